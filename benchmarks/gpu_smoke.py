"""The trials of every op, forward and backward, against float64: three dtypes, both memory formats,
sizes that 16-byte vectors divide and sizes that they do not. Run by `benchmarks.gpu`."""

import itertools
from functools import partial

import torch

from . import suites
from .gpu import Case
from .measure import DEVICE, FORMATS
from .trials import DTYPES, Setup


def run_trial(trial, setup):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ratio = trial(setup)
    return {"error": ratio} | ({} if ratio <= 1 else {"failed": f"error {ratio:.3g} times its bound"})


def cases(options):
    """All trials on all setups. A trial in one dtype is a group: Triton compiles it once."""
    tiny = options.tiny or DEVICE == "cpu"
    setups = [
        Setup(dtype, memory_format, packed, tiny)
        for packed, memory_format, dtype in itertools.product((True, False), FORMATS, DTYPES)
    ]
    trials = {(op, name): trial for op, bench in suites.load(options.only).items() for name, trial in bench.TRIALS.items()}
    if DEVICE == "cpu" and options.backend == "triton":
        # Triton's interpreter takes seconds for a trial, and truncates to bfloat16.
        setups = setups[:1]
        trials = {names: trials[names] for names in {names[0]: names for names in trials}.values()}
    groups = {group: i for i, group in enumerate(itertools.product(DTYPES, trials))}
    return [
        Case(f"{' '.join(names)} {setup}", partial(run_trial, trial, setup), groups[setup.dtype, names])
        for setup in setups
        for names, trial in trials.items()
    ]
