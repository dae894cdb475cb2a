"""Ablations: the runner with a stand-in for `segops fit`, all shipped tables, and two true runs."""

import argparse
import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from segops.models import create_model, list_models

from segops.train import ablation, cli
from segops.train.metrics import SegmentationMetrics
from segops.train.recipes import Classification, ClassificationMetrics, Cooperative, Segmentation

SCORES = {"ce": [0.70, 0.72, 0.77, 0.9], "bal": [0.71, 0.75, 0.76, 0.9], "pac": [0.8] * 4}  # by seed
TABLE = {
    "title": "A table",
    "source": "A paper, Table 1",
    "base": "base.yaml",
    "metric": "val/iou_macro",
    "scale": 100,
    "baseline": "ce",
    "seeds": [0, 1, 2],
    "variants": [
        {"name": "ce", "arguments": ["--model.loss=ce"], "paper": {"value": 76.68}},
        {"name": "bal", "arguments": ["--model.loss=bal"], "paper": {"value": 77.64}},
    ],
}


def write(folder, table=None, **changes):
    """The file of an ablation, and that of its base."""
    (folder / "base.yaml").write_text("trainer: {max_epochs: 1}\n")
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump((TABLE if table is None else table) | changes))
    return path


class Fit:
    """Stands in for `ablation.start`: leaves what `segops fit` would, and keeps the commands. `trouble`: what happens instead, by
    VARIANT/SEED."""

    def __init__(self):
        self.commands, self.trouble = [], {}

    def __call__(self, command, log, lock):
        os.fstat(lock)
        self.commands.append(command)
        folder = Path(option(command, "--trainer.default_root_dir"))
        seed = int(option(command, "--seed_everything"))
        assert (folder.name, log) == (str(seed), folder / "log.txt")
        trouble = self.trouble.get(f"{folder.parent.name}/{seed}")
        if trouble == "interrupt":
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
            raise KeyboardInterrupt
        if trouble == "fail":
            log.write_text("".join(f"line {number}\n" for number in range(30)))
            return 3
        if trouble == "nothing":
            return 0
        score = SCORES[folder.parent.name][seed] if folder.parent.name in SCORES else 0.5
        epochs = [{"epoch": 1, "val/iou_macro": 0.1}, {"epoch": 2, "val/iou_macro": score, "val/f1_macro": score / 2}]
        (folder / "results.json").write_text(json.dumps({"seconds": 10.5, "epochs": epochs}))
        return 0

    def runs(self):
        folders = [Path(option(command, "--trainer.default_root_dir")) for command in self.commands]
        return [f"{folder.parent.name}/{folder.name}" for folder in folders]


def option(command, name):
    (value,) = [part.removeprefix(f"{name}=") for part in command if part.startswith(f"{name}=")]
    return value


@pytest.fixture
def fit(monkeypatch):
    fit = Fit()
    monkeypatch.setattr(ablation, "start", fit)
    return fit


def ablate(*arguments):
    parser = argparse.ArgumentParser()
    ablation.add_arguments(parser)
    ablation.run(parser.parse_args([str(argument) for argument in arguments]))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_commands(tmp_path, fit):
    """Seed by seed, in the table's order; what comes after -- follows the variant's arguments."""
    path, out = write(tmp_path, arguments=["--trainer.max_epochs=2"]), tmp_path / "out"
    ablate(path, "--seeds", 3, 1, "--out", out, "--", "--data.root=a b", "--trainer.max_epochs", 5)
    assert fit.runs() == ["ce/3", "bal/3", "ce/1", "bal/1"]
    assert fit.commands[1] == [
        *(sys.executable, "-m", "segops", "fit", f"--config={tmp_path / 'base.yaml'}"),
        *("--trainer.max_epochs=2", "--model.loss=bal", "--data.root=a b", "--trainer.max_epochs", "5"),
        *("--seed_everything=3", f"--trainer.default_root_dir={out}/bal/3"),
    ]


def test_default_folder_and_seeds(tmp_path, fit, monkeypatch):
    path = write(tmp_path, seeds=[2])
    monkeypatch.chdir(tmp_path)
    ablate(path)
    assert fit.runs() == ["ce/2", "bal/2"] and len(rows(tmp_path / "runs/ablations/table/results.csv")) == 2


def test_bases(tmp_path, fit):
    """A list of them, files beside the ablation and shipped ones; a variant's own in place of the common one."""
    variants = [TABLE["variants"][0], TABLE["variants"][1] | {"base": "camvid_pacnet"}]
    ablate(write(tmp_path, base=["camvid_pacnet", "base.yaml"], variants=variants), "--out", tmp_path / "out", "--seeds", 0)
    shipped = f"--config={cli.CONFIGS / 'camvid_pacnet.yaml'}"
    configs = [[part for part in command if part.startswith("--config")] for command in fit.commands]
    assert configs == [[shipped, f"--config={tmp_path / 'base.yaml'}"], [shipped]]


def test_tables(tmp_path, fit, capsys):
    """By hand: 70, 72, 77 have mean 73 and deviation sqrt((9 + 1 + 16) / 2); 71, 75, 76 mean 74 and sqrt((9 + 1 + 4) / 2)."""
    variants = [*TABLE["variants"], {"name": "pac", "paper": {"difference": 0.29}}, {"name": "other"}]
    path, out = write(tmp_path, variants=variants), tmp_path / "out"
    ablate(path, "--out", out, "--only", "bal", "ce")
    ablate(path, "--out", out, "--only", "pac", "--seeds", 1)
    results, (ce, bal, pac, other) = rows(out / "results.csv"), rows(out / "summary.csv")
    assert [(row["variant"], row["seed"]) for row in results] == [(v, s) for v in ("ce", "bal") for s in "012"] + [("pac", "1")]
    assert list(results[0]) == ["variant", "seed", "val/iou_macro", "seconds", "epochs"]
    assert [float(row["val/iou_macro"]) for row in results] == [70, 72, 77, 71, 75, 76, 80]
    assert {(row["seconds"], row["epochs"]) for row in results} == {("10.5", "2")}
    assert float(ce["mean"]) == pytest.approx(73, abs=1e-12) and float(ce["std"]) == pytest.approx(math.sqrt(13), abs=1e-12)
    assert float(bal["mean"]) == pytest.approx(74, abs=1e-12) and float(bal["std"]) == pytest.approx(math.sqrt(7), abs=1e-12)
    columns = ("n", "difference", "paper", "paper_difference")
    assert [ce[name] for name in columns] == ["3", "", "76.68", ""]
    assert [bal[name] for name in columns] == ["3", "1.0", "77.64", "0.96"]
    assert [pac[name] for name in ("mean", "std", *columns)] == ["80.0", "", "1", "7.0", "", "0.29"]
    assert [other[name] for name in ("mean", "std", *columns)] == ["", "", "0", "", "", ""]
    capsys.readouterr()
    ablate(path, "--out", out, "--report")
    assert capsys.readouterr().out == (
        "## A table\n\nA paper, Table 1\n\n### val/iou_macro\n\n"
        "val/iou_macro (macro: mean over the classes that occur), times 100, of the last epoch; ours: mean ± sample standard "
        "deviation over seeds (their number).\n\n"
        "| variant | paper | ours | paper's difference | our difference |\n|---|---|---|---|---|\n"
        "| ce | 76.68 | 73.00 ± 3.61 (3) | - | - |\n"
        "| bal | 77.64 | 74.00 ± 2.65 (3) | +0.96 | +1.00 |\n"
        "| pac | - | 80.00 (1) | +0.29 | +7.00 |\n"
        "| other | - | - | - | - |\n\n"
        "Differences are to ce. One within the spread says nothing.\n"
    )


def test_several_metrics(tmp_path, fit, capsys):
    """A table for each; a variant may have others. Not scaled: four digits."""
    metrics = ["val/iou_macro", "val/f1_macro"]
    paper = {"val/f1_macro": {"value": 0.93}}
    variants = [{"name": "ce", "paper": paper}, {"name": "bal", "metric": "val/f1_macro", "paper": {"value": 0.95}}]
    table = {key: value for key, value in TABLE.items() if key != "scale"}
    path, out = write(tmp_path, table, metric=metrics, variants=variants, note="A note."), tmp_path / "out"
    ablate(path, "--out", out, "--seeds", 0)
    printed = capsys.readouterr().out
    assert "\n\nA note.\n\n" in printed
    one, two = printed.split("### ")[1:]
    assert "| ce | - | 0.7000 (1) | - | - |" in one and "bal" not in one
    assert "| ce | 0.9300 | 0.3500 (1) | - | - |\n| bal | 0.9500 | 0.3550 (1) | +0.0200 | +0.0050 |" in two
    assert list(rows(out / "results.csv")[1].values()) == ["bal", "0", "", "0.355", "10.5", "2"]
    summary = [(row["variant"], row["metric"], row["mean"]) for row in rows(out / "summary.csv")]
    assert summary == [("ce", metrics[0], "0.7"), ("ce", metrics[1], "0.35"), ("bal", metrics[1], "0.355")]


def test_report_of_nothing(tmp_path, fit, capsys):
    ablate(write(tmp_path), "--report", "--out", tmp_path / "out")
    assert "| ce | 76.68 | - | - | - |\n| bal | 77.64 | - | +0.96 | - |" in capsys.readouterr().out
    assert not fit.commands and not (tmp_path / "out").exists()


def test_finished_are_skipped(tmp_path, fit):
    path, out = write(tmp_path), tmp_path / "out"
    ablate(path, "--out", out, "--seeds", 0)
    ablate(path, "--out", out, "--seeds", 0, 1)
    assert fit.runs() == ["ce/0", "bal/0", "ce/1", "bal/1"]
    (out / "ce/0/run.json").unlink()  # finished is what run.json calls so
    ablate(path, "--out", out, "--seeds", 0)
    assert fit.runs()[4:] == ["ce/0"]


def test_interrupted_is_resumed(tmp_path, fit, capsys):
    path, out = write(tmp_path), tmp_path / "out"
    fit.trouble = {"bal/0": "interrupt"}
    with pytest.raises(SystemExit) as exit:
        ablate(path, "--out", out, "--seeds", 0)
    assert exit.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert [row["variant"] for row in rows(out / "results.csv")] == ["ce"]
    fit.trouble = {}
    ablate(path, "--out", out, "--seeds", 0)
    assert fit.runs() == ["ce/0", "bal/0", "bal/0"]
    assert [command[-1] == "--ckpt_path=last" for command in fit.commands] == [False, False, True]
    assert [row["variant"] for row in rows(out / "results.csv")] == ["ce", "bal"]


def test_failures(tmp_path, fit, capsys):
    """The others go on; the last lines of the log are shown; a repetition tries again."""
    path, out = write(tmp_path), tmp_path / "out"
    fit.trouble = {"ce/0": "fail", "bal/1": "nothing"}
    with pytest.raises(SystemExit) as exit:
        ablate(path, "--out", out, "--seeds", 0, 1)
    printed = capsys.readouterr()
    assert exit.value.code == 1 and fit.runs() == ["ce/0", "bal/0", "ce/1", "bal/1"]
    assert f"ce/0 failed: exit status 3; the end of {out}/ce/0/log.txt:\nline 20\n" in printed.err
    assert "line 29" in printed.err and "line 19" not in printed.err
    assert f"bal/1 failed: it left no {out}/bal/1/results.json" in printed.err
    assert "2 of 4 runs failed: ce/0, bal/1" in printed.err
    assert "| ce | 76.68 | 72.00 (1) |" in printed.out
    fit.trouble = {}
    ablate(path, "--out", out, "--seeds", 0, 1)
    assert fit.runs()[4:] == ["ce/0", "bal/1"]


AFTER = [
    {"name": "encoder", "report": False},
    {"name": "other"},
    {"name": "fcn", "after": "encoder", "arguments": ["--model.options.pretrained={after}/checkpoints/best.ckpt"]},
]


def test_after(tmp_path, fit, capsys):
    path, out = write(tmp_path, variants=AFTER, baseline=None), tmp_path / "out"
    ablate(path, "--out", out, "--only", "fcn", "--seeds", 0, 1)
    assert fit.runs() == ["encoder/0", "fcn/0", "encoder/1", "fcn/1"]
    assert option(fit.commands[3], "--model.options.pretrained") == f"{out}/encoder/1/checkpoints/best.ckpt"
    printed = capsys.readouterr().out
    assert "| fcn | - | 50.00 ± 0.00 (2) |" in printed and "encoder" not in printed and "Differences" not in printed
    assert {row["variant"] for row in rows(out / "results.csv")} == {"fcn"}
    assert [row["variant"] for row in rows(out / "summary.csv")] == ["other", "fcn"]


def test_after_a_failure(tmp_path, fit, capsys):
    fit.trouble = {"encoder/0": "fail"}
    with pytest.raises(SystemExit):
        ablate(write(tmp_path, variants=AFTER, baseline=None), "--out", tmp_path / "out", "--seeds", 0, 1)
    assert fit.runs() == ["encoder/0", "other/0", "encoder/1", "other/1", "fcn/1"]
    assert "fcn/0 failed: encoder, which it comes after, failed" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", [False, True])
def test_other_arguments_are_refused(tmp_path, fit, interrupted):
    path, out = write(tmp_path), tmp_path / "out"
    if interrupted:
        fit.trouble = {"ce/1": "interrupt"}
        with pytest.raises(SystemExit):
            ablate(path, "--out", out, "--only", "ce", "--seeds", 1)
    else:
        ablate(path, "--out", out, "--only", "ce", "--seeds", 1)
    message = r"it was trained with --model.loss=ce; asked for is --model.loss=ce --a=1. Move"
    with pytest.raises(ValueError, match=message) as error:
        ablate(path, "--out", out, "--seeds", 0, 1, "--", "--a=1")
    assert str(out / "ce/1") in str(error.value) and fit.runs() == ["ce/1"]  # nothing else was begun
    (tmp_path / "base.yaml").write_text("# another comment alone\ntrainer:\n  max_epochs: 1\n")
    fit.trouble = {}
    ablate(path, "--out", out, "--only", "ce", "--seeds", 1)
    (tmp_path / "base.yaml").write_text("trainer: {max_epochs: 2}\n")
    with pytest.raises(ValueError, match="holds another run: its base configuration was another"):
        ablate(path, "--out", out, "--only", "ce", "--seeds", 1)


def test_failed_at_once_may_change(tmp_path, fit):
    """Where nothing was trained yet, arguments may be set right."""
    path, out = write(tmp_path), tmp_path / "out"
    fit.trouble = {"ce/0": "fail"}
    with pytest.raises(SystemExit):
        ablate(path, "--out", out, "--only", "ce", "--seeds", 0)
    fit.trouble = {}
    ablate(path, "--out", out, "--only", "ce", "--seeds", 0, "--", "--a=1")
    assert fit.runs() == ["ce/0", "ce/0"]


def test_run_of_another_is_refused(tmp_path, fit):
    (tmp_path / "out/ce/0/checkpoints").mkdir(parents=True)
    (tmp_path / "out/ce/0/checkpoints/last.ckpt").touch()
    with pytest.raises(ValueError, match="out/ce/0 holds a run that segops ablate did not begin"):
        ablate(write(tmp_path), "--out", tmp_path / "out")


def test_metric_that_no_run_has(tmp_path, fit):
    """Said after the first run, which is not lost."""
    path, out = write(tmp_path, metric="val/iou"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"metric of 'ce' must be one of .*: val/f1_macro, val/iou_macro; got 'val/iou'"):
        ablate(path, "--out", out)
    ablate(write(tmp_path), "--out", out, "--seeds", 0)
    assert fit.runs() == ["ce/0", "bal/0"]


VARIANT = TABLE["variants"][0]
WRONG = {
    "no mapping": (["a"], "an ablation must be a mapping; got \\['a'\\]"),
    "unknown key": (TABLE | {"lr": 1}, "an ablation has no 'lr': it may have arguments, base"),
    "no title": ({key: TABLE[key] for key in TABLE if key != "title"}, "an ablation must have 'title'"),
    "title": (TABLE | {"title": 1}, "title must be text; got 1"),
    "note": (TABLE | {"note": ["a"]}, "note must be text"),
    "scale": (TABLE | {"scale": "100"}, "scale must be a positive number; got '100'"),
    "scale zero": (TABLE | {"scale": 0}, "scale must be a positive number; got 0"),
    "seeds": (TABLE | {"seeds": [0, "1"]}, "seeds must be a list of different ints"),
    "seeds bool": (TABLE | {"seeds": [True]}, "seeds must be a list of different ints"),
    "seeds twice": (TABLE | {"seeds": [1, 1]}, "seeds must be a list of different ints"),
    "seed": (TABLE | {"seeds": 3}, "seeds must be a list of different ints.*; got 3"),
    "no seed": (TABLE | {"seeds": []}, "seeds must be a list of different ints"),
    "negative seed": (TABLE | {"seeds": [-1]}, "seeds must be a list of different ints, at least 0"),
    "arguments": (TABLE | {"arguments": "--a=1"}, "arguments must be a list of texts; got '--a=1'"),
    "arguments number": (TABLE | {"arguments": ["--a", 1]}, "arguments must be a list of texts"),
    "seed as argument": (TABLE | {"arguments": ["--seed_everything=1"]}, "must leave --ckpt_path, --seed_everything"),
    "no variant": (TABLE | {"variants": []}, "variants must be a list of one or more; got \\[\\]"),
    "variants": (TABLE | {"variants": {"ce": {}}}, "variants must be a list of one or more"),
    "variant": (TABLE | {"variants": ["ce"]}, "variant 1 must be a mapping; got 'ce'"),
    "no name": (TABLE | {"variants": [VARIANT, {}]}, "variant 2 must have 'name'"),
    "name number": (TABLE | {"variants": [{"name": 16}]}, "variant 1: name must be letters, digits and .*got 16"),
    "name path": (TABLE | {"variants": [{"name": "../ce"}]}, "variant 1: name must be letters, digits"),
    "twice": (TABLE | {"variants": [VARIANT, VARIANT]}, "variant 'ce': name must occur once"),
    "variant's key": (TABLE | {"variants": [{"name": "ce", "seeds": [1]}]}, "variant 1 has no 'seeds': it may have after"),
    "variant's arguments": (TABLE | {"variants": [{"name": "a", "arguments": {}}]}, "'a': arguments must be a list of texts"),
    "report": (TABLE | {"variants": [{"name": "a", "report": "no"}]}, "'a': report must be true or false; got 'no'"),
    "none reported": (TABLE | {"variants": [{"name": "a", "report": False}]}, "variants must have one that is reported"),
    "no base": ({key: TABLE[key] for key in TABLE if key != "base"}, "'ce': base must be a name or a list of names; got None"),
    "no metric": ({key: TABLE[key] for key in TABLE if key != "metric"}, "'ce': metric must be a name or a list"),
    "metric twice": (TABLE | {"metric": ["a", "a"]}, "'ce': metric must name each once"),
    "after": (TABLE | {"variants": [{"name": "a", "after": "b", "arguments": ["{after}"]}]}, "after must be a variant above"),
    "after itself": (TABLE | {"variants": [{"name": "a", "after": "a", "arguments": ["{after}"]}]}, "must be a variant above"),
    "after alone": (TABLE | {"variants": [VARIANT, {"name": "a", "after": "ce"}]}, "after and {after} in arguments must go"),
    "after missing": (TABLE | {"variants": [{"name": "a", "arguments": ["--a={after}"]}]}, "after and {after} in arguments"),
    "baseline": (TABLE | {"baseline": "pac"}, "baseline must be one of the variants ce, bal; got 'pac'"),
    "paper": (TABLE | {"variants": [{"name": "ce", "paper": 76.68}]}, "'ce': paper must be a mapping; got 76.68"),
    "paper's key": (TABLE | {"variants": [{"name": "ce", "paper": {"mean": 1}}]}, "'ce': paper has no 'mean'"),
    "paper's value": (TABLE | {"variants": [{"name": "ce", "paper": {"value": "1"}}]}, "value must be a number; got '1'"),
    "paper's metric": (
        TABLE | {"metric": ["a", "b"], "variants": [{"name": "ce", "paper": {"value": 1}}]},
        "'ce': paper has no 'value': it may have a, b",
    ),
}


@pytest.mark.parametrize("table, message", WRONG.values(), ids=WRONG)
def test_wrong_tables(tmp_path, table, message):
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match=message) as error:
        ablation.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_wrong_files(tmp_path, fit):
    path = tmp_path / "table.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"table.yaml must be YAML: while parsing"):
        ablation.load(path)
    with pytest.raises(FileNotFoundError, match=r"ablation must be a file or one of bal_table1, camvid, .*; got 'nothing'"):
        ablation.load("nothing")
    message = "variant 'ce': base must be a file beside it or one of .*camvid_pacnet.*; got 'nothing'"
    with pytest.raises(FileNotFoundError, match=message):
        ablate(write(tmp_path, base="nothing"), "--out", tmp_path / "out")
    path = write(tmp_path)
    (tmp_path / "base.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"base.yaml must be YAML"):
        ablate(path, "--out", tmp_path / "out")
    assert not fit.commands and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "-1"], "seeds must be a list of different ints, at least 0"),
        (["--seeds", "1", "1"], "seeds must be a list of different ints"),
        (["--only", "pac"], "--only must name variants, of ce, bal; got 'pac'"),
        (["--", "--ckpt_path", "last"], "arguments after -- must leave --ckpt_path, .*; got '--ckpt_path'"),
        (["--", "--trainer.default_root_dir=a"], "arguments after -- must leave"),
    ],
)
def test_wrong_arguments(tmp_path, fit, arguments, message):
    with pytest.raises(ValueError, match=message):
        ablate(write(tmp_path), "--out", tmp_path / "out", *arguments)
    assert not fit.commands and not (tmp_path / "out").exists()


def test_waits_for_the_training_of_a_killed_runner(tmp_path, fit, capsys):
    """Whose lock the training holds on."""
    out = tmp_path / "out"
    out.mkdir()
    code = "import time; print(flush=True); time.sleep(1)"
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        training = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=[lock.fileno()])
        training.stdout.readline()
    ablate(write(tmp_path), "--out", out, "--seeds", 0)
    assert training.wait(0) == 0 and "waiting for another training" in capsys.readouterr().err
    training.stdout.close()


def names(metrics, *batch):
    metrics.update(*batch)
    return {f"val/{name}" for name in metrics.compute()}


@pytest.mark.parametrize("name", cli.shipped(ablation.ABLATIONS))
def test_shipped(name, parser):
    """Every variant's arguments make a recipe that has its metrics, and data; and its network can be built."""
    table = ablation.load(name)
    assert table.seeds == (0, 1, 2) and table.baseline is not None
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    of_masks = names(SegmentationMetrics(3), labels, labels)
    of_images = names(ClassificationMetrics(3), torch.zeros(1, 3), labels[0, 0, :1])
    built = []
    for variant in table.variants.values():
        command = ablation.command(table, variant, 0, Path("out"), [])
        config = parser.parse_args(command[3:])
        assert config["fit"]["seed_everything"] == 0
        recipe = parser.instantiate(config)["fit"]["model"]
        known = of_masks if isinstance(recipe, Segmentation) else set()
        known = known | of_images if isinstance(recipe, Classification | Cooperative) else known
        assert not variant.report or known >= set(variant.metrics)
        options = {key: value for key, value in recipe.options.items() if key != "pretrained"}
        if recipe.name in list_models() and (recipe.name, options) not in built:
            built.append((recipe.name, options))
            with torch.device("meta"):
                create_model(recipe.name, 5, **options)


def test_shipped_tables_are_the_papers():
    counts = {name: len(ablation.load(name).reported()) for name in cli.shipped(ablation.ABLATIONS)}
    assert counts == {
        "bal_table1": 16,
        "camvid": 4,
        "cityscapes_r2unet_segnet_aspp": 2,
        "combined_table3": 4,
        "discriminators": 2,
        "jointseg_table1": 3,
        "jointseg_table2": 3,
        "jointseg_table3": 3,
        "jointseg_table4": 3,
        "pac_table2": 8,
    }
    empty = {name: {} for name in ablation.load("bal_table1").variants}
    differences = [row["paper_difference"] for row in ablation.summarise(ablation.load("bal_table1"), empty)]
    assert differences[2:] == [-0.35, -0.12, 0.15, 0.32, 0.58, 0.68, -0.82, -0.43, -0.14, 0.13, 0.24, 0.62, 0.81, 0.96]


TINY = """
trainer: {accelerator: cpu, max_epochs: 1, num_sanity_val_steps: 0, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: segops.train.Supervised
  init_args: {model: segnet_basic, options: {channels: 4}, optimizer: {lr: 0.01}}
data:
  class_path: segops.train.SegmentationData
  init_args: {dataset: synthetic, options: {train: 8, val: 4, size: [32, 32]}, batch_size: 4, eval_batch_size: 4}
"""


def test_end_to_end(tmp_path, capsys):
    """The command itself, killed, and repeated while what it started still trains."""
    path, out = write(tmp_path, seeds=[0], variants=TABLE["variants"][1:], baseline=None), tmp_path / "out"
    (tmp_path / "base.yaml").write_text(TINY)
    command = [sys.executable, "-m", "segops", "ablate", str(path), "--out", str(out)]
    runner = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    folder = out / "bal/0"
    while not (folder / "config.yaml").is_file():
        assert runner.poll() is None
        time.sleep(0.02)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    assert not ablation.record(folder)["finished"]
    ablate(path, "--out", out)
    printed = capsys.readouterr()
    assert "| bal | 77.64 | " in printed.out and "waiting for another training" in printed.err and "1/1" in printed.err
    (row,) = rows(out / "results.csv")
    (epoch,) = json.loads((folder / "results.json").read_text())["epochs"]
    assert row["variant"] == "bal" and float(row["val/iou_macro"]) == 100 * epoch["val/iou_macro"]
    assert ablation.record(folder)["finished"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["loss"] == "bal"
