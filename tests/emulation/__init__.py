"""The CUDA kernels on a CPU, as the backend "emulated": the ops with their .cu files, compiled as they are by the host's compiler.

`cuda_on_cpu.h` says what stands for CUDA, `scheduler.cpp` how a launch runs. The environment's SEGOPS_SANITIZE=1 builds for
AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python: see `make sanitize`.
"""

import ctypes
import functools
import os
import subprocess
import threading
from pathlib import Path

import torch
from torch import library as torch_library
from torch.utils._pytree import tree_leaves

from segops.backend import REASONS
from segops.ops.common import library

from ..compiled import ROOT, shared_library

FOLDER = Path(__file__).parent
SANITIZE = os.environ.get("SEGOPS_SANITIZE") == "1"
# Without the sanitizers' library, wrong addresses and indices call functions of scheduler.cpp.
CHECKS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"] if SANITIZE else ["-fsanitize=alignment,bounds"]
FLAGS = ["-O1", "-std=c++17", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DSEGOPS_EMULATION", *CHECKS]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(["-DSEGOPS_SANITIZE"] if SANITIZE else [])]
NAMESPACE = "segops_emulated"  # of the C++ code; what tests call runs it twice
LIBRARY = torch_library.Library(NAMESPACE, "FRAGMENT")
ONE_AT_A_TIME = threading.Lock()
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sanitizer_environment():
    """What a process needs for SEGOPS_SANITIZE=1: the sanitizers' libraries loaded first. PyTorch leaks by design.

    Raises:
        FileNotFoundError: the compiler comes without them.
    """
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")  # the last, or the first would not find what it wraps
    ]
    missing = [name for name in libraries if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(f"{compiler} must come with the sanitizers of GCC; it has no {', '.join(missing)}")
    return os.environ | {
        "SEGOPS_SANITIZE": "1",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


class Library:
    """The ops of C++ files, by name, each run twice: forwards and in reverse. Both must give the same bits.

    What they allocate or write is poisoned before, with something else each time, so that an element that is left out differs.
    `launches()` counts the kernels that were launched so far: two for each one that a GPU would launch.
    """

    def __init__(self, name, sources, schemas):
        self.name, self.sources = name, sources
        self.schemas = {schema.partition("(")[0]: schema for schema in schemas}
        self.failure = None

    def build(self):
        folder = ROOT / "build" / ("sanitized" if SANITIZE else "emulation") / self.name
        folder.mkdir(parents=True, exist_ok=True)
        files = [FOLDER / "scheduler.cpp"]
        for source in self.sources:
            if source.suffix == ".cpp":
                files.append(source)
                continue
            files.append(folder / f"{source.stem}.cpp")  # a .cu would go to nvcc
            text = f'#include "{source}"\n'
            if not files[-1].exists() or files[-1].read_text(encoding="utf-8") != text:
                files[-1].write_text(text, encoding="utf-8")
        library = shared_library(
            f"segops_{self.name}",
            files,
            folder,
            extra_cflags=FLAGS,
            extra_include_paths=[str(FOLDER)],
            extra_ldflags=CHECKS if SANITIZE else None,
        )
        compiled = ctypes.CDLL(str(library))
        self.launches = compiled.segops_emulation_launches
        for op, schema in self.schemas.items():
            LIBRARY.define(schema)
            setattr(self, op, functools.partial(run_twice, getattr(getattr(torch.ops, NAMESPACE), op), compiled))

    def __getattr__(self, name):
        if name not in self.schemas and name != "launches":
            raise AttributeError(name)
        if self.failure is None:
            try:
                self.build()
            except Exception as error:
                self.failure = error  # the next test need not wait for it
        if self.failure is not None:
            raise self.failure
        return getattr(self, name)


def run_twice(op, compiled, *arguments):
    schema = op.default._schema.arguments
    written = [
        value
        for value, declared in zip(arguments, schema, strict=True)
        if declared.alias_info is not None and declared.alias_info.is_write and value is not None
    ]
    results = []
    with ONE_AT_A_TIME:
        for reversed, number, integer in ((False, torch.nan, -77), (True, -77.0, 123456789)):
            for each in written:
                each.fill_(number if each.is_floating_point() else integer)
            compiled.segops_emulation_reverse(ctypes.c_bool(reversed))
            returned = op(*arguments)
            found = written if returned is None else tree_leaves(returned)
            results.append([each.contiguous().view(INTEGERS[each.element_size()]).clone() for each in found])
    for number, (value, again) in enumerate(zip(*results, strict=True)):
        if not torch.equal(value, again):
            raise AssertionError(f"{op}: output {number} has elements that are not written, or depend on the order of threads")
    return returned


def why_not(device_type, device_index, dtype):
    if device_type != "cpu" or dtype == torch.float64:
        return f"CUDA kernels are emulated on the CPU, in float32, bfloat16 and float16, not on {device_type} in {dtype}"
    return None


def register():
    """Makes segops know the backend, and returns its ops. They are built when one is first used."""
    kernels = list((ROOT / "csrc").glob("*/*_cuda.cu"))
    sources = sorted({*kernels, *(path.with_name(f"{path.parent.name}.cpp") for path in kernels)})
    ops = Library("emulated", sources, library.schemas("cuda"))
    library.implement("emulated", "segops_emulated_twice", lambda name, _: lambda *arguments: getattr(ops, name)(*arguments))
    REASONS["emulated"] = why_not
    return ops
