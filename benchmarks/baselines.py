"""What a user would write without segops. Each returns {name: function} over the same arguments."""

import functools

import torch
import torch.nn.functional as F

from segops.ops.bal.edge import blur_factors
from segops.ops.bal.reference import blur_kernel
from segops.ops.pac.reference import pyramid_atrous_conv2d


def pac(rates, merge, device):
    """Plain PyTorch in the memory format of its arguments, the same factorisation by hand, on a GPU also torch.compile."""

    def eager(input, weight):
        return pyramid_atrous_conv2d(input, weight, None, rates, merge)

    def handwritten(input, weight):
        """The factorisation in PyTorch's own ops: one product with all taps, then padded slices added up."""
        (_, _, h, w), c_out = input.shape, weight.shape[0]
        reach = max(rates)
        taps = weight.permute(2, 3, 0, 1).reshape(9 * c_out, -1, 1, 1)
        planes = F.pad(F.conv2d(input, taps), (reach,) * 4).unflatten(1, (9, c_out))
        branches = []
        for rate in rates:
            shifts = [(reach + rate * dy, reach + rate * dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            slices = [planes[:, t, :, y : y + h, x : x + w] for t, (y, x) in enumerate(shifts)]
            branches.append(functools.reduce(torch.add, slices))
        return functools.reduce(torch.add, branches) if merge == "sum" else torch.cat(branches, 1)

    baselines = {"eager": eager, "handwritten": handwritten}
    if device == "cuda":  # on the CPU it calls the same convolutions and compiles for half a minute a shape
        baselines["compile"] = torch.compile(eager, dynamic=False)
    return baselines


def pag(merge, device):
    """The partial-attention gate: a pooling for each map that is larger than the decoder's, then cat, or a sum."""

    def eager(decoder, *encoders):
        pooled = [_pooled(encoder, decoder.shape[2:]) for encoder in encoders]
        return torch.cat([decoder, *pooled], 1) if merge == "concat" else functools.reduce(torch.add, pooled, decoder)

    return _with_compile(eager, device)


def pag_unpool(kernel_size, device):
    """Pooling, and unpooling to where the maxima lay: with indices of eight bytes."""

    def eager(input):
        pooled, indices = F.max_pool2d(input, kernel_size, ceil_mode=True, return_indices=True)
        return F.max_unpool2d(pooled, indices, kernel_size, output_size=input.shape[2:])

    return _with_compile(eager, device)


def argmax(size, device):
    """Class indices from upsampled logits."""

    def eager(logits):
        return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)

    return _with_compile(eager, device)


def _pooled(encoder, size):
    """The map max-pooled to the size, by the fastest of PyTorch's ways."""
    (height, width), (h, w) = encoder.shape[2:], size
    if (height, width) == (h, w):
        return encoder
    if height % h or width % w:
        return F.adaptive_max_pool2d(encoder, size)
    return F.max_pool2d(encoder, (height // h, width // w))


def _with_compile(eager, device):
    baselines = {"eager": eager}
    if device == "cuda":
        baselines["compile"] = torch.compile(eager, dynamic=False)
    return baselines


# The boundary-aware loss with the settings that the paper found best, which are segops' defaults.
KERNEL, KERNEL_SIZE, SIGMA, BETA, DOWNSAMPLE, VOID = "gaussian", 35, 3.0, 0.5, 4, 255


def bal(device):
    """{name: function} of logits and labels to the loss, all in float32, as segops computes it.

    "paper" follows the text; "handwritten" is the best formulation that PyTorch differentiates; on a CPU "strips" has its gradient
    by hand; on a GPU "compile" is torch.compile of the formulation in planes, of which it made the faster code for a CPU.
    """
    kernel = blur_kernel(KERNEL, KERNEL_SIZE, SIGMA).to(device, torch.float32)
    factors = blur_factors(KERNEL, KERNEL_SIZE, SIGMA, torch.device(device))
    baselines = {
        "paper": functools.partial(_bal_paper, kernel=kernel),
        "handwritten": functools.partial(_bal_handwritten, factors=factors),
    }
    if device == "cuda":
        baselines["compile"] = torch.compile(functools.partial(_bal_planes, factors=factors), dynamic=False)
    else:
        baselines["strips"] = functools.partial(_bal_strips, factors=factors)
    return baselines


def _bal_paper(logits, labels, kernel):
    """A plane per class all the way: edge, downsample, blur, upsample each, then sum (Yu, Eq. 1 to 4)."""
    num_classes, size = logits.shape[1], labels.shape[1:]
    planes = (labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None, None]).float()
    padded = F.pad(planes, (0, 1, 0, 1), mode="replicate")
    edges = padded[..., :-1, :-1].sub(padded[..., :-1, 1:], alpha=0.5).sub_(padded[..., 1:, :-1], alpha=0.5).ne(0).float()
    edges = F.interpolate(edges, [-(-side // DOWNSAMPLE) for side in size], mode="bilinear", antialias=True)
    edges = edges.contiguous(memory_format=torch.channels_last)  # a depthwise convolution on a CPU is 12 times slower without
    edges = F.conv2d(edges, kernel.expand(num_classes, 1, -1, -1), padding=KERNEL_SIZE // 2, groups=num_classes)
    weight = F.interpolate(edges, size, mode="bilinear").sum(1) + BETA
    logits = logits.float()
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear")
    loss = F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none")
    return (loss * weight).sum() / (labels != VOID).sum()


def _bal_weight(labels, factors):
    """The weight map with the classes summed first: the classes among three labels are counted by comparing them, the blur is
    two separable ones."""
    size = labels.shape[1:]
    padded = labels.to(torch.int16)
    padded = torch.cat([padded, padded[:, -1:]], 1)
    padded = torch.cat([padded, padded[:, :, -1:]], 2)
    here, right, lower = _corners(padded)
    known, right_known, lower_known = _corners(padded != VOID)
    to_right, to_lower = here != right, here != lower
    count = ((to_right | to_lower) & known).byte() + (to_right & right_known) + (to_lower & (right != lower) & lower_known)
    small = [-(-side // DOWNSAMPLE) for side in size]
    edges = F.interpolate(count.float()[:, None], small, mode="bilinear", antialias=True)
    u1, v1, u2, v2 = factors
    rows = F.conv2d(edges, torch.stack([v1, v2])[:, None, None], padding=(0, KERNEL_SIZE // 2))
    edges = F.conv2d(rows, torch.stack([u1, u2])[None, :, :, None], padding=(KERNEL_SIZE // 2, 0))
    return F.interpolate(edges, size, mode="bilinear")[:, 0] + BETA


def _corners(padded):
    """The map, and the same shifted by one to the right and by one down."""
    return padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1]


def _bal_planes(logits, labels, factors):
    """One weight map; upsampling and softmax of planes."""
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    loss = F.nll_loss(F.log_softmax(logits, 1, dtype=torch.float32), labels, ignore_index=VOID, reduction="none")
    return (loss * _bal_weight(labels, factors)).sum() / (labels != VOID).sum()


def _bal_handwritten(logits, labels, factors):
    """One weight map; upsampling and softmax with the classes of a pixel side by side: on a CPU faster than planes, unless there
    is nothing to upsample."""
    if logits.shape[2:] == labels.shape[1:]:
        return _bal_planes(logits, labels, factors)
    logits = logits.float().contiguous(memory_format=torch.channels_last)
    pixels = F.interpolate(logits, labels.shape[1:], mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    loss = F.cross_entropy(pixels, labels.flatten(), ignore_index=VOID, reduction="none").view(labels.shape)
    return (loss * _bal_weight(labels, factors)).sum() / (labels != VOID).sum()


def _bal_strips(logits, labels, factors):
    """Loss and gradient a strip at a time, where there is something to upsample."""
    if logits.shape[2:] == labels.shape[1:]:
        return _bal_planes(logits, labels, factors)
    return _Strips.apply(logits.float(), labels, _bal_weight(labels, factors), torch.is_grad_enabled())


class _Strips(torch.autograd.Function):
    """The loss and, at once, its gradient by hand, for a strip of rows at a time: nothing is large, strips stay in cache.

    Strips of the upsampled logits are products with the matrices of bilinear interpolation.
    """

    @staticmethod
    def forward(ctx, logits, labels, weight, with_gradient):
        valid = labels != VOID
        index, weight = labels.where(valid, 0)[:, None], weight * valid / valid.sum()
        vertical, horizontal = (
            _interpolation(side, full).to(logits) for side, full in zip(logits.shape[2:], labels.shape[1:], strict=True)
        )
        wide = logits @ horizontal.T
        gradient, loss = torch.zeros_like(wide), 0
        for rows, i, w in zip(vertical.split(64), index.split(64, 2), weight.split(64, 1), strict=True):
            softmax = F.log_softmax(rows @ wide, 1)
            loss = loss - (softmax.gather(1, i)[:, 0] * w).sum()
            if with_gradient:
                softmax.exp_().scatter_add_(1, i, softmax.new_full((), -1).expand(i.shape)).mul_(w[:, None])
                gradient += rows.T @ softmax
        ctx.save_for_backward(gradient @ horizontal)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None


def _interpolation(side, full):
    """(full, side): the matrix of `F.interpolate(mode="bilinear")` along one axis."""
    source = ((torch.arange(full, dtype=torch.float64) + 0.5) * (side / full) - 0.5).clamp(0, side - 1)
    return (1 - (source[:, None] - torch.arange(side)).abs()).clamp(min=0)
