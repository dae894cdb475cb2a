"""Upsampling with argmax: its mathematics against PyTorch's, on every implementation; then what every op owes its users."""

import pytest
import torch
import torch.nn.functional as F

import segops

from ..compile_triton import variants
from ..contract import Contract, Export, Use, ops_of
from ..layouts import spread
from ..targets import DTYPES, INTERPRETED, REFERENCE, TARGETS, interpreted, matrix, runs

# (N, C, h, w) -> (H, W), each for what it makes the kernels do. The first ones are the interpreter's.
CASES = [
    ((2, 5, 6, 7), (40, 43)),  # factors that are no integers, images one after the other, tails of vectors
    ((2, 7, 8, 9), (8, 9)),  # no resizing: the best of each position is the result
    ((3, 2, 1, 5), (1, 33)),  # one row, which lies between itself and itself
    ((1, 6, 1, 1), (9, 70)),  # one position: its cell is the whole map, and wider than a vector
    ((2, 3, 4, 9), (31, 5)),  # cells in which no pixel lies, along one axis
    ((1, 4, 20, 30), (7, 11)),  # and along both
    ((1, 1, 3, 3), (8, 8)),  # nothing to compare with
    ((1, 21, 9, 12), (65, 96)),  # classes that fill no vector
    ((1, 40, 3, 70), (6, 140)),  # several vectors of classes, and of a row of logits
    ((2, 3, 2, 5), (27, 16)),  # cells of more rows than a CUDA thread owns
    ((1, 5, 8, 3), (25, 4)),  # and of as few as make it own four
    ((2, 5, 6, 7), (1, 1)),  # one pixel
    ((1, 1003, 2, 3), (5, 7)),  # more classes than a byte or a block numbers
]


def matters(implementation, dtype, case, channels_last, smooth):
    """What other dtypes than float32 differ in is how logits are read. The interpreter takes seconds."""
    if dtype != torch.float32:
        return runs(implementation, dtype) and implementation != INTERPRETED and case in CASES[:2] and not smooth
    return implementation != INTERPRETED or (case in CASES[:4] and smooth == channels_last)


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


@pytest.mark.parametrize(
    "implementation, dtype, case, channels_last, smooth",
    matrix([*TARGETS, REFERENCE], DTYPES, CASES, [False, True], [False, True], when=matters),
    indirect=["implementation"],
)
def test_largest_class(implementation, dtype, case, channels_last, smooth):
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


def test_one_int_is_both_sides(implementation):
    logits = draw((1, 3, 4, 5), device=implementation[0])
    assert torch.equal(segops.upsample_argmax(logits, 12), segops.upsample_argmax(logits, (12, 12)))


def test_logits_far_apart(target):
    """Beyond 8192 elements from first to last, gaps included, the emulated CUDA kernels number them with 64 bits."""
    for shape, size in CASES[:5]:
        logits = draw(shape, device=target[0])
        logits[:, 0, 0, 0] = torch.inf
        expected = segops.upsample_argmax(logits, size)
        for dim in (1, 3):
            assert torch.equal(segops.upsample_argmax(spread(logits, 1 << 13, dim), size), expected)


def test_weights_are_exact_halfway(target):
    """Ties in the middle between two positions, though the factor is no power of two, are the lowest class."""
    logits = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]], device=target[0])
    expected = torch.tensor([0, 0, 1, 0, 0, 1], device=target[0])  # at -1/6, 1/2, 7/6, 11/6, 5/2 and 19/6
    columns, rows = logits[None, :, None, :].expand(1, 2, 3, 4), logits[None, :, :, None].expand(1, 2, 4, 3)
    assert torch.equal(segops.upsample_argmax(columns, (3, 6)), expected.expand(1, 3, 6))
    assert torch.equal(segops.upsample_argmax(rows, (6, 3)), expected[:, None].expand(1, 6, 3))


@interpreted
def test_triton_compiles_nothing_for_a_size(monkeypatch):
    """Of images, logits, classes or results; and positions of 64 bits find the same."""
    from segops.ops.argmax import triton_kernels

    seen = variants(triton_kernels, monkeypatch)
    sizes = ((2, 5, 3, 4), (7, 9)), ((1, 16, 2, 3), (16, 5)), ((1, 2, 3, 2), (4, 16))
    with segops.backend("triton"):
        results = [segops.upsample_argmax(draw(shape), size) for shape, size in sizes]
        assert sorted(name for name, *_ in seen) == ["_best", "_upsample"]
        monkeypatch.setattr("segops.ops.common.triton_launch.SMALL", 1)
        for result, (shape, size) in zip(results, sizes, strict=True):
            assert torch.equal(segops.upsample_argmax(draw(shape), size), result)


def test_no_gradient(implementation):
    logits = draw((2, 3, 4, 5), device=implementation[0]).requires_grad_()
    assert not segops.upsample_argmax(logits, (8, 9)).requires_grad


# The contract.


def draw_with_image(sizes, dtype, device):
    """Logits and an image; where random logits have one largest class, and by far."""
    shape, size = sizes
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)
    return [logits.to(device, dtype), torch.zeros(shape[0], 1, *size, device=device)]


class Predict(torch.nn.Module):
    def forward(self, logits, image):
        return segops.upsample_argmax(logits * 2, image.shape[2:])


def opcheck(device, backend):
    logits, _ = draw_with_image(((2, 3, 4, 5), (8, 11)), torch.float32, device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        yield ops_of(backend).upsample_argmax, (logits.contiguous(memory_format=memory_format), [8, 11])


def export():
    auto = torch.export.Dim.AUTO
    return Export(
        module=Predict,
        draw=lambda *arguments: tuple(draw_with_image(*arguments)),
        sizes=(((2, 3, 4, 5), (16, 20)), ((1, 3, 7, 6), (21, 31)), ((3, 3, 5, 4), (5, 4))),
        dynamic_shapes=lambda: ({0: auto, 2: auto, 3: auto},) * 2,
    )


POINTERS = {"best": "*i32", "out": "*i64"}


def compilations():
    """(kernel, capability, types, constants) for `tests.compile_triton.compile_for`."""
    import triton.language as tl

    from segops.ops.argmax import triton_kernels

    for capability, logit in ((80, "fp32"), (90, "fp32"), (90, "bf16"), (90, "fp16")):
        types = POINTERS | {"logits": f"*{logit}"}
        for index in (tl.int32, tl.int64):
            constants = {"PIXELS": 256, "INDEX": index}
            yield triton_kernels._best, capability, types, constants
            for resized in (True, False):
                yield triton_kernels._upsample, capability, types, constants | {"RESIZED": resized}


USE = Use(
    function="upsample_argmax",
    call=Predict(),
    draw=draw_with_image,
    sizes=(((2, 3, 4, 5), (9, 13)), ((3, 3, 5, 4), (16, 11)), ((1, 3, 4, 6), (4, 6))),
    tails=(((1, 5, 3, 17), (5, 33)), ((2, 33, 2, 3), (1, 130)), ((1, 2, 9, 9), (65, 7))),
    large=(((2, 9, 33, 34), (200, 210)), ((2, 9, 80, 90), (80, 90))),
    empty=(((0, 3, 4, 5), (9, 13)), ((0, 3, 4, 5), (4, 5))),
    forward=("segops::upsample_argmax",),
    autocast=((torch.bfloat16, torch.float32), (torch.float32,)),
)
L = torch.zeros(1, 2, 3, 4)


class TestUpsampleArgmax(Contract):
    USES = {"argmax": USE}
    EXPORTS = {"argmax": export()}
    OPCHECKS = {"argmax": opcheck}
    COMPILATIONS = compilations
    ERRORS = [
        (lambda: segops.upsample_argmax([1.0], 3), TypeError, "logits must be a torch.Tensor; got list"),
        (lambda: segops.upsample_argmax(L.long(), 3), TypeError, "logits must be float32, .*; got torch.int64"),
        (lambda: segops.upsample_argmax(L[0], 3), ValueError, r"logits must have shape \(N, C, h, w\); got \(2, 3, 4\)"),
        (lambda: segops.upsample_argmax(L[:, :0], 3), ValueError, r"logits must have classes, .*; got shape \(1, 0, 3, 4\)"),
        (lambda: segops.upsample_argmax(L[..., :0], 3), ValueError, r"logits must have .*; got shape \(1, 2, 3, 0\)"),
        (lambda: segops.upsample_argmax(L, 2.5), TypeError, r"size must be an int or a pair of ints; got 2.5"),
        (lambda: segops.upsample_argmax(L, (2, 3, 4)), TypeError, r"size must be .*; got \(2, 3, 4\)"),
        (lambda: segops.upsample_argmax(L, (0, 3)), ValueError, r"size must be positive; got \(0, 3\)"),
    ]
    COMPILED_ERRORS = (
        (L,),
        [
            (lambda logits: segops.upsample_argmax(logits[0], 3), ValueError, r"logits must have shape \(N, C, h, w\)"),
            (lambda logits: segops.upsample_argmax(logits, 2.5), TypeError, "size must be an int or a pair of ints; got 2.5"),
        ],
    )
