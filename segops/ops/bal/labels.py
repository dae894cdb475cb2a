"""Label maps: their checks, and classes as the reference takes them."""

import os

import torch
from torch import library as torch_library

from ..common import library

# Whether labels are looked at on a GPU too, where that stalls the stream. csrc/bal/bal.cpp asks for
# itself.
CHECK_LABELS = os.environ.get("SEGOPS_CHECK_LABELS") == "1"


def check_labels(labels):
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"labels must be int64, int32 or uint8; got {labels.dtype}")
    if labels.dim() != 3:
        raise ValueError(f"labels must have shape (N, H, W); got {tuple(labels.shape)}")
    _, height, width = labels.shape
    if height == 0 or width == 0:
        raise ValueError(f"labels must have a height and a width of at least 1; got shape {tuple(labels.shape)}")


def index_classes(labels, num_classes, ignore_index):
    """The labels as int64, -1 where they are ignored, -2 where they are none of the classes."""
    labels = labels.long()
    inside = (labels >= 0) & (labels < num_classes)
    return labels.where(inside, -2).where(labels != ignore_index, -1)


def raise_on_wrong_label(labels, num_classes, ignore_index):
    """An IndexError, except on CUDA and XPU unless CHECK_LABELS."""
    if labels.device.type in ("cuda", "xpu") and not CHECK_LABELS:
        return
    wrong = index_classes(labels, num_classes, ignore_index) == -2
    if wrong.any():
        value = labels[wrong][0].item()
        raise IndexError(f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}); got {value}")


def classes_of(labels, num_classes, ignore_index):
    """`index_classes`; raises where labels can be looked at: under a transform they cannot."""
    return (index_classes if library.under_functorch() else checked_classes)(labels, num_classes, ignore_index)


@torch_library.custom_op("segops_reference::bal_classes", mutates_args=())
def checked_classes(labels: torch.Tensor, num_classes: int, ignore_index: int) -> torch.Tensor:
    raise_on_wrong_label(labels, num_classes, ignore_index)
    return index_classes(labels, num_classes, ignore_index)


@checked_classes.register_fake
def _(labels, num_classes, ignore_index):
    return torch.empty_like(labels, dtype=torch.int64)
