"""segops: hand-written kernels for semantic segmentation, as PyTorch ops.

    segops.pyramid_atrous_conv2d    one filter at several dilation rates, for the arithmetic of one
    segops.boundary_aware_loss      cross entropy weighted towards boundaries; logits of any size
    segops.upsample_cross_entropy   the same with weights of your own: full-size logits never exist
    segops.gaussian_edge            the weights: a blurred edge map of the labels
    segops.partial_attention_gate   encoder maps max-pooled to the decoder's size and merged
    segops.max_pool2d_with_offsets  max pooling that remembers where in a byte; and its unpooling
    segops.upsample_argmax          class indices from logits at any resolution
    segops.dense_crf                logits refined by the image: mean field in a dense CRF
    segops.permutohedral_filter     high-dimensional Gaussian filters, such as the bilateral one
    segops.nn                       the same as modules
    segops.models                   networks that use them (needs timm: pip install segops[models])
    segops.backend                  choose between native (C++, CUDA), triton and reference kernels

`python -m segops info` tells which kernels run on this machine, `library_path()` where the library
of native ops lies, for processes without segops or Python.
"""

import importlib
from importlib.metadata import version

from . import nn as nn
from .backend import backend as backend
from .backend import library_path as library_path
from .ops.argmax.op import upsample_argmax as upsample_argmax
from .ops.bal.edge import gaussian_edge as gaussian_edge
from .ops.bal.op import boundary_aware_loss as boundary_aware_loss
from .ops.bal.op import upsample_cross_entropy as upsample_cross_entropy
from .ops.common import library
from .ops.crf.op import dense_crf as dense_crf
from .ops.crf.op import permutohedral_filter as permutohedral_filter
from .ops.pac.op import pyramid_atrous_conv2d as pyramid_atrous_conv2d
from .ops.pag.op import max_pool2d_with_offsets as max_pool2d_with_offsets
from .ops.pag.op import max_unpool2d_with_offsets as max_unpool2d_with_offsets
from .ops.pag.op import partial_attention_gate as partial_attention_gate

library.start()

__version__ = version("segops")

__all__ = sorted(
    {"__version__", "backend", "library_path", "nn"}
    | {name for name, value in globals().items() if getattr(value, "__module__", "").startswith("segops.ops.")}
)


def __getattr__(name):
    """`segops.models` and `segops.train` need more than torch: they are imported when they are
    first used."""
    if name in ("models", "train"):
        return importlib.import_module(f"segops.{name}")
    raise AttributeError(f"module 'segops' has no attribute {name!r}")
