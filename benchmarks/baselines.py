"""What a user would write without segops. Each returns {name: function} over the same arguments."""

import functools

import torch
import torch.nn.functional as F

from segops.pac.reference import pyramid_atrous_conv2d


def pac(rates, merge, device):
    """Plain PyTorch in the memory format of its arguments, the same factorisation by hand, on a GPU also torch.compile."""

    def eager(input, weight):
        return pyramid_atrous_conv2d(input, weight, None, rates, merge)

    def handwritten(input, weight):
        """The factorisation in PyTorch's own ops: one product with all taps, then padded slices added up."""
        (_, _, h, w), c_out = input.shape, weight.shape[0]
        reach = max(rates)
        taps = weight.permute(2, 3, 0, 1).reshape(9 * c_out, -1, 1, 1)
        planes = F.pad(F.conv2d(input, taps), (reach,) * 4).unflatten(1, (9, c_out))
        branches = []
        for rate in rates:
            shifts = [(reach + rate * dy, reach + rate * dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            slices = [planes[:, t, :, y : y + h, x : x + w] for t, (y, x) in enumerate(shifts)]
            branches.append(functools.reduce(torch.add, slices))
        return functools.reduce(torch.add, branches) if merge == "sum" else torch.cat(branches, 1)

    baselines = {"eager": eager, "handwritten": handwritten}
    if device == "cuda":  # on the CPU it calls the same convolutions and compiles for half a minute a shape
        baselines["compile"] = torch.compile(eager, dynamic=False)
    return baselines
