"""setup.py: what cannot be built is left out with its reason; what was asked for by name is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path):
    """Runs build_ext on a copy of the sources, with changes to the environment; None removes a variable."""
    for name in ("csrc", "segops", "models", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("*.so", "__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, tmp_path / name, **options)

    def run(**environment):
        variables = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    run.built = lambda: {path.name.split(".")[0] for path in (tmp_path / "segops").glob("*.so")}
    return run


def test_no_compiler(build):
    done = build(CXX="no-such-compiler", CC="no-such-compiler", SEGOPS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert "segops._C was not built, the next backend takes its place: " in done.stdout
    assert build.built() == set()


def test_no_nvcc(build, tmp_path):
    """An nvcc in sight that does not work is the same as none."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvcc"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    broken = {
        "PATH": path,
        "CUDA_HOME": str(tmp_path),
        "CXX": "no-such-compiler",
        "CC": "no-such-compiler",
        "SEGOPS_BUILD_CUDA": None,
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    done = build(**broken)
    assert done.returncode == 0, done.stdout
    forced = build(**{**broken, "SEGOPS_BUILD_CUDA": "1"})
    assert forced.returncode != 0
    assert "SEGOPS_BUILD_CUDA=1, but the CUDA extension cannot be built" in forced.stdout


def test_bad_setting(build):
    done = build(SEGOPS_BUILD_CUDA="yes")
    assert done.returncode != 0 and "SEGOPS_BUILD_CUDA must be 0 or 1; got 'yes'" in done.stdout


def test_binaries_of_this_checkout_load():
    """The suite runs on what it tests: the CPU kernels, and the CUDA kernels where they were asked for."""
    from segops.backend import build_info

    assert isinstance(build_info()["cpu"], dict), build_info()["cpu"]
    if os.environ.get("SEGOPS_BUILD_CUDA") == "1":
        assert isinstance(build_info()["cuda"], dict), build_info()["cuda"]
