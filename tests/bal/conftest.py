"""What the tests of the boundary-aware loss share: labels, cases, the float64 truth, the bounds of the contract."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

import segops
from segops.ops.bal import reference
from segops.ops.bal.edge import EdgeSettings
from segops.ops.bal.labels import index_classes

from ..accuracy import assert_close
from ..contract import results


def draw_labels(n, classes, height, width, dtype=torch.int64, ignore_index=255, seed=0):
    """Blobs and noise, a tenth of the pixels ignored where the dtype can say so; the first pixel counts."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.randint(classes, (n, -(-height // 5), -(-width // 5)), generator=generator)
    labels = blobs.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width]
    noise = torch.rand(n, height, width, generator=generator)
    labels = labels.where(noise > 0.1, torch.randint(classes, (n, height, width), generator=generator))
    if torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        labels = labels.where(noise < 0.9, ignore_index)
    labels[:, :1, :1] = classes - 1
    return labels.to(dtype)


def reference_classes(labels, num_classes, ignore_index=255):
    return index_classes(labels, num_classes, ignore_index)


EDGE_DEFAULTS = dict(kernel="gaussian", kernel_size=35, sigma=3.0, beta=0.5, downsample=4, normalize=None)


def edge_map(labels, num_classes, dtype=torch.float64, ignore_index=255, **settings):
    """The reference's map, in float64 the truth."""
    settings = EdgeSettings(**EDGE_DEFAULTS | settings, ignore_index=ignore_index)
    return reference.gaussian_edge(reference_classes(labels, num_classes, ignore_index), num_classes, settings, dtype)


@dataclass(frozen=True)
class Case:
    """Logits of this shape against labels of this size; `edge` holds settings of boundary_aware_loss, None for plain weights."""

    shape: tuple
    size: tuple
    pixel_weight: tuple | None = None
    class_weight: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"
    channels_last: bool = False
    label_dtype: torch.dtype = torch.int64
    ignore_index: int = 255
    edge: dict | None = None

    def __str__(self):
        told = [
            f"{each.name}={getattr(self, each.name)}" for each in fields(self)[2:] if getattr(self, each.name) != each.default
        ]
        return " ".join([f"{self.shape}->{self.size}", *told])

    def rounds(self):
        """How often the Triton kernel of the gradient goes round, 8 ms each where it is interpreted."""
        (n, c, h, w), (height, width) = self.shape, self.size
        return 1 if (h, w) == (height, width) else n * -(-w // 32) * -(-c // 8) * height * (1.5 * width / w + 1)

    def logits(self, dtype=torch.float64, device="cpu", seed=0):
        """The same numbers in every dtype under test."""
        drawn = 3 * torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        logits = drawn.to(torch.bfloat16).to(device=device, dtype=dtype)
        return (logits.contiguous(memory_format=torch.channels_last) if self.channels_last else logits).requires_grad_()

    def labels(self, device="cpu"):
        return draw_labels(self.shape[0], self.shape[1], *self.size, self.label_dtype, self.ignore_index).to(device)

    def weights(self, device="cpu", dtype=torch.float32):
        """Of pixels and classes, float32 numbers."""
        generator = torch.Generator().manual_seed(2)
        by_class = torch.rand(self.shape[1], generator=generator) + 0.5 if self.class_weight else None
        by_pixel = torch.rand(self.shape[0], *self.pixel_weight, generator=generator) + 0.1 if self.pixel_weight else None
        return tuple(None if each is None else each.to(device, dtype) for each in (by_pixel, by_class))

    def op(self, logits):
        pixel_weight, class_weight = self.weights(logits.device)
        settings = dict(label_smoothing=self.label_smoothing, ignore_index=self.ignore_index, reduction=self.reduction)
        settings["class_weight"] = class_weight
        labels = self.labels(logits.device)
        if self.edge is not None:
            return segops.boundary_aware_loss(logits, labels, **self.edge, **settings)
        return segops.upsample_cross_entropy(logits, labels, pixel_weight, **settings)

    def plain(self, logits):
        """As one writes it with PyTorch, in the logits' dtype, with a float32 weight map; float64 throughout for float64 logits."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        labels = self.labels(logits.device)
        weight, class_weight = self.weights(logits.device, wide)
        if self.edge is not None:
            weight = edge_map(labels, self.shape[1], wide, self.ignore_index, **self.edge)
        if logits.shape[2:] != self.size:
            logits = F.interpolate(logits, self.size, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(
            logits,
            labels.long(),
            None if class_weight is None else class_weight.to(logits.dtype),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if weight is not None:
            loss = loss * F.interpolate(weight[:, None], self.size, mode="bilinear", align_corners=False)[:, 0]
        if self.reduction == "none":
            return loss
        return loss.sum() / ((labels != self.ignore_index).sum() if self.reduction == "mean" else 1)


def output_and_gradient(function, logits):
    return results(function, [logits])


def assert_all_close(values, plain, truth, exactly=False):
    """Losses and gradients; edge maps are float32 numbers whatever the logits."""
    for each in zip(("loss", "gradient"), values, plain, truth, strict=True):
        assert_close(*each, float64=1e-12 if exactly else 1e-6)


def assert_accurate(case, dtype, device):
    logits = case.logits(dtype, device)
    values, plain = output_and_gradient(case.op, logits), output_and_gradient(case.plain, logits)
    assert values[0].dtype == torch.promote_types(dtype, torch.float32) and values[1].dtype == dtype
    assert_all_close(values, plain, output_and_gradient(case.plain, case.logits()), exactly=case.edge is None)
