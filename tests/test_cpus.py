"""Every op on CPUs that this one may not be: the kernels' AVX2 and SSE2 code, run by an emulator.

The CPU kernels are compiled once per instruction set, and the CPU decides which of them run: where it has AVX-512, no other
test runs the rest. As a program, this file does on its own CPU what the test has the emulator do.
"""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import segops

from . import OPS
from .accuracy import relative_error
from .contract import contract_of, leaves, results
from .layouts import in_format

ROOT = Path(__file__).parent.parent
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@pytest.mark.thorough
@pytest.mark.parametrize("cpu, instructions", [("Haswell", "AVX2"), ("Nehalem", "DEFAULT")])
def test_every_op(cpu, instructions):
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the emulator runs programs of x86-64 Linux")
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None:
        pytest.skip("needs QEMU's user mode emulation: qemu-x86_64, in Debian's package qemu-user")
    environment = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", "TRITON_INTERPRET")}
    done = subprocess.run(
        [emulator, "-cpu", cpu, sys.executable, "-m", "tests.test_cpus"],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [instructions], f"{done.stdout}(QEMU emulates AVX2 from version 7.2 on)"


def check(use, size, dtype, memory_format):
    """Outputs and gradients against the reference in float64; integers are the same."""
    tensors = [in_format(each, memory_format) for each in use.draw(size, dtype, "cpu")]
    wide = leaves([each.double() if each.is_floating_point() else each for each in tensors], tensors)
    with segops.backend("native"):
        found = results(use.call, tensors)
    with segops.backend("reference"):
        truth = results(use.call, wide)
    for value, exact in zip(found, truth, strict=True):
        if value.is_floating_point():
            assert relative_error(value, exact) <= BOUNDS[value.dtype], relative_error(value, exact)
        else:
            assert torch.equal(value, exact)


def main():
    print(torch.backends.cpu.get_cpu_capability())
    # What torch.empty hands out is then NaN: an element that a kernel leaves out is a wrong one.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    for contract in map(contract_of, OPS):
        for name, use in contract.USES.items():
            formats = torch.contiguous_format, torch.channels_last
            for each in itertools.product((*use.sizes, *use.tails), BOUNDS, formats):
                try:
                    check(use, *each)
                except AssertionError as error:
                    sys.exit(f"{contract.__name__} {name} {each}: {error}")


if __name__ == "__main__":
    main()
