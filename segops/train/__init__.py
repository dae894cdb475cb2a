"""Training, evaluation and prediction on Lightning: data, recipes, figures, inference."""

try:
    import lightning as _lightning  # noqa: F401
    import timm as _timm  # noqa: F401
    import torchmetrics as _torchmetrics  # noqa: F401
    import torchvision as _torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(f"segops.train needs what pip install 'segops[train]' brings: {error}") from error

from .data import ClassificationData, CooperativeData, SegmentationData
from .datasets import VOC, CamVid, Cityscapes, Folder, ImageClasses, Unlabelled, palette
from .inference import Predictor, load_network
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
    "Predictor",
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
    "load_network",
    "normalize",
    "palette",
    "scores",
]
