"""benchmarks/gpu.sh, rehearsed without a GPU: NVIDIA's tools are stand-ins on PATH."""

import csv
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import segops
from benchmarks import gpu, gpu_faults, measure
from benchmarks.suites import OPS

ROOT = Path(gpu.__file__).parent.parent
COMMIT = "0123456789abcdef"

NVIDIA_SMI = """#!/usr/bin/env bash
case $* in
  *driver_version\\ *) echo 580.00 ;;
  *) printf 'name, driver_version\\nNVIDIA Stand-in, 580.00\\n' ;;
esac
"""
# Skips its own options and runs the command.
COMPUTE_SANITIZER = """#!/usr/bin/env bash
while [[ $1 != */python* ]]; do shift; done
exec "$@"
"""
NCU_CSV = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","void segops::pac::<unnamed>::gather_kernel<__nv_bfloat16, (int)8>(const T1 *, T1 *)","S","Duration","us","12.34"
"0","7","python3","void segops::pac::<unnamed>::gather_kernel<__nv_bfloat16, (int)8>(const T1 *, T1 *)","S","DRAM Throughput","%","56.7"
"0","7","python3","void segops::pac::<unnamed>::gather_kernel<__nv_bfloat16, (int)8>(const T1 *, T1 *)","L","Registers Per Thread","register/thread","40"
"1","7","python3","void segops::pac::<unnamed>::gather_kernel<__nv_bfloat16, (int)8>(const T1 *, T1 *)","S","Duration","us","99.99"
"""
NCU = f"""#!/usr/bin/env bash
while [[ $1 != */python* ]]; do
  [[ $1 != --log-file ]] || cat > "$2" <<'END'
{NCU_CSV}END
  shift
done
exec "$@"
"""
STAND_INS = {"nvidia-smi": NVIDIA_SMI, "compute-sanitizer": COMPUTE_SANITIZER, "ncu": NCU}


def environment(folder, **stand_ins):
    """The environment with stand-ins, and this Python, on PATH."""
    folder.mkdir()
    for name, text in (STAND_INS | {name.replace("_", "-"): text for name, text in stand_ins.items()}).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}


def run(*arguments, env=None):
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


RUNS = {
    "smoke": ["smoke"],
    "check": ["check"],
    "retime": ["retime", "--only", "pag"],
    "one": ["check", "--only", "argmax"],
    "train": ["train"],
    "failing": ["smoke", "--only", "argmax"],
}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A function of a run's name that gives the finished process and {member of its tar: text}."""
    folder = tmp_path_factory.mktemp("gpu")

    @functools.cache
    def rehearse(name):
        broken = {"compute_sanitizer": "#!/usr/bin/env bash\necho 'no device'\nexit 1\n"} if name == "failing" else {}
        env = environment(folder / f"{name}-bin", **broken)
        done = run(*RUNS[name], "--commit", COMMIT, "--device", "cpu", "--no-build", "--out", folder / name, env=env)
        (path,) = (folder / name).iterdir()
        with tarfile.open(path) as tar:
            return done, {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}

    return rehearse


# Whole stages take a minute. Always rehearsed are retime and check of one op, and smoke of one, where a step fails.
def stages(*names):
    return [pytest.param(*name, marks=() if name[0] == "retime" else pytest.mark.thorough) for name in names]


STEPS = {
    "smoke": ["info", "native", "memcheck", "headline", "triton"],
    "check": ["tests", "tests-models", "racecheck", "synccheck", "ncu", "compiled", "tests-train"],
    "retime": ["native", "headline"],
    "train": ["train"],
}
PLAIN = {"info", "tests", "tests-models", "tests-train"}  # steps that are no suite of benchmarks.gpu


@pytest.mark.parametrize("stage", stages(*([stage] for stage in STEPS)))
def test_stage(rehearsal, stage):
    done, texts = rehearsal(stage)
    assert done.returncode == 0, done.stdout + done.stderr
    members = {f"{stage}/{name}" for name in ("machine.csv", "steps.txt", "summary.txt")}
    for step in STEPS[stage]:
        members |= {f"{stage}/{step}.{suffix}" for suffix in (["log"] if step in PLAIN else ["log", "json", "txt"])}
    assert members <= set(texts)

    table = texts[f"{stage}/summary.txt"]
    assert done.stdout.endswith(table) and table.endswith("all steps passed\n") and len(table) < 10_000
    assert f"{stage} of {COMMIT}" in table
    assert [line.split()[0] for line in texts[f"{stage}/steps.txt"].splitlines()] == STEPS[stage]
    assert "Stand-in" in texts[f"{stage}/machine.csv"]


@pytest.mark.parametrize(
    "stage, name",
    stages(("retime", "native"), ("retime", "headline"), ("smoke", "triton"), ("check", "compiled"), ("train", "train")),
)
def test_results_say_where_they_come_from(rehearsal, stage, name):
    results = json.loads(rehearsal(stage)[1][f"{stage}/{name}.json"])
    found = results["environment"]
    assert found["commit"] == COMMIT and found["torch"] == torch.__version__ and found["segops"] == segops.__version__
    assert found["device"] and found["python"] and found["triton"]
    assert results["results"] and not results["failures"]


@pytest.mark.thorough
def test_smoke_tries_every_op_in_every_way(rehearsal):
    results = json.loads(rehearsal("smoke")[1]["smoke/native.json"])["results"]
    names = [result["case"] for result in results]
    for dtype in ("float32", "bfloat16", "float16"):
        for memory_format in ("contiguous", "channels_last"):
            for shape in ("packed", "odd"):
                for op in OPS:
                    for trial in importlib.import_module(f"benchmarks.bench_{op}").TRIALS:
                        assert f"{op} {trial} {dtype} {memory_format} {shape}" in names
    assert all(result["error"] <= 1 for result in results)


@pytest.mark.thorough
def test_headline(rehearsal):
    _, texts = rehearsal("smoke")
    rates, *results = json.loads(texts["smoke/headline.json"])["results"]
    assert all(rate > 0 for rate in rates["rates"].values())
    assert {result["case"].split()[0] for result in results} == set(OPS)
    for result in results:
        assert {row["kind"] for row in result["rows"]} == ({"forward"} if "argmax" in result["case"] else {"forward", "full"})
        assert all(kernel["us"] >= 0 and kernel["calls"] > 0 for kernel in result["kernels"])
        assert any(not row["name"].startswith("segops") for row in result["rows"])
    rows = list(csv.DictReader(io.StringIO(texts["smoke/headline.csv"])))
    assert {row["commit"] for row in rows} == {COMMIT} and all(float(row["median"]) > 0 and row["device"] for row in rows)
    assert "upsample_argmax" in texts["smoke/headline.txt"]


def test_retime_is_of_one_op(rehearsal):
    results = json.loads(rehearsal("retime")[1]["retime/headline.json"])["results"]
    assert {result["case"].split()[0] for result in results} == {"rates", "pag"}


def test_check_of_one_op(rehearsal):
    done, texts = rehearsal("one")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[0] for line in texts["check/steps.txt"].splitlines()]
    assert steps == ["tests", "racecheck", "synccheck", "ncu", "compiled"]
    assert " passed" in texts["check/tests.txt"] and json.loads(texts["check/compiled.json"])["results"]
    lines = texts["check/ncu.txt"].splitlines()
    assert lines[0] == "1 of 1 cases on native under ncu" and len(lines) == 3


@pytest.mark.thorough
def test_ncu(rehearsal):
    lines = rehearsal("check")[1]["check/ncu.txt"].splitlines()
    assert lines[0] == "6 of 6 cases on native under ncu"
    assert lines[2].split() == ["12.34us", "56.7%", "40", "gather_kernel<__nv_bfloat16,", "8>"] and len(lines) == 3


@pytest.mark.thorough
def test_every_network_trains(rehearsal):
    results = json.loads(rehearsal("train")[1]["train/train.json"])["results"]
    assert len(results) == 6 and all(result["images"] > 0 for result in results)
    first = {result["case"]: result["first_loss"] for result in results if result["case"].startswith("pacnet")}
    assert max(first.values()) - min(first.values()) < 0.01  # it is one network, however it is run


def test_a_step_that_fails_is_named_and_the_others_run(rehearsal):
    done, texts = rehearsal("failing")
    assert done.returncode == 1
    assert [line.split(maxsplit=3)[0::3] for line in texts["smoke/steps.txt"].splitlines()] == [
        ["info", "passed"],
        ["native", "passed"],
        ["memcheck", "FAILED: status 1"],
        ["headline", "passed"],
        ["triton", "passed"],
    ]
    assert "FAILED the process started no case and ended with status 1: no device" in texts["smoke/summary.txt"]
    assert done.stdout.endswith("FAILED: memcheck\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "STAGE must be smoke, check, retime or train; got ''"),
        (["smok"], "STAGE must be smoke, check, retime or train; got 'smok'"),
        (["smoke", "--fast"], "unknown option '--fast'"),
        (["smoke", "--commit"], "--commit needs a value"),
        (["smoke", "--commit", "main"], "--commit must be a hash; got 'main'"),
        (["smoke", "--device", "tpu"], "--device must be cuda or cpu; got 'tpu'"),
        (["smoke", "--only", "crf2"], "--only must be an op that has a benchmark, as pac; got 'crf2'"),
        (["train", "--only", "pac"], "train has no --only"),
        (["smoke", "--commit", COMMIT], "nvidia-smi finds no GPU: --device cpu rehearses without one"),
    ],
)
def test_wrong_usage(tmp_path, arguments, message):
    env = environment(tmp_path / "bin", nvidia_smi="#!/usr/bin/env bash\nexit 9\n")
    done = run(*arguments, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"gpu.sh: {message}; usage: ") and done.stderr.count("\n") == 1


def test_stopped_by_hand(tmp_path):
    env = environment(tmp_path / "bin", python3="#!/usr/bin/env bash\nexec sleep 600\n")
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", "retime", "--commit", COMMIT, "--device", "cpu", "--no-build"]
    process = subprocess.Popen([*command, "--out", tmp_path / "out"], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("== native, at most ")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and (tmp_path / "out" / "retime.tar.gz").exists()
    assert "FAILED: stopped\n" in output and "FAILED: stopped before\n" in output


def suite(folder, env, *arguments, **options):
    """`python -m benchmarks.gpu smoke` of one op under memcheck's stand-in; what reads its JSON."""
    command = [sys.executable, "-m", "benchmarks.gpu", "smoke", "--name", "x", "--out", folder, "--device", "cpu"]
    command += ["--only", "argmax", "--tool", "memcheck", *arguments]
    env = env | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    return process, lambda: json.loads((folder / "x.json").read_text())


def test_goes_on_after_the_case_that_killed_the_process(tmp_path):
    deadly = """#!/usr/bin/env bash
while [[ $1 != */python* ]]; do shift; done
[[ $* == *'--start 0'* ]] || exec "$@"
"$@" | while read -r line; do
  printf '%s\\n' "$line"
  if [[ $line == *begin*noise\\ bfloat16\\ contiguous\\ packed* ]]; then
    echo '========= Invalid __global__ write of size 16 bytes'
    kill -9 $$
    exit
  fi
done
"""
    process, found = suite(tmp_path, environment(tmp_path / "bin", compute_sanitizer=deadly))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    results = found()["results"]
    assert len(results) == 24 and sum("failed" in result for result in results) == 1
    (failure,) = found()["failures"]
    assert failure.startswith("argmax noise bfloat16 contiguous packed: the process ended with signal 9: ")
    assert "Invalid __global__ write of size 16 bytes" in failure and f"FAILED {failure}" in output


def test_time_that_runs_out_leaves_what_there_is(tmp_path):
    slow = '#!/usr/bin/env bash\nprintf \'\\x1e{"begin": "a case", "index": 0}\\n\'\nsleep 600\n'
    process, found = suite(tmp_path, environment(tmp_path / "bin", compute_sanitizer=slow), start_new_session=True)
    while process.stdout.readline() != "> a case\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert found()["failures"] == ["interrupted", "a case: did not end in time"] and "FAILED interrupted" in output


def test_a_tool_that_is_not_there(tmp_path):
    env = environment(tmp_path / "bin")
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    process, found = suite(tmp_path, env | {"PATH": str(tmp_path / "bin")})
    process.communicate(timeout=60)
    assert process.returncode == 1 and found()["failures"] == ["compute-sanitizer is not on PATH"]


def test_no_gpu_is_no_result(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "smoke", "--name", "x", "--out", tmp_path, "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "finds no GPU" in (tmp_path / "x.txt").read_text()


def test_ncu_that_may_not_read_counters(tmp_path):
    (tmp_path / "ncu.csv").write_text("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
    lines, troubles = gpu.ncu_table(tmp_path / "ncu.csv")
    assert lines == [] and troubles == ["==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"]
    (tmp_path / "ncu.csv").write_text("==WARNING== No kernels were profiled.\n")
    assert gpu.ncu_table(tmp_path / "ncu.csv") == ([], ["ncu profiled no kernel"])
    assert gpu.ncu_table(tmp_path / "none.csv") == ([], ["ncu wrote nothing"])


@pytest.mark.parametrize(
    "line, expected",
    [
        ("========= COMPUTE-SANITIZER\n", False),
        ("========= ERROR SUMMARY: 0 errors\n", False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", False),
        ("=========\n", False),
        ("ordinary output\n", False),
        ("========= Invalid __global__ read of size 4 bytes\n", True),
    ],
)
def test_findings(line, expected):
    assert gpu.is_finding(line) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "void segops::bal::(anonymous namespace)::cells_kernel<float, int>(float const*, long)",
            "bal::cells_kernel<float, int>",
        ),
        ("void segops::bal::<unnamed>::blur_x_kernel<int>(const float *)", "bal::blur_x_kernel<int>"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >(int)",
            "vectorized_elementwise_kernel<4, FillFunctor<float>, std::array<char*, 1ul> >",
        ),
    ],
)
def test_short_names(name, expected):
    assert gpu.short_name(name) == expected


class Gpu:
    """Stands in for torch.cuda: a clock in milliseconds, and a GPU at 2 GHz with a queue."""

    def __init__(self):
        self.now = self.free = 0.0

    def launch(self, busy, cost):
        self.now += cost
        self.free = max(self.free, self.now) + busy

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.free, gpu.now)

            def query(self):
                return gpu.now >= self.at

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def test_launching_does_not_count_and_the_gpu_waits_no_longer_than_it_takes(monkeypatch):
    device, waited = Gpu(), []
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (waited.append(cycles), device.launch(cycles / 2e6, 0.005)))

    def call():  # ten kernels of 2 us, which take 20 us each to launch
        for _ in range(10):
            device.launch(busy=0.002, cost=0.02)

    timer = measure.CudaTimer(call)
    times = [timer() for _ in range(5)]
    assert times == pytest.approx([0.02] * 5)
    assert 0.2 < waited[-1] / 2e6 < 0.5 and waited == sorted(waited)

    def waits():  # for the GPU, in the middle
        call()
        device.now = max(device.now, device.free)
        call()

    timer = measure.CudaTimer(waits)
    assert timer() > 0.2 and waited[-1] < 3e7


def test_commit_and_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGOPS_COMMIT", COMMIT)
    assert measure.environment("cpu")["commit"] == COMMIT
    monkeypatch.delenv("SEGOPS_COMMIT")
    assert measure.environment("cpu")["commit"] != COMMIT
    smi = "#!/usr/bin/env bash\n[[ $1 == --query-gpu=driver_version ]] && echo 580.1.2\n"
    monkeypatch.setenv("PATH", environment(tmp_path / "bin", nvidia_smi=smi)["PATH"])
    assert measure._driver() == "580.1.2"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure._driver() == "unknown"


def test_triton_is_timed_unless_a_backend_is_asked_for(monkeypatch):
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    assert list(measure.on_backends(torch.exp)) == ["segops", "segops triton"]
    with segops.backend("native"):
        assert list(measure.on_backends(torch.exp)) == ["segops"]


def test_a_fault_ends_the_worker_that_it_hit(monkeypatch):
    def fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=fault)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    for worker in (None, "gw0"):
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        if worker:
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        hook = gpu_faults.pytest_runtest_protocol()
        next(hook)
        with pytest.raises(StopIteration) as stop:
            hook.send(True)
        assert stop.value.value is True
    assert ended == [1]
