"""timm backbones as feature extractors, dilated as far as they can be."""

import functools
from typing import NamedTuple

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from .layers import MaxPool2d
from .model import check_all_positive, crop, pad_to_multiple
from .pretrained import check_timm, create_timm

LEVELS = (-4, -3, -2, -1)  # of a timm pyramid: strides 4, 8, 16, 32 where nothing is dilated


class Backbone(nn.Module):
    """Feature maps of a timm model at a given output stride.

    Args:
        name: any timm model that has `features_only`.
        output_stride: image size over the size of the last map.
        in_channels: channels of the images, default 3.
        pretrained: load the weights that timm has (default False), or those of this state_dict of a classifier.
        levels: which maps, counted from the last, -1 (default: that alone). -4 has stride 4 in every common pyramid.
        full_rate: the first block of a dilated ResNet stage at the stage's own rate, as in Caffe, TensorFlow and PSPNet's code; by default
            at the rate of the stage before, as in torchvision. The same weights load, the results differ.
        multi_grid: factors on the rates of the blocks of a ResNet's last stage, default None.

    Attributes: channels and strides, one for each level.

    VGGs at stride 8 or 16 are dilated as in DeepLab: 3x3 pooling throughout, its stride 1 where the output stride is reached, convolutions behind
    it at rate 2. Batch normalisation is timm's: in training, a batch of one image needs more than one position in the deepest map.

    Raises:
        ValueError: timm does not know the name; the model has no features at this output stride (names those it has), too few maps, or takes
            one size of images only; full_rate or multi_grid without a ResNet; timm has no weights
            of the model.
        OSError: timm's weights are not in the cache and cannot be fetched.
    """

    def __init__(self, name, output_stride, in_channels=3, pretrained=False, levels=(-1,), full_rate=False, multi_grid=None):
        super().__init__()
        check_timm(name)
        structure = _structure(name, output_stride)
        if structure is None:
            able = [stride for stride in (4, 8, 16, 32) if _structure(name, stride) is not None]
            has = f"one of {able}" if able else "another backbone's: this one has no pyramid of features"
            raise ValueError(f"output_stride must be {has} for backbone {name!r}; got {output_stride!r}")
        if structure.maps < -min(levels):
            raise ValueError(f"backbone must have {-min(levels)} maps for this model; {name!r} has {structure.maps}")
        self.features = create_timm(
            name, pretrained, features_only=True, in_chans=in_channels, out_indices=levels, **structure.arguments
        )
        if structure.dilated_vgg:
            _dilate_vgg(self.features, output_stride)
        for module in list(self.features.modules()):
            for key, child in module.named_children():
                if type(child) is nn.MaxPool2d and not child.ceil_mode and isinstance(child.stride, int):
                    setattr(module, key, MaxPool2d(child.kernel_size, child.stride, child.padding))
        info = self.features.feature_info
        self.channels, self.strides = info.channels(), [min(stride, output_stride) for stride in info.reduction()]
        self.channels_last = getattr(self.features, "output_fmt", None) == "NHWC"
        self.multiple = structure.multiple
        if full_rate or multi_grid is not None:
            self._set_rates(name, output_stride, full_rate, (1,) if multi_grid is None else multi_grid)

    def forward(self, images):
        size = images.shape[2:]
        maps = self.features(images if self.multiple == 1 else pad_to_multiple(images, self.multiple))
        if self.channels_last:
            maps = [map.permute(0, 3, 1, 2) for map in maps]
        if self.multiple > 1:
            maps = [crop(map, 0, [-(-side // s) for side in size]) for map, s in zip(maps, self.strides, strict=True)]
        return maps

    def _set_rates(self, name, output_stride, full_rate, multi_grid):
        check_all_positive("multi_grid", multi_grid)
        if not is_resnet(name):
            raise ValueError(f"full_rate and multi_grid need a ResNet; got backbone {name!r}")
        for stage, stride in ((self.features.layer3, 16), (self.features.layer4, 32)):
            rate = max(stride // output_stride, 1)
            first = rate if full_rate else max(rate // 2, 1)
            for index, block in enumerate(stage):
                factor = multi_grid[index % len(multi_grid)] if stride == 32 else 1
                set_rate(block, factor * (rate if index else first), factor * rate)

    def tap_before_relu(self):
        """Makes the first map of an aligned Xception, the second convolution of block 2, what it is before the ReLU: TensorFlow's DeepLab v3+
        takes it there, timm behind it."""
        stack = self.features["blocks_1"].stack
        stack.act3.__class__ = nn.Identity  # not another module: timm takes the map by a hook on this one
        stack.conv3.register_forward_pre_hook(_rectify)


def _rectify(module, arguments):
    return (torch.relu(arguments[0]),)


@functools.cache
def is_resnet(name):
    """Whether timm's model is made of ResNet's blocks, which have rates."""
    check_timm(name)
    with torch.device("meta"):
        try:
            features = timm.create_model(name, features_only=True)
        except (RuntimeError, TypeError):  # it has no feature maps at all
            return False
    stages = [getattr(features, stage, None) for stage in ("layer3", "layer4")]
    return all(isinstance(s, nn.Sequential) and all(isinstance(b, BasicBlock | Bottleneck) for b in s) for s in stages)


def is_aligned_xception(name):
    return name.split(".")[0] in ("xception41", "xception65", "xception71")


def pyramid(name):
    """The levels of all maps of a timm model, for `Backbone`."""
    check_timm(name)
    structure = _structure(name, 32)
    if structure is None:
        raise ValueError(f"backbone must have a pyramid of features down to stride 32; got {name!r}")
    return tuple(range(-structure.maps, 0))


def set_rate(block, first, rate):
    """Sets the rates of a ResNet block's 3x3 convolutions: that of the first, and that of any other."""
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for index, convolution in enumerate(convolutions):
        convolution.dilation = convolution.padding = (rate, rate) if index else (first, first)


class Structure(NamedTuple):
    """How timm makes a backbone at an output stride: what it takes for that, the number of maps, and what images' sides must be multiples
    of: 1, or 32 for models whose maps of two strides meet, which cut images into windows, or whose maps are not ceil(side / stride)."""

    arguments: dict
    maps: int
    multiple: int
    dilated_vgg: bool


@functools.cache
def _structure(name, output_stride):
    """The `Structure` of a timm model, found without allocating it, or None where it has no maps at this output stride.

    Raises:
        ValueError: the model takes no images but of one size.
    """
    with torch.device("meta"), torch.no_grad():
        features, arguments, dilated_vgg = _probe(name, output_stride)
        if features is None:
            return None
        strides = [min(stride, output_stride) for stride in features.feature_info.reduction()]
        nhwc = getattr(features, "output_fmt", None) == "NHWC"
        for multiple, sizes in ((1, ((65, 97), (100, 131))), (32, ((64, 96),))):
            if all(_fits(features.eval(), size, strides, nhwc) for size in sizes):
                return Structure(arguments, len(strides), multiple, dilated_vgg)
    raise ValueError(f"backbone must take images of any size; timm's {name!r} does not")


def _probe(name, output_stride):
    for sizes in ({"dynamic_img_size": True, "dynamic_img_pad": True}, {"strict_img_size": False}, {}):  # ViTs, Swins, others
        for strides in ({"output_stride": output_stride}, {}):
            arguments = strides | sizes
            try:
                features = timm.create_model(name, features_only=True, **arguments)
            except (AssertionError, NotImplementedError, ValueError):
                if not is_vgg(name) or output_stride not in (8, 16):
                    return None, None, False
                features = timm.create_model(name, features_only=True)
                _dilate_vgg(features, output_stride)
                return features, {}, True
            except (RuntimeError, TypeError):  # no such argument, or no feature maps at all
                continue
            return (features if features.feature_info.reduction()[-1] == output_stride else None), arguments, False
    return None, None, False


def _fits(features, size, strides, nhwc):
    """Whether every map has ceil(side / stride) rows and columns."""
    try:
        maps = features(torch.empty(1, 3, *size))
    except (AssertionError, RuntimeError, ValueError):
        return False
    sides = [tuple(map.shape[1:3] if nhwc else map.shape[2:]) for map in maps]
    return sides == [tuple(-(-side // stride) for side in size) for stride in strides]


def _dilate_vgg(features, output_stride):
    """DeepLab's VGG: 3x3 pooling, at stride 1 where the output stride is reached, and convolutions behind that at rate 2."""
    stride = rate = 1
    for module in features.modules():
        if isinstance(module, nn.MaxPool2d):
            module.kernel_size, module.padding = 3, 1
            if stride == output_stride:
                module.stride, rate = 1, 2 * rate
            else:
                stride *= 2
        elif isinstance(module, nn.Conv2d):
            module.dilation = module.padding = (rate, rate)


def is_vgg(name):
    return name.startswith("vgg")


def check_vgg(name):
    check_timm(name)
    if not is_vgg(name):
        raise ValueError(f"backbone must be a VGG of timm (vgg16, vgg16_bn, vgg11, ...) for this model; got {name!r}")


def create_vgg(name, in_channels, pretrained):
    """timm's whole VGG, for the models that take it apart: `features`, and fc6 and fc7 as convolutions in `pre_logits`.

    Raises:
        ValueError: it is not a VGG.
    """
    check_vgg(name)
    return create_timm(name, pretrained, in_chans=in_channels, num_classes=1)


def create_vgg_features(name, in_channels, pretrained):
    """Its `features` alone, as an nn.Sequential. Raises as `create_vgg`."""
    check_vgg(name)
    features = create_timm(name, pretrained, in_chans=in_channels, features_only=True)
    return nn.Sequential(*features.children())


def fully_convolutional(vgg):
    """fc6 and fc7 of a whole VGG, ReLU and dropout behind each."""
    fc6, fc7 = vgg.pre_logits.fc1, vgg.pre_logits.fc2
    return nn.Sequential(fc6, nn.ReLU(), nn.Dropout(0.5), fc7, nn.ReLU(), nn.Dropout(0.5))


def vgg_stages(features):
    """A VGG's `features` cut behind each pooling."""
    ends = [index + 1 for index, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
    return [features[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
