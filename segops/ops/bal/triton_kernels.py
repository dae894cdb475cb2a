"""The boundary-aware loss in Triton; csrc/bal/bal.h gives the kernels' arguments and mathematics.

The gradient is made by cells, the places between four logits: each sums up what its label pixels
have for its corners, and a second kernel adds up to four such sums for a logit, in a fixed order.

Loops over what changes with the sizes are `while`: Triton's interpreter, up to 3.6, takes no
`range` of an argument.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..common.triton_launch import device_of, index_type
from ..common.triton_resize import between, first_output, offset_in_cell, source, weight_of
from .labels import raise_on_wrong_label
from .op import check_weight_size, cross_entropy, cross_entropy_map_grad

PIXELS_PER_PROGRAM = 128
# Of a warp, whose threads have all the classes of a column: they share what they read of a pixel.
COLUMNS_PER_PROGRAM = 32
CLASSES_PER_PROGRAM = 8
# Sums of cells at a time, float32: but for two rows, never more than a quarter of the logits at the
# labels' size.
LARGEST_WORKSPACE = 1 << 24

# Numbers that no kernel is compiled for.
SIZES = (
    "outputs", "pixels", "height", "width", "h", "w", "weight_h", "weight_w", "classes", "taps_y", "taps_x", "size",
    "elements", "first_row", "rows_before", "ignore_index", "stride_n", "stride_c", "stride_y", "stride_x",
    "out_n", "out_c", "out_y", "out_x",
)  # fmt: skip


@triton.jit
def _class_of(labels, at, mask, classes, ignore_index):
    """The label's class, -1 where it is ignored, -2 where it is none of the classes."""
    label = tl.load(labels + at, mask=mask, other=0).to(tl.int64)
    inside = (label >= 0) & (label < classes)
    return tl.where(label == ignore_index, -1, tl.where(inside, label, -2)).to(tl.int32)


@triton.jit
def _triangle(i, tap, size_in, size_out):
    """The weight, before normalisation, of a source in output i of an antialiased resize."""
    distance = tl.abs((2 * tap + 1) * size_out - (2 * i + 1) * size_in).to(tl.float32) / (2 * size_in)
    return tl.where((tap >= 0) & (tap < size_in), tl.maximum(1 - distance, 0.0), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _count_edges(
    labels, out, outputs, height, width, h, w, classes, ignore_index, taps_y, taps_x,
    RESIZED: tl.constexpr, OUTPUTS: tl.constexpr,
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
    ky = 0
    while ky < taps_y:
        y = first_y + ky
        weight_y = _triangle(i, y, height, h) if RESIZED else 1.0
        row = (image * height + tl.minimum(y, height - 1)) * width
        lower = (image * height + tl.minimum(y + 1, height - 1)) * width
        kx = 0
        while kx < taps_x:
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
            kx += 1
        ky += 1
    tl.store(out + index, total / weights, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _blur_x(edges, factors, rows, elements, w, size, ELEMENTS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = index % w
    sum1 = tl.zeros((ELEMENTS,), tl.float32)
    sum2 = tl.zeros((ELEMENTS,), tl.float32)
    k = 0
    while k < size:
        shift = k - size // 2
        edge = tl.load(edges + index + shift, mask=(index < elements) & (x + shift >= 0) & (x + shift < w), other=0.0)
        sum1 += tl.load(factors + size + k) * edge
        sum2 += tl.load(factors + 3 * size + k) * edge
        k += 1
    tl.store(rows + index, sum1, mask=index < elements)
    tl.store(rows + elements + index, sum2, mask=index < elements)


@triton.jit(do_not_specialize=SIZES)
def _blur_y(rows, factors, out, elements, h, w, size, ELEMENTS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    y = index // w % h
    total = tl.zeros((ELEMENTS,), tl.float32)
    k = 0
    while k < size:
        shift = k - size // 2
        mask = (index < elements) & (y + shift >= 0) & (y + shift < h)
        at = rows + index + shift * w
        total += tl.load(factors + k) * tl.load(at, mask=mask, other=0.0)
        total += tl.load(factors + 2 * size + k) * tl.load(at + elements, mask=mask, other=0.0)
        k += 1
    tl.store(out + index, total, mask=index < elements)


@triton.jit
def _weight_of_pixel(pixel_weight, image, y, x, mask, height, width, weight_h, weight_w, RESIZED: tl.constexpr):
    if RESIZED:
        y_low, y_high, wy = source(y, weight_h, height)
        x_low, x_high, wx = source(x, weight_w, width)
        map = pixel_weight + image.to(tl.int64) * weight_h * weight_w
        upper, lower = map + y_low * weight_w, map + y_high * weight_w
        above = between(tl.load(upper + x_low, mask=mask, other=0.0), tl.load(upper + x_high, mask=mask, other=0.0), wx)
        below = between(tl.load(lower + x_low, mask=mask, other=0.0), tl.load(lower + x_high, mask=mask, other=0.0), wx)
        weight = between(above, below, wy)
    else:  # the weight of an ignored pixel, NaN perhaps, must not reach its neighbours
        weight = tl.load(pixel_weight + (image * height + y) * width + x, mask=mask, other=0.0)
    return weight


@triton.jit
def _logit(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _settled(value, target):
    """0 where the pixel is ignored, NaN where its label is wrong."""
    return tl.where(target == -2, float("nan"), tl.where(target == -1, 0.0, value))


@triton.jit(do_not_specialize=SIZES)
def _softmax_loss(
    logits, labels, pixel_weight, class_weight, coefficients, loss, sums, counts, pixels, height, width, h, w, weight_h, weight_w,
    classes, stride_n, stride_c, stride_y, stride_x, keep, share, ignore_index,
    RESIZED: tl.constexpr, WEIGHT_RESIZED: tl.constexpr, SMOOTHED: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    mask = index < pixels
    x, y, image = index % width, index // width % height, (index // width // height).to(tl.int64)
    target = _class_of(labels, index, mask, classes, ignore_index)
    y_low, y_high, wy = y, y, 0.0
    x_low, x_high, wx = x, x, 0.0
    if RESIZED:
        y_low, y_high, wy = source(y, h, height)
        x_low, x_high, wx = source(x, w, width)
    of_image = logits + image * stride_n
    upper, lower = of_image + y_low.to(tl.int64) * stride_y, of_image + y_high.to(tl.int64) * stride_y
    left, right = x_low.to(tl.int64) * stride_x, x_high.to(tl.int64) * stride_x
    upper_left, upper_right, lower_left, lower_right = upper + left, upper + right, lower + left, lower + right

    # The least number, not minus infinity: by a logit of that a class may be masked.
    max_logit = tl.full((PIXELS,), -3.4028234663852886e38, tl.float32)
    rest = tl.zeros((PIXELS,), tl.float32)
    at_target = tl.full((PIXELS,), float("-inf"), tl.float32)  # for pixels that have no target
    smooth = tl.zeros((PIXELS,), tl.float32)
    weight_sum = 0.0
    c = 0
    while c < classes:
        z = _logit(upper_left, mask)
        if RESIZED:  # along y first, as the gradient does, so that it finds these very logits
            z_left = between(z, _logit(lower_left, mask), wy)
            z_right = between(_logit(upper_right, mask), _logit(lower_right, mask), wy)
            z = between(z_left, z_right, wx)
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
        upper_left, upper_right, lower_left, lower_right = (
            upper_left + stride_c,
            upper_right + stride_c,
            lower_left + stride_c,
            lower_right + stride_c,
        )
        c += 1
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
        map_size = tl.full((), pixels, tl.int64)
        tl.store(coefficients + index, max_logit, mask=mask)
        tl.store(coefficients + map_size + index, _settled(weight * (own + all_smooth) / total, target), mask=mask)
        tl.store(coefficients + 2 * map_size + index, _settled(weight * at_label, target), mask=mask)
        if SMOOTHED:
            tl.store(coefficients + 3 * map_size + index, _settled(weight * share, target), mask=mask)
    if loss is not None:
        tl.store(loss + index, value, mask=mask)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(mask, value, 0.0), 0))
    tl.store(counts + tl.program_id(0), tl.sum((mask & (target != -1)).to(tl.int32), 0))


@triton.jit
def _gradient(
    z, c, grad, labels, class_weights, coefficients, at, mask, pixels, classes, ignore_index, SMOOTHED: tl.constexpr
):  # fmt: skip
    """That of the logits z of classes c at label pixels, [classes, pixels]; 0 where masked."""
    map_size = tl.full((), pixels, tl.int64)
    target = _class_of(labels, at, mask, classes, ignore_index)
    max_logit = tl.load(coefficients + at, mask=mask, other=3.4028234663852886e38)
    grad_scale = tl.load(coefficients + map_size + at, mask=mask, other=0.0)
    target_grad = tl.load(coefficients + 2 * map_size + at, mask=mask, other=0.0)
    incoming = 1.0
    if grad is not None:  # whatever comes in at an ignored pixel, NaN perhaps, goes nowhere
        incoming = tl.where(target == -1, 0.0, tl.load(grad + at, mask=mask, other=0.0))
        grad_scale, target_grad = incoming * grad_scale, incoming * target_grad
    e = tl.exp(z - max_logit[None, :])
    value = tl.where(c[:, None] == target[None, :], target_grad[None, :], grad_scale[None, :] * e)
    if SMOOTHED:
        smoothing = incoming * tl.load(coefficients + 3 * map_size + at, mask=mask, other=0.0)
        value -= smoothing[None, :] * class_weights[:, None]
    return value


@triton.jit
def _class_weights(class_weight, c, own_class, CLASSES: tl.constexpr):
    weights = tl.full((CLASSES,), 1.0, tl.float32)
    if class_weight is not None:
        weights = tl.load(class_weight + c, mask=own_class, other=0.0)
    return weights


@triton.jit(do_not_specialize=SIZES)
def _cell_grad(
    grad, logits, labels, class_weight, coefficients, sums, pixels, first_row, height, width, h, w, classes, ignore_index,
    SMOOTHED: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What the pixels of cell (k, j), those between logits (k, j) and (k + 1, j + 1), have for its
    corners: sums[row, corner, class, j], the rows being those of all images from the first on."""
    tiles = tl.cdiv(w, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    own = (c < classes)[:, None] & (j < w)[None, :]
    class_weights = _class_weights(class_weight, c, c < classes, CLASSES)
    image, k = (first_row + row) // h, ((first_row + row) % h).to(INDEX)
    y_begin, y_end = first_output(k, h, height), first_output(k + 1, h, height)
    x_begin, x_end = first_output(j, w, width), first_output(j + 1, w, width)
    rows, columns = (y_end - y_begin).to(tl.int32), (x_end - x_begin).to(tl.int32)
    most_columns = tl.max(columns, 0)
    first_y, first_x = offset_in_cell(y_begin, k, h, height), offset_in_cell(x_begin, j, w, width)
    last_row, last_column = k + 1 == h, j + 1 == w

    corner = logits + ((image * classes + c.to(tl.int64)[:, None]) * h + k) * w + j[None, :]
    below, after = tl.where(last_row, 0, w), own & (j + 1 < w)[None, :]
    upper_left, upper_right = _logit(corner, own), _logit(corner + 1, after)
    lower_left, lower_right = _logit(corner + below, own), _logit(corner + below + 1, after)
    of_upper_left = tl.zeros((CLASSES, COLUMNS), tl.float32)
    of_upper_right = tl.zeros((CLASSES, COLUMNS), tl.float32)
    of_lower_left = tl.zeros((CLASSES, COLUMNS), tl.float32)
    of_lower_right = tl.zeros((CLASSES, COLUMNS), tl.float32)
    dy = 0
    while dy < rows:
        wy = tl.where(last_row, 0.0, weight_of(first_y + 2 * dy * h, height))
        left, right = between(upper_left, lower_left, wy), between(upper_right, lower_right, wy)
        of_left = tl.zeros((CLASSES, COLUMNS), tl.float32)
        of_right = tl.zeros((CLASSES, COLUMNS), tl.float32)
        at = (image * height + y_begin + dy) * width + x_begin
        dx = 0
        while dx < most_columns:
            wx = tl.where(last_column | (dx >= columns), 0.0, weight_of(first_x + 2 * dx * w, width))[None, :]
            value = _gradient(
                between(left, right, wx), c, grad, labels, class_weights, coefficients, at + dx, dx < columns,
                pixels, classes, ignore_index, SMOOTHED,
            )  # fmt: skip
            of_left += (1 - wx) * value
            of_right += wx * value
            dx += 1
        of_upper_left += (1 - wy) * of_left
        of_upper_right += (1 - wy) * of_right
        of_lower_left += wy * of_left
        of_lower_right += wy * of_right
        dy += 1

    plane = tl.full((), classes, tl.int64) * w
    to = sums + row * 4 * plane + c.to(tl.int64)[:, None] * w + j[None, :]
    tl.store(to, of_upper_left, mask=own)
    tl.store(to + plane, of_upper_right, mask=own)
    tl.store(to + 2 * plane, of_lower_left, mask=own)
    tl.store(to + 3 * plane, of_lower_right, mask=own)


@triton.jit(do_not_specialize=SIZES)
def _add_cells(
    sums, out, first_row, rows_before, h, w, classes, out_n, out_c, out_y, out_x,
    COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The gradient of rows of logits, of all images, from the first on: sums has theirs, and
    rows_before more."""
    tiles = tl.cdiv(w, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    c = (tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)).to(tl.int64)
    image, k = (first_row + row) // h, (first_row + row) % h
    own = (c < classes)[:, None] & (j < w)[None, :]
    after, below = own & (j > 0)[None, :], own & (tl.full((COLUMNS,), k, tl.int64) > 0)[None, :]
    plane = tl.full((), classes, tl.int64) * w
    cell = sums + (rows_before + row) * 4 * plane + c[:, None] * w + j[None, :]
    total = tl.load(cell, mask=own, other=0.0)
    total += tl.load(cell + plane - 1, mask=after, other=0.0)
    total += tl.load(cell - 2 * plane, mask=below, other=0.0)
    total += tl.load(cell - plane - 1, mask=after & below, other=0.0)
    to = out + image * out_n + k * out_y + j[None, :] * out_x + c[:, None] * out_c
    tl.store(to, total.to(out.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=SIZES)
def _pixel_grad(
    grad, logits, labels, class_weight, coefficients, out, pixels, h, w, classes,
    stride_n, stride_c, stride_y, stride_x, out_n, out_c, out_y, out_x, ignore_index,
    SMOOTHED: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The gradient where logits and labels have one size."""
    at = tl.program_id(0).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    c = (tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)).to(tl.int64)
    x, y, image = (at % w).to(tl.int64), (at // w % h).to(tl.int64), (at // w // h).to(tl.int64)
    own = (c < classes)[:, None] & (at < pixels)[None, :]
    z = _logit(logits + (image * stride_n + y * stride_y + x * stride_x)[None, :] + c[:, None] * stride_c, own)
    value = _gradient(
        z, c, grad, labels, _class_weights(class_weight, c, c < classes, CLASSES), coefficients, at, at < pixels,
        pixels, classes, ignore_index, SMOOTHED,
    )  # fmt: skip
    to = out + (image * out_n + y * out_y + x * out_x)[None, :] + c[:, None] * out_c
    tl.store(to, value.to(out.dtype.element_ty), mask=own)


def _run_count_edges(labels, out, num_classes, ignore_index):
    (_, height, width), (_, h, w) = labels.shape, out.shape
    resized = (h, w) != (height, width)
    taps = [2 * full // small + 3 if resized else 1 for full, small in ((height, h), (width, w))]
    with device_of(out):
        _count_edges[(triton.cdiv(out.numel(), PIXELS_PER_PROGRAM),)](
            labels, out, out.numel(), height, width, h, w, num_classes, ignore_index, *taps, resized, PIXELS_PER_PROGRAM
        )  # fmt: skip


def _run_blur(edges, factors):
    """In place."""
    _, h, w = edges.shape
    grid, size = (triton.cdiv(edges.numel(), PIXELS_PER_PROGRAM),), factors.shape[1]
    rows = edges.new_empty((2, *edges.shape))
    with device_of(edges):
        _blur_x[grid](edges, factors, rows, edges.numel(), w, size, PIXELS_PER_PROGRAM)
        _blur_y[grid](rows, factors, edges, edges.numel(), h, w, size, PIXELS_PER_PROGRAM)


def _positions(labels, *maps):
    """The integers in which kernels find labels in maps of other sizes."""
    products = [2 * (a + 1) * b for each in maps for a, b in zip(each.shape[-2:], labels.shape[1:], strict=True)]
    return index_type(labels.numel(), *products)


def _run_softmax_loss(logits, labels, pixel_weight, class_weight, coefficients, loss, label_smoothing, ignore_index):
    """Returns the sum of the losses and the number of pixels that are not ignored."""
    resized = logits.shape[2:] != labels.shape[1:]
    weight_h, weight_w = (0, 0) if pixel_weight is None else pixel_weight.shape[1:]
    weight_resized = pixel_weight is not None and pixel_weight.shape != labels.shape
    programs = triton.cdiv(labels.numel(), PIXELS_PER_PROGRAM)
    sums = torch.empty(programs, dtype=torch.float32, device=labels.device)
    counts = torch.empty(programs, dtype=torch.int32, device=labels.device)
    with device_of(logits):
        _softmax_loss[(programs,)](
            logits, labels, pixel_weight, class_weight, coefficients, loss, sums, counts, labels.numel(), *labels.shape[1:],
            *logits.shape[2:], weight_h, weight_w, logits.shape[1], *logits.stride(), 1 - label_smoothing,
            label_smoothing / logits.shape[1], ignore_index, resized, weight_resized, label_smoothing > 0, PIXELS_PER_PROGRAM,
            _positions(labels, logits, *([] if pixel_weight is None else [pixel_weight])),
        )  # fmt: skip
    return sums.sum(), counts.sum()


def _run_softmax_grad(grad, logits, labels, class_weight, coefficients, out, ignore_index):
    """Without grad, the gradient of the sum."""
    n, classes, h, w = logits.shape
    height, width = labels.shape[1:]
    smoothed = len(coefficients) > 3
    class_tiles = triton.cdiv(classes, CLASSES_PER_PROGRAM)
    if (h, w) == (height, width):
        with device_of(logits):
            _pixel_grad[(triton.cdiv(n * h * w, PIXELS_PER_PROGRAM), class_tiles)](
                grad, logits, labels, class_weight, coefficients, out, labels.numel(), h, w, classes,
                *logits.stride(), *out.stride(), ignore_index, smoothed, PIXELS_PER_PROGRAM, CLASSES_PER_PROGRAM, _positions(labels, logits),
            )  # fmt: skip
        return
    tile = {"COLUMNS": COLUMNS_PER_PROGRAM, "CLASSES": CLASSES_PER_PROGRAM, "num_warps": 1}
    column_tiles = triton.cdiv(w, COLUMNS_PER_PROGRAM)
    dense = logits.contiguous()  # what lies side by side is what Triton's threads are dealt out along
    room = min(LARGEST_WORKSPACE, n * classes * max(h * w, height * width) // 4)
    rows = min(n * h, max(1, room // (4 * classes * w) - 1))  # and the one before them
    sums = torch.empty((rows + 1, 4, classes, w), dtype=torch.float32, device=logits.device)
    for first in range(0, n * h, rows):
        before, own = min(first, 1), min(rows, n * h - first)
        with device_of(logits):
            _cell_grad[((before + own) * column_tiles, class_tiles)](
                grad, dense, labels, class_weight, coefficients, sums, labels.numel(), first - before, height, width, h, w,
                classes, ignore_index, smoothed, INDEX=_positions(labels, logits), **tile,
            )  # fmt: skip
            _add_cells[(own * column_tiles, class_tiles)](
                sums, out, first, before, h, w, classes, *out.stride(), **tile
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
        return _BLUR_FACTORS.setdefault(settings, _make_blur_factors_now(*settings))
    if torch.cuda.is_current_stream_capturing():
        return _make_blur_factors(*settings)  # memory of the graph's, which nobody writes before it runs
    # Warming up for a graph, torch.compile has this thread's allocations come from the graph's
    # memory: another thread's do not.
    with ThreadPoolExecutor(1) as thread:
        return _BLUR_FACTORS.setdefault(settings, thread.submit(_make_blur_factors_now, *settings).result())


def _make_blur_factors_now(*settings):
    factors = _make_blur_factors(*settings)
    if factors.device.type in ("cuda", "xpu"):
        torch.accelerator.current_stream(factors.device).synchronize()  # once: calls may come on any stream
    return factors


def _make_blur_factors(kernel, kernel_size, sigma, device):
    """Computed where they are used: nothing is copied, which a capture would not allow. In float32,
    which every GPU has; nothing cancels."""
    distance = torch.arange(kernel_size, dtype=torch.float32, device=device) - kernel_size // 2
    ones = torch.ones_like(distance)
    if kernel == "gaussian":
        breadth = kernel_size * sigma
        g, q = (-(distance**2) / breadth).exp(), -(distance[0] ** 2) / breadth
        p = -g * ((distance**2 - distance[0] ** 2) / breadth).expm1()  # g - exp(q)
        spread = -(2 * q).expm1()  # 1 - exp(q)^2
        factors = p / spread, g, g[0] / spread * ones, p
    else:
        slope = 0.5 - distance.abs() / (kernel_size - 1)
        factors = slope, ones, ones, slope
    return torch.stack(factors)


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
    return logits.float() if logits.device.type == "cpu" else logits


def _weights(weights):
    return None if weights is None else weights.float().contiguous()


def bal_cross_entropy(logits, labels, pixel_weight, class_weight, label_smoothing, ignore_index, reduction, saves):
    loss, saved, divisor = cross_entropy.empty(logits, labels, label_smoothing, reduction, saves)
    check_weight_size(pixel_weight, labels)
    if not labels.numel():
        return loss.zero_(), saved, divisor.fill_(1)
    raise_on_wrong_label(labels, logits.shape[1], ignore_index)
    logits, labels, class_weight = _logits(logits), labels.contiguous(), _weights(class_weight)
    coefficients = saved if saves == "coefficients" else None
    if saves == "gradient":
        coefficients = saved.new_empty((4 if label_smoothing > 0 else 3, *labels.shape))
    total, count = _run_softmax_loss(
        logits, labels, _weights(pixel_weight), class_weight, coefficients, loss if reduction == "none" else None,
        label_smoothing, ignore_index,
    )  # fmt: skip
    if reduction == "none":
        return loss, saved, divisor
    if saves == "gradient":
        _run_softmax_grad(None, logits, labels, class_weight, coefficients, saved, ignore_index)
    divisor.copy_(count.clamp(min=1)) if reduction == "mean" else divisor.fill_(1)
    return total / divisor, saved, divisor


def bal_boundary_loss(logits, labels, class_weight, *settings):
    *of_edge, label_smoothing, ignore_index, reduction, saves = settings
    edge = _small_edge(labels, logits.shape[1], *of_edge, ignore_index)
    return bal_cross_entropy(logits, labels, edge, class_weight, label_smoothing, ignore_index, reduction, saves)


def bal_cross_entropy_grad(grad, logits, saved, divisor):
    return (saved * (grad / divisor)).to(logits.dtype)


def bal_cross_entropy_map_grad(grad, logits, labels, class_weight, coefficients, divisor, label_smoothing, ignore_index):
    out, wide = cross_entropy_map_grad.empty(logits), _logits(logits)
    if not out.numel():
        return out
    written = out if out.dtype == wide.dtype else torch.empty_like(out, dtype=wide.dtype)
    grad = grad.float()
    if not grad.dim():
        grad = (grad / divisor).expand(labels.shape)
    _run_softmax_grad(grad.contiguous(), wide, labels.contiguous(), _weights(class_weight), coefficients, written, ignore_index)
    return out.copy_(written) if written is not out else out
