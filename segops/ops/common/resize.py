"""Bilinear resizing in plain PyTorch, of logits that may be infinite."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import library


def resize(logits, size, align_corners=False):
    """(N, C, h, w) -> (N, C, *size); itself if it has that size.

    `F.interpolate`, but for two things. On a CPU it rounds otherwise with another number of
    threads: here each axis is two products and a sum, which in eager code round one way. And it
    multiplies infinities by weights of zero, which makes NaN: here a logit that weighs nothing
    counts for nothing.
    """
    # Traced sizes are resized unless they are known to be equal: a guess would be a guard.
    if all(statically_known_true(side == wanted) for side, wanted in zip(logits.shape[2:], size, strict=True)):
        return logits

    def interpolate(tensor):
        for dim in (3, 2):  # the small map first
            tensor = _resize_axis(tensor, dim, size[dim - 2], align_corners)
        return tensor

    if logits.numel() == 0 or (library.can_look(logits) and logits.isfinite().all()):
        return interpolate(logits)
    detached = logits.detach()
    positive, negative = (interpolate((detached.isnan() | (detached == sign * torch.inf)).to(logits)) > 0 for sign in (1, -1))
    value = interpolate(logits.nan_to_num(0.0, 0.0, 0.0))
    return value.masked_fill(positive, torch.inf).masked_fill(negative, -torch.inf).masked_fill(positive & negative, torch.nan)


def _resize_axis(tensor, dim, size, align_corners):
    side = tensor.shape[dim]
    precise = torch.float32 if tensor.device.type == "mps" else torch.float64
    at = torch.arange(size, dtype=precise, device=tensor.device)
    if align_corners:
        at = at * ((side - 1) / torch.sym_max(size - 1, 1))
    else:
        at = ((at + 0.5) * (side / size) - 0.5).clamp(min=0)
    low = at.long().clamp(max=side - 1)
    weight = (at - low).masked_fill(low == side - 1, 0.0).to(tensor.dtype).view(-1, *(1,) * (3 - dim))
    high = (low + 1).clamp(max=side - 1)
    return tensor.index_select(dim, low).mul_(1 - weight).add_(tensor.index_select(dim, high).mul_(weight))
