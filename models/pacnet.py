"""PAC-net.

D. Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", 3.4, Fig. 3. No public code of the authors exists.
What the paper leaves open is decided here: batch normalisation after the sum of the rates (`norm="post"`), output stride 16 in
training, as DeepLab v3 whose protocol the paper follows; no multi-grid.
"""

from .backbones import Backbone
from .contexts import create_context
from .layers import Classifier
from .segmenter import Segmenter, auxiliary_head, encoder_levels


def pacnet(
    num_classes,
    in_channels=3,
    backbone="resnet101",
    output_stride=16,
    aux=False,
    context="pac",
    multi_grid=None,
    full_rate=False,
    pretrained=False,
    **context_options,
):
    """PAC-net: [1x1 | global pooling | PAC], concatenated, one 1x1 to the classes. 48,285,013 parameters with 21 classes.

    Args:
        output_stride: 8, 16 (default) or 32; the rates are not scaled with it.
        aux: an auxiliary head on the last but one stage (default False).
        context: "pac" (default), "aspp", "ppm" or "none".
        multi_grid: factors on the rates of a ResNet's last stage, default None: the paper does not speak of them.
        full_rate: as in `Backbone`.
        **context_options: of the context: for "pac" channels (256), rates ((1, 3, 5, 7, 9)), merge ("sum", or "concat" with a 1x1 squeeze: the
            paper's Table 2), norm ("post", or "per_rate": each branch before the sum).
    """
    encoder = Backbone(backbone, output_stride, in_channels, pretrained, encoder_levels(aux), full_rate, multi_grid)
    context = create_context(context, encoder.channels[-1], **context_options)
    head = Classifier(context.channels, num_classes)
    return Segmenter(num_classes, in_channels, encoder, context, head, auxiliary=auxiliary_head(encoder, num_classes, aux))
