"""The boundary-aware loss in Triton; csrc/bal/bal.h gives the kernels' arguments and mathematics.

The gradient gathers per logit: every softmax in its footprint is computed again from its
coefficients, and nothing is added to memory.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..common.triton_resize import first_output, share_of, source
from .labels import raise_on_wrong_label
from .op import check_weight_size, cross_entropy, cross_entropy_map_grad

PIXELS_PER_PROGRAM = 128
COLUMNS_PER_PROGRAM = 16
CLASSES_PER_PROGRAM = 8


@triton.jit
def _class_of(labels, at, mask, classes, ignore_index):
    """The label's class, -1 where it is ignored, -2 where it is none of the classes."""
    label = tl.load(labels + at, mask=mask, other=0).to(tl.int64)
    inside = (label >= 0) & (label < classes)
    return tl.where(label == ignore_index, -1, tl.where(inside, label, -2))


@triton.jit
def _triangle(i, tap, size_in, size_out):
    """The weight, before normalisation, of a source in output i of an antialiased resize."""
    distance = tl.abs((2 * tap + 1) * size_out - (2 * i + 1) * size_in).to(tl.float32) / (2 * size_in)
    return tl.where((tap >= 0) & (tap < size_in), tl.maximum(1 - distance, 0.0), 0.0)


@triton.jit
def _count_edges(
    labels, out, outputs, height, width, h, w, classes, ignore_index,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, RESIZED: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = index < outputs
    j, i, image = index % w, index // w % h, index // w // h
    first_y, first_x = i, j
    if RESIZED:
        first_y = tl.maximum((2 * i - 1) * height, 0) // (2 * h)
        first_x = tl.maximum((2 * j - 1) * width, 0) // (2 * w)
    total = tl.zeros((OUTPUTS,), tl.float32)
    weights = tl.zeros((OUTPUTS,), tl.float32)
    for ky in range(TAPS_Y):
        y = first_y + ky
        weight_y = _triangle(i, y, height, h) if RESIZED else 1.0
        row = (image * height + tl.minimum(y, height - 1)) * width
        lower = (image * height + tl.minimum(y + 1, height - 1)) * width
        for kx in range(TAPS_X):
            x = first_x + kx
            here, right = tl.minimum(x, width - 1), tl.minimum(x + 1, width - 1)
            a = _class_of(labels, row + here, mask, classes, ignore_index)
            b = _class_of(labels, row + right, mask, classes, ignore_index)
            c = _class_of(labels, lower + here, mask, classes, ignore_index)
            distinct = (a >= 0).to(tl.float32) + ((b >= 0) & (b != a)).to(tl.float32)
            distinct += ((c >= 0) & (c != a) & (c != b)).to(tl.float32)
            weight = weight_y * _triangle(j, x, width, w) if RESIZED else tl.full((OUTPUTS,), 1.0, tl.float32)
            total += weight * tl.where((a == b) & (a == c), 0.0, distinct)
            weights += weight
    tl.store(out + index, total / weights, mask=mask)


@triton.jit
def _blur_x(edges, factors, rows, elements, w, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = index % w
    sum1 = tl.zeros((ELEMENTS,), tl.float32)
    sum2 = tl.zeros((ELEMENTS,), tl.float32)
    for k in range(SIZE):
        shift = k - SIZE // 2
        edge = tl.load(edges + index + shift, mask=(index < elements) & (x + shift >= 0) & (x + shift < w), other=0.0)
        sum1 += tl.load(factors + SIZE + k) * edge
        sum2 += tl.load(factors + 3 * SIZE + k) * edge
    tl.store(rows + index, sum1, mask=index < elements)
    tl.store(rows + elements + index, sum2, mask=index < elements)


@triton.jit
def _blur_y(rows, factors, out, elements, h, w, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    y = index // w % h
    total = tl.zeros((ELEMENTS,), tl.float32)
    for k in range(SIZE):
        shift = k - SIZE // 2
        mask = (index < elements) & (y + shift >= 0) & (y + shift < h)
        at = rows + index + shift * w
        total += tl.load(factors + k) * tl.load(at, mask=mask, other=0.0)
        total += tl.load(factors + 2 * SIZE + k) * tl.load(at + elements, mask=mask, other=0.0)
    tl.store(out + index, total, mask=index < elements)


@triton.jit
def _weight_of_pixel(pixel_weight, image, y, x, mask, height, width, weight_h, weight_w, RESIZED: tl.constexpr):
    if RESIZED:
        y_low, y_high, wy = source(y, weight_h, height)
        x_low, x_high, wx = source(x, weight_w, width)
        map = pixel_weight + image * weight_h * weight_w
        upper, lower = map + y_low * weight_w, map + y_high * weight_w
        above = (1 - wx) * tl.load(upper + x_low, mask=mask, other=0.0) + wx * tl.load(upper + x_high, mask=mask, other=0.0)
        below = (1 - wx) * tl.load(lower + x_low, mask=mask, other=0.0) + wx * tl.load(lower + x_high, mask=mask, other=0.0)
        weight = (1 - wy) * above + wy * below
    else:  # the weight of an ignored pixel, NaN perhaps, must not reach its neighbours
        weight = tl.load(pixel_weight + (image * height + y) * width + x, mask=mask, other=0.0)
    return weight


@triton.jit
def _logit(upper_left, upper_right, lower_left, lower_right, offset, mask, wy, wx, RESIZED: tl.constexpr):
    """The logits at pointers + offset, resized from four corners."""
    z = tl.load(upper_left + offset, mask=mask, other=0.0).to(tl.float32)
    if RESIZED:
        upper = (1 - wx) * z + wx * tl.load(upper_right + offset, mask=mask, other=0.0).to(tl.float32)
        left = tl.load(lower_left + offset, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(lower_right + offset, mask=mask, other=0.0).to(tl.float32)
        z = (1 - wy) * upper + wy * ((1 - wx) * left + wx * right)
    return z


@triton.jit
def _settled(value, target):
    """0 where the pixel is ignored, NaN where its label is wrong."""
    return tl.where(target == -2, float("nan"), tl.where(target == -1, 0.0, value))


@triton.jit
def _softmax_loss(
    logits, labels, pixel_weight, class_weight, coefficients, loss, partial, pixels, height, width, h, w, weight_h, weight_w,
    stride_n, stride_c, stride_y, stride_x, keep, share, ignore_index,
    CLASSES: tl.constexpr, RESIZED: tl.constexpr, WEIGHT_RESIZED: tl.constexpr, SMOOTHED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    mask = index < pixels
    x, y, image = index % width, index // width % height, index // width // height
    target = _class_of(labels, index, mask, CLASSES, ignore_index)
    y_low, y_high, wy = y, y, 0.0
    x_low, x_high, wx = x, x, 0.0
    if RESIZED:
        y_low, y_high, wy = source(y, h, height)
        x_low, x_high, wx = source(x, w, width)
    upper, lower = logits + image * stride_n + y_low * stride_y, logits + image * stride_n + y_high * stride_y

    # The least number, not minus infinity: by a logit of that a class may be masked.
    max_logit = tl.full((PIXELS,), -3.4028234663852886e38, tl.float32)
    rest = tl.zeros((PIXELS,), tl.float32)
    at_target = tl.full((PIXELS,), float("-inf"), tl.float32)  # for pixels that have no target
    smooth = tl.zeros((PIXELS,), tl.float32)
    weight_sum = 0.0
    step = tl.full((), stride_c, tl.int64)
    for c in range(CLASSES):
        z = _logit(
            upper + x_low * stride_x, upper + x_high * stride_x, lower + x_low * stride_x, lower + x_high * stride_x,
            c * step, mask, wy, wx, RESIZED,
        )  # fmt: skip
        e = tl.exp(-tl.abs(z - max_logit))
        counted = tl.where(target == c, 0.0, 1.0)
        rest = tl.where(z > max_logit, rest * e + counted, rest + counted * e)
        previous = max_logit
        max_logit = tl.maximum(max_logit, z)
        at_target = tl.where(target == c, z, at_target)
        if SMOOTHED:
            weight = 1.0
            if class_weight is not None:
                weight = tl.load(class_weight + c)
            smooth += weight * (max_logit - z)  # sum of class weights times max_logit - z, so far
            smooth += tl.where(c > 0, weight_sum * (max_logit - previous), 0.0)
            weight_sum += weight
    total = rest + tl.exp(at_target - max_logit)
    own = keep + tl.zeros((PIXELS,), tl.float32)
    if class_weight is not None:
        own *= tl.load(class_weight + tl.maximum(target, 0), mask=mask, other=0.0)
    weight = tl.full((PIXELS,), 1.0, tl.float32)
    if pixel_weight is not None:
        weight = _weight_of_pixel(pixel_weight, image, y, x, mask, height, width, weight_h, weight_w, WEIGHT_RESIZED)
    value = own * (tl.log(total) + (max_logit - at_target))
    if SMOOTHED:
        value += share * (weight_sum * tl.log(total) + smooth)
    all_smooth = share * weight_sum
    at_label = (all_smooth * (total - rest) - own * rest) / total
    value = _settled(weight * value, target)
    if coefficients is not None:
        tl.store(coefficients + index, max_logit, mask=mask)
        tl.store(coefficients + pixels + index, _settled(weight * (own + all_smooth) / total, target), mask=mask)
        tl.store(coefficients + 2 * pixels + index, _settled(weight * at_label, target), mask=mask)
        if SMOOTHED:
            tl.store(coefficients + 3 * pixels + index, _settled(weight * share, target), mask=mask)
    if loss is not None:
        tl.store(loss + index, value, mask=mask)
    program = tl.program_id(0).to(tl.int64)
    tl.store(partial + 2 * program, tl.sum(tl.where(mask, value, 0.0), 0))
    tl.store(partial + 2 * program + 1, tl.sum((mask & (target != -1)).to(tl.float32), 0))


@triton.jit
def _softmax_grad(
    grad, logits, labels, class_weight, coefficients, out, pixels, logit_columns, label_height, label_width, h, w, classes,
    stride_n, stride_c, stride_y, stride_x, out_n, out_c, out_y, out_x, ignore_index,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, RESIZED: tl.constexpr, SMOOTHED: tl.constexpr,
    COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # of all rows of all images
    c = tl.program_id(1).to(tl.int64) * CLASSES + tl.arange(0, CLASSES)
    own_column, own_class = column < logit_columns, c < classes
    j, k, image = column % w, column // w % h, column // w // h
    height, width = tl.full((), label_height, tl.int64), tl.full((), label_width, tl.int64)
    y_begin, y_end, x_begin, x_end = k, k + 1, j, j + 1
    if RESIZED:
        y_begin, y_end = first_output(k - 1, h, height), first_output(k + 1, h, height)
        x_begin, x_end = first_output(j - 1, w, width), first_output(j + 1, w, width)
    class_weights = tl.full((CLASSES,), 1.0, tl.float32)
    if SMOOTHED:
        if class_weight is not None:
            class_weights = tl.load(class_weight + c, mask=own_class, other=0.0)

    total = tl.zeros((CLASSES, COLUMNS), tl.float32)
    for dy in range(TAPS_Y):
        y = y_begin + dy
        y_low, y_high, wy, share_y = k, k, 0.0, 1.0
        if RESIZED:
            y_low, y_high, wy = source(y, h, height)
            share_y = share_of(k, y_low, y_high, wy)
            wy = wy[None, :]
        upper, lower = logits + image * stride_n + y_low * stride_y, logits + image * stride_n + y_high * stride_y
        for dx in range(TAPS_X):
            x = x_begin + dx
            mask = own_column & (y < y_end) & (x < x_end)
            x_low, x_high, wx, part = j, j, 0.0, 1.0
            if RESIZED:
                x_low, x_high, wx = source(x, w, width)
                part = share_y * share_of(j, x_low, x_high, wx)
                wx = wx[None, :]
            at = (image * height + y) * width + x
            target = _class_of(labels, at, mask, classes, ignore_index)
            # Whatever comes in at an ignored pixel, NaN perhaps, goes nowhere.
            incoming = tl.where(target == -1, 0.0, tl.load(grad + at, mask=mask, other=0.0))
            max_logit = tl.load(coefficients + at, mask=mask, other=0.0)
            grad_scale = incoming * tl.load(coefficients + pixels + at, mask=mask, other=0.0)
            at_label = incoming * tl.load(coefficients + 2 * pixels + at, mask=mask, other=0.0)
            both = own_class[:, None] & mask[None, :]
            z = _logit(
                (upper + x_low * stride_x)[None, :], (upper + x_high * stride_x)[None, :], (lower + x_low * stride_x)[None, :],
                (lower + x_high * stride_x)[None, :], c[:, None] * stride_c, both, wy, wx, RESIZED,
            )  # fmt: skip
            value = tl.where(
                c[:, None] == target[None, :], at_label[None, :], grad_scale[None, :] * tl.exp(z - max_logit[None, :])
            )
            if SMOOTHED:
                smoothing = incoming * tl.load(coefficients + 3 * pixels + at, mask=mask, other=0.0)
                value -= smoothing[None, :] * class_weights[:, None]
            if RESIZED:
                value *= part[None, :]
            total += tl.where(both, value, 0.0)
    to = out + (image * out_n + k * out_y + j * out_x)[None, :] + c[:, None] * out_c
    tl.store(to, total.to(out.dtype.element_ty), mask=own_class[:, None] & own_column[None, :])


def _run_count_edges(labels, out, num_classes, ignore_index):
    (_, height, width), (_, h, w) = labels.shape, out.shape
    resized = (h, w) != (height, width)
    taps = [2 * full // small + 3 if resized else 1 for full, small in ((height, h), (width, w))]
    with torch.cuda.device_of(out):
        _count_edges[(triton.cdiv(out.numel(), PIXELS_PER_PROGRAM),)](
            labels, out, out.numel(), height, width, h, w, num_classes, ignore_index, *taps, resized, PIXELS_PER_PROGRAM
        )  # fmt: skip


def _run_blur(edges, factors):
    """In place."""
    _, h, w = edges.shape
    grid, size = (triton.cdiv(edges.numel(), PIXELS_PER_PROGRAM),), factors.shape[1]
    rows = edges.new_empty((2, *edges.shape))
    with torch.cuda.device_of(edges):
        _blur_x[grid](edges, factors, rows, edges.numel(), w, size, PIXELS_PER_PROGRAM)
        _blur_y[grid](rows, factors, edges, edges.numel(), h, w, size, PIXELS_PER_PROGRAM)


def _run_softmax_loss(logits, labels, pixel_weight, class_weight, coefficients, loss, label_smoothing, ignore_index):
    """Returns the sum of the losses and the number of pixels that are not ignored."""
    resized = logits.shape[2:] != labels.shape[1:]
    weight_h, weight_w = (0, 0) if pixel_weight is None else pixel_weight.shape[1:]
    weight_resized = pixel_weight is not None and pixel_weight.shape != labels.shape
    programs = triton.cdiv(labels.numel(), PIXELS_PER_PROGRAM)
    partial = torch.empty((programs, 2), dtype=torch.float32, device=labels.device)
    with torch.cuda.device_of(logits):
        _softmax_loss[(programs,)](
            logits, labels, pixel_weight, class_weight, coefficients, loss, partial, labels.numel(), *labels.shape[1:],
            *logits.shape[2:], weight_h, weight_w, *logits.stride(), 1 - label_smoothing, label_smoothing / logits.shape[1],
            ignore_index, logits.shape[1], resized, weight_resized, label_smoothing > 0, PIXELS_PER_PROGRAM,
        )  # fmt: skip
    return partial.sum(0, dtype=torch.float64).to(partial.dtype)


def _run_softmax_grad(grad, logits, labels, class_weight, coefficients, out, ignore_index):
    n, classes, h, w = logits.shape
    resized = (h, w) != labels.shape[1:]
    # Two intervals between logits, and at the border half of one more, which the second logit looks
    # through in vain.
    taps = [
        triton.cdiv(5 * full, 2 * small) + 2 if resized else 1 for full, small in zip(labels.shape[1:], (h, w), strict=True)
    ]
    grid = (triton.cdiv(n * h * w, COLUMNS_PER_PROGRAM), triton.cdiv(classes, CLASSES_PER_PROGRAM))
    smoothed = len(coefficients) > 3
    with torch.cuda.device_of(logits):
        _softmax_grad[grid](
            grad, logits, labels, class_weight, coefficients, out, labels.numel(), n * h * w, *labels.shape[1:], h, w, classes,
            *logits.stride(), *out.stride(), ignore_index,
            *taps, resized, smoothed, COLUMNS_PER_PROGRAM, CLASSES_PER_PROGRAM,
        )  # fmt: skip


_BLUR_FACTORS = {}


def blur_factors(kernel, kernel_size, sigma, device):
    """(u1, v1, u2, v2) of bal.h's BlurKernel, each of kernel_size.

    Made once for each device: also in a CUDA graph's capture, where they are kept from later calls.
    """
    settings = kernel, kernel_size, sigma, device
    if settings in _BLUR_FACTORS:
        return _BLUR_FACTORS[settings]
    if device.type != "cuda":
        return _BLUR_FACTORS.setdefault(settings, _make_blur_factors(*settings))
    if torch.cuda.is_current_stream_capturing():
        return _make_blur_factors(*settings)  # memory of the graph's, which nobody writes before it runs
    # Warming up for a graph, torch.compile has this thread's allocations come from the graph's
    # memory: another thread's do not.
    with ThreadPoolExecutor(1) as thread:
        return _BLUR_FACTORS.setdefault(settings, thread.submit(_make_blur_factors_now, *settings).result())


def _make_blur_factors_now(*settings):
    factors = _make_blur_factors(*settings)
    torch.cuda.current_stream(factors.device).synchronize()  # once: calls may come on any stream
    return factors


def _make_blur_factors(kernel, kernel_size, sigma, device):
    """Computed where they are used: nothing is copied, which a capture would not allow."""
    distance = torch.arange(kernel_size, dtype=torch.float64, device=device) - kernel_size // 2
    ones = torch.ones_like(distance)
    if kernel == "gaussian":
        exponent = -(distance**2) / (kernel_size * sigma)
        g, p = exponent.exp(), exponent.expm1() - exponent[0].expm1()
        spread = -(2 * exponent[0]).expm1()  # 1 - q^2
        factors = p / spread, g, g[0] / spread * ones, p
    else:
        slope = 0.5 - distance.abs() / (kernel_size - 1)
        factors = slope, ones, ones, slope
    return torch.stack(factors).float()


def _upsample(edge, labels):
    return F.interpolate(edge[:, None], labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]


def _small_edge(labels, num_classes, kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index):
    """E_G before its last upsampling: `small_edge` of bal.cpp."""
    n, h, w = labels.shape
    edge = torch.empty((n, -(-h // downsample), -(-w // downsample)), dtype=torch.float32, device=labels.device)
    if edge.numel() == 0:
        return edge
    raise_on_wrong_label(labels, num_classes, ignore_index)
    _run_count_edges(labels.contiguous(), edge, num_classes, ignore_index)
    if kernel_size > 1:
        _run_blur(edge, blur_factors(kernel, kernel_size, sigma, edge.device))
    if normalize == "max":
        peak = edge.amax((1, 2), keepdim=True)
        edge /= peak.where(peak > 0, 1)
    edge += beta
    if normalize == "mean":
        mean = _upsample(edge, labels).mean((1, 2), keepdim=True)
        edge = (edge / mean).where(mean != 0, 1)
    return edge


def bal_edge(labels, *settings):
    edge = _small_edge(labels, *settings)
    return edge if edge.shape == labels.shape else _upsample(edge, labels)


def _logits(logits):
    """As kernels take them: interpreted, in the dtype that is computed in."""
    return logits if logits.is_cuda else logits.float()


def _weights(weights):
    return None if weights is None else weights.float().contiguous()


def bal_cross_entropy(logits, labels, pixel_weight, class_weight, label_smoothing, ignore_index, reduction, gradient):
    loss, saved, divisor = cross_entropy.empty(logits, labels, label_smoothing, reduction, gradient)
    check_weight_size(pixel_weight, labels)
    if not labels.numel():
        return loss.zero_(), saved, divisor.fill_(1)
    raise_on_wrong_label(labels, logits.shape[1], ignore_index)
    logits, labels, class_weight = _logits(logits), labels.contiguous(), _weights(class_weight)
    coefficients = None
    if gradient:
        maps = 4 if label_smoothing > 0 else 3
        coefficients = saved if reduction == "none" else saved.new_empty((maps, *labels.shape))
    total, count = _run_softmax_loss(
        logits, labels, _weights(pixel_weight), class_weight, coefficients, loss if reduction == "none" else None,
        label_smoothing, ignore_index,
    )  # fmt: skip
    if reduction == "none":
        return loss, saved, divisor
    if gradient:
        _run_softmax_grad(
            torch.ones(labels.shape, device=labels.device), logits, labels, class_weight, coefficients, saved, ignore_index
        )
    divisor.copy_(count.clamp(min=1)) if reduction == "mean" else divisor.fill_(1)
    return total / divisor, saved, divisor


def bal_boundary_loss(logits, labels, class_weight, *settings):
    *of_edge, label_smoothing, ignore_index, reduction, gradient = settings
    edge = _small_edge(labels, logits.shape[1], *of_edge, ignore_index)
    return bal_cross_entropy(logits, labels, edge, class_weight, label_smoothing, ignore_index, reduction, gradient)


def bal_cross_entropy_grad(grad, saved, divisor, dtype):
    return (saved * (grad / divisor)).to(dtype)


def bal_cross_entropy_map_grad(grad, logits, labels, class_weight, coefficients, label_smoothing, ignore_index):
    out, wide = cross_entropy_map_grad.empty(logits), _logits(logits)
    if not out.numel():
        return out
    written = out if out.dtype == wide.dtype else torch.empty_like(out, dtype=wide.dtype)
    _run_softmax_grad(
        grad.float().contiguous(), wide, labels.contiguous(), _weights(class_weight), coefficients, written, ignore_index
    )
    return out.copy_(written) if written is not out else out
