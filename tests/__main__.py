"""Runs the tests: a process for each core, each of one thread; then, one by one, what needs the machine for itself.

Arguments go to pytest, except --all, which adds the tests that `make test` leaves out.
"""

import argparse
import subprocess
import sys

import pytest

from . import SIDE_BY_SIDE

parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__, allow_abbrev=False)
parser.add_argument("--all", action="store_true", help="also Triton's compilations for GPUs, and every variant")
parser.add_argument("-m", default="", help="as pytest's")
options, arguments = parser.parse_known_args()
wanted = [f"({options.m})"] if options.m else []
if not options.all:
    wanted += ["not thorough", "not triton"]
found = [
    subprocess.run([sys.executable, "-m", "pytest", "-q", *how, *arguments, "-m", " and ".join([*wanted, alone])]).returncode
    for how, alone in ((SIDE_BY_SIDE, "not alone"), ([], "alone"))
]
nothing = pytest.ExitCode.NO_TESTS_COLLECTED
if set(found) == {nothing}:
    sys.exit(nothing)
sys.exit(any(code not in (0, nothing) for code in found))
