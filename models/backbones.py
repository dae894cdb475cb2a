"""timm backbones as feature extractors, dilated as far as they can be."""

import difflib
import functools

import timm
import torch
from torch import nn

from .layers import MaxPool2d
from .model import crop, pad_to_multiple

LEVELS = (-4, -3, -2, -1)  # of a timm pyramid: strides 4, 8, 16, 32 where nothing is dilated


class Backbone(nn.Module):
    """Feature maps of a timm model at a given output stride.

    Args:
        name: any timm model that has `features_only`.
        output_stride: image size over the size of the last map.
        in_channels: channels of the images, default 3.
        pretrained: load the weights that timm has (default False).
        levels: which maps, counted from the last, -1 (default: that alone). -4 has stride 4 in every common pyramid.
        full_rate: the first block of a dilated ResNet stage at the stage's own rate, as in Caffe, TensorFlow and PSPNet's code; by default
            at the rate of the stage before, as in torchvision. The same weights load, the results differ.
        multi_grid: factors on the rates of the blocks of a ResNet's last stage, default None.

    Attributes: channels and strides, one for each level.

    VGGs are dilated as in DeepLab: 3x3 pooling throughout, its stride 1 where the output stride is reached, convolutions behind it at rate 2.

    Raises:
        ValueError: timm does not know the name; the model has no features at this output stride (names those it has); full_rate or multi_grid
            without a ResNet.
    """

    def __init__(self, name, output_stride, in_channels=3, pretrained=False, levels=(-1,), full_rate=False, multi_grid=None):
        super().__init__()
        check_timm(name)
        options = {"in_chans": in_channels, "pretrained": pretrained, "out_indices": levels}
        self.features = _features(name, output_stride, **options)
        if self.features is None:
            with torch.device("meta"):
                able = [stride for stride in (4, 8, 16, 32) if _features(name, stride, out_indices=(-1,)) is not None]
            has = f"one of {able}" if able else "another backbone's: this one has no pyramid of features"
            raise ValueError(f"output_stride must be {has} for backbone {name!r}; got {output_stride!r}")
        for module in list(self.features.modules()):
            for key, child in module.named_children():
                if type(child) is nn.MaxPool2d and not child.ceil_mode:
                    setattr(module, key, MaxPool2d(child.kernel_size, child.stride, child.padding))
        info = self.features.feature_info
        self.channels, self.strides = info.channels(), [min(stride, output_stride) for stride in info.reduction()]
        self.channels_last = getattr(self.features, "output_fmt", None) == "NHWC"
        if full_rate or multi_grid is not None:
            self._set_rates(name, output_stride, full_rate, multi_grid or (1,))
        self.multiple = _multiple(name, output_stride)
        self.unrectified = {}

    def forward(self, images):
        size = images.shape[2:]
        maps = self.features(images if self.multiple == 1 else pad_to_multiple(images, self.multiple))
        if self.channels_last:
            maps = [map.permute(0, 3, 1, 2) for map in maps]
        if self.multiple > 1:
            maps = [crop(map, 0, [-(-side // s) for side in size]) for map, s in zip(maps, self.strides, strict=True)]
        if self.unrectified:
            maps[0] = self.unrectified.pop(maps[0].device)
        return maps

    def _set_rates(self, name, output_stride, full_rate, multi_grid):
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
        stack.act3.inplace = False
        stack.conv2.register_forward_hook(self._keep)

    def _keep(self, module, arguments, output):
        self.unrectified[output.device] = output


def check_timm(name):
    if not isinstance(name, str) or not timm.is_model(name):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=5)
        raise ValueError(f"backbone must be a timm model; got {name!r}; near matches: {', '.join(near) or 'none'}")


def is_resnet(name):
    """Whether timm's model is a ResNet, whose stages have names and whose blocks have rates."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == "timm.models.resnet"


def is_aligned_xception(name):
    return name.split(".")[0] in ("xception41", "xception65", "xception71")


def pyramid(name):
    """The levels of all maps of a timm model, for `Backbone`."""
    check_timm(name)
    with torch.device("meta"):
        features = _features(name, 32)
    if features is None:
        raise ValueError(f"backbone must have a pyramid of features down to stride 32; got {name!r}")
    return tuple(range(-len(features.feature_info.reduction()), 0))


def set_rate(block, first, rate):
    """Sets the rates of a ResNet block's 3x3 convolutions: that of the first, and that of any other."""
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for index, convolution in enumerate(convolutions):
        convolution.dilation = convolution.padding = (rate, rate) if index else (first, first)


def _features(name, output_stride, **options):
    """The timm model cut after its last feature map, or None where it has none at this output stride."""
    options |= {"features_only": True}
    for sizes in ({"dynamic_img_size": True, "dynamic_img_pad": True}, {"strict_img_size": False}, {}):  # ViTs, Swins, others
        for strides in ({"output_stride": output_stride}, {}):
            try:
                features = timm.create_model(name, **strides, **sizes, **options)
            except (AssertionError, NotImplementedError, ValueError):
                return _dilated_vgg(name, output_stride, options)
            except (RuntimeError, TypeError):  # no such argument, or no feature maps at all
                continue
            return features if features.feature_info.reduction()[-1] == output_stride else None
    return None


@functools.cache
def _multiple(name, output_stride):
    """What the sides of images must be multiples of: 1, or 32 for models whose maps of two strides meet, or which cut images into windows."""
    with torch.device("meta"), torch.no_grad():
        features = _features(name, output_stride).eval()
        try:
            features(torch.empty(1, 3, 65, 97))
        except (AssertionError, RuntimeError, ValueError):
            return 32
    return 1


def _dilated_vgg(name, output_stride, options):
    if not name.startswith("vgg") or output_stride not in (8, 16):
        return None
    features, stride, rate = timm.create_model(name, **options), 1, 1
    for module in features.modules():
        if isinstance(module, nn.MaxPool2d):
            module.kernel_size, module.padding = 3, 1
            if stride == output_stride:
                module.stride, rate = 1, 2 * rate
            else:
                stride *= 2
        elif isinstance(module, nn.Conv2d):
            module.dilation = module.padding = (rate, rate)
    return features


def check_vgg(name):
    check_timm(name)
    if not name.startswith("vgg"):
        raise ValueError(f"backbone must be a VGG of timm (vgg16, vgg16_bn, vgg11, ...) for this model; got {name!r}")


def create_vgg(name, in_channels, pretrained):
    """timm's whole VGG, for the models that take it apart: `features`, and fc6 and fc7 as convolutions in `pre_logits`.

    Raises:
        ValueError: it is not a VGG.
    """
    check_vgg(name)
    return timm.create_model(name, in_chans=in_channels, pretrained=pretrained, num_classes=1)


def create_vgg_features(name, in_channels, pretrained):
    """Its `features` alone, as an nn.Sequential. Raises as `create_vgg`."""
    check_vgg(name)
    features = timm.create_model(name, in_chans=in_channels, pretrained=pretrained, features_only=True)
    return nn.Sequential(*features.children())


def vgg_stages(features):
    """A VGG's `features` cut behind each pooling."""
    ends = [index + 1 for index, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
    return [features[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
