"""Pyramid atrous convolution for the arithmetic of one convolution: dense products plus two shift
kernels.

The filter is shared, so with t over its taps and r over the rates

    sum_r conv_r(x) = sum_t sum_r shift(W_t x, r t)     project, then gather     Cout * taps planes
                    = sum_t W_t sum_r shift(x, r t)     scatter, then project    Cin * taps planes

The input gradient is the same computation on the output's gradient, the weight gradient one scatter
and one product. The side with fewer channels is the one that is shifted. Kernels and products are
pixel-major, (N, H, W, C): contiguous maps are copied to that layout and back. On two CPU cores the
copies cost 8 to 20 % of a forward pass, and the same products on contiguous maps would cost 13 to
80 % more.

The planes are made in blocks of about `WORKSPACE` bytes, which on a CPU stay in cache;
the least block is 16 channels of an image. They have the products' dtype: float16 sums of shifted
inputs overflow where len(rates) * |input| passes 65504.
"""

import torch
import torch.nn.functional as F

from ..common import library

WORKSPACE = {"cpu": 4 << 20, "cuda": 256 << 20}
LARGEST_WORKSPACE = {"cpu": 32 << 20, "cuda": 1 << 30}

# csrc/pac/pac.h says what they compute.
shift_gather = library.kernel(
    "pac_shift_gather(Tensor planes, Tensor? bias, Tensor(a!) out, int[] kernel_size, int[] rates, int sign) -> ()"
)
shift_scatter = library.kernel(
    "pac_shift_scatter(Tensor source, Tensor(a!) out, int first_row, int[] kernel_size, int[] rates, int sign) -> ()"
)


def forward(input, weight, bias, rates, merge, out, backend):
    """Writes pyramid_atrous_conv2d(input, weight, bias) into `out`, of either memory format."""
    dtype, rates = _compute_dtype(input, backend), _clamp(rates, input)
    w = _live_taps(weight, rates, input).to(dtype)
    b = None if bias is None else bias.to(dtype).contiguous()
    x, y = _pixels(input, dtype), _buffer(out, dtype)
    groups = len(rates) if merge == "concat" else 1
    _convolve(x.unsqueeze(3), w, b, rates, 1, y.unflatten(3, (groups, -1)), backend)
    _deliver(y, out)


def input_gradient(grad, weight, rates, merge, out, backend):
    """Writes the gradient for the input into `out`: the adjoint of `forward` in the input."""
    dtype, rates = _compute_dtype(grad, backend), _clamp(rates, grad)
    w = _live_taps(weight, rates, grad).to(dtype)
    dy, dx = _pixels(grad, dtype), _buffer(out, dtype)
    groups = len(rates) if merge == "concat" else 1
    _convolve(dy.unflatten(3, (groups, -1)), w.transpose(0, 1), None, rates, -1, dx.unsqueeze(3), backend)
    _deliver(dx, out)


def weight_gradient(grad, input, rates, merge, out, backend):
    """Writes the gradient for the weight into `out` (Cout, Cin, k, k): the adjoint of `forward` in
    the weight."""
    dtype, rates = _compute_dtype(input, backend), _clamp(rates, input)
    dw = _live_taps(out.zero_(), rates, input)
    c_out, c_in, kh, kw = dw.shape
    dy, x = _pixels(grad, dtype), _pixels(input, dtype)
    total = None
    if merge == "concat" or c_out <= c_in:
        groups = len(rates) if merge == "concat" else 1
        for rows, planes in _scattered(dy.unflatten(3, (groups, -1)), (kh, kw), rates, -1, backend):
            total = _accumulate(total, planes, x.flatten(0, 2)[rows])
        dw.copy_(total.view(kh, kw, c_out, c_in).permute(2, 3, 0, 1))
    else:
        for rows, planes in _scattered(x.unsqueeze(3), (kh, kw), rates, 1, backend):
            total = _accumulate(total, dy.flatten(0, 2)[rows], planes)
        dw.copy_(total.view(c_out, kh, kw, c_in).permute(0, 3, 1, 2))


def _convolve(source, weight, bias, rates, sign, out, backend):
    """out (N, H, W, G, C) = bias + the shifts, by sign, of source (N, H, W, G', K) under weight
    (C, K, kh, kw).

    At most one of G and G' is not 1: there is a group per rate on the side that is concatenated.
    """
    n, h, w, source_groups, source_channels = source.shape
    channels, _, kh, kw = weight.shape
    plane = h * w * kh * kw * source.element_size()  # bytes, per image and channel
    device = library.device_type(source, backend)
    least = min(channels, 16)  # channels that make a product worth its call

    scatter = source_groups > 1 or (
        out.shape[3] == 1
        and (source_channels <= channels or (least * plane > LARGEST_WORKSPACE[device] and source_channels <= 4 * channels))
    )
    if scatter:
        flat = weight.permute(0, 2, 3, 1).flatten(1)
        bias = None if bias is None else bias * len(rates)
        for rows, planes in _scattered(source, (kh, kw), rates, sign, backend):
            out.view(-1, channels)[rows] = _linear(planes, flat, bias)
        return

    budget = WORKSPACE[device]
    images = min(n, max(1, budget // (least * plane)))
    block = min(channels, max(least, budget // (images * plane) // 16 * 16))
    for c in range(0, channels, block):
        flat = weight[c : c + block].permute(2, 3, 0, 1).flatten(0, 2)
        b = None if bias is None else bias[c : c + block]
        for i in range(0, n, images):
            part = source[i : i + images]
            planes = _linear(part.flatten(0, 3), flat).view(*part.shape[:3], kh * kw, -1)
            shift_gather(planes, b, out[i : i + images, ..., c : c + block], (kh, kw), rates, sign, backend=backend)


def _scattered(source, kernel_size, rates, sign, backend):
    """Yields (slice of pixels, scatter of source (N, H, W, G, C) as (pixels, taps * C)), strip
    after strip."""
    n, h, w, _, channels = source.shape
    taps = kernel_size[0] * kernel_size[1]
    pixels = max(2048, WORKSPACE[library.device_type(source, backend)] // (taps * channels * source.element_size()))
    rows = min(n * h, -(-pixels // w))
    rows = -(-n * h // -(-n * h // rows))  # the same number of strips, of even size
    buffer = source.new_empty((rows, w, taps, channels))
    for first in range(0, n * h, rows):
        strip = buffer[: n * h - first]
        shift_scatter(source, strip, first, kernel_size, rates, sign, backend=backend)
        yield slice(first * w, (first + len(strip)) * w), strip.view(-1, taps * channels)


def _linear(x, weight, bias=None):
    """x (M, K) @ weight (O, K).T + bias."""
    large = x.shape[0] >= 256 and x.shape[0] * weight.numel() >= 1 << 22
    if large and x.device.type == "cpu" and x.dtype != torch.float64:
        # As a 1x1 convolution it runs on oneDNN, 5-25 % faster than the BLAS once its 30 us of
        # overhead do not count.
        pixels = x.view(1, x.shape[0], 1, x.shape[1]).permute(0, 3, 1, 2)
        return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).view(x.shape[0], -1)
    return F.linear(x, weight, bias)


def _accumulate(total, a, b):
    """total + a.T @ b, summed in float32 at least; total is None at first."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.device.type == "cpu" and a.shape[1] * b.shape[1] < 2048:
        # The BLAS sums so small a product in one long sequence, and loses a digit to rounding: in
        # pieces it keeps it.
        product = sum((rows_a.t() @ rows_b).to(wide) for rows_a, rows_b in zip(a.split(512), b.split(512), strict=True))
    elif total is not None and wide == a.dtype:
        return total.addmm_(a.t(), b)
    else:
        product = (a.t() @ b).to(wide)
    return product if total is None else total.add_(product)


def _compute_dtype(tensor, backend):
    """What to compute in: a CPU without the instructions for half precision is faster, and more
    accurate, in float32."""
    if library.device_type(tensor, backend) == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16):
        native = tensor.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return tensor.dtype


def _pixels(tensor, dtype):
    """(N, C, H, W) of any strides as dense (N, H, W, C)."""
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _buffer(out, dtype):
    """Room for `out` as dense (N, H, W, C): its own memory where that is what it is."""
    pixels = out.permute(0, 2, 3, 1)
    _, h, w, c = pixels.shape
    dense = pixels.stride() == (h * w * c, w * c, c, 1)
    return pixels if dense and out.dtype == dtype else torch.empty(pixels.shape, dtype=dtype, device=out.device)


def _deliver(buffer, out):
    if buffer.data_ptr() != out.data_ptr():
        out.copy_(buffer.permute(0, 3, 1, 2))


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
