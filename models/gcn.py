"""Global convolutional network. C. Peng et al., "Large Kernel Matters: Improve Semantic Segmentation by Global Convolutional Network",
arXiv:1703.02719; facts from the paper and ZijunDeng/pytorch-semantic-segmentation."""

import torch
from torch import nn

from .backbones import LEVELS, Backbone
from .layers import BilinearDeconvolution, normal_
from .model import Output, SegmentationModel


class GlobalConvolution(nn.Module):
    """A k x k neighbourhood from k x 1 then 1 x k, plus 1 x k then k x 1 (Fig. 2 B); no normalisation, no ReLU."""

    def __init__(self, in_channels, channels, kernel_size):
        super().__init__()
        tall, wide = (kernel_size, 1), (1, kernel_size)
        self.left = nn.Sequential(*self._pair(in_channels, channels, tall, wide))
        self.right = nn.Sequential(*self._pair(in_channels, channels, wide, tall))

    @staticmethod
    def _pair(in_channels, channels, first, second):
        yield nn.Conv2d(in_channels, channels, first, padding=(first[0] // 2, first[1] // 2))
        yield nn.Conv2d(channels, channels, second, padding=(second[0] // 2, second[1] // 2))

    def forward(self, features):
        return self.left(features) + self.right(features)


class BoundaryRefinement(nn.Module):
    """x + conv(relu(conv(x))), 3x3 (Fig. 2 C)."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class GCN(SegmentationModel):
    """Score maps from large separable kernels on a ResNet's maps at strides 4 to 32, refined at boundaries, upsampled and summed. Logits have
    the images' size.

    60,688,084 parameters with 21 classes, kernel_size 7: 59,369,620; learned upsampling adds five times 16 C².

    Args:
        backbone: any timm backbone with maps at these strides, default "resnet152".
        kernel_size: odd, default 15.
        learn_upsampling: dense 4x4 deconvolutions that are trained (default False: bilinear and fixed).
        pretrained: load the backbone's weights through timm (default False).
    """

    multiple = 32

    def __init__(
        self,
        num_classes,
        in_channels=3,
        backbone="resnet152",
        kernel_size=15,
        learn_upsampling=False,
        pretrained=False,
    ):
        super().__init__(num_classes, in_channels)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd int; got {kernel_size!r}")
        encoder = Backbone(backbone, 32, in_channels, pretrained, LEVELS)
        self.scores = nn.ModuleList(
            nn.Sequential(GlobalConvolution(channels, num_classes, kernel_size), BoundaryRefinement(num_classes))
            for channels in encoder.channels
        )
        self.upsample = nn.ModuleList(
            BilinearDeconvolution(num_classes, 4, 2, padding=1, learned=learn_upsampling) for _ in range(5)
        )
        self.refine = nn.ModuleList(BoundaryRefinement(num_classes) for _ in range(5))
        for module in (*self.scores.modules(), *self.refine.modules()):
            if isinstance(module, nn.Conv2d):
                normal_(module, 0.01)
        self.encoder = encoder

    def segment(self, images):
        maps = [score(features) for score, features in zip(self.scores, self.encoder(images), strict=True)]
        x = maps.pop()
        for upsample, refine in zip(self.upsample, self.refine, strict=True):
            x = upsample(x)
            x = refine(x + maps.pop() if maps else x)
        return Output(x)
