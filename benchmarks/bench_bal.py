"""The boundary-aware loss against plain PyTorch. Run through `python -m benchmarks`, or pytest --benchmark-only."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import segops
from segops.ops.bal import reference
from segops.ops.bal.edge import EdgeSettings
from segops.ops.bal.op import LossSettings

from . import measure, trials
from .measure import DEVICE, FORMATS
from .trials import VOID

# The boundary-aware loss with the settings that the paper found best, which are segops' defaults.
KERNEL, KERNEL_SIZE, SIGMA, BETA, DOWNSAMPLE = "gaussian", 35, 3.0, 0.5, 4


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
HEADLINE = measure.Headline(CUDA_CASES[:3] if DEVICE == "cuda" else [Case((1, 5, 9, 11), (40, 43))], eager="handwritten")


def label_maps(n, num_classes, size, seed):
    """(N, H, W) int64: regions of a few classes with smooth borders, and a void of four pixels along these, as in PASCAL VOC."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.stack([torch.randperm(num_classes, generator=generator)[:8] for _ in range(n)])
    scores = torch.randn(n, present.shape[1], *(max(3, side // 100) for side in size), generator=generator)
    regions = F.interpolate(scores, size, mode="bicubic").argmax(1)
    labels = present.gather(1, regions.flatten(1)).view_as(regions)
    highest, lowest = (F.max_pool2d(each, 5, stride=1, padding=2) for each in (labels.float(), -labels.float()))
    return labels.masked_fill(highest != -lowest, VOID)


def arguments(case, seed=0):
    """Random logits, and labels."""
    logits = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed))
    logits = logits.to(DEVICE, case.dtype).contiguous(memory_format=FORMATS[case.memory_format]).requires_grad_()
    return logits, label_maps(case.shape[0], case.shape[1], case.size, seed).to(DEVICE)


def float64_loss(
    logits,
    labels,
    *,
    kernel=KERNEL,
    kernel_size=KERNEL_SIZE,
    sigma=SIGMA,
    beta=BETA,
    downsample=DOWNSAMPLE,
    normalize=None,
    class_weight=None,
    label_smoothing=0.0,
    reduction="mean",
):
    """`segops.boundary_aware_loss` with a weight map in float64."""
    classes = labels.where(labels != VOID, -1)
    edge = EdgeSettings(kernel, kernel_size, sigma, beta, downsample, normalize, VOID)
    weight = reference.gaussian_edge(classes, logits.shape[1], edge, torch.float64)
    loss = LossSettings(label_smoothing, VOID, reduction)
    return reference.upsample_cross_entropy(logits, classes, weight, class_weight, loss)


def plain():
    """{name: function} of logits and labels to the loss, all in float32, as segops computes it.

    "paper" follows the text; "handwritten" is the best formulation that PyTorch differentiates; on a CPU "strips" has its gradient
    by hand; on a GPU "compile" is torch.compile of the formulation in planes, of which it made the faster code for a CPU.
    """
    kernel = reference.blur_kernel(KERNEL, KERNEL_SIZE, SIGMA).to(DEVICE, torch.float32)
    left, weights, right = torch.linalg.svd(kernel.double())  # of rank two
    factors = [vector.float() for i in range(2) for vector in (left[:, i] * weights[i], right[i])]
    baselines = {
        "paper": partial(_paper, kernel=kernel),
        "handwritten": partial(_handwritten, factors=factors),
    }
    if DEVICE == "cuda":
        baselines["compile"] = torch.compile(partial(_planes, factors=factors), dynamic=False)
    else:
        baselines["strips"] = partial(_strips, factors=factors)
    return baselines


def _paper(logits, labels, kernel):
    """A plane per class all the way: edge, downsample, blur, upsample each, then sum (Yu, Eq. 1 to 4)."""
    num_classes, size = logits.shape[1], labels.shape[1:]
    planes = (labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None, None]).float()
    padded = F.pad(planes, (0, 1, 0, 1), mode="replicate")
    edges = padded[..., :-1, :-1].sub(padded[..., :-1, 1:], alpha=0.5).sub_(padded[..., 1:, :-1], alpha=0.5).ne(0).float()
    edges = F.interpolate(edges, [-(-side // DOWNSAMPLE) for side in size], mode="bilinear", antialias=True)
    edges = edges.contiguous(memory_format=torch.channels_last)  # a depthwise convolution on a CPU is 12 times slower without
    edges = F.conv2d(edges, kernel.expand(num_classes, 1, -1, -1), padding=KERNEL_SIZE // 2, groups=num_classes)
    weight = F.interpolate(edges, size, mode="bilinear").sum(1) + BETA
    logits = logits.float()
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear")
    loss = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none")
    return (loss * weight).sum() / (labels != VOID).sum()


def _weight(labels, factors):
    """The weight map with the classes summed first: the classes among three labels are counted by comparing them, the blur is
    two separable ones."""
    size = labels.shape[1:]
    padded = labels.to(torch.int16)
    padded = torch.cat([padded, padded[:, -1:]], 1)
    padded = torch.cat([padded, padded[:, :, -1:]], 2)
    here, right, lower = _corners(padded)
    known, right_known, lower_known = _corners(padded != VOID)
    to_right, to_lower = here != right, here != lower
    count = ((to_right | to_lower) & known).byte() + (to_right & right_known) + (to_lower & (right != lower) & lower_known)
    small = [-(-side // DOWNSAMPLE) for side in size]
    edges = F.interpolate(count.float()[:, None], small, mode="bilinear", antialias=True)
    u1, v1, u2, v2 = factors
    rows = F.conv2d(edges, torch.stack([v1, v2])[:, None, None], padding=(0, KERNEL_SIZE // 2))
    edges = F.conv2d(rows, torch.stack([u1, u2])[None, :, :, None], padding=(KERNEL_SIZE // 2, 0))
    return F.interpolate(edges, size, mode="bilinear")[:, 0] + BETA


def _corners(padded):
    """The map, and the same shifted by one to the right and by one down."""
    return padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1]


def _planes(logits, labels, factors):
    """One weight map; upsampling and softmax of planes."""
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    loss = F.nll_loss(F.log_softmax(logits, 1, dtype=torch.float32), labels, ignore_index=VOID, reduction="none")
    return (loss * _weight(labels, factors)).sum() / (labels != VOID).sum()


def _handwritten(logits, labels, factors):
    """One weight map; upsampling and softmax with the classes of a pixel side by side: on a CPU faster than planes, unless there
    is nothing to upsample."""
    if logits.shape[2:] == labels.shape[1:]:
        return _planes(logits, labels, factors)
    logits = logits.float().contiguous(memory_format=torch.channels_last)
    pixels = F.interpolate(logits, labels.shape[1:], mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    loss = F.cross_entropy(pixels, labels.flatten(), ignore_index=VOID, reduction="none").view(labels.shape)
    return (loss * _weight(labels, factors)).sum() / (labels != VOID).sum()


def _strips(logits, labels, factors):
    """Loss and gradient a strip at a time, where there is something to upsample."""
    if logits.shape[2:] == labels.shape[1:]:
        return _planes(logits, labels, factors)
    return _Strips.apply(logits.float(), labels, _weight(labels, factors), torch.is_grad_enabled())


class _Strips(torch.autograd.Function):
    """The loss and, at once, its gradient by hand, for a strip of rows at a time: nothing is large, strips stay in cache.

    Strips of the upsampled logits are products with the matrices of bilinear interpolation.
    """

    @staticmethod
    def forward(ctx, logits, labels, weight, with_gradient):
        valid = labels != VOID
        index, weight = labels.where(valid, 0)[:, None], weight * valid / valid.sum()
        vertical, horizontal = (
            _interpolation(side, full).to(logits) for side, full in zip(logits.shape[2:], labels.shape[1:], strict=True)
        )
        wide = logits @ horizontal.T
        gradient, loss = torch.zeros_like(wide), 0
        for rows, i, w in zip(vertical.split(64), index.split(64, 2), weight.split(64, 1), strict=True):
            softmax = F.log_softmax(rows @ wide, 1)
            loss = loss - (softmax.gather(1, i)[:, 0] * w).sum()
            if with_gradient:
                softmax.exp_().scatter_add_(1, i, softmax.new_full((), -1).expand(i.shape)).mul_(w[:, None])
                gradient += rows.T @ softmax
        ctx.save_for_backward(gradient @ horizontal)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None


def _interpolation(side, full):
    """(full, side): the matrix of `F.interpolate(mode="bilinear")` along one axis."""
    source = ((torch.arange(full, dtype=torch.float64) + 0.5) * (side / full) - 0.5).clamp(0, side - 1)
    return (1 - (source[:, None] - torch.arange(side)).abs()).clamp(min=0)


def gate(case):
    """The largest relative error of loss and gradient over its bound (`measure.error_over_bound`): above 1 is wrong.

    Checked on one image of the case, which float64 can afford.
    """
    logits, labels = arguments(replace(case, shape=(1, *case.shape[1:])))
    precise = logits.detach().double().requires_grad_()
    truth = measure.outputs_and_gradients(float64_loss, (precise, labels))
    expected = measure.outputs_and_gradients(plain()["handwritten"], (logits, labels))
    return max(
        measure.error_over_bound(measure.outputs_and_gradients(function, (logits, labels)), expected, truth)
        for function in measure.on_backends(segops.boundary_aware_loss).values()
    )


def functions(case):
    """{name: function} of segops and its baselines."""
    return {**measure.on_backends(segops.boundary_aware_loss), **plain()}


def calls(case, kind, functions):
    """{name: the call to time}."""
    tensors = arguments(case)
    return {name: measure.timed_call(function, tensors, kind) for name, function in functions.items()}


def floor(case, kind):
    """Milliseconds to read labels and logits once and, with the backward pass, to write the gradient, at the measured bandwidth,
    plus N * C * H * W exponentials at PyTorch's measured rate, which kernels may beat: one pass makes loss and gradient."""
    logits, labels = arguments(case)
    moved = labels.nbytes + logits.nbytes * (1 if kind == "forward" else 2)
    return (moved / measure.copy_rate(DEVICE) + case.shape[1] * labels.numel() / measure.exponential_rate(DEVICE)) * 1e3


def resized_cross_entropy(logits, labels):
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=255)


def draw():
    return [torch.randn(1, 5, 4, 4), torch.randint(0, 5, (1, 8, 8))]


CALLS = {
    "upsample_cross_entropy": measure.Call(
        draw, segops.upsample_cross_entropy, resized_cross_entropy, {"forward": 2.0, "full": 1.8}
    )
}


# What benchmarks/gpu.sh tries first: functions of a `trials.Setup` that return error over bound.


def edge_trial(normalize, setup):
    _, c, h, w = setup.shape
    settings = {"kernel": "gaussian", "kernel_size": 35, "sigma": 3.0, "beta": 0.5, "downsample": 4, "normalize": normalize}

    def truth(labels):
        classes = labels.long().where(labels != VOID, -1)
        return reference.gaussian_edge(classes, c, EdgeSettings(**settings, ignore_index=VOID), torch.float64)

    return trials.error(lambda labels: segops.gaussian_edge(labels, c, **settings), [setup.labels(4 * h + 1, 4 * w - 1)], truth)


def cross_entropy_trial(setup):
    n, c, h, w = setup.shape
    pixel_weight = setup.map(n, 1, h, w).detach()[:, 0].abs()
    tensors = [setup.map(n, c, h, w), setup.labels(4 * h, 4 * w), pixel_weight, setup.class_weight()]

    def loss(logits, labels, pixel_weight, class_weight):
        return segops.upsample_cross_entropy(logits, labels, pixel_weight, class_weight=class_weight, label_smoothing=0.1)

    return trials.error(loss, tensors)


def boundary_loss_trial(scale, options, setup):
    """Labels at `scale` times the logits' size; class weights where there are options."""
    n, c, h, w = setup.shape
    tensors = [setup.map(n, c, h, w), setup.labels(scale * h, scale * w), *([setup.class_weight()] if options else [])]

    def loss(logits, labels, class_weight=None):
        return segops.boundary_aware_loss(logits, labels, class_weight=class_weight, **options)

    def truth(logits, labels, class_weight=None):
        return float64_loss(logits, labels.long(), class_weight=class_weight, **options)

    return trials.error(loss, tensors, truth)


LOSS_OPTIONS = {"kernel": "linear", "kernel_size": 9, "beta": 0.3, "downsample": 2, "normalize": "mean", "label_smoothing": 0.1}
TRIALS = {
    "edge": partial(edge_trial, None),
    "edge, normalised": partial(edge_trial, "max"),
    "cross entropy with weights": cross_entropy_trial,
    "boundary-aware loss": partial(boundary_loss_trial, 4, {}),
    "boundary-aware loss with options": partial(boundary_loss_trial, 3, LOSS_OPTIONS),
    "boundary-aware loss, a map, at full size": partial(boundary_loss_trial, 1, {"reduction": "none"}),
}


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
