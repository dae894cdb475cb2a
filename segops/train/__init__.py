"""Training, evaluation and prediction on Lightning: data, recipes, figures, inference (pip install 'segops[models,train]')."""

from .data import ClassificationData, CooperativeData, SegmentationData
from .datasets import VOC, CamVid, Cityscapes, Folder, ImageClasses, Unlabelled, palette
from .losses import SegmentationLoss, focal_loss
from .metrics import SegmentationMetrics, boundary_mask, confusion_matrix, iou, scores
from .optimizers import Optimizer
from .recipes import Adversarial, Classification, Cooperative, Supervised
from .scenes import SyntheticScenes
from .transforms import Augment, normalize

__all__ = [
    "VOC",
    "Adversarial",
    "Augment",
    "CamVid",
    "Cityscapes",
    "Classification",
    "ClassificationData",
    "Cooperative",
    "CooperativeData",
    "Folder",
    "ImageClasses",
    "Optimizer",
    "SegmentationData",
    "SegmentationLoss",
    "SegmentationMetrics",
    "Supervised",
    "SyntheticScenes",
    "Unlabelled",
    "boundary_mask",
    "confusion_matrix",
    "focal_loss",
    "iou",
    "normalize",
    "palette",
    "scores",
]
