"""The boundary-aware loss, its edges and its cross entropy: what every op owes its users."""

import torch

import segops

from ..contract import Contract, Export, Use, ops_of
from .compile_triton import compilations
from .conftest import draw_labels

SIZES = (((2, 5, 2, 3), (5, 7)), ((3, 5, 3, 4), (8, 6)), ((1, 5, 4, 5), (4, 5)))
TAILS = (((1, 5, 1, 17), (3, 65)), ((2, 5, 9, 3), (33, 1)), ((1, 5, 33, 2), (8, 130)))


def draw(sizes, dtype, device):
    shape, size = sizes
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    return [logits, draw_labels(shape[0], 5, *size).to(device)]


def draw_weighted(sizes, dtype, device):
    logits, labels = draw(sizes, dtype, device)
    return [logits, labels, labels[:, ::2, ::3] * 0.1 + 1, torch.linspace(0.5, 1.5, 5, device=device)]


def draw_labels_alone(sizes, dtype, device):
    return draw(sizes, dtype, device)[1:]


def boundary(logits, labels):
    settings = dict(normalize="mean", kernel_size=5, label_smoothing=0.1)
    return segops.boundary_aware_loss(
        logits, labels, class_weight=torch.linspace(0.5, 1.5, 5, device=logits.device), **settings
    )


def per_pixel(logits, labels):
    return segops.boundary_aware_loss(logits, labels, kernel_size=5, reduction="none")


def weighted(logits, labels, pixel_weight, class_weight):
    return segops.upsample_cross_entropy(logits, labels, pixel_weight, class_weight=class_weight, label_smoothing=0.1)


def edges(labels):
    """Three maps, on three paths: resized or not, divided by their greatest or their mean."""
    choices = {}, {"normalize": "mean"}, {"normalize": "max", "downsample": 1}
    return [segops.gaussian_edge(labels, 5, kernel_size=5, **each) for each in choices]


def use(function, call, draw, forward, **settings):
    return Use(
        function, call, draw, SIZES, TAILS,
        large=(((3, 5, 33, 37), (129, 145)), ((3, 5, 80, 90), (80, 90))),
        empty=(((0, 5, 2, 3), (5, 7)), ((0, 5, 4, 5), (4, 5))), forward=forward,
        cast=lambda *dtypes: torch.float32, exact=False, twice=False, slow_reference=True, **settings,
    )  # fmt: skip


BACKWARD = {
    "backward": ("segops::bal_cross_entropy_grad",),
    "never": ("nll_loss", "upsample"),
    "autocast": ((torch.bfloat16, torch.float32, torch.float32), (torch.float32,)),
}
LOSS = ("segops::bal_boundary_loss",)


def opcheck_of(dtype, reduction, memory_format=torch.contiguous_format):
    def arguments(device, backend):
        logits, labels = draw(SIZES[0], torch.float32, device)
        logits, labels = logits.detach().contiguous(memory_format=memory_format).requires_grad_(), labels.to(dtype)
        ops, weights = ops_of(backend), (None, None)
        if reduction == "none":
            weights = torch.rand(2, 3, 2, device=device), torch.rand(5, device=device)
        yield torch.ops.segops_reference.bal_classes, (labels, 5, 255)
        for normalize in (None, "max", "mean"):
            yield ops.bal_edge, (labels, 5, "gaussian", 5, 2.0, 0.5, 2, normalize, 255)
        settings = 0.1, 255, reduction
        yield ops.bal_cross_entropy, (logits.detach(), labels, *weights, *settings, "nothing")
        for saves in ("coefficients", *([] if reduction == "none" else ["gradient"])):
            yield ops.bal_cross_entropy, (logits, labels, *weights, *settings, saves)
            with torch.no_grad():
                loss, saved, divisor = ops.bal_cross_entropy(logits, labels, *weights, *settings, saves)
            grad = torch.rand_like(loss)
            if saves == "gradient":
                yield ops.bal_cross_entropy_grad, (grad, logits.detach(), saved, divisor)
            else:
                yield ops.bal_cross_entropy_map_grad, (grad, logits.detach(), labels, weights[1], saved, divisor, 0.1, 255)
        settings = "linear", 3, 1.0, 0.5, 2, "mean", 0.0, 255, reduction, saves
        yield ops.bal_boundary_loss, (logits, labels, weights[1], *settings)

    return arguments


def export(module):
    def dynamic_shapes():
        n, h, w, height, width = map(torch.export.Dim, ("n", "h", "w", "height", "width"))
        return {0: n, 2: h, 3: w}, {0: n, 1: height, 2: width}

    sizes = SIZES[0], ((3, 5, 7, 6), (18, 21)), ((1, 5, 9, 12), (9, 12)), ((2, 5, 20, 3), (17, 39))
    return Export(lambda: module, lambda *given: tuple(draw(*given)), sizes, dynamic_shapes, exact=False)


Z, L = torch.randn(2, 5, 4, 6), draw_labels(2, 5, 11, 13)
edge, cross_entropy, loss = segops.gaussian_edge, segops.upsample_cross_entropy, segops.boundary_aware_loss


class TestBoundaryAwareLoss(Contract):
    USES = {
        "boundary": use("boundary_aware_loss", boundary, draw, LOSS, **BACKWARD),
        "per pixel": use(
            "boundary_aware_loss", per_pixel, draw, LOSS, **BACKWARD | {"backward": ("segops::bal_cross_entropy_map_grad",)}
        ),
        "weighted": use("upsample_cross_entropy", weighted, draw_weighted, ("segops::bal_cross_entropy",), **BACKWARD),
        "edges": use("gaussian_edge", edges, draw_labels_alone, ("segops::bal_edge",)),
    }
    EXPORTS = {
        "boundary": export(segops.nn.BoundaryAwareLoss(normalize="mean")),
        "per pixel": export(segops.nn.UpsampleCrossEntropy(reduction="none")),
    }
    OPCHECKS = {
        "int64": opcheck_of(torch.int64, "mean"),
        "int32, per pixel, channels_last": opcheck_of(torch.int32, "none", torch.channels_last),
        "uint8, summed": opcheck_of(torch.uint8, "sum"),
    }
    COMPILATIONS = compilations
    ERRORS = [
        (lambda: edge(L.float(), 5), TypeError, r"labels must be int64, int32 or uint8; got torch\.float32"),
        (lambda: edge(L.bool(), 5), TypeError, r"labels must be int64, int32 or uint8; got torch\.bool"),
        (lambda: edge(L.tolist(), 5), TypeError, r"labels must be a torch\.Tensor; got list"),
        (lambda: edge(L[:, None], 5), ValueError, r"labels must have shape \(N, H, W\); got \(2, 1, 11, 13\)"),
        (lambda: edge(L[0], 5), ValueError, r"labels must have shape \(N, H, W\); got \(11, 13\)"),
        (lambda: edge(L, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: edge(L, 2**33), ValueError, "num_classes must be at most 2147483647; got 8589934592"),
        (lambda: edge(L, 5, ignore_index=2**63), ValueError, "ignore_index must be at most 9223372036854775807; got 9223372036854775808"),
        (lambda: edge(L[:, :0], 5), ValueError, r"labels must have a height and a width of at least 1; got shape \(2, 0, 13\)"),
        (lambda: edge(L, 5, sigma=10**400), ValueError, "sigma must be finite; got 1000"),
        (lambda: edge(L, 5.0), TypeError, r"num_classes must be an int; got 5\.0"),
        (lambda: edge(L, 5, kernel="box"), ValueError, "kernel must be 'gaussian' or 'linear'; got 'box'"),
        (lambda: edge(L, 5, kernel_size=4), ValueError, "kernel_size must be odd; got 4"),
        (lambda: edge(L, 5, kernel_size=-1), ValueError, "kernel_size must be at least 1; got -1"),
        (lambda: edge(L, 5, kernel_size=3.0), TypeError, r"kernel_size must be an int; got 3\.0"),
        (lambda: edge(L, 5, kernel_size=True), TypeError, "kernel_size must be an int; got True"),
        (lambda: edge(L, 5, sigma=0), ValueError, "sigma must be positive; got 0"),
        (lambda: edge(L, 5, sigma=-1.5), ValueError, r"sigma must be positive; got -1\.5"),
        (lambda: edge(L, 5, sigma=float("nan")), ValueError, "sigma must be finite; got nan"),
        (lambda: edge(L, 5, sigma="3"), TypeError, "sigma must be a number; got '3'"),
        (lambda: edge(L, 5, sigma=1e30), ValueError, r"kernel is not constant; got 1e\+30 with size 35"),
        (lambda: edge(L, 5, beta=float("inf")), ValueError, "beta must be finite; got inf"),
        (lambda: edge(L, 5, beta=1e39), ValueError, r"beta must be at most 3\.403e\+38 in size, the largest torch\.float32; got 1e\+39"),
        (lambda: edge(L, 5, beta=None), TypeError, "beta must be a number; got None"),
        (lambda: edge(L, 5, downsample=0), ValueError, "downsample must be at least 1; got 0"),
        (lambda: edge(L, 5, downsample=2.0), TypeError, r"downsample must be an int; got 2\.0"),
        (lambda: edge(L, 5, normalize="sum"), ValueError, "normalize must be None, 'max' or 'mean'; got 'sum'"),
        (lambda: edge(L, 5, normalize=True), ValueError, "normalize must be None, 'max' or 'mean'; got True"),
        (lambda: edge(L, 5, beta=True), TypeError, "beta must be a number; got True"),
        (lambda: edge(L, 5, kernel=["gaussian"]), ValueError, r"kernel must be 'gaussian' or 'linear'; got \['gaussian'\]"),
        (lambda: edge(L, 5, ignore_index=None), TypeError, "ignore_index must be an int; got None"),
        (lambda: cross_entropy(Z.long(), L), TypeError, r"logits must be float32, .* got torch\.int64"),
        (lambda: cross_entropy(Z.tolist(), L), TypeError, r"logits must be a torch\.Tensor; got list"),
        (lambda: cross_entropy(Z[0], L), ValueError, r"logits must have shape \(N, C, h, w\); got \(5, 4, 6\)"),
        (lambda: cross_entropy(Z[:, :0], L), ValueError, r"logits must have classes, .* got shape \(2, 0, 4, 6\)"),
        (lambda: cross_entropy(Z[:, :, :0], L), ValueError, r"logits must have .* height .* got shape \(2, 5, 0, 6\)"),
        (lambda: cross_entropy(Z, L.float()), TypeError, r"labels must be int64, int32 or uint8; got torch\.float32"),
        (lambda: cross_entropy(Z, L[:, None]), ValueError, r"labels must have shape \(N, H, W\); got \(2, 1, 11, 13\)"),
        (lambda: cross_entropy(Z, L[:1]), ValueError, r"labels must have logits' batch of 2; got shape \(1, 11, 13\)"),
        (lambda: cross_entropy(Z, L.to("meta")), ValueError, "labels must be on logits' device cpu; got meta"),
        (lambda: cross_entropy(Z, L, L), TypeError, r"pixel_weight must be float32, .* got torch\.int64"),
        (lambda: cross_entropy(Z, L, L.tolist()), TypeError, r"pixel_weight must be a torch\.Tensor; got list"),
        (lambda: cross_entropy(Z, L, Z), ValueError, r"pixel_weight must have shape \(2, H, W\), .* got \(2, 5, 4, 6\)"),
        (lambda: cross_entropy(Z, L, Z[:1, 0]), ValueError, r"pixel_weight must have shape \(2, H, W\), .* got \(1, 4, 6\)"),
        (lambda: cross_entropy(Z, L, torch.rand(2, 12, 13)), ValueError, r"pixel_weight .* size \(11, 13\) .* got shape \(2, 12, 13\)"),
        (lambda: cross_entropy(Z, L, torch.rand(2, 5, 14)), ValueError, r"pixel_weight .* size \(11, 13\) .* got shape \(2, 5, 14\)"),
        (lambda: cross_entropy(Z, L, torch.rand(2, 0, 3)), ValueError, r"pixel_weight .* no empty side; got shape \(2, 0, 3\)"),
        (lambda: cross_entropy(Z, L, Z[:, 0].to("meta")), ValueError, "pixel_weight must be on logits' device cpu; got meta"),
        (lambda: cross_entropy(Z, L, class_weight=torch.rand(4)), ValueError, r"class_weight must have shape \(5,\), .* got \(4,\)"),
        (lambda: cross_entropy(Z, L, class_weight=torch.rand(5, 1)), ValueError, r"class_weight must have shape \(C,\), .* got \(5, 1\)"),
        (lambda: cross_entropy(Z, L, class_weight=torch.ones(5).int()), TypeError, r"class_weight must be float32, .* got torch\.int32"),
        (lambda: cross_entropy(Z, L, class_weight=[1.0] * 5), TypeError, r"class_weight must be a torch\.Tensor; got list"),
        (lambda: cross_entropy(Z, L, class_weight=torch.rand(5, device="meta")), ValueError, "class_weight must be on logits' device cpu"),
        (lambda: cross_entropy(Z, L, label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]; got 1\.5"),
        (lambda: cross_entropy(Z, L, label_smoothing=-0.1), ValueError, r"label_smoothing must be in \[0, 1\]; got -0\.1"),
        (lambda: cross_entropy(Z, L, label_smoothing=None), TypeError, "label_smoothing must be a number; got None"),
        (lambda: cross_entropy(Z, L, ignore_index=255.0), TypeError, r"ignore_index must be an int; got 255\.0"),
        (lambda: (cross_entropy(Z, L, label_smoothing=1), cross_entropy(Z, L, label_smoothing=True)), TypeError, "got True"),
        (lambda: cross_entropy(Z, L, reduction="batchmean"), ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'batchmean'"),
        (lambda: cross_entropy(Z, L, reduction=None), ValueError, "reduction must be 'mean', 'sum' or 'none'; got None"),
        (lambda: loss(Z.long(), L), TypeError, r"logits must be float32, .* got torch\.int64"),
        (lambda: loss(Z, L[:, None]), ValueError, r"labels must have shape \(N, H, W\); got \(2, 1, 11, 13\)"),
        (lambda: loss(Z, L.float()), TypeError, r"labels must be int64, int32 or uint8; got torch\.float32"),
        (lambda: loss(Z, L, kernel_size=6), ValueError, "kernel_size must be odd; got 6"),
        (lambda: loss(Z, L, class_weight=torch.rand(6)), ValueError, r"class_weight must have shape \(5,\), .* got \(6,\)"),
        (lambda: loss(Z, L, reduction="max"), ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
        (lambda: segops.nn.BoundaryAwareLoss(sigma=0), ValueError, "sigma must be positive; got 0"),
        (lambda: segops.nn.BoundaryAwareLoss(reduction="max"), ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
        (lambda: segops.nn.BoundaryAwareLoss(class_weight=torch.rand(5, 5)), ValueError, r"class_weight must have shape \(C,\)"),
        (lambda: segops.nn.UpsampleCrossEntropy(label_smoothing=2), ValueError, r"label_smoothing must be in \[0, 1\]; got 2"),
        (lambda: segops.nn.UpsampleCrossEntropy(class_weight=[1.0]), TypeError, r"class_weight must be a torch\.Tensor; got list"),
    ]  # fmt: skip
    COMPILED_ERRORS = (
        (Z, L),
        [
            (lambda z, labels: loss(z, labels, sigma=-1.0), ValueError, r"sigma must be positive; got -1\.0"),
            (lambda z, labels: loss(z, labels[:, None]), ValueError, r"labels must have shape \(N, H, W\); got \(2, 1, 11, 13\)"),
            (lambda z, labels: cross_entropy(z, labels.float()), TypeError, r"labels must be int64, int32 or uint8; got torch\.float32"),
            (lambda z, labels: edge(labels, 5, kernel_size=4), ValueError, "kernel_size must be odd; got 4"),
            (lambda z, labels: cross_entropy(z, labels, z.new_ones(2, 12, 13)), ValueError, r"pixel_weight .* got shape \(2, 12, 13\)"),
        ],
    )  # fmt: skip
