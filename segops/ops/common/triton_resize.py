"""Bilinear resizing in Triton: csrc/common/resize.h gives the mathematics.

Positions are integers, in units of 1 / (2 * out) of a source pixel, so that they are exact.
"""

import triton
import triton.language as tl


@triton.jit
def source(i, size_in, size_out):
    """(low, high, weight): output i is (1 - weight) * source[low] + weight * source[high]."""
    at = tl.maximum((2 * i + 1) * size_in - size_out, 0)
    low = tl.minimum(at // (2 * size_out), size_in - 1)
    weight = tl.div_rn((at % (2 * size_out)).to(tl.float32), 2.0 * size_out)  # halves are exact
    weight = tl.where(low == size_in - 1, 0.0, weight)
    return low, tl.minimum(low + 1, size_in - 1), weight


@triton.jit
def between(low, high, weight):
    return (1 - weight) * low + weight * high


@triton.jit
def first_output(j, size_in, size_out):
    """The first output of a bilinear resize whose `low` is at least j."""
    first = ((2 * j + 1) * size_out + size_in - 1) // (2 * size_in)
    return tl.where(j <= 0, 0, tl.where(j >= size_in, size_out, first))


@triton.jit
def offset_in_cell(i, low, size_in, size_out):
    """Where output i lies from its source `low` on, in units of 1 / (2 * size_out), which add up to
    less than 2^31: the next output is 2 * size_in further. Negative before the first source."""
    return ((2 * i + 1) * size_in - size_out - 2 * size_out * low).to(tl.int32)


@triton.jit
def weight_of(offset, size_out):
    """That of the source after `low`, if there is one."""
    return tl.div_rn(tl.maximum(offset, 0).to(tl.float32), 2.0 * size_out)
