"""Pyramid atrous convolution: what every op owes its users."""

import torch

import segops

from ..contract import Contract, Export, Use, ops_of
from .compile_triton import compilations
from .conftest import Case

X, W, B = torch.randn(2, 24, 9, 10), torch.randn(20, 24, 3, 3), torch.randn(20)
pac = segops.pyramid_atrous_conv2d


def use(merge, channels, channels_last):
    rates = (1, 3, 5, 7, 9)

    def draw(shape, dtype, device):
        return Case(shape, channels, rates, merge, channels_last=channels_last).tensors(dtype, device)

    return Use(
        function="pyramid_atrous_conv2d",
        call=Case((), channels, rates, merge).op,
        draw=draw,
        sizes=((2, 24, 2, 3), (3, 24, 5, 2), (2, 24, 6, 9)),
        tails=tuple((1, c, 5, 7) for c in (21, 31, 33, 64, 67)),
        large=((2, 24, 65, 67),),
        empty=((0, 24, 3, 4),),
        forward=("segops::pac",),
        backward=("segops::pac_grads",),
        never=("convolution_backward", "pac_input_grad", "pac_weight_grad"),
        autocast=((torch.float32,), (torch.float32, torch.bfloat16)),
        cast=lambda *dtypes: torch.bfloat16,
        multiplied=True,
        slow_reference=True,
    )


def opcheck_of(channels_last, channels, merge):
    def arguments(device, backend):
        case = Case((2, 24, 3, 4), channels, (1, 2, 3), merge, channels_last=channels_last)
        x, weight, bias = case.tensors(torch.float32, device)
        grad = torch.randn_like(case.plain(x, weight)).requires_grad_()
        ops = ops_of(backend)
        yield ops.pac, (x, weight, bias, case.rates, merge)
        yield ops.pac_input_grad, (grad, weight, channels_last, case.rates, merge)
        yield ops.pac_weight_grad, (grad, x, 3, channels_last, case.rates, merge)
        yield ops.pac_grads, (*(each.detach() for each in (grad, x, weight)), channels_last, False, case.rates, merge)

    return arguments


def export():
    return Export(
        module=lambda: torch.nn.Sequential(segops.nn.PyramidAtrousConv2d(24, 20), torch.nn.ReLU()),
        draw=lambda shape, dtype, device: (torch.randn(shape, dtype=dtype, device=device),),
        sizes=((2, 24, 9, 10), (5, 24, 31, 8), (1, 24, 2, 3)),
        dynamic_shapes=lambda: ({0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},),
    )


class TestPyramidAtrousConv2d(Contract):
    USES = {"sum": use("sum", 20, False), "sum of more, channels_last": use("sum", 30, True), "concat": use("concat", 20, True)}
    EXPORTS = {"module": export()}
    OPCHECKS = {
        "sum": opcheck_of(False, 20, "sum"),
        "sum, channels_last": opcheck_of(True, 30, "sum"),
        "concat": opcheck_of(True, 20, "concat"),
    }
    COMPILATIONS = compilations
    ERRORS = [
        (lambda: pac(X[0], W), ValueError, r"input must have shape \(N, Cin, H, W\); got \(24, 9, 10\)"),
        (lambda: pac(X, W[0]), ValueError, r"weight must have shape .* got \(24, 3, 3\)"),
        (lambda: pac(X, W[:, :5]), ValueError, r"weight must have input's 24 channels .* \(20, 5, 3, 3\)"),
        (lambda: pac(X, W[..., :2, :2]), ValueError, "must be square and odd; got 2x2"),
        (lambda: pac(X, W[..., :1]), ValueError, "must be square and odd; got 3x1"),
        (lambda: pac(X, W, B[:7]), ValueError, r"bias must have shape \(20,\).* got \(7,\)"),
        (lambda: pac(X, W, rates=()), ValueError, "rates must hold at least one positive int; got none"),
        (lambda: pac(X, W, rates=(1, 0)), ValueError, r"rates must be positive ints; got \(1, 0\)"),
        (lambda: pac(X, W, rates=(1.5,)), TypeError, "rates must be positive ints; got 1.5"),
        (lambda: pac(X, W, rates=3), TypeError, "rates must be a tuple or list of positive ints; got int"),
        (lambda: pac(X, W, merge="mean"), ValueError, "merge must be 'concat' or 'sum'; got 'mean'"),
        (lambda: pac(X.long(), W), TypeError, r"input must be float32, .* got torch\.int64"),
        (lambda: pac(X, W.double()), TypeError, r"weight must have input's dtype torch\.float32; got torch\.float64"),
        (lambda: pac(X, W, B.half()), TypeError, r"bias must have input's dtype torch\.float32; got torch\.float16"),
        (lambda: pac(X, W.to("meta")), ValueError, "weight must be on input's device cpu; got meta"),
        (lambda: pac(X.tolist(), W), TypeError, r"input must be a torch\.Tensor; got list"),
        (lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=4), ValueError, "must be square and odd; got 4x4"),
        (lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=-3), ValueError, "must be square and odd; got -3x-3"),
        (
            lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=3.0),
            TypeError,
            r"kernel_size must be an odd int; got 3\.0",
        ),
        (lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=(3, 3)), TypeError, r"must be an odd int; got \(3, 3\)"),
        (lambda: segops.nn.PyramidAtrousConv2d(24, 20, rates=[]), ValueError, "rates must hold at least one"),
        (lambda: segops.nn.PyramidAtrousConv2d(24, 0), ValueError, "out_channels must be a positive int; got 0"),
    ]
    COMPILED_ERRORS = (
        (X, W),
        [
            (lambda x, w: pac(x, w, rates=()), ValueError, "rates must hold at least one positive int; got none"),
            (lambda x, w: pac(x, w[:, :5]), ValueError, r"weight must have input's 24 channels .* \(20, 5, 3, 3\)"),
            (lambda x, w: pac(x.long(), w), TypeError, r"input must be float32, .* got torch\.int64"),
        ],
    )
