"""Upsampling and argmax in plain PyTorch."""

import torch
import torch.nn.functional as F


def upsample_argmax(logits, size):
    """Bilinear resizing in float32 at least, then the largest class."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if tuple(logits.shape[2:]) != tuple(size):
        # PyTorch would multiply infinities by weights of zero, which makes NaN: they are told apart by where they reach.
        positive, negative = ((logits.isnan() | (logits == sign * torch.inf)).to(logits) for sign in (1, -1))
        value, positive, negative = (
            F.interpolate(each, size, mode="bilinear", align_corners=False)
            for each in (logits.nan_to_num(0.0, 0.0, 0.0), positive, negative)
        )
        value = value.masked_fill(positive > 0, torch.inf).masked_fill(negative > 0, -torch.inf)
        logits = value.masked_fill((positive > 0) & (negative > 0), torch.nan)
    return logits.argmax(1)
