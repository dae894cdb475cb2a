"""Data and metrics for training segmentation networks (needs pillow: pip install 'segops[train]')."""

from .data import FolderDataset
from .metrics import boundary_mask, confusion_matrix, iou
from .scenes import SyntheticScenes

__all__ = ["FolderDataset", "SyntheticScenes", "boundary_mask", "confusion_matrix", "iou"]
