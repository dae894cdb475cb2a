"""What the trials of an op, in its bench_OP.py, are made of: the tensors that it is tried on, and
errors over their bounds."""

from dataclasses import dataclass

import torch

import segops

from . import measure
from .measure import DEVICE, FORMATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOID = 255  # the label of pixels that do not count
LABELS = dict(zip(DTYPES, (torch.int64, torch.int32, torch.uint8), strict=True))


@dataclass(frozen=True)
class Setup:
    """The tensors that an op is tried on: made on the CPU, so that every device gets the same."""

    dtype: torch.dtype
    memory_format: str
    packed: bool
    tiny: bool

    def __str__(self):
        return f"{str(self.dtype).removeprefix('torch.')} {self.memory_format} {'packed' if self.packed else 'odd'}"

    @property
    def shape(self):
        """N, C, H, W."""
        if self.tiny:
            return (1, 8, 8, 8) if self.packed else (1, 5, 7, 9)
        return (2, 16, 24, 32) if self.packed else (2, 13, 23, 27)

    def map(self, n, c, h, w, scale=1.0):
        generator = torch.Generator().manual_seed(n + c + h + w)
        values = (scale * torch.randn(n, c, h, w, generator=generator)).to(self.dtype)
        return values.contiguous(memory_format=FORMATS[self.memory_format]).requires_grad_()

    def labels(self, height, width):
        """Patches of 3x3, a tenth of them void."""
        n, c, _, _ = self.shape
        generator = torch.Generator().manual_seed(height + width)
        patches = torch.randint(0, c, (n, height // 3 + 1, width // 3 + 1), generator=generator)
        patches[torch.rand(patches.shape, generator=generator) < 0.1] = VOID
        labels = patches.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :height, :width]
        return labels.to(LABELS[self.dtype]).contiguous()

    def class_weight(self):
        return torch.linspace(0.5, 1.5, self.shape[1])


def on_device(tensors):
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


def error(function, tensors, truth=None):
    """The largest relative error of result and gradients over its bound: above 1 is wrong.

    truth: computes the same in float64; by default the function itself on the reference backend.
    """

    def step_by_step(*tensors):
        result = function(*tensors)
        measure.synchronise()
        return result

    values = measure.outputs_and_gradients(step_by_step, on_device(tensors))
    measure.synchronise()
    with segops.backend("reference"):
        plain = measure.outputs_and_gradients(function, tensors)
        precise = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
        exact = measure.outputs_and_gradients(truth or function, precise, plain[0].dtype)
    return measure.error_over_bound([value.cpu() for value in values], plain, exact)


def mismatch(function, tensors):
    """Infinite unless the result is that of the reference, element by element."""
    values = function(*on_device(tensors)).cpu()
    with segops.backend("reference"):
        return 0.0 if torch.equal(values, function(*tensors)) else float("inf")
