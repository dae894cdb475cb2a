"""Headline timings: the papers' shapes, checked, then timed beside plain PyTorch, with the time of
every kernel. Run by `benchmarks.gpu`."""

from functools import partial

import torch

from . import measure, suites
from .gpu import Case, short_name
from .measure import DEVICE

# On a CPU this is a rehearsal: its numbers do not matter.
measure.SECONDS |= {"cpu": 0.02, "cuda": 0.15}
measure.PRODUCT_SIDE["cpu"], measure.COPY_SIZE["cpu"] = 256, 2**16


def chosen_calls(bench, case, kind, baselines):
    """{name: the call to time} of segops and of the baselines."""
    functions = bench.functions(case)
    chosen = {name: functions[name] for name in functions if name.startswith("segops") or name in baselines}
    return bench.calls(case, kind, chosen)


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


def timed(bench, case, baselines):
    with measure.precision(getattr(case, "tf32", False)):
        error = bench.gate(case)
        if not error <= 1:
            return {"failed": f"wrong by {error:.2f} times the bound: no time is reported"}
        rows = []
        for kind in bench.HEADLINE.kinds:
            torch.compiler.reset()  # or the compiled baseline falls back to eager at the recompilation limit
            calls = chosen_calls(bench, case, kind, baselines)
            times = measure.compare(calls, DEVICE)
            beside = [name for name in calls if not name.startswith("segops")]
            for row in measure.rows(kind, calls, times, beside, bench.floor(case, kind), {}, DEVICE):
                launch = measure.launch_time(calls[row["name"]], DEVICE)
                rows.append(row | {"launch": launch, "error": error})
        kernels = [
            {"call": name, **kernel, "name": short_name(kernel["name"])}
            for name, call in calls.items()
            if name.startswith("segops") and "compile" not in baselines  # those were profiled before
            for kernel in measure.kernel_times(call, DEVICE)
        ]
    return {"error": error, "rows": rows, "kernels": kernels}


def call(bench, case):
    with measure.precision(getattr(case, "tf32", False)):
        for function in chosen_calls(bench, case, bench.HEADLINE.kinds[-1], ()).values():
            function()
    return {}


def cases(options):
    """Beside eager PyTorch."""
    return [
        Case("rates", rates),
        *(
            Case(f"{op} {case}", partial(timed, bench, case, (bench.HEADLINE.eager,)))
            for op, bench in suites.load(options.only).items()
            for case in bench.HEADLINE.cases
        ),
    ]


def few(options):
    """(op, bench, case) of a case or two of each op."""
    for op, bench in suites.load(options.only).items():
        yield from ((op, bench, bench.HEADLINE.cases[i]) for i in bench.HEADLINE.few)


def compiled_cases(options):
    """Beside torch.compile as well."""
    return [
        Case(f"{op} {case}", partial(timed, bench, case, (bench.HEADLINE.eager, "compile"))) for op, bench, case in few(options)
    ]


def single_calls(options):
    """For a profiler: each called once, without baselines."""
    return [Case(f"{op} {case}", partial(call, bench, case)) for op, bench, case in few(options)]
