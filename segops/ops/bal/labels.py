"""Label maps: their checks, and classes as the reference takes them."""

import os

import torch

from ..common import library

# Whether labels are looked at on CUDA too, where that stalls the stream.
CHECK_LABELS = os.environ.get("SEGOPS_CHECK_LABELS") == "1"


def check_labels(labels):
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"labels must be int64, int32 or uint8; got {labels.dtype}")
    if labels.dim() != 3:
        raise ValueError(f"labels must have shape (N, H, W); got {tuple(labels.shape)}")
    if 0 in labels.shape[1:]:
        raise ValueError(f"labels must have a height and a width of at least 1; got shape {tuple(labels.shape)}")


def index_classes(labels, num_classes, ignore_index):
    """The labels as int64, -1 where they are ignored, -2 where they are none of the classes."""
    labels = labels.long()
    inside = (labels >= 0) & (labels < num_classes)
    return labels.where(inside, -2).where(labels != ignore_index, -1)


def _raise_on_bad_label(labels, num_classes, ignore_index):
    bad = index_classes(labels, num_classes, ignore_index) == -2
    if bad.any():
        value = labels[bad][0].item()
        raise IndexError(f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index}); got {value}")


def check_result(result, labels, num_classes, ignore_index, backend):
    """On the CPU a label out of range raises. The C++ kernels leave a NaN there, which costs
    nothing to look for."""
    on_cpu = library.device_type(labels, backend) == "cpu" and (backend == "triton" or result.isnan().any())
    if on_cpu or CHECK_LABELS:
        _raise_on_bad_label(labels, num_classes, ignore_index)


def classes_of(labels, num_classes, ignore_index):
    """`index_classes`; raises where labels can be looked at: under a transform they cannot."""
    return (index_classes if library.under_functorch() else checked_classes)(labels, num_classes, ignore_index)


@library.op("bal_classes(Tensor labels, SymInt num_classes, int ignore_index) -> Tensor")
class checked_classes:
    def empty(labels):
        return torch.empty_like(labels, dtype=torch.int64)

    def compute(labels, num_classes, ignore_index):
        if labels.device.type != "cuda" or CHECK_LABELS:
            _raise_on_bad_label(labels, num_classes, ignore_index)
        return index_classes(labels, num_classes, ignore_index)
