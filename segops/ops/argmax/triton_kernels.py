"""Upsampling and argmax in Triton; csrc/argmax/argmax.h gives the arguments and mathematics.

The loops over classes are `while`: Triton's interpreter, up to 3.6, takes no `range` of an
argument.
"""

import torch
import triton
import triton.language as tl

from ..common.triton_launch import device_of, index_type
from ..common.triton_resize import source
from .op import argmax

PIXELS_PER_PROGRAM = 256

# Numbers that no kernel is compiled for.
SIZES = (
    "positions", "pixels", "height", "width", "h", "w", "classes", "stride_n", "stride_c", "stride_y", "stride_x",
)  # fmt: skip


@triton.jit
def _see(value, largest, index, c):
    """The larger of value, of class c, and what came before; a NaN is larger than any number, and
    the first stays."""
    takes = (value > largest) | ((value != value) & (largest == largest))
    return tl.where(takes, value, largest), tl.where(takes, c, index)


@triton.jit(do_not_specialize=SIZES)
def _best(
    logits, best, positions, h, w, classes, stride_n, stride_c, stride_y, stride_x, PIXELS: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    mask = at < positions
    x, y, n = (at % w).to(tl.int64), (at // w % h).to(tl.int64), (at // w // h).to(tl.int64)
    from_ = logits + n * stride_n + y * stride_y + x * stride_x
    largest = tl.load(from_, mask=mask, other=0.0).to(tl.float32)
    index = tl.zeros((PIXELS,), tl.int32)
    c = 1
    while c < classes:
        from_ += stride_c
        largest, index = _see(tl.load(from_, mask=mask, other=0.0).to(tl.float32), largest, index, c)
        c += 1
    tl.store(best + at, tl.where(largest < float("inf"), index, ~index), mask=mask)


@triton.jit
def _between(low, high, weight):
    """A logit that weighs nothing is not looked at: zero times infinity is no number."""
    return tl.where(weight == 0, low, (1 - weight) * low + weight * high)


@triton.jit
def _logit(upper_left, upper_right, lower_left, lower_right, mask, wy, wx):
    """The logits at these corners, resized."""
    a = tl.load(upper_left, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(upper_right, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(lower_left, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(lower_right, mask=mask, other=0.0).to(tl.float32)
    return _between(_between(a, b, wx), _between(c, d, wx), wy)


@triton.jit(do_not_specialize=SIZES)
def _upsample(
    logits, best, out, pixels, height, width, h, w, classes, stride_n, stride_c, stride_y, stride_x,
    RESIZED: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
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
            image = logits + n.to(tl.int64) * stride_n
            upper, lower = image + y_low.to(tl.int64) * stride_y, image + y_high.to(tl.int64) * stride_y
            left, right = x_low.to(tl.int64) * stride_x, x_high.to(tl.int64) * stride_x
            a, b, c, d = upper + left, upper + right, lower + left, lower + right
            needed = mask & differ
            largest = _logit(a, b, c, d, needed, wy, wx)
            own = tl.zeros((PIXELS,), tl.int32)
            k = 1
            while k < classes:
                a, b, c, d = a + stride_c, b + stride_c, c + stride_c, d + stride_c
                largest, own = _see(_logit(a, b, c, d, needed, wy, wx), largest, own, k)
                k += 1
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
    height, width = size
    best = torch.empty((n, h, w), dtype=torch.int32, device=logits.device)
    tile = {
        "PIXELS": PIXELS_PER_PROGRAM,
        "INDEX": index_type(logits.numel(), out.numel(), 2 * (h + 1) * height, 2 * (w + 1) * width),
    }
    with device_of(logits):
        _best[(triton.cdiv(best.numel(), PIXELS_PER_PROGRAM),)](
            logits, best, best.numel(), h, w, classes, *logits.stride(), **tile
        )  # fmt: skip
        _upsample[(triton.cdiv(out.numel(), PIXELS_PER_PROGRAM),)](
            logits, best, out, out.numel(), height, width, h, w, classes, *logits.stride(),
            RESIZED=(h, w) != (height, width), **tile,
        )  # fmt: skip
    return out
