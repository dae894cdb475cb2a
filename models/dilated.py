"""Dilated front end and context module. F. Yu, V. Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", arXiv:1511.07122; facts from
the authors' code (fyu/dilation)."""

import torch
from torch import nn

from .backbones import create_vgg, fully_convolutional, vgg_stages
from .layers import Classifier, normal_
from .model import Output, SegmentationModel, check_all_positive, check_one_of, mirror


class FrontEnd(SegmentationModel):
    """VGG16 without its last two pooling layers: conv5 at rate 2, fc6 at rate 4, no padding anywhere. Images are mirrored at their borders
    instead, 186 pixels a side; logits are at stride 8.

    134,346,581 parameters with 21 classes.

    Args:
        backbone: a VGG of timm, default "vgg16".
        pretrained: timm's weights of the whole classifier, fc6 and fc7 included (default False).
    """

    def __init__(self, num_classes, in_channels=3, backbone="vgg16", pretrained=False):
        super().__init__(num_classes, in_channels)
        vgg = create_vgg(backbone, in_channels, pretrained)
        layers = []
        self.margin = 96  # what unpadded convolutions take from each side: first fc6's
        for pools, stage in enumerate(vgg_stages(vgg.features)):
            for module in stage:
                if isinstance(module, nn.Conv2d):
                    rate = 2 if pools == 4 else 1
                    module.padding, module.dilation = (0, 0), (rate, rate)
                    self.margin += rate * 2 ** min(pools, 3)
                if not isinstance(module, nn.MaxPool2d) or pools < 3:
                    layers.append(module)
        self.features = nn.Sequential(*layers)
        self.fc = fully_convolutional(vgg)
        self.fc[0].dilation = (4, 4)
        self.final = normal_(Classifier(vgg.pre_logits.fc2.out_channels, num_classes), 0.001)
        self.context = nn.Identity()

    def segment(self, images):
        height, width = ((side + 7) // 8 * 8 - side for side in images.shape[2:])
        images = mirror(images, self.margin, self.margin + height, self.margin, self.margin + width)
        return Output(self.context(self.final(self.fc(self.features(images)))))


class Context(nn.Module):
    """The context module: 3x3 convolutions at growing rates and a 1x1, which start as the identity (Table 1, Eq. 5).

    The scores are padded with zeros once, by the sum of the rates (33), as in the released VOC network. Identity weights are one over the
    inputs of a class, so that every layer keeps the scores (Eq. 5 has one over the outputs, with which only the whole module does); the noise is
    divided by the width's multiple of the classes.

    Args:
        classes: of the scores.
        large: widths 2C, 2C, 4C, 8C, 16C, 32C, 32C instead of C (default False).
        rates: of the 3x3 convolutions, default (1, 1, 2, 4, 8, 16, 1); Cityscapes has (1, 1, 2, 4, 8, 16, 32, 64, 1).
        noise: standard deviation of the other weights, default 0.01.
    """

    def __init__(self, classes, large=False, rates=(1, 1, 2, 4, 8, 16, 1), noise=0.01):
        super().__init__()
        check_all_positive("rates", rates)
        multiples = [min(2 ** max(index, 1), 32) if large else 1 for index in range(len(rates))]
        layers, before = [nn.ZeroPad2d(sum(rates))], 1
        for rate, multiple in zip(rates, multiples, strict=True):
            convolution = nn.Conv2d(before * classes, multiple * classes, 3, dilation=rate)
            layers += [identity_(convolution, classes, noise), nn.ReLU()]
            before = multiple
        final = identity_(nn.Conv2d(before * classes, classes, 1), classes, noise)
        self.layers = nn.Sequential(*layers, final)

    def forward(self, scores):
        return self.layers(scores)


@torch.no_grad()
def identity_(convolution, groups, noise):
    """Fills a convolution so that each of `groups` equal groups of outputs is the mean of the same group of inputs, noise elsewhere."""
    outputs, inputs, *size = convolution.weight.shape
    nn.init.normal_(convolution.weight, std=noise * groups / outputs)
    nn.init.zeros_(convolution.bias)
    group_of = [torch.arange(channels) * groups // channels for channels in (outputs, inputs)]
    same = group_of[0][:, None] == group_of[1]
    centre = convolution.weight[:, :, size[0] // 2, size[1] // 2]
    centre[same] = groups / inputs
    return convolution


class FrontEndContext(FrontEnd):
    """The front end with the context module on its scores: 134,374,973 parameters with 21 classes, 141,149,720 with the large module.

    Args:
        backbone: a VGG of timm, default "vgg16".
        context: "basic" (default) or "large".
        rates: of the context's 3x3 convolutions, default (1, 1, 2, 4, 8, 16, 1); Cityscapes: (1, 1, 2, 4, 8, 16, 32, 64, 1).
        noise: standard deviation of the context's noise, default 0.01.
        pretrained: timm's weights of the whole classifier (default False).
    """

    def __init__(
        self,
        num_classes,
        in_channels=3,
        backbone="vgg16",
        context="basic",
        rates=(1, 1, 2, 4, 8, 16, 1),
        noise=0.01,
        pretrained=False,
    ):
        check_one_of("context", context, ("basic", "large"))
        super().__init__(num_classes, in_channels, backbone, pretrained)
        self.context = Context(num_classes, context == "large", rates, noise)

    def adapt_state_dict(self, state_dict):
        """Lets a front end's checkpoint be the start: the context begins as the identity."""
        if any(key.startswith("context.") for key in state_dict):
            return state_dict
        return state_dict | {key: value for key, value in self.state_dict().items() if key.startswith("context.")}
