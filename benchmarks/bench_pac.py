"""Pyramid atrous convolution against plain PyTorch. Run through `python -m benchmarks`, or pytest --benchmark-only."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

import segops

from . import baselines, measure
from .measure import DEVICE, FORMATS

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

# What benchmarks/gpu.sh times; on a CPU, where it is rehearsed, the smallest case.
HEADLINE = [CUDA_CASES[0], CUDA_CASES[7]] if DEVICE == "cuda" else [Case((1, 16, 9, 9), 8)]


def implementations(case):
    """{name: function} of the segops backends to time."""
    return measure.on_backends(
        lambda input, weight: segops.pyramid_atrous_conv2d(input, weight, rates=case.rates, merge=case.merge)
    )


def arguments(case, memory_format, seed=0):
    """Random input and weight of a convolution's usual scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.channels, case.shape[1], 3, 3, generator=generator) / (9 * case.shape[1]) ** 0.5
    tensors = torch.randn(case.shape, generator=generator), weight
    return [t.to(DEVICE, case.dtype).contiguous(memory_format=memory_format).requires_grad_() for t in tensors]


def gate(case):
    """The largest relative error of output and gradients over its bound (`measure.error_over_bound`): above 1 is wrong.

    Both formats are checked, on one image of the case, which float64 can afford.
    """
    small = replace(case, shape=(1, *case.shape[1:]))
    tensors = arguments(small, torch.contiguous_format)
    precise = [t.detach().double().requires_grad_() for t in tensors]
    eager = baselines.pac(case.rates, case.merge, "cpu")["eager"]
    truth, plain = (measure.outputs_and_gradients(eager, t) for t in (precise, tensors))
    return max(
        measure.error_over_bound(
            measure.outputs_and_gradients(function, arguments(small, memory_format)), plain, truth, case.tf32
        )
        for function, memory_format in itertools.product(implementations(case).values(), FORMATS.values())
    )


def functions(case):
    """{name: function} of segops and its baselines."""
    return {**implementations(case), **baselines.pac(case.rates, case.merge, DEVICE)}


def calls(case, kind, functions):
    """{name and memory format: the call to time}."""
    timed = {}
    for format_name, memory_format in FORMATS.items():
        tensors = arguments(case, memory_format)
        timed |= {f"{name} {format_name}": measure.timed_call(f, tensors, kind) for name, f in functions.items()}
    return timed


def floor(case, kind):
    """Milliseconds that the products cost at the machine's measured rate; on a GPU also one write and one read of the planes,
    which a CPU keeps in cache."""
    n, c_in, h, w = case.shape
    flops = 2 * n * h * w * c_in * case.channels * 9
    milliseconds = flops / measure.product_rate(DEVICE, case.dtype, case.tf32) * 1e3
    if DEVICE == "cuda":
        planes = 2 * n * h * w * 9 * min(c_in, case.channels) * torch.empty((), dtype=case.dtype).element_size()
        milliseconds += planes / measure.copy_rate(DEVICE) * 1e3
    return (1 if kind == "forward" else 3) * milliseconds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pac(benchmark, case):
    error = gate(case)
    assert error <= 1, f"wrong by {error:.2f} times the bound: no time is reported"

    rows = []
    for kind in ("forward", "full"):
        torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
        timed = calls(case, kind, functions(case))
        times = measure.compare(timed, DEVICE)
        best = min((name for name in timed if name.startswith(("eager", "compile"))), key=lambda name: times[name]["median"])
        bars = {best: (dict(case.bars).get(kind), None)}
        rows += measure.rows(kind, timed, times, [best], floor(case, kind), bars, DEVICE)
    benchmark.extra_info.update(op="pac", case=str(case), gate=error, rows=rows, environment=measure.environment(DEVICE))
    benchmark.pedantic(timed["segops contiguous"], rounds=3)
