"""Runs the tests of the emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer; arguments go to pytest."""

import os
import sys

from .. import OPS, SIDE_BY_SIDE
from . import ROOT, sanitizer_environment

os.chdir(ROOT)
# -s: what a sanitizer writes before it ends the process is for the reader, not for pytest.
command = [sys.executable, "-m", "pytest", "-q", "-s", *SIDE_BY_SIDE, "-k", "emulated-cuda or planted"]
try:
    environment = sanitizer_environment()
except FileNotFoundError as error:
    sys.exit(str(error))
os.execve(
    sys.executable,
    [*command, *(f"tests/{op}" for op in OPS), "tests/emulation", *sys.argv[1:]],
    environment,
)
