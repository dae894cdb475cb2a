"""Turns what pytest-benchmark wrote into rows (CSV, JSON), a Markdown table and a plot."""

import csv
import json
import math
from pathlib import Path


def collect(raw):
    """pytest-benchmark's JSON -> {op: {"environment": ..., "rows": [...]}}; each row is one implementation of one case and pass,
    `against` its baselines."""
    benchmarks = [b["extra_info"] for b in json.loads(Path(raw).read_text())["benchmarks"]]
    if not benchmarks:
        raise ValueError(f"{raw} holds no benchmarks")
    results = {}
    for b in benchmarks:
        rows = results.setdefault(b["op"], {"environment": b["environment"], "rows": []})["rows"]
        rows += [{"case": b["case"], "gate": b["gate"], **row} for row in b["rows"]]
    return results


def write(results, folder, name):
    """Writes one op's NAME.json, NAME.csv, NAME.md and, where matplotlib is installed, NAME.png; returns the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    write_csv([{**row, **beside} for row in results["rows"] for beside in row["against"]], folder / f"{name}.csv")
    table = render(results)
    (folder / f"{name}.md").write_text(table + "\n")
    try:
        plot(results, folder / f"{name}.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    return table


def write_csv(lines, path):
    """Writes dictionaries, not all of which have all keys."""
    with open(path, "w", newline="") as file:
        keys = dict.fromkeys(key for line in lines for key in line if key != "against")
        writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def render(results):
    """A Markdown table, a line for each segops row and baseline: times and peak memory of both, their ratios, the bars, the floor;
    what both keep for backward, where it was measured; the most memory that segops may take, where there is a bound."""
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items() if value is not None)
    lines = [
        environment,
        "",
        "| case | pass | implementation | ms (p20-p80) | x floor | error / bound | baseline | its ms | ratio | bar | peak MB | its MB | memory ratio | memory bar |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    has_kept = any("kept" in row for row in results["rows"])
    if has_kept:
        lines[2:] = [lines[2] + " kept MB | its kept MB | kept ratio | kept bar |", lines[3] + "---|---|---|---|"]
    has_allowed = any("allowed" in row for row in results["rows"])
    if has_allowed:
        lines[2:] = [lines[2] + " allowed MB |", lines[3] + "---|"]
    by_name = {(row["case"], row["kind"], row["name"]): row for row in results["rows"]}
    for row, beside in _comparisons(results):
        baseline = by_name[row["case"], row["kind"], beside["baseline"]]
        lines.append(
            f"| {row['case']} | {row['kind']} | {row['name']} | {row['median']:.3g} ({row['p20']:.3g}-{row['p80']:.3g}) "
            f"| {row['median'] / row['floor']:.2f} | {row['gate']:.2f} "
            f"| {beside['baseline']} | {baseline['median']:.3g} | {beside['ratio']:.2f} | {_verdict(beside['ratio'], beside['bar'])} "
            f"| {row['memory'] / 1e6:.1f} | {baseline['memory'] / 1e6:.1f} "
            f"| {beside['memory_ratio']:.2f} | {_verdict(beside['memory_ratio'], beside['memory_bar'])} |"
            + (_kept(row, baseline, beside) if has_kept else "")
            + (_allowed(row) if has_allowed else "")
        )
    return "\n".join(lines)


def _comparisons(results):
    """(row, what it is beside one baseline) of the segops rows."""
    return [(row, beside) for row in results["rows"] if row["name"].startswith("segops") for beside in row["against"]]


def _kept(row, baseline, beside):
    """The four cells about memory kept for backward: empty for a pass without one."""
    if "kept" not in row:
        return "  |" * 4
    return (
        f" {row['kept'] / 1e6:.1f} | {baseline['kept'] / 1e6:.1f} "
        f"| {beside['kept_ratio']:.2f} | {_verdict(beside['kept_ratio'], beside['kept_bar'])} |"
    )


def _allowed(row):
    """The cell about the bound of memory: empty for a row without one."""
    if "allowed" not in row:
        return "  |"
    return f" {row['allowed'] / 1e6:.1f} {'met' if row['memory'] <= row['allowed'] else 'MISSED'} |"


def _verdict(ratio, bar):
    return "" if bar is None else f"{bar} {'met' if ratio >= bar else 'MISSED'}"


def plot(results, path):
    """A bar per case, implementation and baseline: how many times faster than it. Where each case has one baseline, as the fastest
    of several, an implementation's bars are one series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = any(len(row["against"]) > 1 for row in results["rows"])
    series = {}
    for row, beside in _comparisons(results):
        bars, baselines = series.setdefault((row["name"], several and beside["baseline"]), ({}, set()))
        bars[row["case"], row["kind"]] = beside["ratio"]
        baselines.add(beside["baseline"])
    cases = list(dict.fromkeys(case for bars, _ in series.values() for case in bars))
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.16 * len(cases) * len(series)), layout="constrained")
    height = 0.8 / len(series)
    for i, ((name, _), (bars, baselines)) in enumerate(series.items()):
        label = f"{name} over {' or '.join(sorted(baselines))}"
        axes.barh(
            [y + i * height for y in range(len(cases))], [bars.get(case, math.nan) for case in cases], height, label=label
        )
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(cases))], [f"{case}, {kind}" for case, kind in cases], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times the baseline in the same process (1 = as fast)")
    axes.set_title(f"{results['environment']['device']}, torch {results['environment']['torch']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
