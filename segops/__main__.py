"""The command line: `python -m segops info`, `python -m segops models`."""

import argparse
import os
import platform
import sys

import torch

from . import __version__
from .backend import ORDER, build_info, requested, why_not

OPS = (
    "pyramid_atrous_conv2d",
    "gaussian_edge",
    "upsample_cross_entropy",
    "boundary_aware_loss",
    "partial_attention_gate",
    "max_pool2d_with_offsets",
    "max_unpool2d_with_offsets",
    "upsample_argmax",
)


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


def info():
    """Prints versions, the built binaries and, per op and device, which backend runs and why the others do not."""
    print(f"segops {__version__}   torch {torch.__version__}   python {platform.python_version()}   CUDA {torch.version.cuda}")
    for name, built in build_info().items():
        print(f"{name} kernels")
        for line in describe_build(built):
            print(f"    {line}")
    print(f"requested backend: {requested()}")
    for label, kind, index in devices():
        reasons = {name: why_not(name, kind, index, torch.float32) for name in ORDER}
        able = [name for name in ORDER if reasons[name] is None]
        chosen = able[0] if requested() == "auto" else requested()
        print(label)
        for op in OPS:
            print(f"    {op}: {chosen}" + ("" if chosen in able else f" CANNOT RUN: {reasons[chosen]}"))
        for name in ORDER:
            print(f"    {name:<10} {reasons[name] or 'available'}")
    if not torch.cuda.is_available():
        print("no CUDA device is visible")


def models():
    """Prints the reference models: parameters, multiply-adds, paper."""
    try:
        from .models.table import lines
    except ImportError as error:
        raise SystemExit(f"segops: {error}") from error
    for line in lines():
        print(line)


def main():
    parser = argparse.ArgumentParser(prog="python -m segops", description="Kernels for semantic segmentation, as PyTorch ops.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="versions, what was built, and which backend each op runs on").set_defaults(run=info)
    commands.add_parser("models", help="the reference models: parameters, multiply-adds, paper").set_defaults(run=models)
    try:
        parser.parse_args().run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
