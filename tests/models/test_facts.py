"""What the papers and their reference code say of each model. Big networks are built without memory, on the meta device."""

import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from segops.models import CRF_SETTINGS, create_model, from_crfasrnn, from_torchvision, list_models, model_info
from segops.models.backbones import Backbone
from segops.models.contexts import AtrousSpatialPyramidPooling, PyramidAtrousBlock, PyramidAtrousContext
from segops.models.dilated import Context
from segops.models.layers import BatchNorm2d, BilinearDeconvolution, Classifier, separable_conv
from segops.models.model import mirror
from segops.models.unet import RecurrentConv, UNet
from torch import nn

import segops

from .small import VGG_CONFIG, Case, assert_same, perturbed

VGG, RESNET = {"backbone": "vggtiny_bn"}, {"backbone": "resnettiny"}


def meta(name, num_classes=21, **options):
    with torch.device("meta"):
        return create_model(name, num_classes, **options)


def small(name, **options):
    return perturbed(Case(name, options).build())


def of(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


def convolutions(module):
    return of(module, nn.Conv2d)


def rates(module, size=3):
    return [c.dilation[0] for c in convolutions(module) if c.kernel_size == (size, size)]


def outputs_of(module, run):
    """What a module returns while `run` does."""
    seen = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run()
    handle.remove()
    return seen


# Parameters, with 21 classes unless said.

PARAMETERS = [
    ("fcn32s", {}, 134_346_581),
    ("fcn16s", {}, 134_357_354),
    ("fcn8s", {}, 134_362_751),
    ("fcn8s", {"learn_upsampling": True}, 134_489_759),
    ("segnet", {}, 29_455_125),
    ("segnet", {"num_classes": 11}, 29_449_355),
    ("segnet_basic", {"num_classes": 11}, 1_416_587),
    ("segnet_aspp", {"num_classes": 34}, 30_257_634),
    ("dilated_frontend", {}, 134_346_581),
    ("dilated_context", {}, 134_346_581 + 28_392),
    ("dilated_context", {"context": "large"}, 134_346_581 + 6_803_139),
    ("deeplabv1_largefov", {}, 20_505_429),
    ("deeplabv2", {}, 44_048_532),
    ("deeplabv2", {"backbone": "vgg16"}, 37_877_652),
    ("deeplabv3", {}, 58_040_661),
    ("deeplabv3", {"head": "torchvision"}, 58_630_997),
    ("deeplabv3", {"head": "torchvision", "aux": True}, 60_996_202),
    ("deeplabv3_cascaded", {}, 82_706_517),
    ("deeplabv3plus", {}, 41_055_413),
    ("deeplabv3plus", {"separable": False}, 53_570_741),
    ("pacnet", {}, 48_285_013),
    ("refinenet", {}, 118_052_437),
    ("refinenet", {"crp_blocks": 2}, 109_794_901),
    ("pspnet", {}, 46_716_373),
    ("pspnet", {"aux": True}, 46_716_373 + 2_365_205),
    ("pspnet", {"backbone": "resnet101s"}, 65_708_501),
    ("gcn", {}, 60_688_084),
    ("gcn", {"kernel_size": 7}, 59_369_620),
    ("gcn", {"learn_upsampling": True}, 60_688_084 + 5 * 16 * 21**2),
    ("unet", {}, 31_033_045),
    ("unet", {"num_classes": 2, "in_channels": 1}, 31_030_658),
    ("r2unet", {"num_classes": 1}, 39_091_393),
    ("r2unet", {"num_classes": 34}, 39_093_538),
    ("r2unet", {"num_classes": 34, "t": 3}, 39_093_538),
    ("fcn_discriminator", {"decoder": "bilinear", "conditioned": False}, 2_783_169),
    ("fcn_discriminator", {"decoder": "bilinear", "num_classes": 4}, 2_768_833),
    ("patchgan", {"num_classes": 3}, 2_768_705),
]


@pytest.mark.parametrize("name, options, expected", PARAMETERS)
def test_parameters(name, options, expected):
    if options:
        assert sum(p.numel() for p in meta(name, **options).parameters() if p.requires_grad) == expected
    else:
        assert model_info(name).parameters == expected


def test_parameters_of_the_contexts():
    with torch.device("meta"):
        aspp, pac = AtrousSpatialPyramidPooling(2048), PyramidAtrousContext(2048)
    assert sum(p.numel() for p in aspp.parameters()) == 15_535_104
    assert sum(p.numel() for p in pac.parameters()) == 5_768_704


def test_model_info():
    info = model_info("deeplabv3plus")
    assert (info.name, info.backbone, info.output_stride) == ("deeplabv3plus", "xception65", 16) and "1802.02611" in info.paper
    assert [model_info(name).output_stride for name in ("fcn32s", "fcn8s", "pspnet", "pacnet")] == [32, 8, 8, 16]
    assert model_info("unet").backbone is None
    assert len(list_models()) == 25


# Backbones.


@pytest.mark.parametrize(
    "backbone, output_stride",
    [
        ("mobilenetv3_small_050", 8),
        ("mobilenetv3_small_050", 32),
        ("efficientnet_b0", 16),
        ("convnext_atto", 32),
        ("vgg11", 16),
        ("vggtiny", 8),
        ("vggtiny", 32),
        ("test_resnet", 8),
        ("resnettiny", 16),
    ],
)
@torch.no_grad()
def test_backbones_at_output_strides(backbone, output_stride):
    model = create_model("pacnet", 5, backbone=backbone, output_stride=output_stride, channels=8).eval()
    assert model(torch.randn(1, 3, 65, 97)).logits.shape[2:] == (-(-65 // output_stride), -(-97 // output_stride))


@pytest.mark.parametrize("full_rate", [False, True])
@pytest.mark.parametrize("output_stride, rate3, rate4", [(8, 2, 4), (16, 1, 2), (32, 1, 1)])
def test_rates_of_a_dilated_resnet(output_stride, rate3, rate4, full_rate):
    """The first block of a stage has the rate of the stage before, or its own."""
    model = meta("deeplabv3", backbone="resnet50", output_stride=output_stride, full_rate=full_rate, multi_grid=None)
    stages = model.encoder.features
    first3, first4 = (rate3, rate4) if full_rate else (1, rate3)
    assert rates(stages.layer1) + rates(stages.layer2) == 7 * [1]
    assert rates(stages.layer3) == [first3] + 5 * [rate3]
    assert rates(stages.layer4) == [first4] + 2 * [rate4]


def test_both_rules_load_the_same_weights_and_differ():
    model = small("deeplabv3", **RESNET, output_stride=8).eval()
    other = small("deeplabv3", **RESNET, output_stride=8, full_rate=True).eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    one, two = model(images).logits, other(images).logits
    assert (one - two).norm() > 0.01 * one.norm()


@pytest.fixture
def vgg_weights(tmp_path, monkeypatch):
    """timm's own VGG, whose weights are what `pretrained=True` loads."""
    vgg = perturbed(timm.create_model("vggtiny"))
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    monkeypatch.setitem(VGG_CONFIG, "file", str(tmp_path / "vgg.pth"))
    return vgg


@pytest.mark.parametrize(
    "name", ["fcn32s", "fcn8s", "dilated_frontend", "dilated_context", "segnet", "segnet_aspp", "deeplabv2", "unet"]
)
def test_weights_of_the_classifier_are_the_start(name, vgg_weights):
    whole = name.startswith(("fcn", "dilated"))  # these take fc6 and fc7 too
    expected = convolutions(vgg_weights.features) + (convolutions(vgg_weights.pre_logits) if whole else [])
    model = create_model(name, 5, backbone="vggtiny", pretrained=True)
    assert len(expected) == (8 if whole else 6)
    for ours, theirs in zip(convolutions(model), expected, strict=False):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_weights_of_the_classifier_adapt_to_more_channels(vgg_weights):
    model = create_model("fcn8s", 5, in_channels=6, backbone="vggtiny", pretrained=True)
    first, theirs = (convolutions(m)[0].weight for m in (model, vgg_weights))
    torch.testing.assert_close(first, theirs.repeat(1, 2, 1, 1) / 2)  # the same answer to an image given twice


# FCN.


def bilinear_weight(channels, factor):
    """A dense kernel, bilinear on the diagonal."""
    line = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
    return torch.eye(channels)[:, :, None, None] * torch.outer(line, line)


def plain_fcn(model, images, output_stride):
    """Forward as in the authors' prototxt, in PyTorch's ops."""
    x, pools = images, []
    for index, stage in enumerate(model.stages):
        for module in stage:
            x = F.conv2d(x, module.weight, module.bias, padding=99 + 1) if module is model.stages[0][0] else module(x)
        x = F.max_pool2d(x, 2, ceil_mode=True)
        pools.append(x)
        assert index < 5
    fc6, fc7 = convolutions(model.fc)
    assert fc6.padding == (0, 0) and fc6.kernel_size == (7, 7) and fc7.kernel_size == (1, 1)
    scores = model.score_fr(fc7(fc6(x).relu()).relu())
    if output_stride < 32:
        scores = F.conv_transpose2d(scores, bilinear_weight(5, 2), stride=2)
        scores = scores + model.score_pool4(pools[3])[:, :, 5 : 5 + scores.shape[2], 5 : 5 + scores.shape[3]]
    if output_stride == 8:
        scores = F.conv_transpose2d(scores, bilinear_weight(5, 2), stride=2)
        scores = scores + model.score_pool3(pools[2])[:, :, 9 : 9 + scores.shape[2], 9 : 9 + scores.shape[3]]
    offset = {32: 19, 16: 27, 8: 31}[output_stride]
    upscored = F.conv_transpose2d(scores, bilinear_weight(5, output_stride), stride=output_stride)
    return upscored[:, :, offset : offset + images.shape[2], offset : offset + images.shape[3]]


FCNS = pytest.mark.parametrize("output_stride", [32, 16, 8])


@FCNS
@torch.no_grad()
def test_fcn_is_the_authors_network(output_stride):
    model = small(f"fcn{output_stride}s", **VGG).eval()
    images = torch.randn(1, 3, 75, 50)
    expected = plain_fcn(model, images, output_stride)
    assert expected.shape == (1, 5, 75, 50)
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@FCNS
@torch.no_grad()
def test_fcn_crops_in_the_middle(output_stride):
    """With symmetric filters, at a size whose pooling windows lie symmetrically, mirrored images have mirrored logits."""
    model = small(f"fcn{output_stride}s", **VGG).eval()
    for convolution in convolutions(model):
        convolution.weight.copy_((convolution.weight + convolution.weight.flip(3)) / 2)
    images = torch.randn(1, 3, 58, 58)  # 256 with its padding
    torch.testing.assert_close(model(images.flip(3)).logits, model(images).logits.flip(3), rtol=1e-4, atol=1e-4)


@FCNS
def test_fcn_starts_at_zero(output_stride):
    model = create_model(f"fcn{output_stride}s", 5, **VGG)
    assert not model(torch.randn(1, 3, 40, 40)).logits.any()
    scores = [m for name, m in model.named_children() if name.startswith("score")]
    assert len(scores) == {32: 1, 16: 2, 8: 3}[output_stride]
    assert not any(p.any() for score in scores for p in score.parameters())


def test_fcn_convolutionalises_vgg16():
    model = meta("fcn8s")
    padding = [c.padding[0] for stage in model.stages for c in convolutions(stage)]
    assert padding == [100] + 12 * [1]
    assert [c.weight.shape for c in convolutions(model.fc)] == [(4096, 512, 7, 7), (4096, 4096, 1, 1)]
    assert [d.p for d in of(model, nn.Dropout)] == [0.5, 0.5]
    kernels = [(d.kernel_size, d.stride) for d in of(model, BilinearDeconvolution)]
    assert sorted(kernels) == [(4, 2), (4, 2), (16, 8)]
    assert [d.kernel_size for d in of(meta("fcn32s"), BilinearDeconvolution)] == [64]


@torch.no_grad()
def test_fcn_at_once_scales_the_pools():
    model, plain = small("fcn8s", **VGG, at_once=True).eval(), small("fcn8s", **VGG).eval()
    plain.load_state_dict(model.state_dict())
    plain.score_pool4.weight *= 0.01
    plain.score_pool3.weight *= 0.0001
    images = torch.randn(1, 3, 40, 40)
    assert_same(model(images), plain(images))


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_bilinear_deconvolution(learned):
    deconvolution = BilinearDeconvolution(3, 8, 4, padding=2, learned=learned)
    x = torch.randn(2, 3, 5, 6)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # beyond the outer centres one extrapolates
    torch.testing.assert_close(deconvolution(x)[inside], F.interpolate(x, scale_factor=4, mode="bilinear")[inside])
    assert [tuple(p.shape) for p in deconvolution.parameters()] == ([(3, 3, 8, 8)] if learned else [])
    assert list(deconvolution.state_dict()) == (["weight"] if learned else [])


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_finer_fcns_start_from_coarser_ones(learned, tmp_path):
    options = VGG | {"learn_upsampling": learned}
    images = torch.randn(1, 3, 40, 56)
    coarse = small("fcn32s", **options).eval()
    for name, fresh in (("fcn16s", "score_pool4"), ("fcn8s", "score_pool3")):
        torch.save(coarse.state_dict(), tmp_path / "coarse.pt")
        fine = create_model(name, 5, **options, checkpoint=tmp_path / "coarse.pt").eval()
        assert not any(p.any() for p in fine.get_submodule(fresh).parameters())
        begun = create_model(name, 5, **options).state_dict()
        for key, value in fine.state_dict().items():
            new = key == "upscore.weight" or key not in coarse.state_dict()  # the last upsampling has another size
            assert torch.equal(value, begun[key] if new else coarse.state_dict()[key])
        scores = [outputs_of(model.score_fr, lambda model=model: model(images))[0] for model in (coarse, fine)]
        assert torch.equal(*scores) and scores[0].any()
        coarse = perturbed(fine)


# SegNet.


def plain_unpooling(model, images):
    x, places = images, []
    for stage in model.encoder:
        x = stage(x)
        shape = x.shape
        x, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        places.append((index, shape))
    for stage in model.decoder:
        index, shape = places.pop()
        x = stage(F.max_unpool2d(x, index, 2, output_size=shape[2:]))
    return model.head(x)


@torch.no_grad()
def test_segnet_unpools_to_the_places_of_the_maxima():
    model = small("segnet", **VGG).eval()
    images = torch.randn(2, 3, 49, 66)
    expected = plain_unpooling(model, images)
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_segnet_basic_normalises_the_image():
    model = small("segnet_basic", channels=8).eval()
    images = 100 * torch.randn(2, 3, 49, 66)
    expected = plain_unpooling(model, nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)(images))
    assert_same(model(images).logits, expected)
    assert not torch.allclose(expected, plain_unpooling(model, images), rtol=0.01)


def test_layers_of_segnet():
    model = meta("segnet")
    decoder = [c.out_channels for stage in model.decoder for c in convolutions(stage)]
    assert decoder == [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64]
    assert type(model.head) is nn.Conv2d and model.head.out_channels == 21  # nothing behind it
    assert len(convolutions(model)) == 26 and all(c.kernel_size == (3, 3) and c.bias is not None for c in convolutions(model))
    assert len(of(model, nn.BatchNorm2d)) == len(of(model, nn.ReLU)) == 25


def test_layers_of_segnet_basic():
    model = meta("segnet_basic")
    assert [c.kernel_size for c in convolutions(model)] == 8 * [(7, 7)] + [(1, 1)]
    assert [c.out_channels for c in convolutions(model)] == 8 * [64] + [21]
    assert len(of(model.encoder, nn.ReLU)) == 4 and not of(model.decoder, nn.ReLU)
    assert len(of(model, nn.BatchNorm2d)) == 8


def test_segnet_aspp_sees_the_full_resolution():
    model = small("segnet_aspp", **VGG, channels=8).eval()
    aspp = model.head[0]
    assert isinstance(aspp, AtrousSpatialPyramidPooling) and rates(aspp) == [6, 12, 18]
    assert outputs_of(model.decoder[-1], lambda: model(torch.randn(1, 3, 33, 50)))[0].shape == (1, 8, 33, 50)
    assert convolutions(meta("segnet_aspp").head)[0].in_channels == 64


# Dilated front end and context.


def test_layers_of_the_front_end():
    model = meta("dilated_frontend")
    assert model.margin == 186
    assert all(c.padding == (0, 0) for c in convolutions(model))
    assert [c.dilation[0] for c in convolutions(model)] == 10 * [1] + 3 * [2] + [4, 1, 1]
    assert [p.kernel_size for p in of(model, nn.MaxPool2d)] == [2, 2, 2]
    assert convolutions(model.fc)[0].weight.shape == (4096, 512, 7, 7)
    final = create_model("dilated_frontend", 64, backbone="vggtiny").final.weight
    assert final.std().item() == pytest.approx(0.001, rel=0.05)


@torch.no_grad()
def test_front_end_mirrors_what_its_convolutions_take():
    """The unpadded network on the mirrored image gives the same logits, and exactly as many."""
    model = small("dilated_frontend", **VGG).eval()
    images = torch.randn(1, 3, 160, 168)
    mirrored = F.pad(images, 4 * (model.margin,), mode="reflect")
    assert_same(model(images).logits, model.final(model.fc(model.features(mirrored))))


@pytest.mark.parametrize("channels", [1, 3])
def test_mirrored_images_keep_their_memory_format(channels):
    """Crops and slices of larger buffers too."""
    whole = torch.randn(2, 4, 12, 13)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = whole.contiguous(memory_format=layout)[:, :channels, 2:9, 1:11]
        expected = torch.contiguous_format if channels == 1 else layout
        mirrored = mirror(images, 2, 3, 1, 4)
        assert torch.equal(mirrored, F.pad(images, (1, 4, 2, 3), mode="reflect"))
        assert mirrored.stride() == mirrored.contiguous(memory_format=expected).stride()


@pytest.mark.parametrize("large", [False, True])
@torch.no_grad()
def test_context_starts_as_the_identity(large):
    context = Context(5, large, noise=0)
    scores = torch.rand(2, 5, 9, 12)
    torch.testing.assert_close(context(scores), scores)
    assert not context(-scores).any()  # a ReLU behind every convolution but the last
    noisy = Context(5, large)(scores)
    assert 0 < (noisy - scores).norm() < scores.norm()


def test_layers_of_the_context():
    basic, large, cityscapes = Context(21), Context(21, large=True), Context(21, rates=(1, 1, 2, 4, 8, 16, 32, 64, 1))
    assert rates(basic) == rates(large) == [1, 1, 2, 4, 8, 16, 1] and rates(cityscapes) == [1, 1, 2, 4, 8, 16, 32, 64, 1]
    assert [c.kernel_size for c in convolutions(basic)] == 7 * [(3, 3)] + [(1, 1)]
    assert [c.out_channels for c in convolutions(basic)] == 8 * [21]
    assert [c.out_channels // 21 for c in convolutions(large)] == [2, 2, 4, 8, 16, 32, 32, 1]
    assert type(basic.layers[-1]) is nn.Conv2d and len(of(basic, nn.ReLU)) == 7


@torch.no_grad()
def test_context_starts_from_a_front_end(tmp_path):
    front = small("dilated_frontend", **VGG).eval()
    torch.save(front.state_dict(), tmp_path / "front.pt")
    model = create_model("dilated_context", 5, **VGG, noise=0, checkpoint=tmp_path / "front.pt").eval()
    images = torch.randn(1, 3, 40, 56)
    assert_same(model(images).logits, front(images).logits.relu())


# DeepLab.


def test_layers_of_deeplab_v1():
    model = meta("deeplabv1_largefov")
    pools = of(model.encoder, nn.MaxPool2d)
    assert [(p.kernel_size, p.stride, p.padding) for p in pools] == 3 * [(3, 2, 1)] + 2 * [(3, 1, 1)]
    assert [c.dilation[0] for c in convolutions(model.encoder)] == 10 * [1] + 3 * [2]
    fc6, fc7, _ = convolutions(model.head)
    assert fc6.weight.shape == (1024, 512, 3, 3) and fc6.dilation == (12, 12) and fc7.weight.shape == (1024, 1024, 1, 1)
    pool = model.context
    assert isinstance(pool, nn.AvgPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (3, 1, 1)


def test_deeplab_v1_subsamples_the_classifier(vgg_weights):
    fc6, fc7 = convolutions(vgg_weights.pre_logits)
    head = create_model("deeplabv1_largefov", 5, backbone="vggtiny", channels=16, pretrained=True).head
    kept = torch.stack([(fc6.bias == bias).nonzero().squeeze() for bias in head[0].bias])
    assert kept[0] == 0 and kept[-1] == 63 and set(kept.diff().tolist()) == {4, 5}  # evenly spread
    assert torch.equal(head[0].weight, fc6.weight[kept][:, :, [0, 3, 6]][..., [0, 3, 6]])  # every third position
    assert torch.equal(head[3].weight, fc7.weight[kept][:, kept]) and torch.equal(head[3].bias, fc7.bias[kept])
    branch = create_model("deeplabv2", 5, backbone="vggtiny", pretrained=True).head.branches[3]
    assert torch.isin(branch[0].bias, fc6.bias).all() and torch.isin(branch[3].bias, fc7.bias).all()


@pytest.mark.parametrize("output_stride, expected", [(8, [6, 12, 18, 24]), (16, [3, 6, 9, 12]), (32, [1, 3, 4, 6])])
def test_deeplab_v2_sums_four_classifiers(output_stride, expected):
    model = small("deeplabv2", **RESNET, output_stride=output_stride).eval()
    assert rates(model.head) == expected
    assert len(convolutions(model.head)) == 4 and len(of(model.head, nn.BatchNorm2d | nn.ReLU)) == 0
    images = torch.randn(1, 3, 64, 64)
    features = model.encoder(images)[-1]
    branches = [F.conv2d(features, c.weight, c.bias, 1, c.padding, c.dilation) for c in model.head.branches]
    assert_same(model(images).logits, sum(branches))


@torch.no_grad()
def test_deeplab_v2_takes_the_maximum_of_three_scales():
    model = small("deeplabv2", **RESNET, multi_scale=True).eval()
    single = small("deeplabv2", **RESNET).eval()
    single.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 65, 98)
    output = model(images)
    scales = [single(F.interpolate(images, size, mode="bilinear")).logits for size in ((65, 98), (49, 74), (33, 49))]
    assert_same(output.aux_logits, tuple(scales))
    resized = torch.stack([F.interpolate(logits, (9, 13), mode="bilinear") for logits in scales])
    assert_same(output.logits, resized.amax(0))


@pytest.mark.parametrize("output_stride, expected", [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_aspp_of_deeplab_v3(output_stride, expected):
    for name in ("deeplabv3", "deeplabv3plus"):
        context = meta(name, **RESNET, output_stride=output_stride).context
        assert rates(context) == expected and context.dropout.p == 0.1
        assert len(context.branches) == 4 and convolutions(context.branches[0])[0].kernel_size == (1, 1)


def test_heads_of_deeplab_v3():
    assert isinstance(meta("deeplabv3").head, nn.Conv2d)
    like_torchvision = meta("deeplabv3", head="torchvision", aux=True)
    assert [d.p for d in of(like_torchvision, nn.Dropout)] == [0.5, 0.1]


@pytest.mark.parametrize(
    "output_stride, full_rate, expected",
    [(16, False, [1, 4, 8]), (16, True, [2, 4, 8]), (8, False, [2, 8, 16]), (8, True, [4, 8, 16]), (32, True, [1, 2, 4])],
)
def test_multi_grid_multiplies_the_rate_of_the_last_stage(output_stride, full_rate, expected):
    model = meta("deeplabv3", backbone="resnet50", output_stride=output_stride, full_rate=full_rate)
    assert rates(model.encoder.features.layer4) == expected
    assert set(rates(model.encoder.features.layer3)[1:]) == {2 if output_stride == 8 else 1}


@pytest.mark.parametrize("output_stride, first", [(16, 4), (8, 8)])
def test_cascaded_blocks_double_their_rates(output_stride, first):
    model = meta("deeplabv3_cascaded", backbone="resnet50", output_stride=output_stride, full_rate=True)
    assert rates(model.encoder.features.layer4) == [first // 2, first, first // 2]
    assert [rates(stage) for stage in model.context] == [[r, 2 * r, r] for r in (first, 2 * first, 4 * first)]
    shapes = [p.shape for p in model.encoder.features.layer4[1].parameters()]
    assert all([p.shape for p in block[0].parameters()] == shapes for block in model.context)


@torch.no_grad()
def test_deeplab_v3plus_taps_xception_before_the_relu():
    model = create_model("deeplabv3plus", 5).eval()
    seen = []
    model.encoder.features["blocks_1"].stack.act3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    maps = model.encoder(torch.randn(1, 3, 33, 50))
    low = maps[0]
    assert low.shape == (1, 256, 9, 13) and low.min() < 0 < low.max()
    assert torch.equal(low, seen[0])
    assert maps[-1].shape == (1, 2048, 3, 4)
    assert len(of(model, nn.MaxPool2d)) == 0


def test_decoder_of_deeplab_v3plus():
    model = meta("deeplabv3plus")
    assert [c.weight.shape[:2] for c in convolutions(model.decoder.reduce)] == [(48, 256)]
    shapes = [tuple(c.weight.shape) for c in convolutions(model.decoder.refine)]
    assert shapes == [(304, 1, 3, 3), (256, 304, 1, 1), (256, 1, 3, 3), (256, 256, 1, 1)]
    assert model.head.kernel_size == (1, 1)
    assert len(of(model.decoder.refine, nn.BatchNorm2d)) == len(of(model.decoder.refine, nn.ReLU)) == 4


def test_separable_convolutions_start_truncated():
    depthwise, pointwise = convolutions(separable_conv(256, 256))
    for weight, std in ((depthwise.weight, 0.33), (pointwise.weight, 0.06)):
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.05)  # what cutting at two standard deviations leaves
    assert create_model("deeplabv3plus", 64, **RESNET).head.weight.std().item() == pytest.approx(0.01, rel=0.05)


# PAC.


def test_pacnet_is_the_papers():
    model = meta("pacnet")
    pac = model.context.pac.pac
    assert pac.rates == (1, 3, 5, 7, 9) and pac.merge == "sum" and pac.weight.shape == (256, 2048, 3, 3)
    assert model.head.weight.shape == (21, 3 * 256, 1, 1)  # no fuse convolution
    assert isinstance(model.context.fuse, nn.Identity)
    fused = meta("deeplabv3_pac")
    assert fused.head.weight.shape == (21, 256, 1, 1) and fused.context.fuse[0][0].weight.shape == (256, 768, 1, 1)
    assert rates(fused.encoder.features.layer4)[:3] == [1, 4, 8]  # deeplabv3 otherwise


@pytest.mark.parametrize("norm", ["post", "per_rate"])
@pytest.mark.parametrize("merge", ["sum", "concat"])
@torch.no_grad()
def test_pyramid_atrous_block_equals_its_branches(norm, merge):
    block = perturbed(PyramidAtrousBlock(16, 8, (1, 3, 5), merge, norm)).eval()
    x = torch.randn(1, 16, 7, 6)
    branches = [F.conv2d(x, block.pac.weight, padding=rate, dilation=rate) for rate in (1, 3, 5)]
    if norm == "per_rate":  # statistics of its own for each branch
        branches = block.rate_norm(torch.cat(branches, 1)).chunk(3, dim=1)
    if merge == "sum":
        expected = sum(branches) if norm == "per_rate" else block.norm(sum(branches))
    else:
        expected = block.norm(block.squeeze(torch.cat(list(branches), 1)))
    torch.testing.assert_close(block(x), expected.relu(), rtol=1e-4, atol=1e-5)
    assert len(of(block, nn.BatchNorm2d)) == (2 if norm == "per_rate" and merge == "concat" else 1)


def test_normalisation_of_one_value_keeps_the_statistics():
    norm = perturbed(BatchNorm2d(8)).train()
    before = [statistic.clone() for statistic in norm.buffers()]
    x = torch.randn(1, 8, 1, 1)
    out = norm(x)
    assert all(torch.equal(*pair) for pair in zip(norm.buffers(), before, strict=True)) and len(before) == 3
    expected = (x.flatten() - before[0]) / (before[1] + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(out.flatten(), expected)
    out.sum().backward()
    assert norm.weight.grad.any() and norm.bias.grad.any()
    norm(torch.randn(2, 8, 1, 1))
    assert not torch.equal(norm.running_mean, before[0]) and norm.num_batches_tracked == before[2] + 1


@pytest.mark.parametrize("channels", [2048, 4096])
def test_classifier_under_autocast(channels):
    """PyTorch 2.11 on CPUs with AMX: the gradients of wider 1x1 convolutions to few classes write past their memory in bfloat16."""
    classifier = Classifier(channels, 5)
    x = torch.randn(2, channels, 3, 3).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(x)
    assert logits.dtype == torch.bfloat16
    exact = F.conv2d(x.float(), classifier.weight, classifier.bias)
    if channels > 2048:
        assert torch.equal(logits, exact.bfloat16())
    torch.testing.assert_close(logits.float(), exact, rtol=0.02, atol=0.02)  # 8 bits of mantissa
    logits.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and classifier.weight.grad.dtype == torch.float32
    assert x.grad.isfinite().all() and classifier.weight.grad.isfinite().all()


# RefineNet, PSPNet, GCN.


def test_layers_of_refinenet():
    model = meta("refinenet")
    assert not of(model.blocks, nn.BatchNorm2d)
    assert [b.reduce.weight.shape[:2] for b in model.blocks] == [(512, 2048), (256, 1024), (256, 512), (256, 256)]
    for block in model.blocks:
        assert len(block.adapt) == 2 and len(block.refine) == 3 and len(block.pool.convolutions) == 4
        biased = {c for unit in (*block.adapt, *block.refine) for c in [unit.first]}
        assert all((c.bias is not None) == (c in biased) for c in convolutions(block))
    assert model.dropout.p == 0.5 and model.head.kernel_size == (3, 3) and model.head.bias is not None


def plain(convolution, x):
    return F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.padding)


@torch.no_grad()
def test_refinenet_block_is_the_papers():
    """Units, fusion with the coarser map, ReLU, chained pooling, units."""

    def units(x, several):
        for unit in several:
            x = x + plain(unit.second, plain(unit.first, x.relu()).relu())
        return x

    block = small("refinenet", **RESNET, channels=8).blocks[1]
    features, coarser = torch.randn(1, block.reduce.in_channels, 9, 7), torch.randn(1, 8, 5, 4)
    x = plain(block.fuse, units(plain(block.reduce, features), block.adapt))
    x = link = (x + F.interpolate(coarser, (9, 7), mode="bilinear", align_corners=True)).relu()
    for convolution in block.pool.convolutions:
        link = plain(convolution, F.max_pool2d(link, 5, 1, 2))
        x = x + link
    assert_same(block(features, coarser), plain(block.narrow, units(x, block.refine)))


def test_layers_of_pspnet():
    model = meta("pspnet", aux=True)
    features = model.encoder.features
    assert [c.out_channels for c in convolutions(features.conv1)] == [64, 64, 128]
    assert rates(features.layer3) == 6 * [2] and rates(features.layer4) == 3 * [4]
    bins = of(model.context, nn.AdaptiveAvgPool2d)
    assert [b.output_size for b in bins] == [1, 2, 3, 6]
    assert [c.weight.shape for c in convolutions(model.context)] == 4 * [(512, 2048, 1, 1)]
    assert convolutions(model.head)[0].weight.shape == (512, 4096, 3, 3)
    assert [d.p for d in of(model.head, nn.Dropout2d)] == [0.1] and model.align_corners
    assert convolutions(model.auxiliary)[0].weight.shape == (256, 1024, 3, 3)


def test_layers_of_gcn():
    model = meta("gcn")
    for score, width in zip(model.scores, (256, 512, 1024, 2048), strict=True):
        large = score[0]
        kernels = [(c.in_channels, c.kernel_size) for c in convolutions(large)]
        assert kernels == [(width, (15, 1)), (21, (1, 15)), (width, (1, 15)), (21, (15, 1))]
        assert not of(large, nn.BatchNorm2d | nn.ReLU)
    assert len(model.scores) + len(model.refine) == 9  # boundary refinements
    assert set(rates(model.encoder)) == {1}
    assert [d.stride for d in model.upsample] == 5 * [2]


@torch.no_grad()
def test_score_of_gcn_is_the_papers():
    """k x 1 then 1 x k, plus 1 x k then k x 1; refined by a residual branch."""
    large, refinement = score = small("gcn", **RESNET).scores[0]
    x = torch.randn(1, 16, 20, 18)
    (left, left2), (right, right2) = convolutions(large.left), convolutions(large.right)
    summed = plain(left2, plain(left, x)) + plain(right2, plain(right, x))
    expected = summed + plain(refinement.second, plain(refinement.first, summed).relu())
    assert expected.shape[2:] == x.shape[2:]
    assert_same(score(x), expected)


def test_auxiliary_heads_train_the_encoder():
    model = small("pspnet", **RESNET, channels=16, aux=True)
    model(torch.randn(2, 3, 33, 33)).aux_logits.square().sum().backward()
    assert all(p.grad.any() for p in model.encoder.features.layer3.parameters())
    assert not any(p.grad is not None for p in model.head.parameters())


# U-Net and its relatives.


def test_unet_sees_572_and_gives_388():
    model = meta("unet").eval()
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    head = outputs_of(model.head, lambda: model(torch.empty(1, 3, 388, 388, device="meta")))
    assert seen == [(572, 572)] and head[0].shape[2:] == (388, 388)
    for side in (1, 20, 389):
        seen.clear()
        assert model(torch.empty(1, 3, side, 388, device="meta")).logits.shape[2:] == (side, 388)
        assert (seen[0][0] - 124) % 16 == 0 and side + 184 <= seen[0][0] < side + 184 + 16


@torch.no_grad()
def test_unet_is_valid_inside():
    """Where the pooling windows fall alike, the network gives what it gives for a crop of the image without any mirroring."""
    model = small("unet", channels=4).eval()
    images = torch.randn(1, 3, 200, 200)
    crop = images[:, :, 4:192, 4:192]  # 4 + 92 is a multiple of 16
    inside = UNet.segment(model, crop).logits
    assert inside.shape[2:] == (4, 4)
    torch.testing.assert_close(model(images).logits[:, :, 96:100, 96:100], inside, rtol=1e-4, atol=1e-5)


def test_unet_crops_its_skips_in_the_middle():
    skip, x = torch.randn(1, 4, 9, 10), torch.randn(1, 4, 5, 6)
    joined = small("unet", channels=4).join(skip, x)
    assert torch.equal(joined, torch.cat([skip[:, :, 2:7, 2:8], x], 1))


def test_layers_of_unet():
    model = meta("unet")
    ups = of(model, nn.ConvTranspose2d)
    assert len(convolutions(model)) + len(ups) == 23 and all(c.padding == (0, 0) for c in convolutions(model))
    assert [(u.in_channels, u.out_channels) for u in ups] == [(1024, 512), (512, 256), (256, 128), (128, 64)]
    assert {u.kernel_size for u in ups} == {(2, 2)}
    assert not of(model, nn.BatchNorm2d) and [d.p for d in of(model, nn.Dropout)] == [0.5]
    first = create_model("unet", 5, channels=16).blocks[0][0].weight  # He: variance of two over what goes in
    assert first.std().item() == pytest.approx((2 / first[0].numel()) ** 0.5, rel=0.05)


@pytest.mark.parametrize("t", [0, 2, 3])
@torch.no_grad()
def test_recurrent_convolution_is_applied_once_more_than_t(t):
    layer = perturbed(RecurrentConv(4, t)).eval()
    x = torch.randn(1, 4, 6, 5)
    expected = layer.conv(x)
    for _ in range(t):
        expected = layer.conv(x + expected)
    torch.testing.assert_close(layer(x), expected)
    assert len(outputs_of(layer.conv, lambda: layer(x))) == t + 1
    assert len(convolutions(layer)) == len(of(layer, nn.BatchNorm2d)) == 1  # shared by the steps


def test_r2unet_adds_what_runet_does_not():
    with_residual, without = small("r2unet", channels=4).eval(), small("runet", channels=4).eval()
    without.load_state_dict(with_residual.state_dict())
    x = torch.randn(1, 4, 8, 8)
    one, other = with_residual.encoder.blocks[1], without.encoder.blocks[1]
    torch.testing.assert_close(one(x), other(x) + one.project(x))
    projections = [c.out_channels for c in convolutions(meta("r2unet").encoder) if c.kernel_size == (1, 1)]
    assert projections == [64, 128, 256, 512, 1024]


# JointSeg.


def test_jointseg_has_two_tasks():
    """Each loss trains the encoder and its own branch alone."""
    options = {"widths": (8, 16, 32), "blocks": 1, "image_classes": 3}
    images = torch.randn(2, 3, 32, 40)
    for field, idle, trained in (("logits", "classifier", "decoder"), ("class_logits", "decoder", "classifier")):
        model = small("jointseg", **options)
        getattr(model(images), field).square().sum().backward()
        assert all(p.grad is None for p in model.get_submodule(idle).parameters())
        assert all(p.grad is not None for branch in (trained, "encoder") for p in model.get_submodule(branch).parameters())
    assert model(images).class_logits.shape == (2, 3)


def test_jointseg_gates_the_levels_of_its_size_and_above():
    model = meta("jointseg")
    levels = [level if index == 0 else level[1] for index, level in enumerate(model.encoder)]
    assert [level[-1].merge[0].out_channels for level in levels] == [64, 128, 256, 512]
    assert [c[0].in_channels for c in model.decoder.fuse] == [256 + 64 + 128 + 256, 128 + 64 + 128, 64 + 64]
    assert [u.kernel_size for u in model.decoder.upsample] == 3 * [(2, 2)]
    strided = [c for c in convolutions(model.encoder) if c.stride == (2, 2)]
    assert len(strided) == 3 and not [p for p in of(model.encoder, nn.MaxPool2d) if p.stride != 1]


@torch.no_grad()
def test_jointseg_pools_the_levels_to_the_size_of_its_decoder():
    model = small("jointseg", widths=(8, 12, 16)).eval()
    seen = []
    for fuse in model.decoder.fuse:
        fuse.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 32, 40)
    model(images)
    maps, x = model.encode(images), None
    for step, (upsample, fuse) in enumerate(zip(model.decoder.upsample, model.decoder.fuse, strict=True)):
        x = upsample(maps[-1] if x is None else x)
        pooled = [F.adaptive_max_pool2d(level, x.shape[2:]) for level in maps[: 2 - step]]
        torch.testing.assert_close(seen[step], torch.cat([x, *pooled], dim=1))
        x = fuse(seen[step])


# Discriminators.


@pytest.mark.parametrize("field", [16, 70, 286])
def test_receptive_field_of_patchgan(field):
    """The pixels that one logit depends on."""
    model = small("patchgan", channels=4, receptive_field=field).double().eval()
    side = max(2 * field, 64)
    images = torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    logits = model(images, torch.rand(1, 5, side, side, dtype=torch.float64)).logits
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    rows, columns = images.grad[0].abs().sum(0).nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == field and columns.max() - columns.min() + 1 == field


def test_layers_of_patchgan():
    layers = list(meta("patchgan").layers)
    strided = [(c.out_channels, c.stride[0]) for c in layers if isinstance(c, nn.Conv2d)]
    assert strided == [(64, 2), (128, 2), (256, 2), (512, 1), (1, 1)]
    pairs = zip(layers, [*layers[1:], None], strict=True)
    normed = [isinstance(after, nn.BatchNorm2d) for c, after in pairs if isinstance(c, nn.Conv2d)]
    assert normed == [False, True, True, True, False]
    assert {a.negative_slope for a in layers if isinstance(a, nn.LeakyReLU)} == {0.2}


def test_layers_of_the_bilinear_discriminator():
    model = meta("fcn_discriminator", decoder="bilinear", conditioned=False)
    assert [c.out_channels for c in convolutions(model)] == [64, 128, 256, 512, 1]
    assert all(c.kernel_size == (4, 4) and c.stride == (2, 2) for c in convolutions(model)) and not of(model, nn.BatchNorm2d)


@torch.no_grad()
def test_discriminators_take_labels_and_may_ignore_the_image():
    """A label of no class is zero in every channel."""
    images, labels = torch.randn(2, 3, 32, 40), torch.randint(0, 5, (2, 32, 40))
    labels[:, :8] = 255
    one_hot = F.one_hot(labels.where(labels < 5, 5), 6)[..., :5].permute(0, 3, 1, 2).float()
    for name in ("fcn_discriminator", "patchgan"):
        model = small(name, channels=8).eval()
        assert_same(model(images, labels).logits, model(images, one_hot).logits)
        assert not torch.equal(model(images, labels).logits, model(-images, labels).logits)
    blind = small("fcn_discriminator", channels=8, conditioned=False).eval()
    assert torch.equal(blind(images, labels).logits, blind(-images, labels).logits)


# torchvision.


@pytest.mark.parametrize("kind, aux", [("deeplabv3", False), ("fcn", True)])
@torch.no_grad()
def test_torchvision_gives_the_same_outputs(kind, aux):
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="torchvision is not installed")
    build = getattr(segmentation, f"{kind}_resnet50")
    theirs = perturbed_norms(build(weights=None, weights_backbone=None, num_classes=5, aux_loss=aux)).eval()
    ours = from_torchvision(f"{kind}_resnet50", theirs.state_dict()).eval()
    images = torch.randn(2, 3, 65, 64)
    output, expected = ours(images), theirs(images)
    for logits, wanted in [(output.logits, expected["out"])] + ([(output.aux_logits, expected["aux"])] if aux else []):
        resized = F.interpolate(logits, (65, 64), mode="bilinear")
        torch.testing.assert_close(resized, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert aux or output.aux_logits is None


def test_torchvision_weights_of_resnet101_load():
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="torchvision is not installed")
    theirs = segmentation.deeplabv3_resnet101(weights=None, weights_backbone=None, aux_loss=True)
    ours = from_torchvision("deeplabv3_resnet101", theirs.state_dict())
    assert ours.num_classes == 21
    assert sorted(p.sum().item() for p in ours.parameters()) == sorted(p.sum().item() for p in theirs.parameters())


def perturbed_norms(model):
    for norm in of(model, nn.BatchNorm2d):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.1)
    return model


def test_backbone_names_its_maps():
    encoder = Backbone("resnettiny", 16, levels=(-4, -3, -2, -1))
    assert encoder.channels == [16, 16, 32, 32] and encoder.strides == [4, 8, 16, 16]
    maps = encoder(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (16, 8, 12), (32, 4, 6), (32, 4, 6)]


# Dense CRFs.


@pytest.mark.parametrize(
    "name, spatial, bilateral, normalization",
    [
        ("deeplabv1_largefov", (3, 3), (4, (49, 5)), "after"),
        ("deeplabv1_coco", (3, 3), (5, (67, 3)), "after"),
        ("deeplabv2_vgg16", (2, 2), (4, (65, 3)), "symmetric"),
        ("deeplabv2_resnet101", (3, 1), (4, (67, 3)), "symmetric"),
    ],
)
def test_published_crfs(name, spatial, bilateral, normalization):
    assert CRF_SETTINGS[name] == {
        "iterations": 10,
        "spatial_weight": spatial[0],
        "spatial_sigma": spatial[1],
        "bilateral_weight": bilateral[0],
        "bilateral_sigma": bilateral[1],
        "normalization": normalization,
    }


def test_the_crf_of_deeplabv2_is_the_default():
    parameters = inspect.signature(segops.dense_crf).parameters
    for name, value in CRF_SETTINGS["deeplabv2_resnet101"].items():
        assert parameters[name].default == value, name


def crfasrnn(classes, prefix, **weights):
    """As their layer's state_dict; without weights what it begins with."""
    begins = {"spatial_ker_weights": 3.0, "bilateral_ker_weights": 5.0, "compatibility_matrix": 1.0}
    return {prefix + name: weights.get(name, value * torch.eye(classes)) for name, value in begins.items()}


@pytest.mark.parametrize("prefix", ["", "crfrnn.", "module.crfrnn."])
def test_crfasrnn_begins_as_ours(prefix):
    network = {"conv1_1.weight": torch.zeros(64, 3, 3, 3)} if prefix else {}
    crf, ours = from_crfasrnn(network | crfasrnn(21, prefix)), segops.nn.CRF(21)
    assert repr(crf) == repr(ours) and sum(p.numel() for p in crf.parameters()) == 1_323
    for name, parameter in ours.named_parameters():
        assert torch.equal(crf.get_parameter(name), parameter), name


@torch.no_grad()
def test_crfasrnn_weights_are_where_they_belong():
    weights = {name: torch.randn(3, 3) for name in ("spatial_ker_weights", "bilateral_ker_weights", "compatibility_matrix")}
    crf = from_crfasrnn(crfasrnn(3, "crfrnn.", **weights), test_iterations=2).eval()
    logits, images = torch.randn(1, 3, 12, 16), torch.randint(0, 256, (1, 3, 12, 16), dtype=torch.uint8)
    expected = segops.dense_crf(
        logits,
        images,
        iterations=2,
        spatial_weight=weights["spatial_ker_weights"],
        spatial_sigma=3.0,
        bilateral_weight=weights["bilateral_ker_weights"],
        bilateral_sigma=(160.0, 3.0),
        compatibility=weights["compatibility_matrix"],
        normalization="after",
    )
    assert torch.equal(crf(logits, images), expected)
