"""How good a segmentation is: one confusion matrix over an epoch and all ranks, and every figure from it."""

import torch
import torch.nn.functional as F
from torchmetrics import Metric

from .transforms import check_integer

# Means over classes are "macro"; "micro" is of the sums over classes.
PER_CLASS = ("iou", "f1", "precision", "sensitivity", "specificity", "accuracy")


def confusion_matrix(predicted, labels, num_classes):
    """How many pixels of each class are predicted as which: (num_classes, num_classes) int64, truth in rows.

    Args:
        predicted: classes, integer tensor of any shape: in [0, num_classes) where the label is.
        labels: integer tensor of the same shape; pixels whose label is not in [0, num_classes), as void, do not count.
        num_classes: number of classes.

    Raises:
        IndexError: a pixel that counts is predicted as no class; names the value.
        TypeError: predicted or labels is not an integer tensor.
        ValueError: their shapes differ, or num_classes is not a positive integer.
    """
    check_integer("num_classes", num_classes, 1)
    predicted, labels = integers("predicted", predicted), integers("labels", labels)
    if predicted.shape != labels.shape:
        raise ValueError(f"predicted and labels must have one shape; got {tuple(predicted.shape)} and {tuple(labels.shape)}")
    valid = (labels >= 0) & (labels < num_classes)
    predicted, labels = predicted[valid], labels[valid]
    if predicted.numel():
        least, most = torch.stack(predicted.aminmax()).tolist()
        if least < 0 or most >= num_classes:
            raise IndexError(
                f"predicted must be classes in [0, {num_classes}) where labels are; got {least if least < 0 else most}"
            )
    return counts_of_pairs(predicted, labels, num_classes)


def counts_of_pairs(predicted, labels, num_classes):
    """`confusion_matrix` of classes, which are not checked."""
    pairs = labels.long() * num_classes + predicted.long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def integers(name, values):
    """The tensor as int64, in which no number of classes overflows."""
    if not isinstance(values, torch.Tensor) or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must be an integer tensor; got {getattr(values, 'dtype', type(values).__name__)}")
    return values.long()


def check_confusion(confusion):
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion must be (num_classes, num_classes); got {tuple(confusion.shape)}")


def scores(confusion):
    """Figures of each class from a confusion matrix, one class against the rest: {name: (num_classes,) float64}.

    iou (also called Jaccard), f1 (Dice), precision, sensitivity (recall, class accuracy), specificity, and accuracy: of all pixels those rightly given
    or not given to the class, as Fischer and Malhotra's.

    A class that occurs in neither truth nor prediction is NaN everywhere: it is not scored. Of one that occurs, what would be 0 / 0 is 0, so that a class
    never predicted has precision 0, and is not left out of the mean; specificity where nothing else occurs is NaN.

    Raises:
        ValueError: confusion is not square.
    """
    check_confusion(confusion)
    confusion = confusion.double()
    total, hit = confusion.sum(), confusion.diag()
    truth, predicted = confusion.sum(1), confusion.sum(0)
    occurs = truth + predicted > 0

    def ratio(numerator, denominator):
        return (numerator / denominator.clamp_min(1)).where(occurs, torch.nan)

    others = total - truth
    specificity = ratio(others - (predicted - hit), others)
    return {
        "iou": ratio(hit, truth + predicted - hit),
        "f1": ratio(2 * hit, truth + predicted),
        "precision": ratio(hit, predicted),
        "sensitivity": ratio(hit, truth),
        "specificity": specificity.where(others > 0, torch.nan),
        "accuracy": ratio(total - truth - predicted + 2 * hit, total),
    }


def micro_scores(confusion):
    """The same figures of hits, misses and false alarms summed over the classes. As every pixel has one class and one prediction, f1, precision and
    sensitivity all equal the share of pixels that are right."""
    check_confusion(confusion)
    confusion = confusion.double()
    total, hit, count = confusion.sum(), confusion.diag().sum(), len(confusion)
    wrong = total - hit

    def ratio(numerator, denominator):
        return numerator / denominator if denominator > 0 else torch.tensor(torch.nan, dtype=torch.double)

    right = ratio(hit, total)
    return {
        "iou": ratio(hit, total + wrong),
        "f1": right,
        "precision": right,
        "sensitivity": right,
        "specificity": ratio((count - 1) * total - wrong, (count - 1) * total),
        "accuracy": ratio(count * total - 2 * wrong, count * total),
    }


def iou(confusion):
    """Intersection over union of each class, (num_classes,) float64: NaN where neither truth nor prediction has it. `.nanmean()` is mIoU."""
    return scores(confusion)["iou"]


def boundary_mask(labels, num_classes, radius=3):
    """The trimap: pixels with a pixel of another class at most `radius` rows and columns away, (N, H, W) bool.

    Args:
        labels: (N, H, W), integer. What is not in [0, num_classes) is void: never in the mask, and no class, so that a border
            to void alone is no boundary; across a void thinner than `radius` two classes are still near each other.
        num_classes: number of classes.
        radius: in pixels, default 3.

    Boundary mIoU scores these pixels alone: `confusion_matrix(predicted, labels.where(mask, 255), num_classes)`.

    Raises:
        TypeError: labels is not an integer tensor.
        ValueError: labels has another number of dimensions, or num_classes or radius is not a
            positive integer.
    """
    check_integer("num_classes", num_classes, 1)
    check_integer("radius", radius, 1)
    labels = integers("labels", labels)
    if labels.ndim != 3:
        raise ValueError(f"labels must be (N, H, W); got {tuple(labels.shape)}")
    valid = (labels >= 0) & (labels < num_classes)
    classes = labels.float()
    highest, lowest = (
        F.max_pool2d(values.where(valid, -torch.inf)[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
        for values in (classes, -classes)
    )
    return valid & (highest != -lowest)


class SegmentationMetrics(Metric):
    """Every figure of a segmentation, from one confusion matrix that is summed over batches and ranks, and one of the pixels at boundaries.

    Call it or `update(predicted, labels)` with integer tensors (N, H, W); `compute()` gives

        pixel_accuracy                    share of pixels that are right
        NAME_macro, NAME_micro            iou, f1, precision, sensitivity, specificity, accuracy: mean over the classes that occur; of sums
        boundary_iou_macro                IoU of the pixels within `radius` of another class, mean over classes

    as float64 scalars, and `per_class()` the figures of each class. Pixels of no class, as 255, never count. mIoU is iou_macro; Jaccard is iou.

    Args:
        num_classes: number of classes.
        radius: of the boundary, in pixels, default 3.

    Raises:
        IndexError, TypeError, ValueError: as `confusion_matrix` and `boundary_mask`.
    """

    full_state_update = False

    def __init__(self, num_classes, radius=3):
        super().__init__()
        check_integer("num_classes", num_classes, 1)
        check_integer("radius", radius, 1)
        self.num_classes, self.radius = num_classes, radius
        for name in ("confusion", "boundary"):
            self.add_state(name, torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted, labels):
        near = boundary_mask(labels, self.num_classes, self.radius)
        # Not in place: what reset() makes in an evaluation is for inference alone.
        self.confusion = self.confusion + confusion_matrix(predicted, labels, self.num_classes)
        self.boundary = self.boundary + counts_of_pairs(predicted[near], labels[near], self.num_classes)

    def compute(self):
        micro = micro_scores(self.confusion)
        result = {"pixel_accuracy": micro["sensitivity"]}
        for name, values in scores(self.confusion).items():
            result[f"{name}_macro"], result[f"{name}_micro"] = values.nanmean(), micro[name]
        result["boundary_iou_macro"] = iou(self.boundary).nanmean()
        return result

    def per_class(self):
        """{name: (num_classes,) float64}, as `scores`, and boundary_iou, of the batches of all ranks."""
        with self.sync_context():
            return scores(self.confusion) | {"boundary_iou": iou(self.boundary)}


def table(summary, per_class, classes):
    """The figures as text: a line for each class, then the means, each under the name of its reduction."""
    names = [name for name in (*PER_CLASS, "boundary_iou") if name in per_class]
    width = max(len("boundary_iou"), *(len(name) for name in classes))
    lines = [" " * width + "".join(f"{name:>14}" for name in names)]

    def line(title, values):
        cells = "".join(f"{'-' if value is None or value != value else f'{value:.4f}':>14}" for value in values)
        return f"{title:<{width}}{cells}"

    for index, title in enumerate(classes):
        lines.append(line(title, [per_class[name][index].item() for name in names]))
    for reduction in ("macro", "micro"):
        values = [summary.get(f"{name}_{reduction}") for name in names]
        lines.append(line(reduction, [None if value is None else float(value) for value in values]))
    lines.append(f"{'pixel accuracy (micro)':<{width}}{float(summary['pixel_accuracy']):>12.4f}")
    lines.append(
        "macro: mean over the classes that occur, of iou (Jaccard) mIoU. micro: of sums over classes. void is not scored."
    )
    return "\n".join(lines)
