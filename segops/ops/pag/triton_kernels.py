"""Pooling, scatter and gather in Triton; csrc/pag/pag.h gives their arguments and mathematics.

A program owns a stretch of a plane or, where channels lie side by side, of a row, in the order of
memory. Exact windows are compile-time constants, an adaptive kernel being 0; its longest window is
an argument, and bounds a `while`, as Triton's interpreter takes no `range` of one up to 3.6.
Offsets into memory are 64-bit.
"""

import math

import torch
import triton
import triton.language as tl

from ..common.layout import format_of
from ..common.triton_launch import device_of, index_type
from . import op
from .windows import longest_window, offset_layout

ELEMENTS_PER_PROGRAM = 512


@triton.jit
def _locate(
    inner, channels, height, width, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """(n, c, y, x) of this program's elements, their places in memory, and whether they exist;
    `inner` is the size of a plane or a row."""
    tiles = tl.cdiv(inner, ELEMENTS)
    outer = tl.program_id(0) // tiles
    i = (tl.program_id(0) % tiles).to(INDEX) * ELEMENTS + tl.arange(0, ELEMENTS)
    if CHANNELS_LAST:
        n, y, x, c = outer // height, tl.full((ELEMENTS,), outer % height, INDEX), i // channels, i % channels
    else:
        n, c, y, x = outer // channels, outer % channels, i // width, i % width
    return n.to(tl.int64), c.to(tl.int64), y, x, outer.to(tl.int64) * inner + i, i < inner


@triton.jit
def _offset(view, n, c, y, x):
    return n * view[0] + c * view[1] + y.to(tl.int64) * view[2] + x.to(tl.int64) * view[3]


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
    maps, views, sizes, longest, offsets, out, out_view, inner, channels, height, width,
    KERNELS: tl.constexpr, REMEMBERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    n, c, y, x, place, valid = _locate(inner, channels, height, width, CHANNELS_LAST, ELEMENTS, INDEX)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for m in tl.static_range(len(maps)):
        top, bottom = _begin(y, sizes[m][0], height, KERNELS[m][0]), _end(y, sizes[m][0], height, KERNELS[m][0])
        left, right = _begin(x, sizes[m][1], width, KERNELS[m][1]), _end(x, sizes[m][1], width, KERNELS[m][1])
        rows = KERNELS[m][0] if KERNELS[m][0] > 0 else longest[m][0]
        columns = KERNELS[m][1] if KERNELS[m][1] > 0 else longest[m][1]
        here = maps[m] + _offset(views[m], n, c, top, left)
        best = tl.full((ELEMENTS,), -float("inf"), tl.float32)
        at = tl.zeros((ELEMENTS,), tl.int32)
        dy = 0
        while dy < rows:
            dx = 0
            while dx < columns:
                inside = valid & (top + dy < bottom) & (left + dx < right)
                step = tl.full((), dy, tl.int64) * views[m][2] + tl.full((), dx, tl.int64) * views[m][3]
                v = tl.load(here + step, mask=inside, other=-float("inf")).to(tl.float32)
                later = (v > best) | (v != v)
                best = tl.where(later, v, best)
                at = tl.where(later, dy * columns + dx, at)
                dx += 1
            dy += 1
        if REMEMBERS[m]:
            tl.store(offsets[m] + place, at.to(offsets[m].dtype.element_ty), mask=valid)
        total = best if m == 0 else total + best
    tl.store(out + _offset(out_view, n, c, y, x), total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _scatter(
    pooled, pooled_view, offsets, longest, out, out_view, inner, channels, height, width, windows_y, windows_x,
    KERNEL: tl.constexpr, HOLDERS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    n, c, y, x, _, valid = _locate(inner, channels, height, width, CHANNELS_LAST, ELEMENTS, INDEX)
    total = tl.zeros((ELEMENTS,), tl.float32)
    first_y, last_y = _first(y, height, windows_y, KERNEL[0]), _last(y, height, windows_y, KERNEL[0])
    first_x, last_x = _first(x, width, windows_x, KERNEL[1]), _last(x, width, windows_x, KERNEL[1])
    columns = KERNEL[1] if KERNEL[1] > 0 else longest[1]
    for k in range(HOLDERS[0] * HOLDERS[1]):
        window_y, window_x = first_y + k // HOLDERS[1], first_x + k % HOLDERS[1]
        inside = valid & (window_y <= last_y) & (window_x <= last_x)
        if CHANNELS_LAST:
            window = ((n * windows_y + window_y) * windows_x + window_x) * channels + c
        else:
            window = ((n * channels + c) * windows_y + window_y) * windows_x + window_x
        dy, dx = y - _begin(window_y, height, windows_y, KERNEL[0]), x - _begin(window_x, width, windows_x, KERNEL[1])
        at = tl.load(offsets + window, mask=inside, other=0).to(tl.int32)
        wanted = inside & (at == dy * columns + dx)
        total += tl.load(pooled + _offset(pooled_view, n, c, window_y, window_x), mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + _offset(out_view, n, c, y, x), total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _gather(
    input, input_view, offsets, out, out_view, inner, channels, height, width, input_height, input_width,
    KERNEL: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    n, c, y, x, place, valid = _locate(inner, channels, height, width, CHANNELS_LAST, ELEMENTS, INDEX)
    at = tl.load(offsets + place, mask=valid, other=0).to(tl.int32)
    from_y, from_x = y * KERNEL[0] + at // KERNEL[1], x * KERNEL[1] + at % KERNEL[1]
    inside = valid & (at < KERNEL[0] * KERNEL[1]) & (from_y < input_height) & (from_x < input_width)
    value = tl.load(input + _offset(input_view, n, c, from_y, from_x), mask=inside, other=0.0)
    tl.store(out + _offset(out_view, n, c, y, x), value, mask=valid)


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


def _launch(kernel, out, other_sizes, channels_last, *arguments, **more):
    """On all elements of `out`, whose pixels have others, of maps of these sizes, to do with."""
    n, channels, *size = out.shape
    outer, inner = (n * size[0], size[1] * channels) if channels_last else (n * channels, math.prod(size))
    products = [(a + 1) * (b + 1) for other in other_sizes for a, b in zip(size, other, strict=True)]
    with device_of(out):
        kernel[(outer * triton.cdiv(inner, ELEMENTS_PER_PROGRAM),)](
            *arguments, out, out.stride(), inner, channels, *size, **more,
            CHANNELS_LAST=channels_last, ELEMENTS=ELEMENTS_PER_PROGRAM, INDEX=index_type(inner, *products),
        )  # fmt: skip


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
    sizes = tuple(tuple(each.shape[2:]) for each in maps)
    _launch(
        _pool, out, sizes, channels_last, tuple(maps), tuple(tuple(each.stride()) for each in maps), sizes,
        tuple(longest for _, longest in windows), tuple(out if place is None else place for place in places),
        KERNELS=tuple(kernel for kernel, _ in windows), REMEMBERS=tuple(place is not None for place in places),
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
        windows_y, windows_x = pooled.shape[2:]
        _launch(
            _scatter, out, [pooled.shape[2:]], channels_last, pooled, pooled.stride(), _typed(offsets, longest), longest,
            windows_y=windows_y, windows_x=windows_x, KERNEL=kernel, HOLDERS=tuple(1 if k else 2 for k in kernel),
        )  # fmt: skip
    return out


def pag_max_gather(input, offsets, kernel_h, kernel_w, channels_last):
    out = op.pag_max_gather.empty(input, offsets, channels_last)
    if out.numel():
        input, offsets = _readable(input, channels_last), _dense(offsets, channels_last)
        input_height, input_width = input.shape[2:]
        _launch(
            _gather, out, [input.shape[2:]], channels_last, input, input.stride(), offsets,
            input_height=input_height, input_width=input_width, KERNEL=(kernel_h, kernel_w),
        )  # fmt: skip
    return out
