"""The permutohedral filter and mean field in the dense CRF: the public functions, and the ops
`segops::crf_filter`, `crf_mean_field` and its gradient behind them."""

import sys
from dataclasses import dataclass

import torch

from ...backend import only_on_cpu, select
from ..common import library
from ..common.autocast import autocast_dtype, cast
from ..common.checks import FLOATING, check_bool, check_device, check_floating, check_int, check_logits, check_number
from ..common.layout import memory_format
from ..common.resize import resize
from . import reference

LARGEST_DIMENSION = 16  # of features
GROUPS = 128  # of vertices, at most: crf.h
only_on_cpu("permutohedral_filter", "dense_crf")


def permutohedral_filter(values, features, *, normalization=None):
    """Filters by a Gaussian in feature space: bilateral, joint bilateral, non-local means.

    Approximates ``y_p = sum_q exp(-|f_p - f_q|² / 2) x_q``, q = p included, at a cost that grows
    with the number of positions alone, by the permutohedral lattice (Adams, Baek, Davis, "Fast
    High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010), as Krähenbühl
    and Koltun built it for the dense CRF (NIPS 2011). A normalised result is off by a few percent;
    without normalisation the sums are about 0.6 of the Gaussian's. Values are computed in float32
    at least, the lattice in float64.

    Args:
        values: (N, C, *), any strides; float32, bfloat16, float16 or float64.
        features: (N, d, *) with the trailing sizes of `values`, floating point, 1 <= d <= 16, in
            units of the Gaussian's standard deviation. Lattice coordinates are told apart up to
            1e5, and features beyond 1e7 are taken for 1e7. A position whose features are not finite
            is NaN in the result, and gives nothing to others.
        normalization: None (default), "after", which divides by the filter of ones: a weighted
            mean, constants stay; or "symmetric", which multiplies by its inverse square root before
            and after.

    Returns:
        (N, C, *) in values' dtype. Deterministic on the CPU. Differentiable by `values`, any number
        of times; features are constants.

    Raises:
        TypeError: values or features that are not floating-point tensors.
        ValueError: ranks, batches, trailing sizes or devices that differ, empty dimensions, more
            than 16 features, an unknown normalization.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).

    Example:
        >>> image = torch.rand(1, 3, 120, 160)
        >>> y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
        >>> position = torch.stack([x, y]).expand(1, 2, 120, 160)
        >>> features = torch.cat([position / 8, image / 0.1], 1)  # 8 pixels, 0.1 of intensity
        >>> smooth = segops.permutohedral_filter(image, features, normalization="after")
    """
    _check_filter(values, features)
    check_normalization(normalization, allowed=(None, *NORMALIZATIONS))
    backend = select("permutohedral_filter", values)
    layout = memory_format(values) if values.dim() == 4 else torch.contiguous_format
    shape, values, features = values.shape, values.flatten(2), features.detach().flatten(2)
    if backend == "reference" or library.under_functorch():
        out = reference.permutohedral_filter(values, features, normalization)
    else:
        out = lattice_filter(values, features, str(normalization), False, backend=backend)
    return out.view(shape).contiguous(memory_format=layout)


def dense_crf(
    logits,
    images,
    *,
    iterations=10,
    spatial_weight=3.0,
    spatial_sigma=1.0,
    bilateral_weight=4.0,
    bilateral_sigma=(67.0, 3.0),
    compatibility=None,
    normalization="symmetric",
    align_corners=False,
):
    """Refines logits by the image: mean-field inference in a fully connected CRF.

    Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
    Potentials", NIPS 2011, as DeepLab v1 and v2 (arXiv:1412.7062, 1606.00915) refine with it and
    CRF-RNN (Zheng et al., arXiv:1502.03240) trains through it::

        L  = logits, resized bilinearly to the images' size where it differs
        L' = L;  `iterations` times:
            Q  = softmax(L')
            S  = Q filtered by exp(-|p_i - p_j|² / 2 spatial_sigma²)
            B  = Q filtered by `permutohedral_filter` with features (x, y, image) / bilateral_sigma
            L' = L + compatibility @ (spatial_weight * S + bilateral_weight * B)
        return log_softmax(L')

    The spatial filter is exact. Pixels send messages to themselves too, as in the code of both
    papers. Logits of -inf stay so. Log-probabilities serve as logits. The defaults are those of
    DeepLab v2 with ResNet-101 (kazuto1011/deeplab-pytorch); `segops.models.CRF_SETTINGS` has what
    else was published, and `segops.nn.CRF` the settings of CRF-RNN.

    Args:
        logits: (N, C, h, w), any strides; float32, bfloat16, float16 or float64. Computed in
            float32 at least.
        images: (N, K, H, W), uint8 or floating point, K <= 14, in the units of `bilateral_sigma`.
            Constants: they get no gradient.
        iterations: of mean field, default 10; 0 gives log_softmax of the resized logits.
        spatial_weight: of the spatial kernel, default 3.0: a number, or a tensor () , (C,) per
            class, or (C, C), which S is multiplied by from the left. The number 0 leaves the kernel
            out.
        spatial_sigma: its standard deviation in pixels, default 1.0.
        bilateral_weight: of the bilateral kernel, default 4.0, as spatial_weight.
        bilateral_sigma: its standard deviations in (pixels, intensity levels), default (67.0, 3.0):
            for images of 0 to 255. An image of 0 to 1 needs 3.0 / 255.
        compatibility: (C, C), which is added: entry [l, k] says how much k near by raises l. None
            (default) is the identity, the Potts model. It is -mu of the papers.
        normalization: of both filters, "symmetric" (default) or "after", as in
            `segops.permutohedral_filter`.
        align_corners: of the logits' resize, default False.

    Returns:
        (N, C, H, W) log Q, the log-probabilities, in the logits' dtype, float32 under autocast.
        Deterministic on the CPU. Differentiable by logits, weights and compatibility; once, unless
        the reference runs. What `torch.export` makes of the kernels has no gradient.

    Raises:
        TypeError: logits, weights or compatibility that are not floating point, images that are
            neither uint8 nor floating point, iterations that are not an int, sigmas that are not
            numbers, a bilateral_sigma that is not a pair, an align_corners that is not a bool.
        ValueError: ranks, batches or devices that differ, empty dimensions, more than 14 image
            channels, negative iterations, sigmas that are not positive and finite, weights or
            compatibility of another shape, weights that are not finite, numbers that are not in the
            dtype that is computed in, an unknown normalization.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).

    Example:
        >>> logits, image = torch.randn(1, 21, 41, 41), torch.randint(0, 256, (1, 3, 321, 321))
        >>> refined = segops.dense_crf(logits, image.to(torch.uint8))
        >>> classes = refined.argmax(1)  # (1, 321, 321)
    """
    settings = CRFSettings(iterations, spatial_sigma, bilateral_sigma, normalization)
    check_bool("align_corners", align_corners)
    logits, *tensors = cast(logits, spatial_weight, bilateral_weight, compatibility, to=lambda *_: torch.float32)
    _check_maps(logits, images)
    # Before they were cast: afterwards a number that is too large is as good as infinite.
    _check_weight("spatial_weight", spatial_weight, logits)
    _check_weight("bilateral_weight", bilateral_weight, logits)
    _check_compatibility(compatibility, logits)
    arguments = logits, images.detach(), *tensors, align_corners, settings
    if autocast_dtype(logits) is None:
        return _infer(*arguments)
    with torch.autocast(logits.device.type, enabled=False):
        return _infer(*arguments)


def _infer(logits, images, spatial_weight, bilateral_weight, compatibility, align_corners, settings):
    backend = select("dense_crf", logits)
    wide = logits.to(_computed_in(logits))
    if compatibility is not None:
        compatibility = compatibility.to(wide.dtype)  # once, or its gradient is rounded for each kernel
    spatial = _matrix("spatial_weight", spatial_weight, compatibility, wide)
    bilateral = _matrix("bilateral_weight", bilateral_weight, compatibility, wide)
    filters = settings.iterations > 0 and (spatial is not None or bilateral is not None)
    by_reference = backend == "reference" or library.under_functorch()
    differentiable = any(each is not None and each.requires_grad for each in (wide, spatial, bilateral))
    saves = differentiable and torch.is_grad_enabled() and not library.exporting()
    # Without a gradient the op resizes image by image: a batch of maps of full size does not exist.
    if saves or by_reference or not filters:
        wide = resize(wide, images.shape[2:], align_corners)
    if not filters:
        result = wide.log_softmax(1)
    elif by_reference:
        result = reference.mean_field(wide, images, spatial, bilateral, settings)
    else:
        arguments = align_corners, *settings.arguments(), saves
        result = mean_field(wide, spatial, bilateral, images, *arguments, backend=backend)[0]
    return result.to(logits.dtype, memory_format=memory_format(logits))


def _computed_in(logits):
    return torch.promote_types(logits.dtype, torch.float32)


def _matrix(name, weight, compatibility, like):
    """compatibility @ weight, (C, C): what a filtered Q is multiplied by. None for the number 0."""
    if isinstance(weight, torch.Tensor):
        weight = weight.to(like.dtype)
    elif weight == 0:
        return None
    else:
        weight = float(weight)  # PyTorch takes an int for one of 64 bits
    if compatibility is None:
        compatibility = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        # In float64, which autocast, where a backward pass may run, leaves alone.
        precise = torch.float32 if like.device.type == "mps" else torch.float64
        product = (compatibility.to(precise) @ weight.to(precise)).to(like.dtype)
    else:
        product = compatibility * weight
    if library.can_look(product) and not product.isfinite().all() and compatibility.isfinite().all():
        raise ValueError(f"{name} times compatibility must be finite in {product.dtype}; got a product that is not")
    return product


NORMALIZATIONS = ("after", "symmetric")


@dataclass(frozen=True)
class CRFSettings:
    """The settings of `segops.dense_crf`, which raise its errors."""

    iterations: int
    spatial_sigma: float
    bilateral_sigma: tuple
    normalization: str

    SCHEMA = "int iterations, float spatial_sigma, float position_sigma, float intensity_sigma, str normalization"

    def __post_init__(self):
        check_int("iterations", self.iterations, lowest=0)
        _check_sigma("spatial_sigma", self.spatial_sigma, self.spatial_sigma)
        if not isinstance(self.bilateral_sigma, (tuple, list)) or len(self.bilateral_sigma) != 2:
            raise TypeError(f"bilateral_sigma must be a pair, (pixels, intensity levels); got {self.bilateral_sigma!r}")
        for sigma in self.bilateral_sigma:
            _check_sigma("bilateral_sigma", sigma, self.bilateral_sigma)
        check_normalization(self.normalization)
        object.__setattr__(self, "spatial_sigma", float(self.spatial_sigma))
        object.__setattr__(self, "bilateral_sigma", (float(self.bilateral_sigma[0]), float(self.bilateral_sigma[1])))

    def arguments(self):
        """Those of SCHEMA."""
        return self.iterations, self.spatial_sigma, *self.bilateral_sigma, self.normalization


def _check_sigma(name, sigma, given):
    if not isinstance(sigma, int | float) or isinstance(sigma, bool):
        raise TypeError(f"{name} must be {'a pair of numbers' if sigma is not given else 'a number'}; got {given!r}")
    if not 0 < sigma <= sys.float_info.max:  # not math.isfinite, which compiled code cannot take
        raise ValueError(f"{name} must be positive and finite; got {given!r}")


def check_normalization(normalization, allowed=NORMALIZATIONS):
    if normalization not in allowed:
        raise ValueError(f"normalization must be one of {', '.join(map(repr, allowed))}; got {normalization!r}")


def _check_filter(values, features):
    """Raises the errors of `permutohedral_filter` that are about its tensors."""
    for name, tensor, shape in (("values", values, "(N, C, *)"), ("features", features, "(N, d, *)")):
        check_floating(name, tensor)
        if tensor.dim() < 3:
            raise ValueError(f"{name} must have shape {shape}, of at least three dimensions; got {tuple(tensor.shape)}")
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must have no empty dimension but the batch; got shape {tuple(tensor.shape)}")
    if features.shape[0] != values.shape[0]:
        raise ValueError(f"features must have values' batch of {values.shape[0]}; got shape {tuple(features.shape)}")
    if features.shape[2:] != values.shape[2:]:
        raise ValueError(f"features must have values' sizes {tuple(values.shape[2:])}; got shape {tuple(features.shape)}")
    if features.shape[1] > LARGEST_DIMENSION:
        raise ValueError(f"features must have at most {LARGEST_DIMENSION} dimensions; got shape {tuple(features.shape)}")
    check_device("features", features, "values", values)


def _check_maps(logits, images):
    check_logits(logits)
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a torch.Tensor; got {type(images).__name__}")
    if images.dtype not in (torch.uint8, *FLOATING):
        raise TypeError(f"images must be uint8, float32, bfloat16, float16 or float64; got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape (N, K, H, W); got {tuple(images.shape)}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must have channels, a height and a width of at least 1; got shape {tuple(images.shape)}")
    if images.shape[0] != logits.shape[0]:
        raise ValueError(f"images must have logits' batch of {logits.shape[0]}; got shape {tuple(images.shape)}")
    if images.shape[1] > LARGEST_DIMENSION - 2:
        raise ValueError(f"images must have at most {LARGEST_DIMENSION - 2} channels; got shape {tuple(images.shape)}")
    check_device("images", images, "logits", logits)


def _check_weight(name, weight, logits):
    if not isinstance(weight, torch.Tensor):
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise TypeError(f"{name} must be a number or a floating-point tensor; got {weight!r}")
        check_number(name, weight, _computed_in(logits))
        return
    check_floating(name, weight)
    classes = logits.shape[1]
    if weight.dim() > 2 or any(side != classes for side in weight.shape):
        raise ValueError(f"{name} must have shape (), ({classes},) or ({classes}, {classes}); got {tuple(weight.shape)}")
    check_device(name, weight, "logits", logits)
    if library.can_look(weight) and not weight.isfinite().all():
        raise ValueError(f"{name} must be finite; got a tensor that is not")
    _check_range(name, weight, logits)


def _check_compatibility(compatibility, logits):
    if compatibility is None:
        return
    check_floating("compatibility", compatibility)
    classes = logits.shape[1]
    if tuple(compatibility.shape) != (classes, classes):
        raise ValueError(f"compatibility must have shape ({classes}, {classes}); got {tuple(compatibility.shape)}")
    check_device("compatibility", compatibility, "logits", logits)
    _check_range("compatibility", compatibility, logits)


def _check_range(name, tensor, logits):
    """Finite numbers must be finite in what is computed in, too."""
    dtype = _computed_in(logits)
    narrowed = torch.promote_types(tensor.dtype, dtype) != dtype
    if narrowed and library.can_look(tensor) and (tensor.isfinite() & tensor.to(dtype).isinf()).any():
        largest = torch.finfo(dtype).max
        raise ValueError(f"{name} must be at most {largest:.4g} in size, the largest {dtype}; got a tensor that is not")


# The filter is linear in `values`, and its adjoint, by the axes in reverse order, is the same op.


@library.op("crf_filter(Tensor values, Tensor features, str normalization, bool adjoint) -> Tensor", only_on_cpu=True)
class lattice_filter:
    def empty(values):
        return torch.empty(values.shape, dtype=values.dtype, device=values.device)

    def setup_context(ctx, out, features, normalization, adjoint):
        ctx.save_for_backward(features)
        ctx.settings = normalization, not adjoint

    def backward(ctx, needed, grad):
        (features,), (_, adjoint) = ctx.saved_tensors, ctx.settings
        result = lattice_filter(grad, features, *ctx.settings, backend=ctx.backend)
        # The filter is NaN where features are not finite; as a derivative, of its adjoint, it is 0.
        return (result if adjoint else result.masked_fill(~features.isfinite().all(1, keepdim=True), 0.0),)


# Log Q; and for the gradient Q before each iteration and the lattice: crf.h.


@library.op(
    "crf_mean_field(Tensor logits, Tensor? spatial, Tensor? bilateral, Tensor images, bool align_corners, "
    f"{CRFSettings.SCHEMA}, bool saves) -> (Tensor, Tensor, Tensor, Tensor)",
    only_on_cpu=True,
)
class mean_field:
    def empty(logits, bilateral, images, iterations, saves):
        n, channels, height, width = images.shape
        classes, positions, corners = logits.shape[1], height * width, channels + 3
        keeps = saves and bilateral is not None
        lattice = positions * corners if keeps else 0
        options = {"dtype": logits.dtype, "device": logits.device}
        return (
            torch.empty((n, classes, height, width), **options, memory_format=memory_format(logits)),
            torch.empty((n, iterations if saves else 0, positions, classes), **options),
            torch.empty(
                (n, lattice * (3 + corners) + GROUPS * (1 + corners) + 36 if keeps else 0),
                dtype=torch.int32,
                device=logits.device,
            ),
            torch.empty((n, 2 * lattice + positions if keeps else 0), **options),
        )

    def setup_context(ctx, out, spatial, bilateral, images, iterations, spatial_sigma, normalization, saves):
        if saves:
            ctx.save_for_backward(*out, spatial, bilateral)
        ctx.settings = (images.shape[1], spatial_sigma, normalization) if saves else None

    def backward(ctx, needed, grad):
        if ctx.settings is None:
            raise RuntimeError(
                "segops.dense_crf: the result has no gradient, as it was computed, or exported, where none was wanted "
                "(under torch.no_grad, or of tensors that do not require one)"
            )
        wanted = needed[1] or needed[2]
        grads = mean_field_grad(grad, *ctx.saved_tensors, *ctx.settings, wanted, backend=ctx.backend)
        return tuple(each if need else None for each, need in zip(grads, needed, strict=False))


@library.op(
    "crf_mean_field_grad(Tensor grad, Tensor out, Tensor q, Tensor index, Tensor weight, Tensor? spatial, Tensor? bilateral, "
    "int channels, float spatial_sigma, str normalization, bool matrices) -> (Tensor, Tensor, Tensor)",
    only_on_cpu=True,
)
class mean_field_grad:
    def empty(out, spatial, bilateral, matrices):
        logits = torch.empty(out.shape, dtype=out.dtype, device=out.device, memory_format=memory_format(out))
        return logits, *(
            torch.empty(each.shape if matrices and each is not None else 0, dtype=out.dtype, device=out.device)
            for each in (spatial, bilateral)
        )

    backward = library.no_double_backward("dense_crf")
