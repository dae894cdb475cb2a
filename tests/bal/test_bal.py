"""The boundary-aware loss: mathematics and accuracy, on every backend that runs here."""

import importlib
import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import segops
from benchmarks import measure
from segops.ops.bal import reference
from segops.ops.bal.edge import EdgeSettings
from segops.ops.bal.op import LossSettings

from ..accuracy import relative_error
from ..compile_triton import variants
from ..targets import (
    CUDA,
    DTYPES,
    EMULATED,
    EMULATED_OPS,
    FAST,
    INTERPRETED,
    ON_LINUX,
    REFERENCE,
    TARGETS,
    compiled_targets,
    fast_implementations,
    fast_targets,
    interpreted,
    matrix,
    needs_much_gpu_memory,
    on_a_gpu,
    runs,
)
from .conftest import (
    Case,
    assert_accurate,
    assert_all_close,
    draw_labels,
    edge_map,
    output_and_gradient,
    reference_classes,
)
from .test_contract import L, Z

# The paper's Table 1: kernel, down, size, sigma, beta.
TABLE_1 = [("linear", down, size, 1.0, beta) for down, size, beta in ((1, 15, 0.3), (2, 15, 0.3), (2, 15, 0.5))]
TABLE_1 += [("linear", 4, size, 1.0, 0.5) for size in (15, 25, 35)]
TABLE_1 += [("gaussian", down, 15, 1.0, 0.3) for down in (1, 2, 4)] + [("gaussian", 4, size, 1.0, 0.3) for size in (25, 35)]
TABLE_1 += [("gaussian", 4, 35, sigma, 0.5) for sigma in (1.0, 2.0, 3.0)]


# The oracle itself, against code as literal as the paper.


def literal_edges(labels, classes):
    """Sum of the paper's edge planes, one pixel and one class at a time."""
    n, height, width = labels.shape
    total = torch.zeros(n, height, width, dtype=torch.float64)
    for image, y, x, i in torch.cartesian_prod(*(torch.arange(size) for size in (n, height, width, classes))).tolist():
        here, right, lower = (
            float(labels[image, min(y + dy, height - 1), min(x + dx, width - 1)] == i) for dy, dx in ((0, 0), (0, 1), (1, 0))
        )
        total[image, y, x] += abs(here - right / 2 - lower / 2) > 0
    return total


def literal_kernel(kernel, n, sigma):
    centre = n // 2
    values = [
        math.exp(-((x - centre) ** 2 + (y - centre) ** 2) / (n * sigma))
        if kernel == "gaussian"
        else n - (abs(x - centre) + abs(y - centre))
        for y in range(n)
        for x in range(n)
    ]
    least, most = min(values), max(values)
    return torch.tensor([(value - least) / (most - least) for value in values], dtype=torch.float64).view(n, n)


def shrink(size, out):
    """(out, size): an antialiased bilinear resize, whose triangle is as wide as the scale."""
    scale, rows = size / out, torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        for j in range(size):
            rows[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * scale) / scale)
    return rows / rows.sum(1, keepdim=True)


def stretch(size, out):
    """(out, size): a bilinear resize with align_corners=False."""
    rows = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        at = min(max((i + 0.5) * size / out - 0.5, 0), size - 1)
        low = math.floor(at)
        rows[i, low] += 1 - (at - low)
        rows[i, min(low + 1, size - 1)] += at - low
    return rows


def literal_gaussian_edge(labels, classes, kernel, kernel_size, sigma, beta, downsample, normalize):
    height, width = labels.shape[1:]
    small = math.ceil(height / downsample), math.ceil(width / downsample)
    edges = shrink(height, small[0]) @ literal_edges(labels, classes) @ shrink(width, small[1]).T
    f, reach = literal_kernel(kernel, kernel_size, sigma), kernel_size // 2
    padded = F.pad(edges, (reach,) * 4)
    blurred = torch.zeros_like(edges)
    for dy in range(kernel_size):
        for dx in range(kernel_size):
            blurred += f[dy, dx] * padded[:, dy : dy + small[0], dx : dx + small[1]]
    if normalize == "max":
        blurred = torch.stack([each / each.max() if each.max() > 0 else each for each in blurred])
    edge = stretch(small[0], height) @ blurred @ stretch(small[1], width).T + beta
    return edge / edge.mean((1, 2), keepdim=True) if normalize == "mean" else edge


@pytest.mark.parametrize("height, width", [(9, 11), (8, 12), (1, 7), (6, 1)])
@pytest.mark.parametrize("normalize", [None, "max", "mean"])
def test_reference_edge_is_the_paper(height, width, normalize):
    labels = draw_labels(2, 3, height, width)
    labels[1] = 2 - labels[1].where(labels[1] != 255, -253)  # another image, voids kept
    for kernel, size, downsample in (("gaussian", 5, 2), ("linear", 3, 1), ("gaussian", 7, 3), ("linear", 5, 4)):
        arguments = kernel, size, 1.5, 0.3, downsample, normalize
        value = reference.gaussian_edge(reference_classes(labels, 3), 3, EdgeSettings(*arguments, 255), torch.float64)
        torch.testing.assert_close(value, literal_gaussian_edge(labels, 3, *arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_reference_kernel_is_equation_5_or_6(kernel):
    for size in (3, 5, 35):
        f = reference.blur_kernel(kernel, size, 3.0)
        torch.testing.assert_close(f, literal_kernel(kernel, size, 3.0), rtol=1e-14, atol=1e-15)
        assert f.min() == 0 and f.max() == 1 == f[size // 2, size // 2]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_reference_loss_is_the_formula(reduction, label_smoothing):
    """One pixel at a time: -log softmax of resized logits, class weights as in F.cross_entropy, "mean" over the valid pixels."""
    logits, labels = torch.randn(2, 3, 2, 4, dtype=torch.float64), draw_labels(2, 3, 5, 6)
    class_weight, pixel_weight = torch.rand(3, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)
    resized = stretch(2, 5) @ logits @ stretch(4, 6).T
    weight = stretch(3, 5) @ pixel_weight @ stretch(2, 6).T
    expected = torch.zeros(2, 5, 6, dtype=torch.float64)
    for n, y, x in (labels != 255).nonzero().tolist():
        z, label = resized[n, :, y, x], labels[n, y, x]
        by_class = class_weight * (z.exp().sum().log() - z)
        loss = (1 - label_smoothing) * by_class[label] + label_smoothing / 3 * by_class.sum()
        expected[n, y, x] = weight[n, y, x] * loss
    if reduction != "none":
        expected = expected.sum() / ((labels != 255).sum() if reduction == "mean" else 1)
    settings = LossSettings(label_smoothing, 255, reduction)
    value = reference.upsample_cross_entropy(logits, reference_classes(labels, 3), pixel_weight, class_weight, settings)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


# The edge map.


def counted_edges(labels, classes, **settings):
    """E itself: nothing resized, blurred or added."""
    return segops.gaussian_edge(labels, classes, kernel_size=1, downsample=1, beta=0, **settings)


def test_edges_count_the_classes_that_meet(implementation):
    """Distinct valid classes among a pixel, its right and its lower neighbour, 0 when all agree. Voids are of no class, and their
    borders are edges; the image's own are not, as its last row and column repeat."""
    device, _ = implementation
    for ignore_index in (255, 1):
        labels = draw_labels(2, 4, 11, 13, ignore_index=ignore_index)
        labels[0, 5:, 6:] = ignore_index
        expected = torch.zeros(2, 11, 13)
        for n, y, x in (labels == labels).nonzero().tolist():
            seen = {labels[n, y, x].item(), labels[n, y, min(x + 1, 12)].item(), labels[n, min(y + 1, 10), x].item()}
            expected[n, y, x] = len(seen - {ignore_index}) if len(seen) > 1 else 0
        assert {0, 1, 2, 3} == set(expected.flatten().tolist())
        assert torch.equal(counted_edges(labels.to(device), 4, ignore_index=ignore_index).cpu(), expected)
        if ignore_index == 255:
            assert torch.equal(expected.double(), literal_edges(labels, 4))


@fast_implementations
def test_a_line_vanishes_at_no_offset(implementation):
    """What antialiasing is for: without it the edge between two columns falls between the samples."""
    device, _ = implementation
    totals = []
    for column in range(8, 16):
        labels = torch.zeros(1, 24, 24, dtype=torch.int64, device=device)
        labels[:, :, column:] = 1
        totals.append(segops.gaussian_edge(labels, 2, kernel_size=1, beta=0).mean().item())
    assert min(totals) > 0.7 * max(totals) > 0


@fast_implementations
@pytest.mark.parametrize("kernel, downsample, kernel_size, sigma, beta", TABLE_1)
def test_edge_accuracy_in_table_1(implementation, kernel, downsample, kernel_size, sigma, beta):
    device, _ = implementation
    labels = draw_labels(2, 21, 37, 53)
    given = dict(kernel=kernel, kernel_size=kernel_size, sigma=sigma, beta=beta, downsample=downsample)
    for normalize in (None, "max", "mean"):
        value = segops.gaussian_edge(labels.to(device), 21, normalize=normalize, **given)
        assert value.dtype == torch.float32 and not value.requires_grad
        assert relative_error(value, edge_map(labels, 21, normalize=normalize, **given)) <= 1e-6, normalize


@pytest.mark.parametrize("height, width", [(513, 513), (66, 121), (37, 53), (1, 67), (70, 1), (1, 1), (2, 3), (5, 130)])
def test_edge_accuracy_by_size(implementation, height, width):
    device, _ = implementation
    if (implementation == INTERPRETED and height * width > 1000) or (implementation[1] == "reference" and height == 513):
        pytest.skip("too slow")
    labels = draw_labels(1, 19, height, width)
    for downsample in (4,) if height == 513 or implementation == INTERPRETED else (1, 3, 4, 7):
        value = segops.gaussian_edge(labels.to(device), 19, downsample=downsample)
        assert value.shape == labels.shape
        assert relative_error(value, edge_map(labels, 19, downsample=downsample)) <= 1e-6, downsample


@pytest.mark.parametrize(
    "dtype, ignore_index",
    [(torch.int64, 255), (torch.int64, -1), (torch.int32, -100), (torch.int32, 2**40), (torch.uint8, 0), (torch.uint8, -1)],
)
def test_edge_of_labels_of_any_dtype_and_stride(implementation, dtype, ignore_index):
    device, _ = implementation
    labels, settings = (
        draw_labels(3, 6, 20, 33, dtype, ignore_index),
        dict(ignore_index=ignore_index, kernel_size=7, downsample=2),
    )
    buffer = torch.zeros(3, 22, 70, dtype=dtype, device=device)
    buffer[:, 1:-1, 2:-2:2] = labels.to(device)
    views = {
        "slice": buffer[:, 1:-1, 2:-2:2],
        "transposed": labels.to(device).transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": labels[:1].to(device).expand(3, -1, -1),
    }
    for name, view in views.items():
        if implementation != INTERPRETED or name == "slice":
            value = segops.gaussian_edge(view, 6, **settings)
            assert relative_error(value, edge_map(view.cpu(), 6, **settings)) <= 1e-6, name


def test_more_classes_than_a_byte_counts(implementation):
    device, _ = implementation
    labels = torch.arange(700, device=device).view(1, 20, 35)
    inside = counted_edges(labels, 700, ignore_index=-1)[:, :-1, :-1]
    assert inside.eq(3).all()


@fast_implementations
def test_normalize(implementation):
    device, _ = implementation
    labels = draw_labels(3, 5, 37, 53).to(device)
    labels[2] = 3  # no edge at all
    edge = segops.gaussian_edge(labels, 5, normalize="max", beta=0.25, downsample=1, kernel_size=5)
    torch.testing.assert_close(edge[:2].amax((1, 2)), torch.full((2,), 1.25, device=device))
    edge = segops.gaussian_edge(labels, 5, normalize="max", beta=0.25)
    assert edge.min() >= 0.25 - 1e-6 and edge.max() <= 1.25 + 1e-6
    torch.testing.assert_close(edge[2], torch.full_like(edge[2], 0.25))
    for downsample in (1, 4, 5):
        edge = segops.gaussian_edge(labels, 5, normalize="mean", downsample=downsample)
        torch.testing.assert_close(edge.mean((1, 2)), torch.ones(3, device=device))
        assert edge[0].std() > 0.01
    for beta in (0.0, 0.5):
        for normalize, flat in ((None, beta), ("max", beta), ("mean", 1.0)):
            edge = segops.gaussian_edge(labels, 5, normalize=normalize, beta=beta)[2]
            torch.testing.assert_close(edge, torch.full_like(edge, flat))


def triton_kernels():
    pytest.importorskip("triton")
    return importlib.import_module("segops.ops.bal.triton_kernels")


def any_kernel(test):
    test = pytest.mark.parametrize("kernel", ["gaussian", "linear"])(test)
    test = pytest.mark.parametrize("kernel_size", [3, 5, 15, 35, 255])(test)
    return pytest.mark.parametrize("sigma", [0.05, 1.0, 3.0, 100.0, 1e4])(test)


@fast_implementations
@any_kernel
def test_blur_of_a_single_label(implementation, kernel, kernel_size, sigma):
    """The kernel itself, up to where it leaves the map."""
    device, _ = implementation
    labels = torch.zeros(1, 40, 61, dtype=torch.int64)
    labels[0, 19, 30] = 1
    given = dict(kernel=kernel, kernel_size=kernel_size, sigma=sigma, beta=0, downsample=1)
    value = segops.gaussian_edge(labels.to(device), 2, **given)
    assert relative_error(value, edge_map(labels, 2, **given)) <= 1e-6
    assert kernel == "linear" or (value >= 0).all()  # nothing cancels


@any_kernel
def test_blur_kernels_have_rank_two(kernel, kernel_size, sigma):
    factors = triton_kernels().blur_factors(kernel, kernel_size, sigma, torch.device("cpu"))
    assert factors.dtype == torch.float32 and factors.shape == (4, kernel_size)
    u1, v1, u2, v2 = factors.double()
    f = reference.blur_kernel(kernel, kernel_size, sigma)
    assert relative_error(torch.outer(u1, v1) + torch.outer(u2, v2), f) <= 1e-6
    if kernel == "gaussian":
        assert (factors >= 0).all()  # nothing cancels


def test_blur_factors_are_made_once_and_where_they_are_used():
    """A CUDA graph's capture allows no copy from the host."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.update(each.device.type for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor))
            return result

    blur_factors = triton_kernels().blur_factors
    seen, cpu = set(), torch.device("cpu")
    with Devices():
        assert blur_factors("gaussian", 7, 2.5, torch.device("meta")).shape == (4, 7)
    assert seen == {"meta"}
    assert blur_factors("gaussian", 7, 2.5, cpu) is blur_factors("gaussian", 7, 2.5, cpu)


# The losses.

CASES = [
    # By a whole number, as 65 -> 513.
    Case((2, 21, 5, 9), (33, 65)),
    # By fractions; weights of another size again, resized too; channels that lie side by side.
    Case((2, 19, 7, 9), (30, 41), pixel_weight=(8, 11), channels_last=True, label_dtype=torch.uint8),
    # Not resized: the softmax reads logits where they lie.
    Case((2, 21, 13, 16), (13, 16), pixel_weight=(4, 4), reduction="none", label_dtype=torch.uint8),
    Case((2, 19, 13, 17), (13, 17), class_weight=True, label_smoothing=0.1, channels_last=True, ignore_index=0),
    # One axis alone; weights of the labels' size.
    Case((1, 5, 6, 8), (6, 23), pixel_weight=(6, 23), reduction="sum", label_dtype=torch.int32),
    # From one logit: both of its neighbours are itself.
    Case((2, 3, 1, 1), (5, 7), pixel_weight=(1, 1), class_weight=True, reduction="none"),
    # To fewer pixels, along one axis and both: logits that no pixel lies next to get no gradient.
    Case((1, 4, 4, 13), (11, 6), channels_last=True, class_weight=True),
    Case((2, 4, 12, 13), (5, 6), label_smoothing=0.1, reduction="none", ignore_index=-100),
    # One class: the loss is 0. More classes than a block takes, and nothing but smoothing.
    Case((1, 1, 3, 4), (9, 10), pixel_weight=(9, 10), reduction="sum"),
    Case((1, 70, 5, 4), (15, 16), class_weight=True, label_smoothing=0.1, channels_last=True, reduction="none"),
    Case((1, 150, 4, 5), (9, 17), label_smoothing=1.0, class_weight=True, reduction="sum"),
    # Columns of labels, of one and of more than a block has threads, that a logit is summed over.
    Case((2, 2, 9, 3), (40, 1), label_smoothing=1.0, reduction="sum", label_dtype=torch.int32, ignore_index=-1),
    Case((1, 9, 2, 2), (3, 700), reduction="sum"),
]
# What the tiles of the CUDA kernels have to be right about: cells, label pixels, classes.
TILES = [
    # Cells in more than one tile along both axes: few, whose indices take 32 bits; many: 64.
    Case((1, 2, 10, 40), (40, 66), pixel_weight=(20, 33), reduction="sum"),
    Case((1, 3, 9, 40), (70, 330), label_smoothing=0.1, class_weight=True),
    # Cells of more label pixels than a tile, along both axes and along one; of one logit, one cell.
    Case((2, 3, 1, 1), (70, 300), pixel_weight=(9, 30)),
    Case((1, 5, 2, 2), (9, 700), label_smoothing=0.1),
    Case((1, 2, 1, 40), (300, 43), channels_last=True),
    # As many label pixels as logits, more or less; and fewer: tiles without a label pixel.
    Case((1, 2, 40, 70), (41, 69), reduction="sum"),
    Case((1, 3, 150, 5), (7, 160), class_weight=True),
    Case((1, 2, 70, 80), (1, 1), reduction="sum"),
    # More classes than fit at once, also where nothing is resized.
    Case((1, 1030, 2, 3), (4, 5), class_weight=True, label_smoothing=0.1),
    Case((1, 261, 3, 2), (3, 2), class_weight=True, label_smoothing=0.1, channels_last=True, ignore_index=-1),
]
# One pixel less than a vector, one more than a vector, than a block of vectors, than two.
TAILS = [Case((1, 3, 2, -(-width // 4)), (5, width), (2, 1 + width // 3), reduction="none") for width in (1, 15, 17, 65, 130)]
TAILS += [Case((1, 3, 2, width), (2, width), reduction="sum") for width in (15, 65)]
# The same of classes, which are 8 in a block of a GPU.
TAILS += [Case((1, c, 2, 3), (5, 7), channels_last=c % 2 == 0, class_weight=c > 8, reduction="none") for c in (2, 7, 8, 9, 33)]
BOUNDARY_CASES = [
    Case((2, 21, 5, 7), (33, 53), edge={}),
    Case((2, 19, 9, 9), (30, 41), edge={"normalize": "mean"}, channels_last=True, label_dtype=torch.uint8),
    Case((1, 4, 9, 8), (9, 8), edge={"normalize": "max", "beta": 0.3}, class_weight=True, reduction="sum"),
    Case((1, 7, 3, 17), (11, 17), edge={"kernel": "linear", "kernel_size": 15, "downsample": 2}, reduction="none"),
    Case((2, 5, 4, 4), (15, 14), edge={"downsample": 1, "kernel_size": 5}, label_smoothing=0.1, ignore_index=0),
    Case((1, 3, 9, 7), (5, 6), edge={"downsample": 9, "kernel_size": 1}, label_dtype=torch.int32, ignore_index=-1),
]
HALVES = (*CASES[:4], *BOUNDARY_CASES[:2])  # which differ from float32 in how logits are read and gradients written


def matters(target, dtype, case):
    if target == INTERPRETED:  # which computes in float32 whatever the dtype, and takes seconds
        return dtype == torch.float32 and case.rounds() <= 150
    return runs(target, dtype) and (dtype in (torch.float32, torch.float64) or case in HALVES)


@pytest.mark.parametrize(
    "target, dtype, case", matrix(TARGETS, DTYPES, CASES + TILES + TAILS + BOUNDARY_CASES, when=matters), indirect=["target"]
)
def test_accuracy(target, dtype, case):
    assert_accurate(case, dtype, target[0])


@fast_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_accuracy_at_the_size_of_training(dtype, target):
    """Rows in many blocks, sums over tens of thousands of pixels."""
    for case in (Case((1, 19, 17, 33), (129, 257), edge={}), Case((1, 19, 17, 33), (129, 257), channels_last=True)):
        assert_accurate(case, dtype, target[0])


CELLS = (
    Case((2, 9, 3, 3), (5, 7), class_weight=True, label_smoothing=0.1, reduction="none"),
    Case((1, 3, 2, 35), (3, 40), (2, 7), reduction="sum"),
    Case((1, 9, 3, 4), (3, 4), reduction="none"),
)


@interpreted
@pytest.mark.parametrize("case", CELLS, ids=str)
def test_triton_cells_row_by_row(case, monkeypatch):
    """As sums of cells have it that do not fit the workspace at once; and with 64-bit positions."""
    with segops.backend("triton"):
        whole = output_and_gradient(case.op, case.logits(torch.float32))
        monkeypatch.setattr(triton_kernels(), "LARGEST_WORKSPACE", 1)
        rows = output_and_gradient(case.op, case.logits(torch.float32))
        monkeypatch.setattr("segops.ops.common.triton_launch.SMALL", 1)
        wide = output_and_gradient(case.op, case.logits(torch.float32))
    for values in zip(whole, rows, wide, strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


@interpreted
def test_triton_gradient_needs_no_logits_at_the_labels_size(monkeypatch):
    """Sums of cells, at ratios where those of all cells would be larger than these logits."""
    empty, made = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(empty(*size, **options)) or made[-1])
    for size in ((40, 3), (17, 2)):
        made.clear()
        with segops.backend("triton"):
            output_and_gradient(Case((1, 2, 40, 2), size).op, torch.randn(1, 2, 40, 2, requires_grad=True))
        of_cells = [each.numel() for each in made if each.dim() == 4 and each.shape[1:] == (4, 2, 2)]
        assert len(of_cells) == 1 and of_cells[0] <= max(40 * 2, size[0] * size[1]) * 2 / 4


@interpreted
def test_triton_compiles_nothing_for_a_size(monkeypatch):
    """Of images, logits, labels, maps of weights, or the blur, nor for a number of classes."""
    seen = variants(triton_kernels(), monkeypatch)
    shapes = ((1, 3, 2, 3), (5, 7)), ((2, 16, 1, 4), (2, 5)), ((1, 9, 3, 1), (16, 2))
    each = []
    for kernel_size, (shape, size) in zip((3, 5, 7), shapes, strict=True):
        for reduction in ("sum", "none"):
            edge = dict(kernel_size=kernel_size, downsample=2)
            case = Case(shape, size, reduction=reduction, edge=edge, ignore_index=shape[1])
            with segops.backend("triton"):
                output_and_gradient(case.op, case.logits(torch.float32))
        each.append(set(seen))
    assert each[0] == each[2] and {"_count_edges", "_blur_x", "_softmax_loss", "_cell_grad"} <= {name for name, *_ in seen}


def test_nan_reaches_only_its_logits(target):
    """A gradient that is NaN at one pixel: only the four logits that it lies between are NaN."""
    logits = torch.randn(1, 9, 3, 4, device=target[0], requires_grad=True)
    labels = torch.randint(0, 9, (1, 10, 15)).to(target[0])
    loss = segops.upsample_cross_entropy(logits, labels, reduction="none")
    grad = torch.ones_like(loss)
    grad[0, 3, 6] = torch.nan
    (found,) = torch.autograd.grad(loss, logits, grad)
    touched = logits.detach().double().requires_grad_()
    resized = F.interpolate(touched, (10, 15), mode="bilinear")
    (expected,) = torch.autograd.grad(resized, touched, grad.isnan().double()[:, None].expand_as(resized))
    assert torch.equal(found.isnan(), expected != 0) and found.isnan().sum() == 9 * 4


@fast_targets
def test_accuracy_of_sums_over_many_blocks(target):
    """More than a block of a GPU has threads: their sums are added in rounds."""
    assert_accurate(Case((1, 2, 4, 5), (512, 520)), torch.float32, target[0])


@fast_targets
def test_a_loss_scale_comes_before_gradients_are_rounded(target):
    """The gradient of a mean, divided by the pixels, would be below float16's normal numbers: a scale would come too late."""
    logits = torch.tensor([12.0, 0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).half().to(target[0]).requires_grad_()
    loss = segops.upsample_cross_entropy(logits, torch.zeros(1, 256, 256, dtype=torch.int64, device=target[0]))
    (grad,) = torch.autograd.grad(loss * 2**16, logits)
    exact = 2**16 * torch.sigmoid(torch.tensor(-12.0, dtype=torch.float64)) / 4  # a quarter of the pixels for each logit
    for value, expected in zip(grad[0].cpu(), (-exact, exact), strict=True):
        assert ((value.double() / expected - 1).abs() < 1e-3).all()


# Where a sum's loss and gradient come from one pass, and a map's from two.
ONE_PASS = [
    # Several strips of logit rows, each shared by two; along y by 15: more label rows than a block.
    Case((2, 3, 9, 5), (140, 70), label_smoothing=0.1, class_weight=True, channels_last=True),
    # One row of logits, which has no next; one column.
    Case((1, 4, 1, 3), (40, 64), pixel_weight=(7, 9)),
    Case((1, 4, 3, 1), (40, 65)),
    # To fewer pixels: strips end at rows that no label lies next to.
    Case((1, 3, 80, 9), (45, 20), class_weight=True),
    Case((1, 2, 9, 40), (8, 7), label_smoothing=0.1),
    # Not resized, whole blocks and one pixel more; more rows than a strip.
    Case((1, 5, 17, 64), (17, 64), label_smoothing=0.1, pixel_weight=(17, 64)),
    Case((2, 5, 9, 65), (9, 65), class_weight=True, channels_last=True),
]


@fast_targets
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_a_sum_is_that_of_its_map(target, case):
    dtype, bound = (torch.float64, 1e-12) if runs(target, torch.float64) else (torch.float32, 1e-5)
    logits = case.logits(dtype, target[0])
    found = output_and_gradient(replace(case, reduction="sum").op, logits)
    expected = output_and_gradient(lambda z: replace(case, reduction="none").op(z).sum(), logits)
    for value, truth in zip(found, expected, strict=True):
        assert relative_error(value, truth) <= bound


@fast_targets
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_nan_logits_of_ignored_pixels_reach_nothing_else(target, reduction):
    labels = draw_labels(2, 5, 6, 33).to(target[0])
    logits, ignored = torch.randn(2, 5, 6, 33, device=target[0]), (labels == 255)[:, None].expand(2, 5, 6, 33)
    (loss, grad), (expected, expected_grad) = (
        output_and_gradient(
            lambda z: segops.upsample_cross_entropy(z, labels, reduction=reduction),
            logits.masked_fill(ignored, there).requires_grad_(),
        )
        for there in (torch.nan, 0)
    )
    assert torch.equal(loss, expected) and torch.equal(grad[~ignored], expected_grad[~ignored])


SMALL = st.integers(1, 9)


@compiled_targets
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 2), c=st.integers(1, 40), h=SMALL, w=SMALL, size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    shrunk=st.tuples(SMALL, SMALL), weighted=st.booleans(), class_weight=st.booleans(), label_smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["none", "sum", "mean"]), channels_last=st.booleans(),
)  # fmt: skip
def test_any_shape(target, n, c, h, w, size, shrunk, weighted, class_weight, label_smoothing, reduction, channels_last):
    pixel_weight = tuple(-(-full // by) for full, by in zip(size, shrunk, strict=True)) if weighted else None
    case = Case((n, c, h, w), size, pixel_weight, class_weight, label_smoothing, reduction, channels_last)
    device, backend = target
    dtype, bound = (torch.float64, 1e-11) if runs(target, torch.float64) else (torch.float32, 1e-5)
    with segops.backend(backend):
        values = output_and_gradient(case.op, case.logits(dtype, device))
    with segops.backend("reference"):
        truth = output_and_gradient(case.op, case.logits())
    for value, exact in zip(values, truth, strict=True):
        assert value.shape == exact.shape
        # Gradients may cancel; those of a mean are small themselves.
        assert (value.double().cpu() - exact).norm() <= bound * (exact.norm() + (0.1 if reduction == "mean" else 1))


@compiled_targets
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 2), classes=st.integers(1, 12), height=st.integers(1, 40), width=st.integers(1, 40),
    kernel=st.sampled_from(["gaussian", "linear"]), kernel_size=st.sampled_from([1, 3, 5, 13]), sigma=st.floats(0.01, 100),
    beta=st.floats(0, 2), downsample=st.integers(1, 9), normalize=st.sampled_from([None, "max", "mean"]),
)  # fmt: skip
def test_edge_of_any_shape(target, n, classes, height, width, **given):
    labels = draw_labels(n, classes, height, width)
    device, backend = target
    with segops.backend(backend):
        value = segops.gaussian_edge(labels.to(device), classes, **given).cpu()
    torch.testing.assert_close(value, edge_map(labels, classes, **given).float(), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction):
    labels, weight = draw_labels(1, 3, 5, 4), torch.rand(1, 3, 4)
    with segops.backend("native"):
        for shape in ((1, 3, 2, 3), (1, 3, 5, 4), (1, 3, 7, 2)):
            logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for loss in (
                lambda z: segops.upsample_cross_entropy(
                    z, labels, weight, class_weight=torch.tensor([0.3, 1, 2]), label_smoothing=0.2, reduction=reduction
                ),
                lambda z: segops.boundary_aware_loss(z, labels, kernel_size=5, downsample=2, reduction=reduction),
            ):
                assert torch.autograd.gradcheck(loss, logits)


def test_mean_is_over_valid_pixels_whatever_the_weights(implementation):
    """The paper's n; F.cross_entropy divides by the sum of the class weights."""
    device, _ = implementation
    logits, labels = torch.randn(2, 4, 9, 10, device=device), draw_labels(2, 4, 9, 10).to(device)
    class_weight = torch.tensor([5.0, 6, 7, 8], device=device)
    total = F.cross_entropy(logits, labels, class_weight, ignore_index=255, reduction="sum")
    value = segops.upsample_cross_entropy(logits, labels, class_weight=class_weight)
    torch.testing.assert_close(value, total / (labels != 255).sum())


@fast_implementations
def test_boundary_aware_loss_is_its_parts(implementation):
    device, _ = implementation
    logits, labels = torch.randn(2, 4, 6, 5, device=device), draw_labels(2, 4, 33, 35).to(device)
    for choice in ({}, {"normalize": "mean"}, {"kernel": "linear", "kernel_size": 9, "downsample": 3, "beta": 0.1}):
        weight = segops.gaussian_edge(labels, 4, **choice)
        parts = segops.upsample_cross_entropy(logits, labels, weight, label_smoothing=0.1)
        torch.testing.assert_close(segops.boundary_aware_loss(logits, labels, label_smoothing=0.1, **choice), parts)


EXTREMES = {
    "large": lambda z: z.sign() * 1e4,
    "equal": lambda z: torch.full_like(z, 7.25),
    "large and equal": lambda z: torch.full_like(z, -1e4),
    "far from zero": lambda z: z + 1e4,
    "sure and right": lambda z: z + 20 + 8 * F.one_hot(draw_labels(2, 5, 4, 6).clamp(max=4), 5).movedim(3, 1),
    "one far above": lambda z: torch.where(torch.arange(5)[:, None, None] == 2, 1e4, z),
}


@pytest.mark.parametrize(
    "implementation, name, label_smoothing",
    matrix([*TARGETS, REFERENCE], EXTREMES, [0.0, 0.1], when=lambda target, _, smoothing: smoothing or target != INTERPRETED),
    indirect=["implementation"],
)
def test_extreme_logits(implementation, name, label_smoothing):
    """Finite, and as accurate as PyTorch, which subtracts the greatest logit before it rounds a logarithm."""
    device, _ = implementation
    logits = EXTREMES[name](torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))).to(device).requires_grad_()
    exactly = logits.detach().double().requires_grad_()

    def plain(z, size=(4, 6)):
        z, labels = F.interpolate(z, size, mode="bilinear"), draw_labels(2, 5, *size).to(device)
        return F.cross_entropy(z, labels, ignore_index=255, reduction="none", label_smoothing=label_smoothing)

    def ours(z, size=(4, 6)):
        labels = draw_labels(2, 5, *size).to(device)
        return segops.upsample_cross_entropy(z, labels, label_smoothing=label_smoothing, reduction="none")

    assert_all_close(output_and_gradient(ours, logits), output_and_gradient(plain, logits), output_and_gradient(plain, exactly))
    # Resizing rounds numbers of 1e4, in PyTorch as here.
    resized = (output_and_gradient(lambda z, f=f: f(z, (5, 11)), z) for f, z in ((ours, logits), (plain, exactly)))
    for value, truth in zip(*resized, strict=True):
        torch.testing.assert_close(value, truth.float(), rtol=1e-3, atol=2e-2)


@fast_targets
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8, 1e30])
@pytest.mark.parametrize("size", [(8, 8), (19, 17)])
def test_large_logits(target, scale, size):
    """A softmax and its gradient take the same logit for the greatest, and subtract it before anything is rounded."""
    labels = draw_labels(2, 5, *size).to(target[0])
    logits = scale * (2 * torch.rand(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)) - 1).to(target[0]).requires_grad_()
    found = output_and_gradient(lambda z: segops.upsample_cross_entropy(z, labels), logits)
    exact = output_and_gradient(lambda z: plain_mean(z, labels), logits.detach().double().requires_grad_())
    for value, truth in zip(found, exact, strict=True):
        assert relative_error(value, truth) <= 1e-5
    alike = torch.full_like(logits, -scale, requires_grad=True)
    loss, grad = output_and_gradient(lambda z: segops.upsample_cross_entropy(z, labels), alike)
    torch.testing.assert_close(loss, torch.full_like(loss, 5).log())
    torch.testing.assert_close(
        grad, output_and_gradient(lambda z: plain_mean(z, labels), torch.zeros_like(alike, requires_grad=True))[1]
    )


def plain_mean(logits, labels):
    return F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=255)


@fast_targets
@pytest.mark.parametrize("size", [(8, 8), (19, 17)])
def test_a_penalty_on_the_gradient_is_refused(target, size):
    """Although what comes in at the loss depends on nothing: the gradient depends on the logits."""
    logits = torch.randn(2, 5, 8, 8, device=target[0], requires_grad=True)
    loss = segops.upsample_cross_entropy(logits, draw_labels(2, 5, *size).to(target[0]))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward not supported"):
        (loss + grad.square().sum()).backward()


def test_a_class_ruled_out(implementation):
    """Logits of -inf, where they are not the label's: as in F.cross_entropy, a finite loss and no gradient there."""
    device, _ = implementation
    labels = draw_labels(2, 5, 6, 7, ignore_index=-1).clamp(min=0).to(device)
    logits = torch.randn(2, 5, 6, 7, device=device)
    ruled_out = torch.rand(2, 5, 6, 7, device=device) < 0.5
    ruled_out[:, :, 3] = True  # all but the label
    ruled_out.scatter_(1, labels[:, None], False)
    logits = logits.masked_fill(ruled_out, -torch.inf).requires_grad_()
    value, grad = output_and_gradient(lambda z: segops.upsample_cross_entropy(z, labels, reduction="none"), logits)
    exact = output_and_gradient(lambda z: F.cross_entropy(z, labels, reduction="none"), logits)
    torch.testing.assert_close(value, exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, exact[1], rtol=1e-5, atol=1e-6)
    assert value.isfinite().all() and value[:, 3].eq(0).all() and grad[ruled_out].eq(0).all()


@fast_implementations
@pytest.mark.parametrize("size", [(6, 7), (17, 20)])
def test_a_class_masked_by_the_least_number(implementation, size):
    """As padding of the classes does it: its probability and its gradient are 0, the loss is that of the other classes."""
    device, _ = implementation
    labels = draw_labels(2, 4, *size).to(device)
    logits = torch.randn(2, 5, 6, 7, device=device)
    logits[:, 4] = torch.finfo(torch.float32).min
    for reduction in ("none", "mean"):
        value, grad = output_and_gradient(
            lambda z, r=reduction: segops.upsample_cross_entropy(z, labels, reduction=r), logits.clone().requires_grad_()
        )
        exact = output_and_gradient(
            lambda z, r=reduction: segops.upsample_cross_entropy(z, labels, reduction=r), logits[:, :4].clone().requires_grad_()
        )
        torch.testing.assert_close(value, exact[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[:, :4], exact[1], rtol=1e-5, atol=1e-6)
        assert grad[:, 4].eq(0).all()


@fast_targets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype(target, dtype):
    """They are read as they are, or converted first: the numbers are the same."""
    device, _ = target
    generator = torch.Generator().manual_seed(0)
    by_pixel, by_class = (torch.rand(size, generator=generator).to(torch.bfloat16).to(device) for size in ((2, 4, 5), (5,)))
    for size in ((3, 4), (9, 11)):
        logits, labels = torch.randn(2, 5, *size, device=device, requires_grad=True), draw_labels(2, 5, 9, 11).to(device)

        def run(dtype):
            weights = by_pixel.to(dtype), by_class.to(dtype)
            return output_and_gradient(
                lambda z: segops.upsample_cross_entropy(z, labels, weights[0], class_weight=weights[1], label_smoothing=0.1),  # noqa: B023
                logits,  # noqa: B023
            )

        for value, expected in zip(run(dtype), run(torch.float32), strict=True):
            assert torch.equal(value, expected)


def test_all_ignored(implementation):
    """Loss and gradients are 0, not 0 / 0."""
    device, _ = implementation
    labels = torch.full((2, 5, 7), 255, device=device)
    losses = segops.upsample_cross_entropy, lambda *args, **kwargs: segops.boundary_aware_loss(*args, downsample=1, **kwargs)
    cases = ((2, 3), "mean"), ((5, 7), "sum"), ((5, 7), "none")
    for function, (size, reduction) in itertools.product(losses, cases):
        logits = torch.randn(2, 5, *size, device=device, requires_grad=True)
        value, grad = output_and_gradient(lambda z, f=function, r=reduction: f(z, labels, reduction=r), logits)
        assert value.shape == (labels.shape if reduction == "none" else ()) and value.eq(0).all() and grad.eq(0).all()


def test_weights_of_ignored_pixels_do_not_matter(implementation):
    device, _ = implementation
    labels, weight = draw_labels(2, 5, 5, 7).to(device), torch.rand(2, 5, 7, device=device)
    for size, reduction in (((2, 3), "mean"), ((5, 7), "mean"), ((5, 7), "none")):
        logits = torch.randn(2, 5, *size, device=device, requires_grad=True)

        def run(there):
            weights = weight.where(labels != 255, there)
            return output_and_gradient(lambda z: segops.upsample_cross_entropy(z, labels, weights, reduction=reduction), logits)  # noqa: B023

        for there in (torch.nan, torch.inf):
            for value, expected in zip(run(there), run(0), strict=True):
                assert torch.equal(value, expected)


@pytest.mark.parametrize("size", [(2, 3), (5, 7)])
def test_gradients_that_come_in_at_ignored_pixels_do_not_matter(implementation, size):
    """As from a loss divided by itself: NaN where it is 0."""
    device, _ = implementation
    labels, logits = draw_labels(2, 5, 5, 7).to(device), torch.randn(2, 5, *size, device=device, requires_grad=True)
    loss = segops.upsample_cross_entropy(logits, labels, reduction="none")
    grads = [torch.ones_like(loss).where(labels != 255, there) for there in (torch.nan, torch.inf, 0)]
    *values, expected = (torch.autograd.grad(loss, logits, grad, retain_graph=True)[0] for grad in grads)
    for value in values:
        assert torch.equal(value, expected)


@pytest.mark.parametrize("label_smoothing", [1e-46, 1e-30])
def test_next_to_no_smoothing_is_none(implementation, label_smoothing):
    """Also where it is 0 in float32: what backward reads, forward has written."""
    device, _ = implementation
    labels, logits = draw_labels(2, 5, 5, 7).to(device), torch.randn(2, 5, 2, 3, device=device, requires_grad=True)
    smooth, plain = (
        output_and_gradient(lambda z, s=s: segops.upsample_cross_entropy(z, labels, label_smoothing=s), logits)
        for s in (label_smoothing, 0.0)
    )
    for value, expected in zip(smooth, plain, strict=True):
        torch.testing.assert_close(value, expected)


@fast_implementations
def test_gradients_flow_to_the_logits_only(implementation):
    device, _ = implementation
    logits, pixel_weight, class_weight = (
        torch.rand(size, device=device, requires_grad=True) for size in ((1, 3, 4, 5), (1, 2, 3), (3,))
    )
    loss = segops.upsample_cross_entropy(logits, draw_labels(1, 3, 8, 9).to(device), pixel_weight, class_weight=class_weight)
    assert torch.autograd.grad(loss, (logits, pixel_weight, class_weight), allow_unused=True)[1:] == (None, None)
    assert not segops.upsample_cross_entropy(logits.detach(), draw_labels(1, 3, 8, 9).to(device), pixel_weight).requires_grad


# The emulation keeps copies of what kernels write.
@pytest.mark.parametrize("target", [each for each in FAST if each.values[0] != EMULATED], indirect=True)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nothing_of_the_upsampled_size_is_allocated(target, memory_format):
    """Forward and backward together hold less than a quarter of one set of full-size float32 logits; PyTorch holds several."""
    device, _ = target
    case = Case((2, 21, 17, 17), (129, 129))
    logits, labels = case.logits(torch.float32, device).detach().contiguous(memory_format=memory_format), case.labels(device)
    logits.requires_grad_()

    def peak(function, **settings):
        return measure.peak_memory(lambda: torch.autograd.grad(function(logits, labels, **settings).sum(), logits), device)

    quarter = logits.shape[:2].numel() * 129**2
    assert peak(lambda z, labels: case.plain(z)) > 4 * quarter
    for function in (segops.boundary_aware_loss, segops.upsample_cross_entropy):
        for reduction in ("mean", "none"):
            assert peak(function, reduction=reduction) < quarter, (function.__name__, reduction)


@pytest.mark.parametrize("normalize, downsample, maps", [(None, 4, 3.1), ("mean", 4, 3.1), ("mean", 1, 6.1)])
def test_what_the_edge_map_takes_is_free_before_the_loss_begins(normalize, downsample, maps):
    """Three maps of the labels' size are kept for backward."""
    case = Case((1, 3, 32, 64), (256, 512))
    logits, labels = case.logits(torch.float32).detach(), case.labels()
    settings = {"normalize": normalize, "downsample": downsample}
    assert (
        measure.peak_memory(lambda: segops.boundary_aware_loss(logits, labels, **settings), "cpu") <= maps * 4 * labels.numel()
    )


@ON_LINUX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_launches_on_a_gpu(dtype, channels_last):
    """Each takes some microseconds. PyTorch allocates memory, and does nothing else."""
    case = Case((2, 5, 5, 7), (33, 53), channels_last=channels_last, edge={}, class_weight=True)
    logits, labels, class_weight = case.logits(dtype), case.labels(), case.weights(dtype=dtype)[1]

    def run(logits):
        with segops.backend("emulated"):
            return segops.boundary_aware_loss(logits, labels, class_weight=class_weight)

    def backward():
        torch.autograd.grad(run(logits), logits)

    for function, most in ((backward, 6), (lambda: run(logits.detach()), 5)):
        before = EMULATED_OPS.launches()
        with torch.profiler.profile() as profile:
            function()
        assert 0 < EMULATED_OPS.launches() - before <= 2 * most  # the emulation runs twice
        called = {each.name for each in profile.events() if of_an_emulated_op(each) and each.name.startswith("aten::")}
        assert called <= {"aten::empty_strided", "aten::as_strided"}


@ON_LINUX
@pytest.mark.parametrize(
    "logits, labels",
    [((17, 17), (34, 34)), ((9, 9), (65, 65)), ((24, 24), (24, 96)), ((16, 1), (16, 700)), ((1, 1), (70, 300))],
)
def test_partial_sums_are_few(logits, labels):
    """What a GPU allocates for a gradient, at ratios from two on: each time less than half of the upsampled logits."""
    z, pixels = torch.randn(1, 40, *logits, requires_grad=True), draw_labels(1, 40, *labels)
    with segops.backend("emulated"), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        torch.autograd.grad(segops.upsample_cross_entropy(z, pixels), z)
    allocated = [each.nbytes() for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    assert 0 < max(allocated) < 4 * 40 * labels[0] * labels[1] / 2


def of_an_emulated_op(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith("segops_emulated::"):
            return True
    return False


@CUDA
def test_cuda_graph_without_a_warm_up():
    """Nothing has to be made beforehand, and what a capture makes is not taken for made afterwards."""
    labels = draw_labels(2, 5, 33, 41).cuda()
    settings = dict(kernel_size=11, sigma=7.25)  # of no other test
    graph = torch.cuda.CUDAGraph()
    with segops.backend("native"):
        with torch.cuda.graph(graph):
            captured = segops.gaussian_edge(labels, 5, **settings)
        eager = segops.gaussian_edge(labels, 5, **settings)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
    assert relative_error(eager, edge_map(labels.cpu(), 5, **settings)) <= 1e-6


@CUDA
def test_torch_compile_with_cuda_graphs():
    """Which warms up with the graph's memory: nothing made there may be kept."""
    labels, settings = draw_labels(2, 5, 33, 41).cuda(), dict(kernel_size=13, sigma=6.75)  # of no other test
    logits = torch.randn(2, 5, 9, 11, device="cuda")
    with segops.backend("native"):
        compiled = torch.compile(lambda z: segops.boundary_aware_loss(z, labels, **settings), mode="reduce-overhead")
        losses = [compiled(logits).clone() for _ in range(4)]
        expected = segops.boundary_aware_loss(logits, labels, **settings)
    for loss in losses:
        torch.testing.assert_close(loss, expected)


@needs_much_gpu_memory
@on_a_gpu
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_indices_beyond_32_bits(target, scale, channels_last):
    """Logits of more than 2^31 elements: the last rows' losses and gradients are right, and those of the last class."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    classes, side = 150, 3800
    assert classes * side**2 > 2**31
    logits = torch.empty(
        1, classes, side, side, device="cuda", dtype=torch.bfloat16,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    ).normal_()  # fmt: skip
    logits.requires_grad_()
    labels = torch.randint(classes, (1, scale * side, scale * side), device="cuda", dtype=torch.uint8)
    labels[:, -1] = classes - 1
    tail = logits[:, :, -20:].detach().float().cpu().requires_grad_()

    def losses(logits, labels):
        return segops.upsample_cross_entropy(logits, labels, reduction="none")[:, -10 * scale :]

    with segops.backend("reference"):
        expected = losses(tail, labels[:, -20 * scale :].cpu())
        (expected_grad,) = torch.autograd.grad(expected.sum(), tail)
    value = losses(logits, labels)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert relative_error(value, expected.detach()) < 1e-5
    assert relative_error(grad[:, :, -8:], expected_grad[:, :, -8:]) < 5e-3
    assert not grad[:, :, : side // 2].any()


# Modules.


@pytest.mark.parametrize(
    "module, function",
    [
        (segops.nn.BoundaryAwareLoss, segops.boundary_aware_loss),
        (segops.nn.UpsampleCrossEntropy, segops.upsample_cross_entropy),
    ],
    ids=["BoundaryAwareLoss", "UpsampleCrossEntropy"],
)
def test_modules_have_the_functions_settings(module, function):
    def settings(of):
        parameters = inspect.signature(of).parameters.values()
        return {each.name: each.default for each in parameters if each.kind == each.KEYWORD_ONLY}

    assert settings(module) == settings(function)
    class_weight = torch.tensor([1.0, 2, 3, 4, 5])
    chosen = {"class_weight": class_weight, "label_smoothing": 0.2, "ignore_index": 3, "reduction": "sum"}
    if module is segops.nn.BoundaryAwareLoss:
        chosen |= {"kernel": "linear", "kernel_size": 5, "sigma": 1.0, "beta": 0.1, "downsample": 2, "normalize": "max"}
    assert chosen.keys() == settings(function).keys()
    ours, labels = module(**chosen), draw_labels(2, 5, 11, 13, ignore_index=3)
    torch.testing.assert_close(ours(Z, labels), function(Z, labels, **chosen), rtol=0, atol=0)
    for name, value in chosen.items():
        alone = {name: value}
        if name != "sigma":  # which the linear kernel does not have
            pixels = draw_labels(2, 5, 11, 13, ignore_index=chosen["ignore_index"] if name == "ignore_index" else 255)
            assert not torch.equal(module(**alone)(Z, pixels), function(Z, pixels)), f"{name} is not passed on"
            assert torch.equal(module(**alone)(Z, pixels), function(Z, pixels, **alone)), name
    assert list(ours.state_dict()) == ["class_weight"] and not list(ours.parameters())
    assert not module().state_dict()
    assert ours.double().class_weight.dtype == torch.float64
    assert "label_smoothing=0.2, ignore_index=3, reduction='sum'" in repr(ours)


def test_upsample_cross_entropy_module_takes_pixel_weights():
    weight = torch.rand(2, 3, 4)
    assert torch.equal(segops.nn.UpsampleCrossEntropy()(Z, L, weight), segops.upsample_cross_entropy(Z, L, weight))
    resized = F.interpolate(Z, L.shape[1:], mode="bilinear")
    loss = segops.nn.UpsampleCrossEntropy()(Z, L)
    assert relative_error(loss, F.cross_entropy(resized.double(), L, ignore_index=255)) < 1e-6


@fast_targets
def test_settings_far_beyond_the_map(target):
    """One pixel is left of the map; of the kernel, what can touch it."""
    labels = torch.randint(0, 8, (2, 6, 6), generator=torch.Generator().manual_seed(0)).to(target[0])
    small = segops.gaussian_edge(labels, 8, downsample=6, kernel_size=3)
    for downsample in (2**40, 2**63 - 1):
        assert torch.equal(segops.gaussian_edge(labels, 8, downsample=downsample, kernel_size=3), small)
    if target[1] != "triton":  # which makes the whole kernel
        for kernel in ("gaussian", "linear"):
            edge = segops.gaussian_edge(labels, 8, kernel=kernel, kernel_size=2**62 + 1, sigma=1e-9)
            assert edge.isfinite().all() and (edge >= 0.5).all()


def test_ops_refuse_what_does_not_fit():
    """By themselves: Python may not have checked it."""
    ops, logits, labels = torch.ops.segops, torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 9, dtype=torch.int64)
    settings, loss = ("gaussian", 3, 1.0, 0.5, 2, None), (0.0, 255, "mean", "gradient")
    for call, message in (
        (lambda: ops.bal_edge(labels, 3, "box", 3, 1.0, 0.5, 2, None, 255), "bal_edge: needs .* a kernel"),
        (lambda: ops.bal_edge(labels, 3, "linear", 2, 1.0, 0.5, 2, None, 255), "bal_edge: needs an odd kernel_size"),
        (lambda: ops.bal_edge(labels, 3, "linear", 3, 1.0, 0.5, 0, None, 255), "bal_edge: needs .* a positive downsample"),
        (lambda: ops.bal_edge(labels, 3, "linear", 3, 1.0, 0.5, 2, "sum", 255), "bal_edge: needs .* a normalize"),
        (lambda: ops.bal_edge(labels, 2**40, *settings, 255), "bal_edge: needs .* 2\\^31 - 1 classes"),
        (lambda: ops.bal_edge(labels[0], 3, *settings, 255), "bal_edge: needs labels"),
        (lambda: ops.bal_cross_entropy(logits, labels, None, None, 0.0, 255, "batchmean", "nothing"), "no reduction 'batchmean'"),
        (lambda: ops.bal_cross_entropy(logits, labels[:1], None, None, *loss), "must have one batch"),
        (lambda: ops.bal_cross_entropy(logits, labels, None, torch.ones(1, 3), *loss), "class_weight must be"),
        (lambda: ops.bal_boundary_loss(logits[0], labels, None, *settings, *loss), "needs logits"),
        (lambda: ops.bal_cross_entropy_grad(torch.ones(()), logits, torch.ones(3), torch.ones(())), "needs what bal_cross"),
        (lambda: ops.bal_cross_entropy_map_grad(torch.ones(2, 8, 9), logits, labels, None, torch.ones(3), torch.ones(()), 0.0, 255), "needs what"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
