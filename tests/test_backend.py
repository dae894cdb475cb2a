"""Selection of the backend, and the command line that reports it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segops
from segops.backend import _runs_on, build_info, requested, select, why_not


def python(*arguments, cwd=None, **environment):
    """Runs Python with changes to the environment; None removes a variable."""
    variables = {**os.environ, **environment}
    variables = {key: value for key, value in variables.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=cwd)


def test_setter_and_context_manager():
    assert requested() == "auto"
    with segops.backend("reference"):
        assert requested() == "reference"
        with segops.backend("native"):
            assert requested() == "native"
        assert requested() == "reference"
    assert requested() == "auto"
    segops.backend("reference")
    assert requested() == "reference"


def test_context_is_left_after_an_error():
    with pytest.raises(KeyError), segops.backend("reference"):
        raise KeyError
    assert requested() == "auto"


def test_unknown_name():
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'native', 'triton', 'reference'; got 'cuda'"):
        segops.backend("cuda")
    assert requested() == "auto"


def test_environment():
    show = "import segops.backend; from segops.backend import requested; print(requested())"
    assert python("-c", show, SEGOPS_BACKEND="reference").stdout.strip() == "reference"
    wrong = python("-c", show, SEGOPS_BACKEND="fast")
    assert (
        wrong.returncode and "SEGOPS_BACKEND must be one of 'auto', 'native', 'triton', 'reference'; got 'fast'" in wrong.stderr
    )


def test_forced_backend_that_cannot_run():
    program = (
        "import torch, segops; segops.backend('triton'); "
        "segops.pyramid_atrous_conv2d(torch.randn(1, 64, 5, 5), torch.randn(64, 64, 3, 3))"
    )
    stopped = python("-c", program, TRITON_INTERPRET=None)
    assert stopped.returncode
    assert "backend 'triton' cannot run on cpu with torch.float32: " in stopped.stderr
    assert "Available here: 'auto', 'native', 'reference'" in stopped.stderr


def test_auto_takes_the_first_that_can_run():
    assert select("op", torch.empty(1)) == "native"
    assert why_not("native", "mps", 0, torch.float32) == why_not("triton", "mps", 0, torch.float32)
    assert "not for mps" in why_not("native", "mps", 0, torch.float32)
    if not torch.cuda.is_available() and torch.version.cuda:
        assert why_not("native", "cuda", 0, torch.float32) == "no CUDA device is visible"
    assert "float64" in why_not("native", "cuda", 0, torch.float64)


def test_architectures():
    assert _runs_on(["8.0", "9.0"], (9, 0)) and _runs_on(["8.0"], (8, 6)) and _runs_on(["8.0+PTX"], (12, 0))
    assert not _runs_on(["8.6"], (8, 0)) and not _runs_on(["9.0"], (10, 0)) and not _runs_on(["10.0+PTX"], (9, 0))


def test_build_info():
    info = build_info()
    assert {"compiler", "flags"} <= set(info["cpu"])
    if isinstance(info["cuda"], dict):
        assert info["cuda"]["architectures"]
    else:
        assert info["cuda"].startswith(("segops._C_cuda", "this torch"))


def test_info_command():
    shown = python("-m", "segops", "info", TRITON_INTERPRET=None)
    assert shown.returncode == 0, shown.stderr
    for text in (
        f"segops {segops.__version__}",
        f"torch {torch.__version__}",
        "pyramid_atrous_conv2d: ",
        "reference  available",
    ):
        assert text in shown.stdout
    forced = python("-m", "segops", "info", SEGOPS_BACKEND="triton", TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES="")
    assert "pyramid_atrous_conv2d: triton CANNOT RUN: " in forced.stdout


def test_without_binaries_everything_still_runs(tmp_path):
    """As after an installation without a compiler: the package without its .so files."""
    shutil.copytree(Path(segops.__file__).parent, tmp_path / "segops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = (  # an editable installation would find this checkout's binaries for the copy
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
        f"import torch, segops, segops.backend; assert segops.__file__.startswith({str(tmp_path)!r}); from segops.backend import build_info; "
        "print(build_info()['cpu']); x = torch.randn(1, 64, 5, 5, requires_grad=True); "
        "segops.pyramid_atrous_conv2d(x, torch.randn(64, 64, 3, 3)).sum().backward(); print('ran')"
    )
    shown = python("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path), TRITON_INTERPRET=None)
    assert shown.returncode == 0, shown.stderr
    assert "segops._C was not built" in shown.stdout and "ran" in shown.stdout
    forced = python("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path), SEGOPS_BACKEND="native")
    assert "backend 'native' cannot run" in forced.stderr and "was not built" in forced.stderr
