"""Pyramid atrous convolution against plain PyTorch. Run through `python -m benchmarks`, or pytest --benchmark-only."""

import itertools
from dataclasses import dataclass

import pytest
import torch

import segops

from . import baselines, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RATES = (1, 3, 5, 7, 9)


@dataclass(frozen=True)
class Case:
    shape: tuple  # N, Cin, H, W
    channels: int
    rates: tuple = RATES
    merge: str = "sum"
    dtype: torch.dtype = torch.float32
    bars: tuple = ()  # (pass, least ratio to the best plain PyTorch)
    tf32: bool = False

    def __str__(self):
        n, c, h, w = self.shape
        rates = "" if self.rates == RATES else " rates " + ",".join(map(str, self.rates))
        merge = "" if self.merge == "sum" else f" {self.merge}"
        return f"{n}x{c}x{h}x{w} -> {self.channels}{rates}{merge} {'tf32' if self.tf32 else str(self.dtype).removeprefix('torch.')}"


CPU_CASES = [
    Case((2, 2048, 33, 33), 256, bars=(("forward", 4.2), ("full", 4.0))),
    Case((2, 2048, 33, 33), 256, dtype=torch.bfloat16, bars=(("forward", 8.0),)),
    Case((2, 256, 65, 65), 256, bars=(("forward", 2.8),)),
    Case((1, 64, 129, 129), 64, bars=(("forward", 1.6),)),
]
SWEEP = [
    Case((1, 3, 64, 64), 16),
    Case((1, 4, 64, 64), 4),
    Case((1, 8, 64, 64), 8),
    Case((1, 16, 33, 33), 16),
    Case((1, 16, 64, 64), 16),
    Case((1, 16, 256, 256), 16),
    Case((4, 32, 64, 64), 32),
    Case((1, 64, 17, 17), 64),
    Case((1, 64, 33, 33), 256),
    Case((1, 512, 9, 9), 64),
    Case((1, 512, 17, 17), 256),
    Case((1, 2048, 9, 9), 256),
    Case((8, 256, 33, 33), 64),
    Case((1, 256, 65, 65), 21),
    Case((2, 32, 200, 200), 8),
    Case((1, 8, 300, 300), 32),
    Case((1, 64, 65, 65), 64, rates=(2,)),
    Case((1, 64, 65, 65), 64, rates=(1, 2)),
    Case((1, 256, 33, 33), 256, rates=(6, 12, 18)),
    Case((1, 256, 33, 33), 64, merge="concat"),
]
CUDA_CASES = [
    Case((8, 2048, 33, 33), 256, dtype=torch.bfloat16, bars=(("forward", 4.0), ("full", 4.0))),
    Case((8, 2048, 33, 33), 256, dtype=torch.float16),
    Case((8, 2048, 33, 33), 256),
    Case((8, 2048, 33, 33), 256, tf32=True),
    Case((8, 2048, 65, 65), 256, dtype=torch.bfloat16),
    Case((2, 2048, 128, 256), 256, dtype=torch.bfloat16),
    Case((8, 256, 65, 65), 256, dtype=torch.bfloat16),
    Case((8, 64, 129, 129), 64, dtype=torch.bfloat16),
    Case((8, 2048, 33, 33), 256, rates=(6, 12, 18), dtype=torch.bfloat16),
    Case((8, 2048, 33, 33), 256, merge="concat", dtype=torch.bfloat16),
]
CASES = CUDA_CASES if DEVICE == "cuda" else [
    *CPU_CASES, *(Case(c.shape, c.channels, c.rates, c.merge, bars=(("forward", 0.95), ("full", 0.95))) for c in SWEEP)
]  # fmt: skip


def backends():
    """The segops backends to time: what "auto" picks and, on a GPU, Triton beside it."""
    names = ["auto", "triton"] if DEVICE == "cuda" else ["auto"]

    def call(name, case):
        def function(input, weight):
            with segops.backend(name):
                return segops.pyramid_atrous_conv2d(input, weight, rates=case.rates, merge=case.merge)

        return function

    return {f"segops {name}" if name != "auto" else "segops": lambda case, name=name: call(name, case) for name in names}


def arguments(case, memory_format, seed=0):
    """Random input and weight of a convolution's usual scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.channels, case.shape[1], 3, 3, generator=generator) / (9 * case.shape[1]) ** 0.5
    tensors = torch.randn(case.shape, generator=generator), weight
    return [t.to(DEVICE, case.dtype).contiguous(memory_format=memory_format).requires_grad_() for t in tensors]


def outputs_and_gradients(function, tensors):
    result = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(result.shape, generator=generator).to(result)
    return [result.detach(), *torch.autograd.grad(result, tensors, grad)]


def gate(case):
    """The largest relative error of output and gradients against float64, over its bound: above 1 is wrong.

    The bound is twice plain PyTorch's own error in float32 (1e-6 at least, 1e-5 at most), 1.5 times in half precision.
    Both formats are checked, on one image of the case, which float64 can afford.
    """
    small = Case((1, *case.shape[1:]), case.channels, case.rates, case.merge, case.dtype)
    tensors = arguments(small, torch.contiguous_format)
    precise = [t.detach().double().requires_grad_() for t in tensors]
    eager = baselines.pac(case.rates, case.merge, "cpu")["eager"]
    truth = outputs_and_gradients(eager, precise)
    plain_error = [measure.relative_error(a, b) for a, b in zip(outputs_and_gradients(eager, tensors), truth, strict=True)]
    worst = 0.0
    for make, memory_format in itertools.product(backends().values(), FORMATS.values()):
        values = outputs_and_gradients(make(case), arguments(small, memory_format))
        for value, reference_value, error in zip(values, truth, plain_error, strict=True):
            bound = min(1e-5, max(1e-6, 2 * error)) if case.dtype == torch.float32 else 1.5 * error
            bound = max(bound, 2 * error) if case.tf32 else bound
            ratio = measure.relative_error(value, reference_value) / bound
            worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


def floor(case, passes, rates):
    """Milliseconds that the products cost at the machine's measured rate; on a GPU also one write and one read of the planes,
    which a CPU keeps in cache."""
    n, c_in, h, w = case.shape
    flops = 2 * n * h * w * c_in * case.channels * 9
    planes = 2 * n * h * w * 9 * min(c_in, case.channels) * torch.empty((), dtype=case.dtype).element_size()
    return passes * (flops / rates["flops"] + (planes / rates["bytes"] if DEVICE == "cuda" else 0)) * 1e3


@pytest.fixture(scope="module")
def rates():
    """Measured rates by precision, each measured once."""
    known = {}

    def of(case):
        if (case.dtype, case.tf32) not in known:
            known[case.dtype, case.tf32] = measure.ceilings(DEVICE, case.dtype)
        return known[case.dtype, case.tf32]

    return of


@pytest.fixture(autouse=True)
def precision(request):
    """cudnn.benchmark on; TF32 off but for the rows that are about it."""
    tf32 = request.node.callspec.params["case"].tf32
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    yield
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pac(benchmark, case, rates):
    error = gate(case)
    assert error <= 1, f"wrong by {error:.2f} times the bound: no time is reported"

    rows = {}
    for kind, passes in (("forward", 1), ("full", 3)):
        torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
        calls = {}
        for format_name, memory_format in FORMATS.items():
            tensors = arguments(case, memory_format)
            functions = {**{n: make(case) for n, make in backends().items()}, **baselines.pac(case.rates, case.merge, DEVICE)}
            for name, function in functions.items():
                calls[f"{name} {format_name}"] = timed_call(function, tensors, kind)
        times = measure.compare(calls, DEVICE)
        plain = {name: t["median"] for name, t in times.items() if name.startswith(("eager", "compile"))}
        best = min(plain, key=plain.get)
        for name, call in calls.items():
            rows[f"{kind} {name}"] = {
                "kind": kind,
                "name": name,
                **times[name],
                "ratio": plain[best] / times[name]["median"],
                "baseline": best,
                "floor": floor(case, passes, rates(case)),
                "memory": measure.peak_memory(call, DEVICE),
                "bar": dict(case.bars).get(kind) if name.startswith("segops ") and "triton" not in name else None,
            }
    benchmark.extra_info.update(case=str(case), gate=error, rows=list(rows.values()), environment=measure.environment(DEVICE))
    benchmark.pedantic(timed_call(backends()["segops"](case), arguments(case, torch.contiguous_format), "forward"), rounds=3)


def timed_call(function, tensors, kind):
    """The call to time: the forward pass alone, without autograd, or forward and backward."""
    if kind == "forward":

        def forward():
            with torch.no_grad():
                return function(*tensors)

        return forward

    with torch.no_grad():
        grad = torch.randn_like(function(*tensors))
    return lambda: torch.autograd.grad(function(*tensors), tensors, grad)
