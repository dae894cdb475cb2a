"""The boundary-aware loss against plain PyTorch. Run through `python -m benchmarks`, or pytest --benchmark-only."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

import segops
from segops.ops.bal import reference
from segops.ops.bal.edge import EdgeSettings
from segops.ops.bal.op import LossSettings

from . import baselines, measure
from .measure import DEVICE, FORMATS


@dataclass(frozen=True)
class Case:
    shape: tuple  # N, C, h, w of the logits
    size: tuple  # H, W of the labels
    dtype: torch.dtype = torch.float32
    memory_format: str = "contiguous"
    bars: tuple = ()  # (baseline, least ratio of times, of peak memories) of the pass forward and backward

    def __str__(self):
        n, c, h, w = self.shape
        layout = "" if self.memory_format == "contiguous" else f" {self.memory_format}"
        return f"{n}x{c}x{h}x{w} -> {'x'.join(map(str, self.size))} {str(self.dtype).removeprefix('torch.')}{layout}"


def bars(paper, handwritten):
    return ("paper", paper, 12), ("handwritten", handwritten, 8)


CPU_CASES = [
    Case((2, 21, 65, 65), (513, 513), bars=bars(8, 5)),
    Case((2, 21, 65, 65), (513, 513), memory_format="channels_last"),
    Case((2, 21, 65, 65), (513, 513), torch.bfloat16),
    Case((1, 21, 33, 33), (513, 513), bars=bars(8, 5)),
    Case((2, 19, 64, 64), (256, 256), bars=bars(6, 4)),
    Case((1, 21, 257, 257), (257, 257), bars=(("paper", 2.2, None), ("handwritten", 1.5, None))),
    Case((1, 150, 64, 64), (512, 512)),
    Case((2, 19, 128, 256), (1024, 2048)),
]
CUDA_CASES = [
    Case(shape, size, dtype, bars=(("compile", 5, None),) if shape[2:] != size else ())
    for shape, size in (
        ((8, 21, 65, 65), (513, 513)),
        ((2, 19, 128, 256), (1024, 2048)),
        ((8, 150, 64, 64), (512, 512)),
        ((8, 21, 513, 513), (513, 513)),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
CASES = CUDA_CASES if DEVICE == "cuda" else CPU_CASES
# What benchmarks/gpu.sh times; on a CPU, where it is rehearsed, the smallest case.
HEADLINE = CUDA_CASES[:3] if DEVICE == "cuda" else [Case((1, 5, 9, 11), (40, 43))]


def label_maps(n, num_classes, size, seed):
    """(N, H, W) int64: regions of a few classes with smooth borders, and a void of four pixels along these, as in PASCAL VOC."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.stack([torch.randperm(num_classes, generator=generator)[:8] for _ in range(n)])
    scores = torch.randn(n, present.shape[1], *(max(3, side // 100) for side in size), generator=generator)
    regions = F.interpolate(scores, size, mode="bicubic").argmax(1)
    labels = present.gather(1, regions.flatten(1)).view_as(regions)
    highest, lowest = (F.max_pool2d(each, 5, stride=1, padding=2) for each in (labels.float(), -labels.float()))
    return labels.masked_fill(highest != -lowest, baselines.VOID)


def arguments(case, seed=0):
    """Random logits, and labels."""
    logits = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed))
    logits = logits.to(DEVICE, case.dtype).contiguous(memory_format=FORMATS[case.memory_format]).requires_grad_()
    return logits, label_maps(case.shape[0], case.shape[1], case.size, seed).to(DEVICE)


def float64_loss(
    logits,
    labels,
    *,
    kernel=baselines.KERNEL,
    kernel_size=baselines.KERNEL_SIZE,
    sigma=baselines.SIGMA,
    beta=baselines.BETA,
    downsample=baselines.DOWNSAMPLE,
    normalize=None,
    class_weight=None,
    label_smoothing=0.0,
    reduction="mean",
):
    """`segops.boundary_aware_loss` with a weight map in float64."""
    classes = labels.where(labels != baselines.VOID, -1)
    edge = EdgeSettings(kernel, kernel_size, sigma, beta, downsample, normalize, baselines.VOID)
    weight = reference.gaussian_edge(classes, logits.shape[1], edge, torch.float64)
    loss = LossSettings(label_smoothing, baselines.VOID, reduction)
    return reference.upsample_cross_entropy(logits, classes, weight, class_weight, loss)


def gate(case):
    """The largest relative error of loss and gradient over its bound (`measure.error_over_bound`): above 1 is wrong.

    Checked on one image of the case, which float64 can afford.
    """
    logits, labels = arguments(replace(case, shape=(1, *case.shape[1:])))
    precise = logits.detach().double().requires_grad_()
    truth = measure.outputs_and_gradients(float64_loss, (precise, labels))
    plain = measure.outputs_and_gradients(baselines.bal(DEVICE)["handwritten"], (logits, labels))
    return max(
        measure.error_over_bound(measure.outputs_and_gradients(function, (logits, labels)), plain, truth)
        for function in measure.on_backends(segops.boundary_aware_loss).values()
    )


def functions(case):
    """{name: function} of segops and its baselines."""
    return {**measure.on_backends(segops.boundary_aware_loss), **baselines.bal(DEVICE)}


def calls(case, kind, functions):
    """{name: the call to time}."""
    tensors = arguments(case)
    return {name: measure.timed_call(function, tensors, kind) for name, function in functions.items()}


def floor(case, kind):
    """Milliseconds to read labels and logits, for each pass, and to write the gradient, at the measured bandwidth, plus the
    N * C * H * W exponentials of each pass at the measured rate."""
    logits, labels = arguments(case)
    passes = 1 if kind == "forward" else 2
    moved = passes * (labels.nbytes + logits.nbytes) + (passes - 1) * logits.nbytes
    exponentials = passes * case.shape[1] * labels.numel()
    return (moved / measure.copy_rate(DEVICE) + exponentials / measure.exponential_rate(DEVICE)) * 1e3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bal(benchmark, case):
    error = gate(case)
    assert error <= 1, f"wrong by {error:.2f} times the bound: no time is reported"

    rows = []
    for kind in ("forward", "full"):
        torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
        timed = calls(case, kind, functions(case))
        times = measure.compare(timed, DEVICE)
        held = {baseline: least for baseline, *least in case.bars} if kind == "full" else {}
        beside = [name for name in timed if not name.startswith("segops")]
        rows += measure.rows(kind, timed, times, beside, floor(case, kind), held, DEVICE)
    benchmark.extra_info.update(op="bal", case=str(case), gate=error, rows=rows, environment=measure.environment(DEVICE))
    benchmark.pedantic(timed["segops"], rounds=3)
