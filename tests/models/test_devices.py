"""Every model on a GPU; thoroughly on the CPU too, so that the test itself is tried."""

import pytest
import torch

from ..targets import CUDA
from .small import SMALL, perturbed, total

devices = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.thorough), pytest.param("cuda", marks=CUDA)])


@devices
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_step_and_prediction(case, device):
    """Float32 logits and classes are those of the CPU; a step of training under autocast leaves every parameter finite."""
    model = perturbed(case.build()).eval()
    inputs = case.inputs((65, 49))
    with torch.no_grad():
        expected = model(*inputs).logits
        classes = None if case.judges else model.predict(inputs[0])
    model, inputs = model.to(device), [tensor.to(device) for tensor in inputs]
    with torch.no_grad():
        logits = model(*inputs).logits.cpu()
    assert (logits - expected).norm() <= 1e-4 * expected.norm()
    if classes is not None:
        assert (model.predict(inputs[0]).cpu() == classes).float().mean() > 0.99

    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.autocast(device, dtype=torch.bfloat16):
        total(model(*inputs)).backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
