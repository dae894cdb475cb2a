"""The gate as the paper writes it, and pooling that remembers where, in plain PyTorch: the
documentation, the oracle, the fallback."""

import functools

import torch
import torch.nn.functional as F


def partial_attention_gate(decoder, encoders, merge):
    """Haloi, "Partial attention" and Eq. 3: the encoder maps whose switch is on, max-pooled to the
    decoder's size, merged with it.

    Adaptive pooling has windows of a = H_i / h where that divides, and is the identity where a = 1.
    """
    size = decoder.shape[2:]
    pooled = [F.adaptive_max_pool2d(encoder, size) if encoder.shape[2:] != size else encoder for encoder in encoders]
    if merge == "concat":
        return torch.cat([decoder, *pooled], 1)
    wide = torch.promote_types(decoder.dtype, torch.float32)
    return functools.reduce(torch.add, (each.to(wide) for each in pooled), decoder.to(wide, copy=True)).to(decoder.dtype)


def max_pool2d_with_offsets(input, kernel_size):
    """`F.max_pool2d`, its indices into the map turned into positions inside the window."""
    kernel_h, kernel_w = kernel_size
    height, width = input.shape[2:]
    pooled, index = F.max_pool2d(input, kernel_size, ceil_mode=True, return_indices=True)
    y, x = _first(-(-height // kernel_h), kernel_h, index), _first(-(-width // kernel_w), kernel_w, index)
    return pooled, ((index // width - y[:, None]) * kernel_w + index % width - x).to(torch.uint8)


def max_unpool2d_with_offsets(pooled, offsets, kernel_size, size):
    """Zeros, and each value where its offset says; a value whose offset points outside its window
    is left out."""
    kernel_h, kernel_w = kernel_size
    (height, width), offsets = size, offsets.long()
    top, left = _first(pooled.shape[2], kernel_h, offsets)[:, None], _first(pooled.shape[3], kernel_w, offsets)
    y, x = top + offsets // kernel_w, left + offsets % kernel_w
    inside = (y < height) & (offsets < kernel_h * kernel_w) & (x < width)
    index, values = (y * width + x).where(inside, top * width + left), pooled.where(inside, 0)
    zeros = pooled.new_zeros((*pooled.shape[:2], height * width))
    return zeros.scatter(2, index.flatten(2), values.flatten(2)).unflatten(2, (height, width))


def _first(windows, kernel, like):
    """Where each window along an axis begins."""
    return torch.arange(windows, device=like.device) * kernel
