"""The benchmarks of each op, bench_OP.py."""

import importlib
from pathlib import Path

OPS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def load(only=None):
    """{op: its module}, those whose baselines take long to tune last."""
    modules = {op: importlib.import_module(f".bench_{op}", __package__) for op in OPS if only in (None, op)}
    return dict(sorted(modules.items(), key=lambda item: item[1].HEADLINE.slow))
