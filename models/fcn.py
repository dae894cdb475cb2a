"""FCN. J. Long, E. Shelhamer, T. Darrell, "Fully Convolutional Networks for Semantic Segmentation", arXiv:1411.4038; facts from the
authors' code (shelhamer/fcn.berkeleyvision.org)."""

from torch import nn

from segops import max_pool2d_with_offsets

from .backbones import create_vgg, fully_convolutional, vgg_stages
from .layers import BilinearDeconvolution, Classifier
from .model import Output, SegmentationModel, crop


class FCN(SegmentationModel):
    """VGG16 with its fully connected layers as convolutions, scores upsampled by bilinear deconvolutions and fused with those of pool4
    and pool3. Logits have the images' size.

    conv1_1 pads by 100, fc6 not at all; score convolutions start at zero. 134,346,581, 134,357,354 and 134,362,751 parameters with 21 classes.

    Args:
        output_stride: 32, 16 or 8: of the finest scores that are fused. fcn32s, fcn16s and fcn8s fix it.
        backbone: a VGG of timm, default "vgg16".
        at_once: scale pool4 by 0.01 and pool3 by 0.0001, as the authors do where all scores are trained at once (default False: a
            checkpoint of the next coarser network is the start).
        learn_upsampling: dense deconvolutions that are trained (default False: bilinear and fixed).
        pretrained: timm's weights of the whole classifier, fc6 and fc7 included (default False).
    """

    def __init__(
        self,
        num_classes,
        in_channels=3,
        backbone="vgg16",
        output_stride=8,
        at_once=False,
        learn_upsampling=False,
        pretrained=False,
    ):
        super().__init__(num_classes, in_channels)
        self.output_stride = output_stride
        vgg = create_vgg(backbone, in_channels, pretrained)
        vgg.features[0].padding = (100, 100)
        stages = [stage[:-1] for stage in vgg_stages(vgg.features)]
        self.stages = nn.ModuleList(stages)
        self.fc = fully_convolutional(vgg)
        self.scales = (0.01, 0.0001) if at_once else (1.0, 1.0)

        self.score_fr = score(vgg.pre_logits.fc2.out_channels, num_classes)
        if output_stride <= 16:
            self.score_pool4 = score(stages[4][0].in_channels, num_classes)
            self.upscore2 = BilinearDeconvolution(num_classes, 4, 2, learned=learn_upsampling)
        if output_stride == 8:
            self.score_pool3 = score(stages[3][0].in_channels, num_classes)
            self.upscore_pool4 = BilinearDeconvolution(num_classes, 4, 2, learned=learn_upsampling)
        self.upscore = BilinearDeconvolution(num_classes, 2 * output_stride, output_stride, learned=learn_upsampling)

    def segment(self, images):
        pools, x = [], images
        for stage in self.stages:
            x, _ = max_pool2d_with_offsets(stage(x), 2)  # as Caffe pools: windows at the border are clipped
            pools.append(x)
        _, _, pool3, pool4, pool5 = pools
        scores, offset = self.score_fr(self.fc(pool5)), 19
        if self.output_stride <= 16:
            scores, offset = self.upscore2(scores), 27
            scores = scores + crop(self.score_pool4(pool4 * self.scales[0]), 5, scores.shape[2:])
        if self.output_stride == 8:
            scores, offset = self.upscore_pool4(scores), 31
            scores = scores + crop(self.score_pool3(pool3 * self.scales[1]), 9, scores.shape[2:])
        return Output(crop(self.upscore(scores), offset, images.shape[2:]))

    def adapt_state_dict(self, state_dict):
        """Lets a checkpoint of the next coarser network be the start: scores that it lacks begin at zero, its last upsampling has another size."""
        own = self.state_dict()
        missing = {key for key in own if key not in state_dict}
        if not missing or not all(key.startswith(("score_pool", "upscore")) for key in missing):
            return state_dict
        begun = missing | ({"upscore.weight"} & own.keys())
        return state_dict | {key: own[key] for key in begun}


def score(in_channels, num_classes):
    convolution = Classifier(in_channels, num_classes)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution
