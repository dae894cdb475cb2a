"""The benchmarks tell the truth: a wrong kernel is never timed, memory and errors are measured right, misses are shown."""

import pytest
import torch

import segops
from benchmarks import bench_pac, measure, report

CASE = bench_pac.Case((1, 64, 9, 9), 64)


def test_gate_passes_what_is_right_and_stops_what_is_wrong(monkeypatch):
    assert bench_pac.gate(CASE) <= 1
    right = segops.pyramid_atrous_conv2d
    monkeypatch.setattr(segops, "pyramid_atrous_conv2d", lambda *args, **kwargs: right(*args, **kwargs) * 1.0001)
    assert bench_pac.gate(CASE) > 1
    monkeypatch.setattr(segops, "pyramid_atrous_conv2d", lambda *args, **kwargs: right(*args, **kwargs) * torch.nan)
    assert bench_pac.gate(CASE) == float("inf")


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


def test_report(tmp_path):
    def row(name, median, ratio, bar=None):
        numbers = {"median": median, "p20": median, "p80": median, "ratio": ratio, "floor": 1.0, "memory": 1e6}
        return {
            "case": "a",
            "gate": 0.5,
            "kind": "forward",
            "name": name,
            "baseline": "eager contiguous",
            "bar": bar,
            **numbers,
        }

    rows = [
        row("segops contiguous", 2.0, 2.0, bar=4.2),
        row("segops channels_last", 1.0, 4.0, bar=3.0),
        row("eager contiguous", 4.0, 1.0),
    ]
    table = report.write({"environment": {"device": "X", "torch": "2"}, "rows": rows}, tmp_path, "pac")
    assert "4.2 MISSED" in table and "3.0 met" in table and table == (tmp_path / "pac.md").read_text().rstrip("\n")
    assert {path.suffix for path in tmp_path.iterdir()} >= {".csv", ".json", ".md"}
