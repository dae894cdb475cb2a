"""The boundary-aware loss as the paper writes it, in plain PyTorch: the documentation, the oracle,
the fallback.

`classes` are labels with -1 at ignored pixels and -2 where a label is none of the classes.
"""

import torch
import torch.nn.functional as F


def blur_kernel(kernel, kernel_size, sigma):
    """Eq. 5 or 6, min-max normalised to [0, 1], float64 (kernel_size, kernel_size); kernel_size 1
    is the identity."""
    if kernel_size == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    distance = torch.arange(kernel_size, dtype=torch.float64, device="cpu") - kernel_size // 2
    y, x = distance[:, None], distance[None, :]
    if kernel == "gaussian":
        f = torch.expm1(-(x**2 + y**2) / (kernel_size * sigma))  # exp less 1, which cancels below but for rounding
    else:
        f = kernel_size - (x.abs() + y.abs())
    return (f - f.min()) / (f.max() - f.min())


def gaussian_edge(classes, num_classes, settings, dtype=torch.float32):
    """Yu, Eq. 1 to 3: an edge plane per class; their sum downsampled, blurred, upsampled; beta."""
    edges = torch.zeros(classes.shape, dtype=dtype, device=classes.device)
    for i in range(num_classes):
        plane = (classes == i).to(dtype)
        right = torch.cat([plane[:, :, 1:], plane[:, :, -1:]], dim=2)
        lower = torch.cat([plane[:, 1:], plane[:, -1:]], dim=1)
        edges = edges + ((plane - right / 2 - lower / 2).abs() > 0)
    edges = edges[:, None]
    height, width = classes.shape[1:]
    if settings.downsample > 1:
        small = (-(-height // settings.downsample), -(-width // settings.downsample))
        if small[1] > 1:
            edges = F.interpolate(edges, small, mode="bilinear", antialias=True)
        else:  # to a width of one, PyTorch repeats the first row of the result: as a column of height one it is right
            edges = F.interpolate(edges.mT.contiguous(), small[::-1], mode="bilinear", antialias=True).mT
    f = blur_kernel(settings.kernel, settings.kernel_size, settings.sigma).to(edges.device)
    # In float64, which is safe from autocast and TF32.
    blurred = F.conv2d(edges.to(f), f[None, None], padding=settings.kernel_size // 2).to(dtype)
    if settings.normalize == "max":
        peak = blurred.amax((1, 2, 3), keepdim=True)
        blurred = blurred / peak.where(peak > 0, 1)
    if settings.downsample > 1:
        blurred = F.interpolate(blurred, (height, width), mode="bilinear", align_corners=False)
    edge = blurred[:, 0] + settings.beta
    if settings.normalize == "mean":
        mean = edge.mean((1, 2), keepdim=True)
        edge = (edge / mean).where(mean != 0, 1)
    return edge


def upsample_cross_entropy(logits, classes, pixel_weight, class_weight, settings):
    """Bilinear upsampling of the logits, cross entropy per pixel, times the weight; "mean" is over
    the valid pixels."""
    size = classes.shape[1:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    class_weight = None if class_weight is None else class_weight.to(wide)
    loss = F.cross_entropy(
        logits, classes.clamp(min=-1), class_weight, ignore_index=-1, reduction="none", label_smoothing=settings.label_smoothing
    )
    if pixel_weight is not None:
        weight = pixel_weight.to(wide)[:, None]
        if weight.shape[2:] != size:
            weight = F.interpolate(weight, size, mode="bilinear", align_corners=False)
        loss = loss * weight[:, 0]
    loss = loss.where(classes != -1, 0).where(classes != -2, torch.nan)
    if settings.reduction == "none":
        return loss
    return loss.sum() if settings.reduction == "sum" else loss.sum() / (classes != -1).sum().clamp(min=1)
