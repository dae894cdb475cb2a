"""Every model at a width that two cores train in seconds, on backbones made for tests."""

from typing import Any, NamedTuple

import timm.models.resnet
import timm.models.vgg
import torch
from segops.models import create_model
from timm.models import build_model_with_cfg, register_model
from torch import nn
from torch.utils._pytree import tree_leaves

CLASSES = 5
VGG_CONFIG = timm.models.vgg._cfg()  # tests of pretrained weights put a "file" into it
STAGES = [8, "M", 8, "M", 16, "M", 16, "M", 16, 16, "M"]


class TinyVGG(timm.models.vgg.VGG):
    """With 64 channels in fc6 and fc7."""

    def __init__(self, *args, **options):
        super().__init__(*args, mlp_ratio=1 / 64, **options)  # timm's own are wide, and take long to make
        self.pre_logits = timm.models.vgg.ConvMlp(self.num_features, 64)


def _vgg(pretrained, out_indices=(0, 1, 2, 3, 4, 5), **options):
    features = {"flatten_sequential": True, "out_indices": out_indices}
    options |= {"model_cfg": STAGES, "feature_cfg": features, "pretrained_cfg": VGG_CONFIG}
    return build_model_with_cfg(TinyVGG, "vggtiny", pretrained, **options)


@register_model
def vggtiny(pretrained=False, **options):
    return _vgg(pretrained, **options)


@register_model
def vggtiny_bn(pretrained=False, **options):
    return _vgg(pretrained, norm_layer=nn.BatchNorm2d, **options)


@register_model
def resnettiny(pretrained=False, **options):
    """Two blocks in the last stage, as the cascade and the multi-grid need."""
    shape = {"block": timm.models.resnet.BasicBlock, "layers": (1, 1, 1, 2), "channels": (16, 16, 32, 32)}
    options |= {"pretrained_cfg": timm.models.resnet._cfg()}
    return timm.models.resnet._create_resnet("resnettiny", pretrained, **shape, **options)


class Case(NamedTuple):
    """A small model. stride: of its logits; least: the smallest side that an exported program is asked for, where logits are 2x2."""

    name: str
    options: dict[str, Any]
    stride: int = 1
    least: int = 48

    def __str__(self):
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def judges(self):
        """Whether it is a discriminator, which takes a class map beside the images."""
        return self.name in ("fcn_discriminator", "patchgan")

    def build(self, num_classes=CLASSES, **options):
        torch.manual_seed(0)
        return create_model(self.name, num_classes, **self.options | options)

    def inputs(self, size, batch=2, channels=3):
        images = torch.randn(batch, channels, *size)
        return (images, torch.randn(batch, CLASSES, *size).softmax(1)) if self.judges else (images,)

    def logits_size(self, size):
        if self.name == "patchgan":
            halvings = {16: 1, 70: 3, 286: 5}[self.options.get("receptive_field", 70)]
            return tuple(max(side // 2**halvings, 3) - 2 for side in size)
        return tuple(-(-side // self.stride) for side in size)


VGG, RESNET = {"backbone": "vggtiny_bn"}, {"backbone": "resnettiny"}
NARROW = RESNET | {"channels": 16}

SMALL = [
    Case("fcn32s", VGG),
    Case("fcn16s", VGG),
    Case("fcn8s", VGG),
    Case("segnet", VGG),
    Case("segnet_basic", {"channels": 8}),
    Case("segnet_aspp", VGG | {"channels": 8}),
    Case("dilated_frontend", VGG, 8),
    Case("dilated_context", VGG, 8),
    Case("deeplabv1_largefov", VGG | {"channels": 64}, 8),
    Case("deeplabv2", RESNET, 8),
    Case("deeplabv3", NARROW, 16),
    Case("deeplabv3_cascaded", RESNET, 16),
    Case("deeplabv3plus", NARROW, 4),
    Case("deeplabv3_pac", NARROW, 16),
    Case("pacnet", NARROW, 16),
    Case("refinenet", NARROW, 4),
    Case("pspnet", NARROW, 8),
    Case("gcn", RESNET),
    Case("unet", {"channels": 8}),
    Case("unet_inception", {"channels": 4}),
    Case("r2unet", {"channels": 4, "t": 1}),
    Case("runet", {"channels": 4}),
    Case("jointseg", {"widths": (8, 16), "blocks": 1}),
    Case("fcn_discriminator", {"channels": 8}),
    Case("patchgan", {"channels": 8}),
]

MULTI_SCALE = Case("deeplabv2", RESNET | {"multi_scale": True}, 8)
BILINEAR = Case("fcn_discriminator", {"channels": 8, "decoder": "bilinear"})

# Options that make another graph.
VARIANTS = [
    MULTI_SCALE,
    Case("deeplabv3", NARROW | {"aux": True, "output_stride": 8, "head": "torchvision"}, 8),
    Case("pacnet", NARROW | {"norm": "per_rate", "merge": "concat", "aux": True}, 16),
    Case("unet", RESNET | {"channels": 8}),
    BILINEAR,
    Case("patchgan", {"channels": 4, "receptive_field": 286}, least=128),
]

# Options that change little of it.
OPTIONS = [
    Case("fcn8s", VGG | {"at_once": True, "learn_upsampling": True}),
    Case("dilated_context", VGG | {"context": "large"}, 8),
    Case("deeplabv2", VGG | {"output_stride": 16}, 16),
    Case("deeplabv3plus", NARROW | {"aux": True, "separable": False, "output_stride": 32}, 4),
    Case("pspnet", NARROW | {"aux": True, "output_stride": 16}, 16),
    Case("unet", {"channels": 4, "merge": "sum"}),
    Case("fcn16s", {"backbone": "vggtiny"}),
    Case("deeplabv1_largefov", {"backbone": "vggtiny", "output_stride": 16, "channels": 64}, 16),
    Case("deeplabv3", RESNET | {"context": "ppm", "full_rate": True}, 16),
    Case("deeplabv3plus", NARROW | {"context": "pac"}, 4),
    Case("pacnet", NARROW | {"norm": "per_rate"}, 16),
    Case("pacnet", NARROW | {"merge": "concat", "output_stride": 8}, 8),
    Case("pacnet", RESNET | {"context": "none", "output_stride": 32}, 32),
    Case("refinenet", NARROW | {"crp_blocks": 2}, 4),
    Case("gcn", RESNET | {"kernel_size": 7, "learn_upsampling": True}),
    Case("unet", VGG | {"channels": 8, "merge": "sum"}),
    Case("unet_inception", {"channels": 8, "blocks": 2, "merge": "sum"}),
    Case("r2unet", {"channels": 4, "t": 0, "merge": "sum"}),
    Case("jointseg", {"widths": (16, 24, 32), "image_classes": 3}),
    Case("fcn_discriminator", {"channels": 8, "conditioned": False}),
    Case("patchgan", {"channels": 8, "receptive_field": 16}),
]


@torch.no_grad()
def perturbed(model):
    """The model off its initialisation, where some parameters are zero and some statistics trivial."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def total(output):
    """One number of everything that a model returns."""
    return sum(tensor.float().square().mean() for tensor in tree_leaves(output) if tensor is not None)


def assert_same(output, expected):
    """Equal up to float32's rounding in another order of summation: 1e-5 of the largest value."""
    pairs = list(zip(tree_leaves(output), tree_leaves(expected), strict=True))
    for value, wanted in pairs:
        assert (value is None) == (wanted is None)
        if wanted is not None:
            scale = wanted.abs().max()
            assert scale > 0  # zeros would equal zeros
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * scale.item())
