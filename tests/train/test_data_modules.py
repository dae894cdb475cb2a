"""Streams and loaders: what is read, in which order, on which rank, whatever the workers; and the data modules' splits."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segops.train import Augment, ClassificationData, CooperativeData, Folder, SegmentationData, normalize
from segops.train.data import UNSCORED, Key, Once, RandomClasses, Samples, Stream, WithoutMasks, collate
from segops.train.transforms import VOID

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid"
SCENES = {"train": 10, "val": 3, "size": (16, 24)}


def trained(data, done=0, rank=0, world=1, stage="fit", **recipe):
    """A data module that is set up, of a trainer that has done some batches, and a recipe with some attributes."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        fit_loop=loop,
        lightning_module=SimpleNamespace(**{"takes_unlabelled": True} | recipe),
    )
    data.setup(stage)
    return data


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    """Sets the run's seed, as `seed_everything` does."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return lambda value: monkeypatch.setenv("PL_GLOBAL_SEED", str(value))


@pytest.fixture
def table(tmp_path):
    """20 images of five classes, told apart by red, with a split each."""
    (tmp_path / "train").mkdir()
    lines = ["image,level,split"]
    for index in range(20):
        Image.new("RGB", (12, 8), (10 * index, 0, 0)).save(tmp_path / f"train/{index}.png")
        lines.append(f"{index},{index % 5},{'val' if index < 6 else 'train'}")
    (tmp_path / "trainLabels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def red(images):
    """Which images of the table these are, where normalize is "none"."""
    return (images[:, 0, 0, 0] * 25.5).round().int().tolist()


def keys(stream):
    return [key for batch in stream for key in batch]


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (10, 5), (4, 9), (1, 2)])
def test_stream_is_one_shuffling_after_another(length, batch_size):
    stream = Stream(length, batch_size, 40, lambda: 0, 7, 0, 1)
    batches = list(stream)
    assert len(stream) == len(batches) == 40 and all(len(batch) == batch_size for batch in batches)
    drawn = keys(stream)
    assert drawn == keys(batches) and [key.place for key in drawn] == list(range(40 * batch_size))
    passes = [tuple(key.index for key in drawn[start : start + length]) for start in range(0, len(drawn) - length + 1, length)]
    assert all(sorted(shuffling) == list(range(length)) for shuffling in passes)
    assert length < 9 or len(set(passes)) == len(passes)
    assert length < 9 or keys(Stream(length, batch_size, 40, lambda: 0, 8, 0, 1)) != drawn
    assert all(key.scored for key in drawn)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(world):
    whole = list(Stream(11, 6, 5, lambda: 2, 7, 0, 1))
    parts = [list(Stream(11, 6 // world, 5, lambda: 2, 7, rank, world)) for rank in range(world)]
    assert [keys(step) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("done", [1, 4, 5, 23])
def test_stream_goes_on_at_any_step(done):
    """The number of batches done is asked for when an epoch begins, not before."""
    whole, steps = list(Stream(11, 3, 40, lambda: 0, 7, 0, 1)), [0]
    stream = Stream(11, 3, 5, lambda: steps[0], 7, 0, 1)
    assert list(stream) == whole[:5]
    steps[0] = done
    assert list(stream) == whole[done : done + 5]


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 2), (10, 3), (2, 4), (12, 4), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_once(length, world, batch_size):
    ranks = [Once(length, batch_size, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    assert all([len(batch) for batch in rank] == [len(batch) for batch in ranks[0]] for rank in ranks)
    drawn = [key for rank in ranks for key in keys(rank)]
    assert sorted(key.index for key in drawn if key.scored) == list(range(length))
    assert len(drawn) == -(-length // world) * world and all(key.place is None for key in drawn)


def test_what_is_not_scored(table):
    scenes = trained(SegmentationData(options=SCENES, batch_size=2))
    samples = scenes.samples(scenes.sets["val"], False)
    assert len(samples) == 3
    image, mask = samples[Key(1, None)]
    same, void = samples[Key(1, None, False)]
    assert torch.equal(image, same) and mask.dtype == void.dtype == torch.int64 and mask.shape == void.shape
    assert (void == VOID).all() and (mask != VOID).all()
    images = trained(ClassificationData(str(table), split_column="split"))
    samples = images.samples(images.sets["val"], False)
    assert samples[Key(3, None)][1] == 3 and samples[Key(3, None, False)][1] == UNSCORED


def test_evaluation_on_ranks_scores_every_image_once(table):
    seen, batches = [], []
    for rank in range(4):
        data = ClassificationData(str(table), split_column="split", normalize="none", eval_batch_size=2)
        loader = trained(data, rank=rank, world=4).val_dataloader()
        drawn = list(loader)
        batches.append(len(drawn))
        seen += [name for images, classes in drawn for name, c in zip(red(images), classes, strict=True) if c != UNSCORED]
        assert len(loader) == len(drawn)
    assert sorted(seen) == list(range(6)) and len(set(batches)) == 1


RANDOM = Augment(scale=(0.5, 2.0, 0.25), crop=(12, 12), rotate=10, brightness=0.3)


def batches_of(data, **where):
    return [batch for batch in trained(data, **where).train_dataloader()]


def assert_batches(one, other):
    assert len(one) == len(other)
    for (images, masks), (others, other_masks) in zip(one, other, strict=True):
        assert torch.equal(images, others) and torch.equal(masks, other_masks)


def scenes(**settings):
    return SegmentationData(**{"options": SCENES, "augment": RANDOM, "batch_size": 4} | settings)


def test_augmentation_depends_on_seed_and_place_alone(seed):
    expected = batches_of(scenes())
    assert len(expected) == 2
    torch.manual_seed(1)
    assert_batches(batches_of(scenes()), expected)
    assert_batches(batches_of(scenes(cache=True)), expected)
    seed(5)
    assert not torch.equal(batches_of(scenes())[0][0], expected[0][0])


def test_augmentation_leaves_the_process_its_random_numbers():
    data = trained(scenes())
    samples, state = data.samples(data.sets["train"], True), torch.get_rng_state()
    samples[Key(0, 0)]
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_change_nothing():
    expected = batches_of(scenes())
    loader = trained(scenes(workers=2, cache=True)).train_dataloader()
    assert_batches(list(loader), expected)
    assert_batches(list(loader), expected)  # now from the cache


def test_batches_of_ranks_and_of_a_later_start():
    expected = batches_of(scenes())
    halves = [batches_of(scenes(), rank=rank, world=2) for rank in range(2)]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*halves, strict=True)]
    assert_batches(joined, expected)
    assert_batches(batches_of(scenes(), done=1)[:1], expected[1:])


def test_the_same_image_is_augmented_anew_in_every_pass():
    data = trained(scenes(options=SCENES | {"train": 1}, batch_size=8))
    images, _ = next(iter(data.train_dataloader()))
    assert len({image.sum().item() for image in images}) == 8


@pytest.mark.parametrize("augment", [None, RANDOM])
def test_a_cache_stays_as_it_was_read(augment):
    class Counted(torch.utils.data.Dataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return torch.full((3, 20, 30), index, dtype=torch.uint8), torch.full((20, 30), index, dtype=torch.uint8)

    dataset = Counted()
    samples = Samples(dataset, (10, 12), augment, "imagenet", True, 0)
    for place in range(6):
        samples[Key(place % 2, place)]
    assert dataset.reads == 2
    for index in range(2):
        image, mask = samples.read(index)
        assert image.shape == (3, 10, 12) and mask.shape == (10, 12) and image.dtype == mask.dtype == torch.uint8
        assert (image == index).all() and (mask == index).all()


def test_batches():
    data = trained(scenes(augment=Augment(horizontal_flip=0), normalize="none", resize=(8, 10), batch_size=3))
    loader = data.train_dataloader()
    images, masks = next(iter(loader))
    assert len(loader) == 3 and images.shape == (3, 3, 8, 10) and masks.shape == (3, 8, 10)
    assert images.dtype == torch.float32 and masks.dtype == torch.int64 and 0 <= images.min() and 0.2 < images.max() <= 1
    first = data.samples(data.sets["train"], False)
    order = [key.index for key in next(iter(loader.batch_sampler))]
    assert torch.equal(images, torch.stack([first[Key(index, None)][0] for index in order]))
    assert (images.max() * 255).item() == pytest.approx(round((images.max() * 255).item()), abs=1e-3)


@pytest.mark.parametrize(("kind", "mean"), [("imagenet", None), ("per_image", 0.0), ("none", None)])
def test_normalize(kind, mean):
    plain, _ = batches_of(scenes(normalize="none"))[0]
    images, _ = batches_of(scenes(normalize=kind))[0]
    if kind == "imagenet":
        scale, shift = (torch.tensor(values).view(3, 1, 1) for values in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
        torch.testing.assert_close(images, (plain - shift) / scale)
    else:
        assert torch.equal(images, plain) == (kind == "none")
    assert mean is None or images.mean((1, 2, 3)).abs().max() < 1e-5


def test_evaluation_is_without_augmentation():
    data = trained(scenes(normalize="none", eval_batch_size=2))
    batches = list(data.val_dataloader())
    assert [len(images) for images, _ in batches] == [2, 1]
    images, masks = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for index, (image, mask) in enumerate(data.sets["val"]):
        assert torch.equal((images[index] * 255).round().byte(), image) and torch.equal(masks[index], mask.long())


def test_collate():
    image, other = torch.zeros(3, 4, 5), torch.zeros(3, 5, 4)
    message = "images of one batch must have one size; got 4x5 and 5x4: set resize or augment.crop, or eval_batch_size to 1"
    with pytest.raises(ValueError, match=message):
        collate([(image, 1), (other, 2)])
    images, classes = collate([(image, 1), (image, UNSCORED)])
    assert images.shape == (2, 3, 4, 5) and classes.tolist() == [1, UNSCORED] and classes.dtype == torch.int64
    images, masks = collate([(image, image[0].long())] * 3)
    assert images.shape == (3, 3, 4, 5) and masks.shape == (3, 4, 5) and masks.dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "coco"}, "dataset must be one of 'camvid', 'cityscapes', 'folder', 'synthetic', 'voc'; got 'coco'"),
        ({"dataset": "voc"}, "root must be a folder for dataset 'voc'; got None"),
        ({"root": "somewhere"}, "root must be left out for dataset 'synthetic'; got 'somewhere'"),
        ({"labelled": 0}, "labelled must be a share, above 0 and at most 1; got 0"),
        ({"labelled": 1.1}, "labelled must be a share"),
        ({"labelled": float("nan")}, "labelled must be a share, above 0 and at most 1; got nan"),
        ({"labelled": "0.5"}, "labelled must be a share, above 0 and at most 1; got '0.5'"),
        ({"labelled": True}, "labelled must be a share, above 0 and at most 1; got True"),
        ({"batch_size": 0}, "batch_size must be an integer, at least 1; got 0"),
        ({"batch_size": 2.5}, r"batch_size must be an integer, at least 1; got 2\.5"),
        ({"batch_size": True}, "batch_size must be an integer, at least 1; got True"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer, at least 1; got 0"),
        ({"workers": -1}, "workers must be an integer, at least 0; got -1"),
        ({"workers": "2"}, "workers must be an integer, at least 0; got '2'"),
        ({"cache": "no"}, "cache must be True or False; got 'no'"),
        ({"augment": {"crop": (4, 4)}}, r"augment must be an Augment; got \{'crop': \(4, 4\)\}"),
        ({"train_split": 3}, "train_split must be text; got 3"),
        ({"test_split": ["a"]}, r"test_split must be text; got \['a'\]"),
        ({"unlabelled": 3}, "unlabelled must be text; got 3"),
        ({"options": []}, r"options must be a mapping of names to values; got \[\]"),
        ({"options": "size"}, "options must be a mapping of names to values; got 'size'"),
        ({"options": ""}, "options must be a mapping of names to values; got ''"),
        ({"options": {1: 2}}, "options of dataset 'synthetic' are train, val, size; got 1"),
        ({"dataset": ["voc"]}, r"dataset must be one of .*; got \['voc'\]"),
        ({"dataset": "voc", "root": __file__}, r"root must be a folder; got '.*\.py'"),
        ({"dataset": "voc", "root": 3}, "root must be a folder; got 3"),
        ({"dataset": "voc", "root": ""}, "root must be a folder; got ''"),
        ({"dataset": "camvid", "root": ".", "options": {"void": 1}}, "options of dataset 'camvid' are none; got 'void'"),
        ({"dataset": "folder", "root": ".", "options": {"split": "x"}}, "options of dataset 'folder' are num_.*; got 'split'"),
        ({"resize": (True, 4)}, "resize must be two positive sizes"),
        ({"resize": (0, 4)}, r"resize must be two positive sizes \(height, width\); got \(0, 4\)"),
        ({"normalize": "tanh"}, "normalize must be one of"),
    ],
)
def test_segmentation_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"scenes": 3}}, "options of dataset 'synthetic' are train, val, size; got 'scenes'"),
        ({"options": {"train": 0}}, "train must be an integer, at least 1; got 0"),
        ({"options": {"val": 2.5}}, r"val must be an integer, at least 1; got 2\.5"),
        ({"options": {"size": 64}}, "size must be two positive sizes"),
        ({"train_split": "training"}, "split must be 'train', 'val' or 'test'; got 'training'"),
        (
            {"dataset": "folder", "root": ".", "options": {"sbd": "x"}},
            "options of dataset 'folder' are num_classes, void, .*; got 'sbd'",
        ),
    ],
)
def test_options(settings, message):
    with pytest.raises(ValueError, match=message):
        trained(SegmentationData(**settings))


def test_stages_open_what_they_need():
    data = trained(scenes())
    assert set(data.sets) == {"train", "val"} and data.num_classes == len(data.classes) == len(data.palette) == 7
    assert len(data.sets["train"]) == 10 and len(data.sets["val"]) == 3
    assert set(trained(scenes(), stage="validate").sets) == {"val"}
    data = trained(scenes(train_split="val", test_split="train"), stage="test")
    assert set(data.sets) == {"test"} and len(list(data.test_dataloader())) == 10
    with pytest.raises(ValueError, match="test_split must name the split to be scored; got None"):
        trained(scenes(), stage="test")
    splits = [trained(scenes(test_split=split), stage="test").sets["test"][0][0] for split in ("train", "val", "test")]
    assert not any(torch.equal(splits[i], splits[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_what_is_predicted():
    for test_split, expected in ((None, "val"), ("test", "test"), ("train", "train")):
        data = trained(scenes(val_split="val", test_split=test_split, eval_batch_size=2), stage="predict")
        assert set(data.sets) == {"predict"} and data.num_classes == 7
        like = trained(scenes(test_split=expected, eval_batch_size=2), stage="test")
        assert_batches(list(data.predict_dataloader()), list(like.test_dataloader()))


@pytest.mark.parametrize(
    ("stage", "loader", "message"),
    [
        ("validate", "train_dataloader", r"the images of 'train' are not open: setup\('fit'\) opens them"),
        ("validate", "median_frequency", r"the images of 'train' are not open: setup\('fit'\) opens them"),
        ("test", "val_dataloader", r"the images of 'val' are not open: setup\('fit'\) opens them"),
        ("fit", "test_dataloader", r"the images of 'test' are not open: setup\('test'\) opens them"),
        ("fit", "predict_dataloader", r"the images of 'predict' are not open: setup\('predict'\) opens them"),
    ],
)
@pytest.mark.parametrize("kind", ["segmentation", "classification", "cooperative"])
def test_loaders_of_another_stage(table, kind, stage, loader, message):
    segmentation = scenes(test_split="test")
    classification = ClassificationData(str(table), split_column="split", test_split="val")
    cooperative = CooperativeData(segmentation, classification)
    data = {"segmentation": segmentation, "classification": classification, "cooperative": cooperative}[kind]
    if not hasattr(data, loader):
        return
    with pytest.raises(ValueError, match=message):
        getattr(trained(data, stage=stage), loader)()
    with pytest.raises(ValueError, match=r"stage must be one of 'fit', 'validate', 'test', 'predict'; got 'tune'"):
        trained(data, stage="tune")


def test_batches_without_a_trainer(table):
    """To be looked at."""
    for data in (scenes(), ClassificationData(str(table), split_column="split", batch_size=4)):
        data.setup("fit")
        expected = trained(data).train_dataloader()
        data.trainer = None
        assert_batches(list(data.train_dataloader()), list(expected))
        assert len(list(data.val_dataloader())) == len(data.sets["val"])


def test_bytes_for_evaluation(table):
    """Where the recipe asks for them: what normalised images are made of, in evaluation alone."""
    asked = {"evaluates_bytes": True}
    settings = {"resize": (8, 10), "test_split": "test", "eval_batch_size": 2}
    for stage, loader in (("fit", "val_dataloader"), ("test", "test_dataloader"), ("predict", "predict_dataloader")):
        plain = list(getattr(trained(scenes(**settings), stage=stage), loader)())
        found = list(getattr(trained(scenes(**settings), stage=stage, **asked), loader)())
        for (images, masks), (expected, same) in zip(found, plain, strict=True):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 10) and torch.equal(masks, same)
            assert torch.equal(normalize(images.float() / 255, "imagenet"), expected)
    assert_batches(batches_of(scenes(), **asked), batches_of(scenes()))
    one, other = cooperative(table, **asked).val_dataloader()
    assert next(iter(one))[0].dtype == torch.uint8 and next(iter(other))[0].dtype == torch.float32


def chosen(data):
    """(labelled, unlabelled) indices."""
    unlabelled = data.sets["unlabelled"].datasets[0]
    assert isinstance(unlabelled, WithoutMasks)
    return data.sets["train"].indices, unlabelled.dataset.indices


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.3, 3), (0.5, 5), (0.9, 9)])
def test_labelled(share, count, seed):
    labelled, unlabelled = chosen(trained(scenes(labelled=share)))
    assert len(labelled) == count and sorted([*labelled, *unlabelled]) == list(range(10))
    assert chosen(trained(scenes(labelled=share))) == (labelled, unlabelled)
    others = set()
    for value in range(1, 6):
        seed(value)
        others.add(tuple(chosen(trained(scenes(labelled=share)))[0]))
    assert len(others) > 1


def test_labelled_all_but_nothing():
    """A share that rounds to all images leaves no unlabelled stream."""
    data = trained(scenes(labelled=0.9, options=SCENES | {"train": 3}, batch_size=1))
    assert len(data.sets["train"]) == 3
    batches = list(data.train_dataloader())
    assert len(batches) == 3 and not isinstance(batches[0], dict)


def reds_of(images):
    return {value for value in (images[:, 0].amax((1, 2)) * 255).round().int().tolist()}


def test_unlabelled_stream(tmp_path):
    for index in range(4):
        Image.new("RGB", (24, 16), (index + 1, 0, 0)).save(tmp_path / f"{index}.png")
    plain = {"normalize": "none", "augment": Augment(), "batch_size": 5}
    data = trained(scenes(labelled=0.5, unlabelled=str(tmp_path), **plain))
    assert len(data.sets["train"]) == 5 and len(data.sets["unlabelled"]) == 9
    loaders = data.train_dataloader()
    assert set(loaders) == {"labelled", "unlabelled"} and len(loaders["labelled"]) == len(loaders["unlabelled"]) == 1
    images, masks = next(iter(loaders["labelled"]))
    assert images.shape == (5, 3, 16, 24) and (masks != VOID).all()
    images, masks = next(iter(loaders["unlabelled"]))
    assert images.shape == (5, 3, 16, 24) and masks.shape == (5, 16, 24) and (masks == VOID).all()
    all_files = trained(scenes(unlabelled=str(tmp_path), **plain))
    assert len(all_files.sets["train"]) == 10
    loaders = all_files.train_dataloader()
    assert len(loaders["unlabelled"]) == 2
    assert reds_of(torch.cat([images for images, _ in loaders["unlabelled"]])) == {1, 2, 3, 4}


def test_the_streams_of_an_epoch_differ():
    data = trained(scenes(labelled=0.5))
    orders = [[key.index for key in keys(loader.batch_sampler)] for loader in data.train_dataloader().values()]
    longer = [
        [key.index for key in keys(data.stream(data.samples(data.sets["train"], True), 9, n).batch_sampler)] for n in (0, 1)
    ]
    assert len(orders[0]) == len(orders[1]) and longer[0] != longer[1]


def test_masks_are_hidden_from_the_unlabelled():
    data = trained(scenes(labelled=0.5))
    hidden = data.sets["unlabelled"]
    assert all((mask == VOID).all() and mask.dtype == torch.uint8 for _, mask in (hidden[i] for i in range(len(hidden))))
    whole = trained(scenes()).sets["train"]
    assert torch.equal(hidden[0][0], whole[chosen(data)[1][0]][0])


def test_an_epoch_is_one_pass_on_all_ranks():
    assert len(trained(scenes(batch_size=3)).train_dataloader()) == 3
    assert len(trained(scenes(batch_size=4), world=2).train_dataloader()) == 2
    with pytest.raises(ValueError, match="batch_size must be a multiple of the number of processes, 2; got 3"):
        trained(scenes(batch_size=3), world=2).train_dataloader()
    assert len(trained(scenes(batch_size=30)).train_dataloader()) == 1


def write_folder(root, masks):
    for name in ("images", "masks"):
        (root / name).mkdir()
    for index, mask in enumerate(masks):
        mask = np.array(mask, dtype=np.uint8)
        Image.fromarray(mask).save(root / f"masks/{index}.png")
        Image.fromarray(np.zeros((*mask.shape, 3), dtype=np.uint8)).save(root / f"images/{index}.png")


def test_median_frequency(tmp_path):
    """By hand: class 0 has 6 of its images' 12 pixels, void included, class 1 has 3 of 12, class 2 has 1 of 6, class 3 none."""
    write_folder(tmp_path, [[[0, 0, 0], [0, 1, 1]], [[0, 0, 1], [2, 255, 255]]])
    data = trained(SegmentationData("folder", str(tmp_path), {"num_classes": 4}, train_split=None, val_split=None))
    weights = data.median_frequency()
    assert weights == pytest.approx([0.5, 1.0, 1.5, 0.0]) and all(isinstance(weight, float) for weight in weights)


def test_median_frequency_is_of_what_training_sees(tmp_path):
    write_folder(tmp_path, [[[0] * 4 + [1] * 4] * 4 for _ in range(3)] + [[[2] * 8] * 4])
    settings = {"train_split": None, "val_split": None, "options": {"num_classes": 3}}
    small = trained(SegmentationData("folder", str(tmp_path), resize=(2, 4), **settings))
    assert small.median_frequency() == pytest.approx([1.0, 1.0, 0.5])
    data = trained(SegmentationData("folder", str(tmp_path), labelled=0.25, **settings))
    shown = data.sets["train"][0][1].unique().tolist()
    assert data.median_frequency() == pytest.approx([1.0 if index in shown else 0.0 for index in range(3)])


@pytest.mark.skipif(not CAMVID.exists(), reason="shared/data/camvid is not beside the checkout")
def test_median_frequency_of_camvid():
    data = trained(SegmentationData("camvid", str(CAMVID)))
    expected = [0.2793, 0.2017, 4.7865, 0.1490, 1.0000, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587]
    assert [round(weight, 4) for weight in data.median_frequency()] == expected


def test_descriptions(table):
    data = trained(scenes(resize=(8, 10), normalize="per_image"))
    description = data.description()
    assert description["classes"][:2] == ["background", "disc"] and description["palette"][0] == [90, 110, 130]
    assert description["normalize"] == "per_image" and description["resize"] == [8, 10]
    classes = trained(ClassificationData(str(table)))
    assert classes.description() == {"image_classes": list("01234"), "normalize": "imagenet", "resize": None, "scale": "dtype"}


def test_scale_is_that_of_all_images(tmp_path, table):
    folder(tmp_path, [[[0, 1], [0, 255]]] * 2)
    (tmp_path / "more").mkdir()
    for image in (*(tmp_path / "images").iterdir(), tmp_path / "more/a.png"):
        Image.fromarray(np.full((2, 2), 819, np.uint16)).save(image)
    data = trained(SegmentationData("folder", str(tmp_path), {"scale": 4095}, unlabelled=str(tmp_path / "more")))
    assert all(data.sets[part][0][0].unique().tolist() == [51] for part in ("train", "val", "unlabelled"))
    assert data.description()["scale"] == 4095
    assert trained(scenes()).description()["scale"] == "dtype"
    for image in (table / "train").iterdir():
        Image.fromarray(np.full((2, 2), 819, np.uint16)).save(image)
    data = trained(ClassificationData(str(table), scale=4095.0))
    assert data.sets["train"][0][0].unique().tolist() == [51] and data.description()["scale"] == 4095


def names(dataset):
    """Which images of the table a part holds."""
    return [round(dataset[index][0][0].float().mean().item() / 10) for index in range(len(dataset))]


def test_split_column(table):
    data = trained(ClassificationData(str(table), split_column="split", normalize="none", batch_size=4))
    assert data.num_classes == 5 and data.classes == tuple("01234")
    assert names(data.sets["val"]) == list(range(6)) and names(data.sets["train"]) == list(range(6, 20))
    loader = data.train_dataloader()
    assert len(loader) == 3
    for images, classes in loader:
        assert images.shape == (4, 3, 8, 12) and classes.tolist() == [name % 5 for name in red(images)]
    swapped = {"split_column": "split", "train_split": "val", "val_split": "train"}
    assert names(trained(ClassificationData(str(table), **swapped)).sets["train"]) == list(range(6))


def test_val_share(table, seed):
    data = trained(ClassificationData(str(table), val_share=0.3))
    train, val = names(data.sets["train"]), names(data.sets["val"])
    assert len(val) == 6 and sorted(train + val) == list(range(20)) and val != list(range(6))
    seed(9)
    assert names(trained(ClassificationData(str(table), val_share=0.3)).sets["val"]) == val
    for share, split in ((0.0, "val"), (1.0, "train")):
        with pytest.raises(ValueError, match=f"val_share leaves no image to {split}; got {share}"):
            trained(ClassificationData(str(table), val_share=share))


@pytest.mark.parametrize("name", ["val_share", "random_classes"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.1"])
def test_shares(table, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and at most 1; got {value!r}"):
        ClassificationData(str(table), **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": __file__}, r"root must be a folder; got '.*\.py'"),
        ({"csv": 3}, "csv must be text; got 3"),
        ({"images": None}, "images must be text; got None"),
        ({"image_column": 0}, "image_column must be text; got 0"),
        ({"split_column": 2}, "split_column must be text; got 2"),
        ({"val_split": 1}, "val_split must be text; got 1"),
        ({"test_split": "test"}, "test_split needs a split_column; got 'test'"),
        ({"batch_size": 0}, "batch_size must be an integer, at least 1; got 0"),
        ({"workers": -1}, "workers must be an integer, at least 0; got -1"),
    ],
)
def test_classification_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassificationData(**{"root": "nowhere"} | settings)


def write_table(root, rows):
    (root / "train").mkdir(exist_ok=True)
    for name, _, _ in rows:
        Image.new("RGB", (4, 4)).save(root / f"train/{name}.png")
    (root / "trainLabels.csv").write_text("image,level,split\n" + "".join(f"{','.join(row)}\n" for row in rows))
    return ClassificationData(str(root), split_column="split")


def warnings_of(data, **where):
    """What setup says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(data, **where)
    return [str(warning.message) for warning in caught]


def test_image_classes_that_never_occur(tmp_path):
    data = write_table(tmp_path, [("a", "x", "train"), ("b", "y", "train"), ("c", "z", "val"), ("d", "w", "val")])
    assert warnings_of(data) == ["classes that never occur in the training table: 'w', 'z'"]
    assert warnings_of(data, stage="validate") == []
    data = write_table(tmp_path, [("a", "x", "train"), ("b", "x", "train"), ("c", "z", "val")])
    assert warnings_of(data) == ["all 2 training images are of class 'x': there is nothing to learn"]
    data = write_table(tmp_path, [("a", "x", "train"), ("b", "z", "train"), ("c", "z", "val")])
    assert warnings_of(data) == []
    data = write_table(tmp_path, [("a", "x", "train"), ("c", "x", "val")])
    with pytest.raises(ValueError, match="classes must be at least 2; got 'x'"):
        trained(data)


def test_image_classes_without_a_column_of_splits(table):
    assert warnings_of(ClassificationData(str(table), val_share=0.1)) == []
    (message,) = warnings_of(ClassificationData(str(table), val_share=0.95))
    assert message.startswith("all 1 training images are of class")
    (message,) = warnings_of(ClassificationData(str(table), val_share=0.9))
    assert message.startswith("classes that never occur in the training table: ")


def test_images_with_classes_that_train_and_validate(table):
    (message,) = warnings_of(ClassificationData(str(table), split_column="split", val_split="train"))
    assert message.startswith("14 of 14 validation images are training images too, the first ") and "6.png" in message


def test_what_is_predicted_of_a_table(table):
    data = {"normalize": "none", "split_column": "split"}
    predicted = [
        (ClassificationData(str(table), **data), list(range(6))),
        (ClassificationData(str(table), test_split="train", **data), list(range(6, 20))),
    ]
    for module, expected in predicted:
        loader = trained(module, stage="predict").predict_dataloader()
        assert [red(images)[0] for images, _ in loader] == expected
    halves = trained(ClassificationData(str(table), normalize="none"), stage="predict")
    assert names(halves.sets["predict"]) == names(trained(ClassificationData(str(table))).sets["val"])


def test_random_classes(table, seed):
    """Of 14 training images 80 % get one by chance, the same one in every epoch; those of validation keep theirs."""
    data = trained(ClassificationData(str(table), split_column="split", random_classes=0.8, normalize="none", batch_size=7))
    assert [target for _, target in (data.sets["val"][index] for index in range(6))] == [0, 1, 2, 3, 4, 0]
    train = data.sets["train"]
    targets = [train[index][1] for index in range(14)]
    assert len(train.classes) == 11 and set(train.classes) <= set(range(14))
    assert all(target == (index + 6) % 5 for index, target in enumerate(targets) if index not in train.classes)
    assert targets != [(index + 6) % 5 for index in range(14)] and set(targets) <= set(range(5))
    for _ in range(2):
        for images, classes in data.train_dataloader():
            assert classes.tolist() == [targets[name - 6] for name in red(images)]
    again = trained(ClassificationData(str(table), split_column="split", random_classes=0.8))
    assert again.sets["train"].classes == train.classes
    seed(3)
    assert (
        trained(ClassificationData(str(table), split_column="split", random_classes=0.8)).sets["train"].classes != train.classes
    )


def test_random_classes_are_of_all_classes():
    drawn = RandomClasses([(None, 7)] * 1000, 8, 0.8, 0)
    counts = np.bincount([target for _, target in (drawn[index] for index in range(1000))], minlength=8)
    assert counts.sum() == 1000 and abs(counts[:7] - 100).max() < 40 and abs(counts[7] - 300) < 40


def test_classes_are_augmented_as_images(table):
    augment = Augment(pad=4, horizontal_flip=0, crop=(8, 12))
    data = trained(
        ClassificationData(str(table), augment=augment, batch_size=20, val_share=0.1, normalize="none", resize=(10, 14))
    )
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (20, 3, 8, 12)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (1, 3, 10, 14)


def cooperative(table, **where):
    segmentation = scenes(batch_size=2)
    classification = ClassificationData(str(table), split_column="split", normalize="none", batch_size=4)
    return trained(CooperativeData(segmentation, classification), **where)


def test_cooperative(table):
    data = cooperative(table)
    assert data.num_classes == 7 and len(data.classes) == len(data.palette) == 7 and data.image_classes == tuple("01234")
    loaders = data.train_dataloader()
    assert set(loaders) == {"segmentation", "classification"} and [len(loader) for loader in loaders.values()] == [5, 5]
    images, masks = next(iter(loaders["segmentation"]))
    assert images.shape == (2, 3, 12, 12) and masks.shape == (2, 12, 12)
    batches = list(loaders["classification"])
    assert all(images.shape == (4, 3, 8, 12) for images, _ in batches)
    assert all(classes.tolist() == [name % 5 for name in red(images)] for images, classes in batches)
    scored = [list(loader) for loader in data.val_dataloader()]
    assert [len(batches) for batches in scored] == [3, 6] and scored[1][0][1].shape == (1,)
    predicted = cooperative(table, stage="predict")
    assert predicted.image_classes == tuple("01234")
    assert_batches(list(predicted.predict_dataloader()), scored[0])
    description = data.description()
    assert set(description) == {"classes", "palette", "normalize", "resize", "scale", "image_classes"}
    assert description["normalize"] == "imagenet"


def test_the_classifier_s_stream_goes_on(table):
    """20 of its 14 images in the first epoch, and the next 20 in the second: no pass is cut."""
    seen = []
    for done in (0, 5):
        loader = cooperative(table, done=done).train_dataloader()["classification"]
        seen += [name for images, _ in loader for name in red(images)]
    assert len(seen) == 40
    assert all(sorted(seen[start : start + 14]) == list(range(6, 20)) for start in (0, 14))


def folder(root, train, val=None, test=None, **settings):
    """A data module of masks, each a list of rows, in splits."""
    write_folder(root, [*train, *(val or train), *(test or [])])
    start = 0
    for name, masks in (("train", train), ("val", val or train), ("test", test or [])):
        (root / f"{name}.txt").write_text("".join(f"{index}\n" for index in range(start, start + len(masks))))
        start += len(masks)
    return SegmentationData("folder", str(root), **settings)


EMPTY, WHITE, ONE, VOIDS = [[0, 0, 0]], [[0, 255, 0]], [[0, 1, 1]], [[255, 255, 255]]


@pytest.mark.parametrize("num_classes", [2, 5])
def test_masks_of_0_and_255(tmp_path, num_classes):
    """They would train on nothing, however many empty ones come first. What is scored alone may, of
    several classes, hold one and void."""
    options = {"num_classes": num_classes}
    data = folder(tmp_path, [EMPTY] * 9 + [WHITE], options=options, test_split="val")
    message = r"all 10 {} masks, as .*{}\.png, hold 0 and 255 alone, and 255 is void: data\.options\.values=\{{255: 1\}} makes"
    stages = [("fit", "training", 0), ("validate", "validation", 10), ("test", "test", 10)]
    for stage, which, first in stages if num_classes == 2 else stages[:1]:
        with pytest.raises(ValueError, match=message.format(which, first)):
            trained(data, stage=stage)
    data = trained(SegmentationData("folder", str(tmp_path), options | {"values": {255: 1}}))
    assert data.sets["train"][9][1].tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match=rf"values must be \{{0 to 255: class below {num_classes}\}}; got 255: {num_classes}"):
        trained(SegmentationData("folder", str(tmp_path), options | {"values": {255: num_classes}}))


def test_void_that_is_a_class(tmp_path):
    data = folder(tmp_path, [EMPTY, ONE], options={"void": 1})
    message = r"void is 1, so that class 1 never occurs: all 2 training masks, as .*0\.png, hold class 0 and void alone"
    with pytest.raises(ValueError, match=message):
        trained(data)
    with pytest.raises(ValueError, match=r"void is 0, so that class 0 never occurs: .* hold class 1 and void alone"):
        trained(SegmentationData("folder", str(tmp_path), {"void": 0}))
    assert warnings_of(SegmentationData("folder", str(tmp_path), {"void": 2, "num_classes": 3})) == [
        "class that never occurs in the training masks: '2'"
    ]


def test_masks_in_colours(tmp_path):
    """White is what mask_colors says, also where it says another thing than before."""
    data = folder(tmp_path, [WHITE] * 2)
    for file in (tmp_path / "masks").iterdir():
        Image.open(file).convert("RGB").save(file)
    for white, expected in ((1, []), (255, ["all 2 training masks hold class '0' alone: there is nothing to learn"])):
        colours = {"mask_colors": {"0,0,0": 0, "255,255,255": white}}
        assert warnings_of(SegmentationData("folder", data.root, colours))[:1] == expected


def test_classes_that_never_occur(tmp_path):
    names = [f"name {index}" for index in range(14)]
    data = folder(tmp_path, [EMPTY, ONE], [[[0, 1, 2]]], options={"num_classes": 14, "classes": names})
    listed = ", ".join(f"'name {index}'" for index in range(2, 12))
    assert warnings_of(data) == [f"classes that never occur in the training masks: {listed} and 2 more"]
    assert warnings_of(data, stage="validate") == []


def test_classes_of_the_labelled(tmp_path):
    train = [[[0, 1, index]] for index in range(10)]
    data = folder(tmp_path, train, options={"num_classes": 10}, labelled=0.3)
    (message,) = warnings_of(data)
    shown = {0, 1, *data.sets["train"].indices}
    absent = ", ".join(repr(str(index)) for index in range(10) if index not in shown)
    assert message == f"classes that never occur in the labelled training masks: {absent}"


def test_masks_of_one_class(tmp_path):
    assert warnings_of(folder(tmp_path, [EMPTY] * 3, [EMPTY, [[0, 255, 0], [0, 0, 0]]], [[[0, 0, 1]]], test_split="test")) == [
        "all 3 training masks hold class '0' alone: there is nothing to learn",
        "all 2 validation masks hold class '0' alone: no other is scored",
    ]


@pytest.mark.parametrize("part", ["training", "validation", "test"])
def test_masks_that_are_void(tmp_path, part):
    masks = {name: [VOIDS] * 5 if name == part else [ONE] * 5 for name in ("training", "validation", "test")}
    data = folder(tmp_path, *masks.values(), test_split="test")
    first = 5 * list(masks).index(part)
    files = ", ".join(rf".*/masks/{index}\.png" for index in range(first, first + 3))
    with pytest.raises(ValueError, match=rf"every pixel of all 5 {part} masks is void, of value 255: {files} and 2 more$"):
        trained(data, stage="test" if part == "test" else "fit")


def test_labelled_masks_that_are_void(tmp_path):
    data = folder(tmp_path, [VOIDS] * 9 + [ONE], [ONE], labelled=0.2)
    message = r"every pixel of all 2 labelled training masks is void, of value 255: .*\.png, .*\.png$"
    with pytest.raises(ValueError, match=message):
        trained(data)


def test_values_that_are_void(tmp_path):
    data = folder(tmp_path, [[[0, 255, 0]], [[0, 0, 0]]], options={"void": 0})
    with pytest.raises(ValueError, match="every pixel of all 2 training masks is void, of value 0, 255: "):
        trained(data)


def test_every_mask_is_read(tmp_path):
    data = folder(tmp_path, [ONE] * 19 + [[[0, 1, 7]]])
    with pytest.raises(ValueError, match=r"19\.png holds value 7: neither a class \(0 to 1\) nor void \(255\)"):
        trained(data)


def test_images_that_train_and_validate(tmp_path):
    data = folder(tmp_path, [ONE] * 5)
    assert warnings_of(data) == []
    (tmp_path / "val.txt").write_text("7\n3\n8\n4\n")
    message = f"2 of 4 validation images are training images too, the first {tmp_path}/images/3.png: their scores say nothing"
    (found,) = warnings_of(data)
    assert found.startswith(message)
    (found,) = warnings_of(SegmentationData("folder", str(tmp_path), train_split=None, val_split=None))
    assert found.startswith("10 of 10 validation images are training images too")


def test_images_that_train_without_masks_and_validate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the same files by other paths
    data = folder(tmp_path, [ONE] * 5, labelled=0.4, unlabelled="images")
    (found,) = warnings_of(data)
    assert found.startswith(f"5 of 5 validation images are training images too, the first {tmp_path}/images/5.png: ")


def test_less_than_one_labelled_image():
    assert warnings_of(scenes(labelled=0.01)) == ["labelled 0.01 of 10 training images is less than one: 1 is used"]
    assert warnings_of(scenes(labelled=0.1)) == []


@pytest.mark.parametrize(("masks", "error"), [([ONE] * 3, None), ([[[0, 9, 0]]], "holds value 9")])
@pytest.mark.parametrize("local_rank", [0, 1])
def test_processes_of_a_machine_take_turns(tmp_path, monkeypatch, masks, error, local_rank):
    """The first reads masks before the barrier, the others look up what it found after it; also where the first fails."""
    data, steps, values = folder(tmp_path, masks), [], Folder.values
    if local_rank == 1:
        with pytest.raises(ValueError, match=error) if error else nullcontext():
            data.setup("fit")
    monkeypatch.setattr(Folder, "values", lambda *arguments: steps.append("read") or values(*arguments))
    strategy = SimpleNamespace(barrier=lambda: steps.append("barrier"))
    data.trainer = SimpleNamespace(world_size=2, local_rank=local_rank, strategy=strategy)
    with pytest.raises(ValueError, match=error) if error else nullcontext():
        data.setup("fit")
    reads = ["read"] * (len(steps) - 1)
    assert steps == ([*reads, "barrier"] if local_rank == 0 else ["barrier", *reads])
    assert bool(reads) == (local_rank == 0 or error is not None)


def test_masks_of_0_1_and_void(tmp_path):
    data = trained(folder(tmp_path, [[[0, 1], [0, 255]]] * 2))
    assert data.sets["train"][0][1].tolist() == [[0, 1], [0, 255]]


def test_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset must have at least 2 classes, background among them; got 1"):
        trained(folder(tmp_path, [EMPTY], options={"num_classes": 1}))


def test_a_split_without_masks_is_not_scored(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "JPEGImages/a.jpg")
    (tmp_path / "ImageSets/Segmentation/test.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"test_split must have masks; 'test' of .* has none"):
        trained(SegmentationData("voc", str(tmp_path), test_split="test"), stage="test")
    data = trained(SegmentationData("voc", str(tmp_path), test_split="test"), stage="predict")
    ((images, masks),) = data.predict_dataloader()
    assert images.shape == (1, 3, 4, 4) and masks.shape == (1, 4, 4) and (masks == VOID).all() and data.num_classes == 21
