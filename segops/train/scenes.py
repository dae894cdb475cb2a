"""Synthetic scenes: objects at several scales, thin parts, occlusion. Deterministic by seed and index."""

import numpy as np
import torch
from PIL import Image, ImageDraw

CLASSES = ("background", "disc", "box", "triangle", "ring", "pole", "fence")
COLOURS = ((90, 110, 130), (190, 60, 60), (60, 150, 70), (70, 80, 190), (190, 160, 50), (140, 70, 160), (60, 170, 170))


class SyntheticScenes(torch.utils.data.Dataset):
    """Scenes drawn back to front on a shaded background, as (image (3, H, W) uint8, mask (H, W) uint8).

    Args:
        length: number of scenes.
        size: (height, width), default (128, 128).
        seed: scenes of different seeds differ; the same seed and index give the same scene on every machine.

    Labels are indices into `CLASSES`: discs, boxes, triangles, rings from 6 pixels to half the image, poles 1 to 3 pixels
    wide across the image, fences of thin bars. Colours vary around the class's own, so that colour alone does not tell.
    """

    classes = CLASSES
    num_classes = len(CLASSES)
    palette = COLOURS

    def __init__(self, length, size=(128, 128), seed=0):
        self.length, self.size, self.seed = length, size, seed
        self.ids = [f"{seed}_{index}" for index in range(length)]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}); got {index}")
        rng = np.random.default_rng((self.seed, index))
        height, width = self.size
        image = Image.fromarray(_background(rng, height, width))
        label = Image.new("L", (width, height), 0)
        for _ in range(rng.integers(4, 11)):
            kind = int(rng.integers(1, len(CLASSES)))
            colour = tuple(int(v) for v in np.clip(np.array(COLOURS[kind]) + rng.normal(0, 45, 3), 0, 255))
            for canvas, ink in ((ImageDraw.Draw(image), colour), (ImageDraw.Draw(label), kind)):
                _draw(canvas, ink, CLASSES[kind], np.random.default_rng((self.seed, index, kind, *colour)), height, width)
        pixels = np.asarray(image) + 255 * rng.normal(0, 0.04, (height, width, 3))
        image = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
        return image, torch.from_numpy(np.array(label))


def _background(rng, height, width):
    """A smooth gradient between two greys-with-a-tint, with coarse texture."""
    y, x = np.mgrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * x / width + np.sin(angle) * y / height)[..., None] * 60
    coarse = rng.normal(0, 12, (-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.clip(np.array(COLOURS[0]) + rng.normal(0, 25, 3) + ramp + coarse, 0, 255).astype(np.uint8)


def _draw(canvas, ink, kind, rng, height, width):
    """One object at a random place; called twice with equal generators, for the image and for its label."""
    radius = float(np.exp(rng.uniform(np.log(3), np.log(min(height, width) / 4))))
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    box = [x - radius, y - radius, x + radius, y + radius]
    if kind == "disc":
        canvas.ellipse(box, fill=ink)
    elif kind == "box":
        aspect = rng.uniform(0.5, 1)
        canvas.rectangle([x - radius, y - aspect * radius, x + radius, y + aspect * radius], fill=ink)
    elif kind == "triangle":
        turns = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3
        canvas.polygon([(x + radius * np.cos(t), y + radius * np.sin(t)) for t in turns], fill=ink)
    elif kind == "ring":
        canvas.ellipse(box, outline=ink, width=max(2, int(radius / 4)))
    elif kind == "pole":
        lean = rng.uniform(-0.2, 0.2) * height
        canvas.line([x, y, x + lean, height], fill=ink, width=int(rng.integers(1, 4)))
    else:
        for bar in np.arange(-radius, radius, max(4, radius / 4)):
            canvas.line([x + bar, y - radius / 2, x + bar, y + radius / 2], fill=ink, width=2)
        canvas.line([x - radius, y, x + radius, y], fill=ink, width=2)
