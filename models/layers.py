"""Layers that several reference models share."""

import torch
import torch.nn.functional as F
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that also trains on one value per channel, as global pooling of a single image leaves it: there the running
    statistics normalise and stay as they are, and only the affine parameters train."""

    def forward(self, input):
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(input)


class MaxPool2d(nn.MaxPool2d):
    """Max pooling whose exported program takes any size. PyTorch's own guards on the remainder that the example's size left."""

    def forward(self, input):
        if torch.compiler.is_exporting() and self.stride > 1:
            return F.max_pool2d(input, self.kernel_size, 1, self.padding)[:, :, :: self.stride, :: self.stride]
        return super().forward(input)


class Classifier(nn.Conv2d):
    """The 1x1 convolution to the classes.

    Under autocast on a CPU it computes in float32 where its input has more than 2048 channels, and rounds: with AMX, two threads and few
    classes (12, not 16) the backward pass of PyTorch's own in bfloat16 writes beyond its memory there (torch 2.11).
    """

    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes, 1)

    def forward(self, input):
        if self.in_channels <= 2048 or input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(input.dtype)


def conv_norm_relu(in_channels, channels, kernel_size=1, rate=1, stride=1, groups=1):
    """Convolution that keeps the size (at stride 1), batch normalisation, ReLU."""
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    padding = tuple(rate * (size // 2) for size in sizes)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, sizes, stride, padding, rate, groups, bias=False), BatchNorm2d(channels), nn.ReLU()
    )


def separable_conv(in_channels, channels, rate=1):
    """Depthwise 3x3 and pointwise convolution, each with batch normalisation and ReLU, initialised as in DeepLab v3+."""
    depthwise = conv_norm_relu(in_channels, in_channels, 3, rate, groups=in_channels)
    pointwise = conv_norm_relu(in_channels, channels)
    nn.init.trunc_normal_(depthwise[0].weight, std=0.33, a=-0.66, b=0.66)
    nn.init.trunc_normal_(pointwise[0].weight, std=0.06, a=-0.12, b=0.12)
    return nn.Sequential(depthwise, pointwise)


def global_pool(in_channels, channels):
    """Image-level features: (N, in_channels, h, w) -> (N, channels, 1, 1)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm_relu(in_channels, channels))


def normal_(convolution, std):
    """Gaussian weights, biases of zero."""
    nn.init.normal_(convolution.weight, std=std)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def he_(module):
    """He initialisation of every convolution, biases of zero; for `module.apply`."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize(map, size, align_corners=False):
    return F.interpolate(map, size, mode="bilinear", align_corners=align_corners)


class BilinearDeconvolution(nn.Module):
    """Transposed convolution that starts as bilinear interpolation, channel by channel, without bias.

    Fixed by default: one kernel for all channels, no parameter and not in the state_dict. With learned=True a dense
    (channels, channels, kernel_size, kernel_size) parameter whose diagonal holds that kernel.
    """

    def __init__(self, channels, kernel_size, stride, padding=0, learned=False):
        super().__init__()
        self.channels, self.kernel_size, self.stride, self.padding = channels, kernel_size, stride, padding
        if learned:
            self.weight = nn.Parameter(torch.eye(channels)[:, :, None, None] * bilinear_kernel(kernel_size))
        else:
            self.register_parameter("weight", None)

    def forward(self, map):
        if self.weight is not None:
            return F.conv_transpose2d(map, self.weight, stride=self.stride, padding=self.padding)
        kernel = bilinear_kernel(self.kernel_size, map.dtype, map.device)[None, None]
        planes = F.conv_transpose2d(map.flatten(0, 1)[:, None], kernel, stride=self.stride, padding=self.padding)
        return planes[:, 0].unflatten(0, map.shape[:2])

    def extra_repr(self):
        learned = self.weight is not None
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, learned={learned}"
        )


def bilinear_kernel(size, dtype=None, device=None):
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    line = 1 - (torch.arange(size, device=device) - centre).abs() / factor
    return (line[:, None] * line).to(dtype or line.dtype)
