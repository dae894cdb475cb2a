"""Counts of the values in masks: right, of every mask, in order, remembered, and never in the way."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from segops.train import Folder, masks
from segops.train.masks import count_values


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "segops"


@pytest.fixture
def folder(tmp_path, cache):
    """12 masks of 0 to 2 and 255."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(12):
        Image.new("RGB", (9, 7)).save(tmp_path / f"images/{index:02}.png")
        mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (7, 9))
        Image.fromarray(mask).save(tmp_path / f"masks/{index:02}.png")
    return Folder(str(tmp_path), num_classes=3)


def expected(dataset):
    return np.array([np.bincount(dataset.values(index).ravel(), minlength=256) for index in range(len(dataset))])


class Reads:
    """Notes which masks are read."""

    def __init__(self, monkeypatch):
        self.indices, self.values = [], Folder.values
        monkeypatch.setattr(Folder, "values", lambda dataset, index: self.read(dataset, index))

    def read(self, dataset, index):
        self.indices.append(index)
        return self.values(dataset, index)

    def of(self, dataset, reading=""):
        """The masks read by a count, whose result is right."""
        self.indices = []
        counts = count_values(dataset, reading)
        found, self.indices = sorted(self.indices), []
        np.testing.assert_array_equal(counts, expected(dataset))
        assert counts.dtype == np.int64
        return found


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


def test_a_mask_is_read_again_only_after_a_change(folder, reads, cache):
    assert reads.of(folder) == list(range(12)) and reads.of(folder) == []
    assert [path.suffix for path in cache.iterdir()] == [".json"]  # no part is left
    Image.new("L", (9, 7), 1).save(folder.masks[4])
    os.utime(folder.masks[7], ns=(0, 5))
    assert reads.of(folder) == [4, 7] and reads.of(folder) == []
    assert reads.of(folder, "other colours") == list(range(12))
    folder.masks, folder.ids = folder.masks[2:5], folder.ids[2:5]
    assert reads.of(folder) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0\1 no json",
        lambda text: "[" * 100_000,
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: json.dumps(dict.fromkeys(json.loads(text))),
        lambda text: json.dumps({name: 5 for name in json.loads(text)}),
        lambda text: json.dumps({name: [entry[0], [1]] for name, entry in json.loads(text).items()}),
        lambda text: json.dumps({name: [entry[0], {"256": 63}] for name, entry in json.loads(text).items()}),
        lambda text: json.dumps({name: [entry[0], {"0": -63}] for name, entry in json.loads(text).items()}),
        lambda text: json.dumps({name: [entry[0], {"0": 1e300}] for name, entry in json.loads(text).items()}),
        lambda text: json.dumps({name: [entry[0], {"0": 10**30}] for name, entry in json.loads(text).items()}),
        lambda text: json.dumps({name: [entry[0], {"0": True}] for name, entry in json.loads(text).items()}),
        lambda text: json.dumps({name: [entry[0], {}] for name, entry in json.loads(text).items()}),
    ],
)
def test_a_damaged_memory_is_none(folder, reads, cache, damage):
    reads.of(folder)
    (store,) = cache.iterdir()
    store.write_text(damage(store.read_text()))
    assert reads.of(folder) == list(range(12)) and reads.of(folder) == []


def test_where_nothing_can_be_remembered(folder, reads, cache, monkeypatch):
    cache.parent.write_text("a file")  # also for root, who may write everywhere
    assert reads.of(folder) == reads.of(folder) == list(range(12))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(masks.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert reads.of(folder) == list(range(12))


def test_a_full_disk(folder, reads, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(masks.json, "dump", full)
        assert reads.of(folder) == list(range(12))
    assert list(cache.iterdir()) == [] and reads.of(folder) == list(range(12))


def test_home(folder, reads, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(masks.Path, "home", lambda: tmp_path / "home")
    reads.of(folder)
    assert len(list((tmp_path / "home/.cache/segops").iterdir())) == 1 and reads.of(folder) == []


def test_several_at_once(folder, cache):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: count_values(folder, ""), range(16)))
    assert all(np.array_equal(counts, expected(folder)) for counts in results)
    assert len(list(cache.iterdir())) == 1


def test_the_first_bad_mask_is_named(folder, reads):
    folder.masks[9].write_bytes(b"no image")
    Image.new("L", (9, 7), 9).save(folder.masks[6])
    message = r"06\.png holds value 9: neither a class \(0 to 2\) nor void \(255\)"
    for _ in range(2):  # also from what is remembered
        with pytest.raises(ValueError, match=message):
            count_values(folder, "")
    Image.new("L", (9, 7), 2).save(folder.masks[6])
    with pytest.raises(ValueError, match=r"09\.png cannot be read as an image"):
        count_values(folder, "")
    Image.new("L", (9, 7), 2).save(folder.masks[9])
    assert set(reads.of(folder)) <= {9, 10, 11}  # those before are remembered
    folder.masks[3].unlink()
    with pytest.raises(FileNotFoundError, match=r"03\.png"):
        count_values(folder, "")


def test_a_bad_mask_ends_it_at_once(folder, reads):
    folder.masks[0].write_bytes(b"no image")
    folder.ids, folder.images, folder.masks = (part * 50 for part in (folder.ids, folder.images, folder.masks))
    with pytest.raises(ValueError, match=r"00\.png cannot be read"):
        count_values(folder, "")
    assert len(reads.indices) < 500
