"""Pyramid atrous convolution against plain PyTorch. Run through `python -m benchmarks`, or pytest --benchmark-only."""

import functools
import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import segops
from segops.backend import select
from segops.ops.pac import op, reference

from . import measure, trials
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

HEADLINE = measure.Headline([CUDA_CASES[0], CUDA_CASES[7]] if DEVICE == "cuda" else [Case((1, 16, 9, 9), 8)], slow=True)


def run_kernels(input, weight, bias, rates, merge):
    """As the public function, but for the convolutions that it leaves maps of few channels to."""
    backend = select("pyramid_atrous_conv2d", input)
    if backend == "reference":
        return reference.pyramid_atrous_conv2d(input, weight, bias, rates, merge)
    return op.pac(input, weight, bias, rates, merge, backend=backend)


def implementations(case):
    """{name: function} of the segops backends to time; where a GPU has PyTorch's convolutions run, for which the bound is an
    estimate, also of the kernels."""
    found = measure.on_backends(
        lambda input, weight: segops.pyramid_atrous_conv2d(input, weight, rates=case.rates, merge=case.merge)
    )
    if DEVICE == "cuda" and max(case.shape[1], case.channels) < op.channels_that_pay("cuda", len(case.rates)):
        found["segops kernels"] = lambda input, weight: run_kernels(input, weight, None, case.rates, case.merge)
    return found


def plain(case):
    """{name: function} of what a user would write without segops: plain PyTorch in the memory format of
    its arguments, the same factorisation by hand, on a GPU also torch.compile."""

    def eager(input, weight):
        return reference.pyramid_atrous_conv2d(input, weight, None, case.rates, case.merge)

    def handwritten(input, weight):
        """The factorisation in PyTorch's own ops: one product with all taps, then padded slices added up."""
        (_, _, h, w), c_out = input.shape, weight.shape[0]
        reach = max(case.rates)
        taps = weight.permute(2, 3, 0, 1).reshape(9 * c_out, -1, 1, 1)
        planes = F.pad(F.conv2d(input, taps), (reach,) * 4).unflatten(1, (9, c_out))
        branches = []
        for rate in case.rates:
            shifts = [(reach + rate * dy, reach + rate * dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            slices = [planes[:, t, :, y : y + h, x : x + w] for t, (y, x) in enumerate(shifts)]
            branches.append(functools.reduce(torch.add, slices))
        return functools.reduce(torch.add, branches) if case.merge == "sum" else torch.cat(branches, 1)

    return measure.with_compile(eager) | {"handwritten": handwritten}


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
    eager = plain(case)["eager"]
    truth, expected = (measure.outputs_and_gradients(eager, t) for t in (precise, tensors))
    return max(
        measure.error_over_bound(
            measure.outputs_and_gradients(function, arguments(small, memory_format)), expected, truth, case.tf32
        )
        for function, memory_format in itertools.product(implementations(case).values(), FORMATS.values())
    )


def functions(case):
    """{name: function} of segops and its baselines."""
    return {**implementations(case), **plain(case)}


def calls(case, kind, functions):
    """{name and memory format: the call to time}."""
    timed = {}
    for format_name, memory_format in FORMATS.items():
        tensors = arguments(case, memory_format)
        timed |= {f"{name} {format_name}": measure.timed_call(f, tensors, kind) for name, f in functions.items()}
    return timed


def floor(case, kind):
    """Milliseconds that the products cost at the machine's measured rate; on a GPU also one write and one read of the planes,
    which a CPU keeps in cache, and in the backward pass one more, and a read, for two products."""
    n, c_in, h, w = case.shape
    flops = 2 * n * h * w * c_in * case.channels * 9
    milliseconds = flops / measure.product_rate(DEVICE, case.dtype, case.tf32) * 1e3
    milliseconds *= 1 if kind == "forward" else 3
    if DEVICE == "cuda":
        planes = n * h * w * 9 * min(c_in, case.channels) * torch.empty((), dtype=case.dtype).element_size()
        milliseconds += (2 if kind == "forward" else 5) * planes / measure.copy_rate(DEVICE) * 1e3
    return milliseconds


def call(channels):
    """Both at rates 1, 3, 5, 7 and 9, on a map of so many channels."""

    def draw():
        shapes = (1, channels, 4, 4), (channels, channels, 3, 3), (channels,)
        return [torch.randn(shape) for shape in shapes]

    plain = partial(reference.pyramid_atrous_conv2d, rates=(1, 3, 5, 7, 9), merge="sum")
    return measure.Call(draw, segops.pyramid_atrous_conv2d, plain, {"forward": 1.2, "full": 1.2})


CALLS = {f"pyramid_atrous_conv2d, {channels} channels": call(channels) for channels in (4, 64)}


# What benchmarks/gpu.sh tries first: functions of a `trials.Setup` that return error over bound.


def pac_trial(widening, merge, setup):
    n, c, h, w = setup.shape
    c_in, c_out = (c, 2 * c) if widening else (2 * c, c)
    bias = torch.linspace(-1, 1, c_out).to(setup.dtype).requires_grad_()
    tensors = [setup.map(n, c_in, h, w), setup.map(c_out, c_in, 3, 3, scale=(9 * c_in) ** -0.5), bias]
    return trials.error(lambda *tensors: run_kernels(*tensors, RATES, merge), tensors)


TRIALS = {
    "sum": partial(pac_trial, False, "sum"),
    "sum, more filters than channels": partial(pac_trial, True, "sum"),
    "concat": partial(pac_trial, True, "concat"),
}


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
