"""The gate and pooling as PyTorch ops: opcheck, compile, export, autocast, transforms, checkpoint, DDP, backends, errors, module."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import segops
from segops.pag import op

from ..targets import CUDA, INTERPRETED, fast_implementations, fast_targets, free_port
from .conftest import Case, Pooling, draw, gradients, names_of


class PoolAndUnpool(torch.nn.Module):
    """As SegNet's decoder: convolved in between, put back where it came from."""

    def __init__(self, channels=3, kernel=2):
        super().__init__()
        self.convolution, self.kernel = torch.nn.Conv2d(channels, channels, 3, padding=1), kernel

    def forward(self, x):
        pooled, offsets = segops.max_pool2d_with_offsets(x, self.kernel)
        return segops.max_unpool2d_with_offsets(self.convolution(pooled), offsets, self.kernel, x.shape)


GATES = {
    "concat": Case((2, 3, 4, 5), ((2, 8, 10), (3, 4, 5), (4, 9, 7), (3, 3, 9))),
    "sum": Case((2, 3, 4, 5), ((3, 8, 10), (3, 4, 5), (3, 9, 7), (2, 3, 9)), "sum", (True,)),
    "large windows": Case((1, 2, 2, 2), ((2, 40, 40), (2, 2, 6)), "sum"),
}
by_gate = pytest.mark.parametrize("case", GATES.values(), ids=GATES)
by_layout = pytest.mark.parametrize("channels_last", [False, True])


@by_gate
def test_opcheck_of_the_gate(target, case):
    device, backend = target
    if target == INTERPRETED:
        case = Case((1, 2, 2, 3), ((2, 4, 6), (2, 3, 3)), case.merge)  # every opcheck runs the kernels a dozen times
    decoder, *encoders = maps = case.maps(torch.float32, device)
    settings = case.channels_last[0], backend
    on = [each for each in encoders if each.shape[2] >= decoder.shape[2]]
    for some in (on, []) if case.merge == "concat" else (on,):
        torch.library.opcheck(torch.ops.segops.pag, (decoder, some, case.merge, *settings))
    with torch.no_grad():
        out, offsets = torch.ops.segops.pag(maps[0], on, case.merge, *settings)
    part, held = out[:, -on[-1].shape[1] :], op.round_up(op.offset_bytes(on[-1].shape, decoder.shape))
    torch.library.opcheck(torch.ops.segops.pag_grad, (part, offsets[-held:], on[-1].shape[2:], *settings))


@by_layout
@pytest.mark.parametrize("kernel", [2, (3, 2)], ids=str)
def test_opcheck_of_pooling(target, channels_last, kernel):
    device, backend = target
    case = Pooling((2, 3, 7, 9) if target != INTERPRETED else (1, 2, 3, 4), kernel, channels_last)
    settings, map, ops = (case.sides, channels_last, backend), case.map(torch.float32, device), torch.ops.segops
    torch.library.opcheck(ops.pag_max_pool, (map, *settings))
    pooled, offsets = (each.detach() for each in ops.pag_max_pool(map, *settings))
    torch.library.opcheck(ops.pag_max_unpool, (pooled.requires_grad_(), offsets, case.sides, case.shape[2:], *settings[1:]))
    torch.library.opcheck(ops.pag_max_gather, (map, offsets, *settings))


@by_layout
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_opcheck_of_the_kernels(device, channels_last):
    ops, layout = torch.ops.segops, torch.channels_last if channels_last else torch.contiguous_format
    small, large, merged = (
        torch.randn(2, c, *size, device=device).contiguous(memory_format=layout)
        for c, size in ((3, (4, 5)), (3, (8, 10)), (6, (4, 5)))
    )
    offsets = torch.zeros(128, dtype=torch.uint8, device=device)
    torch.library.opcheck(ops.pag_pool, ([small, large], merged, offsets, [], True, channels_last))
    torch.library.opcheck(ops.pag_pool, ([small, large], small.clone(), offsets, [], False, channels_last))
    torch.library.opcheck(ops.pag_scatter, (small, offsets, large.clone(), [], channels_last))
    offsets = torch.zeros_like(small, dtype=torch.uint8)
    torch.library.opcheck(ops.pag_pool, ([large], small.clone(), offsets, [2, 2], True, channels_last))
    torch.library.opcheck(ops.pag_scatter, (small, offsets, large.clone(), [2, 2], channels_last))
    torch.library.opcheck(ops.pag_gather, (large, offsets, small.clone(), [2, 2], channels_last))


# Compiled and exported.


def assert_same(function, other, maps):
    """Bits and strides, of outputs and gradients. Some of these are views of the output's gradient, which has the output's strides."""
    out, exact = function(*maps), other(*maps)
    grad = torch.empty_like(exact).copy_(draw(exact.shape))
    for pair in zip((out, *gradients(out, maps, grad)), (exact, *gradients(exact, maps, grad)), strict=True):
        assert torch.equal(*pair) and pair[0].stride() == pair[1].stride()


@fast_implementations
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("merge, formats", [("concat", (False,)), ("concat", (True, False)), ("sum", (True,))], ids=str)
def test_compile_of_the_gate(implementation, merge, formats, dynamic):
    """Sizes that change: windows that divide and that do not, maps that are switched off."""
    cases = [
        Case((2, 3, 4, 5), ((3, 8, 10), (3, 4, 5)), merge, formats),
        Case((3, 3, 6, 7), ((3, 12, 14), (3, 6, 7)), merge, formats),
        Case((2, 3, 5, 4), ((3, 41, 59), (3, 5, 4)), merge, formats),
        Case((2, 3, 4, 5), ((3, 3, 10), (3, 4, 5)), merge, formats),
    ]
    compiled = torch.compile(cases[0].op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in cases[:3]:
        assert_same(compiled, case.op, case.maps(torch.float32, implementation[0]))
    maps = cases[3].maps(torch.float32, implementation[0])
    assert torch.equal(compiled(*maps), cases[3].op(*maps))


@fast_implementations
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_pooling(implementation, dynamic):
    device, _ = implementation
    module = PoolAndUnpool(kernel=(3, 2)).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, height, width, channels_last in ((2, 8, 10, False), (3, 9, 7, False), (2, 12, 13, True)):
        map = draw((n, 3, height, width), torch.float32, device, channels_last=channels_last).requires_grad_()
        assert_same(compiled, module, [map])


@fast_targets
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_pooling_alone(target, dynamic):
    """Whose offsets come out too."""
    compiled = torch.compile(segops.max_pool2d_with_offsets, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, height, width, kernel in ((2, 8, 10, 2), (3, 9, 7, 2), (3, 9, 7, (3, 4))):
        for channels_last in (False, True):
            map = draw((n, 3, height, width), torch.float32, target[0], channels_last=channels_last)
            for each, exact in zip(compiled(map, kernel), segops.max_pool2d_with_offsets(map, kernel), strict=True):
                assert torch.equal(each, exact) and each.stride() == exact.stride()


def test_inductor():
    """The default compiler, which plans strides and memory. It has no kernel of its own to write here: that takes 20 s."""

    def function(decoder, encoder):
        merged = segops.partial_attention_gate(decoder, [encoder], merge="sum")
        pooled, offsets = segops.max_pool2d_with_offsets(merged, 2)
        return segops.max_unpool2d_with_offsets(pooled, offsets, 2, merged.shape)

    maps = Case((2, 2, 5, 6), ((2, 10, 13),), channels_last=(True, False)).maps(torch.float32)
    with segops.backend("native"), torch.no_grad():
        assert torch.equal(torch.compile(function, fullgraph=True)(*maps), function(*maps))


def test_compile_follows_the_backend():
    gate, pooling = GATES["concat"], PoolAndUnpool()

    def function(*maps):
        return pooling(maps[0]), gate.op(*maps)

    compiled, maps = torch.compile(function, fullgraph=True, backend="aot_eager"), gate.maps(torch.float32)
    for backend, fused in (("native", True), ("reference", False), ("native", True)):
        with segops.backend(backend):
            compiled(*maps)
            names = names_of(lambda: compiled(*maps))
            for name in ("pag", "pag_max_pool", "pag_max_unpool"):
                assert (f"segops::{name}" in names) == fused, name


def dims(*names):
    return [None if name is None else torch.export.Dim(name) for name in names]


@fast_targets
@by_layout
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_export_of_the_gate_with_derived_sizes(target, merge, channels_last):
    """Batch, height and width, of which the encoder's are multiples."""
    device, _ = target
    n, h, w = dims("n", "h", "w")
    shapes = {0: n, 2: h, 3: w}, [{0: n, 2: by * h, 3: by * w} for by in (1, 2, 4)]
    module = segops.nn.PartialAttentionGate(merge)

    def maps(n, h, w):
        sizes = ((by * h, by * w) for by in (1, 2, 4))
        decoder, *encoders = Case((n, 3, h, w), tuple((3, *size) for size in sizes), merge, (channels_last,)).maps(
            torch.float32, device
        )
        return decoder.detach(), [each.detach() for each in encoders]

    program = torch.export.export(module, maps(2, 4, 5), dynamic_shapes=shapes).module()
    for sizes in ((3, 6, 7), (1, 2, 9), (5, 21, 3)):
        out, eager = program(*maps(*sizes)), module(*maps(*sizes))
        assert torch.equal(out, eager) and out.stride() == eager.stride()


@fast_targets
@pytest.mark.parametrize("example", [(8, 10), (9, 7), (40, 60)], ids=str)
def test_export_of_the_gate_with_independent_sizes(target, example):
    """Only switches specialise, and the bytes of an offset: else windows of any size, whatever those of the example."""
    device, _ = target
    n, h, w, height, width = dims("n", "h", "w", "height", "width")
    shapes = {0: n, 2: h, 3: w}, [{0: n, 2: height, 3: width}]
    module = segops.nn.PartialAttentionGate()

    def maps(n, size, encoder):
        return draw((n, 3, *size), torch.float32, device), [draw((n, 2, *encoder), torch.float32, device, 1)]

    program = torch.export.export(module, maps(2, (4, 5), example), dynamic_shapes=shapes).module()
    for sizes in (
        (3, (6, 7), (12, 14)),
        (1, (4, 5), (9, 8)),
        (5, (5, 4), (7, 20)),
        (2, (2, 3), (20, 21)),
        (2, (7, 9), (8, 10)),
    ):
        assert torch.equal(program(*maps(*sizes)), module(*maps(*sizes))), sizes
    with pytest.raises((AssertionError, RuntimeError)):  # a switch that was on is off
        program(*maps(2, (4, 5), (3, 10)))


@fast_targets
@by_layout
@pytest.mark.parametrize("kernel, strict", [(2, False), ((3, 2), False), ((3, 2), True)], ids=str)
def test_export_of_pooling_with_dynamic_sizes(target, kernel, channels_last, strict):
    device, _ = target
    module = PoolAndUnpool(kernel=kernel).to(device)
    # More than one window: of a single one, the strides tell no memory format.
    least_h, least_w = (kernel + 1, kernel + 1) if kernel == 2 else (kernel[0] + 1, kernel[1] + 1)
    shapes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=least_h), 3: torch.export.Dim("w", min=least_w)}

    def map(*size):
        n, *size = size
        return (draw((n, 3, *size), torch.float32, device, channels_last=channels_last),)

    program = torch.export.export(module, map(2, 8, 10), dynamic_shapes=(shapes,), strict=strict).module()
    for sizes in ((3, 12, 16), (2, 9, 11), (1, 31, 14), (5, 7, 25)):
        out, eager = program(*map(*sizes)), module(*map(*sizes))
        assert torch.equal(out, eager) and out.stride() == eager.stride(), sizes


# Autocast and transforms.


@fast_implementations
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_autocast_of_the_gate(implementation, merge, compiled):
    """The widest dtype that comes in, not the one that autocast is for: nothing is lost. Gradients in each map's own."""
    device, _ = implementation
    case = Case((2, 3, 4, 5), ((3, 8, 10), (3, 9, 7)), merge)
    op = torch.compile(case.op, fullgraph=True, backend="aot_eager") if compiled else case.op
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtypes, widest in (
        ((bf16, bf16, bf16), bf16),
        ((bf16, fp32, bf16), fp32),
        ((fp32, bf16, fp32), fp32),
        ((bf16, fp16, bf16), fp32),
    ):
        maps = [each.detach().to(dtype).requires_grad_() for each, dtype in zip(case.maps(fp32, device), dtypes, strict=True)]
        with torch.autocast(device, dtype=bf16):
            out = op(*maps)
            grads = gradients(out, maps)
        expected = case.op(*(each.to(widest) for each in maps))
        assert out.dtype == widest and torch.equal(out, expected)
        assert all(torch.equal(*pair) for pair in zip(grads, gradients(expected, maps), strict=True))
        assert tuple(each.dtype for each in grads) == dtypes


@fast_implementations
def test_autocast_leaves_pooling_alone(implementation):
    device, _ = implementation
    case = Pooling((2, 3, 7, 9), 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        map = case.map(dtype, device)
        pooled, offsets = case.pool(map)
        with torch.autocast(device, dtype=torch.bfloat16):
            for value, exact in zip(
                (*case.pool(map), case.unpool(pooled, offsets)), (pooled, offsets, case.unpool(pooled, offsets)), strict=True
            ):
                assert value.dtype == exact.dtype and torch.equal(value, exact)


def test_autocast_still_validates():
    decoder, encoder = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"decoder must be .* got torch\.int64"):
            segops.partial_attention_gate(decoder.long(), [encoder])
        with pytest.raises(TypeError, match=r"encoders\[1\] must be .* got torch\.bool"):
            segops.partial_attention_gate(decoder, [encoder, encoder > 0])
        with pytest.raises(TypeError, match=r"encoders\[0\] must be a torch\.Tensor; got list"):
            segops.partial_attention_gate(decoder, [[1.0]])
        with pytest.raises(TypeError, match=r"decoder must be a torch\.Tensor; got NoneType"):
            segops.partial_attention_gate(None, [encoder])
        with pytest.raises(ValueError, match=r"encoders\[0\] must have decoder's batch of 2"):
            segops.partial_attention_gate(decoder, [encoder[:1].bfloat16()])
        with pytest.raises(TypeError, match=r"input must be .* got torch\.int64"):
            segops.max_pool2d_with_offsets(decoder.long(), 2)


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_transforms_of_the_gate(merge):
    """PyTorch's ops run, which know vmap and derivatives of every kind."""
    case = Case((2, 3, 4, 5), ((3, 8, 10), (3, 9, 7), (3, 4, 5)), merge)
    maps = case.maps()
    plain, tangents = [each.detach() for each in maps], [each.detach() for each in case.maps(draw=_other_numbers)]

    def weighed(*maps):
        out = case.op(*maps)
        return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()

    expected = torch.autograd.grad(weighed(*maps), maps)
    grads = torch.func.grad(weighed, argnums=(0, 1, 2, 3))(*plain)
    for value, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(value, exact)
    value, derivative = torch.func.jvp(weighed, tuple(plain), tuple(tangents))
    assert torch.equal(value, weighed(*plain))
    torch.testing.assert_close(derivative, sum((a * b).sum() for a, b in zip(expected, tangents, strict=True)))
    several = [torch.stack([a, b, a - b]) for a, b in zip(plain, tangents, strict=True)]
    mapped = torch.func.vmap(case.op)(*several)
    assert torch.equal(mapped, torch.stack([case.op(*each) for each in zip(*several, strict=True)]))
    mapped = torch.func.vmap(case.op, in_dims=(None, 0, 0, None))(plain[0], several[1], several[2], plain[3])
    assert torch.equal(mapped, torch.stack([case.op(plain[0], *each, plain[3]) for each in zip(*several[1:3], strict=True)]))


def _other_numbers(shape, dtype, device, seed, channels_last):
    return draw(shape, dtype, device, seed + 50, channels_last)


def test_transforms_of_pooling():
    case = Pooling((2, 3, 7, 9), 2)
    map = case.map()
    plain, tangent = map.detach(), draw(case.shape, seed=50)

    def chain(map):
        pooled, offsets = case.pool(map)
        return case.unpool(pooled.square(), offsets).sin()

    (expected,) = torch.autograd.grad(chain(map).sum(), map)
    torch.testing.assert_close(torch.func.grad(lambda map: chain(map).sum())(plain), expected)
    value, derivative = torch.func.jvp(lambda map: chain(map).sum(), (plain,), (tangent,))
    assert torch.equal(value, chain(plain).sum())
    torch.testing.assert_close(derivative, (expected * tangent).sum())
    several = torch.stack([plain, tangent, plain - tangent])
    pooled, offsets = torch.func.vmap(case.pool)(several)
    singly = [case.pool(each) for each in several]
    assert torch.equal(pooled, torch.stack([each for each, _ in singly]))
    assert torch.equal(offsets, torch.stack([each for _, each in singly]))
    assert torch.equal(torch.func.vmap(case.unpool)(pooled, offsets), torch.stack([case.unpool(*each) for each in singly]))


def test_transforms_in_compiled_code():
    """A derivative that the ops do not have must not come out as 0."""
    case, pooling = Case((2, 3, 4, 5), ((3, 8, 10), (3, 9, 7)), "sum"), PoolAndUnpool()
    decoder, *encoders = (each.detach() for each in case.maps(torch.float32))

    def functions(encoder):
        def chain(encoder):
            return pooling(segops.partial_attention_gate(decoder, [encoder, encoders[1]])[:, :3]).sum() + pooling(encoder).sum()

        return torch.func.jvp(chain, (encoder,), (encoder.cos(),))[1], torch.func.grad(chain)(encoder)

    compiled = torch.compile(functions, backend="aot_eager", fullgraph=True)
    for value, expected in zip(compiled(encoders[0]), functions(encoders[0]), strict=True):
        torch.testing.assert_close(value, expected)
        assert expected.any()


@fast_targets
@by_gate
def test_checkpoint(target, case):
    device, _ = target
    pooling = PoolAndUnpool(2).to(device) if case is GATES["large windows"] else PoolAndUnpool().to(device)
    maps = [each for each in case.maps(torch.float32, device) if each.shape[2] >= case.decoder[2]]

    def function(*maps):
        return pooling(case.op(*(each.sin() for each in maps))[:, : case.decoder[1]])

    def kept(*maps):
        return torch.utils.checkpoint.checkpoint(function, *maps, use_reentrant=False)

    maps = [maps[0].requires_grad_(), *maps[1:]] if case.merge == "sum" else maps[:1]
    assert_same(kept, function, maps)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pooling, self.gate = (
            torch.nn.Conv2d(3, 4, 3, padding=1),
            PoolAndUnpool(4),
            segops.nn.PartialAttentionGate(),
        )
        self.head = torch.nn.Conv2d(8, 2, 1)

    def forward(self, x):
        encoder = self.stem(x)
        decoder = F.avg_pool2d(self.pooling(encoder), 2)
        return self.head(self.gate(decoder, [encoder]))


def test_distributed_data_parallel():
    """Two processes over gloo: each gradient is the mean of what the two halves of the batch give."""
    torch.multiprocessing.spawn(_train_half, (free_port(),), nprocs=2)


def _train_half(rank, port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module, x = Network(), torch.randn(2, 3, 8, 10)
    expected = torch.autograd.grad(module(x).square().mean(), list(module.parameters()))
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    parallel(x[rank : rank + 1]).square().mean().backward()
    for parameter, grad in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    torch.distributed.destroy_process_group()


# Backends.


def test_backward_runs_where_forward_ran():
    """Whatever is asked for in between: the graph keeps its backend."""
    maps, map = GATES["concat"].maps(torch.float32), torch.randn(2, 3, 8, 10, requires_grad=True)
    with segops.backend("native"):
        out = GATES["concat"].op(*maps)
        pooled, offsets = segops.max_pool2d_with_offsets(map, 2)
        unpooled = segops.max_unpool2d_with_offsets(pooled, offsets, 2, (8, 10))
    with segops.backend("reference"):
        names = {*names_of(lambda: out.sum().backward()), *names_of(lambda: unpooled.sum().backward())}
    assert {
        f"segops::{name}" for name in ("pag_grad", "pag_max_gather", "pag_max_unpool", "pag_scatter", "pag_gather")
    } <= names
    assert not any("max_pool2d" in name or name in ("aten::scatter", "aten::gather") for name in names)


CALLS = {
    "partial_attention_gate": lambda map: segops.partial_attention_gate(map, [map]),
    "max_pool2d_with_offsets": lambda map: segops.max_pool2d_with_offsets(map, 2),
    "max_unpool2d_with_offsets": lambda map: segops.max_unpool2d_with_offsets(map, torch.zeros_like(map).byte(), 1, map.shape),
}
by_call = pytest.mark.parametrize("name, call", CALLS.items(), ids=CALLS)


@by_call
def test_forced_backend_that_cannot_run(name, call):
    message = rf"segops\.{name}: backend 'native' cannot run on meta with torch\.float32: .*Available here: 'auto', 'reference'"
    with segops.backend("native"), pytest.raises(RuntimeError, match=message):
        call(torch.empty(2, 3, 4, 5, device="meta"))


def test_environment():
    """SEGOPS_BACKEND holds for all of the functions."""
    program = """
import torch, segops
map = torch.randn(2, 3, 4, 5)
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    segops.partial_attention_gate(map, [torch.randn(2, 3, 8, 10)])
    segops.max_unpool2d_with_offsets(*segops.max_pool2d_with_offsets(map, 2), 2, map.shape)
print(any(event.name.startswith("segops::") for event in profile.events()))
"""
    environment = {**os.environ, "SEGOPS_BACKEND": "reference"}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert shown.stdout.strip() == "False", shown.stderr


def test_meta_device():
    decoder, encoder = (torch.empty(2, 3, *size, device="meta", requires_grad=True) for size in ((4, 5), (8, 10)))
    out = segops.partial_attention_gate(decoder, [encoder, encoder])
    assert out.shape == (2, 9, 4, 5) and torch.autograd.grad(out.sum(), encoder)[0].shape == encoder.shape
    pooled, offsets = segops.max_pool2d_with_offsets(encoder, 3)
    assert pooled.shape == offsets.shape == (2, 3, 3, 4) and offsets.dtype == torch.uint8
    assert segops.max_unpool2d_with_offsets(pooled, offsets, 3, (8, 10)).shape == encoder.shape


# Arguments that are wrong before any kernel runs.

D, E, K = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10), torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
gate, pool, unpool = segops.partial_attention_gate, segops.max_pool2d_with_offsets, segops.max_unpool2d_with_offsets
ERRORS = [
    (lambda: gate(D, [E], merge="mean"), ValueError, "merge must be 'concat' or 'sum'; got 'mean'"),
    (lambda: gate(D, [E], merge=None), ValueError, "merge must be 'concat' or 'sum'; got None"),
    (lambda: gate(D, E), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got Tensor"),
    (lambda: gate(D, None), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got NoneType"),
    (lambda: gate(D, (each for each in [E])), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got generator"),
    (lambda: gate(D.tolist(), [E]), TypeError, r"decoder must be a torch\.Tensor; got list"),
    (lambda: gate(D.long(), [E]), TypeError, r"decoder must be float32, bfloat16, float16 or float64; got torch\.int64"),
    (lambda: gate(D.to(torch.complex64), [E]), TypeError, r"decoder must be float32, .* got torch\.complex64"),
    (lambda: gate(D[0], [E]), ValueError, r"decoder must have shape \(N, C, H, W\); got \(3, 4, 5\)"),
    (lambda: gate(D[:, :0], [E]), ValueError, r"decoder must have channels, .* got shape \(2, 0, 4, 5\)"),
    (lambda: gate(D[:, :, :0], [E]), ValueError, r"decoder must have .* height .* got shape \(2, 3, 0, 5\)"),
    (lambda: gate(D[..., :0], [E]), ValueError, r"decoder must have .* width of at least 1; got shape \(2, 3, 4, 0\)"),
    (lambda: gate(D, [E, None]), TypeError, r"encoders\[1\] must be a torch\.Tensor; got NoneType"),
    (lambda: gate(D, [E.int()]), TypeError, r"encoders\[0\] must be float32, .* got torch\.int32"),
    (lambda: gate(D, [E, E[0]]), ValueError, r"encoders\[1\] must have shape \(N, C, H, W\); got \(3, 8, 10\)"),
    (lambda: gate(D, [E[:, :0]]), ValueError, r"encoders\[0\] must have channels, .* got shape \(2, 0, 8, 10\)"),
    (lambda: gate(D, [E, E, E[:, :, :0]]), ValueError, r"encoders\[2\] must have .* height .* got shape \(2, 3, 0, 10\)"),
    (lambda: gate(D, [E.half()]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.float32; got torch\.float16"),
    (lambda: gate(D.bfloat16(), [E]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.bfloat16; got torch\.float32"),
    (lambda: gate(D, (E, E.to("meta"))), ValueError, r"encoders\[1\] must be on decoder's device cpu; got meta"),
    (lambda: gate(D, [E[:1]]), ValueError, r"encoders\[0\] must have decoder's batch of 2; got shape \(1, 3, 8, 10\)"),
    (lambda: gate(D, [E, E[:, :2]], merge="sum"), ValueError, r"encoders\[1\] must have decoder's 3 channels where merge is 'sum'; got shape \(2, 2, 8, 10\)"),
    # What is wrong with a map that is off is wrong all the same, but for its channels.
    (lambda: gate(D, [E[:1, :, :3]]), ValueError, r"encoders\[0\] must have decoder's batch of 2; got shape \(1, 3, 3, 10\)"),
    (lambda: gate(D, [E[:, :, :3].double()]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.float32; got torch\.float64"),
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
    (lambda: unpool(D, K, 2, (9, 10)), ValueError, r"output_size must be what windows of \(2, 2\) cut into \(4, 5\); got \(9, 10\)"),
    (lambda: unpool(D, K, 2, (6, 10)), ValueError, r"output_size must be what windows of \(2, 2\) cut into \(4, 5\); got \(6, 10\)"),
    (lambda: unpool(D, K, (3, 2), E.shape), ValueError, r"output_size must be what windows of \(3, 2\) cut into \(4, 5\); got \(2, 3, 8, 10\)"),
    (lambda: segops.nn.PartialAttentionGate("max"), ValueError, "merge must be 'concat' or 'sum'; got 'max'"),
    (lambda: segops.nn.PartialAttentionGate(merge=0), ValueError, "merge must be 'concat' or 'sum'; got 0"),
    (lambda: segops.nn.PartialAttentionGate("sum")(D, [E[:, :1]]), ValueError, r"encoders\[0\] must have decoder's 3 channels"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message, backend):
    with pytest.raises(error, match=message), segops.backend(backend):
        call()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_in_compiled_code(backend):
    """The same with graph breaks; the same text where fullgraph wraps it."""
    calls = [
        (lambda d, e, k: gate(d, [e], merge="mean"), ValueError, "merge must be 'concat' or 'sum'; got 'mean'"),
        (lambda d, e, k: gate(d, e), TypeError, r"encoders must be a list or tuple of torch\.Tensor; got Tensor"),
        (lambda d, e, k: gate(d, [e.half()]), TypeError, r"encoders\[0\] must have decoder's dtype torch\.float32; got torch\.float16"),
        (lambda d, e, k: gate(d, [e[:1]]), ValueError, r"encoders\[0\] must have decoder's batch of 2; got shape \(1, 3, 8, 10\)"),
        (lambda d, e, k: gate(d, [e[:, :2]], merge="sum"), ValueError, r"encoders\[0\] must have decoder's 3 channels .* \(2, 2, 8, 10\)"),
        (lambda d, e, k: gate(d[0], [e]), ValueError, r"decoder must have shape \(N, C, H, W\); got \(3, 4, 5\)"),
        (lambda d, e, k: pool(e.long(), 2), TypeError, r"input must be float32, .* got torch\.int64"),
        (lambda d, e, k: pool(e, 17), ValueError, "kernel_size must have at most 256 elements, .* got 17"),
        (lambda d, e, k: pool(e, (2, 1.5)), TypeError, r"kernel_size must be an int or a pair of ints; got \(2, 1\.5\)"),
        (lambda d, e, k: unpool(d, k.int(), 2, (8, 10)), TypeError, r"offsets must be uint8; got torch\.int32"),
        (lambda d, e, k: unpool(d, k[:1], 2, (8, 10)), ValueError, r"offsets must have pooled's shape \(2, 3, 4, 5\); got \(1, 3, 4, 5\)"),
        (lambda d, e, k: unpool(d, k, 2, (9, 10)), ValueError, r"output_size must be what windows .* \(4, 5\); got \(9, 10\)"),
        (lambda d, e, k: unpool(d, k, 2, (8, 10.0)), TypeError, r"output_size must be ints \(H, W\), .* got \(8, 10\.0\)"),
        (lambda d, e, k: unpool(d, k, 3, e.shape), ValueError, r"output_size must be what windows of \(3, 3\) cut into \(4, 5\); got \(2, 3, 8, 10\)"),
    ]  # fmt: skip
    with segops.backend(backend):
        for call, error, message in calls:
            torch.compiler.reset()
            with pytest.raises(error, match=message):
                torch.compile(call, backend="eager")(D, E, K)
            with pytest.raises(Exception, match=message):
                torch.compile(call, backend="eager", fullgraph=True)(D, E, K)


# The module.


def test_module():
    for merge in ("concat", "sum"):
        module = segops.nn.PartialAttentionGate(merge)
        assert torch.equal(module(D, [E, D]), segops.partial_attention_gate(D, [E, D], merge=merge))
        assert not list(module.parameters()) and not list(module.buffers()) and not module.state_dict()
        assert repr(module) == f"PartialAttentionGate(merge={merge!r})"
        module.load_state_dict({})
    assert segops.nn.PartialAttentionGate().merge == "concat" and segops.nn.PartialAttentionGate(merge="sum").merge == "sum"
    assert segops.nn.PartialAttentionGate()(D, (E,)).shape == (2, 6, 4, 5)


# What the kernels refuse by themselves.


def test_kernels_refuse_offsets_that_are_too_short():
    input, pooled = torch.randn(1, 1, 8, 8), torch.empty(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="offsets must be 16 bytes"):
        torch.ops.segops.pag_pool([input], pooled, torch.zeros(15, dtype=torch.uint8), [2, 2], True, False)
    with pytest.raises(RuntimeError, match="offsets must be bytes, 16"):
        torch.ops.segops.pag_scatter(pooled, torch.zeros(15, dtype=torch.uint8), input, [2, 2], False)


def test_kernels_refuse_windows_that_two_bytes_do_not_number():
    decoder, encoder = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 300, 300)
    with pytest.raises(RuntimeError, match="do not number windows of 90000 elements"):
        torch.ops.segops.pag(decoder, [encoder], "concat", False, "native")


def test_kernels_take_empty_maps():
    out = torch.empty(0, 1, 4, 4)
    torch.ops.segops.pag_scatter(torch.empty(0, 1, 2, 2), torch.empty(0, dtype=torch.uint8), out, [2, 2], False)


def test_sparse_maps_are_refused():
    with pytest.raises(TypeError, match=r"input must be a dense tensor; got layout torch\.sparse_coo"):
        segops.max_pool2d_with_offsets(torch.zeros(1, 1, 4, 4).to_sparse(), 2)


def test_float64_is_not_for_triton():
    with segops.backend("triton"), pytest.raises(RuntimeError, match="float64 runs in C\\+\\+ on the CPU and in the reference"):
        segops.max_pool2d_with_offsets(torch.zeros(1, 1, 4, 4, dtype=torch.float64), 2)


def test_sums_keep_negative_zero(target):
    device, _ = target
    maps = [torch.full((1, 3, 2, 5), -0.0, device=device), torch.full((1, 3, 4, 5), -0.0, device=device)]
    assert segops.partial_attention_gate(maps[0], maps[1:], merge="sum").signbit().all()
