"""That the oracle's lattice is one, and that the accuracy tests would see mistakes: on the very inputs that they use, each makes
far more of a difference than their bounds allow."""

import functools

import numpy as np
import pytest
import torch

from ..accuracy import relative_error
from . import oracle
from .conftest import CASES, FEATURES, FILTER_BOUNDS, NORMALIZATIONS, filtered, lattices_of, values_of


@pytest.mark.parametrize("d", [1, 2, 5, 16])
def test_simplex(d):
    """Its vertices are points of the lattice, the weights of a point within it positive and those of a vertex 1 and 0."""
    for seed in range(20):
        feature = np.random.default_rng(seed).normal(size=d) * 10.0 ** (seed % 4)
        e = oracle.elevate(feature.tolist())
        # Distances are those of the features, (d + 1) sqrt(2 / 3) times as long.
        assert np.linalg.norm(e) == pytest.approx((d + 1) * np.sqrt(2 / 3) * np.linalg.norm(feature))
        vertices, weights = oracle.simplex(e)
        for k, vertex in enumerate(vertices):
            assert sum(vertex) == 0 and set(vertex % (d + 1)) == {k}
            assert all(np.abs(vertex - other).max() <= d for other in vertices)
        assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(weights @ np.array(vertices), e, atol=1e-9)
        _, at_a_vertex = oracle.simplex(vertices[d // 2].astype(float).tolist())
        assert sorted(at_a_vertex.round(12).tolist()) == [0.0] * d + [1.0]


@functools.cache
def of_filters(mistake=None):
    return {
        (name, normalization, adjoint): filtered(values_of(features), lattices, normalization, adjoint)
        for name, features in FEATURES.items()
        for lattices in [lattices_of(features, mistake)]
        for normalization in NORMALIZATIONS
        for adjoint in (False, True)
    }


@functools.cache
def probabilities(mistake=None):
    return {name: case.exactly(mistake).exp() for name, case in CASES.items()}


@pytest.mark.parametrize("mistake", oracle.FILTER_MISTAKES)
def test_a_mistake_in_the_filter_shows(mistake):
    """In what `test_filter` and `test_gradient_of_the_filter` compare."""
    errors = {key: relative_error(each, of_filters()[key]) for key, each in of_filters(mistake).items()}
    assert max(errors.values()) > 1000 * FILTER_BOUNDS[torch.float32], errors


@pytest.mark.parametrize("mistake", oracle.CRF_MISTAKES)
def test_a_mistake_in_mean_field_shows(mistake):
    """In what `test_mean_field` compares."""
    dtype = torch.float64 if "float64" in mistake else torch.float32
    ratios = {
        name: ((each - probabilities()[name]).abs().max() / CASES[name].bounds[dtype]).item()
        for name, each in probabilities(mistake).items()
    }
    assert max(ratios.values()) > 30, ratios
