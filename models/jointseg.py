"""JointSeg: segmentation and classification of images from one encoder, with partial-attention gating.

M. Haloi, "Rethinking Convolutional Semantic Segmentation Learning", arXiv:1710.07991. No code exists, and the paper gives no widths. Decided here:
levels of 64, 128, 256 and 512 channels, two blocks each, strided 3x3 convolutions between them; inside a block four branches of a
quarter of its width; the gate concatenates; the classifier has three factorised blocks.
"""

from itertools import pairwise

import torch
from torch import nn

from segops.nn import PartialAttentionGate

from .layers import BatchNorm2d, Classifier, conv_norm_relu
from .model import Output, SegmentationModel, check_all_positive, check_positive, crop, pad_to_multiple


class ResidualInception(nn.Module):
    """1x1 | 1x1, 3x3 | 1x1, 5x5 | 3x3, max pooling; concatenated, a 3x3 convolution against aliasing, plus a 1x1 of the input (Fig. 2).

    factorised=True is Fig. 3: every k x k convolution becomes 1 x k and k x 1.
    """

    def __init__(self, in_channels, channels, factorised=False):
        super().__init__()
        width = max(channels // 4, 1)

        def conv(before, after, size):
            if not factorised:
                return conv_norm_relu(before, after, size)
            return nn.Sequential(conv_norm_relu(before, after, (1, size)), conv_norm_relu(after, after, (size, 1)))

        self.branches = nn.ModuleList(
            [
                conv_norm_relu(in_channels, width),
                nn.Sequential(conv_norm_relu(in_channels, width), conv(width, width, 3)),
                nn.Sequential(conv_norm_relu(in_channels, width), conv(width, width, 5)),
                nn.Sequential(conv(in_channels, width, 3), nn.MaxPool2d(3, 1, 1)),
            ]
        )
        self.merge = conv(4 * width, channels, 3)
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), BatchNorm2d(channels))

    def forward(self, x):
        merged = self.merge(torch.cat([branch(x) for branch in self.branches], dim=1))
        return torch.relu(merged + self.shortcut(x))


def inception_level(in_channels, channels, blocks):
    return nn.Sequential(*(ResidualInception(channels if index else in_channels, channels) for index in range(blocks)))


class JointSeg(SegmentationModel):
    """A strided encoder of residual-inception levels; a decoder of 2x2 transposed convolutions, each followed by the gate over all encoder
    levels (`segops.partial_attention_gate`) and a 3x3 convolution; a classifier of the deepest level. Logits have the images' size;
    `class_logits` are the classifier's.

    Attributes `encoder`, `decoder` and `classifier` are the paper's M, S and C: the shared parameters and each agent's own.

    Args:
        image_classes: classes that the classifier tells apart, default `num_classes`.
        widths: channels of the levels, default (64, 128, 256, 512).
        blocks: residual-inception blocks a level, default 2.
    """

    def __init__(self, num_classes, in_channels=3, image_classes=None, widths=(64, 128, 256, 512), blocks=2):
        super().__init__(num_classes, in_channels)
        self.image_classes = num_classes if image_classes is None else image_classes
        check_positive("image_classes", self.image_classes)
        check_all_positive("widths", widths)
        check_positive("blocks", blocks)
        self.multiple = 2 ** (len(widths) - 1)
        encoder = [inception_level(in_channels, widths[0], blocks)]
        for before, width in pairwise(widths):
            encoder.append(nn.Sequential(conv_norm_relu(before, width, 3, stride=2), inception_level(width, width, blocks)))
        self.encoder = nn.ModuleList(encoder)
        self.decoder = Decoder(widths, num_classes)
        self.classifier = nn.Sequential(
            *(ResidualInception(widths[-1], widths[-1], factorised=True) for _ in range(3)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], self.image_classes),
        )

    def encode(self, images):
        """The last map of every level."""
        maps = []
        for stage in self.encoder:
            maps.append(stage(maps[-1] if maps else images))
        return maps

    def segment(self, images):
        maps = self.encode(images)
        return Output(self.decoder(maps), class_logits=self.classifier(maps[-1]))

    def segment_logits(self, images):
        """S(M(images)) of Eq. 1: `logits` alone."""
        maps = self.encode(pad_to_multiple(images, self.multiple))
        return crop(self.decoder(maps), 0, images.shape[2:])

    def class_logits(self, images):
        """C(M(images)) of Eq. 1: `class_logits` alone."""
        return self.classifier(self.encode(pad_to_multiple(images, self.multiple))[-1])


class Decoder(nn.Module):
    """Transposed convolution, gate, 3x3 convolution for each level above the deepest; 1x1 to the classes."""

    def __init__(self, widths, num_classes):
        super().__init__()
        self.gate = PartialAttentionGate()
        self.upsample, self.fuse = nn.ModuleList(), nn.ModuleList()
        for index in range(len(widths) - 2, -1, -1):
            self.upsample.append(nn.ConvTranspose2d(widths[index + 1], widths[index], 2, stride=2))
            # The gate lets through the levels of this size and above.
            self.fuse.append(conv_norm_relu(widths[index] + sum(widths[: index + 1]), widths[index], 3))
        self.head = Classifier(widths[0], num_classes)

    def forward(self, maps):
        x = maps[-1]
        for upsample, fuse in zip(self.upsample, self.fuse, strict=True):
            x = fuse(self.gate(upsample(x), maps))
        return self.head(x)
