"""Data sets in the layouts of their sites: ids, order, values, void, errors that name the file; and the real files."""

import os
import pickle
import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, TiffImagePlugin

from segops.train import datasets
from segops.train.datasets import VOC, CamVid, Cityscapes, Folder, ImageClasses, Unlabelled, palette, read_image
from segops.train.inference import save_classes, save_image

SHARED = Path(__file__).parents[3] / "shared" / "data"

# images are 2x3 pixels and told apart by red, in tens: JPEG is off by one
VALUES = [[0, 1, 255], [1, 0, 0]]


def needs(name):
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"shared/data/{name} is not beside the checkout")


def write_image(path, red=0, size=(3, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10 * red, 100, 200)).save(path)


def write_mask(path, values=VALUES, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.array(values, dtype=np.uint8))
    if mode == "P":
        mask.putpalette([value for colour in palette(256) for value in colour])
    mask.save(path)


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def voc_layout(root, splits):
    """VOCdevkit with the given {split: ids}; red values count the ids in order."""
    home = root / "VOCdevkit/VOC2012"
    for split, ids in splits.items():
        write_text(home / f"ImageSets/Segmentation/{split}.txt", *ids)
    for red, name in enumerate(sorted({name for ids in splits.values() for name in ids})):
        write_image(home / f"JPEGImages/{name}.jpg", red)
    for name in {name for split, ids in splits.items() if split != "test" for name in ids}:
        write_mask(home / f"SegmentationClass/{name}.png", [[0, 15, 255], [20, 0, 0]], "P")
    return home


def sbd_layout(root, splits, savemat=None):
    """The release of SBD; with savemat its masks are real."""
    home = root / "benchmark_RELEASE/dataset"
    (home / "cls").mkdir(parents=True)
    for split, ids in splits.items():
        write_text(home / f"{split}.txt", *ids)
        for name in ids:
            write_image(home / f"img/{name}.jpg", 25)
            (home / f"cls/{name}.mat").touch()
            if savemat:
                values = np.array([[0, 7, 7], [20, 0, 0]], dtype=np.uint8)
                categories = np.array([[7], [20]], dtype=np.uint8)
                savemat(
                    home / f"cls/{name}.mat",
                    {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": values, "CategoriesPresent": categories}},
                )
    return home


def cityscapes_layout(root, split, names, kind="gtFine", values=((7, 8, 0), (33, 29, 1))):
    for red, name in enumerate(names):
        city = name.split("_")[0]
        write_image(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", red)
        write_mask(root / f"{kind}/{split}/{city}/{name}_{kind}_labelIds.png", values)
        write_mask(root / f"{kind}/{split}/{city}/{name}_{kind}_instanceIds.png", np.full((2, 3), 200))
    return root


def check(dataset, ids, num_classes):
    """The contract, item by item."""
    assert dataset.ids == ids and len(dataset) == len(dataset.images) == len(ids)
    assert len(dataset.classes) == dataset.num_classes == len(dataset.palette) == num_classes
    assert isinstance(dataset.classes, tuple) and all(isinstance(name, str) for name in dataset.classes)
    assert all(len(colour) == 3 and all(0 <= value <= 255 for value in colour) for colour in dataset.palette)
    assert all(isinstance(path, Path) for path in [*dataset.images, *(dataset.masks or [])])
    for image, mask in dataset:
        assert image.dtype == mask.dtype == torch.uint8 and image.shape == (3, *mask.shape)
        assert set(mask.unique().tolist()) <= {*range(num_classes), 255}
        if dataset.masks is None:
            assert (mask == 255).all()
    return dataset


def reds(dataset):
    return [round(item[0][0].float().mean().item() / 10) for item in dataset]


def test_palette():
    assert palette(21)[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0)) and palette(21)[20] == (0, 64, 128)
    assert palette(256)[255] == (224, 224, 192) and len(set(palette(256))) == 256


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_gray_of_16_bits_is_scaled(tmp_path, suffix):
    Image.fromarray(np.array([[0, 128, 129, 25700, 65535]], dtype=np.uint16)).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (3, 1, 5) and image.dtype == torch.uint8
    assert all(channel.tolist() == [[0, 0, 1, 100, 255]] for channel in image)


def test_modes_become_rgb(tmp_path):
    def read(image, **options):
        image.save(tmp_path / "a.png", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read_image(tmp_path / "a.png")[:, 0, 0].tolist()

    assert read(Image.new("L", (2, 2), 7)) == [7, 7, 7]
    assert read(Image.new("1", (2, 2), 1)) == [255, 255, 255]
    assert read(Image.new("LA", (2, 2), (7, 50))) == [7, 7, 7]
    assert read(Image.new("RGBA", (2, 2), (1, 2, 3, 50))) == [1, 2, 3]
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert read(image) == read(image, transparency=b"\0\x80") == [10, 20, 30]
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg")[:, 0, 0].tolist() == [255, 255, 255]


def levels(path, scale):
    image = read_image(path, scale)
    assert image.dtype == torch.uint8 and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    return image[0].flatten().tolist()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_scales_of_gray_of_16_bits(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[1000, 2000, 4095, 5000]], dtype=np.uint16)).save(path)
    assert levels(path, "dtype") == [4, 8, 16, 19]
    assert levels(path, 4095) == [62, 125, 255, 255]
    assert levels(path, 65535) == levels(path, "dtype")
    assert levels(path, "file") == [0, 64, 197, 255]
    Image.fromarray(np.full((1, 3), 700, dtype=np.uint16)).save(path)
    assert levels(path, "file") == [0, 0, 0]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_scales_of_gray_of_32_bits(tmp_path, kind):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[-100, 0, 300, 500]], dtype=kind)).save(path)
    message = rf'a\.tif has mode {"IF"[kind == np.float32]}, whose range is not known: scale must be "file", or the value'
    with pytest.raises(ValueError, match=message):
        read_image(path)
    assert levels(path, "file") == [0, 42, 170, 255]
    assert levels(path, 300) == [0, 0, 255, 255]
    if kind == np.float32:
        Image.fromarray(np.array([[np.nan, -np.inf, np.inf, 0.25, 0.75, 0.5]], kind)).save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert levels(path, "file") == [0, 0, 255, 0, 255, 128]
            assert levels(path, 0.5) == [0, 0, 255, 128, 255, 255]


def write_png(path, rows, bits, colour, width):
    """A PNG of rows of packed bytes: of kinds that Pillow reads and does not write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        (b"IEND", b""),
    ]
    content = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
def test_scales_of_channels_of_16_bits(tmp_path, colour, channels):
    """Pillow has their upper 8 bits alone."""
    path, pixels = tmp_path / "a.png", np.array([[[100, 400, 4095, 9], [0, 800, 2000, 9]]], np.uint16)[..., :channels]
    write_png(path, [row.astype(">u2").tobytes() for row in pixels], 16, colour, width=2)
    expected = pixels[..., :3] if channels > 2 else pixels[..., [0, 0, 0]]
    for scale, low, high in ((4095, 0, 4095), ("file", expected.min(), expected.max())):
        wanted = np.round((expected.astype(float) - low) / float(high - low) * 255)
        assert np.array_equal(read_image(path, scale).permute(1, 2, 0).numpy(), wanted)
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), expected >> 8)
    tiff = tmp_path / "a.tif"  # that Pillow writes with 8 bits alone
    Image.new("RGB", (2, 2)).save(tiff)
    eight, sixteen = (struct.pack("<HHH", *[bits] * 3) for bits in (8, 16))
    tiff.write_bytes(tiff.read_bytes().replace(eight, sixteen) + bytes(2 * 2 * 3))
    assert read_image(tiff).shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r'a\.tif holds 16 bits a channel, of which Pillow reads 8: scale must be "dtype"'):
        read_image(tiff, 4095)


def test_scales_of_8_bits(tmp_path):
    pixels = torch.tensor([[[10, 60, 110], [20, 10, 30]]], dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    for scale, expected in (("dtype", pixels), (255, pixels), ("file", [[[0, 128, 255], [26, 0, 51]]])):
        assert read_image(tmp_path / "a.png", scale).permute(1, 2, 0).tolist() == torch.as_tensor(expected).tolist()
    assert read_image(tmp_path / "a.png", 100)[:, 0, 0].tolist() == [26, 153, 255]


@pytest.mark.parametrize(
    "scale, error", [("bits", ValueError), (0, ValueError), (float("nan"), ValueError), (True, TypeError), (None, TypeError)]
)
def test_scales_that_are_refused(folder, scale, error):
    message = r'scale must be "dtype", "file" or a positive number, the value that becomes 255; got '
    csv = write_text(folder / "classes.csv", "image,level", "a,0")
    for use in (
        lambda: read_image(folder / "images/a.png", scale),
        lambda: Folder(folder, scale=scale),
        lambda: Unlabelled(folder / "images", scale=scale),
        lambda: ImageClasses(csv, folder / "images", scale=scale),
    ):
        with pytest.raises(error, match=message):
            use()


def test_data_sets_scale(tmp_path):
    image = tmp_path / "images/a.png"
    image.parent.mkdir()
    Image.fromarray(np.array([[0, 819, 4095], [1, 2, 3]], dtype=np.uint16)).save(image)
    write_mask(tmp_path / "masks/a.png")
    csv = write_text(tmp_path / "classes.csv", "image,level", "a,0")
    for dataset in (
        Folder(tmp_path, scale=4095),
        Unlabelled(image.parent, scale=4095),
        ImageClasses(csv, image.parent, scale=4095),
    ):
        assert dataset[0][0][0].tolist() == [[0, 51, 255], [0, 0, 0]]


UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def write_turned(path, pixels, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
def test_images_lie_upright(tmp_path, suffix, orientation):
    pixels = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, np.ones((16, 16, 3), np.uint8))
    write_turned(tmp_path / f"a.{suffix}", pixels, orientation)
    image = read_image(tmp_path / f"a.{suffix}").permute(1, 2, 0).numpy()
    assert image.shape == UPRIGHT[orientation](pixels).shape
    assert abs(image.astype(int) - UPRIGHT[orientation](pixels)).max() <= (3 if suffix == "jpg" else 0)


def test_wide_images_lie_upright(tmp_path):
    pixels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 100
    write_turned(tmp_path / "a.png", pixels, 6)
    assert read_image(tmp_path / "a.png", 255)[0].tolist() == np.rot90(pixels, -1).clip(max=255).tolist()


def test_masks_lie_as_drawn(tmp_path):
    write_turned(tmp_path / "images/a.png", np.zeros((2, 3, 3), np.uint8), 8)
    write_turned(tmp_path / "masks/a.png", np.array([[1, 0], [0, 0], [0, 1]], np.uint8), 6)
    image, mask = Folder(tmp_path)[0]
    assert image.shape == (3, 3, 2) and mask.tolist() == [[1, 0], [0, 0], [0, 1]]
    write_mask(tmp_path / "masks/a.png")
    message = r"masks/a\.png is 3x2 pixels, its image .*images/a\.png 2x3, turned upright as its EXIF orientation says"
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path)[0]
    write_image(tmp_path / "images/a.png", size=(2, 3))
    with pytest.raises(ValueError, match=r"images/a\.png 2x3$"):
        Folder(tmp_path)[0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damage", [b"Exif\0\0", b"Exif\0\0garbage that is none", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_turns_nothing(tmp_path, damage):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=damage)
    assert read_image(tmp_path / "a.jpg").shape == (3, 20, 30)


def test_an_orientation_beside_damaged_exif_still_turns(tmp_path, monkeypatch):
    write_turned(tmp_path / "a.png", np.zeros((2, 3, 3), np.uint8), 6)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda self: (_ for _ in ()).throw(TypeError("a tag of another type")))
    assert read_image(tmp_path / "a.png").shape == (3, 3, 2)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_several_frames_are_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (9, 8), (80 * index, 9, 9)) for index in range(3)]
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        frames[0].save(tmp_path / f"{folder}/a.{suffix}", save_all=True, append_images=frames[1:])
    message = rf"images/a\.{suffix} has 3 frames or pages: save each as a file of its own"
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / f"images/a.{suffix}")
    frames[0].save(tmp_path / f"images/a.{suffix}")
    assert read_image(tmp_path / f"images/a.{suffix}").shape == (3, 8, 9)


def test_files_of_a_picture_and_its_copies(tmp_path):
    """Of phones, and of mapping: what is beside the picture is no picture of its own."""
    frames = [Image.new("RGB", (18, 16), (200, 100, 0)), Image.new("RGB", (9, 8))]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "a.tif"), True) as file:
        for frame, kind in zip(frames, (0, 1), strict=True):
            frame.save(file, format="TIFF", tiffinfo={254: kind})
            file.newFrame()
    for name in ("a.jpg", "a.tif"):
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 2
        image = read_image(tmp_path / name)
        assert image.shape == (3, 16, 18) and abs(image[0].int() - 200).max() < 5


def test_folder_without_split(tmp_path):
    for red, name in ((2, "b.JPEG"), (1, "a.tif"), (3, "c.d.bmp")):
        write_image(tmp_path / "images" / name, red)
        write_mask(tmp_path / "masks" / f"{Path(name).stem}.png", [[0, 1, 255], [2, 9, 0]], "P" if red == 1 else "L")
    write_image(tmp_path / "images/more/x.png")
    (tmp_path / "images/._a.png").write_bytes(b"resource fork")
    (tmp_path / "images/Thumbs.db").touch()
    with pytest.warns(UserWarning, match=r"images: 1 of other kinds than regular files of .*, such as Thumbs\.db"):
        dataset = Folder(str(tmp_path), num_classes=3, void=9, classes=["x", "y", "z"])
    check(dataset, ["a", "b", "c.d"], 3)
    assert dataset.classes == ("x", "y", "z") and dataset.palette == palette(3)
    assert reds(dataset) == [1, 2, 3]
    assert all(mask.tolist() == [[0, 1, 255], [2, 255, 0]] for _, mask in dataset)


@pytest.mark.parametrize("suffix", ["webp", "gif", "jfif", "WEBP"])
def test_more_formats(tmp_path, suffix):
    image = Image.new("RGB", (3, 2), (200, 100, 0))
    write_mask(tmp_path / "masks/a.png")
    (tmp_path / "images").mkdir()
    image.save(tmp_path / f"images/a.{suffix}", quality=95)
    for dataset in (Folder(tmp_path), Unlabelled(tmp_path / "images")):
        assert dataset.ids == ["a"] and abs(dataset[0][0][:, 0, 0].int() - torch.tensor([200, 100, 0])).max() < 5


def test_what_is_not_read_is_said(folder):
    images = folder / "images"
    for name in ("b.svg", "c.npy", ".hidden.svg", "._a.png", "train.txt"):
        (images / name).touch()
    (images / "folder.png").mkdir()
    (images / ".ipynb_checkpoints").mkdir()
    write_image(images / ".ipynb_checkpoints/a-checkpoint.png")
    said = r"^not read in .*images: 2 of other kinds than regular files of \.jpg, .*\.webp, \.gif, such as b\.svg$"
    for open_it in (lambda: Folder(folder), lambda: Unlabelled(images)):
        with pytest.warns(UserWarning, match=said) as record:
            assert open_it().ids == ["a", "b"]
        assert len(record) == 1
    write_image(images / "below/c.png")
    with pytest.warns(UserWarning, match=r"images: the images in folders below it, as below: a pattern with \*\*/ takes them$"):
        assert Folder(folder).ids == ["a", "b"]
    (images / "below/c.png").unlink()
    for path in (images / "b.svg", images / "c.npy"):
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Folder(folder)
    for name in "ab":
        (images / f"{name}.png").rename(images / f"{name}.dcm")
    with pytest.raises(
        FileNotFoundError, match=r"images holds no images \(.*\): expected .*; not read in .*images: 2 .* a\.dcm"
    ):
        Folder(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_not_read(folder):
    """Opening a pipe would wait for ever; a link to nothing is a file that somebody misses."""
    os.mkfifo(folder / "images/pipe.png")
    (folder / "images/link.png").symlink_to(folder / "nowhere.png")
    with pytest.warns(UserWarning, match=r"images: 2 of other kinds than regular files of .*, such as link\.png"):
        assert Folder(folder).ids == ["a", "b"]
    (folder / "masks/a.png").unlink()
    os.mkfifo(folder / "masks/a.png")
    with (
        pytest.raises(FileNotFoundError, match=r"masks/a\.png is missing: .* with .*masks/ID\.png$"),
        pytest.warns(UserWarning),
    ):
        Folder(folder)
    with pytest.raises(FileNotFoundError, match=r"pipe\.png is missing: .*list\.txt lists it"):
        Unlabelled(write_text(folder / "list.txt", "images/pipe.png"))


def test_predictions_are_no_images(folder):
    save_classes(folder / "images/c.png", torch.zeros(2, 3))
    save_image(folder / "images/d.png", torch.zeros(3, 2, 3, dtype=torch.uint8))
    for open_it in (lambda: Folder(folder), lambda: Unlabelled(folder / "images")):
        with pytest.warns(UserWarning, match=r"images: 2 that segops predict wrote, such as c\.png"):
            assert open_it().ids == ["a", "b"]
    save_classes(folder / "masks/a.png", torch.ones(2, 3))  # a mask may be one
    with pytest.warns(UserWarning):
        assert Folder(folder)[0][1].tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"list\.txt lists .*c\.png, which segops predict wrote: it is no image"):
        Unlabelled(write_text(folder / "list.txt", "images/c.png"))


@pytest.mark.parametrize("inner", ["", "val/"])
def test_folder_with_list(tmp_path, inner):
    for red, name in enumerate("abc"):
        write_image(tmp_path / f"pictures/{inner}{name}.png", red)
        write_mask(tmp_path / f"labels/{name}.png")
    write_text(tmp_path / "val.txt", "c", "", " a ", "")
    dataset = check(Folder(tmp_path, "val", images="pictures", masks="labels"), ["c", "a"], 2)
    assert reds(dataset) == [2, 0] and dataset.classes == ("0", "1") and dataset[0][1].tolist() == VALUES


def test_folder_with_folder_per_split(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        write_image(tmp_path / f"images/{split}/{name}.jpg")
        write_mask(tmp_path / f"masks/{split}/{name}.png")
    check(Folder(tmp_path, "train"), ["a", "b"], 2)
    check(Folder(tmp_path, "val"), ["c"], 2)
    with pytest.raises(FileNotFoundError, match=r"images/test is not a folder: expected .*test\.txt, or .*images/test/ID\.jpg"):
        Folder(tmp_path, "test")


def test_mask_of_one_bit(tmp_path):
    write_image(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[True, False, True], [False, False, True]])).save(tmp_path / "masks/a.png")
    assert Folder(tmp_path)[0][1].tolist() == [[1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("bits", "values"), [(1, [[0, 1, 1], [1, 0, 0]]), (2, [[0, 1, 2], [3, 2, 0]]), (4, [[0, 1, 15], [7, 3, 0]])]
)
def test_gray_masks_of_few_bits_hold_what_is_stored(tmp_path, bits, values):
    write_image(tmp_path / "images/a.png")
    rows = np.unpackbits(np.array(values, np.uint8)[..., None], 2)[..., -bits:].reshape(2, -1)
    write_png(tmp_path / "masks/a.png", [np.packbits(row).tobytes() for row in rows], bits, 0, width=3)
    dataset = Folder(tmp_path, num_classes=16)
    assert dataset[0][1].tolist() == dataset.values(0).tolist() == values
    image = read_image(tmp_path / "masks/a.png")[0]
    assert image.tolist() == [[value * 255 // (2**bits - 1) for value in row] for row in values]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_masks_of_more_bits(tmp_path, kind):
    write_image(tmp_path / "images/a.png")
    values, mask = np.array([[0, 1, 255], [1, 0, 0]], kind), tmp_path / "masks/a.png"
    write_mask(mask)
    Image.fromarray(values).save(mask, format="PNG" if kind == np.uint16 else "TIFF")
    assert Folder(tmp_path)[0][1].tolist() == values.tolist()
    values[1, 1] = 256
    Image.fromarray(values).save(mask, format="PNG" if kind == np.uint16 else "TIFF")
    with pytest.raises(ValueError, match=r"masks/a\.png holds value 256: masks hold values of 8 bits, 0 to 255"):
        Folder(tmp_path)[0]


def test_values_are_those_of_the_file(tmp_path):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", [[0, 9, 255], [7, 0, 0]])
    dataset = Folder(tmp_path, void=9, values={7: 1})
    values = dataset.values(0)
    assert values.dtype == np.uint8 and values.tolist() == [[0, 9, 255], [7, 0, 0]]
    assert dataset[0][1].tolist() == [[0, 255, 255], [1, 0, 0]]


def test_void_may_be_the_first_value(tmp_path):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png")
    assert Folder(tmp_path, void=0)[0][1].tolist() == [[255, 1, 255], [1, 255, 255]]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"images/{name}.png")
        write_mask(tmp_path / f"masks/{name}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, r"num_classes must be in 1 \.\. 255, as 255 is void; got 0"),
        ({"num_classes": 256}, r"num_classes must be in 1 \.\. 255, as 255 is void; got 256"),
        ({"void": 256}, r"void must be a value of 8 bits, 0 to 255; got 256"),
        ({"void": 0, "num_classes": 1}, r"void is 0, the only class"),
        ({"classes": ["x"]}, r"classes has 1 names, num_classes is 2"),
    ],
)
def test_folder_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Folder(folder, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": "5"}, TypeError, r"num_classes must be an int, 1 to 255; got '5'"),
        ({"num_classes": 2.5}, TypeError, r"num_classes must be an int, 1 to 255; got 2\.5"),
        ({"num_classes": True}, TypeError, r"num_classes must be an int, 1 to 255; got True"),
        ({"num_classes": None}, TypeError, r"num_classes must be an int, 1 to 255; got None"),
        ({"void": "a"}, TypeError, r"void must be an int, 0 to 255; got 'a'"),
        ({"void": None}, TypeError, r"void must be an int, 0 to 255; got None"),
        ({"classes": "ab"}, TypeError, r'classes must be a list of names, as \["road", "car"\]; got \'ab\''),
        ({"classes": [1, 2]}, TypeError, r"classes must be a list of names, as .*; got \[1, 2\]"),
        ({"classes": []}, TypeError, r"classes must be a list of names, as .*; got \[\]"),
        ({"classes": ["a", "a"]}, ValueError, r"classes has 'a' twice: each must be unique"),
        ({"values": [1]}, TypeError, r"values must be \{0 to 255: class below 2\}; got \[1\]"),
        ({"values": {"a": 1}}, ValueError, r"values must be \{0 to 255: class below 2\}; got 'a': 1"),
        ({"values": {255: "1"}}, ValueError, r"values must be \{0 to 255: class below 2\}; got 255: '1'"),
        ({"values": {255: True}}, ValueError, r"values must be \{0 to 255: class below 2\}; got 255: True"),
        ({"values": {2.5: 1}}, ValueError, r"values must be \{0 to 255: class below 2\}; got 2\.5: 1"),
        ({"images": 3}, TypeError, r"images must be a string; got 3"),
        ({"masks": None}, TypeError, r"masks must be a string; got None"),
        ({"split": 7}, TypeError, r"split must be a string; got 7"),
    ],
)
def test_types_of_folder_arguments(folder, options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        Folder(folder, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Folder(3), r"root must be a path; got 3"),
        (lambda: VOC(None), r"root must be a path; got None"),
        (lambda: VOC("x", "trainaug", sbd=3), r"sbd must be a path; got 3"),
        (lambda: Cityscapes(3), r"root must be a path; got 3"),
        (lambda: CamVid(["x"]), r"root must be a path; got \['x'\]"),
        (lambda: Unlabelled(["x"]), r"source must be a path; got \['x'\]"),
        (lambda: Unlabelled("x", root=3), r"root must be a path; got 3"),
        (lambda: Unlabelled("x", "2"), r"num_classes must be an int, 1 to 255; got '2'"),
        (lambda: ImageClasses(3, "x"), r"csv must be a path; got 3"),
        (lambda: ImageClasses("x", None), r"images must be a path; got None"),
        (lambda: ImageClasses("x", "x", image_column=0), r"image_column must be a string; got 0"),
        (lambda: ImageClasses("x", "x", class_column=["level"]), r"class_column must be a string; got \['level'\]"),
        (lambda: ImageClasses("x", "x", classes="ab"), r"classes must be a list of names, as .*; got 'ab'"),
        (lambda: ImageClasses("x", "x", classes=[0, 1]), r"classes must be a list of names, as .*; got \[0, 1\]"),
        (lambda: ImageClasses("x", "x", split_column="part", split=1), r"split must be a string; got 1"),
    ],
)
def test_types_of_arguments(make, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        make()


def test_values_may_come_as_text(folder):
    write_mask(folder / "masks/a.png", [[0, 200, 255], [1, 0, 0]])
    assert Folder(folder, values={"200": 1})[0][1].tolist() == [[0, 1, 255], [1, 0, 0]]


def test_masks_beside_their_images(tmp_path):
    for red, name in enumerate(("b", "a.x", "c_mask")):
        write_image(tmp_path / f"{name}.png", red)
        write_mask(tmp_path / f"{name}_mask.png")
    dataset = check(Folder(tmp_path, images=".", masks=".", mask_suffix="_mask.png"), ["a.x", "b"], 2)
    assert reds(dataset) == [1, 0] and dataset[0][1].tolist() == VALUES
    write_text(tmp_path / "val.txt", "b")
    assert Folder(tmp_path, "val", images=".", masks=".", mask_suffix="_mask.png").ids == ["b"]
    (tmp_path / "train").mkdir()
    (tmp_path / "b.png").rename(tmp_path / "train/b.png")
    (tmp_path / "b_mask.png").rename(tmp_path / "train/b_mask.png")
    assert Folder(tmp_path, "train", images=".", masks=".", mask_suffix="_mask.png").ids == ["b"]
    with pytest.raises(
        FileNotFoundError, match=r"train holds no images \(.*\) beside masks: expected .*train/ID\.jpg .* with .*ID\.png"
    ):
        Folder(tmp_path, "train", images=".", masks=".")


def test_patterns(tmp_path):
    for red, name in enumerate("ba"):
        write_image(tmp_path / f"frames/{name}_rgb.JPG", red)
        write_mask(tmp_path / f"frames/{name}_seg.png")
        write_image(tmp_path / f"frames/{name}_depth.png")
    for images in ("frames/*_rgb.jpg", "frames/*_rgb"):
        dataset = check(Folder(tmp_path, images=images, masks="frames/*_seg.png"), ["a", "b"], 2)
        assert reds(dataset) == [1, 0] and dataset[0][1].tolist() == VALUES
    with pytest.raises(FileNotFoundError, match=r"frames holds 4 images, none of which is .*frames/ID_left\.png"):
        Folder(tmp_path, images="frames/*_left.png", masks="frames/*_seg.png")
    message = r"frames/a_gt\.png is missing: the mask of .*; expected .*frames/ID_rgb\.jpg with .*frames/ID_gt\.png"
    with pytest.raises(FileNotFoundError, match=message):
        Folder(tmp_path, images="frames/*_rgb.jpg", masks="frames/*_gt.png")


@pytest.mark.parametrize(
    "below", ["images/{split}/**/*", "{split}/**/*_rgb.png", "images/**/*_rgb.png", "{split}/pictures/*_rgb.png"]
)
def test_patterns_of_splits(tmp_path, below):
    """The split where {split} says, or as without patterns; folders below are part of the ID."""
    masks = below.replace("images/", "").replace("_rgb.png", "")
    masks = f"masks/{masks}.png"
    for split, name in (("train", "x"), ("train", "y"), ("val", "z")):
        city = "city/" if "**" in below else ""
        for pattern, write in ((below, write_image), (masks, write_mask)):
            folder, _, last = (pattern if "{split}" in pattern else pattern.replace("**", "{split}/**")).rpartition("/")
            last = last.replace("*", name)
            path = tmp_path / folder.replace("{split}", split).replace("/**", f"/{city}".rstrip("/")) / last
            write(path if path.suffix else path.with_suffix(".png"))
    assert check(Folder(tmp_path, "train", images=below, masks=masks), [f"{city}x", f"{city}y"], 2)
    assert Folder(tmp_path, "val", images=below, masks=masks).ids == [f"{city}z"]
    write_text(tmp_path / "train.txt", f"{city}y")
    assert Folder(tmp_path, "train", images=below, masks=masks).ids == [f"{city}y"]


def test_folders_of_splits_that_hold_images_and_masks(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / f"{split}/images/{split}.png")
        write_mask(tmp_path / f"{split}/masks/{split}.png")
    for split in ("train", "val"):
        assert Folder(tmp_path, split, images="{split}/images", masks="{split}/masks").ids == [split]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"images": "*/*_rgb.png"},
            r"images must be a folder, or a pattern with one \* in its name, .*; got \'\*/\*_rgb\.png\'",
        ),
        (
            {"masks": "frames/*_*.png"},
            r"masks must be a folder, or a pattern with one \* in its name, .*; got 'frames/\*_\*\.png'",
        ),
        ({"mask_suffix": "*.png"}, r"masks must be a folder, or a pattern with one \*"),
        ({"images": "{split}/images"}, r"images has \{split\}: split must be named; got None"),
        ({"masks": "a/*.png", "mask_suffix": ".tif"}, r"mask_suffix goes with a folder .*, 'a/\*\.png'; got '\.tif'"),
    ],
)
def test_patterns_that_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Folder(folder, **options)


@pytest.mark.parametrize("suffix", ["_mask.png", ".tif", ".PNG", "_gtFine_labelIds.png"])
def test_mask_suffix(tmp_path, suffix):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / f"masks/a{suffix}")
    write_mask(tmp_path / f"masks/ab{suffix}")
    message = rf"masks/a\.png is missing: the mask of .*images/a\.png; expected .*masks/ID\.png; .*masks/a{suffix} is there: mask_suffix='{suffix}'"
    with pytest.raises(FileNotFoundError, match=message):
        Folder(tmp_path)
    assert Folder(tmp_path, mask_suffix=suffix)[0][1].tolist() == VALUES


def test_lists_hold_ids(folder):
    write_text(folder / "train.txt", "a.png", "b.png")
    with pytest.raises(
        FileNotFoundError, match=r"a\.png\{.*\} is missing, listed in .*train\.txt: ids have no suffix, list a$"
    ):
        Folder(folder, "train")


COLOURS = {"128,64,128": 0, "#F423E8": 1, (70, 70, 70): 2, " 0, 0, 142": 2, "0,0,0": 255}
COLOURED = [[[128, 64, 128], [244, 35, 232], [0, 0, 142]], [[70, 70, 70], [0, 0, 0], [128, 64, 128]]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_mask_colors(tmp_path, mode):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", COLOURED)
    with Image.open(tmp_path / "masks/a.png") as mask:
        (mask.quantize(8) if mode == "P" else mask.convert(mode)).save(tmp_path / "masks/a.png")
    dataset = check(Folder(tmp_path, num_classes=4, mask_colors=COLOURS), ["a"], 4)
    assert dataset[0][1].tolist() == dataset.values(0).tolist() == [[0, 1, 2], [2, 255, 0]]
    assert dataset.values(0).dtype == np.uint8
    assert dataset.palette == ((128, 64, 128), (244, 35, 232), (70, 70, 70), palette(4)[3])
    assert pickle.loads(pickle.dumps(dataset))[0][1].tolist() == dataset[0][1].tolist()
    del (less := dict(COLOURS))["0,0,0"]
    with pytest.raises(ValueError, match=r"masks/a\.png holds colour 0,0,0 \(#000000\), which mask_colors does not list"):
        Folder(tmp_path, num_classes=4, mask_colors=less)[0]
    if mode != "P":
        with pytest.raises(
            ValueError, match=rf"masks/a\.png has mode {mode}, .*, or say what the colours mean, .* mask_colors"
        ):
            Folder(tmp_path)[0]


def test_masks_in_colours_are_opaque(tmp_path):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", [[[*colour, 255 - 5 * (colour == [0, 0, 0])] for colour in row] for row in COLOURED])
    with pytest.raises(ValueError, match=r"holds colour 0,0,0 \(#000000\), of alpha 250: masks must be opaque"):
        Folder(tmp_path, num_classes=4, mask_colors=COLOURS)[0]
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match=r"masks/a\.png has mode I.*, and no colours, which mask_colors is for"):
        Folder(tmp_path, num_classes=4, mask_colors=COLOURS)[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_colors": [1]}, TypeError, r'mask_colors must be \{"R,G,B" or "#RRGGBB": class below 2, or 255\}; got \[1\]'),
        ({"mask_colors": {}}, TypeError, r"mask_colors must be .*; got \{\}"),
        ({"mask_colors": {"0,0": 1}}, ValueError, r"mask_colors must be .*; got '0,0': 1"),
        ({"mask_colors": {"0,0,256": 1}}, ValueError, r"mask_colors must be .*; got '0,0,256': 1"),
        ({"mask_colors": {"#00000000": 1}}, ValueError, r"mask_colors must be .*; got '#00000000': 1"),
        ({"mask_colors": {7: 1}}, ValueError, r"mask_colors must be .*; got 7: 1"),
        ({"mask_colors": {"0,0,0": 2}}, ValueError, r"mask_colors must be .*; got '0,0,0': 2"),
        ({"mask_colors": {"0,0,0": "1"}}, ValueError, r"mask_colors must be .*; got '0,0,0': '1'"),
        ({"mask_colors": {"0,0,0": 0, "#000": 1}}, ValueError, r"mask_colors has the colour '#000' twice, as 0 and 1"),
        ({"mask_colors": {"0,0,0": 0}, "void": 1}, ValueError, r"mask_colors says what is void, .*: leave out void and values"),
        ({"mask_colors": {"0,0,0": 0}, "values": {2: 1}}, ValueError, r"mask_colors says what is void, .*: leave out void and"),
        ({"mask_suffix": 3}, TypeError, r"mask_suffix must be a string; got 3"),
    ],
)
def test_mask_colors_that_are_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        Folder(folder, **options)


def test_colours_of_cityscapes_and_voc(tmp_path):
    """The examples of the docstring."""
    name, expected = "aachen_000000_000019", [[0, 18, 255], [13, 255, 0]]
    colours = {train: colour for _, train, colour in datasets.CITYSCAPES_LABELS if train != 255} | {255: (0, 0, 0)}
    write_image(tmp_path / f"leftImg8bit/train/aachen/{name}_leftImg8bit.png")
    write_mask(
        tmp_path / f"gtFine/train/aachen/{name}_gtFine_color.png",
        [[[*colours[train], 255] for train in row] for row in expected],
    )
    dataset = Folder(
        tmp_path,
        "train",
        19,
        images="leftImg8bit/{split}/**/*_leftImg8bit.png",
        masks="gtFine/{split}/**/*_gtFine_color.png",
        mask_colors={colour: train for _, train, colour in datasets.CITYSCAPES_LABELS},
    )
    assert dataset.ids == [f"aachen/{name}"] and dataset[0][1].tolist() == expected
    assert dataset.palette[18] == (119, 11, 32)
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", [[palette(256)[index] for index in row] for row in ([0, 15, 255], [20, 0, 0])])
    colours = {colour: index for index, colour in enumerate(palette(21))} | {"224,224,192": 255}
    dataset = Folder(tmp_path, num_classes=21, mask_colors=colours)
    assert dataset[0][1].tolist() == [[0, 15, 255], [20, 0, 0]] and dataset.palette == palette(21)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tif", "webp"])
def test_mask_colors_of_other_formats(tmp_path, suffix):
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / "masks/a.png", COLOURED)
    with Image.open(tmp_path / "masks/a.png") as mask:
        mask.save(tmp_path / f"masks/a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    dataset = Folder(tmp_path, num_classes=4, mask_suffix=f".{suffix}", mask_colors=COLOURS)
    assert dataset[0][1].tolist() == [[0, 1, 2], [2, 255, 0]]


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_of_other_formats(tmp_path, suffix, mode):
    values = [[0, 3, 9], [9, 3, 0]] if mode != "1" else [[0, 1, 1], [1, 0, 0]]
    write_image(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    mask = Image.fromarray(np.array(values, np.uint8 if mode != "1" else bool))
    if mode == "P":
        mask.putpalette([value for colour in palette(256) for value in colour])
    mask.save(tmp_path / f"masks/a.{suffix}")
    assert Folder(tmp_path, num_classes=10, mask_suffix=f".{suffix}")[0][1].tolist() == values


@pytest.mark.parametrize("suffix", ["jpg", "ppm", "gif"])
def test_masks_of_formats_that_change_values(tmp_path, suffix):
    """JPEG blurs them, Pillow scales PGMs to 8 bits and renumbers the palettes of GIFs."""
    write_image(tmp_path / "images/a.png")
    write_mask(tmp_path / f"masks/a.{suffix}")
    with pytest.raises(
        ValueError, match=r"masks/a\.\w+ is a (JPEG|PPM|GIF) file, which does not keep the values of masks: save them as PNG"
    ):
        Folder(tmp_path, mask_suffix=f".{suffix}")[0]


def test_folder_files(folder):
    message = r"pictures is not a folder: expected .*pictures/ID\.jpg .* with .*masks/ID\.png"
    with pytest.raises(FileNotFoundError, match=message):
        Folder(folder, images="pictures")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no images \(\.jpg, .*\): expected .*empty/ID\.jpg"):
        Folder(folder, images="empty")
    with pytest.raises(FileNotFoundError, match=r"labels/a\.png is missing: the mask of .*images/a\.png; expected .*labels/ID"):
        Folder(folder, masks="labels")
    source = write_text(folder / "val.txt", "b", "c")
    with pytest.raises(FileNotFoundError, match=r"images/c\{\.jpg,.*\} is missing, listed in .*val\.txt"):
        Folder(folder, "val")
    (folder / "masks/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/b\.png is missing: the mask of .*images/b\.png, listed in .*val\.txt"):
        Folder(folder, "val")
    write_text(source, "a", "b", "a")
    with pytest.raises(ValueError, match=r"val\.txt has 'a' twice"):
        Folder(folder, "val")
    write_text(source, "", " ")
    with pytest.raises(ValueError, match=r"val\.txt is empty: it must list one image a line"):
        Folder(folder, "val")
    write_image(folder / "images/a.jpg")
    with pytest.raises(ValueError, match=r"images, by names without suffix, has 'a' twice"):
        Folder(folder)


def test_items(folder):
    dataset = Folder(folder)  # found here, decoded below
    image, mask = folder / "images/a.png", folder / "masks/a.png"
    with pytest.raises(IndexError):
        dataset[2]
    assert torch.equal(dataset[-1][1], dataset[1][1])

    write_mask(mask, [[0, 1, 2], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"masks/a\.png holds value 2: neither a class \(0 to 1\) nor void \(255\)"):
        dataset[0]
    assert Folder(folder, void=2)[0][1].tolist() == [[0, 1, 255], [0, 0, 0]]
    write_mask(mask, [[0, 1, 3], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"masks/a\.png holds value 3: neither a class \(0 to 1\) nor void \(2, 255\)"):
        Folder(folder, void=2)[0]
    write_mask(mask, [[0, 1], [1, 0], [0, 0]])
    with pytest.raises(ValueError, match=r"masks/a\.png is 2x3 pixels, its image .*images/a\.png 3x2"):
        dataset[0]
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (3, 2)).save(mask)
        with pytest.raises(ValueError, match=rf"masks/a\.png has mode {mode}, .*: save indices as 8-bit gray \(L\) or palette"):
            dataset[0]
    for path in (mask, image):
        path.write_bytes(b"no image at all")
        with pytest.raises(ValueError, match=rf"{path.parent.name}/a\.png cannot be read as an image"):
            dataset[0]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"images/a\.png"):
        dataset[0]


def test_programs_are_no_images(tmp_path, monkeypatch):
    """Pillow would have Ghostscript run a PostScript file, whatever its name."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: pytest.fail("it runs"))
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n%%EndComments\nshowpage\n")
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image: cannot identify"):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "gif"])
def test_truncated_image(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for length in (0, 1, 10, 50, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"a\.{suffix} cannot be read as an image"):
            read_image(path)


VOC_SPLITS = {
    "train": ["2007_000032", "2007_000129"],
    "val": ["2007_000033", "2008_000009"],
    "trainval": ["2007_000032", "2007_000033", "2007_000129", "2008_000009"],
    "test": ["2008_000006", "2008_000011"],
}


def test_voc(tmp_path):
    home = voc_layout(tmp_path, VOC_SPLITS)
    for root in (tmp_path, tmp_path / "VOCdevkit", home):
        for split in ("train", "val", "trainval"):
            dataset = check(VOC(str(root), split), VOC_SPLITS[split], 21)
            assert all(mask.tolist() == [[0, 15, 255], [20, 0, 0]] for _, mask in dataset)
    assert reds(VOC(home, "trainval")) == [0, 1, 2, 4]
    assert check(VOC(tmp_path, "test"), VOC_SPLITS["test"], 21).masks is None
    assert dataset.classes[15] == "person" and dataset.palette[15] == (192, 128, 128)


def test_voc_errors(tmp_path):
    message = r"JPEGImages is missing, also below VOC2012 and VOCdevkit/VOC2012: expected JPEG"
    with pytest.raises(FileNotFoundError, match=message):
        VOC(tmp_path)
    home = voc_layout(tmp_path, VOC_SPLITS)
    with pytest.raises(ValueError, match=r"split must be one of train, val, trainval, test, trainaug; got 'valid'"):
        VOC(tmp_path, "valid")
    (home / "ImageSets/Segmentation/test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Segmentation/test\.txt is missing: expected JPEGImages/ID\.jpg"):
        VOC(tmp_path, "test")
    (home / "SegmentationClass/2007_000129.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"000129\.png is missing: the mask of .*000129\.jpg, listed in .*train\.txt"):
        VOC(tmp_path)
    (home / "JPEGImages/2007_000129.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages/2007_000129\{.* is missing, listed in .*/train\.txt"):
        VOC(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"trainaug\.txt is missing: expected SegmentationClassAug/ID\.png .*, or sbd="):
        VOC(tmp_path, "trainaug")


@pytest.mark.parametrize("pairs", [False, True])
def test_voc_trainaug_of_pngs(tmp_path, pairs):
    home = voc_layout(tmp_path, VOC_SPLITS)
    ids = ["2008_000009", "2007_000032"]
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in ids] if pairs else ids
    source = write_text(home / "ImageSets/Segmentation/trainaug.txt", *lines)
    for name in ids:
        write_mask(home / f"SegmentationClassAug/{name}.png", [[0, 3, 255], [0, 0, 0]])
    dataset = check(VOC(tmp_path, "trainaug"), ids, 21)
    assert dataset[0][1].tolist() == [[0, 3, 255], [0, 0, 0]]
    write_text(source, "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000033.png")
    with pytest.raises(ValueError, match=r"trainaug\.txt pairs 2007_000032 and 2007_000033: .* must have the same base name"):
        VOC(tmp_path, "trainaug")
    write_text(source, "2007_000032", "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png")
    with pytest.raises(ValueError, match=r"trainaug\.txt has '2007_000032' twice"):
        VOC(tmp_path, "trainaug")


SBD_SPLITS = {"train": ["2008_000009", "2009_000001", "2007_000129"], "val": ["2007_000033", "2007_000099"]}
SBD_IDS = ["2007_000032", "2007_000099", "2007_000129", "2009_000001"]


@pytest.fixture
def no_scipy_needed(monkeypatch):
    """Listing does not call loadmat: any will do."""
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "scipy.io", SimpleNamespace(loadmat=None))


def test_voc_trainaug_lists_sbd(tmp_path, no_scipy_needed):
    home, sbd = voc_layout(tmp_path, VOC_SPLITS), sbd_layout(tmp_path, SBD_SPLITS)
    for place in (tmp_path, sbd.parent, sbd):
        dataset = VOC(tmp_path, "trainaug", str(place))
        assert dataset.ids == SBD_IDS
        assert [path.parent for path in dataset.images] == [home / "JPEGImages", sbd / "img"] * 2
        assert [path.name for path in dataset.images] == [f"{name}.jpg" for name in SBD_IDS]
        assert dataset.masks[:2] == [home / "SegmentationClass/2007_000032.png", sbd / "cls/2007_000099.mat"]
    (sbd / "cls/2009_000001.mat").unlink()
    message = r"cls/2009_000001\.mat is missing: the mask of .*listed in .*train\.txt or val\.txt"
    with pytest.raises(FileNotFoundError, match=message):
        VOC(tmp_path, "trainaug", sbd)
    for split in ("train", "val"):
        write_text(sbd / f"{split}.txt", VOC_SPLITS[split][0])
    message = r"dataset lists no image that is in neither train nor val of .*ImageSets/Segmentation"
    with pytest.raises(ValueError, match=message):
        VOC(tmp_path, "trainaug", sbd)
    (sbd / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset/val\.txt is missing: expected img/ID\.jpg, cls/ID\.mat"):
        VOC(tmp_path, "trainaug", sbd)
    with pytest.raises(FileNotFoundError, match=r"cls is missing, also below dataset and benchmark_RELEASE/dataset"):
        VOC(tmp_path, "trainaug", home)


def test_voc_trainaug_reads_sbd(tmp_path):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed: no .mat file can be written").savemat
    voc_layout(tmp_path, VOC_SPLITS)
    sbd = sbd_layout(tmp_path, SBD_SPLITS, savemat)
    dataset = check(VOC(tmp_path, "trainaug", sbd), SBD_IDS, 21)
    voc, theirs = [[0, 15, 255], [20, 0, 0]], [[0, 7, 7], [20, 0, 0]]
    assert [mask.tolist() for _, mask in dataset] == [voc, theirs, voc, theirs]
    assert reds(dataset) == [0, 25, 2, 25]
    path = sbd / "cls/2007_000099.mat"
    content = path.read_bytes()
    for damage in (b"", content[:150], content.replace(b"GTcls", b"GTins")):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"000099\.mat cannot be read as a mask of SBD, GTcls\.Segmentation"):
            dataset[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"000099\.mat"):
        dataset[1]


def test_sbd_without_scipy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    voc_layout(tmp_path, VOC_SPLITS)
    sbd = sbd_layout(tmp_path, SBD_SPLITS)
    with pytest.raises(ImportError, match=r"SBD are \.mat files, which scipy reads: pip install scipy"):
        VOC(tmp_path, "trainaug", sbd)
    assert len(VOC(tmp_path, "train", sbd)) == 2


CITYSCAPES_IDS = ["aachen_000000_000019", "aachen_000001_000019", "frankfurt_000000_000294"]
TRAIN_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def test_cityscapes(tmp_path):
    cityscapes_layout(tmp_path, "train", CITYSCAPES_IDS)
    dataset = check(Cityscapes(str(tmp_path)), CITYSCAPES_IDS, 19)
    assert reds(dataset) == [0, 1, 2] and dataset[0][1].tolist() == [[0, 1, 255], [18, 255, 255]]
    assert dataset.classes[:3] == ("road", "sidewalk", "building") and dataset.classes[17:] == ("motorcycle", "bicycle")
    assert dataset.palette[0] == (128, 64, 128) and dataset.palette[18] == (119, 11, 32)
    dataset = check(Cityscapes(tmp_path, labels="all"), CITYSCAPES_IDS, 34)
    assert dataset[0][1].tolist() == [[7, 8, 0], [33, 29, 1]]
    assert dataset.classes[7] == "road" and dataset.classes[33] == "bicycle" and dataset.palette[33] == (119, 11, 32)


def test_cityscapes_table(tmp_path):
    cityscapes_layout(tmp_path, "val", CITYSCAPES_IDS[2:], values=[[*range(34), 255]])
    write_image(tmp_path / "leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png", size=(35, 1))
    expected = [TRAIN_IDS.index(value) if value in TRAIN_IDS else 255 for value in range(34)]
    assert Cityscapes(tmp_path, "val")[0][1].tolist() == [[*expected, 255]]
    assert Cityscapes(tmp_path, "val", "all")[0][1].tolist() == [[*range(34), 255]]


def test_cityscapes_other_splits(tmp_path):
    cityscapes_layout(tmp_path, "train_extra", ["bad-honnef_000000_000000"], "gtCoarse")
    dataset = check(Cityscapes(tmp_path, "train_extra"), ["bad-honnef_000000_000000"], 19)
    assert dataset.masks[0].name == "bad-honnef_000000_000000_gtCoarse_labelIds.png"
    cityscapes_layout(tmp_path, "test", ["berlin_000000_000019"])
    assert check(Cityscapes(tmp_path, "test"), ["berlin_000000_000019"], 19).masks is None


def test_cityscapes_errors(tmp_path):
    message = r"leftImg8bit/train is missing, or holds no images: expected .*_leftImg8bit\.png"
    with pytest.raises(FileNotFoundError, match=message):
        Cityscapes(tmp_path)
    cityscapes_layout(tmp_path, "train", CITYSCAPES_IDS, values=[[7, 7, 34], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"split must be one of train, val, test, train_extra; got 'extra'"):
        Cityscapes(tmp_path, "extra")
    with pytest.raises(ValueError, match=r'labels must be "train" \(19 classes\) or "all" \(34\); got \'fine\''):
        Cityscapes(tmp_path, labels="fine")
    for labels in ("train", "all"):
        with pytest.raises(ValueError, match=r"aachen_000000_000019_gtFine_labelIds\.png holds value 34"):
            Cityscapes(tmp_path, labels=labels)[0]
    (tmp_path / "gtFine/train/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png").unlink()
    message = r"000294_gtFine_labelIds\.png is missing: the mask of .*000294_leftImg8bit\.png"
    with pytest.raises(FileNotFoundError, match=message):
        Cityscapes(tmp_path)
    write_image(tmp_path / "leftImg8bit/train/bochum/aachen_000000_000019_leftImg8bit.png")
    with pytest.raises(ValueError, match=r"train has 'aachen_000000_000019' twice"):
        Cityscapes(tmp_path)


CAMVID_VALUES = [[0, 10, 11], [5, 255, 1]]


def test_camvid_of_segnet(tmp_path):
    for red, name in enumerate(("0001TP_006690", "0016E5_00390", "unlisted")):
        write_image(tmp_path / f"train/{name}.png", red)
        write_mask(tmp_path / f"trainannot/{name}.png", CAMVID_VALUES)
    ids = ["0016E5_00390", "0001TP_006690"]
    lines = [f"/SegNet/CamVid/train/{name}.png /SegNet/CamVid/trainannot/{name}.png" for name in ids]
    source = write_text(tmp_path / "train.txt", *lines)
    dataset = check(CamVid(str(tmp_path)), ids, 11)
    assert reds(dataset) == [1, 0] and dataset[0][1].tolist() == [[0, 10, 255], [5, 255, 1]]
    assert dataset.classes[0] == "Sky" and dataset.classes[10] == "Bicyclist" and dataset.palette[1] == (128, 0, 0)
    source.unlink()
    check(CamVid(tmp_path), [*sorted(ids), "unlisted"], 11)
    write_text(source, "missing")
    with pytest.raises(FileNotFoundError, match=r"train/missing\{.* is missing, listed in .*train\.txt"):
        CamVid(tmp_path)


def test_camvid_of_images_and_labels(tmp_path):
    for split, suffix in (("val", "jpg"), ("test", "png")):
        write_image(tmp_path / f"images/{split}/{split}.{suffix}")
        write_mask(tmp_path / f"labels/{split}/{split}.png", CAMVID_VALUES)
    write_text(tmp_path / "val.txt", "val")
    for split in ("val", "test"):
        assert check(CamVid(tmp_path, split), [split], 11)[0][1].tolist() == [[0, 10, 255], [5, 255, 1]]
    message = r"images/train is not a folder: expected .*trainannot/ID\.png, or .*labels/train"
    with pytest.raises(FileNotFoundError, match=message):
        CamVid(tmp_path)
    with pytest.raises(ValueError, match=r"split must be one of train, val, test; got 'trainval'"):
        CamVid(tmp_path, "trainval")
    write_mask(tmp_path / "labels/val/val.png", [[12, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"val\.png holds value 12: neither a class \(0 to 10\) nor void \(11, 255\)"):
        CamVid(tmp_path, "val")[0]


def test_unlabelled_folder(tmp_path):
    for red, name in enumerate(("a.jpg", "b/c/a.png", "b/d.tif", "z.JPG")):
        write_image(tmp_path / "in" / name, red)
    write_text(tmp_path / "in/b/notes.txt", "not an image")
    dataset = check(Unlabelled(str(tmp_path / "in"), 5), ["a", "b/c/a", "b/d", "z"], 5)
    assert reds(dataset) == [0, 1, 2, 3] and dataset.masks is None and dataset[0][1].shape == (2, 3)
    write_image(tmp_path / "in/a.png")
    with pytest.raises(ValueError, match=r"in has 'a' twice"):
        Unlabelled(tmp_path / "in")
    (tmp_path / "empty/below").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty holds no images \(.*\), nor do folders below it"):
        Unlabelled(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"num_classes must be in 1 \.\. 255"):
        Unlabelled(tmp_path / "in", 0)


def test_unlabelled_list(tmp_path):
    for red, name in enumerate(("in/a.png", "in/b c.png", "other/d.png")):
        write_image(tmp_path / name, red)
    source = write_text(tmp_path / "in/list.txt", "b c.png", "", "a.png", "../other/d.png")
    assert reds(check(Unlabelled(source), ["b c", "a", "other/d"], 2)) == [1, 0, 2]
    source = write_text(tmp_path / "list.txt", "in/a.png", str(tmp_path / "other/d.png"))
    dataset = Unlabelled(source, root=str(tmp_path))
    assert dataset.ids == ["in/a", str(tmp_path / "other/d")[1:]] and reds(dataset) == [0, 2]
    with pytest.raises(FileNotFoundError, match=r"other/in/a\.png is missing: .*list\.txt lists it"):
        Unlabelled(source, root=tmp_path / "other")
    for lines, message in (([], r"list\.txt is empty"), (["in/a.png"] * 2, r"list\.txt has 'in/a\.png' twice")):
        write_text(source, *lines)
        with pytest.raises(ValueError, match=message):
            Unlabelled(source)
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing: expected a folder of images, or a file that lists paths"):
        Unlabelled(tmp_path / "nowhere")


def eyepacs_layout(root, *rows, header="image,level", images=("10_left", "10_right", "13_left")):
    for red, name in enumerate(images):
        write_image(root / f"train/{name}.jpeg", red)
    return str(write_text(root / "trainLabels.csv", header, *rows)), str(root / "train")


def test_image_classes(tmp_path):
    dataset = ImageClasses(*eyepacs_layout(tmp_path, "13_left,0", "10_left,4", "10_right, 2"))
    assert dataset.ids == ["13_left", "10_left", "10_right"] and dataset.targets == [0, 4, 2] and len(dataset) == 3
    assert dataset.classes == ("0", "1", "2", "3", "4") and dataset.num_classes == 5
    image, target = dataset[1]
    assert image.dtype == torch.uint8 and image.shape == (3, 2, 3) and (target, type(target)) == (4, int)
    assert reds(dataset) == [2, 0, 1]


def test_image_classes_by_name(tmp_path):
    csv, images = eyepacs_layout(
        tmp_path, "train,10_left,dog", "val,10_right,ant", "train,13_left,cat", header="part,image,level"
    )
    dataset = ImageClasses(csv, images, split_column="part", split="train")
    assert dataset.classes == ("ant", "cat", "dog") and dataset.targets == [2, 1] and dataset.ids == ["10_left", "13_left"]
    assert ImageClasses(csv, images, split_column="part", split="val").targets == [0]
    assert ImageClasses(csv, images, classes=["dog", "cat", "ant"]).targets == [0, 2, 1]
    csv, images = eyepacs_layout(tmp_path, "10_left,1", "10_right,dog")
    assert ImageClasses(csv, images, classes=["dog", "cat"]).targets == [1, 0]
    csv, images = eyepacs_layout(tmp_path, "10_left,2", "10_right,1")
    assert ImageClasses(csv, images, classes=["1", "2"]).targets == [1, 0]


def test_image_classes_are_those_of_all_splits(tmp_path):
    csv, images = eyepacs_layout(tmp_path, "a,10_left,0", "b,10_right,3", "c,13_left,", header="part,image,level")
    assert ImageClasses(csv, images, split_column="part", split="a").num_classes == 4
    with pytest.raises(ValueError, match=r"trainLabels\.csv, line 4: column 'level' holds '', needed is one of 0, 1, 2, 3"):
        ImageClasses(csv, images, split_column="part", split="c")


def test_image_classes_with_paths(tmp_path):
    write_image(tmp_path / "train/cats/1.png")
    csv = write_text(tmp_path / "list.csv", "file,animal", "cats/1.png,cat")
    dataset = ImageClasses(csv, tmp_path / "train", "file", "animal")
    assert dataset.ids == ["cats/1"] and dataset.images == [tmp_path / "train/cats/1.png"] and dataset.targets == [0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ["10_left,0", "10_right,5"],
            {"classes": list("abcde")},
            r"csv, line 3: .* holds '5', .* one of a, b, c, d, e, or 0 to 4",
        ),
        (["10_left,0", "10_right,-1"], {}, r"csv, line 3: column 'level' holds '-1', needed is one of 0$"),
        (["10_left,x", "10_right,y"], {"classes": ["x", "z"]}, r"csv, line 3: column 'level' holds 'y', needed is one of x, z"),
        (["10_left,0"], {"classes": ["1", "2"]}, r"csv, line 2: column 'level' holds '0', needed is one of 1, 2$"),
        (["10_left,0", "10_right,2x"], {}, r"csv, line 3: column 'level' holds '2x' among integers: give classes"),
        (["10_left,9999999999"], {}, r"csv: column 'level' holds 9999999999: no more than 65536 classes"),
        (["10_left,x"], {"classes": ["x", "x"]}, r"classes has 'x' twice"),
        (["10_left,0"], {"image_column": "id"}, r"csv has no column 'id'; its columns are image, level"),
        (["10_left,0"], {"class_column": "grade"}, r"csv has no column 'grade'; its columns are image, level"),
        (["10_left,0"], {"split_column": "part", "split": "val"}, r"csv has no column 'part'; its columns are image, level"),
        (["10_left,0"], {"split": "val"}, r"split_column and split go together; got None and 'val'"),
        (
            ["10_left,0"],
            {"split_column": "level", "split": "1"},
            r"csv has no row with '1' in column 'level', which holds \['0'\]",
        ),
        (["10_left,0", "10_left,1"], {}, r"trainLabels\.csv has '10_left' twice"),
        ([], {}, r"trainLabels\.csv has a header and no rows"),
    ],
)
def test_image_classes_errors(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        ImageClasses(*eyepacs_layout(tmp_path, *rows), **options)


def test_image_classes_files(tmp_path):
    csv, images = eyepacs_layout(tmp_path, "10_left,0", "15_left,1")
    with pytest.raises(FileNotFoundError, match=r"train/15_left\.\* is missing: .*trainLabels\.csv, line 3, names it"):
        ImageClasses(csv, images)
    write_text(Path(csv), "image,level", "10_left.jpeg,0", "15_left.jpeg,1")
    with pytest.raises(FileNotFoundError, match=r"train/15_left\.jpeg is missing: .*trainLabels\.csv, line 3, names it"):
        ImageClasses(csv, images)
    write_text(Path(csv), "image,level", "10_left,0")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: expected the images of .*trainLabels\.csv"):
        ImageClasses(csv, str(tmp_path / "nowhere"))
    dataset = ImageClasses(csv, images)
    dataset.images[0].write_bytes(dataset.images[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"10_left\.jpeg cannot be read as an image"):
        dataset[0]
    message = r"labels\.csv is missing: expected a CSV file with a header that has image, level"
    with pytest.raises(FileNotFoundError, match=message):
        ImageClasses(str(tmp_path / "labels.csv"), images)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_of_other_systems(folder, encoding):
    """Their marks and line ends; what PowerShell writes is refused by name."""
    (folder / "train.txt").write_bytes("b\r\na\r\n".encode(encoding))
    (folder / "classes.csv").write_bytes("image,level\r\nb,1\r\na,0\r\n".encode(encoding))
    assert Folder(folder, "train").ids == ImageClasses(folder / "classes.csv", folder / "images").ids == ["b", "a"]
    for name, make in (
        ("train.txt", lambda: Folder(folder, "train")),
        ("classes.csv", lambda: ImageClasses(folder / "classes.csv", folder / "images")),
    ):
        (folder / name).write_bytes("b\r\na\r\n".encode("utf-16"))
        with pytest.raises(ValueError, match=rf"{name} must be text in UTF-8: 'utf-8' codec can't decode"):
            make()


def test_tables_that_no_csv_reader_takes(folder):
    (folder / "classes.csv").write_text("image,level\n" + "a" * 200000 + ",0\n")
    with pytest.raises(ValueError, match=r"classes\.csv, line \d: field larger than field limit"):
        ImageClasses(folder / "classes.csv", folder / "images")


def test_listing_decodes_nothing(folder, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert len(Folder(folder)) == len(Unlabelled(folder / "images")) == 2


def test_workers_take_them(folder):
    """Data sets travel to spawned workers; batches come out whole."""
    dataset = pickle.loads(pickle.dumps(Folder(folder)))
    images, masks = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2)))
    assert images.shape == (2, 3, 2, 3) and masks.shape == (2, 2, 3)


@needs("camvid")
def test_real_camvid():
    for split, count in (("train", 367), ("val", 101)):
        dataset = CamVid(SHARED / "camvid", split)
        listed = (SHARED / "camvid" / f"{split}.txt").read_text().split()
        assert dataset.ids == listed and len(dataset) == count
        image, mask = dataset[count // 2]
        assert image.shape == (3, 360, 480) and mask.shape == (360, 480)
        assert {0, 3, 255} <= set(mask.unique().tolist()) <= {*range(11), 255}
        folder = Folder(SHARED / "camvid", split, 11, void=11, masks="labels")
        assert folder.ids == listed and torch.equal(folder[count // 2][1], mask)


@needs("dsb2018_nuclei")
def test_real_nuclei():
    root, modalities = SHARED / "dsb2018_nuclei", []
    for split, count in (("train", 388), ("val", 75), ("test", 75)):
        dataset = Folder(root, split, num_classes=2, masks="labels")
        image, mask = dataset[0]
        assert len(dataset) == count and image.shape[1:] == mask.shape and mask.unique().tolist() == [0, 1]
        classes = ImageClasses(
            str(root / "index.csv"), str(root / "images"), "id", "modality", split_column="split", split=split
        )
        assert sorted(classes.ids) == sorted(dataset.ids) and classes.classes == ("fluorescence", "histology")
        modalities += classes.targets
        for target in (0, 1):  # fluorescence is gray and dark
            image, value = classes[classes.targets.index(target)]
            assert value == target and torch.equal(image[0], image[1]) == (target == 0)
    assert np.bincount(modalities).tolist() == [431, 107]


@needs("voc_slice")
def test_real_voc_slice():
    dataset = Folder(SHARED / "voc_slice", images="images", masks="labels", num_classes=21)
    check(dataset, sorted((SHARED / "voc_slice/list.txt").read_text().split()), 21)
    assert dataset[dataset.ids.index("2007_000129")][1].unique().tolist() == [0, 2, 15, 255]  # bicycles and riders


@needs("mmseg_fixtures")
def test_real_cityscapes(tmp_path):
    """The pair holds train ids: written as the label ids of the site, they come back."""
    name, root = "frankfurt_000000_000294", SHARED / "mmseg_fixtures"
    train_ids = np.array(Image.open(root / f"labels/cityscapes_{name}.png"))
    cityscapes_layout(tmp_path, "val", [name], values=np.array([*TRAIN_IDS, *[0] * 237], dtype=np.uint8)[train_ids])
    (tmp_path / f"leftImg8bit/val/frankfurt/{name}_leftImg8bit.png").write_bytes(
        (root / f"images/cityscapes_{name}.png").read_bytes()
    )
    dataset = check(Cityscapes(tmp_path, "val"), [name], 19)
    image, mask = dataset[0]
    assert image.shape == (3, 128, 256) and np.array_equal(mask.numpy(), train_ids) and len(mask.unique()) > 10


def test_tables():
    assert len(datasets.VOC_CLASSES) == 21 and len(datasets.CITYSCAPES_LABELS) == 34 and len(datasets.CAMVID_LABELS) == 11
    assert [train for _, train, _ in datasets.CITYSCAPES_LABELS if train != 255] == list(range(19))
    # sums of red, green, blue of the published tables
    assert np.sum([colour for *_, colour in datasets.CITYSCAPES_LABELS], 0).tolist() == [3585, 2593, 3127]
    assert np.sum([colour for _, colour in datasets.CAMVID_LABELS], 0).tolist() == [1088, 896, 1152]
