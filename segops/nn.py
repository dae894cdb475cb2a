"""The ops of segops as modules."""

import torch

from .pac import pyramid_atrous_conv2d


class PyramidAtrousConv2d(torch.nn.Conv2d):
    """Pyramid atrous convolution: one filter at several dilation rates, summed or concatenated.

    The module of `segops.pyramid_atrous_conv2d` (Yu, section 3.3). Weights are initialised as by `torch.nn.Conv2d`, and
    the state_dict has its keys, `weight` and `bias`: weights of a convolution of the same kernel load as they are.

    Args:
        in_channels: channels of the input.
        out_channels: filters; the output has out_channels channels for "sum", len(rates) * out_channels for "concat".
        kernel_size: odd int, default 3.
        rates: dilation rates, positive ints; default (1, 3, 5, 7, 9).
        merge: "sum" (default) or "concat".
        bias: whether the shared filter has a bias (default True), which "sum" adds len(rates) times.

    Shape: (N, in_channels, H, W) -> (N, channels, H, W), same H and W.

    Raises:
        ValueError, TypeError: as `segops.pyramid_atrous_conv2d`, at construction for what is known there.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size=3, rates=(1, 3, 5, 7, 9), merge="sum", bias=True, device=None, dtype=None
    ):
        check_settings(kernel_size, rates, merge)
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)
        self.rates = tuple(rates)
        self.merge = merge

    def forward(self, input):
        return pyramid_atrous_conv2d(input, self.weight, self.bias, rates=self.rates, merge=self.merge)

    def extra_repr(self):
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size[0]}, rates={self.rates}, merge={self.merge!r}{bias}"
