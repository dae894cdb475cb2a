"""RefineNet. G. Lin et al., "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic Segmentation", arXiv:1611.06612; facts from
guosheng/refinenet and DrSleep/refinenet-pytorch."""

import torch
import torch.nn.functional as F
from torch import nn

from .backbones import LEVELS, Backbone
from .layers import resize
from .model import Output, SegmentationModel, check_positive


def conv3x3(in_channels, channels, bias=False):
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)


class ResidualConvUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), a bias on the first convolution alone."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = conv3x3(channels, channels, bias=True), conv3x3(channels, channels)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(torch.relu(x))))


class ChainedResidualPooling(nn.Module):
    """A chain of 5x5 max pooling at stride 1 and 3x3 convolution, each link's result added."""

    def __init__(self, channels, links):
        super().__init__()
        self.convolutions = nn.ModuleList(conv3x3(channels, channels) for _ in range(links))

    def forward(self, x):
        link = x
        for convolution in self.convolutions:
            link = convolution(F.max_pool2d(link, 5, 1, 2))
            x = x + link
        return x


class RefineBlock(nn.Module):
    """Adapts an encoder map, fuses it with the coarser block's result, pools in a chain, refines (Fig. 3).

    fuses: whether there is a coarser block. out_channels: width that the finer block takes, None for the last block.
    """

    def __init__(self, in_channels, channels, out_channels, fuses, crp_blocks):
        super().__init__()
        self.reduce = conv3x3(in_channels, channels)
        self.adapt = nn.Sequential(ResidualConvUnit(channels), ResidualConvUnit(channels))
        self.fuse = conv3x3(channels, channels) if fuses else nn.Identity()
        self.pool = ChainedResidualPooling(channels, crp_blocks)
        self.refine = nn.Sequential(*(ResidualConvUnit(channels) for _ in range(3)))
        self.narrow = conv3x3(channels, out_channels) if out_channels else nn.Identity()

    def forward(self, features, coarser=None):
        x = self.fuse(self.adapt(self.reduce(features)))
        if coarser is not None:
            x = x + resize(coarser, x.shape[2:], align_corners=True)
        return self.narrow(self.refine(self.pool(torch.relu(x))))


class RefineNet(SegmentationModel):
    """A cascade of four RefineNet blocks over a ResNet's maps at strides 32, 16, 8, 4. Logits are at stride 4.

    118,052,437 parameters with 21 classes; with the paper's crp_blocks=2 109,794,901. The released networks scale images by 1.2 first; this
    one does not.

    Args:
        backbone: any timm backbone with maps at these strides, default "resnet101".
        channels: width of the blocks, default 256; twice that in the coarsest.
        crp_blocks: links of the chained residual pooling, default 4 as released.
        dropout: of the two coarsest maps and before the classifier, default 0.5.
        pretrained: load the backbone's weights through timm (default False).
    """

    def __init__(
        self,
        num_classes,
        in_channels=3,
        backbone="resnet101",
        channels=256,
        crp_blocks=4,
        dropout=0.5,
        pretrained=False,
    ):
        super().__init__(num_classes, in_channels)
        check_positive("channels", channels)
        check_positive("crp_blocks", crp_blocks)
        self.encoder = Backbone(backbone, 32, in_channels, pretrained, LEVELS)
        stride4, stride8, stride16, stride32 = self.encoder.channels
        self.blocks = nn.ModuleList(
            [
                RefineBlock(stride32, 2 * channels, channels, False, crp_blocks),
                RefineBlock(stride16, channels, channels, True, crp_blocks),
                RefineBlock(stride8, channels, channels, True, crp_blocks),
                RefineBlock(stride4, channels, None, True, crp_blocks),
            ]
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(channels, num_classes, 3, padding=1)

    def segment(self, images):
        stride4, stride8, stride16, stride32 = self.encoder(images)
        x = None
        for block, features in zip(
            self.blocks, (self.dropout(stride32), self.dropout(stride16), stride8, stride4), strict=True
        ):
            x = block(features, x)
        return Output(self.head(self.dropout(x)))
