"""Loading weights: checkpoints of these models, and torchvision's segmentation networks."""

import os
from collections.abc import Mapping
from pathlib import Path

import timm.models
from torch import nn

from .backbones import Backbone
from .deeplab import deeplabv3
from .model import Model
from .segmenter import Segmenter, auxiliary_head, encoder_levels, fcn_head

SHOWN = 5  # mismatches that an error lists


def load_checkpoint(model, path):
    """Loads a file of weights into a model. Raises as `read_weights`, and ValueError where they do not fit: lists the first mismatches."""
    load_state_dict(model, read_weights(path, "checkpoint"), f"checkpoint {path}")


def read_weights(path, argument):
    """The state_dict in a file as torch.save or safetensors write them.

    The file holds a state_dict, or a dictionary with one under "state_dict" or "model". Of a training module's, which holds the model beside others, the
    model's are taken: those that begin with "model.".

    Raises:
        FileNotFoundError: there is no such file. TypeError: no path. ValueError: it is no file of weights. They name `argument`.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} must be a path; got {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file; there is none at {path}")
    try:
        state_dict = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # torch.load raises what its parsers do
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{argument} must be a file of weights; {path} is not: {type(error).__name__}: {reason}") from error
    of_model = {key.removeprefix("model."): value for key, value in state_dict.items() if key.startswith("model.")}
    return of_model or state_dict


def load_encoder(model, path):
    """Loads the weights of a model's own encoder from a file that has them among others. Raises as `load_checkpoint`."""
    if not hasattr(model, "encoder"):
        raise ValueError(f"pretrained must be False for {type(model).__name__}, which has no encoder; got {path!r}")
    weights = read_weights(path, "pretrained")
    encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    load_state_dict(model.encoder, encoder, f"pretrained {path}")


def load_state_dict(model, state_dict, source, names=lambda key: key):
    """Loads weights that fit: see `check_state_dict`."""
    if isinstance(model, Model):
        state_dict = model.adapt_state_dict(state_dict)
    check_state_dict(model, state_dict, source, names)
    model.load_state_dict(state_dict)


def check_state_dict(module, state_dict, source, names=lambda key: key):
    """Where names or shapes differ, a ValueError lists the first of them, by `names(our name)`."""
    own = module.state_dict()
    mismatches = [f"{names(key)} is missing" for key in own if key not in state_dict]
    mismatches += [f"{names(key)} is unknown" for key in state_dict if key not in own]
    shapes = {key: getattr(value, "shape", None) for key, value in state_dict.items()}
    mismatches += [
        f"{names(key)} has shape {shapes[key] and tuple(shapes[key])} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in shapes and shapes[key] != value.shape
    ]
    if mismatches:
        more = f"; and {len(mismatches) - SHOWN} more" if len(mismatches) > SHOWN else ""
        raise ValueError(f"{source} does not fit {type(module).__name__}: {'; '.join(mismatches[:SHOWN])}{more}")


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

    `create_model("deeplabv3", ..., head="torchvision", multi_grid=None, output_stride=8)` is the same network; the FCNs have no name there.

    Args:
        name: "deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50" or "fcn_resnet101".
        state_dict: that network's. Classes and auxiliary head are read off it.

    Raises:
        ValueError: another name, or weights of another network: lists the first mismatches.
        TypeError: no state_dict.
    """
    names = [f"{kind}_{backbone}" for kind in TORCHVISION for backbone in ("resnet50", "resnet101")]
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a state_dict; got {type(state_dict).__name__}")
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
    theirs = {ours: theirs for theirs, ours in prefixes.items()}
    renamed = {_renamed(key, prefixes): value for key, value in state_dict.items()}
    load_state_dict(model, renamed, f"state_dict of torchvision's {name}", lambda key: _renamed(key, theirs))
    return model


def _renamed(key, prefixes):
    for before, after in prefixes.items():
        if key.startswith(before):
            return after + key.removeprefix(before)
    return key
