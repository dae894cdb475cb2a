"""Reference networks for semantic segmentation, built on timm backbones and the ops of segops.

model = segops.models.create_model("pacnet", num_classes=21, backbone="resnet101", pretrained=True)
output = model(images)             # .logits (N, num_classes, h, w), .aux_logits, .class_logits
classes = model.predict(images)    # (N, H, W), int64
segops.dense_crf(logits, images, **segops.models.CRF_SETTINGS["deeplabv1_largefov"])
"""

try:
    import timm as _  # noqa: F401
except ImportError as error:
    raise ImportError("segops.models needs timm: pip install 'segops[models]'") from error

from .backbones import Backbone
from .checkpoints import from_crfasrnn, from_torchvision
from .contexts import CONTEXTS, create_context
from .deeplab import CRF_SETTINGS
from .model import Output
from .registry import ModelInfo, create_model, list_models, model_info
from .segmenter import Segmenter

__all__ = [
    "CONTEXTS",
    "CRF_SETTINGS",
    "Backbone",
    "ModelInfo",
    "Output",
    "Segmenter",
    "create_context",
    "create_model",
    "from_crfasrnn",
    "from_torchvision",
    "list_models",
    "model_info",
]
