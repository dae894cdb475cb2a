"""Turns what pytest-benchmark wrote into rows (CSV, JSON), a Markdown table and a plot."""

import csv
import json
from pathlib import Path


def collect(raw):
    """pytest-benchmark's JSON -> {"environment": ..., "rows": [...]}; each row is one implementation of one case and pass."""
    benchmarks = [b["extra_info"] for b in json.loads(Path(raw).read_text())["benchmarks"]]
    if not benchmarks:
        raise ValueError(f"{raw} holds no benchmarks")
    rows = [{"case": b["case"], "gate": b["gate"], **row} for b in benchmarks for row in b["rows"]]
    return {"environment": benchmarks[0]["environment"], "rows": rows}


def write(results, folder, name):
    """Writes NAME.json, NAME.csv, NAME.md and, where matplotlib is installed, NAME.png; returns the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, results["rows"][0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(results["rows"])
    table = render(results)
    (folder / f"{name}.md").write_text(table + "\n")
    try:
        plot(results, folder / f"{name}.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    return table


def render(results):
    """A Markdown table of the segops rows: time, the best plain PyTorch, their ratio, the floor, memory, and the bar."""
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items() if value is not None)
    lines = [
        environment,
        "",
        "| case | pass | implementation | ms (p20-p80) | best plain PyTorch, ms | ratio | x floor | peak MB (plain) | error / bound | bar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_name = {(row["case"], row["kind"], row["name"]): row for row in results["rows"]}
    for row in results["rows"]:
        if not row["name"].startswith("segops"):
            continue
        plain = by_name[row["case"], row["kind"], row["baseline"]]
        bar = "" if row["bar"] is None else f"{row['bar']} {'met' if row['ratio'] >= row['bar'] else 'MISSED'}"
        lines.append(
            f"| {row['case']} | {row['kind']} | {row['name']} | {row['median']:.3g} ({row['p20']:.3g}-{row['p80']:.3g}) "
            f"| {plain['median']:.3g} {row['baseline']} | {row['ratio']:.2f} | {row['median'] / row['floor']:.2f} "
            f"| {row['memory'] / 1e6:.1f} ({plain['memory'] / 1e6:.1f}) | {row['gate']:.2f} | {bar} |"
        )
    return "\n".join(lines)


def plot(results, path):
    """A bar per case and implementation: how many times faster than the best plain PyTorch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["name"].startswith("segops")]
    cases = list(dict.fromkeys((row["case"], row["kind"]) for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.32 * len(cases)), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        ratios = {(row["case"], row["kind"]): row["ratio"] for row in rows if row["name"] == name}
        axes.barh([y + i * height for y in range(len(cases))], [ratios[case] for case in cases], height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(cases))], [f"{case}, {kind}" for case, kind in cases], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times the best plain PyTorch in the same process (1 = as fast)")
    axes.set_title(f"{results['environment']['device']}, torch {results['environment']['torch']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
