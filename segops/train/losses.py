"""Losses on the logits as the network made them, with one mean over the pixels of all ranks."""

import torch
import torch.nn.functional as F
from torch import nn

import segops

from .transforms import VOID

LOSSES = ("ce", "bal", "focal")
MEDIAN_FREQUENCY = "median_frequency"


def focal_loss(logits, labels, gamma=2.0, class_weight=None, reduction="mean"):
    """Cross entropy times (1 - p)^gamma, p the probability of the true class (Lin et al., arXiv:1708.02002): the comparator of the boundary-aware loss.

    Args:
        logits: (N, C, h, w), resized bilinearly to the labels' size.
        labels: (N, H, W), integer; 255 does not count.
        gamma: default 2, that paper's. 0 is cross entropy.
        class_weight: (C) or None.
        reduction: "mean" over the pixels that count, or "sum".
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    labels = labels.long()
    log_p = F.log_softmax(logits, 1)
    true_log_p = log_p.gather(1, labels.where(labels != VOID, 0)[:, None])[:, 0]
    cross_entropy = F.nll_loss(log_p, labels, class_weight, ignore_index=VOID, reduction="none")
    doubt = (-torch.expm1(true_log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)  # 0 ** (gamma - 1) is infinite
    total = (doubt**gamma * cross_entropy).sum()
    return total if reduction == "sum" else total / (labels != VOID).sum().clamp_min(1)


class SegmentationLoss(nn.Module):
    """Loss of a model's `Output`, its auxiliary logits included.

    Args:
        name: "ce", cross entropy (`segops.upsample_cross_entropy`); "bal", the boundary-aware loss (`segops.boundary_aware_loss`), here with
            normalize="mean" unless options say otherwise, so that learning rates of cross entropy hold; "focal" (`focal_loss`).
        aux_weight: of the auxiliary logits' loss, default 0.4 (PSPNet).
        reduction: "mean" over the pixels that are not void, of all ranks together (default), or "sum" of them (FCN's unnormalised loss).
        class_weight: a number for each class, or None.
        options: of the function: kernel, kernel_size, sigma, beta, downsample, normalize, label_smoothing, gamma.

    Raises:
        ValueError, TypeError: another name or reduction; options that the function has not.
    """

    def __init__(self, name="ce", aux_weight=0.4, reduction="mean", class_weight=None, **options):
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}; got {name!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum'; got {reduction!r}")
        functions = {"ce": segops.upsample_cross_entropy, "bal": segops.boundary_aware_loss, "focal": focal_loss}
        if name == "bal":
            options = {"normalize": "mean"} | options
        allowed = set(functions[name].__kwdefaults__ or {"gamma": 2.0}) - {"class_weight", "reduction", "ignore_index"}
        unknown = sorted(set(options) - allowed)
        if unknown:
            raise TypeError(f"loss {name!r} has no option {unknown[0]!r}: it has {', '.join(sorted(allowed))}")
        if isinstance(class_weight, str):
            raise ValueError(f"class_weight must be a number for each class, or {MEDIAN_FREQUENCY!r}; got {class_weight!r}")
        weight = None if class_weight is None else torch.as_tensor(class_weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)
        self.function, self.options, self.aux_weight, self.reduction = functions[name], options, aux_weight, reduction

    def forward(self, output, labels, align_corners=False):
        """align_corners: of the resizing that the model's predictions have; where it is True, full-size logits are built."""
        total, count = self.total(output, labels, align_corners)
        return total * ranks() if self.reduction == "sum" else mean_over_ranks(total, count)

    def total(self, output, labels, align_corners=False):
        """The sum over the pixels that are not void, of this rank, and how many they are."""
        total = self._sum(output.logits, labels, align_corners)
        auxiliary = output.aux_logits
        if auxiliary is not None:
            maps = auxiliary if isinstance(auxiliary, tuple) else (auxiliary,)
            total = total + self.aux_weight * sum(self._sum(logits, labels, align_corners) for logits in maps)
        return total, (labels != VOID).sum()

    def _sum(self, logits, labels, align_corners):
        if align_corners:
            logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
        return self.function(logits, labels, class_weight=self.class_weight, reduction="sum", **self.options)


def ranks():
    return torch.distributed.get_world_size() if distributed() else 1


def distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def mean_over_ranks(total, count):
    """total / count, the count summed over ranks: the mean of these over ranks, as data parallelism takes of gradients, is the mean of all."""
    count = count.to(torch.float64 if count.device.type == "cpu" else torch.float32)
    if distributed():
        torch.distributed.all_reduce(count)
    return total * (ranks() / count.clamp_min(1)).to(total.dtype)
