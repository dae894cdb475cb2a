"""Pyramid atrous convolution: mathematics and accuracy, on every backend that runs here."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import segops
from segops._library import kernels
from segops.pac import factorised, op, reference

from ..layouts import shifted, spread
from ..targets import INTERPRETED, compiled_targets, fast_targets, on_a_gpu, runs
from .conftest import CASES, Case, assert_accurate, outputs_and_gradients, relative_error


def test_reference_is_the_paper():
    """The oracle itself, against a loop over output pixels."""
    case = Case((1, 2, 5, 6), 3, rates=(1, 3))
    x, weight, bias = (t.detach() for t in case.tensors())
    expected = torch.zeros(1, 3, 5, 6, dtype=torch.float64)
    for rate in case.rates:
        padded = F.pad(x, (rate,) * 4)
        for i in range(5):
            for j in range(6):
                window = padded[0, :, i : i + 2 * rate + 1 : rate, j : j + 2 * rate + 1 : rate]
                expected[0, :, i, j] += (weight * window).sum((1, 2, 3)) + bias
    torch.testing.assert_close(case.plain(x, weight, bias), expected, rtol=1e-13, atol=1e-13)


def test_cases_run_the_kernels():
    """The cases of this suite are of the kind that is factorised, not handed to conv2d."""
    for case in CASES:
        assert op._pays(torch.empty(case.channels, case.shape[1], 1, 1), case.rates), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def test_accuracy(case, dtype, target):
    device, backend = target
    if not runs(target, dtype):
        pytest.skip("float64 is for the CPU kernels and the reference")
    if dtype == torch.bfloat16 and backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds: see test_interpreted_bfloat16")
    assert_accurate(case, dtype, device)


@pytest.mark.parametrize(
    "shape, channels",
    [((2, 512, 33, 33), 64), ((1, 24, 129, 65), 96), ((1, 16, 150, 150), 16), ((1, 4, 64, 64), 4), ((1, 8, 150, 100), 8)],
)
def test_accuracy_of_large_maps(shape, channels):
    """Several strips and channel blocks; few channels and many pixels, where a careless sum loses a digit."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_accurate(Case(shape, channels), dtype, "cpu")


@fast_targets
@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("c_in, c_out", [(8, 40), (40, 8)])
def test_accuracy_in_strips_and_blocks(target, c_in, c_out, merge, monkeypatch):
    """As maps have it that do not fit the workspace at once."""
    for workspace in (factorised.WORKSPACE, factorised.LARGEST_WORKSPACE):
        monkeypatch.setitem(workspace, "cpu", 1)
        monkeypatch.setitem(workspace, "cuda", 1)
    assert_accurate(Case((2, c_in, 45, 50), c_out, (1, 2, 5, 7), merge), torch.float32, target[0])


def test_interpreted_bfloat16():
    """The Triton kernels under the interpreter, in bfloat16: within one unit in the last place of the native ones."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the compiled kernels in test_accuracy")
    case = CASES[0]
    tensors = case.tensors(torch.bfloat16)
    with segops.backend("native"):
        native = case.op(*tensors).float()
    with segops.backend("triton"):
        triton = case.op(*tensors).float()
    torch.testing.assert_close(triton, native, rtol=2**-6, atol=2**-6)


@compiled_targets
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3), c_in=st.integers(1, 40), c_out=st.integers(1, 40), h=st.integers(1, 20), w=st.integers(1, 20),
    rates=st.lists(st.integers(1, 12), min_size=1, max_size=5), merge=st.sampled_from(["sum", "concat"]),
    kernel_size=st.sampled_from([1, 3, 5]), channels_last=st.booleans(),
)  # fmt: skip
def test_any_shape(target, n, c_in, c_out, h, w, rates, merge, kernel_size, channels_last):
    """The op itself, whatever the public function would have chosen, against the reference in float64."""
    device, backend = target
    case = Case((n, c_in, h, w), c_out, tuple(rates), merge, kernel_size, channels_last)
    dtype, bound = (torch.float64, 1e-11) if runs(target, torch.float64) else (torch.float32, 1e-5)

    def op(x, weight, bias):
        return torch.ops.segops.pac(x, weight, bias, case.rates, merge, backend)

    values, truth = outputs_and_gradients(op, case.tensors(dtype, device)), outputs_and_gradients(case.plain, case.tensors())
    for value, exact in zip(values, truth, strict=True):
        assert value.shape == exact.shape
        assert (value.double().cpu() - exact).norm() <= bound * (exact.norm() + 1)  # of values near 1, whose sums may cancel


@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("c_in, c_out", [(4, 3), (3, 4)])
def test_gradcheck(merge, c_in, c_out):
    x = torch.randn(2, c_in, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(c_out, c_in, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(c_out, dtype=torch.float64, requires_grad=True)

    def native(*tensors):
        return torch.ops.segops.pac(*tensors, (1, 2, 4), merge, "native")

    assert torch.autograd.gradcheck(native, (x, weight, bias))
    assert torch.autograd.gradgradcheck(native, (x, weight, bias))


@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_gradcheck_of_the_public_function(merge):
    """Channels enough that the factorised kernels run."""
    x = torch.randn(1, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 5, 3, 3, dtype=torch.float64, requires_grad=True)

    def public(*tensors):
        return segops.pyramid_atrous_conv2d(*tensors, rates=(1, 2, 3), merge=merge)

    assert torch.autograd.gradcheck(public, (x, weight))
    assert torch.autograd.gradgradcheck(public, (x, weight), fast_mode=True)


@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_shift_kernels_are_adjoint(target, merge):
    """<gather(P), Y> = <P, scatter(Y)> with opposite signs, exactly what makes one the other's derivative. In integers."""
    device, backend = target
    rates, groups, run = (1, 2, 5), 3 if merge == "concat" else 1, kernels("pac", backend)
    planes = torch.randint(-8, 9, (2, 7, 6, 9, 5)).float().to(device)
    grad = torch.randint(-8, 9, (2, 7, 6, groups, 5)).float().to(device)
    gathered, scattered = torch.full_like(grad, torch.nan), torch.full((14, 6, 9, 5), torch.nan, device=device)
    for sign in (1, -1):
        run.pac_shift_gather(planes, None, gathered, (3, 3), rates, sign)
        run.pac_shift_scatter(grad, scattered, 0, (3, 3), rates, -sign)
        assert (gathered * grad).sum() == (planes.view_as(scattered) * scattered).sum() != 0


@pytest.mark.parametrize("groups", [1, 4])
def test_kernels_take_any_address_and_stride(target, groups):
    """Eight channels, which 16 bytes divide; tensors that begin or go on where they do not, strips, and slices of channels."""
    device, backend = target
    run, rates = kernels("pac", backend), (1, 2, 3, 4)
    planes, bias = torch.randn(2, 5, 6, 9, 8, device=device), torch.randn(8, device=device)
    out, source = torch.empty(2, 5, 6, groups, 8, device=device), torch.randn(2, 5, 6, groups, 8, device=device)
    run.pac_shift_gather(planes, bias, out, (3, 3), rates, 1)
    expected = out.clone()
    for planes_, bias_, out_ in (
        (shifted(planes), bias, out),
        (planes, shifted(bias), out),
        (planes, bias, shifted(out)),
        (planes, bias, spread(out)),
        (planes, bias, spread(out, 4)),
        (planes, bias, spread(out.flatten(3)).unflatten(3, (groups, 8))),
    ):
        run.pac_shift_gather(planes_, bias_, out_, (3, 3), rates, 1)
        assert torch.equal(out_, expected)
    scattered = torch.empty(10, 6, 9, 8, device=device)
    run.pac_shift_scatter(source, scattered, 0, (3, 3), rates, 1)
    expected = scattered.clone()
    for source_, out_, first in (
        (shifted(source), scattered, 0),
        (source, shifted(scattered), 0),
        (source, torch.empty(4, 6, 9, 8, device=device), 3),
        (source, shifted(torch.empty(2, 6, 9, 8, device=device)), 8),
    ):
        run.pac_shift_scatter(source_, out_, first, (3, 3), rates, 1)
        assert torch.equal(out_, expected[first : first + len(out_)])


def test_every_element_is_written(target):
    """Into memory full of NaN, also where the output is a slice of a wider buffer and the rows are a strip. The slice may begin
    where a pack of 16 bytes does, and only its pixels be out of step."""
    device, backend = target
    run = kernels("pac", backend)
    for channels in (1, 3, 8, 21, 64, 67):
        planes = torch.randn(2, 5, 6, 9, channels, device=device)
        for before in (0, 1):
            buffer = torch.full((2, 5, 6, 1, before + channels + 1), torch.nan, device=device)
            run.pac_shift_gather(planes, None, buffer[..., before:-1], (3, 3), (1, 2, 3), 1)
            assert buffer[..., before:-1].isfinite().all()
            assert buffer[..., :before].isnan().all() and buffer[..., -1].isnan().all()
        strip = torch.full((4, 6, 9, channels), torch.nan, device=device)
        run.pac_shift_scatter(torch.randn(2, 5, 6, 1, channels, device=device), strip, 3, (3, 3), (1, 2, 3), 1)
        assert strip.isfinite().all()


def test_not_a_convolution_per_rate():
    """The arithmetic of one convolution: no dilated convolution is called, and the products' work does not grow with the rates."""

    def flops(rates):
        x, weight = torch.randn(1, 64, 33, 33), torch.randn(64, 64, 3, 3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_flops=True) as p:
            segops.pyramid_atrous_conv2d(x, weight, rates=rates)
        return sum(event.flops or 0 for event in p.key_averages())

    one = 2 * 64 * 64 * 9 * 33 * 33
    assert 0 < flops((1, 3, 5)) <= 1.05 * one
    assert flops((1, 3, 5, 7, 9)) <= 1.05 * one


def test_rates_far_beyond_the_map():
    case = Case((1, 40, 5, 6), 24, rates=(1, 2, 1000, 2**40))
    x, weight, bias = (t.detach() for t in case.tensors())
    near = reference.pyramid_atrous_conv2d(x, weight, bias, (1, 2, 50, 60), "sum")
    torch.testing.assert_close(case.op(x, weight, bias), near, rtol=1e-12, atol=1e-12)


def test_taps_outside_the_map_are_skipped():
    weight = torch.randn(8, 8, 3, 3)
    for size, live in (((4, 9), (3, 3)), ((4, 2), (3, 1)), ((1, 1), (1, 1)), ((3, 4), (1, 3))):
        assert factorised._live_taps(weight, (3, 6), torch.empty(1, 8, *size)).shape[2:] == live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype, target):
    case = CASES[0] if target != INTERPRETED else Case((1, 24, 3, 4), 20)
    runs = [outputs_and_gradients(case.op, case.tensors(dtype, target[0])) for _ in range(3)]
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("channels", [40, 56])
def test_strided_inputs_and_gradients(target, channels):
    """Slices of larger buffers, transposed weights, expanded gradients."""
    device, _ = target
    buffer = torch.randn(3, 80, 15, 16, device=device)
    views = {
        "slice": buffer[1:, 8:56, 2:13, 3:12],
        "channels_last slice": buffer.contiguous(memory_format=torch.channels_last)[1:, 8:56, 2:13, 3:12],
        "transposed": buffer[:2, :48, :11, :9].transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": buffer[:1, :48, :11, :9].expand(2, -1, -1, -1),
    }
    weight = torch.randn(48, channels, 3, 3, device=device).transpose(0, 1)
    for name, x in views.items():
        x = x.detach().requires_grad_()
        w = weight.detach().requires_grad_()
        out = segops.pyramid_atrous_conv2d(x, w)
        expected = reference.pyramid_atrous_conv2d(x, w, None, (1, 3, 5, 7, 9), "sum")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3, msg=name)
        got, want = (torch.autograd.grad(y.sum(), (x, w)) for y in (out, expected))
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b.double().cpu()) < 1e-5, name


def test_memory_format_follows_the_input(target):
    device, _ = target
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 40, 6, 7, device=device).contiguous(memory_format=memory_format).requires_grad_()
        weight = torch.randn(24, 40, 3, 3, device=device).contiguous(memory_format=memory_format).requires_grad_()
        for merge in ("sum", "concat"):
            out = segops.pyramid_atrous_conv2d(x, weight, merge=merge)
            assert out.is_contiguous(memory_format=memory_format)
            grads = torch.autograd.grad(out.square().sum(), (x, weight))
            assert [g.stride() for g in grads] == [x.stride(), weight.stride()]


def test_empty_batch(target):
    device, _ = target
    x = torch.randn(0, 40, 6, 7, device=device, requires_grad=True)
    weight, bias = (
        torch.randn(24, 40, 3, 3, device=device, requires_grad=True),
        torch.randn(24, device=device, requires_grad=True),
    )
    for merge, channels in (("sum", 24), ("concat", 120)):
        out = segops.pyramid_atrous_conv2d(x, weight, bias, merge=merge)
        assert out.shape == (0, channels, 6, 7)
        grads = torch.autograd.grad(out.sum(), (x, weight, bias))
        assert grads[0].shape == x.shape and all(g.eq(0).all() for g in grads[1:])


def test_bias_is_part_of_the_shared_filter(target):
    device, _ = target
    x, weight, bias = (
        torch.zeros(1, 40, 3, 3, device=device),
        torch.randn(24, 40, 3, 3, device=device),
        torch.randn(24, device=device),
    )
    out = segops.pyramid_atrous_conv2d(x, weight, bias, rates=(1, 2, 3))
    torch.testing.assert_close(out, 3 * bias[None, :, None, None].expand_as(out))
    out = segops.pyramid_atrous_conv2d(x, weight, bias, rates=(1, 2, 3), merge="concat")
    torch.testing.assert_close(out, bias.repeat(3)[None, :, None, None].expand_as(out))


def test_only_what_is_wanted_gets_a_gradient(target):
    device, _ = target
    case = CASES[0]
    for wanted in range(3):
        tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(case.tensors(torch.float32, device))]
        (grad,) = torch.autograd.grad(case.op(*tensors).square().sum(), tensors[wanted])
        assert grad.shape == tensors[wanted].shape


def test_nan_and_infinity_reach_exactly_their_outputs():
    x = torch.zeros(1, 70, 9, 9)
    x[0, 3, 4, 4] = torch.inf
    weight = torch.rand(24, 70, 3, 3) + 0.1
    out = segops.pyramid_atrous_conv2d(x, weight, rates=(1, 3))
    expected = reference.pyramid_atrous_conv2d((x == torch.inf).float(), weight, None, (1, 3), "sum") != 0
    assert torch.equal(out.isinf(), expected)


@on_a_gpu
def test_current_stream_and_cuda_graph(target):
    case = Case((2, 64, 17, 19), 32)
    x, weight, _ = (t.detach() for t in case.tensors(torch.bfloat16, "cuda"))
    expected = case.op(x, weight)
    torch.testing.assert_close(expected, case.plain(x, weight), rtol=2e-2, atol=2e-2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = case.op(x, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.op(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(on_side, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(captured, expected, rtol=2e-2, atol=2e-2)


@on_a_gpu
def test_no_synchronisation(target):
    case = Case((2, 64, 17, 19), 32)
    tensors = case.tensors(torch.bfloat16, "cuda")
    outputs_and_gradients(case.op, tensors)
    grad = torch.randn_like(case.op(*tensors))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(case.op(*tensors), tensors, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("c_in, c_out, side", [(8, 16, 16400), (64, 8, 8200)])
def test_indices_beyond_32_bits(target, c_in, c_out, side):
    """More than 2^31 elements, of the output where inputs are shifted, of the planes where products are: the last rows are right."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    x = torch.randn(1, c_in, side, side, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(c_out, c_in, 3, 3, device="cuda", dtype=torch.bfloat16)
    assert max(c_out, 9 * c_out if c_in > c_out else 0) * side**2 > 2**31
    tail = reference.pyramid_atrous_conv2d(x[:, :, -40:], weight, None, (1, 3, 5, 7, 9), "sum")[:, :, 20:]
    out = segops.pyramid_atrous_conv2d(x, weight)[:, :, -20:]
    assert relative_error(out, tail.double().cpu()) < 1e-2
