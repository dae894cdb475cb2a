"""What is compiled of the kernels of the boundary-aware loss."""

import triton.language as tl

FLOATS = (
    "edges",
    "factors",
    "rows",
    "out",
    "pixel_weight",
    "class_weight",
    "coefficients",
    "loss",
    "sums",
    "grad",
)
LOSS = {"PIXELS": 128, "INDEX": tl.int32}
CELLS = {"COLUMNS": 32, "CLASSES": 8, "num_warps": 1, "INDEX": tl.int32}
PIXELS = {"PIXELS": 128, "CLASSES": 8, "INDEX": tl.int32}
WIDE = {"INDEX": tl.int64}
NONE = {"pixel_weight": None, "class_weight": None, "grad": None}


def types(label="i64", logit="fp32"):
    scalars = {"keep": "fp32", "share": "fp32"}
    pointers = {"labels": f"*{label}", "logits": f"*{logit}", "out": f"*{logit}", "counts": "*i32"}
    return dict.fromkeys(FLOATS, "*fp32") | pointers | scalars


def compilations():
    """(kernel, capability, types, constants) for `tests.compile_triton.compile_for`."""
    from segops.ops.bal import triton_kernels as kernels

    for label in ("i64", "i32", "u8"):
        yield kernels._count_edges, 90, types(label), {"RESIZED": True, "OUTPUTS": 128}
    yield kernels._count_edges, 80, types(), {"RESIZED": False, "OUTPUTS": 128}
    for kernel in (kernels._blur_x, kernels._blur_y):
        yield kernel, 90, types(), {"ELEMENTS": 128}
    for capability, logit in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
        given = types("i64", logit)
        for smoothed in (True, False):
            flags = {"SMOOTHED": smoothed} | ({} if smoothed else NONE)
            for resized in (True, False):
                yield kernels._softmax_loss, capability, given, LOSS | flags | {"RESIZED": resized, "WEIGHT_RESIZED": resized}
            yield kernels._cell_grad, capability, given, CELLS | flags
            yield kernels._pixel_grad, capability, given, PIXELS | flags
        yield kernels._add_cells, capability, given, CELLS
    flags = {"SMOOTHED": True, "RESIZED": True, "WEIGHT_RESIZED": True} | WIDE
    yield kernels._softmax_loss, 90, types("u8"), LOSS | {"loss": None} | flags
    yield kernels._cell_grad, 90, types("u8"), CELLS | flags
    yield kernels._pixel_grad, 90, types("u8"), PIXELS | flags
