"""Builds the libraries of kernels and ops where that is possible, and installs segops in any case.

segops/libsegops_cpu.so and libsegops_cuda.so need no Python; segops._C and segops._C_cuda tell
Python how they were built.

SEGOPS_BUILD_CUDA=0 leaves CUDA out, =1 makes its absence an error; by default it is built where
torch is a CUDA build and nvcc is found. TORCH_CUDA_ARCH_LIST picks the architectures, by default
those of the GPUs in sight, or a list for all.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

# Both target the stable ABI of torch 2.10: one binary serves every later release, so a build in
# isolation does too.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# psabi: GCC notes that passing wide vectors changed in 4.6; ours are passed between inlined
# functions only.
# visibility: both libraries have functions of the same names.
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-Wno-psabi", "-fvisibility=hidden", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA"]
FORCED = "segops: SEGOPS_BUILD_CUDA=1, but the CUDA extension cannot be built: {}"


def point_to_toolkit():
    """Sets CUDA_HOME to the toolkit that nvcc itself reports: torch guesses from nvcc's path, which
    may be a wrapper's."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    if top:
        os.environ["CUDA_HOME"] = str(Path(top.group(1)).resolve())


def cuda_architectures():
    """The value for TORCH_CUDA_ARCH_LIST: the user's, the visible GPUs', or every architecture that
    nvcc knows of ours."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    ours = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return ";".join(ours) + "+PTX"


def built_architectures():
    """What torch makes of TORCH_CUDA_ARCH_LIST, as "9.0" for machine code and "9.0+PTX" for code
    the driver can compile."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    flags = " ".join(_get_cuda_arch_flags())
    found = re.findall(r"code=(sm|compute)_(\d+)(\d)([af]?)", flags)
    return " ".join(f"{major}.{minor}{suffix}{'+PTX' if kind == 'compute' else ''}" for kind, major, minor, suffix in found)


def definitions(compiler, flags, **others):
    values = {"SEGOPS_COMPILER": compiler, "SEGOPS_FLAGS": " ".join(flags), **others}
    return [(name, f'"{value}"') for name, value in values.items()]


def version_line(command):
    """A compiler's own one-line description: its last line that names a release, else its first."""
    try:
        lines = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return str(command)
    return next((line for line in lines if "release" in line), lines[0])


def sources(suffix):
    """The files of all kernels for a device, and of the ops that have some."""
    kernels = list(Path("csrc").glob(f"*/*{suffix}"))
    ops = {path.with_name(f"{path.parent.name}.cpp") for path in kernels}
    return sorted(path.as_posix() for path in (*ops, *kernels))


def without_python(extension):
    extension.libraries.remove("torch_python")
    return extension


def module(name, compiler, flags, **others):
    """segops.NAME, which Python imports: it has `build_info` alone."""
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"segops.{name}",
        [f"csrc/bind{name[2:] or '_cpu'}.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=definitions(compiler, flags, **others),
        extra_compile_args={"cxx": CXX_FLAGS},
    )


def cpu_extensions():
    from torch.utils.cpp_extension import CppExtension

    library = CppExtension("segops.libsegops_cpu", sources("_cpu.cpp"), extra_compile_args={"cxx": CXX_FLAGS})
    return without_python(library), module("_C", version_line(os.environ.get("CXX", "c++")), CXX_FLAGS)


def cuda_extensions():
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is a build without CUDA")
    if CUDA_HOME is None or not shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")):
        raise RuntimeError("nvcc was not found (CUDA_HOME or PATH)")
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures()
    nvcc = version_line(os.path.join(CUDA_HOME, "bin", "nvcc"))
    library = CUDAExtension(
        "segops.libsegops_cuda",
        sources("_cuda.cu"),
        extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
    )
    return without_python(library), module("_C_cuda", nvcc, NVCC_FLAGS, SEGOPS_ARCHITECTURES=built_architectures())


def extensions():
    """The extensions that can be tried here; says why where one cannot."""
    wanted = os.environ.get("SEGOPS_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"segops: SEGOPS_BUILD_CUDA must be 0 or 1; got {wanted!r}")
    found = []
    for make, forced, skipped in ((cpu_extensions, False, False), (cuda_extensions, wanted == "1", wanted == "0")):
        if skipped:
            print(f"segops: {make.__name__} left out: SEGOPS_BUILD_CUDA=0")
            continue
        try:
            found += make()
        except Exception as error:
            if forced:
                raise SystemExit(FORCED.format(error)) from error
            print(f"segops: no {make.__name__}: {error}")
    return found


def build_command():
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        print(f"segops: no extensions: {error}")
        return {}

    class Build(BuildExtension):
        """Builds each library and its module; one that fails is left out with the reason, unless it
        was forced."""

        def get_ext_filename(self, name):
            if "libsegops" in name:
                return f"{name.replace('.', os.sep)}.so"
            return super().get_ext_filename(name)

        def build_extensions(self):
            wanted, built, folder = self.extensions, [], self.build_temp
            for library, module in zip(wanted[::2], wanted[1::2], strict=True):
                try:
                    for extension in (library, module):
                        extension.optional = False  # or setuptools would swallow the reason
                        self.extensions, self.build_temp = [extension], os.path.join(folder, extension.name)
                        super().build_extensions()
                    built += [library, module]
                except (Exception, SystemExit) as error:
                    reason = (str(error).strip() or repr(error)).splitlines()[0]
                    if module.name == "segops._C_cuda" and os.environ.get("SEGOPS_BUILD_CUDA") == "1":
                        raise SystemExit(FORCED.format(reason)) from error
                    print(f"segops: {module.name} was not built, the next backend takes its place: {reason}")
            self.extensions, self.build_temp = built, folder

    return {"build_ext": Build}


point_to_toolkit()
setup(
    # Every folder that has Python files.
    packages=[
        *sorted({".".join(path.parent.parts) for path in Path("segops").rglob("*.py")}),
        "segops.models",
        "segops.benchmarks",
    ],
    package_dir={"segops.models": "models", "segops.benchmarks": "benchmarks"},
    package_data={"segops.configs": ["*.yaml", "ablations/*.yaml"]},
    ext_modules=extensions(),
    cmdclass=build_command(),
)
