"""What the tests of pyramid atrous convolution share: inputs, the float64 truth, the bounds of the contract."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import segops
from segops.ops.pac import op, reference

from ..accuracy import assert_close
from ..contract import results


@pytest.fixture(scope="module", autouse=True)
def kernels_run_on_a_gpu_too():
    """Where so few channels do not pay."""
    on_a_cpu = partial(op.channels_that_pay, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "channels_that_pay", lambda device_type, rates: on_a_cpu(rates))
        yield


@dataclass(frozen=True)
class Case:
    shape: tuple
    channels: int
    rates: tuple = (1, 3, 5, 7, 9)
    merge: str = "sum"
    kernel_size: int = 3
    channels_last: bool = False

    def tensors(self, dtype=torch.float64, device="cpu", seed=0):
        """Input, weight and bias, the same numbers in every dtype as far as it can hold them."""
        generator = torch.Generator().manual_seed(seed)
        n, c, h, w = self.shape
        k = self.kernel_size
        weight = torch.randn(self.channels, c, k, k, generator=generator) / (c * k * k) ** 0.5
        drawn = torch.randn(n, c, h, w, generator=generator), weight, torch.randn(self.channels, generator=generator)
        x, weight, bias = (t.to(torch.bfloat16).to(dtype) for t in drawn)  # representable in all of the dtypes under test
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return [t.to(device).requires_grad_() for t in (x, weight, bias)]

    def op(self, x, weight, bias=None):
        return segops.pyramid_atrous_conv2d(x, weight, bias, rates=self.rates, merge=self.merge)

    def plain(self, x, weight, bias=None):
        return reference.pyramid_atrous_conv2d(x, weight, bias, self.rates, self.merge)


# The last five are the interpreter's.
CASES = [
    Case((2, 40, 13, 17), 24),  # fewer channels come out: products first, then shifts of what they are
    Case((2, 24, 13, 17), 40, channels_last=True),  # more come out: shifts of the input first
    Case((1, 21, 9, 31), 70, rates=(1, 2, 4)),  # channels that no vector divides
    Case((2, 33, 12, 11), 33, merge="concat"),  # a group of outputs for each rate
    Case((3, 70, 5, 4), 21, rates=(2, 6, 12), channels_last=True),  # rates beyond the map: taps that touch nothing
    Case((1, 32, 1, 9), 32, rates=(1, 2, 3)),  # one row: only the taps of its middle live
    Case((1, 64, 8, 8), 17, rates=(1, 5), merge="concat", channels_last=True),
    Case((1, 34, 6, 5), 19, rates=(1, 2, 3), kernel_size=5),
    Case((1, 66, 7, 7), 20, rates=(2, 3), kernel_size=1),  # nothing is shifted
]


def assert_accurate(case, dtype, device):
    """Relative norm against float64, bounded by "plain": the sequential sum of F.conv2d in the same dtype."""
    truth, values = results(case.plain, case.tensors()), results(case.op, case.tensors(dtype, device))
    plain = results(case.plain, case.tensors(dtype, device))
    for each in zip(("output", "input", "weight", "bias"), values, plain, truth, strict=True):
        assert each[1].dtype == dtype
        assert_close(*each)
