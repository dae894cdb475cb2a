"""Pyramid atrous convolution in Triton: the shift kernels, whose arguments and mathematics
csrc/pac/pac.h gives, and the ops that csrc/pac/pac.cpp explains.

A program owns a tile of pixels and channels and sums its reads in float32. Offsets are 64-bit. The
rates are compile-time constants and their loop is unrolled; the loop over taps is not, or the code
would be a megabyte.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..common.triton_launch import device_of
from . import op as ops

# Bytes of planes at a time; where the least block is larger than the second, the side with more
# channels may be scattered.
WORKSPACE = 256 << 20
LARGEST_WORKSPACE = 1 << 30
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


def _shift_gather(planes, bias, out, kernel_size, rates, sign):
    n, h, w, groups, channels = out.shape
    tile = _tile(channels)
    grid = (triton.cdiv(n * h * w, tile["PIXELS"]), triton.cdiv(channels, tile["CHANNELS"]), groups)
    with device_of(out):
        _gather[grid](
            planes, bias, out, n * h * w, h, w, channels, out.stride(2), out.stride(3),
            *kernel_size, tuple(rates), len(rates) // groups, sign, **tile,
        )  # fmt: skip


def _shift_scatter(source, out, first_row, kernel_size, rates, sign):
    _, h, w, groups, channels = source.shape
    rows = out.shape[0]
    tile = _tile(channels)
    grid = (triton.cdiv(rows * w, tile["PIXELS"]), triton.cdiv(channels, tile["CHANNELS"]))
    with device_of(out):
        _scatter[grid](source, out, first_row * w, rows * w, h, w, channels, *kernel_size, tuple(rates), groups, sign, **tile)


def pac(input, weight, bias, rates, merge):
    out = ops.pac.empty(input, weight, rates, merge)
    if _is_zero(out, input, weight):
        return out
    rates = _clamp(rates, input)
    bias = None if bias is None else bias.contiguous()
    x, y = _pixels(input), _buffer(out)
    groups = len(rates) if merge == "concat" else 1
    _convolve(x.unsqueeze(3), _live_taps(weight, rates, input), bias, rates, 1, y.unflatten(3, (groups, -1)))
    return _deliver(y, out)


def pac_input_grad(grad, weight, channels_last, rates, merge):
    out = ops.pac_input_grad.empty(grad, weight, channels_last)
    if _is_zero(out, grad, weight):
        return out
    rates = _clamp(rates, grad)
    w = _live_taps(weight, rates, grad).transpose(0, 1)
    dy, dx = _pixels(grad), _buffer(out)
    groups = len(rates) if merge == "concat" else 1
    _convolve(dy.unflatten(3, (groups, -1)), w, None, rates, -1, dx.unsqueeze(3))
    return _deliver(dx, out)


def pac_weight_grad(grad, input, kernel_size, channels_last, rates, merge):
    out = ops.pac_weight_grad.empty(grad, input, kernel_size, channels_last, rates, merge).zero_()
    if _is_zero(out, grad, input):
        return out
    rates = _clamp(rates, input)
    dw = _live_taps(out, rates, input)
    c_out, c_in, kh, kw = dw.shape
    dy, x = _pixels(grad), _pixels(input)
    total = None
    if merge == "concat" or c_out <= c_in:
        groups = len(rates) if merge == "concat" else 1
        for rows, planes in _scattered(dy.unflatten(3, (groups, -1)), (kh, kw), rates, -1):
            total = _accumulate(total, planes, x.flatten(0, 2)[rows])
        dw.copy_(total.view(kh, kw, c_out, c_in).permute(2, 3, 0, 1))
    else:
        for rows, planes in _scattered(x.unsqueeze(3), (kh, kw), rates, 1):
            total = _accumulate(total, dy.flatten(0, 2)[rows], planes)
        dw.copy_(total.view(c_out, kh, kw, c_in).permute(0, 3, 1, 2))
    return out


def pac_grads(grad, input, weight, input_channels_last, weight_channels_last, rates, merge):
    by_input, by_weight = ops.pac_grads.empty(grad, input, weight, input_channels_last, weight_channels_last)
    by_weight.zero_()
    if _is_zero(by_input, grad, input, weight):
        return by_input, by_weight
    c_out, c_in = weight.shape[:2]
    if merge == "sum" and c_out > c_in:  # they shift different maps
        return (
            pac_input_grad(grad, weight, input_channels_last, rates, merge),
            pac_weight_grad(grad, input, weight.shape[-1], weight_channels_last, rates, merge),
        )
    rates = _clamp(rates, input)
    w, dw = _live_taps(weight, rates, input), _live_taps(by_weight, rates, input)
    kh, kw = w.shape[2:]
    dy, x, dx = _pixels(grad), _pixels(input), _buffer(by_input)
    flat = w.permute(1, 2, 3, 0).flatten(1)
    total = None
    for rows, planes in _scattered(dy.unflatten(3, (-1, c_out)), (kh, kw), rates, -1):
        torch.mm(planes, flat.t(), out=dx.view(-1, c_in)[rows])
        total = _accumulate(total, planes, x.flatten(0, 2)[rows])
    dw.copy_(total.view(kh, kw, c_out, c_in).permute(2, 3, 0, 1))
    return _deliver(dx, by_input), by_weight


def _convolve(source, weight, bias, rates, sign, out):
    """out (N, H, W, G, C) = bias + the shifts, by sign, of source (N, H, W, G', K) under weight
    (C, K, kh, kw).

    At most one of G and G' is not 1: there is a group per rate on the side that is concatenated.
    """
    n, h, w, source_groups, source_channels = source.shape
    channels, _, kh, kw = weight.shape
    plane = h * w * kh * kw * source.element_size()  # bytes, per image and channel
    least = min(channels, 16)  # channels that make a product worth its call

    scatter = source_groups > 1 or (
        out.shape[3] == 1
        and (source_channels <= channels or (least * plane > LARGEST_WORKSPACE and source_channels <= 4 * channels))
    )
    if scatter:
        flat = weight.permute(0, 2, 3, 1).flatten(1)
        bias = None if bias is None else bias * len(rates)
        for rows, planes in _scattered(source, (kh, kw), rates, sign):
            out.view(-1, channels)[rows] = F.linear(planes, flat, bias)
        return

    images = min(n, max(1, WORKSPACE // (least * plane)))
    block = min(channels, max(least, WORKSPACE // (images * plane) // 16 * 16))
    block = min(block, -(-channels // -(-channels // block) // 16) * 16)  # as many blocks, of even size
    for c in range(0, channels, block):
        flat = weight[c : c + block].permute(2, 3, 0, 1).flatten(0, 2)
        b = None if bias is None else bias[c : c + block]
        for i in range(0, n, images):
            part = source[i : i + images]
            planes = F.linear(part.flatten(0, 3), flat).view(*part.shape[:3], kh * kw, -1)
            _shift_gather(planes, b, out[i : i + images, ..., c : c + block], (kh, kw), rates, sign)


def _scattered(source, kernel_size, rates, sign):
    """Yields (slice of pixels, scatter of source (N, H, W, G, C) as (pixels, taps * C)), strip
    after strip."""
    n, h, w, _, channels = source.shape
    taps = kernel_size[0] * kernel_size[1]
    pixels = max(2048, WORKSPACE // (taps * channels * source.element_size()))
    rows = min(n * h, -(-pixels // w))
    rows = -(-n * h // -(-n * h // rows))  # the same number of strips, of even size
    buffer = source.new_empty((rows, w, taps, channels))
    for first in range(0, n * h, rows):
        strip = buffer[: n * h - first]
        _shift_scatter(source, strip, first, kernel_size, rates, sign)
        yield slice(first * w, (first + len(strip)) * w), strip.view(-1, taps * channels)


def _accumulate(total, a, b):
    """total + a.T @ b, summed in float32 at least; total is None at first."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if total is not None and wide == a.dtype:
        return total.addmm_(a.t(), b)
    product = (a.t() @ b).to(wide)
    return product if total is None else total.add_(product)


def _pixels(tensor):
    """(N, C, H, W) of any strides as dense (N, H, W, C)."""
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _buffer(out):
    """Room for `out` as dense (N, H, W, C): its own memory where that is what it is."""
    pixels = out.permute(0, 2, 3, 1)
    return pixels if pixels.is_contiguous() else torch.empty_like(pixels, memory_format=torch.contiguous_format)


def _deliver(buffer, out):
    return out if buffer.data_ptr() == out.data_ptr() else out.copy_(buffer.permute(0, 3, 1, 2))


def _is_zero(out, *factors):
    """Whether there is nothing to sum up; then `out` is filled with zeros."""
    empty = any(factor.numel() == 0 for factor in factors)
    if empty:
        out.zero_()
    return empty


def _clamp(rates, image):
    """Rates beyond the map read nothing but the centre: as large as the map is as large as any, and
    no offset overflows."""
    return [min(rate, max(image.shape[2:])) for rate in rates]


def _live_taps(weight, rates, image):
    """The taps that can touch the map: one that even the smallest rate leads outside is skipped."""
    for dim in (2, 3):
        centre = weight.shape[dim] // 2
        reach = min(centre, (image.shape[dim] - 1) // min(rates))
        weight = weight.narrow(dim, centre - reach, 2 * reach + 1)
    return weight
