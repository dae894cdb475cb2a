"""The papers' training procedures, as Lightning modules: supervised, classification, cooperative, adversarial.

Each draws the random numbers of a training step (dropout) from the run's seed and the step's number, so that a resumed run draws the same.
"""

import copy
import inspect
import math
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from segops.models import Output, create_model, list_models
from segops.models.checkpoints import check_state_dict
from segops.models.pretrained import create_timm

from .data import UNSCORED, mixed_seed, run_seed
from .files import first_line, is_plain, read_checkpoint
from .inference import Predictor, is_model
from .losses import MEDIAN_FREQUENCY, SegmentationLoss, mean_over_ranks
from .metrics import SegmentationMetrics
from .optimizers import Optimizer
from .transforms import VOID

# What a data module describes: masks have a palette.
MASKS, CLASSES = frozenset({"palette"}), frozenset({"image_classes"})
DATA = {
    MASKS: "images with masks, as SegmentationData",
    CLASSES: "images with classes, as ClassificationData",
    MASKS | CLASSES: "images with classes beside those with masks, as CooperativeData",
}


# Options that name weights in other files, ours and timm's.
ELSEWHERE = ("pretrained", "checkpoint", "checkpoint_path", "pretrained_cfg", "cache_dir")


class Recipe(LightningModule):
    """What the recipes share. The network, `model`, is made for the classes of the data when
    training or evaluation begins, or for those of the checkpoint by `load_from_checkpoint`.

    Args:
        model: name of a model (`segops.models.list_models()`).
        options: of `segops.models.create_model`, as {"backbone": "resnet18", "pretrained": True}.
        optimizer: `Optimizer`.
    """

    takes_unlabelled = False
    reads = MASKS

    def __init__(self, model, options, optimizer):
        super().__init__()
        self.save_hyperparameters(logger=False)  # `on_save_checkpoint` makes them plain
        self.name, self.options = model, dict(options or {})
        self.optimizer = settings(optimizer) or Optimizer()
        self.model = None
        self.entry = None  # what checkpoints say of the network, under "segops"
        self.latest = {}  # losses
        self.resumes = False  # the command line says so where it is given a checkpoint

    def setup(self, stage):
        data = self.trainer.datamodule
        if data is None:
            if self.model is None:
                raise ValueError(
                    f"{type(self).__name__} needs a data module beside it, which says the classes: "
                    f"trainer.{self.trainer.state.fn.value}(recipe, data), as segops.train.SegmentationData"
                )
            return
        if getattr(data, "unlabelled", None) is not None and not self.takes_unlabelled:
            raise ValueError(
                f"unlabelled must be None: {type(self).__name__} takes no images without masks; got {data.unlabelled!r}"
            )
        description = data.description() if hasattr(data, "description") else {}
        if {"palette", "image_classes"} & description.keys() != self.reads:
            raise ValueError(f"{type(self).__name__} needs {DATA[self.reads]}; got {type(data).__name__}")
        if self.model is None:
            self.entry = {"model": {"num_classes": data.num_classes}} | description
            self.make(self.entry)
            self.entry["model"] |= {"name": self.name, "options": self.options}
            if not is_plain(self.entry, 2**20):  # or its checkpoints could not be read
                raise ValueError("classes and model.options must be plain values, and text without control characters")
        else:
            self.check_data(self.entry, data, "the recipe's network")
            if stage == "fit":
                self.entry |= description
        self.begin(data)

    def check_data(self, entry, data, whose):
        """Refuses other classes than the network's; warns of images that are read otherwise."""
        count = entry["model"]["num_classes"]
        if data.num_classes != count:
            raise ValueError(f"{whose} has {count} classes; the data has {data.num_classes}: {', '.join(data.classes)}")
        for key, value in data.description().items():
            if key in entry and entry[key] != value and key not in ("palette", "resize"):
                rank_zero_warn(f"{whose} was trained with {key} {entry[key]!r}; the data has {value!r}")

    def begin(self, data):
        """What a recipe needs of the data beside the classes: nothing here."""

    def forward(self, images):
        if self.model is None:
            raise RuntimeError(
                f"{type(self).__name__} has no network yet: fit makes it, or {type(self).__name__}.load_from_checkpoint"
            )
        return self.model(images)

    def network_options(self, options):
        """Options of a network; without weights to begin with where a checkpoint brings all."""
        if not self.resumes:
            return options
        return {key: value for key, value in options.items() if key not in ELSEWHERE}

    def configure_optimizers(self):
        optimizer, schedule = self.optimizer.build(self.model, self.iterations())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def iterations(self):
        """Batches of the whole training, over which learning rates decay."""
        trainer = self.trainer
        limits = [] if trainer.max_steps == -1 else [self.batches_of(trainer.max_steps)]
        if trainer.max_epochs not in (None, -1):
            limits.append(math.ceil(self.epoch_batches() / trainer.accumulate_grad_batches) * trainer.max_epochs)
        if not limits:
            raise ValueError(
                "trainer.max_epochs or trainer.max_steps must be set: learning rates decay over the whole training"
            )
        return min(limits)

    def epoch_batches(self):
        self.trainer.fit_loop.setup_data()
        return self.trainer.num_training_batches

    def batches_of(self, steps):
        """Batches in which the optimizers of this recipe make so many steps, as Lightning's max_steps counts them."""
        return steps

    def descend(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def show(self, name, loss):
        """Logs a loss of a training step, the mean over ranks, and refuses to go on with one that is no number."""
        self.log(f"train/{name}", loss, prog_bar=name == "loss", sync_dist=True)
        self.latest[name] = loss.detach()
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        # A GPU would wait at every step for the answer. A loss that is NaN once stays NaN.
        if loss.device.type == "cpu" or step % (self.trainer.log_every_n_steps or 50) == 0:
            self.check_finite(step)

    def check_finite(self, step):
        for name, loss in self.latest.items():
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{name} is {loss.item()} at step {step}: try a smaller learning rate")

    def on_train_epoch_end(self):  # before last.ckpt is written
        self.check_finite(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def on_train_batch_start(self, batch, batch_idx):
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        torch.manual_seed(mixed_seed(run_seed(), step, self.global_rank))

    def on_train_start(self):
        self.resumes = False  # it is loaded

    on_validation_start = on_test_start = on_train_start

    def on_validation_epoch_end(self):
        self.finish("val")

    def on_test_epoch_end(self):
        self.finish("test")

    def finish(self, split):
        """Logs the figures of a split: the same on every rank, each from the sums of all."""
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        for name, value in self.figures().items():
            if training and "loss" in name and not torch.isfinite(value):  # after an epoch's last step
                raise FloatingPointError(f"{split}/{name} is {value.item()}: try a smaller learning rate")
            self.log(f"{split}/{name}", value.float(), prog_bar=name == "iou_macro")

    def on_save_checkpoint(self, checkpoint):
        """Adds what `segops predict` and `load_from_checkpoint` need, in plain types, so that
        weights_only loads it."""
        checkpoint["segops"] = self.entry | {"optimizers": list(map(asdict, self.optimizer_settings()))}
        checkpoint["hyper_parameters"] = {
            name: asdict(value) if isinstance(value, Optimizer) else value for name, value in self.hparams.items()
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location="cpu", strict=True, weights_only=True, **arguments):
        """The recipe of a checkpoint of `segops fit`, with its network.

        Nothing in the file is run, and no module imported: Lightning's own would import what
        "hyper_parameters" names.

        Args:
            checkpoint_path: the file.
            map_location: of the weights and the recipe, as for `torch.load`, default "cpu".
            strict, weights_only: Lightning's; must be True.
            arguments: of the recipe, in place of those in the file.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it cannot be read, or is no
                checkpoint of `segops fit`. TypeError: a setting that the recipe does not have.
        """
        if strict is False or weights_only is False:
            raise ValueError(f"strict and weights_only must be True; got {strict!r} and {weights_only!r}")
        saved = read_checkpoint(checkpoint_path, map_location)
        own = saved.get("hyper_parameters") if isinstance(saved, dict) else None
        if not isinstance(own, dict):
            raise ValueError(f"{checkpoint_path} is no checkpoint of segops fit: it needs the entry 'hyper_parameters'")
        known = inspect.signature(cls).parameters
        recipe = cls(**{name: value for name, value in own.items() if name in known} | arguments)
        recipe.on_load_checkpoint(saved)
        recipe.load_state_dict(saved["state_dict"])
        return recipe.to(next(iter(saved["state_dict"].values())).device)

    def on_load_checkpoint(self, checkpoint):
        """Refuses a checkpoint that does not fit. Where there is no network yet, makes that of the
        checkpoint."""
        training = self._trainer is not None and self.trainer.training
        file = "the checkpoint" if self._trainer is None else self.trainer.ckpt_path or "the checkpoint"
        entry = checkpoint.get("segops")
        weights = checkpoint.get("state_dict")
        if not isinstance(entry, dict) or not is_model(entry.get("model")) or not isinstance(weights, dict):
            raise ValueError(f"{file} is no checkpoint of segops fit: it needs the entries 'state_dict' and 'segops'")
        check_entry(entry, file)
        if self.model is None:
            self.resumes, self.entry = True, {key: value for key, value in entry.items() if key != "optimizers"}
            self.name = entry["model"]["name"]
            self.options = dict(entry["model"]["options"])
            self.make(self.entry)
        elif entry["model"]["name"] != self.name:
            raise ValueError(f"{file} has the weights of {entry['model']['name']!r}; model is {self.name!r}")
        elif self._trainer is not None and self.trainer.datamodule is not None:
            self.check_data(entry, self.trainer.datamodule, file)
        if training:
            self.check_optimizers(entry.get("optimizers", []), file)
        check_state_dict(self, weights, str(file))

    def check_optimizers(self, saved, file):
        """Refuses other settings than the saved ones, which would not come into force: the state of
        optimizers is the checkpoint's. Schedules are the new ones."""
        for before, now in zip(saved, map(asdict, self.optimizer_settings()), strict=False):
            for key in RESTORED:
                if key in before and before[key] != now[key]:
                    raise ValueError(
                        f"a resumed run keeps its optimizer: {key} is {now[key]!r}, in {file} {before[key]!r}; "
                        "for others begin a run with model.options.checkpoint"
                    )

    def optimizer_settings(self):
        """`Optimizer` of each optimizer, in the order of `configure_optimizers`."""
        return [self.optimizer]


def check_entry(entry, file):
    """Refuses what a "segops" entry says beside the network where it is not as `on_save_checkpoint`
    writes it."""
    if not is_plain(entry, 2**20):
        raise ValueError(
            f"{file} is no checkpoint of segops fit: its entry 'segops' must hold plain values and printable text alone"
        )
    count, weights, optimizers = entry["model"]["num_classes"], entry.get("class_weight"), entry.get("optimizers", [])
    if weights is not None and not (
        type(weights) is list and len(weights) == count and all(type(weight) in (int, float) for weight in weights)
    ):
        raise ValueError(
            f"{file} is no checkpoint of segops fit: class_weight must be a number for each of its {count} classes"
        )
    if type(optimizers) is not list or not all(type(optimizer) is dict for optimizer in optimizers):
        raise ValueError(f"{file} is no checkpoint of segops fit: optimizers must be a list of their settings")


# Settings of an `Optimizer` that its state has.
RESTORED = (
    *("name", "lr", "momentum", "nesterov", "betas"),
    *("weight_decay", "head_lr", "bias_lr", "bias_weight_decay"),
)


def settings(optimizer):
    """An `Optimizer` given as such, or as checkpoints have it."""
    return Optimizer(**optimizer) if isinstance(optimizer, dict) else optimizer


class Segmentation(Recipe):
    """Base of the recipes that segment: loss and figures of validation and test.

    `predictor_options`, {} by default, are arguments of `Predictor` (window, overlap, scales, flip, crf):
    with any, validation and test score its class maps, and there is no val/loss.
    """

    monitor = "val/iou_macro"  # of best.ckpt

    def __init__(self, model, options, loss, loss_options, optimizer):
        super().__init__(model, options, optimizer)
        self.predictor_options = {}
        self.loss_name, self.loss_options = loss, dict(loss_options or {})
        options = self.loss_options
        if options.get("class_weight") == MEDIAN_FREQUENCY:
            options = options | {"class_weight": None}
        SegmentationLoss(loss, **options)  # what is wrong is said before any data is read

    def make(self, entry):
        classes = entry["model"]["num_classes"]
        self.model = create_model(self.name, classes, **self.network_options(self.options))
        if not hasattr(self.model, "to_classes"):
            raise ValueError(f"model must segment; {self.name!r} judges what other models segment")
        options = dict(self.loss_options)
        if options.get("class_weight") == MEDIAN_FREQUENCY:
            options["class_weight"] = entry.get("class_weight")
        self.criterion = SegmentationLoss(self.loss_name, **options)
        self.metrics, self.val_loss = SegmentationMetrics(classes), MeanLoss()
        Predictor(self.model, **self.predictor_options)  # what is wrong is said before training

    def begin(self, data):
        if self.loss_options.get("class_weight") == MEDIAN_FREQUENCY and "train" in data.sets:
            weights = data.median_frequency()
            self.entry["class_weight"] = weights
            self.criterion.class_weight = torch.tensor(weights)

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        weights = checkpoint["segops"].get("class_weight")
        if weights is not None:
            self.criterion.class_weight = torch.tensor(weights)

    def loss(self, output, masks):
        return self.criterion(output, masks, self.model.align_corners)

    @property
    def evaluates_bytes(self):
        """Whether evaluation is `Predictor`'s, which takes images as they are read."""
        return bool(self.predictor_options)

    def evaluate(self, batch):
        images, masks = batch
        if self.predictor_options:
            predicted = self.predicted(images).to(masks.device)
        else:
            output = self.model(channels_last(images))
            self.val_loss.update(*self.criterion.total(output, masks, self.model.align_corners))
            predicted = self.model.to_classes(output.logits, masks.shape[1:])
        self.metrics.update(predicted, masks)

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch)

    def test_step(self, batch, batch_idx):
        self.evaluate(batch)

    def predict_step(self, batch, batch_idx):
        """Class maps (N, H, W) int64 of a batch of images, or of one of images and targets."""
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        return (
            self.predicted(images).long().to(self.device)
            if images.dtype == torch.uint8
            else self.model.predict(channels_last(images))
        )

    def predicted(self, images):
        """Class maps (N, H, W) of bytes, by `Predictor`."""
        predictor = Predictor(self.model, self.entry["normalize"], **self.predictor_options)
        try:
            return torch.stack([predictor(image) for image in images])
        except RuntimeError as error:  # as of no memory, or of a scale that leaves no image
            size = "x".join(map(str, images.shape[2:]))
            raise ValueError(
                f"images of {size} cannot be predicted with {self.predictor_options}: {first_line(error)}"
            ) from error

    def figures(self):
        self.per_class = {name: values.tolist() for name, values in self.metrics.per_class().items()}
        values = self.metrics.compute()
        self.metrics.reset()
        if not self.predictor_options:
            values["loss"] = self.val_loss.compute()
            self.val_loss.reset()
        if values["pixel_accuracy"].isnan() and not self.trainer.sanity_checking:
            raise ValueError("nothing was scored: every pixel of the masks that were looked at is void")
        return values


class MeanLoss(Metric):
    """A loss over batches and ranks, in which each pixel, or image, counts once."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, total, count):
        self.total = self.total + total  # not in place: what reset() makes in an evaluation is for inference alone
        self.count = self.count + count

    def compute(self):
        return self.total / self.count


class Supervised(Segmentation):
    """Training on images with masks.

    Args:
        model: name of a model, default "pacnet".
        options: of `segops.models.create_model`, as {"backbone": "resnet18", "pretrained": True, "checkpoint": "fcn16s.ckpt"}.
        loss: "ce" (default), "bal" or "focal".
        loss_options: of `SegmentationLoss`: aux_weight, reduction, class_weight (a list, or "median_frequency", SegNet's), kernel_size, gamma, ...
        optimizer: `Optimizer`, by default SGD with polynomial decay from 0.007.
        freeze_batch_norm: batch normalisation keeps its running statistics, scales and shifts (default False): for batches too small for it, as DeepLab v2.
        batch_norm_momentum: share of a batch in the running statistics, default PyTorch's 0.1; a decay of 0.9997 (DeepLab v3) is 0.0003.
    """

    def __init__(
        self,
        model: str = "pacnet",
        options: dict[str, Any] | None = None,
        loss: str = "ce",
        loss_options: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        freeze_batch_norm: bool = False,
        batch_norm_momentum: float | None = None,
    ):
        super().__init__(model, options, loss, loss_options, optimizer)
        self.freeze_batch_norm, self.batch_norm_momentum = freeze_batch_norm, batch_norm_momentum

    def make(self, entry):
        super().make(entry)
        for module in batch_norms(self.model):
            module.requires_grad_(not self.freeze_batch_norm)
            if self.batch_norm_momentum is not None:
                module.momentum = self.batch_norm_momentum

    def on_train_start(self):  # a run resumed within an epoch does not start that; validation gives each module its mode back
        super().on_train_start()
        if self.freeze_batch_norm:
            for module in batch_norms(self.model):
                module.eval()

    def training_step(self, batch, batch_idx):
        images, masks = labelled(batch)
        loss = self.loss(self.model(channels_last(images)), masks)
        self.show("loss", loss)
        return loss


class Classification(Recipe):
    """Training on images with a class each: a classifier of timm (VGG-19, Inception-v3: Haloi, Tables III and IV), JointSeg's, or a linear layer on the mean
    of the deepest map of a segmentation model's encoder. Its checkpoint is what `pretrained=` of `segops.models.create_model` takes (Table I).

    Figures: top-1, top-2, and binary accuracy, class 0 against all others (Table IV).

    Args:
        model: name of a timm model or of a model here with an encoder of its own, as "jointseg" and "unet_inception"; default "vgg19".
        options: of timm's or our create_model.
        optimizer: `Optimizer`.
    """

    monitor = "val/top1_accuracy_micro"
    reads = CLASSES

    def __init__(self, model: str = "vgg19", options: dict[str, Any] | None = None, optimizer: Optimizer | None = None):
        super().__init__(model, options, optimizer)

    def make(self, entry):
        classes, options = entry["model"]["num_classes"], self.network_options(self.options)
        if self.name in list_models():
            network = create_model(self.name, classes, **options)
            if hasattr(network, "class_logits"):
                network.decoder, network.forward = None, network.class_logits
            else:
                network = ImageClassifier(network, classes)
            self.model = network
        elif timm.is_model(self.name):
            self.model = create_timm(self.name, num_classes=classes, **options)
        else:
            raise ValueError(f"model must be a model of timm or of segops; got {self.name!r}")
        self.metrics, self.val_loss = ClassificationMetrics(classes), MeanLoss()

    def training_step(self, batch, batch_idx):
        images, classes = batch
        logits = self.model(channels_last(images))
        if isinstance(logits, tuple):  # Inception-v3's auxiliary classifier, 0.4 as its paper
            loss = class_loss(logits[0], classes) + 0.4 * class_loss(logits[1], classes)
        else:
            loss = class_loss(logits, classes)
        self.show("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, classes = batch
        logits = main_logits(self.model(channels_last(images)))
        self.metrics.update(logits, classes)
        self.val_loss.update(*class_total(logits, classes))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        """Classes (N) of a batch of images, or of one of images and targets."""
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        return main_logits(self.model(channels_last(images))).argmax(1)

    def figures(self):
        values = self.metrics.compute() | {"loss": self.val_loss.compute()}
        self.val_loss.reset()
        return values


def main_logits(output):
    """Of Inception-v3 in training, which has auxiliary ones too, and of others."""
    return output[0] if isinstance(output, tuple) else output


class ImageClassifier(nn.Module):
    """Classes of whole images by a segmentation model's encoder: a linear layer on the mean of its deepest map."""

    def __init__(self, model, num_classes):
        super().__init__()
        encoder = getattr(model, "encoder", None)
        if encoder is None or isinstance(encoder, nn.ModuleList):
            raise ValueError(f"model must have an encoder of its own, images to maps; {type(model).__name__} has none")
        images = torch.empty(1, model.in_channels, 256, 256, device="meta")
        channels = copy.deepcopy(encoder).to("meta")(images)[-1].shape[1]
        self.encoder = encoder
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images):
        return self.linear(self.encoder(images)[-1].mean((2, 3)))


class ClassificationMetrics(nn.Module):
    """Accuracies of image classes, all micro: top-1, top-2 (of more than two classes), and binary, class 0 against all others."""

    def __init__(self, num_classes):
        super().__init__()
        self.figures = nn.ModuleDict({"top1": MulticlassAccuracy(num_classes, average="micro", ignore_index=UNSCORED)})
        if num_classes > 2:
            self.figures["top2"] = MulticlassAccuracy(num_classes, top_k=2, average="micro", ignore_index=UNSCORED)
        self.figures["binary"] = BinaryAccuracy(ignore_index=UNSCORED)

    def update(self, logits, classes):
        for name, figure in self.figures.items():
            if name == "binary":
                figure.update((logits.argmax(1) > 0).long(), classes.clamp(max=1))
            else:
                figure.update(logits.float(), classes)

    def compute(self):
        """{"top1_accuracy_micro": ..., ...} of all batches and ranks since the last."""
        values = {f"{name}_accuracy_micro": figure.compute() for name, figure in self.figures.items()}
        for figure in self.figures.values():
            figure.reset()
        return values


class Cooperative(Segmentation):
    """Two agents that share an encoder (Haloi, arXiv:1710.07991, II): with M the encoder, C the classifier, S the decoder, one optimizer minimises the
    classification's cross entropy over M and C, another the segmentation's over M and S. A step is one of the classifier, then one of the segmenter;
    the order is decided here. Needs `CooperativeData`.

    Args:
        model: "jointseg" (default), or any with `encoder`, `decoder`, `classifier`, `encode`, `class_logits` and `segment_logits`.
        options, loss, loss_options: as in `Supervised`.
        optimizer: of the segmenter, by default the paper's: SGD with Nesterov momentum 0.9 and polynomial decay; from 0.001.
        classifier_lr: factor on its learning rate for the classifier, default 30, the paper's. (The classifier's batch, 32 times the segmenter's there, is
            the data module's.)
    """

    reads = MASKS | CLASSES

    def __init__(
        self,
        model: str = "jointseg",
        options: dict[str, Any] | None = None,
        loss: str = "ce",
        loss_options: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        classifier_lr: float = 30.0,
    ):
        optimizer = settings(optimizer) or Optimizer(lr=0.001, nesterov=True)
        super().__init__(model, options, loss, loss_options, optimizer)
        self.classifier_lr = classifier_lr
        self.automatic_optimization = False

    def optimizer_settings(self):
        segmenter, factor = self.optimizer, self.classifier_lr
        return [segmenter, replace(segmenter, lr=factor * segmenter.lr, min_lr=factor * segmenter.min_lr)]

    def make(self, entry):
        self.options["image_classes"] = len(entry["image_classes"])
        super().make(entry)
        self.class_metrics, self.class_val_loss = ClassificationMetrics(len(entry["image_classes"])), MeanLoss()

    def configure_optimizers(self):
        segmenter, classifier = self.optimizer_settings()
        built = [
            segmenter.build([self.model.encoder, self.model.decoder], self.iterations()),
            classifier.build([self.model.encoder, self.model.classifier], self.iterations()),
        ]
        return tuple(map(list, zip(*built, strict=True)))

    def batches_of(self, steps):
        return math.ceil(steps / 2)

    def training_step(self, batch, batch_idx):
        segmenter, classifier = self.optimizers()
        images, classes = batch["classification"]
        loss = class_loss(self.model.class_logits(channels_last(images)), classes)
        self.show("classification_loss", loss)
        self.descend(classifier, loss)
        images, masks = labelled(batch["segmentation"])
        loss = self.loss(Output(self.model.segment_logits(channels_last(images))), masks)
        self.show("loss", loss)
        self.descend(segmenter, loss)
        for schedule in self.lr_schedulers():
            schedule.step()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 0:
            self.evaluate(batch)
        else:
            images, classes = batch
            logits = self.model.class_logits(channels_last(images))
            self.class_metrics.update(logits, classes)
            self.class_val_loss.update(*class_total(logits, classes))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.validation_step(batch, batch_idx, dataloader_idx)

    def figures(self):
        values = super().figures() | self.class_metrics.compute()
        values["classification_loss"] = self.class_val_loss.compute()
        self.class_val_loss.reset()
        return values


class Adversarial(Segmentation):
    """A generator that segments and a discriminator that tells its class maps from labels, for images with masks and without (Lalwani, III.C).

    Every step has a labelled phase: the discriminator minimises L_BCE, half for labels and half for predictions, then the generator
    L_CCE + lambda_labelled L_BCE with the discriminator frozen, on the same batch (the paper draws another). From epoch `unlabelled_from` on an
    unlabelled phase follows: the generator minimises lambda_unlabelled L_BCE on images without masks, the discriminator frozen. Frozen: no gradients,
    and running statistics are kept. Void pixels count in no loss, and the discriminator sees no class there.

    Args:
        model, options, loss, loss_options: the generator, as in `Supervised`; default "deeplabv3plus", "ce".
        discriminator: "fcn_discriminator" (default) or "patchgan"; discriminator_options: of `segops.models.create_model`.
        optimizer: of the generator. discriminator_optimizer: by default Adam at 1e-4 with betas (0.9, 0.99) and polynomial decay (AdvSemiSeg).
            PatchGAN's learning rate must be above the generator's, as Lalwani has it (IV.A).
        lambda_labelled, lambda_unlabelled: default 0.01 and 0.001.
        unlabelled_from: epoch, default 0.
    """

    takes_unlabelled = True

    def __init__(
        self,
        model: str = "deeplabv3plus",
        options: dict[str, Any] | None = None,
        loss: str = "ce",
        loss_options: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        discriminator: str = "fcn_discriminator",
        discriminator_options: dict[str, Any] | None = None,
        discriminator_optimizer: Optimizer | None = None,
        lambda_labelled: float = 0.01,
        lambda_unlabelled: float = 0.001,
        unlabelled_from: int = 0,
    ):
        super().__init__(model, options, loss, loss_options, optimizer)
        if discriminator not in ("fcn_discriminator", "patchgan"):
            raise ValueError(f"discriminator must be 'fcn_discriminator' or 'patchgan'; got {discriminator!r}")
        self.discriminator_name, self.discriminator_options = discriminator, dict(discriminator_options or {})
        self.discriminator_optimizer = settings(discriminator_optimizer) or Optimizer(
            "adam", 1e-4, betas=(0.9, 0.99), weight_decay=0.0
        )
        if discriminator == "patchgan" and self.discriminator_optimizer.lr <= self.optimizer.lr:
            raise ValueError(
                f"discriminator_optimizer.lr must be above the generator's, {self.optimizer.lr}, for 'patchgan'; "
                f"got {self.discriminator_optimizer.lr}"
            )
        for name, value in (("lambda_labelled", lambda_labelled), ("lambda_unlabelled", lambda_unlabelled)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0; got {value}")
        self.lambda_labelled, self.lambda_unlabelled, self.unlabelled_from = lambda_labelled, lambda_unlabelled, unlabelled_from
        self.automatic_optimization = False

    def optimizer_settings(self):
        return [self.optimizer, self.discriminator_optimizer]

    def make(self, entry):
        super().make(entry)
        classes = entry["model"]["num_classes"]
        options = self.network_options(self.discriminator_options)
        self.discriminator = create_model(self.discriminator_name, classes, **options)

    def begin(self, data):
        super().begin(data)
        if "train" in data.sets and "unlabelled" not in data.sets:
            rank_zero_warn("no images without masks (data.labelled below 1, or data.unlabelled): there is no unlabelled phase")

    def configure_optimizers(self):
        built = [
            self.optimizer.build(self.model, self.iterations()),
            self.discriminator_optimizer.build(self.discriminator, self.iterations()),
        ]
        return tuple(map(list, zip(*built, strict=True)))

    def batches_of(self, steps):
        unlabelled = "unlabelled" in self.trainer.datamodule.sets
        if not unlabelled:
            return math.ceil(steps / 2)
        before = min(math.ceil(steps / 2), self.unlabelled_from * self.epoch_batches())
        return before + math.ceil((steps - 2 * before) / 3)

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        images, masks = labelled(batch)
        images = channels_last(images)
        output, valid = self.model(images), masks != VOID
        predicted = class_map(output.logits, valid, self.model.align_corners)

        real, fake = (self.discriminator(images, classes).logits for classes in (masks, predicted.detach()))
        loss = (judged(real, True, valid) + judged(fake, False, valid)) / 2
        self.show("discriminator_loss", loss)
        self.descend(discriminator, loss)

        loss = self.loss(output, masks)
        self.show("loss", loss)
        with frozen(self.discriminator):
            adversarial = judged(self.discriminator(images, predicted).logits, True, valid)
        self.show("adversarial_loss", adversarial)
        self.descend(generator, loss + self.lambda_labelled * adversarial)

        if isinstance(batch, dict) and self.current_epoch >= self.unlabelled_from:
            images = channels_last(batch["unlabelled"][0])
            everywhere = torch.ones_like(images[:, 0], dtype=torch.bool)
            predicted = class_map(self.model(images).logits, everywhere, self.model.align_corners)
            with frozen(self.discriminator):
                adversarial = judged(self.discriminator(images, predicted).logits, True, everywhere)
            self.show("unlabelled_loss", adversarial)
            self.descend(generator, self.lambda_unlabelled * adversarial)
        for schedule in self.lr_schedulers():
            schedule.step()


def class_map(logits, valid, align_corners=False):
    """Probabilities (N, C, H, W) float32 at the images' size, zero where a pixel is not valid, as a label's are."""
    logits = F.interpolate(logits.float(), valid.shape[1:], mode="bilinear", align_corners=align_corners)
    return logits.softmax(1) * valid[:, None]


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def labelled(batch):
    """Images and masks of a batch that may have an unlabelled stream beside."""
    return batch["labelled"] if isinstance(batch, dict) else batch


def judged(logits, real, valid):
    """Binary cross entropy of a discriminator's logits (N, 1, h, w) for "this is a label", over what is valid at their size."""
    valid = F.interpolate(valid[:, None].float(), logits.shape[2:], mode="nearest")
    losses = F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(valid, float(real)), reduction="none")
    return mean_over_ranks((losses * valid).sum(), valid.sum())


@contextmanager
def frozen(network):
    """The network in evaluation mode, without gradients for its parameters."""
    training = network.training
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train(training).requires_grad_(True)


def class_total(logits, classes):
    """Cross entropy of image classes, its sum, and how many images it is of."""
    total = F.cross_entropy(logits.float(), classes, ignore_index=UNSCORED, reduction="sum")
    return total, (classes != UNSCORED).sum()


def class_loss(logits, classes):
    """Cross entropy of image classes, averaged over all ranks."""
    return mean_over_ranks(*class_total(logits, classes))


def channels_last(images):
    return images.contiguous(memory_format=torch.channels_last)
