"""Upsampling with argmax against PyTorch's, on every implementation."""

import pytest
import torch
import torch.nn.functional as F

import segops

from ..targets import on_a_gpu, runs

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
# (N, C, h, w) -> (H, W): up by whole and broken factors, one axis down, both down, a single logit, one row, unchanged
CASES = [
    ((2, 5, 6, 7), (40, 43)),
    ((1, 21, 9, 12), (65, 96)),
    ((2, 3, 4, 9), (31, 5)),
    ((1, 4, 20, 30), (7, 11)),
    ((1, 6, 1, 1), (9, 70)),
    ((3, 2, 1, 5), (1, 33)),
    ((1, 1, 3, 3), (8, 8)),
    ((2, 7, 8, 9), (8, 9)),
    ((1, 40, 3, 70), (6, 140)),
]


def draw(shape, smooth=False, dtype=torch.float32, device="cpu"):
    """Random logits; smooth ones have regions of a class, as a network's have."""
    generator = torch.Generator().manual_seed(sum(shape))
    if smooth:
        return F.interpolate(torch.randn(*shape[:2], 2, 3, generator=generator), shape[2:], mode="bilinear").to(device, dtype)
    return torch.randn(shape, generator=generator).to(device, dtype)


def resized(logits, size):
    """In float64."""
    logits = logits.double()
    return logits if tuple(logits.shape[2:]) == tuple(size) else F.interpolate(logits, size, mode="bilinear")


def assert_largest(classes, logits, size, rounding=1e-5):
    """Every pixel has the class of the largest resized logit, or of one that float32 cannot tell from it."""
    truth = resized(logits, size)
    assert classes.shape == (logits.shape[0], *size) and classes.dtype == torch.int64
    assert (truth.amax(1) - truth.gather(1, classes[:, None])[:, 0]).max() <= rounding * truth.abs().max()


@pytest.mark.parametrize("smooth", [False, True], ids=["random", "smooth"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_largest_class(implementation, dtype, case, channels_last, smooth):
    if not runs(implementation, dtype):
        pytest.skip("float64 is for the CPU kernels and the reference")
    shape, size = case
    logits = draw(shape, smooth, dtype, implementation[0])
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    assert_largest(segops.upsample_argmax(logits, size), logits, size)


def test_equals_pytorch_where_arithmetic_is_exact(implementation):
    """Integers and a factor of two: every mean is exact, ties are many, and the lowest class takes them."""
    logits = torch.randint(-2, 3, (2, 6, 7, 9), generator=torch.Generator().manual_seed(0)).float().to(implementation[0])
    expected = F.interpolate(logits, (14, 18), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(segops.upsample_argmax(logits, (14, 18)), expected)
    assert torch.equal(segops.upsample_argmax(logits, (7, 9)), logits.argmax(1))


def test_ties_are_the_lowest_class(implementation):
    assert not segops.upsample_argmax(torch.full((1, 5, 4, 4), -3.0, device=implementation[0]), (11, 9)).any()


def test_one_class_inside_another(implementation):
    """Four corners of class 0, and one lone logit of class 1 between four others: only its own cells change."""
    logits = torch.zeros(1, 2, 5, 5, device=implementation[0])
    logits[0, 0] = 1
    logits[0, 1, 2, 2] = 3
    classes = segops.upsample_argmax(logits, (40, 40))
    assert torch.equal(classes, F.interpolate(logits, (40, 40), mode="bilinear").argmax(1))
    assert 0 < classes.sum() < 16 * 16


def test_strided_logits(implementation):
    logits = draw((2, 10, 6, 14), device=implementation[0])[:, ::2, :, ::2]
    assert torch.equal(segops.upsample_argmax(logits, (40, 43)), segops.upsample_argmax(logits.contiguous(), (40, 43)))
    part = draw((2, 5, 6, 9), device=implementation[0])[..., :7]
    assert torch.equal(segops.upsample_argmax(part, (40, 43)), segops.upsample_argmax(part.contiguous(), (40, 43)))
    expanded = draw((1, 5, 6, 7), device=implementation[0]).expand(3, -1, -1, -1)
    assert segops.upsample_argmax(expanded, 20).eq(segops.upsample_argmax(expanded[:1], 20)).all()


def test_a_class_masked_by_minus_infinity_never_wins(implementation):
    logits = draw((1, 4, 5, 6), device=implementation[0])
    logits[:, 1] = -torch.inf
    logits[:, 3, 2:4] = -torch.inf
    classes = segops.upsample_argmax(logits, (33, 40))
    assert not (classes == 1).any()
    expected = segops.upsample_argmax(logits.nan_to_num(neginf=-1e30), (33, 40))
    assert torch.equal(classes, expected)


def test_nan_is_larger_than_any_number(implementation):
    logits = draw((1, 4, 5, 6), device=implementation[0])
    logits[0, 2, 1:4, 2:5] = torch.nan
    logits[0, 1, 2, 3] = torch.inf
    classes = segops.upsample_argmax(logits, (40, 48))
    assert (classes[0, 12:28, 20:36] == 2).all()


def test_a_class_infinite_with_both_signs_is_nan_in_between(implementation):
    """Also where the four corners share their largest class: class 0 the first that is infinite, class 3 NaN. Rows and columns
    inside, where no weight is zero."""
    logits = draw((1, 4, 6, 7), device=implementation[0])
    logits[:, 0] += 20
    logits[:, 0, 2, 3] = logits[:, 2, 2, 3] = torch.inf
    logits[:, 2, 3, 4] = -torch.inf
    logits[:, 3, 3:6, :3] = torch.nan
    logits[:, 1, 4, 1], logits[:, 1, 4, 2] = torch.inf, -torch.inf
    expected = F.interpolate(logits, (12, 14), mode="bilinear").argmax(1)[:, 1:-1, 1:-1]
    assert set(expected.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(segops.upsample_argmax(logits, (12, 14))[:, 1:-1, 1:-1], expected)
    assert torch.equal(segops.upsample_argmax(logits, (6, 7)), logits.argmax(1))


@pytest.mark.parametrize("size", [(5, 7), (9, 11)])
def test_no_images(implementation, size):
    assert segops.upsample_argmax(torch.empty(0, 3, 5, 7, device=implementation[0]), size).shape == (0, *size)


def test_no_gradient_and_the_same_on_every_run(implementation):
    logits = draw((2, 9, 12, 13), device=implementation[0]).requires_grad_()
    classes = segops.upsample_argmax(logits, (50, 60))
    assert not classes.requires_grad
    assert torch.equal(classes, segops.upsample_argmax(logits, (50, 60)))


def test_threads_make_no_difference():
    logits, threads = draw((2, 9, 33, 34)), torch.get_num_threads()
    expected = segops.upsample_argmax(logits, (200, 210))
    try:
        torch.set_num_threads(1)
        assert torch.equal(segops.upsample_argmax(logits, (200, 210)), expected)
    finally:
        torch.set_num_threads(threads)


def test_one_int_is_both_sides(implementation):
    logits = draw((1, 3, 4, 5), device=implementation[0])
    assert torch.equal(segops.upsample_argmax(logits, 12), segops.upsample_argmax(logits, (12, 12)))


# --- citizenship ---------------------------------------------------------------------------------------------------------


def test_opcheck(implementation):
    if implementation[1] == "reference":
        pytest.skip("the reference is no op of its own")
    torch.library.opcheck(
        torch.ops.segops.upsample_argmax, (draw((2, 3, 4, 5), device=implementation[0]), [8, 11], implementation[1])
    )


class Predict(torch.nn.Module):
    def forward(self, logits, image):
        return segops.upsample_argmax(logits * 2, image.shape[2:])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(implementation, dynamic):
    compiled = torch.compile(Predict(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((9, 13), (16, 11)):
        logits, image = draw((2, 3, 4, 5), device=implementation[0]), torch.empty(2, 3, *size, device=implementation[0])
        assert torch.equal(compiled(logits, image), Predict()(logits, image))


def test_export_with_dynamic_sizes(implementation):
    auto = torch.export.Dim.AUTO
    example = draw((2, 3, 4, 5), device=implementation[0]), torch.empty(2, 3, 16, 20, device=implementation[0])
    program = torch.export.export(Predict(), example, dynamic_shapes=({0: auto, 2: auto, 3: auto},) * 2)
    logits, image = draw((1, 3, 7, 6), device=implementation[0]), torch.empty(1, 3, 21, 31, device=implementation[0])
    assert torch.equal(program.module()(logits, image), Predict()(logits, image))


def test_autocast_and_inference_mode(implementation):
    logits = draw((1, 3, 4, 5), device=implementation[0])
    with torch.autocast(implementation[0], dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(segops.upsample_argmax(logits, 9), segops.upsample_argmax(logits, 9))
        half = logits.bfloat16()
        assert_largest(segops.upsample_argmax(half, (9, 9)), half, (9, 9))


def test_vmap(implementation):
    logits = draw((3, 2, 4, 5, 6), device=implementation[0])
    mapped = torch.func.vmap(lambda each: segops.upsample_argmax(each, (9, 10)))(logits)
    with segops.backend("reference"):
        assert torch.equal(mapped, torch.stack([segops.upsample_argmax(each, (9, 10)) for each in logits]))


@on_a_gpu
def test_cuda_graph(target):
    logits = draw((2, 21, 33, 33), device="cuda")
    if target[1] == "triton":
        segops.upsample_argmax(logits, (129, 129))  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        classes = segops.upsample_argmax(logits, (129, 129))
    logits.copy_(logits.flip(1))
    graph.replay()
    assert torch.equal(classes, segops.upsample_argmax(logits, (129, 129)))


@pytest.mark.parametrize(
    "logits, size, error, message",
    [
        ([1.0], 3, TypeError, "logits must be a torch.Tensor; got list"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int64), 3, TypeError, "logits must be float32, .*; got torch.int64"),
        (torch.zeros(2, 3, 4), 3, ValueError, r"logits must have shape \(N, C, h, w\); got \(2, 3, 4\)"),
        (torch.zeros(1, 0, 3, 4), 3, ValueError, r"logits must have classes, .*; got shape \(1, 0, 3, 4\)"),
        (torch.zeros(1, 2, 3, 0), 3, ValueError, r"logits must have .*; got shape \(1, 2, 3, 0\)"),
        (torch.zeros(1, 2, 3, 4), 2.5, TypeError, r"size must be an int or a pair of ints; got 2.5"),
        (torch.zeros(1, 2, 3, 4), (2, 3, 4), TypeError, r"size must be .*; got \(2, 3, 4\)"),
        (torch.zeros(1, 2, 3, 4), (0, 3), ValueError, r"size must be positive; got \(0, 3\)"),
    ],
)
def test_errors(logits, size, error, message):
    with pytest.raises(error, match=message):
        segops.upsample_argmax(logits, size)
