"""The benchmarks tell the truth: a wrong kernel is never timed, memory and errors are measured right, misses are shown."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import segops
from benchmarks import bench_argmax, bench_bal, bench_crf, bench_pac, bench_pag, measure, refinement, report, scene
from segops.ops.crf import reference

PAC = bench_pac.Case((1, 64, 9, 9), 64)
BAL = bench_bal.Case((1, 5, 9, 11), (40, 43))
BALS = [BAL, bench_bal.Case((1, 3, 33, 32), (33, 32)), bench_bal.Case((2, 5, 9, 11), (40, 43), torch.bfloat16)]
PAG = bench_pag.Case(((2, 3, 4, 5), (2, 4, 8, 10), (2, 5, 4, 5)))
UNPOOL = bench_pag.Case(((2, 3, 7, 8),), kernel_size=2)
CRF, LAYER, FILTER = (bench_crf.Case(what, (2, 6, 41, 49)) for what in ("dense_crf", "layer", "filter"))
needs_pydensecrf = pytest.mark.skipif(bench_crf.DenseCRF2D is None, reason="pydensecrf2 is not installed")


@pytest.mark.parametrize(
    "bench, case, op",
    [
        (bench_pac, PAC, "pyramid_atrous_conv2d"),
        (bench_bal, BAL, "boundary_aware_loss"),
        (bench_pag, PAG, "partial_attention_gate"),
        (bench_pag, UNPOOL, "max_unpool2d_with_offsets"),
    ],
)
def test_gate_passes_what_is_right_and_stops_what_is_wrong(monkeypatch, bench, case, op):
    assert bench.gate(case) <= 1
    right = getattr(segops, op)
    monkeypatch.setattr(segops, op, lambda *args, **kwargs: right(*args, **kwargs) * 1.0001)
    assert bench.gate(case) > 1
    monkeypatch.setattr(segops, op, lambda *args, **kwargs: right(*args, **kwargs) * torch.nan)
    assert bench.gate(case) == float("inf")


def test_gate_wants_the_largest_class(monkeypatch):
    case, right = bench_argmax.Case((1, 5, 9, 11), (40, 43)), segops.upsample_argmax
    assert bench_argmax.gate(case) <= 1
    for wrong in (lambda *args: (right(*args) + 1) % 5, lambda *args: right(*args) + 5, lambda *args: right(*args)[:, 1:]):
        monkeypatch.setattr(segops, "upsample_argmax", wrong)
        assert bench_argmax.gate(case) > 1


def test_gate_looks_at_the_gradient(monkeypatch):
    right = segops.boundary_aware_loss
    monkeypatch.setattr(segops, "boundary_aware_loss", lambda logits, labels: right(logits.detach() + 0 * logits, labels))
    assert bench_bal.gate(BAL) > 1


@pytest.mark.parametrize(
    "case, owner, name",
    [(CRF, segops, "dense_crf"), (LAYER, segops.nn.CRF, "forward"), (FILTER, segops, "permutohedral_filter")],
    ids=["dense_crf", "layer", "filter"],
)
def test_gate_of_the_crf(monkeypatch, case, owner, name):
    assert bench_crf.gate(case) <= 1
    right = getattr(owner, name)

    def gate_of(wrong):
        """Where the float64 result is right."""

        def function(*tensors, **settings):
            result = right(*tensors, **settings)
            return result if result.dtype == torch.float64 else wrong(result)

        monkeypatch.setattr(owner, name, function)
        return bench_crf.gate(case)

    assert gate_of(lambda result: result * 1.01) > 1
    assert gate_of(lambda result: result * torch.nan) == float("inf")
    if case is LAYER:
        assert gate_of(lambda result: result.detach() + 0.99 * (result - result.detach())) > 1


@needs_pydensecrf
def test_gate_wants_the_classes_of_pydensecrf2(monkeypatch):
    right = bench_crf.pydensecrf
    monkeypatch.setattr(bench_crf, "pydensecrf", lambda *tensors: right(*tensors).roll(1, 1))
    assert bench_crf.gate(CRF) > 1


def test_crf_without_pydensecrf2(monkeypatch):
    monkeypatch.setattr(bench_crf, "DenseCRF2D", None)
    assert bench_crf.gate(CRF) <= 1
    for case in bench_crf.CASES:
        assert list(bench_crf.functions(case)) == ["segops", "single calls" if case.shape[0] > 1 else "reference"]


def test_bars_of_the_crf_are_of_baselines_that_are_timed():
    for case in bench_crf.CASES:
        for kind, baseline, _ in case.bars:
            timed = bench_crf.calls(replace(case, shape=(case.shape[0], 6, 9, 11)), kind, bench_crf.functions(case))
            assert baseline in timed or (baseline == "pydensecrf2" and bench_crf.DenseCRF2D is None)


@pytest.mark.parametrize("memory_format", measure.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_wants_copied_gradients_exact(monkeypatch, dtype, memory_format):
    case, right = replace(PAG, dtype=dtype, memory_format=memory_format), segops.partial_attention_gate
    assert bench_pag.gate(case) == 0

    def one_gradient_off(decoder, encoders, merge):
        result = right(decoder, encoders, merge=merge)
        scale = torch.ones_like(result)
        scale[-1, -1, -1, -1] += torch.finfo(dtype).eps
        return result.detach() + (result - result.detach()) * scale

    monkeypatch.setattr(segops, "partial_attention_gate", one_gradient_off)
    assert bench_pag.gate(case) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_result_is_right_and_only_that_where_plain_pytorch_is_exact(dtype):
    truth = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    exact, rounded = truth.to(dtype), truth.to(dtype) * (1 + torch.finfo(dtype).eps)
    assert measure.error_over_bound([exact], [exact], [truth]) == 0
    assert measure.error_over_bound([exact], [rounded], [truth]) == 0
    assert measure.error_over_bound([rounded], [exact], [truth]) == float("inf")
    assert measure.error_over_bound([exact * torch.nan], [exact], [truth]) == float("inf")
    assert 0 < measure.error_over_bound([rounded], [rounded], [truth]) < 1


@pytest.mark.parametrize("memory_format", measure.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [PAG, bench_pag.Case(((2, 3, 4, 5), (2, 4, 9, 11), (2, 5, 8, 6))), UNPOOL], ids=str)
def test_baselines_copy_what_the_gate_copies(case, dtype, memory_format):
    case = replace(case, dtype=dtype, memory_format=memory_format)
    maps = bench_pag.arguments(case)
    truth = bench_pag.float64_result(case, [each.detach().double() for each in maps])
    for function in bench_pag.plain(case).values():
        assert torch.equal(function(*maps).double(), truth)


def test_baselines_sum_what_the_gate_sums():
    case = bench_pag.Case(((1, 3, 4, 5), (1, 3, 8, 10), (1, 3, 9, 11), (1, 3, 4, 5)), "sum")
    maps = bench_pag.arguments(case)
    truth = bench_pag.float64_result(case, [each.detach().double() for each in maps])
    for function in bench_pag.plain(case).values():
        assert measure.relative_error(function(*maps), truth) < 1e-6


def test_bytes_that_the_gate_and_pooling_move():
    maps = (1, 2, 2, 2), (1, 3, 4, 4), (1, 5, 2, 2)
    gate = bench_pag.Case(maps)
    assert bench_pag.moved(gate, "forward") == 4 * (8 + 48 + 20 + 40)
    assert bench_pag.moved(gate, "full") == 4 * (8 + 48 + 20 + 40 + 12 + 48)  # the pooled map's part, and its gradient
    total = bench_pag.Case(((1, 2, 2, 2), (1, 2, 4, 4), (1, 2, 2, 2)), "sum", dtype=torch.bfloat16)
    assert bench_pag.moved(total, "forward") == 2 * (8 + 32 + 8 + 8)
    assert bench_pag.moved(total, "full") == 2 * (8 + 32 + 8 + 8 + 8 + 32)
    unpool = bench_pag.Case(((1, 2, 5, 4),), kernel_size=2)
    assert bench_pag.moved(unpool, "forward") == 2 * (160 + 12 * 5)
    assert bench_pag.moved(unpool, "full") == 4 * (160 + 12 * 5)


@pytest.mark.parametrize("case", [*bench_pag.CPU_CASES, *bench_pag.CUDA_CASES], ids=str)
def test_switches_of_the_timed_gates_are_on(case):
    decoder, *encoders = case.shapes
    assert all(shape[2] >= decoder[2] and shape[3] >= decoder[3] for shape in encoders)


@pytest.mark.parametrize("case", BALS, ids=str)
@pytest.mark.parametrize("name", bench_bal.plain())
def test_baselines_compute_the_loss(case, name):
    logits, labels = bench_bal.arguments(case)
    truth = measure.outputs_and_gradients(bench_bal.float64_loss, (logits.detach().double().requires_grad_(), labels))
    values = measure.outputs_and_gradients(bench_bal.plain()[name], (logits, labels))
    for value, expected in zip(values, truth, strict=True):
        assert measure.relative_error(value, expected) < (1e-5 if value.dtype == torch.float32 else 4e-3)


def test_label_maps():
    labels = bench_bal.label_maps(2, 21, (129, 200), seed=0)
    assert torch.equal(labels, bench_bal.label_maps(2, 21, (129, 200), seed=0))
    assert not torch.equal(labels, bench_bal.label_maps(2, 21, (129, 200), seed=1))
    void = labels == bench_bal.VOID
    assert labels.shape == (2, 129, 200) and labels[~void].max() < 21 and 0.01 < void.double().mean() < 0.3


def test_scenes():
    image, labels = scene.draw((129, 161), seed=3)
    again, _ = scene.draw((129, 161), seed=3)
    other, _ = scene.draw((129, 161), seed=4)
    assert torch.equal(image, again) and not torch.equal(image, other)
    assert image.shape == (3, 129, 161) and image.dtype == torch.uint8
    assert labels.shape == (129, 161) and labels.unique().tolist() == list(range(len(scene.CLASSES)))


def test_a_scene_has_as_many_vertices_as_a_photograph():
    _, image = bench_crf.arguments(bench_crf.Case("dense_crf", (1, 6, 161, 161)))
    index, *_ = reference.lattice(reference.features_of(image, 67.0, 3.0).flatten(2))
    assert 1.0 < (int(index.max()) + 1) / 161**2 < 2.0  # photographs of this size: 0.3 to 2.4


def test_coarse_logits():
    labels = torch.zeros(33, 40, dtype=torch.int64)
    labels[:, 20:], labels[16:, 20:] = 2, 255  # the second class never occurs, the last quarter is void
    logits = scene.coarse_logits(labels, 3, 8, noise=0)
    assert logits.shape == (3, 5, 5)
    assert logits[:, 0].argmax(0).tolist() == [0, 0, 0, 2, 2] and (logits[1] == logits.min()).all()
    assert logits[:, -1, -1].unique().numel() == 1
    assert torch.equal(scene.coarse_logits(labels, 3, 8), scene.coarse_logits(labels, 3, 8))


def test_picture_of_the_crf(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(refinement, "SIZE", (97, 97))
    refinement.draw(tmp_path / "crf.png")
    assert (tmp_path / "crf.png").stat().st_size > 10_000 and "crf.png" in capsys.readouterr().out


def test_threads():
    before = torch.get_num_threads()
    with measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with measure.threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_peak_memory():
    def function():
        a = torch.empty(1 << 20)  # 4 MiB
        b = torch.empty(1 << 20)
        del a
        return b + torch.empty(1 << 18)[0]

    assert measure.peak_memory(function, "cpu") == pytest.approx(8 << 20, rel=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
def test_peak_resident():
    def function():
        a = np.ones(1 << 23)  # 64 MiB, which PyTorch does not see
        b = torch.ones(1 << 23)  # 32 MiB
        del a
        return b + 1

    measure.peak_resident(lambda: np.ones(1 << 25))  # an earlier peak does not count
    assert measure.peak_resident(function) == pytest.approx(96 << 20, rel=0.1)


def test_kept_memory():
    x, y = (torch.randn(100, requires_grad=True) for _ in range(2))
    assert measure.kept_memory(lambda x: x[10:] * 2, [x]) == 0
    assert measure.kept_memory(lambda x, y: x[:50] * y[50:], [x, y]) == 0  # the arguments'
    assert measure.kept_memory(torch.exp, [x]) == 0  # the result's
    assert measure.kept_memory(lambda x: x.exp().sin() + 0, [x]) == 400  # both save the one map
    assert measure.kept_memory(lambda x: x.exp()[:50].sin() + 0, [x]) == 400  # views hold all of it
    assert measure.kept_memory(lambda x, y: (x * 3).sin() * (y * 5).sin(), [x, y]) == 4 * 400
    with torch.no_grad():
        assert measure.kept_memory(lambda x: x.exp().sin(), [x]) == 0
    # An index takes eight bytes.
    assert measure.kept_memory(bench_pag.plain_gate("concat")["eager"], bench_pag.arguments(PAG)) == 8 * 2 * 4 * 4 * 5
    assert measure.kept_memory(bench_pag.plain_unpool(2)["eager"], bench_pag.arguments(UNPOOL)) == 8 * 2 * 3 * 4 * 4


def test_bars_hold_beside_the_best_baseline_and_eager():
    case = replace(PAG, bar=2.5)
    assert (
        bench_pag.bars(case, "forward", ["eager", "compile"], "compile")
        == bench_pag.bars(PAG, "full", ["eager"], "eager")
        == {}
    )
    assert bench_pag.bars(case, "full", ["eager"], "eager") == {"eager": (2.5, None, 3)}
    assert bench_pag.bars(case, "full", ["eager", "compile"], "compile") == {
        "eager": (None, None, 3),
        "compile": (2.5, None, None),
    }


def test_summary():
    assert measure.summary([5.0, 1.0, 3.0, 2.0, 4.0])["median"] == 3.0
    assert measure.relative_error(torch.ones(3), torch.ones(3, dtype=torch.float64)) == 0


def rows(kind, bars, kept=None):
    """What a suite would write of two kernels that take 2 ms and 1 MB, beside baselines that take 4 and 16 ms, 3 and 9 MB."""
    numbers = {"segops": (2.0, 1), "segops triton": (2.0, 1), "fast": (4.0, 3), "slow": (16.0, 9)}
    times = {name: {"median": ms, "p20": ms, "p80": ms} for name, (ms, _) in numbers.items()}
    calls = {name: lambda mega=mega: torch.empty(mega * 10**6, dtype=torch.uint8) for name, (_, mega) in numbers.items()}
    return measure.rows(kind, calls, times, ["slow", "fast"], 1.0, bars, "cpu", kept)


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


def test_report_of_kept_memory(tmp_path):
    kept = {"segops": 10**6, "segops triton": 0, "fast": 2 * 10**6, "slow": 8 * 10**6}
    bars = {"slow": (7, None, 3), "fast": (None, None, 3)}
    cases = [{"case": "1", "gate": 0.0, **row} for row in rows("forward", {}) + rows("full", bars, kept)]
    table = report.write({"environment": {"device": "X", "torch": "2"}, "rows": cases}, tmp_path, "a-cpu")
    header, dashes, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {len(header), len(dashes), *map(len, lines)} == {18}
    assert header[14:] == ["kept MB", "its kept MB", "kept ratio", "kept bar"]
    assert [line[1:3] + line[14:] for line in lines if line[2] == "segops"] == [
        *[["forward", "segops", "", "", "", ""]] * 2,
        ["full", "segops", "1.0", "8.0", "8.00", "3 met"],
        ["full", "segops", "1.0", "2.0", "2.00", "3 MISSED"],
    ]
    assert lines[-1][14:] == ["0.0", "2.0", "inf", ""]
    with open(tmp_path / "a-cpu.csv") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["kept"] == "" and lines[8]["kept"] == "1000000" and float(lines[8]["kept_ratio"]) == 8


def test_report_of_allowed_memory(tmp_path):
    def timed(kind, allowed):
        numbers = {"median": 2.0, "p20": 2.0, "p80": 2.0}
        calls = dict.fromkeys(("segops", "fast"))
        memory = {"segops": 3 * 10**6, "fast": 6 * 10**6}
        return measure.rows(
            kind, calls, dict.fromkeys(calls, numbers), ["fast"], 1.0, {}, "cpu", memory=memory, allowed=allowed
        )

    found = timed("forward", 4 * 10**6) + timed("full", 2 * 10**6) + timed("backward", None)
    cases = [{"case": "1", "gate": 0.0, **row} for row in found]
    table = report.write({"environment": {"device": "X", "torch": "2"}, "rows": cases}, tmp_path, "a-cpu")
    header, dashes, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {len(header), len(dashes), *map(len, lines)} == {15} and header[-1] == "allowed MB"
    assert [line[-1] for line in lines] == ["4.0 met", "2.0 MISSED", ""]
    assert lines[0][10:13] == ["3.0", "6.0", "2.00"]


def test_plot_of_cases_with_different_baselines(tmp_path):
    pytest.importorskip("matplotlib")
    both, one = rows("forward", {}), rows("full", {})
    for row in one:
        row["against"] = row["against"][:1]
    cases = [{"case": "1", "gate": 0.0, **row} for row in both + one]
    report.plot({"environment": {"device": "X", "torch": "2"}, "rows": cases}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_committed_results_still_render():
    stored = Path(report.__file__).parent / "results" / "bal-cpu.json"
    assert report.render(json.loads(stored.read_text())) + "\n" == stored.with_suffix(".md").read_text()
