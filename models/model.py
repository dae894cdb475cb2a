"""What every reference model shares: its output, its checks, prediction, and room for images of any size."""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from segops import upsample_argmax


@dataclass(eq=False)
class Output:
    """What a model returns: a pytree, which torch.compile and torch.export take.

    logits: (N, num_classes, h, w), at the network's own resolution: before any resizing that the network does not learn from.
    aux_logits: (N, num_classes, h', w') of the auxiliary head, or None. A tuple of these, one for each scale, where the input has several.
    class_logits: (N, image_classes) of a classifier of whole images, or None.
    """

    logits: torch.Tensor
    aux_logits: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    class_logits: torch.Tensor | None = None


torch.export.register_dataclass(Output, serialized_type_name="segops.models.Output")


class Model(nn.Module):
    """Base of all models: `num_classes`, `in_channels`, and what a checkpoint may lack."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_channels", in_channels)
        self.num_classes, self.in_channels = num_classes, in_channels

    def adapt_state_dict(self, state_dict):
        """A checkpoint as this model loads it: here unchanged; models that grow out of others fill in what those lack."""
        return state_dict


class SegmentationModel(Model):
    """Base of what segments. Subclasses give `segment`, images -> Output; where that needs sides that are multiples of `multiple`, images are padded at
    the bottom and right by reflection, and logits of the padded size are cropped."""

    multiple = 1
    align_corners = False  # of the resizing from logits to image

    def forward(self, images):
        """(N, in_channels, H, W) floating point -> Output.

        Raises:
            ValueError: another number of dimensions or channels, or an empty image.
            TypeError: integer images.
        """
        check_images(images, self.in_channels)
        if self.multiple == 1:
            return self.segment(images)
        output = self.segment(pad_to_multiple(images, self.multiple))
        return Output(crop(output.logits, 0, images.shape[2:]), output.aux_logits, output.class_logits)

    @torch.no_grad()
    def predict(self, images):
        """Class indices (N, H, W), int64, at the images' size. Leaves the mode as it is: call eval() before."""
        return self.to_classes(self(images).logits, images.shape[2:])

    @torch.no_grad()
    def to_classes(self, logits, size):
        """Class indices (N, H, W), int64, of logits at `size`: resized bilinearly, then the largest; with a single class 1 where its logit is
        positive."""
        if self.num_classes > 1 and not self.align_corners:
            return upsample_argmax(logits, size)
        if logits.shape[2:] != tuple(size):
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)
        return (logits[:, 0] > 0).long() if self.num_classes == 1 else logits.argmax(1)


def check_images(images, channels, name="images"):
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"{name} must be (N, {channels}, H, W); got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {images.dtype}")
    if 0 in images.shape[2:]:
        raise ValueError(f"{name} must have a height and a width of at least 1; got {tuple(images.shape)}")


def pad_to_multiple(images, multiple):
    """Pads by reflection at the bottom and right, up to the next multiple of both sides."""
    # Written as a product: symbolic sizes of poolings stay short where the factor is in sight.
    height, width = (multiple * ((side + multiple - 1) // multiple) for side in images.shape[2:])
    return mirror(images, 0, height - images.shape[2], 0, width - images.shape[3])


def mirror(images, top, bottom, left, right):
    """Pads by reflection, the edge not repeated.

    Unlike F.pad as often as it takes, so that an image may be smaller than its margin; and an exported program does not keep to sizes
    that need padding, or to those that need none.
    """
    rows = _reflected(images.shape[2], top, bottom, images.device)
    columns = _reflected(images.shape[3], left, right, images.device)
    channels_last = images.shape[1] > 1 and images.stride(1) == 1  # also of a slice
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images[:, :, rows[:, None], columns].contiguous(memory_format=layout)


def _reflected(size, before, after, device):
    period = max(2 * (size - 1), 1)
    index = torch.arange(-before, size + after, device=device) % period
    return torch.minimum(index, period - index)


def crop(map, offset, size):
    """The window of `size` (h, w) that begins at (offset, offset)."""
    if not torch.compiler.is_exporting():
        return map[:, :, offset : offset + size[0], offset : offset + size[1]]
    # A slice's strides would tie the exported program to sizes that need cropping, or to those that need none.
    rows, columns = (torch.arange(offset, offset + side, device=map.device) for side in size)
    return map[:, :, rows[:, None], columns]


def check_one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")


def check_positive(name, value):
    if not _is_positive(value):
        raise ValueError(f"{name} must be a positive int; got {value!r}")


def check_all_positive(name, values):
    if not isinstance(values, tuple | list) or not values or not all(map(_is_positive, values)):
        raise ValueError(f"{name} must be positive ints; got {values!r}")


def _is_positive(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


COMMON = ("num_classes", "in_channels", "pretrained")  # what callers give by other ways


def check_options(owner, function, options):
    """Refuses options that are no parameters of `function`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            has = ", ".join(known for known in parameters if known not in COMMON) or "none"
            raise TypeError(f"{owner} has no option {name!r}; it has {has}")


def misfit(own, value):
    """What keeps a saved value from being loaded into a tensor of ours, as words, or None."""
    if type(value) not in (torch.Tensor, nn.Parameter):
        return f"is a {type(value).__name__} instead of a tensor"
    if value.shape != own.shape:
        return f"has shape {tuple(value.shape)} instead of {tuple(own.shape)}"
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return "is not a dense tensor with values"
    floating = value.dtype.is_floating_point and value.dtype.itemsize > 1  # not of 8 bits
    if value.dtype != own.dtype and not (floating and own.dtype.is_floating_point):
        return f"has dtype {value.dtype} instead of {own.dtype}"
    if floating and not torch.isfinite(value).all():
        return "holds NaN or infinity"
    return None


def shown(key):
    """The name of a weight as an error may show it, whoever gave it."""
    return key if key.isprintable() and len(key) < 200 else ascii(key[:200])
