"""The house of CONTRIBUTING.md: an op is one name on every floor, and imports go one way."""

import ast
import graphlib
from pathlib import Path

import pytest

import segops
from benchmarks import suites
from segops.__main__ import ops
from segops.backend import implementation
from segops.ops.common import library

from . import OPS
from .contract import contract_of
from .targets import only_on_cpu

ROOT = Path(__file__).parent.parent
PACKAGES = {"segops": ROOT / "segops", "segops.models": ROOT / "models", "segops.benchmarks": ROOT / "benchmarks"}
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
}


def imported(module):
    """The names that a module imports, `package.name` of `from package import name`, wherever it
    does."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def dependencies(module):
    for name in imported(module):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            yield name


def test_all_floors_have_the_same_ops():
    assert OPS and OPS == suites.OPS
    assert OPS == sorted(path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name != "common")


def test_no_circle_of_imports():
    graph = {module: {name for name in dependencies(module) if name != module} for module in MODULES}
    assert sum(map(len, graph.values())) > len(MODULES)
    graphlib.TopologicalSorter(graph).prepare()  # which raises CycleError with the circle


@pytest.mark.parametrize("op", OPS)
def test_an_op_imports_no_other(op):
    own = [module for module in MODULES if module.startswith(f"segops.ops.{op}.")]
    foreign = {name for module in own for name in dependencies(module) if name not in own}
    assert foreign
    assert all(name == "segops.backend" or name.startswith("segops.ops.common") for name in foreign), foreign


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_name_on_every_floor(op):
    csrc, package = ROOT / "csrc" / op, ROOT / "segops" / "ops" / op
    assert all((csrc / f"{op}{end}").is_file() for end in (".h", ".cpp"))
    assert any(csrc.glob("*_cpu.cpp")) and (package / "reference.py").is_file()
    assert any(csrc.glob("*_cuda.cu")) == (package / "triton_kernels.py").is_file() == (not only_on_cpu(op))
    assert (ROOT / "tests" / op / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    assert contract_of(op).USES


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_only_on_the_cpu_in_all_its_parts(op):
    """What is declared of the ops, and of the public functions that call them."""
    declared = {each.only_on_cpu for each in library._DECLARED if each.module.startswith(f"segops.ops.{op}.")}
    functions = [name for name in ops() if getattr(segops, name).__module__.startswith(f"segops.ops.{op}.")]
    runs = {implementation(name, chosen, "cuda") for name in functions for chosen in ("native", "triton")}
    assert declared == {only_on_cpu(op)} and runs == ({"reference"} if only_on_cpu(op) else {"native", "triton"})
    assert {implementation(name, "native", "cpu") for name in functions} == {"native"}


def test_models_use_public_names():
    names = {name for module in MODULES if module.startswith("segops.models.") for name in imported(module)}
    ours = {name for name in names if name.startswith("segops.") and not name.startswith("segops.models")}
    modules = {name for name, value in vars(segops.nn).items() if getattr(value, "__module__", "") == "segops.nn"}
    public = {f"segops.{name}" for name in segops.__all__} | {f"segops.nn.{name}" for name in modules}
    assert ours and ours <= public, ours - public
    assert not [path for path in (ROOT / "models").glob("*.py") if "segops.ops" in path.read_text(encoding="utf-8")]
