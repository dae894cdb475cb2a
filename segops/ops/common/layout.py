"""Memory formats of maps, by strides alone."""

import torch


def memory_format(tensor):
    """The format that a 4-d tensor's strides suggest, by PyTorch's own rule: also right for slices
    of larger buffers."""
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
