"""DeepLab v1 to v3+.

v1: L.-C. Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", arXiv:1412.7062.
v2: "DeepLab: Semantic Image Segmentation with ... Atrous Convolution, and Fully Connected CRFs", arXiv:1606.00915.
v3: "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv:1706.05587.
v3+: "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", arXiv:1802.02611.

v1 and v2 refine the resized logits by a dense CRF, `segops.dense_crf`, with `CRF_SETTINGS`.
"""

import copy

import torch
from torch import nn

from .backbones import Backbone, check_vgg, create_vgg, is_aligned_xception, is_resnet, is_vgg, set_rate
from .contexts import create_context
from .layers import Classifier, conv_norm_relu, he_, normal_, resize, separable_conv
from .model import Output, check_all_positive, check_one_of
from .segmenter import Segmenter, auxiliary_head, encoder_levels


def scaled(rates, reference, output_stride):
    """Rates that are meant for the output stride `reference`, at another one."""
    return tuple(max(rate * reference // output_stride, 1) for rate in rates)


def large_field_of_view(in_channels, channels, num_classes, rate):
    """fc6 as a 3x3 convolution at a large rate, fc7 and the classifier as 1x1. fc6 and fc7 are marked as `of_backbone`: they learn at its rate."""
    fc6 = nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate)
    fc7 = nn.Conv2d(channels, channels, 1)
    fc6.of_backbone = fc7.of_backbone = True
    classifier = normal_(Classifier(channels, num_classes), 0.01)
    return nn.Sequential(fc6, nn.ReLU(), nn.Dropout(0.5), fc7, nn.ReLU(), nn.Dropout(0.5), classifier)


@torch.no_grad()
def subsample_fully_connected(head, vgg):
    """Fills fc6 and fc7 from a classifier's, 7x7x4096: every third position, channels evenly spread (v1, 3.1)."""
    fc6, fc7 = vgg.pre_logits.fc1, vgg.pre_logits.fc2
    kept = torch.linspace(0, fc7.out_channels - 1, head[0].out_channels).long()
    head[0].weight.copy_(fc6.weight[kept][:, :, ::3, ::3])
    head[0].bias.copy_(fc6.bias[kept])
    head[3].weight.copy_(fc7.weight[kept][:, kept])
    head[3].bias.copy_(fc7.bias[kept])


def deeplabv1_largefov(num_classes, in_channels=3, backbone="vgg16", output_stride=8, rate=12, channels=1024, pretrained=False):
    """DeepLab v1, LargeFOV: VGG16 at stride 8, fc6 as 3x3x1024 at rate 12. 20,505,429 parameters with 21 classes.

    The authors' network pools 3x3, the last two times at stride 1, and averages 3x3 before fc6.

    Args:
        backbone: a VGG of timm, default "vgg16".
        output_stride: 8 (default) or 16; the rate is not scaled with it.
        rate: of fc6, default 12.
        channels: width of fc6 and fc7, default 1024. With pretrained=True they are subsampled from the classifier's.
    """
    check_vgg(backbone)
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride must be 8 or 16 for 'deeplabv1_largefov'; got {output_stride!r}")
    encoder = Backbone(backbone, output_stride, in_channels, pretrained)
    head = large_field_of_view(encoder.channels[-1], channels, num_classes, rate)
    if pretrained:
        subsample_fully_connected(head, create_vgg(backbone, in_channels, pretrained))
    return Segmenter(num_classes, in_channels, encoder, nn.AvgPool2d(3, 1, 1), head)


class SummedBranches(nn.Module):
    """DeepLab v2's ASPP: classifiers at several rates, their logits summed (v2, Fig. 7).

    channels=None is the ResNet's: 3x3 convolutions straight to the classes; otherwise fc6, fc7 and a classifier of that width each, the VGG's.
    """

    def __init__(self, in_channels, num_classes, rates, channels=None):
        super().__init__()
        if channels is None:
            branches = [normal_(nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate), 0.01) for rate in rates]
        else:
            branches = [large_field_of_view(in_channels, channels, num_classes, rate) for rate in rates]
        self.branches = nn.ModuleList(branches)

    def forward(self, features):
        return sum(branch(features) for branch in self.branches)


class MultiScaleSegmenter(Segmenter):
    """A Segmenter on the image at several scales, the logits' maximum taken at the first scale's size (v2, 4.1.1).

    Training takes a loss of each: `logits` is the maximum, `aux_logits` a tuple of the scales' own.
    """

    quarters = (3, 2)  # the scales beside 1, in integers: an exported program would keep to one size of image otherwise

    def segment(self, images):
        logits = [super().segment(images).logits]
        for scale in self.quarters:
            smaller = resize(images, [(side * scale + 3) // 4 for side in images.shape[2:]])
            logits.append(super().segment(smaller).logits)
        fused = logits[0]
        for other in logits[1:]:
            fused = torch.maximum(fused, resize(other, fused.shape[2:]))
        return Output(fused, tuple(logits))


def deeplabv2(
    num_classes,
    in_channels=3,
    backbone="resnet101",
    output_stride=8,
    rates=None,
    multi_scale=False,
    full_rate=False,
    pretrained=False,
):
    """DeepLab v2: ResNet-101 at stride 8, four 3x3 classifiers at rates 6, 12, 18, 24, summed.

    44,048,532 parameters with 21 classes; with backbone="vgg16", where each branch has its own fc6 and fc7, 37,877,652.

    Args:
        output_stride: 8 (default), 16 or 32.
        rates: default (6, 12, 18, 24) at stride 8, scaled to other strides.
        multi_scale: run at scales 1, 0.75 and 0.5 and fuse by maximum (default False); `aux_logits` then holds the three scales' logits.
        full_rate: as in `Backbone`. The authors' ResNet (Caffe) has it.
    """
    encoder = Backbone(backbone, output_stride, in_channels, pretrained, full_rate=full_rate)
    rates = scaled((6, 12, 18, 24), 8, output_stride) if rates is None else rates
    check_all_positive("rates", rates)
    channels = 1024 if is_vgg(backbone) else None
    head = SummedBranches(encoder.channels[-1], num_classes, rates, channels)
    if pretrained and channels is not None:
        vgg = create_vgg(backbone, in_channels, pretrained)
        for branch in head.branches:
            subsample_fully_connected(branch, vgg)
    segmenter = MultiScaleSegmenter if multi_scale else Segmenter
    return segmenter(num_classes, in_channels, encoder, nn.Identity(), head)


def deeplabv3(
    num_classes,
    in_channels=3,
    backbone="resnet101",
    output_stride=16,
    aux=False,
    context="aspp",
    head="paper",
    multi_grid=(1, 2, 4),
    full_rate=False,
    pretrained=False,
    **context_options,
):
    """DeepLab v3: a dilated ResNet and ASPP. 58,040,661 parameters with 21 classes.

    "deeplabv3_pac" is this with context="pac" and fuse=True: one pyramid atrous convolution in place of the three atrous branches.

    Args:
        output_stride: 8, 16 (default) or 32.
        aux: an auxiliary head on the last but one stage (default False), 2,365,205 parameters.
        context: "aspp" (default), "pac", "ppm" or "none".
        head: "paper" (default; one 1x1 convolution) or "torchvision" (a 3x3 convolution before it, dropout 0.5; 58,630,997).
        multi_grid: factors on the rates of the last stage's blocks, default (1, 2, 4); None for (1, 1, 1). Without effect where the backbone is
            no ResNet.
        full_rate: as in `Backbone`; the paper's code (TensorFlow) has it.
        **context_options: of the context: for "aspp" channels (256), rates ((6, 12, 18) at stride 16, scaled to others), dropout, separable.
    """
    check_one_of("head", head, ("paper", "torchvision"))
    grid = multi_grid if is_resnet(backbone) else None
    encoder = Backbone(backbone, output_stride, in_channels, pretrained, encoder_levels(aux), full_rate, grid)
    if context == "aspp":
        defaults = {"rates": scaled((6, 12, 18), 16, output_stride), "dropout": 0.1 if head == "paper" else 0.5}
        context_options = defaults | context_options
    context = create_context(context, encoder.channels[-1], **context_options)
    classifier = Classifier(context.channels, num_classes)
    if head == "torchvision":
        classifier = nn.Sequential(conv_norm_relu(context.channels, context.channels, 3), classifier)
    return Segmenter(
        num_classes, in_channels, encoder, context, classifier, auxiliary=auxiliary_head(encoder, num_classes, aux)
    )


def cascade(encoder, output_stride, multi_grid, pretrained):
    """Blocks 5 to 7: copies of a ResNet's last stage at twice the rate each (v3, Fig. 3), pretrained weights included. The stage's first block, whose
    input is narrower, is replaced by its second."""
    last = encoder.features.layer4
    if len(last) == 1:
        raise ValueError("backbone must be a ResNet with two or more blocks in its last stage: the cascade repeats them")
    stages = []
    for stride in (64, 128, 256):
        stage = nn.Sequential(*(copy.deepcopy(last[max(index, 1)]) for index in range(len(last))))
        for index, block in enumerate(stage):
            rate = stride // output_stride * multi_grid[index % len(multi_grid)]
            set_rate(block, rate, rate)
        stages.append(stage)
    blocks = nn.Sequential(*stages)
    return blocks if pretrained else blocks.apply(he_)


def deeplabv3_cascaded(
    num_classes,
    in_channels=3,
    backbone="resnet101",
    output_stride=16,
    aux=False,
    multi_grid=(1, 2, 1),
    full_rate=False,
    pretrained=False,
):
    """DeepLab v3 with cascaded modules: ResNet's last stage three times more, rates 4, 8, 16 at stride 16. 82,706,517 parameters with 21 classes.

    Args:
        backbone: a ResNet with two or more blocks in its last stage, default "resnet101".
        output_stride: 8, 16 (default) or 32; the rates scale with it.
        aux: an auxiliary head on layer3 (default False).
        multi_grid: factors on the rates of the blocks of stages 4 to 7, default (1, 2, 1); None for (1, 1, 1).
        full_rate: as in `Backbone`, of stages 3 and 4; 5 to 7 always have their full rate.
    """
    multi_grid = (1,) if multi_grid is None else multi_grid
    encoder = Backbone(backbone, output_stride, in_channels, pretrained, encoder_levels(aux), full_rate, multi_grid)
    return Segmenter(
        num_classes,
        in_channels,
        encoder,
        cascade(encoder, output_stride, multi_grid, pretrained),
        normal_(Classifier(encoder.channels[-1], num_classes), 0.01),
        auxiliary=auxiliary_head(encoder, num_classes, aux),
    )


class LowLevelDecoder(nn.Module):
    """DeepLab v3+'s decoder: the context resized to a low-level map, concatenated with 48 channels of it, two separable 3x3 (v3+, Fig. 2)."""

    def __init__(self, in_channels, low_channels, channels=256, reduced=48):
        super().__init__()
        self.reduce = conv_norm_relu(low_channels, reduced)
        self.refine = nn.Sequential(separable_conv(in_channels + reduced, channels), separable_conv(channels, channels))

    def forward(self, features, low):
        return self.refine(torch.cat([resize(features, low.shape[2:]), self.reduce(low)], dim=1))


def deeplabv3plus(
    num_classes,
    in_channels=3,
    backbone="xception65",
    output_stride=16,
    aux=False,
    context="aspp",
    channels=256,
    pretrained=False,
    **context_options,
):
    """DeepLab v3+: Aligned Xception-65, separable ASPP, a decoder at stride 4. 41,055,413 parameters with 21 classes.

    The low-level map of an Xception is the second separable convolution of its block 2, before the ReLU; of others, the last map at stride 4.

    Args:
        output_stride: 8, 16 (default) or 32.
        aux: an auxiliary head on the last but one stage (default False).
        context: "aspp" (default), "pac", "ppm" or "none".
        channels: width of ASPP or PAC and of the decoder, default 256.
        **context_options: of the context: for "aspp" rates ((6, 12, 18) at stride 16, scaled to others), dropout (0.1), separable (True; False
            makes it 53,570,741 parameters).
    """
    encoder = Backbone(backbone, output_stride, in_channels, pretrained, encoder_levels(aux, low_level=True))
    if is_aligned_xception(backbone):
        encoder.tap_before_relu()
    if context == "aspp":
        context_options = {"rates": scaled((6, 12, 18), 16, output_stride), "separable": True} | context_options
    if context in ("aspp", "pac"):
        context_options |= {"channels": channels}
    context = create_context(context, encoder.channels[-1], **context_options)
    return Segmenter(
        num_classes,
        in_channels,
        encoder,
        context,
        normal_(Classifier(channels, num_classes), 0.01),
        decoder=LowLevelDecoder(context.channels, encoder.channels[0], channels),
        auxiliary=auxiliary_head(encoder, num_classes, aux),
    )


def crf_settings(spatial_weight, spatial_sigma, bilateral_weight, bilateral_sigma, normalization):
    """Arguments of `segops.dense_crf`: ten iterations in all of the papers."""
    return {
        "iterations": 10,
        "spatial_weight": spatial_weight,
        "spatial_sigma": spatial_sigma,
        "bilateral_weight": bilateral_weight,
        "bilateral_sigma": bilateral_sigma,
        "normalization": normalization,
    }


# The published dense CRFs, by the system that they belong to; "coco" has been trained on MS-COCO
# too. v1's are the authors' own, as are v2's for VGG16; ResNet-101's are kazuto1011's, of
# deeplab-pytorch. "after" is Krähenbühl and Koltun's code of 2011, "symmetric" that of 2013.
CRF_SETTINGS = {
    "deeplabv1_largefov": crf_settings(3.0, 3.0, 4.0, (49.0, 5.0), "after"),
    "deeplabv1_coco": crf_settings(3.0, 3.0, 5.0, (67.0, 3.0), "after"),
    "deeplabv2_vgg16": crf_settings(2.0, 2.0, 4.0, (65.0, 3.0), "symmetric"),
    "deeplabv2_resnet101": crf_settings(3.0, 1.0, 4.0, (67.0, 3.0), "symmetric"),
}
