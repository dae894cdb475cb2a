"""Pyramid atrous convolution as the paper writes it, in plain PyTorch: the documentation, the
oracle, the fallback."""

import functools

import torch
import torch.nn.functional as F


def pyramid_atrous_conv2d(input, weight, bias, rates, merge):
    """Yu, section 3.3 and Fig. 6: atrous convolutions at several rates that share one filter,
    summed or concatenated.

    Differentiable any number of times by autograd; the arithmetic of len(rates) convolutions.
    """
    reach = weight.shape[-1] // 2
    branches = (F.conv2d(input, weight, bias, padding=rate * reach, dilation=rate) for rate in rates)
    return functools.reduce(torch.add, branches) if merge == "sum" else torch.cat(list(branches), dim=1)
