"""Compiling Triton kernels to machine code for GPUs that need not be here.

`python -m tests.compile_triton MODULE CLASS` compiles those of a contract. In a process of its own:
the interpreter, under which the other tests run, replaces parts of Triton.
"""

import importlib
import os
import subprocess
import sys


def compile_for(kernel, capability, types, constants):
    """Compiles a kernel whose arguments are constant where `constants` names them, or of the Triton
    types given, or i32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(kernel.__name__, capability, len(compiled.asm["cubin"]), "bytes,", compiled.metadata.shared, "shared")


def assert_compiles(contract):
    """That what the contract's COMPILATIONS yields compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, contract.__module__, contract.__name__]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and " bytes, " in done.stdout, done.stdout


if __name__ == "__main__":
    _, module, name = sys.argv
    for kernel, capability, types, constants in getattr(importlib.import_module(module), name).COMPILATIONS():
        compile_for(kernel, capability, types, constants)
