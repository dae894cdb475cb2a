"""The dense CRF and its filter against pydensecrf2, which is Krähenbühl and Koltun's code, and plain PyTorch. Run through
`python -m benchmarks`, or pytest --benchmark-only.

pydensecrf2 is built from source; where that failed, it is left out, and the table's first line says so.
"""

import functools
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segops
from segops.ops.crf import reference

from . import measure, scene, trials
from .measure import DEVICE

try:
    from pydensecrf.densecrf import DenseCRF2D
except ImportError:
    DenseCRF2D = None


@dataclass(frozen=True)
class Case:
    what: str  # "dense_crf", with its defaults; "layer", a training step of `segops.nn.CRF`; "filter", `permutohedral_filter`
    shape: tuple  # N, C, H, W
    threads: int | None = None  # by default PyTorch's
    bars: tuple = ()  # (pass, baseline, least ratio)

    def __str__(self):
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.what} {'x'.join(map(str, self.shape))}{threads}"


CASES = [
    Case("dense_crf", (1, 21, 513, 513), 1, (("forward", "pydensecrf2", 3.0),)),
    Case("dense_crf", (1, 21, 513, 513), 2, (("forward", "pydensecrf2", 5.0),)),
    Case("dense_crf", (1, 21, 321, 321), 1, (("forward", "pydensecrf2", 2.7),)),
    Case("dense_crf", (1, 21, 321, 321), 2),
    Case("dense_crf", (8, 21, 321, 321), 2, (("forward", "single calls", 1.0),)),
    Case("layer", (1, 21, 321, 321), 1, (("backward", "its forward", 0.4),)),
    Case("layer", (1, 21, 321, 321), 2, (("backward", "its forward", 0.4),)),
    Case("filter", (1, 21, 513, 513), 1),
    Case("filter", (1, 21, 513, 513), 2),
]
PASSES = {"dense_crf": ("forward",), "layer": ("forward", "full", "backward"), "filter": ("forward",)}
ITERATIONS = {"dense_crf": 10, "layer": 5, "filter": 1}

HEADLINE = measure.Headline(
    [Case("layer", (1, 21, 321, 321)) if DEVICE == "cuda" else Case("layer", (1, 5, 9, 11))], eager="reference"
)

# Largest differences from float64: of probabilities; of filtered values and of gradients, in relative norm.
BOUNDS = {torch.float32: (1e-4, 1e-5, 1e-3), torch.bfloat16: (2e-3, 3e-3, 4e-3), torch.float16: (3e-4, 4e-4, 1e-3)}
OTHER_LABELS = 0.002  # share of pixels that pydensecrf2, whose spatial kernel is another lattice, may give another class


def arguments(case, seed=0):
    """Photographs that were drawn, and logits of their size as of a network with output stride 8; what the layer has learnt;
    or probabilities and features."""
    n, classes, *size = case.shape
    scenes = [scene.draw(size, seed + i) for i in range(n)]
    images = torch.stack([image for image, _ in scenes]).to(DEVICE)
    coarse = torch.stack([scene.coarse_logits(labels, classes, 8, seed=seed + i) for i, (_, labels) in enumerate(scenes)])
    logits = F.interpolate(coarse, size, mode="bilinear").to(DEVICE)
    if case.what == "filter":
        return [logits.softmax(1), reference.features_of(images, 67.0, 3.0).float()]
    if case.what == "dense_crf":
        return [logits, images]
    return [logits.requires_grad_(), images, *segops.nn.CRF(classes, device=DEVICE).parameters()]


def function(case):
    """What is timed, as a function of the arguments."""
    if case.what == "filter":
        return lambda values, features: segops.permutohedral_filter(values, features, normalization="after")
    if case.what == "dense_crf":
        return lambda logits, images: segops.dense_crf(logits, images)
    layer = segops.nn.CRF(case.shape[1])
    names = [name for name, _ in layer.named_parameters()]

    def step(logits, images, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (logits, images))

    return step


def by_reference(function):
    def call(*tensors):
        with segops.backend("reference"):
            return function(*tensors)

    return call


def single_calls(logits, images):
    return [segops.dense_crf(*pair) for pair in zip(logits.split(1), images.split(1), strict=True)]


def pydensecrf(logits, images, spatial=True):
    """Q by pydensecrf2 with the defaults of `segops.dense_crf`: it takes one image, and builds its lattices for each."""
    n, classes, height, width = logits.shape
    result = np.empty(logits.shape, dtype=np.float32)
    unaries = np.ascontiguousarray(-logits.flatten(2).cpu().numpy())
    pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
    for i in range(n):
        crf = DenseCRF2D(width, height, classes)
        crf.setUnaryEnergy(unaries[i])
        if spatial:
            crf.addPairwiseGaussian(sxy=1, compat=3)
        crf.addPairwiseBilateral(sxy=67, srgb=3, rgbim=pixels[i], compat=4)
        result[i] = np.reshape(crf.inference(ITERATIONS["dense_crf"]), (classes, height, width))
    return torch.from_numpy(result)


def probabilities(log_q):
    return log_q.double().exp()


def over(error, bound):
    """The ratio; infinite where it is NaN."""
    ratio = float(error) / bound
    return ratio if ratio == ratio else float("inf")


def error_over_bounds(what, values, truth):
    """The largest error of [result, *gradients] over its bound."""
    of_q, of_filter, of_gradients = BOUNDS[values[0].dtype]
    if what == "filter":
        ratios = [over(measure.relative_error(values[0], truth[0]), of_filter)]
    else:
        ratios = [over((probabilities(values[0]) - probabilities(truth[0])).abs().max(), of_q)]
    pairs = zip(values[1:], truth[1:], strict=True)
    return max(ratios + [over(measure.relative_error(value, exact), of_gradients) for value, exact in pairs])


def gate(case):
    """The largest error over its bound: above 1 is wrong. On a part of the first image, which float64 can afford; and of the
    whole image the share of classes that are not pydensecrf2's."""
    _, classes, height, width = case.shape
    tensors = arguments(replace(case, shape=(1, classes, height, width)))
    y, x = max(0, height // 2 - 48), max(0, width // 2 - 48)
    maps = [each.detach()[..., y : y + 97, x : x + 97].requires_grad_(each.requires_grad) for each in tensors[:2]]
    part = [*maps, *tensors[2:]]
    exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in part]
    values = measure.outputs_and_gradients(function(case), part)
    truth = measure.outputs_and_gradients(by_reference(function(case)), exact)
    error = error_over_bounds(case.what, values, truth)
    if case.what != "dense_crf" or DenseCRF2D is None:
        return error
    differ = segops.dense_crf(*tensors).argmax(1).cpu() != pydensecrf(*tensors).argmax(1)
    return max(error, over(differ.double().mean(), OTHER_LABELS))


def functions(case):
    """{name: function} of segops and its baselines."""
    own = function(case)
    found = {"segops": own}
    if case.what == "dense_crf" and DenseCRF2D is not None:
        found["pydensecrf2"] = pydensecrf
    if case.shape[0] > 1:
        found["single calls"] = single_calls
    elif case.what != "dense_crf" or case.threads != 2 or len(found) == 1:  # it takes 20 s
        found["reference"] = by_reference(own)
    return found


def calls(case, kind, functions):
    """{name: the call to time}. "backward" is that pass alone, and beside it the forward pass of a training step."""
    tensors = arguments(case)
    if kind != "backward":
        return {name: measure.timed_call(function, tensors, kind) for name, function in functions.items()}
    timed = {name: backward_call(function, tensors) for name, function in functions.items()}
    return timed | {"its forward": lambda: functions["segops"](*tensors)}


def backward_call(function, tensors):
    result = function(*tensors)
    grad, inputs = torch.randn_like(result), [each for each in tensors if each.requires_grad]
    return lambda: torch.autograd.grad(result, inputs, grad, retain_graph=True)


@functools.cache
def vertices(shape):
    """How many the lattice of the first image has."""
    _, images = arguments(Case("dense_crf", (1, *shape[1:])))
    index, *_ = reference.lattice(reference.features_of(images, 67.0, 3.0).flatten(2))
    return int(index.max()) + 1


def floor(case, kind):
    """Milliseconds to move what the filter reads and writes at the measured bandwidth: values of pixels once each, the vertices
    of each pixel and their weights twice, values of vertices by the splat, by d + 1 blurs and by the slice, and their neighbours.
    The backward pass filters as often, and reads what the forward pass kept. What stays in cache is faster."""
    n, classes, height, width = case.shape
    pixels, points, corners = height * width, vertices(case.shape), 6
    numbers = 2 * classes * (pixels + (corners + 1) * points) + 2 * corners * (2 * pixels + points)
    numbers *= {"forward": 1, "full": 2, "backward": 1}[kind]
    numbers += {"forward": 0, "full": 2, "backward": 1}[kind] * classes * pixels
    return n * ITERATIONS[case.what] * 4 * numbers / measure.copy_rate(DEVICE) * 1e3


def allowed(case, kind):
    """Most bytes that dense_crf may take: 2 (d + 1) H W (min(C, 32) + 8) numbers of scratch, whatever N, and the result; for the
    backward pass Q of each iteration, the lattice with its weights, and the gradient."""
    n, classes, height, width = case.shape
    pixels, corners = height * width, 6
    scratch = 2 * corners * pixels * (min(classes, 32) + 8)
    kept = n * classes * pixels
    if kind != "forward":
        kept += n * pixels * (classes * (ITERATIONS[case.what] + 1) + (corners + 1) ** 2)
    return 4 * (scratch + kept)


def peak(call):
    """pydensecrf2's memory is not PyTorch's."""
    if DEVICE == "cpu" and sys.platform == "linux":
        return measure.peak_resident(call)
    return measure.peak_memory(call, DEVICE)


def draw():
    return [torch.randn(1, 5, 4, 4), torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)]


once = partial(segops.dense_crf, iterations=1)
CALLS = {"dense_crf, one iteration": measure.Call(draw, once, by_reference(once), {"forward": 0.05, "full": 0.05})}


# What benchmarks/gpu.sh tries first: functions of a `trials.Setup` that return error over bound.


def photographs(n, size, seed=0):
    return torch.stack([scene.draw(size, seed + i)[0] for i in range(n)])


def trial(what, function, tensors):
    """Where there are no kernels the reference runs."""
    values = [value.cpu() for value in measure.outputs_and_gradients(function, trials.on_device(tensors))]
    exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
    truth = measure.outputs_and_gradients(by_reference(function), exact, values[0].dtype)
    return error_over_bounds(what, values, truth)


def crf_trial(normalization, setup):
    """Logits of a lower resolution, weights of each class, compatibility."""
    n, c, h, w = setup.shape
    weights = [torch.linspace(low, high, c).to(setup.dtype).requires_grad_() for low, high in ((2, 4), (5, 3))]
    compatibility = (torch.eye(c) - 0.1).to(setup.dtype).requires_grad_()
    tensors = [setup.map(n, c, h, w), photographs(n, (2 * h + 1, 2 * w - 1)), *weights, compatibility]

    def refine(logits, images, spatial, bilateral, compatibility):
        return segops.dense_crf(
            logits,
            images,
            iterations=3,
            spatial_weight=spatial,
            bilateral_weight=bilateral,
            compatibility=compatibility,
            normalization=normalization,
        )

    return trial("dense_crf", refine, tensors)


def filter_trial(normalization, setup):
    n, c, h, w = setup.shape
    features = reference.features_of(photographs(n, (h, w)), 8.0, 20.0).float()
    run = partial(segops.permutohedral_filter, normalization=normalization)
    return trial("filter", run, [setup.map(n, c, h, w), features])


TRIALS = {
    "dense_crf, symmetric": partial(crf_trial, "symmetric"),
    "dense_crf, after": partial(crf_trial, "after"),
    "filter": partial(filter_trial, None),
    "filter, symmetric": partial(filter_trial, "symmetric"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_crf(benchmark, case):
    rows = []
    with measure.threads(case.threads):
        error = gate(case)
        assert error <= 1, f"wrong by {error:.2f} times the bound: no time is reported"
        results = {}
        for kind in PASSES[case.what]:
            timed = calls(case, kind, functions(case))
            results[kind] = timed, measure.compare(timed, DEVICE), {name: peak(call) for name, call in timed.items()}
    for kind, (timed, times, memory) in results.items():
        bars = {baseline: (least, None) for held, baseline, least in case.bars if held == kind}
        beside = [name for name in timed if name != "segops"]
        bound = None if case.what == "filter" or kind == "backward" else allowed(case, kind)
        rows += measure.rows(kind, timed, times, beside, floor(case, kind), bars, DEVICE, memory=memory, allowed=bound)
    environment = measure.environment(DEVICE) | {"pydensecrf2": measure.version_of("pydensecrf2") or "not installed"}
    benchmark.extra_info.update(op="crf", case=str(case), gate=error, rows=rows, environment=environment)
    benchmark.pedantic(timed["segops"], rounds=3)
