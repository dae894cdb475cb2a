"""Checkpoints of a stranger: nothing of them runs, none takes the memory it asks for, each is refused in one line."""

import argparse
import contextlib
import io
import os
import pickle
import reprlib
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from PIL import Image
from segops.models import create_model

from segops.train import Adversarial, Supervised, predict
from segops.train.cli import main
from segops.train.inference import load_network
from segops.train.runs import WholeCheckpoints

OPTIONS = {"channels": 4}


@pytest.fixture(scope="module")
def weights():
    return {f"model.{key}": value for key, value in create_model("segnet_basic", 3, **OPTIONS).state_dict().items()}


@pytest.fixture
def good(weights):
    """What `segops fit` would save."""
    return {
        "state_dict": dict(weights),
        "segops": {
            "model": {"name": "segnet_basic", "num_classes": 3, "options": dict(OPTIONS)},
            "classes": ["ground", "box", "disc"],
            "palette": [[0, 0, 0], [200, 10, 10], [10, 200, 10]],
            "normalize": "imagenet",
            "resize": None,
        },
    }


def refused(path, message=None):
    """The error of load_network: one line that names the file, and passes on no advice to trust it."""
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load_network(path)
    said = str(caught.value)
    assert path.name in said and len(said) < 1000 and "\n" not in said and "\x1b" not in said
    assert "weights_only" not in said and "safe_globals" not in said
    assert time.monotonic() - begin < 5
    return said


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / "stranger.ckpt", **options)
    return tmp_path / "stranger.ckpt"


def test_what_is_good_is_taken(tmp_path, good):
    path = saved(tmp_path, good)
    model, info = load_network(path)
    assert info == good["segops"] and not model.training
    assert all(torch.equal(value, good["state_dict"][f"model.{key}"]) for key, value in model.state_dict().items())
    for scale in ("dtype", "file", 255, 0.5):
        good["segops"]["scale"] = scale
        assert load_network(saved(tmp_path, good))[1]["scale"] == scale
    good["segops"]["classes"][0] = "\u062c\u0627\u062f\u0647\u200c\u0647\u0627\u3000\u9053"  # joiners and wide spaces are text
    assert load_network(saved(tmp_path, good, _use_new_zipfile_serialization=False))[1] == good["segops"]


# Code.


class Run:
    """Would be called, were it unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Own:
    pass


def payloads(marker):
    make = f"open({str(marker)!r}, 'w')"
    return {
        "system": Run(os.system, f"touch {marker}"),
        "exec": Run(exec, make),
        "eval": Run(eval, make),
        "open": Run(open, str(marker), "w"),
        "class": Own(),
        "load": Run(pickle.loads, pickle.dumps(Run(exec, make))),
    }


KINDS = list(payloads(""))
BAITS = ["entry", "weights", "loops", "hyper_parameters", "alone"]


def baited(good, payload, bait):
    """A checkpoint that is good but for a payload."""
    if bait == "alone":
        return payload
    place = (
        good["segops"]["model"]["options"]
        if bait == "entry"
        else good.setdefault("state_dict" if bait == "weights" else bait, {})
    )
    place["model.payload"] = payload
    return good


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("bait", BAITS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_pickle_runs(tmp_path, good, kind, bait, legacy):
    marker = tmp_path / "marker"
    path = saved(tmp_path, baited(good, payloads(marker)[kind], bait), _use_new_zipfile_serialization=not legacy)
    refused(path, r"stranger\.ckpt cannot be read as a checkpoint: (it wants Python's [\w.]+, which could|it holds bytes)")
    for argument in ("checkpoint", "pretrained"):
        with pytest.raises(ValueError, match=f"^{argument} .*stranger.ckpt cannot be read"):
            create_model("unet_inception", 3, channels=4, **{argument: path})
    assert not marker.exists()


def test_nothing_of_a_bare_pickle_runs(tmp_path):
    path = tmp_path / "stranger.ckpt"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"state_dict": payloads(tmp_path / "marker")["exec"]}, protocol))
        refused(path, "cannot be read as a checkpoint")
    assert not (tmp_path / "marker").exists()


def command(*arguments):
    if arguments[0] != "predict":
        return main(list(arguments))
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    return predict.run(parser.parse_args(arguments[1:]))


@pytest.mark.parametrize("name", ["predict", "validate", "fit"])
@pytest.mark.parametrize("kind", ["exec", "class"])
def test_no_command_runs_it(tmp_path, good, name, kind):
    path = saved(tmp_path, baited(good, payloads(tmp_path / "marker")[kind], "entry"))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    arguments = {"predict": [str(path), str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]}
    run = [
        "--config",
        "demo",
        "--ckpt_path",
        str(path),
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--trainer.accelerator",
        "cpu",
    ]
    with pytest.raises((ValueError, SystemExit, pickle.UnpicklingError)):
        command(name, *arguments.get(name, run))
    assert not (tmp_path / "marker").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["validate", "fit"])
@pytest.mark.parametrize("key", ["class_path", "_class_path"])
def test_no_command_imports_what_a_checkpoint_names(tmp_path, good, monkeypatch, name, key):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = saved(tmp_path, good | {"hyper_parameters": {key: "stranger.Recipe"}})
    run = ["--config", "demo", "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    with pytest.raises(Exception):  # noqa: B017  whatever it lacks
        main([name, *run, "--ckpt_path", str(path)])
    assert not (tmp_path / "marker").exists()


def test_a_run_removes_no_more_than_checkpoints_of_its_own(tmp_path):
    """What it removes is named in the checkpoint that it was resumed from."""
    folder, other = tmp_path / "run/checkpoints", tmp_path / "other"
    for parent in (folder, other):
        parent.mkdir(parents=True)
        (parent / "some.ckpt").write_text("")
    for path in (other, folder / "../../other", folder / "../../other/some.ckpt", f"simplecache::file://{other}/some.ckpt"):
        WholeCheckpoints().remove_checkpoint(str(path))
        assert (other / "some.ckpt").exists()
    WholeCheckpoints().remove_checkpoint(str(folder / "some.ckpt"))
    assert not (folder / "some.ckpt").exists()


# Files of other kinds.


def test_files_of_other_kinds(tmp_path, good):
    path = tmp_path / "stranger.ckpt"
    image, script, archive, keyed = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(1, 1, 1)), script)
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(1)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(keyed, "w") as other:
        other.writestr("arr_0.npy", b"\x93NUMPY")
    whole = saved(tmp_path, good).read_bytes()
    for content, kind in {
        b"": "it is empty",
        b"epoch 3\n": "it is text, which begins 'epoch 3",
        b"version https://git-lfs.github.com/spec/v1\n": "it is text, which begins 'version https://git-lfs",
        b"\x1b[31mred": "it is damaged, or not written by torch.save",
        image.getvalue(): "it is a JPEG image",
        script.getvalue(): "it is a TorchScript archive, a program; what is needed is its state_dict",
        archive.getvalue(): "it is a tar archive",
        keyed.getvalue(): "it is a zip archive that is cut short, damaged or of another program",
        whole[: len(whole) // 2]: "it is a zip archive that is cut short",
        whole[len(whole) // 2 :]: "cannot be read",
        struct.pack("<Q", 2**60) + b"{": "it is damaged",
        os.urandom(1000): "cannot be read as a checkpoint: it is damaged",
    }.items():
        path.write_bytes(content)
        refused(path, kind)


def test_what_is_no_regular_file(tmp_path):
    path = tmp_path / "stranger.ckpt"
    path.mkdir()
    refused(path, "checkpoint must be a regular file; .* is a directory")
    path.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        refused(path, "checkpoint must be a regular file; .* is p")


def test_checkpoints_of_other_programs(tmp_path, good):
    lightning = {"state_dict": good["state_dict"], "epoch": 3, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}}
    for content in (
        lightning,
        OrderedDict(good["state_dict"]),
        [1],
        7,
        torch.ones(3),
        {1: 2},
        {"segops": {}, "state_dict": []},
    ):
        refused(saved(tmp_path, content), "is no checkpoint of segops fit: it needs the entries 'state_dict' and 'segops'")
    safetensors.torch.save_file(good["state_dict"], tmp_path / "stranger.ckpt")
    refused(tmp_path / "stranger.ckpt", "is no checkpoint of segops fit")


# Memory and time.


def test_files_that_unpack_to_more_than_they_are(tmp_path, good):
    path = tmp_path / "stranger.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10_000_000 + b"N.")
        archive.writestr("archive/version", "3\n")
    assert path.stat().st_size < 100_000
    refused(path, "it is a zip archive that unpacks to more than torch.save packs")
    for bomb in (Run(bytearray, 10**12), b"bytes are made by a codec"):
        for legacy in (False, True):
            content = saved(tmp_path, good | {"loops": bomb}, _use_new_zipfile_serialization=not legacy)
            refused(content, "it holds bytes that are made as it is read")


def test_views_of_one_number(tmp_path, good):
    """They fit a network of 5 GB."""
    good["segops"]["model"]["options"] = {"channels": 5000}
    with torch.device("meta"):
        own = create_model("segnet_basic", 3, channels=5000).state_dict()
    good["state_dict"] = {f"model.{key}": torch.ones((), dtype=value.dtype).expand(value.shape) for key, value in own.items()}
    assert sum(value.nbytes for value in own.values()) > 5e9
    refused(saved(tmp_path, good), "does not hold its weights: some are views of the same numbers")


def test_weights_that_share_their_numbers(tmp_path, good):
    good["segops"]["model"]["options"] = {"channels": 16}
    shapes = {key: value.shape for key, value in create_model("segnet_basic", 3, channels=16).state_dict().items()}
    one = torch.ones(max(shape.numel() for shape in shapes.values()))
    good["state_dict"] = {
        f"model.{key}": torch.tensor(1) if shape == () else one[: shape.numel()].view(shape) for key, shape in shapes.items()
    }
    refused(saved(tmp_path, good), "does not hold its weights: some are views of the same numbers")


@pytest.mark.parametrize(
    "model",
    [
        ("segnet_basic", {"channels": 10**9}),
        ("segnet_basic", {"channels": 2**62}),
        ("segnet_basic", {"in_channels": 10**12}),
        ("jointseg", {"blocks": 10**9}),
        ("unet_inception", {"blocks": 10**9}),
        ("refinenet", {"backbone": "resnet10t", "crp_blocks": 10**9}),
        ("pspnet", {"backbone": "resnet10t", "bins": [6] * 60_000}),
        ("deeplabv2", {"backbone": "resnet10t", "rates": [6] * 60_000}),
        ("gcn", {"backbone": "resnet10t", "kernel_size": 10**15 + 1}),
        ("unet", {"backbone": "vit_giant_patch14_dinov2"}),
        ("pacnet", {"backbone": "resnet10t", "output_stride": 0}),
        ("pacnet", {"backbone": "resnet10t", "output_stride": [8]}),
        ("pacnet", {"backbone": "resnet10t", "output_stride": float("nan")}),
        ("segnet_basic", {"name": "unet"}),
        ("segnet_basic", {"num_classes": 4}),
        ("segnet_basic", {"self": 4}),
    ],
    ids=range(16),
)
def test_networks_that_nobody_could_hold(tmp_path, good, model):
    good["segops"]["model"] |= {"name": model[0], "options": model[1]}
    refused(saved(tmp_path, good), "names no network that can be built|does not fit")


@pytest.mark.parametrize("backbone", ["hf-hub:{}", "local-dir:{}", "hf_hub:{}", "resnet18.a:{}", "{}", "resnet18@{}"])
def test_backbones_elsewhere(tmp_path, good, backbone, monkeypatch):
    """Names that timm would read from a folder or fetch."""
    (tmp_path / "config.json").write_text("{}")

    def opened(*arguments, **options):
        raise AssertionError("a look elsewhere")

    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", opened)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_path", opened)
    good["segops"]["model"] |= {"name": "unet", "options": {"backbone": backbone.format(tmp_path)}}
    refused(saved(tmp_path, good), "names no network that can be built: ValueError: backbone must be a timm model")


def test_weights_that_are_elsewhere_are_not_looked_for(tmp_path, good):
    good["segops"]["model"]["options"] |= {"pretrained": "/etc/passwd", "checkpoint": "/etc/passwd"}
    load_network(saved(tmp_path, good))


# The entry.

LAUGHS = ["ha"]
for _ in range(60):
    LAUGHS = [LAUGHS, LAUGHS]  # 2**60 of them to whoever counts
ITSELF = []
ITSELF.append(ITSELF)
DEEP = []
for _ in range(300):
    DEEP = [DEEP]


VALUES = {
    "laughs": LAUGHS,
    "itself": ITSELF,
    "deep": DEEP,
    "lists": [[]] * 10,
    "tensor": torch.ones(2),
    "set": {1, 2},
    "keys": {3: 4},
    "large": 2**2000,
    "escape": "\x1b[31m",
}
PLACES = ["model", "name", "options", "channels", "classes", "palette", "normalize", "resize", "scale", "other"]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("key", PLACES)
def test_values_of_any_kind(tmp_path, good, key, kind):
    place = good["segops"]
    place = place["model"] if key in ("name", "options") else place["model"]["options"] if key == "channels" else place
    place[key] = VALUES[kind]
    path = saved(tmp_path, good)
    if key == "other" and kind in ("deep", "lists", "keys", "large"):
        load_network(path)
    else:
        refused(path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", []),
        ("model", {}),
        ("model", {"name": 3, "num_classes": 3, "options": {}}),
        ("model", {"name": "unet", "num_classes": 3, "options": []}),
        *(("model", {"name": "unet", "num_classes": n, "options": {}}) for n in (0, -1, 256, 10**12, True, 3.0, "3", None)),
        ("classes", None),
        ("classes", {"a": 1, "b": 2, "c": 3}),
        ("classes", "abc"),
        ("classes", ["a", "b"]),
        ("classes", ["a", "b", 3]),
        ("classes", ["name"] * 10**5),
        ("palette", [[0, 0, 0]] * 2),
        ("palette", [0, 0, 0]),
        ("palette", [[0, 0]] * 3),
        ("palette", [[0, 0, 256]] * 3),
        ("palette", [[0, 0, -1]] * 3),
        ("palette", [[0, 0, 0.5]] * 3),
        ("palette", [[0, 0, True]] * 3),
        ("normalize", "mean"),
        ("normalize", ["none"]),
        ("normalize", None),
        *(("resize", size) for size in (5, [5], [5, 5, 5], [0, 5], [-5, 5], [True, True], [5.0, 5.0], [10**9, 10**9], "5", {})),
        *(("scale", scale) for scale in (0, -1, True, float("inf"), float("nan"), "none", None, [255])),
    ],
    ids=lambda value: reprlib.repr(value),
)
def test_entries_that_are_not_what_they_must_be(tmp_path, good, key, value):
    good["segops"][key] = value
    refused(saved(tmp_path, good), f"stranger.ckpt is no checkpoint of segops fit: (its|{key}) .*must (be|hold)")


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\x00b", "a\x9bb", "a\ud800b", "a" * 10**6], ids=range(6))
def test_text_that_a_terminal_would_obey(tmp_path, good, text):
    for change in ({"classes": [text, "b", "c"]}, {"model": good["segops"]["model"] | {"name": text}}, {text: 3}):
        refused(saved(tmp_path, good | {"segops": good["segops"] | change}), "must hold plain values and printable text alone")


# The weights.


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda value: value.long(), "has dtype torch.int64 instead of torch.float32"),
        (lambda value: value.bool(), "has dtype torch.bool instead"),
        (lambda value: value.cfloat(), "has dtype torch.complex64 instead"),
        (lambda value: value.to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn instead"),
        (lambda value: value.to_sparse(), "is not a dense tensor with values"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is not a dense tensor with values"),
        (lambda value: value.to("meta"), "is not a dense tensor with values"),
        (lambda value: value / 0, "holds NaN or infinity"),
        (lambda value: value * float("nan"), "holds NaN or infinity"),
        (lambda value: value[:0], r"has shape \(0,.* instead of"),
        (lambda value: value.sum(), r"has shape \(\) instead of"),
        (lambda value: value.tolist(), "is a list instead of a tensor"),
        (lambda value: None, "is a NoneType instead of a tensor"),
        (lambda value: "weights", "is a str instead of a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*")  # quantisation and sparse layouts are said to change
def test_weights_that_are_none(tmp_path, good, change, reason):
    key = next(key for key, value in good["state_dict"].items() if value.ndim == 4)
    good["state_dict"][key] = change(good["state_dict"][key])
    said = refused(saved(tmp_path, good), f"does not fit SegNetBasic: .*{reason}")
    assert key.removeprefix("model.") in said
    with pytest.raises(ValueError, match=reason):
        create_model("segnet_basic", 3, **OPTIONS, checkpoint=tmp_path / "stranger.ckpt")


def test_weights_of_half_precision_are_taken(tmp_path, good):
    good["state_dict"] = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in good["state_dict"].items()
    }
    model, _ = load_network(saved(tmp_path, good))
    assert next(model.parameters()).dtype == torch.float32


def test_names_of_weights(tmp_path, good):
    weights = good["state_dict"]
    for key in (3, None, (1, 2), b"model.x"):
        good["state_dict"] = weights | {key: torch.ones(1)}
        refused(saved(tmp_path, good), "cannot be read|its state_dict has keys that are not str")
    for key in ("\x1b[2J", "a" * 10**6, "\n"):
        good["state_dict"] = weights | {f"model.{key}": torch.ones(1)}
        refused(saved(tmp_path, good), "does not fit SegNetBasic: .* is unknown")


class Shadowed:
    """An OrderedDict with an attribute in place of a method, as a pickle can make it."""

    def __init__(self, content, name):
        self.parts = OrderedDict, (), {name: torch.Size}, None, iter(content.items())

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("name", ["items", "get", "keys", "pop", "__iter__"])
def test_dictionaries_with_methods_of_their_own(tmp_path, good, name):
    path = saved(tmp_path, Shadowed(good | {"state_dict": Shadowed(good["state_dict"], name)}, name))
    assert vars(torch.load(path, weights_only=True)) == {name: torch.Size}
    load_network(path)
    create_model("segnet_basic", 3, **OPTIONS, checkpoint=path)


def test_recipes_import_nothing_that_a_checkpoint_names(tmp_path, good, monkeypatch):
    """Lightning would, as what `_instantiator` makes of its arguments."""
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {
        "model": "segnet_basic",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "optimizer": "stranger.Recipe",
    }
    good |= {"hyper_parameters": settings, "pytorch-lightning_version": "2.6.0"}
    with contextlib.suppress(Exception):  # whatever it lacks
        Supervised.load_from_checkpoint(saved(tmp_path, good))
    assert not (tmp_path / "marker").exists()


def test_recipes_read_no_weights_that_are_elsewhere(tmp_path, good):
    elsewhere = {"checkpoint": "/etc/passwd", "pretrained": "/etc/passwd"}
    good["segops"]["model"]["options"] |= elsewhere
    settings = {"model": "segnet_basic", "discriminator_options": {"channels": 4} | elsewhere}
    adversarial = good["state_dict"] | {
        f"discriminator.{key}": value for key, value in create_model("fcn_discriminator", 3, channels=4).state_dict().items()
    }
    good |= {"state_dict": adversarial, "pytorch-lightning_version": "2.6.0"}
    with pytest.raises(ValueError, match="is no checkpoint of segops fit: it needs the entry 'hyper_parameters'"):
        Adversarial.load_from_checkpoint(saved(tmp_path, good))
    path = saved(tmp_path, good | {"hyper_parameters": settings})
    assert Adversarial.load_from_checkpoint(path).name == "segnet_basic"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The arguments of a run, and its last.ckpt."""
    arguments = [
        *("--model=Supervised", "--model.model=segnet_basic", "--model.options={channels: 4}"),
        *("--data=SegmentationData", "--data.options={train: 2, val: 1, size: [32, 32]}", "--data.batch_size=2"),
        *("--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"),
        f"--trainer.default_root_dir={tmp_path_factory.mktemp('run')}",
    ]
    main(["fit", *arguments])
    return arguments, torch.load(f"{arguments[-1].partition('=')[2]}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", ["fit", "validate"])
@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("scale", LAUGHS, "it is not as Lightning writes them"),
        ("scale", "\x1b[31m", "must hold plain values"),
        ("optimizers", [{"lr": LAUGHS}], "it is not as Lightning writes them"),
        ("optimizers", ["lr"], "optimizers must be a list of their settings"),
        ("optimizers", "lr", "optimizers must be a list of their settings"),
        ("class_weight", {"a": 1}, "class_weight must be a number for each of its 7 classes"),
        ("class_weight", [1.0] * 6, "class_weight must be a number for each of its 7 classes"),
        ("class_weight", ["1"] * 7, "class_weight must be a number for each of its 7 classes"),
    ],
    ids=range(8),
)
def test_entries_that_a_run_is_resumed_from(tmp_path, run, name, key, value, reason):
    arguments, last = run
    path = saved(tmp_path, last | {"segops": last["segops"] | {key: value}})
    with pytest.raises(ValueError, match=f"stranger.ckpt is no checkpoint of segops fit: .*{reason}"):
        main([name, *arguments, f"--ckpt_path={path}"])


@pytest.mark.parametrize("weights", [[1], torch.ones(3), {3: torch.ones(1)}], ids=["list", "tensor", "int"])
def test_weights_that_a_run_is_resumed_from(tmp_path, run, weights):
    arguments, last = run
    if isinstance(weights, dict):
        weights = last["state_dict"] | weights
    with pytest.raises(
        ValueError, match=r"stranger\.ckpt (is no checkpoint of segops fit|does not fit Supervised: 3 is unknown)"
    ):
        main(["fit", *arguments, f"--ckpt_path={saved(tmp_path, last | {'state_dict': weights})}"])


@pytest.mark.parametrize(
    "results",
    [
        "text",
        {"history": "text", "seconds": 1.0},
        {"history": [LAUGHS], "seconds": 1.0},
        {"history": [], "seconds": [1]},
        {"history": [{"epoch": LAUGHS}], "seconds": 1.0},
        {"history": [{"epoch": "\x1b[31m"}], "seconds": 1.0},
    ],
    ids=range(6),
)
def test_results_that_a_run_is_resumed_from(tmp_path, run, results):
    arguments, last = run
    path = saved(tmp_path, last | {"callbacks": {"Results": results}})
    with pytest.raises(ValueError, match=r"must hold its results as segops fit writes them|it is not as Lightning writes them"):
        main(["fit", *arguments, f"--ckpt_path={path}", "--trainer.max_epochs=2"])


@pytest.mark.parametrize("name", ["fit", "validate"])
@pytest.mark.parametrize("key", ["loops", "callbacks", "optimizer_states", "pytorch-lightning_version"])
@pytest.mark.parametrize("value", ["text", 3, [LAUGHS], {"fit_loop": 3}, None], ids=range(5))
def test_what_lightning_reads(tmp_path, run, name, key, value):
    """In one line, or not looked at."""
    arguments, last = run
    path = saved(tmp_path, last | {key: value})
    try:
        main([name, *arguments, f"--ckpt_path={path}", *(["--trainer.max_epochs=2"] if name == "fit" else [])])
    except (TypeError, ValueError) as error:
        assert "\n" not in str(error)
