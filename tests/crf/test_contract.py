"""The permutohedral filter, the dense CRF and its module: what every op owes its users."""

import torch

import segops

from ..contract import Contract, Export, Use, ops_of
from .conftest import normal, pictures, uniform

CLASSES = 3


def floats(*shape, device="cpu", dtype=torch.float32, seed=0):
    return normal(shape, seed).to(device, dtype)


def filtering(d, normalization, sizes, tails, large):
    """Sizes are (N, C, *)."""

    def draw(size, dtype, device):
        n, _, *trailing = size
        features = uniform((n, d, *trailing), 0, 2, seed=d)
        return [floats(*size, device=device, dtype=dtype).requires_grad_(), features.to(device, dtype)]

    return Use(
        function="permutohedral_filter",
        call=lambda values, features: segops.permutohedral_filter(values, features, normalization=normalization),
        draw=draw,
        sizes=sizes,
        tails=tails,
        large=large,
        empty=((0, *sizes[0][1:]),),
        forward=("segops::crf_filter",),
        backward=("segops::crf_filter",),
        never=("aten::index", "unique"),
        autocast=((torch.bfloat16,), (torch.float32,)),
        slow_reference=True,
        grad_layout=False,  # views of one whose positions are in one dimension
    )


# A class of channels more than the kernels' vectors and blocks have, one position, one row.
FILTERS = {
    "plain, in two dimensions": filtering(
        2, None, ((2, 3, 6), (3, 3, 9), (2, 3, 14)), ((1, 1, 1), (2, 33, 17), (1, 9, 65)), ((3, 8, 3000),)
    ),
    "after, of maps": filtering(
        5, "after", ((2, 3, 2, 4), (3, 3, 5, 3), (2, 3, 4, 6)), ((1, 1, 1, 5), (2, 17, 3, 9), (1, 40, 7, 2)), ((3, 8, 40, 50),)
    ),
    "symmetric, of volumes": filtering(
        5, "symmetric", ((2, 3, 2, 1, 3), (3, 3, 2, 2, 3), (2, 3, 3, 2, 4)), ((1, 9, 1, 3, 2), (1, 33, 3, 1, 4)), ((2, 40, 9, 10, 11),)
    ),
}  # fmt: skip


def draw_defaults(sizes, dtype, device):
    n, logits, images = sizes
    drawn = pictures((n, 3, *images)).to(device)
    return [(2 * floats(n, CLASSES, *logits, device=device)).to(dtype).requires_grad_(), drawn]


def draw_tensors(sizes, dtype, device):
    """Weights of a class and of all, and a compatibility, each with a gradient; images that are floating point."""
    logits, images = draw_defaults(sizes, dtype, device)
    near_identity = torch.eye(CLASSES) + 0.3 * floats(CLASSES, CLASSES, seed=2)
    weights = [0.5 + floats(CLASSES, seed=1) ** 2, near_identity, near_identity.flip(0)]
    return [logits, images.to(dtype), *(each.to(device, dtype).requires_grad_() for each in weights)]


def defaults(logits, images):
    """But for the iterations, each of which takes a second to compile in the reference."""
    return segops.dense_crf(logits, images, iterations=2)


def with_tensors(logits, images, spatial_weight, bilateral_weight, compatibility):
    return segops.dense_crf(
        logits,
        images,
        iterations=1,
        spatial_weight=spatial_weight,
        bilateral_weight=bilateral_weight,
        bilateral_sigma=(5.0, 20.0),
        compatibility=compatibility,
        normalization="after",
    )


def refining(call, draw, resized=True, **settings):
    """Sizes are (N, those of the logits, those of the images)."""
    sizes = (2, (2, 3), (3, 4)), (3, (3, 2), (5, 4)), (2, (4, 5), (4, 5))
    tails = (1, (3, 4), (1, 17)), (2, (1, 1), (9, 1)), (1, (7, 9), (7, 9))
    if not resized:
        sizes, tails = ([(n, images, images) for n, _, images in some] for some in (sizes, tails))
    return Use(
        function="dense_crf",
        call=call,
        draw=draw,
        sizes=tuple(sizes),
        tails=tuple(tails),
        large=((3, (17, 19) if resized else (60, 70), (60, 70)),),
        empty=((0, (2, 3), (4, 5)), (0, (4, 5), (4, 5))),
        forward=("segops::crf_mean_field",),
        backward=("segops::crf_mean_field_grad",),
        never=("index_put", "unique", "softmax"),
        cast=lambda *dtypes: torch.float32,
        twice=False,
        grad_layout=not resized,  # of what is resized PyTorch decides
        slow_reference=True,
        **settings,
    )


def opcheck_of_filter(normalization, trailing):
    def arguments(device, backend):
        features = uniform((2, 4, trailing), 0, 2).to(device)
        values = floats(2, 3, trailing, device=device).requires_grad_()
        for adjoint in (False, True):
            yield ops_of(backend).crf_filter, (values, features, normalization, adjoint)

    return arguments


def opcheck_of_mean_field(spatial, bilateral, memory_format=torch.contiguous_format):
    """With the gradients of a kernel alone, and of both."""

    def arguments(device, backend):
        ops, images = ops_of(backend), pictures((2, 3, 4, 5)).to(device)
        logits = floats(2, CLASSES, 4, 5, device=device).contiguous(memory_format=memory_format)
        matrices = [torch.eye(CLASSES, device=device) if each else None for each in (spatial, bilateral)]
        settings = False, 2, 1.0, 5.0, 20.0, "symmetric"
        small = floats(2, CLASSES, 2, 3, device=device, seed=1)
        yield ops.crf_mean_field, (small, *matrices, images, True, *settings[1:], False)
        yield ops.crf_mean_field, (logits, *matrices, images, *settings, False)
        leaves = [each if each is None else each.clone().requires_grad_() for each in matrices]
        yield ops.crf_mean_field, (logits.clone().requires_grad_(), *leaves, images, *settings, True)
        with torch.no_grad():
            saved = ops.crf_mean_field(logits, *matrices, images, *settings, True)
        grad = floats(2, CLASSES, 4, 5, device=device, seed=3)
        for wanted in (False, True):
            yield ops.crf_mean_field_grad, (grad, *saved, *matrices, 3, 1.0, "symmetric", wanted)

    return arguments


class Refine(torch.nn.Module):
    """As one puts it behind a network."""

    def forward(self, logits, images):
        return segops.dense_crf(logits * 2, images, iterations=3)


class Smooth(torch.nn.Module):
    def forward(self, values, features):
        return segops.permutohedral_filter(values, features, normalization="after")


def export_of_crf(module):
    def dynamic_shapes():
        n, h, w, height, width = map(torch.export.Dim, ("n", "h", "w", "height", "width"))
        return {0: n, 2: h, 3: w}, {0: n, 2: height, 3: width}

    def draw(sizes, dtype, device):
        return tuple(each.detach() for each in draw_defaults(sizes, dtype, device))

    sizes = (2, (2, 3), (4, 5)), (3, (4, 3), (9, 8)), (1, (5, 6), (5, 6)), (5, (3, 7), (2, 11))
    return Export(module, draw, sizes, dynamic_shapes)


def export_of_filter():
    def dynamic_shapes():
        n, height, width = map(torch.export.Dim, ("n", "height", "width"))
        return ({0: n, 2: height, 3: width},) * 2

    def draw(size, dtype, device):
        return floats(size[0], 3, *size[1:], device=device, dtype=dtype), uniform((size[0], 5, *size[1:]), 0, 2).to(
            device, dtype
        )

    return Export(Smooth, draw, ((2, 3, 4), (3, 5, 6), (1, 9, 2), (5, 2, 13)), dynamic_shapes)


V, F, Z, P, E = floats(2, 3, 4, 5), floats(2, 5, 4, 5), floats(2, 3, 2, 3), pictures((2, 3, 4, 5)), torch.eye(3)
filters, crf, module = segops.permutohedral_filter, segops.dense_crf, segops.nn.CRF
INFINITE = float("inf")


class TestCRF(Contract):
    USES = {
        **FILTERS,
        "defaults": refining(defaults, draw_defaults),
        "after, with tensors, at the images' size": refining(
            with_tensors,
            draw_tensors,
            resized=False,
            autocast=((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)),
        ),
    }
    EXPORTS = {
        "filter": export_of_filter(),
        "defaults": export_of_crf(Refine),
        "module": export_of_crf(lambda: segops.nn.CRF(CLASSES, iterations=2)),
        "module, in eval mode": export_of_crf(lambda: segops.nn.CRF(CLASSES, test_iterations=3).eval()),
    }
    OPCHECKS = {
        "filter": opcheck_of_filter("None", 12),
        "filter, after": opcheck_of_filter("after", 20),
        "filter, symmetric": opcheck_of_filter("symmetric", 7),
        "both kernels": opcheck_of_mean_field(True, True),
        "both kernels, channels_last": opcheck_of_mean_field(True, True, torch.channels_last),
        "spatial": opcheck_of_mean_field(True, False),
        "bilateral": opcheck_of_mean_field(False, True),
    }
    ERRORS = [
        (lambda: filters(V.tolist(), F), TypeError, r"values must be a torch\.Tensor; got list"),
        (lambda: filters(V.long(), F), TypeError, r"values must be float32, .* got torch\.int64"),
        (lambda: filters(V, F.byte()), TypeError, r"features must be float32, .* got torch\.uint8"),
        (lambda: filters(V, None), TypeError, r"features must be a torch\.Tensor; got NoneType"),
        (lambda: filters(V[0, 0], F), ValueError, r"values must have shape \(N, C, \*\), .* got \(4, 5\)"),
        (lambda: filters(V, F[0, 0]), ValueError, r"features must have shape \(N, d, \*\), .* got \(4, 5\)"),
        (lambda: filters(V[:, :0], F), ValueError, r"values must have no empty dimension .* got shape \(2, 0, 4, 5\)"),
        (lambda: filters(V[:, :, :0], F[:, :, :0]), ValueError, r"values must have no empty .* got shape \(2, 3, 0, 5\)"),
        (lambda: filters(V, F[:, :0]), ValueError, r"features must have no empty dimension .* got shape \(2, 0, 4, 5\)"),
        (lambda: filters(V, F[:1]), ValueError, r"features must have values' batch of 2; got shape \(1, 5, 4, 5\)"),
        (lambda: filters(V, F[..., :4]), ValueError, r"features must have values' sizes \(4, 5\); got shape \(2, 5, 4, 4\)"),
        (lambda: filters(V, F.flatten(2)), ValueError, r"features must have values' sizes \(4, 5\); got shape \(2, 5, 20\)"),
        (lambda: filters(V, F[:, :1].expand(2, 17, 4, 5)), ValueError, r"features must have at most 16 dimensions; got shape \(2, 17, 4, 5\)"),
        (lambda: filters(V, F.to("meta")), ValueError, "features must be on values' device cpu; got meta"),
        (lambda: filters(V, F, normalization="before"), ValueError, "normalization must be one of None, 'after', 'symmetric'; got 'before'"),
        (lambda: filters(V, F, normalization=True), ValueError, "normalization must be one of None, 'after', 'symmetric'; got True"),
        (lambda: crf(Z.tolist(), P), TypeError, r"logits must be a torch\.Tensor; got list"),
        (lambda: crf(Z.long(), P), TypeError, r"logits must be float32, .* got torch\.int64"),
        (lambda: crf(Z[0], P), ValueError, r"logits must have shape \(N, C, h, w\); got \(3, 2, 3\)"),
        (lambda: crf(Z[:, :0], P), ValueError, r"logits must have classes, .* got shape \(2, 0, 2, 3\)"),
        (lambda: crf(Z[..., :0], P), ValueError, r"logits must have .* width of at least 1; got shape \(2, 3, 2, 0\)"),
        (lambda: crf(Z, P.tolist()), TypeError, r"images must be a torch\.Tensor; got list"),
        (lambda: crf(Z, P.long()), TypeError, r"images must be uint8, float32, .* got torch\.int64"),
        (lambda: crf(Z, P.bool()), TypeError, r"images must be uint8, float32, .* got torch\.bool"),
        (lambda: crf(Z, P[0]), ValueError, r"images must have shape \(N, K, H, W\); got \(3, 4, 5\)"),
        (lambda: crf(Z, P[:, :0]), ValueError, r"images must have channels, .* got shape \(2, 0, 4, 5\)"),
        (lambda: crf(Z, P[:, :, :0]), ValueError, r"images must have .* height .* got shape \(2, 3, 0, 5\)"),
        (lambda: crf(Z, P[:1]), ValueError, r"images must have logits' batch of 2; got shape \(1, 3, 4, 5\)"),
        (lambda: crf(Z, P[:, :1].expand(2, 15, 4, 5)), ValueError, r"images must have at most 14 channels; got shape \(2, 15, 4, 5\)"),
        (lambda: crf(Z, P.to("meta")), ValueError, "images must be on logits' device cpu; got meta"),
        (lambda: crf(Z, P, iterations=2.0), TypeError, r"iterations must be an int; got 2\.0"),
        (lambda: crf(Z, P, iterations=True), TypeError, "iterations must be an int; got True"),
        (lambda: crf(Z, P, iterations=-1), ValueError, "iterations must be at least 0; got -1"),
        (lambda: crf(Z, P, spatial_sigma="1"), TypeError, "spatial_sigma must be a number; got '1'"),
        (lambda: crf(Z, P, spatial_sigma=True), TypeError, "spatial_sigma must be a number; got True"),
        (lambda: crf(Z, P, spatial_sigma=0), ValueError, "spatial_sigma must be positive and finite; got 0"),
        (lambda: crf(Z, P, spatial_sigma=-1.0), ValueError, r"spatial_sigma must be positive and finite; got -1\.0"),
        (lambda: crf(Z, P, spatial_sigma=INFINITE), ValueError, "spatial_sigma must be positive and finite; got inf"),
        (lambda: crf(Z, P, spatial_sigma=float("nan")), ValueError, "spatial_sigma must be positive and finite; got nan"),
        (lambda: crf(Z, P, spatial_sigma=10**400), ValueError, "spatial_sigma must be positive and finite; got 1000"),
        (lambda: crf(Z, P, align_corners="yes"), TypeError, "align_corners must be True or False; got 'yes'"),
        (lambda: segops.nn.CRF(3, align_corners=None), TypeError, "align_corners must be True or False; got None"),
        (lambda: crf(Z, P, bilateral_sigma=67.0), TypeError, r"bilateral_sigma must be a pair, .* got 67\.0"),
        (lambda: crf(Z, P, bilateral_sigma=(67.0,)), TypeError, r"bilateral_sigma must be a pair, .* got \(67\.0,\)"),
        (lambda: crf(Z, P, bilateral_sigma=(67.0, 67.0, 3.0)), TypeError, r"bilateral_sigma must be a pair, .* got \(67\.0, 67\.0, 3\.0\)"),
        (lambda: crf(Z, P, bilateral_sigma=(67.0, None)), TypeError, r"bilateral_sigma must be a pair of numbers; got \(67\.0, None\)"),
        (lambda: crf(Z, P, bilateral_sigma=(0, 3.0)), ValueError, r"bilateral_sigma must be positive and finite; got \(0, 3\.0\)"),
        (lambda: crf(Z, P, bilateral_sigma=[67.0, INFINITE]), ValueError, r"bilateral_sigma must be positive and finite; got \[67\.0, inf\]"),
        (lambda: crf(Z, P, normalization="before"), ValueError, "normalization must be one of 'after', 'symmetric'; got 'before'"),
        (lambda: crf(Z, P, normalization=None), ValueError, "normalization must be one of 'after', 'symmetric'; got None"),
        (lambda: crf(Z, P, spatial_weight="3"), TypeError, "spatial_weight must be a number or a floating-point tensor; got '3'"),
        (lambda: crf(Z, P, bilateral_weight=None), TypeError, "bilateral_weight must be a number or a floating-point tensor; got None"),
        (lambda: crf(Z, P, bilateral_weight=True), TypeError, "bilateral_weight must be a number or a floating-point tensor; got True"),
        (lambda: crf(Z, P, spatial_weight=E.long()), TypeError, r"spatial_weight must be float32, .* got torch\.int64"),
        (lambda: crf(Z, P, spatial_weight=INFINITE), ValueError, "spatial_weight must be finite; got inf"),
        (lambda: crf(Z, P, bilateral_weight=float("nan")), ValueError, "bilateral_weight must be finite; got nan"),
        (lambda: crf(Z, P, bilateral_weight=torch.tensor(INFINITE)), ValueError, "bilateral_weight must be finite; got a tensor that is not"),
        (lambda: crf(Z, P, spatial_weight=E / 0), ValueError, "spatial_weight must be finite; got a tensor that is not"),
        (lambda: crf(Z, P, spatial_weight=1e39), ValueError, r"spatial_weight must be at most 3\.403e\+38 in size, the largest torch\.float32; got 1e\+39"),
        (lambda: crf(Z.half(), P, spatial_weight=-(10**39)), ValueError, r"spatial_weight must be at most 3\.403e\+38 .* got -1000"),
        (lambda: crf(Z, P, bilateral_weight=1e39), ValueError, r"bilateral_weight must be at most 3\.403e\+38 in size, .* got 1e\+39"),
        (lambda: crf(Z, P, bilateral_weight=1e39 * E.double()), ValueError, r"bilateral_weight must be at most 3\.403e\+38 .* got a tensor that is not"),
        (lambda: crf(Z, P, compatibility=1e39 * E.double()), ValueError, r"compatibility must be at most 3\.403e\+38 .* got a tensor that is not"),
        (lambda: crf(Z, P, spatial_weight=1e20, compatibility=1e20 * E), ValueError, r"spatial_weight times compatibility must be finite in torch\.float32"),
        (lambda: crf(Z, P, bilateral_weight=1e20 * E, compatibility=1e20 * E), ValueError, "bilateral_weight times compatibility must be finite"),
        (lambda: crf(Z, P, spatial_weight=E[:2]), ValueError, r"spatial_weight must have shape \(\), \(3,\) or \(3, 3\); got \(2, 3\)"),
        (lambda: crf(Z, P, spatial_weight=E[:2, 0]), ValueError, r"spatial_weight must have shape \(\), \(3,\) or \(3, 3\); got \(2,\)"),
        (lambda: crf(Z, P, bilateral_weight=E[:1, :1]), ValueError, r"bilateral_weight must have shape .* got \(1, 1\)"),
        (lambda: crf(Z, P, bilateral_weight=E[None]), ValueError, r"bilateral_weight must have shape .* got \(1, 3, 3\)"),
        (lambda: crf(Z, P, bilateral_weight=E.to("meta")), ValueError, "bilateral_weight must be on logits' device cpu; got meta"),
        (lambda: crf(Z, P, compatibility=[1.0]), TypeError, r"compatibility must be a torch\.Tensor; got list"),
        (lambda: crf(Z, P, compatibility=-1.0), TypeError, r"compatibility must be a torch\.Tensor; got float"),
        (lambda: crf(Z, P, compatibility=E.int()), TypeError, r"compatibility must be float32, .* got torch\.int32"),
        (lambda: crf(Z, P, compatibility=E[0]), ValueError, r"compatibility must have shape \(3, 3\); got \(3,\)"),
        (lambda: crf(Z, P, compatibility=torch.eye(4)), ValueError, r"compatibility must have shape \(3, 3\); got \(4, 4\)"),
        (lambda: crf(Z, P, compatibility=E.to("meta")), ValueError, "compatibility must be on logits' device cpu; got meta"),
        (lambda: module(0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: module(21.0), TypeError, r"num_classes must be an int; got 21\.0"),
        (lambda: module(3, iterations=-1), ValueError, "iterations must be at least 0; got -1"),
        (lambda: module(3, test_iterations=2.5), TypeError, r"test_iterations must be an int; got 2\.5"),
        (lambda: module(3, test_iterations=-2), ValueError, "test_iterations must be at least 0; got -2"),
        (lambda: module(3, spatial_weight=E), TypeError, "spatial_weight must be a number; got tensor"),
        (lambda: module(3, bilateral_weight=INFINITE), ValueError, "bilateral_weight must be finite; got inf"),
        (lambda: module(3, spatial_weight=1e39), ValueError, r"spatial_weight must be at most 3\.403e\+38 in size, .* got 1e\+39"),
        (lambda: module(3, bilateral_weight=1e5, dtype=torch.half), ValueError, r"bilateral_weight must be at most 6\.55e\+04 .* got 100000\.0"),
        (lambda: module(3, spatial_sigma=0.0), ValueError, r"spatial_sigma must be positive and finite; got 0\.0"),
        (lambda: module(3, bilateral_sigma=160.0), TypeError, r"bilateral_sigma must be a pair, .* got 160\.0"),
        (lambda: module(3, normalization=None), ValueError, "normalization must be one of 'after', 'symmetric'; got None"),
        (lambda: module(4)(Z, P), ValueError, r"spatial_weight must have shape \(\), \(3,\) or \(3, 3\); got \(4, 4\)"),
    ]  # fmt: skip
    COMPILED_ERRORS = (
        (V, F, Z, P),
        [
            (lambda v, f, z, i: filters(v, f[:1]), ValueError, r"features must have values' batch of 2; got shape \(1, 5, 4, 5\)"),
            (lambda v, f, z, i: filters(v, f, normalization="before"), ValueError, "normalization must be one of None, 'after', 'symmetric'"),
            (lambda v, f, z, i: crf(z.long(), i), TypeError, r"logits must be float32, .* got torch\.int64"),
            (lambda v, f, z, i: crf(z, i, spatial_sigma=-1.0), ValueError, r"spatial_sigma must be positive and finite; got -1\.0"),
            (lambda v, f, z, i: crf(z, i, bilateral_sigma=(0.0, 3.0)), ValueError, r"bilateral_sigma must be positive and finite; got \(0\.0, 3\.0\)"),
            (lambda v, f, z, i: crf(z, i, spatial_weight=1e39), ValueError, r"spatial_weight must be at most 3\.403e\+38 .* got 1e\+39"),
            (lambda v, f, z, i: crf(z, i, iterations=True), TypeError, "iterations must be an int; got True"),
            (lambda v, f, z, i: crf(z, i, spatial_weight=z[0, :2, 0, 0]), ValueError, r"spatial_weight must have shape .* got \(2,\)"),
            (lambda v, f, z, i: crf(z, i, compatibility=z[0]), ValueError, r"compatibility must have shape \(3, 3\); got \(3, 2, 3\)"),
        ],
    )  # fmt: skip
