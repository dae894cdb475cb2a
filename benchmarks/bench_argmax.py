"""Upsampling with argmax against plain PyTorch. Run through `python -m benchmarks`, or pytest --benchmark-only."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import segops

from . import measure, trials
from .measure import DEVICE, FORMATS


@dataclass(frozen=True)
class Case:
    shape: tuple  # N, C, h, w of the logits
    size: tuple
    regions: bool = True  # classes in regions, as a network's logits have them; or noise, where every pixel is at a boundary
    dtype: torch.dtype = torch.float32
    memory_format: str = "contiguous"

    def __str__(self):
        what = "regions" if self.regions else "noise"
        layout = "" if self.memory_format == "contiguous" else f" {self.memory_format}"
        shape, size = ("x".join(map(str, sides)) for sides in (self.shape, self.size))
        return f"{shape} -> {size} {what} {str(self.dtype).removeprefix('torch.')}{layout}"


SHAPES = [
    ((2, 21, 65, 65), (513, 513)),
    ((1, 21, 33, 33), (513, 513)),
    ((1, 19, 128, 256), (1024, 2048)),
    ((1, 150, 64, 64), (512, 512)),
    ((1, 21, 257, 257), (513, 513)),
    ((8, 11, 45, 60), (180, 240)),
]
CASES = [
    Case(shape, size, regions, memory_format=memory_format)
    for (shape, size), regions, memory_format in itertools.product(SHAPES, (True, False), FORMATS)
] + [Case(*SHAPES[0], dtype=torch.bfloat16, memory_format=memory_format) for memory_format in FORMATS]

HEADLINE = measure.Headline(
    [CASES[2], CASES[0], CASES[9]] if DEVICE == "cuda" else [Case((1, 5, 9, 11), (40, 43))], kinds=("forward",)
)


def implementations(case):
    """{name: function} of the segops backends to time."""
    return measure.on_backends(lambda logits: segops.upsample_argmax(logits, case.size))


def plain(case):
    """{name: function} of what a user would write without segops."""
    return measure.with_compile(lambda logits: F.interpolate(logits, case.size, mode="bilinear", align_corners=False).argmax(1))


def arguments(case, seed=0):
    """Random logits: noise, or a few random numbers a class resized and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(case.shape, generator=generator)
    if case.regions:
        coarse = torch.randn(*case.shape[:2], 6, 8, generator=generator)
        logits = 4 * F.interpolate(coarse, case.shape[2:], mode="bicubic") + 0.1 * logits
    return [logits.to(DEVICE, case.dtype).contiguous(memory_format=FORMATS[case.memory_format])]


def shortfall(classes, truth):
    """How far the logits of the chosen classes stay below the largest, over the largest magnitude of all."""
    if classes.shape != (truth.shape[0], *truth.shape[2:]) or not 0 <= classes.min() <= classes.max() < truth.shape[1]:
        return float("inf")
    return ((truth.amax(1) - truth.gather(1, classes[:, None])[:, 0]).max() / truth.abs().max()).item()


def gate(case):
    """The largest shortfall over its bound, twice plain PyTorch's own and 1e-6 at least: above 1 is wrong. On one image of the case."""
    (logits,) = arguments(replace(case, shape=(1, *case.shape[1:])))
    truth = F.interpolate(logits.double(), case.size, mode="bilinear", align_corners=False)
    bound = max(1e-6, 2 * shortfall(plain(case)["eager"](logits), truth))
    return max(shortfall(function(logits), truth) / bound for function in implementations(case).values())


def functions(case):
    """{name: function} of segops and its baselines."""
    return {**implementations(case), **plain(case)}


def calls(case, kind, functions):
    """{name: the call to time}."""
    tensors = arguments(case)
    return {name: measure.timed_call(function, tensors, kind) for name, function in functions.items()}


def floor(case, kind):
    """Milliseconds to read the logits and write the classes once, at the measured bandwidth."""
    n, classes, h, w = case.shape
    moved = n * (classes * h * w * case.dtype.itemsize + case.size[0] * case.size[1] * 8)
    return moved / measure.copy_rate(DEVICE) * 1e3


def resized(logits):
    return F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False).argmax(1)


CALLS = {
    "upsample_argmax": measure.Call(
        lambda: [torch.randn(1, 5, 4, 4)], lambda logits: segops.upsample_argmax(logits, (8, 8)), resized, {"forward": 2.0}
    )
}


# What benchmarks/gpu.sh tries first: functions of a `trials.Setup` that return error over bound.


def argmax_trial(regions, setup):
    n, c, h, w = setup.shape
    size = 4 * h + 1, 4 * w - 1
    logits = setup.map(n, c, h, w).detach()
    if regions:
        coarse = F.interpolate(logits[:, :, :2, :3].float(), (h, w), mode="bicubic")
        logits = (4 * coarse + 0.1 * logits).to(logits).contiguous(memory_format=FORMATS[setup.memory_format])
    classes = segops.upsample_argmax(*trials.on_device([logits]), size).cpu()
    plain = F.interpolate(logits, size, mode="bilinear").argmax(1)
    truth = F.interpolate(logits.double(), size, mode="bilinear")
    return shortfall(classes, truth) / max(1e-6, 2 * shortfall(plain, truth))


TRIALS = {"regions": partial(argmax_trial, True), "noise": partial(argmax_trial, False)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_argmax(benchmark, case):
    error = gate(case)
    assert error <= 1, f"wrong by {error:.2f} times the bound: no time is reported"

    torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
    timed = calls(case, "forward", functions(case))
    times = measure.compare(timed, DEVICE)
    beside = [name for name in timed if not name.startswith("segops")]
    rows = measure.rows("forward", timed, times, beside, floor(case, "forward"), {}, DEVICE)
    benchmark.extra_info.update(op="argmax", case=str(case), gate=error, rows=rows, environment=measure.environment(DEVICE))
    benchmark.pedantic(timed["segops"], rounds=3)
