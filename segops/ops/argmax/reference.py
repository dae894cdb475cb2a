"""Upsampling and argmax in plain PyTorch."""

import torch
import torch.nn.functional as F

from ..common import library


def upsample_argmax(logits, size):
    """Bilinear resizing in float32 at least, then the largest class."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if tuple(logits.shape[2:]) != tuple(size):
        logits = _resize(logits, size) if _known_to_be_finite(logits) else _resize_infinite(logits, size)
    return logits.argmax(1)


def _resize(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _known_to_be_finite(logits):
    """What is traced or transformed cannot tell, and a GPU would have to be waited for."""
    if torch.compiler.is_compiling() or library.under_functorch() or logits.device.type != "cpu":
        return False
    return bool(logits.isfinite().all())


def _resize_infinite(logits, size):
    """PyTorch multiplies infinities by weights of zero, which makes NaN: here a logit that weighs
    nothing counts for nothing."""
    positive, negative = ((logits.isnan() | (logits == sign * torch.inf)).to(logits) for sign in (1, -1))
    positive, negative = _resize(positive, size) > 0, _resize(negative, size) > 0
    value = _resize(logits.nan_to_num(0.0, 0.0, 0.0), size)
    return value.masked_fill(positive, torch.inf).masked_fill(negative, -torch.inf).masked_fill(positive & negative, torch.nan)
