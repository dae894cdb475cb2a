"""Memory formats of maps, by strides alone."""

import torch


def is_channels_last(tensor):
    """Whether a 4-d tensor's strides suggest channels_last, by PyTorch's own rule: also right for
    slices of larger buffers."""
    strides = tensor.stride()
    if strides[1] == 0 or strides[3] < strides[1]:  # the second is what most are, and what follows would find
        return False
    sizes, least = tensor.shape, 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim]
        if sizes[dim] > 1:
            least = least * sizes[dim]
    return True


def memory_format(tensor):
    """The memory format that a 4-d tensor suggests."""
    return format_of(is_channels_last(tensor))


def format_of(channels_last):
    """The memory format that the flag stands for in the ops' schemas."""
    return torch.channels_last if channels_last else torch.contiguous_format
