"""What benchmarks/gpu.sh runs: `python -m benchmarks.gpu SUITE --name NAME --out FOLDER`.

The cases of a suite run in a child process, and each is announced before it starts. When a kernel
fault or a crash ends the child, the case is therefore known, and another child goes on with the
next one. Results are written to FOLDER/NAME.json (timings to NAME.csv too) and a short table of
them to FOLDER/NAME.txt, which is also printed last. The exit status is 1 if a case failed or if
time ran out.

The parent does not import torch: it starts at once, and no fault on the GPU can reach it.
"""

import argparse
import contextlib
import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import report
from .suites import OPS

MARK = "\x1e"  # begins a message from child to parent
SUITES = {  # name: module, function of the options that gives its cases
    "smoke": ("gpu_smoke", "cases"),
    "headline": ("gpu_headline", "cases"),
    "compiled": ("gpu_headline", "compiled_cases"),
    "kernels": ("gpu_headline", "single_calls"),
    "train": ("gpu_train", "cases"),
}
SANITIZERS = ("memcheck", "racecheck", "synccheck")
LISTED = 12  # failures in a table


class Case(NamedTuple):
    """run() returns the result to keep, with the reason under "failed" if it is one. The cases of a
    group run in one process."""

    name: str
    run: Callable[[], dict]
    group: int = 0


def under_tool(tool, out):
    """The command line that runs a child under a tool, which looks at our own kernels alone."""
    if tool in SANITIZERS:
        # Libraries probe the driver for functions that it may not have: not an error of ours.
        options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all", "--report-api-errors", "no"]
        return ["compute-sanitizer", *options, "--kernel-regex", "kns=segops", "--print-limit", "50"]
    if tool == "ncu":
        which = ["--kernel-name-base", "demangled", "--kernel-name", "regex:segops", "--launch-count", "60"]
        how = ["--set", "basic", "--clock-control", "none", "--target-processes", "all"]
        return ["ncu", *how, *which, "--csv", "--page", "details", "--log-file", str(out / "ncu.csv")]
    return []


# The child.


def send(**message):
    print(MARK + json.dumps(message), flush=True)


def run_cases(options):
    """Runs this worker's cases, from number options.start on."""
    from . import measure

    if options.device != measure.DEVICE:
        raise SystemExit(f"torch {measure.torch.__version__} finds no GPU")
    if options.tool is None:
        send(environment=measure.environment(measure.DEVICE))
    module, function = SUITES[options.suite]
    cases = getattr(importlib.import_module(f".{module}", __package__), function)(options)
    send(total=len(cases))
    for index, case in enumerate(cases):
        if index < options.start or case.group % options.jobs != options.worker:
            continue
        send(begin=case.name, index=index)
        began = time.perf_counter()
        try:
            result = case.run()
            measure.synchronise()
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]}
        send(end=result, seconds=round(time.perf_counter() - began, 3))
        measure.synchronise()  # raises, and so ends this process, if a fault has made CUDA unusable
    send(finished=True)


# The parent.


class Supervisor:
    """Runs the cases in `jobs` children at a time, and collects their results."""

    def __init__(self, options):
        self.options = options
        self.environment, self.total = None, 0
        self.results, self.errors = [], []
        self.processes, self.stopping = set(), False

    def run(self):
        workers = [threading.Thread(target=self.work, args=(i,), daemon=True) for i in range(self.options.jobs)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            self.stopping = True
            self.errors.append("interrupted")
            for process in list(self.processes):
                kill(process)
        for result in self.results:
            if "seconds" not in result:
                result.setdefault("failed", "did not end in time")

    def work(self, worker):
        try:
            self.run_children(worker)
        except Exception as error:  # which would end the thread silently
            traceback.print_exc()
            self.errors.append(f"{type(error).__name__}: {error}")

    def run_children(self, worker):
        """One child after another, until all cases of this worker have been started."""
        start = 0
        while not self.stopping:
            process = self.spawn(worker, start)
            self.processes.add(process)
            if self.stopping:
                kill(process)
            case, finished, last_line = None, False, "no output"
            for line in process.stdout:
                text, mark, message = line.partition(MARK)
                if text:
                    print(text.rstrip("\n"), flush=True)
                    last_line = text.strip() or last_line
                    if case is not None and is_finding(text):
                        case.setdefault("report", []).append(text.removeprefix("=========").strip())
                message = json.loads(message) if mark else {}
                if "begin" in message:
                    case = {"case": message["begin"], "index": message["index"]}
                    self.results.append(case)
                    print(f"> {case['case']}", flush=True)
                elif "end" in message:
                    case |= message["end"] | {"seconds": message["seconds"]}
                    print(f"< {case['case']}: {case.get('failed', 'ok')}, {case['seconds']} s", flush=True)
                elif "environment" in message:
                    self.environment = message["environment"]
                elif "total" in message:
                    self.total = message["total"]
                elif "finished" in message:
                    finished = True
            status = process.wait()
            self.processes.discard(process)
            if self.stopping:
                return
            ended = f"ended with {f'signal {-status}' if status < 0 else f'status {status}'}: {last_line}"
            if finished:
                if status:
                    self.errors.append(f"{self.options.tool or 'the process'} {ended}")
                return
            if case is None:
                self.errors.append(f"the process started no case and {ended}")
                return
            if "seconds" not in case:
                case |= {"failed": f"the process {ended}", "seconds": 0}
            start = case["index"] + 1

    def spawn(self, worker, start):
        options = self.options
        command = [sys.executable, "-m", "benchmarks.gpu", options.suite, "--child", "--worker", worker, "--start", start]
        command += ["--jobs", options.jobs, "--name", options.name, "--out", options.out, "--device", options.device]
        for name in ("backend", "tool", "only"):
            if getattr(options, name) is not None:
                command += [f"--{name}", getattr(options, name)]
        command += ["--tiny"] if options.tiny else []
        environment = dict(os.environ)
        if options.backend is not None:
            environment["SEGOPS_BACKEND"] = options.backend
        if options.tool in SANITIZERS:
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # the cache hides overruns
        if options.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
        return subprocess.Popen(
            [*under_tool(options.tool, options.out), *map(str, command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def failures(self):
        """Lines "case: reason", after the errors of whole processes."""
        lines = list(self.errors)
        for result in sorted(self.results, key=lambda result: result["index"]):
            reasons = [result["failed"]] if "failed" in result else []
            if self.errors or reasons:  # else the tool found nothing, whatever it printed
                reasons += result.get("report", [])[:2]
            if reasons:
                lines.append(f"{result['case']}: {'; '.join(reasons)}")
        if not lines and len(self.results) < max(1, self.total):
            lines.append(f"{self.total - len(self.results)} of {self.total} cases did not run")
        return list(dict.fromkeys(lines))


def kill(process):
    """Kills a child and, under a tool, what the tool started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def is_finding(line):
    """Whether a line of compute-sanitizer's output reports something, other than itself."""
    return line.startswith("=========") and not re.search(r"COMPUTE-SANITIZER|SUMMARY|^=+\s*$", line)


# Tables.


def smoke_table(results):
    measured = [result for result in results if "error" in result]
    if not measured:
        return []
    worst = max(measured, key=lambda result: result["error"])
    return [f"largest error / bound {worst['error']:.2f}: {worst['case']}"]


def headline_table(results):
    """Per case the segops rows, each beside the best eager and the best compiled baseline, then the
    kernels that take most of the time."""
    lines = []
    for result in results:
        if "rates" in result:
            lines.append("this machine: " + "; ".join(f"{name} {rate:.4g}" for name, rate in result["rates"].items()))
        if "rows" not in result:
            continue
        lines.append(f"{result['case']} (error / bound {result['error']:.2f})")
        for row in result["rows"]:
            if row["name"].startswith("segops"):
                lines.append(headline_row(row, result["rows"]))
        for call in dict.fromkeys(kernel["call"] for kernel in result["kernels"]):
            kernels = [kernel for kernel in result["kernels"] if kernel["call"] == call]
            total = sum(kernel["us"] * kernel["calls"] for kernel in kernels)
            lines += [
                f"    {kernel['us']:9.1f} us x {kernel['calls']:<3g}{kernel['name'][:60]}{call.removeprefix('segops')}"
                for kernel in kernels[:3]
                if kernel["us"] * kernel["calls"] > 0.08 * total
            ]
    return lines


def headline_row(row, rows):
    line = (
        f"  {row['kind']:<8}{row['name'].removeprefix('segops '):<14}{row['median']:9.4f} ms{row['median'] / row['floor']:7.1f} floors"
        f"{row['launch'] * 1e3:6.0f} us a call{row['memory'] / 1e6:8.1f} MB"
    )
    beside = [other for other in rows if other["kind"] == row["kind"] and not other["name"].startswith("segops")]
    for compiled in (False, True):
        others = [other for other in beside if other["name"].startswith("compile") == compiled]
        if others:
            best = min(others, key=lambda other: other["median"])
            line += f" | {best['name']} {best['median']:.4f} ms x{best['median'] / row['median']:.2f}"
    return line


def train_table(results):
    lines = list(dict.fromkeys(result["setting"] for result in results if "setting" in result))
    for result in results:
        if "images" in result:
            memory = "" if result["memory"] is None else f" {result['memory'] / 1e9:6.2f} GB"
            lines.append(
                f"  {result['case']:<66}{result['images']:8.1f} images/s {result['ms']:8.1f} ms{memory}"
                f"  loss {result['first_loss']:.3f} to {result['last_loss']:.3f}"
            )
    return lines


NCU_COLUMNS = {  # a metric of ncu's basic set: its column
    "Duration": "time",
    "Compute (SM) Throughput": "SM",
    "Memory Throughput": "memory",
    "DRAM Throughput": "DRAM",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
}


def ncu_table(path):
    """(lines, errors): the first launch of each kernel in ncu's CSV."""
    if not path.exists():
        return [], ["ncu wrote nothing"]
    lines = path.read_text(errors="replace").splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return [], [line for line in lines if "ERR" in line][:3] or ["ncu profiled no kernel"]
    launches = {}
    for row in csv.DictReader(lines[header:]):
        launch = launches.setdefault(row["ID"], {"kernel": short_name(row["Kernel Name"])})
        if row["Metric Name"] in NCU_COLUMNS:
            unit = row["Metric Unit"].removesuffix("register/thread")
            launch[NCU_COLUMNS[row["Metric Name"]]] = row["Metric Value"] + unit
    first = {}
    for launch in launches.values():
        first.setdefault(launch["kernel"], launch)
    table = ["".join(f"{name:>12}" for name in NCU_COLUMNS.values()) + "  kernel"]
    for kernel, launch in first.items():
        table.append("".join(f"{launch.get(name, ''):>12}" for name in NCU_COLUMNS.values()) + f"  {kernel[:70]}")
    return table, []


def short_name(kernel):
    """A kernel's name without its arguments and namespaces, but for the op's."""
    kernel = re.sub(r"\((anonymous namespace|bool|int|unsigned int|long)\)|<unnamed>", "", kernel)
    kernel = re.sub(r"^void\s+|\(.*$", "", kernel)
    return re.sub(r"\bsegops::|\b(at|native|cutlass|detail)::|(?<![\w>])::", "", kernel)


TABLES = {"smoke": smoke_table, "headline": headline_table, "compiled": headline_table, "train": train_table}


def write(supervisor, options):
    """Writes and prints the results so far; returns the exit status."""
    results = sorted(supervisor.results, key=lambda result: result["index"])
    failures = supervisor.failures()
    backend, tool = f" on {options.backend}" if options.backend else "", f" under {options.tool}" if options.tool else ""
    lines = [f"{len(results)} of {supervisor.total} cases{backend}{tool}"]
    if options.tool == "ncu":
        table, errors = ncu_table(options.out / "ncu.csv")
        failures += errors
    else:
        table = TABLES[options.suite](results)
    lines += table + [f"FAILED {failure[:200]}" for failure in failures[:LISTED]]
    if len(failures) > LISTED:
        lines.append(f"FAILED and {len(failures) - LISTED} more")
    text = "\n".join(lines) + "\n"
    (options.out / f"{options.name}.txt").write_text(text)
    print(text, end="")

    environment = supervisor.environment or {}
    content = {"environment": environment, "suite": options.suite, "results": results, "failures": failures}
    (options.out / f"{options.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    rows = [
        {"case": result["case"], **row, **beside, **environment}
        for result in results
        for row in result.get("rows", [])
        for beside in row["against"]
    ]
    if rows:
        report.write_csv(rows, options.out / f"{options.name}.csv")
    return int(bool(failures))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--name", required=True, help="of the files that are written")
    parser.add_argument("--out", required=True, type=Path, help="the folder that they are written to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--backend", choices=("native", "triton"), help="of segops; default as SEGOPS_BACKEND says")
    parser.add_argument("--tool", choices=(*SANITIZERS, "ncu"), help="what to run the cases under")
    parser.add_argument("--only", metavar="OP", choices=OPS, help="the cases of this op alone")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases, default 1")
    for name, kind in (("--child", {"action": "store_true"}), ("--worker", {"type": int}), ("--start", {"type": int})):
        parser.add_argument(name, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    # `timeout` sends it. Python installs no handler of its own if the signal was ignored before.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.child:
        return run_cases(options)
    options.out.mkdir(parents=True, exist_ok=True)
    tool = under_tool(options.tool, options.out)[:1]
    supervisor = Supervisor(options)
    if tool and shutil.which(tool[0]) is None:
        supervisor.errors.append(f"{tool[0]} is not on PATH")
    else:
        supervisor.run()
    status = write(supervisor, options)
    sys.stdout.flush()
    os._exit(status)  # threads of killed processes may still be reading


if __name__ == "__main__":
    main()
