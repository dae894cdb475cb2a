"""Reference networks for semantic segmentation, built on timm backbones and the ops of segops.

model = segops.models.create_model("pacnet", num_classes=21, backbone="resnet101", pretrained=True)
logits = model(images)                    # (N, num_classes, h, w), at the network's own resolution
logits = model(images, upsample=True)     # (N, num_classes, H, W)
classes = model.predict(images)           # (N, H, W), int64
"""

import difflib

try:
    import timm as _  # noqa: F401
except ImportError as error:
    raise ImportError("segops.models needs timm: pip install 'segops[models]'") from error

from .pacnet import PACNet

MODELS = {"pacnet": PACNet}

__all__ = ["PACNet", "create_model", "list_models"]


def list_models():
    """The names that `create_model` knows."""
    return sorted(MODELS)


def create_model(name, num_classes, in_channels=3, backbone=None, output_stride=None, pretrained=False, **options):
    """Builds a network by name.

    Args:
        name: one of `list_models()`.
        num_classes: classes to tell apart.
        in_channels: channels of the images, default 3.
        backbone: name of a timm model that has `features_only`; default the paper's.
        output_stride: input size over feature size, as far as the backbone supports it; default the paper's.
        pretrained: load the backbone's ImageNet weights through timm (default False).
        **options: further arguments of the model's class.

    Raises:
        ValueError: unknown name (lists near matches), unknown backbone, unsupported output_stride.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(list_models())}"
        raise ValueError(f"name must be a known model; got {name!r}; {hint}")
    chosen = {"backbone": backbone, "output_stride": output_stride}
    options |= {key: value for key, value in chosen.items() if value is not None}
    return MODELS[name](num_classes, in_channels=in_channels, pretrained=pretrained, **options)
