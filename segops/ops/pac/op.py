"""Pyramid atrous convolution: the public function, and the ops `segops::pac`, `pac_input_grad`,
`pac_weight_grad` and `pac_grads` behind it.

This file is the worked example of an op. From top to bottom: the public function (validate, pick
the backend, call the op), its settings, the declarations of the ops; what computes them is
csrc/pac/pac.cpp, and for Triton triton_kernels.py.
"""

from dataclasses import dataclass

import torch

from ...backend import select
from ..common import library
from ..common.autocast import cast
from ..common.checks import FLOATING, check_merge, is_int
from ..common.layout import format_of, is_channels_last, memory_format
from . import reference

MAX_RATES = 64  # kMaxRates in csrc/pac/pac_cuda.cu


def pyramid_atrous_conv2d(input, weight, bias=None, *, rates=(1, 3, 5, 7, 9), merge="sum"):
    """Pyramid atrous convolution: one filter at several dilation rates, summed or concatenated.

    Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss",
    section 3.3, Fig. 6::

        branch_r = conv2d(input, weight, bias, stride=1, dilation=r, padding=r * (k - 1) / 2)
        merge="sum"      sum over r of branch_r
        merge="concat"   the branches along the channels, in the order of `rates`

    Because the filter is shared, the branches cost the arithmetic of one convolution together, not
    one each.
    The bias is part of the shared filter: "sum" adds it len(rates) times.

    Args:
        input: (N, Cin, H, W), any strides; float32, bfloat16, float16, or float64 (CPU and
            reference backend).
        weight: (Cout, Cin, k, k), k odd, input's dtype and device.
        bias: (Cout), or None (default).
        rates: dilation rates, positive ints; default the paper's best, (1, 3, 5, 7, 9).
        merge: "sum" (default) or "concat".

    Returns:
        (N, Cout, H, W) for "sum", (N, len(rates) * Cout, H, W) for "concat"; input's dtype and
        suggested memory format. Sums are taken in float32 at least. Differentiable any number of
        times; deterministic.

    Under autocast floating-point arguments are cast to the autocast dtype first. With one rate, or
    too few rates and channels to gain anything, and under `torch.func` transforms or forward-mode
    differentiation, PyTorch's convolutions run.

    Raises:
        TypeError: an argument that is not a floating-point tensor, mixed dtypes, rates that are not
            ints.
        ValueError: wrong rank, channel mismatch, even or oblong kernel, empty or non-positive
            rates, unknown merge, mixed devices.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    input, weight, bias = cast(input, weight, bias, to=lambda dtype, _: dtype)
    _check_tensors(input, weight, bias)
    settings = Settings(tuple(weight.shape[2:]), rates, merge)
    backend = select("pyramid_atrous_conv2d", input)
    if backend == "reference" or not _pays(weight, settings.rates) or library.under_functorch():
        return reference.pyramid_atrous_conv2d(input, weight, bias, settings.rates, merge)
    return pac(input, weight, bias, settings.rates, merge, backend=backend)


@dataclass(frozen=True)
class Settings:
    """What pyramid atrous convolution is told beside its tensors.

    Raises:
        TypeError, ValueError: as `segops.pyramid_atrous_conv2d`.
    """

    kernel_size: tuple  # (kh, kw)
    rates: tuple
    merge: str

    def __post_init__(self):
        for side in self.kernel_size:
            if not is_int(side):
                raise TypeError(f"kernel_size must be an odd int; got {side!r}")
        kernel_h, kernel_w = self.kernel_size
        if kernel_h != kernel_w or kernel_h % 2 == 0 or kernel_h < 1:
            raise ValueError(f"kernel_size (weight's last two dimensions) must be square and odd; got {kernel_h}x{kernel_w}")
        if not isinstance(self.rates, (tuple, list)):
            raise TypeError(f"rates must be a tuple or list of positive ints; got {type(self.rates).__name__}")
        object.__setattr__(self, "rates", tuple(self.rates))
        for rate in self.rates:
            if not isinstance(rate, int) or isinstance(rate, bool):
                raise TypeError(f"rates must be positive ints; got {rate!r} in {self.rates}")
            if rate < 1:
                raise ValueError(f"rates must be positive ints; got {self.rates}")
        if not self.rates:
            raise ValueError("rates must hold at least one positive int; got none")
        check_merge(self.merge)


def _pays(weight, rates):
    """Whether sharing the arithmetic saves more than the shifts cost; else plain convolutions run.

    It depends on no size of the map, so that compiled and exported graphs stay dynamic. More than
    MAX_RATES fit no kernel.
    """
    if not 2 <= len(rates) <= MAX_RATES or 0 in weight.shape:
        return False
    return max(weight.shape[:2]) >= channels_that_pay(weight.device.type, len(rates))


def channels_that_pay(device_type, rates):
    """The least channels, of whichever of input and output has more.

    On a CPU they are where the two about broke even on two cores (with fewer than 16 a backward
    pass may lose 10 %).

    On a GPU they are an estimate that no GPU has confirmed yet: of a forward pass over a large map
    in bfloat16, at 800 TFLOP/s, 3 TB/s from memory and 5.5 TB/s from the L2 cache. For R rates,
    with M channels on the wider side, each tap of a pixel costs, for each channel of the narrower,

        plain   2 R M FLOP, and its part of adding up R outputs      0.0025 R M + 0.07 (R + 1) ps
        shared  planes written once, behind which the product hides,
                and read R times, from L2                            0.67 + 0.36 R ps

    which is the same at M = 116 + 240 / R. A backward pass, of twice the products, gains earlier;
    so does a small map, for which launches of 5 us count: 3 against 2 R - 1.
    """
    if device_type in ("cuda", "xpu"):
        return 116 + 240 // rates
    return 2 if rates >= 4 else 64 // (rates - 1)


def _check_tensors(input, weight, bias):
    """Raises the errors of `pyramid_atrous_conv2d` that are about its tensors."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor{' or None' if name == 'bias' else ''}; got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} must have input's dtype {input.dtype}; got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}; got {tensor.device}")
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, Cin, H, W); got {tuple(input.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have shape (Cout, Cin, k, k); got {tuple(weight.shape)}")
    if weight.shape[1] != input.shape[1]:
        raise ValueError(f"weight must have input's {input.shape[1]} channels in dimension 1; got shape {tuple(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), weight's output channels; got {tuple(bias.shape)}")


# The ops are bilinear, and closed under differentiation: each derivative of one is another of them.
# `pac_grads` is two of them at once, for who does not differentiate again.


@library.op("pac(Tensor input, Tensor weight, Tensor? bias, int[] rates, str merge) -> Tensor")
class pac:
    def empty(input, weight, rates, merge):
        n, _, h, w = input.shape
        shape = (n, weight.shape[0] * _groups(rates, merge), h, w)
        return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))

    def setup_context(ctx, out, input, weight, rates, merge):
        ctx.save_for_backward(input, weight)
        ctx.settings = rates, merge

    def backward(ctx, needed, grad):
        (input, weight), (rates, merge) = ctx.saved_tensors, ctx.settings
        grad_input = grad_weight = grad_bias = None
        last = is_channels_last(input), is_channels_last(weight)
        if needed[0] and needed[1] and not torch.is_grad_enabled():  # nothing is differentiated again
            grad_input, grad_weight = pac_grads(grad, input, weight, *last, *ctx.settings, backend=ctx.backend)
        else:
            if needed[0]:
                grad_input = pac_input_grad(grad, weight, last[0], *ctx.settings, backend=ctx.backend)
            if needed[1]:
                grad_weight = pac_weight_grad(grad, input, weight.shape[-1], last[1], *ctx.settings, backend=ctx.backend)
        if needed[2]:
            # Every branch adds the bias: to the one output of "sum", to its own of "concat".
            total = grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
            total = total * len(rates) if merge == "sum" else total.view(len(rates), -1).sum(0)
            grad_bias = total.to(grad.dtype)
        return grad_input, grad_weight, grad_bias


@library.op("pac_input_grad(Tensor grad, Tensor weight, bool channels_last, int[] rates, str merge) -> Tensor")
class pac_input_grad:
    def empty(grad, weight, channels_last):
        n, _, h, w = grad.shape
        shape = (n, weight.shape[1], h, w)
        return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=format_of(channels_last))

    def setup_context(ctx, out, grad, weight, rates, merge):
        ctx.save_for_backward(grad, weight)
        ctx.settings = rates, merge

    def backward(ctx, needed, gg):
        grad, weight = ctx.saved_tensors
        grad_grad = grad_weight = None
        if needed[0]:
            grad_grad = pac(gg, weight, None, *ctx.settings, backend=ctx.backend)
        if needed[1]:
            last = is_channels_last(weight)
            grad_weight = pac_weight_grad(grad, gg, weight.shape[-1], last, *ctx.settings, backend=ctx.backend)
        return grad_grad, grad_weight


@library.op("pac_weight_grad(Tensor grad, Tensor input, int kernel_size, bool channels_last, int[] rates, str merge) -> Tensor")
class pac_weight_grad:
    def empty(grad, input, kernel_size, channels_last, rates, merge):
        shape = (grad.shape[1] // _groups(rates, merge), input.shape[1], kernel_size, kernel_size)
        return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=format_of(channels_last))

    def setup_context(ctx, out, grad, input, rates, merge):
        ctx.save_for_backward(grad, input)
        ctx.settings = rates, merge

    def backward(ctx, needed, gg):
        grad, input = ctx.saved_tensors
        grad_grad = grad_input = None
        if needed[0]:
            grad_grad = pac(input, gg, None, *ctx.settings, backend=ctx.backend)
        if needed[1]:
            grad_input = pac_input_grad(grad, gg, is_channels_last(input), *ctx.settings, backend=ctx.backend)
        return grad_grad, grad_input


@library.op(
    "pac_grads(Tensor grad, Tensor input, Tensor weight, bool input_channels_last, bool weight_channels_last, int[] rates, "
    "str merge) -> (Tensor, Tensor)"
)
class pac_grads:
    def empty(grad, input, weight, input_channels_last, weight_channels_last):
        formats = ((input, input_channels_last), (weight, weight_channels_last))
        return tuple(torch.empty_like(like, dtype=grad.dtype, memory_format=format_of(last)) for like, last in formats)


def _groups(rates, merge):
    return len(rates) if merge == "concat" else 1
