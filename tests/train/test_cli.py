"""The command line as a user meets it: what is wrong comes in one line, and nothing is lost by it."""

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import segops.__main__
from segops.train import SegmentationMetrics, cli, recipes
from segops.train.datasets import Folder
from segops.train.files import write_whole
from segops.train.runs import locked

from .processes import CONTEXT
from .test_runs import ONE_EPOCH, TINY, UNET, load, results


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a command changes in its process."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.delenv("SEGOPS_TRACEBACK", raising=False)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line. Returns its exit status or the line it ends with, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["segops", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            segops.__main__.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr()

    return run


@pytest.fixture
def fails(command):
    """Runs a command that must end in one line, which it returns without its beginning."""

    def run(*arguments):
        status, _ = command(*arguments)
        assert isinstance(status, str) and status.startswith(f"segops {arguments[0]}: "), status
        assert status.isprintable() and "Namespace" not in status and "<class" not in status
        return status.removeprefix(f"segops {arguments[0]}: ")

    return run


def tiny(folder, *arguments):
    return ["fit", f"--trainer.default_root_dir={folder}", *TINY, *ONE_EPOCH, *arguments]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    cli.main(tiny(folder))
    return folder


def contents(folder):
    """Of a run's files, but for the lock and the events that TensorBoard adds to."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock" and "events" not in path.name]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--trainer.max_epochs=abc"], "--trainer.max_epochs: needs int; got abc"),
        (["--trainer.precision=12"], "--trainer.precision: needs 64, 32, 16; .*; got 12"),
        (["--model.optinos=3"], "--model: Option 'optinos' is not accepted"),
        (["--model.optimizer.lr=abc"], "--model.optimizer.lr: needs float; got abc"),
        (["--model.optimizer.lr=-1"], "lr must be positive; got -1.0"),
        (["--model.optimizer.name=sdg"], "--model.optimizer.name: needs 'sgd', 'adam', 'adamw'; got sdg"),
        (["--model.loss=nonsense"], "loss must be one of 'ce', 'bal', 'focal'; got 'nonsense'"),
        (["--model.loss_options=3"], "--model.loss_options: needs dict; got 3"),
        (["--model.loss_options={gama: 3}"], "loss 'ce' has no option 'gama': it has .*"),
        (["--model.options={chanels: 4}"], "'unet' has no option 'chanels'; it has .*channels.*"),
        (["--model.model=unett"], "name must be a known model; got 'unett'; did you mean 'unet'.*"),
        (["--data.batch_size=0"], "batch_size must be an integer, at least 1; got 0"),
        (["--data.dataset=foo"], "--data.dataset: needs 'camvid', 'cityscapes', 'folder', 'synthetic', 'voc'; got foo"),
        (["--data.options={trian: 3}"], "options of dataset 'synthetic' are train, val, size; got 'trian'"),
        (["--data.augment.crop=[0, 3]"], "crop must be two positive .*"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs must be above 0, or nothing is trained; got 0"),
        (["--trainer.max_steps=0"], "trainer.max_steps must be above 0, or nothing is trained; got 0"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches must be above 0, .*; got 0"),
        (
            ["--trainer.check_val_every_n_epoch=0"],
            "trainer.check_val_every_n_epoch must be above 0, or nothing is validated; got 0",
        ),
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval must be above 0, or nothing is validated; got 0"),
        (["--trainer.max_time=00:00:00:00"], "nothing was trained: trainer.max_time allows no step"),
        (["--checkpoint_every=0"], "--checkpoint_every must be at least 1; got 0"),
        (["--seed_everything=-3"], "--seed_everything must be at least 0, at most 4294967295; got -3"),
        (["--window", "0", "8"], "window must be positive.*"),
        (["--overlap=2"], r"overlap must be in \[0, 1\); got 2.0"),
        (["--scales", "a"], "--scales: needs float; got a"),
        (["--crf-settings", "deeplab"], "--crf_settings: needs 'deeplabv1_largefov', .*; got deeplab"),
        (["--trainer.default_root_dir=s3://b"], "--trainer.default_root_dir must be a local folder; got s3://b"),
        (["--nonsense=3"], "unrecognized arguments: --nonsense=3"),
        (["--optimizer=SGD"], "unrecognized arguments: --optimizer=SGD"),
        (["--ckpt_path=last"], "--ckpt_path last: there is no file .*last.ckpt"),
        (["--ckpt_path=nowhere.ckpt"], "--ckpt_path nowhere.ckpt: there is no file nowhere.ckpt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(fails, tmp_path, arguments, line):
    assert re.fullmatch(line, fails(*tiny(tmp_path), *arguments))
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(fails, tmp_path):
    line = fails(*tiny(tmp_path), "--trainer.accelerator=gpu", "--trainer.devices=2")
    assert line.startswith("trainer cannot run as asked for, with accelerator 'gpu', devices '2', strategy 'auto': ")


def test_without_arguments(fails):
    assert re.fullmatch("needs --config NAME or FILE, .*; NAME is one of .*camvid_pacnet.*, demo, .*", fails("fit"))


# Ten lists, each ten times the one before.
BOMB = b"a0: &a0 [1, 2]\n" + b"".join(
    f"a{index}: &a{index} [{', '.join(10 * [f'*a{index - 1}'])}]\n".encode() for index in range(1, 10)
)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"trainer: [1, 2", "config.yaml must be YAML: while parsing .*"),
        (b"\xff\xfe\x00", "config.yaml must be YAML: .*"),
        (b"[" * 5000, "config.yaml must be YAML: maximum recursion depth .*"),
        (b"hello", "config.yaml must be a mapping of settings; it holds 'hello'"),
        (b"", "config.yaml must be a mapping of settings; it holds 'None'"),
        (BOMB, "config.yaml must be a configuration: its anchors repeat more than one holds"),
        (b"trainer: {max_epochs: abc}", "--trainer.max_epochs: needs int; got abc"),
        (b"model: {class_path: Supervised, init_args: {optimizer: {lr: abc}}}", "--model.optimizer.lr: needs float; got abc"),
    ],
)
def test_configurations(fails, tmp_path, monkeypatch, content, line):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(content)
    assert re.fullmatch(f"(--config )?{line}", fails("fit", "--config", "config.yaml"))


def test_version_and_help(command):
    assert command("--version")[1].out == f"segops {segops.__version__}\n"
    text = " ".join(command("fit", "--help")[1].out.split())
    assert "--optimizer" not in text and "--lr_scheduler" not in text and "--weights_only" not in text
    assert re.search(r"--ckpt_path .* `auto` from the last", text)


def test_traceback_where_it_is_asked_for(command, monkeypatch, tmp_path):
    monkeypatch.setenv("SEGOPS_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"max_epochs must be above 0"):
        command(*tiny(tmp_path, "--trainer.max_epochs=0"))


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_without_a_checkpoint(fails, tmp_path, subcommand):
    """An untrained network is never scored."""
    arguments = [subcommand, *tiny(tmp_path)[1:], "--data.test_split=val"]
    assert fails(*arguments) == "--ckpt_path must be a checkpoint of segops fit; got none"
    for name, file in (("last", "last"), ("auto", "last"), ("best", "best")):
        line = f"--ckpt_path {name}: there is no file {tmp_path}/checkpoints/{file}.ckpt"
        assert fails(*arguments, f"--ckpt_path={name}") == line


@pytest.mark.parametrize("name", ["last", "best"])
def test_evaluation_of_the_folder_s_checkpoint(command, trained, name):
    status, printed = command("validate", *tiny(trained)[1:], f"--ckpt_path={name}")
    figures = results(trained)["epochs"][-1]
    assert status == 0 and f"{figures['val/iou_macro']:.4f}" in printed.out and f"loss {figures['val/loss']:.4f}" in printed.out


def foreign(folder):
    """Files that are no checkpoint of this run, and what is said of them."""
    (folder / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {"weight": torch.ones(3)}}, folder / "foreign.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}, "segops": {"model": 3}}, folder / "odd.ckpt")
    cut = (folder / "checkpoints/last.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(cut[: len(cut) // 2])
    needs = "is no checkpoint of segops fit: it needs the entries"
    return {"text": "it is text", "foreign": needs, "list": needs, "odd": needs, "cut": "cut short, damaged"}


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_files_that_are_no_checkpoint(fails, trained, tmp_path, subcommand):
    cli.main(tiny(tmp_path))
    lines = foreign(tmp_path)
    before = contents(tmp_path)
    for name, line in lines.items():
        file = tmp_path / f"{name}.ckpt"
        said = fails(subcommand, *tiny(tmp_path)[1:], f"--ckpt_path={file}", "--trainer.max_epochs=2", "--model.loss=bal")
        assert str(file) in said and line in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data=FOLDER"], ".*last.ckpt has 7 classes; the data has 3: 0, 1, 2"),
        (["--model.options.channels=2"], ".*last.ckpt does not fit Supervised: .* has shape .*"),
        (
            ["--model.model=segnet_basic", "--model.options={}"],
            ".*last.ckpt has the weights of 'unet'; model is 'segnet_basic'",
        ),
        (
            ["--model.optimizer.lr=0.3"],
            "a resumed run keeps its optimizer: lr is 0.3, in .*last.ckpt 0.01; for others begin .*",
        ),
        (["--model.optimizer.name=adam"], "a resumed run keeps its optimizer: name is 'adam', in .*last.ckpt 'sgd'; .*"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_resume_that_fails_changes_nothing(fails, tmp_path, arguments, line):
    run = tmp_path / "run"
    cli.main(tiny(run))
    before = contents(run)
    if arguments == ["--data=FOLDER"]:
        data = folder_of_images(tmp_path / "data", 3)
        arguments = ["--data.dataset=folder", f"--data.root={data}", "--data.options={num_classes: 3}"]
    assert re.fullmatch(line, fails(*tiny(run), "--trainer.max_epochs=2", "--ckpt_path=last", *arguments))
    assert contents(run) == before


def test_a_resume_with_another_schedule(command, tmp_path):
    """Which comes into force, as the optimizer's own settings do not."""
    cli.main(tiny(tmp_path))
    status, printed = command(*tiny(tmp_path), "--trainer.max_epochs=2", "--model.optimizer.power=2", "--ckpt_path=last")
    assert status == 0 and "resumed with another model.init_args.optimizer.power: 2.0, before 0.9" in printed.out


@pytest.mark.parametrize("arguments", [[], ["--crf", "--model.freeze_batch_norm=true"]], ids=["by default", "asked for"])
def test_a_resume_of_a_run_that_is_older_than_a_setting(command, tmp_path, arguments):
    """It was trained with what is the default now: only another is said."""
    cli.main(tiny(tmp_path))
    path = tmp_path / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["crf"], config["crf_settings"], config["flip"], config["model"]["init_args"]["freeze_batch_norm"]
    path.write_text(yaml.safe_dump(config))
    status, printed = command(*tiny(tmp_path), "--trainer.max_epochs=2", "--ckpt_path=last", *arguments)
    said = [line for line in printed.out.splitlines() if line.startswith("resumed")]
    others = ["crf: True, before False", "model.init_args.freeze_batch_norm: True, before False"] if arguments else []
    assert status == 0
    assert said == [f"resumed with another {each}" for each in (*others, "trainer.max_epochs: 2, before 1")]


def test_a_resume_writes_its_configuration(command, tmp_path):
    cli.main(tiny(tmp_path))
    _, printed = command(*tiny(tmp_path), "--trainer.max_epochs=2", "--model.loss=focal", "--ckpt_path=last")
    assert "resumed with another model.init_args.loss: 'focal', before 'ce'" in printed.out
    config = (tmp_path / "config.yaml").read_text()
    assert "loss: focal" in config and "max_epochs: 2" in config and "ckpt_path: null" in config


def test_nothing_left_to_train(command, trained):
    status, printed = command(*tiny(trained), "--ckpt_path=last")
    assert status == 0 and re.search("nothing was left to train of .*last.ckpt: trainer.max_epochs or max_steps", printed.out)


def test_fast_dev_run_names_no_files(command, tmp_path):
    status, printed = command(*tiny(tmp_path / "run"), "--trainer.fast_dev_run=1")
    assert status == 0 and "macro" in printed.out
    assert ".ckpt" not in printed.out and "results.json" not in printed.out and not (tmp_path / "run").exists()


def hold(folder, held):
    """Trains, as far as others see, and leaves a process that outlives it, as loaders' workers do."""
    with locked(folder):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        held.set()
        time.sleep(30)


def test_two_fits_in_one_folder(fails, tmp_path):
    """The second refuses; a killed run keeps nothing."""
    held = CONTEXT.Event()
    first = CONTEXT.Process(target=hold, args=(tmp_path, held))
    first.start()
    assert held.wait(20)
    line = f"process {first.pid} trains in {tmp_path}: wait until it ends, or name another folder with .*"
    for _ in range(2):  # and refusing loosens nothing
        assert re.fullmatch(line, fails(*tiny(tmp_path), "--ckpt_path=auto"))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    first.kill()
    first.join()
    cli.main(tiny(tmp_path))


@pytest.mark.parametrize("epochs", [0, 1])
def test_interrupted(command, tmp_path, monkeypatch, epochs):
    """Ctrl-C says how to go on."""
    folder = tmp_path / "my run"
    original = recipes.Recipe.on_train_batch_start

    def stop(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.trainer.current_epoch == epochs and batch_idx == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes.Recipe, "on_train_batch_start", stop)
        status, printed = command(*tiny(folder), "--trainer.max_epochs=2")
    assert status == 130
    if epochs == 0:
        assert f"{folder} has no checkpoint yet" in printed.err
        return
    line = f"segops fit --config '{folder}/config.yaml' --ckpt_path last"
    assert f"go on with: {line}\n" in printed.err
    assert command("fit", "--config", folder / "config.yaml", "--ckpt_path", "last")[0] == 0
    assert load(folder)["epoch"] == 1


def test_what_is_printed(tmp_path):
    """By a process of its own, since Lightning's log has handlers of its own: no advertising."""
    run = [sys.executable, "-m", "segops", *tiny(tmp_path), "--trainer.max_epochs=1"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "Tip" not in done.stderr and "litlogger" not in done.stderr and "litmodels" not in done.stderr
    names = "checkpoints/best.ckpt, checkpoints/last.ckpt, results.json, config.yaml"
    assert done.stdout.splitlines()[-1] == f"in {tmp_path}: {names}"


# Data of one's own.


def folder_of_images(root, classes=2, count=3):
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        for split in ("train", "val"):
            (root / part / split).mkdir(parents=True)
    for split in ("train", "val"):
        for index in range(count):
            mask = np.zeros((40, 56), np.uint8)
            mask[8:, 8 + 4 * index :] = 1 + index % (classes - 1)
            pixels = np.where(mask[..., None] > 0, 180, 60) + rng.integers(-40, 40, (40, 56, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{split}/{index}.png")
            Image.fromarray(mask).save(root / f"masks/{split}/{index}.png")
    return root


def on_folder(data, run, *arguments):
    return [
        f"--trainer.default_root_dir={run}",
        *(setting for setting in TINY if not setting.startswith(("--data.options", "--data.augment"))),
        *UNET,
        *("--data.dataset=folder", f"--data.root={data}", "--data.normalize=per_image", "--trainer.max_epochs=1"),
        *arguments,
    ]


VIEWS = ["--window", "24", "32", "--overlap", "0", "--scales", "0.5", "1.0", "--flip"]


CRF = ["--crf-settings", "deeplabv1_largefov"]


@pytest.mark.parametrize("views", [[], VIEWS, CRF, ["--crf"]], ids=["whole", "windows", "settings", "crf"])
def test_validate_scores_what_predict_writes(command, tmp_path, views):
    data, run = folder_of_images(tmp_path / "data"), tmp_path / "run"
    assert command("fit", *on_folder(data, run))[0] == 0
    checkpoint = run / "checkpoints/last.ckpt"
    assert command("predict", checkpoint, data / "images/val", "--out", tmp_path / "out", *views)[0] == 0
    metrics = SegmentationMetrics(2)
    for name, (_, mask) in zip("012", Folder(data, "val"), strict=True):
        predicted = torch.from_numpy(np.array(Image.open(tmp_path / f"out/classes/{name}.png")))
        metrics.update(predicted[None], mask[None])
    expected = metrics.compute()
    status, printed = command("validate", *on_folder(data, run, *views), "--ckpt_path=last")
    assert status == 0
    for line, name in (("macro", "iou_macro"), ("micro", "iou_micro")):
        found = next(text.split()[1] for text in printed.out.splitlines() if text.startswith(f"{line} "))
        assert found == f"{expected[name]:.4f}"
    assert ("loss" in printed.out) == (not views)


def test_views_are_of_models_that_segment(fails, tmp_path):
    line = fails("fit", "--config", "eyepacs_unet", "--flip", f"--trainer.default_root_dir={tmp_path}")
    assert line == "--flip is of models that segment"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image(fails, tmp_path, workers):
    """Also where another process met it."""
    data = folder_of_images(tmp_path / "data")
    (data / "images/val/1.png").write_bytes(b"nonsense")
    line = fails("fit", *on_folder(data, tmp_path / "run", f"--data.workers={workers}"))
    assert line.startswith(f"{data}/images/val/1.png cannot be read as an image: ")


def test_names_that_would_steer_a_terminal(fails, tmp_path):
    data = folder_of_images(tmp_path / "da\x1b[2Jta\n")
    (data / "masks/train/1.png").unlink()
    line = fails("fit", *on_folder(data, tmp_path / "run"))
    assert r"da\x1b[2Jta" in line and "1.png is missing" in line


# A full disk.


def beyond_the_limit(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        write_whole(path, lambda file: torch.save(torch.zeros(2**20), file))
    except OSError as error:
        os._exit(0 if path.name in str(error) and "what was there before is whole" in str(error) else 1)


def test_a_file_that_cannot_be_written(tmp_path):
    """torch.save turns the error of the file into one of its own."""
    path = tmp_path / "last.ckpt"
    path.write_text("before")
    process = multiprocessing.get_context("fork").Process(target=beyond_the_limit, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0 and path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_logger_s_thread(capsys):
    """TensorBoard's writes events; it too meets the full disk."""

    def fail(error):
        raise error

    threading.excepthook = cli.say_os_error
    for error in (OSError(28, "No space left on device"), KeyError("x")):
        thread = threading.Thread(target=fail, args=(error,), name="events")
        thread.start()
        thread.join()
        said = capsys.readouterr().err
        if isinstance(error, OSError):
            assert said == "segops: in events, perhaps TensorBoard's: [Errno 28] No space left on device\n"
        else:
            assert "Traceback" in said
