"""Upsampling and argmax in Triton; csrc/argmax/argmax.h gives the arguments and mathematics."""

import torch
import triton
import triton.language as tl

from ..common.triton_resize import source
from .op import argmax

PIXELS_PER_PROGRAM = 256


@triton.jit
def _see(value, largest, index, c):
    """The larger of value, of class c, and what came before; a NaN is larger than any number, and
    the first stays."""
    takes = (value > largest) | ((value != value) & (largest == largest))
    return tl.where(takes, value, largest), tl.where(takes, c, index)


@triton.jit
def _best(
    logits, best, positions, h, w, stride_n, stride_c, stride_y, stride_x, CLASSES: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    mask = at < positions
    from_ = logits + at // w // h * stride_n + at // w % h * stride_y + at % w * stride_x
    step = tl.full((), stride_c, tl.int64)
    largest = tl.load(from_, mask=mask, other=0.0).to(tl.float32)
    index = tl.zeros((PIXELS,), tl.int32)
    for c in range(1, CLASSES):
        largest, index = _see(tl.load(from_ + c * step, mask=mask, other=0.0).to(tl.float32), largest, index, c)
    tl.store(best + at, tl.where(largest < float("inf"), index, ~index), mask=mask)


@triton.jit
def _between(low, high, weight):
    """A logit that weighs nothing is not looked at: zero times infinity is no number."""
    return tl.where(weight == 0, low, (1 - weight) * low + weight * high)


@triton.jit
def _logit(upper_left, upper_right, lower_left, lower_right, offset, mask, wy, wx):
    """The logits at pointers + offset, resized from four corners."""
    a = tl.load(upper_left + offset, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(upper_right + offset, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(lower_left + offset, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(lower_right + offset, mask=mask, other=0.0).to(tl.float32)
    return _between(_between(a, b, wx), _between(c, d, wx), wy)


@triton.jit
def _upsample(
    logits, best, out, pixels, height, width, h, w, stride_n, stride_c, stride_y, stride_x,
    CLASSES: tl.constexpr, RESIZED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    mask = at < pixels
    if RESIZED:
        n = at // width // height
        y_low, y_high, wy = source(at // width % height, h, height)
        x_low, x_high, wx = source(at % width, w, width)
        above, below = best + (n * h + y_low) * w, best + (n * h + y_high) * w
        index = tl.load(above + x_low, mask=mask, other=0)
        differ = (index < 0) | (index != tl.load(above + x_high, mask=mask, other=0))
        differ = differ | (index != tl.load(below + x_low, mask=mask, other=0))
        differ = differ | (index != tl.load(below + x_high, mask=mask, other=0))
        if tl.max(differ.to(tl.int32), 0) > 0:
            upper, lower = logits + n * stride_n + y_low * stride_y, logits + n * stride_n + y_high * stride_y
            a, b, c, d = (
                upper + x_low * stride_x,
                upper + x_high * stride_x,
                lower + x_low * stride_x,
                lower + x_high * stride_x,
            )
            needed = mask & differ
            step = tl.full((), stride_c, tl.int64)
            largest = _logit(a, b, c, d, 0, needed, wy, wx)
            own = tl.zeros((PIXELS,), tl.int32)
            for k in range(1, CLASSES):
                largest, own = _see(_logit(a, b, c, d, k * step, needed, wy, wx), largest, own, k)
            index = tl.where(differ, own, index)
    else:
        index = tl.load(best + at, mask=mask, other=0)
        index = tl.where(index < 0, ~index, index)
    tl.store(out + at, index.to(tl.int64), mask=mask)


def upsample_argmax(logits, size):
    out = argmax.empty(logits, size)
    if not out.numel():
        return out
    n, classes, h, w = logits.shape
    best = torch.empty((n, h, w), dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        _best[(triton.cdiv(best.numel(), PIXELS_PER_PROGRAM),)](
            logits, best, best.numel(), h, w, *logits.stride(), classes, PIXELS_PER_PROGRAM
        )  # fmt: skip
        _upsample[(triton.cdiv(out.numel(), PIXELS_PER_PROGRAM),)](
            logits, best, out, out.numel(), *size, h, w, *logits.stride(), classes, [h, w] != [*size], PIXELS_PER_PROGRAM
        )  # fmt: skip
    return out
