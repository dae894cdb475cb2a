"""What is compiled of the kernels of the gate and of pooling."""

import triton.language as tl

VIEW, SIZE = ("i64",) * 4, ("i32",) * 2
ELEMENTS = {"ELEMENTS": 512, "INDEX": tl.int32}


def types(value="fp32", offset="u8", maps=1):
    one = {"pooled": f"*{value}", "input": f"*{value}", "out": f"*{value}", "offsets": f"*{offset}"}
    views = {"pooled_view": VIEW, "input_view": VIEW, "out_view": VIEW}
    many = {"maps": (f"*{value}",) * maps, "views": (VIEW,) * maps, "sizes": (SIZE,) * maps}
    return one | views | many | {"longest": SIZE}


def of_maps(kernels, value="fp32", offset="u8"):
    maps = len(kernels)
    remembers = tuple(kernel != (1, 1) for kernel in kernels)
    held = tuple(f"*{offset}" if each else f"*{value}" for each in remembers)  # where there is none, the output stands in
    constants = {"KERNELS": kernels, "REMEMBERS": remembers} | ELEMENTS
    return types(value, offset, maps) | {"offsets": held, "longest": (SIZE,) * maps}, constants


# Kernels that divide, an adaptive one (0), one whose offsets take two bytes.
EXACT, ADAPTIVE, LARGE = (2, 4), (0, 2), (20, 20)


def compilations():
    """(kernel, capability, types, constants) for `tests.compile_triton.compile_for`."""
    from segops.ops.pag import triton_kernels

    for channels_last in (False, True):
        layout = {"CHANNELS_LAST": channels_last}
        for capability, value in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
            for kernels in (EXACT, ADAPTIVE):
                given, constants = of_maps((kernels,), value)
                yield triton_kernels._pool, capability, given, constants | layout
                holders = tuple(1 if kernel else 2 for kernel in kernels)
                constants = {"KERNEL": kernels, "HOLDERS": holders} | ELEMENTS | layout
                yield triton_kernels._scatter, capability, types(value), constants
            yield triton_kernels._gather, capability, types(value), {"KERNEL": EXACT} | ELEMENTS | layout
        given, constants = of_maps(((1, 1), EXACT, ADAPTIVE))
        yield triton_kernels._pool, 90, given, constants | layout  # a sum
        given, constants = of_maps((LARGE,), offset="u16")
        yield triton_kernels._pool, 90, given, constants | layout | {"INDEX": tl.int64}
        constants = {"KERNEL": LARGE, "HOLDERS": (1, 1)} | ELEMENTS | layout | {"INDEX": tl.int64}
        # Triton turns an argument that is 1 into a constant.
        narrow = {"channels": 1, "height": 1, "width": 1, "windows_y": 1, "windows_x": 1, "input_height": 1, "input_width": 1}
        yield triton_kernels._scatter, 90, types(offset="u16"), constants | narrow
        yield triton_kernels._gather, 90, types(offset="u16"), constants | narrow
