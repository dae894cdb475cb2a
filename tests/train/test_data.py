"""Synthetic scenes and the folder of images: determinism, layout, errors that name the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segops.train import FolderDataset, SyntheticScenes

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_scenes_are_deterministic():
    first, again, other = SyntheticScenes(3, seed=1), SyntheticScenes(3, seed=1), SyntheticScenes(3, seed=2)
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first[i], again[i], strict=True))
        assert not torch.equal(first[i][0], other[i][0])


def test_scenes_show_every_class():
    scenes = SyntheticScenes(60, size=(96, 128))
    image, label = scenes[0]
    assert image.shape == (3, 96, 128) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert label.shape == (96, 128) and label.dtype == torch.int64
    counts = torch.stack([torch.bincount(scenes[i][1].flatten(), minlength=len(scenes.classes)) for i in range(60)])
    assert counts.shape[1] == len(scenes.classes)
    assert ((counts > 0).sum(0) >= 10).all()
    with pytest.raises(IndexError, match=r"index must be in \[0, 60\); got 60"):
        scenes[60]


@pytest.fixture
def folder(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(tmp_path / "images/train" / f"{name}.jpg")
        label = rng.integers(0, 4, (12, 16), dtype=np.uint8)
        label[0, 0] = 255
        Image.fromarray(label).save(tmp_path / "labels/train" / f"{name}.png")
    return tmp_path


def test_folder(folder):
    dataset = FolderDataset(folder, "train", num_classes=3, void=3)
    image, label = dataset[1]
    assert len(dataset) == 2 and image.shape == (3, 12, 16) and label.shape == (12, 16)
    original = np.array(Image.open(folder / "labels/train/b.png"))
    assert np.array_equal(label.numpy(), np.where(original == 3, 255, original))
    assert FolderDataset(folder, "train", 3, void=3, size=(6, 8))[0][1].shape == (6, 8)


def test_folder_errors(folder):
    with pytest.raises(FileNotFoundError, match=r"images/val is not a folder: expected .*images/val/ID\.jpg"):
        FolderDataset(folder, "val", 4)
    with pytest.raises(ValueError, match=r"labels/train/[ab]\.png holds label 3: not in \[0, 3\), and not void \(255\)"):
        FolderDataset(folder, "train", 3)[0]
    (folder / "images/train/a.jpg").write_bytes((folder / "images/train/a.jpg").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image"):
        FolderDataset(folder, "train", 4)[0]
    Image.new("L", (5, 5)).save(folder / "labels/train/b.png")
    with pytest.raises(ValueError, match=r"b\.png is 5x5, its image 16x12"):
        FolderDataset(folder, "train", 4)[1]
    Image.new("RGB", (16, 12)).save(folder / "labels/train/b.png")
    with pytest.raises(ValueError, match=r"b\.png must hold one 8-bit class index a pixel; its mode is RGB"):
        FolderDataset(folder, "train", 4)[1]
    (folder / "labels/train/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png is missing: the label of .*b\.jpg"):
        FolderDataset(folder, "train", 4)


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="the CamVid images are not beside the checkout")
def test_camvid():
    for split, count in (("train", 367), ("val", 101)):
        dataset = FolderDataset(SHARED / "camvid", split, 11, void=11)
        assert len(dataset) == count
        image, label = dataset[count // 2]
        assert image.shape == (3, 360, 480) and set(label.unique().tolist()) <= {*range(11), 255}
