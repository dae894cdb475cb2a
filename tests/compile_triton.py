"""Compiling Triton kernels to machine code for GPUs that need not be here, and how often that would
happen.

`python -m tests.compile_triton MODULE CLASS` compiles those of a contract. In a process of its own:
the interpreter, under which the other tests run, replaces parts of Triton.
"""

import functools
import importlib
import inspect
import os
import subprocess
import sys

AMD = "gfx942"


def compile_for(kernel, capability, types, constants):
    """Compiles, for an NVIDIA GPU of this compute capability or for AMD, a kernel whose arguments
    are constant where `constants` names them, which may hold `num_warps` too, or of the Triton
    types given, or i32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in {"num_warps"} & constants.keys()}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    target, code = (GPUTarget("hip", AMD, 64), "hsaco") if capability == AMD else (GPUTarget("cuda", capability, 32), "cubin")
    compiled = triton.compile(source, target=target, options=options)
    print(kernel.__name__, capability, len(compiled.asm[code]), "bytes,", compiled.metadata.shared, "shared")


def assert_compiles(contract):
    """That what the contract's COMPILATIONS yields compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, contract.__module__, contract.__name__]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and " bytes, " in done.stdout, done.stdout


def variants(module, monkeypatch):
    """A set, to which every launch of the module's kernels adds what Triton compiles for it: kernel
    and constants. The interpreter's launches."""
    seen = set()
    for kernel in list(vars(module).values()):
        if hasattr(kernel, "pre_run_hooks"):
            monkeypatch.setattr(kernel, "pre_run_hooks", [functools.partial(_see, seen, kernel)])
    return seen


def _see(seen, kernel, *args, **kwargs):
    signature = inspect.signature(kernel.fn)
    given = signature.bind(*args, **kwargs).arguments
    constants = {name for name, each in signature.parameters.items() if "constexpr" in str(each.annotation)}
    general = kernel.kwargs["do_not_specialize"] or ()
    key = [(name, value if name in constants else _kind(value, name in general)) for name, value in given.items()]
    seen.add((kernel.__name__, *key))


def _kind(value, general):
    if isinstance(value, tuple):
        return tuple(_kind(each, general) for each in value)
    if isinstance(value, int):  # a multiple of 16 makes for wider loads
        return "integer" if general else 1 if value == 1 else value % 16 == 0
    return getattr(value, "dtype", type(value))


if __name__ == "__main__":
    _, module, name = sys.argv
    for kernel, capability, *arguments in getattr(importlib.import_module(module), name).COMPILATIONS():
        for each in (capability, AMD) if capability == 90 else (capability,):
            compile_for(kernel, each, *arguments)
