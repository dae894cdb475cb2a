"""The models by name."""

import difflib
import inspect
from functools import partial
from typing import NamedTuple

import torch

from .checkpoints import load_checkpoint, load_encoder, read_weights
from .deeplab import deeplabv1_largefov, deeplabv2, deeplabv3, deeplabv3_cascaded, deeplabv3plus
from .dilated import FrontEnd, FrontEndContext
from .discriminators import FCNDiscriminator, PatchGAN
from .fcn import FCN
from .gcn import GCN
from .jointseg import JointSeg
from .model import check_options, check_positive
from .pacnet import pacnet
from .pretrained import check_classifier, check_timm
from .pspnet import pspnet
from .refinenet import RefineNet
from .segnet import SegNetBasic, segnet, segnet_aspp
from .unet import r2unet, runet, unet, unet_inception

FCN_PAPER = "Long et al., Fully Convolutional Networks for Semantic Segmentation, arXiv:1411.4038"
SEGNET_PAPER = "Badrinarayanan et al., SegNet, arXiv:1511.00561"
DILATED_PAPER = "Yu and Koltun, Multi-Scale Context Aggregation by Dilated Convolutions, arXiv:1511.07122"
DEEPLABV3_PAPER = "Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv:1706.05587"
PAC_PAPER = "D. Yu, Semantic Image Segmentation with Pyramid Atrous Convolution and Boundary-aware Loss"
R2UNET_PAPER = "Alom et al., Recurrent Residual Convolutional Neural Network based on U-Net (R2U-Net), arXiv:1802.06955"
JOINTSEG_PAPER = "Haloi, Rethinking Convolutional Semantic Segmentation Learning, arXiv:1710.07991"

# name -> what builds it; its output stride where that is fixed: of FCNs that of the finest scores, else of the deepest map; the paper.
MODELS = {
    "fcn32s": (partial(FCN, output_stride=32), 32, FCN_PAPER),
    "fcn16s": (partial(FCN, output_stride=16), 16, FCN_PAPER),
    "fcn8s": (partial(FCN, output_stride=8), 8, FCN_PAPER),
    "segnet": (segnet, 32, SEGNET_PAPER),
    "segnet_basic": (SegNetBasic, 16, SEGNET_PAPER),
    "segnet_aspp": (segnet_aspp, 32, "Fischer and Malhotra, Neural Networks final project, 2021"),
    "dilated_frontend": (FrontEnd, 8, DILATED_PAPER),
    "dilated_context": (FrontEndContext, 8, DILATED_PAPER),
    "deeplabv1_largefov": (
        deeplabv1_largefov,
        None,
        "Chen et al., Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs, arXiv:1412.7062",
    ),
    "deeplabv2": (deeplabv2, None, "Chen et al., DeepLab: ... Atrous Convolution, and Fully Connected CRFs, arXiv:1606.00915"),
    "deeplabv3": (deeplabv3, None, DEEPLABV3_PAPER),
    "deeplabv3_cascaded": (deeplabv3_cascaded, None, DEEPLABV3_PAPER),
    "deeplabv3plus": (
        deeplabv3plus,
        None,
        "Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation, arXiv:1802.02611",
    ),
    "deeplabv3_pac": (partial(deeplabv3, context="pac", fuse=True), None, PAC_PAPER),
    "pacnet": (pacnet, None, PAC_PAPER),
    "refinenet": (RefineNet, 32, "Lin et al., RefineNet: Multi-Path Refinement Networks, arXiv:1611.06612"),
    "pspnet": (pspnet, None, "Zhao et al., Pyramid Scene Parsing Network, arXiv:1612.01105"),
    "gcn": (GCN, 32, "Peng et al., Large Kernel Matters: ... Global Convolutional Network, arXiv:1703.02719"),
    "unet": (unet, 16, "Ronneberger et al., U-Net, arXiv:1505.04597"),
    "unet_inception": (unet_inception, 16, JOINTSEG_PAPER),
    "r2unet": (r2unet, 16, R2UNET_PAPER),
    "runet": (runet, 16, R2UNET_PAPER),
    "jointseg": (JointSeg, 8, JOINTSEG_PAPER),
    "fcn_discriminator": (
        FCNDiscriminator,
        16,
        "Lalwani, DeepLab with adversarial loss for semi-supervised semantic segmentation",
    ),
    "patchgan": (
        PatchGAN,
        8,
        "Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, arXiv:1611.07004",
    ),
}


class ModelInfo(NamedTuple):
    """What `model_info` says. parameters: trainable ones, with 21 classes and 3 channels; backbone: the default, None for an encoder of its own;
    output_stride: the default."""

    name: str
    paper: str
    parameters: int
    backbone: str | None
    output_stride: int


def list_models():
    """The names that `create_model` knows."""
    return list(MODELS)


def model_info(name):
    """Paper, parameters, default backbone and output stride of a model, as `ModelInfo`. Nothing is allocated.

    Raises:
        ValueError: unknown name (lists near matches).
    """
    builder, output_stride, paper = _entry(name)
    defaults = {key: parameter.default for key, parameter in inspect.signature(builder).parameters.items()}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in builder(21).parameters())
    return ModelInfo(name, paper, parameters, defaults.get("backbone"), output_stride or defaults["output_stride"])


def create_model(
    name,
    num_classes,
    in_channels=3,
    backbone=None,
    output_stride=None,
    aux=False,
    pretrained=False,
    checkpoint=None,
    **options,
):
    """Builds a network by name.

    Args:
        name: one of `list_models()`.
        num_classes: classes to tell apart.
        in_channels: channels of the images, default 3.
        backbone: name of a timm model that has `features_only`; default the paper's (`model_info(name).backbone`).
        output_stride: input size over feature size, as far as model and backbone support it; default the paper's.
        aux: an auxiliary head, whose logits are `aux_logits` (default False); for networks on dilated backbones.
        pretrained: load the backbone's ImageNet weights through timm (default False). Or a file: a checkpoint of a classifier, as `segops fit`
            trains it with segops.train.Classification, or timm's state_dict; for a model with an encoder of its own a checkpoint with that encoder.
        checkpoint: a file with weights of this model (torch.save or safetensors), or of the one it grows out of (fcn32s -> fcn16s -> fcn8s,
            dilated_frontend -> dilated_context); default None.
        **options: further arguments of what builds the model: see its docstring.

    Returns a module in training mode: images (N, in_channels, H, W), of any size and floating point, -> `Output`. Discriminators are called
    (images, class_map).

    Raises:
        ValueError: unknown name or backbone (lists near matches), an output_stride, backbone or aux that the model does not have (says what it has), a
            checkpoint that does not fit (lists the first mismatches), a file that cannot be read, pretrained=True for a backbone of which timm has no weights.
        TypeError: an option that the model does not have.
        FileNotFoundError: no such checkpoint.
        OSError: timm's weights are not in the cache and cannot be fetched: says so within seconds,
            and what does without.
    """
    builder, fixed, _ = _entry(name)
    check_positive("num_classes", num_classes)
    check_positive("in_channels", in_channels)
    if backbone is not None:
        check_timm(backbone)
    known = inspect.signature(builder).parameters
    if output_stride is not None and fixed is None:
        options["output_stride"] = output_stride
    elif output_stride not in (None, fixed):
        raise ValueError(f"output_stride must be {fixed} for {name!r}; got {output_stride!r}")
    defaults = {key: parameter.default for key, parameter in known.items()}
    encoder_file = None
    if not isinstance(pretrained, bool):
        named = backbone or defaults.get("backbone")
        if named is None:
            encoder_file, pretrained = pretrained, False
        else:
            source, pretrained = pretrained, read_weights(pretrained, "pretrained")
            check_classifier(named, pretrained, source)
    for key, value, default in (("backbone", backbone, None), ("aux", aux, False), ("pretrained", pretrained, False)):
        if value == default:
            continue
        if key not in known:
            able = [other for other, (build, *_) in MODELS.items() if key in inspect.signature(build).parameters]
            raise ValueError(f"{key} must be {default} for {name!r}; got {value!r}; models that have it: {', '.join(able)}")
        options[key] = value
    check_options(repr(name), builder, options)
    model = builder(num_classes, in_channels=in_channels, **options)
    if encoder_file is not None:
        load_encoder(model, encoder_file)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _entry(name):
    if not isinstance(name, str) or name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(MODELS)}"
        raise ValueError(f"name must be a known model; got {name!r}; {hint}")
    return MODELS[name]
