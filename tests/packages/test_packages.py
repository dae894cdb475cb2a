"""AOTInductor packages of models run where only PyTorch and the library of ops are loaded: in Python, and without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segops import library_path

from ..models.small import SMALL, perturbed
from ..targets import ON_LINUX

SIZE = 96, 128
FOLDER = Path(__file__).parent
IN_PYTHON = """
import sys
import torch
import torch._inductor.codecache  # which torch 2.10 does not find by itself
library, package, classes = sys.argv[1:]
torch.ops.load_library(library)
images = torch.arange(2 * 3 * 96 * 128).float().sin().mul(5).view(2, 3, 96, 128)
found = torch._inductor.aoti_load_package(package)(images)
found.contiguous().numpy().tofile(classes)
assert not [name for name in sys.modules if name.startswith("segops")]
"""


class Predict(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, images):
        return self.model.predict(images)


def images():
    return torch.arange(2 * 3 * 96 * 128).float().sin().mul(5).view(2, 3, *SIZE)


def package(name, path):
    """Writes the package of a model's `predict`; returns what it is to answer."""
    case = next(each for each in SMALL if each.name == name)
    model = Predict(perturbed(case.build()))
    with torch.no_grad():
        program = torch.export.export(model, (images(),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        return model(images())


def run(command, path, out):
    done = subprocess.run([*command, library_path(), path, out], capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.from_file(str(out), size=2 * SIZE[0] * SIZE[1], dtype=torch.int64).view(2, *SIZE)


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory):
    """A C++ program that links libtorch and nothing else."""
    torch_folder, program = Path(torch.__file__).parent, tmp_path_factory.mktemp("program") / "run_package"
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", FOLDER / "run_package.cpp", "-o", program,
        f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}",
        "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return [program]


@ON_LINUX
@pytest.mark.parametrize(
    "name", ["pacnet", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("segnet_basic", "jointseg"))]
)
def test_runs_without_segops(name, in_cpp, tmp_path):
    expected = package(name, tmp_path / "model.pt2")
    assert len(expected.unique()) > 1
    for command in ([sys.executable, "-I", "-c", IN_PYTHON], in_cpp):
        assert torch.equal(run(command, tmp_path / "model.pt2", tmp_path / "classes"), expected)
