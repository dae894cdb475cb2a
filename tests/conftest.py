import os

# Small tensors gain nothing from a second thread, and beside another busy process wait for it most of the time.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU the Triton kernels run under Triton's interpreter. It is chosen when kernels are defined: before any import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import segops

from .targets import ON_CPU, REFERENCE, TARGETS, only_on_cpu

# Bounds are those of float32, which TF32 products miss by far.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def fill_what_is_handed_out():
    """What torch.empty returns is NaN, or the greatest int: an element that a kernel leaves out is a wrong number.

    PyTorch does so together with deterministic algorithms, which on a GPU are not the ones that users run.
    """
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)


fill_what_is_handed_out()  # for fixtures that live longer than a test


@pytest.fixture(autouse=True)
def fresh_start():
    """Every test starts on "auto" and with the same random numbers, whatever the environment or the tests before asked for."""
    torch.manual_seed(0)
    torch.compiler.reset()  # or compilations of one function in many tests add up to the recompilation limit
    fill_what_is_handed_out()
    with segops.backend("auto"):
        yield


def runs_a_reference_once_more(item):
    """Whether it is about kernels, or a target, that an op which is only on the CPU does not have."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    target = parameters.get("target", parameters.get("implementation"))
    lacks = item.get_closest_marker("triton") or (target is not None and target not in ON_CPU)
    return lacks and only_on_cpu(item.path.parent.name)


def pytest_collection_modifyitems(config, items):
    runs, deselected = [], []
    for item in items:
        (deselected if runs_a_reference_once_more(item) else runs).append(item)
    if deselected:
        items[:] = runs
        config.hook.pytest_deselected(items=deselected)
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=TARGETS)
def target(request):
    """(device, backend), with the backend forced for the test."""
    device, backend = request.param
    with segops.backend(backend):
        yield device, backend


@pytest.fixture(params=[*TARGETS, REFERENCE])
def implementation(request):
    """As `target`, and the reference: what the public functions promise holds there too."""
    device, backend = request.param
    with segops.backend(backend):
        yield device, backend
