"""Every op, forward and backward, against float64: three dtypes, both memory formats, sizes that
16-byte vectors divide and sizes that they do not. Run by `benchmarks.gpu`."""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import segops
from segops.ops.bal import reference

from . import baselines, bench_argmax, bench_bal, measure
from .gpu import Case
from .measure import DEVICE, FORMATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABELS = dict(zip(DTYPES, (torch.int64, torch.int32, torch.uint8), strict=True))
LOSS_OPTIONS = {"kernel": "linear", "kernel_size": 9, "beta": 0.3, "downsample": 2, "normalize": "mean", "label_smoothing": 0.1}


@dataclass(frozen=True)
class Setup:
    """The tensors that an op is tried on: made on the CPU, so that every device gets the same."""

    dtype: torch.dtype
    memory_format: str
    packed: bool
    tiny: bool

    def __str__(self):
        return f"{str(self.dtype).removeprefix('torch.')} {self.memory_format} {'packed' if self.packed else 'odd'}"

    @property
    def shape(self):
        """N, C, H, W."""
        if self.tiny:
            return (1, 8, 8, 8) if self.packed else (1, 5, 7, 9)
        return (2, 16, 24, 32) if self.packed else (2, 13, 23, 27)

    def map(self, n, c, h, w, scale=1.0):
        generator = torch.Generator().manual_seed(n + c + h + w)
        values = (scale * torch.randn(n, c, h, w, generator=generator)).to(self.dtype)
        return values.contiguous(memory_format=FORMATS[self.memory_format]).requires_grad_()

    def labels(self, height, width):
        """Patches of 3x3, a tenth of them void."""
        n, c, _, _ = self.shape
        generator = torch.Generator().manual_seed(height + width)
        patches = torch.randint(0, c, (n, height // 3 + 1, width // 3 + 1), generator=generator)
        patches[torch.rand(patches.shape, generator=generator) < 0.1] = baselines.VOID
        labels = patches.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :height, :width]
        return labels.to(LABELS[self.dtype]).contiguous()

    def class_weight(self):
        return torch.linspace(0.5, 1.5, self.shape[1])


def on_device(tensors):
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


def error(function, tensors, truth=None):
    """The largest relative error of result and gradients over its bound: above 1 is wrong.

    truth: computes the same in float64; by default the function itself on the reference backend.
    """

    def step_by_step(*tensors):
        result = function(*tensors)
        measure.synchronise()
        return result

    values = measure.outputs_and_gradients(step_by_step, on_device(tensors))
    measure.synchronise()
    with segops.backend("reference"):
        plain = measure.outputs_and_gradients(function, tensors)
        precise = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
        exact = measure.outputs_and_gradients(truth or function, precise, plain[0].dtype)
    return measure.error_over_bound([value.cpu() for value in values], plain, exact)


def mismatch(function, tensors):
    """Infinite unless the result is that of the reference, element by element."""
    values = function(*on_device(tensors)).cpu()
    with segops.backend("reference"):
        return 0.0 if torch.equal(values, function(*tensors)) else float("inf")


def pac(widening, merge, setup):
    n, c, h, w = setup.shape
    c_in, c_out = (c, 2 * c) if widening else (2 * c, c)
    bias = torch.linspace(-1, 1, c_out).to(setup.dtype).requires_grad_()
    tensors = [setup.map(n, c_in, h, w), setup.map(c_out, c_in, 3, 3, scale=(9 * c_in) ** -0.5), bias]
    return error(lambda input, weight, bias: segops.pyramid_atrous_conv2d(input, weight, bias, merge=merge), tensors)


def edge(normalize, setup):
    _, c, h, w = setup.shape
    settings = {"kernel": "gaussian", "kernel_size": 35, "sigma": 3.0, "beta": 0.5, "downsample": 4, "normalize": normalize}

    def truth(labels):
        classes = labels.long().where(labels != baselines.VOID, -1)
        return reference.gaussian_edge(classes, c, *settings.values(), dtype=torch.float64)

    return error(lambda labels: segops.gaussian_edge(labels, c, **settings), [setup.labels(4 * h + 1, 4 * w - 1)], truth)


def cross_entropy(setup):
    n, c, h, w = setup.shape
    pixel_weight = setup.map(n, 1, h, w).detach()[:, 0].abs()
    tensors = [setup.map(n, c, h, w), setup.labels(4 * h, 4 * w), pixel_weight, setup.class_weight()]

    def loss(logits, labels, pixel_weight, class_weight):
        return segops.upsample_cross_entropy(logits, labels, pixel_weight, class_weight=class_weight, label_smoothing=0.1)

    return error(loss, tensors)


def boundary_loss(scale, options, setup):
    """Labels at `scale` times the logits' size; class weights where there are options."""
    n, c, h, w = setup.shape
    tensors = [setup.map(n, c, h, w), setup.labels(scale * h, scale * w), *([setup.class_weight()] if options else [])]

    def loss(logits, labels, class_weight=None):
        return segops.boundary_aware_loss(logits, labels, class_weight=class_weight, **options)

    def truth(logits, labels, class_weight=None):
        return bench_bal.float64_loss(logits, labels.long(), class_weight=class_weight, **options)

    return error(loss, tensors, truth)


def gate(merge, adaptive, setup):
    n, c, h, w = setup.shape
    if adaptive:
        sizes = [(h, w), (2 * h + 1, 3 * w - 1), (h + 2, w + 1)]
    else:
        sizes = [(h, w), (2 * h, 4 * w), (h, w), (h // 2, w // 2)]  # the last one is off
    maps = [setup.map(n, c, *size) for size in sizes]
    if not adaptive:
        maps[-1].requires_grad_(False)
    return error(lambda decoder, *encoders: segops.partial_attention_gate(decoder, encoders, merge=merge), maps)


def pool(kernel_size, setup):
    n, c, h, w = setup.shape
    tensors = [setup.map(n, c, 2 * h + 1, 2 * w - 1)]
    return max(
        error(lambda input: segops.max_pool2d_with_offsets(input, kernel_size)[0], tensors),
        mismatch(lambda input: segops.max_pool2d_with_offsets(input, kernel_size)[1], tensors),
    )


def unpool(kernel_size, setup):
    n, c, h, w = setup.shape
    size = 2 * h + 1, 2 * w - 1
    with segops.backend("reference"):
        pooled, offsets = segops.max_pool2d_with_offsets(setup.map(n, c, *size).detach(), kernel_size)
    tensors = [pooled.requires_grad_(), offsets]
    return error(lambda pooled, offsets: segops.max_unpool2d_with_offsets(pooled, offsets, kernel_size, size), tensors)


def argmax(regions, setup):
    n, c, h, w = setup.shape
    size = 4 * h + 1, 4 * w - 1
    logits = setup.map(n, c, h, w).detach()
    if regions:
        coarse = F.interpolate(logits[:, :, :2, :3].float(), (h, w), mode="bicubic")
        logits = (4 * coarse + 0.1 * logits).to(logits).contiguous(memory_format=FORMATS[setup.memory_format])
    classes = segops.upsample_argmax(*on_device([logits]), size).cpu()
    plain = F.interpolate(logits, size, mode="bilinear").argmax(1)
    truth = F.interpolate(logits.double(), size, mode="bilinear")
    return bench_argmax.shortfall(classes, truth) / max(1e-6, 2 * bench_argmax.shortfall(plain, truth))


# (op, trial): a function of a Setup that returns the error over its bound.
TRIALS = {
    ("pac", "sum"): partial(pac, False, "sum"),
    ("pac", "sum, more filters than channels"): partial(pac, True, "sum"),
    ("pac", "concat"): partial(pac, True, "concat"),
    ("bal", "edge"): partial(edge, None),
    ("bal", "edge, normalised"): partial(edge, "max"),
    ("bal", "cross entropy with weights"): cross_entropy,
    ("bal", "boundary-aware loss"): partial(boundary_loss, 4, {}),
    ("bal", "boundary-aware loss with options"): partial(boundary_loss, 3, LOSS_OPTIONS),
    ("bal", "boundary-aware loss, a map, at full size"): partial(boundary_loss, 1, {"reduction": "none"}),
    ("pag", "gate concat"): partial(gate, "concat", False),
    ("pag", "gate sum"): partial(gate, "sum", False),
    ("pag", "gate concat, adaptive windows"): partial(gate, "concat", True),
    ("pag", "gate sum, adaptive windows"): partial(gate, "sum", True),
    ("pag", "pool 2"): partial(pool, 2),
    ("pag", "pool 3x2"): partial(pool, (3, 2)),
    ("pag", "unpool 2"): partial(unpool, 2),
    ("argmax", "regions"): partial(argmax, True),
    ("argmax", "noise"): partial(argmax, False),
}


def run_trial(trial, setup):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ratio = trial(setup)
    return {"error": ratio} | ({} if ratio <= 1 else {"failed": f"error {ratio:.3g} times its bound"})


def cases(options):
    """All trials on all setups. A trial in one dtype is a group: Triton compiles it once."""
    tiny = options.tiny or DEVICE == "cpu"
    setups = [
        Setup(dtype, memory_format, packed, tiny)
        for packed, memory_format, dtype in itertools.product((True, False), FORMATS, DTYPES)
    ]
    trials = {names: trial for names, trial in TRIALS.items() if options.only in (None, names[0])}
    if DEVICE == "cpu" and options.backend == "triton":
        # Triton's interpreter takes seconds for a trial, and truncates to bfloat16.
        setups = setups[:1]
        trials = {names: trials[names] for names in {names[0]: names for names in trials}.values()}
    groups = {group: i for i, group in enumerate(itertools.product(DTYPES, trials))}
    return [
        Case(f"{' '.join(names)} {setup}", partial(run_trial, trial, setup), groups[setup.dtype, names])
        for setup in setups
        for names, trial in trials.items()
    ]
