"""Pyramid atrous convolution: the public function, and the ops `segops::pac`, `pac_input_grad` and `pac_weight_grad` behind it.

This file is the worked example of an op. From top to bottom: the public function (validate, pick the backend,
call the op), the schemas, their implementation and fakes, autograd.
"""

import torch

from .._checks import FLOATING, is_int
from .._library import LIBRARY, autocast_dtype, format_of, full_precision, is_channels_last, memory_format, transformed
from ..backend import select
from . import factorised, reference

MAX_RATES = 64  # kMaxRates in csrc/pac/pac_cuda.cu


def pyramid_atrous_conv2d(input, weight, bias=None, *, rates=(1, 3, 5, 7, 9), merge="sum"):
    """Pyramid atrous convolution: one filter at several dilation rates, summed or concatenated.

    Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", section 3.3, Fig. 6::

        branch_r = conv2d(input, weight, bias, stride=1, dilation=r, padding=r * (k - 1) / 2)
        merge="sum"      sum over r of branch_r
        merge="concat"   the branches along the channels, in the order of `rates`

    Because the filter is shared, the branches cost the arithmetic of one convolution together, not one each.
    The bias is part of the shared filter: "sum" adds it len(rates) times.

    Args:
        input: (N, Cin, H, W), any strides; float32, bfloat16, float16, or float64 (CPU and reference backend).
        weight: (Cout, Cin, k, k), k odd, input's dtype and device.
        bias: (Cout), or None (default).
        rates: dilation rates, positive ints; default the paper's best, (1, 3, 5, 7, 9).
        merge: "sum" (default) or "concat".

    Returns:
        (N, Cout, H, W) for "sum", (N, len(rates) * Cout, H, W) for "concat"; input's dtype and suggested memory
        format. Sums are taken in float32 at least. Differentiable any number of times; deterministic.

    Under autocast floating-point arguments are cast to the autocast dtype first. With one rate, or too few rates and channels
    to gain anything, and under `torch.func` transforms or forward-mode differentiation, PyTorch's convolutions run.

    Raises:
        TypeError: an argument that is no tensor or no floating-point tensor, mixed dtypes, rates that are not ints.
        ValueError: wrong rank, channel mismatch, even or oblong kernel, empty or non-positive rates, unknown merge,
            mixed devices.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    input, weight, bias = _autocast(input, weight, bias)
    rates = _validate(input, weight, bias, rates, merge)
    backend = select("pyramid_atrous_conv2d", input)
    if backend == "reference" or not _pays(weight, rates) or transformed():
        return reference.pyramid_atrous_conv2d(input, weight, bias, rates, merge)
    return torch.ops.segops.pac(input, weight, bias, rates, merge, backend)


def _pays(weight, rates):
    """Whether sharing the arithmetic saves more than the shifts cost; if not, plain convolutions do.

    The bounds are where the two about broke even on two CPU cores (with fewer than 16 channels a backward pass may lose 10 %). They
    depend on no size of the map, so that compiled and exported graphs stay dynamic. More than MAX_RATES fit no kernel.
    """
    if not 2 <= len(rates) <= MAX_RATES or 0 in weight.shape:
        return False
    return max(weight.shape[:2]) >= (2 if len(rates) >= 4 else 64 // (len(rates) - 1))


def _autocast(*tensors):
    """The tensors in the autocast dtype of the first one's device, where autocast is on."""
    if not isinstance(tensors[0], torch.Tensor):
        return tensors
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)


def _validate(input, weight, bias, rates, merge):
    """Raises the errors of `pyramid_atrous_conv2d`; returns the rates as a tuple."""
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
    return check_settings(*weight.shape[2:], rates, merge)


def check_settings(kernel_h, kernel_w, rates, merge):
    """Raises on a bad kernel size, rates or merge; returns the rates as a tuple."""
    for side in (kernel_h, kernel_w):
        if not is_int(side):
            raise TypeError(f"kernel_size must be an odd int; got {side!r}")
    if kernel_h != kernel_w or kernel_h % 2 == 0 or kernel_h < 1:
        raise ValueError(f"kernel_size (weight's last two dimensions) must be square and odd; got {kernel_h}x{kernel_w}")
    if not isinstance(rates, (tuple, list)):
        raise TypeError(f"rates must be a tuple or list of positive ints; got {type(rates).__name__}")
    for rate in rates:
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise TypeError(f"rates must be positive ints; got {rate!r} in {tuple(rates)}")
        if rate < 1:
            raise ValueError(f"rates must be positive ints; got {tuple(rates)}")
    if not rates:
        raise ValueError("rates must hold at least one positive int; got none")
    if merge not in ("sum", "concat"):
        raise ValueError(f"merge must be 'sum' or 'concat'; got {merge!r}")
    return tuple(rates)


# The three ops are bilinear, and closed under differentiation: each derivative of one is another of them.
# The shift kernels that they are made of are ops too, so that the binaries can implement them.
LIBRARY.define("pac(Tensor input, Tensor weight, Tensor? bias, int[] rates, str merge, str backend) -> Tensor")
LIBRARY.define("pac_input_grad(Tensor grad, Tensor weight, bool channels_last, int[] rates, str merge, str backend) -> Tensor")
LIBRARY.define(
    "pac_weight_grad(Tensor grad, Tensor input, int kernel_size, bool channels_last, int[] rates, str merge, str backend) -> Tensor"
)
LIBRARY.define("pac_shift_gather(Tensor planes, Tensor? bias, Tensor(a!) out, int[] kernel_size, int[] rates, int sign) -> ()")
LIBRARY.define(
    "pac_shift_scatter(Tensor source, Tensor(a!) out, int first_row, int[] kernel_size, int[] rates, int sign) -> ()"
)


def _groups(rates, merge):
    return len(rates) if merge == "concat" else 1


def _empty_output(input, weight, bias, rates, merge, backend):
    n, _, h, w = input.shape
    shape = (n, weight.shape[0] * _groups(rates, merge), h, w)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _empty_input_grad(grad, weight, channels_last, rates, merge, backend):
    n, _, h, w = grad.shape
    shape = (n, weight.shape[1], h, w)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=format_of(channels_last))


def _empty_weight_grad(grad, input, kernel_size, channels_last, rates, merge, backend):
    shape = (grad.shape[1] // _groups(rates, merge), input.shape[1], kernel_size, kernel_size)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=format_of(channels_last))


def _pac(input, weight, bias, rates, merge, backend):
    out = _empty_output(input, weight, bias, rates, merge, backend)
    return _fill(out, (input, weight), lambda: factorised.forward(input, weight, bias, rates, merge, out, backend))


def _pac_input_grad(grad, weight, channels_last, rates, merge, backend):
    out = _empty_input_grad(grad, weight, channels_last, rates, merge, backend)
    return _fill(out, (grad, weight), lambda: factorised.input_gradient(grad, weight, rates, merge, out, backend))


def _pac_weight_grad(grad, input, kernel_size, channels_last, rates, merge, backend):
    out = _empty_weight_grad(grad, input, kernel_size, channels_last, rates, merge, backend)
    return _fill(out, (grad, input), lambda: factorised.weight_gradient(grad, input, rates, merge, out, backend))


def _fill(out, factors, compute):
    """Runs compute, which writes `out`, outside autocast; where a factor is empty, so is the sum: zeros."""
    if out.numel() == 0 or any(factor.numel() == 0 for factor in factors):
        return out.zero_()
    with full_precision(out):
        compute()
    return out


LIBRARY.impl("pac", _pac, "CompositeExplicitAutograd")
LIBRARY.impl("pac_input_grad", _pac_input_grad, "CompositeExplicitAutograd")
LIBRARY.impl("pac_weight_grad", _pac_weight_grad, "CompositeExplicitAutograd")
torch.library.register_fake("segops::pac", _empty_output, lib=LIBRARY)
torch.library.register_fake("segops::pac_input_grad", _empty_input_grad, lib=LIBRARY)
torch.library.register_fake("segops::pac_weight_grad", _empty_weight_grad, lib=LIBRARY)
torch.library.register_fake("segops::pac_shift_gather", lambda *args: None, lib=LIBRARY)
torch.library.register_fake("segops::pac_shift_scatter", lambda *args: None, lib=LIBRARY)


def _setup_pac(ctx, inputs, output):
    input, weight, _bias, *ctx.settings = inputs
    ctx.save_for_backward(input, weight)


def _backward_pac(ctx, grad):
    input, weight = ctx.saved_tensors
    rates, merge, _ = ctx.settings
    grad_input = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.segops.pac_input_grad(grad, weight, is_channels_last(input), *ctx.settings)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.segops.pac_weight_grad(grad, input, weight.shape[-1], is_channels_last(weight), *ctx.settings)
    if ctx.needs_input_grad[2]:
        # Every branch adds the bias: to the one output of "sum", to its own of "concat".
        total = grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
        total = total * len(rates) if merge == "sum" else total.view(len(rates), -1).sum(0)
        grad_bias = total.to(grad.dtype)
    return grad_input, grad_weight, grad_bias, None, None, None


def _setup_pac_input_grad(ctx, inputs, output):
    grad, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(grad, weight)


def _backward_pac_input_grad(ctx, gg):
    grad, weight = ctx.saved_tensors
    grad_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.segops.pac(gg, weight, None, *ctx.settings)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.segops.pac_weight_grad(grad, gg, weight.shape[-1], is_channels_last(weight), *ctx.settings)
    return grad_grad, grad_weight, None, None, None, None


def _setup_pac_weight_grad(ctx, inputs, output):
    grad, input, _, _, *ctx.settings = inputs
    ctx.save_for_backward(grad, input)


def _backward_pac_weight_grad(ctx, gg):
    grad, input = ctx.saved_tensors
    grad_grad = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.segops.pac(input, gg, None, *ctx.settings)
    if ctx.needs_input_grad[1]:
        grad_input = torch.ops.segops.pac_input_grad(grad, gg, is_channels_last(input), *ctx.settings)
    return grad_grad, grad_input, None, None, None, None, None


torch.library.register_autograd("segops::pac", _backward_pac, setup_context=_setup_pac, lib=LIBRARY)
torch.library.register_autograd(
    "segops::pac_input_grad", _backward_pac_input_grad, setup_context=_setup_pac_input_grad, lib=LIBRARY
)
torch.library.register_autograd(
    "segops::pac_weight_grad", _backward_pac_weight_grad, setup_context=_setup_pac_weight_grad, lib=LIBRARY
)
