"""Discriminators for adversarial training: is this class map of this image a label or a prediction?

K. Lalwani, "DeepLab with adversarial loss for semi-supervised semantic segmentation of Medical Images"; W.-C. Hung et al., "Adversarial Learning for
Semi-Supervised Semantic Segmentation", arXiv:1802.07934 (hfslyc/AdvSemiSeg); P. Isola et al., "Image-to-Image Translation with Conditional Adversarial
Networks", arXiv:1611.07004 (pix2pix).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .layers import BatchNorm2d, normal_, resize
from .model import Model, Output, check_images, check_one_of, crop, pad_to_multiple


class Discriminator(Model):
    """Base of the discriminators: called (images, class_map), both concatenated; logits have one channel, positive for labels."""

    def forward(self, images, class_map):
        """images (N, in_channels, H, W); class_map: probabilities (N, num_classes, H, W), or labels (N, H, W) of an integer dtype, where what
        is no class, as 255, becomes zero in every channel -> Output with logits (N, 1, h, w).

        Raises:
            ValueError: other shapes. TypeError: integer images.
        """
        check_images(images, self.in_channels)
        if not isinstance(class_map, torch.Tensor):
            raise TypeError(f"class_map must be a torch.Tensor; got {type(class_map).__name__}")
        if not class_map.is_floating_point() and class_map.ndim == 3:
            classes = torch.arange(self.num_classes, device=class_map.device)
            class_map = (class_map[:, None] == classes[:, None, None]).to(images.dtype)
        if class_map.ndim == 3:
            raise TypeError(f"class_map (N, H, W) must be labels of an integer dtype; got {class_map.dtype}")
        check_images(class_map, self.num_classes, "class_map")
        if class_map.shape[0] != images.shape[0] or class_map.shape[2:] != images.shape[2:]:
            expected = (images.shape[0], self.num_classes, *images.shape[2:])
            raise ValueError(f"class_map must be {expected}, as the images are; got {tuple(class_map.shape)}")
        return self.judge(images, class_map.to(images.dtype))


class FCNDiscriminator(Discriminator):
    """A fully convolutional discriminator: a logit for every pixel.

    Strided 4x4 convolutions of 64, 128, 256, 512 channels and LeakyReLU, no normalisation. The paper's decoder (skip connections) is not published:
    decided here as 4x4 transposed convolutions back through the same widths, each concatenated with the encoder's map of its size.

    Args:
        channels: width of the first convolution, default 64.
        decoder: "skip" (default), or "bilinear": one more strided convolution to a single channel, resized: AdvSemiSeg's network.
        conditioned: on the image (default True). AdvSemiSeg's sees the class map alone: with decoder="bilinear" and 21 classes 2,783,169 parameters.
    """

    def __init__(self, num_classes, in_channels=3, channels=64, decoder="skip", conditioned=True):
        super().__init__(num_classes, in_channels)
        check_one_of("decoder", decoder, ("skip", "bilinear"))
        self.conditioned = conditioned
        widths = [channels, 2 * channels, 4 * channels, 8 * channels]
        first = num_classes + (in_channels if conditioned else 0)
        self.down = nn.ModuleList(
            nn.Conv2d(before, width, 4, 2, 1) for before, width in zip([first, *widths], widths, strict=False)
        )
        if decoder == "bilinear":
            self.up, self.head = None, nn.Conv2d(widths[-1], 1, 4, 2, 1)
            self.multiple = 32
        else:
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(before, width, 4, 2, 1)
                for before, width in ((widths[3], widths[2]), (2 * widths[2], widths[1]), (2 * widths[1], widths[0]))
            )
            self.head = nn.ConvTranspose2d(2 * widths[0], 1, 4, 2, 1)
            self.multiple = 16

    def judge(self, images, class_map):
        x = pad_to_multiple(torch.cat([images, class_map], dim=1) if self.conditioned else class_map, self.multiple)
        size, maps = x.shape[2:], []
        for convolution in self.down:
            x = F.leaky_relu(convolution(x), 0.2)
            maps.append(x)
        if self.up is None:
            x = resize(self.head(x), size)
        else:
            maps.pop()
            for convolution in self.up:
                x = torch.cat([F.leaky_relu(convolution(x), 0.2), maps.pop()], dim=1)
            x = self.head(x)
        return Output(crop(x, 0, images.shape[2:]))


STRIDED = {16: 1, 70: 3, 286: 5}  # receptive field -> strided convolutions


class PatchGAN(Discriminator):
    """pix2pix's discriminator: a logit for every patch. 4x4 convolutions, batch normalisation on all but the first and last, LeakyReLU.

    With 3 + 3 channels and the default field 2,768,705 parameters. Images smaller than one logit needs are padded with zeros.

    Args:
        receptive_field: 16, 70 (default) or 286 pixels: 1, 3 or 5 strided convolutions. (256, as the paper says, is none of this network's.)
        channels: width of the first convolution, default 64.
    """

    def __init__(self, num_classes, in_channels=3, receptive_field=70, channels=64):
        super().__init__(num_classes, in_channels)
        if receptive_field not in tuple(STRIDED):
            raise ValueError(f"receptive_field must be 16, 70 or 286; got {receptive_field!r}")
        count = STRIDED[receptive_field]
        self.least = 3 * 2**count
        layers = [normal_(nn.Conv2d(num_classes + in_channels, channels, 4, 2, 1), 0.02), nn.LeakyReLU(0.2)]
        before = channels
        for index in range(1, count + 1):
            width, stride = channels * min(2**index, 8), 2 if index < count else 1
            norm = BatchNorm2d(width)
            nn.init.normal_(norm.weight, 1.0, 0.02)
            layers += [normal_(nn.Conv2d(before, width, 4, stride, 1, bias=False), 0.02), norm, nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers, normal_(nn.Conv2d(before, 1, 4, 1, 1), 0.02))

    def judge(self, images, class_map):
        # Not max(): torch.export keeps one as an expression, in which it no longer sees that large images stay as they are.
        missing = [self.least - side if side < self.least else 0 for side in images.shape[2:]]
        return Output(self.layers(F.pad(torch.cat([images, class_map], dim=1), (0, missing[1], 0, missing[0]))))
