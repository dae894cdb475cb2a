"""Real images: predictions of 1/16 of the resolution get better, and as much so as by pydensecrf2, Krähenbühl and Koltun's own
code."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import segops
from benchmarks import bench_crf, scene
from segops.train.metrics import confusion_matrix, iou

VOC = Path(__file__).parents[3] / "shared" / "data" / "voc_slice"
IDS = sorted(path.stem for path in (VOC / "labels").glob("*.png"))
CLASSES = 21

pytestmark = [
    pytest.mark.skipif(not IDS, reason="shared/data/voc_slice is not beside the checkout"),
    pytest.mark.skipif(bench_crf.DenseCRF2D is None, reason="pydensecrf2 is not installed"),
]


def read(name):
    """(coarse logits at the image's size (1, 21, H, W), image (1, 3, H, W), labels (H, W))."""
    image = torch.from_numpy(np.array(Image.open(VOC / "images" / f"{name}.jpg").convert("RGB"))).permute(2, 0, 1)
    labels = torch.from_numpy(np.array(Image.open(VOC / "labels" / f"{name}.png"))).long()
    coarse = scene.coarse_logits(labels, CLASSES, 16)
    return F.interpolate(coarse[None], labels.shape, mode="bilinear"), image[None], labels


@pytest.fixture(scope="module")
def refined():
    """{name: (labels, coarse logits, Q, pydensecrf2's Q)}, with both kernels."""
    found = {}
    for name in IDS:
        logits, image, labels = read(name)
        found[name] = labels, logits, segops.dense_crf(logits, image).exp(), bench_crf.pydensecrf(logits, image)
    return found


def agreement(q, other):
    """(share of pixels with one class, mean difference of probabilities)."""
    return (q.argmax(1) == other.argmax(1)).double().mean().item(), (q - other).abs().mean().item()


@pytest.mark.parametrize("name", IDS)
def test_as_pydensecrf2(refined, name):
    *_, q, other = refined[name]
    labels, difference = agreement(q, other)  # its spatial kernel is another lattice
    assert labels >= 0.998 and difference <= 5e-4


# The largest lattice to a pixel, and the smallest.
@pytest.mark.parametrize("name", ["2007_000129", "vainf_1"])
def test_as_pydensecrf2_with_the_bilateral_kernel_alone(name):
    logits, image, _ = read(name)
    q = segops.dense_crf(logits, image, spatial_weight=0).exp()
    labels, difference = agreement(q, bench_crf.pydensecrf(logits, image, spatial=False))
    assert labels >= 0.9999 and difference <= 1e-5


def test_better_than_before_and_as_good_as_pydensecrf2(refined):
    def miou(which):
        confusions = (confusion_matrix(each[which].argmax(1)[0], each[0], CLASSES) for each in refined.values())
        return iou(sum(confusions)).nanmean()

    coarse, ours, theirs = (miou(which) for which in (1, 2, 3))
    assert ours > coarse and ours >= theirs - 0.002
