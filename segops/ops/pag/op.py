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
    maps = cast(decoder, *encoders, to=_widest)
    maps, has_huge_windows = _switched_on(maps, merge)
    decoder = maps[0]
    backend = select("partial_attention_gate", decoder)
    if library.under_functorch():
        return reference.partial_attention_gate(decoder, maps[1:], merge)
    if backend == "reference" or has_huge_windows or len(maps) > MAX_MAPS:
        return _laid_out(reference.partial_attention_gate(decoder, maps[1:], merge), decoder)
    return pag(maps, merge, is_channels_last(decoder), backend=backend)[0]


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
    return pag_max_pool(input, *kernel_size, is_channels_last(input), backend=backend)


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
    return pag_max_unpool(pooled, offsets, *kernel_size, *size, is_channels_last(pooled), backend=backend)


def _widest(_, dtypes):
    return functools.reduce(torch.promote_types, dtypes)


def _laid_out(result, like):
    return result.contiguous(memory_format=memory_format(like))


def _switched_on(maps, merge):
    """Raises the errors of `partial_attention_gate` that are about its maps, the first of which is
    the decoder; returns the decoder and the encoder maps that are on, and whether any of these has
    windows that two bytes do not number."""
    decoder = maps[0]
    check_map("decoder", decoder)
    shape, dtype, device = decoder.shape, decoder.dtype, decoder.device
    n, channels, height, width = shape
    on, has_huge_windows = [decoder], False
    for i in range(1, len(maps)):
        encoder, name = maps[i], f"encoders[{i - 1}]"
        check_map(name, encoder)
        if encoder.dtype != dtype:
            raise TypeError(f"{name} must have decoder's dtype {dtype}; got {encoder.dtype}")
        if encoder.device != device:
            raise ValueError(f"{name} must be on decoder's device {device}; got {encoder.device}")
        its = encoder.shape
        if its[0] != n:
            raise ValueError(f"{name} must have decoder's batch of {n}; got shape {tuple(its)}")
        if its[2] < height or its[3] < width:
            continue
        if merge == "sum" and its[1] != channels:
            raise ValueError(f"{name} must have decoder's {channels} channels where merge is 'sum'; got shape {tuple(its)}")
        on.append(encoder)
        has_huge_windows = has_huge_windows or has_windows_above(65536, its, shape)
    return on, has_huge_windows


def _check_kernel(kernel_size):
    """Raises on a bad kernel_size; returns it as [kh, kw]."""
    if type(kernel_size) is int and 1 <= kernel_size <= 16:
        return [kernel_size, kernel_size]
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
    shape = pooled.shape
    if offsets.shape != shape:
        raise ValueError(f"offsets must have pooled's shape {tuple(shape)}; got {tuple(offsets.shape)}")
    if offsets.device != pooled.device:
        raise ValueError(f"offsets must be on pooled's device {pooled.device}; got {offsets.device}")
    if not isinstance(output_size, (list, tuple)) or not all(map(is_int, output_size)):
        raise TypeError(f"output_size must be ints (H, W), or a shape that ends in them; got {output_size!r}")
    sides = len(output_size)
    if sides != 2 and (sides != 4 or tuple(output_size[:2]) != tuple(shape[:2])):
        raise ValueError(
            f"output_size must be (H, W), or (N, C, H, W) with pooled's {tuple(shape[:2])}; got {tuple(output_size)}"
        )
    (height, width), (kernel_h, kernel_w), (_, _, h, w) = output_size[-2:], kernel_size, shape
    # With inequalities, export would not see that it always holds.
    if -(-height // kernel_h) != h or -(-width // kernel_w) != w:
        fitting = " x ".join(f"[{k * (n - 1) + 1}, {k * n}]" for n, k in ((h, kernel_h), (w, kernel_w)))
        raise ValueError(
            f"output_size must be in {fitting} for pooled size {(h, w)} and kernel_size {(kernel_h, kernel_w)}; "
            f"got {tuple(output_size)}"
        )
    return [height, width]


# csrc/pag/pag.h says what they compute. `channels_last` is how an op reads and writes its maps, and
# its offsets: backward must know without looking at strides.


# The merged maps, the first being the decoder, and the offsets of all pooled ones.
@library.op("pag(Tensor[] maps, str merge, bool channels_last) -> (Tensor, Tensor)")
class pag:
    def empty(maps, merge, channels_last):
        shapes = [each.shape for each in maps]
        n, c, h, w = shapes[0]
        channels = sum(shape[1] for shape in shapes) if merge == "concat" else c
        _, nbytes = offset_layout(shapes)
        out = _empty((n, channels, h, w), maps[0], channels_last)
        return out, torch.empty(nbytes, dtype=torch.uint8, device=out.device)

    def setup_context(ctx, out, maps, merge, channels_last):
        _, offsets = out
        ctx.shapes = [each.shape for each in maps]
        ctx.concat, ctx.channels_last = merge == "concat", channels_last
        ctx.save_for_backward(offsets)

    def backward(ctx, needed, grad):
        (offsets,) = ctx.saved_tensors
        layout, _ = offset_layout(ctx.shapes)
        grads, channel = [], 0
        for shape, need, place in zip(ctx.shapes, needed, layout, strict=True):
            _, channels, height, width = shape
            if not need:
                grads.append(None)
            elif place is not None:
                part = channel, channels, place[0], height, width, ctx.channels_last
                grads.append(pag_grad(grad, offsets, *part, backend=ctx.backend))
            else:
                grads.append(grad.narrow(1, channel, channels) if ctx.concat else grad)
            if ctx.concat:
                channel += channels
        return tuple(grads)


@library.op(
    "pag_grad(Tensor grad, Tensor offsets, SymInt first_channel, SymInt channels, SymInt first_byte, "
    "SymInt height, SymInt width, bool channels_last) -> Tensor"
)
class pag_grad:
    def empty(grad, channels, height, width, channels_last):
        return _empty((grad.shape[0], channels, height, width), grad, channels_last)

    backward = library.no_double_backward("partial_attention_gate")


# The other three are linear, once where the maxima lie is known: unpool and gather are each other's
# derivative.
@library.op("pag_max_pool(Tensor input, int kernel_h, int kernel_w, bool channels_last) -> (Tensor, Tensor)")
class pag_max_pool:
    def empty(input, kernel_h, kernel_w, channels_last):
        n, c, h, w = input.shape
        shape = (n, c, -(-h // kernel_h), -(-w // kernel_w))
        return _empty(shape, input, channels_last), _empty(shape, input, channels_last, torch.uint8)

    def setup_context(ctx, out, input, kernel_h, kernel_w, channels_last):
        _, offsets = out
        ctx.settings = kernel_h, kernel_w, *input.shape[2:], channels_last
        ctx.save_for_backward(offsets)

    def backward(ctx, needed, grad):
        return (pag_max_unpool(grad, *ctx.saved_tensors, *ctx.settings, backend=ctx.backend),)


@library.op(
    "pag_max_unpool(Tensor pooled, Tensor offsets, int kernel_h, int kernel_w, SymInt height, SymInt width, "
    "bool channels_last) -> Tensor"
)
class pag_max_unpool:
    def empty(pooled, height, width, channels_last):
        return _empty((*pooled.shape[:2], height, width), pooled, channels_last)

    def setup_context(ctx, out, offsets, kernel_h, kernel_w, channels_last):
        ctx.settings = kernel_h, kernel_w, channels_last
        ctx.save_for_backward(offsets)

    def backward(ctx, needed, grad):
        return (pag_max_gather(grad, *ctx.saved_tensors, *ctx.settings, backend=ctx.backend),)


@library.op("pag_max_gather(Tensor input, Tensor offsets, int kernel_h, int kernel_w, bool channels_last) -> Tensor")
class pag_max_gather:
    def empty(input, offsets, channels_last):
        return _empty(offsets.shape, input, channels_last)

    def setup_context(ctx, out, input, offsets, kernel_h, kernel_w, channels_last):
        ctx.settings = kernel_h, kernel_w, *input.shape[2:], channels_last
        ctx.save_for_backward(offsets)

    def backward(ctx, needed, grad):
        return (pag_max_unpool(grad, *ctx.saved_tensors, *ctx.settings, backend=ctx.backend),)


def _empty(shape, like, channels_last, dtype=None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format_of(channels_last))
