"""The losses: the public functions, and the ops `segops::bal_cross_entropy`, `bal_boundary_loss`
and their gradients behind them.

The weight map is made at its downsampled size and stays there: the cross entropy upsamples it, as
it does the logits, pixel by pixel. Nothing is made of (N, C, H, W).
"""

from dataclasses import dataclass

import torch

from ...backend import select
from ..common import library
from ..common.autocast import cast
from ..common.checks import check_device, check_floating, check_int, check_logits, check_number
from ..common.layout import memory_format
from . import reference
from .edge import EdgeSettings, edge_settings, remembered
from .labels import check_labels, classes_of


def upsample_cross_entropy(
    logits, labels, pixel_weight=None, *, class_weight=None, label_smoothing=0.0, ignore_index=255, reduction="mean"
):
    """Cross entropy of logits at any resolution against labels at theirs, without the upsampled
    logits.

    Equals ``F.interpolate(logits, (H, W), mode="bilinear", align_corners=False)``, where sizes
    differ, then softmax cross entropy per pixel, times ``pixel_weight`` where given, 0 at ignored
    pixels. Forward and backward allocate nothing of (N, C, H, W), unless the logits have that size.
    Where the logits require a gradient, forward makes it too, and keeps it in the result's dtype.
    For "none", and of logits of the labels' size (unless compiled), backward makes it, from three
    maps of (N, H, W), four with label smoothing.

    Args:
        logits: (N, C, h, w), any strides; float32, bfloat16, float16, or float64 (CPU and reference
            backend).
        labels: (N, H, W), int64, int32 or uint8.
        pixel_weight: (N, H, W) or (N, h', w') with h' <= H and w' <= W, upsampled bilinearly in the
            same pass; floating point; None (default) weighs every pixel 1.
        class_weight: (C), floating point, or None (default); as `weight` of `F.cross_entropy`.
        label_smoothing: in [0, 1], default 0.0, as in `F.cross_entropy`.
        ignore_index: label of pixels that do not count, any int; default 255.
        reduction: "mean" (default): the sum over the number of pixels that are not ignored, also
            with weights (the n of Yu, Eq. 4); 0 where all are ignored. "sum"; or "none" for the map
            of losses.

    Returns:
        () or, for "none", (N, H, W); float32, or float64 for float64 logits. The gradient flows to
        the logits only, in their dtype, once: double backward is not supported. Deterministic.

    Under autocast floating-point arguments are cast to float32 first. Under `torch.func` transforms
    and forward-mode differentiation PyTorch's ops run, and a label out of range gives NaN.

    Raises:
        TypeError: logits or weights that are not floating-point tensors, labels that are not an
            integer tensor, settings of the wrong type.
        ValueError: wrong rank or shape, an empty height or width, mixed devices, label_smoothing
            outside [0, 1], unknown reduction.
        IndexError: on the CPU, a label outside [0, C) that is not ignore_index; on CUDA the loss is
            NaN, unless the environment had SEGOPS_CHECK_LABELS=1 at import.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`); double backward.
    """
    check_class_weight(class_weight)
    settings = loss_settings(label_smoothing, ignore_index, reduction)
    logits, pixel_weight, class_weight = cast(logits, pixel_weight, class_weight, to=_float32)
    _check_tensors(logits, labels, pixel_weight, class_weight)
    if pixel_weight is not None:
        pixel_weight = pixel_weight.detach()
    if class_weight is not None:
        class_weight = class_weight.detach()
    backend = select("upsample_cross_entropy", logits)
    if backend == "reference" or library.under_functorch():
        check_weight_size(pixel_weight, labels)
        classes = classes_of(labels, logits.shape[1], ignore_index)
        return reference.upsample_cross_entropy(logits, classes, pixel_weight, class_weight, settings)
    saves = _what_to_save(logits, labels, reduction)
    return cross_entropy(logits, labels, pixel_weight, class_weight, *settings.arguments(), saves, backend=backend)[0]


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

    Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", Eq.
    4::

        upsample_cross_entropy(logits, labels, gaussian_edge(labels, C, ...), ...)

    with the edge map kept at its downsampled size between the two. See `segops.gaussian_edge` for
    kernel, kernel_size, sigma, beta, downsample and normalize, and `segops.upsample_cross_entropy`
    for everything else: shapes, dtypes, defaults, what is returned and raised. normalize="mean"
    keeps the scale of plain cross entropy, so that its learning rate carries over.
    """
    check_class_weight(class_weight)
    settings = loss_settings(label_smoothing, ignore_index, reduction)
    of_edge = edge_settings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index)
    logits, class_weight = cast(logits, class_weight, to=_float32)
    _check_tensors(logits, labels, None, class_weight)
    if class_weight is not None:
        class_weight = class_weight.detach()
    backend = select("boundary_aware_loss", logits)
    if backend == "reference" or library.under_functorch():
        classes = classes_of(labels, logits.shape[1], ignore_index)
        edge = reference.gaussian_edge(classes, logits.shape[1], of_edge)
        return reference.upsample_cross_entropy(logits, classes, edge, class_weight, settings)
    saves = _what_to_save(logits, labels, reduction)
    return boundary_loss(logits, labels, class_weight, *of_edge.arguments(), *settings.arguments(), saves, backend=backend)[0]


def _float32(*_):
    return torch.float32


@dataclass(frozen=True)
class LossSettings:
    """The settings of `segops.upsample_cross_entropy`, which raise its errors."""

    label_smoothing: float
    ignore_index: int
    reduction: str

    SCHEMA = "float label_smoothing, int ignore_index, str reduction"

    def __post_init__(self):
        check_number("label_smoothing", self.label_smoothing)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1]; got {self.label_smoothing}")
        check_int("ignore_index", self.ignore_index)
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {self.reduction!r}")

    def arguments(self):
        """Those of SCHEMA."""
        return self.label_smoothing, self.ignore_index, self.reduction


loss_settings = remembered(LossSettings)


def check_class_weight(class_weight):
    """Raises the errors of class_weight that need no logits."""
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        if class_weight.dim() != 1:
            raise ValueError(f"class_weight must have shape (C,), one per class; got {tuple(class_weight.shape)}")


def check_weight_size(pixel_weight, labels):
    """Apart from the other checks, inside the op: export would make guards of its comparisons."""
    if pixel_weight is not None and not all(0 < a <= b for a, b in zip(pixel_weight.shape[1:], labels.shape[1:], strict=True)):
        raise ValueError(
            f"pixel_weight must have at most the labels' size {tuple(labels.shape[1:])} and no empty side; "
            f"got shape {tuple(pixel_weight.shape)}"
        )


def _check_tensors(logits, labels, pixel_weight, class_weight):
    """Raises the errors of `upsample_cross_entropy` that are about its tensors."""
    check_logits(logits)
    check_labels(labels)
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(f"labels must have logits' batch of {logits.shape[0]}; got shape {tuple(labels.shape)}")
    check_device("labels", labels, "logits", logits)
    if pixel_weight is not None:
        check_floating("pixel_weight", pixel_weight)
        if pixel_weight.dim() != 3 or pixel_weight.shape[0] != logits.shape[0]:
            raise ValueError(
                f"pixel_weight must have shape ({logits.shape[0]}, H, W), at most the labels' size; got {tuple(pixel_weight.shape)}"
            )
        check_device("pixel_weight", pixel_weight, "logits", logits)
    if class_weight is not None:
        if class_weight.shape[0] != logits.shape[1]:
            raise ValueError(
                f"class_weight must have shape ({logits.shape[1]},), one per class; got {tuple(class_weight.shape)}"
            )
        check_device("class_weight", class_weight, "logits", logits)


# The loss that the reduction asks for; what the gradient goes by; and the divisor: bal.h.


def _what_to_save(logits, labels, reduction):
    """For the gradient: "nothing", the "coefficients" of the pixels, or the "gradient" itself."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return "nothing"
    # What is traced must not depend on sizes; either is right.
    of_one_size = not torch.compiler.is_compiling() and logits.shape[2:] == labels.shape[1:]
    return "coefficients" if reduction == "none" or of_one_size else "gradient"


def _empty_loss(logits, labels, label_smoothing, reduction, saves):
    options = {"dtype": torch.promote_types(logits.dtype, torch.float32), "device": logits.device}
    shape, divisors = (labels.shape, 0) if reduction == "none" else ((), ())
    if saves == "gradient":
        saved = torch.empty(logits.shape, **options, memory_format=memory_format(logits))
    else:
        maps = 4 if label_smoothing > 0 else 3
        saved = torch.empty((maps, *labels.shape) if saves == "coefficients" else 0, **options)
    return torch.empty(shape, **options), saved, torch.empty(divisors, **options)


def _setup_context(ctx, out, logits, labels, class_weight, label_smoothing, ignore_index, saves):
    _, saved, divisor = out
    if saves == "nothing":
        ctx.settings = None
    elif saves == "coefficients":
        ctx.save_for_backward(logits, labels, class_weight, saved, divisor)
        ctx.settings = cross_entropy_map_grad, label_smoothing, ignore_index
    else:
        ctx.save_for_backward(logits, saved, divisor)  # the logits: what is made of them must know
        ctx.settings = (cross_entropy_grad,)


def _backward(ctx, needed, grad):
    if ctx.settings is None:
        raise RuntimeError(
            "segops.upsample_cross_entropy: the loss has no gradient, as it was computed, or exported, where none was wanted "
            "(under torch.no_grad, or of logits that do not require one)"
        )
    op, *settings = ctx.settings
    return (op(grad, *ctx.saved_tensors, *settings, backend=ctx.backend),)


@library.op(
    "bal_cross_entropy(Tensor logits, Tensor labels, Tensor? pixel_weight, Tensor? class_weight, "
    f"{LossSettings.SCHEMA}, str saves) -> (Tensor, Tensor, Tensor)"
)
class cross_entropy:
    empty, setup_context, backward = _empty_loss, _setup_context, _backward


# The same with the edge map for weights. One op, for its downsampled size must stay out of what
# export traces.
@library.op(
    "bal_boundary_loss(Tensor logits, Tensor labels, Tensor? class_weight, "
    f"{EdgeSettings.SCHEMA}, {LossSettings.SCHEMA}, str saves) -> (Tensor, Tensor, Tensor)"
)
class boundary_loss:
    empty, setup_context, backward = _empty_loss, _setup_context, _backward


def _empty_gradient(logits):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format(logits))


@library.op("bal_cross_entropy_grad(Tensor grad, Tensor logits, Tensor saved, Tensor divisor) -> Tensor")
class cross_entropy_grad:
    empty, backward = _empty_gradient, library.no_double_backward("upsample_cross_entropy")


@library.op(
    "bal_cross_entropy_map_grad(Tensor grad, Tensor logits, Tensor labels, Tensor? class_weight, Tensor coefficients, "
    "Tensor divisor, float label_smoothing, int ignore_index) -> Tensor"
)
class cross_entropy_map_grad:
    empty, backward = _empty_gradient, library.no_double_backward("upsample_cross_entropy")
