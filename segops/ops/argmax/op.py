"""Class indices from logits at any resolution: the public function and the op
`segops::upsample_argmax` behind it."""

import torch

from ...backend import select
from ..common import library
from ..common.checks import check_logits, positive_pair
from . import reference


def upsample_argmax(logits, size):
    """Bilinear upsampling and argmax over the classes, without the upsampled logits.

    Equals ``F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)``, computed
    in float32 at least: the lowest class on ties, a NaN is larger than any number; an infinite
    logit that weighs nothing counts for nothing, where PyTorch makes it NaN. Between four logit
    positions with the same largest class that class is the largest everywhere, so only pixels near
    a boundary look at more than one. Nothing of (N, C, H, W) is allocated.

    Args:
        logits: (N, C, h, w), any strides; float32, bfloat16, float16, or float64 (CPU and reference
            backend).
        size: (H, W) of the result, or one int for both.

    Returns:
        (N, H, W) int64, without gradient. Deterministic.

    Raises:
        TypeError: logits that are not a floating-point tensor, a size that is not an int or a pair
            of ints.
        ValueError: wrong rank, no classes, an empty height or width, a size that is not positive.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    check_logits(logits)
    size = positive_pair("size", size)
    backend = select("upsample_argmax", logits)
    if backend == "reference" or library.under_functorch():
        return reference.upsample_argmax(logits.detach(), size)
    return argmax(logits.detach(), size, backend=backend)


@library.op("upsample_argmax(Tensor logits, SymInt[] size) -> Tensor")
class argmax:
    def empty(logits, size):
        return torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)
