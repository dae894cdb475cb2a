"""The same values elsewhere: what decides whether a kernel may read and write 16 bytes at once."""


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
