"""Prediction with a trained network: whole images or windows, scales, flips; class maps, overlays, loss images."""

import contextlib
import itertools
import math
import reprlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision.transforms.v2 import InterpolationMode, functional

import segops
from segops.models import create_model
from segops.models.checkpoints import check_state_dict, named

from ..ops.common.checks import positive_pair
from .datasets import SOFTWARE
from .datasets import palette as voc_palette
from .files import first_line, is_plain, read_checkpoint, write_whole
from .transforms import KINDS, VOID, check_kind, normalize


def load_network(checkpoint_path, device="cpu"):
    """The network of a checkpoint of `segops fit`, with its weights and in eval mode, and what the checkpoint says of it.

    The file may be a stranger's: nothing in it is run or fetched, no other file is read, and no
    more memory is taken than its size calls for. (A YAML configuration, on the other hand, names
    classes to be imported: run only those that you trust.)

    Args:
        checkpoint_path: the file. Of its "state_dict" only "model.*" is read; its "segops" entry tells model, classes, palette,
            normalize and resize.
        device: where the network goes, default "cpu".

    Returns:
        (model, info): info is the "segops" entry, a dict of plain values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is no checkpoint of `segops fit`, has a "segops" entry that is
            not as `segops fit` writes it, names a network that there is not, or has weights of
            another one (lists the first mismatches). Each names the file.
    """
    path, saved = Path(checkpoint_path), read_checkpoint(checkpoint_path)
    saved = named(saved) if isinstance(saved, dict) else {}
    info, weights = saved.get("segops"), saved.get("state_dict")
    if not isinstance(info, dict) or not isinstance(weights, dict):
        raise ValueError(f"{path} is no checkpoint of segops fit: it needs the entries 'state_dict' and 'segops'")
    _check_entry(info, path)
    weights = named(weights)
    if not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{path} is no checkpoint of segops fit: its state_dict has keys that are not str")
    prefix = "model."
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    # The weights are here: none are fetched.
    options = {key: value for key, value in info["model"]["options"].items() if key not in ("pretrained", "checkpoint")}
    build = partial(create_model, info["model"]["name"], info["model"]["num_classes"], **options)
    try:
        with torch.device("meta"), _at_most(2_000 + 10 * len(weights)):  # timm makes a backbone several times to look at it
            model = build()
        if not hasattr(model, "to_classes"):
            raise ValueError(f"{info['model']['name']} judges what other networks segment")
    except Exception as error:  # options of any kind raise anything
        reason = f"{type(error).__name__}: {first_line(error)[:500]}"
        raise ValueError(f"{path} names no network that can be built: {reason}") from error
    if sum(value.numel() * value.element_size() for value in weights.values() if torch.is_tensor(value)) > path.stat().st_size:
        raise ValueError(f"{path} does not hold its weights: some are views of the same numbers")
    check_state_dict(model, weights, str(path))
    model = build()
    model.load_state_dict(weights)
    return model.to(device).eval(), info


def is_model(value, _=None):
    """Whether it is what a checkpoint says of its network."""
    return (
        type(value) is dict
        and type(value.get("name")) is str
        and type(value.get("num_classes")) is int
        and value["num_classes"] >= 1
        and type(value.get("options")) is dict
    )


def _is_palette(value, num_classes):
    return value is None or (
        type(value) is list
        and len(value) == num_classes
        and all(type(colour) is list and len(colour) == 3 for colour in value)
        and all(type(level) is int and 0 <= level <= 255 for colour in value for level in colour)
    )


def _is_size(value, _):
    return value is None or (
        type(value) is list and len(value) == 2 and all(type(side) is int and 0 < side < 2**15 for side in value)
    )


# What a "segops" entry must hold, and how that is told of a value and the number of classes.
ENTRY = {
    "model": (
        "a name, num_classes from 1 to 255 and a dict of options",
        lambda value, _: is_model(value) and value["num_classes"] <= VOID,
    ),
    "classes": (
        "as many names as the model has classes",
        lambda value, num_classes: (
            type(value) is list and len(value) == num_classes and all(type(name) is str for name in value)
        ),
    ),
    "palette": ("a colour [r, g, b] for each class, or None", _is_palette),
    "normalize": (f"one of {', '.join(map(repr, KINDS))}", lambda value, _: value in KINDS),
    "resize": (f"[height, width], each below {2**15}, or None", _is_size),
    "scale": (
        "'dtype', 'file' or a positive number",
        lambda value, _: value in ("dtype", "file") or (type(value) in (int, float) and 0 < value < 2**64),
    ),
}


def _check_entry(info, path):
    if "image_classes" in info and "palette" not in info:
        raise ValueError(f"{path} classifies whole images: class maps need a model that segments")
    entry = {"scale": "dtype"} | named(info)  # older checkpoints have no scale
    missing = [key for key in ENTRY if key not in entry]
    if missing:
        raise ValueError(f"{path} is no checkpoint of segops fit: its entry 'segops' lacks {', '.join(map(repr, missing))}")
    if not is_plain(info):
        raise ValueError(
            f"{path} is no checkpoint of segops fit: its entry 'segops' must hold plain values and printable text alone"
        )
    num_classes = None
    for key, (needed, fits) in ENTRY.items():
        if not fits(entry[key], num_classes):
            raise ValueError(
                f"{path} is no checkpoint of segops fit: {key} in its entry 'segops' must be {needed}; got {_short(entry[key])}"
            )
        num_classes = num_classes or entry["model"]["num_classes"]


def _short(value):
    """An error shows no more of it."""
    return reprlib.repr(value)


@contextlib.contextmanager
def _at_most(parameters):
    """Raises where more are made: options may ask for a billion layers."""
    made = itertools.count(1)

    def hook(module, name, parameter):
        if next(made) > parameters:
            raise ValueError("it has more weights than the file")

    with register_module_parameter_registration_hook(hook):
        yield


class Predictor:
    """A network as a function of images: uint8 (3, H, W) -> class map uint8 (H, W), on the CPU.

    Args:
        model: a `segops.models` network that segments. Its mode stays as it is: call eval() before.
        normalize: "imagenet" (default), "inception", "per_image" or "none": see `segops.train.normalize`. It comes last: "per_image" takes
            the mean of what the network is given, a window's own where there are windows, as in training on crops.
        resize: (h, w) or an int for both: images are resized to it, bilinearly and antialiased, before all else; None
            (default): not at all. The class map has the image's own size: logits are resized to it.
        window: (h, w) or an int for both: the image, as resized, is cut into windows of this size; None (default): taken whole,
            as is an image that a window covers. Where it is lower or narrower than a window, so are its windows. The last ones
            are moved inward.
        overlap: of adjacent windows, in [0, 1), default 0.5.
        scales: factors that an image, or each of its windows, is resized by before the network; default (1.0,).
        flip: the network also sees each of these mirrored left to right (default False).
        device: where to compute; default: where the model is.
        autocast: dtype of autocast, such as torch.bfloat16; None (default) leaves autocast as it is.
        crf: True refines the class probabilities by `segops.dense_crf`, on the model's device; a dict
            has arguments for it, such as those in `segops.models.CRF_SETTINGS`. Default: False.

    With one scale, no flip and no window the class is that of `SegmentationModel.to_classes`, from the logits as the network
    made them. Otherwise softmax probabilities of all scales, flips and overlapping windows are averaged, each window's scales
    among themselves. With windows no more of them exists than a band as high as a window: rows that no later window touches are
    finished and dropped. With both windows and resize they are kept at the resized size, which is what bounds the memory, and
    resized to the image's as their logarithms.

    With a CRF these averaged probabilities, of one scale too, are refined at the image's size by the
    image as it was given, and the class is the largest of the result. A single class counts as two:
    itself and what it is not. The probabilities of the whole image are kept, with windows too.

    Raises:
        TypeError: resize or window that is no int or pair of ints, autocast that is no dtype, crf that is neither bool nor dict;
            when called, an image that is not uint8.
        ValueError: sizes or scales that are not positive, an overlap outside [0, 1), an unknown normalize, a model of more than
            255 classes; when called, an image of another shape, or an empty one.
        What `segops.dense_crf` raises for the arguments in crf.
    """

    def __init__(
        self,
        model,
        normalize="imagenet",
        resize=None,
        window=None,
        overlap=0.5,
        scales=(1.0,),
        flip=False,
        device=None,
        autocast=None,
        crf=False,
    ):
        check_kind(normalize)
        if model.num_classes > VOID:
            raise ValueError(f"model must have at most {VOID} classes, as class maps are uint8; got {model.num_classes}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1); got {overlap!r}")
        scales = tuple(scales)
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be positive factors, at least one; got {scales!r}")
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"autocast must be a torch.dtype or None; got {autocast!r}")
        self.device = next(model.parameters()).device if device is None else torch.device(device)
        self.model, self.normalize, self.overlap, self.autocast = model.to(self.device), normalize, overlap, autocast
        self.resize = None if resize is None else positive_pair("resize", resize)
        self.window = None if window is None else positive_pair("window", window)
        self.views = [(scale, flipped) for scale in scales for flipped in ((False, True) if flip else (False,))]
        self.crf = None if crf is False else self._crf_settings({} if crf is True else crf)

    def _crf_settings(self, settings):
        if not isinstance(settings, dict):
            raise TypeError(f"crf must be a bool or a dict of arguments of segops.dense_crf; got {settings!r}")
        taken = sorted({"logits", "images", "align_corners"} & settings.keys())
        if taken:
            raise TypeError(f"crf must not have {taken[0]}, which the model or the image decides; got {sorted(settings)}")
        settings = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in settings.items()
        }
        # An empty batch: what is wrong with the settings is said before the first image.
        nothing = torch.zeros(0, max(self.model.num_classes, 2), 1, 1, device=self.device)
        segops.dense_crf(nothing, nothing.new_zeros(0, 3, 1, 1), **settings)
        return settings

    def __call__(self, image):
        """uint8 (3, H, W) -> uint8 (H, W)."""
        return self._predict(image, None)[0]

    def with_loss(self, image, mask):
        """The class map and the loss of each pixel, for one run of the network.

        Args:
            image: uint8 (3, H, W).
            mask: (H, W), uint8, int32 or int64: the truth, 255 where it does not count.

        Returns:
            (classes, loss): uint8 (H, W), and float32 (H, W), the cross entropy of the averaged probabilities, or of those that
            the CRF made of them, in nats, 0 where the mask is 255. Both on the CPU.

        Raises:
            ValueError: an image and a mask of different sizes.
            IndexError: a label that is neither a class nor 255. With a single class 0 and 1 are labels.
        """
        return self._predict(image, mask)

    @torch.no_grad()
    def _predict(self, image, mask):
        _check_image(image)
        if mask is not None:
            _check_mask(mask, image, max(self.model.num_classes, 2))
        original, size = image, image.shape[1:]
        classes = torch.empty(size, dtype=torch.uint8)
        loss = None if mask is None else torch.empty(size)
        if self.resize is not None:
            image = _resized(image, self.resize)
        whole = self.window is None or all(side <= most for side, most in zip(image.shape[1:], self.window, strict=True))
        if whole and len(self.views) == 1 and self.crf is None:
            logits = self._logits(image, *self.views[0])
            classes.copy_(self.model.to_classes(logits, tuple(size))[0])
            if mask is not None:
                if self.model.align_corners:
                    logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
                loss.copy_(_loss(_two_sided(logits), mask))
            return classes, loss
        if whole:
            parts = [(slice(None), _mean(self._probabilities(image, size)))]
        else:
            parts = self._bands(image)
            if self.crf is not None or image.shape[1:] != size:
                parts = [(slice(None), torch.cat([logits for _, logits in parts], 2))]
        if self.crf is not None:
            [(rows, logits)] = parts
            parts = [(rows, segops.dense_crf(logits, original[None].to(self.device), **self.crf))]
        for rows, logits in parts:
            part = classes[rows]
            part.copy_(segops.upsample_argmax(logits, tuple(part.shape))[0])
            if mask is not None:
                loss[rows].copy_(_loss(logits, mask[rows]))
        return classes, loss

    def _bands(self, image):
        """Band after band from the top: its rows, and the logarithms of their averaged probabilities (1, C, rows, W)."""
        height, width = image.shape[1:]
        high, wide = (min(side, most) for side, most in zip(image.shape[1:], self.window, strict=True))
        tops, lefts = self._offsets(height, high), self._offsets(width, wide)
        total = torch.zeros(max(self.model.num_classes, 2), high, width, device=self.device)
        for top, below in zip(tops, [*tops[1:], height], strict=True):
            for left in lefts:
                crop = image[:, top : top + high, left : left + wide]
                total[:, :, left : left + wide] += self._probabilities(crop, crop.shape[1:])
            done = below - top
            yield slice(top, below), _mean(total[:, :done])
            total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], 1)

    def _offsets(self, side, window):
        stride = max(1, round(window * (1 - self.overlap)))
        return [*range(0, side - window, stride), side - window]

    def _probabilities(self, image, size):
        """The sum of all views' probabilities, (C, H, W) of the size given."""
        total = 0
        for scale, flipped in self.views:
            logits = self._logits(image, scale, flipped).float()
            if logits.shape[2:] != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=self.model.align_corners)
            probabilities = _two_sided(logits)[0].softmax(0)
            total += probabilities.flip(2) if flipped else probabilities
        return total

    def _logits(self, image, scale, flipped):
        """Of a view of an image: (1, C, h, w) at the network's resolution, mirrored where the view is."""
        if scale != 1:
            image = _resized(image, [max(1, round(scale * side)) for side in image.shape[1:]])
        image = normalize(image.to(self.device).float() / 255, self.normalize)
        if flipped:
            image = image.flip(2)
        autocast = contextlib.nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(self.device.type, self.autocast)
        with autocast:
            return self.model(image[None]).logits


def _check_image(image):
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
        got = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
        raise TypeError(f"image must be a uint8 tensor; got {got}")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (3, H, W), not empty; got {tuple(image.shape)}")


def _check_mask(mask, image, num_classes):
    if mask.shape != image.shape[1:]:
        raise ValueError(f"mask must have the image's size {tuple(image.shape[1:])}; got {tuple(mask.shape)}")
    wrong = mask[((mask < 0) | (mask >= num_classes)) & (mask != VOID)]
    if len(wrong):  # on a GPU the op would not say so
        raise IndexError(f"mask must hold classes below {num_classes}, or {VOID}; got {wrong[0].item()}")


def _resized(image, size):
    """As in training: of bytes."""
    return functional.resize(image, size, InterpolationMode.BILINEAR, antialias=True)


def _two_sided(logits):
    """The one logit of a single class against 0, as logits of two classes."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _mean(total):
    """Logarithms (1, C, H, W) of sums of probabilities over their number: each of these adds up to one."""
    return (total / total.sum(0)).clamp_min(torch.finfo(total.dtype).tiny).log()[None]


def _loss(logits, mask):
    return segops.upsample_cross_entropy(logits, mask[None].to(logits.device), reduction="none")[0]


def loss_image(model, image, mask):
    """Cross entropy of each pixel, the loss images of Yu, "Semantic Image Segmentation with Pyramid Atrous Convolution and
    Boundary-aware Loss", Fig. 4.

    Args:
        model: a `Predictor`, or a `segops.models` network, in eval mode, that takes images normalised as ImageNet's.
        image, mask: see `Predictor.with_loss`, also for what is raised.

    Returns:
        (H, W) float32 on the CPU, 0 where the mask is 255.
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model)
    return predictor.with_loss(image, mask)[1]


def heat(loss, limit=5.0):
    """A loss image as colours, uint8 (3, H, W): black at 0, through red and yellow to white at `limit` and above.

    Args:
        loss: (H, W), floating point.
        limit: default 5 nats, where the truth is given less than 1 %. One limit for all makes images comparable.

    Raises:
        ValueError: a limit that is not positive.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive; got {limit!r}")
    level = (loss.float() / limit).nan_to_num(1.0).clamp(0, 1)
    return torch.stack([(3 * level - channel).clamp(0, 1) for channel in range(3)]).mul(255).round().byte()


def _table(palette):
    """A palette as the colours of all 256 indices."""
    table = torch.tensor(voc_palette(256), dtype=torch.uint8)
    if palette is not None:
        colours = torch.as_tensor(palette)
        if colours.ndim != 2 or colours.shape[1] != 3 or len(colours) > VOID or colours.min() < 0 or colours.max() > 255:
            raise ValueError(f"palette must be at most {VOID} colours [r, g, b] from 0 to 255; got {palette!r}")
        table[: len(colours)] = colours
    return table


def colourise(classes, palette=None):
    """A class map as colours, uint8 (3, H, W).

    Args:
        classes: (H, W), integer, in [0, 255]; 255 is void.
        palette: [r, g, b] of each class; None (default), and beyond it: VOC's colours.

    Raises:
        ValueError: a palette that is none.
    """
    return _table(palette)[classes.long()].permute(2, 0, 1).contiguous()


def overlay(image, classes, palette=None, opacity=0.6):
    """An image with its classes' colours laid over it, uint8 (3, H, W). Where classes are 255 the image stays as it is.

    Args:
        image: uint8 (3, H, W).
        classes, palette: as for `colourise`.
        opacity: of the colours, in [0, 1], default 0.6.

    Raises:
        ValueError: sizes that differ, an opacity outside [0, 1], a palette that is none.
    """
    if classes.shape != image.shape[1:]:
        raise ValueError(f"classes must have the image's size {tuple(image.shape[1:])}; got {tuple(classes.shape)}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1]; got {opacity!r}")
    mixed = torch.lerp(image.float(), colourise(classes, palette).float(), opacity).round().byte()
    return mixed.where(classes != VOID, image)


def comparison(image, mask, classes, loss, palette=None):
    """Image, truth, prediction and loss side by side, uint8 (3, H, 4 W + 12): Yu, Fig. 4. Arguments as for `colourise` and `heat`."""
    gap = torch.full((3, image.shape[1], 4), 255, dtype=torch.uint8)
    return torch.cat([image, gap, colourise(mask, palette), gap, colourise(classes, palette), gap, heat(loss)], 2)


def save_classes(path, classes, palette=None):
    """Writes a class map as a palette PNG, whose pixels are the classes: the form that PASCAL VOC's evaluation server takes.

    Its text "Software" says "segops predict", by which folders of images tell it from an image.

    Args:
        path: the file. It is whole or it is not there: what is written is PATH.part, which then takes its name.
        classes, palette: as for `colourise`. 255 keeps VOC's colour.

    Raises:
        ValueError: a palette that is none. OSError: the file cannot be written.
    """
    image = Image.fromarray(classes.byte().cpu().numpy())
    image.putpalette(_table(palette).flatten().tolist())
    _save(path, image)


def save_image(path, image):
    """Writes uint8 (3, H, W) as a PNG: whole or not at all, and with its text, as `save_classes`.

    Raises:
        OSError: the file cannot be written.
    """
    _save(path, Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()))


def _save(path, picture):
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    write_whole(path, lambda file: picture.save(file, format="PNG", pnginfo=text))
