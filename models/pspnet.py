"""PSPNet. H. Zhao et al., "Pyramid Scene Parsing Network", arXiv:1612.01105; facts from the authors' code (hszhao/semseg)."""

from torch import nn

from .backbones import Backbone, is_resnet
from .contexts import create_context
from .layers import Classifier, conv_norm_relu
from .segmenter import Segmenter, auxiliary_head, encoder_levels


def pspnet(
    num_classes,
    in_channels=3,
    backbone="resnet50s",
    output_stride=8,
    aux=False,
    context="ppm",
    channels=512,
    full_rate=True,
    pretrained=False,
    **context_options,
):
    """PSPNet: a ResNet with a deep stem at stride 8, pyramid pooling, a 3x3 convolution. 46,716,373 parameters with 21 classes; with
    backbone="resnet101s" 65,708,501.

    Made for sides 8k + 1: logits are resized with aligned corners.

    Args:
        output_stride: 8 (default), 16 or 32.
        aux: an auxiliary head on the last but one stage (default False), 2,365,205 parameters; the paper weighs its loss by 0.4.
        context: "ppm" (default), "aspp", "pac" or "none".
        channels: width of the 3x3 convolution, default 512.
        full_rate: as in `Backbone`, default True; without effect where the backbone is no ResNet.
        **context_options: of the context: for "ppm" bins ((1, 2, 3, 6)) and channels, each grid's width, a quarter of the backbone's.
    """
    full_rate = full_rate and is_resnet(backbone)
    encoder = Backbone(backbone, output_stride, in_channels, pretrained, encoder_levels(aux), full_rate)
    context = create_context(context, encoder.channels[-1], **context_options)
    head = nn.Sequential(conv_norm_relu(context.channels, channels, 3), nn.Dropout2d(0.1), Classifier(channels, num_classes))
    auxiliary = auxiliary_head(encoder, num_classes, aux, nn.Dropout2d)
    return Segmenter(num_classes, in_channels, encoder, context, head, auxiliary=auxiliary, align_corners=True)
