"""Learning rates: schedules by hand, and the rate and decay that each parameter gets."""

import pytest
import torch
from segops.models import create_model
from torch import nn

from segops.train import Optimizer

TINY = {"backbone": "resnet10t"}


def rates(settings, steps, iterations):
    """The learning rate at every step of one parameter."""
    layer = nn.Linear(2, 2)
    optimizer, schedule = settings.build(layer, iterations)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_poly():
    values = rates(Optimizer(lr=0.007), 11, 10)
    assert values[:11] == pytest.approx([0.007 * (1 - step / 10) ** 0.9 for step in range(11)])
    assert values[0] == 0.007 and values[5] == pytest.approx(0.0037512, rel=1e-4) and values[10] == 0
    assert rates(Optimizer(lr=1.0, power=2.0), 5, 4) == pytest.approx([1, 0.5625, 0.25, 0.0625, 0])
    assert rates(Optimizer(lr=1.0), 4, 2)[2:] == [0, 0]  # beyond the end


def test_poly_ends_at_min_lr():
    values = rates(Optimizer(lr=0.1, min_lr=0.02, power=1.0), 6, 4)
    assert values == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02])


def test_step():
    assert rates(Optimizer(schedule="step", lr=1.0, every=3), 8, 8) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    halves = rates(Optimizer(schedule="step", lr=1.0, every=1, factor=0.5), 3, 9)
    assert halves == [1, 0.5, 0.25]


def test_fixed():
    assert rates(Optimizer(schedule="fixed", lr=0.3), 5, 3) == [0.3] * 5


def test_every_group_decays():
    settings = Optimizer(lr=0.1, head_lr=10.0, bias_lr=2.0)
    optimizer, schedule = settings.build(create_model("deeplabv2", 3, **TINY), 4)
    optimizer.step()
    schedule.step()
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx(
        [factor * 0.1 * 0.75**0.9 for factor in (1, 10, 20)]  # the backbone has no biases but those of its normalisation
    )


def group_of(optimizer, parameter):
    found = [group for group in optimizer.param_groups if any(parameter is other for other in group["params"])]
    assert len(found) == 1
    return found[0]


def settings_of(optimizer, model):
    """{name: (learning rate, weight decay)}, each parameter in exactly one group."""
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    groups = {name: group_of(optimizer, parameter) for name, parameter in model.named_parameters()}
    return {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}


def test_deeplab_v2():
    """1 for the backbone, 10 and 20 for the classifiers, whose biases do not decay; shifts of batch normalisation are no biases."""
    model = create_model("deeplabv2", 3, **TINY)
    settings = Optimizer(lr=0.001, weight_decay=5e-4, head_lr=10.0, bias_lr=2.0, bias_weight_decay=0.0)
    found = settings_of(settings.build(model, 10)[0], model)
    assert found["encoder.features.conv1.0.weight"] == pytest.approx((0.001, 5e-4))
    assert found["encoder.features.bn1.bias"] == pytest.approx((0.001, 5e-4))
    heads = {name: value for name, value in found.items() if not name.startswith("encoder.")}
    assert heads and all(value == pytest.approx((0.01, 5e-4)) for name, value in heads.items() if name.endswith("weight"))
    assert all(value == pytest.approx((0.02, 0)) for name, value in heads.items() if name.endswith("bias"))
    assert any(name.endswith("bias") for name in heads)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_plain(name):
    """One group where nothing differs."""
    model = create_model("pacnet", 3, **TINY)
    optimizer, _ = Optimizer(name, lr=0.02, weight_decay=0.3).build(model, 10)
    assert len(optimizer.param_groups) == 1
    assert set(settings_of(optimizer, model).values()) == {(0.02, 0.3)}


def test_bias_weight_decay_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    found = settings_of(Optimizer(bias_weight_decay=0.5).build(model, 10)[0], model)
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert found == {name: (0.007, 0.5 if name == "0.bias" else 1e-4) for name in names}
    decays = settings_of(Optimizer(bias_lr=2.0).build(model, 10)[0], model)
    assert decays["0.bias"] == (0.014, 1e-4)


def test_a_parameter_that_is_a_module_s_own_bias():
    layer = nn.Linear(2, 2)
    found = settings_of(Optimizer(lr=1.0, bias_lr=2.0).build(layer, 10)[0], layer)
    assert found == {"weight": (1.0, 1e-4), "bias": (2.0, 1e-4)}


def test_several_modules():
    model = create_model("jointseg", 3, widths=(4, 8), blocks=1)
    optimizer, _ = Optimizer(lr=1.0, bias_lr=2.0).build([model.encoder, model.classifier], 10)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wanted = {id(parameter) for part in (model.encoder, model.classifier) for parameter in part.parameters()}
    assert held == wanted
    assert group_of(optimizer, model.classifier[-1].bias)["lr"] == 2.0


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer, _ = Optimizer().build(model, 10)
    assert [id(parameter) for group in optimizer.param_groups for parameter in group["params"]] == [
        id(parameter) for parameter in model[1].parameters()
    ]


def test_settings_reach_torch():
    layer = nn.Linear(2, 2)
    sgd = Optimizer(momentum=0.8, nesterov=True).build(layer, 1)[0]
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]
    assert not Optimizer().build(layer, 1)[0].defaults["nesterov"]
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        adam = Optimizer(name, betas=(0.5, 0.9)).build(layer, 1)[0]
        assert type(adam) is kind and adam.defaults["betas"] == (0.5, 0.9)


def test_nesterov_by_hand():
    """Two steps on x with gradient 1: velocities 1 and 1.9, updates 1 + 0.9 * velocity."""
    parameter = nn.ParameterList([torch.zeros(1)])
    optimizer, _ = Optimizer(lr=1.0, nesterov=True, weight_decay=0.0, schedule="fixed").build(parameter, 1)
    for expected in (-1.9, -1.9 - 2.71):
        parameter[0].grad = torch.ones(1)
        optimizer.step()
        assert parameter[0].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion"}, "optimizer name must be 'sgd', 'adam' or 'adamw'; got 'lion'"),
        ({"schedule": "cosine"}, "schedule must be 'poly', 'fixed' or 'step'; got 'cosine'"),
        ({"lr": 0.0}, r"lr must be positive; got 0\.0"),
        ({"lr": float("nan")}, "lr must be positive; got nan"),
        ({"min_lr": -1.0}, r"min_lr must be at least 0 and at most lr, 0\.007; got -1\.0"),
        ({"min_lr": 0.1}, "min_lr must be at least 0 and at most lr"),
        ({"every": 0}, "every must be at least 1; got 0"),
    ],
    ids=str,
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**settings)


def test_head_lr_needs_a_backbone():
    model = create_model("jointseg", 3, widths=(4, 8), blocks=1)
    with pytest.raises(ValueError, match=r"head_lr must be 1 for a model without a backbone; got 10\.0"):
        Optimizer(head_lr=10.0).build(model, 10)
