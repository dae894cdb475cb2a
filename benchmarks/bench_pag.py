"""The partial-attention gate, and pooling with unpooling, against plain PyTorch. Run through `python -m benchmarks`, or pytest
--benchmark-only."""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import segops
from segops.ops.pag import reference

from . import measure, trials
from .measure import DEVICE, FORMATS


@dataclass(frozen=True)
class Case:
    shapes: tuple  # N, C, H, W of the decoder and of the encoder maps, all of which are on; or of the map to pool and unpool
    merge: str = "concat"
    kernel_size: int | None = None  # that of pooling and unpooling; None is the gate
    dtype: torch.dtype = torch.float32
    memory_format: str = "contiguous"
    bar: float | None = None  # least ratio to the best plain PyTorch of the pass forward and backward; holds KEPT as well

    def __str__(self):
        maps = ["x".join(map(str, shape[1:])) for shape in self.shapes]
        what = self.merge if self.kernel_size is None else f"unpool {self.kernel_size}"
        layout = "" if self.memory_format == "contiguous" else f" {self.memory_format}"
        return f"{self.shapes[0][0]}x{' + '.join(maps)} {what} {str(self.dtype).removeprefix('torch.')}{layout}"


KEPT = 3  # eager PyTorch keeps at least that many times the memory for backward; torch.compile may keep bytes, too

DECODER_32 = (4, 128, 32, 32), (4, 64, 128, 128), (4, 128, 64, 64), (4, 256, 32, 32)
DECODER_112 = (2, 64, 112, 112), (2, 32, 224, 224), (2, 64, 112, 112)
CPU_CASES = [
    replace(case, memory_format=memory_format)
    for case, memory_format in itertools.product(
        (
            Case(DECODER_32, bar=3),
            Case(DECODER_112, bar=3),
            Case(((2, 64, 56, 56), (2, 64, 224, 224), (2, 64, 112, 112), (2, 64, 56, 56)), "sum"),
            Case(((2, 64, 30, 40), (2, 64, 65, 87), (2, 64, 129, 173))),  # windows that do not divide the maps
            Case(((4, 64, 128, 128),), kernel_size=2, bar=2.5),
            Case(((4, 64, 128, 128),), kernel_size=3),
            Case(DECODER_32, dtype=torch.bfloat16),
        ),
        FORMATS,
    )
]
CUDA_CASES = [
    replace(case, dtype=dtype, memory_format=memory_format)
    for case in (
        Case(((8, 256, 64, 64), (8, 64, 256, 256), (8, 128, 128, 128), (8, 256, 64, 64)), bar=2.5),
        Case(((16, 64, 112, 112), (16, 32, 224, 224), (16, 64, 112, 112)), bar=2.5),
        Case(((16, 64, 256, 256),), kernel_size=2),
    )
    for dtype, memory_format in (
        (torch.bfloat16, "contiguous"),
        (torch.bfloat16, "channels_last"),
        (torch.float32, "contiguous"),
    )
]
CASES = CUDA_CASES if DEVICE == "cuda" else CPU_CASES
# What is rehearsed on a CPU: a gate first.
SMALL = [Case(((2, 3, 4, 5), (2, 4, 8, 10))), Case(((2, 3, 7, 8),), kernel_size=2)]
HEADLINE = measure.Headline([*CUDA_CASES[:3], CUDA_CASES[6]] if DEVICE == "cuda" else SMALL, few=(0, -1))


def implementations(case):
    """{name: function} of the segops backends to time."""

    def attend(decoder, *encoders):
        return segops.partial_attention_gate(decoder, encoders, merge=case.merge)

    def pool_and_unpool(input):
        pooled, offsets = segops.max_pool2d_with_offsets(input, case.kernel_size)
        return segops.max_unpool2d_with_offsets(pooled, offsets, case.kernel_size, input.shape[2:])

    return measure.on_backends(attend if case.kernel_size is None else pool_and_unpool)


def plain_gate(merge):
    """The partial-attention gate: a pooling for each map that is larger than the decoder's, then cat, or a sum."""

    def eager(decoder, *encoders):
        pooled = [_pooled(encoder, decoder.shape[2:]) for encoder in encoders]
        return torch.cat([decoder, *pooled], 1) if merge == "concat" else functools.reduce(torch.add, pooled, decoder)

    return measure.with_compile(eager)


def plain_unpool(kernel_size):
    """Pooling, and unpooling to where the maxima lay: with indices of eight bytes."""

    def eager(input):
        pooled, indices = F.max_pool2d(input, kernel_size, ceil_mode=True, return_indices=True)
        return F.max_unpool2d(pooled, indices, kernel_size, output_size=input.shape[2:])

    return measure.with_compile(eager)


def _pooled(encoder, size):
    """The map max-pooled to the size, by the fastest of PyTorch's ways."""
    (height, width), (h, w) = encoder.shape[2:], size
    if (height, width) == (h, w):
        return encoder
    if height % h or width % w:
        return F.adaptive_max_pool2d(encoder, size)
    return F.max_pool2d(encoder, (height // h, width // w))


def plain(case):
    """{name: function} of the baselines."""
    if case.kernel_size is None:
        return plain_gate(case.merge)
    return plain_unpool(case.kernel_size)


def arguments(case, seed=0):
    """Random maps."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator) for shape in case.shapes]
    return [t.to(DEVICE, case.dtype).contiguous(memory_format=FORMATS[case.memory_format]).requires_grad_() for t in maps]


def float64_result(case, maps):
    if case.kernel_size is None:
        return reference.partial_attention_gate(maps[0], maps[1:], case.merge)
    kernel_size = [case.kernel_size] * 2
    pooled, offsets = reference.max_pool2d_with_offsets(maps[0], kernel_size)
    return reference.max_unpool2d_with_offsets(pooled, offsets, kernel_size, maps[0].shape[2:])


def gate(case):
    """The largest relative error of output and gradients over its bound (`measure.error_over_bound`): above 1 is wrong. Where
    values are only copied, PyTorch is exact and segops must be.

    Checked on one image of the case, which float64 can afford.
    """
    tensors = arguments(replace(case, shapes=tuple((1, *shape[1:]) for shape in case.shapes)))
    precise = [t.detach().double().requires_grad_() for t in tensors]
    truth = measure.outputs_and_gradients(lambda *maps: float64_result(case, maps), precise, case.dtype)
    expected = measure.outputs_and_gradients(plain(case)["eager"], tensors)
    return max(
        measure.error_over_bound(measure.outputs_and_gradients(function, tensors), expected, truth)
        for function in implementations(case).values()
    )


def functions(case):
    """{name: function} of segops and its baselines."""
    return {**implementations(case), **plain(case)}


def calls(case, kind, functions):
    """{name: the call to time}."""
    tensors = arguments(case)
    return {name: measure.timed_call(function, tensors, kind) for name, function in functions.items()}


def moved(case, kind):
    """Bytes that no implementation of these functions can avoid to read or write.

    The gate, forward: every map read, the result written. Backward: the gradient of each pooled map written, and read of the
    result's gradient what belongs to pooled maps, once: their channels under "concat", all under "sum". The gradients of the
    decoder and of maps that are not pooled are views of the result's: nothing. Where the maxima lay is not counted: how it is kept
    is the implementation's affair.

    Pooling and unpooling, forward: the input read, its maxima and their one-byte offsets written, both read, the result written.
    Backward the same in reverse: the result's gradient read at the offsets, which are read, too; the pooled gradient written, then
    read, with the offsets, and the input's written.
    """
    passes, width = 1 if kind == "forward" else 2, case.dtype.itemsize
    if case.kernel_size is not None:
        (shape,) = case.shapes
        windows = math.prod(shape[:2]) * math.prod(-(-side // case.kernel_size) for side in shape[2:])
        return passes * 2 * (math.prod(shape) * width + windows * (width + 1))
    decoder, *encoders = case.shapes
    pooled = [shape for shape in encoders if shape[2:] != decoder[2:]]
    pixels = decoder[0] * math.prod(decoder[2:])

    def merged(shapes):
        return pixels * (sum(shape[1] for shape in shapes) if case.merge == "concat" else decoder[1])

    elements = sum(map(math.prod, case.shapes)) + merged(case.shapes)
    if kind == "full":
        elements += sum(map(math.prod, pooled)) + merged(pooled)
    return elements * width


def floor(case, kind):
    """Milliseconds to move those bytes at the measured bandwidth."""
    return moved(case, kind) / measure.copy_rate(DEVICE) * 1e3


def bars(case, kind, baselines, best):
    """{baseline: (least ratio of times, of peak memories, of memories kept for backward)}."""
    if case.bar is None or kind == "forward":
        return {}
    return {name: (case.bar if name == best else None, None, KEPT if name == "eager" else None) for name in baselines}


CALLS = {
    "partial_attention_gate": measure.Call(
        lambda: [torch.randn(1, 8, 4, 4), torch.randn(1, 8, 8, 8)],
        lambda decoder, encoder: segops.partial_attention_gate(decoder, [encoder]),
        lambda decoder, encoder: torch.cat([decoder, F.max_pool2d(encoder, 2)], 1),
        {"forward": 4.0, "full": 1.8},
    ),
    "max_pool2d_with_offsets": measure.Call(
        lambda: [torch.randn(1, 8, 8, 8)],
        lambda input: segops.max_pool2d_with_offsets(input, 2),
        lambda input: F.max_pool2d(input, 2, ceil_mode=True, return_indices=True),
        {"forward": 4.0, "full": 1.8},
    ),
}


# What benchmarks/gpu.sh tries first: functions of a `trials.Setup` that return error over bound.


def gate_trial(merge, adaptive, setup):
    n, c, h, w = setup.shape
    if adaptive:
        sizes = [(h, w), (2 * h + 1, 3 * w - 1), (h + 2, w + 1)]
    else:
        sizes = [(h, w), (2 * h, 4 * w), (h, w), (h // 2, w // 2)]  # the last one is off
    maps = [setup.map(n, c, *size) for size in sizes]
    if not adaptive:
        maps[-1].requires_grad_(False)
    return trials.error(lambda decoder, *encoders: segops.partial_attention_gate(decoder, encoders, merge=merge), maps)


def pool_trial(kernel_size, setup):
    n, c, h, w = setup.shape
    tensors = [setup.map(n, c, 2 * h + 1, 2 * w - 1)]
    return max(
        trials.error(lambda input: segops.max_pool2d_with_offsets(input, kernel_size)[0], tensors),
        trials.mismatch(lambda input: segops.max_pool2d_with_offsets(input, kernel_size)[1], tensors),
    )


def unpool_trial(kernel_size, setup):
    n, c, h, w = setup.shape
    size = 2 * h + 1, 2 * w - 1
    with segops.backend("reference"):
        pooled, offsets = segops.max_pool2d_with_offsets(setup.map(n, c, *size).detach(), kernel_size)
    tensors = [pooled.requires_grad_(), offsets]
    return trials.error(lambda pooled, offsets: segops.max_unpool2d_with_offsets(pooled, offsets, kernel_size, size), tensors)


TRIALS = {
    "gate concat": partial(gate_trial, "concat", False),
    "gate sum": partial(gate_trial, "sum", False),
    "gate concat, adaptive windows": partial(gate_trial, "concat", True),
    "gate sum, adaptive windows": partial(gate_trial, "sum", True),
    "pool 2": partial(pool_trial, 2),
    "pool 3x2": partial(pool_trial, (3, 2)),
    "unpool 2": partial(unpool_trial, 2),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pag(benchmark, case):
    error = gate(case)
    assert error <= 1, f"wrong by {error:.2f} times the bound: no time is reported"

    rows = []
    for kind in ("forward", "full"):
        torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
        timed_functions, kept = functions(case), None
        timed = calls(case, kind, timed_functions)
        times = measure.compare(timed, DEVICE)
        if kind == "full":
            tensors = arguments(case)
            kept = {name: measure.kept_memory(function, tensors) for name, function in timed_functions.items()}
        beside = [name for name in timed if not name.startswith("segops")]
        best = min(beside, key=lambda name: times[name]["median"])
        held = bars(case, kind, beside, best)
        rows += measure.rows(kind, timed, times, beside, floor(case, kind), held, DEVICE, kept)
    benchmark.extra_info.update(op="pag", case=str(case), gate=error, rows=rows, environment=measure.environment(DEVICE))
    benchmark.pedantic(timed["segops"], rounds=3)
