"""The reference models: facts of the papers, shapes, training, export."""

import subprocess
import sys

import pytest
import torch
from segops.models import create_model, list_models


def small(**options):
    torch.manual_seed(0)
    return create_model("pacnet", 5, backbone="resnet18", channels=32, **options)


def test_parameters_of_the_paper():
    """48,285,013 with ResNet-101 and 21 classes."""
    with torch.device("meta"):
        model = create_model("pacnet", 21)
    assert sum(p.numel() for p in model.parameters()) == 48_285_013
    assert model.pac.pac.rates == (1, 3, 5, 7, 9) and model.pac.pac.merge == "sum"


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (49, 130)])
def test_resolution(output_stride, size):
    model = small(output_stride=output_stride).eval()
    images = torch.randn(2, 3, *size)
    expected = tuple(-(-side // output_stride) for side in size)
    assert model(images).shape == (2, 5, *expected)
    assert model(images, upsample=True).shape == (2, 5, *size)
    classes = model.predict(images)
    assert classes.shape == (2, *size) and classes.dtype == torch.int64 and not classes.requires_grad


@pytest.mark.parametrize(
    "options", [{}, {"norm": "per_rate"}, {"merge": "concat"}, {"merge": "concat", "norm": "per_rate"}], ids=str
)
def test_every_parameter_learns_even_from_one_image(options):
    model = small(**options).train()
    model(torch.randn(1, 3, 65, 49)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.startswith("backbone"))


def test_batch_of_one_keeps_the_statistics_of_pooling():
    norm = small().train().pool[2]
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.randn(1, 32, 1, 1))
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    norm(torch.randn(2, 32, 1, 1))
    assert not torch.equal(norm.running_mean, before[0])


def test_per_rate_norm_in_eval_equals_the_branches():
    """BN on each branch, before the sum."""
    model = small(norm="per_rate").eval().pac
    with torch.no_grad():
        model.rate_norm.running_mean.normal_()
        model.rate_norm.weight.normal_()
        x = torch.randn(1, 512, 7, 6)
        weight = model.pac.weight
        branches = [torch.nn.functional.conv2d(x, weight, padding=r, dilation=r) for r in (1, 3, 5, 7, 9)]
        expected = model.rate_norm(torch.cat(branches, 1)).unflatten(1, (5, 32)).sum(1).relu()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_overfits_four_images():
    model = small().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = torch.randn(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.int64)
    for i in range(4):
        labels[i, 16 * i : 16 * i + 16] = i + 1
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(images, upsample=True), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_state_dict_round_trip(tmp_path):
    model, other = small().eval(), create_model("pacnet", 5, backbone="resnet18", channels=32).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), other(images))


def test_export_with_dynamic_height_and_width():
    model = small().eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    images = torch.randn(1, 3, 80, 112)
    torch.testing.assert_close(program.module()(images), model(images))


def test_compile_without_a_graph_break():
    model = small().eval()
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


def test_autocast_and_channels_last():
    model = small().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()


@pytest.mark.parametrize(
    "backbone, output_stride, size",
    [
        ("mobilenetv3_small_050", 16, 64),
        ("convnext_atto", 16, 64),
        ("vgg11", 32, 64),
        ("swin_tiny_patch4_window7_224", 32, 224),
    ],
)
def test_other_backbones(backbone, output_stride, size):
    model = create_model("pacnet", 3, backbone=backbone, output_stride=output_stride, channels=8).eval()
    assert model(torch.randn(1, 3, size, size)).shape == (1, 3, size // output_stride, size // output_stride)


def test_in_channels():
    assert small(in_channels=6).eval()(torch.randn(1, 6, 64, 64)).shape == (1, 5, 4, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "pacnte"}, "got 'pacnte'; did you mean 'pacnet'?"),
        ({"name": "zzz"}, "got 'zzz'; known: pacnet"),
        ({"num_classes": 0}, "num_classes must be a positive int; got 0"),
        ({"backbone": "resnet1"}, "backbone must be a timm model; got 'resnet1'; near matches: resnet18"),
        ({"backbone": "vgg11", "output_stride": 16}, r"output_stride must be one of \[32\] for backbone 'vgg11'; got 16"),
        ({"backbone": "resnet18", "output_stride": 7}, r"output_stride must be one of \[8, 16, 32\] .* got 7"),
        ({"backbone": "resnet18", "norm": "batch"}, "norm must be 'post' or 'per_rate'; got 'batch'"),
        ({"backbone": "resnet18", "merge": "mean"}, "merge must be 'sum' or 'concat'; got 'mean'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "pacnet", "num_classes": 5, **options})


def test_models_are_imported_when_first_used():
    program = "import sys, segops; assert 'timm' not in sys.modules; print(segops.models.list_models()); segops.nonsense"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "['pacnet']"
    assert "module 'segops' has no attribute 'nonsense'" in done.stderr


def test_list_models():
    assert list_models() == ["pacnet"]
