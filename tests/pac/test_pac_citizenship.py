"""Pyramid atrous convolution as a PyTorch op: opcheck, compile, export, autocast, vmap, checkpoint, errors, module."""

import pytest
import torch

import segops
from segops.pac import reference

from ..targets import free_port
from .conftest import Case, outputs_and_gradients, relative_error

CASE = Case((2, 24, 9, 10), 20)


@pytest.mark.parametrize("merge, channels_last, channels", [("sum", False, 20), ("sum", True, 30), ("concat", True, 20)])
def test_opcheck(target, merge, channels_last, channels):
    device, backend = target
    case = Case((2, 24, 3, 4), channels, (1, 2, 3), merge, channels_last=channels_last)  # small: the interpreter is slow
    x, weight, bias = case.tensors(torch.float32, device)
    grad = torch.randn_like(case.plain(x, weight)).requires_grad_()
    settings = (case.rates, merge, backend)
    torch.library.opcheck(torch.ops.segops.pac, (x, weight, bias, *settings))
    torch.library.opcheck(torch.ops.segops.pac_input_grad, (grad, weight, channels_last, *settings))
    torch.library.opcheck(torch.ops.segops.pac_weight_grad, (grad, x, 3, channels_last, *settings))


def test_opcheck_of_the_kernels():
    planes, out = torch.randn(1, 4, 5, 9, 8), torch.empty(1, 4, 5, 1, 8)
    torch.library.opcheck(torch.ops.segops.pac_shift_gather, (planes, torch.randn(8), out, (3, 3), (1, 2), 1))
    torch.library.opcheck(torch.ops.segops.pac_shift_scatter, (out, torch.empty(4, 5, 9, 8), 0, (3, 3), (1, 2), 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(target, dynamic):
    device, _ = target
    compiled = torch.compile(CASE.op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 24, 3, 4), (3, 24, 5, 2)):
        tensors = Case(shape, 20).tensors(torch.float32, device)
        for value, eager in zip(*(outputs_and_gradients(f, tensors) for f in (compiled, CASE.op)), strict=True):
            assert torch.equal(value, eager) and value.stride() == eager.stride()


def test_compile_follows_the_backend():
    compiled = torch.compile(CASE.op, fullgraph=True, backend="aot_eager")
    tensors = CASE.tensors(torch.float32)
    native = compiled(*tensors)
    with segops.backend("reference"):
        assert torch.equal(compiled(*tensors), CASE.plain(*tensors))
    assert torch.equal(compiled(*tensors), native)


def test_export_with_dynamic_batch_height_and_width():
    module = torch.nn.Sequential(segops.nn.PyramidAtrousConv2d(24, 20), torch.nn.ReLU())
    dynamic = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.export.export(module, (torch.randn(2, 24, 9, 10),), dynamic_shapes=(dynamic,))
    x = torch.randn(5, 24, 31, 8)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    op = torch.compile(CASE.op, fullgraph=True, backend="aot_eager") if compiled else CASE.op
    x, weight, bias = CASE.tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(x, weight.detach().bfloat16().requires_grad_(), bias)  # mixed dtypes are fine here
        out = op(x, weight, bias)
        grads = torch.autograd.grad(out.float().square().sum(), (x, weight, bias))
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_autocast_still_validates():
    x, weight, _ = CASE.tensors(torch.float32)
    with pytest.raises(TypeError, match=r"input must be .*torch\.int64"), torch.autocast("cpu", dtype=torch.bfloat16):
        CASE.op(x.long(), weight)


def test_vmap():
    """PyTorch's convolutions run, which have a batching rule."""
    x, weight = torch.randn(3, 2, 24, 5, 6), torch.randn(20, 24, 3, 3)
    out = torch.func.vmap(CASE.op, in_dims=(0, None))(x, weight)
    expected = torch.stack([CASE.op(each, weight) for each in x])
    assert (out - expected).norm() <= 1e-6 * expected.norm()


def test_functional_and_forward_mode_differentiation():
    x, weight, _ = (t.detach() for t in CASE.tensors())
    tangent = torch.randn_like(x)
    for op in (CASE.op, lambda x, w: CASE.op(x, w).square()):
        value, derivative = torch.func.jvp(lambda x, op=op: op(x, weight), (x,), (tangent,))
        step = 1e-6
        torch.testing.assert_close(derivative, (op(x + step * tangent, weight) - value) / step, rtol=1e-3, atol=1e-3)
    grad = torch.func.grad(lambda w: CASE.op(x, w).square().sum())(weight)
    w = weight.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(CASE.op(x, w).square().sum(), w)[0])


def test_transforms_in_compiled_code():
    """A derivative that the op does not have must not come out as 0."""
    x, weight, _ = (t.detach() for t in CASE.tensors(torch.float32))
    tangent = torch.randn_like(x)

    def derivative(x):
        return torch.func.jvp(lambda x: CASE.op(x, weight), (x,), (tangent,))[1]

    compiled = torch.compile(derivative, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, derivative(x))
    assert compiled.any()


def test_checkpoint():
    tensors = CASE.tensors(torch.float32)
    direct = outputs_and_gradients(CASE.op, tensors)
    kept = outputs_and_gradients(lambda *t: torch.utils.checkpoint.checkpoint(CASE.op, *t, use_reentrant=False), tensors)
    for a, b in zip(direct, kept, strict=True):
        assert torch.equal(a, b)


def test_distributed_data_parallel():
    """Two processes over gloo: each gradient is the mean of what the two halves of the batch give."""
    torch.multiprocessing.spawn(_train_half, (free_port(),), nprocs=2)


def _train_half(rank, port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module, x = segops.nn.PyramidAtrousConv2d(24, 20), torch.randn(2, 24, 9, 10)
    (expected,) = torch.autograd.grad(module(x).square().mean(), module.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    parallel(x[rank : rank + 1]).square().mean().backward()
    torch.testing.assert_close(module.weight.grad, expected)
    torch.distributed.destroy_process_group()


def test_backward_runs_where_forward_ran():
    """Whatever is asked for in between: the graph keeps its backend."""
    tensors = CASE.tensors(torch.float32)
    with segops.backend("native"):
        out = CASE.op(*tensors)
    with segops.backend("reference"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    names = {event.name for event in profile.events()}
    assert "segops::pac_input_grad" in names and "aten::convolution_backward" not in names


def test_meta_device():
    out = segops.pyramid_atrous_conv2d(torch.empty(2, 24, 9, 10, device="meta"), torch.empty(20, 24, 3, 3, device="meta"))
    assert out.shape == (2, 20, 9, 10)


X, W, B = torch.randn(2, 24, 9, 10), torch.randn(20, 24, 3, 3), torch.randn(20)
ERRORS = [
    (lambda: segops.pyramid_atrous_conv2d(X[0], W), ValueError, r"input must have shape \(N, Cin, H, W\); got \(24, 9, 10\)"),
    (lambda: segops.pyramid_atrous_conv2d(X, W[0]), ValueError, r"weight must have shape .* got \(24, 3, 3\)"),
    (lambda: segops.pyramid_atrous_conv2d(X, W[:, :5]), ValueError, r"weight must have input's 24 channels .* \(20, 5, 3, 3\)"),
    (lambda: segops.pyramid_atrous_conv2d(X, W[..., :2, :2]), ValueError, "must be square and odd; got 2x2"),
    (lambda: segops.pyramid_atrous_conv2d(X, W[..., :1]), ValueError, "must be square and odd; got 3x1"),
    (lambda: segops.pyramid_atrous_conv2d(X, W, B[:7]), ValueError, r"bias must have shape \(20,\).* got \(7,\)"),
    (lambda: segops.pyramid_atrous_conv2d(X, W, rates=()), ValueError, "rates must hold at least one positive int; got none"),
    (lambda: segops.pyramid_atrous_conv2d(X, W, rates=(1, 0)), ValueError, r"rates must be positive ints; got \(1, 0\)"),
    (lambda: segops.pyramid_atrous_conv2d(X, W, rates=(1.5,)), TypeError, "rates must be positive ints; got 1.5"),
    (lambda: segops.pyramid_atrous_conv2d(X, W, rates=3), TypeError, "rates must be a tuple or list of positive ints; got int"),
    (lambda: segops.pyramid_atrous_conv2d(X, W, merge="mean"), ValueError, "merge must be 'sum' or 'concat'; got 'mean'"),
    (lambda: segops.pyramid_atrous_conv2d(X.long(), W), TypeError, r"input must be float32, .* got torch\.int64"),
    (
        lambda: segops.pyramid_atrous_conv2d(X, W.double()),
        TypeError,
        r"weight must have input's dtype torch\.float32; got torch\.float64",
    ),
    (
        lambda: segops.pyramid_atrous_conv2d(X, W, B.half()),
        TypeError,
        r"bias must have input's dtype torch\.float32; got torch\.float16",
    ),
    (lambda: segops.pyramid_atrous_conv2d(X, W.to("meta")), ValueError, "weight must be on input's device cpu; got meta"),
    (lambda: segops.pyramid_atrous_conv2d(X.tolist(), W), TypeError, r"input must be a torch\.Tensor; got list"),
    (lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=4), ValueError, "must be square and odd; got 4x4"),
    (lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=-3), ValueError, "must be square and odd; got -3x-3"),
    (lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=3.0), TypeError, r"kernel_size must be an odd int; got 3\.0"),
    (
        lambda: segops.nn.PyramidAtrousConv2d(24, 20, kernel_size=(3, 3)),
        TypeError,
        r"kernel_size must be an odd int; got \(3, 3\)",
    ),
    (lambda: segops.nn.PyramidAtrousConv2d(24, 20, rates=[]), ValueError, "rates must hold at least one"),
    (lambda: segops.nn.PyramidAtrousConv2d(24, 0), ValueError, "out_channels must be a positive int; got 0"),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_errors_in_compiled_code():
    compiled = torch.compile(segops.pyramid_atrous_conv2d, backend="eager")
    with pytest.raises(ValueError, match="rates must hold at least one positive int; got none"):
        compiled(X, W, rates=())
    with pytest.raises(Exception, match="rates must hold at least one positive int; got none"):
        torch.compile(segops.pyramid_atrous_conv2d, backend="eager", fullgraph=True)(X, W, rates=())


def test_module_is_a_drop_in():
    torch.manual_seed(3)
    ours = segops.nn.PyramidAtrousConv2d(24, 20)
    torch.manual_seed(3)
    conv = torch.nn.Conv2d(24, 20, 3)
    assert torch.equal(ours.weight, conv.weight) and torch.equal(ours.bias, conv.bias)
    ours.load_state_dict(conv.state_dict())
    x = torch.randn(2, 24, 9, 10)
    expected = reference.pyramid_atrous_conv2d(x, conv.weight, conv.bias, (1, 3, 5, 7, 9), "sum")
    assert relative_error(ours(x).detach(), expected.detach().double()) < 1e-6
    assert segops.nn.PyramidAtrousConv2d(24, 20, merge="concat", bias=False)(x).shape == (2, 100, 9, 10)
    assert "rates=(1, 3, 5, 7, 9)" in repr(ours)
