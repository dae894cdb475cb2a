"""Headline timings: the papers' shapes, checked, then timed beside plain PyTorch, with the time of
every kernel. Run by `benchmarks.gpu`."""

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from . import bench_argmax, bench_bal, bench_pac, bench_pag, measure
from .gpu import Case, short_name
from .measure import DEVICE

# On a CPU this is a rehearsal: its numbers do not matter.
measure.SECONDS |= {"cpu": 0.02, "cuda": 0.15}
measure.PRODUCT_SIDE["cpu"], measure.COPY_SIZE["cpu"] = 256, 2**16


@dataclass(frozen=True)
class Suite:
    bench: ModuleType
    few: tuple = (0,)  # the cases that stand for the op where a case takes long
    eager: str = "eager"  # the best baseline without torch.compile
    kinds: tuple = ("forward", "full")

    def calls(self, case, kind, baselines):
        """{name: the call to time} of segops and of the baselines."""
        functions = self.bench.functions(case)
        chosen = {name: functions[name] for name in functions if name.startswith("segops") or name in baselines}
        return self.bench.calls(case, kind, chosen)


SUITES = {  # the quickest first: cuDNN's autotuning takes seconds
    "bal": Suite(bench_bal, eager="handwritten"),
    "argmax": Suite(bench_argmax, kinds=("forward",)),
    "pag": Suite(bench_pag, few=(0, -1)),
    "pac": Suite(bench_pac),
}


def rates():
    """The machine's own rates, of which floors are made."""
    dtypes = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32,)
    with measure.precision():
        products = {
            f"{str(dtype).removeprefix('torch.')} products, TFLOP/s": measure.product_rate(DEVICE, dtype) / 1e12
            for dtype in dtypes
        }
        return {
            "rates": {
                "copy, TB/s": measure.copy_rate(DEVICE) / 1e12,
                **products,
                "exponentials, 10^12/s": measure.exponential_rate(DEVICE) / 1e12,
            }
        }


def timed(suite, case, baselines):
    with measure.precision(getattr(case, "tf32", False)):
        error = suite.bench.gate(case)
        if not error <= 1:
            return {"failed": f"wrong by {error:.2f} times the bound: no time is reported"}
        rows = []
        for kind in suite.kinds:
            torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
            calls = suite.calls(case, kind, baselines)
            times = measure.compare(calls, DEVICE)
            beside = [name for name in calls if not name.startswith("segops")]
            for row in measure.rows(kind, calls, times, beside, suite.bench.floor(case, kind), {}, DEVICE):
                launch = measure.launch_time(calls[row["name"]], DEVICE)
                rows.append(row | {"launch": launch, "error": error})
        kernels = [
            {"call": name, **kernel, "name": short_name(kernel["name"])}
            for name, call in calls.items()
            if name.startswith("segops") and "compile" not in baselines  # those were profiled before
            for kernel in measure.kernel_times(call, DEVICE)
        ]
    return {"error": error, "rows": rows, "kernels": kernels}


def call(suite, case):
    with measure.precision(getattr(case, "tf32", False)):
        for function in suite.calls(case, suite.kinds[-1], ()).values():
            function()
    return {}


def cases(options):
    """Beside eager PyTorch."""
    return [
        Case("rates", rates),
        *(
            Case(f"{op} {case}", partial(timed, suite, case, (suite.eager,)))
            for op, suite in SUITES.items()
            if options.only in (None, op)
            for case in suite.bench.HEADLINE
        ),
    ]


def few(options):
    """(op, suite, case) of a case or two of each op."""
    for op, suite in SUITES.items():
        if options.only in (None, op):
            yield from ((op, suite, suite.bench.HEADLINE[i]) for i in suite.few)


def compiled_cases(options):
    """Beside torch.compile as well."""
    return [Case(f"{op} {case}", partial(timed, suite, case, (suite.eager, "compile"))) for op, suite, case in few(options)]


def single_calls(options):
    """For a profiler: each called once, without baselines."""
    return [Case(f"{op} {case}", partial(call, suite, case)) for op, suite, case in few(options)]
