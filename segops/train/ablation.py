"""`segops ablate`: trains every variant and seed of a table, and sets what comes out beside the paper's figures."""

import csv
import fcntl
import io
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .cli import CONFIGS, read_yaml, shipped
from .files import write_whole
from .runs import last_checkpoint

ABLATIONS = CONFIGS / "ablations"
KEYS = {"title", "source", "note", "base", "arguments", "metric", "scale", "baseline", "seeds", "variants"}
VARIANT_KEYS = {"name", "arguments", "base", "metric", "paper", "after", "report"}
OURS = ("--ckpt_path", "--seed_everything", "--trainer.default_root_dir")  # of segops fit: the runner's to give
AFTER = "{after}"
LOG_LINES = 10  # of a run that failed, shown
REDUCTIONS = {"macro": "mean over the classes that occur", "micro": "of the sums over all classes"}


@dataclass(frozen=True)
class Variant:
    """One row of a table, as `load` reads it. paper is {metric: {"value": ..., "difference": ...}}, either may be absent."""

    name: str
    arguments: tuple
    base: tuple
    metrics: tuple
    paper: dict
    after: str | None
    report: bool


@dataclass(frozen=True)
class Ablation:
    """A table to be reproduced, as `load` reads it: variants is {name: Variant}, in the table's order."""

    file: Path
    title: str
    source: str
    note: str
    scale: float
    baseline: str | None
    seeds: tuple
    variants: dict

    def reported(self):
        return [variant for variant in self.variants.values() if variant.report]

    def metrics(self):
        """Those of all reported variants, each once."""
        return list(dict.fromkeys(metric for variant in self.reported() for metric in variant.metrics))


def load(name):
    """Reads an ablation.

    Args:
        name: of a shipped one, or a YAML file with
            title, source: of the table. note: printed with it, optional.
            base: a shipped configuration or a file, relative to this one; or a list of them.
            arguments: further arguments of `segops fit`, of all variants; default none.
            metric: of results.json's last epoch, as val/iou_macro; or a list.
            scale: what metrics are multiplied by, default 1; 100 for per cent.
            baseline: name of the variant that differences are taken to, optional.
            seeds: list of ints.
            variants: list of
                name: also of its folder: letters, digits and ._+-
                arguments: of this variant, default none.
                base, metric: in place of those above.
                paper: {value: ..., difference: ...}, both optional; with several metrics {METRIC: {value: ..., ...}, ...}.
                after: a variant above, whose run folder of the same seed takes the place of {after} in the arguments.
                report: false for a variant that is there for its checkpoint alone; default true.

    Returns `Ablation`.

    Raises:
        FileNotFoundError: neither a shipped ablation nor a file. ValueError: what is wrong with it.
    """
    path = Path(name)
    if not path.is_file():
        path = ABLATIONS / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"ablation must be a file or one of {', '.join(shipped(ABLATIONS))}; got {str(name)!r}")
    content = read_yaml(path)
    try:
        return _ablation(path, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _ablation(path, content):
    _check_keys("an ablation", content, KEYS, ("title", "source", "seeds", "variants"))
    texts = [_text(key, content.get(key, "")) for key in ("title", "source", "note")]
    scale = content.get("scale", 1)
    if not _is_number(scale) or scale <= 0:
        raise ValueError(f"scale must be a positive number; got {scale!r}")
    seeds = content["seeds"]
    check_seeds(seeds)
    if not isinstance(content["variants"], list) or not content["variants"]:
        raise ValueError(f"variants must be a list of one or more; got {content['variants']!r}")
    variants = {}
    for number, entry in enumerate(content["variants"], 1):
        variant = _variant(number, entry, content, variants)
        variants[variant.name] = variant
    baseline = content.get("baseline")
    reported = [name for name, variant in variants.items() if variant.report]
    if not reported:
        raise ValueError("variants must have one that is reported; all say report: false")
    if baseline is not None and baseline not in reported:
        raise ValueError(f"baseline must be one of the variants {', '.join(reported)}; got {baseline!r}")
    return Ablation(path, *texts, scale, baseline, tuple(seeds), variants)


def _variant(number, entry, content, before):
    """A Variant from its entry in the list; `before` are those above it."""
    where = f"variant {number}"
    _check_keys(where, entry, VARIANT_KEYS, ("name",))
    name = entry["name"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name, re.ASCII):
        raise ValueError(f"{where}: name must be letters, digits and ._+- (quoted if digits alone); got {name!r}")
    where = f"variant {name!r}"
    if name in before:
        raise ValueError(f"{where}: name must occur once; it occurs twice")
    merged = content | entry
    base = _names(f"{where}: base", merged.get("base"))
    metrics = _names(f"{where}: metric", merged.get("metric"))
    arguments = [
        *_arguments("arguments", content.get("arguments", [])),
        *_arguments(f"{where}: arguments", entry.get("arguments", [])),
    ]
    after = entry.get("after")
    if after is not None and after not in before:
        raise ValueError(f"{where}: after must be a variant above it; got {after!r}")
    if (after is not None) != any(AFTER in argument for argument in arguments):
        raise ValueError(f"{where}: after and {AFTER} in arguments must go together; got after: {after!r} and {arguments!r}")
    report = entry.get("report", True)
    if not isinstance(report, bool):
        raise ValueError(f"{where}: report must be true or false; got {report!r}")
    paper = _paper(f"{where}: paper", entry.get("paper", {}), metrics)
    return Variant(name, tuple(arguments), base, metrics, paper, after, report)


def _paper(where, paper, metrics):
    """{metric: {"value": ..., "difference": ...}} from either form."""
    if isinstance(paper, dict) and len(metrics) == 1 and paper.keys() <= {"value", "difference"}:
        paper = {metrics[0]: paper}
    _check_keys(where, paper, set(metrics), ())
    for metric, figures in paper.items():
        _check_keys(f"{where}: {metric}", figures, {"value", "difference"}, ())
        for key, value in figures.items():
            if not _is_number(value):
                raise ValueError(f"{where}: {metric}: {key} must be a number; got {value!r}")
    return paper


def _check_keys(where, mapping, known, needed):
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping; got {mapping!r}")
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where} has no {key!r}: it may have {', '.join(sorted(known))}")
    for key in needed:
        if key not in mapping:
            raise ValueError(f"{where} must have {key!r}")


def _text(name, value):
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text; got {value!r}")
    return value.strip()


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(where, value):
    """A name or a list of them as a tuple."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where} must be a name or a list of names; got {value!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{where} must name each once; got {value!r}")
    return tuple(names)


def _arguments(where, value):
    if not isinstance(value, list) or not all(isinstance(argument, str) for argument in value):
        raise ValueError(f"{where} must be a list of texts; got {value!r}")
    for argument in value:
        if argument.split("=")[0] in OURS:
            raise ValueError(f"{where} must leave {', '.join(OURS)} to segops ablate; got {argument!r}")
    return value


def check_seeds(seeds):
    """ValueError unless it is a list of different ints >= 0."""
    right = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not right or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a list of different ints, at least 0 and below 2^32; got {seeds!r}")


def base_files(ablation, variant):
    """The configurations of a variant as paths. FileNotFoundError: one is neither a file nor shipped."""
    files = []
    for name in variant.base:
        own = ablation.file.parent / name
        path = own if own.is_file() else CONFIGS / f"{name}.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                f"{ablation.file}: variant {variant.name!r}: base must be a file beside it or one of {', '.join(shipped())}; "
                f"got {name!r}"
            )
        files.append(path)
    return files


def schedule(ablation, seeds, only=None):
    """[(variant, seed)] in the order of training: all variants of a seed before the next seed.

    Args:
        only: names of variants; those that they come after are added. Default: all.

    Raises:
        ValueError: `only` names a variant that there is not.
    """
    wanted = set(ablation.variants if only is None else only)
    for name in sorted(wanted):
        if name not in ablation.variants:
            raise ValueError(f"--only must name variants, of {', '.join(ablation.variants)}; got {name!r}")
    for variant in reversed(ablation.variants.values()):  # `after` is always above
        if variant.name in wanted and variant.after is not None:
            wanted.add(variant.after)
    return [(variant, seed) for seed in seeds for variant in ablation.variants.values() if variant.name in wanted]


def asked(ablation, variant, extra):
    """What a variant is trained with, for every seed: what run.json keeps, to be compared with what is asked for later."""
    contents = [read_yaml(path) for path in base_files(ablation, variant)]
    return {"configs": json.loads(json.dumps(contents, default=str)), "arguments": [*variant.arguments, *extra]}


def command(ablation, variant, seed, out, extra):
    """The command of a run, but for --ckpt_path."""
    arguments = [*variant.arguments, *extra]
    if variant.after is not None:
        arguments = [argument.replace(AFTER, str(out / variant.after / str(seed))) for argument in arguments]
    return [
        *(sys.executable, "-m", "segops", "fit"),
        *(f"--config={path}" for path in base_files(ablation, variant)),
        *arguments,
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={out / variant.name / str(seed)}",
    ]


def record(folder):
    """run.json of a run's folder: {"asked": ..., "finished": bool}; None where there is none."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_record(folder, asked, finished):
    _write_text(folder / "run.json", json.dumps({"asked": asked, "finished": finished}, indent=1) + "\n")


def _write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def check_same(folder, asked):
    """ValueError if the folder holds a run, finished or not, that was trained with something else than is asked for."""
    before = record(folder)
    if before is None:
        if last_checkpoint(folder).is_file():
            raise ValueError(f"{folder} holds a run that segops ablate did not begin: move it away, or give another --out")
        return
    if before["asked"] == asked or not (before["finished"] or last_checkpoint(folder).is_file()):
        return
    then, now = before["asked"]["arguments"], asked["arguments"]
    if then == now:
        difference = "its base configuration was another"
    else:
        difference = f"it was trained with {' '.join(then) or 'no arguments'}; asked for is {' '.join(now) or 'none'}"
    raise ValueError(f"{folder} holds another run: {difference}. Move the folder away, ask for the same, or give another --out")


def start(command, log, lock):
    """Runs a command, its output added to the file `log`, and returns its exit status.

    Args:
        lock: file descriptor that the command keeps open, so that it holds the runner's lock where the runner is killed.
    """
    with log.open("ab") as file:
        return subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=[lock]
        ).returncode


def train(ablation, variant, seed, out, extra, lock):
    """Trains one variant with one seed, from last.ckpt where it was interrupted. Returns why that failed, or None."""
    folder = out / variant.name / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = command(ablation, variant, seed, out, extra)
    if last_checkpoint(folder).is_file():
        arguments.append("--ckpt_path=last")
    what = asked(ablation, variant, extra)
    _write_record(folder, what, finished=False)
    log = folder / "log.txt"
    status = start(arguments, log, lock)
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"exit status {status}; the end of {log}:", *lines[-LOG_LINES:]])
    if not (folder / "results.json").is_file():
        return f"it left no {folder / 'results.json'}"
    _write_record(folder, what, finished=True)
    return None


def collect(ablation, out):
    """What is there of the reported variants, whatever its seed.

    Returns {variant: {seed: {metric: scaled, ..., "seconds": ..., "epochs": ...}}}.

    Raises:
        ValueError: a finished run has no such metric.
    """
    results = {}
    for variant in ablation.reported():
        folders = [folder for folder in (out / variant.name).glob("*") if folder.name.isdecimal()]
        results[variant.name] = {
            int(folder.name): _figures(ablation, variant, folder)
            for folder in sorted(folders, key=lambda folder: int(folder.name))
            if (record(folder) or {}).get("finished")
        }
    return results


def _figures(ablation, variant, folder):
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    last = results["epochs"][-1]
    for metric in variant.metrics:
        if metric not in last:
            known = ", ".join(sorted(name for name in last if "/" in name))
            raise ValueError(f"{ablation.file}: metric of {variant.name!r} must be one of {path}: {known}; got {metric!r}")
    # null: a figure of nothing
    scaled = {metric: None if last[metric] is None else ablation.scale * last[metric] for metric in variant.metrics}
    return scaled | {"seconds": results["seconds"], "epochs": last["epoch"]}


def summarise(ablation, results):
    """A dictionary for each metric and reported variant, with the columns of summary.csv: mean and sample standard deviation over
    seeds, their number n, the difference of means to the baseline; the paper's value and difference. None: not known."""
    rows = []
    for metric in ablation.metrics():
        means = {}
        for variant in ablation.reported():
            if metric in variant.metrics:
                found = (figures[metric] for figures in results[variant.name].values())
                values = [value for value in found if value is not None]
                means[variant.name] = statistics.fmean(values) if values else None
                rows.append(
                    {
                        "variant": variant.name,
                        "metric": metric,
                        "mean": means[variant.name],
                        "std": statistics.stdev(values) if len(values) > 1 else None,
                        "n": len(values),
                    }
                )
        printed = {name: variant.paper.get(metric, {}) for name, variant in ablation.variants.items()}
        values = {name: figures.get("value") for name, figures in printed.items()}
        for row in (row for row in rows if row["metric"] == metric):
            name = row["variant"]
            row["difference"] = _difference(name, means, ablation.baseline)
            row["paper"] = values[name]
            row["paper_difference"] = printed[name].get("difference", _difference(name, values, ablation.baseline))
    return rows


def _difference(name, values, baseline):
    if name == baseline or values.get(name) is None or values.get(baseline) is None:
        return None
    return round(values[name] - values[baseline], 9)  # 77.64 - 76.68 is 0.96


def write_tables(ablation, out):
    """Writes results.csv, a row for each finished variant and seed, and summary.csv, one for each metric and variant."""
    results, metrics = collect(ablation, out), ablation.metrics()
    rows = [{"variant": name, "seed": seed} | figures for name, seeds in results.items() for seed, figures in seeds.items()]
    _write_csv(out / "results.csv", ["variant", "seed", *metrics, "seconds", "epochs"], rows)
    columns = ["variant", "metric", "mean", "std", "n", "difference", "paper", "paper_difference"]
    _write_csv(out / "summary.csv", columns, summarise(ablation, results))


def _write_csv(path, columns, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write_text(path, text.getvalue())


def report(ablation, out):
    """The table of every metric in Markdown, from what is there."""
    rows = summarise(ablation, collect(ablation, out))
    digits = 2 if ablation.scale >= 10 else 4

    def figure(value, sign=""):
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    lines = [f"## {ablation.title}", "", ablation.source]
    if ablation.note:
        lines += ["", ablation.note]
    for metric in ablation.metrics():
        lines += ["", f"### {metric}", "", _described(metric, ablation.scale), ""]
        lines += ["| variant | paper | ours | paper's difference | our difference |", "|---|---|---|---|---|"]
        for row in (row for row in rows if row["metric"] == metric):
            spread = f" ± {figure(row['std'])}" if row["std"] is not None else ""
            ours = f"{figure(row['mean'])}{spread} ({row['n']})" if row["n"] else "-"
            differences = figure(row["paper_difference"], "+"), figure(row["difference"], "+")
            lines.append(f"| {' | '.join((row['variant'], figure(row['paper']), ours, *differences))} |")
    if ablation.baseline is not None:
        lines += ["", f"Differences are to {ablation.baseline}. One within the spread says nothing."]
    return "\n".join(lines)


def _described(metric, scale):
    times = "" if scale == 1 else f", times {scale:g}"
    kind = metric.rpartition("_")[2]
    reduction = f" ({kind}: {REDUCTIONS[kind]})" if kind in REDUCTIONS else ""
    return f"{metric}{reduction}{times}, of the last epoch; ours: mean ± sample standard deviation over seeds (their number)."


def add_arguments(parser):
    """Adds the arguments of `segops ablate` to an argparse parser; `run` takes what it parses."""
    parser.add_argument("ablation", metavar="NAME_OR_FILE", help=f"a YAML file, or one of {', '.join(shipped(ABLATIONS))}")
    parser.add_argument("--out", metavar="DIR", help="default runs/ablations/NAME; what is there is not trained again")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="train these; default: those of the file")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="train these; default: all")
    parser.add_argument("--report", action="store_true", help="train nothing, print what is there")
    parser.epilog = "Arguments after -- go to segops fit, for all variants: segops ablate NAME -- --data.root=FOLDER"
    parse = parser.parse_args

    def split(arguments):
        # argparse itself refuses positional arguments behind options, before Python 3.12.
        arguments = list(arguments)
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        options = parse(arguments[:cut])
        options.arguments = arguments[cut + 1 :]
        return options

    parser.parse_args = split


def run(options):
    """Trains what is not there yet, one run after the other, then prints the report.

    Every run has the folder DIR/VARIANT/SEED, with log.txt and run.json: what it was asked for and whether it finished. The
    command repeated skips what finished and resumes what was interrupted. Where the runner alone was killed, the training that it
    started goes on; a repeated command waits for it. A run that fails is reported, and the others go on.

    Args:
        options: what a parser with `add_arguments` returned.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the ablation or the arguments, or a folder that holds a run with other
            arguments, before anything is trained; a metric that a finished run has not.
        SystemExit: 1, runs failed; 130, interrupted.
    """
    ablation = load(options.ablation)
    out = Path("runs/ablations", ablation.file.stem) if options.out is None else Path(options.out)
    if options.report:
        print(report(ablation, out))
        return
    seeds = list(ablation.seeds) if options.seeds is None else options.seeds
    check_seeds(seeds)
    plan, extra = schedule(ablation, seeds, options.only), _arguments("arguments after --", options.arguments)
    for variant in {variant.name: variant for variant, _ in plan}.values():
        asked(ablation, variant, extra)  # bases that are missing are said before a folder is made
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        _wait_for(lock, out)
        for variant, seed in plan:
            check_same(out / variant.name / str(seed), asked(ablation, variant, extra))
        try:
            failed = _train_all(ablation, plan, out, extra, lock.fileno())
        except KeyboardInterrupt:
            print("segops ablate: interrupted; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
    print(report(ablation, out))
    if failed:
        print(f"segops ablate: {len(failed)} of {len(plan)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _wait_for(lock, out):
    """Takes the lock of an ablation's folder, which a runner and the training that it started hold."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"segops ablate: waiting for another training in {out}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _train_all(ablation, plan, out, extra, lock):
    """Trains what has not finished. Returns the folders, relative to `out`, of runs that failed."""
    failed = []
    write_tables(ablation, out)
    with tqdm(plan, unit="run", file=sys.stderr) as bar:
        for variant, seed in bar:
            name = f"{variant.name}/{seed}"
            bar.set_description(name)
            if (record(out / name) or {}).get("finished"):
                continue
            if f"{variant.after}/{seed}" in failed:
                reason = f"{variant.after}, which it comes after, failed"
            else:
                reason = train(ablation, variant, seed, out, extra, lock)
            if reason is not None:
                failed.append(name)
                tqdm.write(f"segops ablate: {name} failed: {reason}", file=sys.stderr)
            write_tables(ablation, out)
    return failed
