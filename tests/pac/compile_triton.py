"""What is compiled of the shift kernels."""

TILE = {"PIXELS": 16, "CHANNELS": 128}
PAPER = {"kernel_h": 3, "kernel_w": 3, "rates": (1, 3, 5, 7, 9), "sign": 1}
# Triton turns an argument that is 1 into a constant, which has not every method of a value.
NARROW = {"kernel_h": 3, "kernel_w": 1, "rates": (1, 2), "sign": -1, "width": 1, "channels": 1}


def tensors(dtype):
    return dict.fromkeys(("planes", "bias", "out", "source"), f"*{dtype}")


def compilations():
    """(kernel, capability, types, constants) for `tests.compile_triton.compile_for`."""
    from segops.ops.pac import triton_kernels

    for capability, dtype in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
        yield triton_kernels._gather, capability, tensors(dtype), {**PAPER, **TILE, "rates_per_group": 5}
        yield triton_kernels._scatter, capability, tensors(dtype), {**PAPER, **TILE, "groups": 1}
    yield triton_kernels._gather, 90, tensors("fp32"), {**NARROW, **TILE, "rates_per_group": 1, "bias": None}
    yield triton_kernels._scatter, 90, tensors("fp32"), {**NARROW, **TILE, "groups": 2}
