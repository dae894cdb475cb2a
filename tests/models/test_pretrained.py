"""`pretrained=`: a classifier's weights from a file, as `segops fit` saves them, or timm's own from the cache or the network."""

import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from segops.models import create_model, pretrained
from segops.models.pretrained import create_timm

from .small import VGG_CONFIG


def checkpoint(path, model, **more):
    """As Lightning saves a module that holds the model beside others."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state | {"metrics.confusion": torch.ones(2, 2)}, "epoch": 3} | more, path)
    return str(path)


def convolutions(model):
    return [value for value in model.state_dict().values() if value.ndim == 4]


@pytest.mark.parametrize("classes", [1, 5, 1000])
@pytest.mark.parametrize(
    ("backbone", "name", "unused"),
    [("resnettiny", "pacnet", 1), ("vggtiny", "fcn8s", 0), ("vggtiny_bn", "segnet", 2), ("resnettiny", "unet", 0)],
)  # at stride 16 the last stage needs no shortcut; SegNet has no fc6, fc7
def test_classifier_of_timm(tmp_path, backbone, name, unused, classes):
    classifier = timm.create_model(backbone, num_classes=classes)
    model = create_model(name, 5, backbone=backbone, pretrained=checkpoint(tmp_path / "best.ckpt", classifier))
    ours = convolutions(model)
    found = [any(torch.equal(value, own) for own in ours if own.shape == value.shape) for value in convolutions(classifier)]
    assert len(found) - sum(found) == unused


def test_other_classifiers_are_refused(tmp_path):
    path = checkpoint(tmp_path / "best.ckpt", timm.create_model("resnettiny", num_classes=5))
    message = f"pretrained must be weights of timm's resnet18; in {path} "
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("pacnet", 5, backbone="resnet18", pretrained=path)
    with pytest.raises(ValueError, match=re.escape(f"in {path} features.0.weight is missing")):
        create_model("fcn8s", 5, backbone="vggtiny", pretrained=path)
    with pytest.raises(FileNotFoundError, match=r"pretrained must be a file; there is none at .*none\.ckpt"):
        create_model("pacnet", 5, backbone="resnettiny", pretrained=tmp_path / "none.ckpt")
    with pytest.raises(TypeError, match="pretrained must be a path; got int"):
        create_model("pacnet", 5, backbone="resnettiny", pretrained=3)


@pytest.mark.parametrize("name", ["jointseg", "unet_inception"])
def test_encoder_of_its_own(tmp_path, name):
    options = {"jointseg": {"widths": (4, 8, 8, 16), "blocks": 1}, "unet_inception": {"channels": 4}}[name]
    first = create_model(name, 7, **options)
    path = checkpoint(tmp_path / "best.ckpt", first)
    second = create_model(name, 5, **options, pretrained=path)
    for key, value in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[key], value)
    wider = {"jointseg": {"widths": (8, 8, 8, 16), "blocks": 1}, "unet_inception": {"channels": 8}}[name]
    with pytest.raises(ValueError, match=re.escape(f"pretrained {path} does not fit")):
        create_model(name, 5, **wider, pretrained=path)


def test_a_model_without_an_encoder(tmp_path):
    path = checkpoint(tmp_path / "best.ckpt", torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="pretrained must be False for PatchGAN, which has no encoder"):
        create_model("patchgan", 5, pretrained=path)


# timm's own weights, of "vggtiny", which timm is told to find at one of these.
HUB, WEB = {"hf_hub_id": "someone/vggtiny"}, {"url": "https://weights.invalid/some/vggtiny.pth"}


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty ones, and a second for an answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    return tmp_path


class Session:
    """In place of the hub's client: answers, or fails as told."""

    def __init__(self, failure=None):
        self.failure, self.asked = failure, []

    def head(self, url, timeout):
        self.asked.append(url)
        if self.failure is not None:
            raise self.failure


def found_at(monkeypatch, source, session=None):
    for key, value in source.items():
        monkeypatch.setitem(VGG_CONFIG, key, value)
    session = session or Session(AssertionError("asked"))
    monkeypatch.setattr(pretrained, "get_session", lambda: session)
    return session


def refused():
    """What is said in one line, and how long that took."""
    begin = time.monotonic()
    with pytest.raises(OSError, match="pretrained=True needs the weights of timm's vggtiny from ") as caught:
        create_model("fcn32s", 5, backbone="vggtiny", pretrained=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert caught.value.__suppress_context__
    for way in ("pretrained: false (--model.options.pretrained false)", "a file (pretrained: PATH)", "in the cache beforehand"):
        assert way in str(caught.value)
    return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_cached_weights_of_the_hub_need_no_network(caches, monkeypatch, file):
    found_at(monkeypatch, HUB)
    folder = caches / "hub/models--someone--vggtiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    weights = timm.create_model("vggtiny").state_dict()
    (safetensors.torch.save_file if file == "model.safetensors" else torch.save)(weights, folder / "snapshots/abc" / file)
    assert_loaded(weights)


def test_cached_weights_of_an_address_need_no_network(caches, monkeypatch):
    found_at(monkeypatch, WEB)
    folder = caches / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    weights = timm.create_model("vggtiny").state_dict()
    torch.save(weights, folder / "vggtiny.pth")
    assert_loaded(weights)


def assert_loaded(weights):
    loaded = create_timm("vggtiny", True, num_classes=3).state_dict()
    shared = {key for key in weights if not key.startswith("head.fc.")}
    assert len(shared) > 10 and all(torch.equal(loaded[key], weights[key]) for key in shared)
    ours = convolutions(create_model("fcn32s", 5, backbone="vggtiny", pretrained=True))
    assert any(torch.equal(weights["features.0.weight"], value) for value in ours)


def test_a_hub_that_cannot_be_reached(caches, monkeypatch):
    session = found_at(monkeypatch, HUB, Session(ConnectionError("no such name\nand more")))
    message, seconds = refused()
    assert "from huggingface.co, which cannot be reached (ConnectionError: no such name);" in message
    assert "(hf download someone/vggtiny)" in message and seconds < 2 and len(session.asked) == 1


def test_the_hub_offline(caches, monkeypatch):
    for key, value in HUB.items():
        monkeypatch.setitem(VGG_CONFIG, key, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message, seconds = refused()
    assert "which cannot be reached (OfflineModeIsEnabled: " in message and seconds < 2


def test_a_hub_that_does_not_answer(caches, monkeypatch):
    session = found_at(monkeypatch, HUB)
    session.head = lambda url, timeout: time.sleep(3)  # looking up a name heeds no timeout
    message, seconds = refused()
    assert "(TimeoutError: no answer within 1 s, which HF_HUB_ETAG_TIMEOUT sets)" in message and seconds < 2.5


@pytest.mark.parametrize("answers", [False, True])
def test_an_address_behind_a_proxy_that_is_closed_or_silent(caches, monkeypatch, answers):
    found_at(monkeypatch, WEB)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        if not answers:
            server.close()
        message, seconds = refused()
    assert "from weights.invalid, which cannot be reached (" in message and seconds < 2.5
    assert f"https://weights.invalid/some/vggtiny.pth in {caches / 'torch/hub/checkpoints'}" in message


def test_weights_of_the_hub_that_do_not_arrive(caches, monkeypatch):
    session = found_at(monkeypatch, HUB, Session())
    lost = LocalEntryNotFoundError("An error happened")
    lost.__cause__ = ConnectionResetError("reset by peer")
    for failure, reason in (
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left"),
        (lost, "reset by peer"),
    ):

        def download(failure=failure, **at):
            raise failure

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        message, _ = refused()
        assert "huggingface.co, which does not deliver them (" in message and reason in message
    assert session.asked == [huggingface_hub.hf_hub_url("someone/vggtiny", "model.safetensors")] * 2


def test_weights_of_the_hub_that_arrive(caches, monkeypatch):
    found_at(monkeypatch, HUB, Session())
    weights = timm.create_model("vggtiny").state_dict()
    torch.save(weights, caches / "some.bin")

    def download(repo_id, revision, filename):
        assert (repo_id, revision) == ("someone/vggtiny", None)
        if filename == "model.safetensors":
            raise RemoteEntryNotFoundError("none", response=Response())
        return str(caches / "some.bin")

    class Response:
        headers, request = {}, None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_loaded(weights)


class Server(BaseHTTPRequestHandler):
    content, length = b"", 0

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_an_address(caches, monkeypatch, whole):
    weights = timm.create_model("vggtiny").state_dict()
    torch.save(weights, caches / "served.pth")
    content = (caches / "served.pth").read_bytes()
    handler = type("Handler", (Server,), {"content": content if whole else content[:99], "length": len(content)})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found_at(monkeypatch, {"url": f"http://127.0.0.1:{server.server_port}/vggtiny.pth"})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        if whole:
            assert_loaded(weights)
        else:
            assert "which does not deliver them (ContentTooShortError: " in refused()[0]
        server.shutdown()
    assert [path.name for path in caches.glob("torch/hub/checkpoints/*")] == ["vggtiny.pth"] * whole


def test_models_of_which_timm_has_no_weights():
    message = "pretrained must be False or a file for 'vggtiny', of which timm has no weights; it has vgg"
    with pytest.raises(ValueError, match=message):
        create_model("fcn32s", 5, backbone="vggtiny", pretrained=True)
    with pytest.raises(ValueError, match=r"got 'resnet10t\.none'; near matches: resnet10t\.c3_in1k$"):
        create_model("unet", 5, backbone="resnet10t.none")
    with pytest.raises(TypeError, match="pretrained must be True, False or a state_dict for timm's vggtiny; got 'file'"):
        create_timm("vggtiny", pretrained="file")
