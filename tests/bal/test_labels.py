"""Labels that are no class: an IndexError on the CPU, NaN on a GPU, where nobody waits for the answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segops

from ..targets import CUDA, EMULATED, EMULATED_CUDA, GPU, fast_implementations
from .conftest import draw_labels
from .test_contract import SIZES, draw

BAD_LABELS = [(7, torch.uint8), (5, torch.int64), (-3, torch.int64), (-3, torch.int32), (2**32 + 1, torch.int64)]
TAKERS = {
    "edge": lambda z, labels: segops.gaussian_edge(labels, 5),
    "cross entropy": segops.upsample_cross_entropy,
    "weighed 0": lambda z, labels: segops.upsample_cross_entropy(z[..., :3, :4], labels, labels[:, :2, :2] * 0.0, reduction="none"),
    "boundary": segops.boundary_aware_loss,
}  # fmt: skip


ROOT = Path(__file__).parents[2]
LOOK_AT_NO_LABEL = [EMULATED, *(each.values[0] for each in GPU)]


def says(value):
    return rf"labels must be in \[0, 5\) or ignore_index \(255\); got {value}$"


@fast_implementations
@pytest.mark.parametrize("value, dtype", BAD_LABELS, ids=str)
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_labels_out_of_range(implementation, value, dtype, take):
    if implementation in LOOK_AT_NO_LABEL:
        pytest.skip("a GPU does not look: see test_labels_out_of_range_on_a_gpu")
    logits, labels = draw(((2, 5, 9, 10), (9, 10)), torch.float32, "cpu")
    labels = labels.to(dtype)
    take(logits, labels)
    everywhere = [(n, y, x) for n in range(2) for y in range(9) for x in range(10)]
    for place in everywhere if value == 5 and take is TAKERS["edge"] else everywhere[::50]:
        wrong = labels.clone()
        wrong[place] = value
        with pytest.raises(IndexError, match=says(value)):
            take(logits, wrong)


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_labels_out_of_range_in_compiled_code(implementation, take):
    if implementation in LOOK_AT_NO_LABEL:
        pytest.skip("a GPU does not look")
    logits, labels = draw(((2, 5, 9, 10), (9, 10)), torch.float32, "cpu")
    labels[1, 3, 4] = 7
    with pytest.raises(IndexError, match=says(7)):
        torch.compile(take, fullgraph=True, backend="aot_eager")(logits, labels)


def test_any_int_may_be_ignored(implementation):
    """Among them classes, and ints that the labels' dtype cannot hold, which wrap around to no label."""
    device, _ = implementation
    logits, _ = draw(SIZES[0], torch.float32, device)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        for ignore_index in (0, 4, 255, -1, 256, 2**32 + 1, -(2**63)):
            labels = draw_labels(2, 5, 11, 13, dtype, ignore_index).to(device)
            loss = segops.upsample_cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
            assert torch.equal(loss == 0, labels.long() == ignore_index)


on_gpus = pytest.mark.parametrize(
    "target", [*GPU, pytest.param(("cuda", "reference"), id="cuda-reference", marks=CUDA), EMULATED_CUDA], indirect=True
)


@on_gpus
def test_labels_out_of_range_on_a_gpu(target):
    """NaN, as nobody waits for the answer."""
    logits, labels = draw(SIZES[0], torch.float32, target[0])
    labels[1, 3, 4] = 255
    wrong = labels.clone()
    wrong[1, 3, 4] = 7
    assert torch.equal(segops.gaussian_edge(wrong, 5), segops.gaussian_edge(labels, 5))
    for function in (segops.upsample_cross_entropy, segops.boundary_aware_loss):
        assert function(logits, wrong).isnan()
        loss = function(logits, wrong, reduction="none")
        assert loss[1, 3, 4].isnan() and loss.isnan().sum() == 1


@on_gpus
def test_labels_are_looked_at_where_the_environment_says_so(target):
    """The CPU's error. The variable is read when segops is imported."""
    program = f"from tests.bal.test_labels import raises; raises{target}"
    environment = os.environ | {"SEGOPS_CHECK_LABELS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def raises(device, backend):
    logits, labels = draw(SIZES[0], torch.float32, device)
    wrong = labels.clone()
    wrong[1, 3, 4] = 7
    with segops.backend(backend):
        segops.boundary_aware_loss(logits, labels)
        for take in (TAKERS["edge"], TAKERS["cross entropy"], TAKERS["boundary"]):
            with pytest.raises(IndexError, match=says(7)):
                take(logits, wrong)


@pytest.mark.parametrize("value, checked", [("1", True), ("0", False), (None, False)])
def test_the_environment_is_read_at_import(value, checked):
    environment = {name: each for name, each in os.environ.items() if name != "SEGOPS_CHECK_LABELS"}
    environment |= {} if value is None else {"SEGOPS_CHECK_LABELS": value}
    program = "from segops.ops.bal import labels; print(labels.CHECK_LABELS)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{checked}\n"
