"""What training reads: streams of batches whose order and augmentation depend on the seed and the number of the step alone.

So a run that was interrupted, and one on more workers or ranks, sees what an uninterrupted one on a single process sees.
"""

import inspect
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from .datasets import VOC, CamVid, Cityscapes, Folder, ImageClasses, Unlabelled
from .masks import check_scored, check_values, count_values, listed, occurring
from .scenes import SyntheticScenes
from .transforms import VOID, Augment, check_integer, check_kind, check_number, check_size, is_number, normalize, resize

UNSCORED = -100  # of image classes, as 255 of masks
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}
PARTS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}  # by stage


def run_seed():
    """What `seed_everything` of Lightning was given; 0 where nothing was."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mixed_seed(*numbers):
    """A seed for torch out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Key(NamedTuple):
    """Which sample: its index; its place in the stream, which seeds its augmentation, or None for no augmentation; whether it is scored."""

    index: int
    place: int | None
    scored: bool = True


class Samples(Dataset):
    """(image float (3, H, W) as networks take it, target) of a data set, at a `Key`. A target is a
    mask int64 (H, W), or a class. With kind None images stay bytes."""

    def __init__(self, dataset, size, augment, kind, cache, seed):
        self.dataset, self.size, self.augment, self.kind, self.seed = dataset, size, augment, kind, seed
        self.cache = {} if cache else None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        image, target = self.read(key.index)
        mask = mask_of(image, target)
        if key.place is not None and self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mixed_seed(self.seed, key.place))
                image, mask = self.augment(image, mask)
        if self.kind is not None:
            image = normalize(image.float() / 255, self.kind)
        if not isinstance(target, torch.Tensor):
            return image, target if key.scored else UNSCORED
        return image, mask.long() if key.scored else torch.full(mask.shape, VOID)

    def read(self, index):
        """What the data set has, resized, as bytes."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image, target = self.dataset[index]
        if self.size is not None:
            image, mask = resize(image, mask_of(image, target), self.size)
            target = mask if isinstance(target, torch.Tensor) else target
        if self.cache is not None:
            self.cache[index] = image, target
        return image, target


def mask_of(image, target):
    """The target, or an empty mask beside a class, so that both are treated alike."""
    return target if isinstance(target, torch.Tensor) else torch.zeros(image.shape[1:], dtype=torch.uint8)


class Stream:
    """Batches of keys without end for training: one shuffling of the data set after another, cut into batches for all ranks.

    Args:
        length: of the data set.
        batch_size: of each rank.
        steps: batches of an epoch.
        done: () -> batches that were drawn before.
        seed: of the shuffling.
        rank, world: this process and how many there are.
    """

    def __init__(self, length, batch_size, steps, done, seed, rank, world):
        self.length, self.batch_size, self.steps, self.done, self.seed = length, batch_size, steps, done, seed
        self.rank, self.world = rank, world
        self.shuffling = -1, None  # which, and its order

    def __len__(self):
        return self.steps

    def __iter__(self):
        done = self.done()
        for step in range(done, done + self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            yield [Key(self._index(place), place) for place in range(first, first + self.batch_size)]

    def _index(self, place):
        number = place // self.length
        if self.shuffling[0] != number:
            self.shuffling = number, np.random.default_rng((self.seed, number)).permutation(self.length)
        return int(self.shuffling[1][place % self.length])


class Once:
    """Batches of keys of every sample once, for evaluation: each rank has equally many, what is too much is not scored."""

    def __init__(self, length, batch_size, rank, world):
        keys = [Key(index, None) for index in range(rank, length, world)]
        keys += [Key(0, None, scored=False)] * (-(-length // world) - len(keys))
        self.batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def collate(samples):
    images, targets = zip(*samples, strict=True)
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        listed = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
        raise ValueError(
            f"images of one batch must have one size; got {listed}: set resize or augment.crop, or eval_batch_size to 1"
        )
    return torch.stack(images), torch.stack(targets) if isinstance(targets[0], torch.Tensor) else torch.tensor(targets)


class Data(LightningDataModule):
    """What the data modules share: settings, splits, samples, streams and loaders."""

    def __init__(self, splits, resize, augment, normalize, batch_size, eval_batch_size, workers, cache):
        super().__init__()
        for part, split in splits.items():
            if split is not None:
                check_text(f"{part}_split", split)
        check_kind(normalize)
        if resize is not None:
            check_size("resize", resize)
        if augment is not None and not callable(augment):
            raise ValueError(f"augment must be an Augment; got {augment!r}")
        check_integer("batch_size", batch_size, 1)
        check_integer("eval_batch_size", eval_batch_size, 1)
        check_integer("workers", workers, 0)
        if not isinstance(cache, bool):
            raise ValueError(f"cache must be True or False; got {cache!r}")
        self.splits, self.sets = splits, {}
        self.size, self.augment, self.kind = resize, Augment() if augment is None else augment, normalize
        self.batch_size, self.eval_batch_size, self.workers, self.cache = batch_size, eval_batch_size, workers, cache

    def split(self, part):
        """The split of a part: "predict" is test_split where one is named, or val_split."""
        if part == "predict":
            part = "val" if self.splits["test"] is None else "test"
        elif part == "test" and self.splits["test"] is None:
            raise ValueError("test_split must name the split to be scored; got None")
        return self.splits[part]

    def opened(self, part):
        if part not in self.sets:
            stage = next(stage for stage, parts in PARTS.items() if part in parts)
            raise ValueError(f"the images of {part!r} are not open: setup({stage!r}) opens them")
        return self.sets[part]

    def samples(self, dataset, training):
        return Samples(dataset, self.size, self.augment if training else None, self.kind, self.cache, run_seed())

    def asked(self, name):
        """Whether the recipe has an attribute that asks for something."""
        return getattr(getattr(self.trainer, "lightning_module", None), name, False)

    def ranks(self):
        """(this process, how many there are)."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def stream(self, samples, steps, number=0):
        """The loader of a stream; those of one epoch differ in `number`."""
        rank, world = self.ranks()
        if self.batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the number of processes, {world}; got {self.batch_size}")

        def done():
            return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

        seed = mixed_seed(run_seed(), number)
        return self._loader(samples, Stream(len(samples), self.batch_size // world, steps, done, seed, rank, world))

    def steps(self, dataset):
        """Batches of an epoch, one pass over the data set; what is left begins the next epoch."""
        return max(len(dataset) // self.batch_size, 1)

    def once(self, part):
        samples = self.samples(self.opened(part), False)
        return self._loader(samples, Once(len(samples), self.eval_batch_size, *self.ranks()))

    def val_dataloader(self):
        return self.once("val")

    def test_dataloader(self):
        return self.once("test")

    def predict_dataloader(self):
        return self.once("predict")

    def _loader(self, samples, batches):
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )


class SegmentationData(Data):
    """Images with masks, and perhaps images without.

    Args:
        dataset: "camvid", "cityscapes", "folder", "synthetic" or "voc".
        root: its folder (not for "synthetic").
        options: further arguments of the data set, as sbd for VOC, labels for Cityscapes, and those
            of `Folder` (num_classes, void, values, images, masks, mask_suffix, mask_colors, scale);
            for "synthetic" train and val, the numbers of scenes, default 400 and 100, and size,
            default (128, 128).
        train_split, val_split: which splits, default "train" and "val". test_split: what `segops test` scores, default none.
        resize: (height, width) of all images and masks, in training, validation and test, or None (default) for their own.
        augment: what training does to them besides: `Augment`; by default flips them horizontally.
        normalize: "imagenet" (default), "inception", "per_image" or "none": see `segops.train.normalize`.
        batch_size: of all processes together, default 8. eval_batch_size: of each, default 1, since images may differ in size.
        labelled: share of the training images whose masks are used, default 1.0; the same ones for the same seed. Others are an unlabelled stream.
        unlabelled: a folder of images or a list of them: (more) images without masks, or None (default).
        workers: processes that read, default 0: this one. cache: keep what was read, resized, in memory (default False).

    Batches are (images (N, 3, H, W) float32, masks (N, H, W) int64, 255 void); with an unlabelled
    stream, in training, {"labelled": that, "unlabelled": that with void masks}. Where the recipe
    has `evaluates_bytes = True`, images are uint8 in validation, test and prediction, resized but
    not normalised. A batch_size above the number of images repeats them within a batch. Prediction
    reads test_split, or val_split where that is None; the split may be one without masks.

    Before the first step the values of every mask that trains or is scored are counted; counts are
    remembered (`segops.train.masks`). Warnings tell of a class that no training mask holds, and of
    images that both train and validate.

    Raises:
        ValueError: a setting is wrong (names it); of setup: the masks of a folder hold 0 and 255
            alone, every pixel of a split is void, or a mask cannot be read (names the file).
        FileNotFoundError: as the data set.
    """

    def __init__(
        self,
        dataset: Literal["camvid", "cityscapes", "folder", "synthetic", "voc"] = "synthetic",
        root: str | None = None,
        options: dict[str, Any] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        resize: tuple[int, int] | None = None,
        augment: Augment | None = None,
        normalize: str = "imagenet",
        batch_size: int = 8,
        eval_batch_size: int = 1,
        labelled: float = 1.0,
        unlabelled: str | None = None,
        workers: int = 0,
        cache: bool = False,
    ):
        splits = {"train": train_split, "val": val_split, "test": test_split}
        super().__init__(splits, resize, augment, normalize, batch_size, eval_batch_size, workers, cache)
        if dataset not in list(DATASETS):
            raise ValueError(f"dataset must be one of {', '.join(map(repr, DATASETS))}; got {dataset!r}")
        if (root is None) != (dataset == "synthetic"):
            raise ValueError(f"root must be {'a folder' if root is None else 'left out'} for dataset {dataset!r}; got {root!r}")
        if root is not None:
            check_folder("root", root)
        if not isinstance(options, Mapping | None):
            raise ValueError(f"options must be a mapping of names to values; got {options!r}")
        known = [name for name in inspect.signature(DATASETS[dataset]).parameters if name not in ("root", "split")]
        for name in options or ():
            if name not in known:
                raise ValueError(f"options of dataset {dataset!r} are {', '.join(known) or 'none'}; got {name!r}")
        if not is_number(labelled) or not 0 < labelled <= 1:
            raise ValueError(f"labelled must be a share, above 0 and at most 1; got {labelled!r}")
        if unlabelled is not None:
            check_text("unlabelled", unlabelled)
        self.dataset, self.root, self.options = dataset, root, dict(options or {})
        self.labelled, self.unlabelled = labelled, unlabelled

    def setup(self, stage):
        """Opens the splits that `stage` ("fit", "validate", "test", "predict") needs, and looks at
        every mask of what trains or is scored."""
        self.sets = {part: self._open(part) for part in parts_of(stage)}
        first = next(iter(self.sets.values()))
        if first.num_classes < 2:
            raise ValueError(f"dataset must have at least 2 classes, background among them; got {first.num_classes}")
        self.num_classes, self.classes, self.palette = first.num_classes, tuple(first.classes), tuple(first.palette)
        opened = dict(self.sets)
        if stage == "fit":
            self._divide()
        if self.dataset != "synthetic" and stage != "predict":
            self._look(opened)

    def _open(self, part):
        split = self.split(part)
        try:
            dataset = DATASETS[self.dataset](*(() if self.root is None else (self.root,)), split, **self.options)
        except TypeError as error:
            raise ValueError(f"options of dataset {self.dataset!r}: {error}") from error
        if part != "predict" and getattr(dataset, "masks", ()) is None:
            raise ValueError(f"{part}_split must have masks; {split!r} of {self.root} has none")
        return dataset

    def _look(self, opened):
        """Refuses masks from which nothing is learnt or scored; warns of classes that never occur
        and of images that both train and validate."""
        colours = self.options.get("mask_colors")
        reading = repr((1, self.dataset, os.path.abspath(self.root), colours))  # 1: change it with how masks are read
        with first_of_machine(self.trainer):
            counts = {part: count_values(dataset, reading) for part, dataset in opened.items()}
        if self.dataset == "folder" and colours is None:
            part, dataset = next(iter(opened.items()))
            if part == "train" or dataset.num_classes == 2:
                check_values(dataset, counts[part], PART_NAMES[part])
        for part, dataset in opened.items():
            rows = getattr(self.sets[part], "indices", range(len(dataset)))
            which = f"labelled {PART_NAMES[part]}" if len(rows) < len(dataset) else PART_NAMES[part]
            check_scored(dataset, rows, counts[part], which)
            classes = occurring(dataset, counts[part][rows])
            if len(classes) == 1:
                lacking = "there is nothing to learn" if part == "train" else "no other is scored"
                rank_zero_warn(f"all {len(rows)} {which} masks hold class {self.classes[classes[0]]!r} alone: {lacking}")
            elif part == "train":
                warn_of_absent(self.classes, classes, f"{which} masks")
        if "train" in opened:
            parts = opened["train"], *getattr(self.sets.get("unlabelled"), "datasets", ())
            warn_of_shared([image for part in parts for image in getattr(part, "images", ())], opened["val"].images)

    def _divide(self):
        """The training set's images with masks, and those without."""
        train, without = self.sets["train"], []
        count = max(round(self.labelled * len(train)), 1)
        if self.labelled * len(train) < 1:
            rank_zero_warn(f"labelled {self.labelled} of {len(train)} training images is less than one: 1 is used")
        if count < len(train):
            order = np.random.default_rng((run_seed(), len(train))).permutation(len(train))
            self.sets["train"] = torch.utils.data.Subset(train, sorted(order[:count].tolist()))
            without.append(WithoutMasks(torch.utils.data.Subset(train, sorted(order[count:].tolist()))))
        if self.unlabelled is not None:
            without.append(Unlabelled(self.unlabelled, self.num_classes, scale=self.options.get("scale", "dtype")))
        if without:
            self.sets["unlabelled"] = torch.utils.data.ConcatDataset(without)

    def samples(self, dataset, training):
        """In evaluation images stay bytes for a recipe that cuts or scales them before it
        normalises them."""
        samples = super().samples(dataset, training)
        if not training and self.asked("evaluates_bytes"):
            samples.kind = None
        return samples

    def train_dataloader(self):
        train = self.opened("train")
        steps = self.steps(train)
        labelled = self.stream(self.samples(train, True), steps)
        if "unlabelled" not in self.sets or not self.asked("takes_unlabelled"):
            return labelled
        unlabelled = self.stream(self.samples(self.sets["unlabelled"], True), steps, 1)
        return {"labelled": labelled, "unlabelled": unlabelled}

    def median_frequency(self):
        """Class weights of SegNet: the median frequency over the class's own, the frequency of a class being its share of the pixels, void among them, of the
        images that show it. A class that no image shows weighs 0."""
        pixels, seen = np.zeros(self.num_classes), np.zeros(self.num_classes)
        train = self.opened("train")
        samples = Samples(train, self.size, None, "none", False, 0)
        for index in range(len(train)):
            mask = samples.read(index)[1].numpy()
            counts = np.bincount(mask.ravel(), minlength=256)[: self.num_classes]
            pixels += counts
            seen += np.where(counts > 0, mask.size, 0)
        frequency = pixels / np.maximum(seen, 1)
        weights = np.median(frequency[seen > 0]) / np.maximum(frequency, 1e-30)
        return np.where(seen > 0, weights, 0.0).tolist()

    def description(self):
        """What `predict` needs to know beside the weights, in plain types."""
        return {
            "classes": list(self.classes),
            "palette": [list(colour) for colour in self.palette],
            "normalize": self.kind,
            "resize": None if self.size is None else list(self.size),
            "scale": self.options.get("scale", "dtype"),
        }


class WithoutMasks(Dataset):
    """A data set whose masks are kept from sight."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, mask = self.dataset[index]
        return image, torch.full_like(mask, VOID)


def synthetic(split, train=400, val=100, size=(128, 128)):
    """Scenes of a split: those of "train", "val" and "test" differ."""
    lengths = {"train": train, "val": val, "test": val}
    if split not in lengths:
        raise ValueError(f"split must be 'train', 'val' or 'test'; got {split!r}")
    check_integer("train", train, 1)
    check_integer("val", val, 1)
    check_size("size", size)
    return SyntheticScenes(lengths[split], tuple(size), list(lengths).index(split))


def parts_of(stage):
    if stage not in PARTS:
        raise ValueError(f"stage must be one of {', '.join(map(repr, PARTS))}; got {stage!r}")
    return PARTS[stage]


def check_text(name, value):
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name} must be text; got {value!r}")


def check_folder(name, value):
    if not isinstance(value, str | os.PathLike) or not str(value) or os.path.isfile(value):
        raise ValueError(f"{name} must be a folder; got {value!r}")


@contextmanager
def first_of_machine(trainer):
    """One process of each machine goes first; the others find what it has remembered."""
    alone = trainer is None or trainer.world_size == 1
    if not alone and trainer.local_rank > 0:
        trainer.strategy.barrier()
    try:
        yield
    finally:
        if not alone and trainer.local_rank == 0:
            trainer.strategy.barrier()


def warn_of_absent(classes, found, where):
    absent = [repr(name) for index, name in enumerate(classes) if index not in found]
    if absent:
        which = "class that never occurs" if len(absent) == 1 else "classes that never occur"
        rank_zero_warn(f"{which} in the {where}: {listed(absent, 10)}")


def warn_of_shared(train, val):
    """train, val: lists of paths."""
    trained = set(map(os.path.abspath, train))
    shared = [path for path in val if os.path.abspath(path) in trained]
    if shared:
        rank_zero_warn(
            f"{len(shared)} of {len(val)} validation images are training images too, the first {listed(shared[:1], 1)}: "
            "their scores say nothing of new images"
        )


DATASETS = {"camvid": CamVid, "cityscapes": Cityscapes, "folder": Folder, "synthetic": synthetic, "voc": VOC}


class ClassificationData(Data):
    """Images with a class each, from a table: by default as Kaggle's EyePACS comes, trainLabels.csv with columns image and level.

    Args:
        root: folder that csv and images are in.
        csv, images: table and folder of images in it, default "trainLabels.csv" and "train".
        image_column, class_column: default "image" and "level".
        split_column: column that names an image's split, or None (default): then `val_share` of the images, the same ones for the same table, validate.
        train_split, val_split: names in that column, default "train" and "val".
        val_share: default 0.2. Images are drawn one by one: two of one patient may come to both sides.
        test_split: name in that column of what `segops test` scores, default none.
        classes: names of the classes, if the column holds names in another order than the alphabet's.
        random_classes: share of the training images that get a class by chance, always the same one (Haloi, II.C: 0.8). Default 0.
        resize, augment, normalize, batch_size, eval_batch_size, workers, cache: as in `SegmentationData`.
        scale: which value of images becomes 255: "dtype" (default), "file" or a number, as for
            `segops.train.datasets.read_image`.

    Batches are (images (N, 3, H, W) float32, classes (N) int64). Prediction reads test_split, or
    what validates where that is None. Warnings tell of a class that no training image has, and of
    images that both train and validate.

    Raises:
        ValueError: a setting is wrong (names it), or there are fewer than two classes.
        FileNotFoundError: as `ImageClasses`.
    """

    def __init__(
        self,
        root: str,
        csv: str = "trainLabels.csv",
        images: str = "train",
        image_column: str = "image",
        class_column: str = "level",
        split_column: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        val_share: float = 0.2,
        classes: list[str] | None = None,
        random_classes: float = 0.0,
        resize: tuple[int, int] | None = None,
        augment: Augment | None = None,
        normalize: str = "imagenet",
        batch_size: int = 32,
        eval_batch_size: int = 1,
        workers: int = 0,
        cache: bool = False,
        scale: float | str = "dtype",
    ):
        splits = {"train": train_split, "val": val_split, "test": test_split}
        super().__init__(splits, resize, augment, normalize, batch_size, eval_batch_size, workers, cache)
        check_folder("root", root)
        texts = {"csv": csv, "images": images, "image_column": image_column, "class_column": class_column}
        for name, text in (texts | ({} if split_column is None else {"split_column": split_column})).items():
            check_text(name, text)
        check_number("random_classes", random_classes, 1)
        check_number("val_share", val_share, 1)
        table, folder = str(Path(root, csv)), str(Path(root, images))
        self.table = (table, folder, image_column, class_column, classes, split_column)
        if test_split is not None and split_column is None:
            raise ValueError(f"test_split needs a split_column; got {test_split!r}")
        self.val_share, self.random_classes, self.scale = val_share, random_classes, scale

    def setup(self, stage):
        """Opens what `stage` ("fit", "validate", "test", "predict") needs."""
        splits = {part: self.split(part) for part in parts_of(stage)}
        if self.table[-1] is None:
            everything = ImageClasses(*self.table, scale=self.scale)
            halves = self._halves(everything)
            self.sets = {part: halves[part] for part in splits}
        else:
            self.sets = {part: ImageClasses(*self.table, split, scale=self.scale) for part, split in splits.items()}
            everything = next(iter(self.sets.values()))
        if everything.num_classes < 2:
            raise ValueError(f"classes must be at least 2; got {', '.join(map(repr, everything.classes)) or 'none'}")
        self.num_classes, self.classes = everything.num_classes, tuple(everything.classes)
        if stage == "fit":
            self._look()
            self.sets["train"] = RandomClasses(self.sets["train"], self.num_classes, self.random_classes, run_seed())

    def _halves(self, everything):
        """What trains and what validates of a table without a column of splits."""
        order = np.random.default_rng(len(everything)).permutation(len(everything)).tolist()
        count = round(self.val_share * len(everything))
        parts = {"train": order[count:], "val": order[:count]}
        for part, indices in parts.items():
            if not indices:
                raise ValueError(f"val_share leaves no image to {part}; got {self.val_share}")
        parts["predict"] = parts["val"]
        return {part: torch.utils.data.Subset(everything, sorted(indices)) for part, indices in parts.items()}

    def _look(self):
        train, val = self.sets["train"], self.sets["val"]
        if isinstance(train, torch.utils.data.Subset):  # of one table, in which an image is once
            targets = [train.dataset.targets[index] for index in train.indices]
        else:
            targets = train.targets
            warn_of_shared(train.images, val.images)
        if len(set(targets)) == 1:
            rank_zero_warn(
                f"all {len(targets)} training images are of class {self.classes[targets[0]]!r}: there is nothing to learn"
            )
        else:
            warn_of_absent(self.classes, set(targets), "training table")

    def train_dataloader(self, steps=None, number=0):
        train = self.opened("train")
        return self.stream(self.samples(train, True), steps or self.steps(train), number)

    def description(self):
        return {
            "image_classes": list(self.classes),
            "normalize": self.kind,
            "resize": None if self.size is None else list(self.size),
            "scale": self.scale,
        }


class RandomClasses(Dataset):
    """A data set of images with classes, where a share of them has one by chance."""

    def __init__(self, dataset, num_classes, share, seed):
        rng = np.random.default_rng((seed, len(dataset)))
        chosen = rng.permutation(len(dataset))[: round(share * len(dataset))]
        drawn = rng.integers(num_classes, size=len(chosen))
        self.dataset, self.classes = dataset, dict(zip(chosen.tolist(), drawn.tolist(), strict=True))

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        return image, self.classes.get(index, target)


class CooperativeData(LightningDataModule):
    """Both, for cooperative training: an epoch is one of the segmentation's; the classification's stream goes on from one to the next.

    Training batches are {"segmentation": ..., "classification": ...}; validation and test have a
    loader of each, prediction the segmentation's.
    """

    def __init__(self, segmentation: SegmentationData, classification: ClassificationData):
        super().__init__()
        self.parts = segmentation, classification

    def setup(self, stage):
        segmentation, classification = self.parts
        for part in self.parts:
            part.trainer = self.trainer
            part.setup(stage)
        self.num_classes, self.classes, self.palette = segmentation.num_classes, segmentation.classes, segmentation.palette
        self.image_classes, self.sets = classification.classes, segmentation.sets

    def median_frequency(self):
        return self.parts[0].median_frequency()

    def train_dataloader(self):
        segmentation, classification = self.parts
        return {
            "segmentation": segmentation.train_dataloader(),
            "classification": classification.train_dataloader(segmentation.steps(segmentation.sets["train"]), 2),
        }

    def val_dataloader(self):
        return [part.val_dataloader() for part in self.parts]

    def test_dataloader(self):
        return [part.test_dataloader() for part in self.parts]

    def predict_dataloader(self):
        return self.parts[0].predict_dataloader()

    def description(self):
        return self.parts[1].description() | self.parts[0].description()
