"""Contexts: what sits between a backbone and a head, all interchangeable.

Each maps (N, in_channels, h, w) to (N, context.channels, h, w). CONTEXTS gives them by name to models that take `context=`.
"""

import functools

import torch
from torch import nn

from segops.nn import PyramidAtrousConv2d

from .layers import BatchNorm2d, conv_norm_relu, global_pool, resize, separable_conv
from .model import check_all_positive, check_one_of, check_options, check_positive


class AtrousSpatialPyramidPooling(nn.Module):
    """DeepLab v3's ASPP: a 1x1 convolution, 3x3 convolutions at several rates and global pooling, concatenated and fused by a 1x1.

    L.-C. Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv:1706.05587, Fig. 5.
    separable=True makes the 3x3 convolutions depthwise separable, as in DeepLab v3+.
    """

    def __init__(self, in_channels, channels=256, rates=(6, 12, 18), dropout=0.1, separable=False):
        super().__init__()
        check_positive("channels", channels)
        check_all_positive("rates", rates)
        self.channels = channels
        if separable:
            atrous = [separable_conv(in_channels, channels, rate) for rate in rates]
        else:
            atrous = [conv_norm_relu(in_channels, channels, 3, rate) for rate in rates]
        self.branches = nn.ModuleList([conv_norm_relu(in_channels, channels), *atrous])
        self.pool = global_pool(in_channels, channels)
        self.fuse = conv_norm_relu((len(rates) + 2) * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features):
        pooled = self.pool(features).expand(-1, -1, *features.shape[2:])
        return self.dropout(self.fuse(torch.cat([*(branch(features) for branch in self.branches), pooled], dim=1)))


class PyramidAtrousBlock(nn.Module):
    """Pyramid atrous convolution with batch normalisation and ReLU.

    norm="post" normalises the merged branches; norm="per_rate" each branch with statistics of its own, before the sum.
    merge="concat" is the paper's Table 2: the branches are concatenated and squeezed by a 1x1 convolution.
    """

    def __init__(self, in_channels, channels, rates, merge, norm):
        super().__init__()
        check_one_of("norm", norm, ("post", "per_rate"))
        check_one_of("merge", merge, ("concat", "sum"))
        apart = merge == "concat" or norm == "per_rate"
        self.pac = PyramidAtrousConv2d(in_channels, channels, rates=rates, merge="concat" if apart else "sum", bias=False)
        self.merge, self.branches = merge, len(rates) if norm == "per_rate" else 0
        self.rate_norm = BatchNorm2d(len(rates) * channels) if self.branches else nn.Identity()
        self.squeeze = nn.Conv2d(len(rates) * channels, channels, 1, bias=False) if merge == "concat" else nn.Identity()
        self.norm = nn.Identity() if self.branches and merge == "sum" else BatchNorm2d(channels)

    def forward(self, features):
        x = self.rate_norm(self.pac(features))
        if self.branches and self.merge == "sum":
            x = x.unflatten(1, (self.branches, -1)).sum(1)
        return torch.relu(self.norm(self.squeeze(x)))


class PyramidAtrousContext(nn.Module):
    """[1x1 convolution | global pooling | pyramid atrous convolution], each to `channels`, concatenated.

    D. Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", 3.4, Fig. 3. The paper classifies the
    concatenation as it is; fuse=True puts DeepLab v3's 1x1 fuse convolution and dropout behind it.
    """

    def __init__(self, in_channels, channels=256, rates=(1, 3, 5, 7, 9), merge="sum", norm="post", fuse=False):
        super().__init__()
        check_positive("channels", channels)
        self.channels = channels if fuse else 3 * channels
        self.project = conv_norm_relu(in_channels, channels)
        self.pool = global_pool(in_channels, channels)
        self.pac = PyramidAtrousBlock(in_channels, channels, rates, merge, norm)
        self.fuse = nn.Sequential(conv_norm_relu(3 * channels, channels), nn.Dropout(0.1)) if fuse else nn.Identity()

    def forward(self, features):
        pooled = self.pool(features).expand(-1, -1, *features.shape[2:])
        return self.fuse(torch.cat([self.project(features), pooled, self.pac(features)], dim=1))


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling module: averages over a few grids, squeezed by 1x1 convolutions, resized and concatenated to the features.

    H. Zhao et al., "Pyramid Scene Parsing Network", arXiv:1612.01105, Fig. 3. channels=None gives each grid its share of the input's width.
    """

    def __init__(self, in_channels, channels=None, bins=(1, 2, 3, 6)):
        super().__init__()
        check_all_positive("bins", bins)
        channels = max(in_channels // len(bins), 1) if channels is None else channels
        check_positive("channels", channels)
        self.channels = in_channels + len(bins) * channels
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv_norm_relu(in_channels, channels)) for size in bins
        )

    def forward(self, features):
        size = features.shape[2:]
        return torch.cat([features, *(resize(level(features), size, align_corners=True) for level in self.levels)], dim=1)


class NoContext(nn.Identity):
    """The backbone's features as they are."""

    def __init__(self, in_channels):
        super().__init__()
        self.channels = in_channels


CONTEXTS = {
    "aspp": AtrousSpatialPyramidPooling,
    "pac": PyramidAtrousContext,
    "ppm": PyramidPooling,
    "none": NoContext,
}


def create_context(name, in_channels, **options):
    """A context by name, with its own defaults for what `options` does not say.

    Raises:
        ValueError: unknown name.
        TypeError: an option that this context does not have.
    """
    if name not in CONTEXTS:
        raise ValueError(f"context must be one of {', '.join(map(repr, CONTEXTS))}; got {name!r}")
    check_options(f"context {name!r}", functools.partial(CONTEXTS[name], in_channels), options)
    return CONTEXTS[name](in_channels, **options)
