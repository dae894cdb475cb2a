"""The ops of segops as modules."""

import math

import torch

from .ops.bal.edge import EdgeSettings
from .ops.bal.op import LossSettings, boundary_aware_loss, check_class_weight, upsample_cross_entropy
from .ops.common.checks import check_merge
from .ops.pac.op import Settings, pyramid_atrous_conv2d
from .ops.pag.op import partial_attention_gate


class PyramidAtrousConv2d(torch.nn.Module):
    """Pyramid atrous convolution: one filter at several dilation rates, summed or concatenated.

    The module of `segops.pyramid_atrous_conv2d` (Yu, section 3.3). Weights are initialised as by
    `torch.nn.Conv2d`, and the state_dict has its keys, `weight` and `bias`: weights of a
    convolution of the same kernel load as they are.

    Args:
        in_channels: channels of the input.
        out_channels: filters; the output has out_channels channels for "sum", for "concat"
            len(rates) * out_channels.
        kernel_size: odd int, default 3.
        rates: dilation rates, positive ints; default (1, 3, 5, 7, 9).
        merge: "sum" (default) or "concat".
        bias: whether the shared filter has a bias (default True), which "sum" adds len(rates)
            times.

    Shape: (N, in_channels, H, W) -> (N, channels, H, W), same H and W.

    Raises:
        ValueError, TypeError: as `segops.pyramid_atrous_conv2d`, at construction for what is known
            there.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size=3, rates=(1, 3, 5, 7, 9), merge="sum", bias=True, device=None, dtype=None
    ):
        super().__init__()
        self.rates = Settings((kernel_size, kernel_size), rates, merge).rates
        self.merge = merge
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int) or channels < 1:
                raise ValueError(f"{name} must be a positive int; got {channels!r}")
        self.weight = torch.nn.Parameter(
            torch.empty(out_channels, in_channels, kernel_size, kernel_size, device=device, dtype=dtype)
        )
        self.bias = torch.nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Draws weight and bias as `torch.nn.Conv2d` does."""
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input):
        return pyramid_atrous_conv2d(input, self.weight, self.bias, rates=self.rates, merge=self.merge)

    def extra_repr(self):
        c_out, c_in, k, _ = self.weight.shape
        return f"{c_in}, {c_out}, kernel_size={k}, rates={self.rates}, merge={self.merge!r}, bias={self.bias is not None}"


class UpsampleCrossEntropy(torch.nn.Module):
    """Cross entropy of logits at any resolution, without the upsampled logits.

    The module of `segops.upsample_cross_entropy`, with its keyword arguments and defaults.

    Args:
        class_weight: (C) floating point, kept as a buffer, or None (default).
        label_smoothing: in [0, 1], default 0.0.
        ignore_index: label of pixels that do not count, default 255.
        reduction: "mean" (default; over the pixels that are not ignored), "sum" or "none".

    Shape: logits (N, C, h, w), labels (N, H, W), pixel_weight (N, h', w') or None -> () or, for
        "none", (N, H, W).

    Raises:
        ValueError, TypeError, IndexError: as the function, at construction for what is known there.
    """

    def __init__(self, *, class_weight=None, label_smoothing=0.0, ignore_index=255, reduction="mean"):
        super().__init__()
        check_class_weight(class_weight)
        LossSettings(label_smoothing, ignore_index, reduction)
        self.register_buffer("class_weight", class_weight)
        self.settings = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}

    def forward(self, logits, labels, pixel_weight=None):
        return upsample_cross_entropy(logits, labels, pixel_weight, class_weight=self.class_weight, **self.settings)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class BoundaryAwareLoss(torch.nn.Module):
    """Cross entropy weighted by the gaussian edge map of the labels (Yu, Eq. 4), for logits at any
    resolution.

    The module of `segops.boundary_aware_loss`, with its keyword arguments and defaults.

    Args:
        kernel, kernel_size, sigma, beta, downsample, normalize: of the edge map, as in
            `segops.gaussian_edge`; default the paper's best: "gaussian", 35, 3.0, 0.5, 4, and None.
            normalize="mean" keeps cross entropy's scale.
        class_weight: (C) floating point, kept as a buffer, or None (default).
        label_smoothing: in [0, 1], default 0.0.
        ignore_index: label of pixels that do not count, default 255.
        reduction: "mean" (default; over the pixels that are not ignored), "sum" or "none".

    Shape: logits (N, C, h, w), labels (N, H, W) -> () or, for "none", (N, H, W).

    Raises:
        ValueError, TypeError, IndexError: as the function, at construction for what is known there.
    """

    def __init__(
        self,
        *,
        kernel="gaussian",
        kernel_size=35,
        sigma=3.0,
        beta=0.5,
        downsample=4,
        normalize=None,
        class_weight=None,
        label_smoothing=0.0,
        ignore_index=255,
        reduction="mean",
    ):
        super().__init__()
        EdgeSettings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index)
        check_class_weight(class_weight)
        LossSettings(label_smoothing, ignore_index, reduction)
        self.register_buffer("class_weight", class_weight)
        self.settings = {
            "kernel": kernel,
            "kernel_size": kernel_size,
            "sigma": sigma,
            "beta": beta,
            "downsample": downsample,
            "normalize": normalize,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }

    def forward(self, logits, labels):
        return boundary_aware_loss(logits, labels, class_weight=self.class_weight, **self.settings)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class PartialAttentionGate(torch.nn.Module):
    """Encoder maps max-pooled to the decoder's size and merged with it: a skip connection from all
    of an encoder's levels at once.

    The module of `segops.partial_attention_gate` (Haloi, "Partial attention", Eq. 3). It has no
    parameters.

    Args:
        merge: "concat" (default) or "sum".

    Shape: decoder (N, C, h, w), encoders a list of (N, C_i, H_i, W_i) -> (N, C + C_i of those with
        H_i >= h and W_i >= w, h, w), or (N, C, h, w) for "sum".

    Raises:
        ValueError, TypeError: as the function, at construction for what is known there.
    """

    def __init__(self, merge="concat"):
        super().__init__()
        check_merge(merge)
        self.merge = merge

    def forward(self, decoder, encoders):
        return partial_attention_gate(decoder, encoders, merge=self.merge)

    def extra_repr(self):
        return f"merge={self.merge!r}"
