"""The command line, `segops` or `python -m segops`: info, models, fit, validate, test, predict,
ablate, bench."""

import argparse
import importlib
import os
import platform
import re
import sys
import warnings

import torch

import segops

from .backend import ORDER, automatic, build_info, implementation, requested, untried, why_not
from .text import printable


def describe_build(info):
    """A binary's build_info() as lines, or why there is none."""
    return [f"not available: {info}"] if isinstance(info, str) else [
        f"{key}: {' '.join(value) if isinstance(value, list) else value}" for key, value in info.items()
    ]  # fmt: skip


def devices():
    """(label, device type, index) of every device that segops could run on here."""
    yield f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)", "cpu", None
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index} ({torch.cuda.get_device_name(index)})", "cuda", index
    for index in range(torch.xpu.device_count()):
        yield f"xpu:{index} ({torch.xpu.get_device_name(index)})", "xpu", index


def ops():
    """The names of the public functions that are ops."""
    return [name for name in segops.__all__ if getattr(getattr(segops, name), "__module__", "").startswith("segops.ops.")]


def info():
    """Prints versions, the built binaries and, per op and device, which backend runs and why the
    others do not."""
    print(
        f"segops {segops.__version__}   torch {torch.__version__}   python {platform.python_version()}   CUDA {torch.version.cuda}"
    )
    for name, built in build_info().items():
        print(f"{name} kernels")
        for line in describe_build(built):
            print(f"    {line}")
    print(f"requested backend: {requested()}")
    for label, kind, index in devices():
        reasons = {name: why_not(name, kind, index, torch.float32) for name in ORDER}
        chosen = automatic(kind, index, torch.float32) if requested() == "auto" else requested()
        print(label)
        for op in ops():
            runs = implementation(op, chosen, kind)
            lacking = "" if runs == chosen else f" (it has no kernels for {chosen!r} on {kind} yet)"
            print(f"    {op}: {runs}{lacking}" + (f" CANNOT RUN: {reasons[chosen]}" if reasons[chosen] else ""))
        for name in ORDER:
            available = "available, never tried on such a GPU" if untried(name, kind) else "available"
            print(f"    {name:<10} {reasons[name] or available}")
    if not torch.cuda.is_available():
        print("no CUDA device is visible")


def models():
    """Prints the reference models: parameters, multiply-adds, paper."""
    from .models.table import lines

    for line in lines():
        print(line)


def engine(arguments):
    """`fit`, `validate`, `test`."""
    from .train.cli import main

    main(arguments)


def parsed(module):
    """A command whose module, relative to this package, has `add_arguments(parser)` and
    `run(options)`."""

    def command(arguments):
        implementation = importlib.import_module(module, __package__)
        parser = argparse.ArgumentParser(
            prog=f"segops {arguments[0]}", description=COMMANDS[arguments[0]][0], allow_abbrev=False
        )
        implementation.add_arguments(parser)
        implementation.run(parser.parse_args(arguments[1:]))

    return command


def plain(function):
    """A command without arguments."""

    def command(arguments):
        argparse.ArgumentParser(prog=f"segops {arguments[0]}", description=COMMANDS[arguments[0]][0]).parse_args(arguments[1:])
        function()

    return command


COMMANDS = {
    "info": ("versions, what was built, and which backend each op runs on", plain(info)),
    "models": ("the reference models: parameters, multiply-adds, paper", plain(models)),
    "fit": ("train: --config NAME or FILE, then any setting, as --data.root FOLDER --trainer.max_epochs 20", engine),
    "validate": ("the figures of a checkpoint on the validation set: --config FILE --ckpt_path FILE", engine),
    "test": ("the same on the test set", engine),
    "predict": ("class maps, overlays and loss images of files and folders", parsed(".train.predict")),
    "ablate": ("train all variants and seeds of a table, and print it beside the paper's", parsed(".train.ablation")),
    "bench": ("the benchmark suite: checks, then times, each op against plain PyTorch", parsed(".benchmarks.__main__")),
}


# What a user may have done wrong, or a machine may lack. Others are faults of segops.
MISTAKES = (
    FloatingPointError,
    ImportError,
    IndexError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    torch.OutOfMemoryError,
)


OF_WORKER = r"Caught \w+ in (DataLoader worker|pin memory thread)"  # whatever type it comes as


def one_line(error):
    """What an exception says, without line breaks or what else would steer a terminal."""
    text = str(error).strip() or repr(error)
    if re.match(OF_WORKER, text):  # what follows is a traceback, whose last line says it
        last = text.splitlines()[-1]
        text = last.partition(": ")[2] or last
    return printable(" ".join(text.split())[:3000])


def main():
    parser = argparse.ArgumentParser(
        prog="segops",
        description="Kernels for semantic segmentation, reference models, training.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{text}" for name, (text, _) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"segops {segops.__version__}")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="command", help="one of those below; segops COMMAND --help says more"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    arguments = sys.argv[1:]
    name = parser.parse_args(arguments[:1]).command
    try:
        COMMANDS[name][1](arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"segops {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        of_worker = re.match(OF_WORKER, str(error))
        if os.environ.get("SEGOPS_TRACEBACK") == "1" or not (of_worker or isinstance(error, MISTAKES)):
            raise
        raise SystemExit(f"segops {name}: {one_line(error)}") from error


if __name__ == "__main__":
    main()
