"""The boundary-aware loss as PyTorch ops: opcheck, compile, export, autocast, transforms, checkpoint, DDP, errors, modules."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import segops
from segops.bal import op

from ..targets import CUDA, EMULATED, EMULATED_CUDA, GPU, INTERPRETED, fast_implementations, fast_targets, free_port
from .conftest import draw_labels, output_and_gradient, relative_error


def weighed(z):
    return dict(label_smoothing=0.1, class_weight=torch.linspace(0.5, 1.5, 5, device=z.device))


LOSSES = {
    "boundary": lambda z, labels: segops.boundary_aware_loss(z, labels, normalize="mean", kernel_size=5, **weighed(z)),
    "per pixel": lambda z, labels: segops.boundary_aware_loss(z, labels, reduction="none"),
    "weighted": lambda z, labels: segops.upsample_cross_entropy(z, labels, labels[:, ::2, ::3] * 0.1 + 1, **weighed(z)),
}
by_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def draw(device="cpu", dtype=torch.float32, shape=(2, 5, 2, 3), size=(5, 7)):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    return logits, draw_labels(shape[0], 5, *size).to(device)


@pytest.mark.parametrize(
    "dtype, per_pixel, channels_last",
    [(torch.int64, False, False), (torch.int32, True, True), (torch.uint8, True, False), (torch.uint8, False, True)],
)
def test_opcheck(target, dtype, per_pixel, channels_last):
    device, backend = target
    if target == INTERPRETED and dtype != torch.int32:
        pytest.skip("one is enough for the interpreter")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    logits, labels = draw(device)
    logits, labels = logits.detach().contiguous(memory_format=memory_format).requires_grad_(), labels.to(dtype)
    ops = torch.ops.segops
    pixel_weight, class_weight = (
        (torch.rand(2, 3, 2, device=device), torch.rand(5, device=device)) if per_pixel else (None, None)
    )
    arguments = logits, labels, pixel_weight, class_weight
    torch.library.opcheck(ops.bal_classes, (labels, 5, 255))
    for normalize in (None, "max", "mean"):
        torch.library.opcheck(ops.bal_edge, (labels, 5, "gaussian", 5, 2.0, 0.5, 2, normalize, 255, backend))
    torch.library.opcheck(ops.bal_cross_entropy, (*arguments, 0.1, 255, per_pixel, backend))
    with torch.no_grad():
        loss, _, coefficients = ops.bal_cross_entropy(*arguments, 0.1, 255, per_pixel, backend)
    arguments = logits.detach(), labels, class_weight, coefficients
    torch.library.opcheck(ops.bal_cross_entropy_grad, (torch.rand_like(loss), *arguments, 255, backend))
    settings = "linear", 3, 1.0, 0.5, 2, "mean", 0.0, 255, per_pixel, backend
    torch.library.opcheck(ops.bal_boundary_loss, (logits, labels, class_weight, *settings))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_opcheck_of_the_kernels(device):
    logits, labels = draw(device)
    logits, ops, totals = logits.detach(), torch.ops.segops, torch.zeros(2, dtype=torch.float64, device=device)
    edges, rows, out, coefficients, loss = (
        torch.zeros(s, device=device) for s in ((2, 3, 4), (2, 2, 3, 4), (2, 3, 4), (4, *labels.shape), labels.shape)
    )
    torch.library.opcheck(ops.bal_count_edges, (labels, edges, 5, 255))
    torch.library.opcheck(ops.bal_blur, (edges, op.blur_factors("linear", 3, 1.0, labels.device), rows, out))
    torch.library.opcheck(ops.bal_softmax_loss, (logits, labels, out, None, coefficients, loss, totals, 0.1, 255))
    torch.library.opcheck(ops.bal_softmax_grad, (loss, logits, labels, None, coefficients, logits.clone(), 255))


@by_loss
@fast_targets
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(target, loss, dynamic):
    device, _ = target
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, size in (((2, 5, 2, 3), (5, 7)), ((3, 5, 3, 4), (8, 6)), ((1, 5, 4, 5), (4, 5))):
        logits, labels = draw(device, shape=shape, size=size)
        values, eager = (output_and_gradient(lambda z, f=f: f(z, labels), logits) for f in (compiled, loss))  # noqa: B023
        for value, exact in zip(values, eager, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)
            assert value.stride() == exact.stride()


@fast_implementations
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_edges(implementation, dynamic):
    device, _ = implementation
    compiled = torch.compile(segops.gaussian_edge, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 11, 13), (1, 20, 34)):
        labels = draw_labels(shape[0], 5, *shape[1:]).to(device)
        for settings in ({}, {"normalize": "mean"}, {"normalize": "max", "downsample": 1}):
            expected = segops.gaussian_edge(labels, 5, **settings)
            torch.testing.assert_close(compiled(labels, 5, **settings), expected, rtol=1e-6, atol=1e-6)


def names_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.name for event in profile.events()}


def test_compile_follows_the_backend():
    logits, labels = draw()
    compiled = torch.compile(LOSSES["boundary"], fullgraph=True, backend="aot_eager")
    for backend, fused in (("native", True), ("reference", False), ("native", True)):
        with segops.backend(backend):
            compiled(logits, labels)
            names = names_of(lambda: compiled(logits, labels))
            assert ("segops::bal_boundary_loss" in names) == fused
            torch.testing.assert_close(compiled(logits, labels), LOSSES["boundary"](logits, labels))


@fast_targets
@pytest.mark.parametrize(
    "module",
    [segops.nn.BoundaryAwareLoss(normalize="mean"), segops.nn.UpsampleCrossEntropy(reduction="none")],
    ids=["boundary", "upsample"],
)
def test_export_with_dynamic_sizes(target, module):
    """Batch, and height and width of logits and labels on their own."""
    device, _ = target
    n, h, w, height, width = map(torch.export.Dim, ("n", "h", "w", "height", "width"))
    shapes = {0: n, 2: h, 3: w}, {0: n, 1: height, 2: width}
    program = torch.export.export(module, draw(device), dynamic_shapes=shapes).module()
    for shape, size in (((3, 5, 7, 6), (18, 21)), ((1, 5, 9, 12), (9, 12)), ((2, 5, 20, 3), (17, 39))):
        arguments = draw(device, shape=shape, size=size)
        torch.testing.assert_close(program(*arguments), module(*arguments))


@by_loss
@fast_implementations
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(implementation, loss, compiled):
    """Logits of the autocast dtype, float32 work: what the same numbers give in float32."""
    device, _ = implementation
    logits, labels = draw(device, torch.bfloat16)
    expected = output_and_gradient(lambda z: loss(z, labels), logits.detach().float().requires_grad_())
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    with torch.autocast(device, dtype=torch.bfloat16):
        value, grad = output_and_gradient(lambda z: function(z, labels), logits)
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected[1].bfloat16())


def test_autocast_still_validates():
    logits, labels = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"logits must be .*torch\.int64"):
            segops.boundary_aware_loss(logits.long(), labels)
        with pytest.raises(TypeError, match=r"labels must be .*torch\.float32"):
            segops.upsample_cross_entropy(logits, labels.float())
        with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor; got list"):
            segops.upsample_cross_entropy([1.0], labels)


@by_loss
def test_transforms(loss):
    """PyTorch's ops run, which know vmap and derivatives of every kind."""
    logits, labels = draw(dtype=torch.float64)
    plain = logits.detach()
    (expected,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
    torch.testing.assert_close(torch.func.grad(lambda z: loss(z, labels).sum())(plain), expected, rtol=1e-5, atol=1e-6)
    tangent = torch.randn_like(plain)
    _, derivative = torch.func.jvp(lambda z: loss(z, labels).sum(), (plain,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-5, atol=1e-6)
    several = torch.stack([plain, plain + 1, tangent])
    mapped = torch.func.vmap(loss, in_dims=(0, None))(several, labels)
    torch.testing.assert_close(mapped, torch.stack([loss(each, labels) for each in several]), rtol=1e-5, atol=1e-6)
    mapped = torch.func.vmap(loss)(several, torch.stack([labels] * 3))
    torch.testing.assert_close(mapped, torch.stack([loss(each, labels) for each in several]), rtol=1e-5, atol=1e-6)


def test_transforms_in_compiled_code():
    """A derivative that the op does not have must not come out as 0."""
    logits, labels = draw()
    logits, tangent = logits.detach(), torch.randn_like(logits)

    def functions(z):
        def loss(z):
            return segops.boundary_aware_loss(z, labels)

        return torch.func.jvp(loss, (z,), (tangent,))[1], torch.func.grad(loss)(z)

    compiled = torch.compile(functions, backend="aot_eager", fullgraph=True)
    for value, expected in zip(compiled(logits), functions(logits), strict=True):
        torch.testing.assert_close(value, expected)
        assert expected.any()


@by_loss
@fast_targets
def test_checkpoint(target, loss):
    device, _ = target
    logits, labels = draw(device)
    direct = output_and_gradient(lambda z: loss(z.sin(), labels), logits)
    kept = output_and_gradient(
        lambda z: torch.utils.checkpoint.checkpoint(lambda z: loss(z.sin(), labels), z, use_reentrant=False), logits
    )
    for a, b in zip(direct, kept, strict=True):
        assert torch.equal(a, b)


def test_distributed_data_parallel():
    """Two processes over gloo: each gradient is the mean of what the two halves of the batch give."""
    torch.multiprocessing.spawn(_train_half, (free_port(),), nprocs=2)


def _train_half(rank, port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module, x = torch.nn.Conv2d(3, 5, 1), torch.randn(2, 3, 6, 7)
    labels, loss = draw_labels(2, 5, 21, 25, ignore_index=-1).clamp(min=0), segops.nn.BoundaryAwareLoss()
    (expected,) = torch.autograd.grad(loss(module(x), labels), module.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    loss(parallel(x[rank : rank + 1]), labels[rank : rank + 1]).backward()
    torch.testing.assert_close(module.weight.grad, expected)
    torch.distributed.destroy_process_group()


def test_backward_runs_where_forward_ran():
    """Whatever is asked for in between: the graph keeps its backend."""
    logits, labels = draw()
    with segops.backend("native"):
        out = segops.boundary_aware_loss(logits, labels)
    with segops.backend("reference"):
        names = names_of(out.backward)
    assert {"segops::bal_cross_entropy_grad", "segops::bal_softmax_grad"} <= names
    assert not any("nll_loss" in name or "upsample" in name for name in names)


def test_meta_device():
    logits = torch.empty(2, 5, 4, 6, device="meta", requires_grad=True)
    labels = torch.empty(2, 11, 13, dtype=torch.uint8, device="meta")
    assert segops.gaussian_edge(labels, 5).shape == (2, 11, 13)
    for function in (segops.boundary_aware_loss, segops.upsample_cross_entropy):
        assert function(logits, labels, reduction="none").shape == (2, 11, 13)
        loss = function(logits, labels)
        assert loss.shape == () and loss.dtype == torch.float32
        assert torch.autograd.grad(loss, logits)[0].shape == logits.shape


# Labels that are no class.

BAD_LABELS = [(7, torch.uint8), (5, torch.int64), (-3, torch.int64), (-3, torch.int32), (2**32 + 1, torch.int64)]
TAKERS = {
    "edge": lambda z, labels: segops.gaussian_edge(labels, 5),
    "cross entropy": segops.upsample_cross_entropy,
    "weighed 0": lambda z, labels: segops.upsample_cross_entropy(z[..., :3, :4], labels, labels[:, :2, :2] * 0.0, reduction="none"),
    "boundary": segops.boundary_aware_loss,
}  # fmt: skip


LOOK_AT_NO_LABEL = [EMULATED, *(each.values[0] for each in GPU)]


def says(value):
    return rf"labels must be in \[0, 5\) or ignore_index \(255\); got {value}$"


@fast_implementations
@pytest.mark.parametrize("value, dtype", BAD_LABELS, ids=str)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_labels_out_of_range(implementation, value, dtype, take):
    if implementation in LOOK_AT_NO_LABEL:
        pytest.skip("a GPU does not look: see test_labels_out_of_range_on_a_gpu")
    logits, labels = draw(size=(9, 10), shape=(2, 5, 9, 10))
    labels = labels.to(dtype)
    take(logits, labels)
    everywhere = [(n, y, x) for n in range(2) for y in range(9) for x in range(10)]
    for place in everywhere if value == 5 and take is TAKERS["edge"] else everywhere[::50]:
        wrong = labels.clone()
        wrong[place] = value
        with pytest.raises(IndexError, match=says(value)):
            take(logits, wrong)


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_labels_out_of_range_in_compiled_code(implementation, take):
    if implementation in LOOK_AT_NO_LABEL:
        pytest.skip("a GPU does not look")
    logits, labels = draw(size=(9, 10), shape=(2, 5, 9, 10))
    labels[1, 3, 4] = 7
    with pytest.raises(IndexError, match=says(7)):
        torch.compile(take, fullgraph=True, backend="aot_eager")(logits, labels)


def test_any_int_may_be_ignored(implementation):
    """Among them classes, and ints that the labels' dtype cannot hold, which wrap around to no label."""
    device, _ = implementation
    logits, _ = draw(device)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        for ignore_index in (0, 4, 255, -1, 256, 2**32 + 1, -(2**63)):
            labels = draw_labels(2, 5, 11, 13, dtype, ignore_index).to(device)
            loss = segops.upsample_cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
            assert torch.equal(loss == 0, labels.long() == ignore_index)


@pytest.mark.parametrize(
    "target",
    [
        *GPU,
        pytest.param(("cuda", "reference"), id="cuda-reference", marks=CUDA),
        EMULATED_CUDA,
    ],
    indirect=True,
)
def test_labels_out_of_range_on_a_gpu(target, monkeypatch):
    """NaN where nobody waits for the answer, the CPU's error where somebody does."""
    logits, labels = draw(target[0])
    labels[1, 3, 4] = 255
    wrong = labels.clone()
    wrong[1, 3, 4] = 7
    assert torch.equal(segops.gaussian_edge(wrong, 5), segops.gaussian_edge(labels, 5))
    for function in (segops.upsample_cross_entropy, segops.boundary_aware_loss):
        assert function(logits, wrong).isnan()
        loss = function(logits, wrong, reduction="none")
        assert loss[1, 3, 4].isnan() and loss.isnan().sum() == 1
    monkeypatch.setenv("SEGOPS_CHECK_LABELS", "1")
    segops.boundary_aware_loss(logits, labels)
    for take in (TAKERS["edge"], TAKERS["cross entropy"], TAKERS["boundary"]):
        with pytest.raises(IndexError, match=says(7)):
            take(logits, wrong)


# Arguments that are wrong before any kernel runs.

Z, L = torch.randn(2, 5, 4, 6), draw_labels(2, 5, 11, 13)
edge, cross_entropy, boundary = segops.gaussian_edge, segops.upsample_cross_entropy, segops.boundary_aware_loss
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
    (lambda: edge(L, 5, beta=None), TypeError, "beta must be a number; got None"),
    (lambda: edge(L, 5, downsample=0), ValueError, "downsample must be at least 1; got 0"),
    (lambda: edge(L, 5, downsample=2.0), TypeError, r"downsample must be an int; got 2\.0"),
    (lambda: edge(L, 5, normalize="sum"), ValueError, "normalize must be None, 'max' or 'mean'; got 'sum'"),
    (lambda: edge(L, 5, normalize=True), ValueError, "normalize must be None, 'max' or 'mean'; got True"),
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
    (lambda: cross_entropy(Z, L, reduction="batchmean"), ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'batchmean'"),
    (lambda: cross_entropy(Z, L, reduction=None), ValueError, "reduction must be 'mean', 'sum' or 'none'; got None"),
    (lambda: boundary(Z.long(), L), TypeError, r"logits must be float32, .* got torch\.int64"),
    (lambda: boundary(Z, L[:, None]), ValueError, r"labels must have shape \(N, H, W\); got \(2, 1, 11, 13\)"),
    (lambda: boundary(Z, L.float()), TypeError, r"labels must be int64, int32 or uint8; got torch\.float32"),
    (lambda: boundary(Z, L, kernel_size=6), ValueError, "kernel_size must be odd; got 6"),
    (lambda: boundary(Z, L, class_weight=torch.rand(6)), ValueError, r"class_weight must have shape \(5,\), .* got \(6,\)"),
    (lambda: boundary(Z, L, reduction="max"), ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
    (lambda: segops.nn.BoundaryAwareLoss(sigma=0), ValueError, "sigma must be positive; got 0"),
    (lambda: segops.nn.BoundaryAwareLoss(reduction="max"), ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
    (lambda: segops.nn.BoundaryAwareLoss(class_weight=torch.rand(5, 5)), ValueError, r"class_weight must have shape \(C,\)"),
    (lambda: segops.nn.UpsampleCrossEntropy(label_smoothing=2), ValueError, r"label_smoothing must be in \[0, 1\]; got 2"),
    (lambda: segops.nn.UpsampleCrossEntropy(class_weight=[1.0]), TypeError, r"class_weight must be a torch\.Tensor; got list"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message, backend):
    with pytest.raises(error, match=message), segops.backend(backend):
        call()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_in_compiled_code(backend):
    """The same with graph breaks; the same text where fullgraph wraps it."""
    calls = [
        (lambda z, labels: boundary(z, labels, sigma=-1.0), ValueError, r"sigma must be positive; got -1\.0"),
        (lambda z, labels: boundary(z, labels[:, None]), ValueError, r"labels must have shape \(N, H, W\); got \(2, 1, 11, 13\)"),
        (lambda z, labels: cross_entropy(z, labels.float()), TypeError, r"labels must be int64, int32 or uint8; got torch\.float32"),
        (lambda z, labels: edge(labels, 5, kernel_size=4), ValueError, "kernel_size must be odd; got 4"),
        (lambda z, labels: cross_entropy(z, labels, z.new_ones(2, 12, 13)), ValueError, r"pixel_weight .* got shape \(2, 12, 13\)"),
    ]  # fmt: skip
    with segops.backend(backend):
        for call, error, message in calls:
            with pytest.raises(error, match=message):
                torch.compile(call, backend="eager")(Z, L)
            with pytest.raises(Exception, match=message):
                torch.compile(call, backend="eager", fullgraph=True)(Z, L)


# Modules.


@pytest.mark.parametrize(
    "module, function",
    [
        (segops.nn.BoundaryAwareLoss, segops.boundary_aware_loss),
        (segops.nn.UpsampleCrossEntropy, segops.upsample_cross_entropy),
    ],
    ids=["BoundaryAwareLoss", "UpsampleCrossEntropy"],
)
def test_modules_have_the_functions_settings(module, function):
    def settings(of):
        parameters = inspect.signature(of).parameters.values()
        return {each.name: each.default for each in parameters if each.kind == each.KEYWORD_ONLY}

    assert settings(module) == settings(function)
    class_weight = torch.tensor([1.0, 2, 3, 4, 5])
    chosen = {"class_weight": class_weight, "label_smoothing": 0.2, "ignore_index": 3, "reduction": "sum"}
    if module is segops.nn.BoundaryAwareLoss:
        chosen |= {"kernel": "linear", "kernel_size": 5, "sigma": 1.0, "beta": 0.1, "downsample": 2, "normalize": "max"}
    assert chosen.keys() == settings(function).keys()
    ours, labels = module(**chosen), draw_labels(2, 5, 11, 13, ignore_index=3)
    torch.testing.assert_close(ours(Z, labels), function(Z, labels, **chosen), rtol=0, atol=0)
    for name, value in chosen.items():
        alone = {name: value}
        if name != "sigma":  # which the linear kernel does not have
            pixels = draw_labels(2, 5, 11, 13, ignore_index=chosen["ignore_index"] if name == "ignore_index" else 255)
            assert not torch.equal(module(**alone)(Z, pixels), function(Z, pixels)), f"{name} is not passed on"
            assert torch.equal(module(**alone)(Z, pixels), function(Z, pixels, **alone)), name
    assert list(ours.state_dict()) == ["class_weight"] and not list(ours.parameters())
    assert not module().state_dict()
    assert ours.double().class_weight.dtype == torch.float64
    assert "label_smoothing=0.2, ignore_index=3, reduction='sum'" in repr(ours)


def test_upsample_cross_entropy_module_takes_pixel_weights():
    weight = torch.rand(2, 3, 4)
    assert torch.equal(segops.nn.UpsampleCrossEntropy()(Z, L, weight), segops.upsample_cross_entropy(Z, L, weight))
    resized = F.interpolate(Z, L.shape[1:], mode="bilinear")
    loss = segops.nn.UpsampleCrossEntropy()(Z, L)
    assert relative_error(loss, F.cross_entropy(resized.double(), L, ignore_index=255)) < 1e-6
