"""The gaussian edge map: the public function, its settings, the op `segops::bal_edge` behind it."""

import functools
import math
from dataclasses import dataclass

import torch

from ...backend import select
from ..common import library
from ..common.checks import check_int, check_number
from . import reference
from .labels import check_labels, classes_of


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
    """The gaussian edge map of labels: large along class boundaries, largest where several meet.

    Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss", Eq. 1
    to 3, 5 and 6::

        l_i = [labels == i]               a plane per class; ignored pixels belong to none
        E   = sum over i of [|l_i(y, x) - l_i(y, x + 1) / 2 - l_i(y + 1, x) / 2| > 0]
              the last row and column repeat
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
        normalize: None (default), the paper's map, whose scale depends on the image; "max": each
            image's blurred map (E * f, at its downsampled size) is divided by its own maximum
            before beta is added, E_G is in [beta, 1 + beta]; "mean": each image's E_G is divided by
            its own mean over all pixels, so that a loss weighted by it keeps its scale. An image
            without edges is beta throughout under "max", 1 throughout under "mean".
        ignore_index: label of pixels that belong to no class, any int; default 255. Their borders
            are edges.

    Returns:
        (N, H, W) float32, without gradient. Deterministic.

    Antialiasing is our reading of the paper's "bilinearly downsampling": without it edges vanish at
    some offsets.

    Raises:
        TypeError: labels that are not an integer tensor, settings of the wrong type.
        ValueError: wrong rank, an empty height or width, even or non-positive kernel_size, sigma
            not positive or so large that the kernel is constant, downsample < 1, unknown kernel or
            normalize.
        IndexError: on the CPU, a label outside [0, num_classes) that is not ignore_index; on CUDA
            such a pixel is treated as ignored, unless the environment had SEGOPS_CHECK_LABELS=1 at
            import.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    check_labels(labels)
    check_int("num_classes", num_classes, 1, 2**31 - 1)
    settings = edge_settings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index)
    backend = select("gaussian_edge", labels)
    if backend == "reference" or library.under_functorch():
        return reference.gaussian_edge(classes_of(labels, num_classes, ignore_index), num_classes, settings)
    return edge_map(labels, num_classes, *settings.arguments(), ignore_index, backend=backend)


@dataclass(frozen=True)
class EdgeSettings:
    """The settings of `segops.gaussian_edge`, which raise its errors."""

    kernel: str
    kernel_size: int
    sigma: float
    beta: float
    downsample: int
    normalize: str | None
    ignore_index: int

    SCHEMA = "str kernel, int kernel_size, float sigma, float beta, int downsample, str? normalize"

    def __post_init__(self):
        kernel, kernel_size, sigma = self.kernel, self.kernel_size, self.sigma
        if kernel not in ("gaussian", "linear"):
            raise ValueError(f"kernel must be 'gaussian' or 'linear'; got {kernel!r}")
        check_int("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {kernel_size}")
        check_number("sigma", sigma)
        if sigma <= 0:
            raise ValueError(f"sigma must be positive; got {sigma}")
        if kernel == "gaussian" and kernel_size > 1 and math.exp(-2 * (kernel_size // 2) ** 2 / (kernel_size * sigma)) == 1:
            raise ValueError(f"sigma must be small enough that the kernel is not constant; got {sigma} with size {kernel_size}")
        check_number("beta", self.beta, torch.float32)  # the map's dtype
        check_int("downsample", self.downsample, 1)
        if self.normalize not in (None, "max", "mean"):
            raise ValueError(f"normalize must be None, 'max' or 'mean'; got {self.normalize!r}")
        check_int("ignore_index", self.ignore_index)
        object.__setattr__(self, "sigma", float(sigma))
        object.__setattr__(self, "beta", float(self.beta))

    def arguments(self):
        """Those of SCHEMA."""
        return self.kernel, self.kernel_size, self.sigma, self.beta, self.downsample, self.normalize


def remembered(settings):
    """The class, or a function, of settings, which checks those of earlier calls no more."""
    remembering = functools.lru_cache(typed=True)(settings)  # as True is 1

    def make(*arguments):
        if not torch.compiler.is_compiling():
            try:
                return remembering(*arguments)
            except TypeError:  # the class's own, or of what has no hash: the class says which
                pass
        return settings(*arguments)

    return make


edge_settings = remembered(EdgeSettings)


@library.op(f"bal_edge(Tensor labels, SymInt num_classes, {EdgeSettings.SCHEMA}, int ignore_index) -> Tensor")
class edge_map:
    def empty(labels):
        return torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
