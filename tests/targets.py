"""Every implementation of an op, and the dtypes, for tests to run on; a port for two processes to meet at."""

import itertools
import socket
import sys

import pytest
import torch

from segops.ops.common import library

from . import emulation

EMULATED_OPS = emulation.register()

CUDA = pytest.mark.cuda
# Which compiles a kernel for each shape and setting: minutes.
TRITON = pytest.mark.triton
EMULATED = ("cpu", "emulated")  # the CUDA kernels, run by the CPU: tests/emulation
INTERPRETED = ("cpu", "triton")

# Implementations are (device, backend).
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the emulation of CUDA runs on Linux")
EMULATED_CUDA = pytest.param(EMULATED, id="emulated-cuda", marks=ON_LINUX)
GPU = [
    pytest.param(("cuda", "native"), id="cuda-native", marks=CUDA),
    pytest.param(("cuda", "triton"), id="cuda-triton", marks=[CUDA, TRITON]),
]
COMPILED = [
    pytest.param(("cpu", "native"), id="cpu-native"),
    EMULATED_CUDA,
    GPU[0],
]
# The interpreter takes seconds for a thousand pixels: it runs what is about kernels, on small maps.
FAST = [*COMPILED, GPU[1]]
# All of them but the reference. The interpreter serves where there is no GPU.
TARGETS = FAST if torch.cuda.is_available() else [*FAST, pytest.param(INTERPRETED, id="interpreted-triton")]
REFERENCE = pytest.param(("cpu", "reference"), id="reference")
ON_CPU = [("cpu", "native"), ("cpu", "reference")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the compiled kernels")

fast_targets = pytest.mark.parametrize("target", FAST, indirect=True)
fast_implementations = pytest.mark.parametrize("implementation", [*FAST, REFERENCE], indirect=True)
# What a graph is made of does not depend on whose kernels run: one backend that has some is enough, and the reference.
NATIVE = [COMPILED[0], *GPU]
on_native = pytest.mark.parametrize("target", NATIVE, indirect=True)
native_and_reference = pytest.mark.parametrize("implementation", [*NATIVE, REFERENCE], indirect=True)
on_a_gpu = pytest.mark.parametrize("target", GPU, indirect=True)
# For Hypothesis, which draws many shapes: Triton would compile for each.
compiled_targets = pytest.mark.parametrize("target", COMPILED)


DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def runs(target, dtype):
    """Whether this implementation takes the dtype: float64 is for C++ on the CPU and for the reference."""
    return dtype != torch.float64 or target in ON_CPU


def only_on_cpu(op):
    """Whether an op, by the name of its folder, is declared to have kernels for the CPU alone: elsewhere its reference runs."""
    return any(each.only_on_cpu for each in library._DECLARED if each.module.startswith(f"segops.ops.{op}."))


def matrix(targets, *axes, when):
    """(target, a value of each axis) for parametrize, where `when` has it so."""
    return [
        pytest.param(each.values[0], *values, id="-".join([each.id, *map(str, values)]).replace("torch.", ""), marks=each.marks)
        for each in targets
        for values in itertools.product(*axes)
        if when(each.values[0], *values)
    ]


def needs_much_gpu_memory(test):
    """More than half of it: one of these at a time, also where benchmarks/gpu.sh runs tests side by side."""
    return pytest.mark.alone(pytest.mark.xdist_group("memory")(test))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
