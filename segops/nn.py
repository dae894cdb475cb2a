"""The ops of segops as modules."""

import math

import torch

from .ops.bal.edge import EdgeSettings
from .ops.bal.op import LossSettings, boundary_aware_loss, check_class_weight, upsample_cross_entropy
from .ops.common.checks import check_bool, check_int, check_merge, check_number
from .ops.crf.op import CRFSettings, dense_crf
from .ops.pac.op import Settings, pyramid_atrous_conv2d
from .ops.pag.op import partial_attention_gate


class PyramidAtrousConv2d(torch.nn.Module):
    """Pyramid atrous convolution: one filter at several dilation rates, summed or concatenated.

    The module of `segops.pyramid_atrous_conv2d` (Yu, section 3.3). Weights are initialised as by
    `torch.nn.Conv2d`, and the state_dict has its keys, `weight` and `bias`: weights of a
    convolution of the same kernel load as they are.

    Args:
        in_channels: channels of the input.
        out_channels: filters; the output has out_channels channels for "sum", for "concat"
            len(rates) * out_channels.
        kernel_size: odd int, default 3.
        rates: dilation rates, positive ints; default (1, 3, 5, 7, 9).
        merge: "sum" (default) or "concat".
        bias: whether the shared filter has a bias (default True), which "sum" adds len(rates)
            times.

    Shape: (N, in_channels, H, W) -> (N, channels, H, W), same H and W.

    Raises:
        ValueError, TypeError: as `segops.pyramid_atrous_conv2d`, at construction for what is known
            there.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size=3, rates=(1, 3, 5, 7, 9), merge="sum", bias=True, device=None, dtype=None
    ):
        super().__init__()
        self.rates = Settings((kernel_size, kernel_size), rates, merge).rates
        self.merge = merge
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int) or channels < 1:
                raise ValueError(f"{name} must be a positive int; got {channels!r}")
        self.weight = torch.nn.Parameter(
            torch.empty(out_channels, in_channels, kernel_size, kernel_size, device=device, dtype=dtype)
        )
        self.bias = torch.nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """Draws weight and bias as `torch.nn.Conv2d` does."""
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input):
        return pyramid_atrous_conv2d(input, self.weight, self.bias, rates=self.rates, merge=self.merge)

    def extra_repr(self):
        c_out, c_in, k, _ = self.weight.shape
        return f"{c_in}, {c_out}, kernel_size={k}, rates={self.rates}, merge={self.merge!r}, bias={self.bias is not None}"


class UpsampleCrossEntropy(torch.nn.Module):
    """Cross entropy of logits at any resolution, without the upsampled logits.

    The module of `segops.upsample_cross_entropy`, with its keyword arguments and defaults.

    Args:
        class_weight: (C) floating point, kept as a buffer, or None (default).
        label_smoothing: in [0, 1], default 0.0.
        ignore_index: label of pixels that do not count, default 255.
        reduction: "mean" (default; over the pixels that are not ignored), "sum" or "none".

    Shape: logits (N, C, h, w), labels (N, H, W), pixel_weight (N, h', w') or None -> () or, for
        "none", (N, H, W).

    Raises:
        ValueError, TypeError, IndexError: as the function, at construction for what is known there.
    """

    def __init__(self, *, class_weight=None, label_smoothing=0.0, ignore_index=255, reduction="mean"):
        super().__init__()
        check_class_weight(class_weight)
        LossSettings(label_smoothing, ignore_index, reduction)
        self.register_buffer("class_weight", class_weight)
        self.settings = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}

    def forward(self, logits, labels, pixel_weight=None):
        return upsample_cross_entropy(logits, labels, pixel_weight, class_weight=self.class_weight, **self.settings)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class BoundaryAwareLoss(torch.nn.Module):
    """Cross entropy weighted by the gaussian edge map of the labels (Yu, Eq. 4), for logits at any
    resolution.

    The module of `segops.boundary_aware_loss`, with its keyword arguments and defaults.

    Args:
        kernel, kernel_size, sigma, beta, downsample, normalize: of the edge map, as in
            `segops.gaussian_edge`; default the paper's best: "gaussian", 35, 3.0, 0.5, 4, and None.
            normalize="mean" keeps cross entropy's scale.
        class_weight: (C) floating point, kept as a buffer, or None (default).
        label_smoothing: in [0, 1], default 0.0.
        ignore_index: label of pixels that do not count, default 255.
        reduction: "mean" (default; over the pixels that are not ignored), "sum" or "none".

    Shape: logits (N, C, h, w), labels (N, H, W) -> () or, for "none", (N, H, W).

    Raises:
        ValueError, TypeError, IndexError: as the function, at construction for what is known there.
    """

    def __init__(
        self,
        *,
        kernel="gaussian",
        kernel_size=35,
        sigma=3.0,
        beta=0.5,
        downsample=4,
        normalize=None,
        class_weight=None,
        label_smoothing=0.0,
        ignore_index=255,
        reduction="mean",
    ):
        super().__init__()
        EdgeSettings(kernel, kernel_size, sigma, beta, downsample, normalize, ignore_index)
        check_class_weight(class_weight)
        LossSettings(label_smoothing, ignore_index, reduction)
        self.register_buffer("class_weight", class_weight)
        self.settings = {
            "kernel": kernel,
            "kernel_size": kernel_size,
            "sigma": sigma,
            "beta": beta,
            "downsample": downsample,
            "normalize": normalize,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }

    def forward(self, logits, labels):
        return boundary_aware_loss(logits, labels, class_weight=self.class_weight, **self.settings)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class PartialAttentionGate(torch.nn.Module):
    """Encoder maps max-pooled to the decoder's size and merged with it: a skip connection from all
    of an encoder's levels at once.

    The module of `segops.partial_attention_gate` (Haloi, "Partial attention", Eq. 3). It has no
    parameters.

    Args:
        merge: "concat" (default) or "sum".

    Shape: decoder (N, C, h, w), encoders a list of (N, C_i, H_i, W_i) -> (N, C + C_i of those with
        H_i >= h and W_i >= w, h, w), or (N, C, h, w) for "sum".

    Raises:
        ValueError, TypeError: as the function, at construction for what is known there.
    """

    def __init__(self, merge="concat"):
        super().__init__()
        check_merge(merge)
        self.merge = merge

    def forward(self, decoder, encoders):
        return partial_attention_gate(decoder, encoders, merge=self.merge)

    def extra_repr(self):
        return f"merge={self.merge!r}"


class CRF(torch.nn.Module):
    """The dense CRF as a layer that trains: CRF-RNN.

    Zheng et al., "Conditional Random Fields as Recurrent Neural Networks", arXiv:1502.03240:
    `segops.dense_crf` with the kernels' weights and the compatibility as parameters, (C, C) each.
    Defaults are the values of the authors' network as sadeepj/crfasrnn_pytorch has them; its
    weights load through `segops.models.from_crfasrnn`.

    Args:
        num_classes: C, the logits' channels.
        iterations: of mean field in training mode, default 5.
        test_iterations: in eval mode, default 10.
        spatial_weight: number w; the parameter `spatial_weight` starts as w times the identity;
            default 3.0.
        spatial_sigma: in pixels, default 3.0.
        bilateral_weight: the same for the parameter `bilateral_weight`, default 5.0.
        bilateral_sigma: (pixels, intensity levels), default (160.0, 3.0), of images of 0 to 255.
        normalization: "after" (default) or "symmetric".
        align_corners: of the logits' resize, default False.
        device, dtype: of the parameters, default PyTorch's.

    The parameter `compatibility` starts as the identity, and is added: it is -mu of the paper.

    Shape: logits (N, C, h, w), images (N, K, H, W) -> (N, C, H, W) log-probabilities.

    Raises:
        ValueError, TypeError: as the function, at construction for what is known there.

    Example:
        >>> crf = segops.nn.CRF(21)
        >>> logits, images = torch.randn(2, 21, 33, 33), torch.randint(0, 256, (2, 3, 65, 65))
        >>> log_q = crf(logits, images.to(torch.uint8))  # any loss of logits takes it
    """

    def __init__(
        self,
        num_classes,
        iterations=5,
        test_iterations=10,
        spatial_weight=3.0,
        spatial_sigma=3.0,
        bilateral_weight=5.0,
        bilateral_sigma=(160.0, 3.0),
        normalization="after",
        *,
        align_corners=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_int("num_classes", num_classes, lowest=1)
        check_int("test_iterations", test_iterations, lowest=0)
        CRFSettings(iterations, spatial_sigma, bilateral_sigma, normalization)
        check_bool("align_corners", align_corners)
        self.iterations, self.test_iterations = iterations, test_iterations
        self.settings = {
            "spatial_sigma": spatial_sigma,
            "bilateral_sigma": tuple(bilateral_sigma),
            "normalization": normalization,
            "align_corners": align_corners,
        }
        identity = torch.eye(num_classes, device=device, dtype=dtype)
        for name, weight in (("spatial_weight", spatial_weight), ("bilateral_weight", bilateral_weight)):
            check_number(name, weight, identity.dtype)
            self.register_parameter(name, torch.nn.Parameter(identity * float(weight)))
        self.compatibility = torch.nn.Parameter(identity)

    def forward(self, logits, images):
        return dense_crf(
            logits,
            images,
            iterations=self.iterations if self.training else self.test_iterations,
            spatial_weight=self.spatial_weight,
            bilateral_weight=self.bilateral_weight,
            compatibility=self.compatibility,
            **self.settings,
        )

    def extra_repr(self):
        settings = {"iterations": self.iterations, "test_iterations": self.test_iterations, **self.settings}
        return ", ".join([str(len(self.compatibility)), *(f"{name}={value!r}" for name, value in settings.items())])
