"""PAC-net: a dilated backbone and one pyramid atrous convolution.

Paper: D. Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", section 3.4, Fig. 3.
No public reference code exists. What the paper leaves open is decided here: batch normalisation after the sum of the rates
(`norm="post"`), output stride 16 in training, as DeepLab v3 whose protocol the paper follows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from segops.nn import PyramidAtrousConv2d

from .backbones import Backbone


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation behind global pooling. One value per channel has no statistics to train on: with a batch of one the
    running statistics normalise and stay as they are, and only the affine parameters train."""

    def forward(self, input):
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


class PyramidAtrousHead(nn.Module):
    """Pyramid atrous convolution with batch normalisation and ReLU.

    norm="post" normalises the merged branches; norm="per_rate" each branch with statistics of its own, before the sum.
    merge="concat" is the paper's Table 2: the branches are concatenated and squeezed by a 1x1 convolution.
    """

    def __init__(self, in_channels, channels, rates, merge, norm):
        super().__init__()
        if norm not in ("post", "per_rate"):
            raise ValueError(f"norm must be 'post' or 'per_rate'; got {norm!r}")
        if merge not in ("sum", "concat"):
            raise ValueError(f"merge must be 'sum' or 'concat'; got {merge!r}")
        self.merge, self.branches = merge, len(rates) if norm == "per_rate" else 0
        apart = merge == "concat" or self.branches
        self.pac = PyramidAtrousConv2d(in_channels, channels, rates=rates, merge="concat" if apart else "sum", bias=False)
        self.rate_norm = nn.BatchNorm2d(len(rates) * channels) if self.branches else nn.Identity()
        self.squeeze = nn.Conv2d(len(rates) * channels, channels, 1, bias=False) if merge == "concat" else nn.Identity()
        self.norm = nn.Identity() if self.branches and merge == "sum" else nn.BatchNorm2d(channels)

    def forward(self, features):
        x = self.rate_norm(self.pac(features))
        if self.branches and self.merge == "sum":
            x = x.unflatten(1, (self.branches, -1)).sum(1)
        return F.relu(self.norm(self.squeeze(x)))


class PACNet(nn.Module):
    """[1x1 convolution | global average pooling | PAC], each to `channels` with BN and ReLU, concatenated, one 1x1 to the classes.

    Args:
        num_classes: classes to tell apart.
        backbone: any timm backbone with `features_only`; default "resnet101", the paper's.
        output_stride: input size over feature size; default 16.
        in_channels: channels of the images, default 3.
        channels: width of each of the three branches, default 256.
        rates: rates of the pyramid atrous convolution, default (1, 3, 5, 7, 9).
        merge: "sum" (default) or "concat" with a 1x1 squeeze.
        norm: "post" (default) or "per_rate".
        pretrained: load the backbone's ImageNet weights through timm (default False).

    With the default backbone and 21 classes: 48,285,013 parameters. A batch of one image trains.
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet101",
        output_stride=16,
        in_channels=3,
        channels=256,
        rates=(1, 3, 5, 7, 9),
        merge="sum",
        norm="post",
        pretrained=False,
    ):
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a positive int; got {num_classes!r}")
        self.backbone = Backbone(backbone, output_stride, in_channels, pretrained)
        width = self.backbone.channels
        self.project = nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, channels, 1, bias=False), PooledBatchNorm2d(channels), nn.ReLU()
        )
        self.pac = PyramidAtrousHead(width, channels, rates, merge, norm)
        self.classifier = nn.Conv2d(3 * channels, num_classes, 1)

    def forward(self, images, upsample=False):
        """(N, in_channels, H, W) -> logits (N, num_classes, h, w) at the network's resolution, or (N, num_classes, H, W)."""
        features = self.backbone(images)
        context = self.pool(features).expand(-1, -1, *features.shape[2:])
        logits = self.classifier(torch.cat([self.project(features), context, self.pac(features)], dim=1))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False) if upsample else logits

    @torch.no_grad()
    def predict(self, images):
        """Class indices (N, H, W), int64, at the images' size. Leaves the mode as it is: call eval() before."""
        return self(images, upsample=True).argmax(1)
