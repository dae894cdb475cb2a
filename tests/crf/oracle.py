"""The lattice and mean field as they are defined, in float64 and NumPy, obvious before fast; the Gaussian itself; and, by name,
mistakes that are easily made in them, for tests to show that they would be caught.

Everything is of one image: values (C, P), features (d, P), logits (C, H, W).
"""

import math

import numpy as np

FILTER_MISTAKES = (
    "axes in reverse order",
    "every axis blurs what was splatted",
    "the adjoint in forward order",
    "normalised by the adjoint's sums",
    "normalised before instead of after",
    "normalised after instead of by halves",
    "the later coordinate counts as the larger",
    "no vertices of weight 0",
    "keys of 16 bits",
    "64 bits for all coordinates",
    "a hash of structured multipliers",
    "no factor",
)
CRF_MISTAKES = (
    "axes in reverse order",
    "every axis blurs what was splatted",
    "normalised by the adjoint's sums",
    "the later coordinate counts as the larger",
    "no vertices of weight 0",
    "y before x",
    "no message of a pixel to itself",
    "taps up to three standard deviations",
    "taps of float32 in float64",
    "borders normalised as the inside",
    "compatibility transposed",
    "weights on the other side",
    "weights after compatibility",
)


def gaussian(features):
    """(P, P): the kernel that the lattice approximates."""
    squares = (features**2).sum(0)
    return np.exp(-np.maximum(squares[:, None] + squares - 2 * features.T @ features, 0) / 2)


def normalised(filtered, ones, values, normalization):
    """By a filter's sums, those of ones."""
    if normalization is None:
        return filtered(values)
    if normalization == "after":
        return filtered(values) / ones
    return filtered(values / np.sqrt(ones)) / np.sqrt(ones)


def elevate(feature):
    """Into the hyperplane of d + 1 coordinates that add up to 0: columns of E, from the last to the first."""
    d = len(feature)
    e = [0.0] * (d + 1)
    for i in range(d, 0, -1):
        along = feature[i - 1] * ((d + 1) * math.sqrt(2 / 3) / math.sqrt(i * (i + 1)))
        for row in range(i):
            e[row] += along
        e[i] -= i * along
    return e


def simplex(e, later_is_larger=False):
    """(vertices, weights) of the simplex that e lies in, vertex k having coordinates of k modulo d + 1."""
    count = len(e)
    low = [math.floor(each / count) for each in e]
    above = [each - count * lowest for each, lowest in zip(e, low, strict=True)]
    order = sorted(range(count), key=lambda i: (-above[i], -i if later_is_larger else i))
    moved = -sum(low)  # how many have to go up for a sum of 0: those that are nearest to it
    first = np.array([count * (low[i] + (i in order[:moved])) for i in range(count)])
    order = order[moved:] + order[:moved]  # the largest e - first comes first
    vertices = [first]
    for k in range(1, count):
        vertex = first + k
        vertex[order[count - k :]] -= count
        vertices.append(vertex)
    # The weights add up to 1, and so weighted the vertices to e.
    sides = np.array([vertex - first for vertex in vertices], dtype=np.float64)
    equations = np.vstack([sides.T[1:], np.ones(count)])
    weights = np.linalg.solve(equations, [*(np.array(e) - first)[1:], 1.0])
    assert weights.min() > -1e-9 and sum(first) == 0
    return vertices, weights


class Lattice:
    """Of features (d, P)."""

    def __init__(self, features, mistake=None):
        self.mistake, (self.d, count) = mistake, features.shape
        self.finite = np.isfinite(features).all(0)
        self.number = {}  # of a vertex, by its key
        self.index, self.weight = np.zeros((count, self.d + 1), dtype=np.int64), np.zeros((count, self.d + 1))
        known = []
        for p in np.flatnonzero(self.finite):
            vertices, weights = simplex(
                elevate(features[:, p].tolist()), mistake == "the later coordinate counts as the larger"
            )
            for k, (vertex, weight) in enumerate(zip(vertices, weights, strict=True)):
                if mistake == "no vertices of weight 0" and weight < 1e-12:
                    continue
                key = self.key(vertex)
                if key not in self.number:
                    self.number[key] = len(known)
                    known.append(vertex)
                self.index[p, k], self.weight[p, k] = self.number[key], weight
        self.count = len(known)
        self.neighbours = []
        for j in range(self.d + 1):
            u = np.ones(self.d + 1, dtype=np.int64)
            u[j] -= self.d + 1
            # What does not exist is number `count`, which stays 0.
            self.neighbours.append([[self.number.get(self.key(v + side * u), self.count) for v in known] for side in (1, -1)])
        if mistake in ("axes in reverse order", "every axis blurs what was splatted"):
            self.neighbours.reverse()

    def key(self, vertex):
        own = vertex[: self.d].tolist()  # the last coordinate follows from the others
        if self.mistake == "keys of 16 bits":
            return tuple((each + (1 << 15)) % (1 << 16) for each in own)
        if self.mistake == "64 bits for all coordinates":
            return tuple(each % (1 << 64 // self.d) for each in own)
        if self.mistake == "a hash of structured multipliers":
            return sum(each * 31**i for i, each in enumerate(own)) % (1 << 64)
        return tuple(own)

    def plain(self, values, adjoint=False):
        """Not normalised, of finite features alone."""
        z = np.zeros((self.count + 1, len(values)))
        for k in range(self.d + 1):
            np.add.at(z, self.index[:, k], self.weight[:, k, None] * values.T)
        splatted = z.copy()
        z[self.count] = 0
        for one, other in (
            self.neighbours[::-1] if adjoint and self.mistake != "the adjoint in forward order" else self.neighbours
        ):
            source = splatted if self.mistake == "every axis blurs what was splatted" else z
            blurred = z.copy()
            blurred[: self.count] += (source[one] + source[other]) / 2
            z = blurred
        sliced = sum(self.weight[:, k, None] * z[self.index[:, k]] for k in range(self.d + 1)).T
        return sliced if self.mistake == "no factor" else sliced / (1 + 2.0**-self.d)

    def filter(self, values, normalization, adjoint=False):
        """The adjoint of a normalised filter has the sums of the filter itself."""
        values = np.where(self.finite, values, 0.0)
        ones = np.where(
            self.finite, self.plain(np.ones_like(values[:1]), self.mistake == "normalised by the adjoint's sums"), 1.0
        )
        if normalization == "after" and (adjoint != (self.mistake == "normalised before instead of after")):
            out = self.plain(values / ones, adjoint)
        elif normalization == "symmetric" and self.mistake == "normalised after instead of by halves":
            out = self.plain(values, adjoint) / ones
        else:
            out = normalised(lambda x: self.plain(x, adjoint), ones, values, normalization)
        return np.where(self.finite, out, np.nan)


def softmax(logits):
    q = np.exp(logits - logits.max(0))
    return q / q.sum(0)


def positions(height, width):
    """(2, P): x and y."""
    return np.stack([np.tile(np.arange(width), height), np.repeat(np.arange(height), width)]).astype(np.float64)


def bilateral_features(image, sigma, mistake=None):
    x, y = positions(*image.shape[1:]) / sigma[0]
    return np.stack([*((y, x) if mistake == "y before x" else (x, y)), *(image.reshape(len(image), -1) / sigma[1])])


def spatial_filter(height, width, sigma, normalization, mistake=None):
    """A function of (C, P): the whole matrix."""
    at = positions(height, width)
    kernel = gaussian(at / sigma)
    apart = np.abs(at[:, :, None] - at[:, None]).max(0)
    if mistake == "taps up to three standard deviations":
        kernel[apart > max(1, 3 * sigma)] = 0
    if mistake == "taps of float32 in float64":
        kernel[apart > sigma * math.sqrt(48 * math.log(2))] = 0
    ones = kernel.sum(1)
    if mistake == "borders normalised as the inside":
        reach = np.arange(-math.ceil(9 * sigma), math.ceil(9 * sigma) + 1)
        ones = np.full_like(ones, np.exp(-((reach / sigma) ** 2) / 2).sum() ** 2)
    if mistake == "no message of a pixel to itself":
        kernel = kernel - np.eye(len(kernel))
    return lambda values: normalised(lambda x: x @ kernel.T, ones, values, normalization)


def bilateral_filter(image, sigma, normalization, exact=False, mistake=None):
    features = bilateral_features(image.astype(np.float64), sigma, mistake)
    if exact:
        kernel = gaussian(features)
        return lambda values: normalised(lambda x: x @ kernel.T, kernel.sum(1), values, normalization)
    lattice = Lattice(features, mistake)
    if mistake != "no message of a pixel to itself":
        return lambda values: lattice.filter(values, normalization)
    own = np.diag(lattice.filter(np.eye(features.shape[1]), normalization))
    return lambda values: lattice.filter(values, normalization) - own * values


def matrix(weight, classes):
    """A number, () , (C,) or (C, C) as what multiplies a filtered Q from the left."""
    weight = np.asarray(weight, dtype=np.float64)
    return weight if weight.ndim == 2 else np.diag(np.broadcast_to(weight, (classes,)))


def mean_field(
    logits, image, *, iterations=10, spatial_weight=3.0, spatial_sigma=1.0, bilateral_weight=4.0, bilateral_sigma=(67.0, 3.0),
    compatibility=None, normalization="symmetric", exact=False, mistake=None,
):  # fmt: skip
    """log Q (C, H, W) of logits that have the image's size. `exact` filters by the Gaussian itself."""
    classes, height, width = logits.shape
    compatibility = np.eye(classes) if compatibility is None else np.asarray(compatibility, dtype=np.float64)
    if mistake == "compatibility transposed":
        compatibility = compatibility.T
    kernels = []
    if not np.array_equal(spatial_weight, 0):
        kernels.append((spatial_weight, spatial_filter(height, width, spatial_sigma, normalization, mistake)))
    if not np.array_equal(bilateral_weight, 0):
        kernels.append((bilateral_weight, bilateral_filter(image, bilateral_sigma, normalization, exact, mistake)))
    logits = logits.reshape(classes, -1).astype(np.float64)
    updated = logits
    for _ in range(iterations):
        q = softmax(updated)
        updated = logits.copy()
        for weight, filtered in kernels:
            weight = matrix(weight, classes)
            if mistake == "weights on the other side":
                weight = weight.T
            product = weight @ compatibility if mistake == "weights after compatibility" else compatibility @ weight
            updated += product @ filtered(q)
    return np.log(softmax(updated)).reshape(classes, height, width)
