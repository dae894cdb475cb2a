"""Which implementation of an op runs: `segops.backend`, the environment's `SEGOPS_BACKEND`, and why
not.

native     C++ on the CPU (`segops._C`), CUDA on NVIDIA GPUs (`segops._C_cuda`)
triton     the Triton kernels: NVIDIA GPUs, or any machine under `TRITON_INTERPRET=1`
reference  plain PyTorch, on any device
auto       the first of these that can run
"""

import importlib
import importlib.util
import os

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
    and the alternatives; "auto" takes the first that can run. Where a kernel would gain nothing, as
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


def _load(module):
    """The binary, or why it is not here. Never raises: segops works without compiler or GPU."""
    if importlib.util.find_spec(f"segops.{module}") is None:
        return None, f"segops.{module} was not built at installation (pip install -v . says why)"
    try:
        return importlib.import_module(f"segops.{module}"), None
    except Exception as error:  # an undefined symbol, a missing libcudart: whatever it is, the other backends still run
        return None, f"segops.{module} does not load: {str(error).splitlines()[0]}"


_cpu, _cpu_reason = _load("_C")
# A CUDA binary cannot be loaded by a CPU-only torch.
_cuda, _cuda_reason = _load("_C_cuda") if torch.version.cuda else (None, "this torch is a build without CUDA")

# Triton reads the variable when a kernel is defined, so the environment's word at import is the one
# that counts.
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def build_info():
    """{"cpu": ..., "cuda": ...}: each binary's compiler, flags and architectures, or the reason why
    it is missing (a str)."""
    return {
        "cpu": _cpu.build_info() if _cpu else _cpu_reason,
        "cuda": _cuda.build_info() if _cuda else _cuda_reason,
    }


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


def _why_not_kernels(name, device_type, dtype):
    """A reason that C++, CUDA and Triton have in common, or None."""
    if dtype == torch.float64 and (device_type != "cpu" or name == "triton"):
        return f"float64 runs in C++ on the CPU and in the reference, not in {name} on {device_type}"
    if device_type not in ("cpu", "cuda") or (device_type == "cuda" and not torch.version.cuda):
        return f"segops has kernels for the CPU and NVIDIA GPUs, not for {device_type} here"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    return None


def _why_not_native(device_type, device_index, dtype):
    reason = _why_not_kernels("native", device_type, dtype)
    if reason is not None:
        return reason
    if device_type == "cpu":
        return _cpu_reason
    if _cuda is None:
        return _cuda_reason
    capability = torch.cuda.get_device_capability(device_index)
    built = _cuda.build_info()["architectures"]
    if not _runs_on(built, capability):
        return f"segops._C_cuda was built for {', '.join(built)}, and this GPU is {capability[0]}.{capability[1]}"
    return None


def _why_not_triton(device_type, device_index, dtype):
    reason = _why_not_kernels("triton", device_type, dtype)
    if reason is not None:
        return reason
    if not _HAS_TRITON:
        return "triton is not installed"
    if TRITON_INTERPRET:
        return None
    if device_type == "cpu":
        return "Triton does not run on cpu (set TRITON_INTERPRET=1 before the start to interpret its kernels)"
    major, minor = torch.cuda.get_device_capability(device_index)
    return None if major >= 8 else f"Triton needs a GPU of compute capability 8.0, and this one is {major}.{minor}"


# Every backend that can be asked for by name, and what tells why it cannot run.
REASONS = {"native": _why_not_native, "triton": _why_not_triton, "reference": lambda *_: None}

# A plain global: torch.compile guards on it, whereas it cannot trace a ContextVar and would not see
# the environment change.
_requested = _check(os.environ.get("SEGOPS_BACKEND") or "auto", "the environment variable SEGOPS_BACKEND")


def select(op, tensor):
    """The backend that `op` runs on for this tensor. Raises RuntimeError if the requested one
    cannot."""
    device, dtype = tensor.device, tensor.dtype
    if _requested == "auto":
        for name in ORDER:
            if why_not(name, device.type, device.index, dtype) is None:
                return name
    reason = why_not(_requested, device.type, device.index, dtype)
    if reason is not None:
        able = [name for name in ORDER if why_not(name, device.type, device.index, dtype) is None]
        raise RuntimeError(
            f"segops.{op}: backend {_requested!r} cannot run on {device.type} with {dtype}: {reason}. "
            f"Available here: {', '.join(map(repr, ['auto', *able]))} (segops.backend(...) or SEGOPS_BACKEND)."
        )
    return _requested
