"""Compiling Triton kernels to machine code for GPUs that need not be here. In processes of their own, tests/OP/compile_triton.py:
the interpreter, under which the other tests run, replaces parts of Triton."""

import os
import subprocess
import sys


def compile_for(kernel, capability, types, constants):
    """Compiles a kernel whose arguments are constant where `constants` names them, or of the Triton types given, or i32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(kernel.__name__, capability, len(compiled.asm["cubin"]), "bytes,", compiled.metadata.shared, "shared")


def assert_compiles(script):
    """Runs a script that calls `compile_for` and then prints "compiled"."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", script]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stdout
