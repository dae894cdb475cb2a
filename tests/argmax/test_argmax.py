"""Upsampling with argmax against PyTorch's, on every implementation."""

import pytest
import torch
import torch.nn.functional as F

import segops

from ..targets import DTYPES, INTERPRETED, REFERENCE, TARGETS, matrix, runs

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


def test_no_gradient(implementation):
    logits = draw((2, 3, 4, 5), device=implementation[0]).requires_grad_()
    assert not segops.upsample_argmax(logits, (8, 9)).requires_grad
