"""The shipped configurations: each makes a recipe and data, and its network can be built."""

import argparse
import re
import shlex

import pytest
import timm
import torch
from segops.models import create_model, list_models

from segops.train import cli, predict

NAMES = cli.shipped()


@pytest.mark.parametrize("name", NAMES)
def test_config(name, parser):
    arguments = cli.named_configs(["fit", "--config", name])
    parts = parser.instantiate(parser.parse_args(arguments))["fit"]
    recipe = parts["model"]
    assert parts["trainer"]["default_root_dir"] == f"runs/{name}"
    options = {key: value for key, value in recipe.options.items() if key != "pretrained"}
    with torch.device("meta"):
        if recipe.name in list_models():
            model = create_model(recipe.name, 5, **options)
        else:
            model = timm.create_model(recipe.name, num_classes=5, **options)
        recipe.optimizer.build(model, 10)


def test_every_config_says_how_to_run_it():
    for name in NAMES:
        text = (cli.CONFIGS / f"{name}.yaml").read_text()
        assert text.startswith("# ") and f"#   segops fit --config {name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_a_config(name, parser):
    """Each that its comments give can be parsed, with the configuration in place of a run's."""
    text = (cli.CONFIGS / f"{name}.yaml").read_text()
    for line in re.findall(r"^# +segops (.+)$", text, re.MULTILINE):
        arguments = shlex.split(re.sub(r"runs/(\w+)/config\.yaml", r"\1", line))
        if arguments[0] != "predict":
            parser.parse_args(cli.named_configs(arguments))
            continue
        prediction = argparse.ArgumentParser(allow_abbrev=False)
        predict.add_arguments(prediction)
        prediction.parse_args(arguments[1:])


def test_unknown_config():
    with pytest.raises(FileNotFoundError, match=re.escape("--config must be a file or one of camvid_deeplabv3, ")):
        cli.named_configs(["fit", "--config", "camvid"])
    assert cli.named_configs(["fit", "--config=demo"])[1].endswith("configs/demo.yaml")
