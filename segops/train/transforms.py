"""Resizing, augmentation and normalisation, as the papers say them. A mask follows its image exactly, by the nearest pixel."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torchvision.transforms.v2 import ColorJitter, InterpolationMode, functional

VOID = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
KINDS = ("imagenet", "inception", "per_image", "none")


def normalize(images, kind):
    """Images (..., C, H, W), float in [0, 1], as a network takes them.

    kind: "imagenet" subtracts ImageNet's mean and divides by its deviation (three channels); "inception" subtracts 0.5 and divides by 0.5, as TensorFlow's
        Inception and Xception were trained; "per_image" does so with each image's own, over all
        channels and pixels, as Haloi's "each image is standardized" (the deviation is at least 1 / sqrt(C H W), as in TensorFlow's
        per_image_standardization); "none" changes nothing.

    Raises:
        ValueError: another kind.
    """
    check_kind(kind)
    if kind == "none":
        return images
    if kind == "inception":
        return 2 * images - 1
    if kind == "imagenet":
        return functional.normalize(images, list(MEAN), list(STD))
    dimensions = (-3, -2, -1)
    count = images.shape[-3] * images.shape[-2] * images.shape[-1]
    deviation = images.std(dimensions, keepdim=True, correction=0).clamp_min(count**-0.5)
    return (images - images.mean(dimensions, keepdim=True)) / deviation


def check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")


def resize(image, mask, size):
    """image (3, H, W) bilinearly, antialiased, and mask (H, W) by the nearest pixel, to size (h, w)."""
    nearest = functional.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    return functional.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True), nearest


@dataclass
class Augment:
    """What happens to a training image and its mask, in this order. Images are resampled bilinearly, masks by the nearest pixel; what padding and
    rotation add is the image's mean colour and void.

    Args:
        scale: (least, most, step): resized by a random one of least, least + step, ..., most; step 0 for any factor between them. DeepLab v3 and
            PAC: (0.5, 2.0, 0.25). Default: none.
        rotate: degrees, up to as many either way (PSPNet: 10). Default 0.
        pad: pixels: up to as many are added at each side (JointSeg's random padding). Default 0.
        crop: (height, width) of a random crop; what is smaller is padded at the bottom and right first. Default: none.
        horizontal_flip, vertical_flip: probabilities, default 0.5 and 0.
        brightness, contrast, saturation: each changed by a random factor within 1 - x and 1 + x, default 0. hue: shifted by up to x of the circle,
            at most 0.5, default 0. JointSeg's classifier has them.

    Raises:
        ValueError: a setting that makes no sense; names it.
    """

    scale: tuple[float, float, float] | None = None
    rotate: float = 0.0
    pad: int = 0
    crop: tuple[int, int] | None = None
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        if self.scale is not None:
            factors = self.scale if isinstance(self.scale, tuple | list) else ()
            valid = len(factors) == 3 and all(is_number(factor) and math.isfinite(factor) for factor in factors)
            if not valid or not 0 < factors[0] <= factors[1] or factors[2] < 0:
                raise ValueError(f"scale must be (least, most, step) with 0 < least <= most and step >= 0; got {self.scale!r}")
        for name in ("horizontal_flip", "vertical_flip"):
            check_number(name, getattr(self, name), 1)
        check_number("rotate", self.rotate, 180)
        for name in ("brightness", "contrast", "saturation"):
            check_number(name, getattr(self, name), math.inf)
        check_number("hue", self.hue, 0.5)
        check_integer("pad", self.pad, 0)
        if self.crop is not None:
            check_size("crop", self.crop)
            if self.pad >= min(self.crop):
                raise ValueError(
                    f"pad must be below both sides of crop, or a crop may be padding alone; got {self.pad} and {self.crop!r}"
                )
        # One order of the four, as the values are torch's: ColorJitter draws both.
        self.jitter = ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        self.jitters = any((self.brightness, self.contrast, self.saturation, self.hue))

    def __call__(self, image, mask):
        """image uint8 (3, H, W), mask uint8 (H, W) -> the same kinds. All random numbers are torch's."""
        if self.scale is not None:
            factor = self._factor()
            image, mask = resize(image, mask, [max(1, round(factor * side)) for side in mask.shape])
        fill = image.float().mean((1, 2)).round().tolist()
        if self.rotate:
            angle = self.rotate * (2 * torch.rand(()).item() - 1)
            image = functional.rotate(image, angle, InterpolationMode.BILINEAR, fill=fill)
            mask = functional.rotate(mask[None], angle, InterpolationMode.NEAREST, fill=VOID)[0]
        if self.pad:
            image, mask = pad(image, mask, torch.randint(0, self.pad + 1, (4,)).tolist(), fill)
        if self.crop is not None:
            image, mask = self._cropped(image, mask, fill)
        if torch.rand(()) < self.horizontal_flip:
            image, mask = image.flip(2), mask.flip(1)
        if torch.rand(()) < self.vertical_flip:
            image, mask = image.flip(1), mask.flip(0)
        return (self.jitter(image) if self.jitters else image), mask

    def _factor(self):
        least, most, step = self.scale
        if step == 0:
            return least + (most - least) * torch.rand(()).item()
        return least + step * torch.randint(0, int((most - least) / step + 1e-6) + 1, ()).item()

    def _cropped(self, image, mask, fill):
        missing = [max(wanted - side, 0) for wanted, side in zip(self.crop, mask.shape, strict=True)]
        image, mask = pad(image, mask, (0, 0, missing[1], missing[0]), fill)
        top, left = (torch.randint(0, side - wanted + 1, ()).item() for wanted, side in zip(self.crop, mask.shape, strict=True))
        window = (..., slice(top, top + self.crop[0]), slice(left, left + self.crop[1]))
        return image[window], mask[window]


def pad(image, mask, margins, fill):
    """Adds (left, top, right, bottom) pixels: of colour `fill`, and void."""
    if not any(margins):
        return image, mask
    return functional.pad(image, list(margins), fill=fill), functional.pad(mask[None], list(margins), fill=VOID)[0]


def is_number(value):
    """Whether a setting is a real number, for which True and False do not pass."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_number(name, value, most):
    """Refuses what is not a finite number from 0 to most."""
    if not is_number(value) or not 0 <= value <= most or value == math.inf:
        raise ValueError(f"{name} must be at least 0{'' if most == math.inf else f' and at most {most}'}; got {value!r}")


def check_integer(name, value, least):
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer, at least {least}; got {value!r}")


def check_size(name, size):
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(is_integer(side) and side > 0 for side in size):
        raise ValueError(f"{name} must be two positive sizes (height, width); got {size!r}")
