"""Confusion matrix, figures and trimap against what can be counted by hand."""

import math

import pytest
import torch

from segops.train import SegmentationMetrics, boundary_mask, confusion_matrix, iou, scores
from segops.train.metrics import PER_CLASS, micro_scores, table


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


@pytest.mark.parametrize("value", [-1, 3, 4, 8])
def test_a_prediction_of_no_class(value):
    """Class 0 predicted as 4 of 3 would count as class 1 predicted as 1: a hit."""
    labels, predicted = torch.tensor([[[0, 1], [2, 255]]]), torch.tensor([[[0, 1], [2, 0]]])
    expected = confusion_matrix(predicted, labels, 3)
    assert torch.equal(confusion_matrix(predicted.where(labels != 255, value), labels, 3), expected)  # at void none counts
    message = rf"predicted must be classes in \[0, 3\) where labels are; got {value}$"
    metrics = SegmentationMetrics(3)
    for index in range(3):
        wrong = predicted.clone()
        wrong.view(-1)[index] = value
        for score in (metrics.update, lambda p, t: confusion_matrix(p, t, 3)):
            with pytest.raises(IndexError, match=message):
                score(wrong, labels)
    assert metrics.confusion.sum() == metrics.boundary.sum() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16])
def test_more_classes_than_a_dtype_holds(dtype):
    labels = torch.tensor([[[0, 1], [2, 2]]]).to(dtype)
    assert confusion_matrix(labels, labels, 300).diag()[:3].tolist() == [1, 1, 2]
    assert boundary_mask(labels, 300, 1).all()


def test_no_pixels():
    nothing = torch.zeros(0, 4, 5, dtype=torch.long)
    metrics = SegmentationMetrics(2)
    metrics.update(nothing, nothing)
    assert metrics.confusion.sum() == 0


INTEGERS = torch.zeros(1, 2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: confusion_matrix(INTEGERS, INTEGERS[:, :1], 2),
            ValueError,
            r"predicted and labels must have one shape; got \(1, 2, 3\) and \(1, 1, 3\)",
        ),
        (
            lambda: confusion_matrix(INTEGERS.float(), INTEGERS, 2),
            TypeError,
            r"predicted must be an integer tensor; got torch\.f",
        ),
        (
            lambda: confusion_matrix(INTEGERS, INTEGERS.half(), 2),
            TypeError,
            r"labels must be an integer tensor; got torch\.float16",
        ),
        (lambda: confusion_matrix(INTEGERS.numpy(), INTEGERS, 2), TypeError, "predicted must be an integer tensor; got int64"),
        (lambda: confusion_matrix([0], INTEGERS, 2), TypeError, "predicted must be an integer tensor; got list"),
        (lambda: confusion_matrix(INTEGERS, INTEGERS, 0), ValueError, "num_classes must be an integer, at least 1; got 0"),
        (
            lambda: confusion_matrix(INTEGERS, INTEGERS, 2.0),
            ValueError,
            r"num_classes must be an integer, at least 1; got 2\.0",
        ),
        (lambda: SegmentationMetrics(True), ValueError, "num_classes must be an integer, at least 1; got True"),
        (lambda: SegmentationMetrics(2, 0), ValueError, "radius must be an integer, at least 1; got 0"),
        (lambda: boundary_mask(INTEGERS, 2, 1.5), ValueError, r"radius must be an integer, at least 1; got 1\.5"),
        (lambda: boundary_mask(INTEGERS, 0), ValueError, "num_classes must be an integer"),
        (lambda: boundary_mask(INTEGERS[0], 2), ValueError, r"labels must be \(N, H, W\); got \(2, 3\)"),
        (lambda: boundary_mask(INTEGERS[None], 2), ValueError, r"labels must be \(N, H, W\); got \(1, 1, 2, 3\)"),
        (lambda: boundary_mask(INTEGERS.float(), 2), TypeError, "labels must be an integer tensor"),
        (lambda: scores(torch.zeros(2, 3)), ValueError, r"confusion must be \(num_classes, num_classes\); got \(2, 3\)"),
        (lambda: micro_scores(torch.zeros(4, 2)), ValueError, "confusion must be"),
        (lambda: iou(torch.zeros(4)), ValueError, "confusion must be"),
    ],
)
def test_what_cannot_be_scored(call, error, message):
    with pytest.raises(error, match=message):
        call()


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


def maps(num_classes=5, void=0.1, size=(3, 10, 14), shown=None):
    """Random predictions, and labels that agree with half of them; classes of `shown` alone."""
    classes = torch.arange(num_classes) if shown is None else torch.tensor(shown)
    predicted, labels = (classes[torch.randint(0, len(classes), size)] for _ in range(2))
    labels = labels.where(torch.rand(size) < 0.5, predicted)
    return predicted, labels.where(torch.rand(size) >= void, 255)


def counts(predicted, labels, index):
    """(hits, false alarms, misses, the rest) of one class, pixel by pixel."""
    pairs = [
        (p == index, t == index)
        for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True)
        if t != 255
    ]
    return [pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))]


def figures(tp, fp, fn, tn):
    def ratio(numerator, denominator):
        return numerator / denominator if denominator else 0.0

    return {
        "iou": ratio(tp, tp + fp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": tn / (tn + fp) if tn + fp else math.nan,
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }


@pytest.mark.parametrize("shown", [None, [0, 2, 4], [3, 4], [1]])
@pytest.mark.parametrize("void", [0.0, 0.3])
def test_scores_against_every_pixel(shown, void):
    predicted, labels = maps(void=void, shown=shown)
    confusion = confusion_matrix(predicted, labels, 5)
    found, summed = scores(confusion), [0] * 4
    assert tuple(found) == PER_CLASS and all(values.dtype == torch.float64 for values in found.values())
    for index in range(5):
        cells = counts(predicted, labels, index)
        summed = [a + b for a, b in zip(summed, cells, strict=True)]
        for name, value in figures(*cells).items():
            expected = value if shown is None or index in shown else math.nan
            assert found[name][index].item() == pytest.approx(expected, nan_ok=True), (name, index)
    assert {name: value.item() for name, value in micro_scores(confusion).items()} == pytest.approx(figures(*summed))


def test_a_class_never_predicted_and_one_never_there():
    """Class 1 is never predicted, class 2 never there, class 3 neither."""
    labels = torch.tensor([[0, 0, 0, 1, 1, 255]])
    predicted = torch.tensor([[0, 0, 2, 0, 2, 1]])
    found = {name: values.tolist() for name, values in scores(confusion_matrix(predicted, labels, 4)).items()}
    assert found["precision"][:3] == pytest.approx([2 / 3, 0, 0]) and found["sensitivity"][:3] == pytest.approx([2 / 3, 0, 0])
    assert found["iou"][:3] == pytest.approx([1 / 2, 0, 0]) and found["f1"][:3] == pytest.approx([2 / 3, 0, 0])
    assert found["specificity"][:3] == pytest.approx([1 / 2, 1, 3 / 5]) and found["accuracy"][:3] == pytest.approx(
        [3 / 5, 3 / 5, 3 / 5]
    )
    assert all(math.isnan(values[3]) for values in found.values())


def test_one_class_alone():
    found = scores(torch.tensor([[7, 0], [0, 0]]))
    assert [found[name][0].item() for name in PER_CLASS if name != "specificity"] == [1.0] * 5
    assert found["specificity"][0].isnan() and all(values[1].isnan() for values in found.values())


def test_nothing_at_all():
    empty = torch.zeros(3, 3, dtype=torch.long)
    assert all(values.isnan().all() for values in scores(empty).values())
    assert all(value.isnan() for value in micro_scores(empty).values())


def test_large_counts_are_exact():
    """Beyond float32's integers: one pixel in 2^40."""
    confusion = torch.tensor([[2**40, 1], [0, 2**40]])
    assert 1 - scores(confusion)["precision"][1].item() == pytest.approx(2.0**-40, rel=1e-3)


NAMES = ["pixel_accuracy", *(f"{name}_{kind}" for name in PER_CLASS for kind in ("macro", "micro")), "boundary_iou_macro"]


def test_metrics_of_batches_are_those_of_all():
    predicted, labels = maps(size=(6, 20, 24))
    whole, parts = SegmentationMetrics(5), SegmentationMetrics(5)
    whole.update(predicted, labels)
    for chosen in (slice(0, 1), slice(1, 3), slice(3, 6)):
        parts.update(predicted[chosen], labels[chosen].byte())
    assert sorted(whole.compute()) == sorted(NAMES)
    assert all(torch.equal(whole.compute()[name], parts.compute()[name]) for name in NAMES)
    assert all(torch.equal(value, parts.per_class()[name]) for name, value in whole.per_class().items())
    parts.reset()
    parts.update(predicted[:1], predicted[:1])
    assert parts.compute()["iou_macro"] == 1 and parts.confusion.sum() == 20 * 24


def test_metrics_against_scores():
    predicted, labels = maps(shown=[0, 1, 4])
    metrics = SegmentationMetrics(5, radius=1)
    metrics.update(predicted, labels)
    values, confusion = metrics.compute(), confusion_matrix(predicted, labels, 5)
    valid = labels != 255
    assert values["pixel_accuracy"].item() == pytest.approx((predicted == labels)[valid].double().mean().item())
    for name in PER_CLASS:
        assert values[f"{name}_macro"].item() == pytest.approx(scores(confusion)[name][[0, 1, 4]].mean().item())
        assert values[f"{name}_micro"] == micro_scores(confusion)[name]
        assert torch.equal(metrics.per_class()[name].nan_to_num(-1), scores(confusion)[name].nan_to_num(-1))
    near = labels.where(boundary_mask(labels, 5, 1), 255)
    boundary = iou(confusion_matrix(predicted, near, 5))
    assert values["boundary_iou_macro"] == boundary.nanmean()
    assert torch.equal(metrics.per_class()["boundary_iou"].nan_to_num(-1), boundary.nan_to_num(-1))
    assert all(value.dtype == torch.float64 and value.shape == () for value in values.values())


@pytest.mark.parametrize("radius", [1, 3])
def test_boundary_iou(radius):
    """An edge that is one column off: right of the band's 2 radius columns but one."""
    labels, predicted = torch.zeros(2, 1, 12, 20, dtype=torch.long).unbind()
    labels[:, :, 10:], predicted[:, :, 11:] = 1, 1
    metrics = SegmentationMetrics(2, radius)
    metrics.update(predicted, labels)
    expected = [radius / (radius + 1), (radius - 1) / radius]
    assert metrics.per_class()["boundary_iou"].tolist() == pytest.approx(expected)
    assert metrics.compute()["iou_macro"].item() == pytest.approx((10 / 11 + 9 / 10) / 2)
    metrics = SegmentationMetrics(2, radius)
    metrics.update(predicted[:, :, :5], labels[:, :, :5])
    assert metrics.compute()["boundary_iou_macro"].isnan() and metrics.compute()["iou_macro"] == 1


def test_ignored_pixels_never_count():
    predicted, labels = maps(void=0.3)
    results = []
    for other in (predicted, predicted.where(labels != 255, (predicted + 1) % 5)):
        metrics = SegmentationMetrics(5)
        metrics.update(other, labels)
        results.append((metrics.compute(), metrics.confusion.sum().item()))
    assert results[0] == results[1] and results[0][1] == (labels != 255).sum()
    metrics = SegmentationMetrics(5)
    metrics.update(predicted, torch.full_like(labels, 255))
    assert all(value.isnan() for value in metrics.compute().values())


def test_table():
    predicted, labels = maps(3, shown=[0, 2])
    metrics = SegmentationMetrics(3)
    metrics.update(predicted, labels)
    summary, per_class = metrics.compute(), metrics.per_class()
    lines = table(summary, per_class, ["sky", "a long name of a class", "road"]).splitlines()
    assert lines[0].split() == [*PER_CLASS, "boundary_iou"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[1].split() == ["sky", *(f"{per_class[name][0]:.4f}" for name in (*PER_CLASS, "boundary_iou"))]
    assert lines[2].startswith("a long name of a class") and lines[2].split()[-7:] == ["-"] * 7
    assert lines[4].split() == ["macro", *(f"{summary[f'{name}_macro']:.4f}" for name in (*PER_CLASS, "boundary_iou"))]
    assert lines[5].split() == ["micro", *(f"{summary[f'{name}_micro']:.4f}" for name in PER_CLASS), "-"]
    assert lines[6].split() == ["pixel", "accuracy", "(micro)", f"{summary['pixel_accuracy']:.4f}"]
    assert "macro: mean over the classes that occur" in lines[7] and "micro: of sums over classes" in lines[7]
