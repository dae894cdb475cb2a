"""Compiles the kernels of upsampling with argmax; run by tests/test_triton.py."""

from segops.ops.argmax import triton_kernels
from tests.compile_triton import compile_for

POINTERS = {"best": "*i32", "out": "*i64"}
# Triton turns an argument that is 1 into a constant, which has not every method of a value.
NARROW = {"h": 1, "w": 1, "stride_c": 1, "stride_x": 1}

for capability, logit in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
    types = POINTERS | {"logits": f"*{logit}"}
    for narrow in ({}, NARROW):
        compile_for(triton_kernels._best, capability, types, {"CLASSES": 21, "PIXELS": 256} | narrow)
        for resized in (True, False):
            constants = {"CLASSES": 21, "RESIZED": resized, "PIXELS": 256}
            compile_for(triton_kernels._upsample, capability, types, constants | narrow)
print("compiled")
