"""`segops fit`, `validate` and `test`: Lightning's command line with this package's recipes, data and checkpoints."""

import logging
import re
import warnings
from pathlib import Path

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from .files import write_whole
from .recipes import Recipe
from .runs import Last, Results, WholeCheckpoints, best, last_checkpoint, summary

CONFIGS = Path(__file__).parent.parent / "configs"

# What Lightning says that is not so here, or not of use.
UNHELPFUL = (
    ".*your dataloader is not resumable",  # it is: see data.Stream
    ".*does not have many workers",
    ".*litlogger",
    "`weights_only` was not set",  # of saving
    "LightningCLI's args parameter",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The number of training batches",
    "Be aware that when using `ckpt_path`, callbacks",  # of evaluation, which has none
    ".*Checkpoint directory .* exists and is not empty",  # of a resumed run; others are refused
    ".*find_unused_parameters=True was specified",
)


class Without(logging.Filter):
    """Lets through what does not match."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record):
        return self.pattern.match(record.getMessage()) is None


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, all that was asked for, into the run's folder; of a resumed run it says first what is no longer as it was."""

    def setup(self, trainer, pl_module, stage):
        if stage != "fit" or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir, "config.yaml")
        config = self.config.clone()
        config["ckpt_path"] = None
        text = self.parser.dump(config, skip_none=False)
        if path.is_file():
            before, now = (flat(yaml.safe_load(content)) for content in (path.read_text(), text))
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    print(f"resumed with another {key}: {now.get(key)!r}, before {before.get(key)!r}")
        write_whole(path, lambda file: file.write(text.encode()))


def flat(config, prefix=""):
    """{"trainer.max_epochs": 3, ...} of a nested dictionary."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, item in config.items() for key, value in flat(item, f"{prefix}.{name}".strip(".")).items()}


class CLI(LightningCLI):
    """Recipes and data modules by class_path, `segops.train.` may be left out; every run in a folder of its own, trainer.default_root_dir."""

    def add_arguments_to_parser(self, parser):
        parser.add_argument(
            "--checkpoint_every",
            type=int | None,
            default=None,
            help="steps after which last.ckpt is written, besides every epoch",
        )
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.use_distributed_sampler": False,  # the streams of data.py know the ranks
                "trainer.enable_model_summary": False,
            }
        )

    @property
    def settings(self):
        return self.config_init[self.subcommand] if self.subcommand else self.config_init

    def instantiate_trainer(self, **kwargs):
        config = self.settings["trainer"]
        folder = Path(config["default_root_dir"])
        if config.get("logger") is None:
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="") if self.subcommand == "fit" else False
        if self.subcommand == "fit":
            ours = [best(folder, self.model.monitor), Results(folder), Last(folder, self.settings["checkpoint_every"])]
            if config.get("logger") is None:
                ours.append(LearningRateMonitor("step"))
            config["callbacks"] = [*(config.get("callbacks") or []), *ours]
        config["plugins"] = [*(config.get("plugins") or []), WholeCheckpoints()]
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.strategy, DDPStrategy) and not self.model.automatic_optimization:
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # each optimizer leaves out the others' parameters
        return trainer

    def before_fit(self):
        last, asked = last_checkpoint(self.trainer.default_root_dir), self.settings["ckpt_path"]
        if asked == "last" and not last.is_file():
            raise FileNotFoundError(f"--ckpt_path last: there is no {last}")
        if asked in ("last", "auto"):
            self.settings["ckpt_path"] = str(last) if last.is_file() else None
        elif asked is None and last.is_file():
            raise FileExistsError(
                f"{self.trainer.default_root_dir} holds a run already: go on with --ckpt_path last (or auto), or name another folder with "
                "--trainer.default_root_dir"
            )
        self._resume()

    def before_validate(self):
        if self.settings["ckpt_path"] is None:
            raise ValueError("--ckpt_path must be a checkpoint of segops fit")
        self._resume()
        self.settings["verbose"] = False  # the table has it all

    def _resume(self):
        self.settings["weights_only"] = True
        self.model.resumes = self.settings["ckpt_path"] is not None

    before_test = before_validate

    def after_fit(self):
        self._print("val")

    def after_validate(self):
        self._print("val")

    def after_test(self):
        self._print("test")

    def _print(self, split):
        if self.trainer.is_global_zero:
            print(summary(self.trainer, self.model, split))
            if self.subcommand == "fit":
                print(f"checkpoints, results.json, config.yaml: {self.trainer.default_root_dir}")


def shipped(folder=CONFIGS):
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def named_configs(arguments):
    """The arguments with the names of shipped configurations made paths: --config camvid_pacnet."""
    arguments = list(arguments)
    for index, argument in enumerate(arguments):
        name = argument.removeprefix("--config=") if argument.startswith("--config=") else None
        if index and arguments[index - 1] in ("--config", "-c"):
            name = argument
        if name is None or Path(name).is_file():
            continue
        path = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"--config must be a file or one of {', '.join(shipped())}; got {name!r}")
        arguments[index] = argument.replace(name, str(path))
    return arguments


def main(arguments):
    """Runs `fit`, `validate` or `test`. Raises what goes wrong."""
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)
        for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
            logging.getLogger(f"lightning.pytorch.{name}").addFilter(Without(message))
    CLI(
        Recipe,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        trainer_class=Trainer,
        parser_kwargs={"prog": "segops", "default_env": False},
        args=named_configs(arguments),
    )
