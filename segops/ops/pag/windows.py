"""The windows of adaptive pooling, and where in memory the offsets of several pooled maps lie: as
csrc/pag/pag.h has it."""


def longest_window(size, out):
    """The largest ceil((j + 1) * size / out) - floor(j * size / out): size / out, or between
    integers the next one or the one after it."""
    rest = size % out
    if rest == 0:
        return size // out
    return size // out + (1 if out % rest == 0 else 2)


def has_windows_above(elements, shape, out_shape):
    """Whether any window has more elements than that where a map is pooled to out_shape."""
    if (shape[2] // out_shape[2] + 2) * (shape[3] // out_shape[3] + 2) <= elements:  # simple enough to trace with dynamic sizes
        return False
    return longest_window(shape[2], out_shape[2]) * longest_window(shape[3], out_shape[3]) > elements


def is_pooled(shape, out_shape):
    return shape[2] != out_shape[2] or shape[3] != out_shape[3]


def offset_layout(shapes):
    """What the offsets of maps of these shapes, pooled to the first one's size, take: [(first byte,
    bytes) or None, where a map is not pooled], and the bytes of all. They follow each other, each
    from a multiple of 16 bytes on."""
    layout, end, out_shape = [], 0, shapes[0]
    for shape in shapes:
        if not is_pooled(shape, out_shape):
            layout.append(None)
            continue
        nbytes = shape[0] * shape[1] * out_shape[2] * out_shape[3] * (2 if has_windows_above(256, shape, out_shape) else 1)
        layout.append((end, nbytes))
        end += -(-nbytes // 16) * 16
    return layout, end
