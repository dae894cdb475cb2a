"""U-Net, on its own encoder or a timm backbone, and its relatives with inception and recurrent blocks.

O. Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597. M. Z. Alom et al., "Recurrent Residual
Convolutional Neural Network based on U-Net (R2U-Net)", arXiv:1802.06955; facts from LeeJunHyun/Image_Segmentation. Inception blocks: M. Haloi,
arXiv:1710.07991.
"""

import torch
from torch import nn

from .backbones import Backbone, pyramid
from .jointseg import inception_level
from .layers import BatchNorm2d, Classifier, conv_norm_relu, he_
from .model import Output, SegmentationModel, check_one_of, check_positive, crop, mirror


class Contracting(nn.Module):
    """Blocks with 2x2 max pooling between them; returns the map of every block."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images):
        maps = []
        for block in self.blocks:
            maps.append(block(self.pool(maps[-1]) if maps else images))
        return maps


class UNet(SegmentationModel):
    """An encoder's maps, joined one by one, from the deepest, with the upsampled decoder. Logits have the images' size.

    Args:
        encoder: images -> maps, each of half the size of the one before.
        upsample: a module for each step from the deepest to the images' size; steps beyond the encoder's maps join nothing.
        blocks: as many, behind the joining.
        head: -> logits.
        merge: "concat" or "sum".
        multiple: sides of images are padded to this multiple.
    """

    def __init__(self, num_classes, in_channels, encoder, upsample, blocks, head, merge, multiple):
        super().__init__(num_classes, in_channels)
        self.encoder, self.upsample, self.blocks, self.head = encoder, nn.ModuleList(upsample), nn.ModuleList(blocks), head
        self.merge, self.multiple = merge, multiple

    def segment(self, images):
        skips = list(self.encoder(images))
        x = skips.pop()
        for upsample, block in zip(self.upsample, self.blocks, strict=True):
            x = upsample(x)
            x = block(self.join(skips.pop(), x) if skips else x)
        return Output(self.head(x))

    def join(self, skip, x):
        margin = (skip.shape[2] - x.shape[2]) // 2  # convolutions without padding leave x smaller
        skip = crop(skip, margin, x.shape[2:]) if margin else skip
        return torch.cat([skip, x], dim=1) if self.merge == "concat" else skip + x


class ValidUNet(UNet):
    """U-Net without padding: images are mirrored at their borders by what its convolutions take, 92 pixels a side (Fig. 2)."""

    def segment(self, images):
        # Sides 16 b + 124 divide at every pooling, and 184 less is what comes out.
        height, width = (16 * ((side + 75) // 16) + 124 for side in images.shape[2:])
        padded = mirror(images, 92, height - 92 - images.shape[2], 92, width - 92 - images.shape[3])
        output = super().segment(padded)
        return Output(crop(output.logits, 0, images.shape[2:]))


def up_conv(in_channels, channels):
    return nn.ConvTranspose2d(in_channels, channels, 2, stride=2)


def symmetric(model, num_classes, in_channels, widths, block, upsample, merge, multiple, bottom=None):
    """A U-Net of own blocks: `block(in_channels, channels)` on every level, `upsample(in_channels, channels)` between levels."""
    check_one_of("merge", merge, ("concat", "sum"))
    down = [block(before, width) for before, width in zip((in_channels, *widths), widths, strict=False)]
    if bottom is not None:
        down[-1] = nn.Sequential(down[-1], bottom)
    steps = list(zip(widths[::-1], widths[-2::-1], strict=False))
    ups = [upsample(deep, width) for deep, width in steps]
    blocks = [block(2 * width if merge == "concat" else width, width) for _, width in steps]
    head = Classifier(widths[0], num_classes)
    return model(num_classes, in_channels, Contracting(down), ups, blocks, head, merge, multiple)


def widths_of(channels):
    check_positive("channels", channels)
    return tuple(channels * factor for factor in (1, 2, 4, 8, 16))


def unet(num_classes, in_channels=3, backbone=None, channels=64, merge="concat", pretrained=False):
    """U-Net: 23 convolutions without padding or normalisation, skips cropped and concatenated, dropout at the bottom, He initialisation.

    31,033,045 parameters with 21 classes; 31,030,658 with one input channel and 2 classes. Images are mirrored at their borders, so that logits
    have their size: the network sees 16 b + 124 pixels a side and gives 184 less, 572 -> 388 as in the paper.

    Args:
        backbone: None (default) for the paper's encoder, or any timm backbone; then with padding and batch normalisation.
        channels: width of the finest level, default 64; half that at stride 1 behind a backbone that begins at stride 2.
        merge: "concat" (default) or "sum".
        pretrained: load the backbone's weights through timm (default False).
    """
    check_one_of("merge", merge, ("concat", "sum"))
    if backbone is not None:
        return unet_on(backbone, num_classes, in_channels, channels, merge, pretrained)
    if pretrained:
        raise ValueError("pretrained must be False without a backbone: no weights of the paper's encoder are published")

    def block(before, width):
        return nn.Sequential(nn.Conv2d(before, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())

    model = symmetric(
        ValidUNet, num_classes, in_channels, widths_of(channels), block, up_conv, merge, 1, bottom=nn.Dropout(0.5)
    )
    return model.apply(he_)


def unet_on(backbone, num_classes, in_channels, channels, merge, pretrained):
    """U-Net's decoder on all maps of a timm backbone."""
    encoder = Backbone(backbone, 32, in_channels, pretrained, pyramid(backbone))
    ups, blocks, deep, stride = [], [], encoder.channels[-1], encoder.strides[-1]
    skips = dict(zip(encoder.strides[:-1], encoder.channels[:-1], strict=True))
    while stride > 1:
        stride //= 2
        width, skip = max(channels * stride // 2, 1), skips.get(stride, 0)
        up = skip if merge == "sum" and skip else width
        ups.append(up_conv(deep, up))
        before = up + skip if merge == "concat" else up
        blocks.append(nn.Sequential(conv_norm_relu(before, width, 3), conv_norm_relu(width, width, 3)))
        deep = width
    return UNet(num_classes, in_channels, encoder, ups, blocks, Classifier(deep, num_classes), merge, encoder.strides[-1])


def unet_inception(num_classes, in_channels=3, channels=64, blocks=1, merge="concat"):
    """U-Net with residual-inception blocks in place of its convolutions: the JointSeg paper's "UNet" (Tables I, II). Decided here: the block of
    JointSeg, U-Net's widths, zero padding.

    Args:
        channels: width of the finest level, default 64.
        blocks: a level, default 1.
        merge: "concat" (default) or "sum".
    """

    def block(before, width):
        return inception_level(before, width, blocks)

    return symmetric(UNet, num_classes, in_channels, widths_of(channels), block, up_conv, merge, 16)


class RecurrentConv(nn.Module):
    """One convolution, batch normalisation and ReLU, applied t + 1 times: to x, then t times to x plus the last result. The steps
    share weights and statistics."""

    def __init__(self, channels, t):
        super().__init__()
        self.t, self.conv = t, biased_conv(channels, channels)

    def forward(self, x):
        result = self.conv(x)
        for _ in range(self.t):
            result = self.conv(x + result)
        return result


def biased_conv(in_channels, channels):
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), BatchNorm2d(channels), nn.ReLU())


class RecurrentBlock(nn.Module):
    """A 1x1 convolution and two recurrent convolutions; with `residual` their result is added to that of the 1x1."""

    def __init__(self, in_channels, channels, t, residual):
        super().__init__()
        self.residual = residual
        self.project = nn.Conv2d(in_channels, channels, 1)
        self.recurrent = nn.Sequential(RecurrentConv(channels, t), RecurrentConv(channels, t))

    def forward(self, x):
        x = self.project(x)
        return x + self.recurrent(x) if self.residual else self.recurrent(x)


def recurrent_unet(num_classes, in_channels, channels, t, merge, residual):
    if not isinstance(t, int) or isinstance(t, bool) or t < 0:
        raise ValueError(f"t must be an int >= 0; got {t!r}")

    def block(before, width):
        return RecurrentBlock(before, width, t, residual)

    def upsample(before, width):
        return nn.Sequential(nn.Upsample(scale_factor=2), biased_conv(before, width))

    return symmetric(UNet, num_classes, in_channels, widths_of(channels), block, upsample, merge, 16)


def r2unet(num_classes, in_channels=3, channels=64, t=2, merge="concat"):
    """R2U-Net: U-Net of recurrent residual blocks, upsampling by nearest neighbours and a 3x3 convolution. 39,091,393 parameters with one class,
    39,093,538 with 34, whatever t.

    Args:
        channels: width of the finest level, default 64.
        t: recurrent steps; every convolution is applied t + 1 times. Default 2.
        merge: "concat" (default) or "sum": of the skips.
    """
    return recurrent_unet(num_classes, in_channels, channels, t, merge, residual=True)


def runet(num_classes, in_channels=3, channels=64, t=2, merge="concat"):
    """RU-Net: R2U-Net without the residual connections of its blocks. Options as for "r2unet"."""
    return recurrent_unet(num_classes, in_channels, channels, t, merge, residual=False)
