"""`pretrained=` with a file: an encoder that begins with a classifier's weights, as `segops fit` saves them."""

import re

import pytest
import timm
import torch
from segops.models import create_model

from . import small  # noqa: F401  registers the backbones


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
    with pytest.raises(ValueError, match=re.escape("features.0.weight is missing instead of (8, 3, 3, 3)")):
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
