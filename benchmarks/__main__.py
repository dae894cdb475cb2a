"""`segops bench`, `python -m benchmarks`: runs the suites, checks before it times, and writes the evidence of each op; `overhead`
times what a call of each costs; `sass` reads the machine code of the CUDA kernels."""

import argparse
import tempfile
from pathlib import Path

try:
    import pytest
    import pytest_benchmark  # noqa: F401
except ImportError as error:
    raise ImportError("the benchmarks need pytest-benchmark: pip install 'segops[bench]'") from error

from segops.__main__ import MISTAKES, one_line

from . import measure, overhead, report, sass
from .suites import OPS

HERE = Path(__file__).parent
NAME = "gpu" if measure.DEVICE == "cuda" else "cpu"


def add_arguments(parser):
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"the ops to run, of {', '.join(OPS)} (default: all); or overhead; or sass"
    )
    parser.add_argument("-k", dest="select", default="", help="only the benchmarks that match, as pytest -k; of sass: sm_90")
    parser.add_argument(
        "--out", default="benchmarks/results", type=Path, help="folder for the results (default: benchmarks/results)"
    )
    parser.add_argument(
        "--name", help=f"the result files are called OP-NAME (default here: {NAME}; of sass: what -k says, or all)"
    )
    parser.add_argument("--report", type=Path, metavar="RAW.json", help="only render what pytest --benchmark-json wrote")


def run(options):
    if options.ops == ["sass"]:
        architecture = options.select or "all"
        name = options.name or architecture
        print(sass.run(options.out, name, architecture))
        print(f"\nwritten: {options.out}/sass-{name}.json, .csv, .md\n")
        return
    name = options.name or NAME
    if options.ops == ["overhead"]:
        print(overhead.run(options.out, name))
        print(f"\nwritten: {options.out}/overhead-{name}.json, .csv, .md\n")
        return
    for op in options.ops:
        if op not in OPS:
            raise ValueError(f"OP must be one of {', '.join(OPS)}, or overhead or sass alone; got {op}")

    status = 0
    raw = options.report
    with tempfile.TemporaryDirectory() as folder:
        if raw is None:
            raw = Path(folder, "raw.json")
            arguments = ["-q", "--benchmark-only", f"--benchmark-json={raw}", "-k", options.select, "-p", "no:cacheprovider"]
            status = pytest.main([*arguments, *(str(HERE / f"bench_{op}.py") for op in options.ops or OPS)])
            if not raw.exists() or not raw.stat().st_size:
                raise SystemExit(f"no benchmark ran: pytest ended with {status!s}")
        results = report.collect(raw)
    for op, result in results.items():
        print(report.write(result, options.out, f"{op}-{name}"))
        print(f"\nwritten: {options.out}/{op}-{name}.json, .csv, .md, .png\n")
    raise SystemExit(int(status))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except MISTAKES as error:
        raise SystemExit(f"python -m benchmarks: {one_line(error)}") from error
