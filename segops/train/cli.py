"""`segops fit`, `validate` and `test`: Lightning's command line with this package's recipes, data
and checkpoints."""

import inspect
import logging
import re
import shlex
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from segops.models import CRF_SETTINGS

from .files import first_line, unfolds_to_more, write_whole
from .recipes import Recipe
from .runs import Best, Last, Results, WholeCheckpoints, best_checkpoint, last_checkpoint, locked, summary

CONFIGS = Path(__file__).parent.parent / "configs"

# What Lightning says that is not so here, or not of use.
UNHELPFUL = (
    ".*your dataloader is not resumable",  # it is: see data.Stream
    ".*does not have many workers",
    ".*litlogger",
    ".*litmodels",
    "`weights_only` was not set",  # of saving
    "LightningCLI's args parameter",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The number of training batches",
    "You are using a custom batch sampler",
    "It is recommended to use `self.log",  # sync_dist: figures are of all ranks
    "Be aware that when using `ckpt_path`, callbacks",  # of evaluation, which has none
    ".*Checkpoint directory .* exists and is not empty",  # of a resumed run; others are refused
    ".*find_unused_parameters=True was specified",
)

# Lines of jsonargparse that say nothing to a user.
UNSPECIFIC = (
    "Does not validate|Subtypes:|Errors:$|Given value type:|Expected a <class 'NoneType'>|Problem with given class_path"
)


class Without(logging.Filter):
    """Lets through what does not match."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record):
        return self.pattern.match(record.getMessage()) is None


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml, all that was asked for, into the run's folder, once training begins: the
    checkpoint of a resumed run has been loaded by then. Of such a run it says first what is no
    longer as it was."""

    def setup(self, trainer, pl_module, stage):
        self.path = config_file(trainer.default_root_dir)
        config = self.config.clone()
        config["ckpt_path"] = None
        self.text = self.parser.dump(config, skip_none=False)

    def on_fit_start(self, trainer, pl_module):
        if trainer.is_global_zero and pl_module.resumes and self.path.is_file():
            now = flat(yaml.safe_load(self.text))
            # A setting that came after the run was saved was what it is by default.
            initial = defaults(self.parser, model=pl_module, data=trainer.datamodule)
            before = {key: value for key, value in initial.items() if key in now} | flat(read_yaml(self.path))
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    print(f"resumed with another {key}: {now.get(key)!r}, before {before.get(key)!r}")

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            write_whole(self.path, lambda file: file.write(self.text.encode()))


def config_file(folder):
    return Path(folder, "config.yaml")


def flat(config, prefix=""):
    """{"trainer.max_epochs": 3, ...} of a nested dictionary."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, item in config.items() for key, value in flat(item, f"{prefix}.{name}".strip(".")).items()}


def defaults(parser, **made):
    """{"crf": False, "model.init_args.loss": "ce", ...}: those of the parser, and of what was made
    by class_path."""
    found = dict(parser.get_defaults().items())
    for name, each in made.items():
        for parameter in inspect.signature(type(each)).parameters.values():
            if parameter.default is not parameter.empty:
                found[f"{name}.init_args.{parameter.name}"] = parameter.default
    return found


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, as a ValueError."""

    def error(self, message, ex=None):
        raise ValueError(in_short(message)) from None


def in_short(message):
    """What jsonargparse says, without the types that it tried and without long values."""
    key, reasons, value = "", [], ""
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := re.match(r'Parser key "(.+)"( element \d+)?:$', line):
            key = f"--{found[1]}: "
        elif found := re.match("Given value: (.+)$", line):
            value = f"; got {found[1]}"
        elif line and not re.match(UNSPECIFIC, line):
            line = re.sub(r"Expected a (?:<class '|typing\.Literal\[)(.+?)(?:'>|\])", r"needs \1", line)
            reasons.append(line.replace(". Got value: ", "; got "))
    if "(key=" in value or len(value) > 100:  # the setting itself, or all settings around it
        value = ""
    text = re.sub(r"(--[\w.]+): --", r"\1.", key + "; ".join(reasons) + value)
    return "; got ".join(text.split("; got ")[:2])


class CLI(LightningCLI):
    """Recipes and data modules by class_path, `segops.train.` may be left out; every run in a folder
    of its own, trainer.default_root_dir."""

    @staticmethod
    def subcommands():
        given = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": {*given, "train_dataloaders", "val_dataloaders"},
            "validate": {*given, "dataloaders", "verbose"},
            "test": {*given, "dataloaders", "verbose"},
        }

    def add_arguments_to_parser(self, parser):
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint of segops fit: a file, or `last` or `best` of trainer.default_root_dir; fit goes on from it, "
            "with `auto` from the last where there is one",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int | None,
            default=None,
            help="steps after which last.ckpt is written, besides every epoch",
        )
        parser.add_argument(
            "--window", nargs=2, type=int, metavar=("H", "W"), help="score class maps from sliding windows; no val/loss then"
        )
        parser.add_argument("--overlap", type=float | None, default=None, help="of windows, in [0, 1); default 0.5")
        parser.add_argument("--scales", nargs="+", type=float, help="average over these; default 1.0")
        parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
        parser.add_argument("--crf", action="store_true", help="score class maps that a dense CRF refines; no val/loss then")
        parser.add_argument(
            "--crf-settings",
            "--crf_settings",
            type=Literal[tuple(CRF_SETTINGS)] | None,
            default=None,
            help="the same with the settings of a publication",
        )
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.use_distributed_sampler": False,  # the streams of data.py know the ranks
                "trainer.enable_model_summary": False,
            }
        )

    def parse_arguments(self, parser, args):
        if len(args) == 1:
            raise ValueError(f"needs --config NAME or FILE, and may have other settings; NAME is one of {', '.join(shipped())}")
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        folder = str(settings["trainer.default_root_dir"])
        if "://" in folder or (Path(folder).exists() and not Path(folder).is_dir()):
            raise ValueError(f"--trainer.default_root_dir must be a local folder; got {folder}")
        for name, least, most in (("seed_everything", 0, 2**32 - 1), ("checkpoint_every", 1, None)):
            value = settings[name]
            if value is not None and (value < least or (most is not None and value > most)):
                raise ValueError(f"--{name} must be at least {least}{'' if most is None else f', at most {most}'}; got {value}")

    def _parse_ckpt_path(self):
        """Takes no settings from a checkpoint: Lightning would import what its "hyper_parameters"
        name, and let them replace those that were given."""

    @property
    def settings(self):
        return self.config_init[self.subcommand] if self.subcommand else self.config_init

    def instantiate_trainer(self, **kwargs):
        config = self.settings["trainer"]
        folder = Path(config["default_root_dir"])
        trains = self.subcommand == "fit" and not config.get("fast_dev_run")
        if config.get("logger") is None:
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="") if trains else False
        if trains:
            ours = [Best(folder, self.model.monitor), Results(folder), Last(folder, self.settings["checkpoint_every"])]
            if config.get("logger") is None:
                ours.append(LearningRateMonitor("step"))
            config["callbacks"] = [*(config.get("callbacks") or []), *ours]
        config["plugins"] = [*(config.get("plugins") or []), WholeCheckpoints()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            asked = ", ".join(f"{name} {config[name]!r}" for name in ("accelerator", "devices", "strategy"))
            raise ValueError(f"trainer cannot run as asked for, with {asked}: {error}") from error
        if isinstance(trainer.strategy, DDPStrategy) and not self.model.automatic_optimization:
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # each optimizer leaves out the others' parameters
        return trainer

    def fit(self, model, datamodule):
        trainer, folder = self.trainer, self.trainer.default_root_dir
        trained, validated = (
            ("max_epochs", "max_steps", "limit_train_batches"),
            ("check_val_every_n_epoch", "val_check_interval"),
        )
        for name in (*trained, *validated):
            if getattr(trainer, name) == 0:
                what = "trained" if name in trained else "validated"
                raise ValueError(f"trainer.{name} must be above 0, or nothing is {what}; got 0")
        if trainer.fast_dev_run:
            trainer.fit(model, datamodule=datamodule)
            self.show("val")
            return
        with locked(folder, trainer.is_global_zero):
            checkpoint = self.checkpoint()
            if checkpoint is None and last_checkpoint(folder).is_file():
                raise FileExistsError(
                    f"{folder} holds a run already: go on with --ckpt_path last (or auto), or name another folder with "
                    "--trainer.default_root_dir"
                )
            try:
                with self.loading(checkpoint):
                    trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
            except SystemExit as end:
                self.say_how_to_go_on()
                raise SystemExit(status(end)) from None
            except OSError:  # as a full disk
                if trainer.fit_loop.epoch_loop.batch_progress.total.ready:
                    self.say_how_to_go_on()
                raise
        if not trainer.callback_metrics:
            if checkpoint is None:
                raise ValueError("nothing was trained: trainer.max_time allows no step")
            if trainer.is_global_zero:
                print(f"nothing was left to train of {checkpoint}: trainer.max_epochs or max_steps must be larger")
            return
        self.show("val")
        if trainer.is_global_zero:
            names = ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "results.json", "config.yaml")
            print(f"in {folder}: {', '.join(name for name in names if Path(folder, name).is_file())}")

    def validate(self, model, datamodule):
        self.evaluate(self.trainer.validate, "val")

    def test(self, model, datamodule):
        self.evaluate(self.trainer.test, "test")

    def evaluate(self, run, split):
        checkpoint = self.checkpoint()
        if checkpoint is None:
            raise ValueError("--ckpt_path must be a checkpoint of segops fit; got none")
        try:
            with self.loading(checkpoint):  # the table has all that `verbose` would print
                run(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
        except SystemExit as end:
            raise SystemExit(status(end)) from None
        self.show(split)

    @contextmanager
    def loading(self, checkpoint):
        """Until it is loaded: what Lightning raises where a file is not as it would write it."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
            if not self.model.resumes:
                raise
            raise ValueError(f"{checkpoint} cannot be resumed from: {type(error).__name__}: {first_line(error)}") from error

    def checkpoint(self):
        """The file that --ckpt_path means, or None."""
        asked, folder = self.settings["ckpt_path"], self.trainer.default_root_dir
        files = {"last": last_checkpoint(folder), "auto": last_checkpoint(folder), "best": best_checkpoint(folder)}
        path = files.get(asked, asked)
        if path is not None and not Path(path).is_file():
            if asked == "auto" and self.subcommand == "fit":
                return None
            raise FileNotFoundError(f"--ckpt_path {asked}: there is no file {path}")
        self.model.resumes = path is not None
        return path and str(path)

    def before_instantiate_classes(self):
        settings = self.config[self.subcommand]
        chosen = {name: settings.get(name) for name in ("window", "overlap", "scales", "flip")}
        chosen["crf"] = CRF_SETTINGS.get(settings.get("crf_settings"), settings.get("crf"))
        self.predictor_options = {name: value for name, value in chosen.items() if value is not None and value is not False}

    def instantiate_classes(self):
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:  # of a recipe or data module, wrapped
            raise ValueError(in_short(str(error))) from error
        if self.predictor_options:
            if not hasattr(self.model, "predictor_options"):
                raise ValueError(f"--{next(iter(self.predictor_options))} is of models that segment")
            self.model.predictor_options = self.predictor_options

    def show(self, split):
        if self.trainer.is_global_zero:
            print(summary(self.trainer, self.model, split) or "nothing was evaluated")

    def say_how_to_go_on(self):
        folder = self.trainer.default_root_dir
        if not self.trainer.is_global_zero:
            return
        if last_checkpoint(folder).is_file() and config_file(folder).is_file():
            command = ["segops", "fit", "--config", str(config_file(folder)), "--ckpt_path", "last"]
            print(f"go on with: {shlex.join(command)}", file=sys.stderr)
        else:
            print(f"{folder} has no checkpoint yet: the first is of an epoch's end, or of --checkpoint_every", file=sys.stderr)


def status(end):
    """The exit status that shells expect where Lightning ends at Ctrl-C or SIGTERM."""
    if isinstance(end, SIGTERMException):
        return 143
    return 130 if end.code in (1, None) else end.code  # another is a callback's own


def shipped(folder=CONFIGS):
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def named_configs(arguments):
    """The arguments with the names of shipped configurations made paths: --config camvid_pacnet.

    Raises:
        FileNotFoundError, ValueError: a configuration is not there, or is not YAML with settings.
    """
    arguments = list(arguments)
    for index, argument in enumerate(arguments):
        name = argument.removeprefix("--config=") if argument.startswith("--config=") else None
        if index and arguments[index - 1] in ("--config", "-c"):
            name = argument
        if name is None:
            continue
        path = Path(name) if Path(name).is_file() else CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"--config must be a file or one of {', '.join(shipped())}; got {name!r}")
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError(f"--config {path} must be a mapping of settings; it holds {str(content)[:60]!r}")
        arguments[index] = argument.replace(name, str(path))
    return arguments


def read_yaml(path):
    """What a YAML file holds. ValueError: it is not YAML."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
    if unfolds_to_more(content):
        raise ValueError(f"{path} must be a configuration: its anchors repeat more than one holds")
    return content


def say_os_error(raised):
    """Of a logger's thread, as on a full disk: in one line."""
    if issubclass(raised.exc_type, OSError):
        print(f"segops: in {raised.thread.name}, perhaps TensorBoard's: {raised.exc_value}", file=sys.stderr)
    else:
        threading.__excepthook__(raised)


def main(arguments):
    """Runs `fit`, `validate` or `test`. Raises what goes wrong."""
    threading.excepthook = say_os_error
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)
        for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
            logging.getLogger(f"lightning.pytorch.{name}").addFilter(Without(message))
    try:
        CLI(
            Recipe,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # recipes say themselves what they were made with
            parser_class=Parser,
            parser_kwargs={"prog": "segops", "default_env": False},
            args=named_configs(arguments),
        )
    except MisconfigurationException as error:
        raise ValueError(error) from error
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):  # and lists those there are
            raise ValueError(error) from error
        raise
