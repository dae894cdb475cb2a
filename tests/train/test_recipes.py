"""The recipes on tiny networks: who learns from what, when, at which rate; figures; checkpoints that rebuild the network."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from PIL import Image
from segops.models import Output, create_model
from segops.models.layers import BatchNorm2d
from timm.models import register_model
from torch import nn

from segops.train import (
    Adversarial,
    Augment,
    Classification,
    ClassificationData,
    Cooperative,
    CooperativeData,
    Optimizer,
    Predictor,
    SegmentationData,
    SegmentationLoss,
    SegmentationMetrics,
    Supervised,
)
from segops.train.data import UNSCORED, mixed_seed
from segops.train.inference import load_network
from segops.train.recipes import ClassificationMetrics, class_map, frozen, judged
from segops.train.transforms import VOID

from ..models.small import NARROW, RESNET

PACNET = {"model": "pacnet", "options": NARROW}
JOINTSEG = {"options": {"widths": (4, 8, 16), "blocks": 1}}
FCN = {**PACNET, "discriminator_options": {"channels": 4}}
PATCHGAN = FCN | {
    "discriminator": "patchgan",
    "discriminator_options": {"receptive_field": 16, "channels": 4},
    "optimizer": Optimizer(lr=1e-3),
    "discriminator_optimizer": Optimizer("adam", 1e-2),
}
discriminators = pytest.mark.parametrize("settings", [FCN, PATCHGAN], ids=["fcn", "patchgan"])


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def trainer(tmp_path):
    """Makes a trainer that writes nothing."""

    def make(epochs=1, **settings):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        settings = {"accelerator": "cpu", "max_epochs": epochs, "num_sanity_val_steps": 0} | quiet | settings
        return Trainer(default_root_dir=tmp_path, **settings)

    return make


def scenes(train=4, **settings):
    options = {"train": train, "val": 2, "size": (32, 32)}
    return SegmentationData(**{"options": options, "batch_size": 2, "test_split": "val"} | settings)


def write_table(folder, classes=3):
    """12 images whose colour is their class."""
    (folder / "train").mkdir()
    lines = ["image,level"]
    for index in range(12):
        colour = [40, 40, 40]
        colour[index % 3] = 200 + index
        Image.new("RGB", (32, 32), tuple(colour)).save(folder / f"train/{index}.png")
        lines.append(f"{index},{index % classes}")
    (folder / "trainLabels.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path)


def images(table, **settings):
    return ClassificationData(table, **{"batch_size": 4, "val_share": 1 / 3} | settings)


def both(table, train=4, **settings):
    return CooperativeData(scenes(train, **settings), images(table))


class Watch(Callback):
    """What is logged, and the learning rates, at every batch."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(
            {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        )


class Kept(Callback):
    """The module's tensors and the batch as the first step finds them."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == 0:
            self.state, self.batch = copy.deepcopy(module.state_dict()), batch

    def network(self, name, num_classes, **options):
        model = create_model(name, num_classes, **options)
        model.load_state_dict(
            {key.removeprefix("model."): value for key, value in self.state.items() if key.startswith("model.")}
        )
        return model.train()


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_statistic(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def step_seed(step=0):
    torch.manual_seed(mixed_seed(0, step, 0))


def channels_last(pictures):
    """As the recipes lay them out: sums in the same order."""
    return pictures.contiguous(memory_format=torch.channels_last)


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values()).item()
    assert largest > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_poly(rates, lr, iterations):
    assert rates == pytest.approx([lr * (1 - step / iterations) ** 0.9 for step in range(len(rates))])


# supervised


@pytest.mark.parametrize(
    "settings",
    [PACNET, PACNET | {"loss": "bal"}, {"model": "unet_inception", "options": {"channels": 4}, "loss": "focal"}],
    ids=lambda settings: settings["model"],
)
def test_supervised_learns(trainer, settings):
    watch = Watch()
    recipe = Supervised(**settings, optimizer=Optimizer(lr=0.03))
    trainer(12, callbacks=[watch], limit_val_batches=0).fit(recipe, datamodule=scenes(2, augment=Augment(horizontal_flip=0)))
    losses = [step["train/loss"] for step in watch.losses]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("aux", [False, True])
def test_supervised_step_by_hand(trainer, aux):
    """Plain SGD with decay on the loss of images as the data module gives them."""
    kept, options = Kept(), PACNET["options"] | {"aux": aux}
    settings = Optimizer(lr=0.1, momentum=0.0, weight_decay=0.01)
    recipe = Supervised("pacnet", options, "bal", {"aux_weight": 0.3}, settings)
    run = trainer(max_steps=1, callbacks=[kept], limit_val_batches=0)
    run.fit(recipe, datamodule=scenes())
    model = kept.network("pacnet", 7, **options)
    step_seed()
    loss = SegmentationLoss("bal", aux_weight=0.3)(model(channels_last(kept.batch[0])), kept.batch[1])
    assert run.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), recipe.model.parameters(), strict=True):
        expected = parameter - 0.1 * (parameter.grad + 0.01 * parameter)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_supervised_takes_the_labelled_of_two_streams(trainer):
    watch = Watch()
    trainer(callbacks=[watch]).fit(Supervised(**PACNET), datamodule=scenes(labelled=0.5))
    assert len(watch.losses) == 1 and watch.losses[0]["train/loss"] > 0


@pytest.mark.parametrize(("limits", "batches"), [({"epochs": 3}, 6), ({"epochs": -1, "max_steps": 3}, 3)], ids=str)
def test_learning_rate_of_every_batch(trainer, limits, batches):
    watch = Watch()
    trainer(**limits, callbacks=[watch], limit_val_batches=0).fit(Supervised(**PACNET), datamodule=scenes())
    assert_poly([rates[0] for rates in watch.rates], 0.007, batches)
    assert len(watch.rates) == batches


def test_training_without_end(trainer):
    with pytest.raises(ValueError, match=r"trainer\.max_epochs or trainer\.max_steps must be set"):
        trainer(-1).fit(Supervised(**PACNET), datamodule=scenes())


class Save(Callback):
    """Saves and stops after a batch."""

    def __init__(self, path, batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyError("stopped")


def statistics(module):
    return {name: value.clone() for name, value in module.state_dict().items() if is_statistic(name)}


@pytest.mark.parametrize("frozen_statistics", [False, True])
def test_freeze_batch_norm(trainer, frozen_statistics):
    """Its statistics, scales and shifts stay as they are, in every epoch, and with validations between and within them."""
    kept = Kept()
    recipe = Supervised(**PACNET, freeze_batch_norm=frozen_statistics)
    trainer(2, callbacks=[kept], val_check_interval=1).fit(recipe, datamodule=scenes())
    before = {name: value for name, value in kept.state.items() if is_statistic(name)}
    assert len(before) > 20
    moved = changed(before, statistics(recipe))
    assert moved == (set() if frozen_statistics else set(before))
    norms = [name for name, module in recipe.named_modules() if isinstance(module, nn.BatchNorm2d)]
    learned = {f"{name}.weight" for name in norms} & changed(kept.state, recipe.state_dict())
    assert len(learned) == (0 if frozen_statistics else len(norms))
    assert "model.encoder.features.conv1.weight" in changed(kept.state, recipe.state_dict())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_freeze_batch_norm_of_a_run_that_goes_on(trainer, tmp_path):
    """Within an epoch, where no epoch starts."""
    path = tmp_path / "last.ckpt"
    with pytest.raises(KeyError, match="stopped"):
        trainer(2, callbacks=[Save(path, 1)]).fit(Supervised(**PACNET, freeze_batch_norm=True), datamodule=scenes())
    recipe = Supervised(**PACNET, freeze_batch_norm=True)
    trainer(2).fit(recipe, datamodule=scenes(), ckpt_path=path, weights_only=True)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert not changed({name: value for name, value in saved.items() if is_statistic(name)}, statistics(recipe))
    assert changed(saved, recipe.state_dict())


def test_batch_norm_momentum(trainer):
    """The share of the first batch in the statistics."""
    kept, recipe = Kept(), Supervised(**PACNET, batch_norm_momentum=0.03)
    trainer(max_steps=1, callbacks=[kept], limit_val_batches=0).fit(recipe, datamodule=scenes())
    with torch.no_grad():
        found = []
        model = kept.network("pacnet", 7, **PACNET["options"])
        first = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        first.register_forward_pre_hook(lambda module, arguments: found.append(arguments[0]))
        model(kept.batch[0])
    norm = next(module for module in recipe.model.modules() if isinstance(module, nn.BatchNorm2d))
    torch.testing.assert_close(norm.running_mean, 0.03 * found[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_median_frequency(trainer):
    recipe, data = Supervised(**PACNET, loss_options={"class_weight": "median_frequency"}), scenes()
    trainer(limit_train_batches=1).fit(recipe, datamodule=data)
    assert recipe.criterion.class_weight.tolist() == pytest.approx(data.median_frequency())
    alone = Supervised(**PACNET, loss_options={"class_weight": "median_frequency"})
    trainer().validate(alone, datamodule=scenes(), verbose=False)
    assert alone.criterion.class_weight is None


@pytest.mark.parametrize("split", ["val", "test"])
def test_figures(trainer, split):
    recipe, data = Supervised(**PACNET), scenes()
    run = trainer()
    getattr(run, {"val": "validate", "test": "test"}[split])(recipe, datamodule=data, verbose=False)
    metrics = SegmentationMetrics(7)
    total = count = 0
    for image, mask in (data.val_dataloader if split == "val" else data.test_dataloader)():
        metrics.update(recipe.model.eval().predict(image), mask)
        logits = recipe.model(image).logits.detach()
        total += F.cross_entropy(
            F.interpolate(logits, mask.shape[1:], mode="bilinear"), mask, reduction="sum", ignore_index=255
        )
        count += (mask != 255).sum()
    expected = metrics.compute() | {"loss": total / count}
    assert set(run.callback_metrics) == {f"{split}/{name}" for name in expected}
    for name, value in expected.items():
        assert run.callback_metrics[f"{split}/{name}"].item() == pytest.approx(value.item(), nan_ok=True), name
    assert recipe.per_class["iou"] == pytest.approx(metrics.per_class()["iou"].tolist(), nan_ok=True)


def test_figures_of_every_epoch_alone(trainer):
    """Those of the sanity check and of earlier epochs are not in them."""
    recipe = Supervised(**PACNET)
    run = trainer(2, num_sanity_val_steps=-1)
    run.fit(recipe, datamodule=scenes())
    seen = run.callback_metrics["val/iou_macro"].item()
    fresh = trainer()
    fresh.validate(recipe, datamodule=scenes(), verbose=False)
    assert fresh.callback_metrics["val/iou_macro"].item() == pytest.approx(seen)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Supervised("pacnet", loss="dice"), "loss must be one of"),
        (lambda: Supervised("pacnet", loss_options={"reduction": "none"}), "reduction must be"),
        (lambda: Adversarial(discriminator="dcgan"), "discriminator must be 'fcn_discriminator' or 'patchgan'; got 'dcgan'"),
        (lambda: Adversarial(lambda_labelled=-1.0), r"lambda_labelled must be at least 0; got -1\.0"),
        (lambda: Adversarial(lambda_unlabelled=-1.0), r"lambda_unlabelled must be at least 0; got -1\.0"),
        (
            lambda: Adversarial(discriminator="patchgan"),
            r"discriminator_optimizer\.lr must be above the generator's, 0\.007, for 'patchgan'; got 0\.0001",
        ),
        (
            lambda: Adversarial(discriminator="patchgan", discriminator_optimizer=Optimizer("adam", 0.007)),
            "must be above the generator's",
        ),
    ],
)
def test_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Supervised("fcn_discriminator"), "model must segment; 'fcn_discriminator' judges what other models segment"),
        (Adversarial("patchgan"), "model must segment; 'patchgan'"),
        (
            Cooperative(),
            "Cooperative needs images with classes beside those with masks, as CooperativeData; got SegmentationData",
        ),
        (Classification("unet"), "Classification needs images with classes, as ClassificationData; got SegmentationData"),
    ],
)
def test_what_data_or_model_cannot_do(trainer, recipe, message):
    with pytest.raises(ValueError, match=message):
        trainer().fit(recipe, datamodule=scenes())


class Spoil(Callback):
    """Makes a parameter NaN before the second step."""

    def __init__(self, find):
        self.find = find

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.find(module).data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("make", "find", "name"),
    [
        (lambda: Supervised(**PACNET), lambda module: next(module.model.head.parameters()), "loss"),
        (lambda: Cooperative(**JOINTSEG), lambda module: module.model.classifier[-1].bias, "classification_loss"),
        (lambda: Cooperative(**JOINTSEG), lambda module: module.model.decoder.head.bias, "loss"),
        (lambda: Adversarial(**FCN), lambda module: next(module.discriminator.parameters()), "discriminator_loss"),
        (lambda: Adversarial(**FCN), lambda module: next(module.model.head.parameters()), "discriminator_loss"),
    ],
)
def test_a_loss_that_is_no_number(trainer, table, make, find, name):
    recipe = make()
    data = both(table) if isinstance(recipe, Cooperative) else scenes()
    with pytest.raises(FloatingPointError, match=rf"^{name} is nan at step 2: try a smaller learning rate"):
        trainer(callbacks=[Spoil(find)]).fit(recipe, datamodule=data)


# classification


@register_model
def classifier_with_aux(pretrained=False, num_classes=10, **options):
    """As timm's Inception-v3 with aux_logits: two logits, in evaluation too."""
    return WithAux(num_classes)


class WithAux(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.main, self.aux = nn.Linear(3, num_classes), nn.Linear(3, num_classes)

    def forward(self, images):
        means = images.mean((2, 3))
        return self.main(means), self.aux(means)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("resnettiny", {}),
        ("jointseg", JOINTSEG["options"]),
        ("unet_inception", {"channels": 4}),
        ("pacnet", RESNET),
        ("classifier_with_aux", {}),
    ],
)
def test_classification(trainer, table, model, options):
    watch, data = Watch(), images(table)
    recipe = Classification(model, options, Optimizer(lr=0.05))
    run = trainer(5, callbacks=[watch])
    run.fit(recipe, datamodule=data)
    losses = [step["train/loss"] for step in watch.losses]
    assert len(losses) == 10 and sum(losses[-3:]) < sum(losses[:3])
    assert {name for name in run.callback_metrics if name.startswith("val/")} == {
        "val/loss",
        *(f"val/{name}_accuracy_micro" for name in ("top1", "top2", "binary")),
    }


def test_auxiliary_classifier_counts_0_4(trainer, table):
    kept, recipe = Kept(), Classification("classifier_with_aux")
    run = trainer(max_steps=1, callbacks=[kept], limit_val_batches=0)
    run.fit(recipe, datamodule=images(table))
    model = timm.create_model("classifier_with_aux", num_classes=3)
    model.load_state_dict({name.removeprefix("model."): value for name, value in kept.state.items()})
    main, aux = (F.cross_entropy(logits, kept.batch[1]) for logits in model(kept.batch[0]))
    assert run.callback_metrics["train/loss"].item() == pytest.approx((main + 0.4 * aux).item(), rel=1e-5)


def accuracies(logits, classes):
    """By hand, over images that are scored."""
    top1, top2, binary, count = 0, 0, 0, 0
    for row, truth in zip(logits.tolist(), classes.tolist(), strict=True):
        if truth == UNSCORED:
            continue
        order = sorted(range(len(row)), key=lambda index: -row[index])
        count, top1, top2 = count + 1, top1 + (order[0] == truth), top2 + (truth in order[:2])
        binary += (order[0] > 0) == (truth > 0)
    return {f"{name}_accuracy_micro": hits / count for name, hits in (("top1", top1), ("top2", top2), ("binary", binary))}


def values(metrics):
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("unscored", [0.0, 0.3])
def test_accuracies(num_classes, unscored):
    logits, classes = torch.randn(60, num_classes), torch.randint(0, num_classes, (60,))
    classes = classes.where(torch.rand(60) >= unscored, UNSCORED)
    expected, metrics = accuracies(logits, classes), ClassificationMetrics(num_classes)
    if num_classes == 2:
        del expected["top2_accuracy_micro"]
    for _ in range(2):  # the second time as if it were the first
        for start in range(0, 60, 7):
            metrics.update(logits[start : start + 7], classes[start : start + 7])
        assert values(metrics) == pytest.approx(expected)
    for row, truth in zip(logits, classes, strict=True):
        metrics.update(row[None], truth[None])  # a batch of one, perhaps not scored
    assert values(metrics) == pytest.approx(expected)


@pytest.mark.parametrize("eval_batch_size", [1, 3])
def test_classification_figures(trainer, table, eval_batch_size):
    recipe, data, run = Classification("resnettiny"), images(table, eval_batch_size=eval_batch_size), trainer()
    run.validate(recipe, datamodule=data, verbose=False)
    with torch.no_grad():
        pairs = [(recipe.model.eval()(batch), classes) for batch, classes in data.val_dataloader()]
    logits, classes = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    found = {name.removeprefix("val/"): value.item() for name, value in run.callback_metrics.items()}
    expected = accuracies(logits, classes) | {"loss": F.cross_entropy(logits, classes).item()}
    assert len(classes) == 4 and found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["unet_inception", "jointseg"])
def test_a_classifier_s_encoder_begins_a_segmentation(trainer, table, tmp_path, name):
    """Table I of Haloi: networks that were trained on the classes."""
    options, path = {"unet_inception": {"channels": 4}, "jointseg": JOINTSEG["options"]}[name], tmp_path / "classifier.ckpt"
    run, recipe = trainer(), Classification(name, options)
    run.fit(recipe, datamodule=images(table))
    run.save_checkpoint(path)
    model = create_model(name, 7, pretrained=str(path), **options)
    assert not changed(tensors(recipe.model.encoder), tensors(model.encoder))
    assert changed(tensors(model.encoder), tensors(create_model(name, 7, **options).encoder))


def test_classification_model():
    recipe = Classification("vgg_of_mine")
    with pytest.raises(ValueError, match="model must be a model of timm or of segops; got 'vgg_of_mine'"):
        recipe.make({"model": {"num_classes": 3}})


# cooperative


class Descents:
    """What each of a recipe's descents changed, from what stood just before; and the gradients it left."""

    def __init__(self, recipe, *parts):
        self.recipe, self.parts, self.descend, self.records, self.losses = recipe, parts, recipe.descend, [], []
        recipe.descend = self

    def tensors(self):
        return {name: value for name, value in tensors(self.recipe).items() if "metrics" not in name}

    def __call__(self, optimizer, loss):
        before = self.tensors()
        self.descend(optimizer, loss)
        after = self.tensors()
        self.losses.append(loss.item())
        self.records.append((before, after, gradients(self.recipe)))

    def changed(self, index):
        """Names of the parts whose parameters the descent changed."""
        before, after, _ = self.records[index]
        names = {name for name in changed(before, after) if not is_statistic(name)}
        return {part for part in self.parts if any(name.startswith(part) for name in names)}


AGENTS = ("model.encoder", "model.classifier", "model.decoder")


def test_agents_learn_their_own_and_the_encoder(trainer, table):
    recipe, kept = Cooperative(**JOINTSEG), Kept()
    descents = Descents(recipe, *AGENTS)
    trainer(max_steps=4, callbacks=[kept], limit_val_batches=0).fit(recipe, datamodule=both(table))
    assert len(descents.records) == 4
    for index in (0, 2):
        assert descents.changed(index) == {"model.encoder", "model.classifier"}
        assert descents.changed(index + 1) == {"model.encoder", "model.decoder"}
    # Running statistics are the business of who looks at images, between the descents.
    first, second = (
        changed(one, other)
        for one, other in ((kept.state, descents.records[0][0]), (descents.records[0][1], descents.records[1][0]))
    )
    assert {name.split(".")[1] for name in first} == {"encoder", "classifier"}
    assert {name.split(".")[1] for name in second} == {"encoder", "decoder"}


def test_cooperative_gradients_by_hand(trainer, table):
    """The classifier's first, then the segmenter's with the encoder that it changed; neither has any of the other's in it."""
    recipe, kept = Cooperative(**JOINTSEG), Kept()
    descents = Descents(recipe)
    trainer(max_steps=2, callbacks=[kept], limit_val_batches=0).fit(recipe, datamodule=both(table))
    model = kept.network("jointseg", 7, image_classes=3, **JOINTSEG["options"])
    pictures, classes = kept.batch["classification"]
    assert pictures.shape[0] == 4
    loss = F.cross_entropy(model(channels_last(pictures)).class_logits, classes)
    loss.backward()
    assert descents.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found = {name.removeprefix("model."): value for name, value in descents.records[0][2].items()}
    assert_gradients(found, {name: value for name, value in gradients(model).items() if not name.startswith("decoder")})

    model.load_state_dict({name.removeprefix("model."): value for name, value in descents.records[0][1].items()})
    model.zero_grad()
    pictures, masks = kept.batch["segmentation"]
    loss = F.cross_entropy(model(channels_last(pictures)).logits, masks)
    loss.backward()
    assert descents.losses[1] == pytest.approx(loss.item(), rel=1e-5)
    found = {name.removeprefix("model."): value for name, value in descents.records[1][2].items()}
    own = ("encoder", "decoder")
    assert_gradients(*({n: value for n, value in part.items() if n.startswith(own)} for part in (found, gradients(model))))


def test_classifier_learns_30_times_as_fast(trainer, table):
    recipe, watch = Cooperative(**JOINTSEG), Watch()
    run = trainer(3, callbacks=[watch], limit_val_batches=0)
    run.fit(recipe, datamodule=both(table))
    segmenter, classifier = zip(*watch.rates, strict=True)
    assert len(segmenter) == 6
    assert_poly(list(segmenter), 0.001, 6)
    assert_poly(list(classifier), 0.03, 6)
    assert all(optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9 for optimizer in run.optimizers)
    assert {"train/loss", "train/classification_loss"} <= set(watch.losses[0])


def test_classifier_lr_and_min_lr(trainer, table):
    watch = Watch()
    recipe = Cooperative(**JOINTSEG, optimizer=Optimizer(lr=0.01, min_lr=0.002, power=1.0), classifier_lr=4.0)
    run = trainer(2, callbacks=[watch], limit_val_batches=0)
    run.fit(recipe, datamodule=both(table))
    last = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
    assert watch.rates[0] == pytest.approx([0.01, 0.04]) and last == pytest.approx([0.002, 0.008])


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"epochs": -1, "max_steps": 4}, 2),
        ({"epochs": 10, "max_steps": 4}, 2),
        ({"epochs": 2, "max_steps": 6}, 3),
        ({"epochs": 1, "max_steps": 100}, 2),
    ],
    ids=str,
)
def test_cooperative_decays_over_the_batches_there_are(trainer, table, limits, batches):
    """Lightning counts two steps of every batch."""
    watch = Watch()
    trainer(**limits, callbacks=[watch], limit_val_batches=0).fit(Cooperative(**JOINTSEG), datamodule=both(table))
    assert len(watch.rates) == batches
    assert_poly([rates[0] for rates in watch.rates], 0.001, batches)


def test_cooperative_learns_both(trainer, table):
    watch = Watch()
    run = trainer(10, callbacks=[watch])
    recipe = Cooperative(**JOINTSEG, optimizer=Optimizer(lr=0.02, nesterov=True), classifier_lr=1.0)
    run.fit(recipe, datamodule=both(table, 2))
    for name in ("train/loss", "train/classification_loss"):
        losses = [step[name] for step in watch.losses]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert {"val/iou_macro", "val/top1_accuracy_micro", "val/binary_accuracy_micro"} <= set(run.callback_metrics)


def test_cooperative_takes_the_labelled_of_two_streams(trainer, table):
    watch = Watch()
    trainer(callbacks=[watch]).fit(Cooperative(**JOINTSEG), datamodule=both(table, labelled=0.5))
    assert len(watch.losses) == 1


# adversarial


NETWORKS = ("model", "discriminator")


def is_of(network, names):
    return {name for name in names if name.startswith(f"{network}.")}


@discriminators
def test_adversarial_phases(trainer, settings):
    """Discriminator, generator, from the second epoch on the generator again; who does not learn keeps its statistics too."""
    recipe, kept = Adversarial(**settings, unlabelled_from=1), Kept()
    descents = Descents(recipe, *NETWORKS)
    trainer(2, callbacks=[kept], limit_val_batches=0).fit(recipe, datamodule=scenes(4, labelled=0.5))
    assert len(descents.records) == 2 + 3
    learners = [descents.changed(index) for index in range(5)]
    assert learners == [{"discriminator"}, {"model"}, {"discriminator"}, {"model"}, {"model"}]
    for first, last in ((0, 1), (2, 4)):
        steps = descents.records[first : last + 1]
        # from the discriminator's descent to the end of the batch
        assert not is_of("discriminator", changed(steps[0][1], steps[-1][1]))
    before = kept.state
    assert not is_of("model", {name for name in changed(before, descents.records[0][1]) if not is_statistic(name)})
    assert all(parameter.requires_grad for parameter in recipe.discriminator.parameters()) and recipe.discriminator.training


@discriminators
def test_adversarial_gradients_by_hand(trainer, settings):
    recipe, kept = Adversarial(**settings, lambda_labelled=0.5, lambda_unlabelled=0.2), Kept()
    descents = Descents(recipe)
    run = trainer(max_steps=3, callbacks=[kept], limit_val_batches=0)
    data = scenes(4, labelled=0.5, augment=Augment(crop=(36, 40)))  # so that there is void
    run.fit(recipe, datamodule=data)
    (pictures, masks), (more, _) = kept.batch["labelled"], kept.batch["unlabelled"]
    pictures, more = channels_last(pictures), channels_last(more)
    assert (masks == VOID).any()
    generator = kept.network("pacnet", 7, **PACNET["options"])
    options = settings["discriminator_options"]
    discriminator = create_model(settings.get("discriminator", "fcn_discriminator"), 7, **options).train()

    def load(state):
        for name, network in (("model", generator), ("discriminator", discriminator)):
            network.load_state_dict({key.removeprefix(f"{name}."): state[key] for key in is_of(name, state)})
            network.zero_grad()

    def of(network, index):
        return {
            name.removeprefix(f"{network}."): value
            for name, value in descents.records[index][2].items()
            if name.startswith(f"{network}.")
        }

    def bce(logits, real, valid):
        valid = F.interpolate(valid[:, None].float(), logits.shape[2:], mode="nearest") > 0
        return F.binary_cross_entropy_with_logits(logits[valid], torch.full_like(logits[valid], real))

    valid = masks != VOID
    truth = F.one_hot(masks.where(valid, 0), 7).permute(0, 3, 1, 2) * valid[:, None]
    load(kept.state)
    step_seed()
    logits = F.interpolate(generator(pictures).logits, masks.shape[1:], mode="bilinear")
    predicted = logits.softmax(1) * valid[:, None]

    real, fake = (discriminator(pictures, classes.float()).logits for classes in (truth, predicted.detach()))
    loss = (bce(real, 1.0, valid) + bce(fake, 0.0, valid)) / 2
    assert descents.losses[0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    assert_gradients(of("discriminator", 0), gradients(discriminator))

    discriminator.load_state_dict(
        {
            key.removeprefix("discriminator."): value
            for key, value in descents.records[0][1].items()
            if key.startswith("discriminator.")
        }
    )
    discriminator.eval()
    adversarial = bce(discriminator(pictures, predicted).logits, 1.0, valid)
    loss = F.cross_entropy(logits, masks, ignore_index=VOID) + 0.5 * adversarial
    assert descents.losses[1] == pytest.approx(loss.item(), rel=1e-4)
    assert run.callback_metrics["train/adversarial_loss"].item() == pytest.approx(adversarial.item(), rel=1e-4)
    loss.backward()
    assert_gradients(of("model", 1), gradients(generator))
    state = torch.get_rng_state()

    load(descents.records[1][1])
    torch.set_rng_state(state)
    everywhere = torch.ones_like(more[:, 0], dtype=torch.bool)
    predicted = F.interpolate(generator(more).logits, more.shape[2:], mode="bilinear").softmax(1)
    loss = 0.2 * bce(discriminator(more, predicted).logits, 1.0, everywhere)
    assert descents.losses[2] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    assert_gradients(of("model", 2), gradients(generator))


def test_what_is_void_counts_in_no_loss():
    """Predictions there change nothing, neither there nor where the discriminator sees the place from."""
    discriminator = create_model("fcn_discriminator", 5, channels=4)
    pictures, logits, valid = torch.randn(2, 3, 32, 32), torch.randn(2, 5, 32, 32), torch.rand(2, 32, 32) > 0.3
    other = torch.where(valid[:, None], logits, torch.randn_like(logits))
    losses = []
    for value in (logits, other):
        classes = class_map(value, valid)
        assert (classes.movedim(1, 3)[~valid] == 0).all()
        assert torch.allclose(classes.sum(1)[valid], torch.ones(()))
        losses.append(judged(discriminator(pictures, classes).logits, False, valid))
    assert torch.equal(*losses)
    raw = discriminator(pictures, class_map(logits, valid)).logits
    losses = F.softplus(raw)[:, 0][valid]  # of "no label"
    torch.testing.assert_close(judged(raw, False, valid), losses.mean())
    torch.testing.assert_close(judged(raw, True, valid), (losses - raw[:, 0][valid]).mean())
    assert judged(raw, True, torch.zeros_like(valid)) == 0


def test_frozen():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), BatchNorm2d(1))
    with pytest.raises(KeyError), frozen(network):
        assert not network.training and not network[1].training and not any(p.requires_grad for p in network.parameters())
        raise KeyError
    assert network.training and network[1].training and all(p.requires_grad for p in network.parameters())


def test_adversarial_rates(trainer):
    watch = Watch()
    run = trainer(2, callbacks=[watch], limit_val_batches=0)
    run.fit(Adversarial(**FCN), datamodule=scenes(8, labelled=0.5))
    generator, discriminator = zip(*watch.rates, strict=True)
    assert len(generator) == 4
    assert_poly(list(generator), 0.007, 4)
    assert_poly(list(discriminator), 1e-4, 4)
    assert isinstance(run.optimizers[1], torch.optim.Adam) and run.optimizers[1].defaults["betas"] == (0.9, 0.99)
    losses = {f"train/{name}" for name in ("loss", "discriminator_loss", "adversarial_loss", "unlabelled_loss")}
    assert all(losses <= set(step) for step in watch.losses)


@pytest.mark.parametrize(
    ("limits", "settings", "batches"),
    [
        ({"epochs": -1, "max_steps": 6}, {"labelled": 0.5}, 2),
        ({"epochs": -1, "max_steps": 6}, {}, 3),
        ({"epochs": 2, "max_steps": 100}, {"labelled": 0.5}, 2),
    ],
    ids=str,
)
def test_adversarial_decays_over_the_batches_there_are(trainer, limits, settings, batches):
    """Lightning counts three steps of every batch, two where no unlabelled images are."""
    watch = Watch()
    trainer(**limits, callbacks=[watch], limit_val_batches=0).fit(Adversarial(**FCN), datamodule=scenes(**settings))
    assert len(watch.rates) == batches
    assert_poly([rates[0] for rates in watch.rates], 0.007, batches)


def test_adversarial_without_unlabelled_images(trainer):
    recipe, watch = Adversarial(**FCN), Watch()
    descents = Descents(recipe, *NETWORKS)
    run = trainer(callbacks=[watch])
    run.fit(recipe, datamodule=scenes())
    assert len(descents.records) == 4 and "train/unlabelled_loss" not in watch.losses[0]
    assert "val/iou_macro" in run.callback_metrics


# all of them


def recipes(table):
    return {
        "supervised": (Supervised(**PACNET), scenes()),
        "cooperative": (Cooperative(**JOINTSEG), both(table)),
        "adversarial": (Adversarial(**FCN), scenes(labelled=0.5)),
        "patchgan": (Adversarial(**PATCHGAN), scenes(labelled=0.5, normalize="per_image", resize=(24, 40))),
    }


names = pytest.mark.parametrize("name", ["supervised", "cooperative", "adversarial", "patchgan"])


@names
def test_checkpoints_rebuild_the_network(trainer, table, tmp_path, name):
    recipe, data = recipes(table)[name]
    run, path = trainer(), tmp_path / "last.ckpt"
    run.fit(recipe, datamodule=data)
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)
    model, info = load_network(path)
    assert not changed(tensors(recipe.model), tensors(model)) and not model.training
    pictures = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(model(pictures).logits, recipe.model.eval()(pictures).logits)
    assert info["classes"] == list(data.classes) and len(info["palette"]) == 7
    assert (info["normalize"], info["resize"]) == (("per_image", [24, 40]) if name == "patchgan" else ("imagenet", None))
    assert info.get("image_classes") == (["0", "1", "2"] if name == "cooperative" else None)


@pytest.mark.parametrize("name", ["supervised", "cooperative", "adversarial", "patchgan", "classification"])
def test_recipes_from_checkpoints(trainer, table, tmp_path, name):
    """With the settings that they had, they predict and are evaluated as the trained ones, and train on."""
    optimizer = Optimizer("adam", 0.02)
    trained = recipes(table) | {
        "supervised": (Supervised(**PACNET, optimizer=optimizer, freeze_batch_norm=True), scenes()),
        "classification": (Classification("resnettiny", optimizer=optimizer), images(table)),
    }
    recipe, data = trained[name]
    run, path, pictures = trainer(), tmp_path / "last.ckpt", torch.randn(3, 3, 32, 48)
    run.fit(recipe, datamodule=data)
    run.save_checkpoint(path)
    loaded = type(recipe).load_from_checkpoint(path)
    assert not changed(tensors(recipe), tensors(loaded)) and loaded.optimizer_settings() == recipe.optimizer_settings()
    assert loaded.hparams.keys() == recipe.hparams.keys()
    if name == "supervised":
        assert loaded.freeze_batch_norm and loaded.optimizer == optimizer
    recipe.eval(), loaded.eval()
    with torch.no_grad():
        expected = recipe(pictures)
        outputs = [output if isinstance(output, torch.Tensor) else output.logits for output in (loaded(pictures), expected)]
    assert torch.equal(*outputs)
    classes = outputs[1].argmax(1) if name == "classification" else recipe.model.predict(pictures)
    assert torch.equal(torch.cat(trainer().predict(loaded, torch.utils.data.DataLoader(pictures, 2))), classes)

    figures = []
    for each in (recipe, loaded):
        again = trainer()
        again.validate(each, datamodule=data, verbose=False)
        figures.append({key: value.item() for key, value in again.callback_metrics.items()})
    assert figures[0] == pytest.approx(figures[1], nan_ok=True) and "val/loss" in figures[0]
    trainer().fit(loaded, datamodule=data)


def test_predictions_of_a_data_module(trainer):
    recipe, data = Supervised(**PACNET), scenes()
    trainer().fit(recipe, datamodule=data)
    recipe.predictor_options = {"scales": (0.5, 1.0), "flip": True}  # then it is given bytes
    predicted = torch.cat(trainer().predict(recipe, datamodule=data))
    predictor = Predictor(recipe.model.eval(), **recipe.predictor_options)
    assert torch.equal(predicted, torch.stack([predictor(image).long() for image, _ in data.sets["predict"]]))


@pytest.mark.parametrize("split", ["val", "test"])
def test_figures_of_a_predictor(trainer, split):
    """Windows, scales and flips: what is scored is what `Predictor` makes of the bytes."""
    options = {"window": (16, 24), "overlap": 0.25, "scales": (0.5, 1.0), "flip": True}
    recipe, data = Supervised(**PACNET), scenes(normalize="per_image")
    recipe.predictor_options = options
    run = trainer()
    getattr(run, {"val": "validate", "test": "test"}[split])(recipe, datamodule=data, verbose=False)
    predictor, metrics = Predictor(recipe.model.eval(), "per_image", **options), SegmentationMetrics(7)
    for image, mask in data.sets[split]:
        metrics.update(predictor(image)[None], mask[None])
    expected = {f"{split}/{name}": value.item() for name, value in metrics.compute().items()}
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    assert found == pytest.approx(expected, nan_ok=True)  # and no loss, which is of the network's own logits


def test_what_loading_a_recipe_takes(tmp_path):
    with pytest.raises(ValueError, match="strict and weights_only must be True; got True and False"):
        Supervised.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    with pytest.raises(FileNotFoundError, match=r"checkpoint must be a file; there is none at .*last\.ckpt"):
        Supervised.load_from_checkpoint(tmp_path / "last.ckpt")


def test_a_recipe_without_a_network(trainer):
    with pytest.raises(RuntimeError, match="has no network yet: fit makes it, or Supervised"):
        Supervised()(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"Supervised needs a data module beside it, which says the classes: trainer.fit\("):
        trainer().fit(Supervised(), torch.utils.data.DataLoader(torch.randn(2, 3, 32, 32)))


def test_a_recipe_keeps_to_its_classes(trainer, table):
    recipe = Supervised(**PACNET)
    trainer().fit(recipe, datamodule=scenes())
    other = scenes()
    other.description = lambda: SegmentationData.description(other) | {"normalize": "none", "resize": [8, 8]}
    with pytest.warns(UserWarning, match="network was trained with normalize 'imagenet'; the data has 'none'"):
        trainer().validate(recipe, datamodule=other, verbose=False)
    other.setup = lambda stage: (SegmentationData.setup(other, stage), setattr(other, "num_classes", 5))
    with pytest.raises(ValueError, match="the recipe's network has 7 classes; the data has 5: background, disc, "):
        trainer().validate(recipe, datamodule=other, verbose=False)


class Void(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.randn(3, 32, 32), torch.full((32, 32), VOID)


def test_nothing_scored(trainer):
    """But for the few batches of Lightning's check before training."""
    recipe, data, nothing = Supervised(**PACNET), scenes(), torch.utils.data.DataLoader(Void())
    data.val_dataloader = lambda: nothing
    for validate in (trainer().validate, trainer(num_sanity_val_steps=1).fit):
        with pytest.raises(ValueError, match="nothing was scored: every pixel of the masks that were looked at is void"):
            validate(recipe, datamodule=data)
    assert recipe.trainer.global_step == 2  # it had begun


def test_weights_that_are_no_numbers_after_the_last_step(trainer):
    class Diverge(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                for parameter in module.parameters():
                    parameter.data.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="val/loss is nan: try a smaller learning rate"):
        trainer(callbacks=[Diverge()]).fit(Supervised(**PACNET), datamodule=scenes())


def test_classifiers_of_many_classes(trainer, table, tmp_path):
    """More than masks can have."""
    (tmp_path / "trainLabels.csv").write_text("image,level\n" + "".join(f"{index},{30 * index}\n" for index in range(12)))
    recipe, data, run = Classification("resnettiny"), images(table), trainer()
    run.fit(recipe, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classification.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded(torch.randn(2, 3, 32, 32)).shape == (2, 331)


def test_a_loaded_recipe_that_trains_on_other_data(trainer, tmp_path):
    """Its checkpoints say how these images were read."""
    recipe, run = Supervised(**PACNET), trainer()
    trainer().fit(recipe, datamodule=scenes(normalize="none", resize=(24, 24)))
    with pytest.warns(UserWarning, match="was trained with normalize 'none'; the data has 'imagenet'"):
        run.fit(recipe, datamodule=scenes(resize=(40, 40)))
    run.save_checkpoint(tmp_path / "last.ckpt")
    _, info = load_network(tmp_path / "last.ckpt")
    assert (info["normalize"], info["resize"]) == ("imagenet", [40, 40])


def test_names_that_no_checkpoint_may_hold(trainer):
    data = scenes()
    data.description = lambda: SegmentationData.description(data) | {"classes": ["a\tb", *"cdefgh"]}
    with pytest.raises(ValueError, match=r"classes and model\.options must be plain values, and text without control"):
        trainer().fit(Supervised(**PACNET), datamodule=data)


def test_data_of_others(trainer):
    with pytest.raises(ValueError, match="Supervised needs images with masks, as SegmentationData; got LightningDataModule"):
        trainer().fit(Supervised(**PACNET), datamodule=LightningDataModule())


def test_class_weights_of_a_checkpoint(trainer, tmp_path):
    """Which an evaluation does not count again, so that val/loss stays the training loss."""
    recipe, data = Supervised(**PACNET, loss_options={"class_weight": "median_frequency"}), scenes()
    run, path = trainer(), tmp_path / "last.ckpt"
    run.fit(recipe, datamodule=data)
    run.save_checkpoint(path)
    other, again = Supervised(**PACNET, loss_options={"class_weight": "median_frequency"}), trainer()
    again.validate(other, datamodule=scenes(), ckpt_path=path, verbose=False, weights_only=True)
    assert other.criterion.class_weight.tolist() == pytest.approx(data.median_frequency())
    assert again.callback_metrics["val/loss"] == pytest.approx(run.callback_metrics["val/loss"].item())


@names
def test_the_same_seed_trains_the_same_network(trainer, table, name):
    """Whatever random numbers were drawn before the first step."""
    ends = []
    for drawn in (0, 5):
        torch.manual_seed(1)
        recipe, data = recipes(table)[name]
        data.trainer = recipe.trainer = run = trainer(limit_val_batches=0)
        run.datamodule = data
        data.setup("fit")
        recipe.setup("fit")
        torch.rand(drawn)
        run.fit(recipe, datamodule=data)
        ends.append(tensors(recipe))
    assert not changed(*ends)


def test_workers_train_the_same_network(trainer):
    """Over epochs, each of which goes on where the last one ended."""
    ends = []
    for workers in (0, 1):
        torch.manual_seed(1)
        data = scenes(5, workers=workers, augment=Augment(scale=(0.5, 2.0, 0.25), crop=(32, 32)))
        recipe, kept = Supervised(**PACNET), Kept()
        trainer(3, callbacks=[kept], limit_val_batches=0).fit(recipe, datamodule=data)
        ends.append((kept.state, tensors(recipe)))
    assert not changed(ends[0][0], ends[1][0]) and not changed(ends[0][1], ends[1][1])


def test_recipes_take_outputs_as_models_give_them():
    """A tuple of auxiliary logits, as DeepLab v2's of several scales."""
    model = create_model("deeplabv2", 7, multi_scale=True, **RESNET)
    output = model(torch.randn(2, 3, 32, 32))
    assert isinstance(output.aux_logits, tuple)
    labels = torch.randint(0, 7, (2, 32, 32))
    loss = SegmentationLoss(aux_weight=1.0)(output, labels)
    parts = [SegmentationLoss()(Output(logits), labels) for logits in (output.logits, *output.aux_logits)]
    torch.testing.assert_close(loss, sum(parts))
