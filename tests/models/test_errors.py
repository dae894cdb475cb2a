"""Errors say what was given and what would do; checkpoints that do not fit say where."""

import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from segops.models import create_model, from_crfasrnn, from_torchvision, model_info
from segops.models.backbones import Backbone

from .small import perturbed

TINY, VGG = {"backbone": "resnettiny"}, {"backbone": "vggtiny"}


@pytest.mark.parametrize(
    "error, name, options, message",
    [
        (ValueError, "pacnte", {}, "name must be a known model; got 'pacnte'; did you mean 'pacnet'"),
        (ValueError, "deeplab", {}, "got 'deeplab'; did you mean 'deeplabv3' or 'deeplabv2' or 'deeplabv3plus'"),
        (ValueError, "zzz", {}, "got 'zzz'; known: fcn32s, fcn16s, fcn8s, segnet"),
        (ValueError, None, {}, "name must be a known model; got None"),
        (ValueError, "pacnet", {"num_classes": 0}, "num_classes must be a positive int; got 0"),
        (ValueError, "unet", {"num_classes": 2.0}, "num_classes must be a positive int; got 2.0"),
        (ValueError, "unet", {"num_classes": True}, "num_classes must be a positive int; got True"),
        (ValueError, "unet", {"in_channels": -1}, "in_channels must be a positive int; got -1"),
        (ValueError, "fcn8s", {"output_stride": 16}, "output_stride must be 8 for 'fcn8s'; got 16"),
        (ValueError, "refinenet", {"output_stride": 8}, "output_stride must be 32 for 'refinenet'; got 8"),
        (ValueError, "deeplabv1_largefov", {"output_stride": 32}, "output_stride must be 8 or 16 .*; got 32"),
        (
            ValueError,
            "r2unet",
            {"backbone": "resnet18"},
            "backbone must be None for 'r2unet'; got 'resnet18'; models that have it: fcn32s",
        ),
        (
            ValueError,
            "jointseg",
            {"pretrained": True},
            "pretrained must be False for 'jointseg'; got True; models that have it: fcn32s",
        ),
        (
            ValueError,
            "gcn",
            {"aux": True},
            "aux must be False for 'gcn'; got True; models that have it: deeplabv3, deeplabv3_cascaded",
        ),
        (ValueError, "unet", {"pretrained": True}, "pretrained must be False without a backbone"),
        (TypeError, "unet", {"width": 3}, "'unet' has no option 'width'; it has .*channels.*merge"),
        (TypeError, "pacnet", TINY | {"width": 3}, "context 'pac' has no option 'width'; it has .*rates.*norm"),
        (TypeError, "pspnet", TINY | {"rates": (1,)}, "context 'ppm' has no option 'rates'; it has .*bins"),
        (ValueError, "deeplabv3", TINY | {"context": "asp"}, "context must be one of 'aspp', 'pac', 'ppm', 'none'; got 'asp'"),
        (
            TypeError,
            "deeplabv3",
            TINY | {"context": "none", "rates": (1,)},
            "context 'none' has no option 'rates'; it has none",
        ),
        # Backbones.
        (ValueError, "pacnet", {"backbone": "resnet1"}, "backbone must be a timm model; got 'resnet1'; near matches: resnet18"),
        (ValueError, "gcn", {"backbone": 50}, "backbone must be a timm model; got 50"),
        (ValueError, "pacnet", {"backbone": "vgg11", "output_stride": 4}, r"one of \[8, 16, 32\] for backbone 'vgg11'; got 4"),
        (ValueError, "deeplabv3", {"backbone": "convnext_atto", "output_stride": 7}, r"must be one of \[.*32\] .* got 7"),
        (ValueError, "fcn8s", {"backbone": "resnet18"}, "backbone must be a VGG of timm .*; got 'resnet18'"),
        (ValueError, "deeplabv1_largefov", {"backbone": "resnet18"}, "backbone must be a VGG of timm .*; got 'resnet18'"),
        (ValueError, "segnet", {"backbone": "resnet18"}, "backbone must be a VGG of timm .*; got 'resnet18'"),
        (ValueError, "unet", {"backbone": "vit_tiny_patch16_224"}, "backbone must have a pyramid .* 'vit_tiny_patch16_224'"),
        (ValueError, "pacnet", VGG | {"full_rate": True}, "full_rate and multi_grid need a ResNet; got backbone 'vggtiny'"),
        (ValueError, "deeplabv3_cascaded", VGG, "full_rate and multi_grid need a ResNet; got backbone 'vggtiny'"),
        (ValueError, "deeplabv3_cascaded", {"backbone": "test_resnet"}, "two or more blocks in its last stage"),
        (ValueError, "deeplabv3", TINY | {"multi_grid": (0, 1)}, r"multi_grid must be positive ints; got \(0, 1\)"),
        # Options of single models.
        (ValueError, "pacnet", TINY | {"norm": "batch"}, "norm must be 'post' or 'per_rate'; got 'batch'"),
        (ValueError, "pacnet", TINY | {"merge": "mean"}, "merge must be 'concat' or 'sum'; got 'mean'"),
        (ValueError, "deeplabv3", TINY | {"rates": (6, 0)}, r"rates must be positive ints; got \(6, 0\)"),
        (ValueError, "deeplabv3", TINY | {"channels": 0}, "channels must be a positive int; got 0"),
        (ValueError, "deeplabv3", TINY | {"head": "smp"}, "head must be 'paper' or 'torchvision'; got 'smp'"),
        (ValueError, "deeplabv2", TINY | {"rates": ()}, r"rates must be positive ints; got \(\)"),
        (ValueError, "pspnet", TINY | {"bins": (0,)}, r"bins must be positive ints; got \(0,\)"),
        (ValueError, "dilated_context", VGG | {"context": "big"}, "context must be 'basic' or 'large'; got 'big'"),
        (ValueError, "dilated_context", VGG | {"rates": (0,)}, r"rates must be positive ints; got \(0,\)"),
        (ValueError, "refinenet", TINY | {"crp_blocks": 0}, "crp_blocks must be a positive int; got 0"),
        (ValueError, "gcn", TINY | {"kernel_size": 4}, "kernel_size must be a positive odd int; got 4"),
        (ValueError, "unet", {"merge": "add"}, "merge must be 'concat' or 'sum'; got 'add'"),
        (ValueError, "unet", {"channels": 0}, "channels must be a positive int; got 0"),
        (ValueError, "r2unet", {"t": -1}, "t must be an int >= 0; got -1"),
        (ValueError, "jointseg", {"widths": (8, 0)}, r"widths must be positive ints; got \(8, 0\)"),
        (ValueError, "jointseg", {"image_classes": 0}, "image_classes must be a positive int; got 0"),
        (ValueError, "fcn_discriminator", {"decoder": "unet"}, "decoder must be 'skip' or 'bilinear'; got 'unet'"),
        (ValueError, "patchgan", {"receptive_field": 256}, "receptive_field must be 16, 70 or 286; got 256"),
    ],
)
def test_errors_of_create_model(error, name, options, message):
    with pytest.raises(error, match=message):
        create_model(**{"name": name, "num_classes": 5, **options})


def test_errors_of_backbones():
    with pytest.raises(ValueError, match="backbone must have 6 maps for this model; 'resnettiny' has 5"):
        Backbone("resnettiny", 32, levels=(-6, -1))
    with pytest.raises(ValueError, match="name must be a known model; got 'pac'"):
        model_info("pac")


@pytest.fixture(scope="module")
def model():
    return create_model("r2unet", 5, channels=2)


@pytest.mark.parametrize(
    "error, images, message",
    [
        (ValueError, torch.zeros(2, 4, 8, 8), r"images must be \(N, 3, H, W\); got \(2, 4, 8, 8\)"),
        (ValueError, torch.zeros(3, 8, 8), r"images must be \(N, 3, H, W\); got \(3, 8, 8\)"),
        (TypeError, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"images must be floating point; got torch\.uint8"),
        (ValueError, torch.zeros(1, 3, 0, 8), r"images must have a height and a width of at least 1; got \(1, 3, 0, 8\)"),
        (TypeError, [[1.0]], r"images must be a torch\.Tensor; got list"),
    ],
)
def test_errors_of_images(model, error, images, message):
    for call in (model, model.predict):
        with pytest.raises(error, match=message):
            call(images)


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "error, class_map, message",
    [
        (ValueError, torch.zeros(2, 4, 8, 8), r"class_map must be \(N, 5, H, W\); got \(2, 4, 8, 8\)"),
        (ValueError, torch.zeros(2, 5, 8, 9), r"class_map must be \(2, 5, 8, 8\), as the images are; got \(2, 5, 8, 9\)"),
        (ValueError, torch.zeros(1, 5, 8, 8), r"class_map must be \(2, 5, 8, 8\), as the images are; got \(1, 5, 8, 8\)"),
        (ValueError, torch.zeros(2, 7, 8, dtype=torch.int64), r"class_map must be \(2, 5, 8, 8\), as the images are"),
        (TypeError, torch.zeros(2, 8, 8), r"class_map \(N, H, W\) must be labels of an integer dtype; got torch\.float32"),
        (TypeError, torch.zeros(2, 5, 8, 8, dtype=torch.int64), r"class_map must be floating point; got torch\.int64"),
        (TypeError, None, r"class_map must be a torch\.Tensor; got NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["fcn_discriminator", "patchgan"])
def test_errors_of_class_maps(name, error, class_map, message):
    with pytest.raises(error, match=message):
        create_model(name, 5, channels=2)(IMAGES, class_map)


# Checkpoints.


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "model.", "safetensors"])
def test_forms_of_checkpoints(model, form, tmp_path):
    weights = perturbed(create_model("r2unet", 5, channels=2)).state_dict()
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(weights, path)
    else:
        path = tmp_path / "weights.pt"
        nested = {"plain": weights, "model.": {f"model.{key}": value for key, value in weights.items()}}
        torch.save(nested.get(form, {form: weights, "epoch": 3}), path)
    loaded = create_model("r2unet", 5, channels=2, checkpoint=str(path)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert any(not torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_checkpoint_that_is_missing(tmp_path):
    message = f"checkpoint must be a file; there is none at {re.escape(str(tmp_path))}/no.pt"
    with pytest.raises(FileNotFoundError, match=message):
        create_model("unet", 5, channels=2, checkpoint=tmp_path / "no.pt")
    with pytest.raises(ValueError, match=r"checkpoint must be a regular file; .* is a directory"):
        create_model("unet", 5, channels=2, checkpoint=tmp_path)
    with pytest.raises(TypeError, match="checkpoint must be a path; got int"):
        create_model("unet", 5, channels=2, checkpoint=3)


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"", "it is empty"),
        (b"no weights", "it is text, which begins 'no weights'"),
        (b"PK\x03\x04 cut short", "it is a zip archive that is cut"),
    ],
)
def test_checkpoint_that_is_corrupt(content, kind, tmp_path):
    path = tmp_path / "corrupt.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^checkpoint .*corrupt\.pt cannot be read as a checkpoint: {kind}"):
        create_model("unet", 5, channels=2, checkpoint=path)


class Payload:
    """What a checkpoint could run, were it unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], 7, Payload()], ids=["tensor", "list", "number", "code"])
def test_checkpoint_that_holds_something_else(content, tmp_path, capsys):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"checkpoint (must be a file of weights; )?.*other\.pt (holds no state_dict|cannot be read)"
    ):
        create_model("unet", 5, channels=2, checkpoint=tmp_path / "other.pt")
    assert "unpickled" not in capsys.readouterr().out


def test_checkpoint_of_another_model(tmp_path):
    torch.save(create_model("unet", 5, channels=2).state_dict(), tmp_path / "unet.pt")
    message = r"unet\.pt does not fit UNet: encoder\.blocks\.0\.project\.weight is missing; .* and \d+ more"
    with pytest.raises(ValueError, match=message) as caught:
        create_model("r2unet", 5, channels=2, checkpoint=tmp_path / "unet.pt")
    assert str(caught.value).count(";") == 5  # five mismatches and how many more
    message = r"head\.weight has shape \(5, 2, 1, 1\) instead of \(6, 2, 1, 1\); head\.bias has shape \(5,\) instead of \(6,\)$"
    with pytest.raises(ValueError, match=message):
        create_model("unet", 6, channels=2, checkpoint=tmp_path / "unet.pt")


def test_checkpoint_of_a_finer_network_does_not_fit(tmp_path):
    torch.save(create_model("fcn8s", 5, **VGG).state_dict(), tmp_path / "fine.pt")
    message = r"does not fit FCN: score_pool3\.weight is unknown; score_pool3\.bias is unknown$"
    with pytest.raises(ValueError, match=message):
        create_model("fcn16s", 5, **VGG, checkpoint=tmp_path / "fine.pt")
    torch.save(create_model("dilated_context", 5, **VGG).state_dict(), tmp_path / "context.pt")
    with pytest.raises(ValueError, match=r"does not fit FrontEnd: context\.layers\.1\.weight is unknown"):
        create_model("dilated_frontend", 5, **VGG, checkpoint=tmp_path / "context.pt")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    for name in ("fcn16s", "dilated_context"):  # what lets a coarser network in lets no other in
        with pytest.raises(ValueError, match=r"is missing; .* more"):
            create_model(name, 5, **VGG, checkpoint=tmp_path / "foreign.pt")


def test_errors_of_from_torchvision():
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="torchvision is not installed")
    names = "'deeplabv3_resnet50', 'deeplabv3_resnet101', 'fcn_resnet50', 'fcn_resnet101'"
    with pytest.raises(ValueError, match=f"name must be one of {names}; got 'lraspp_mobilenet_v3_large'"):
        from_torchvision("lraspp_mobilenet_v3_large", {})
    message = r"state_dict must be that of torchvision's fcn_resnet50; classifier\.4\.weight is missing"
    with pytest.raises(ValueError, match=message):
        from_torchvision("fcn_resnet50", {})
    with pytest.raises(TypeError, match="state_dict must be a state_dict; got list"):
        from_torchvision("fcn_resnet50", [])
    fcn = segmentation.fcn_resnet50(weights=None, weights_backbone=None).state_dict()
    message = r"state_dict of torchvision's fcn_resnet101 does not fit Segmenter: backbone\.layer3\.6\.conv1\.weight is missing"
    with pytest.raises(ValueError, match=message):
        from_torchvision("fcn_resnet101", fcn)
    with pytest.raises(ValueError, match=r"classifier\.0\.convs\.0\.0\.weight is missing"):
        from_torchvision("deeplabv3_resnet50", fcn)


def test_errors_of_from_crfasrnn():
    names = ("spatial_ker_weights", "bilateral_ker_weights", "compatibility_matrix")
    layer = {f"crfrnn.{name}": torch.eye(3) for name in names}
    with pytest.raises(TypeError, match="state_dict must be a state_dict; got list"):
        from_crfasrnn([])
    message = "state_dict must hold one CRF layer of crfasrnn_pytorch; spatial_ker_weights is there {} times"
    with pytest.raises(ValueError, match=message.format(0)):
        from_crfasrnn({"conv1_1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=message.format(2)):
        from_crfasrnn(layer | {name: torch.eye(3) for name in names})
    begin = "state_dict of crfasrnn_pytorch does not fit CRF: "
    with pytest.raises(ValueError, match=begin + r"crfrnn\.compatibility_matrix has shape \(2, 2\) instead of \(3, 3\)$"):
        from_crfasrnn(layer | {"crfrnn.compatibility_matrix": torch.eye(2)})
    with pytest.raises(ValueError, match=begin + r"crfrnn\.spatial_ker_weights has shape \(3,\) instead of \(3, 3\)$"):
        from_crfasrnn(layer | {"crfrnn.spatial_ker_weights": torch.ones(3)})
    with pytest.raises(ValueError, match=begin + r"crfrnn\.bilateral_ker_weights is missing; crfrnn\.other is unknown$"):
        del layer["crfrnn.bilateral_ker_weights"]
        from_crfasrnn(layer | {"crfrnn.other": torch.eye(3)})


# Import.


PROGRAM = """
import sys, segops
assert "timm" not in sys.modules
sys.modules["timm"] = None
try:
    segops.models
except ImportError as error:
    print(error)
del sys.modules["timm"]
print(segops.models.list_models()[0])
segops.nonsense
"""


def test_models_are_imported_when_first_used():
    """And say that they need timm, where it is missing."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["segops.models needs timm: pip install 'segops[models]'", "fcn32s"]
    assert "module 'segops' has no attribute 'nonsense'" in done.stderr
