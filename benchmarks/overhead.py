"""What a call costs: each op on 4x4 maps, where nothing else does, beside PyTorch's own ops for the same.

    python -m benchmarks overhead

One thread, one process, in turns; medians. On a GPU it is what the CPU spends to launch the work.
"""

import json
import random
import statistics
import time

from . import measure, suites
from .report import write_csv

CALLS_PER_ROUND = 100


def compare(functions, rounds=30):
    """{name: median microseconds of a call}, round after round in an order drawn anew for each."""
    times, order = {name: [] for name in functions}, random.Random(0)
    for round_number in range(rounds + 3):  # the first ones warm up
        for name in order.sample(list(functions), len(functions)):
            function = functions[name]
            measure.synchronise()
            start = time.perf_counter()
            for _ in range(CALLS_PER_ROUND):
                function()
            elapsed = time.perf_counter() - start
            if round_number >= 3:
                times[name].append(elapsed / CALLS_PER_ROUND * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def rows(rounds=30):
    """A dictionary for each call and pass."""
    for op, module in suites.load().items():
        for name, call in module.CALLS.items():
            tensors = [each.to(measure.DEVICE) for each in call.draw()]
            tensors = [each.requires_grad_() if each.is_floating_point() else each for each in tensors]
            for kind, bar in call.bars.items():
                functions = {
                    each: measure.timed_call(lambda *tensors, run=run: first(run(*tensors)), tensors, kind)
                    for each, run in (("segops", call.op), ("pytorch", call.plain))
                }
                found = compare(functions, rounds)
                ratio = found["segops"] / found["pytorch"]
                yield {"op": op, "call": name, "pass": kind, **found, "ratio": ratio, "bar": bar}


def render(environment, rows):
    """A Markdown table, a line for each call and pass."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None),
        "",
        "| op | call | pass | segops, us | PyTorch, us | times PyTorch | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = f"{row['bar']} {'met' if row['ratio'] <= row['bar'] else 'MISSED'}"
        figures = f"{row['segops']:.1f} | {row['pytorch']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['op']} | {row['call']} | {row['pass']} | {figures} | {verdict} |")
    return "\n".join(lines)


def run(folder, name, rounds=30):
    """Times all calls; writes overhead-NAME.json, .csv and .md to the folder and returns the table."""
    with measure.threads(1):
        environment, found = measure.environment(measure.DEVICE), list(rows(rounds))
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"overhead-{name}"
    (folder / f"{stem}.json").write_text(json.dumps({"environment": environment, "rows": found}, indent=1) + "\n")
    write_csv(found, folder / f"{stem}.csv")
    table = render(environment, found)
    (folder / f"{stem}.md").write_text(table + "\n")
    return table
