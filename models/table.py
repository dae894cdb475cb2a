"""The table of `python -m segops models`."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from segops.nn import PyramidAtrousConv2d

from .discriminators import Discriminator
from .registry import create_model, list_models, model_info

SIDE = 513  # of the images that multiply-adds are counted for


def multiply_adds(name, num_classes=21, side=SIDE):
    """Multiply-adds of the default model for one image of side x side, from shapes alone. A pyramid atrous convolution counts as the one
    convolution that it costs here, whatever its rates."""
    with torch.device("meta"):
        model = create_model(name, num_classes).eval()
        inputs = [torch.empty(1, channels, side, side) for channels in (3, num_classes)]
    spared = []
    for module in model.modules():
        if isinstance(module, PyramidAtrousConv2d):
            module.register_forward_hook(lambda pac, inputs, _: spared.append(_spared(pac, inputs[0])))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs if isinstance(model, Discriminator) else inputs[:1])
    return counter.get_total_flops() // 2 - sum(spared)


def _spared(pac, features):
    """What the reference, which runs on shapes alone, has more than one convolution."""
    images, _, height, width = features.shape
    return (len(pac.rates) - 1) * pac.weight.numel() * images * height * width


def lines():
    """The table, line by line."""
    yield f"{'model':<20}{'backbone':<12}{'parameters':>12}{f'GMACs at {SIDE}x{SIDE}':>20}  paper"
    for name in list_models():
        info = model_info(name)
        gmacs = multiply_adds(name) / 1e9
        yield f"{name:<20}{info.backbone or 'its own':<12}{info.parameters:>12,}{gmacs:>20.1f}  {info.paper}"
    yield "21 classes; a multiply-add counts once, a pyramid atrous convolution as one convolution"
