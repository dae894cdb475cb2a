"""What a user would write without segops. Each returns {name: function} over the same arguments."""

import torch

from segops.pac.reference import pyramid_atrous_conv2d


def pac(rates, merge, device):
    """Plain PyTorch, in the memory format of its arguments; on a GPU also torch.compile of it."""

    def eager(input, weight):
        return pyramid_atrous_conv2d(input, weight, None, rates, merge)

    baselines = {"eager": eager}
    if device == "cuda":  # on the CPU it calls the same convolutions and compiles for half a minute a shape
        baselines["compile"] = torch.compile(eager, dynamic=False)
    return baselines
