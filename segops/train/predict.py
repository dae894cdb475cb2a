"""`segops predict`: class maps, overlays and loss images of image files, from a checkpoint of `segops fit`."""

import os
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from segops.models import CRF_SETTINGS

from ..text import printable
from .datasets import SOFTWARE, ImagesWithMasks, images_below, is_prediction, mask_instead
from .files import first_line
from .inference import Predictor, comparison, load_network, overlay, save_classes, save_image
from .transforms import VOID

LARGEST = 2**29  # pixels that Pillow reads without a word; twice as many it refuses. Large images are what windows are for
KINDS = {"classes": "class maps", "overlay": "overlays", "loss": "loss images"}  # folders of DIR


def add_arguments(parser):
    """Adds the arguments of `segops predict` to an argparse parser; `run` takes what it parses."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="written by segops fit")
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="image files, or folders of them: all below but what segops predict wrote"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="class maps go to DIR/classes/ID.png: palette PNGs")
    parser.add_argument("--overlay", action="store_true", help="also DIR/overlay/ID.png: the classes over the image")
    parser.add_argument(
        "--loss-images", action="store_true", help="also DIR/loss/ID.png: image, truth, prediction, loss; needs --labels"
    )
    parser.add_argument("--labels", metavar="DIR", help="holds ID.png for each image, ID being its path below INPUT")
    parser.add_argument("--mask-suffix", default=".png", help="the label of ID is ID + this; default .png")
    parser.add_argument("--void", type=int, default=VOID, help=f"label that does not count, beside {VOID}")
    parser.add_argument("--window", nargs=2, type=int, metavar=("H", "W"), help="sliding window; default: whole images")
    parser.add_argument("--overlap", type=float, default=0.5, help="of windows, in [0, 1); default 0.5")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="average over these; default 1.0")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument("--crf", action="store_true", help="refine by the image: a dense CRF, with segops.dense_crf's defaults")
    parser.add_argument("--crf-settings", choices=CRF_SETTINGS, help="the same with the settings of a publication")
    parser.add_argument(
        "--image-scale",
        type=_number_or_text,
        help='which value of images becomes 255: "dtype", "file" or a number; default: as in training',
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16: autocast to bfloat16")


def _number_or_text(text):
    try:
        return float(text)
    except ValueError:
        return text


def run(options):
    """Predicts. An image that cannot be read or predicted is reported and the others go on; the exit status is then 1.

    Args:
        options: what a parser with `add_arguments` returned.

    Raises:
        SystemExit: with the message, for what is wrong before the first image, a file that cannot be written, or images that
            failed; 130 after an interrupt. Whatever is written is whole.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, LARGEST
    try:
        _run(options)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _run(options):
    kinds = ["classes", *["overlay"] * options.overlay, *["loss"] * options.loss_images]
    out = Path(options.out)
    try:
        predictor, info = _predictor(options)
        names, images = _images(options.inputs)
        labels = None if options.labels is None else [Path(options.labels, f"{name}{options.mask_suffix}") for name in names]
        targets = [{kind: out / kind / f"{name}.png" for kind in kinds} for name in names]
        _check_files(images, labels, targets, options.mask_suffix)
        # A single class is told from none.
        values = {index: index for index in range(max(info["model"]["num_classes"], 2))} | {options.void: VOID}
        # Checkpoints from before there was a scale do not tell it.
        scale = info.get("scale", "dtype") if options.image_scale is None else options.image_scale
        dataset = ImagesWithMasks(names, images, labels, info["classes"], info["palette"] or (), values, scale)
        for kind in kinds:
            (out / kind).mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if os.environ.get("SEGOPS_TRACEBACK") == "1":
            raise
        raise SystemExit(f"segops predict: {printable(str(error))}") from error

    written, failures = dict.fromkeys(kinds, 0), []
    try:
        for index, files in enumerate(tqdm(targets, unit="image", file=sys.stderr)):
            try:
                results = _results(*dataset[index], kinds, predictor, info["palette"])
            except (
                MemoryError,
                OSError,
                ValueError,
                RuntimeError,
            ) as error:  # torch raises the last: no memory, or an image too small
                reason, name = first_line(error), printable(str(images[index]))
                failures.append(reason if name in reason else f"{name}: {reason}")
                tqdm.write(f"segops predict: {failures[-1]}", file=sys.stderr)
                continue
            for kind, file in files.items():
                _write(file, results[kind], info["palette"])
                written[kind] += 1
    except KeyboardInterrupt:
        _tell("interrupted; the files that are there are whole")
        raise SystemExit(130) from None
    finally:
        for kind, count in written.items():
            print(f"{KINDS[kind]}: {count} in {out / kind}")
    if failures:
        listed = "".join(f"\n  {failure}" for failure in failures)
        raise SystemExit(f"segops predict: {len(failures)} of {len(images)} images failed:{listed}")


def _predictor(options):
    """(predictor, what the checkpoint says)."""
    if options.loss_images != (options.labels is not None):
        raise ValueError("--loss-images and --labels need each other")
    if not 0 <= options.void <= 255:
        raise ValueError(f"--void must be a value of 8 bits, 0 to 255; got {options.void}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device; torch sees none")
    model, info = load_network(options.checkpoint, device)
    predictor = Predictor(
        model,
        normalize=info["normalize"],
        resize=info["resize"],
        window=options.window,
        overlap=options.overlap,
        scales=options.scales,
        flip=options.flip,
        autocast=torch.bfloat16 if options.precision == "bf16" else None,
        crf=CRF_SETTINGS.get(options.crf_settings, options.crf),
    )
    return predictor, info


def _images(inputs):
    """(IDs, files) of all images that the INPUTs stand for."""
    names, images = [], []
    for given in map(Path, inputs):
        if given.is_file():
            if is_prediction(given):
                raise ValueError(f"INPUT must be an image; {given} is what {SOFTWARE} wrote")
            names.append(given.stem)
            images.append(given)
            continue
        if not given.is_dir():
            raise FileNotFoundError(f"INPUT must be an image or a folder of images; there is none at {given}")
        files = images_below(given, _tell)
        names += [(file.relative_to(given).parent / file.stem).as_posix() for file in files]
        images += files
    return names, images


def _tell(text):
    print(f"segops predict: {printable(text)}", file=sys.stderr)


def _check_files(images, labels, targets, mask_suffix):
    """Every label is there; nothing is written twice, or over what is read."""
    if labels is not None:
        missing = [pair for pair in zip(labels, images, strict=True) if not pair[0].is_file()]
        if missing:
            label, image = missing[0]
            there, rest = mask_instead(label.with_name(label.name.removesuffix(mask_suffix)), image)
            hint = f"; {there} is there: --mask-suffix={rest} takes it" if there else ""
            more = f"; {len(missing) - 1} more labels are missing" if len(missing) > 1 else ""
            raise FileNotFoundError(f"{label} is missing: the label of {image}{hint}{more}")
    read = {file.resolve() for file in (*images, *(labels or ()))}
    writers = {}
    for image, files in zip(images, targets, strict=True):
        for file in files.values():
            if file in writers:
                raise ValueError(f"{writers[file]} and {image} would both write {file}")
            if file.resolve() in read:
                raise ValueError(f"{file} would be written over, and is an INPUT or a label: choose another --out")
            writers[file] = image


def _results(image, mask, kinds, predictor, palette):
    """{kind: what is written}."""
    if "loss" not in kinds:
        results = {"classes": predictor(image)}
    else:
        classes, loss = predictor.with_loss(image, mask)
        results = {"classes": classes, "loss": comparison(image, mask, classes, loss, palette)}
    if "overlay" in kinds:
        results["overlay"] = overlay(image, results["classes"], palette)
    return results


def _write(file, result, palette):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if result.ndim == 2:
            save_classes(file, result, palette)
        else:
            save_image(file, result)
    except OSError as error:
        raise SystemExit(f"segops predict: {printable(str(file))} cannot be written: {first_line(error)}") from error
