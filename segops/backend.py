"""Which implementation of an op runs: `segops.backend`, the environment's `SEGOPS_BACKEND`, and why
not.

native     C++ on the CPU, CUDA on NVIDIA GPUs: a library of each, which runs without Python too
triton     the Triton kernels: GPUs of NVIDIA, AMD (ROCm) and Intel (XPU), or any machine under
           `TRITON_INTERPRET=1`
reference  plain PyTorch, on any device
auto       the first of these that can run and has been tried: nobody has tried Triton on GPUs of
           AMD and Intel, where it may fail, and the reference does not
"""

import importlib
import importlib.util
import os
from pathlib import Path

import torch

ORDER = ("native", "triton", "reference")


def _check(name, source):
    if name not in ("auto", *REASONS):
        raise ValueError(f"{source} must be one of {', '.join(map(repr, ('auto', *ORDER)))}; got {name!r}")
    return name


class backend:
    """Choose the implementation that segops ops run on, for good or for a `with` block.

        segops.backend("reference")             # from here on
        with segops.backend("triton"): ...      # here only, then back to what it was

    Args:
        name: "auto" (default at start, or the environment's SEGOPS_BACKEND), "native", "triton" or
            "reference".

    A forced backend that cannot run where it is needed raises a RuntimeError that names the reason
    and the alternatives; "auto" takes the first that can run, but "triton" on GPUs of AMD and Intel
    only if it is asked for: it has never been tried there. Where a kernel would gain nothing, as
    an op's documentation says, PyTorch's own ops run under any name. The choice holds for the whole
    process, all threads. A backward pass runs on the backend that its forward pass used.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name):
        global _requested
        self._previous = _requested
        _requested = _check(name, "backend")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        global _requested
        _requested = self._previous


def requested():
    """The name last asked for: "auto" unless `segops.backend` or SEGOPS_BACKEND said otherwise."""
    return _requested


# By type of device: the module that says how the library was built, and why it is not here.
_MODULES = {}
_MISSING = {}


def load_library(device, schemas):
    """Loads the ops of a type of device. Never raises: segops works without compiler or GPU."""
    name = {"cpu": "_C", "cuda": "_C_cuda"}[device]
    try:
        _MODULES[device] = _load(device, name, schemas)
    except Exception as error:  # an undefined symbol, a missing libcudart: whatever it is, the other backends still run
        _MISSING[device] = str(error).splitlines()[0]


def _load(device, name, schemas):
    path = _path(device)
    if name == "_C_cuda" and not torch.version.cuda:  # which could not load it
        raise ImportError("this torch is a build without CUDA")
    if importlib.util.find_spec(f"segops.{name}") is None:
        raise ImportError(f"segops.{name} was not built at installation (pip install -v . says why)")
    if not path.exists():
        raise ImportError(f"segops.{name} has lost its library, segops/{path.name}: install segops again")
    text = path.read_bytes()
    for schema in schemas:
        if schema.encode() + b"\0" not in text or not _agrees(schema):
            raise ImportError(
                f"segops/{path.name} was built for other Python files than these, it has no op {schema}: install segops again"
            )
    try:
        if not _is_loaded(device, schemas):
            torch.ops.load_library(path)
        return importlib.import_module(f"segops.{name}")
    except Exception as error:
        raise ImportError(f"segops.{name} does not load: {error.__cause__ or error}") from error


def _agrees(schema):
    """Whether an op of this name, if it is defined already, has this schema."""
    op = getattr(torch.ops.segops, schema.partition("(")[0], None)
    return op is None or str(op.default._schema) == f"segops::{torch._C.parse_schema(schema)}"


def _is_loaded(device, schemas):
    """Whether somebody has loaded a copy before, which cannot be done again."""
    name = schemas[0].partition("(")[0]
    defined = hasattr(torch.ops.segops, name)
    return defined and torch._C._dispatch_has_kernel_for_dispatch_key(f"segops::{name}", device.upper())


def _path(device):
    return Path(__file__).with_name(f"libsegops_{device}.so")


def library_path(device="cpu"):
    """Where the library of native ops lies, to be loaded where Python or segops is not.

        torch.ops.load_library(path)        # in a process that imports torch alone
        dlopen(path, RTLD_NOW);             // in a C++ program that links libtorch

    It runs what `torch.export` and AOTInductor made of models that use segops. The library of
    "cuda" implements the ops that "cpu" defines: it is loaded after it.

    Args:
        device: "cpu" (default) or "cuda".

    Returns:
        The path, a str.

    Raises:
        ValueError: another device.
        RuntimeError: it was not built here, or does not load.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {device!r}")
    if device in _MISSING:
        raise RuntimeError(f"there is no library for {device!r}: {_MISSING[device]}")
    return str(_path(device))


# Triton reads the variable when a kernel is defined, so the environment's word at import is the one
# that counts.
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def build_info():
    """{"cpu": ..., "cuda": ...}: each binary's compiler, flags and architectures, or the reason why
    it is missing (a str)."""
    return {device: _MODULES[device].build_info() if device in _MODULES else _MISSING[device] for device in ("cpu", "cuda")}


def _runs_on(architectures, capability):
    """Whether code built for `architectures` ("9.0", or "9.0+PTX") runs on a GPU of this (major,
    minor) capability."""
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if ptx and (major, minor) <= capability:
            return True
        if major == capability[0] and minor <= capability[1]:
            return True
    return False


@torch.compiler.assume_constant_result
def why_not(name, device_type, device_index, dtype):
    """Why backend `name` cannot run on this device and dtype, or None if it can."""
    return REASONS[name](device_type, device_index, dtype)


def _why_not_native(device_type, device_index, dtype):
    if dtype == torch.float64 and device_type != "cpu":
        return _without_float64("native", device_type)
    if device_type not in ("cpu", "cuda") or (device_type == "cuda" and not torch.version.cuda):
        return f"segops has native kernels for the CPU and NVIDIA GPUs, not for {device_type} here"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    if device_type == "cpu" or "cuda" in _MISSING:
        return _MISSING.get(device_type)
    capability = torch.cuda.get_device_capability(device_index)
    built = build_info()["cuda"]["architectures"]
    if not _runs_on(built, capability):
        return f"segops._C_cuda was built for {', '.join(built)}, and this GPU is {capability[0]}.{capability[1]}"
    return None


def _why_not_triton(device_type, device_index, dtype):
    if dtype == torch.float64:
        return _without_float64("triton", device_type)
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"Triton has kernels for GPUs of NVIDIA, AMD and Intel, not for {device_type}"
    if device_type != "cpu" and not torch.get_device_module(device_type).is_available():
        return f"no {device_type.upper()} device is visible"
    if not _HAS_TRITON:
        return "triton is not installed"
    if TRITON_INTERPRET:
        return None
    if device_type == "cpu":
        return "Triton does not run on cpu (set TRITON_INTERPRET=1 before the start to interpret its kernels)"
    if device_type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device_index)
        if major < 8:
            return f"Triton needs a GPU of compute capability 8.0, and this one is {major}.{minor}"
    if not _has_triton_driver():
        return f"this build of Triton has no driver for {device_type} here"
    return None


def _without_float64(name, device_type):
    return f"float64 runs in C++ on the CPU and in the reference, not in {name} on {device_type}"


def _has_triton_driver():
    from triton.backends import backends  # takes a second

    return any(each.driver.is_active() for each in backends.values())


# Every backend that can be asked for by name, and what tells why it cannot run.
REASONS = {"native": _why_not_native, "triton": _why_not_triton, "reference": lambda *_: None}

# A plain global: torch.compile guards on it, whereas it cannot trace a ContextVar and would not see
# the environment change.
_requested = _check(os.environ.get("SEGOPS_BACKEND") or "auto", "the environment variable SEGOPS_BACKEND")


def untried(name, device_type):
    """Whether nobody has tried this backend on GPUs of this type: then "auto" leaves it out."""
    return name == "triton" and (device_type == "xpu" or (device_type == "cuda" and torch.version.hip is not None))


@torch.compiler.assume_constant_result
def automatic(device_type, device_index, dtype):
    """The backend that "auto" stands for."""
    tried = (name for name in ORDER if not untried(name, device_type))
    return next(name for name in tried if why_not(name, device_type, device_index, dtype) is None)


_ONLY_ON_CPU = set()


def only_on_cpu(*ops):
    """Declares public functions whose only kernels are native ones on the CPU: elsewhere their
    reference runs, under any name that can run at all."""
    _ONLY_ON_CPU.update(ops)


def implementation(op, chosen, device_type):
    """What runs of an op on the backend that was chosen."""
    has_kernels = op not in _ONLY_ON_CPU or (chosen == "native" and device_type == "cpu")
    return chosen if has_kernels else "reference"


_SELECTED = {}  # what can run stays the same for as long as the process lives


def select(op, tensor):
    """The backend that `op` runs on for this tensor. Raises RuntimeError if the requested one
    cannot."""
    if torch.compiler.is_compiling():
        return _select(op, tensor.device, tensor.dtype)
    question = _requested, op, tensor.device, tensor.dtype
    if question not in _SELECTED:
        _SELECTED[question] = _select(*question[1:])
    return _SELECTED[question]


def _select(op, device, dtype):
    return implementation(op, _choose(op, device, dtype), device.type)


def _choose(op, device, dtype):
    if _requested == "auto":
        return automatic(device.type, device.index, dtype)
    reason = why_not(_requested, device.type, device.index, dtype)
    if reason is not None:
        able = [name for name in ORDER if why_not(name, device.type, device.index, dtype) is None]
        raise RuntimeError(
            f"segops.{op}: backend {_requested!r} cannot run on {device.type} with {dtype}: {reason}. "
            f"Available here: {', '.join(map(repr, ['auto', *able]))} (segops.backend(...) or SEGOPS_BACKEND)."
        )
    return _requested
