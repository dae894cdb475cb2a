"""Inputs, each for what it makes the lattice or mean field do; and bounds, those of the contract."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import segops

from . import oracle

FILTER_BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # in relative norm
Q_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of every probability
SPATIAL_BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5}  # where the spatial kernel is alone
GRADIENT_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3}  # in relative norm


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(shape, low=-1.0, high=1.0, seed=0):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64) * (high - low) + low


def normal(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def pictures(shape, seed=0, noise=6):
    """uint8: coloured patches with noise, whose first columns are black. There x = 0 and coordinates are equal."""
    n, channels, height, width = shape
    smooth = F.interpolate(uniform((n, channels, 3, 4), 0, 255, seed), (height, width), mode="bilinear")
    picture = (smooth + noise * normal(shape, seed + 1)).clamp(0, 255)
    picture[..., : min(3, width - 1)] = 0
    return picture.to(torch.uint8)


def image_features(n=2, height=9, width=11):
    return torch.from_numpy(
        np.stack(
            [
                oracle.bilateral_features(each.double().numpy(), (5.0, 20.0)).reshape(5, height, width)
                for each in pictures((n, 3, height, width))
            ]
        )
    )


def smooth_features(n, d, count, seed=0):
    """Of any dimension, along a curve: positions share vertices, and vertices have neighbours."""
    at = torch.linspace(0, 3, count, dtype=torch.float64)
    angles = at[:, None] * uniform((n, 1, d), 0.2, 2, seed) + uniform((n, 1, d), 0, 6, seed + 1)
    return angles.sin().transpose(1, 2).contiguous()


def far_features(d, count=20):
    """A cloud of positions, and the same where lattice coordinates are larger by each of these powers of two times
    (1, .., 1, -d): up to |f| = 9e4, apart by more than keys of few bits can tell."""
    cloud = uniform((1, d, count), 0, 1.5)
    shift = np.zeros(d)
    shift[-1] = 1 / (np.sqrt(2 / 3) * (d + 1)) * np.sqrt(d * (d + 1))  # of (1, .., 1, -d)
    powers = [0, *(2**bits for bits in (4, 8, 10, 12, 14, 16))]
    return torch.cat([cloud + power * torch.from_numpy(shift)[:, None] for power in powers], 2)


FEATURES = {  # (N, d, *)
    "image": image_features(),
    "positions": torch.from_numpy(oracle.positions(13, 8)).view(1, 2, 13, 8) / 3,
    "one dimension": uniform((2, 1, 30), 0, 9),
    "volume": uniform((1, 3, 3, 4, 5), 0, 2),
    "sixteen dimensions": smooth_features(1, 16, 35),
    "one position": uniform((2, 3, 1)),
    "far apart in two": far_features(2),
    "far apart in five": far_features(5),
    "far apart in sixteen": far_features(16, 8),
    "spread out": uniform((1, 2, 400), 0, 100),  # where vertices are 31 times as far apart along one axis as along another
}
NORMALIZATIONS = (None, "after", "symmetric")


def values_of(features, channels=3):
    return normal((features.shape[0], channels, *features.shape[2:]), 7)


def lattices_of(features, mistake=None):
    """The oracle's, one for each image."""
    return [oracle.Lattice(each.double().flatten(1).numpy(), mistake) for each in features]


def filtered(values, lattices, normalization, adjoint=False):
    """By the oracle, float64."""
    flat = values.detach().double().flatten(2).numpy()
    each = [lattice.filter(image, normalization, adjoint) for lattice, image in zip(lattices, flat, strict=True)]
    return torch.from_numpy(np.stack(each)).view(values.shape)


@dataclass(frozen=True)
class Case:
    """An input of dense_crf."""

    shape: tuple  # of the logits: (N, C, H, W)
    channels: int = 3  # of the images
    settings: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)  # shapes, of tensors: spatial_weight, bilateral_weight, compatibility
    noise: float = 6

    def logits(self, dtype=torch.float64):
        n, classes, height, width = self.shape
        smooth = F.interpolate(normal((n, classes, 3, 3)), (height, width), mode="bilinear")
        return (1.5 * smooth + 0.7 * normal(self.shape, 1)).to(dtype)

    def images(self):
        n, _, height, width = self.shape
        return pictures((n, self.channels, height, width), noise=self.noise)

    def tensors(self, dtype=torch.float64):
        """Weights around 1, a compatibility near the identity."""
        drawn = {}
        for seed, (name, shape) in enumerate(self.weights.items(), 20):
            matrix = len(shape) == 2
            drawn[name] = 0.4 * normal(shape, seed) + torch.eye(shape[0]) if matrix else uniform(shape, 0.5, 1.5, seed)
        return {name: each.to(dtype) for name, each in drawn.items()}

    def op(self, logits, tensors=None, images=None):
        images = self.images() if images is None else images
        tensors = self.tensors(logits.dtype) if tensors is None else tensors
        return segops.dense_crf(logits, images, **self.settings, **tensors)

    def exactly(self, mistake=None, **settings):
        """log Q by the oracle."""
        given = {name: each.numpy() for name, each in self.tensors().items()}
        each = [
            oracle.mean_field(logits.numpy(), image.numpy(), mistake=mistake, **self.settings, **given, **settings)
            for logits, image in zip(self.logits(), self.images(), strict=True)
        ]
        return torch.from_numpy(np.stack(each))

    @property
    def bounds(self):
        return SPATIAL_BOUNDS if self.settings.get("bilateral_weight") == 0 else Q_BOUNDS


# Of the size of these images, and no more than what leaves probabilities between 0 and 1.
NEAR = {"bilateral_sigma": (5.0, 20.0), "spatial_weight": 0.6, "bilateral_weight": 0.9}
MATRICES = {"spatial_weight": (4, 4), "bilateral_weight": (4, 4), "compatibility": (4, 4)}
CASES = {
    "defaults": Case((2, 4, 12, 14)),
    "bilateral alone": Case((2, 3, 11, 9), settings={**NEAR, "spatial_weight": 0, "iterations": 3}),
    "spatial alone": Case(
        (2, 3, 13, 10), settings={"spatial_weight": 1.0, "bilateral_weight": 0, "spatial_sigma": 1.5, "iterations": 4}
    ),
    "after": Case((1, 4, 10, 12), settings={**NEAR, "normalization": "after", "spatial_sigma": 3.0, "iterations": 5}),
    "matrices": Case(
        (2, 4, 9, 10), settings={"bilateral_sigma": (5.0, 20.0), "normalization": "after", "iterations": 3}, weights=MATRICES
    ),
    "matrices, symmetric": Case((1, 4, 10, 8), settings={"bilateral_sigma": (5.0, 20.0), "iterations": 4}, weights=MATRICES),
    "weights per class": Case(
        (1, 5, 8, 9),
        settings={"bilateral_sigma": (5.0, 20.0)},
        weights={"spatial_weight": (5,), "bilateral_weight": (), "compatibility": (5, 5)},
    ),
    "negative weights": Case((1, 3, 8, 9), settings={**NEAR, "spatial_weight": -0.4, "bilateral_weight": -0.5}),
    "a kernel wider than the image": Case((1, 3, 3, 3), settings={**NEAR, "spatial_sigma": 40.0}),
    "a kernel of the pixel alone": Case((1, 3, 6, 7), settings={**NEAR, "spatial_sigma": 0.1, "bilateral_sigma": (0.1, 0.1)}),
    "one row": Case((2, 3, 1, 17), settings=NEAR),
    "one column": Case((2, 3, 17, 1), settings=NEAR),
    "one pixel": Case((2, 3, 1, 1), settings=NEAR),
    "one iteration": Case((1, 3, 7, 8), settings={**NEAR, "iterations": 1}),
}
