"""The shift kernels in Triton; csrc/pac/pac.h gives their arguments and mathematics.

A program owns a tile of pixels and channels and sums its reads in float32. Offsets are 64-bit. The
rates are compile-time constants and their loop is unrolled; the loop over taps is not, or the code
would be a megabyte.
"""

import torch
import triton
import triton.language as tl

MAX_CHANNELS_PER_PROGRAM = 128
PIXELS_PER_PROGRAM = 16


@triton.jit
def _gather(
    planes, bias, out, pixels, height, width, channels, out_pixel_stride, out_group_stride,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr, rates: tl.constexpr, rates_per_group: tl.constexpr, sign: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(2)
    group_p = tl.full((PIXELS,), group, tl.int32)  # for masks: a scalar's comparison is no mask to Triton 3.9's interpreter
    x, y = p % width, p // width % height
    valid_p, valid_c = p < pixels, c < channels
    mask = valid_p[:, None] & valid_c[None, :]
    taps: tl.constexpr = kernel_h * kernel_w
    row = tl.full((), width, tl.int64)

    here = planes + (p[:, None] * taps) * channels + c[None, :]
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for t in range(taps):
        ky = sign * (t // kernel_w - kernel_h // 2)
        kx = sign * (t % kernel_w - kernel_w // 2)
        for r in tl.static_range(len(rates)):
            dy, dx = ky * rates[r], kx * rates[r]
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width) & (group_p == r // rates_per_group)
            step = ((dy * row + dx) * taps + t) * channels
            acc += tl.load(here + step, mask=mask & inside[:, None], other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + c, mask=valid_c, other=0.0).to(tl.float32)[None, :] * rates_per_group
    to = out + p[:, None] * out_pixel_stride + group * out_group_stride + c[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scatter(
    source, out, first_pixel, pixels, height, width, channels,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr, rates: tl.constexpr, groups: tl.constexpr, sign: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p = q + first_pixel
    x, y = p % width, p // width % height
    valid_p, valid_c = q < pixels, c < channels
    mask = valid_p[:, None] & valid_c[None, :]
    taps: tl.constexpr = kernel_h * kernel_w
    row = tl.full((), width, tl.int64)

    here = source + (p[:, None] * groups) * channels + c[None, :]
    for t in range(taps):
        ky = sign * (t // kernel_w - kernel_h // 2)
        kx = sign * (t % kernel_w - kernel_w // 2)
        acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for r in tl.static_range(len(rates)):
            dy, dx = ky * rates[r], kx * rates[r]
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            step = ((dy * row + dx) * groups + r * groups // len(rates)) * channels
            acc += tl.load(here + step, mask=mask & inside[:, None], other=0.0).to(tl.float32)
        to = out + (q[:, None] * taps + t) * channels + c[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=mask)


def _tile(channels):
    return {"PIXELS": PIXELS_PER_PROGRAM, "CHANNELS": min(MAX_CHANNELS_PER_PROGRAM, triton.next_power_of_2(channels))}


def pac_shift_gather(planes, bias, out, kernel_size, rates, sign):
    n, h, w, groups, channels = out.shape
    tile = _tile(channels)
    grid = (triton.cdiv(n * h * w, tile["PIXELS"]), triton.cdiv(channels, tile["CHANNELS"]), groups)
    with torch.cuda.device_of(out):  # a CPU tensor is the interpreter's
        _gather[grid](
            planes, bias, out, n * h * w, h, w, channels, out.stride(2), out.stride(3),
            *kernel_size, tuple(rates), len(rates) // groups, sign, **tile,
        )  # fmt: skip


def pac_shift_scatter(source, out, first_row, kernel_size, rates, sign):
    _, h, w, groups, channels = source.shape
    rows = out.shape[0]
    tile = _tile(channels)
    grid = (triton.cdiv(rows * w, tile["PIXELS"]), triton.cdiv(channels, tile["CHANNELS"]))
    with torch.cuda.device_of(out):
        _scatter[grid](source, out, first_row * w, rows * w, h, w, channels, *kernel_size, tuple(rates), groups, sign, **tile)
