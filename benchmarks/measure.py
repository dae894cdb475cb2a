"""How everything here is measured: interleaved in one process, medians, on inputs whose results were checked first."""

import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch

import segops

ROOT = Path(__file__).parent.parent


def compare(functions, device, seconds=1.0, least_rounds=5):
    """Times the functions round after round, in an order drawn anew for each: all see the same machine, in every state that
    the others leave caches and allocator in.

    Returns {name: {"median": ms, "p20": ms, "p80": ms}}. On a GPU times are those of device events.
    """
    time_once = _time_cuda if device == "cuda" else _time_cpu
    for function in functions.values():
        for _ in range(3 if device == "cuda" else 1):
            time_once(function)
    times, order = {name: [] for name in functions}, random.Random(0)
    end = time.perf_counter() + seconds * len(functions)
    while len(next(iter(times.values()))) < least_rounds or time.perf_counter() < end:
        for name in order.sample(list(functions), len(functions)):
            times[name].append(time_once(functions[name]))
    return {name: summary(values) for name, values in times.items()}


def summary(values):
    twenty = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": twenty[0], "p80": twenty[-1]}


def _time_cpu(function):
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _time_cuda(function):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)  # the kernels queue up behind it, so that launching them does not count
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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


def ceilings(device, dtype):
    """The machine's rates: {"flops": per second in a large matrix product, "bytes": per second in a large copy}.

    A ceiling is what the machine reaches at its best: the fast quintile, and products apart from the copy, which would leave
    them cold caches.
    """
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    pixels = a.t().reshape(1, side, side, 1).contiguous(memory_format=torch.channels_last)
    products = {"mm": lambda: a @ b, "conv2d 1x1": lambda: torch.nn.functional.conv2d(pixels, b[:, :, None, None])}
    product = min(time["p20"] for time in compare(products, device).values())
    copy = compare({"copy": lambda: target.copy_(source)}, device)["copy"]["p20"]
    return {"flops": 2 * side**3 / product * 1e3, "bytes": 2 * source.nbytes / copy * 1e3}


def relative_error(value, truth):
    """||value - truth|| / ||truth|| in float64; NaN stays NaN."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def environment(device):
    """What a figure is worth nothing without: device, versions, commit."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "segops": segops.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": _commit(),
    }


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
        return git("rev-parse", "--short", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
