"""The partial-attention gate, and max pooling whose offsets take a byte: the public functions, and
the ops behind them.

Both are max pooling over windows that side by side cover a map. What backward needs, and what
unpooling takes, is where in its window each maximum lay: a number below the window's size, so a
byte, where PyTorch keeps the index into the map in eight.
"""

import functools

import torch

from ...backend import select
from ..common import library
from ..common.autocast import cast
from ..common.checks import check_map, check_merge, is_int, positive_pair
from ..common.layout import format_of, is_channels_last, memory_format
from . import reference
from .windows import has_windows_above, offset_layout

MAX_MAPS = 32  # kMaxMaps in csrc/pag/pag_cuda.cu


def partial_attention_gate(decoder, encoders, *, merge="concat"):
    """Encoder maps max-pooled to the decoder's size and merged with it, in one pass.

    Haloi, "Rethinking Convolutional Semantic Segmentation Learning", arXiv:1710.07991, "Partial
    attention", Eq. 3 and Fig. 4::

        switch i is on iff H_i >= h and W_i >= w; the other encoder maps are left out
        op_i(E_i) = E_i max-pooled to (h, w), per axis with windows
                    [floor(j * H_i / h), ceil((j + 1) * H_i / h)): stride and window H_i / h where
                    that divides, the identity where it is 1, as `F.adaptive_max_pool2d` elsewhere
        merge="concat"   cat([decoder, op_i(E_i) for each i that is on], 1)
        merge="sum"      decoder + the sum of op_i(E_i)

    Args:
        decoder: (N, C, h, w), any strides; float32, bfloat16, float16, or float64 (CPU and
            reference backend).
        encoders: list or tuple of (N, C_i, H_i, W_i), decoder's dtype and device.
        merge: "concat" (default), or "sum", for which every map that is on must have C channels.

    Returns:
        (N, C + sum of C_i, h, w) for "concat", (N, C, h, w) for "sum", in decoder's dtype and
        suggested memory format; a copy of the decoder where no switch is on. Sums are taken in
        float32 at least and rounded once. NaN propagates and the gradient of a tie goes to the
        first element, as in `F.max_pool2d`. Deterministic.

    Backward keeps one byte for each pooled element, two where windows have more than 256 elements.
    Gradients of the decoder and of encoder maps that need no pooling are views of the output's.
    Double backward is not supported.

    Under autocast the maps are cast to the widest of their dtypes first. With 32 encoder maps or
    more that are on, with windows of more than 65536 elements, and under `torch.func` transforms
    and forward-mode differentiation, PyTorch's ops run. Compile and export specialise on which maps
    are on, which are pooled, and which have windows of more than 256 elements.

    Raises:
        TypeError: a map that is not a floating-point tensor, encoders that are not a list or tuple,
            mixed dtypes.
        ValueError: wrong rank, no channels, an empty height or width, mixed batches or devices,
            unknown merge, a map that is on and has not C channels under "sum".
        RuntimeError: a forced backend that cannot run here (see `segops.backend`); double backward.
    """
    check_merge(merge)
    if not isinstance(encoders, (list, tuple)):
        raise TypeError(f"encoders must be a list or tuple of torch.Tensor; got {type(encoders).__name__}")
    decoder, *encoders = cast(decoder, *encoders, to=lambda _, dtypes: functools.reduce(torch.promote_types, dtypes))
    encoders = _switched_on(decoder, encoders, merge)
    backend = select("partial_attention_gate", decoder)
    if library.under_functorch():
        return reference.partial_attention_gate(decoder, encoders, merge)
    if backend == "reference" or len(encoders) >= MAX_MAPS or _has_huge_windows(decoder, encoders):
        return _laid_out(reference.partial_attention_gate(decoder, encoders, merge), decoder)
    return pag(decoder, encoders, merge, is_channels_last(decoder), backend)[0]


def max_pool2d_with_offsets(input, kernel_size):
    """Max pooling that remembers where in its window each maximum lay, in one byte.

    As ``F.max_pool2d(input, kernel_size, ceil_mode=True, return_indices=True)``: stride =
    kernel_size, no padding, windows clipped at the lower and right border; the same values, ties
    (the first element) and NaN (which propagates; its last occurrence). Made for SegNet's decoder
    (Badrinarayanan et al., "SegNet"), at an eighth of the memory that indices take.

    Args:
        input: (N, C, H, W), any strides; float32, bfloat16, float16, or float64 (CPU and reference
            backend).
        kernel_size: int or (kh, kw), kh * kw <= 256.

    Returns:
        pooled: (N, C, ceil(H / kh), ceil(W / kw)), input's dtype and suggested memory format;
            differentiable any number of times.
        offsets: the same shape, uint8: dy * kw + dx of the maximum in the window as it would be
            unclipped.

    Under `torch.func` transforms and forward-mode differentiation PyTorch's ops run. `torch.export`
    with dynamic sizes needs their bound, as PyTorch's own pooling does: more than one window,
    `Dim("h", min=kernel_size + 1)`, or `Dim.AUTO`.

    Raises:
        TypeError: input that is not a floating-point tensor, kernel_size that is not an int or a
            pair of ints.
        ValueError: wrong rank, no channels, an empty height or width, kernel_size not positive or
            of more than 256 elements.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    kernel_size = _check_kernel(kernel_size)
    check_map("input", input)
    backend = select("max_pool2d_with_offsets", input)
    if library.under_functorch():
        return reference.max_pool2d_with_offsets(input, kernel_size)
    if backend == "reference":
        pooled, offsets = reference.max_pool2d_with_offsets(input, kernel_size)
        return _laid_out(pooled, input), _laid_out(offsets, input)
    return pag_max_pool(input, kernel_size, is_channels_last(input), backend)


def max_unpool2d_with_offsets(pooled, offsets, kernel_size, output_size):
    """The inverse of `max_pool2d_with_offsets`: zeros, and each pooled value where its offset says.

    As `F.max_unpool2d`, with a byte per element in place of an index. An offset that points outside
    its window, which pooling does not make, places nothing.

    Args:
        pooled: (N, C, h, w), any strides; float32, bfloat16, float16, or float64 (CPU and reference
            backend).
        offsets: (N, C, h, w) uint8, as `max_pool2d_with_offsets` returns them.
        kernel_size: int or (kh, kw), that of the pooling.
        output_size: (H, W), or a shape that ends in them, with ceil(H / kh) = h, ceil(W / kw) = w.

    Returns:
        (N, C, H, W), pooled's dtype and suggested memory format; differentiable any number of
        times. Deterministic.

    Under `torch.func` transforms and forward-mode differentiation PyTorch's ops run.

    Raises:
        TypeError: pooled that is not a floating-point tensor, offsets that are not uint8, sizes
            that are not ints.
        ValueError: wrong rank or shape, mixed devices, kernel_size not positive or of more than 256
            elements, an output_size that does not fit.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    kernel_size = _check_kernel(kernel_size)
    check_map("pooled", pooled)
    size = _check_unpooling(pooled, offsets, kernel_size, output_size)
    backend = select("max_unpool2d_with_offsets", pooled)
    if library.under_functorch():
        return reference.max_unpool2d_with_offsets(pooled, offsets, kernel_size, size)
    if backend == "reference":
        return _laid_out(reference.max_unpool2d_with_offsets(pooled, offsets, kernel_size, size), pooled)
    return pag_max_unpool(pooled, offsets, kernel_size, size, is_channels_last(pooled), backend)


def _laid_out(result, like):
    return result.contiguous(memory_format=memory_format(like))


def _switched_on(decoder, encoders, merge):
    """Raises the errors of `partial_attention_gate` that are about its maps; returns the encoder
    maps that are on."""
    check_map("decoder", decoder)
    on = []
    for i, encoder in enumerate(encoders):
        name = f"encoders[{i}]"
        check_map(name, encoder)
        if encoder.dtype != decoder.dtype:
            raise TypeError(f"{name} must have decoder's dtype {decoder.dtype}; got {encoder.dtype}")
        if encoder.device != decoder.device:
            raise ValueError(f"{name} must be on decoder's device {decoder.device}; got {encoder.device}")
        if encoder.shape[0] != decoder.shape[0]:
            raise ValueError(f"{name} must have decoder's batch of {decoder.shape[0]}; got shape {tuple(encoder.shape)}")
        if encoder.shape[2] < decoder.shape[2] or encoder.shape[3] < decoder.shape[3]:
            continue
        if merge == "sum" and encoder.shape[1] != decoder.shape[1]:
            raise ValueError(
                f"{name} must have decoder's {decoder.shape[1]} channels where merge is 'sum'; got shape {tuple(encoder.shape)}"
            )
        on.append(encoder)
    return on


def _has_huge_windows(decoder, encoders):
    return any(has_windows_above(65536, each.shape, decoder.shape) for each in encoders)  # which two bytes do not number


def _check_kernel(kernel_size):
    """Raises on a bad kernel_size; returns it as [kh, kw]."""
    sides = positive_pair("kernel_size", kernel_size)
    if sides[0] * sides[1] > 256:
        raise ValueError(f"kernel_size must have at most 256 elements, which a byte can number; got {kernel_size!r}")
    return sides


def _check_unpooling(pooled, offsets, kernel_size, output_size):
    """Raises on offsets or an output_size that do not fit; returns output_size as [H, W]."""
    if not isinstance(offsets, torch.Tensor):
        raise TypeError(f"offsets must be a torch.Tensor; got {type(offsets).__name__}")
    if offsets.dtype != torch.uint8:
        raise TypeError(f"offsets must be uint8; got {offsets.dtype}")
    if offsets.shape != pooled.shape:
        raise ValueError(f"offsets must have pooled's shape {tuple(pooled.shape)}; got {tuple(offsets.shape)}")
    if offsets.device != pooled.device:
        raise ValueError(f"offsets must be on pooled's device {pooled.device}; got {offsets.device}")
    if not isinstance(output_size, (list, tuple)) or not all(map(is_int, output_size)):
        raise TypeError(f"output_size must be ints (H, W), or a shape that ends in them; got {output_size!r}")
    size = list(output_size[-2:])
    if (len(output_size) == 4 and tuple(output_size[:2]) != tuple(pooled.shape[:2])) or len(output_size) not in (2, 4):
        raise ValueError(
            f"output_size must be (H, W), or (N, C, H, W) with pooled's {tuple(pooled.shape[:2])}; got {tuple(output_size)}"
        )
    for side, count, step in zip(size, pooled.shape[2:], kernel_size, strict=True):
        if -(-side // step) != count:  # with inequalities, export would not see that it always holds
            fitting = " x ".join(f"[{k * (n - 1) + 1}, {k * n}]" for n, k in zip(pooled.shape[2:], kernel_size, strict=True))
            raise ValueError(
                f"output_size must be in {fitting} for pooled size {tuple(pooled.shape[2:])} and kernel_size {tuple(kernel_size)}; "
                f"got {tuple(output_size)}"
            )
    return size


# csrc/pag/pag.h says what they compute.
pool = library.kernel(
    "pag_pool(Tensor[] maps, Tensor(a!) out, Tensor(b!) offsets, int[] kernel_size, bool concat, bool channels_last) -> ()"
)
scatter = library.kernel(
    "pag_scatter(Tensor pooled, Tensor offsets, Tensor(a!) out, int[] kernel_size, bool channels_last) -> ()"
)
gather = library.kernel("pag_gather(Tensor input, Tensor offsets, Tensor(a!) out, int[] kernel_size, bool channels_last) -> ()")


# The merged maps, and the offsets of all pooled ones.
# `channels_last` is how an op reads and writes its maps, and its offsets: backward must know
# without looking at strides.
@library.op("pag(Tensor decoder, Tensor[] encoders, str merge, bool channels_last, str backend) -> (Tensor, Tensor)")
class pag:
    def empty(decoder, encoders, merge, channels_last):
        n, c, h, w = decoder.shape
        channels = c + sum(each.shape[1] for each in encoders) if merge == "concat" else c
        _, nbytes = offset_layout([each.shape for each in encoders], decoder.shape)
        # The large one first: the other way round a forward pass took 6 % longer on a CPU.
        out = _empty((n, channels, h, w), decoder, channels_last)
        return out, torch.empty(nbytes, dtype=torch.uint8, device=decoder.device)

    def fill(out, decoder, encoders, merge, channels_last, backend):
        out, offsets = out
        maps = [_readable(each, channels_last) for each in (decoder, *encoders)]
        pool(maps, out, offsets, [], merge == "concat", channels_last, backend=backend)
        layout, _ = offset_layout([each.shape for each in encoders], decoder.shape)
        for begin, nbytes in filter(None, layout):
            if nbytes % 16:
                offsets[begin + nbytes :][: -nbytes % 16] = 0  # what comes out of an op is never by chance

    def setup_context(ctx, out, decoder, encoders, merge, channels_last, backend):
        _, offsets = out
        ctx.shapes = [each.shape for each in (decoder, *encoders)]
        ctx.merge, ctx.settings = merge, {"channels_last": channels_last, "backend": backend}
        ctx.save_for_backward(offsets)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        if grad is None:
            return None, [None] * (len(ctx.shapes) - 1)
        (offsets,) = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
        layout, _ = offset_layout(ctx.shapes, ctx.shapes[0])
        grads, channel = [], 0
        for shape, need, place in zip(ctx.shapes, needed, layout, strict=True):
            part = None
            if need:
                part = grad.narrow(1, channel, shape[1]) if ctx.merge == "concat" else grad
                if place is not None:
                    part = pag_grad(part, offsets.narrow(0, *place), shape[2:], **ctx.settings)
            grads.append(part)
            channel += shape[1]
        return grads[0], grads[1:]


@library.op("pag_grad(Tensor grad, Tensor offsets, SymInt[] size, bool channels_last, str backend) -> Tensor")
class pag_grad:
    def empty(grad, size, channels_last):
        return _empty((*grad.shape[:2], *size), grad, channels_last)

    def fill(out, grad, offsets, channels_last, backend):
        scatter(_readable(grad, channels_last), offsets, out, [], channels_last, backend=backend)

    backward = library.no_double_backward("partial_attention_gate")


# The other three are linear, once where the maxima lie is known: unpool and gather are each other's
# derivative.
@library.op("pag_max_pool(Tensor input, int[] kernel_size, bool channels_last, str backend) -> (Tensor, Tensor)")
class pag_max_pool:
    def empty(input, kernel_size, channels_last):
        n, c, *size = input.shape
        shape = (n, c, *(-(-side // step) for side, step in zip(size, kernel_size, strict=True)))
        return _empty(shape, input, channels_last), _empty(shape, input, channels_last, torch.uint8)

    def fill(out, input, kernel_size, channels_last, backend):
        pooled, offsets = out
        pool([_readable(input, channels_last)], pooled, offsets, kernel_size, True, channels_last, backend=backend)

    def setup_context(ctx, out, input, kernel_size, channels_last, backend):
        _, offsets = out
        ctx.settings = {"kernel_size": kernel_size, "size": input.shape[2:], "channels_last": channels_last, "backend": backend}
        ctx.save_for_backward(offsets)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        return (None if grad is None else pag_max_unpool(grad, *ctx.saved_tensors, **ctx.settings),)


@library.op(
    "pag_max_unpool(Tensor pooled, Tensor offsets, int[] kernel_size, SymInt[] size, bool channels_last, str backend) -> Tensor"
)
class pag_max_unpool:
    def empty(pooled, size, channels_last):
        return _empty((*pooled.shape[:2], *size), pooled, channels_last)

    def fill(out, pooled, offsets, kernel_size, channels_last, backend):
        offsets = _dense(offsets, channels_last)
        scatter(_readable(pooled, channels_last), offsets, out, kernel_size, channels_last, backend=backend)

    def setup_context(ctx, out, offsets, kernel_size, channels_last, backend):
        ctx.settings = {"kernel_size": kernel_size, "channels_last": channels_last, "backend": backend}
        ctx.save_for_backward(offsets)

    def backward(ctx, grad):
        return (pag_max_gather(grad, *ctx.saved_tensors, **ctx.settings),)


@library.op("pag_max_gather(Tensor input, Tensor offsets, int[] kernel_size, bool channels_last, str backend) -> Tensor")
class pag_max_gather:
    def empty(input, offsets, channels_last):
        return _empty(offsets.shape, input, channels_last)

    def fill(out, input, offsets, kernel_size, channels_last, backend):
        offsets = _dense(offsets, channels_last)
        gather(_readable(input, channels_last), offsets, out, kernel_size, channels_last, backend=backend)

    def setup_context(ctx, out, input, offsets, kernel_size, channels_last, backend):
        ctx.settings = {"kernel_size": kernel_size, "size": input.shape[2:], "channels_last": channels_last, "backend": backend}
        ctx.save_for_backward(offsets)

    def backward(ctx, grad):
        return (pag_max_unpool(grad, *ctx.saved_tensors, **ctx.settings),)


def _empty(shape, like, channels_last, dtype=None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format_of(channels_last))


def _readable(tensor, channels_last):
    """The tensor with neighbours side by side along x, or along the channels: a kernel does with
    any other strides."""
    dim = 1 if channels_last else 3
    return tensor if tensor.stride(dim) == 1 or tensor.shape[dim] == 1 else _dense(tensor, channels_last)


def _dense(tensor, channels_last):
    return tensor.contiguous(memory_format=format_of(channels_last))
