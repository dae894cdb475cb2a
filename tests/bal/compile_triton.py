"""What is compiled of the kernels of the boundary-aware loss."""

FLOATS = (
    "edges",
    "factors",
    "rows",
    "out",
    "pixel_weight",
    "class_weight",
    "coefficients",
    "loss",
    "partial",
    "grad",
    "weight_sum_at",
)
PAPER = {"CLASSES": 21, "PIXELS": 128}
GRAD = {"TAPS_Y": 22, "TAPS_X": 22, "COLUMNS": 16, "CLASSES": 8}
# Triton turns an argument that is 1 into a constant, which has not every method of a value.
NARROW = {"h": 1, "w": 1, "weight_h": 1, "weight_w": 1, "stride_x": 1, "stride_c": 1}
NONE = {"pixel_weight": None, "class_weight": None}


def types(label="i64", logit="fp32"):
    scalars = {"keep": "fp32", "share": "fp32"}
    return dict.fromkeys(FLOATS, "*fp32") | {"labels": f"*{label}", "logits": f"*{logit}", "out": f"*{logit}"} | scalars


def compilations():
    """(kernel, capability, types, constants) for `tests.compile_triton.compile_for`."""
    from segops.ops.bal import triton_kernels

    for label in ("i64", "i32", "u8"):
        edges = {"TAPS_Y": 10, "TAPS_X": 10, "RESIZED": True, "OUTPUTS": 128}
        yield triton_kernels._count_edges, 90, types(label), edges
    yield triton_kernels._count_edges, 80, types(), {"TAPS_Y": 1, "TAPS_X": 1, "RESIZED": False, "OUTPUTS": 128, "h": 1, "w": 1}
    for kernel in (triton_kernels._blur_x, triton_kernels._blur_y):
        yield kernel, 90, types(), {"SIZE": 35, "ELEMENTS": 128}
    for capability, logit in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
        for resized, smoothed in ((True, True), (True, False), (False, True), (False, False)):
            flags = {"RESIZED": resized, "WEIGHT_RESIZED": resized, "SMOOTHED": smoothed} | ({} if smoothed else NONE)
            yield triton_kernels._softmax_loss, capability, types("i64", logit), PAPER | flags
            yield triton_kernels._softmax_grad, capability, types("i64", logit), GRAD | flags
    for kernel, constants in ((triton_kernels._softmax_loss, PAPER | {"loss": None}), (triton_kernels._softmax_grad, GRAD)):
        yield kernel, 90, types("u8"), {"RESIZED": True, "WEIGHT_RESIZED": True, "SMOOTHED": True} | constants | NARROW
