"""The Triton kernels compile for real GPUs, also on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_compiles():
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_triton.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stdout
