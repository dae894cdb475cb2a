"""Loading weights: checkpoints of these models, torchvision's segmentation networks, CRF-RNN's layer."""

import argparse
import mmap
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import timm.models
import torch
from torch import nn

from segops.nn import CRF

from .backbones import Backbone
from .deeplab import deeplabv3
from .model import Model, misfit, shown
from .segmenter import Segmenter, auxiliary_head, encoder_levels, fcn_head

SHOWN = 5  # mismatches that an error lists

# What begins a file, at which byte, and what it is then.
SIGNS = (
    (b"\xff\xd8\xff", 0, "a JPEG image"),
    (b"\x89PNG", 0, "a PNG image"),
    (b"\x89HDF", 0, "an HDF5 file"),
    (b"\x1f\x8b", 0, "a gzip archive"),
    (b"ustar", 257, "a tar archive"),
    (b"PK", 0, "a zip archive that is cut short, damaged or of another program"),
)
# What torch.load calls with weights_only, and what then makes gigabytes of a few bytes.
BOMBS = re.compile(rb"c_codecs\nencode\n|c(?:builtins|__builtin__)\nbytearray\n")


def load_checkpoint(model, path):
    """Loads a file of weights into a model. Raises as `read_weights`, and ValueError where they do not fit: lists the first mismatches."""
    load_state_dict(model, read_weights(path, "checkpoint"), f"checkpoint {path}")


def read_weights(path, argument):
    """The state_dict in a file as torch.save or safetensors write them.

    The file holds a state_dict, or a dictionary with one under "state_dict" or "model". Of a training module's, which holds the model beside others, the
    model's are taken: those that begin with "model.".

    Raises: as `read_file`; ValueError where the file holds no state_dict.
    """
    saved = read_file(path, argument)
    for key in ("state_dict", "model"):
        if isinstance(saved, dict) and key in saved:
            saved = saved[key]
            break
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise ValueError(f"{argument} must be a file of weights; {path} holds no state_dict")
    state_dict = timm.models.clean_state_dict(named(saved))
    of_model = {key.removeprefix("model."): value for key, value in state_dict.items() if key.startswith("model.")}
    return of_model or state_dict


def named(state_dict):
    """A state_dict as a plain dict: an OrderedDict from a file may have an `items` of its own."""
    return dict(dict.items(state_dict))


def read_file(path, argument, map_location="cpu"):
    """What is in a file of torch.save or safetensors: tensors and plain values. Nothing of it is
    run, whoever wrote it.

    Raises:
        FileNotFoundError: there is no such file. TypeError: no path. ValueError: it cannot be read
            so; says what it is, as far as that can be told.
        They name `argument` and the file.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} must be a path; got {type(path).__name__}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{argument} must be a file; there is none at {path}")
    if not path.is_file():  # reading a FIFO would wait
        kind = "a directory" if path.is_dir() else stat.filemode(path.stat().st_mode)
        raise ValueError(f"{argument} must be a regular file; {path} is {kind}")
    with path.open("rb") as file:
        head = file.read(512)
    try:
        if head[8:9] == b"{":
            return safetensors.torch.load_file(path)
        _check_memory(path)
        # timm's own checkpoints hold their arguments as a Namespace, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the parsers raise anything; what PyTorch says advises to trust the file
        raise ValueError(f"{argument} {path} cannot be read as a checkpoint: {_reason(head, error)}") from error


class _Refused(Exception):
    pass


def _check_memory(path):
    """Refuses a file that would unpack to more than it is."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise _Refused("it is a TorchScript archive, a program; what is needed is its state_dict")
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise _Refused("it is a zip archive that unpacks to more than torch.save packs")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if BOMBS.search(content):
            raise _Refused("it holds bytes that are made as it is read; only tensors and plain values are")


def _reason(head, error):
    if isinstance(error, _Refused):
        return str(error)
    if not head:
        return "it is empty"
    wanted = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
    if wanted:
        return f"it wants Python's {wanted[1]}, which could run code; only tensors and plain values are read"
    if "deserialize object on" in str(error):  # map_location names a device that is not there
        return str(error).splitlines()[0]
    for sign, start, kind in SIGNS:
        if head.startswith(sign, start):
            return f"it is {kind}"
    if not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        return f"it is text, which begins {head[:40].decode(errors='replace')!a}"
    return "it is damaged, or not written by torch.save or safetensors"


def load_encoder(model, path):
    """Loads the weights of a model's own encoder from a file that has them among others. Raises as `load_checkpoint`."""
    if not hasattr(model, "encoder"):
        raise ValueError(f"pretrained must be False for {type(model).__name__}, which has no encoder; got {path!r}")
    weights = read_weights(path, "pretrained")
    encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    load_state_dict(model.encoder, encoder, f"pretrained {path}")


def load_state_dict(model, state_dict, source, names=lambda key: key):
    """Loads weights; where they do not fit, an error lists the first mismatches, by `names(our name)`."""
    if isinstance(model, Model):
        state_dict = model.adapt_state_dict(state_dict)
    check_state_dict(model, state_dict, source, names)
    model.load_state_dict(state_dict)


def check_state_dict(model, state_dict, source, names=lambda key: key):
    """Refuses weights that are not the model's, which may be on the meta device: of other names,
    shapes or dtypes, or not finite."""
    own = model.state_dict()
    mismatches = [(key, "is missing") for key in own if key not in state_dict]
    mismatches += [(key, "is unknown") for key in state_dict if key not in own]
    mismatches += [(key, misfit(value, state_dict[key])) for key, value in own.items() if key in state_dict]
    mismatches = [f"{shown(str(names(key)))} {reason}" for key, reason in mismatches if reason]
    if mismatches:
        more = f"; and {len(mismatches) - SHOWN} more" if len(mismatches) > SHOWN else ""
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(mismatches[:SHOWN])}{more}")


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
    _check_is_state_dict(state_dict)
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


# crfasrnn_pytorch's names -> ours.
CRFASRNN = {
    "spatial_ker_weights": "spatial_weight",
    "bilateral_ker_weights": "bilateral_weight",
    "compatibility_matrix": "compatibility",
}


def from_crfasrnn(state_dict, **options):
    """A `segops.nn.CRF` with the weights of sadeepj/crfasrnn_pytorch's CRF layer.

    Args:
        state_dict: of the layer, or of a network that holds one, as theirs does under "crfrnn.";
            the network's other weights are left alone. The classes are read off it.
        **options: of `segops.nn.CRF`, whose defaults are theirs.

    Raises:
        ValueError: weights of another module: lists the first mismatches.
        TypeError: no state_dict.

    Example:
        >>> crf = segops.models.from_crfasrnn(torch.load("crfasrnn_weights.pth", weights_only=True))
        >>> log_q = crf(logits, images)
    """
    _check_is_state_dict(state_dict)
    first = next(iter(CRFASRNN))
    found = [key for key in state_dict if f".{key}".endswith(f".{first}")]
    if len(found) != 1:
        raise ValueError(f"state_dict must hold one CRF layer of crfasrnn_pytorch; {first} is there {len(found)} times")
    prefix = found[0].removesuffix(first)
    layer = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    crf = CRF(len(layer[first]), **options)
    theirs = {ours: prefix + theirs for theirs, ours in CRFASRNN.items()}
    renamed = {CRFASRNN.get(key, prefix + key): value for key, value in layer.items()}
    load_state_dict(crf, renamed, "state_dict of crfasrnn_pytorch", lambda key: theirs.get(key, key))
    return crf


def _check_is_state_dict(state_dict):
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a state_dict; got {type(state_dict).__name__}")


def _renamed(key, prefixes):
    for before, after in prefixes.items():
        if key.startswith(before):
            return after + key.removeprefix(before)
    return key
