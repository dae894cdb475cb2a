"""How everything here is measured: interleaved in one process, medians, on inputs whose results were checked first."""

import contextlib
import ctypes
import functools
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import segops
from segops.backend import requested

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SECONDS = {"cpu": 1.0, "cuda": 0.3}  # that a function is timed for; a GPU varies less
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices of `product_rate`
COPY_SIZE = {"cpu": 2**26, "cuda": 2**28}  # elements that `copy_rate` copies


@dataclass(frozen=True)
class Headline:
    """What benchmarks/gpu.sh times of an op; on a CPU, where it is rehearsed, something small."""

    cases: list
    few: tuple = (0,)  # of the cases, those that stand for the op where one takes long
    eager: str = "eager"  # the best baseline without torch.compile
    kinds: tuple = ("forward", "full")
    slow: bool = False  # cuDNN's autotuning takes seconds: such ops come last


@dataclass(frozen=True)
class Call:
    """What `python -m benchmarks overhead` times: an op on maps so small that only the call costs, and what PyTorch needs for the
    same, both functions of `draw()`'s tensors. Bars are times PyTorch's time, at most."""

    draw: Callable
    op: Callable
    plain: Callable
    bars: dict  # of "forward" without gradients, and of "full", forward and backward


def synchronise():
    """Waits for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def precision(tf32=False):
    """cudnn.benchmark on; TF32 off but for the rows that are about it."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def threads(count):
    """So many threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_backends(function):
    """{name: function} of the segops backends to time: the requested one (SEGOPS_BACKEND), else what
    "auto" picks and, on a GPU, Triton."""

    def on_triton(*tensors):
        with segops.backend("triton"):
            return function(*tensors)

    if DEVICE == "cuda" and requested() == "auto":
        return {"segops": function, "segops triton": on_triton}
    return {"segops": function}


def with_compile(eager):
    """{name: function} of a baseline, on a GPU also as torch.compile has it: a CPU calls the same ops, and compiles for half a minute."""
    baselines = {"eager": eager}
    if DEVICE == "cuda":
        baselines["compile"] = torch.compile(eager, dynamic=False)
    return baselines


def timed_call(function, tensors, kind):
    """The call to time: the "forward" pass alone, without autograd, or forward and backward."""
    if kind == "forward":

        def forward():
            with torch.no_grad():
                return function(*tensors)

        return forward

    with torch.no_grad():
        grad = torch.randn_like(function(*tensors))
    inputs = [t for t in tensors if t.requires_grad]
    return lambda: torch.autograd.grad(function(*tensors), inputs, grad)


def outputs_and_gradients(function, tensors, grad_dtype=torch.float32):
    """[the result, the gradient of each tensor that requires one] for a gradient drawn once and for all.

    It is rounded to `grad_dtype` first: the truth for half precision, in float64, starts from what half precision can hold.
    """
    result = function(*tensors)
    inputs = [t for t in tensors if t.requires_grad]
    if not inputs:
        return [result]
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(grad_dtype).to(result)
    return [result.detach(), *torch.autograd.grad(result, inputs, grad)]


def error_over_bound(values, plain, truth, tf32=False):
    """The largest relative error of `values` against float64 `truth`, over its bound: above 1 is wrong, NaN infinitely so.

    The bound is twice plain PyTorch's own error in float32 (1e-6 at least, and 1e-5 at most but for TF32), 1.5 times in half
    precision. Where plain PyTorch has none, as where values are only copied, any error at all is infinitely wrong.
    """
    worst = 0.0
    for value, plain_value, true_value in zip(values, plain, truth, strict=True):
        error, plain_error = relative_error(value, true_value), relative_error(plain_value, true_value)
        bound = min(1e-5, max(1e-6, 2 * plain_error)) if value.dtype == torch.float32 else 1.5 * plain_error
        bound = max(bound, 2 * plain_error) if tf32 else bound
        if error != 0:  # nothing is wrong with an exact result, whatever the bound
            ratio = error / bound if plain_error else float("inf")
            worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


def compare(functions, device, seconds=None, least_rounds=5):
    """Times the functions round after round, in an order drawn anew for each: all see the same machine, in every state that
    the others leave caches and allocator in. For `seconds` per function, by default SECONDS[device].

    Returns {name: {"median": ms, "p20": ms, "p80": ms}}. On a GPU times are those of device events.
    """
    seconds = seconds or SECONDS[device]
    timers = {name: CudaTimer(function) if device == "cuda" else _cpu_timer(function) for name, function in functions.items()}
    for timer in timers.values():
        for _ in range(3 if device == "cuda" else 1):
            timer()
    times, order = {name: [] for name in functions}, random.Random(0)
    end = time.perf_counter() + seconds * len(functions)
    while len(next(iter(times.values()))) < least_rounds or time.perf_counter() < end:
        for name in order.sample(list(functions), len(functions)):
            times[name].append(timers[name]())
    return {name: summary(values) for name, values in times.items()}


def summary(values):
    twenty = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": twenty[0], "p80": twenty[-1]}


def _cpu_timer(function):
    def time_once():
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    return time_once


class CudaTimer:
    """Times one call by device events, in milliseconds, without the cost of launching its kernels.

    The GPU sleeps while the kernels are queued behind the first event. How long that has to be is
    found out by doubling, and kept for the calls that follow.
    """

    LONGEST = 20_000_000  # clock cycles, 10 ms: no sleep suffices for a call that synchronises

    def __init__(self, function):
        self.function, self.cycles = function, 100_000

    def __call__(self):
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self.cycles)
            start.record()
            self.function()
            end.record()
            queued = not start.query()  # the GPU was still asleep when the last kernel was queued
            end.synchronize()
            if queued or self.cycles >= self.LONGEST:
                return start.elapsed_time(end)
            self.cycles *= 2


def launch_time(function, device, calls=20):
    """Median milliseconds until a call returns: on a GPU the cost of Python and of the launches."""
    time_once = _cpu_timer(function)

    times = []
    for _ in range(calls):
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time_once())
    return statistics.median(times)


def kernel_times(function, device, calls=5):
    """[{"name", "calls" (per call of the function), "us" (mean)}] of the kernels on a GPU, of PyTorch's
    ops on a CPU; the largest totals first."""
    function()
    synchronise()
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        for _ in range(calls):
            function()
        synchronise()
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    times = [
        (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event)
        for event in profile.key_averages()
        if event.device_type == kind
    ]
    times.sort(key=lambda pair: -pair[0])
    return [{"name": event.key, "calls": event.count / calls, "us": total / event.count} for total, event in times]


def peak_memory(function, device):
    """Most bytes that the call holds beyond what it found allocated."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def peak_resident(function):
    """Most bytes by which the call makes the process larger: also those that no tensor holds, which `peak_memory` does not see.
    Linux tells."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    function()
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier calls have freed serves this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS:")
    function()
    return resident("VmHWM:") - before


def kept_memory(function, tensors):
    """Bytes held from forward to backward: of the storages that autograd saves, each once, but for those of the arguments and of
    the result, which are there anyway."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        result = function(*tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for tensor in (*tensors, result):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def rows(kind, calls, times, baselines, floor, bars, device, kept=None, memory=None, allowed=None):
    """A row for each timed call: its times, floor and memory, and its ratios to each of the baselines.

    bars: {baseline: (least ratio of times, of peak memory, of `kept`)}, any of them None, the last may be left out; they hold for
    what "auto" picks.
    kept: {name: what `kept_memory` says}, in suites that compare it.
    memory: {name: peak memory}, by default what `peak_memory` says.
    allowed: most bytes that segops may take at its peak, in suites that have such a bound.
    """
    memory = memory or {name: peak_memory(call, device) for name, call in calls.items()}

    def beside(name, baseline):
        held = name.startswith("segops") and "triton" not in name
        bar, memory_bar, *kept_bar = bars.get(baseline, (None, None)) if held else (None, None)
        comparison = {
            "baseline": baseline,
            "ratio": times[baseline]["median"] / times[name]["median"],
            "bar": bar,
            "memory_ratio": memory[baseline] / memory[name],
            "memory_bar": memory_bar,
        }
        if kept:
            comparison["kept_ratio"] = kept[baseline] / kept[name] if kept[name] else float("inf")
            comparison["kept_bar"] = kept_bar[0] if kept_bar else None
        return comparison

    return [
        {
            "kind": kind,
            "name": name,
            **times[name],
            "floor": floor,
            "memory": memory[name],
            **({"kept": kept[name]} if kept else {}),
            **({"allowed": allowed} if allowed else {}),
            "against": [beside(name, baseline) for baseline in baselines],
        }
        for name in calls
    ]


# The machine's rates, each a ceiling: what it reaches at its best, the fast quintile, apart from what would leave caches cold.


@functools.cache
def product_rate(device, dtype, tf32=False):
    """Operations per second in a large matrix product, at the precision that is set; `tf32` keeps the two apart."""
    side = PRODUCT_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    pixels = a.t().reshape(1, side, side, 1).contiguous(memory_format=torch.channels_last)
    products = {"mm": lambda: a @ b, "conv2d 1x1": lambda: torch.nn.functional.conv2d(pixels, b[:, :, None, None])}
    return 2 * side**3 / min(time["p20"] for time in compare(products, device).values()) * 1e3


@functools.cache
def copy_rate(device):
    """Bytes per second, read and written, in a large copy."""
    source = torch.randn(COPY_SIZE[device], device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / compare({"copy": lambda: target.copy_(source)}, device)["copy"]["p20"] * 1e3


@functools.cache
def exponential_rate(device):
    """Exponentials per second of float32 that stay in cache."""
    source = torch.randn(2**22 if device == "cuda" else 2**16, device=device)
    target = torch.empty_like(source)
    return source.numel() / compare({"exp": lambda: torch.exp(source, out=target)}, device)["exp"]["p20"] * 1e3


def relative_error(value, truth):
    """||value - truth|| / ||truth|| in float64; NaN stays NaN."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def environment(device):
    """What a figure is worth nothing without: device, versions, commit."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _driver() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "segops": segops.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "triton": version_of("triton"),
        "commit": os.environ.get("SEGOPS_COMMIT") or _commit(),
    }


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver():
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _commit():
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")  # which runs write
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
