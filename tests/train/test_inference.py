"""Prediction against brute force: whole images, windows, scales, flips; loss images; files; the command."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from segops.models import CRF_SETTINGS
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import InterpolationMode, functional

import segops
from segops.train import predict
from segops.train.datasets import Unlabelled, read_image
from segops.train.inference import Predictor, colourise, heat, load_network, loss_image, overlay, save_classes, save_image
from segops.train.transforms import normalize

from ..models.small import Case, perturbed

SMALL = {"channels": 4}
PACNET = {"backbone": "resnettiny", "channels": 16}
PALETTE = [[0, 0, 0], [200, 10, 10], [10, 200, 10]]


@torch.no_grad()
def network(name="segnet_basic", num_classes=3, kind="imagenet"):
    """Random weights, and logits whose mean is 0 and deviation 1 for each class: images show several."""
    model = perturbed(Case(name, SMALL if name == "segnet_basic" else PACNET).build(num_classes)).eval()
    logits = logits_of(model, picture(96, 96), kind)
    *_, weight, bias = model.parameters()  # the classifier's
    assert weight.shape[0] == len(bias) == num_classes
    deviation = logits.std((0, 2, 3))
    bias.sub_(logits.mean((0, 2, 3))).div_(deviation)
    weight.div_(deviation[:, None, None, None])
    return model


def picture(height, width):
    """Tiles of random colours."""
    tiles = torch.randint(0, 256, (3, -(-height // 12), -(-width // 12)), dtype=torch.uint8)
    return tiles.repeat_interleave(12, 1).repeat_interleave(12, 2)[:, :height, :width].contiguous()


@torch.no_grad()
def logits_of(model, image, kind="imagenet"):
    return model(normalize(image.float() / 255, kind)[None]).logits


def probabilities(model, image, scales=(1.0,), flips=(False,), size=None, kind="imagenet"):
    """The mean over scales and flips, (C, H, W)."""
    size = size or image.shape[1:]
    results = []
    for scale in scales:
        scaled = [round(scale * side) for side in image.shape[1:]]
        view = functional.resize(image, scaled, InterpolationMode.BILINEAR, antialias=True)
        for flip in flips:
            logits = logits_of(model, view.flip(2) if flip else view, kind)
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=model.align_corners)
            results.append(logits.softmax(1)[0].flip(2) if flip else logits.softmax(1)[0])
    return torch.stack(results).mean(0)


def slid(model, image, window, stride, **views):
    """The mean over all windows that cover a pixel, from accumulators of the whole image."""
    height, width = image.shape[1:]
    high, wide = min(window[0], height), min(window[1], width)
    total, count = torch.zeros(model.num_classes, height, width), torch.zeros(height, width)
    tops = sorted({min(top, height - high) for top in range(0, height, stride[0])})
    lefts = sorted({min(left, width - wide) for left in range(0, width, stride[1])})
    for top in tops:
        for left in lefts:
            place = (..., slice(top, top + high), slice(left, left + wide))
            total[place] += probabilities(model, image[place], **views)
            count[place] += 1
    return total / count


def assert_classes(classes, expected):
    """The largest of the expected probabilities, but where two are as good as equal."""
    best = expected.topk(2, dim=0)
    sure = best.values[0] - best.values[1] > 1e-5
    assert classes.dtype == torch.uint8 and classes.shape == expected.shape[1:]
    assert sure.float().mean() > 0.99 and classes.unique().numel() > 1
    assert torch.equal(classes[sure].long(), best.indices[0][sure])


@pytest.mark.parametrize("kind", ["imagenet", "per_image", "none"])
@pytest.mark.parametrize("name", ["segnet_basic", "pacnet", "pspnet"])
def test_whole_image(name, kind):
    model, image = network(name, kind=kind), picture(45, 70)
    logits = F.interpolate(logits_of(model, image, kind), (45, 70), mode="bilinear", align_corners=name == "pspnet")
    assert_classes(Predictor(model, kind)(image), logits[0].softmax(0))


def test_resize_is_of_bytes_and_classes_have_the_images_size():
    model, image = network("pacnet"), picture(50, 81)
    small = functional.resize(image, [40, 48], InterpolationMode.BILINEAR, antialias=True)
    assert_classes(Predictor(model, resize=(40, 48))(image), probabilities(model, small, size=(50, 81)))
    both = probabilities(model, small, (1.0, 1.5), size=(50, 81))
    assert_classes(Predictor(model, resize=[40, 48], scales=[1.0, 1.5])(image), both)


def test_full_size_logits_of_a_whole_image_never_exist():
    model, image = network("pacnet", num_classes=21), picture(160, 160)
    with Largest() as largest:
        Predictor(model)(image)
    assert largest.numel < 21 * 160 * 160


@pytest.mark.parametrize("size", [(64, 96), (40, 50), (41, 50), (37, 200)])
@pytest.mark.parametrize("overlap, stride", [(0.5, (20, 24)), (0.0, (40, 48)), (0.8, (8, 10))])
def test_windows(size, overlap, stride):
    model, image = network(), picture(*size)
    predicted = Predictor(model, window=(40, 48), overlap=overlap)(image)
    assert_classes(predicted, slid(model, image, (40, 48), stride))


def test_a_window_over_everything_is_the_whole_image():
    model, image = network("pacnet"), picture(45, 70)
    for window in ((45, 70), 70, (1000, 1000)):
        assert torch.equal(Predictor(model, window=window)(image), Predictor(model)(image))


def test_scales_and_flip():
    model, image = network("pacnet"), picture(48, 64)
    views = {"scales": (0.5, 1.0, 1.5), "flips": (False, True)}
    assert_classes(Predictor(model, scales=views["scales"], flip=True)(image), probabilities(model, image, **views))
    predicted = Predictor(model, window=(32, 48), scales=views["scales"], flip=True)(image)
    assert_classes(predicted, slid(model, image, (32, 48), (16, 24), **views))
    assert_classes(Predictor(model, scales=[1.5])(image), probabilities(model, image, (1.5,)))


def test_with_flip_a_mirrored_image_has_mirrored_classes():
    model, image = network(), picture(32, 48)
    predictor = Predictor(model, flip=True)
    assert torch.equal(predictor(image.flip(2)), predictor(image).flip(1))
    symmetric = torch.cat([image, image.flip(2)], 2)
    assert torch.equal(predictor(symmetric), predictor(symmetric).flip(1))
    assert not torch.equal(Predictor(model)(symmetric), Predictor(model)(symmetric).flip(1))


def test_windows_of_a_resized_image():
    model, image = network(), picture(90, 60)
    small = functional.resize(image, [60, 48], InterpolationMode.BILINEAR, antialias=True)
    expected = slid(model, small, (32, 32), (16, 16)).log()[None]
    expected = F.interpolate(expected, (90, 60), mode="bilinear")[0].softmax(0)
    assert_classes(Predictor(model, resize=(60, 48), window=32)(image), expected)


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that any op returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("scored", [False, True])
def test_windows_keep_no_more_than_a_band(scored):
    model, image = network(num_classes=21), picture(4000, 64)
    predictor = Predictor(model, window=64, overlap=0.25)
    with Largest() as largest:
        if scored:
            predictor.with_loss(image, torch.zeros(4000, 64, dtype=torch.uint8))
        else:
            predictor(image)
    # The loss image itself is of the image's size.
    assert largest.numel <= max(21 * 64 * 64, 4000 * 64 * scored)


def test_a_single_class():
    model, image = network(num_classes=1), picture(48, 48)
    logits = logits_of(model, image)[0, 0]
    assert torch.equal(Predictor(model)(image), (logits > 0).byte())
    windowed = Predictor(model, window=32)
    two_sided = torch.stack([torch.zeros_like(logits), logits]).softmax(0)
    mask = torch.randint(0, 2, (48, 48))
    loss = loss_image(model, image, mask)
    torch.testing.assert_close(loss, F.cross_entropy(two_sided.log()[None], mask[None], reduction="none")[0])
    assert windowed(image).unique().tolist() == [0, 1] and torch.equal(windowed.with_loss(image, mask)[0], windowed(image))


def test_autocast():
    model, image = network(), picture(48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, image)
    assert expected.dtype == torch.bfloat16
    predicted = Predictor(model, autocast=torch.bfloat16)(image)
    assert torch.equal(predicted.long(), expected.float().argmax(1)[0])
    assert Predictor(model, autocast=torch.bfloat16, window=32, flip=True)(image).shape == (48, 64)


# A dense CRF.


def refined(probabilities, image, **settings):
    """log Q (C, H, W): what the CRF makes of probabilities (C, h, w)."""
    return segops.dense_crf(probabilities.log()[None], image[None], **settings)[0]


def assert_refined(predictor, image, log_q):
    """Classes, and the loss of each class, are of log Q: small as these images are, the CRF leaves
    one class on some."""
    size = image.shape[1:]
    losses = []
    for label in range(len(log_q)):
        classes, loss = predictor.with_loss(image, torch.full(size, label))
        losses.append(loss)
        assert torch.equal(classes, predictor(image))
    torch.testing.assert_close(-torch.stack(losses), log_q, rtol=1e-3, atol=1e-4)
    best = log_q.topk(2, dim=0)
    sure = best.values[0] - best.values[1] > 1e-3
    assert classes.dtype == torch.uint8 and sure.float().mean() > 0.99
    assert torch.equal(classes[sure].long(), best.indices[0][sure])


@pytest.mark.parametrize("name", ["segnet_basic", "pacnet", "pspnet"])
def test_crf_of_a_whole_image(name):
    model, image = network(name), picture(30, 45)
    assert_refined(Predictor(model, crf=True), image, refined(probabilities(model, image), image))


def test_crf_comes_after_scales_flips_and_windows():
    model, image = network("pacnet"), picture(48, 40)
    views = {"scales": (0.5, 1.0), "flips": (False, True)}
    predictor = Predictor(model, scales=views["scales"], flip=True, crf=True)
    assert_refined(predictor, image, refined(probabilities(model, image, **views), image))
    predictor = Predictor(model, window=(32, 32), scales=views["scales"], flip=True, crf=True)
    assert_refined(predictor, image, refined(slid(model, image, (32, 32), (16, 16), **views), image))


@pytest.mark.parametrize("name", ["pacnet", "pspnet"])
def test_crf_sees_the_image_as_it_was_before_resize(name):
    model, image = network(name), picture(45, 30)
    small = functional.resize(image, [40, 36], InterpolationMode.BILINEAR, antialias=True)
    expected = refined(probabilities(model, small, size=(45, 30)), image)
    assert_refined(Predictor(model, resize=(40, 36), crf=True), image, expected)


def test_crf_after_windows_of_a_resized_image():
    model, image = network(), picture(45, 30)
    small = functional.resize(image, [40, 36], InterpolationMode.BILINEAR, antialias=True)
    expected = refined(slid(model, small, (32, 32), (16, 16)), image)
    assert_refined(Predictor(model, resize=(40, 36), window=32, crf=True), image, expected)


@pytest.mark.parametrize("options", [{}, {"window": 24, "flip": True}, {"window": 24, "resize": (40, 32)}])
def test_a_crf_without_iterations_changes_nothing(options):
    model, image = network(), picture(36, 40)
    mask = torch.randint(0, 3, (36, 40))
    mask[4:6] = 255
    plain = Predictor(model, **options).with_loss(image, mask)
    classes, loss = Predictor(model, crf={"iterations": 0}, **options).with_loss(image, mask)
    assert torch.equal(classes, plain[0]) and (loss[4:6] == 0).all()
    torch.testing.assert_close(loss, plain[1], rtol=1e-4, atol=1e-5)


def test_crf_of_a_single_class_is_of_two():
    model, image = network(num_classes=1), picture(32, 40)
    logits = logits_of(model, image)[0]
    expected = refined(torch.cat([torch.zeros_like(logits), logits]).softmax(0), image)
    assert_refined(Predictor(model, crf=True), image, expected)


def test_settings_of_a_crf():
    model, image = network(), picture(32, 40)
    compatibility = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]])
    for settings in (CRF_SETTINGS["deeplabv1_largefov"], {"iterations": 3, "compatibility": compatibility}):
        expected = refined(probabilities(model, image), image, **settings)
        assert_refined(Predictor(model, crf=settings), image, expected)


def test_crf_is_in_float32_where_the_network_is_not():
    model, image = network(), picture(32, 40)
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(model, image)
    expected = refined(logits[0].float().softmax(0), image)
    assert_refined(Predictor(model, autocast=torch.bfloat16, crf=True), image, expected)


@pytest.mark.parametrize(
    "crf, error, message",
    [
        (None, TypeError, r"crf must be a bool or a dict of arguments of segops\.dense_crf; got None"),
        ("deeplabv1_coco", TypeError, r"crf must be a bool or a dict of .*; got 'deeplabv1_coco'"),
        ({"sigma": 3.0}, TypeError, r"unexpected keyword argument 'sigma'"),
        ({"align_corners": True}, TypeError, r"crf must not have align_corners, .*; got \['align_corners'\]"),
        ({"logits": torch.zeros(1, 3, 8, 8)}, TypeError, r"crf must not have logits, .*; got \['logits'\]"),
        ({"iterations": -1}, ValueError, r"iterations must be at least 0; got -1"),
        ({"bilateral_sigma": 3.0}, TypeError, r"bilateral_sigma must be a pair, .*; got 3\.0"),
        ({"spatial_weight": torch.ones(4)}, ValueError, r"spatial_weight must have shape \(\), \(3,\) or \(3, 3\); got \(4,\)"),
        ({"normalization": None}, ValueError, r"normalization must be one of 'after', 'symmetric'; got None"),
    ],
)
def test_crfs_that_are_refused_at_construction(crf, error, message):
    with pytest.raises(error, match=message):
        Predictor(network(), crf=crf)


@pytest.mark.cuda
def test_crf_on_a_gpu():
    model, image = network("pacnet"), picture(30, 45)
    compatibility = torch.eye(3)  # goes where the model is
    for options in ({}, {"window": (24, 32), "flip": True}):
        expected = Predictor(model.cpu(), crf=True, **options)(image)
        classes = Predictor(model, crf={"compatibility": compatibility}, **options, device="cuda")(image)
        assert classes.device.type == "cpu" and (classes == expected).float().mean() > 0.99


@pytest.mark.cuda
def test_on_a_gpu():
    model, image = network("pacnet"), picture(48, 80)
    mask = torch.randint(0, 3, (48, 80))
    for options in ({}, {"window": (32, 48), "scales": (1.0, 1.5), "flip": True}):
        expected, expected_loss = Predictor(model.cpu(), **options).with_loss(image, mask)
        classes, loss = Predictor(model, **options, device="cuda").with_loss(image, mask)
        assert classes.device.type == loss.device.type == "cpu"
        assert (classes == expected).float().mean() > 0.99
        torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["segnet_basic", "pacnet", "pspnet"])
def test_loss_image(name):
    model, image = network(name), picture(40, 56)
    mask = torch.randint(0, 3, (40, 56))
    mask[5:9] = 255
    logits = F.interpolate(logits_of(model, image), (40, 56), mode="bilinear", align_corners=name == "pspnet")
    expected = F.cross_entropy(logits, mask[None], ignore_index=255, reduction="none")[0]
    for masked in (mask, mask.byte()):
        loss = loss_image(model, image, masked)
        assert loss.dtype == torch.float32 and (loss[5:9] == 0).all() and (loss[:5] > 0).all()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_loss_image_of_averaged_probabilities():
    model, image = network(), picture(50, 56)
    mask = torch.randint(0, 3, (50, 56), dtype=torch.uint8)
    mask[:, 3] = 255
    predictor = Predictor(model, "none", window=32, flip=True)
    mean = slid(model, image, (32, 32), (16, 16), flips=(False, True), kind="none")
    expected = F.nll_loss(mean.log()[None], mask[None].long(), ignore_index=255, reduction="none")[0]
    torch.testing.assert_close(loss_image(predictor, image, mask), expected, rtol=1e-4, atol=1e-5)
    classes, loss = predictor.with_loss(image, mask)
    assert torch.equal(classes, predictor(image)) and torch.equal(loss, loss_image(predictor, image, mask))


def test_heat():
    colours = heat(torch.tensor([[0.0, 5 / 3, 10 / 3, 5.0], [9.0, torch.inf, torch.nan, 0.5]]))
    assert colours.shape == (3, 2, 4) and colours.dtype == torch.uint8
    black, red, yellow, white = [0, 0, 0], [255, 0, 0], [255, 255, 0], [255] * 3
    assert colours.permute(1, 2, 0).tolist() == [[black, red, yellow, white], [white, white, white, [76, 0, 0]]]
    assert torch.equal(heat(torch.tensor([[1.0]]), limit=1.0).flatten(), torch.tensor(white, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"limit must be positive; got 0"):
        heat(torch.zeros(1, 1), 0)


def test_overlay():
    image, classes = picture(2, 3), torch.tensor([[0, 1, 2], [255, 1, 0]])
    mixed = overlay(image, classes, PALETTE, opacity=0.25)
    expected = 0.75 * image[:, 0, 1] + 0.25 * torch.tensor(PALETTE[1])
    assert torch.equal(mixed[:, 0, 1], expected.round().byte()) and torch.equal(mixed[:, 1, 0], image[:, 1, 0])
    assert torch.equal(
        overlay(image, classes.where(classes != 255, 0), opacity=1.0), colourise(classes.where(classes != 255, 0))
    )
    with pytest.raises(ValueError, match=r"classes must have the image's size \(2, 3\); got \(3, 2\)"):
        overlay(image, classes.T)
    with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\]; got 2"):
        overlay(image, classes, opacity=2)


def test_palette_png(tmp_path):
    classes = torch.randint(0, 21, (9, 7))
    classes[0, 0] = 255
    save_classes(tmp_path / "voc.png", classes)
    with Image.open(tmp_path / "voc.png") as image:
        assert image.mode == "P" and np.array_equal(np.array(image), classes.numpy())
        colours = image.getpalette()
    voc = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128, 64, 0, 0]
    assert colours[: len(voc)] == voc and colours[20 * 3 : 21 * 3] == [0, 64, 128] and colours[255 * 3 :] == [224, 224, 192]
    save_classes(tmp_path / "own.png", classes.byte(), PALETTE)
    with Image.open(tmp_path / "own.png") as image:
        colours = image.getpalette()
        assert np.array_equal(np.array(image), classes.numpy())
    assert (
        colours[:9] == [value for colour in PALETTE for value in colour]
        and colours[9:12] == voc[9:12]
        and colours[255 * 3 :] == [224, 224, 192]
    )


@pytest.mark.parametrize("palette", [[], [[0, 0]], [[0, 0, 256]], [[0, -1, 0]], [[0, 0, 0]] * 256])
def test_palettes_that_are_none(palette):
    with pytest.raises(ValueError, match=r"palette must be at most 255 colours \[r, g, b\] from 0 to 255"):
        colourise(torch.zeros(2, 2, dtype=torch.uint8), palette)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_files_are_whole_or_not_there(tmp_path, monkeypatch, error):
    def fail(self, file, **options):
        file.write(b"half")
        raise error

    old = tmp_path / "old.png"
    save_image(old, picture(4, 4))
    content = old.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    for path in (old, tmp_path / "new.png"):
        for save in (lambda: save_classes(path, torch.zeros(2, 2)), lambda: save_image(path, picture(2, 2))):  # noqa: B023
            with pytest.raises(type(error)):
                save()
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and old.read_bytes() == content


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"normalize": "mean"}, ValueError, r"normalize must be one of .*'per_image'.*; got 'mean'"),
        ({"window": 0}, ValueError, r"window must be positive; got 0"),
        ({"window": 2.5}, TypeError, r"window must be an int or a pair of ints; got 2\.5"),
        ({"resize": (1, 2, 3)}, TypeError, r"resize must be an int or a pair of ints; got \(1, 2, 3\)"),
        ({"overlap": 1.0}, ValueError, r"overlap must be in \[0, 1\); got 1\.0"),
        ({"scales": ()}, ValueError, r"scales must be positive factors, at least one; got \(\)"),
        ({"scales": (1.0, 0.0)}, ValueError, r"scales must be positive factors, at least one; got \(1\.0, 0\.0\)"),
        ({"autocast": "bf16"}, TypeError, r"autocast must be a torch\.dtype or None; got 'bf16'"),
    ],
)
def test_settings_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        Predictor(network(), **options)


def test_arguments_that_are_none():
    predictor = Predictor(network())
    with pytest.raises(ValueError, match=r"model must have at most 255 classes, as class maps are uint8; got 256"):
        Predictor(network(num_classes=256))
    with pytest.raises(TypeError, match=r"image must be a uint8 tensor; got torch\.float32"):
        predictor(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"image must be a uint8 tensor; got ndarray"):
        predictor(np.zeros((3, 8, 8), np.uint8))
    for shape in ((8, 8), (1, 8, 8), (3, 0, 8)):
        with pytest.raises(ValueError, match=r"image must be \(3, H, W\), not empty; got \("):
            predictor(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"mask must have the image's size \(8, 8\); got \(8, 9\)"):
        predictor.with_loss(picture(8, 8), torch.zeros(8, 9, dtype=torch.uint8))
    for label in (3, -1):
        with pytest.raises(IndexError, match=rf"mask must hold classes below 3, or 255; got {label}"):
            predictor.with_loss(picture(8, 8), torch.full((8, 8), label))


def save_checkpoint(path, trained=None, **changes):
    trained = trained or network()
    info = {
        "model": {"name": "segnet_basic", "num_classes": 3, "options": {**SMALL, "pretrained": True, "checkpoint": "none.pt"}},
        "classes": ["ground", "box", "disc"],
        "palette": PALETTE,
        "normalize": "imagenet",
        "resize": None,
    } | changes
    weights = {f"model.{key}": value for key, value in trained.state_dict().items()}
    torch.save(
        {"state_dict": weights | {"discriminator.0.weight": torch.ones(1), "metrics.total": torch.ones(1)}, "segops": info},
        path,
    )
    return info


def test_load_network(tmp_path):
    model, image = network(), picture(32, 48)
    info = save_checkpoint(tmp_path / "best.ckpt", model)
    loaded, said = load_network(tmp_path / "best.ckpt")
    assert not loaded.training and said == info
    assert torch.equal(Predictor(loaded)(image), Predictor(model)(image))


def test_checkpoints_that_are_none(tmp_path):
    path = tmp_path / "best.ckpt"
    with pytest.raises(FileNotFoundError, match=r"checkpoint must be a file; there is none at .*best\.ckpt"):
        load_network(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"best\.ckpt cannot be read as a checkpoint: it is text"):
        load_network(path)
    for saved in ({"state_dict": {}}, {"segops": {}}, [1], {"state_dict": {}, "segops": 3}):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=r"best\.ckpt is no checkpoint of segops fit: it needs the entries"):
            load_network(path)
    torch.save({"state_dict": {}, "segops": {"model": {}, "normalize": "none", "resize": None}}, path)
    message = r"best\.ckpt is no checkpoint of segops fit: its entry 'segops' lacks 'classes', 'palette'"
    with pytest.raises(ValueError, match=message):
        load_network(path)
    for model, reason in (
        ({"name": "segnot", "num_classes": 3, "options": {}}, "name must be a known model; got 'segnot'"),
        ({"name": "segnet_basic", "num_classes": 3, "options": {"wide": 1}}, "has no option 'wide'"),
        ({"name": "patchgan", "num_classes": 3, "options": {}}, "patchgan judges what other networks segment"),
    ):
        save_checkpoint(path, model=model)
        with pytest.raises(ValueError, match=rf"best\.ckpt names no network that can be built: .*{reason}"):
            load_network(path)
    save_checkpoint(path, normalize="mean")
    with pytest.raises(ValueError, match=r"best\.ckpt is no checkpoint of segops fit: normalize .* must be one of"):
        load_network(path)
    save_checkpoint(path, network(num_classes=4))
    with pytest.raises(ValueError, match=r"best\.ckpt does not fit SegNetBasic: .*has shape \(4"):
        load_network(path)


@pytest.fixture
def work(tmp_path):
    """A checkpoint, a folder of three images, one of them in a folder below, and their labels, void being 3."""
    save_checkpoint(tmp_path / "best.ckpt")
    for name in ("a", "b.x", "city/c"):
        image, label = tmp_path / "images" / f"{name}.jpg", tmp_path / "labels" / f"{name}.png"
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(36, 40).permute(1, 2, 0).numpy()).save(image)
        Image.fromarray(torch.randint(0, 4, (36, 40), dtype=torch.uint8).numpy()).save(label)
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path


def command(work, *arguments, inputs=("images",), out="out"):
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    inputs = [str(work / given) for given in inputs]
    arguments = [str(work / argument) if argument == "labels" else argument for argument in arguments]
    options = parser.parse_args([str(work / "best.ckpt"), *inputs, "--out", str(work / out), "--device", "cpu", *arguments])
    return predict.run(options)


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


NAMES = ("a", "b.x", "city/c")
EVERYTHING = ("--overlay", "--loss-images", "--labels", "labels", "--void", "3")


def test_command(work, capsys):
    assert command(work, *EVERYTHING) is None
    out = work / "out"
    assert written(out) == sorted(f"{kind}/{name}.png" for kind in ("classes", "overlay", "loss") for name in NAMES)
    predictor = Predictor(load_network(work / "best.ckpt")[0])
    for name in NAMES:
        image, mask = pixels(work / f"images/{name}.jpg").permute(2, 0, 1), pixels(work / f"labels/{name}.png")
        classes, loss = predictor.with_loss(image, mask.where(mask != 3, 255))
        assert torch.equal(pixels(out / f"classes/{name}.png"), classes)
        assert torch.equal(pixels(out / f"overlay/{name}.png").permute(2, 0, 1), overlay(image, classes, PALETTE))
        panel = pixels(out / f"loss/{name}.png").permute(2, 0, 1)
        assert panel.shape == (3, 36, 4 * 40 + 3 * 4)
        first, second, third, fourth = (panel[:, :, start : start + 40] for start in range(0, 4 * 44, 44))
        assert torch.equal(first, image) and torch.equal(second, colourise(mask.where(mask != 3, 255), PALETTE))
        assert torch.equal(third, colourise(classes, PALETTE)) and torch.equal(fourth, heat(loss))
    said = capsys.readouterr()
    for line in ("class maps: 3 in", "overlays: 3 in", "loss images: 3 in"):
        assert line in said.out
    assert "100%" in said.err


def test_command_takes_labels_of_another_name(work):
    for name in NAMES:
        label = work / f"labels/{name}.png"
        label.rename(label.with_name(f"{label.stem}_gt.png"))
    message = (
        r"labels/a\.png is missing: the label of .*a\.jpg; .*labels/a_gt\.png is there: --mask-suffix=_gt\.png takes it; 2 more"
    )
    with pytest.raises(SystemExit, match=message):
        command(work, *EVERYTHING)
    command(work, *EVERYTHING, "--mask-suffix=_gt.png")
    assert len(written(work / "out/loss")) == 3


def test_command_takes_files_and_settings(work):
    settings = "--window 32 32 --overlap 0.25 --scales 0.5 1 --flip --precision bf16".split()
    command(work, *settings, inputs=("images/city/c.jpg", "images/a.jpg"))
    assert written(work / "out") == ["classes/a.png", "classes/c.png"]
    options = {"window": (32, 32), "overlap": 0.25, "scales": (0.5, 1.0), "flip": True, "autocast": torch.bfloat16}
    predictor = Predictor(load_network(work / "best.ckpt")[0], **options)
    assert torch.equal(pixels(work / "out/classes/a.png"), predictor(pixels(work / "images/a.jpg").permute(2, 0, 1)))


@pytest.mark.parametrize(
    "arguments, crf",
    [(["--crf"], True), (["--crf-settings", "deeplabv1_largefov"], CRF_SETTINGS["deeplabv1_largefov"])],
)
def test_command_with_a_crf(work, arguments, crf):
    command(work, *EVERYTHING, *arguments, inputs=("images/a.jpg",))
    image, mask = pixels(work / "images/a.jpg").permute(2, 0, 1), pixels(work / "labels/a.png")
    mask = mask.where(mask != 3, 255)
    predictor = Predictor(load_network(work / "best.ckpt")[0], crf=crf)
    classes, loss = predictor.with_loss(image, mask)
    assert torch.equal(pixels(work / "out/classes/a.png"), classes)
    assert torch.equal(pixels(work / "out/overlay/a.png").permute(2, 0, 1), overlay(image, classes, PALETTE))
    assert torch.equal(pixels(work / "out/loss/a.png")[:, -40:].permute(2, 0, 1), heat(loss))


def test_files_may_follow_the_crf_on_the_command_line(work, capsys):
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    options = parser.parse_args(["best.ckpt", "--out", "out", "--crf", "a.jpg", "b.jpg"])
    assert options.crf and options.inputs == ["a.jpg", "b.jpg"]
    with pytest.raises(SystemExit):
        parser.parse_args(["best.ckpt", "a.jpg", "--out", "out", "--crf-settings", "deeplab"])
    said = capsys.readouterr().err
    assert "argument --crf-settings: invalid choice: 'deeplab'" in said and all(name in said for name in CRF_SETTINGS)


def test_command_says_in_one_line_that_a_crf_cannot_run(work, monkeypatch):
    def unable(*arguments, **settings):
        raise RuntimeError("segops.dense_crf: backend 'triton' cannot run on cpu")

    monkeypatch.setattr(segops, "dense_crf", unable)
    with pytest.raises(SystemExit, match=r"^segops predict: segops\.dense_crf: backend 'triton' cannot run on cpu$"):
        command(work, "--crf")
    assert not (work / "out").exists()


def test_command_does_as_the_checkpoint_says(work):
    save_checkpoint(work / "best.ckpt", normalize="per_image", resize=[48, 32])
    command(work)
    predictor = Predictor(load_network(work / "best.ckpt")[0], "per_image", resize=(48, 32))
    assert torch.equal(pixels(work / "out/classes/a.png"), predictor(pixels(work / "images/a.jpg").permute(2, 0, 1)))


def test_command_reads_images_as_training_did(work):
    wide = picture(36, 40)[0].numpy().astype(np.uint16) * 16
    Image.fromarray(wide).save(work / "wide.png")
    predictor = Predictor(load_network(work / "best.ckpt")[0])
    for said, asked, scale in (
        ({}, (), "dtype"),
        ({"scale": 4095}, (), 4095),
        ({"scale": 4095}, ("--image-scale", "file"), "file"),
    ):
        save_checkpoint(work / "best.ckpt", predictor.model, **said)
        command(work, *asked, inputs=("wide.png",))
        assert torch.equal(pixels(work / "out/classes/wide.png"), predictor(read_image(work / "wide.png", scale)))
    with pytest.raises(SystemExit, match=r'scale must be "dtype", "file" or a positive number, .*; got -1\.0'):
        command(work, "--image-scale=-1")


def test_command_predicts_upright(work):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(picture(36, 40).permute(1, 2, 0).numpy()).save(work / "turned.png", exif=exif)
    Image.fromarray(torch.randint(0, 3, (40, 36), dtype=torch.uint8).numpy()).save(work / "labels/turned.png")
    command(work, *EVERYTHING, inputs=("turned.png",))
    image = read_image(work / "turned.png")
    classes = Predictor(load_network(work / "best.ckpt")[0])(image)
    assert classes.shape == (40, 36) and torch.equal(pixels(work / "out/classes/turned.png"), classes)
    assert torch.equal(pixels(work / "out/overlay/turned.png").permute(2, 0, 1), overlay(image, classes, PALETTE))
    assert pixels(work / "out/loss/turned.png").shape == (40, 4 * 36 + 3 * 4, 3)


def test_command_goes_on_after_a_corrupt_file(work, capsys):
    broken = work / "images/b.x.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    Image.new("L", (9, 9)).save(work / "labels/a.png")
    with pytest.raises(SystemExit) as stop:
        command(work, *EVERYTHING)
    message = stop.value.code  # a text: the exit status is 1
    assert message.startswith("segops predict: 2 of 3 images failed:\n  ") and message.count("\n") == 2
    assert f"{broken} cannot be read as an image" in message and "labels/a.png is 9x9" in message
    assert written(work / "out") == [f"{kind}/city/c.png" for kind in ("classes", "loss", "overlay")]
    said = capsys.readouterr()
    assert "class maps: 1 in" in said.out and f"segops predict: {broken} cannot be read" in said.err


def test_command_names_the_image_that_the_network_refuses(work, monkeypatch):
    monkeypatch.setattr(Predictor, "__call__", lambda self, image: (_ for _ in ()).throw(RuntimeError("too small\nat")))
    with pytest.raises(SystemExit, match=r"3 of 3 images failed:\n  .*a\.jpg: too small\n"):
        command(work)


@pytest.mark.parametrize("out", ["images", "images/first", "images/city"])
def test_command_again_on_a_folder_that_holds_its_output(work, capsys, out):
    """Whatever --out and options were before."""
    command(work, *EVERYTHING, out=out)
    capsys.readouterr()
    command(work, out="images/again")
    assert written(work / "images/again/classes") == sorted(f"{name}.png" for name in NAMES)
    said = capsys.readouterr().err
    assert said.startswith("segops predict: ") and "not read in " in said and ": 9 that segops predict wrote, such as " in said
    with pytest.warns(UserWarning, match=r"not read in .*images: 12 that segops predict wrote"):
        assert Unlabelled(work / "images").ids == list(NAMES)


def test_command_does_not_take_its_output_for_images(work):
    command(work)
    with pytest.raises(SystemExit, match=r"INPUT must be an image; .*out/classes/a\.png is what segops predict wrote"):
        command(work, inputs=("images", "out/classes/a.png"), out="other")
    message = r"out holds no images \(.*\), nor do folders below it; not read in .*out: 3 that segops predict wrote, such as classes/a"
    with pytest.raises(SystemExit, match=message):
        command(work, inputs=("out",), out="other")


def test_command_stops_after_an_interrupt(work, capsys, monkeypatch):
    first = Predictor.__call__
    calls = []

    def interrupted(self, image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return first(self, image)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(work)
    said = capsys.readouterr()
    assert stop.value.code == 130 and written(work / "out") == ["classes/a.png"]
    assert "segops predict: interrupted" in said.err and "class maps: 1 in" in said.out


def test_command_stops_where_it_cannot_write(work, monkeypatch):
    def full(path, classes, palette):
        raise OSError("no space left")

    monkeypatch.setattr(predict, "save_classes", full)
    with pytest.raises(SystemExit, match=r"segops predict: .*out/classes/a\.png cannot be written: no space left"):
        command(work)


@pytest.mark.parametrize(
    "arguments, inputs, message",
    [
        ((), ("nothing",), r"INPUT must be an image or a folder of images; there is none at .*nothing"),
        ((), ("labels/empty",), r".*empty holds no images \(\.jpg"),
        ((), ("images", "images/a.jpg"), r"images/a\.jpg and .*images/a\.jpg would both write .*out/classes/a\.png"),
        (("--loss-images",), ("images",), r"--loss-images and --labels need each other"),
        (("--labels", "labels"), ("images",), r"--loss-images and --labels need each other"),
        (
            ("--loss-images", "--labels", "images"),
            ("images",),
            r"images/a\.png is missing: the label of .*a\.jpg; 2 more labels",
        ),
        (("--scales", "0"), ("images",), r"scales must be positive factors"),
        (("--window", "0", "5"), ("images",), r"window must be positive; got \[0, 5\]"),
        (("--overlap", "1"), ("images",), r"overlap must be in \[0, 1\)"),
        (("--void", "256"), ("images",), r"--void must be a value of 8 bits, 0 to 255; got 256"),
    ],
)
def test_command_refuses_before_it_starts(work, arguments, inputs, message):
    (work / "labels/empty").mkdir()
    with pytest.raises(SystemExit, match=rf"^segops predict: .*{message}"):
        command(work, *arguments, inputs=inputs)
    assert not (work / "out").exists()


def test_command_refuses_what_it_cannot_use(work, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^segops predict: --device cuda needs a CUDA device; torch sees none"):
        command(work, "--device", "cuda")
    (work / "best.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^segops predict: .*best\.ckpt cannot be read as a checkpoint"):
        command(work)


def test_command_does_not_write_over_what_it_reads(work):
    (work / "labels").rename(work / "classes")
    with pytest.raises(SystemExit, match=r"classes/a\.png would be written over, and is an INPUT or a label"):
        command(work, "--loss-images", "--labels", str(work / "classes"), "--void", "3", out=".")
