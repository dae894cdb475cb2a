"""Labelled images from a folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderDataset(torch.utils.data.Dataset):
    """root/images/SPLIT/ID.jpg (or .png) with root/labels/SPLIT/ID.png, as (image float32 in [0, 1], label int64).

    Args:
        root: the folder.
        split: "train", "val", ...
        num_classes: labels 0 .. num_classes - 1 are classes.
        void: the label that is not scored (255 never is either); it comes out as 255.
        size: (height, width) that images (bilinear) and labels (nearest) are resized to, or None for their own.

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no label; names the path.
        ValueError: a file does not decode, differs in size from its image, or holds a label that is neither a class
            nor void; names the file and the value.
    """

    void = 255

    def __init__(self, root, split, num_classes, void=255, size=None):
        self.num_classes, self.void_label, self.size = num_classes, void, size
        images, labels = Path(root) / "images" / split, Path(root) / "labels" / split
        for folder in (images, labels):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} is not a folder: expected {root}/images/{split}/ID.jpg and {root}/labels/{split}/ID.png"
                )
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{images} holds no {' or '.join(IMAGE_SUFFIXES)} files")
        self.pairs = [(path, labels / f"{path.stem}.png") for path in files]
        for image, label in self.pairs:
            if not label.is_file():
                raise FileNotFoundError(f"{label} is missing: the label of {image}")

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image_path, label_path = self.pairs[index]
        image, label = _read(image_path).convert("RGB"), _read(label_path)
        if image.size != label.size:
            raise ValueError(f"{label_path} is {label.size[0]}x{label.size[1]}, its image {image.size[0]}x{image.size[1]}")
        if label.mode not in ("L", "P"):
            raise ValueError(f"{label_path} must hold one 8-bit class index a pixel; its mode is {label.mode}")
        if self.size is not None:
            height, width = self.size
            image, label = image.resize((width, height), Image.BILINEAR), label.resize((width, height), Image.NEAREST)
        classes = np.array(label, dtype=np.int64)
        classes[classes == self.void_label] = self.void
        wrong = (classes >= self.num_classes) & (classes != self.void)
        if wrong.any():
            raise ValueError(
                f"{label_path} holds label {classes[wrong][0]}: not in [0, {self.num_classes}), and not void ({self.void_label})"
            )
        return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1), torch.from_numpy(classes)


def _read(path):
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return image
