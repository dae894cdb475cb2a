"""The same values elsewhere in memory."""

import torch
from torch._prims_common import suggest_memory_format


def shifted(tensor, by=1):
    """A copy with the same strides, `by` elements behind an address that any pack fits."""
    buffer = tensor.new_empty(tensor.numel() + by)
    return buffer.as_strided(tensor.shape, tensor.stride(), by).copy_(tensor)


def spread(tensor, by=1, dim=-1):
    """A copy whose neighbours along `dim` lie side by side, with `by` elements left out before the next row of them."""
    order = [each for each in range(tensor.dim()) if each != dim % tensor.dim()] + [dim % tensor.dim()]
    rows = tensor.permute(order)
    copy = rows.new_empty((*rows.shape[:-1], rows.shape[-1] + by))[..., : rows.shape[-1]].copy_(rows)
    return copy.permute([order.index(each) for each in range(tensor.dim())])


def in_format(tensor, memory_format):
    """A leaf of that format where the tensor has four dimensions."""
    if tensor.dim() != 4:
        return tensor
    return tensor.detach().contiguous(memory_format=memory_format).requires_grad_(tensor.requires_grad)


def fresh_strides(shape, like):
    """Of a new tensor in the memory format that the other one suggests."""
    return torch.empty(shape, device="meta", memory_format=suggest_memory_format(like)).stride()


def _around(tensor):
    """What lies around a view, for nobody to read."""
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 255)


def _views(tensor):
    around, dims = _around(tensor), range(tensor.dim())
    for dim in dims:
        size = tensor.shape[dim]
        yield f"part of more along {dim}", torch.cat([around, tensor, around], dim).narrow(dim, size, size)
        every = torch.stack([tensor, around], dim + 1).flatten(dim, dim + 1)
        yield f"every other along {dim}", every[(slice(None),) * dim + (slice(None, None, 2),)]
        yield f"one expanded along {dim}", tensor.narrow(dim, 0, 1).expand_as(tensor)
    yield "off by one", shifted(tensor)
    yield "one number expanded", tensor[(slice(1),) * tensor.dim()].expand_as(tensor)
    for one, other in ((-1, -2), (0, 1)) if tensor.dim() > 1 else ():
        yield f"{one} and {other} swapped", tensor.transpose(one, other).contiguous().transpose(one, other)


def views(tensor, few=False):
    """(name, view): parts of larger buffers, transposed and expanded, of contiguous memory and of channels_last."""
    if not tensor.dim():
        yield "number", tensor
        return
    for name, view in _views(tensor.contiguous()):
        if not few or name == f"every other along {tensor.dim() - 1}":
            yield name, view
    if tensor.dim() == 4:
        for name, view in _views(tensor.permute(0, 2, 3, 1).contiguous()):
            if not few or name == "part of more along 3":
                yield f"{name} of channels_last", view.permute(0, 3, 1, 2)
