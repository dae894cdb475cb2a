"""The boundary-aware loss: the public functions, and the ops `segops::bal_edge`, `bal_cross_entropy` and its gradient behind them.

The weight map is made at its downsampled size and stays there: the cross entropy upsamples it, as it does the logits, pixel by
pixel. Nothing is made of (N, C, H, W).
"""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from .._checks import check_floating, check_logits, is_int
from .._library import LIBRARY, autocast_dtype, device_type, kernels, memory_format, transformed
from ..backend import select
from . import reference


def gaussian_edge(
    labels,
    num_classes,
    *,
    kernel="gaussian",
    kernel_size=35,
    sigma=3.0,
    beta=0.5,
    downsample=4,
    normalize=None,
    ignore_index=255,
):
    """The gaussian edge map of a label map: large along the boundaries of classes, largest where several meet.

    Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", Eq. 1 to 3, 5 and 6::

        l_i = [labels == i]                                         a plane per class; ignored pixels belong to none
        E   = sum over i of [|l_i(y, x) - l_i(y, x + 1) / 2 - l_i(y + 1, x) / 2| > 0]     the last row and column repeat
        E   = bilinear resize of E, antialiased, to (ceil(H / downsample), ceil(W / downsample))
        f   = exp(-((x - xc)^2 + (y - yc)^2) / (kernel_size * sigma))      "gaussian", Eq. 5
              kernel_size - (|x - xc| + |y - yc|)                          "linear", Eq. 6
              min-max normalised to [0, 1]
        E_G = bilinear resize of (E * f, zero padding) to (H, W), plus beta

    Args:
        labels: (N, H, W), int64, int32 or uint8, any strides.
        num_classes: labels 0 .. num_classes - 1 are classes.
        kernel: "gaussian" (default) or "linear".
        kernel_size: odd int >= 1, in pixels of the downsampled map; default 35. 1 does not blur.
        sigma: of the gaussian, > 0; default 3.0.
        beta: weight of pixels far from any boundary; default 0.5.
        downsample: int >= 1, default 4. The blur reaches kernel_size // 2 * downsample pixels.
        normalize: None (default), the paper's map, whose scale depends on the image; "max": each image's blurred map
            (E * f, at its downsampled size) is divided by its own maximum before beta is added, E_G is in [beta, 1 + beta];
            "mean": each image's E_G is divided by its own mean over all pixels, so that a loss weighted by it keeps its scale.
            An image without edges is beta throughout under "max", 1 throughout under "mean".
        ignore_index: label of pixels that belong to no class, any int; default 255. Their borders are edges.

    Returns:
        (N, H, W) float32, without gradient. Deterministic.

    Antialiasing is our reading of the paper's "bilinearly downsampling": without it edges vanish at some offsets.

    Raises:
        TypeError: labels that are no integer tensor, settings of the wrong type.
        ValueError: wrong rank, an empty height or width, even or non-positive kernel_size, sigma <= 0 or so large that the kernel is constant,
            downsample < 1, unknown kernel or normalize.
        IndexError: on the CPU, a label outside [0, num_classes) that is not ignore_index; on CUDA such a pixel is treated
            as ignored, unless the environment has SEGOPS_CHECK_LABELS=1.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    _check_labels(labels)
    _check_int("num_classes", num_classes, 1, 2**31 - 1)
    settings = check_edge_settings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index)
    backend = select("gaussian_edge", labels)
    if backend == "reference" or transformed():
        return reference.gaussian_edge(_classes(labels, num_classes, ignore_index), num_classes, *settings)
    return torch.ops.segops.bal_edge(labels, num_classes, *settings, ignore_index, backend)


def upsample_cross_entropy(
    logits, labels, pixel_weight=None, *, class_weight=None, label_smoothing=0.0, ignore_index=255, reduction="mean"
):
    """Cross entropy of logits at any resolution against labels at theirs, without the upsampled logits.

    Equals ``F.interpolate(logits, (H, W), mode="bilinear", align_corners=False)``, where sizes differ, then softmax cross
    entropy per pixel, times ``pixel_weight`` where given, 0 at ignored pixels. Forward and backward allocate nothing of
    (N, C, H, W), unless the logits have that size: what backward needs is kept in three maps of (N, H, W), four with label
    smoothing.

    Args:
        logits: (N, C, h, w), any strides; float32, bfloat16, float16, or float64 (CPU and reference backend).
        labels: (N, H, W), int64, int32 or uint8.
        pixel_weight: (N, H, W) or (N, h', w') with h' <= H and w' <= W, upsampled bilinearly in the same pass; floating
            point; None (default) weighs every pixel 1.
        class_weight: (C), floating point, or None (default); as `weight` of `F.cross_entropy`.
        label_smoothing: in [0, 1], default 0.0, as in `F.cross_entropy`.
        ignore_index: label of pixels that do not count, any int; default 255.
        reduction: "mean" (default): the sum over the number of pixels that are not ignored, also with weights (the n of
            Yu, Eq. 4); 0 where all are ignored. "sum"; or "none" for the map of losses.

    Returns:
        () or, for "none", (N, H, W); float32, or float64 for float64 logits. The gradient flows to the logits only, in their
        dtype, once: double backward is not supported. Deterministic.

    Under autocast floating-point arguments are cast to float32 first. Under `torch.func` transforms and forward-mode
    differentiation PyTorch's ops run, and a label out of range gives NaN.

    Raises:
        TypeError: logits or weights that are no floating-point tensors, labels that are no integer tensor, settings of the
            wrong type.
        ValueError: wrong rank or shape, an empty height or width, mixed devices, label_smoothing outside [0, 1], unknown reduction.
        IndexError: on the CPU, a label outside [0, C) that is not ignore_index; on CUDA the loss is NaN, unless the
            environment has SEGOPS_CHECK_LABELS=1.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`); double backward.
    """
    check_loss_settings(class_weight, label_smoothing, ignore_index, reduction)
    logits, pixel_weight, class_weight = _autocast(logits, pixel_weight, class_weight)
    _check_loss(logits, labels, pixel_weight, class_weight)
    pixel_weight, class_weight = (None if weight is None else weight.detach() for weight in (pixel_weight, class_weight))
    backend = select("upsample_cross_entropy", logits)
    if backend == "reference" or transformed():
        _check_weight_size(pixel_weight, labels)
        classes = _classes(labels, logits.shape[1], ignore_index)
        return reference.upsample_cross_entropy(logits, classes, pixel_weight, class_weight, label_smoothing, reduction)
    loss, count, _ = torch.ops.segops.bal_cross_entropy(
        logits, labels, pixel_weight, class_weight, label_smoothing, ignore_index, reduction == "none", backend
    )
    return loss / count.clamp(min=1) if reduction == "mean" else loss


def boundary_aware_loss(
    logits,
    labels,
    *,
    kernel="gaussian",
    kernel_size=35,
    sigma=3.0,
    beta=0.5,
    downsample=4,
    normalize=None,
    class_weight=None,
    label_smoothing=0.0,
    ignore_index=255,
    reduction="mean",
):
    """Cross entropy weighted by the gaussian edge map of the labels, for logits at any resolution.

    Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", Eq. 4::

        upsample_cross_entropy(logits, labels, gaussian_edge(labels, C, ...), ...)

    with the edge map kept at its downsampled size between the two. See `segops.gaussian_edge` for kernel, kernel_size,
    sigma, beta, downsample and normalize, and `segops.upsample_cross_entropy` for everything else: shapes, dtypes, defaults,
    what is returned and raised. normalize="mean" keeps the scale of plain cross entropy, so that its learning rate carries over.
    """
    check_loss_settings(class_weight, label_smoothing, ignore_index, reduction)
    settings = check_edge_settings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index)
    logits, class_weight = _autocast(logits, class_weight)
    _check_loss(logits, labels, None, class_weight)
    class_weight = None if class_weight is None else class_weight.detach()
    backend = select("boundary_aware_loss", logits)
    if backend == "reference" or transformed():
        classes = _classes(labels, logits.shape[1], ignore_index)
        edge = reference.gaussian_edge(classes, logits.shape[1], *settings)
        return reference.upsample_cross_entropy(logits, classes, edge, class_weight, label_smoothing, reduction)
    loss, count, _ = torch.ops.segops.bal_boundary_loss(
        logits, labels, class_weight, *settings, label_smoothing, ignore_index, reduction == "none", backend
    )
    return loss / count.clamp(min=1) if reduction == "mean" else loss


def _classes(labels, num_classes, ignore_index):
    """The labels as the reference takes them. What is looked at by a transform cannot raise."""
    return (_index_classes if transformed() else torch.ops.segops.bal_classes)(labels, num_classes, ignore_index)


def _index_classes(labels, num_classes, ignore_index):
    labels = labels.long()
    inside = (labels >= 0) & (labels < num_classes)
    return labels.where(inside, -2).where(labels != ignore_index, -1)


def _autocast(*tensors):
    """Floating-point tensors in float32 where autocast is on for the first one's device."""
    if not isinstance(tensors[0], torch.Tensor) or autocast_dtype(tensors[0]) is None:
        return tensors
    return tuple(t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)


def _check_int(name, value, least=-(2**63), most=2**63 - 1):
    if not is_int(value):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}; got {value}")


def _check_number(name, value):
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite; got {value}")


def _check_labels(labels):
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"labels must be int64, int32 or uint8; got {labels.dtype}")
    if labels.dim() != 3:
        raise ValueError(f"labels must have shape (N, H, W); got {tuple(labels.shape)}")
    if 0 in labels.shape[1:]:
        raise ValueError(f"labels must have a height and a width of at least 1; got shape {tuple(labels.shape)}")


def _check_weight_size(pixel_weight, labels):
    """Apart from the other checks, inside the op: export would make guards of its comparisons."""
    if pixel_weight is not None and not all(0 < a <= b for a, b in zip(pixel_weight.shape[1:], labels.shape[1:], strict=True)):
        raise ValueError(
            f"pixel_weight must have at most the labels' size {tuple(labels.shape[1:])} and no empty side; "
            f"got shape {tuple(pixel_weight.shape)}"
        )


def _check_loss(logits, labels, pixel_weight, class_weight):
    """Raises the errors of `upsample_cross_entropy` that are about its tensors."""
    check_logits(logits)
    _check_labels(labels)
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(f"labels must have logits' batch of {logits.shape[0]}; got shape {tuple(labels.shape)}")
    others = [("labels", labels)]
    if pixel_weight is not None:
        check_floating("pixel_weight", pixel_weight)
        if pixel_weight.dim() != 3 or pixel_weight.shape[0] != logits.shape[0]:
            raise ValueError(
                f"pixel_weight must have shape ({logits.shape[0]}, H, W), at most the labels' size; got {tuple(pixel_weight.shape)}"
            )
        others.append(("pixel_weight", pixel_weight))
    if class_weight is not None:
        if class_weight.shape[0] != logits.shape[1]:
            raise ValueError(
                f"class_weight must have shape ({logits.shape[1]},), one per class; got {tuple(class_weight.shape)}"
            )
        others.append(("class_weight", class_weight))
    for name, tensor in others:
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on logits' device {logits.device}; got {tensor.device}")


def check_loss_settings(class_weight, label_smoothing, ignore_index, reduction):
    """Raises the errors of `upsample_cross_entropy` that need no logits."""
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        if class_weight.dim() != 1:
            raise ValueError(f"class_weight must have shape (C,), one per class; got {tuple(class_weight.shape)}")
    _check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    _check_int("ignore_index", ignore_index)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")


def check_edge_settings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index):
    """Raises the errors of `gaussian_edge` that need no labels; returns the settings but for ignore_index."""
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f"kernel must be 'gaussian' or 'linear'; got {kernel!r}")
    _check_int("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd; got {kernel_size}")
    _check_number("sigma", sigma)
    if sigma <= 0:
        raise ValueError(f"sigma must be positive; got {sigma}")
    if kernel == "gaussian" and kernel_size > 1 and math.exp(-2 * (kernel_size // 2) ** 2 / (kernel_size * sigma)) == 1:
        raise ValueError(f"sigma must be small enough that the kernel is not constant; got {sigma} with size {kernel_size}")
    _check_number("beta", beta)
    _check_int("downsample", downsample, 1)
    if normalize not in (None, "max", "mean"):
        raise ValueError(f"normalize must be None, 'max' or 'mean'; got {normalize!r}")
    _check_int("ignore_index", ignore_index)
    return kernel, kernel_size, float(sigma), float(beta), downsample, normalize


LIBRARY.define("bal_classes(Tensor labels, SymInt num_classes, int ignore_index) -> Tensor")
LIBRARY.define(
    "bal_edge(Tensor labels, SymInt num_classes, str kernel, int kernel_size, float sigma, float beta, int downsample, "
    "str? normalize, int ignore_index, str backend) -> Tensor"
)
# -> loss: the sum, or (N, H, W) with per_pixel; the number of pixels that are not ignored; what the gradient needs of each pixel
LIBRARY.define(
    "bal_cross_entropy(Tensor logits, Tensor labels, Tensor? pixel_weight, Tensor? class_weight, float label_smoothing, "
    "int ignore_index, bool per_pixel, str backend) -> (Tensor, Tensor, Tensor)"
)
# The same with the edge map for weights. One op, for its downsampled size must stay out of what export traces.
LIBRARY.define(
    "bal_boundary_loss(Tensor logits, Tensor labels, Tensor? class_weight, str kernel, int kernel_size, float sigma, float beta, "
    "int downsample, str? normalize, float label_smoothing, int ignore_index, bool per_pixel, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "bal_cross_entropy_grad(Tensor grad, Tensor logits, Tensor labels, Tensor? class_weight, Tensor coefficients, "
    "int ignore_index, str backend) -> Tensor"
)
# The kernels, which csrc/bal/bal.h describes.
LIBRARY.define("bal_count_edges(Tensor labels, Tensor(a!) out, SymInt num_classes, int ignore_index) -> ()")
LIBRARY.define("bal_blur(Tensor edges, Tensor factors, Tensor(a!) rows, Tensor(b!) out) -> ()")
LIBRARY.define(
    "bal_softmax_loss(Tensor logits, Tensor labels, Tensor? pixel_weight, Tensor? class_weight, Tensor(a!) coefficients, "
    "Tensor(b!)? loss, Tensor(c!) totals, float label_smoothing, int ignore_index) -> ()"
)
LIBRARY.define(
    "bal_softmax_grad(Tensor grad, Tensor logits, Tensor labels, Tensor? class_weight, Tensor coefficients, Tensor(a!) out, "
    "int ignore_index) -> ()"
)


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _raise_on_bad_label(labels, num_classes, ignore_index):
    bad = _index_classes(labels, num_classes, ignore_index) == -2
    if bad.any():
        value = labels[bad][0].item()
        raise IndexError(f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}); got {value}")


def _check_result(result, labels, num_classes, ignore_index, backend):
    """On the CPU a label out of range raises. The C++ kernels leave a NaN there, which costs nothing to look for."""
    on_cpu = device_type(labels, backend) == "cpu" and (backend == "triton" or result.isnan().any())
    if on_cpu or os.environ.get("SEGOPS_CHECK_LABELS") == "1":
        _raise_on_bad_label(labels, num_classes, ignore_index)


def _bal_classes(labels, num_classes, ignore_index):
    if labels.device.type != "cuda" or os.environ.get("SEGOPS_CHECK_LABELS") == "1":
        _raise_on_bad_label(labels, num_classes, ignore_index)
    return _index_classes(labels, num_classes, ignore_index)


def _empty_edge(labels, *settings):
    return torch.empty(labels.shape, dtype=torch.float32, device=labels.device)


def _bal_edge(labels, num_classes, kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index, backend):
    settings = kernel, kernel_size, sigma, beta, downsample, normalize
    edge = _small_edge(labels, num_classes, *settings, ignore_index, backend)
    if downsample == 1:
        return edge
    return _upsample(edge, labels)


def _small_edge(labels, num_classes, kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index, backend):
    """E_G before its last upsampling, (N, ceil(H / downsample), ceil(W / downsample)). Upsampling keeps beta, and the mean is of
    what is upsampled."""
    n, h, w = labels.shape
    edge = torch.empty((n, -(-h // downsample), -(-w // downsample)), dtype=torch.float32, device=labels.device)
    if edge.numel() == 0:
        return edge
    run = kernels("bal", backend)
    run.bal_count_edges(labels.contiguous(), edge, num_classes, ignore_index)
    _check_result(edge, labels, num_classes, ignore_index, backend)
    if kernel_size > 1:
        counts, edge, rows = edge, torch.empty_like(edge), edge.new_empty((2, *edge.shape))
        run.bal_blur(counts, blur_factors(kernel, kernel_size, sigma, edge.device), rows, edge)
    if normalize == "max":
        peak = edge.amax((1, 2), keepdim=True)
        edge /= peak.where(peak > 0, 1)
    edge += beta
    if normalize == "mean":
        mean = _upsample(edge, labels).mean((1, 2), keepdim=True)
        edge = (edge / mean).where(mean != 0, 1)
    return edge


def _upsample(edge, labels):
    return F.interpolate(edge[:, None], labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]


_BLUR_FACTORS = {}


def blur_factors(kernel, kernel_size, sigma, device):
    """(u1, v1, u2, v2), each of kernel_size, with blur_kernel = u1 v1^T + u2 v2^T: both kernels have rank two.

    Made once for each device: also in a CUDA graph's capture, where they are kept from later calls.
    """
    settings = kernel, kernel_size, sigma, device
    if settings in _BLUR_FACTORS:
        return _BLUR_FACTORS[settings]
    if device.type != "cuda":
        return _BLUR_FACTORS.setdefault(settings, _make_blur_factors(*settings))
    if torch.cuda.is_current_stream_capturing():
        return _make_blur_factors(*settings)  # memory of the graph's, which nobody writes before it runs
    # Warming up for a graph, torch.compile has this thread's allocations come from the graph's memory: another thread's do not.
    with ThreadPoolExecutor(1) as thread:
        return _BLUR_FACTORS.setdefault(settings, thread.submit(_make_blur_factors_now, *settings).result())


def _make_blur_factors_now(*settings):
    factors = _make_blur_factors(*settings)
    torch.cuda.current_stream(factors.device).synchronize()  # once: calls may come on any stream
    return factors


def _make_blur_factors(kernel, kernel_size, sigma, device):
    """Computed where they are used: nothing is copied, which a capture would not allow.

    None is negative, so that the two separable passes lose nothing to cancellation. With g the gaussian on an axis, q its
    least value and p = g - q, the product g g' less its own least value q^2 is p g' + q p'.
    """
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


def _empty_loss(logits, labels, label_smoothing, per_pixel):
    maps = 4 if label_smoothing > 0 else 3
    coefficients = torch.empty((maps, *labels.shape), dtype=_wide(logits.dtype), device=logits.device)
    return coefficients.new_empty(labels.shape if per_pixel else ()), coefficients.new_empty(()), coefficients


def _empty_cross_entropy(logits, labels, pixel_weight, class_weight, label_smoothing, ignore_index, per_pixel, backend):
    return _empty_loss(logits, labels, label_smoothing, per_pixel)


def _empty_boundary_loss(logits, labels, class_weight, *settings):
    label_smoothing, _, per_pixel, _ = settings[-4:]
    return _empty_loss(logits, labels, label_smoothing, per_pixel)


def _bal_cross_entropy(logits, labels, pixel_weight, class_weight, label_smoothing, ignore_index, per_pixel, backend):
    _check_weight_size(pixel_weight, labels)
    loss, _, coefficients = _empty_loss(logits, labels, label_smoothing, per_pixel)
    totals = torch.zeros(2, dtype=torch.float64, device=logits.device)  # of the losses, and of the pixels not ignored
    if labels.numel():
        kernels("bal", backend).bal_softmax_loss(
            _logits(logits, backend), labels.contiguous(), _weights(pixel_weight, logits), _weights(class_weight, logits),
            coefficients, loss if per_pixel else None, totals, label_smoothing, ignore_index,
        )  # fmt: skip
        _check_result(totals, labels, logits.shape[1], ignore_index, backend)
    total, count = (each.to(coefficients.dtype, copy=True) for each in totals)
    return loss if per_pixel else total, count, coefficients


def _bal_boundary_loss(logits, labels, class_weight, *settings):
    *edge_settings, label_smoothing, ignore_index, per_pixel, backend = settings
    edge = _small_edge(labels, logits.shape[1], *edge_settings, ignore_index, backend)
    return _bal_cross_entropy(logits, labels, edge, class_weight, label_smoothing, ignore_index, per_pixel, backend)


def _empty_grad(grad, logits, labels, class_weight, coefficients, ignore_index, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format(logits))


def _bal_cross_entropy_grad(grad, logits, labels, class_weight, coefficients, ignore_index, backend):
    out = _empty_grad(grad, logits, labels, class_weight, coefficients, ignore_index, backend)
    if labels.numel() == 0:
        return out
    wide = _logits(logits, backend)
    written = out if out.dtype == wide.dtype else torch.empty_like(out, dtype=wide.dtype)
    kernels("bal", backend).bal_softmax_grad(
        grad.to(coefficients.dtype).contiguous(), wide, labels.contiguous(), _weights(class_weight, logits), coefficients,
        written, ignore_index,
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def _logits(logits, backend):
    """As kernels take them: on a CPU in the dtype that is computed in."""
    return logits.to(_wide(logits.dtype)) if device_type(logits, backend) == "cpu" else logits


def _weights(weights, logits):
    return None if weights is None else weights.to(_wide(logits.dtype)).contiguous()


LIBRARY.impl("bal_classes", _bal_classes, "CompositeExplicitAutograd")
LIBRARY.impl("bal_edge", _bal_edge, "CompositeExplicitAutograd")
LIBRARY.impl("bal_cross_entropy", _bal_cross_entropy, "CompositeExplicitAutograd")
LIBRARY.impl("bal_boundary_loss", _bal_boundary_loss, "CompositeExplicitAutograd")
LIBRARY.impl("bal_cross_entropy_grad", _bal_cross_entropy_grad, "CompositeExplicitAutograd")
torch.library.register_fake("segops::bal_classes", lambda labels, *_: torch.empty_like(labels, dtype=torch.int64), lib=LIBRARY)
torch.library.register_fake("segops::bal_edge", _empty_edge, lib=LIBRARY)
torch.library.register_fake("segops::bal_cross_entropy", _empty_cross_entropy, lib=LIBRARY)
torch.library.register_fake("segops::bal_boundary_loss", _empty_boundary_loss, lib=LIBRARY)
torch.library.register_fake("segops::bal_cross_entropy_grad", _empty_grad, lib=LIBRARY)
for _kernel in ("bal_count_edges", "bal_blur", "bal_softmax_loss", "bal_softmax_grad"):
    torch.library.register_fake(f"segops::{_kernel}", lambda *args: None, lib=LIBRARY)


def _setup_cross_entropy(ctx, inputs, output):
    logits, labels, _, class_weight, _, *settings = inputs
    _setup(ctx, logits, labels, class_weight, settings, output)


def _setup_boundary_loss(ctx, inputs, output):
    logits, labels, class_weight, *settings = inputs
    _setup(ctx, logits, labels, class_weight, settings, output)


def _setup(ctx, logits, labels, class_weight, settings, output):
    _, count, coefficients = output
    ctx.ignore_index, _, ctx.backend = settings[-3:]
    ctx.save_for_backward(logits, labels, class_weight, coefficients)
    ctx.mark_non_differentiable(count, coefficients)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    logits = None
    if grad is not None:
        logits = torch.ops.segops.bal_cross_entropy_grad(grad, *ctx.saved_tensors, ctx.ignore_index, ctx.backend)
    return logits, *(None,) * (len(ctx.needs_input_grad) - 1)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError("segops.upsample_cross_entropy: double backward not supported (the reference backend has it)")


torch.library.register_autograd("segops::bal_cross_entropy", _backward, setup_context=_setup_cross_entropy, lib=LIBRARY)
torch.library.register_autograd("segops::bal_boundary_loss", _backward, setup_context=_setup_boundary_loss, lib=LIBRARY)
torch.library.register_autograd("segops::bal_cross_entropy_grad", _refuse_double_backward, lib=LIBRARY)
