"""Data for training segmentation networks (needs pillow: pip install 'segops[train]')."""

from .data import FolderDataset
from .scenes import SyntheticScenes

__all__ = ["FolderDataset", "SyntheticScenes"]
