"""The torch.library namespace `segops`, and what every op's file needs to put an op into it."""

import contextlib
import importlib

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("segops", "FRAGMENT")

# What has a backend's kernels, by the names of their schemas; those of Triton are modules of the ops.
KERNELS = {"native": torch.ops.segops}
# The type of device that a backend's kernels are written for, where it is not that of the tensors.
DEVICE_TYPES = {}


def kernels(op, backend):
    """The kernels of an op, "pac" for one. Importing Triton takes a second: only those who use it pay."""
    if backend in KERNELS:
        return KERNELS[backend]
    return importlib.import_module(f"segops.{op}.triton_kernels")


def device_type(tensor, backend):
    """The type of the device that computes: what is chosen by device is chosen by this."""
    return DEVICE_TYPES.get(backend, tensor.device.type)


def memory_format(tensor):
    """The format that a 4-d tensor's strides suggest, by PyTorch's own rule: also right for slices of larger buffers."""
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[dim]
        if sizes[dim] > 1:
            least = least * sizes[dim]
    return torch.channels_last


def is_channels_last(tensor):
    return memory_format(tensor) == torch.channels_last


def format_of(channels_last):
    """The memory format that the flag stands for in the ops' schemas."""
    return torch.channels_last if channels_last else torch.contiguous_format


def autocast_dtype(tensor):
    """The dtype that autocast asks for on the tensor's device, or None where it is off."""
    device = tensor.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # it raises for meta, which has no autocast
    return torch.get_autocast_dtype(device) if enabled else None


def full_precision(tensor):
    """A context in which autocast leaves ops on the tensor's device alone."""
    if autocast_dtype(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def transformed():
    """Whether vmap, jvp, functional grad or forward-mode differentiation look on: they know PyTorch's ops, not ours."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
