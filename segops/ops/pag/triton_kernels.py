"""Pooling, scatter and gather in Triton; csrc/pag/pag.h gives their arguments and mathematics.

A program owns a stretch of elements in the order of memory. Windows are compile-time constants, an
adaptive kernel being 0 and its longest window the bound of the loops. Offsets into memory are
64-bit.
"""

import math

import torch
import triton
import triton.language as tl

from ..common.layout import format_of
from . import op
from .windows import longest_window, offset_layout

ELEMENTS_PER_PROGRAM = 512


@triton.jit
def _locate(i, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """(n, c, y, x) of element i."""
    if CHANNELS_LAST:
        c, x, y, n = i % channels, i // channels % width, i // channels // width % height, i // channels // width // height
    else:
        c, x, y, n = i // width // height % channels, i % width, i // width % height, i // width // height // channels
    return n, c, y, x


@triton.jit
def _begin(j, size, count, KERNEL: tl.constexpr):
    if KERNEL > 0:
        return j * KERNEL
    return j * size // count


@triton.jit
def _end(j, size, count, KERNEL: tl.constexpr):
    if KERNEL > 0:
        return tl.minimum((j + 1) * KERNEL, size)
    return ((j + 1) * size + count - 1) // count


@triton.jit
def _first(i, size, count, KERNEL: tl.constexpr):
    """The first window that holds element i."""
    if KERNEL > 0:
        return i // KERNEL
    return i * count // size


@triton.jit
def _last(i, size, count, KERNEL: tl.constexpr):
    if KERNEL > 0:
        return i // KERNEL
    return ((i + 1) * count + size - 1) // size - 1


@triton.jit
def _pool(
    maps, views, sizes, offsets, out, out_view, channels, height, width, elements,
    KERNELS: tl.constexpr, LONGEST: tl.constexpr, REMEMBERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = i < elements
    n, c, y, x = _locate(i, channels, height, width, CHANNELS_LAST)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for m in tl.static_range(len(maps)):
        top, bottom = _begin(y, sizes[m][0], height, KERNELS[m][0]), _end(y, sizes[m][0], height, KERNELS[m][0])
        left, right = _begin(x, sizes[m][1], width, KERNELS[m][1]), _end(x, sizes[m][1], width, KERNELS[m][1])
        here = maps[m] + n * views[m][0] + c * views[m][1] + top * views[m][2] + left * views[m][3]
        best = tl.full((ELEMENTS,), -float("inf"), tl.float32)
        at = tl.zeros((ELEMENTS,), tl.int32)
        for dy in range(LONGEST[m][0]):
            for dx in range(LONGEST[m][1]):
                inside = valid & (top + dy < bottom) & (left + dx < right)
                step = tl.full((), dy, tl.int64) * views[m][2] + tl.full((), dx, tl.int64) * views[m][3]
                v = tl.load(here + step, mask=inside, other=-float("inf")).to(tl.float32)
                later = (v > best) | (v != v)
                best = tl.where(later, v, best)
                at = tl.where(later, dy * LONGEST[m][1] + dx, at)
        if REMEMBERS[m]:
            tl.store(offsets[m] + i, at.to(offsets[m].dtype.element_ty), mask=valid)
        total = best if m == 0 else total + best
    to = out + n * out_view[0] + c * out_view[1] + y * out_view[2] + x * out_view[3]
    tl.store(to, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _scatter(
    pooled, pooled_view, offsets, out, out_view, channels, height, width, windows_y, windows_x, elements,
    KERNEL: tl.constexpr, LONGEST: tl.constexpr, HOLDERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = i < elements
    n, c, y, x = _locate(i, channels, height, width, CHANNELS_LAST)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for k in range(HOLDERS[0] * HOLDERS[1]):
        window_y = _first(y, height, windows_y, KERNEL[0]) + k // HOLDERS[1]
        window_x = _first(x, width, windows_x, KERNEL[1]) + k % HOLDERS[1]
        inside = (window_y <= _last(y, height, windows_y, KERNEL[0])) & (window_x <= _last(x, width, windows_x, KERNEL[1]))
        if CHANNELS_LAST:
            window = ((n * windows_y + window_y) * windows_x + window_x) * channels + c
        else:
            window = ((n * channels + c) * windows_y + window_y) * windows_x + window_x
        dy, dx = y - _begin(window_y, height, windows_y, KERNEL[0]), x - _begin(window_x, width, windows_x, KERNEL[1])
        at = tl.load(offsets + window, mask=valid & inside, other=0).to(tl.int32)
        wanted = valid & inside & (at == dy * LONGEST[1] + dx)
        there = n * pooled_view[0] + c * pooled_view[1] + window_y * pooled_view[2] + window_x * pooled_view[3]
        total += tl.load(pooled + there, mask=wanted, other=0.0).to(tl.float32)
    to = out + n * out_view[0] + c * out_view[1] + y * out_view[2] + x * out_view[3]
    tl.store(to, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _gather(
    input, input_view, offsets, out, out_view, channels, height, width, input_height, input_width, elements,
    KERNEL: tl.constexpr, LONGEST: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = i < elements
    n, c, y, x = _locate(i, channels, height, width, CHANNELS_LAST)
    at = tl.load(offsets + i, mask=valid, other=0).to(tl.int32)
    from_y = _begin(y, input_height, height, KERNEL[0]) + at // LONGEST[1]
    from_x = _begin(x, input_width, width, KERNEL[1]) + at % LONGEST[1]
    inside = valid & (from_y < _end(y, input_height, height, KERNEL[0])) & (from_x < _end(x, input_width, width, KERNEL[1]))
    there = n * input_view[0] + c * input_view[1] + from_y * input_view[2] + from_x * input_view[3]
    value = tl.load(input + there, mask=inside, other=0.0)
    to = out + n * out_view[0] + c * out_view[1] + y * out_view[2] + x * out_view[3]
    tl.store(to, value, mask=valid)


def _windows(size, count):
    """(kernel, longest window) along both axes; a kernel of 0 is adaptive."""
    longest = tuple(map(longest_window, size, count))
    return tuple(0 if a % b else a // b for a, b in zip(size, count, strict=True)), longest


def _typed(offsets, longest):
    return offsets if math.prod(longest) <= 256 else offsets.view(torch.uint16)


def _readable(tensor, channels_last):
    """The tensor with neighbours side by side along x, or along the channels: a kernel does with
    any other strides."""
    dim = 1 if channels_last else 3
    return tensor if tensor.stride(dim) == 1 or tensor.shape[dim] == 1 else _dense(tensor, channels_last)


def _dense(tensor, channels_last):
    return tensor.contiguous(memory_format=format_of(channels_last))


def _launch(kernel, out, *arguments, **constants):
    elements = out.numel()
    with torch.cuda.device_of(out):  # Triton launches on the current device; a CPU tensor is the interpreter's
        kernel[(triton.cdiv(elements, ELEMENTS_PER_PROGRAM),)](*arguments, elements, **constants, ELEMENTS=ELEMENTS_PER_PROGRAM)


def pag(maps, merge, channels_last):
    out, offsets = op.pag.empty(maps, merge, channels_last)
    if not out.numel():
        return out, offsets
    maps = [_readable(each, channels_last) for each in maps]
    size = tuple(out.shape[2:])
    windows = [_windows(tuple(each.shape[2:]), size) for each in maps]
    layout, _ = offset_layout([each.shape for each in maps])
    for begin, nbytes in filter(None, layout):
        if nbytes % 16:
            offsets[begin + nbytes :][: -nbytes % 16] = 0  # what comes out of an op is never by chance
    places = [
        None if place is None else _typed(offsets.narrow(0, *place), longest)
        for place, (_, longest) in zip(layout, windows, strict=True)
    ]
    # Under concat each map has a stretch of the output to itself; a sum is of all maps at once.
    groups, channel = [[m] for m in range(len(maps))] if merge == "concat" else [range(len(maps))], 0
    for group in groups:
        to = out.narrow(1, channel, maps[group[0]].shape[1])
        channel += to.shape[1]
        _pool_group([maps[m] for m in group], [windows[m] for m in group], [places[m] for m in group], to, channels_last)
    return out, offsets


def _pool_group(maps, windows, places, out, channels_last):
    _launch(
        _pool, out, tuple(maps), tuple(tuple(each.stride()) for each in maps), tuple(tuple(each.shape[2:]) for each in maps),
        tuple(out if place is None else place for place in places), out, out.stride(), *out.shape[1:],
        KERNELS=tuple(kernel for kernel, _ in windows), LONGEST=tuple(longest for _, longest in windows),
        REMEMBERS=tuple(place is not None for place in places), CHANNELS_LAST=channels_last,
    )  # fmt: skip


def pag_grad(grad, offsets, first_channel, channels, first_byte, height, width, channels_last):
    out = op.pag_grad.empty(grad, channels, height, width, channels_last)
    part = grad.narrow(1, first_channel, channels)
    return _scatter_into(out, part, offsets[first_byte:], _windows((height, width), tuple(grad.shape[2:])), channels_last)


def pag_max_pool(input, kernel_h, kernel_w, channels_last):
    pooled, offsets = op.pag_max_pool.empty(input, kernel_h, kernel_w, channels_last)
    windows = (kernel_h, kernel_w), (kernel_h, kernel_w)
    if pooled.numel():
        _pool_group([_readable(input, channels_last)], [windows], [offsets], pooled, channels_last)
    return pooled, offsets


def pag_max_unpool(pooled, offsets, kernel_h, kernel_w, height, width, channels_last):
    out = op.pag_max_unpool.empty(pooled, height, width, channels_last)
    windows = (kernel_h, kernel_w), (kernel_h, kernel_w)
    return _scatter_into(out, pooled, _dense(offsets, channels_last), windows, channels_last)


def _scatter_into(out, pooled, offsets, windows, channels_last):
    if out.numel():
        kernel, longest = windows
        pooled = _readable(pooled, channels_last)
        _launch(
            _scatter, out, pooled, pooled.stride(), _typed(offsets, longest), out, out.stride(), *out.shape[1:],
            *pooled.shape[2:], KERNEL=kernel, LONGEST=longest, HOLDERS=tuple(1 if k else 2 for k in kernel),
            CHANNELS_LAST=channels_last,
        )  # fmt: skip
    return out


def pag_max_gather(input, offsets, kernel_h, kernel_w, channels_last):
    out = op.pag_max_gather.empty(input, offsets, channels_last)
    if out.numel():
        input, offsets = _readable(input, channels_last), _dense(offsets, channels_last)
        _launch(
            _gather, out, input, input.stride(), offsets, out, out.stride(), *out.shape[1:], *input.shape[2:],
            KERNEL=(kernel_h, kernel_w), LONGEST=(kernel_h, kernel_w), CHANNELS_LAST=channels_last,
        )  # fmt: skip
    return out
