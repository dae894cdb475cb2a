"""Selection of the backend, and the command line that reports it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import segops
from segops import library_path
from segops.__main__ import info
from segops.backend import _runs_on, _select, build_info, implementation, only_on_cpu, requested, select, why_not
from segops.ops.common import library


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
    for name in ("native", "triton"):
        assert "not for mps" in why_not(name, "mps", 0, torch.float32)
    if not torch.cuda.is_available() and torch.version.cuda:
        assert why_not("native", "cuda", 0, torch.float32) == "no CUDA device is visible"
    assert "float64" in why_not("native", "cuda", 0, torch.float64)


def test_an_op_that_is_only_on_the_cpu(monkeypatch):
    """Elsewhere its reference runs, but a backend that cannot run is refused all the same."""
    monkeypatch.setattr(sys.modules["segops.backend"], "_ONLY_ON_CPU", set())
    only_on_cpu("new", "newer")
    for name in ("new", "newer", "old"):
        assert implementation(name, "native", "cpu") == "native" and implementation(name, "reference", "cuda") == "reference"
    for chosen, device in (("triton", "cpu"), ("triton", "cuda"), ("native", "cuda")):
        assert implementation("new", chosen, device) == implementation("newer", chosen, device) == "reference"
        assert implementation("old", chosen, device) == chosen
    monkeypatch.setattr(sys.modules["segops.backend"], "TRITON_INTERPRET", True)
    pytest.importorskip("triton")
    with segops.backend("triton"):
        assert (_select("new", torch.device("cpu"), torch.float32), _select("old", torch.device("cpu"), torch.float32)) == (
            "reference",
            "triton",
        )
        with pytest.raises(RuntimeError, match=r"segops\.new: backend 'triton' cannot run on cpu with torch\.float64"):
            _select("new", torch.device("cpu"), torch.float64)


@pytest.fixture
def rocm(monkeypatch):
    """As PyTorch for an AMD GPU presents itself."""
    monkeypatch.setattr(sys.modules["segops.backend"], "TRITON_INTERPRET", False)  # `segops.backend` is the class
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "AMD Instinct")
    return torch.device("cuda", 0)


@pytest.fixture
def xpu(monkeypatch):
    """As PyTorch for an Intel GPU presents itself, without the Triton that comes with it."""
    monkeypatch.setattr(sys.modules["segops.backend"], "TRITON_INTERPRET", False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    return torch.device("xpu", 0)


def intel_driver(monkeypatch):
    backends = pytest.importorskip("triton.backends").backends
    monkeypatch.setitem(backends, "intel", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True)))


def chosen(device, name):
    with segops.backend(name):
        return _select("op", device, torch.float32)


def test_triton_runs_on_amd_gpus_if_asked_for(rocm, monkeypatch):
    pytest.importorskip("triton")
    assert "not for cuda here" in why_not("native", "cuda", 0, torch.float32)
    assert why_not("triton", "cuda", 0, torch.float32) is None
    assert chosen(rocm, "triton") == "triton" and chosen(rocm, "auto") == "reference"
    assert "float64" in why_not("triton", "cuda", 0, torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not("triton", "cuda", 0, torch.float32) == "no CUDA device is visible"


def test_triton_runs_on_intel_gpus_if_it_has_a_driver_and_is_asked_for(xpu, monkeypatch):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="this build of Triton has no driver for xpu here"):
            chosen(xpu, "triton")
    intel_driver(monkeypatch)
    assert "not for xpu here" in why_not("native", "xpu", 0, torch.float32)
    assert chosen(xpu, "triton") == "triton" and chosen(xpu, "auto") == "reference"
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert why_not("triton", "xpu", 0, torch.float32) == "no XPU device is visible"


def test_info_says_what_was_never_tried(rocm, capsys):
    pytest.importorskip("triton")
    info()
    shown = capsys.readouterr().out.partition("cuda:0 (AMD Instinct)")[2]
    assert "pyramid_atrous_conv2d: reference" in shown
    assert "triton     available, never tried on such a GPU" in shown and "reference  available\n" in shown


def test_triton_launches_on_the_tensors_device():
    pytest.importorskip("triton")
    from segops.ops.common.triton_launch import device_of

    for device, index in ((torch.device("cpu", 0), None), (torch.device("cuda", 1), 1), (torch.device("xpu", 2), 2)):
        assert device_of(SimpleNamespace(device=device)).idx == index
    with device_of(torch.empty(1)):
        pass


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
    lacking = "dense_crf: reference (it has no kernels for 'triton' on cpu yet)"
    assert f"{lacking} CANNOT RUN: " in forced.stdout and "dense_crf: native\n" in shown.stdout
    if importlib.util.find_spec("triton"):
        interpreted = python("-m", "segops", "info", SEGOPS_BACKEND="triton", TRITON_INTERPRET="1")
        assert f"{lacking}\n" in interpreted.stdout and "pyramid_atrous_conv2d: triton\n" in interpreted.stdout


# An editable installation would find this checkout's binaries for a copy.
IN_A_COPY = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import torch, segops
from segops.backend import build_info
assert segops.__file__.startswith(sys.argv[1])
print(build_info()["cpu"])
x = torch.randn(1, 64, 5, 5, requires_grad=True)
segops.pyramid_atrous_conv2d(x, torch.randn(64, 64, 3, 3)).sum().backward()
print("ran", torch.ops.segops.pac.default._schema)
"""


def in_a_copy(folder, *without, **environment):
    shutil.copytree(
        Path(segops.__file__).parent,
        folder / "segops",
        ignore=shutil.ignore_patterns("__pycache__", *without),
        dirs_exist_ok=True,
    )
    return python("-c", IN_A_COPY, str(folder), cwd=folder, PYTHONPATH=str(folder), TRITON_INTERPRET=None, **environment)


def test_without_binaries_everything_still_runs(tmp_path):
    """As after an installation without a compiler: the package without its .so files."""
    shown = in_a_copy(tmp_path, "*.so")
    assert shown.returncode == 0, shown.stderr
    assert "segops._C was not built" in shown.stdout and f"ran {torch.ops.segops.pac.default._schema}" in shown.stdout
    forced = in_a_copy(tmp_path, "*.so", SEGOPS_BACKEND="native")
    assert "backend 'native' cannot run" in forced.stderr and "was not built" in forced.stderr


def test_libraries_of_other_files_are_refused(tmp_path):
    """Before they are loaded, since what they define cannot be taken back."""
    assert "{'compiler'" in in_a_copy(tmp_path).stdout
    changed = tmp_path / "segops" / "ops" / "pac" / "op.py"
    text = changed.read_text(encoding="utf-8")
    assert text.count("int[] rates, str merge) -> Tensor") == 3
    changed.write_text(text.replace("int[] rates, str merge) -> Tensor", "int[] rates, str merge, bool more) -> Tensor"))
    shown = in_a_copy(tmp_path, "op.py")
    assert shown.returncode == 0, shown.stderr
    assert "segops/libsegops_cpu.so was built for other Python files than these, it has no op pac(" in shown.stdout
    assert "install segops again" in shown.stdout and "str merge, bool more) -> Tensor" in shown.stdout.splitlines()[-1]
    forced = in_a_copy(tmp_path, "op.py", SEGOPS_BACKEND="native")
    assert "backend 'native' cannot run" in forced.stderr and "built for other Python files" in forced.stderr


def test_why_a_library_does_not_load(tmp_path):
    """What the loader says, not that it did not load."""
    in_a_copy(tmp_path)
    (tmp_path / "segops" / "libsegops_cpu.so").write_bytes(
        b"no library\0" + b"\0".join(map(str.encode, library.schemas("cpu"))) + b"\0"
    )
    shown = in_a_copy(tmp_path, "libsegops_cpu.so")
    assert shown.returncode == 0, shown.stderr
    assert "segops._C does not load: " in shown.stdout and "invalid ELF header" in shown.stdout


def test_a_copy_of_the_library_may_be_loaded_already(tmp_path):
    """By a program that ran a package first."""
    copy = shutil.copy(library_path(), tmp_path)
    program = (
        f"import torch; torch.ops.load_library({str(copy)!r}); import segops; segops.backend('native');"
        "x = torch.randn(1, 8, 5, 5, requires_grad=True);"
        "segops.pyramid_atrous_conv2d(x, torch.randn(8, 8, 3, 3)).sum().backward(); print('ran')"
    )
    shown = python("-c", program)
    assert shown.stdout.strip() == "ran" and not shown.stderr, shown.stderr


def test_a_copy_that_is_loaded_already_must_be_of_these_files(tmp_path):
    copy = tmp_path / "libsegops_cpu.so"
    text = Path(library_path()).read_bytes()
    copy.write_bytes(text.replace(b"upsample_argmax(Tensor logits,", b"upsample_argmax(Tensor logitz,"))
    program = (
        f"import torch; torch.ops.load_library({str(copy)!r}); import segops; from segops.backend import build_info;"
        "print(build_info()['cpu'])"
    )
    assert "built for other Python files than these" in python("-c", program).stdout


def test_schemas_are_the_libraries_own():
    """Python's texts, by which it defines the ops where there is no library, say the same."""
    assert isinstance(build_info()["cpu"], dict)
    ours = [schema for schema in library.schemas("cpu") if not schema.startswith("test_")]
    assert len(ours) >= 10
    for schema in ours:
        name = schema.partition("(")[0]
        assert str(getattr(torch.ops.segops, name).default._schema) == f"segops::{torch._C.parse_schema(schema)}"


@pytest.mark.skipif(isinstance(build_info()["cuda"], str), reason="needs the CUDA library")
def test_the_cuda_library_has_the_ops_that_are_not_only_on_the_cpu():
    for schema in library.schemas("cpu"):
        name = schema.partition("(")[0]
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"segops::{name}", "CUDA")
        assert name.startswith("test_") or has_kernel == (schema in library.schemas("cuda")), name


def test_library_path():
    path = Path(library_path())
    assert path.is_file() and path == Path(library_path("cpu"))
    assert not [name for name in (b"libtorch_python", b"libpython", b"Py_IncRef", b"_Py_") if name in path.read_bytes()]
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'; got 'mps'"):
        library_path("mps")
    if isinstance(build_info()["cuda"], dict):
        assert Path(library_path("cuda")).is_file()
    else:
        with pytest.raises(RuntimeError, match=r"there is no library for 'cuda': (segops\._C_cuda|this torch)"):
            library_path("cuda")
