"""Augmentation and normalisation: masks follow their images, what is added is void, random numbers are torch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from segops.train import Augment, normalize
from segops.train.transforms import VOID, resize


def coded(height=24, width=36):
    """An image whose channels tell the mask and the place of every pixel, and the mask."""
    mask = torch.randint(0, 200, (height, width), dtype=torch.uint8)
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand_as(mask)
    columns = torch.arange(width, dtype=torch.uint8).expand_as(mask)
    return torch.stack([mask, rows, columns]), mask


def mean_colour(image):
    return image.float().mean((1, 2)).round().byte()


def assert_exact(image, mask, fill):
    """Every pixel is one of the coded image's with its own label, or the mean colour and void."""
    added = mask == VOID
    assert image.dtype == mask.dtype == torch.uint8 and image.shape == (3, *mask.shape)
    assert torch.equal(image[0][~added], mask[~added])
    assert (image[:, added] == fill[:, None]).all()


def disc(size=(80, 120), centre=(30.0, 70.0), radius=22.0):
    """A bright disc on dark ground, and its mask."""
    y, x = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    mask = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2).byte()
    return (40 + 160 * mask).expand(3, *size).contiguous(), mask


def assert_follows(image, mask):
    """The mask is the thresholded image but within a pixel of an edge, void included."""
    edges = torch.stack([F.max_pool2d(value * mask.float()[None], 3, 1, 1)[0] for value in (1, -1)]).sum(0) > 0
    inner = ~edges & (mask != VOID)
    assert inner.float().mean() > 0.4 and (mask[inner] == 1).sum() > 100
    assert torch.equal((image[0] > 120)[inner], mask[inner] == 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"horizontal_flip": 1.0},
        {"vertical_flip": 1.0},
        {"horizontal_flip": 0.5, "vertical_flip": 0.5},
        {"pad": 9},
        {"crop": (10, 50)},
        {"crop": (40, 20)},
        {"crop": (24, 36)},
        {"pad": 5, "crop": (20, 30), "vertical_flip": 0.5},
    ],
    ids=str,
)
def test_flips_crops_and_padding_are_exact(settings):
    image, mask = coded()
    augment = Augment(**settings)
    for _ in range(8):
        assert_exact(*augment(image, mask), mean_colour(image))


def test_what_flips_do():
    image, mask = coded()
    flipped = Augment(horizontal_flip=1, vertical_flip=0)(image, mask)
    assert torch.equal(flipped[0], image.flip(2)) and torch.equal(flipped[1], mask.flip(1))
    flipped = Augment(horizontal_flip=0, vertical_flip=1)(image, mask)
    assert torch.equal(flipped[0], image.flip(1)) and torch.equal(flipped[1], mask.flip(0))
    same = Augment(horizontal_flip=0)(image, mask)
    assert torch.equal(same[0], image) and torch.equal(same[1], mask)


@pytest.mark.parametrize(("name", "axis"), [("horizontal_flip", 1), ("vertical_flip", 0)])
@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_probability_of_flips(name, axis, probability):
    image, mask = coded(4, 6)
    augment = Augment(**{"horizontal_flip": 0.0, name: probability})
    flips = sum(torch.equal(augment(image, mask)[1], mask.flip(axis)) for _ in range(400))
    assert abs(flips - 400 * probability) < 4 * (400 * probability * (1 - probability)) ** 0.5


def test_one_flips_and_the_other_does_not():
    image, mask = coded(4, 6)
    augment = Augment(horizontal_flip=0.5, vertical_flip=0.5)
    seen = {tuple(augment(image, mask)[1].flatten().tolist()) for _ in range(60)}
    assert seen == {tuple(variant.flatten().tolist()) for variant in (mask, mask.flip(0), mask.flip(1), mask.flip(0, 1))}


def test_padding_is_drawn_for_each_side():
    image, mask = coded()
    augment, margins = Augment(pad=3, horizontal_flip=0), set()
    for _ in range(200):
        added = augment(image, mask)[1] == VOID
        rows, columns = ((~added).any(axis).nonzero()[:, 0] for axis in (1, 0))
        assert (len(rows), len(columns)) == mask.shape
        top, left = rows[0].item(), columns[0].item()
        margins |= {("top", top), ("left", left), ("bottom", added.shape[0] - 24 - top), ("right", added.shape[1] - 36 - left)}
    assert margins == {(side, margin) for side in ("top", "left", "bottom", "right") for margin in range(4)}


@pytest.mark.parametrize("crop", [(10, 20), [10, 20], (24, 36)])
def test_crops_of_a_larger_image(crop):
    image, mask = coded()
    augment, corners = Augment(crop=crop, horizontal_flip=0), set()
    for _ in range(300):
        cropped, labels = augment(image, mask)
        assert labels.shape == tuple(crop) and (labels != VOID).all()
        top, left = cropped[1, 0, 0].item(), cropped[2, 0, 0].item()
        assert torch.equal(cropped, image[:, top : top + crop[0], left : left + crop[1]])
        corners.add((top, left))
    tops, lefts = (set(values) for values in zip(*corners, strict=True))
    assert tops == set(range(24 - crop[0] + 1)) and lefts == set(range(36 - crop[1] + 1))


def test_crops_of_a_smaller_image():
    image, mask = coded()
    cropped, labels = Augment(crop=(30, 40), horizontal_flip=0)(image, mask)
    assert torch.equal(cropped[:, :24, :36], image) and torch.equal(labels[:24, :36], mask)
    assert (labels[24:] == VOID).all() and (labels[:, 36:] == VOID).all()
    assert (cropped[:, 24:] == mean_colour(image)[:, None, None]).all()
    cropped, labels = Augment(crop=(30, 20), horizontal_flip=0)(image, mask)  # lower, but wider
    left = cropped[2, 0, 0].item()
    assert torch.equal(labels[:24], mask[:, left : left + 20]) and (labels[24:] == VOID).all()


@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        ((0.5, 2.0, 0.25), {0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0}),
        ((0.7, 1.3, 0.1), {0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3}),
        ((0.5, 1.2, 0.5), {0.5, 1.0}),
        ((1.5, 1.5, 0.25), {1.5}),
    ],
)
def test_factors(scale, factors):
    """Those drawn, equally often, and no others."""
    image, mask = coded(20, 40)
    augment = Augment(scale=scale, horizontal_flip=0)
    draws = [tuple(augment(image, mask)[1].shape) for _ in range(280)]
    assert set(draws) == {(round(20 * factor), round(40 * factor)) for factor in factors}
    mean = len(draws) / len(factors)
    assert all(abs(draws.count(size) - mean) < 4 * mean**0.5 for size in set(draws))


def test_factors_between():
    image, mask = coded(1, 1000)
    augment = Augment(scale=(0.5, 2.0, 0.0))
    widths = [augment(image, mask)[1].shape[1] for _ in range(100)]
    assert 500 <= min(widths) < 600 and 1900 < max(widths) <= 2000 and len(set(widths)) > 80


def test_a_side_never_vanishes():
    image, mask = coded(1, 30)
    scaled, labels = Augment(scale=(0.25, 0.25, 0.0))(image, mask)
    assert labels.shape == (1, 8) and scaled.shape == (3, 1, 8)


@pytest.mark.parametrize("size", [(80, 120), (40, 60), (120, 180), (53, 171), (31, 77)])
def test_resize(size):
    image, mask = resize(*disc(), size)
    assert mask.shape == size and image.shape == (3, *size) and image.dtype == mask.dtype == torch.uint8
    assert_follows(image, mask)
    if size == (80, 120):
        assert torch.equal(image, disc()[0]) and torch.equal(mask, disc()[1])


def test_resize_is_centred():
    """Halves: the mean of four pixels, and a label of these four, in the same place after a flip of both axes."""
    image, mask = coded()
    small, labels = resize(image, mask, (12, 18))
    turned, turned_labels = resize(image.flip(1, 2), mask.flip(0, 1), (12, 18))
    assert (small.flip(1, 2).int() - turned.int()).abs().max() <= 1
    blocks = F.unfold(mask[None, None].float(), 2, stride=2).view(4, 12, 18)
    assert (blocks == labels).any(0).all() and (blocks == turned_labels.flip(0, 1)).any(0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": (0.5, 2.0, 0.25)},
        {"rotate": 10},
        {"rotate": 180},
        {"scale": (0.75, 1.5, 0.0), "rotate": 30, "pad": 12, "vertical_flip": 0.5},
    ],
    ids=str,
)
def test_masks_follow(settings):
    augment = Augment(**settings)
    for _ in range(6):
        image, mask = augment(*disc())
        assert image.dtype == mask.dtype == torch.uint8 and set(mask.unique().tolist()) <= {0, 1, VOID}
        assert_follows(image, mask)


def test_rotation():
    """A hand to the right of the centre shows the angle, in the image and in the mask."""
    mask = torch.zeros(80, 120, dtype=torch.uint8)
    mask[36:44, 60:110] = 1
    image = (40 + 160 * mask).expand(3, 80, 120).contiguous()
    augment, angles = Augment(rotate=20, horizontal_flip=0), []
    for _ in range(60):
        turned, labels = augment(image, mask)
        assert labels.shape == mask.shape
        angle = [angle_of(hand) for hand in (labels == 1, turned[0] > 120)]
        assert angle[0] == pytest.approx(angle[1], abs=0.5)
        angles.append(angle[0])
        added = labels == VOID
        assert added.any() or abs(angles[-1]) < 1
        far = added & (F.max_pool2d((~added).float()[None], 3, 1, 1)[0] == 0)
        assert (turned[:, far] == mean_colour(image)[:, None]).all() and not added[30:50, 30:90].any()
    assert -21 < min(angles) < -14 and 14 < max(angles) < 21


def angle_of(hand):
    y, x = hand.nonzero().float().mean(0).tolist()
    return math.degrees(math.atan2(39.5 - y, x - 59.5))


def test_colours_change_and_places_do_not():
    image, mask = disc()
    image[1], image[2] = image[0] // 2, 90
    for name in ("brightness", "contrast", "saturation", "hue"):
        plain, jittered = Augment(horizontal_flip=0), Augment(horizontal_flip=0, **{name: 0.4})
        changed, labels = jittered(image, mask)
        assert torch.equal(labels, mask) and changed.dtype == torch.uint8 and changed.shape == image.shape
        assert not torch.equal(changed, image) and torch.equal(plain(image, mask)[0], image)
        inside, outside = changed[:, mask == 1], changed[:, mask == 0]  # one colour each, as before
        assert (inside == inside[:, :1]).all() and (outside == outside[:, :1]).all()


def test_brightness_keeps_its_bounds():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    augment = Augment(brightness=0.3)
    values = [augment(image, image[0])[0][0, 0, 0].item() for _ in range(100)]
    assert 70 <= min(values) < 80 and 120 < max(values) <= 130


EVERYTHING = {
    "scale": (0.5, 2.0, 0.25),
    "rotate": 10,
    "pad": 8,
    "crop": (32, 48),
    "vertical_flip": 0.5,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.1,
}


def test_torch_s_seed_decides():
    image, mask = disc()
    before, augment, results = (image.clone(), mask.clone()), Augment(**EVERYTHING), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        results.append(augment(image, mask))
    assert all(torch.equal(*pair) for pair in zip(results[0], results[2], strict=True))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])  # not in place


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (0.0, 2.0, 0.25)}, r"scale must be \(least, most, step\) with 0 < least <= most and step >= 0; got \(0\.0"),
        ({"scale": (2.0, 0.5, 0.25)}, "scale must be"),
        ({"scale": (0.5, 2.0, -0.25)}, "scale must be"),
        ({"scale": (0.5, 2.0)}, "scale must be"),
        ({"crop": (0, 32)}, r"crop must be two positive sizes \(height, width\); got \(0, 32\)"),
        ({"crop": (32,)}, "crop must be"),
        ({"crop": 32}, "crop must be"),
        ({"horizontal_flip": 1.5}, r"horizontal_flip must be at least 0 and at most 1; got 1\.5"),
        ({"vertical_flip": -0.1}, r"vertical_flip must be at least 0 and at most 1; got -0\.1"),
        ({"hue": 0.6}, r"hue must be at least 0 and at most 0\.5; got 0\.6"),
        ({"rotate": 181}, "rotate must be at least 0 and at most 180; got 181"),
        ({"pad": -1}, "pad must be an integer, at least 0; got -1"),
        ({"pad": 2.5}, r"pad must be an integer, at least 0; got 2\.5"),
        ({"pad": 8, "crop": (16, 8)}, r"pad must be below both sides of crop, .*; got 8 and \(16, 8\)"),
        ({"brightness": -0.1}, r"brightness must be at least 0; got -0\.1"),
        ({"contrast": -0.1}, "contrast must be at least 0"),
        ({"saturation": -0.1}, "saturation must be at least 0"),
        ({"brightness": math.nan}, "brightness must be at least 0; got nan"),
        ({"contrast": math.inf}, "contrast must be at least 0; got inf"),
        ({"saturation": (0.5, 1.5)}, r"saturation must be at least 0; got \(0\.5, 1\.5\)"),
        ({"hue": math.nan}, r"hue must be at least 0 and at most 0\.5; got nan"),
        ({"rotate": math.nan}, "rotate must be at least 0 and at most 180; got nan"),
        ({"rotate": "10"}, "rotate must be at least 0 and at most 180; got '10'"),
        ({"horizontal_flip": math.nan}, "horizontal_flip must be at least 0 and at most 1; got nan"),
        ({"vertical_flip": True}, "vertical_flip must be at least 0 and at most 1; got True"),
        ({"scale": (0.5, math.inf, 0)}, "scale must be"),
        ({"scale": (0.5, 2.0, math.nan)}, "scale must be"),
        ({"scale": ("0.5", 2.0, 0)}, "scale must be"),
        ({"scale": 2.0}, "scale must be"),
        ({"crop": (True, 4)}, "crop must be"),
    ],
    ids=str,
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


def test_normalize_imagenet():
    images = torch.rand(2, 3, 4, 5)
    normal = normalize(images, "imagenet")
    for channel, (mean, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(normal[:, channel], (images[:, channel] - mean) / deviation)
    torch.testing.assert_close(normalize(images[1], "imagenet"), normal[1])
    assert normalize(images, "none") is images


def test_normalize_per_image():
    images = torch.rand(2, 3, 18, 19) * torch.tensor([0.5, 1.0]).view(2, 1, 1, 1)
    images[:, 1] *= 0.5
    normal = normalize(images, "per_image")
    for image, result in zip(images, normal, strict=True):
        deviation = (image - image.mean()).square().mean().sqrt()
        torch.testing.assert_close(result, (image - image.mean()) / deviation)
        torch.testing.assert_close(normalize(image, "per_image"), result)
    assert normal[0, 0].mean() > 0.2 and normal[0, 1].mean() < -0.4  # over all channels, not each


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
def test_normalize_per_image_of_one_colour(value):
    assert normalize(torch.full((2, 3, 31, 33), value), "per_image").abs().max() < 1e-3
    faint = torch.full((3, 10, 10), 0.5)
    faint[0, 0, 0] += 0.01  # deviation below 1 / sqrt(300)
    normal = normalize(faint, "per_image")
    assert normal[0, 0, 0].item() == pytest.approx(0.01 * (1 - 1 / 300) * 300**0.5, rel=1e-3)


def test_normalize_kind():
    message = "normalize must be one of 'imagenet', 'inception', 'per_image', 'none'; got 'standard'"
    with pytest.raises(ValueError, match=message):
        normalize(torch.rand(3, 2, 2), "standard")
