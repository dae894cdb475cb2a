"""The benchmarks tell the truth: a wrong kernel is never timed, memory and errors are measured right, misses are shown."""

import csv
import json

import pytest
import torch

import segops
from benchmarks import baselines, bench_bal, bench_pac, measure, report

PAC = bench_pac.Case((1, 64, 9, 9), 64)
BAL = bench_bal.Case((1, 5, 9, 11), (40, 43))
BALS = [BAL, bench_bal.Case((1, 3, 33, 32), (33, 32)), bench_bal.Case((2, 5, 9, 11), (40, 43), torch.bfloat16)]


@pytest.mark.parametrize(
    "bench, case, op", [(bench_pac, PAC, "pyramid_atrous_conv2d"), (bench_bal, BAL, "boundary_aware_loss")]
)
def test_gate_passes_what_is_right_and_stops_what_is_wrong(monkeypatch, bench, case, op):
    assert bench.gate(case) <= 1
    right = getattr(segops, op)
    monkeypatch.setattr(segops, op, lambda *args, **kwargs: right(*args, **kwargs) * 1.0001)
    assert bench.gate(case) > 1
    monkeypatch.setattr(segops, op, lambda *args, **kwargs: right(*args, **kwargs) * torch.nan)
    assert bench.gate(case) == float("inf")


def test_gate_looks_at_the_gradient(monkeypatch):
    right = segops.boundary_aware_loss
    monkeypatch.setattr(segops, "boundary_aware_loss", lambda logits, labels: right(logits.detach() + 0 * logits, labels))
    assert bench_bal.gate(BAL) > 1


@pytest.mark.parametrize("case", BALS, ids=str)
@pytest.mark.parametrize("name", baselines.bal(measure.DEVICE))
def test_baselines_compute_the_loss(case, name):
    logits, labels = bench_bal.arguments(case)
    truth = measure.outputs_and_gradients(bench_bal.float64_loss, (logits.detach().double().requires_grad_(), labels))
    values = measure.outputs_and_gradients(baselines.bal(measure.DEVICE)[name], (logits, labels))
    for value, expected in zip(values, truth, strict=True):
        assert measure.relative_error(value, expected) < (1e-5 if value.dtype == torch.float32 else 4e-3)


def test_label_maps():
    labels = bench_bal.label_maps(2, 21, (129, 200), seed=0)
    assert torch.equal(labels, bench_bal.label_maps(2, 21, (129, 200), seed=0))
    assert not torch.equal(labels, bench_bal.label_maps(2, 21, (129, 200), seed=1))
    void = labels == baselines.VOID
    assert labels.shape == (2, 129, 200) and labels[~void].max() < 21 and 0.01 < void.double().mean() < 0.3


def test_peak_memory():
    def function():
        a = torch.empty(1 << 20)  # 4 MiB
        b = torch.empty(1 << 20)
        del a
        return b + torch.empty(1 << 18)[0]

    assert measure.peak_memory(function, "cpu") == pytest.approx(8 << 20, rel=0.2)


def test_summary():
    assert measure.summary([5.0, 1.0, 3.0, 2.0, 4.0])["median"] == 3.0
    assert measure.relative_error(torch.ones(3), torch.ones(3, dtype=torch.float64)) == 0


def rows(kind, bars):
    """What a suite would write of two kernels that take 2 ms and 1 MB, beside baselines that take 4 and 16 ms, 3 and 9 MB."""
    numbers = {"segops": (2.0, 1), "segops triton": (2.0, 1), "fast": (4.0, 3), "slow": (16.0, 9)}
    times = {name: {"median": ms, "p20": ms, "p80": ms} for name, (ms, _) in numbers.items()}
    calls = {name: lambda mega=mega: torch.empty(mega * 10**6, dtype=torch.uint8) for name, (_, mega) in numbers.items()}
    return measure.rows(kind, calls, times, ["slow", "fast"], 1.0, bars, "cpu")


def test_report(tmp_path):
    extra = {"gate": 0.5, "environment": {"device": "X", "torch": "2"}}
    benchmarks = [
        {"op": "a", "case": "1", "rows": rows("forward", {}) + rows("full", {"slow": (7, 12), "fast": (2.5, 3)}), **extra},
        {"op": "b", "case": "2", "rows": rows("full", {"fast": (2, None)}), **extra},
    ]
    (tmp_path / "raw.json").write_text(json.dumps({"benchmarks": [{"extra_info": b} for b in benchmarks]}))
    results = report.collect(tmp_path / "raw.json")
    assert list(results) == ["a", "b"]

    table = report.write(results["a"], tmp_path, "a-cpu")
    assert table == (tmp_path / "a-cpu.md").read_text().rstrip("\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert [line[1:3] for line in lines] == [
        [p, name] for p in ("forward", "full") for name in ("segops", "segops triton") for _ in range(2)
    ]
    assert [line[6:] for line in lines if line[2] == "segops"] == [
        ["slow", "16", "8.00", "", "1.0", "9.0", "9.00", ""],
        ["fast", "4", "2.00", "", "1.0", "3.0", "3.00", ""],
        ["slow", "16", "8.00", "7 met", "1.0", "9.0", "9.00", "12 MISSED"],
        ["fast", "4", "2.00", "2.5 MISSED", "1.0", "3.0", "3.00", "3 met"],
    ]
    assert all(line[9] == line[13] == "" for line in lines if line[2] == "segops triton")  # bars are for what "auto" picks
    assert "2 met" in report.render(results["b"])

    assert {path.suffix for path in tmp_path.iterdir()} >= {".csv", ".json", ".md"}
    with open(tmp_path / "a-cpu.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4 * 2  # passes, implementations, baselines
    assert lines[0]["baseline"] == "slow" and float(lines[0]["ratio"]) == 8 and lines[0]["bar"] == ""
