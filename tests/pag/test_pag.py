"""The partial-attention gate, and pooling with offsets: values, gradients and layouts, on every backend that runs here."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import segops
from segops.ops.pag import op, reference
from segops.ops.pag.windows import longest_window, offset_layout

from ..accuracy import assert_close
from ..compile_triton import variants
from ..contract import names_of
from ..layouts import fresh_strides, shifted, spread, views
from ..targets import (
    DTYPES,
    INTERPRETED,
    REFERENCE,
    TARGETS,
    compiled_targets,
    fast_implementations,
    fast_targets,
    interpreted,
    matrix,
    native_and_reference,
    needs_much_gpu_memory,
    on_a_gpu,
    runs,
)
from .conftest import (
    Case,
    Pooling,
    draw,
    draw_integers,
    gradients,
    output_and_gradients,
    pairs,
    same_bits,
    same_values,
)
from .test_contract import D, E

# The oracle itself, one element at a time, and what the ops compute before any kernel runs.


def literal_window(j, size, out):
    return range(math.floor(j * size / out), math.ceil((j + 1) * size / out))


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_reference_is_the_paper(merge):
    case = Case((2, 2, 4, 5), ((2, 8, 10), (2, 9, 7), (2, 4, 5), (2, 3, 20), (2, 12, 5)), merge)
    decoder, *encoders = maps = [each.detach() for each in case.maps()]
    parts = [decoder]
    for encoder in encoders:
        height, width = encoder.shape[2:]
        if height < 4 or width < 5:
            continue
        parts.append(torch.zeros(2, 2, 4, 5, dtype=torch.float64))
        for n, c, y, x in itertools.product(*map(range, parts[-1].shape)):
            rows, columns = literal_window(y, height, 4), literal_window(x, width, 5)
            parts[-1][n, c, y, x] = max(encoder[n, c, i, j].item() for i in rows for j in columns)
    expected = torch.cat(parts, 1) if merge == "concat" else torch.stack(parts).sum(0)
    assert len(parts) == 5
    with segops.backend("reference"):
        torch.testing.assert_close(case.op(*maps), expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(case.plain(*maps), expected, rtol=1e-15, atol=1e-15)


def test_reference_offsets_are_positions_in_windows():
    """Of the first maximum, where windows are clipped too."""
    map = draw_integers((2, 3, 7, 8))
    for kernel_h, kernel_w in ((2, 2), (3, 2), (2, 5), (1, 3), (9, 9)):
        pooled, offsets = reference.max_pool2d_with_offsets(map, (kernel_h, kernel_w))
        assert pooled.shape == offsets.shape == (2, 3, math.ceil(7 / kernel_h), math.ceil(8 / kernel_w))
        for n, c, y, x in itertools.product(*(range(size) for size in pooled.shape)):
            inside = {
                dy * kernel_w + dx: map[n, c, y * kernel_h + dy, x * kernel_w + dx].item()
                for dy in range(min(kernel_h, 7 - y * kernel_h))
                for dx in range(min(kernel_w, 8 - x * kernel_w))
            }
            assert pooled[n, c, y, x] == max(inside.values()) == inside[offsets[n, c, y, x].item()]
            assert offsets[n, c, y, x] == min(at for at, value in inside.items() if value == pooled[n, c, y, x])


def test_longest_window():
    for out in range(1, 25):
        for size in range(out, 90):
            lengths = [len(literal_window(j, size, out)) for j in range(out)]
            assert longest_window(size, out) == max(lengths), (size, out)


# The gate.

# Exact windows; windows that differ by axis; adaptive ones, which overlap; 256 elements, and more, where an offset takes two bytes.
CASES = [
    Case((2, 5, 4, 6), ((3, 8, 12), (4, 16, 24)), small=True),
    Case((1, 3, 3, 2), ((7, 24, 16),)),
    Case((1, 4, 5, 4), ((2, 15, 12), (3, 5, 4), (1, 15, 4)), small=True),
    Case((2, 3, 8, 5), ((4, 16, 20), (3, 8, 20), (2, 24, 5))),
    Case((2, 3, 4, 5), ((4, 9, 7),), small=True),
    Case((1, 2, 5, 5), ((3, 7, 7), (2, 7, 5), (1, 5, 9)), small=True),
    Case((2, 2, 3, 5), ((2, 6, 7), (3, 10, 15), (1, 20, 13))),
    Case((1, 1, 7, 11), ((2, 29, 50),)),
    Case((2, 2, 2, 2), ((3, 32, 32), (2, 31, 31))),
    Case((1, 2, 2, 2), ((3, 40, 40),), small=True),
    Case((2, 1, 2, 2), ((2, 33, 33), (1, 33, 66), (2, 2, 512), (1, 2, 514))),
    Case((1, 3, 1, 1), ((2, 16, 16), (2, 257, 1), (1, 1, 256), (2, 70, 90))),
    Case((2, 3, 1, 1), ((4, 1, 1), (2, 5, 3))),
    Case((2, 3, 4, 5), ((3, 4, 5),)),
    Case((1, 2, 4, 8), ((2, 9, 16), (3, 8, 17))),
    Case((2, 3, 4, 4), ((2, 8, 8), (5, 4, 4), (1, 16, 16), (4, 4, 4), (3, 12, 9)), small=True),
    Case((2, 3, 4, 6), ((2, 3, 12), (3, 8, 12), (4, 8, 5), (1, 3, 5), (2, 4, 6))),
    Case((2, 3, 4, 6), ((2, 3, 12), (4, 8, 5)), small=True),
    Case((1, 3, 5, 7)),
]
CASES += [Case((2, c, 3, 5), ((c + 1, 6, 10), (c, 3, 5), (c, 7, 9))) for c in (1, 3, 5, 17, 33, 64)]
SOME = [each for each in CASES if each.small]


@pytest.mark.parametrize("target, case, dtype", pairs(CASES), indirect=["target"])
def test_gate_is_pytorchs(target, case, dtype):
    """Values of concat to the bit, and gradients where no two windows meet; the rest within the bounds of the contract."""
    device, _ = target
    for name, variant in case.variants(target):
        maps = variant.maps(dtype, device)
        out, plain = variant.op(*maps), variant.plain(*maps)
        assert out.dtype == dtype, name
        on = [i for i, each in enumerate(maps) if each.shape[2] >= out.shape[2] and each.shape[3] >= out.shape[3]]
        got = gradients(out, maps, allow_unused=True)
        assert [i for i, each in enumerate(got) if each is not None] == on, name
        got, wanted = [got[i] for i in on], gradients(plain, [maps[i] for i in on])
        if variant.merge == "concat":
            assert same_bits(out.detach(), plain.detach()), name
        if not variant.overlaps:
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name
        if variant.merge == "sum" or variant.overlaps:
            exact = variant.maps()
            truth = variant.plain(*exact)
            assert_close(f"{name}: output", out.detach(), plain.detach(), truth.detach())
            for i, *each in zip(on, got, wanted, gradients(truth, [exact[i] for i in on]), strict=True):
                assert_close(f"{name}: map {i}", *each)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=lambda d: str(d)[6:])
def test_halves_are_copied(target, dtype):
    """Also by Triton's interpreter, which rounds bfloat16 as no GPU does and is asked for nothing else in it."""
    case = SOME[0]
    maps = case.maps(dtype, target[0])
    for value, plain in zip(*(output_and_gradients(f, maps) for f in (case.op, case.plain)), strict=True):
        assert torch.equal(value, plain)


def assert_equal(case, dtype, device):
    """Numbers of few bits: exactly what PyTorch has, also where windows overlap."""
    maps = case.maps(dtype, device, draw_integers)
    for i, pair in enumerate(zip(*(output_and_gradients(f, maps, draw_integers) for f in (case.op, case.plain)), strict=True)):
        assert torch.equal(*pair), f"{case}, {case.merge}, channels_last={case.channels_last}, number {i}"


@fast_targets
@pytest.mark.parametrize("channels_last", [False, True])
def test_tails_of_vectors(target, channels_last):
    """Every width, and every number of channels, up to more than a vector holds."""
    for size, dtype in itertools.product(range(1, 41), (torch.float32, torch.bfloat16)):
        wide = ((1, 4, 2 * size), (2, 2, 3 * size), (1, 2, size), (1, 3, size + 1))
        assert_equal(Case((1, 2, 2, size), wide, "concat", (channels_last,)), dtype, target[0])
        deep = ((size, 4, 6), (size, 2, 3), (41 - size, 3, 4))
        assert_equal(Case((1, size, 2, 3), deep, "concat", (channels_last,)), dtype, target[0])
        assert_equal(
            Case((1, size, 2, size), ((size, 2, 2 * size), (size, 4, size)), "sum", (channels_last,)), dtype, target[0]
        )


@fast_targets
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_gate_at_the_size_of_training(target, merge):
    """Many rows and planes, cut into blocks and among threads."""
    for dtype, channels_last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        assert_equal(
            Case((2, 16, 32, 40), ((8, 64, 80), (8, 128, 160), (16, 32, 40)), merge, (channels_last,)), dtype, target[0]
        )
        assert_equal(Case((3, 8, 33, 45), ((8, 65, 90), (8, 129, 180)), merge, (channels_last,)), dtype, target[0])


@pytest.mark.parametrize("dtype, large", [(torch.bfloat16, 256.0), (torch.float16, 2048.0)], ids=str)
def test_sums_are_rounded_once(implementation, dtype, large):
    """A one is lost next to the large number, two of them are not: of maps, and of gradients where four windows meet."""
    device, backend = implementation
    decoder, ones = (torch.full((1, 2, 2, 2), value, dtype=dtype, device=device) for value in (large, 1.0))
    assert decoder[0, 0, 0, 0] + 1 == large
    out = segops.partial_attention_gate(decoder, [ones, torch.ones(1, 2, 4, 6, dtype=dtype, device=device)], merge="sum")
    assert out.eq(large + 2).all()
    if backend != "reference":  # whose gradients are PyTorch's
        encoder = torch.zeros(1, 2, 3, 3, dtype=dtype, device=device)
        encoder[:, :, 1, 1] = 1
        grad = torch.tensor([[large, 1.0], [1.0, 0.0]], dtype=dtype, device=device).expand(1, 2, 2, 2)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            maps = decoder.contiguous(memory_format=memory_format), encoder.requires_grad_()
            out = segops.partial_attention_gate(maps[0], maps[1:], merge="sum")
            assert torch.equal(gradients(out, encoder, grad)[0], encoder * (large + 2))


@fast_implementations
@pytest.mark.parametrize("size", [(256, 256), (1, 65537), (300, 301)], ids=str)
def test_windows_of_more_elements_than_two_bytes_number(implementation, size):
    """The gradient arrives at the maximum, wherever it is."""
    device, _ = implementation
    for channels_last in (False, True):
        case = Case((1, 2, 1, 1), ((2, *size),), channels_last=(channels_last,))
        decoder, encoder = case.maps(torch.float32, device)
        there = torch.zeros_like(encoder)
        there[:, 0, -1, -1] = there[:, 1, 0, 0] = 1
        encoder = (encoder + 100 * there).detach().requires_grad_()
        out = case.op(decoder, encoder)
        assert torch.equal(out[:, 2:, 0, 0], encoder.amax((2, 3)))
        assert torch.equal(gradients(out, encoder, torch.ones_like(out))[0], there)


def test_all_switches_off_is_a_copy(implementation):
    device, _ = implementation
    decoder, smaller = draw((2, 3, 4, 5), torch.float32, device), draw((2, 3, 3, 9), torch.float32, device)
    for encoders, merge in itertools.product(([], [smaller], (smaller, smaller)), ("concat", "sum")):
        out = segops.partial_attention_gate(decoder, encoders, merge=merge)
        assert torch.equal(out, decoder)
        out.zero_()
        assert decoder.any()


def test_outputs_alias_no_input(implementation):
    """Neither a map that needs no pooling."""
    device, _ = implementation
    decoder, encoder = (draw((2, 3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    for merge in ("concat", "sum"):
        segops.partial_attention_gate(decoder, [encoder], merge=merge).zero_()
    pooled, offsets = segops.max_pool2d_with_offsets(encoder, 1)
    segops.max_unpool2d_with_offsets(pooled, offsets, 1, (4, 5)).zero_()
    assert torch.equal(pooled, encoder)
    pooled.zero_()
    assert torch.equal(decoder, draw((2, 3, 4, 5), torch.float32, device))
    assert torch.equal(encoder, draw((2, 3, 4, 5), torch.float32, device, 1))


@fast_implementations
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_maps_that_are_off_need_no_fitting_channels(implementation, merge):
    decoder, off, on = (draw(shape, torch.float32, implementation[0]) for shape in ((2, 3, 4, 5), (2, 7, 8, 4), (2, 3, 8, 10)))
    out = segops.partial_attention_gate(decoder, [off, on], merge=merge)
    assert torch.equal(out, segops.partial_attention_gate(decoder, (on,), merge=merge))


@fast_implementations
def test_as_many_maps_as_there_are(implementation):
    """More than a kernel takes are left to PyTorch; the answer is the same on both sides of that."""
    device, backend = implementation
    for count in (1, 30, 31, 32, 40):
        for merge in ("concat", "sum"):
            case = Case((2, 2, 2, 3), ((2, 4, 6),) * count, merge)
            assert_equal(case, torch.float32, device)
    for count in (31, 32):
        maps = Case((2, 2, 2, 3), ((2, 4, 6),) * count).maps(torch.float32, device)
        names = names_of(lambda: segops.partial_attention_gate(maps[0], maps[1:]))  # noqa: B023
        assert any(name.endswith("::pag") for name in names) == (backend != "reference" and count == 31)


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_only_the_gradients_that_are_asked_for(target, merge):
    """Each combination of maps; a kernel runs for each of those that were pooled, and for no other."""
    case = Case((2, 3, 4, 5), ((3, 8, 10), (3, 4, 5), (3, 9, 7)), merge)
    every = output_and_gradients(case.op, case.maps(torch.float32, target[0]))[1:]
    for asked in itertools.product((False, True), repeat=4) if target != INTERPRETED else [(False, True, True, False)]:
        maps = [each.requires_grad_(ask) for each, ask in zip(case.maps(torch.float32, target[0]), asked, strict=True)]
        out = case.op(*maps)
        assert out.requires_grad == any(asked)
        if any(asked):
            grads = iter(())

            def backward(out=out, maps=maps):
                nonlocal grads
                grads = iter(gradients(out, [each for each in maps if each.requires_grad]))

            calls = Counter(name for name in names_of(backward) if name.endswith("::pag_grad"))
            # The emulation's op calls another of the name twice.
            assert min(calls.values(), default=0) == asked[1] + asked[3]
            assert all(torch.equal(next(grads), grad) for grad, ask in zip(every, asked, strict=True) if ask), asked


# Ties, infinities, NaN.


def some(value, often=0.2):
    """A function that puts it into a map here and there, and everywhere in a corner."""

    def fill(map):
        there = torch.rand(map.shape, generator=torch.Generator().manual_seed(7)) < often
        there[..., : map.shape[2] // 2 + 1, : map.shape[3] // 2 + 1] = True
        return map.masked_fill(there.to(map.device), value)

    return fill


def signed_zeros(map):
    return torch.where(map > 0, 0.0, -0.0).to(map)


def numbered(map):
    return torch.arange(map.numel(), device=map.device).view(map.shape)


FILLS = {
    "zeros and ones": lambda map: (map > 0).to(map),  # ties: the first
    "the least": lambda map: torch.full_like(map, torch.finfo(map.dtype).min),  # next to what a search begins with
    "signed zeros": signed_zeros,  # are equal, and keep their signs
    "signed zeros above others": lambda map: torch.where(map < 0, map, signed_zeros(map + (numbered(map) % 3 - 4))),
    "NaN": some(torch.nan),  # several in a window, and nothing else in those of a corner: the last
    "NaN here and there": lambda map: map.masked_fill(numbered(map) % 23 == 11, torch.nan),  # with larger numbers behind it
    "-inf": some(-torch.inf),  # what a search begins with, and nothing else in a corner
    "inf": some(torch.inf, 0.05),  # what NaN is taken for while it is compared
    "all of them": lambda map: some(torch.nan, 0.02)(some(torch.inf, 0.02)(some(-torch.inf)(map))),
}
TIED = [
    # Windows that divide the map, that overlap, of one element, along one axis.
    Case((2, 3, 4, 5), ((3, 8, 10), (3, 9, 7), (3, 4, 5), (3, 4, 15)), small=True),
    # Offsets of two bytes, and of one.
    Case((1, 2, 2, 2), ((2, 40, 40), (2, 33, 35), (2, 16, 2))),
]
# By twos, which are dealt out; by fives, first down the columns; with all 256 offsets, and windows that are clipped.
TIED_POOLINGS = [Pooling((2, 3, 7, 9), 2, small=True), Pooling((1, 2, 11, 20), (3, 5)), Pooling((1, 5, 18, 20), 16)]


def tied(cases):
    """(implementation, case, dtype, fill): every fill in float32; what other dtypes differ in, one of everything shows."""
    return matrix(
        [*TARGETS, REFERENCE], cases, DTYPES, FILLS,
        when=lambda target, case, dtype, fill: runs(target, dtype)
        and (dtype == torch.float32 or fill in ("signed zeros above others", "all of them"))
        and (target != INTERPRETED or (dtype == torch.float32 and case.small)),
    )  # fmt: skip


@pytest.mark.parametrize("target, case, dtype, fill", tied(TIED), indirect=["target"])
def test_gate_of_ties_and_nan(target, case, dtype, fill):
    """The first of equals, the NaN that PyTorch takes: gradients arrive where PyTorch's do. Sums of few bits are exact."""
    for name, variant in case.variants(target):
        decoder, *encoders = variant.maps(dtype, target[0], draw_integers)
        maps = [decoder, *(FILLS[fill](each.detach()).requires_grad_() for each in encoders)]
        got, wanted = (output_and_gradients(f, maps, draw_integers) for f in (variant.op, variant.plain))
        assert same_bits(got[0], wanted[0]), name
        for i, pair in enumerate(zip(got[1:], wanted[1:], strict=True)):
            assert torch.equal(*pair), f"{name}: map {i}"


@pytest.mark.parametrize("target, case, dtype, fill", tied(TIED_POOLINGS), indirect=["target"])
def test_pooling_of_ties_and_nan(target, case, dtype, fill):
    for name, variant in case.variants():
        map = FILLS[fill](variant.map(dtype, target[0], draw_integers).detach()).requires_grad_()
        (pooled, offsets), (plain, index) = variant.pool(map), variant.plain_pool(map)
        assert same_bits(pooled.detach(), plain.detach()) and torch.equal(variant.index(offsets), index), name
        assert torch.equal(*(gradients(each, map)[0] for each in (pooled, plain))), name
        # What is put down is added to a zero, which takes the sign from another.
        assert same_values(variant.unpool(pooled, offsets), variant.plain_unpool(plain, index)), name


@interpreted
@pytest.mark.parametrize("channels_last", [(False,), (True,)], ids=["contiguous", "channels_last"])
def test_triton_compiles_nothing_for_an_adaptive_window(channels_last, monkeypatch):
    """Only for exact ones, which are few; and positions of 64 bits find the same."""
    from segops.ops.pag import triton_kernels

    seen = variants(triton_kernels, monkeypatch)
    cases = [
        Case((2, 3, 3, 5), ((5, 7, 9),), channels_last=channels_last),
        Case((2, 3, 3, 5), ((5, 13, 22),), channels_last=channels_last),
    ]
    found = []
    with segops.backend("triton"):
        for case in cases:
            found.append(output_and_gradients(case.op, case.maps(torch.float32)))
        assert sorted(name for name, *_ in seen) == ["_pool", "_pool", "_scatter"]  # the decoder's is a copy
        monkeypatch.setattr("segops.ops.common.triton_launch.SMALL", 1)
        for case, narrow in zip(cases, found, strict=True):
            wide = output_and_gradients(case.op, case.maps(torch.float32))
            assert all(same_bits(*each) for each in zip(wide, narrow, strict=True))


# Pooling with offsets, and unpooling.

POOLINGS = [
    Pooling((2, 3, 7, 8), 1),
    Pooling((2, 5, 7, 9), 2, small=True),
    Pooling((2, 4, 8, 12), 2),
    Pooling((1, 3, 10, 11), 3),
    Pooling((1, 2, 16, 21), 4),
    Pooling((2, 2, 9, 14), 5),
    Pooling((1, 3, 16, 17), 8),
    Pooling((2, 3, 7, 8), (2, 3), small=True),
    Pooling((2, 3, 7, 8), (3, 1)),
    Pooling((2, 3, 5, 8), (1, 4)),
    Pooling((1, 2, 35, 33), (16, 16)),
    Pooling((1, 2, 16, 16), 16),
    Pooling((1, 2, 3, 260), (1, 256)),
    Pooling((1, 2, 257, 3), (256, 1)),
    Pooling((2, 3, 3, 2), 5, small=True),
    Pooling((2, 3, 1, 1), 2),
    Pooling((2, 3, 1, 9), (3, 2)),
    Pooling((2, 1, 6, 50), 2),
    Pooling((1, 2, 16, 32), 8),
    Pooling((1, 2, 9, 28), 8),
    *(Pooling((1, c, 4, 5), 2) for c in (1, 5, 17, 33, 64)),
]


@pytest.mark.parametrize("target, case, dtype", pairs(POOLINGS, [*TARGETS, REFERENCE]), indirect=["target"])
def test_pooling_is_pytorchs(target, case, dtype):
    """Values, positions and gradients, of pooling, of unpooling and of both, to the bit."""
    for name, variant in case.variants():
        map = variant.map(dtype, target[0])
        (pooled, offsets), (plain, index) = variant.pool(map), variant.plain_pool(map)
        assert same_bits(pooled.detach(), plain.detach()) and torch.equal(variant.index(offsets), index), name
        assert offsets.dtype == torch.uint8 and not offsets.requires_grad
        out, plain_out = variant.unpool(pooled, offsets), variant.plain_unpool(plain, index)
        assert same_bits(out.detach(), plain_out.detach()), name
        for each, plain_each in ((pooled, plain), (out, plain_out)):
            got, wanted = (gradients(o, map, retain_graph=True)[0] for o in (each, plain_each))
            assert torch.equal(got, wanted), name
        # Other values at the same places, as a network that works between the two has them.
        values = draw(pooled.shape, dtype, target[0], 3, variant.channels_last).requires_grad_()
        plain_values = values.detach().clone().requires_grad_()
        got = output_and_gradients(lambda v: variant.unpool(v, offsets), [values])  # noqa: B023
        wanted = output_and_gradients(lambda v: variant.plain_unpool(v, index), [plain_values])  # noqa: B023
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True)), name


@fast_targets
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_of_tails_of_vectors(target, channels_last):
    for size, kernel, dtype in itertools.product(range(1, 41), (2, 3), (torch.float32, torch.bfloat16)):
        for shape in ((1, 2, 3, kernel * size - size % kernel), (1, size, 3, 5)):
            case = Pooling(shape, kernel, channels_last)
            map = case.map(dtype, target[0])
            (pooled, offsets), (plain, index) = case.pool(map), case.plain_pool(map)
            assert torch.equal(pooled, plain) and torch.equal(case.index(offsets), index), (case, dtype)
            out, plain_out = case.unpool(pooled, offsets), case.plain_unpool(plain, index)
            assert torch.equal(out, plain_out), (case, dtype)
            assert torch.equal(*(gradients(each, map)[0] for each in (out, plain_out))), (case, dtype)


@fast_targets
def test_pooling_at_the_size_of_training(target):
    for dtype, channels_last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        case = Pooling((2, 32, 129, 161), 2, channels_last)
        map = case.map(dtype, target[0])
        (pooled, offsets), (plain, index) = case.pool(map), case.plain_pool(map)
        assert torch.equal(pooled, plain) and torch.equal(case.index(offsets), index)
        out, plain_out = case.unpool(pooled, offsets), case.plain_unpool(plain, index)
        assert torch.equal(out, plain_out) and torch.equal(*(gradients(each, map)[0] for each in (out, plain_out)))


def test_round_trip(implementation):
    """Pooling finds again what unpooling put down, where it is greater than the zeros around it."""
    for case in (each for each in POOLINGS if each.small or implementation != INTERPRETED):
        for name, variant in case.variants():
            pooled, offsets = variant.pool(variant.map(torch.float32, implementation[0]).abs() + 1)
            for values in (pooled, pooled.flip(3)):
                again = variant.pool(variant.unpool(values, offsets))
                assert torch.equal(again[0], values) and torch.equal(again[1], offsets), (str(variant), name)


def test_output_size(implementation):
    """(H, W), or any shape that ends in them; what ceil mode cuts into as many windows."""
    map = draw((2, 3, 7, 8), torch.float32, implementation[0])
    pooled, offsets = segops.max_pool2d_with_offsets(map, (3, 2))
    outs = [
        segops.max_unpool2d_with_offsets(pooled, offsets, (3, 2), size)
        for size in ((7, 8), [7, 8], map.shape, map.shape[2:], (2, 3, 7, 8))
    ]
    assert all(torch.equal(each, outs[0]) for each in outs) and outs[0].shape == map.shape
    for size in ((7, 7), (8, 8), (9, 7)):
        out = segops.max_unpool2d_with_offsets(pooled, torch.zeros_like(offsets), [3, 2], size)
        assert (
            out.shape == (2, 3, *size)
            and torch.equal(out[..., ::3, ::2], pooled)
            and out.count_nonzero() == pooled.count_nonzero()
        )


def test_offsets_in_another_memory_format(implementation):
    device, _ = implementation
    case = Pooling((2, 3, 7, 9), 2)
    pooled, offsets = case.pool(case.map(torch.float32, device).detach())
    expected = case.unpool(pooled, offsets)
    formats = torch.contiguous_format, torch.channels_last
    for values, where in itertools.product(formats, formats):
        values = pooled.contiguous(memory_format=values).requires_grad_()
        out = case.unpool(values, offsets.contiguous(memory_format=where))
        assert torch.equal(out, expected)
        assert torch.equal(
            gradients(out, values)[0], gradients(case.unpool(q := pooled.clone().requires_grad_(), offsets), q)[0]
        )


def test_offsets_outside_of_windows_place_nothing(implementation):
    """Whether beyond the kernel, or where a clipped window's would be; nor does a gradient come from there."""
    device, _ = implementation
    for size, kernel in (((5, 7), 2), ((5, 7), (3, 2)), ((4, 6), 2), ((3, 2), 5)):
        case = Pooling((1, 2, *size), kernel)
        kernel_h, kernel_w = case.sides
        h, w = -(-size[0] // kernel_h), -(-size[1] // kernel_w)
        for value in {0, 1, kernel_w, kernel_h * kernel_w - 1, kernel_h * kernel_w, 255}:
            inside = torch.zeros(1, 2, h, w, dtype=torch.bool, device=device)
            for y, x in itertools.product(range(h), range(w)):
                y_at, x_at = y * kernel_h + value // kernel_w, x * kernel_w + value % kernel_w
                inside[..., y, x] = value < kernel_h * kernel_w and y_at < size[0] and x_at < size[1]
            pooled = torch.arange(1.0, 2 * h * w + 1, device=device).view(1, 2, h, w).requires_grad_()
            out = case.unpool(pooled, torch.full((1, 2, h, w), value, dtype=torch.uint8, device=device))
            assert torch.equal(out[out != 0].sort().values, pooled[inside].sort().values), (case, value)
            assert torch.equal(gradients(out, pooled, torch.ones_like(out))[0], inside.float()), (case, value)


# Strides.


STRIDED = (2, 3, 4, 5), ((3, 8, 10), (3, 9, 7), (3, 4, 5))


@pytest.mark.parametrize("merge", ["concat", "sum"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_of_a_sum(target, channels_last, merge):
    """One number expanded, all the way to leaves, whose gradients have their strides."""
    case = Case(*STRIDED, merge, (channels_last, not channels_last))
    maps, others = (case.maps(torch.float32, target[0]) for _ in range(2))
    case.op(*maps).sum().backward()
    case.plain(*others).sum().backward()
    for i, (each, plain) in enumerate(zip(maps, others, strict=True)):
        assert torch.equal(each.grad, plain.grad) and each.grad.stride() == each.stride(), i


@fast_targets
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_leaves_do_not_share_gradients(target, merge):
    """Gradients of maps that need no pooling are views: of the output's, not of one another once they are kept."""
    case = Case((1, 3, 4, 5), ((3, 4, 5), (3, 8, 10), (3, 4, 5)), merge)
    maps = case.maps(torch.float32, target[0])
    for _ in range(2):
        case.op(*maps).square().sum().backward()
    kept = [each.grad.clone() for each in maps]
    for i, each in enumerate(maps):
        each.grad.zero_()
        assert all(torch.equal(maps[j].grad, kept[j]) for j in range(i + 1, len(maps))), i


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1), (2, 3, 1, 5), (2, 3, 4, 1), (1, 1, 1, 1)], ids=str)
def test_memory_format_follows_the_first_map(implementation, shape):
    """Whatever its strides and the other maps': a new tensor's, in the format that the first one suggests."""
    device, backend = implementation

    def follows(out, map):
        strides = zip(out.shape, out.stride(), fresh_strides(out.shape, map), strict=True)
        # That of a side of one tells nothing; but kernels' outputs are told beforehand, to the compiler.
        return all(stride == fresh for size, stride, fresh in strides if size > 1 or backend != "reference")

    n, c, h, w = shape
    encoders = [
        draw((n, c, h, w), torch.float32, device),
        draw((n, c, 2 * h, 3 * w), torch.float32, device, channels_last=True),
    ]
    offsets = torch.zeros(shape, dtype=torch.uint8, device=device)
    for name, map in views(draw(shape, torch.float32, device), few=implementation == INTERPRETED):
        for merge, some in itertools.product(("concat", "sum"), (encoders, encoders[::-1], encoders[1:], ())):
            out = segops.partial_attention_gate(map, some, merge=merge)
            assert follows(out, map), (name, merge)
        pooled, where = segops.max_pool2d_with_offsets(map, 2)
        assert follows(pooled, map) and follows(where, map), name
        for each in (offsets, offsets.contiguous(memory_format=torch.channels_last)):
            out = segops.max_unpool2d_with_offsets(map, each, (3, 2), (3 * h, 2 * w))
            assert follows(out, map), name


# Derivatives of float64, step by step.


def apart(*shape):
    """No two alike or near, for the maximum to stay where it is."""
    order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(3))
    return (order.view(shape).double() / math.prod(shape)).requires_grad_()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_of_the_gate(backend, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shapes = (1, 2, 2, 3), (1, 2, 4, 6), (1, 2, 5, 4), (1, 2, 2, 3), (1, 2, 34, 51)
    maps = [apart(*each).detach().contiguous(memory_format=memory_format).requires_grad_() for each in shapes]
    with segops.backend(backend):
        for merge in ("concat", "sum"):
            gate = lambda decoder, *encoders: segops.partial_attention_gate(decoder, encoders, merge=merge)  # noqa: B023, E731
            assert torch.autograd.gradcheck(gate, maps[:4])
            assert torch.autograd.gradcheck(gate, (maps[0], maps[4]), fast_mode=True)  # offsets of two bytes


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kernel", [2, (2, 3), 4], ids=str)
def test_gradcheck_of_pooling_and_unpooling(backend, kernel):
    """Differentiable any number of times, each and both."""
    with segops.backend(backend):
        map = apart(1, 2, 5, 6)
        pooled, offsets = segops.max_pool2d_with_offsets(map, kernel)

        def pool(map):
            return segops.max_pool2d_with_offsets(map, kernel)[0]

        def unpool(values):
            return segops.max_unpool2d_with_offsets(values, offsets, kernel, (5, 6))

        def between(map):
            pooled, offsets = segops.max_pool2d_with_offsets(map, kernel)
            return segops.max_unpool2d_with_offsets(pooled.sin(), offsets, kernel, (5, 6)).square()

        for function, argument in ((pool, map), (unpool, pooled.detach().requires_grad_()), (between, map)):
            assert torch.autograd.gradcheck(function, argument)
            assert torch.autograd.gradgradcheck(function, argument)


def test_third_derivatives_of_pooling(target):
    """Against PyTorch's, through both ops behind each."""
    case = Pooling((1, 2, 5, 6), (2, 3))
    results = []
    for ours in (True, False):
        map = draw_integers(case.shape, torch.float32, target[0]).requires_grad_()
        pooled, where = case.pool(map) if ours else case.plain_pool(map)
        each = (case.unpool if ours else case.plain_unpool)(pooled.pow(2), where).pow(2).sum()
        results.append([])
        for _ in range(3):
            (each,) = torch.autograd.grad(each.sum(), map, create_graph=True)
            results[-1].append(each.detach())
    for order, pair in enumerate(zip(*results, strict=True), 1):
        assert torch.equal(*pair) and pair[0].any(), order


# Memory, determinism.


def saved_by(function):
    """What autograd keeps: the function's result, and the tensors."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        out = function()
    return out, kept


@fast_targets
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_what_the_gate_keeps_for_backward(target, merge):
    """A byte for each pooled element, two where windows have more than 256, from a multiple of 16 on; nothing for the others."""
    for dtype, channels_last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        for encoders, windows in (
            ((), ()),
            (((3, 5, 7),), (0,)),
            (((3, 4, 14), (3, 10, 6)), (0, 0)),
            (((3, 10, 14),), (1,)),
            (((3, 10, 14), (3, 5, 7), (3, 9, 9), (3, 3, 70)), (1, 0, 1, 0)),
            (((3, 80, 112), (3, 80, 119), (3, 6, 120), (3, 41, 200)), (1, 2, 1, 2)),
        ):
            case = Case((2, 3, 5, 7), encoders, merge, (channels_last,))
            maps = case.maps(dtype, target[0])
            out, kept = saved_by(lambda: case.op(*maps))  # noqa: B023
            assert out.requires_grad
            expected = sum(-(-2 * 3 * 5 * 7 * bytes // 16) * 16 for bytes in windows)
            assert sum(each.untyped_storage().nbytes() for each in kept) == expected, encoders


@fast_targets
def test_what_pooling_keeps_for_backward(target):
    """The offsets, and no copy of them."""
    case = Pooling((2, 3, 10, 14), 2)
    map = case.map(torch.float32, target[0])
    (pooled, offsets), kept = saved_by(lambda: case.pool(map))
    assert [each.data_ptr() for each in kept] == [offsets.data_ptr()] and offsets.untyped_storage().nbytes() == pooled.numel()
    _, kept = saved_by(lambda: case.unpool(pooled, offsets))
    assert [each.data_ptr() for each in kept] == [offsets.data_ptr()]


@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_all_bytes_of_the_offsets_are_determined(target, merge, monkeypatch):
    """Also those between one map's and the next's: what compares an op's outputs, such as opcheck, compares all of them."""
    case = Case((1, 3, 4, 5), ((3, 8, 10), (3, 9, 7), (3, 4, 5), (3, 80, 100)), merge)
    decoder, *encoders = (each.detach() for each in case.maps(torch.float32, target[0]))
    seen = []
    for left in (84, 255):
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        del [torch.full((256,), left, dtype=torch.uint8, device=target[0]) for _ in range(8)][:]  # to be handed out again
        _, offsets = op.pag([decoder, *encoders], merge, False, backend=target[1])
        seen.append(offsets)
    assert len(offsets) == 256 and torch.equal(*seen)


def same_results(function, variants):
    """What the function returns of the first arguments; of all others it must return the same."""
    expected = function(*variants[0])
    for each in variants[1:]:
        for value, wanted in zip(tree_leaves(function(*each)), tree_leaves(expected), strict=True):
            assert torch.equal(value, wanted)
    return expected


@pytest.mark.parametrize("channels_last", [False, True])
def test_ops_take_any_address_and_stride(target, channels_last):
    """Maps that 16 bytes divide, each of which begins or goes on where they do not."""
    device, backend = target
    inner = 1 if channels_last else 3
    small, large = (draw_integers((1, 4, *size), torch.float32, device, 0, channels_last) for size in ((2, 8), (4, 16)))

    def elsewhere(map):
        return map, shifted(map), spread(map, dim=inner), spread(map, 4, inner)

    def same(function, variants):
        return same_results(function, variants if target != INTERPRETED else variants[:2] + variants[5::4])

    for merge in ("concat", "sum"):
        variants = [(map, large) for map in elsewhere(small)] + [(small, map) for map in elsewhere(large)]
        out, offsets = same(lambda *maps: op.pag([*maps], merge, channels_last, backend=backend), variants)  # noqa: B023
        variants = [(each, offsets) for each in elsewhere(out)] + [(out, shifted(offsets))]
        same(lambda *each: op.pag_grad(*each, out.shape[1] - 4, 4, 0, 4, 16, channels_last, backend=backend), variants)  # noqa: B023
    settings = 2, 2, channels_last
    _, offsets = same(lambda map: op.pag_max_pool(map, *settings, backend=backend), [(map,) for map in elsewhere(large)])
    variants = [(each, offsets) for each in elsewhere(small)] + [(small, shifted(offsets))]
    same(lambda *each: op.pag_max_unpool(*each, 2, 2, 4, 16, channels_last, backend=backend), variants)
    variants = [(each, offsets) for each in elsewhere(large)] + [(large, shifted(offsets))]
    same(lambda *each: op.pag_max_gather(*each, *settings, backend=backend), variants)


@fast_targets
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("channels_last", [False, True])
def test_ops_take_maps_far_apart(target, dtype, channels_last):
    """Beyond 8192 elements from first to last, gaps included, the emulated CUDA kernels number them with 64 bits: windows of every
    kind, and copies, in packs or not."""
    kernels = (1, 1), (2, 2), (4, 4), (3, 8), (2, 1), (3, 3)

    def new(channels, height, width):
        return draw((2, channels, height, width), dtype, target[0], height + width, channels_last)

    def far(map):
        return spread(map, 1 << 13, 1 if channels_last else 3)

    def same(function, map, *rest):
        return same_results(
            partial(function, backend=target[1]), [(map, *rest, channels_last), (far(map), *rest, channels_last)]
        )

    for width, merge in itertools.product((8, 5), ("concat", "sum")):
        maps = [new(8, 3 * a, width * b) for a, b in kernels] + [new(8, 7, width + 2)]
        for channels, kernel in ((3, 1), (16, 1), (8, 2), (5, 1)):  # of 88 channels, some begin where packs do not
            maps.append(new(8 if merge == "sum" else channels, 3 * kernel, width * kernel))
        variants = [maps, [far(maps[0]), *maps[1:]], [*maps[:-1], far(maps[-1])], [far(each) for each in maps]]
        pag = partial(op.pag, backend=target[1])
        out, offsets = same_results(pag, [(each, merge, channels_last) for each in variants])
        channel = 0
        for map, place in zip(maps, offset_layout([each.shape for each in maps])[0], strict=True):
            if place is not None:
                same(op.pag_grad, out, offsets, channel, map.shape[1], place[0], *map.shape[2:])
            channel += map.shape[1] if merge == "concat" else 0
    map = new(8, 12, 16)
    for kernel in kernels:
        pooled, offsets = same(op.pag_max_pool, map, *kernel)
        same(op.pag_max_unpool, pooled, offsets, *kernel, 12, 16)
        same(op.pag_max_gather, map, offsets, *kernel)


# Any shape.

SIDE = st.integers(1, 12)
ENCODER = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))


@compiled_targets
@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 2), c=st.integers(1, 20), h=SIDE, w=SIDE, encoders=st.lists(ENCODER, max_size=4),
    merge=st.sampled_from(["concat", "sum"]), channels_last=st.lists(st.booleans(), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_gate_of_any_shape(target, n, c, h, w, encoders, merge, channels_last, dtype):
    """As the reference has it: windows that divide, that do not, maps that are too small."""
    encoders = tuple((channels, max(h * a - less, 1), max(w * b - fewer, 1)) for channels, a, b, less, fewer in encoders)
    case = Case((n, c, h, w), encoders, merge, tuple(channels_last))
    assume(runs(target, dtype))
    results = []
    for device, backend in (target, ("cpu", "reference")):
        with segops.backend(backend):
            maps = case.maps(dtype, device, draw_integers)
            out = case.op(*maps)
            results.append([out.detach(), *gradients(out, maps, draw=draw_integers, allow_unused=True)])
    for value, exact in zip(*results, strict=True):
        assert (value is None) == (exact is None) and (value is None or torch.equal(value.cpu(), exact))


@compiled_targets
@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 2), c=st.integers(1, 20), h=st.integers(1, 40), w=st.integers(1, 40), kernel_h=st.integers(1, 16),
    kernel_w=st.integers(1, 16), channels_last=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_pooling_of_any_shape(target, n, c, h, w, kernel_h, kernel_w, channels_last, dtype):
    case = Pooling((n, c, h, w), (kernel_h, kernel_w), channels_last)
    assume(runs(target, dtype))
    results = []
    for device, backend in (target, ("cpu", "reference")):
        with segops.backend(backend):
            map = case.map(dtype, device, draw_integers)
            pooled, offsets = case.pool(map)
            out = case.unpool(pooled, offsets)
            results.append(
                [pooled.detach(), offsets, out.detach(), *gradients(out, map, retain_graph=True), *gradients(pooled, map)]
            )
    assert all(torch.equal(value.cpu(), exact) for value, exact in zip(*results, strict=True))


# GPUs.


@needs_much_gpu_memory
@on_a_gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_indices_beyond_32_bits(target, channels_last):
    """Maps of more than 2^31 elements: the last rows and channels are right, forward and backward."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    c, side = 136, 4000
    assert c * side**2 > 2**31
    encoder = (
        torch.empty(1, c, side, side, device="cuda", dtype=torch.bfloat16, memory_format=layout).normal_().requires_grad_()
    )
    decoder = torch.zeros(1, c, side // 2, side // 2, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    tail = encoder[:, -3:, -8:].detach().cpu().requires_grad_()
    plain, _ = F.max_pool2d(tail, 2, return_indices=True)
    out = segops.partial_attention_gate(decoder, [encoder], merge="sum")
    assert torch.equal(out[:, -3:, -4:].cpu(), plain)
    (grad,) = torch.autograd.grad(out, encoder, out)
    assert torch.equal(grad[:, -3:, -8:].cpu(), torch.autograd.grad(plain, tail, plain, retain_graph=True)[0])
    del out, grad
    pooled, offsets = segops.max_pool2d_with_offsets(encoder, 2)
    assert torch.equal(pooled[:, -3:, -4:].cpu(), plain)
    out = segops.max_unpool2d_with_offsets(pooled, offsets, 2, encoder.shape)
    assert torch.equal(out[:, -3:, -8:].cpu(), torch.autograd.grad(plain, tail, plain)[0])


# Compiled.


@native_and_reference
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_compile_where_a_map_is_switched_off(implementation, merge):
    compiled = torch.compile(Case((), (), merge).op, fullgraph=True, backend="aot_eager", dynamic=True)
    for encoders in (((3, 8, 10), (3, 4, 5)), ((3, 3, 10), (3, 4, 5)), ((3, 8, 4), (3, 3, 3))):
        case = Case((2, 3, 4, 5), encoders, merge)
        maps = case.maps(torch.float32, implementation[0])
        assert torch.equal(compiled(*maps), case.op(*maps)), encoders


def test_inductor():
    """The default compiler, which plans strides and memory. It has no kernel of its own to write here: that takes 20 s."""

    def function(decoder, encoder):
        merged = segops.partial_attention_gate(decoder, [encoder], merge="sum")
        pooled, offsets = segops.max_pool2d_with_offsets(merged, 2)
        return segops.max_unpool2d_with_offsets(pooled, offsets, 2, merged.shape)

    maps = Case((2, 2, 5, 6), ((2, 10, 13),), channels_last=(True, False)).maps(torch.float32)
    with segops.backend("native"), torch.no_grad():
        assert torch.equal(torch.compile(function, fullgraph=True)(*maps), function(*maps))


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


# What the ops refuse by themselves: Python may not have checked it.


def test_ops_refuse_what_does_not_fit():
    ops, map, pooled = torch.ops.segops, torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)
    offsets = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    half = offsets[:, :1].contiguous()
    for call, message in (
        (lambda: ops.pag([pooled, map], "max", False), "pag: merge must be 'concat' or 'sum'"),
        (lambda: ops.pag_grad(pooled, offsets.flatten(), 0, 2, 2**63 - 1, 8, 8, False), "pag_grad: offsets must have 32 bytes"),
        (lambda: ops.pag_grad(pooled, offsets, 2**63 - 2, 4, 0, 8, 8, False), "pag_grad: grad has not these channels"),
        (lambda: ops.pag([map, pooled], "concat", False), "pag: 4 elements cannot make 8 windows"),
        (lambda: ops.pag([pooled, map[:, :1]], "sum", False), "pag: channels of a sum differ"),
        (lambda: ops.pag([pooled, map.double()], "sum", False), "pag: maps differ in dtype"),
        (lambda: ops.pag([pooled, map[:0]], "sum", False), r"pag: maps must be \(N, C, H, W\) of one batch"),
        (lambda: ops.pag([map[..., :1, :1], torch.zeros(1, 1, 300, 300)], "concat", False), "windows of 90000 elements"),
        (lambda: ops.pag_grad(pooled, offsets, 1, 2, 0, 8, 8, False), "pag_grad: grad has not these channels"),
        (lambda: ops.pag_grad(pooled, offsets.flatten(), 0, 2, 1, 8, 8, False), "pag_grad: offsets must have 32 bytes from 1 on"),
        (lambda: ops.pag_grad(pooled, offsets.flatten(), 0, 2, 0, 80, 80, False), "pag_grad: offsets must have 64 bytes from 0 on"),
        (lambda: ops.pag_max_pool(map, 2, 0, False), "pag_max_pool: needs .* a positive kernel"),
        (lambda: ops.pag_max_pool(torch.zeros(1, 1, 17, 17), 17, 17, False), "pag_max_pool: a byte does not number windows"),
        (lambda: ops.pag_max_unpool(pooled, half, 2, 2, 8, 8, False), "pag_max_unpool: offsets must be bytes, of the map's"),
        (lambda: ops.pag_max_unpool(pooled, offsets[:, :, :3], 2, 2, 8, 8, False), "needs offsets of pooled's shape"),
        (lambda: ops.pag_max_unpool(pooled, offsets, 2, 2, 9, 8, False), "pag_max_unpool: 4 windows do not cover 9"),
        (lambda: ops.pag_max_gather(map, half, 2, 2, False), "pag_max_gather: offsets must be bytes, of the map's"),
        (lambda: ops.pag_max_gather(map, offsets, 3, 2, False), "pag_max_gather: 4 windows do not cover 8"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()


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
