"""What launches of Triton's kernels have in common."""

import torch
import triton.language as tl

SMALL = 2**31 - 2**12  # what a program's last elements go beyond a size is less


def device_of(tensor):
    """Has the tensor's device for the current one, on which Triton launches. A CPU tensor is the
    interpreter's."""
    return torch.accelerator.device_index(None if tensor.device.type == "cpu" else tensor.device.index)


def index_type(*sizes):
    """The integers that a kernel counts with; a division of 64 bits is a hundred instructions."""
    return tl.int32 if max(sizes) < SMALL else tl.int64
