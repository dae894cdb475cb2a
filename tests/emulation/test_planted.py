"""What the emulation must catch: each kernel of planted.cu runs without its fault, and is caught with it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from ..targets import ON_LINUX
from . import FLAGS, FOLDER, ROOT, SANITIZE, Library, sanitizer_environment

pytestmark = ON_LINUX
SIZE = 256
NAMES = re.findall(r'm\.impl\("(\w+)"', (FOLDER / "planted.cu").read_text(encoding="utf-8"))
FAULTS = [name for name in NAMES if name != "sort"]
# Memory that belongs to nobody, which only a sanitizer sees.
SEEN_BY_ASAN = ["read_out_of_bounds", "write_out_of_bounds", "dynamic_out_of_bounds"]


SORT = "sort(Tensor keys, Tensor values, Tensor(a!) sorted_keys, Tensor(b!) sorted_values) -> ()"
SCHEMAS = [f"{name}(Tensor input, Tensor(a!) out, bool faulty) -> ()" for name in FAULTS]
PLANTED = Library("planted", [FOLDER / "planted.cu"], [SORT, *SCHEMAS])


def draw():
    return torch.randint(-8, 9, (SIZE,), generator=torch.Generator().manual_seed(0)).float()


def expected(name, x):
    index = torch.arange(SIZE)
    special = {
        "misaligned_load": x,
        "missing_barrier_in_order": x + torch.cat([x.new_zeros(1), x[:-1]]),
        "missing_barrier_before_reuse": 2 * x.sum().expand(SIZE),
        "copy_into_what_is_read": 2 * x.sum().expand(SIZE),
        "unwritten_shared_maximum": x.max().expand(SIZE),
        "sum_of_block": 2 * x.sum().expand(SIZE),
        "mask_of_others": x[index ^ 8],
        "shuffle_from_absent_lane": x[index ^ 8],
        "votes_in_different_places": (x > 0).view(-1, 32).sum(1).repeat_interleave(32).float(),
        "too_short_a_wait": x + x.flip(0),
    }
    reversed_ = ("index_out_of_bounds", "dynamic_out_of_bounds", "missing_barrier", "different_barriers", "missing_wait")
    if name in (*reversed_, "barrier_after_return", "mask_of_absent_lanes"):
        return 2 * x.flip(0)
    return special.get(name, 2 * x)


def run(name, faulty):
    x, out = draw(), torch.empty(SIZE)
    getattr(PLANTED, name)(x, out, faulty)
    assert torch.equal(out, expected(name, x))


@pytest.mark.parametrize("name", FAULTS)
def test_without_the_fault(name):
    run(name, faulty=False)


# What says so. Where nothing is said, NaN of shared memory or another wrong number is in the output.
DEPENDS = "output 0 has elements that are not written, or depend on the order of threads"
SAID = {
    "misaligned_load": "a misaligned address: .* needs a multiple of 16 bytes at planted.cu:.* thread [(]3, 0, 0[)] of block",
    "misaligned_copy": "an asynchronous copy of 16 bytes is misaligned",
    "index_out_of_bounds": "an index out of bounds: 256 of 'float",
    "different_barriers": r"threads meet different barriers: thread 0 waits at planted.cu:\d+, thread 255 waits at planted.cu:",
    "barrier_after_return": "threads meet different barriers: .* thread 7 has ended",
    "mask_of_absent_lanes": "whose lanes do not all come there with that mask",
    "mask_of_others": "a lane calls with a mask that does not name it",
    "shuffle_from_absent_lane": "a shuffle reads a lane that its mask does not name",
    "votes_in_different_places": "whose lanes do not all come there with that mask",
    "copies_at_the_end": "a thread ends without waiting for its copies",
    "zero_blocks": r"a launch of zero blocks: the grid is \(0, 1, 1\)",
    "too_many_threads": r"a block cannot be \(1025, 1, 1\)",
    "too_large_a_grid": r"the grid is too large: \(1, 65536, 1\)",
    "too_much_shared_memory": "too much shared memory: 102400 bytes, of 101376",
    "unwritten_output": DEPENDS,
    "missing_barrier_in_order": DEPENDS,
    "missing_barrier_before_reuse": DEPENDS,
    "order_of_blocks": DEPENDS,
    "unwritten_shared": DEPENDS,
    "unwritten_shared_maximum": DEPENDS,
    "missing_barrier": DEPENDS,
    "missing_wait": DEPENDS,
    "too_short_a_wait": DEPENDS,
    "copy_into_what_is_read": DEPENDS,
    "write_under_a_copy": DEPENDS,
}


@pytest.mark.skipif(SANITIZE, reason="the sanitizers end the process: see test_sanitizers")
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SEEN_BY_ASAN])
def test_with_the_fault(name):
    error = RuntimeError if SAID.get(name, DEPENDS) != DEPENDS else AssertionError
    with pytest.raises(error, match=SAID.get(name)):
        run(name, faulty=True)
    run(name, faulty=False)  # what was interrupted leaves nothing behind


def test_sort_is_stable():
    keys = torch.randint(-5, 6, (1000,), generator=torch.Generator().manual_seed(0)) * 2**40
    values, sorted_keys, sorted_values = torch.arange(1000, dtype=torch.int32), torch.empty_like(keys), torch.empty(1000).int()
    PLANTED.sort(keys, values, sorted_keys, sorted_values)
    exact, order = keys.sort(stable=True)
    assert torch.equal(sorted_keys, exact) and torch.equal(sorted_values, order.int())


@pytest.mark.thorough
@pytest.mark.skipif(SANITIZE, reason="is the process that this test starts")
@pytest.mark.parametrize("name", SEEN_BY_ASAN)
def test_sanitizers(name):
    try:
        environment = sanitizer_environment()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    program = f"from tests.emulation.test_planted import run; run({name!r}, faulty={{}})"
    healthy, faulty = (
        subprocess.run(
            [sys.executable, "-c", program.format(fault)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )
        for fault in (False, True)
    )  # fmt: skip
    assert healthy.returncode == 0, healthy.stderr
    assert faulty.returncode and "AddressSanitizer: heap-buffer-overflow" in faulty.stderr and "planted.cu" in faulty.stderr


@pytest.mark.thorough
@pytest.mark.skipif(SANITIZE, reason="nvcc does not run under AddressSanitizer")
def test_nvcc_compiles_what_only_planted_kernels_use(tmp_path):
    """Asynchronous copies, the sort: no kernel of an op has them yet."""
    from torch.utils.cpp_extension import CUDA_HOME, include_paths

    nvcc = CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin"))
    if not nvcc or not torch.version.cuda:
        pytest.skip("needs nvcc and a CUDA build of torch")
    flags = [flag for flag in FLAGS if flag.startswith(("-std", "-DTORCH"))] + ["-DUSE_CUDA", "-arch=sm_80"]
    command = [nvcc, *flags, *(f"-I{path}" for path in include_paths("cuda")), "-c", str(FOLDER / "planted.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "planted.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
