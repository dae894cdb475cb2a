"""Runs: what a resumed run, one killed by SIGKILL, and one on two processes come to is what an undisturbed one comes to, bit by bit where that can be."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segops.models import create_model

from segops.train.cli import main
from segops.train.files import write_whole
from segops.train.runs import WholeCheckpoints

from .processes import on_two_ranks, start

TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=3",
    "--trainer.num_sanity_val_steps=0",
    "--data=SegmentationData",
    '--data.options={"train": 10, "val": 3, "size": [32, 48]}',
    "--data.batch_size=2",
    "--data.augment.scale=[0.5, 2.0, 0.25]",
    "--data.augment.crop=[32, 32]",
]
# Dropout and momentum; batch normalisation.
UNET = ["--model=Supervised", "--model.model=unet", '--model.options={"channels": 4}', "--model.optimizer.lr=0.01"]
PACNET = ["--model=Supervised", "--model.model=pacnet", "--model.loss=bal"]
PACNET += ['--model.options={"backbone": "test_resnet", "channels": 16}']
ONE_EPOCH = [*UNET, "--trainer.max_epochs=1"]


def command(folder, *arguments):
    return ["fit", f"--trainer.default_root_dir={folder}", *TINY, *arguments]


def fit(folder, *arguments):
    main(command(folder, *arguments))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(arguments) -> the folder of a run that nothing disturbed; trained once, and only to be read."""
    folders = {}

    def run(*arguments):
        if arguments not in folders:
            folders[arguments] = tmp_path_factory.mktemp("undisturbed")
            fit(folders[arguments], *arguments)
        return folders[arguments]

    return run


def load(folder, name="last"):
    return torch.load(Path(folder, "checkpoints", f"{name}.ckpt"), weights_only=True)


def assert_same(one, other, path=""):
    """Tensors bit by bit, and everything else, but for times, paths, and what Lightning saves and does not load."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if key not in (
                "seconds",
                "current_score",
                "dirpath",
                "best_model_path",
                "last_model_path",
                "best_k_models",
                "kth_best_model_path",
            ):
                assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other or (one != one and other != other), path


def assert_same_run(one, other):
    one, other = load(one), load(other)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(one[part], other[part], part)
    best = [next(state for name, state in run["callbacks"].items() if "Checkpoint" in name) for run in (one, other)]
    assert_same(best[0], best[1], "best")


def assert_same_best(one, other):
    assert_same(load(one, "best")["state_dict"], load(other, "best")["state_dict"])


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Makes training end abruptly before step number `steps`."""

    def at(steps):
        from segops.train import recipes

        original = recipes.Recipe.on_train_batch_start

        def stop(self, batch, batch_idx):
            original(self, batch, batch_idx)
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.processed == steps:
                raise Interrupted

        monkeypatch.setattr(recipes.Recipe, "on_train_batch_start", stop)
        return monkeypatch

    return at


@pytest.mark.parametrize(
    ("model", "every"),
    [(UNET, None), (UNET, 1), (UNET, 3), (PACNET, 1)]
    + [pytest.param(PACNET, every, marks=pytest.mark.thorough) for every in (None, 3)],
)
def test_resumed(tmp_path, undisturbed, model, every, interrupt):
    """Interrupted in the midst of the second epoch, and resumed from its beginning, or from the last or the next to last step."""
    whole = undisturbed(*model)
    patched = interrupt(8)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", *model, *([] if every is None else [f"--checkpoint_every={every}"]))
    patched.undo()
    assert load(tmp_path / "parts")["global_step"] == {None: 5, 1: 8, 3: 6}[every]
    fit(tmp_path / "parts", *model, "--ckpt_path=last")
    assert_same_run(whole, tmp_path / "parts")
    epochs = [
        [{name: value for name, value in epoch.items() if "val" in name} for epoch in results(folder)["epochs"]]
        for folder in (whole, tmp_path / "parts")
    ]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 3
    assert_same_best(whole, tmp_path / "parts")


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory):
    """Images with masks, and a table of classes, as small files."""
    folder = tmp_path_factory.mktemp("nuclei")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rows = ["id,modality,split"]
    for index in range(14):
        split = "train" if index < 10 else "val"
        pixels = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        Image.fromarray((pixels[..., 0] > 127).astype(np.uint8)).save(folder / "masks" / f"{index}.png")
        rows.append(f"{index},{'dark' if index % 2 else 'bright'},{split}")
        with (folder / f"{split}.txt").open("a") as file:
            file.write(f"{index}\n")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return folder


def cooperative(data):
    table = {"root": str(data), "csv": "index.csv", "images": "images", "image_column": "id", "class_column": "modality"}
    table |= {"split_column": "split", "batch_size": 4, "random_classes": 0.5}
    segmentation = {"dataset": "folder", "root": str(data), "batch_size": 2, "labelled": 0.7}
    return [
        "--model=Cooperative",
        '--model.options={"widths": [4, 8, 8, 16], "blocks": 1}',
        "--data=CooperativeData",
        f"--data.segmentation={json.dumps({'class_path': 'SegmentationData', 'init_args': segmentation})}",
        f"--data.classification={json.dumps({'class_path': 'ClassificationData', 'init_args': table})}",
    ]


def adversarial(data):
    return [
        "--model=Adversarial",
        "--model.model=unet",
        '--model.options={"channels": 4}',
        "--model.discriminator=patchgan",
        '--model.discriminator_options={"channels": 4, "receptive_field": 16}',
        "--model.discriminator_optimizer.lr=0.01",
        "--model.unlabelled_from=1",
        "--data=SegmentationData",
        "--data.dataset=folder",
        f"--data.root={data}",
        "--data.labelled=0.6",
        "--data.batch_size=2",
    ]


def train(folder, *arguments):
    """As `command`, on other data, for two epochs."""
    return ["fit", f"--trainer.default_root_dir={folder}", *TINY[:5], "--trainer.max_epochs=2", *arguments]


@pytest.fixture(scope="module", params=[cooperative, adversarial])
def recipe(request, nuclei, tmp_path_factory):
    """The arguments of a recipe of several optimizers, and the folder of an undisturbed run."""
    folder, arguments = tmp_path_factory.mktemp("whole"), request.param(nuclei)
    main(train(folder, *arguments))
    return arguments, folder


@pytest.mark.parametrize("every", [pytest.param(None, marks=pytest.mark.thorough), 1])
def test_recipes_of_several_optimizers_resume(tmp_path, recipe, every, interrupt):
    arguments, whole = recipe
    patched = interrupt(5)
    with pytest.raises(Interrupted):
        main(train(tmp_path, *arguments, *([] if every is None else [f"--checkpoint_every={every}"])))
    patched.undo()
    main(train(tmp_path, *arguments, "--ckpt_path=last"))
    assert_same_run(whole, tmp_path)


def test_recipes_of_several_optimizers_on_two_processes(tmp_path, nuclei):
    recipes = {tmp_path / recipe.__name__: recipe(nuclei) for recipe in (cooperative, adversarial)}
    on_two_ranks(tmp_path, *(train(folder, *arguments, "--trainer.devices=2") for folder, arguments in recipes.items()))
    assert [len(results(folder)["epochs"]) for folder in recipes] == [2, 2]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("every", [5, 10])
def test_resumed_from_the_last_step_of_an_epoch(tmp_path, undisturbed, every, interrupt):
    whole = undisturbed(*UNET)
    patched = interrupt(10)
    with pytest.raises(Interrupted):
        fit(tmp_path, *UNET, f"--checkpoint_every={every}")
    patched.undo()
    fit(tmp_path, *UNET, "--ckpt_path=last")
    assert_same_run(whole, tmp_path)


def test_killed_and_resumed(tmp_path, undisturbed):
    """SIGKILL somewhere in the second epoch or later."""
    parts = tmp_path / "parts"
    run = start(tmp_path / "log.txt", [command(parts, *UNET, "--checkpoint_every=1")])
    while not (parts / "results.json").exists():
        assert run.is_alive(), (tmp_path / "log.txt").read_text()
        time.sleep(0.005)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert load(parts)["global_step"] < 15
    fit(parts, *UNET, "--ckpt_path=last")
    assert_same_run(undisturbed(*UNET), parts)


# No dropout, and batch normalisation that keeps its statistics: what two processes can do as one does.
FROZEN = [*PACNET, "--model.freeze_batch_norm=true", "--data.options.val=5", "--data.eval_batch_size=2"]


@pytest.mark.parametrize("void", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["full", "void"])
def test_two_processes_are_as_one(tmp_path, void):
    """The same loss, weights and figures, although the ranks' shares of the valid pixels and of the validation images differ."""
    # Images that augmentation pads have fewer valid pixels.
    size = ["--data.augment.crop=[48, 48]"] if void else []
    fit(tmp_path / "one", *FROZEN, *size, "--data.batch_size=4")
    two = command(tmp_path / "two", *FROZEN, *size, "--data.batch_size=4", "--trainer.devices=2")
    run = subprocess.run([sys.executable, "-m", "segops", *two], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (load(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value.double(), two[name].double(), rtol=1e-4, atol=1e-5), name
    epochs = [results(tmp_path / name)["epochs"] for name in ("one", "two")]
    for ours, theirs in zip(*epochs, strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=2e-3), name


@pytest.fixture
def trained(tmp_path, undisturbed):
    """A run's folder, which tests may spoil."""
    return shutil.copytree(undisturbed(*ONE_EPOCH), tmp_path / "trained")


def test_a_run_is_not_written_over(trained, tmp_path):
    before = (trained / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(f"{trained} holds a run already: go on with --ckpt_path last")):
        fit(trained, *ONE_EPOCH)
    assert (trained / "checkpoints" / "last.ckpt").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"--ckpt_path last: there is no .*last\.ckpt"):
        fit(tmp_path / "other", *UNET, "--ckpt_path=last")


def test_a_damaged_checkpoint_is_named(trained):
    path = trained / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a checkpoint")):
        fit(trained, *UNET, "--ckpt_path=last")


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    plugin, path = WholeCheckpoints(), tmp_path / "last.ckpt"
    whole = {"pytorch-lightning_version": "2.6.6", "state_dict": {}, "segops": {}}
    plugin.save_checkpoint(whole, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=f"No space left on device; what was there before is whole: '{path}'"):
        plugin.save_checkpoint(whole | {"step": 2}, path)
    assert plugin.load_checkpoint(path) == whole and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_written_replaces_only_when_whole(tmp_path):
    path = tmp_path / "folder" / "results.json"
    write_whole(path, lambda file: file.write(b"one"))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, lambda file: file.write(b"two") and (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == b"one" and len(list(path.parent.iterdir())) == 1


def test_what_is_written_follows_no_link(tmp_path):
    """Which a folder from elsewhere may hold."""
    other, path = tmp_path / "other", tmp_path / "run/results.json"
    other.write_text("precious")
    path.parent.mkdir()
    for name in ("results.json", "results.json.part"):
        (path.parent / name).symlink_to(other)
    write_whole(path, lambda file: file.write(b"one"))
    assert other.read_text() == "precious" and path.read_bytes() == b"one" and not path.is_symlink()


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_of_a_checkpoint(undisturbed, subcommand, capsys):
    folder = undisturbed(*ONE_EPOCH)
    figures = results(folder)["epochs"][-1]
    capsys.readouterr()
    main([subcommand, *TINY, *UNET, f"--ckpt_path={folder}/checkpoints/last.ckpt", "--data.test_split=val"])
    printed = capsys.readouterr().out
    assert f"{figures['val/iou_macro']:.4f}" in printed and "macro: mean over the classes that occur" in printed


def best_of(folder):
    state = next(state for name, state in load(folder)["callbacks"].items() if name.startswith("ModelCheckpoint"))
    return state["best_model_score"].item(), load(folder, "best")["epoch"]


def test_a_moved_run_keeps_its_best(tmp_path):
    """Also where the next epochs are worse; and where best.ckpt is gone, there is none yet."""
    fit(tmp_path / "a", *UNET, "--trainer.max_epochs=2")
    checkpoint = load(tmp_path / "a")
    for state in (state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint")):
        state |= {key: torch.tensor(2.0) for key in ("best_model_score", "kth_value")}  # not to be surpassed
    torch.save(checkpoint, tmp_path / "a/checkpoints/last.ckpt")
    (tmp_path / "a").rename(tmp_path / "b")
    fit(tmp_path / "b", *UNET, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert load(tmp_path / "b")["epoch"] == 2 and best_of(tmp_path / "b")[0] == 2 and best_of(tmp_path / "b")[1] < 2
    (tmp_path / "b/checkpoints/best.ckpt").unlink()
    fit(tmp_path / "b", *UNET, "--trainer.max_epochs=4", "--ckpt_path=last")
    assert best_of(tmp_path / "b")[0] < 1 and best_of(tmp_path / "b")[1] == 3


def test_weights_to_begin_with_are_not_needed_again(tmp_path):
    """Not to resume, nor to evaluate."""
    first = tmp_path / "first.pt"
    torch.save(create_model("unet", 7, channels=4).state_dict(), first)
    begun = [*TINY, "--model=Supervised", "--model.model=unet", f'--model.options={{"channels": 4, "checkpoint": "{first}"}}']
    main(["fit", f"--trainer.default_root_dir={tmp_path}", *begun, "--trainer.max_epochs=1"])
    first.unlink()
    main(["validate", *begun, f"--ckpt_path={tmp_path}/checkpoints/last.ckpt"])
    main(["fit", f"--trainer.default_root_dir={tmp_path}", *begun, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert load(tmp_path)["epoch"] == 1


def test_auto_begins_or_goes_on(tmp_path):
    fit(tmp_path, *ONE_EPOCH, "--ckpt_path=auto")
    fit(tmp_path, *UNET, "--trainer.max_epochs=2", "--ckpt_path=auto")
    assert [epoch["step"] for epoch in results(tmp_path)["epochs"]] == [5, 10]


def test_a_resumed_run_says_what_is_no_longer_as_it_was(trained, capsys):
    capsys.readouterr()
    fit(trained, *ONE_EPOCH, "--model.loss=bal", "--ckpt_path=last")
    assert "resumed with another model.init_args.loss: 'bal', before 'ce'" in capsys.readouterr().out
    assert "ckpt_path: null" in (trained / "config.yaml").read_text()


def test_results_are_json(tmp_path):
    """A figure of nothing is null."""
    fit(tmp_path, *ONE_EPOCH, '--data.options={"train": 4, "val": 1, "size": [16, 24]}')

    def refuse(name):
        raise AssertionError(name)

    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert None in written["per_class"]["iou"]


def test_images_without_masks_are_not_left_out_silently(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="unlabelled must be None: Supervised takes no images without masks; got "):
        fit(tmp_path / "run", *UNET, f"--data.unlabelled={tmp_path}")
