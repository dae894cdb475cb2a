"""Encoder, context, decoder, head: the form of the networks on dilated backbones."""

from torch import nn

from .layers import Classifier, conv_norm_relu
from .model import Output, SegmentationModel


class Segmenter(SegmentationModel):
    """encoder -> context -> decoder -> head, each a module of its own.

    Args:
        num_classes, in_channels: as in `create_model`.
        encoder: images -> list of maps, the deepest last; with a decoder the first is its low-level map, with an auxiliary head the last but one
            is that head's.
        context: the deepest map -> a map of the same size.
        head: -> logits.
        decoder: (context's map, low-level map) -> map; default None.
        auxiliary: a head on the last but one map; default None. It runs in every mode.
        align_corners: of predict's resizing, default False.
    """

    def __init__(self, num_classes, in_channels, encoder, context, head, decoder=None, auxiliary=None, align_corners=False):
        super().__init__(num_classes, in_channels)
        self.encoder, self.context, self.decoder, self.head, self.auxiliary = encoder, context, decoder, head, auxiliary
        self.align_corners = align_corners

    def segment(self, images):
        maps = self.encoder(images)
        features = self.context(maps[-1])
        if self.decoder is not None:
            features = self.decoder(features, maps[0])
        aux = self.auxiliary(maps[-2]) if self.auxiliary is not None else None
        return Output(self.head(features), aux)


def encoder_levels(aux, low_level=False):
    """The levels that a Segmenter's encoder must give."""
    return (*([-4] if low_level else []), *([-2] if aux else []), -1)


def fcn_head(in_channels, num_classes, dropout=nn.Dropout):
    """A 3x3 convolution to a quarter of the width and a classifier: torchvision's FCN head, and the auxiliary head of PSPNet."""
    channels = max(in_channels // 4, 1)
    return nn.Sequential(conv_norm_relu(in_channels, channels, 3), dropout(0.1), Classifier(channels, num_classes))


def auxiliary_head(encoder, num_classes, aux, dropout=nn.Dropout):
    return fcn_head(encoder.channels[-2], num_classes, dropout) if aux else None
