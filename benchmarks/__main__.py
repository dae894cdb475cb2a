"""`python -m benchmarks`: runs the suite, checks before it times, and writes the evidence."""

import argparse
import tempfile
from pathlib import Path

import pytest
import torch

from . import report

HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-k", dest="select", default="", help="only the benchmarks that match, as pytest -k")
    parser.add_argument(
        "--out", default=HERE / "results", type=Path, help="folder for the results (default: benchmarks/results)"
    )
    name = f"pac-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    parser.add_argument("--name", default=name, help=f"name of the result files (default here: {name})")
    parser.add_argument("--report", type=Path, metavar="RAW.json", help="only render what pytest --benchmark-json wrote")
    options = parser.parse_args()

    status = 0
    raw = options.report
    with tempfile.TemporaryDirectory() as folder:
        if raw is None:
            raw = Path(folder, "raw.json")
            arguments = ["-q", "--benchmark-only", f"--benchmark-json={raw}", "-k", options.select, "-p", "no:cacheprovider"]
            status = pytest.main([*arguments, *map(str, sorted(HERE.glob("bench_*.py")))])
            if not raw.exists() or not raw.stat().st_size:
                raise SystemExit(f"no benchmark ran: pytest ended with {status!s}")
        print(report.write(report.collect(raw), options.out, options.name))
    print(f"\nwritten: {options.out / options.name}.json, .csv, .md, .png")
    raise SystemExit(int(status))


if __name__ == "__main__":
    main()
