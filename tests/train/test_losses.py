"""Losses of whole outputs against F.interpolate and F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from segops.models import Output

import segops
from segops.train import SegmentationLoss, focal_loss
from segops.train.losses import mean_over_ranks

CLASSES, VOID = 5, 255


def case(size=(4, 6), labels=(16, 24), void=0.2, dtype=torch.float32):
    """Logits, and labels with void, at their own sizes."""
    logits = (2 * torch.randn(2, CLASSES, *size, dtype=dtype)).requires_grad_()
    truth = torch.randint(0, CLASSES, (2, *labels))
    return logits, truth.where(torch.rand(2, *labels) >= void, VOID)


def cross_entropy(logits, labels, weight=None, **options):
    """Of every pixel."""
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, labels, weight, ignore_index=VOID, reduction="none", **options)


def boundary(logits, labels, weight=None, **options):
    edge = segops.gaussian_edge(labels, CLASSES, **{"normalize": "mean"} | options)
    return cross_entropy(logits, labels, weight) * edge


def focal(logits, labels, weight=None, gamma=2.0):
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    p = logits.softmax(1).gather(1, labels.where(labels != VOID, 0)[:, None])[:, 0]
    return (1 - p) ** gamma * cross_entropy(logits, labels, weight)


FUNCTIONS = {"ce": cross_entropy, "bal": boundary, "focal": focal}
names = pytest.mark.parametrize("name", FUNCTIONS)


def assert_same_loss(loss, expected, *logits):
    gradients, wanted = (torch.autograd.grad(value, logits, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@names
@pytest.mark.parametrize("size", [(4, 6), (16, 24)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(name, size, reduction, weighted):
    """The mean is over the pixels that count, also where classes are weighted."""
    logits, labels = case(size)
    weight = [0.5, 1.0, 0.0, 2.0, 4.0] if weighted else None
    loss = SegmentationLoss(name, reduction=reduction, class_weight=weight)(Output(logits), labels)
    expected = FUNCTIONS[name](logits, labels, None if weight is None else torch.tensor(weight)).sum()
    assert loss.shape == () and loss.dtype == torch.float32
    assert_same_loss(loss, expected if reduction == "sum" else expected / (labels != VOID).sum(), logits)


@names
@pytest.mark.parametrize("aux_weight", [0.0, 0.4, 1.0])
def test_auxiliary_logits(name, aux_weight):
    logits, labels = case()
    first, second = case((2, 3))[0], case((8, 12))[0]
    criterion, count = SegmentationLoss(name, aux_weight), (labels != VOID).sum()
    main, one, other = (FUNCTIONS[name](value, labels).sum() / count for value in (logits, first, second))
    torch.testing.assert_close(criterion(Output(logits, first), labels), main + aux_weight * one)
    both = criterion(Output(logits, (first, second)), labels)
    if aux_weight:
        assert_same_loss(both, main + aux_weight * (one + other), logits, first, second)
    else:
        torch.testing.assert_close(both, main)


def test_auxiliary_weight_is_0_4():
    (logits, labels), (aux, _) = case(), case()
    plain = SegmentationLoss()
    expected = plain(Output(logits), labels) + 0.4 * plain(Output(aux), labels)
    torch.testing.assert_close(plain(Output(logits, aux), labels), expected)


@names
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_void_alone(name, reduction):
    logits, labels = case()
    aux = case((2, 3))[0]
    loss = SegmentationLoss(name, reduction=reduction)(Output(logits, aux), torch.full_like(labels, VOID))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (logits, aux)))


@names
def test_one_image_of_void_alone(name):
    """Adds nothing to the mean."""
    logits, labels = case()
    labels[1] = VOID
    loss = SegmentationLoss(name)
    torch.testing.assert_close(loss(Output(logits), labels), loss(Output(logits[:1]), labels[:1]))


@names
def test_void_has_no_gradient(name):
    logits, labels = case((16, 24))
    loss = SegmentationLoss(name)(Output(logits), labels)
    gradient = torch.autograd.grad(loss, logits)[0].abs().amax(1)
    assert (gradient[labels == VOID] == 0).all() and (gradient[labels != VOID] > 0).all()


@names
def test_bfloat16_logits(name):
    logits, labels = case()
    logits = logits.detach().bfloat16()
    loss = SegmentationLoss(name)(Output(logits), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SegmentationLoss(name)(Output(logits.float()), labels), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ce", {"label_smoothing": 0.1}),
        ("bal", {"kernel": "linear", "kernel_size": 5, "beta": 0.2, "downsample": 2}),
        ("bal", {"normalize": None, "sigma": 2.0}),
        ("focal", {"gamma": 0.0}),
        ("focal", {"gamma": 3.5}),
    ],
    ids=str,
)
def test_options(name, options):
    logits, labels = case()
    loss = SegmentationLoss(name, **options)(Output(logits), labels)
    expected = FUNCTIONS[name](logits, labels, **options).sum() / (labels != VOID).sum()
    assert_same_loss(loss, expected, logits)
    assert not torch.isclose(loss, SegmentationLoss(name)(Output(logits), labels))


def test_focal_is_cross_entropy_without_gamma():
    logits, labels = case()
    expected = cross_entropy(logits, labels).sum() / (labels != VOID).sum()
    torch.testing.assert_close(focal_loss(logits, labels, 0.0), expected)
    torch.testing.assert_close(focal_loss(logits, labels, 0.0, reduction="sum"), cross_entropy(logits, labels).sum())


def test_focal_by_hand():
    """p = 0.9: (1 - 0.9)^2 log(1 / 0.9) of Lin et al.; a void pixel and class weights beside it."""
    logits = torch.tensor([0.9, 0.1]).log().view(1, 2, 1, 1).expand(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, VOID]]])
    right, wrong = 0.01 * 0.1053605, 0.81 * 2.3025851
    assert focal_loss(logits, labels).item() == pytest.approx((right + wrong) / 2, rel=1e-5)
    weighted = focal_loss(logits, labels, class_weight=torch.tensor([3.0, 0.5]), reduction="sum")
    assert weighted.item() == pytest.approx(3 * right + 0.5 * wrong, rel=1e-5)
    assert focal_loss(logits, labels.byte()).item() == focal_loss(logits, labels).item()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_gradient(gamma):
    """(gamma p (1 - p)^(gamma - 1) log p - (1 - p)^gamma) (delta_ij - p_j) of the logits, in float64."""
    logits, labels = case((8, 9), (8, 9))
    gradient = torch.autograd.grad(focal_loss(logits, labels, gamma, reduction="sum"), logits)[0]
    p = logits.detach().double().softmax(1)
    true = F.one_hot(labels.where(labels != VOID, 0), CLASSES).permute(0, 3, 1, 2)
    q = (p * true).sum(1, keepdim=True)
    expected = (gamma * q * (1 - q) ** (gamma - 1) * q.log() - (1 - q) ** gamma) * (true - p) * (labels != VOID)[:, None]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("height", [20.0, 60.0, 1000.0])
def test_focal_of_certainty(gamma, height):
    """Where p rounds to 1 or to 0 loss and gradient are finite."""
    logits = torch.tensor([[height, 0, 0], [0, height, 0]]).T.reshape(1, 3, 1, 2).requires_grad_()
    loss = focal_loss(logits, torch.zeros(1, 1, 2, dtype=torch.long), gamma)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert loss.item() == pytest.approx(height / 2, rel=1e-5) and gradient.isfinite().all()
    assert gradient[0, :, 0, 0].abs().max() < 1e-3 and gradient[0, 1, 0, 1].item() == pytest.approx(0.5, abs=1e-3)


def test_mean_over_ranks_of_one():
    total = torch.tensor(6.0)
    assert mean_over_ranks(total, torch.tensor(4)).item() == 1.5
    assert mean_over_ranks(total, torch.tensor(0)).item() == 6.0
    assert mean_over_ranks(total, torch.tensor(2**24 + 1)).dtype == torch.float32


def test_class_weight_is_no_part_of_a_checkpoint():
    criterion = SegmentationLoss("ce", class_weight=[1, 2, 3, 4, 5])
    assert criterion.state_dict() == {} and criterion.class_weight.dtype == torch.float32
    assert criterion.double().class_weight.dtype == torch.float64  # it moves with the module


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "dice"}, ValueError, "loss must be one of 'ce', 'bal', 'focal'; got 'dice'"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'; got 'none'"),
        ({"gamma": 2.0}, TypeError, "loss 'ce' has no option 'gamma': it has label_smoothing"),
        ({"name": "focal", "sigma": 3.0}, TypeError, "loss 'focal' has no option 'sigma': it has gamma"),
        (
            {"name": "bal", "sgima": 3.0},
            TypeError,
            "loss 'bal' has no option 'sgima': it has beta, downsample, kernel, kernel_size",
        ),
        ({"ignore_index": 0}, TypeError, "has no option 'ignore_index'"),
        ({"pixel_weight": None}, TypeError, "has no option 'pixel_weight'"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        SegmentationLoss(**arguments)
