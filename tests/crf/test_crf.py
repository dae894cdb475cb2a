"""The permutohedral filter and mean field: mathematics and accuracy, on the native kernels and in the reference."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import segops
from benchmarks import measure
from segops.ops.crf.op import LARGEST_DIMENSION

from ..accuracy import relative_error
from ..contract import names_of
from ..targets import CUDA, ON_CPU, ON_LINUX, interpreted
from . import oracle
from .conftest import (
    CASES,
    FEATURES,
    FILTER_BOUNDS,
    GRADIENT_BOUNDS,
    NEAR,
    NORMALIZATIONS,
    Q_BOUNDS,
    Case,
    filtered,
    image_features,
    lattices_of,
    normal,
    pictures,
    smooth_features,
    uniform,
    values_of,
)

SHARED = Path(__file__).parents[3] / "shared" / "data" / "voc_slice"
on_voc = pytest.mark.skipif(not SHARED.exists(), reason="shared/data/voc_slice is not beside the checkout")
IDS = ("2007_000129", "vainf_1", "vainf_23", "vainf_114")
dtypes = pytest.mark.parametrize("dtype", FILTER_BOUNDS, ids=str)
normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)
# Every implementation has these on the CPU, and a test that compares the two takes the kernels alone.
# Of the reference, which takes seconds for a photograph or a hundred calls.
slow_reference = pytest.mark.parametrize(
    "implementation",
    [pytest.param(ON_CPU[0], id="cpu-native"), pytest.param(ON_CPU[1], id="reference", marks=pytest.mark.thorough)],
    indirect=True,
)
implementations = pytest.mark.parametrize("implementation", ON_CPU, ids=["cpu-native", "reference"], indirect=True)
on_native = pytest.mark.parametrize("implementation", ON_CPU[:1], ids=["cpu-native"], indirect=True)


def in_the_reference(function, *arguments, **settings):
    with segops.backend("reference"):
        return function(*arguments, **settings)


def probabilities_differ(log_q, expected):
    """The largest difference of probabilities."""
    return (log_q.double().exp() - expected.double().exp()).abs().max().item()


# The filter.


@functools.cache
def lattices(name):
    return lattices_of(FEATURES[name])


@implementations
@dtypes
@normalizations
@pytest.mark.parametrize("name", FEATURES)
def test_filter(implementation, name, normalization, dtype):
    values = values_of(FEATURES[name]).to(dtype)
    found = segops.permutohedral_filter(values, FEATURES[name], normalization=normalization)
    assert found.dtype == dtype and found.shape == values.shape
    assert relative_error(found, filtered(values, lattices(name), normalization)) <= FILTER_BOUNDS[dtype]


@implementations
@dtypes
@normalizations
@pytest.mark.parametrize("name", ["image", "far apart in five"])
def test_gradient_of_the_filter(implementation, name, normalization, dtype):
    """By the adjoint, whose axes are in reverse order and whose sums are those of the filter itself."""
    values, grad = values_of(FEATURES[name]).to(dtype).requires_grad_(), values_of(FEATURES[name]).flip(1).to(dtype)
    features = FEATURES[name].clone().requires_grad_()
    out = segops.permutohedral_filter(values, features, normalization=normalization)
    found, none = torch.autograd.grad(out, (values, features), grad, allow_unused=True)
    assert none is None and found.dtype == dtype
    assert relative_error(found, filtered(grad, lattices(name), normalization, adjoint=True)) <= FILTER_BOUNDS[dtype]


@implementations
@pytest.mark.parametrize("d", range(1, LARGEST_DIMENSION + 1))
def test_filter_of_any_dimension(implementation, d):
    features = smooth_features(2, d, 37, seed=d)
    values = values_of(features)
    for dtype in (torch.float64, torch.float32):
        found = segops.permutohedral_filter(values.to(dtype), features)
        truth = filtered(values.to(dtype), lattices_of(features), None)
        assert relative_error(found, truth) <= FILTER_BOUNDS[dtype]


# Kernels work in blocks of channels and vectors: one less, as many, one more; several blocks.
CHANNELS = (1, 2, 3, 5, 8, 9, 16, 17, 21, 31, 32, 33, 40, 64, 150)


@implementations
@pytest.mark.parametrize("channels", CHANNELS)
def test_filter_of_any_channels(implementation, channels):
    for normalization, dtype in itertools.product(NORMALIZATIONS, (torch.float64, torch.float32)):
        values = values_of(FEATURES["image"], channels).to(dtype).requires_grad_()
        found = segops.permutohedral_filter(values, FEATURES["image"], normalization=normalization)
        assert relative_error(found, filtered(values, lattices("image"), normalization)) <= FILTER_BOUNDS[dtype]
        (grad,) = torch.autograd.grad(found, values, values.detach())
        truth = filtered(values, lattices("image"), normalization, adjoint=True)
        assert relative_error(grad, truth) <= FILTER_BOUNDS[dtype]


@implementations
@normalizations
def test_derivatives_of_the_filter(implementation, normalization):
    values, features = values_of(FEATURES["volume"], 2).requires_grad_(), FEATURES["volume"]

    def call(values):
        return segops.permutohedral_filter(values, features, normalization=normalization).sin()

    assert torch.autograd.gradcheck(call, values, fast_mode=True) and torch.autograd.gradgradcheck(call, values, fast_mode=True)


@implementations
def test_narrow_values_are_rounded_once(implementation):
    for dtype, normalization in itertools.product((torch.bfloat16, torch.float16), NORMALIZATIONS):
        values = values_of(FEATURES["image"]).to(dtype).requires_grad_()
        wide = values.detach().float().requires_grad_()
        results = []
        for each in (values, wide):
            out = segops.permutohedral_filter(each, FEATURES["image"], normalization=normalization)
            results.append([out, *torch.autograd.grad(out, each, values.detach().to(out.dtype))])
        for narrow, rounded in zip(*results, strict=True):
            assert narrow.dtype == dtype and torch.equal(narrow, rounded.to(dtype))


@implementations
def test_features_of_any_dtype(implementation):
    """The same numbers make the same lattice."""
    narrow = FEATURES["image"].bfloat16()
    values = values_of(FEATURES["image"]).float()
    expected = segops.permutohedral_filter(values, narrow.double())
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(segops.permutohedral_filter(values, narrow.to(dtype)), expected)


@implementations
def test_a_weighted_mean_keeps_constants(implementation):
    values = torch.full((2, 3, 9, 11), 2.5, dtype=torch.float64)
    found = segops.permutohedral_filter(values, FEATURES["image"], normalization="after")
    torch.testing.assert_close(found, values, rtol=1e-14, atol=0)


@implementations
@normalizations
def test_long_sums(implementation, normalization):
    """Of positions that share all their vertices: the result is their mean, or a multiple of their sum. Equal values are
    rounded one way all along."""
    values = torch.cat([uniform((1, 2, 300, 300), 0, 1), torch.full((1, 1, 300, 300), 0.7)], 1).float()
    features = torch.full((1, 5, 300, 300), 0.3)
    truth = values.double().mean((2, 3), keepdim=True)
    if normalization is None:
        one = torch.ones(1, 1, 1, 1)
        truth = truth * 300**2 * filtered(one, lattices_of(features[..., :1, :1]), None)
    found = segops.permutohedral_filter(values, features, normalization=normalization)
    assert relative_error(found, truth.expand(found.shape)) <= FILTER_BOUNDS[torch.float32]


@implementations
def test_features_that_are_not_finite(implementation):
    """Such positions are NaN, and the others what they are without them; a NaN in values stays in its image."""
    features, values = FEATURES["image"].flatten(2).clone(), values_of(FEATURES["image"]).flatten(2)
    features[0, 1, 4], features[0, 0, 17], features[0, 3, 98] = torch.nan, torch.inf, -torch.inf
    kept = [p for p in range(99) if p not in (4, 17, 98)]
    for normalization in NORMALIZATIONS:
        given = values.clone()
        given[0, :, 17] = torch.nan  # which gives nothing either
        given.requires_grad_()
        found = segops.permutohedral_filter(given, features, normalization=normalization)
        assert found[0, :, [4, 17, 98]].isnan().all() and found[1].isfinite().all()
        without = segops.permutohedral_filter(values[:1, :, kept], features[:1, :, kept], normalization=normalization)
        torch.testing.assert_close(found[0, :, kept], without[0], rtol=1e-12, atol=1e-13)
        whole = segops.permutohedral_filter(values[1:], features[1:], normalization=normalization)
        assert torch.equal(found[1:], whole)
        of_result = values[:, :, kept].requires_grad_()
        (grad,) = torch.autograd.grad(found[:, :, kept], given, of_result, create_graph=True)
        assert not grad[0, :, [4, 17, 98]].any() and grad.isfinite().all()
        (of_grad,) = torch.autograd.grad(grad, of_result, values)
        assert of_grad.isfinite().all() and of_grad.any()
    values[0, 1, 50] = torch.nan
    found = segops.permutohedral_filter(values, FEATURES["image"].flatten(2))
    assert found[0, 1].isnan().any() and found[1].isfinite().all()
    everywhere = segops.permutohedral_filter(values, torch.full_like(features, torch.nan), normalization="after")
    assert everywhere.isnan().all()


@implementations
def test_features_beyond_what_coordinates_hold(implementation):
    """Are taken for 1e7."""
    features, values = uniform((1, 3, 6)), normal((1, 2, 6))
    features[0, 0, :2], features[0, 2, 3] = 1e7, -1e7
    expected = segops.permutohedral_filter(values, features)
    features[0, 0, :2], features[0, 2, 3] = torch.tensor([3e7, 1e300], dtype=torch.float64), -1e12
    assert torch.equal(segops.permutohedral_filter(values, features), expected)


@implementations
def test_each_image_is_filtered_as_if_alone(implementation):
    """To the bit, forward and backward."""
    features, values = image_features(5, 7, 8), normal((5, 19, 7, 8)).float().requires_grad_()
    for normalization in NORMALIZATIONS:
        out = segops.permutohedral_filter(values, features, normalization=normalization)
        (grad,) = torch.autograd.grad(out, values, values.detach())
        for n in range(5):
            alone = values[n : n + 1].detach().requires_grad_()
            expected = segops.permutohedral_filter(alone, features[n : n + 1], normalization=normalization)
            assert torch.equal(out[n : n + 1], expected)
            assert torch.equal(grad[n : n + 1], torch.autograd.grad(expected, alone, alone.detach())[0])


def test_filter_of_any_shape():
    """The kernels as the reference, in float64."""

    @settings(max_examples=80, deadline=None)
    @given(
        n=st.integers(0, 3), c=st.integers(1, 40), d=st.integers(1, 16), count=st.integers(1, 60), spread=st.floats(0, 1e4),
        normalization=st.sampled_from(NORMALIZATIONS), ties=st.booleans(), seed=st.integers(0, 99),
    )  # fmt: skip
    def check(n, c, d, count, spread, normalization, ties, seed):
        features, values = normal((n, d, count), seed) * spread, normal((n, c, count), seed + 1).requires_grad_()
        results = []
        for backend in ("native", "reference"):
            with segops.backend(backend):
                given = features.round() if ties else features
                out = segops.permutohedral_filter(values, given, normalization=normalization)
                results.append([out, *torch.autograd.grad(out, values, values.detach())])
        for value, truth in zip(*results, strict=True):
            assert relative_error(value, truth) <= FILTER_BOUNDS[torch.float64]

    check()


# Mean field.


@functools.cache
def exact(name):
    return CASES[name].exactly()


@implementations
@pytest.mark.parametrize("dtype", Q_BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_mean_field(implementation, name, dtype):
    case = CASES[name]
    found = case.op(case.logits(dtype))
    assert found.dtype == dtype and found.shape == case.shape
    torch.testing.assert_close(found.exp().sum(1), torch.ones_like(found[:, 0]))
    assert probabilities_differ(found, exact(name)) <= case.bounds[dtype]


def assert_accurate(case):
    truth = case.exactly()
    for dtype, bound in case.bounds.items():
        assert probabilities_differ(case.op(case.logits(dtype)), truth) <= bound


@implementations
@pytest.mark.parametrize("channels", range(1, LARGEST_DIMENSION - 1))
def test_images_of_any_channels(implementation, channels):
    case = Case((2, 3, 5, 7), channels, {**NEAR, "bilateral_sigma": (3.0, 60.0), "iterations": 2})
    assert_accurate(case)


@implementations
@pytest.mark.parametrize("classes", CHANNELS)
def test_any_number_of_classes(implementation, classes):
    shapes = {"bilateral_weight": (classes, classes), "compatibility": (classes, classes)}
    case = Case(
        (2, classes, 6, 7), settings={"spatial_weight": 0.5, "bilateral_sigma": (3.0, 40.0), "iterations": 2}, weights=shapes
    )
    assert_accurate(case)


# Sides of a vector, of a row and of a block, and of one.
@implementations
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (33, 1), (2, 16), (16, 17), (31, 9)])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_any_size(implementation, size, sigma):
    case = Case((1, 3, *size), settings={**NEAR, "spatial_sigma": sigma, "iterations": 2})
    assert_accurate(case)


@implementations
@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 3.0, 40.0, 1e4, 1e30])
@pytest.mark.parametrize("normalization", ["after", "symmetric"])
def test_the_spatial_kernel_is_exact(implementation, sigma, normalization):
    for size in ((9, 1), (3, 3), (13, 30)):
        given = {"bilateral_weight": 0, "spatial_weight": 1.0, "spatial_sigma": sigma, "normalization": normalization}
        assert_accurate(Case((1, 2, *size), settings={**given, "iterations": 2}))


@implementations
@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_of_another_size_are_resized_first(implementation, align_corners):
    case = Case((2, 4, 12, 14), settings=NEAR)
    for size in ((5, 4), (12, 7), (20, 30), (1, 1)):
        logits = normal((2, 4, *size))
        resized = F.interpolate(logits, (12, 14), mode="bilinear", align_corners=align_corners)
        found = segops.dense_crf(logits, case.images(), **NEAR, align_corners=align_corners)
        assert probabilities_differ(found, case.op(resized)) <= 1e-12


@on_native
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", [4, 40])
def test_results_do_not_depend_on_whether_a_gradient_is_wanted(implementation, classes, align_corners):
    """Where none is wanted, logits are resized inside the op: to the same bits, infinite ones too."""
    images = pictures((2, 3, 12, 14))
    for size in ((5, 4), (12, 7), (20, 30), (1, 1), (12, 14)):
        logits = normal((2, classes, *size)).float()
        logits[0, 1], logits[0, 2, 0], logits[1, 0, -1, -1], logits[1, 3, 0, 0] = -torch.inf, -torch.inf, torch.inf, torch.nan
        for each in (logits, logits.contiguous(memory_format=torch.channels_last), logits.bfloat16()):
            plain = segops.dense_crf(each, images, **NEAR, align_corners=align_corners)
            found = segops.dense_crf(each.clone().requires_grad_(), images, **NEAR, align_corners=align_corners)
            assert not plain.requires_grad and found.requires_grad
            torch.testing.assert_close(plain, found.detach(), rtol=0, atol=0, equal_nan=True)


@implementations
@pytest.mark.parametrize("size", [(7, 8), (4, 5)])
def test_narrow_logits_are_rounded_once(implementation, size):
    """So they and their gradients are what float32 has of the same numbers, rounded; also where logits are resized."""
    images = pictures((2, 3, 7, 8))
    for dtype in (torch.bfloat16, torch.float16):
        logits, weight = normal((2, 3, *size)).to(dtype).requires_grad_(), uniform((3, 3), 0, 1).to(dtype).requires_grad_()
        results = []
        for tensors in ((logits, weight), [each.detach().float().requires_grad_() for each in (logits, weight)]):
            out = segops.dense_crf(tensors[0], images, compatibility=tensors[1], **NEAR)
            grad = normal((2, 3, 7, 8), 3).to(dtype)
            results.append([out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))])
        for narrow, wide in zip(*results, strict=True):
            assert narrow.dtype == dtype and torch.equal(narrow, wide.to(dtype))


@implementations
def test_images_of_any_dtype(implementation):
    """The same numbers give the same bits."""
    case = CASES["defaults"]
    logits, images = case.logits(torch.float32), case.images()
    expected = case.op(logits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(case.op(logits, images=images.to(dtype)), expected)
    in_units = segops.dense_crf(logits.double(), images / 255, bilateral_sigma=(67.0, 3.0 / 255))
    assert probabilities_differ(in_units, case.op(logits.double())) <= 0.03  # where coordinates are equal but for rounding


@implementations
def test_log_probabilities_serve_as_logits(implementation):
    case = CASES["matrices"]
    logits = case.logits()
    assert probabilities_differ(case.op(logits.log_softmax(1)), case.op(logits)) <= 1e-12


@implementations
def test_no_iterations(implementation):
    case = Case((2, 3, 5, 6), settings={"iterations": 0})
    logits = case.logits(torch.float32)
    assert torch.equal(case.op(logits), logits.log_softmax(1))


@implementations
@pytest.mark.parametrize("dtype", Q_BOUNDS, ids=str)
def test_one_class(implementation, dtype):
    """Log Q is 0, for all logits and weights, and so are gradients."""
    for weight in (0.6, 1.7, -2.3):
        case = Case((2, 1, 25, 26), settings=NEAR | {"spatial_weight": weight})
        logits = case.logits(dtype).requires_grad_()
        out = case.op(logits)
        assert not out.any()
        (grad,) = torch.autograd.grad(out, logits, normal(out.shape).to(dtype))
        assert not grad.any()


@implementations
def test_one_pixel_sends_its_own_message(implementation):
    """S = B = Q: the recurrence by hand, normalised either way."""
    logits = normal((2, 3, 1, 1))
    for normalization in ("after", "symmetric"):
        expected = logits
        for _ in range(4):
            expected = logits + 2.5 * expected.softmax(1)
        given = {"spatial_weight": 1.0, "bilateral_weight": 1.5, "iterations": 4, "normalization": normalization}
        found = segops.dense_crf(logits, pictures((2, 3, 1, 1)), **given)
        assert probabilities_differ(found, expected.log_softmax(1)) <= 1e-14


@implementations
def test_a_kernel_of_weight_0_is_left_out(implementation):
    """The number: a NaN image is then no one's."""
    case = Case((2, 3, 6, 7))
    logits, nothing = case.logits(), torch.full((2, 3, 6, 7), torch.nan)
    for zero in (0, 0.0, -0.0):
        given = {"bilateral_weight": zero, "iterations": 3}
        found = segops.dense_crf(logits, nothing, **given)
        assert torch.equal(found, segops.dense_crf(logits, case.images(), **given)) and found.isfinite().all()
        assert torch.equal(segops.dense_crf(logits, nothing, **given, spatial_weight=zero), logits.log_softmax(1))
    alone = segops.dense_crf(logits, case.images(), spatial_weight=0)
    zeros = torch.zeros((), dtype=torch.float64)
    assert probabilities_differ(alone, segops.dense_crf(logits, case.images(), spatial_weight=zeros)) <= 1e-12


@implementations
def test_sigmas_of_any_size(implementation):
    """Also those whose square, or what is divided by them, is no number: levels and positions but 0 are then the largest
    feature, as they are of sigmas that are small but not that small."""
    case = Case((2, 3, 6, 7))
    logits, images = case.logits(), case.images().double() - 100
    for sigmas, like in (
        ({"spatial_sigma": 5e-324}, {"spatial_sigma": 0.01}),
        ({"spatial_sigma": 1e-200}, {"spatial_sigma": 0.01}),
        ({"spatial_sigma": 1e200}, {"spatial_sigma": 1e30}),
        ({"spatial_sigma": 10**300}, {"spatial_sigma": 1e30}),
        ({"bilateral_sigma": (67.0, 1e-307)}, {"bilateral_sigma": (67.0, 1e-8)}),
        ({"bilateral_sigma": (5e-324, 5e-324)}, {"bilateral_sigma": (1e-8, 1e-8)}),
        ({"bilateral_sigma": (10**300, 10**300)}, {"bilateral_sigma": (1e300, 1e300)}),
    ):
        found = segops.dense_crf(logits, images, **sigmas)
        assert torch.equal(found, segops.dense_crf(logits, images, **like)) and found.isfinite().all(), sigmas
    images[0, 1, 2, 3], images[1, 0, 4, 5], images[1, 2, 1, 1] = torch.nan, torch.inf, -torch.inf
    for sigma in ((67.0, 3.0), (67.0, 1e-307), (67.0, 5e-324)):
        found = segops.dense_crf(logits, images, spatial_weight=0, bilateral_sigma=sigma)
        assert torch.equal(found.isnan().any(1), ~images.isfinite().all(1)), sigma


@implementations
def test_weights_of_any_size(implementation):
    """That the dtype which is computed in has."""
    case = Case((1, 3, 4, 5), settings={"iterations": 2})
    for dtype, weight in ((torch.float64, 10**200), (torch.float32, 10**30), (torch.float16, 10**30)):
        logits = case.logits(dtype)
        found = segops.dense_crf(logits, case.images(), spatial_weight=weight, **case.settings)
        assert torch.equal(found, segops.dense_crf(logits, case.images(), spatial_weight=float(weight), **case.settings))
        assert not found.isnan().any()


@implementations
def test_minus_infinity_stays(implementation):
    """A class that is nowhere is as good as not there; gradients are finite."""
    case = Case((2, 4, 6, 7), settings={"spatial_weight": 0.7, "bilateral_sigma": (5.0, 20.0), "iterations": 3})
    for dtype, bound in Q_BOUNDS.items():
        logits = case.logits(dtype)
        without = case.op(logits[:, [0, 1, 3]])
        logits[:, 2] = -torch.inf
        found = case.op(logits)
        assert found[:, 2].isneginf().all() and probabilities_differ(found[:, [0, 1, 3]], without) <= bound
        logits = case.logits(dtype)
        logits[:, 2, 2:4] = -torch.inf
        logits[0, 0, 3, 1:5] = -torch.inf
        weights = {"bilateral_weight": uniform((4,)).to(dtype), "compatibility": uniform((4, 4), 0, 1).to(dtype)}
        tensors = [logits.requires_grad_(), *(each.requires_grad_() for each in weights.values())]
        found = segops.dense_crf(logits, case.images(), **case.settings, **weights)
        assert torch.equal(found.isneginf(), logits.isneginf()) and not found.isnan().any()
        kept = ~logits.isneginf()
        grads = torch.autograd.grad(found[kept].sum(), tensors)
        assert all(each.isfinite().all() and each.any() for each in grads) and not grads[0][~kept].any()


@implementations
def test_nan_stays_in_its_image(implementation):
    case = Case((3, 3, 6, 7), settings=NEAR)
    logits, images = case.logits(torch.float32), case.images().float()
    expected = case.op(logits, images=images)
    for of_logits in (False, True):
        some, other = logits.clone(), images.clone()
        (some if of_logits else other)[1, 2, 3, 4] = torch.nan
        found = case.op(some, images=other)
        assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1, :, 3, 4].isnan().all()


@implementations
def test_each_image_is_refined_as_if_alone(implementation):
    """To the bit, forward and backward."""
    case = Case((5, 4, 7, 9), settings=NEAR)
    for dtype in Q_BOUNDS:
        logits, images = case.logits(dtype).requires_grad_(), case.images()
        out = case.op(logits)
        (grad,) = torch.autograd.grad(out, logits, logits.detach())
        for n in range(5):
            alone = logits[n : n + 1].detach().requires_grad_()
            expected = case.op(alone, images=images[n : n + 1])
            assert torch.equal(out[n : n + 1], expected)
            assert torch.equal(grad[n : n + 1], torch.autograd.grad(expected, alone, alone.detach())[0])


def test_mean_field_of_any_shape():
    """The kernels as the reference, in float64."""

    @settings(max_examples=60, deadline=None)
    @given(
        shape=st.tuples(st.integers(0, 2), st.integers(1, 36), st.integers(1, 12), st.integers(1, 12)),
        channels=st.integers(1, 5), iterations=st.integers(1, 3), sigma=st.floats(0.1, 20), pixels=st.floats(0.5, 100),
        levels=st.floats(1, 100), normalization=st.sampled_from(["after", "symmetric"]), left_out=st.sampled_from(["", "spatial", "bilateral"]),
        matrices=st.booleans(),
    )  # fmt: skip
    def check(shape, channels, iterations, sigma, pixels, levels, normalization, left_out, matrices):
        given = {**NEAR, "iterations": iterations, "spatial_sigma": sigma, "bilateral_sigma": (pixels, levels)}
        given["normalization"] = normalization
        shapes = {"spatial_weight": (shape[1],) * 2, "bilateral_weight": (shape[1],), "compatibility": (shape[1],) * 2}
        if left_out:
            given[f"{left_out}_weight"] = 0
            del shapes[f"{left_out}_weight"]
        shapes = shapes if matrices else {}
        case = Case(shape, channels, {name: each for name, each in given.items() if name not in shapes}, shapes)
        results = []
        for backend in ("native", "reference"):
            with segops.backend(backend):
                tensors = [case.logits().requires_grad_(), *(each.requires_grad_() for each in case.tensors().values())]
                out = case.op(tensors[0], dict(zip(case.tensors(), tensors[1:], strict=True)))
                results.append([out.exp(), *torch.autograd.grad(out, tensors, normal(out.shape, 5))])
        for value, truth in zip(*results, strict=True):
            assert relative_error(value, truth) <= 1e-9

    check()


# Gradients.

GRADIENTS = [
    "defaults",
    "bilateral alone",
    "spatial alone",
    "after",
    "matrices",
    "matrices, symmetric",
    "weights per class",
    "one row",
]


@on_native
@pytest.mark.parametrize("dtype", GRADIENT_BOUNDS, ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(implementation, name, dtype):
    """Of the kernels, against float64 autograd of the reference."""
    case = CASES[name]
    grad = normal(case.shape, 9)

    def gradients_in(dtype):
        tensors = {key: each.requires_grad_() for key, each in case.tensors(dtype).items()}
        logits = case.logits(dtype).requires_grad_()
        return torch.autograd.grad(case.op(logits, tensors), [logits, *tensors.values()], grad.to(dtype))

    for value, truth in zip(gradients_in(dtype), in_the_reference(gradients_in, torch.float64), strict=True):
        assert value.dtype == dtype and relative_error(value, truth) <= GRADIENT_BOUNDS[dtype]


@slow_reference
@pytest.mark.parametrize("normalization", ["after", "symmetric"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 3)], ids=["number", "per class", "matrix"])
def test_gradients_are_those_of_finite_differences(implementation, shape, normalization):
    """To logits of lower resolution, both weights and the compatibility."""
    case = Case((2, 3, 5, 4), 2, weights={"spatial_weight": shape, "bilateral_weight": shape, "compatibility": (3, 3)})
    logits = normal((2, 3, 3, 4)).requires_grad_()

    def call(logits, *tensors):
        given = {"iterations": 3, "bilateral_sigma": (3.0, 30.0), "normalization": normalization}
        return segops.dense_crf(logits, case.images(), **given, **dict(zip(case.weights, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, (logits, *(each.requires_grad_() for each in case.tensors().values())))


@implementations
def test_gradients_of_some_of_the_tensors(implementation):
    """Are those of all of them."""
    case = CASES["matrices"]
    names = ["logits", *case.tensors()]

    def gradients_of(wanted):
        tensors = {"logits": case.logits(), **case.tensors()}
        for name in wanted:
            tensors[name].requires_grad_()
        logits = tensors.pop("logits")
        tensors = {**tensors, "logits": logits}
        out = case.op(logits, {name: each for name, each in tensors.items() if name != "logits"})
        return dict(
            zip(wanted, torch.autograd.grad(out, [tensors[name] for name in wanted], normal(case.shape, 9)), strict=True)
        )

    every = gradients_of(names)
    for name in names:
        assert torch.equal(gradients_of([name])[name], every[name])


@implementations
def test_images_are_constants(implementation):
    case = Case((1, 3, 5, 6), settings=NEAR)
    images = case.images().float().requires_grad_()
    assert not case.op(case.logits(), images=images).requires_grad
    out = case.op(case.logits().requires_grad_(), images=images)
    assert torch.autograd.grad(out.sum(), images, allow_unused=True) == (None,)


@implementations
def test_flat_probabilities_have_gradients(implementation):
    """Certain pixels, whose other classes have probabilities that float32 hardly holds, or not at all."""
    case = Case((1, 4, 6, 7), settings=NEAR)
    for scale in (30.0, 100.0, 1e4):
        logits = (scale * case.logits(torch.float32)).requires_grad_()
        out = case.op(logits)
        (grad,) = torch.autograd.grad(out, logits, normal(out.shape, 3).float())
        assert out.isfinite().all() and grad.isfinite().all()
        assert probabilities_differ(out, in_the_reference(case.op, logits.detach().double())) <= Q_BOUNDS[torch.float32]


# Photographs.


@functools.cache
def photograph(name, height, width):
    """(image, labels): a crop from the middle."""
    Image = pytest.importorskip("PIL.Image")
    files = SHARED / "images" / f"{name}.jpg", SHARED / "labels" / f"{name}.png"
    image, labels = (torch.from_numpy(np.array(Image.open(each))) for each in files)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    window = slice(top, top + height), slice(left, left + width)
    return image[window].permute(2, 0, 1)[None].contiguous(), labels[window][None]


def scores(labels, noise=1.0):
    """Log-probabilities (1, 21, H, W) as of a network: coarse, and wrong in places."""
    height, width = labels.shape[1:]
    right = F.one_hot(labels.long().where(labels < 21, 0), 21).permute(0, 3, 1, 2).double()
    coarse = F.interpolate(right, (height // 8, width // 8), mode="bilinear", antialias=True)
    coarse = 4 * coarse + noise * normal(coarse.shape)
    return F.interpolate(coarse, (height, width), mode="bilinear").log_softmax(1)


def mean_iou(classes, labels):
    valid = labels < 21
    both = torch.bincount(21 * labels[valid].long() + classes[valid], minlength=441).view(21, 21).double()
    union = both.sum(0) + both.sum(1) - both.diag()
    return (both.diag() / union)[union > 0].mean().item()


@on_voc
@implementations
@pytest.mark.parametrize("name", IDS)
def test_the_filter_approximates_the_gaussian(implementation, name):
    """Of photographs, to 7 % where it is normalised."""
    image, _ = photograph(name, 48, 48)
    features = torch.from_numpy(oracle.bilateral_features(image[0].double().numpy(), (67.0, 3.0)))
    kernel, values = torch.from_numpy(oracle.gaussian(features.numpy())), image.double().flatten(2)
    for normalization in ("after", "symmetric"):
        ones = kernel.sum(1).numpy()
        truth = oracle.normalised(lambda x: x @ kernel.numpy(), ones, values[0].numpy(), normalization)
        found = segops.permutohedral_filter(values, features[None], normalization=normalization)
        assert relative_error(found[0], torch.from_numpy(truth)) <= 0.07


@on_voc
@implementations
@pytest.mark.parametrize("name", IDS)
def test_mean_field_approximates_that_of_the_gaussian(implementation, name):
    image, labels = photograph(name, 48, 48)
    logits = scores(labels)
    exact = torch.from_numpy(oracle.mean_field(logits[0].numpy(), image[0].numpy(), exact=True))
    found = segops.dense_crf(logits.float(), image)[0]
    assert (found.exp() - exact.exp()).abs().mean() <= 0.003
    assert (found.argmax(0) == exact.argmax(0)).double().mean() >= 0.99


def densecrf(logits, image, iterations, spatial, bilateral, normalization):
    """Krähenbühl and Koltun's own code, in float32: Q (1, C, H, W)."""
    package = pytest.importorskip("pydensecrf.densecrf")
    _, classes, height, width = logits.shape
    crf = package.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(-logits[0].float().flatten(1).numpy()))
    settings = {"normalization": getattr(package, f"NORMALIZE_{normalization.upper()}")}
    if spatial is not None:
        weight, sigma = spatial
        crf.addPairwiseGaussian(sxy=sigma, compat=weight, **settings)
    weight, (pixels, levels) = bilateral
    pixels_last = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=pixels, srgb=levels, rgbim=pixels_last, compat=weight, **settings)
    return torch.from_numpy(np.array(crf.inference(iterations))).view(logits.shape)


# Weights and standard deviations of DeepLab v2 with ResNet-101, and of v1.
PUBLISHED = {"symmetric": ((3.0, 1.0), (4.0, (67.0, 3.0))), "after": ((3.0, 3.0), (4.0, (49.0, 5.0)))}


@on_voc
@slow_reference
@pytest.mark.parametrize("normalization", PUBLISHED)
@pytest.mark.parametrize("name", IDS)
def test_as_the_papers_code(implementation, name, normalization):
    """The bilateral kernel alone, whose lattice is the same; and both, of which the spatial one is exact here alone."""
    image, labels = photograph(name, 120, 160)
    logits = scores(labels).float()
    (spatial_weight, spatial_sigma), (bilateral_weight, bilateral_sigma) = PUBLISHED[normalization]
    given = {"bilateral_weight": bilateral_weight, "bilateral_sigma": bilateral_sigma, "normalization": normalization}
    for spatial, least, mean in ((None, 0.9999, 1e-5), ((spatial_weight, spatial_sigma), 0.998, 5e-4)):
        theirs = densecrf(logits, image, 10, spatial, (bilateral_weight, bilateral_sigma), normalization)
        kernel = {"spatial_weight": 0 if spatial is None else spatial_weight, "spatial_sigma": spatial_sigma}
        ours = segops.dense_crf(logits, image, **kernel, **given).exp()
        assert (ours.argmax(1) == theirs.argmax(1)).double().mean() >= least
        assert (ours - theirs).abs().mean() <= mean
        assert mean_iou(ours.argmax(1), labels) >= mean_iou(theirs.argmax(1), labels) - 0.002


@on_voc
@slow_reference
def test_refined_classes_are_better(implementation):
    before, after = [], []
    for name in IDS:
        image, labels = photograph(name, 120, 160)
        logits = scores(labels, noise=1.5).float()
        before.append(mean_iou(logits.argmax(1), labels))
        after.append(mean_iou(segops.dense_crf(logits, image).argmax(1), labels))
    assert np.mean(after) > np.mean(before) + 0.02, (before, after)


@on_voc
@on_native
def test_a_large_image(implementation):
    """In float32, where rounding decides which vertices of weight 0 there are, single pixels differ."""
    image, labels = photograph(IDS[0], 320, 480)
    logits = scores(labels)
    truth = in_the_reference(segops.dense_crf, logits, image)
    assert probabilities_differ(segops.dense_crf(logits, image), truth) <= Q_BOUNDS[torch.float64]
    differences = (segops.dense_crf(logits.float(), image).exp() - truth.exp()).abs()
    assert differences.max() <= 0.03 and differences.mean() <= 1e-5


# Memory.

PEAK = """
import sys, torch, segops

def status(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

segops.backend("native")
function, side = sys.argv[1], int(sys.argv[2])
for channels in map(int, sys.argv[3:]):
    for n in (1, 1, 4):
        small = side // 8 if function == "mean field of a small map" else side
        images, logits = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8), torch.randn(n, channels, small, small)
        features = torch.cat([images / 20, torch.rand(n, 2, side, side) * 9], 1)
        features = features.double() if channels == 3 else features
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
        if function == "filter":
            result = segops.permutohedral_filter(logits, features)
        else:
            result = segops.dense_crf(logits, images, iterations=2)
        print(status("VmHWM") - before)
        del images, logits, features, result
"""


@ON_LINUX
@pytest.mark.parametrize(
    ("function", "channels"),
    [("filter", (1, 3, 64)), ("mean field", (1, 3, 21, 64)), ("mean field of a small map", (3, 21))],
)
def test_scratch_does_not_grow_with_the_batch(function, channels):
    """Beyond the result: 2 (d + 1) H W (min(C, 32) + 8) floats at most, whatever allocates them."""
    side, d = 160, 5
    command = [sys.executable, "-c", PEAK, function, str(side), *map(str, channels)]
    given_back_at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=given_back_at_once)
    assert done.returncode == 0, done.stderr
    peaks = iter(map(int, done.stdout.split()))
    for count in channels:
        result, scratch = 4 * count * side**2, 4 * 2 * (d + 1) * side**2 * (min(count, 32) + 8)
        _, *of_batches = (next(peaks) for _ in range(3))
        for n, peak in zip((1, 4), of_batches, strict=True):
            assert n * result <= peak <= n * result + scratch + (1 << 20), (count, n, peak, result, scratch)


@on_native
@pytest.mark.parametrize("bilateral_weight", [0, 4.0])
def test_what_is_kept_for_the_gradient(implementation, bilateral_weight):
    """A map of probabilities for each iteration, and the lattice, by 32-bit indices and float weights."""
    n, classes, side, iterations, corners = 2, 21, 30, 3, 6
    logits, images = normal((n, classes, side, side)).float().requires_grad_(), pictures((n, 3, side, side))
    kept = measure.kept_memory(
        lambda logits, images: segops.dense_crf(logits, images, iterations=iterations, bilateral_weight=bilateral_weight),
        (logits, images),
    )
    # Twice, by positions and by vertices; what a run may take; the filter of ones.
    lattice = corners * (3 + corners) + 2 * corners + 1 if bilateral_weight else 0
    assert 0 < kept <= 4 * n * (side**2 * (iterations * classes + lattice) + 1024) + 8192
    with torch.no_grad():
        nothing = segops.dense_crf(logits, images, iterations=iterations)
    assert nothing.grad_fn is None


@on_native
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_keeps_nothing_for_the_gradient(implementation, strict):
    """Whether or not it was exported under no_grad: parameters require gradients outside of it."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.crf = torch.nn.Conv2d(3, 4, 3, padding=1), segops.nn.CRF(4, test_iterations=2)

        def forward(self, images):
            return self.crf(self.scores(images / 100), images)

    network, images = Network().eval(), pictures((2, 3, 6, 7)).float()
    program = torch.export.export(network, (images,), strict=strict)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.segops.crf_mean_field.default]
    assert [node.args[-1] for node in calls] == [False]
    found = program.module()(images)
    assert torch.equal(found, network(images))
    with pytest.raises(
        RuntimeError, match="the result has no gradient, as it was computed, or exported, where none was wanted"
    ):
        found.sum().backward()


# Backends.


def run_both(device="cpu"):
    """Both functions and their gradients, and the names of what ran."""
    features = image_features(1, 3, 4)
    values = values_of(features).float().to(device).requires_grad_()
    case = Case((1, 3, 4, 4), settings=NEAR)
    logits, results = case.logits(torch.float32).to(device).requires_grad_(), []

    def run():
        filtered = segops.permutohedral_filter(values, features.to(device), normalization="after")
        refined = case.op(logits, images=case.images().to(device))
        results.extend([filtered, refined])
        results.extend(torch.autograd.grad([filtered, refined], [values, logits], [values.detach(), logits.detach()]))

    names = names_of(run)
    return [each.detach().cpu() for each in results], {name for name in names if name.startswith("segops")}


NATIVE = {f"segops::crf_{name}" for name in ("filter", "mean_field", "mean_field_grad")}


@interpreted
def test_the_reference_runs_where_there_are_no_kernels():
    pytest.importorskip("triton")
    results, names = {}, {}
    for each in ("triton", "emulated", "reference", "native"):
        with segops.backend(each):
            results[each], names[each] = run_both()
    assert names["triton"] == names["emulated"] == names["reference"] == {"segops_reference::crf_lattice"}
    assert names["native"] == NATIVE
    for triton, emulated, expected, close in zip(*results.values(), strict=True):
        assert torch.equal(triton, expected) and torch.equal(emulated, expected) and relative_error(close, expected) <= 1e-5


@CUDA
@pytest.mark.parametrize("backend", ["native", "triton", "auto"])
def test_the_reference_runs_on_a_gpu(backend):
    with segops.backend(backend):
        results, names = run_both("cuda")
    assert names == {"segops_reference::crf_lattice"}
    for value, expected in zip(results, in_the_reference(run_both)[0], strict=True):
        assert relative_error(value, expected) <= 1e-5


# The module.


def test_module():
    crf = segops.nn.CRF(21)
    assert sum(each.numel() for each in crf.parameters()) == 1323 and not list(crf.buffers())
    assert list(crf.state_dict()) == ["spatial_weight", "bilateral_weight", "compatibility"]
    assert torch.equal(crf.spatial_weight, 3 * torch.eye(21)) and torch.equal(crf.bilateral_weight, 5 * torch.eye(21))
    assert torch.equal(crf.compatibility, torch.eye(21))
    assert repr(crf).startswith("CRF(21, ") and all(
        f"{name}=" in repr(crf) for name in ("iterations", "spatial_sigma", "normalization")
    )
    assert (segops.nn.CRF(2, spatial_weight=10**30).spatial_weight == torch.eye(2) * 1e30).all()
    crf = segops.nn.CRF(2, 1, 2, 0.5, 0.25, 0.75, [3, 4], "symmetric", align_corners=True, dtype=torch.float64)
    assert repr(crf) == (
        "CRF(2, iterations=1, test_iterations=2, spatial_sigma=0.25, bilateral_sigma=(3, 4), normalization='symmetric', "
        "align_corners=True)"
    )
    assert {each.dtype for each in crf.parameters()} == {torch.float64}


@implementations
def test_module_is_the_function(implementation):
    logits, images = normal((2, 3, 4, 5)), pictures((2, 3, 8, 9))
    crf = segops.nn.CRF(3, 2, 4, 1.5, 2.0, 0.5, (20.0, 9.0), "after", dtype=torch.float64)
    with torch.no_grad():
        for each in crf.parameters():
            each += 0.1 * normal(each.shape, 3)
    for training, iterations in ((True, 2), (False, 4)):
        expected = segops.dense_crf(
            logits, images, iterations=iterations, spatial_sigma=2.0, bilateral_sigma=(20.0, 9.0), normalization="after",
            **dict(crf.named_parameters()),
        )  # fmt: skip
        assert torch.equal(crf.train(training)(logits, images), expected)
    F.nll_loss(crf.train()(logits, images), torch.zeros(2, 8, 9, dtype=torch.int64)).backward()
    assert all(each.grad.any() for each in crf.parameters())


@implementations
def test_module_learns(implementation):
    """Weights that start at nothing come to refine: the loss falls."""
    labels = torch.zeros(1, 12, 16, dtype=torch.int64)
    labels[:, 4:9, 5:13] = 1
    images = (labels[:, None] * 150 + 40 + 3 * normal((1, 3, 12, 16))).float()
    logits = F.one_hot(labels, 2).permute(0, 3, 1, 2).float() + 1.5 * normal((1, 2, 12, 16)).float()
    crf = segops.nn.CRF(2, spatial_weight=0.0, bilateral_weight=0.0, bilateral_sigma=(10.0, 10.0))
    optimizer, losses = torch.optim.SGD(crf.parameters(), lr=1.0), []
    for _ in range(20):
        losses.append(F.cross_entropy(crf(logits, images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


# What the ops refuse by themselves: Python may not have checked it.


def test_ops_refuse_what_does_not_fit():
    ops, z, f, images = torch.ops.segops, torch.zeros(2, 3, 6), torch.zeros(2, 4, 6), torch.zeros(2, 3, 4, 5)
    logits, eye = torch.zeros(2, 3, 4, 5), torch.eye(3)

    def mean_field(logits=logits, spatial=eye, bilateral=eye, images=images, iterations=1, sigma=1.0, normalization="after"):
        return ops.crf_mean_field(logits, spatial, bilateral, images, False, iterations, sigma, 9.0, 9.0, normalization, True)

    out, q, index, weight = mean_field()

    def grad(grad=logits, out=out, q=q, index=index, weight=weight, spatial=eye, bilateral=eye, channels=3):
        return ops.crf_mean_field_grad(grad, out, q, index, weight, spatial, bilateral, channels, 1.0, "after", True)

    for call, message in (
        (lambda: ops.crf_filter(z[0], f, "None", False), r"permutohedral_filter: needs values \(N, C, P\)"),
        (lambda: ops.crf_filter(z, f[:1], "None", False), r"permutohedral_filter: needs values \(N, C, P\)"),
        (lambda: ops.crf_filter(z, f[..., :5], "None", False), r"permutohedral_filter: needs values \(N, C, P\)"),
        (lambda: ops.crf_filter(z, f[:, :1].expand(2, 17, 6), "None", False), "permutohedral_filter: needs .* d at most 16"),
        (lambda: ops.crf_filter(z, f, "before", False), "unknown normalization before"),
        (lambda: mean_field(images=images[:1]), r"dense_crf: needs logits \(N, C, h, w\), images"),
        (lambda: mean_field(images=images[:, :, :3]), "dense_crf: saves nothing where logits are resized"),
        (lambda: mean_field(images=images[:, :, :0]), "dense_crf: needs logits and images that are not empty"),
        (lambda: mean_field(images=images[:, :1].expand(2, 15, 4, 5)), "dense_crf: needs .* K at most 14"),
        (lambda: mean_field(iterations=0), "dense_crf: needs .* an iteration"),
        (lambda: mean_field(normalization="None"), "dense_crf: needs a normalization"),
        (lambda: mean_field(logits=logits.half(), spatial=None, bilateral=None), "dense_crf: needs float or double logits"),
        (lambda: mean_field(sigma=0.0), "dense_crf: needs .* positive sigmas"),
        (lambda: mean_field(spatial=eye[:2]), r"dense_crf: spatial and bilateral must be \(C, C\)"),
        (lambda: mean_field(bilateral=eye.double()), r"dense_crf: spatial and bilateral must be \(C, C\)"),
        (lambda: mean_field(normalization="None "), "unknown normalization None "),
        (lambda: grad(grad=logits[:1]), "dense_crf: a gradient must be like the result"),
        (lambda: grad(grad=logits.double()), "dense_crf: a gradient must be like the result"),
        (lambda: grad(q=q.transpose(2, 3)), "dense_crf: a gradient must be like the result, and what was saved as it was"),
        (lambda: grad(q=q[:, :, :3].contiguous()), "dense_crf: "),
        (lambda: grad(index=index[:, :9].contiguous()), "dense_crf: "),
        (lambda: grad(weight=weight[:, :9].contiguous()), "dense_crf: "),
        (lambda: grad(channels=2), "dense_crf: "),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@on_native
def test_images_of_too_many_positions(implementation):
    """Entries of the lattice are numbered by 32 bits: said before anything is allocated."""
    one, side = torch.zeros(1, 1, 1, 1), 24000
    with pytest.raises(RuntimeError, match=r"dense_crf: an image must have fewer than 536870911 positions, with 3 features"):
        segops.dense_crf(one, one.expand(1, 1, side, side))
    with pytest.raises(RuntimeError, match="permutohedral_filter: an image must have fewer than 1073741823 positions"):
        segops.permutohedral_filter(one.expand(1, 1, 2 * side, side), one.expand(1, 1, 2 * side, side))


OUT_OF_MEMORY = """
import resource, torch, segops
segops.backend("native")
torch.set_num_threads(2)
segops.dense_crf(torch.zeros(2, 21, 8, 8), torch.zeros(2, 3, 8, 8))  # which starts the threads
logits, images = torch.zeros(2, 21, 150, 150), torch.zeros(2, 3, 150, 150)  # small enough for a thread each
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (4096 * pages + (8 << 20),) * 2)
try:
    segops.dense_crf(logits, images)
except RuntimeError as error:
    print(error)
"""


@ON_LINUX
def test_no_memory_left_in_a_thread():
    """The error says so, whichever thread met it."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out of memory. segops asked for" in done.stdout
