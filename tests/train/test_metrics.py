"""Confusion matrix, IoU and trimap against what can be counted by hand."""

import pytest
import torch

from segops.train import boundary_mask, confusion_matrix, iou


def test_confusion_and_iou():
    labels = torch.tensor([[0, 0, 1, 1, 255, -1]])
    predicted = torch.tensor([[0, 1, 1, 1, 2, 0]])
    confusion = confusion_matrix(predicted, labels, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0] * 4, [0] * 4]
    values = iou(confusion)
    assert values[:2].tolist() == pytest.approx([1 / 2, 2 / 3]) and values[2:].isnan().all()
    assert values.nanmean().item() == pytest.approx(7 / 12)
    assert torch.equal(confusion_matrix(predicted.byte(), labels.where(labels >= 0, 255).byte(), 4), confusion)


def test_a_confusion_of_parts_adds_up():
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 5, (2, 9, 11), generator=generator) for _ in range(2))
    parts = sum(confusion_matrix(predicted[i], labels[i], 5) for i in range(2))
    assert torch.equal(confusion_matrix(predicted, labels, 5), parts) and parts.sum() == labels.numel()


@pytest.mark.parametrize("radius", [1, 3])
def test_boundary_mask_is_a_band_on_both_sides(radius):
    labels = torch.zeros(1, 12, 20, dtype=torch.int64)
    labels[:, :, 9:] = 2
    columns = boundary_mask(labels, 3, radius)[0]
    assert (columns == columns[:1]).all() and columns[0].nonzero()[:, 0].tolist() == list(range(9 - radius, 9 + radius))


def test_void_is_neither_scored_nor_a_boundary():
    labels = torch.zeros(2, 16, 16, dtype=torch.uint8)
    labels[0, :, 8:] = 255
    labels[1, :, 7:9], labels[1, :, 9:] = 255, 1  # a void two pixels thin between two classes
    mask = boundary_mask(labels, 2, 3)
    assert not mask[0].any()
    assert mask[1, 0].nonzero()[:, 0].tolist() == [6, 9]


def test_boundary_mask_against_every_pair_of_pixels():
    labels = torch.randint(0, 3, (1, 9, 10), generator=torch.Generator().manual_seed(0)).where(
        torch.rand(1, 9, 10, generator=torch.Generator().manual_seed(1)) < 0.9, 255
    )
    blank = torch.full_like(labels, 255)
    coarse = torch.cat([labels, blank], 2)  # the image's own border is none
    for y, x in torch.cartesian_prod(torch.arange(9), torch.arange(10)).tolist():
        near = labels[0, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        expected = labels[0, y, x] != 255 and ((near != 255) & (near != labels[0, y, x])).any()
        assert boundary_mask(coarse, 3, 1)[0, y, x] == expected
