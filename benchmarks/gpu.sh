#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one go and one folder, within ten minutes: build, CUDA tests, timings of
# every op, memory checker.
#
#   bash benchmarks/gpu.sh [FOLDER]      FOLDER defaults to benchmarks/results/gpu
#
# Uses the python3 that is active and installs segops into it without dependencies. It must have a CUDA build of torch, and
# setuptools, pybind11, ninja, pytest, pytest-benchmark, hypothesis, timm, pillow (pip install ".[dev]" elsewhere has them all).
# Goes on after a step that fails, so that one run says as much as it can; the last lines name what failed. Timings that run out
# of time are interrupted: what was timed by then is written.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results/gpu}" && cd "${1:-benchmarks/results/gpu}" && pwd)
failed=()

step() { # step NAME SECONDS COMMAND...: runs it for that long at most, and for what is left of ten minutes; keeps its log
  local name=$1 limit=$(($2 < 600 - SECONDS ? $2 : 600 - SECONDS))
  shift 2
  printf '\n== %s\n' "$name"
  timeout --signal=INT --kill-after=15 "$((limit > 0 ? limit : 1))" "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}

export SEGOPS_BUILD_CUDA=1 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
step build 120 python3 -m pip install --no-build-isolation --no-deps -e .
step info 30 python3 -m segops info
step tests 120 python3 -m pytest -q -m cuda -p no:cacheprovider tests/argmax tests/pac tests/bal tests/pag -k "not triton"
step benchmarks-argmax 60 python3 -m benchmarks argmax --out "$out"
step benchmarks-pag 100 python3 -m benchmarks pag --out "$out"
step benchmarks-pac 200 python3 -m benchmarks pac --out "$out"
step benchmarks-bal 160 python3 -m benchmarks bal --out "$out"
step tests-triton 150 python3 -m pytest -q -m cuda -p no:cacheprovider tests/argmax tests/pac tests/bal tests/pag -k triton # compiles for minutes
if command -v compute-sanitizer > /dev/null; then
  # Small shapes: the checker slows everything down a hundredfold.
  small='(test_every_element_is_written or test_memory_format_follows or test_bias_is_part_of_the_shared_filter or test_edges_count or test_kernels_write_all or test_strided_logits) and not triton'
  for tool in memcheck racecheck; do
    step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python3 -m pytest -q -m cuda -p no:cacheprovider tests/argmax/test_argmax.py tests/pac/test_pac.py tests/bal/test_bal.py tests/pag/test_pag.py -k "$small"
  done
fi

if ((${#failed[@]})); then
  printf '\nFAILED: %s (logs in %s)\n' "${failed[*]}" "$out"
  exit 1
fi
printf '\nall steps passed, evidence in %s\n' "$out"
