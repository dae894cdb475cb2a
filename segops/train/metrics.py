"""How good a segmentation is: confusion matrix, intersection over union, and the band along boundaries for both."""

import torch
import torch.nn.functional as F


def confusion_matrix(predicted, labels, num_classes):
    """How many pixels of each class are predicted as which: (num_classes, num_classes) int64, truth in rows.

    Args:
        predicted: classes in [0, num_classes), integer tensor of any shape.
        labels: integer tensor of the same shape; pixels whose label is not in [0, num_classes), as void, do not count.
        num_classes: number of classes.
    """
    valid = (labels >= 0) & (labels < num_classes)
    pairs = labels[valid].long() * num_classes + predicted[valid]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def iou(confusion):
    """Intersection over union of each class, (num_classes,): NaN where neither truth nor prediction has it. `.nanmean()` is mIoU."""
    intersection = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return intersection / union.where(union > 0, torch.nan)


def boundary_mask(labels, num_classes, radius=3):
    """The trimap: pixels with a pixel of another class at most `radius` rows and columns away, (N, H, W) bool.

    Args:
        labels: (N, H, W), integer. What is not in [0, num_classes) is void: never in the mask, and no class, so that a border
            to void alone is no boundary; across a void thinner than `radius` two classes are still near each other.
        num_classes: number of classes.
        radius: in pixels, default 3.

    Boundary mIoU scores these pixels alone: `confusion_matrix(predicted, labels.where(mask, 255), num_classes)`.
    """
    valid = (labels >= 0) & (labels < num_classes)
    classes = labels.float()
    highest, lowest = (
        F.max_pool2d(values.where(valid, -torch.inf), 2 * radius + 1, stride=1, padding=radius)
        for values in (classes, -classes)
    )
    return valid & (highest != -lowest)
