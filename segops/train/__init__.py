"""Data for training segmentation networks (needs numpy and pillow: pip install 'segops[dev]')."""

from .data import FolderDataset
from .scenes import SyntheticScenes

__all__ = ["FolderDataset", "SyntheticScenes"]
