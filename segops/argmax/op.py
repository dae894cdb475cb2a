"""Class indices from logits at any resolution: the public function and the op `segops::upsample_argmax` behind it."""

import torch

from .._library import LIBRARY, transformed
from ..backend import select
from . import reference

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def upsample_argmax(logits, size):
    """Bilinear upsampling and argmax over the classes, without the upsampled logits.

    Equals ``F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)``, computed in float32 at least: the lowest class on
    ties, a NaN is larger than any number. Between four logit positions with the same largest class that class is the largest everywhere, so
    only pixels near a boundary look at more than one. Nothing of (N, C, H, W) is allocated.

    Args:
        logits: (N, C, h, w), any strides; float32, bfloat16, float16, or float64 (CPU and reference backend).
        size: (H, W) of the result, or one int for both.

    Returns:
        (N, H, W) int64, without gradient. Deterministic.

    Raises:
        TypeError: logits that are no floating-point tensor, a size that is no int or pair of ints.
        ValueError: wrong rank, no classes, an empty height or width, a size that is not positive.
        RuntimeError: a forced backend that cannot run here (see `segops.backend`).
    """
    _check_logits(logits)
    size = _check_size(size)
    backend = select("upsample_argmax", logits)
    if backend == "reference" or transformed():
        return reference.upsample_argmax(logits.detach(), size)
    return torch.ops.segops.upsample_argmax(logits.detach(), size, backend)


def _check_logits(logits):
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits must be a torch.Tensor; got {type(logits).__name__}")
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64; got {logits.dtype}")
    if logits.dim() != 4:
        raise ValueError(f"logits must have shape (N, C, h, w); got {tuple(logits.shape)}")
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits must have classes, a height and a width of at least 1; got shape {tuple(logits.shape)}")


def _is_int(value):
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _check_size(size):
    """Raises on a bad size; returns it as [H, W]."""
    sides = [size] * 2 if _is_int(size) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(_is_int, sides)):
        raise TypeError(f"size must be an int or a pair of ints (H, W); got {size!r}")
    if sides[0] < 1 or sides[1] < 1:
        raise ValueError(f"size must be positive; got {size!r}")
    return list(sides)


LIBRARY.define("upsample_argmax(Tensor logits, SymInt[] size, str backend) -> Tensor")
# The kernel, which csrc/argmax/argmax.h describes.
LIBRARY.define("argmax_upsample(Tensor logits, Tensor(a!) best, Tensor(b!) out) -> ()")


def _empty_upsample_argmax(logits, size, backend):
    return torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)


def _upsample_argmax(logits, size, backend):
    out = _empty_upsample_argmax(logits, size, backend)
    if out.numel():
        n, _, h, w = logits.shape
        best = torch.empty((n, h, w), dtype=torch.int32, device=logits.device)
        if backend == "native":
            if logits.device.type == "cpu":  # whose kernel computes in the dtype of what it is given
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            torch.ops.segops.argmax_upsample(logits, best, out)
        else:
            from . import triton_kernels  # importing Triton takes a second: only those who use it pay

            triton_kernels.argmax_upsample(logits, best, out)
    return out


LIBRARY.impl("upsample_argmax", _upsample_argmax, "CompositeExplicitAutograd")
torch.library.register_fake("segops::upsample_argmax", _empty_upsample_argmax, lib=LIBRARY)
torch.library.register_fake("segops::argmax_upsample", lambda *args: None, lib=LIBRARY)
