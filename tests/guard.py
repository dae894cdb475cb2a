"""Memory that tells who touches it."""

import contextlib
import ctypes
import functools

import torch

from .compiled import ROOT, shared_library


@functools.cache
def _library():
    library = ctypes.CDLL(str(shared_library("segops_guard", [ROOT / "tests" / "guard.cpp"], ROOT / "build" / "guard")))
    library.segops_guard_end.restype = library.segops_guard_holds.restype = ctypes.c_bool
    return library


def holds(tensor):
    """Whether the tensor's memory is guarded."""
    return _library().segops_guard_holds(ctypes.c_void_p(tensor.untyped_storage().data_ptr()))


@contextlib.contextmanager
def guarded(byte):
    """Tensors that are allocated, by whomever, are full of this byte at first; on a CPU between margins that nobody may change.

    0xff makes floating-point numbers NaN, and 0xc2 negative.
    """
    if torch.cuda.is_available():  # whose allocator hands out again what is given back
        for size in (*[400 << 10] * 64, *[8 << 20] * 16, 512 << 20):
            torch.full((size,), byte, dtype=torch.uint8, device="cuda")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    _library().segops_guard_begin(ctypes.c_ubyte(byte))
    try:
        yield
    finally:
        whole = _library().segops_guard_end()
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert whole, "something was written beyond a tensor"
