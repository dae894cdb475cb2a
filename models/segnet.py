"""SegNet, SegNet-basic and SegNet-ASPP.

V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
arXiv:1511.00561; facts from the authors' code (alexgkendall/SegNet-Tutorial). T. Fischer, M. Malhotra, "Neural Networks final project", 2021.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from segops import max_pool2d_with_offsets, max_unpool2d_with_offsets

from .backbones import create_vgg_features, vgg_stages
from .contexts import AtrousSpatialPyramidPooling
from .layers import BatchNorm2d, Classifier, he_
from .model import Output, SegmentationModel


def conv_norm(in_channels, channels, kernel_size=3):
    """Convolution with bias and batch normalisation, as Caffe's SegNet has them."""
    return [nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2), BatchNorm2d(channels)]


class Unpooling(SegmentationModel):
    """An encoder of stages with 2x2 pooling between them and a decoder of mirrored stages, which unpools to where each maximum was."""

    def __init__(self, num_classes, in_channels, encoder, decoder, head):
        super().__init__(num_classes, in_channels)
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.head = head

    def segment(self, images):
        x, places = self.normalise(images), []
        for stage in self.encoder:
            x = stage(x)
            pooled, offsets = max_pool2d_with_offsets(x, 2)
            places.append((offsets, x.shape))
            x = pooled
        for stage in self.decoder:
            offsets, shape = places.pop()
            x = stage(max_unpool2d_with_offsets(x, offsets, 2, shape))
        return Output(self.head(x))

    def normalise(self, images):
        return images


def mirrored(stages):
    """The decoder of a VGG encoder: every convolution back from its output's width to its input's, but the first of all, whose place a head
    takes."""
    decoder = []
    for stage in reversed(stages):
        convolutions = [module for module in reversed(stage) if isinstance(module, nn.Conv2d)]
        if stage is stages[0]:
            convolutions.pop()
        decoder.append(
            nn.Sequential(*(layer for c in convolutions for layer in (*conv_norm(c.out_channels, c.in_channels), nn.ReLU())))
        )
    return decoder


def vgg_unpooling(num_classes, in_channels, backbone, pretrained, make_head):
    stages = vgg_stages(create_vgg_features(backbone, in_channels, pretrained))
    width = stages[0][0].out_channels
    decoder, head = mirrored(stages), make_head(width)
    for module in (*decoder, head):
        module.apply(he_)
    return Unpooling(num_classes, in_channels, [stage[:-1] for stage in stages], decoder, head)


def segnet(num_classes, in_channels=3, backbone="vgg16_bn", pretrained=False):
    """SegNet: VGG16-BN without its fully connected layers, mirrored, unpooling by the places of the maxima. Logits have the images' size.

    29,455,125 parameters with 21 classes: 13 + 13 convolutions, all with bias, batch normalisation and ReLU behind all but the last.

    Args:
        backbone: a VGG of timm, default "vgg16_bn".
    """
    return vgg_unpooling(
        num_classes, in_channels, backbone, pretrained, lambda width: nn.Conv2d(width, num_classes, 3, padding=1)
    )


def segnet_aspp(
    num_classes, in_channels=3, backbone="vgg16_bn", channels=256, rates=(6, 12, 18), dropout=0.1, pretrained=False
):
    """SegNet without its last convolution, and DeepLab v3's ASPP on its 64 channels at the images' size. 30,257,634 parameters with 34 classes.

    The report's "transposed convolutions" of stride 1 are convolutions with mirrored filters, and are written as such.

    Args:
        backbone: a VGG of timm, default "vgg16_bn".
        channels: width of ASPP, default 256.
        rates: of ASPP, default (6, 12, 18).
        dropout: behind ASPP, default 0.1; the report does not say.
    """

    def head(width):
        return nn.Sequential(AtrousSpatialPyramidPooling(width, channels, rates, dropout), Classifier(channels, num_classes))

    return vgg_unpooling(num_classes, in_channels, backbone, pretrained, head)


class SegNetBasic(Unpooling):
    """SegNet-basic: four 7x7 convolutions down, four up, local response normalisation of the images, no ReLU in the decoder. 1,416,587
    parameters with 11 classes. Logits have the images' size.

    Args:
        channels: width, default 64.
    """

    def __init__(self, num_classes, in_channels=3, channels=64):
        widths = [in_channels, channels, channels, channels, channels]
        encoder = [nn.Sequential(*conv_norm(before, after, 7), nn.ReLU()) for before, after in pairwise(widths)]
        decoder = [nn.Sequential(*conv_norm(channels, channels, 7)) for _ in encoder]
        super().__init__(num_classes, in_channels, encoder, decoder, Classifier(channels, num_classes))
        self.apply(he_)

    def normalise(self, images):
        # In float32: on the CPU it has no half precision.
        return F.local_response_norm(images.float(), size=5, alpha=1e-4, beta=0.75).to(images.dtype)
