"""timm backbones as feature extractors."""

import difflib

import timm
import torch


class Backbone(torch.nn.Module):
    """The last feature map (N, channels, h, w) of a timm model at the given output stride; `channels` is its width.

    Dilated ResNets follow torchvision's rule: the first block of a dilated stage keeps the rate of the stage before.

    Raises:
        ValueError: timm does not know the name, or the model has no features at this output stride (names those it has).
    """

    def __init__(self, name, output_stride, in_channels=3, pretrained=False):
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(str(name), timm.list_models(), n=5)
            raise ValueError(f"backbone must be a timm model; got {name!r}; near matches: {', '.join(near) or 'none'}")
        self.features = _features(name, output_stride, in_chans=in_channels, pretrained=pretrained)
        if self.features is None:
            with torch.device("meta"):
                able = [stride for stride in (4, 8, 16, 32) if _features(name, stride) is not None]
            raise ValueError(f"output_stride must be one of {able} for backbone {name!r}; got {output_stride}")
        self.channels = self.features.feature_info.channels()[-1]
        self.channels_last = getattr(self.features, "output_fmt", None) == "NHWC"

    def forward(self, images):
        features = self.features(images)[0]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def _features(name, output_stride, **options):
    """The timm model cut after its last feature map, or None where it has none at this output stride."""
    options |= {"features_only": True, "out_indices": (-1,)}
    try:
        features = timm.create_model(name, output_stride=output_stride, **options)
    except (AssertionError, NotImplementedError, ValueError):
        return None
    except TypeError:  # the architecture has a fixed stride, and no such argument
        try:
            features = timm.create_model(name, **options)
        except (RuntimeError, TypeError):  # it has no feature maps at all
            return None
    return features if features.feature_info.reduction()[-1] == output_stride else None
