"""Pyramid atrous convolution: mathematics and accuracy, on every backend that runs here."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import segops
from segops.ops.pac import op, reference
from segops.ops.pac.op import channels_that_pay  # as it is: conftest.py has kernels run everywhere

from ..accuracy import relative_error
from ..contract import assert_same, gradients, names_of, results
from ..layouts import shifted
from ..targets import (
    DTYPES,
    INTERPRETED,
    TARGETS,
    compiled_targets,
    fast_targets,
    matrix,
    needs_much_gpu_memory,
    on_a_gpu,
    runs,
)
from .conftest import CASES, Case, assert_accurate


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


def test_channels_that_pay():
    """Fewer the more rates there are; on a GPU more than 64 and less than 256 at the paper's five."""
    for device in ("cpu", "cuda"):
        bounds = [channels_that_pay(device, rates) for rates in range(2, 65)]
        assert bounds == sorted(bounds, reverse=True) and bounds[-1] >= 2
    assert 64 < channels_that_pay("cuda", 5) <= 256


def matters(target, dtype, case):
    """The interpreter takes seconds; it truncates to bfloat16 where a GPU rounds: see test_interpreted_bfloat16."""
    if target == INTERPRETED:
        return case in CASES[4:] and (dtype == torch.float32 or (dtype == torch.float16 and case is CASES[-1]))
    return runs(target, dtype)


@pytest.mark.parametrize("target, dtype, case", matrix(TARGETS, DTYPES, CASES, when=matters), indirect=["target"])
def test_accuracy(target, dtype, case):
    assert_accurate(case, dtype, target[0])


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
    """As maps have it that do not fit the workspace at once; the emulation's is small."""
    size = {("cpu", "native"): (150, 150), ("cuda", "native"): (1000, 1000)}.get(target, (45, 50))
    if target[1] == "triton":
        from segops.ops.pac import triton_kernels

        monkeypatch.setattr(triton_kernels, "WORKSPACE", 1)
        monkeypatch.setattr(triton_kernels, "LARGEST_WORKSPACE", 1)
    for dtype in (torch.float32, torch.bfloat16):
        if target[1] != "triton" or dtype == torch.float32:  # the interpreter truncates to bfloat16
            assert_accurate(Case((2, c_in, *size), c_out, (1, 2, 5, 7), merge), dtype, target[0])


def test_interpreted_bfloat16():
    """The Triton kernels under the interpreter, in bfloat16: within one unit in the last place of the native ones."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the compiled kernels in test_accuracy")
    case = CASES[4]
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

    def call(x, weight, bias):
        return op.pac(x, weight, bias, case.rates, merge, backend=backend)

    values, truth = results(call, case.tensors(dtype, device)), results(case.plain, case.tensors())
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
        return op.pac(*tensors, (1, 2, 4), merge, backend="native")

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


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_tensors_that_begin_where_no_pack_does(target, channels, merge):
    """Eight channels, which 16 bytes divide; in the kernels' layout, so that they read what they are given."""
    device, _ = target
    case = Case((2, 8, 3, 4), channels, (1, 2, 3, 4), merge, channels_last=True)
    tensors = case.tensors(torch.float32, device)
    out = case.op(*tensors)
    grad = torch.randn_like(out)
    expected = results(case.op, tensors)[:1] + gradients([out], tensors, [grad])
    for i in range(4):
        moved = [shifted(each.detach()).requires_grad_() if i == at else each for at, each in enumerate(tensors)]
        out = case.op(*moved)
        found = [out.detach(), *gradients([out], moved, [shifted(grad) if i == 3 else grad])]
        assert_same(found, expected)


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_gradients_are_adjoint(target, channels, merge):
    """<pac(x, w), y> = <x, its input gradient of y> = <w, its weight gradient of y>, exactly: in integers."""
    (device, backend), rates = target, (1, 2, 5)
    x, w = torch.randint(-3, 4, (2, 16, 7, 6)).float().to(device), torch.randint(-3, 4, (channels, 16, 3, 3)).float().to(device)
    out = op.pac(x, w, None, rates, merge, backend=backend)
    y = torch.randint(-3, 4, out.shape).float().to(device)
    by_x = op.pac_input_grad(y, w, False, rates, merge, backend=backend)
    by_w = op.pac_weight_grad(y, x, 3, False, rates, merge, backend=backend)
    assert (out * y).sum() == (x * by_x).sum() == (w * by_w).sum() != 0
    assert_same(op.pac_grads(y, x, w, False, False, rates, merge, backend=backend), (by_x, by_w))


@compiled_targets
@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("c_in, c_out", [(40, 8), (8, 40), (16, 16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_at_once_are_those_of_each(target, c_in, c_out, merge, channels_last):
    """To the bit, in one strip of planes or several, also where some taps touch nothing."""
    device, backend = target
    for size, rates, dtype in (((45, 50), (1, 2, 5), torch.float32), ((3, 9), (3, 4, 50), torch.bfloat16)):
        case = Case((2, c_in, *size), c_out, rates, merge, channels_last=channels_last)
        x, weight, _ = (each.detach() for each in case.tensors(dtype, device))
        grad = torch.randn_like(case.plain(x, weight))
        both = op.pac_grads(grad, x, weight, channels_last, not channels_last, rates, merge, backend=backend)
        by_x = op.pac_input_grad(grad, weight, channels_last, rates, merge, backend=backend)
        by_weight = op.pac_weight_grad(grad, x, 3, not channels_last, rates, merge, backend=backend)
        assert_same(both, (by_x, by_weight))


def test_gradients_that_are_differentiated_again_are_each_an_op():
    case = CASES[0]
    tensors = case.tensors(torch.float32)
    out = case.op(*tensors)
    names = names_of(lambda: gradients([out], tensors, create_graph=True))
    assert {"segops::pac_input_grad", "segops::pac_weight_grad"} <= set(names) and "segops::pac_grads" not in names


@compiled_targets
@pytest.mark.parametrize("kernel_size, size, rates", [(3, (4, 5), (1, 2, 3)), (5, (4, 5), (1, 3)), (3, (3, 4), (3, 6, 1))])
@pytest.mark.parametrize("c_in, c_out", [(16, 8), (8, 16), (14, 6)])
@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_indices_of_32_bits_and_of_64(target, kernel_size, size, rates, c_in, c_out, merge):
    """The same bits from kernels for small maps and for large ones, as the emulation has it: of one image, and of it 48
    times. In integers, whose products are exact."""
    device, backend = target
    x, grad = torch.randint(-1, 2, (1, c_in, *size)).float(), torch.randint(-1, 2, (1, c_out, *size)).float()
    weight = torch.randint(-1, 2, (c_out, c_in, kernel_size, kernel_size)).float()
    grad = grad.repeat(1, len(rates), 1, 1) if merge == "concat" else grad
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for images in (1, 48):
            some_x, some_grad = (each.repeat(images, 1, 1, 1).to(device, dtype) for each in (x, grad))
            w = weight.to(device, dtype)
            out = op.pac(some_x, w, None, rates, merge, backend=backend)
            by_x, by_weight = op.pac_grads(some_grad, some_x, w, False, False, rates, merge, backend=backend)
            found.append([out[-1], by_x[-1], by_weight / images if dtype == torch.float32 else by_x[0]])
        assert_same(found[0], found[1])


@fast_targets
@pytest.mark.parametrize("shape", [(2, 72, 8, 24), (3, 70, 9, 8), (1, 64, 13, 11), (2, 33, 7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_memory_formats_make_no_difference(target, shape, dtype):
    """Contiguous maps are transposed, in tiles whose rows and columns are packs, or are not. In integers, whose products are
    exact."""
    (device, backend), c = target, shape[1]
    drawn = (torch.randint(-1, 2, each) for each in (shape, shape, (c, c, 3, 3)))
    grad, x, weight = (each.to(device, dtype) for each in drawn)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        some_grad, some_x = (each.contiguous(memory_format=memory_format) for each in (grad, x))
        last = memory_format is torch.channels_last
        both = op.pac_grads(some_grad, some_x, weight, last, False, (1, 2), "sum", backend=backend)
        found.append([op.pac(some_x, weight, None, (1, 2), "sum", backend=backend), *both])
    assert_same(*found, strides=False)


def test_ops_refuse_what_does_not_fit():
    """By themselves: Python may not have checked it."""
    ops, x, w, bias = torch.ops.segops, torch.ones(1, 8, 9, 9), torch.ones(40, 8, 3, 3), torch.ones(40)
    for call, message in (
        (lambda: ops.pac(x, w, None, [], "sum"), "pac: rates must hold positive ints"),
        (lambda: ops.pac(x, w, None, [1, 0], "sum"), "pac: rates must hold positive ints"),
        (lambda: ops.pac(x, w, None, [1, 2], "max"), "pac: merge must be 'sum' or 'concat'"),
        (lambda: ops.pac(x, w[..., :2, :2], None, [1, 2], "sum"), "pac: the kernel must be square and odd"),
        (lambda: ops.pac(x, w[:, :7], None, [1, 2], "sum"), "pac: weight must have input's channels"),
        (lambda: ops.pac(x, w, bias[:1], [1, 2], "concat"), "pac: bias must be"),
        (lambda: ops.pac(x[0], w, None, [1, 2], "sum"), "pac: needs tensors of four dimensions"),
        (lambda: ops.pac(x, w.double(), None, [1, 2], "sum"), "pac: tensors differ in dtype"),
        (lambda: ops.pac_input_grad(x, w, False, [1, 2], "sum"), "pac_input_grad: grad must have the channels"),
        (lambda: ops.pac_weight_grad(x, x, 2, False, [1], "sum"), "pac_weight_grad: the kernel must be square and odd"),
        (lambda: ops.pac_weight_grad(x, x[..., 1:], 3, False, [1], "sum"), "pac_weight_grad: grad must have input's batch"),
        (lambda: ops.pac_weight_grad(x, torch.cat([x, x]), 3, False, [1], "sum"), "pac_weight_grad: grad must have input's"),
        (lambda: ops.pac_grads(x, x, w, False, False, [1], "sum"), "pac_grads: .* the channels of pac's output"),
        (lambda: ops.pac_grads(x[:, :1], x, w[:1, :7], False, False, [1], "sum"), "pac_grads: weight must have input's"),
        (lambda: ops.pac_weight_grad(x[:, :7], x, 3, False, [1, 2], "concat"), "pac_weight_grad: .* the channels of pac's output"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()


def test_not_a_convolution_per_rate():
    """The arithmetic of one convolution: the products' work does not grow with the rates."""

    def flops(rates):
        x, weight = torch.randn(1, 64, 33, 33), torch.randn(64, 64, 3, 3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            segops.pyramid_atrous_conv2d(x, weight, rates=rates)
        shapes = [event.input_shapes for event in profile.events() if event.name == "aten::_convolution"]
        return sum(2 * math.prod(image) * filters[0] for image, filters, *_ in shapes)  # by filters of one pixel

    assert flops((1, 3, 5)) == flops((1, 3, 5, 7, 9)) == 2 * 64 * 64 * 9 * 33 * 33


def test_the_product_that_cuda_calls():
    """By its name and the order of its arguments: no test without a GPU runs it."""
    wanted = "aten::mm.dtype_out(Tensor self, Tensor mat2, ScalarType out_dtype, *, Tensor(a!) out) -> Tensor(a!)"
    assert str(torch.ops.aten.mm.dtype_out._schema) == wanted


def test_rates_far_beyond_the_map():
    case = Case((1, 40, 5, 6), 24, rates=(1, 2, 1000, 2**40))
    x, weight, bias = (t.detach() for t in case.tensors())
    near = reference.pyramid_atrous_conv2d(x, weight, bias, (1, 2, 50, 60), "sum")
    torch.testing.assert_close(case.op(x, weight, bias), near, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, live", [((4, 9), (3, 3)), ((4, 2), (3, 1)), ((1, 1), (1, 1)), ((3, 4), (1, 3))])
def test_taps_outside_the_map_are_skipped(target, size, live):
    """Whatever their weights are."""
    x, weight = torch.randn(1, 40, *size).to(target[0]), torch.randn(24, 40, 3, 3).to(target[0])

    def run():
        return op.pac(x, weight, None, (3, 6), "sum", backend=target[1])

    expected = run()
    alive = torch.zeros(3, 3, dtype=torch.bool)
    alive[tuple(slice(1 - side // 2, 2 + side // 2) for side in live)] = True
    weight[:, :, ~alive] = torch.nan
    assert torch.equal(run(), expected)
    weight[:, :, alive] = torch.nan
    assert run().isnan().all()


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


@fast_targets
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


@needs_much_gpu_memory
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
