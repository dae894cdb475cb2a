"""Compiles the Triton kernels to machine code for GPUs that need not be here. Run by test_pac_triton.py in a process of its
own: the interpreter, under which the other tests run, replaces parts of Triton."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from segops.pac import triton_kernels

TILE = {"PIXELS": 16, "CHANNELS": 128}
PAPER = {"kernel_h": 3, "kernel_w": 3, "rates": (1, 3, 5, 7, 9), "sign": 1}
# Triton turns an argument that is 1 into a constant, which has not every method of a value.
NARROW = {"kernel_h": 3, "kernel_w": 1, "rates": (1, 2), "sign": -1, "width": 1, "channels": 1}


def compile_for(kernel, capability, dtype, constants):
    tensors = ("planes", "bias", "out", "source")
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name in tensors else "i32" for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(kernel.__name__, capability, dtype, len(compiled.asm["cubin"]), "bytes,", compiled.metadata.shared, "shared")


for capability, dtype in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
    compile_for(triton_kernels._gather, capability, dtype, {**PAPER, **TILE, "rates_per_group": 5})
    compile_for(triton_kernels._scatter, capability, dtype, {**PAPER, **TILE, "groups": 1})
compile_for(triton_kernels._gather, 90, "fp32", {**NARROW, **TILE, "rates_per_group": 1, "bias": None})
compile_for(triton_kernels._scatter, 90, "fp32", {**NARROW, **TILE, "groups": 2})
print("compiled")
