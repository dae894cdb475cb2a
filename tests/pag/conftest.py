"""What the tests of the partial-attention gate and of pooling with offsets share: maps, PyTorch's answer, the bounds of the contract."""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import segops

from ..targets import DTYPES, INTERPRETED, TARGETS, matrix, runs

FORMATS = {"contiguous": (False,), "channels_last": (True,), "mixed": (False, True, True, False), "mixed too": (True, False)}


def pairs(cases, targets=TARGETS, dtypes=DTYPES):
    """(target, case, dtype) for parametrize: all that run, and on the interpreter the cases that are `small`, in float32."""
    return matrix(
        targets, cases, dtypes,
        when=lambda target, case, dtype: runs(target, dtype)
        and (target != INTERPRETED or (dtype == torch.float32 and case.small)),
    )  # fmt: skip


def draw(shape, dtype=torch.float64, device="cpu", seed=0, channels_last=False):
    """The same numbers in every dtype under test; few enough for ties to happen."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(device, dtype)
    return drawn.contiguous(memory_format=torch.channels_last) if channels_last else drawn


def draw_integers(shape, dtype=torch.float64, device="cpu", seed=0, channels_last=False):
    """Numbers of few bits: their sums are exact in every dtype and in any order, and ties are many."""
    drawn = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return drawn.contiguous(memory_format=torch.channels_last) if channels_last else drawn


@dataclass(frozen=True)
class Case:
    """A decoder of this shape and encoder maps (channels, height, width). Which maps are channels_last, decoder first, goes round."""

    decoder: tuple
    encoders: tuple = ()
    merge: str = "concat"
    channels_last: tuple = (False,)
    small: bool = False

    def __str__(self):
        n, *rest = ("x".join(map(str, each)) for each in ((self.decoder[0],), self.decoder[1:], *self.encoders))
        return f"{n}: {' '.join(rest)}"

    def variants(self, target):
        """Both merges, in every combination of memory formats; one of each for the interpreter."""
        for merge, (name, channels_last) in itertools.product(("concat", "sum"), FORMATS.items()):
            if target != INTERPRETED or (merge, name) in (("concat", "contiguous"), ("sum", "channels_last")):
                yield f"{merge}, {name}", replace(self, merge=merge, channels_last=channels_last)

    @property
    def overlaps(self):
        """Whether windows do: where they do not divide the map."""
        h, w = self.decoder[2:]
        return any(height >= h and width >= w and (height % h or width % w) for _, height, width in self.encoders)

    def shapes(self):
        n, c, *_ = self.decoder
        return self.decoder, *((n, c if self.merge == "sum" else each[0], *each[1:]) for each in self.encoders)

    def maps(self, dtype=torch.float64, device="cpu", draw=draw):
        """The decoder, and the encoder maps."""
        formats = self.channels_last * (1 + len(self.encoders))
        return [
            draw(shape, dtype, device, i, channels_last).requires_grad_()
            for i, (shape, channels_last) in enumerate(zip(self.shapes(), formats, strict=False))
        ]

    def op(self, decoder, *encoders):
        return segops.partial_attention_gate(decoder, encoders, merge=self.merge)

    def plain(self, decoder, *encoders):
        """As one writes it with PyTorch, in the maps' dtype."""
        h, w = decoder.shape[2:]
        pooled = [max_pool(each, (h, w)) for each in encoders if each.shape[2] >= h and each.shape[3] >= w]
        return torch.cat([decoder, *pooled], 1) if self.merge == "concat" else sum(pooled, decoder.clone())


def max_pool(map, out):
    """To this size: the pooling that a network would call, and the adaptive one where there is no such."""
    (height, width), (h, w) = map.shape[2:], out
    if height % h or width % w:
        return F.adaptive_max_pool2d(map, out)
    return F.max_pool2d(map, (height // h, width // w))


@dataclass(frozen=True)
class Pooling:
    """A map of this shape under windows of this size."""

    shape: tuple
    kernel: int | tuple
    channels_last: bool = False
    small: bool = False

    def __str__(self):
        sides = "x".join(map(str, self.kernel)) if isinstance(self.kernel, tuple) else self.kernel
        return f"{'x'.join(map(str, self.shape))} by {sides}"

    @property
    def sides(self):
        return (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel

    def variants(self):
        for channels_last in (False, True):
            yield "channels_last" if channels_last else "contiguous", replace(self, channels_last=channels_last)

    def map(self, dtype=torch.float64, device="cpu", draw=draw):
        return draw(self.shape, dtype, device, 0, self.channels_last).requires_grad_()

    def pool(self, map):
        return segops.max_pool2d_with_offsets(map, self.kernel)

    def unpool(self, pooled, offsets):
        return segops.max_unpool2d_with_offsets(pooled, offsets, self.kernel, self.shape)

    def plain_pool(self, map):
        """Pooled, and the index into the map."""
        return F.max_pool2d(map, self.kernel, ceil_mode=True, return_indices=True)

    def plain_unpool(self, pooled, index):
        return F.max_unpool2d(pooled, index, self.kernel, output_size=self.shape[2:])

    def index(self, offsets):
        """PyTorch's, of where these offsets point."""
        (kernel_h, kernel_w), (_, _, height, width) = self.sides, self.shape
        y, x = (torch.arange(0, size, by, device=offsets.device) for size, by in ((height, kernel_h), (width, kernel_w)))
        dy, dx = offsets.long() // kernel_w, offsets.long() % kernel_w
        assert ((dy < kernel_h) & (y[:, None] + dy < height) & (x + dx < width)).all(), "an offset outside its window"
        return (y[:, None] + dy) * width + x + dx


def gradients(out, inputs, grad=None, draw=draw, **options):
    """Of `inputs`, for a gradient of the output that is the same numbers in every dtype."""
    return torch.autograd.grad(out, inputs, draw(out.shape, out.dtype, out.device, 99) if grad is None else grad, **options)


def output_and_gradients(function, inputs, draw=draw):
    out = function(*inputs)
    return [out.detach(), *gradients(out, inputs, draw=draw)]


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_values(a, b):
    """`torch.equal`, and NaN wherever the other has one."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(each.masked_fill(each.isnan(), 0) for each in (a, b)))


def same_bits(a, b):
    """Also zeros of the same sign."""
    integers = INTEGERS[a.element_size()]
    bits = (each.masked_fill(each.isnan(), 0).contiguous().view(integers) for each in (a, b))
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)
