"""Loading weights: checkpoints of these models, and torchvision's segmentation networks."""

import pickle
from pathlib import Path

import timm.models
from torch import nn

from .backbones import Backbone
from .deeplab import deeplabv3
from .segmenter import Segmenter, auxiliary_head, encoder_levels, fcn_head

SHOWN = 5  # mismatches that an error lists


def load_checkpoint(model, path):
    """Loads a file of weights, as torch.save or safetensors write them, into a model.

    The file holds a state_dict, or a dictionary with one under "state_dict" or "model".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of weights, or of another model: lists the first mismatches.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file; there is none at {path}")
    try:
        state_dict = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"checkpoint must be a file of weights; {path} cannot be read: {reason}") from error
    load_state_dict(model, state_dict, f"checkpoint {path}")


def load_state_dict(model, state_dict, source="state_dict"):
    """Loads weights; where names or shapes differ, an error lists the first of them."""
    state_dict, own = model.adapt_state_dict(state_dict), model.state_dict()
    mismatches = [f"{key} is missing" for key in own if key not in state_dict]
    mismatches += [f"{key} is unknown" for key in state_dict if key not in own]
    mismatches += [
        f"{key} has shape {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    if mismatches:
        more = f"; and {len(mismatches) - SHOWN} more" if len(mismatches) > SHOWN else ""
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(mismatches[:SHOWN])}{more}")
    model.load_state_dict(state_dict)


# torchvision's prefixes -> ours; the first that fits counts.
FCN_HEAD = {"0.": "0.0.", "1.": "0.1.", "4.": "2."}
TORCHVISION = {
    "deeplabv3": {
        "classifier.0.convs.4.1.": "context.pool.1.0.",
        "classifier.0.convs.4.2.": "context.pool.1.1.",
        "classifier.0.convs.": "context.branches.",
        "classifier.0.project.": "context.fuse.",
        "classifier.1.": "head.0.0.",
        "classifier.2.": "head.0.1.",
        "classifier.4.": "head.1.",
    },
    "fcn": {f"classifier.{theirs}": f"head.{ours}" for theirs, ours in FCN_HEAD.items()},
}
COMMON = {"backbone.": "encoder.features."} | {
    f"aux_classifier.{theirs}": f"auxiliary.{ours}" for theirs, ours in FCN_HEAD.items()
}


def from_torchvision(name, state_dict):
    """Our model with the weights of one of torchvision's segmentation networks: the same outputs to 1e-5, at output stride 8.

    Args:
        name: "deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50" or "fcn_resnet101".
        state_dict: that network's. Classes and auxiliary head are read off it.

    Raises:
        ValueError: another name, or weights of another network: lists the first mismatches.
    """
    names = [f"{kind}_{backbone}" for kind in TORCHVISION for backbone in ("resnet50", "resnet101")]
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(map(repr, names))}; got {name!r}")
    kind, backbone = name.split("_")
    if "classifier.4.weight" not in state_dict:
        raise ValueError(f"state_dict must be that of torchvision's {name}; classifier.4.weight is missing")
    num_classes, aux = len(state_dict["classifier.4.weight"]), "aux_classifier.4.weight" in state_dict
    if kind == "deeplabv3":
        model = deeplabv3(num_classes, backbone=backbone, output_stride=8, aux=aux, head="torchvision", multi_grid=None)
    else:
        encoder = Backbone(backbone, 8, levels=encoder_levels(aux))
        head = fcn_head(encoder.channels[-1], num_classes)
        model = Segmenter(num_classes, 3, encoder, nn.Identity(), head, auxiliary=auxiliary_head(encoder, num_classes, aux))
    prefixes = COMMON | TORCHVISION[kind]
    load_state_dict(model, {_renamed(key, prefixes): value for key, value in state_dict.items()}, f"torchvision's {name}")
    return model


def _renamed(key, prefixes):
    for theirs, ours in prefixes.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key
