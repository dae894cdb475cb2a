"""Training on a GPU, from Python; on the CPU the same, so that the tests themselves are tried."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segops.train import Adversarial, Classification, Cooperative, Supervised

from ..targets import CUDA
from .test_recipes import FCN, JOINTSEG, PACNET, PATCHGAN, both, images, scenes, table, trainer  # noqa: F401

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
RECIPES = {
    "supervised": lambda root: (Supervised(**PACNET, loss="bal"), scenes()),
    "classification": lambda root: (Classification(model="resnettiny"), images(root)),
    "cooperative": lambda root: (Cooperative(**JOINTSEG), both(root)),
    "adversarial": lambda root: (Adversarial(**FCN), scenes(labelled=0.5)),
    "patchgan": lambda root: (Adversarial(**PATCHGAN), scenes(labelled=0.5)),
}


@devices
@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)
def test_fit_and_validate(make, device, trainer, table):  # noqa: F811
    """A few steps in bfloat16, and metrics that are numbers."""
    recipe, data = make(table)
    run = trainer(accelerator=device, devices=1, precision="bf16-mixed", max_epochs=2, log_every_n_steps=1)
    run.fit(recipe, data)
    assert run.global_step >= 2
    losses = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("train/")}
    assert losses and all(map(math.isfinite, losses.values()))
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in recipe.parameters())
    for metrics in run.validate(recipe, data, verbose=False):  # of each validation set
        assert metrics and all(map(math.isfinite, metrics.values()))


PROGRAM = """
import torch
from lightning.pytorch import Trainer
from tests.train.test_recipes import PACNET, scenes
from segops.train import Supervised

run = Trainer(
    accelerator={device!r}, devices=1, strategy="ddp", use_distributed_sampler=False, max_epochs=1, num_sanity_val_steps=0,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
run.fit(Supervised(**PACNET, loss="bal"), scenes())
assert torch.distributed.get_backend() == ("nccl" if {device!r} == "cuda" else "gloo")
assert all(value.isfinite() for value in run.callback_metrics.values())
print("trained")
"""


# On the CPU, tests of runs on two processes cover it.
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.thorough), pytest.param("cuda", marks=CUDA)])
def test_distributed_data_parallel_on_one_device(device, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(device=device)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr[-3000:]
