"""Synthetic scenes: the same everywhere, and every class in them."""

import pytest
import torch

from segops.train import SyntheticScenes


def test_scenes_are_deterministic():
    first, again, other = SyntheticScenes(3, seed=1), SyntheticScenes(3, seed=1), SyntheticScenes(3, seed=2)
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first[i], again[i], strict=True))
        assert not torch.equal(first[i][0], other[i][0])


def test_scenes_show_every_class():
    scenes = SyntheticScenes(60, size=(96, 128))
    image, mask = scenes[0]
    assert image.shape == (3, 96, 128) and image.dtype == torch.uint8
    assert mask.shape == (96, 128) and mask.dtype == torch.uint8
    counts = torch.stack([torch.bincount(scenes[i][1].flatten(), minlength=scenes.num_classes) for i in range(60)])
    assert counts.shape[1] == len(scenes.classes)
    assert ((counts > 0).sum(0) >= 10).all()
    with pytest.raises(IndexError, match=r"index must be in \[0, 60\); got 60"):
        scenes[60]
