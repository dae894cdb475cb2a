"""The partial-attention gate, and pooling with offsets: what every op owes its users."""

import functools

import torch

import segops
from segops.ops.pag.windows import offset_layout

from ..contract import Contract, Export, Use, ops_of
from .compile_triton import compilations
from .conftest import Case, Pooling, draw


def gate(merge, channels_last, sizes, tails):
    def maps(size, dtype, device):
        return Case(*size, merge, channels_last).maps(dtype, device)

    return Use(
        function="partial_attention_gate",
        call=Case((), (), merge).op,
        draw=maps,
        sizes=sizes,
        tails=tails,
        large=(((2, 8, 33, 45), ((8, 65, 90), (8, 129, 180), (8, 33, 45))),),
        empty=tuple(((0, *decoder[1:]), encoders) for decoder, encoders in sizes),
        forward=("segops::pag",),
        backward=("segops::pag_grad",),
        never=("max_pool2d", "aten::scatter", "aten::gather"),
        autocast=(
            (torch.bfloat16,),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float16),
        ),
        cast=lambda *dtypes: functools.reduce(torch.promote_types, dtypes),
        twice=False,
        grad_layout=False,  # views of the output's gradient
    )


def pooling(kernel, channels_last=False):
    def map(shape, dtype, device):
        return [Pooling(shape, kernel, channels_last).map(dtype, device)]

    def pool_and_unpool(map):
        """As SegNet, with other values in between; and what is pooled."""
        pooled, offsets = segops.max_pool2d_with_offsets(map, kernel)
        return segops.max_unpool2d_with_offsets(pooled.sin(), offsets, kernel, map.shape), pooled, offsets

    return Use(
        function="max_pool2d_with_offsets",
        call=pool_and_unpool,
        draw=map,
        sizes=((2, 3, 8, 10), (3, 3, 9, 7), (2, 3, 12, 13)),
        tails=((2, 33, 7, 9), (1, 3, 7, 130), (1, 1, 17, 33)),
        large=((2, 16, 65, 67),),
        empty=((0, 3, 8, 10),),
        forward=("segops::pag_max_pool", "segops::pag_max_unpool"),
        backward=("segops::pag_max_gather", "segops::pag_max_unpool"),
        never=("max_pool2d", "aten::scatter", "aten::gather"),
        autocast=((torch.float32,), (torch.bfloat16,), (torch.float16,)),
    )


def unpooling():
    """Of any values and offsets."""

    def values_and_offsets(shape, dtype, device):
        offsets = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return [draw(shape, dtype, device).requires_grad_(), offsets.to(device)]

    def unpool(pooled, offsets):
        n, c, h, w = pooled.shape
        return segops.max_unpool2d_with_offsets(pooled, offsets, (3, 2), (n, c, 3 * h, 2 * w)).square()

    return Use(
        function="max_unpool2d_with_offsets",
        call=unpool,
        draw=values_and_offsets,
        sizes=((2, 3, 3, 4), (3, 3, 5, 2), (2, 3, 4, 7)),
        tails=((2, 33, 2, 3), (1, 3, 2, 65)),
        large=((2, 16, 33, 35),),
        empty=((0, 3, 3, 4),),
        forward=("segops::pag_max_unpool",),
        backward=("segops::pag_max_gather",),
        never=("aten::scatter", "aten::gather"),
        autocast=((torch.float32,), (torch.bfloat16,)),
    )


# Windows that divide, a map that needs no pooling; then windows that do not divide, more of them, and of other lengths.
SIZES = (
    ((2, 3, 4, 5), ((3, 8, 10), (3, 4, 5))),
    ((3, 3, 6, 7), ((3, 12, 14), (3, 6, 7))),
    ((2, 3, 5, 4), ((3, 41, 59), (3, 5, 4))),
)
TAILS = (
    ((1, 33, 1, 17), ((33, 3, 18),)),
    ((2, 33, 3, 5), ((33, 8, 7), (33, 6, 10))),
    ((1, 3, 2, 65), ((3, 2, 130), (3, 2, 65))),
    ((2, 1, 3, 33), ((1, 5, 70),)),
    ((1, 3, 1, 1), ((3, 16, 16), (3, 2, 3))),
)
LARGE_WINDOWS = tuple(((n, 2, 2, 2), ((2, 40, width), (2, 2, 6))) for n, width in ((1, 40), (2, 44), (1, 41)))
GATES = {
    "concat": Case((2, 3, 4, 5), ((2, 8, 10), (3, 4, 5), (4, 9, 7), (3, 3, 9))),
    "sum": Case((2, 3, 4, 5), ((3, 8, 10), (3, 4, 5), (3, 9, 7), (2, 3, 9)), "sum", (True,)),
    "large windows": Case((1, 2, 2, 2), ((2, 40, 40), (2, 2, 6)), "sum"),
}


def opcheck_of_gate(case):
    def arguments(device, backend):
        ops, channels_last = ops_of(backend), case.channels_last[0]
        decoder, *encoders = case.maps(torch.float32, device)
        on = [decoder, *(each for each in encoders if each.shape[2] >= decoder.shape[2])]
        for maps in (on, [decoder]):
            yield ops.pag, (maps, case.merge, channels_last)
        with torch.no_grad():
            out, offsets = ops.pag(on, case.merge, channels_last)
        (*_, (first_byte, _)), _ = offset_layout([each.shape for each in on])
        _, channels, *size = on[-1].shape
        yield ops.pag_grad, (out, offsets, out.shape[1] - channels, channels, first_byte, *size, channels_last)

    return arguments


def opcheck_of_pooling(kernel, channels_last):
    def arguments(device, backend):
        case, ops = Pooling((2, 3, 7, 9), kernel, channels_last), ops_of(backend)
        settings, map = (*case.sides, channels_last), case.map(torch.float32, device)
        yield ops.pag_max_pool, (map, *settings)
        pooled, offsets = (each.detach() for each in ops.pag_max_pool(map, *settings))
        yield ops.pag_max_unpool, (pooled.requires_grad_(), offsets, *case.sides, *case.shape[2:], channels_last)
        yield ops.pag_max_gather, (map, offsets, *settings)

    return arguments


def dims(*names):
    return [torch.export.Dim(name) for name in names]


def export_of_gate(merge, channels_last):
    """Batch, height and width, of which the encoder's are multiples."""

    def maps(sizes, dtype, device):
        n, h, w = sizes
        encoders = tuple((3, by * h, by * w) for by in (1, 2, 4))
        decoder, *encoders = (
            each.detach() for each in Case((n, 3, h, w), encoders, merge, (channels_last,)).maps(dtype, device)
        )
        return decoder, encoders

    def shapes():
        n, h, w = dims("n", "h", "w")
        return {0: n, 2: h, 3: w}, [{0: n, 2: by * h, 3: by * w} for by in (1, 2, 4)]

    return Export(lambda: segops.nn.PartialAttentionGate(merge), maps, ((2, 4, 5), (3, 6, 7), (1, 2, 9), (5, 21, 3)), shapes)


def export_of_independent_sizes(*example):
    """Only switches specialise, and the bytes of an offset: else windows of any size, whatever those of the example."""

    def maps(sizes, dtype, device):
        n, size, encoder = sizes
        return draw((n, 3, *size), dtype, device), [draw((n, 2, *encoder), dtype, device, 1)]

    def shapes():
        n, h, w, height, width = dims("n", "h", "w", "height", "width")
        return {0: n, 2: h, 3: w}, [{0: n, 2: height, 3: width}]

    sizes = (
        (2, (4, 5), example),
        (3, (6, 7), (12, 14)),
        (1, (4, 5), (9, 8)),
        (5, (5, 4), (7, 20)),
        (2, (2, 3), (20, 21)),
        (2, (7, 9), (8, 10)),
    )
    return Export(segops.nn.PartialAttentionGate, maps, sizes, shapes, specialised=((2, (4, 5), (3, 10)),))


class PoolAndUnpool(torch.nn.Module):
    """As SegNet's decoder: convolved in between, put back where it came from."""

    def __init__(self, kernel):
        super().__init__()
        self.convolution, self.kernel = torch.nn.Conv2d(3, 3, 3, padding=1), kernel

    def forward(self, x):
        pooled, offsets = segops.max_pool2d_with_offsets(x, self.kernel)
        return segops.max_unpool2d_with_offsets(self.convolution(pooled), offsets, self.kernel, x.shape)


def export_of_pooling(kernel, channels_last, **options):
    def map(sizes, dtype, device):
        n, *size = sizes
        return (draw((n, 3, *size), dtype, device, channels_last=channels_last),)

    def shapes():
        """More than one window: of a single one, the strides tell no memory format."""
        least_h, least_w = (kernel + 1, kernel + 1) if isinstance(kernel, int) else (kernel[0] + 1, kernel[1] + 1)
        return ({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=least_h), 3: torch.export.Dim("w", min=least_w)},)

    sizes = (2, 8, 10), (3, 12, 16), (2, 9, 11), (1, 31, 14), (5, 7, 25)
    return Export(lambda: PoolAndUnpool(kernel), map, sizes, shapes, options)


D, E, K = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10), torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
gates, pool, unpool = segops.partial_attention_gate, segops.max_pool2d_with_offsets, segops.max_unpool2d_with_offsets


class TestPartialAttentionGate(Contract):
    USES = {
        "concat": gate("concat", (False,), SIZES, TAILS),
        "concat of mixed formats": gate("concat", (True, False), SIZES, TAILS[:1]),
        "sum, channels_last": gate("sum", (True,), SIZES, TAILS),
        "large windows": gate("sum", (False,), LARGE_WINDOWS, TAILS[1:]),
        "pooling by 2": pooling(2),
        "pooling by 3x2, channels_last": pooling((3, 2), True),
        "unpooling": unpooling(),
    }
    EXPORTS = {
        "concat": export_of_gate("concat", True),
        "sum": export_of_gate("sum", False),
        "windows that divide": export_of_independent_sizes(8, 10),
        "windows that do not": export_of_independent_sizes(9, 7),
        "large windows": export_of_independent_sizes(40, 60),
        "pooling by 2": export_of_pooling(2, True),
        "pooling by 3x2": export_of_pooling((3, 2), False),
        "pooling, strictly": export_of_pooling((3, 2), True, strict=True),
    }
    OPCHECKS = {name: opcheck_of_gate(case) for name, case in GATES.items()} | {
        "pooling by 2": opcheck_of_pooling(2, False),
        "pooling by 3x2, channels_last": opcheck_of_pooling((3, 2), True),
    }
    COMPILATIONS = compilations
    ERRORS = [
        (lambda: gates(D, [E], merge="mean"), ValueError, "merge must be 'concat' or 'sum'; got 'mean'"),
        (lambda: gates(D, [E], merge=None), ValueError, "merge must be 'concat' or 'sum'; got None"),
        (lambda: gates(D, E), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got Tensor"),
        (lambda: gates(D, None), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got NoneType"),
        (lambda: gates(D, (each for each in [E])), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got generator"),
        (lambda: gates(D.tolist(), [E]), TypeError, r"decoder must be a torch\.Tensor; got list"),
        (lambda: gates(D.long(), [E]), TypeError, r"decoder must be float32, bfloat16, float16 or float64; got torch\.int64"),
        (lambda: gates(D.to(torch.complex64), [E]), TypeError, r"decoder must be float32, .* got torch\.complex64"),
        (lambda: gates(D[0], [E]), ValueError, r"decoder must have shape \(N, C, H, W\); got \(3, 4, 5\)"),
        (lambda: gates(D[:, :0], [E]), ValueError, r"decoder must have channels, .* got shape \(2, 0, 4, 5\)"),
        (lambda: gates(D[:, :, :0], [E]), ValueError, r"decoder must have .* height .* got shape \(2, 3, 0, 5\)"),
        (lambda: gates(D[..., :0], [E]), ValueError, r"decoder must have .* width of at least 1; got shape \(2, 3, 4, 0\)"),
        (lambda: gates(D, [E, None]), TypeError, r"encoders\[1\] must be a torch\.Tensor; got NoneType"),
        (lambda: gates(D, [E.int()]), TypeError, r"encoders\[0\] must be float32, .* got torch\.int32"),
        (lambda: gates(D, [E, E[0]]), ValueError, r"encoders\[1\] must have shape \(N, C, H, W\); got \(3, 8, 10\)"),
        (lambda: gates(D, [E[:, :0]]), ValueError, r"encoders\[0\] must have channels, .* got shape \(2, 0, 8, 10\)"),
        (lambda: gates(D, [E, E, E[:, :, :0]]), ValueError, r"encoders\[2\] must have .* height .* got shape \(2, 3, 0, 10\)"),
        (lambda: gates(D, [E.half()]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.float32; got torch\.float16"),
        (lambda: gates(D.bfloat16(), [E]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.bfloat16; got torch\.float32"),
        (lambda: gates(D, (E, E.to("meta"))), ValueError, r"encoders\[1\] must be on decoder's device cpu; got meta"),
        (lambda: gates(D, [E[:1]]), ValueError, r"encoders\[0\] must have decoder's batch of 2; got shape \(1, 3, 8, 10\)"),
        (lambda: gates(D, [E, E[:, :2]], merge="sum"), ValueError, r"encoders\[1\] must have decoder's 3 channels where merge is 'sum'; got shape \(2, 2, 8, 10\)"),
        # What is wrong with a map that is off is wrong all the same, but for its channels.
        (lambda: gates(D, [E[:1, :, :3]]), ValueError, r"encoders\[0\] must have decoder's batch of 2; got shape \(1, 3, 3, 10\)"),
        (lambda: gates(D, [E[:, :, :3].double()]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.float32; got torch\.float64"),
        (lambda: pool(E.tolist(), 2), TypeError, r"input must be a torch\.Tensor; got list"),
        (lambda: pool(E.byte(), 2), TypeError, r"input must be float32, bfloat16, float16 or float64; got torch\.uint8"),
        (lambda: pool(E[0], 2), ValueError, r"input must have shape \(N, C, H, W\); got \(3, 8, 10\)"),
        (lambda: pool(E[:, :0], 2), ValueError, r"input must have channels, .* got shape \(2, 0, 8, 10\)"),
        (lambda: pool(E[..., :0], 2), ValueError, r"input must have .* width of at least 1; got shape \(2, 3, 8, 0\)"),
        (lambda: pool(E, 2.0), TypeError, r"kernel_size must be an int or a pair of ints; got 2\.0"),
        (lambda: pool(E, None), TypeError, "kernel_size must be an int or a pair of ints; got None"),
        (lambda: pool(E, True), TypeError, "kernel_size must be an int or a pair of ints; got True"),
        (lambda: pool(E, "2"), TypeError, "kernel_size must be an int or a pair of ints; got '2'"),
        (lambda: pool(E, (2,)), TypeError, r"kernel_size must be an int or a pair of ints; got \(2,\)"),
        (lambda: pool(E, (2, 2, 2)), TypeError, r"kernel_size must be an int or a pair of ints; got \(2, 2, 2\)"),
        (lambda: pool(E, (2, 1.5)), TypeError, r"kernel_size must be an int or a pair of ints; got \(2, 1\.5\)"),
        (lambda: pool(E, 0), ValueError, "kernel_size must be positive; got 0"),
        (lambda: pool(E, (2, -1)), ValueError, r"kernel_size must be positive; got \(2, -1\)"),
        (lambda: pool(E, 17), ValueError, "kernel_size must have at most 256 elements, which a byte can number; got 17"),
        (lambda: pool(E, (1, 257)), ValueError, r"kernel_size must have at most 256 elements, .* got \(1, 257\)"),
        (lambda: unpool(D.tolist(), K, 2, (8, 10)), TypeError, r"pooled must be a torch\.Tensor; got list"),
        (lambda: unpool(D.int(), K, 2, (8, 10)), TypeError, r"pooled must be float32, .* got torch\.int32"),
        (lambda: unpool(D[0], K, 2, (8, 10)), ValueError, r"pooled must have shape \(N, C, H, W\); got \(3, 4, 5\)"),
        (lambda: unpool(D[:, :0], K, 2, (8, 10)), ValueError, r"pooled must have channels, .* got shape \(2, 0, 4, 5\)"),
        (lambda: unpool(D, K.tolist(), 2, (8, 10)), TypeError, r"offsets must be a torch\.Tensor; got list"),
        (lambda: unpool(D, K.long(), 2, (8, 10)), TypeError, r"offsets must be uint8; got torch\.int64"),
        (lambda: unpool(D, K[:, :2], 2, (8, 10)), ValueError, r"offsets must have pooled's shape \(2, 3, 4, 5\); got \(2, 2, 4, 5\)"),
        (lambda: unpool(D, K.to("meta"), 2, (8, 10)), ValueError, "offsets must be on pooled's device cpu; got meta"),
        (lambda: unpool(D, K, 2.0, (8, 10)), TypeError, r"kernel_size must be an int or a pair of ints; got 2\.0"),
        (lambda: unpool(D, K, 0, (8, 10)), ValueError, "kernel_size must be positive; got 0"),
        (lambda: unpool(D, K, (16, 17), (8, 10)), ValueError, r"kernel_size must have at most 256 elements, .* got \(16, 17\)"),
        (lambda: unpool(D, K, 2, 8), TypeError, r"output_size must be ints \(H, W\), or a shape that ends in them; got 8"),
        (lambda: unpool(D, K, 2, None), TypeError, r"output_size must be ints \(H, W\), or a shape that ends in them; got None"),
        (lambda: unpool(D, K, 2, (8, 10.0)), TypeError, r"output_size must be ints \(H, W\), .* got \(8, 10\.0\)"),
        (lambda: unpool(D, K, 2, (8,)), ValueError, r"output_size must be \(H, W\), or \(N, C, H, W\) with pooled's \(2, 3\); got \(8,\)"),
        (lambda: unpool(D, K, 2, ()), ValueError, r"output_size must be \(H, W\), or \(N, C, H, W\) with pooled's \(2, 3\); got \(\)"),
        (lambda: unpool(D, K, 2, (3, 8, 10)), ValueError, r"output_size must be \(H, W\), .* got \(3, 8, 10\)"),
        (lambda: unpool(D, K, 2, (2, 4, 8, 10)), ValueError, r"output_size must be \(H, W\), .* pooled's \(2, 3\); got \(2, 4, 8, 10\)"),
        (lambda: unpool(D, K, 2, (9, 10)), ValueError, r"output_size must be in \[7, 8\] x \[9, 10\] for pooled size \(4, 5\) and kernel_size \(2, 2\); got \(9, 10\)"),
        (lambda: unpool(D, K, 2, (6, 10)), ValueError, r"output_size must be in \[7, 8\] x \[9, 10\] for pooled size \(4, 5\) and kernel_size \(2, 2\); got \(6, 10\)"),
        (lambda: unpool(D, K, (3, 2), E.shape), ValueError, r"output_size must be in \[10, 12\] x \[9, 10\] for pooled size \(4, 5\) .* \(3, 2\); got \(2, 3, 8, 10\)"),
        (lambda: segops.nn.PartialAttentionGate("max"), ValueError, "merge must be 'concat' or 'sum'; got 'max'"),
        (lambda: segops.nn.PartialAttentionGate(merge=0), ValueError, "merge must be 'concat' or 'sum'; got 0"),
        (lambda: segops.nn.PartialAttentionGate("sum")(D, [E[:, :1]]), ValueError, r"encoders\[0\] must have decoder's 3 channels"),
    ]  # fmt: skip
    COMPILED_ERRORS = (
        (D, E, K),
        [
            (lambda d, e, k: gates(d, [e], merge="mean"), ValueError, "merge must be 'concat' or 'sum'; got 'mean'"),
            (lambda d, e, k: gates(d, e), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got Tensor"),
            (lambda d, e, k: gates(d, [e.half()]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.float32; got torch\.float16"),
            (lambda d, e, k: gates(d, [e[:1]]), ValueError, r"encoders\[0\] must have decoder's batch of 2; got shape \(1, 3, 8, 10\)"),
            (lambda d, e, k: gates(d, [e[:, :2]], merge="sum"), ValueError, r"encoders\[0\] must have decoder's 3 channels .* \(2, 2, 8, 10\)"),
            (lambda d, e, k: gates(d[0], [e]), ValueError, r"decoder must have shape \(N, C, H, W\); got \(3, 4, 5\)"),
            (lambda d, e, k: pool(e.long(), 2), TypeError, r"input must be float32, .* got torch\.int64"),
            (lambda d, e, k: pool(e, 17), ValueError, "kernel_size must have at most 256 elements, .* got 17"),
            (lambda d, e, k: pool(e, (2, 1.5)), TypeError, r"kernel_size must be an int or a pair of ints; got \(2, 1\.5\)"),
            (lambda d, e, k: unpool(d, k.int(), 2, (8, 10)), TypeError, r"offsets must be uint8; got torch\.int32"),
            (lambda d, e, k: unpool(d, k[:1], 2, (8, 10)), ValueError, r"offsets must have pooled's shape \(2, 3, 4, 5\); got \(1, 3, 4, 5\)"),
            (lambda d, e, k: unpool(d, k, 2, (9, 10)), ValueError, r"output_size must be in \[7, 8\] x \[9, 10\] for pooled size \(4, 5\) .* got \(9, 10\)"),
            (lambda d, e, k: unpool(d, k, 2, (8, 10.0)), TypeError, r"output_size must be ints \(H, W\), .* got \(8, 10\.0\)"),
            (lambda d, e, k: unpool(d, k, 3, e.shape), ValueError, r"output_size must be in \[10, 12\] x \[13, 15\] for pooled size \(4, 5\) .* got \(2, 3, 8, 10\)"),
        ],
    )  # fmt: skip
