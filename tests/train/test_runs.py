"""Runs: what a resumed run, one killed by SIGKILL, and one on two processes come to is what an undisturbed one comes to, bit by bit where that can be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from segops.train import runs
from segops.train.cli import main

TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=3",
    "--trainer.num_sanity_val_steps=0",
    "--data=SegmentationData",
    '--data.options={"train": 10, "val": 3, "size": [32, 48]}',
    "--data.batch_size=2",
    "--data.augment.scale=[0.5, 2.0, 0.25]",
    "--data.augment.crop=[32, 32]",
]
# Dropout and momentum; batch normalisation.
UNET = ["--model=Supervised", "--model.model=unet", '--model.options={"channels": 4}', "--model.optimizer.lr=0.01"]
PACNET = ["--model=Supervised", "--model.model=pacnet", '--model.options={"backbone": "resnet10t"}', "--model.loss=bal"]


def fit(folder, *arguments):
    main(["fit", f"--trainer.default_root_dir={folder}", *TINY, *arguments])


def load(folder, name="last"):
    return torch.load(Path(folder, "checkpoints", f"{name}.ckpt"), weights_only=True)


def assert_same(one, other, path=""):
    """Tensors bit by bit, and everything else, but for times and paths."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if key not in ("seconds", "dirpath", "best_model_path", "last_model_path", "best_k_models", "kth_best_model_path"):
                assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other or (one != one and other != other), path


def assert_same_run(one, other):
    one, other = load(one), load(other)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(one[part], other[part], part)


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Makes training end abruptly before step number `steps`."""

    def at(steps):
        from segops.train import recipes

        original = recipes.Recipe.on_train_batch_start

        def stop(self, batch, batch_idx):
            original(self, batch, batch_idx)
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.processed == steps:
                raise Interrupted

        monkeypatch.setattr(recipes.Recipe, "on_train_batch_start", stop)
        return monkeypatch

    return at


@pytest.mark.parametrize("model", [UNET, PACNET], ids=["unet", "pacnet"])
@pytest.mark.parametrize("every", [None, 1, 3], ids=["epoch", "step", "three"])
def test_resumed(tmp_path, model, every, interrupt):
    """Interrupted in the midst of the second epoch, and resumed from its beginning, or from the last or the next to last step."""
    fit(tmp_path / "whole", *model)
    patched = interrupt(8)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", *model, *([] if every is None else [f"--checkpoint_every={every}"]))
    patched.undo()
    assert load(tmp_path / "parts")["global_step"] == {None: 5, 1: 8, 3: 6}[every]
    fit(tmp_path / "parts", *model, "--ckpt_path=last")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    epochs = [
        [{name: value for name, value in epoch.items() if "val" in name} for epoch in results(tmp_path / part)["epochs"]]
        for part in ("whole", "parts")
    ]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 3


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("every", [5, 10])
def test_resumed_from_the_last_step_of_an_epoch(tmp_path, every, interrupt):
    fit(tmp_path / "whole", *UNET)
    patched = interrupt(10)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", *UNET, f"--checkpoint_every={every}")
    patched.undo()
    fit(tmp_path / "parts", *UNET, "--ckpt_path=last")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
