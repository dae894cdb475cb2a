#!/usr/bin/env bash
# Builds, tests, checks and times segops on a machine with a GPU, in stages of a few minutes. Each
# stage leaves one file of evidence, FOLDER/STAGE.tar.gz, and prints a table of its results last.
#
#   bash benchmarks/gpu.sh STAGE [--commit HASH] [--out FOLDER] [--device cuda|cpu] [--only OP] [--no-build]
#
#   smoke   at most 190 s   every op against float64, also under memcheck; timings beside eager
#                           PyTorch, and of every kernel; the Triton kernels against float64
#   check   at most 240 s   the GPU tests but Triton's; racecheck, synccheck; ncu; timings beside
#                           torch.compile
#   retime  at most 120 s   every op against float64; timings beside eager PyTorch
#   train   at most 180 s   PAC-net in training, eager, compiled and as a CUDA graph, beside
#                           torchvision's DeepLab v3
#
#   --commit HASH      the commit that is measured; by default what git says
#   --out FOLDER       default benchmarks/results/gpu
#   --device cpu       rehearse without a GPU: small shapes, five times the seconds; default cuda
#   --only OP          one op alone, as pac
#   --no-build         do not build first: segops is installed already
#
# Runs the python3 on PATH, which needs a CUDA build of torch, setuptools >= 77, pybind11, ninja and
# pytest; timm, torchvision, lightning, hypothesis and xdist for all of the tests and for training.
# A step that fails or runs out of time is named in the table, and the other steps still run; the exit
# status is then 1. It is 2 if the command line is wrong.
set -uo pipefail

usage() {
  echo "gpu.sh: $1; usage: bash benchmarks/gpu.sh smoke|check|retime|train [--commit HASH] [--out FOLDER] [--device cuda|cpu] [--only OP] [--no-build]" >&2
  exit 2
}

stage=${1-} commit='' out='' device=cuda only='' build=1
case $stage in
  smoke) budget=190 ;;
  check) budget=240 ;;
  retime) budget=120 ;;
  train) budget=180 ;;
  *) usage "STAGE must be smoke, check, retime or train; got '$stage'" ;;
esac
shift
while (($#)); do
  case $1 in
    --no-build) build=0 && shift && continue ;;
    --commit | --out | --device | --only) [[ -n ${2-} ]] || usage "$1 needs a value" ;;
    *) usage "unknown option '$1'" ;;
  esac
  case $1 in
    --commit) commit=$2 ;;
    --out) out=$(realpath -m -- "$2") ;;
    --device) device=$2 ;;
    --only) only=$2 ;;
  esac
  shift 2
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[[ $device == cuda || $device == cpu ]] || usage "--device must be cuda or cpu; got '$device'"
[[ -z $only || -f benchmarks/bench_$only.py ]] || usage "--only must be an op that has a benchmark, as pac; got '$only'"
[[ $stage != train || -z $only ]] || usage "train has no --only"
[[ -n $commit ]] || git rev-parse --verify -q HEAD > /dev/null 2>&1 || usage "git does not know the commit: --commit HASH says it"
[[ -z $commit || $commit =~ ^[0-9a-f]{7,40}(\+changes)?$ ]] || usage "--commit must be a hash; got '$commit'"
[[ $device == cpu ]] || nvidia-smi -L > /dev/null 2>&1 || usage "nvidia-smi finds no GPU: --device cpu rehearses without one"
out=${out:-$PWD/benchmarks/results/gpu}
mkdir -p "$out" || usage "--out cannot be made: '$out'"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
work=$scratch/$stage
mkdir "$work"
names=() failed=() stopped=0
: > "$work/steps.txt"
# Ends the current step; the table and the tar are still written. It kills by itself, as nobody else would
# between the look at `stopped` and `wait`.
trap 'stopped=1; [[ -z ${!:-} ]] || kill -INT $! 2> /dev/null' INT TERM

export PYTHONUNBUFFERED=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
[[ -z $commit ]] || export SEGOPS_COMMIT=$commit
unset SEGOPS_BACKEND TORCH_CUDA_ARCH_LIST TRITON_INTERPRET # the visible GPU is what is built for
scale=1 few=4 many=12 workers=8
if [[ $device == cuda ]]; then
  export SEGOPS_BUILD_CUDA=1
else
  scale=5 few=1 many=2 workers=2
  export CUDA_VISIBLE_DEVICES='' TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi

step() { # step NAME SECONDS COMMAND...: runs it for at most that long, or as long as is left; keeps its log
  local i name=$1 limit=$(($2 * scale)) left=$((budget * scale - SECONDS - 10)) began=$SECONDS status=0 running verdict
  shift 2
  names+=("$name")
  ((limit <= left)) || limit=$left
  if ((stopped)); then
    verdict='FAILED: stopped before'
  elif ((limit < 5)); then
    verdict='FAILED: no time was left'
  else
    printf '== %s, at most %d s\n' "$name" "$limit"
    set -m # or what runs in the background ignores interrupts
    timeout --signal=INT --kill-after=5 "$limit" "$@" < /dev/null > "$work/$name.log" 2>&1 &
    running=$!
    set +m
    ((!stopped)) && wait "$running" || status=$?
    if ((stopped)); then
      while kill -INT "$running" 2> /dev/null; do # once more if it was still a copy of this shell, which loses signals
        for ((i = 0; i < 100; ++i)); do
          sleep 0.1
          kill -0 "$running" 2> /dev/null || break
        done
      done
      verdict='FAILED: stopped'
    elif ((status == 0)); then
      verdict=passed
    elif ((SECONDS - began >= limit)); then
      verdict="FAILED: time ran out after $limit s"
    else
      verdict="FAILED: status $status"
    fi
  fi
  if [[ $verdict != passed ]]; then
    failed+=("$name")
    [[ ! -e $work/$name.log ]] || tail -n 10 "$work/$name.log" | cut -c 1-200
  fi
  printf '%-14s %4d s  %s\n' "$name" "$((SECONDS - began))" "$verdict" | tee -a "$work/steps.txt"
}

suite() { # suite NAME SECONDS ARGUMENTS...: cases of `python3 -m benchmarks.gpu`
  local name=$1 seconds=$2
  shift 2
  step "$name" "$seconds" python3 -m benchmarks.gpu "$@" --name "$name" --out "$work" --device "$device" ${only:+--only "$only"}
}

tests() { # tests NAME SECONDS PATHS...: the GPU tests but Triton's; in a rehearsal a few of the others
  local name=$1 seconds=$2 parallel=()
  shift 2
  if [[ $device == cuda ]]; then
    set -- -m 'cuda and not triton' "$@"
  else
    set -- -m 'not cuda and not triton' -k 'test_errors and not emulated' "$@"
  fi
  if python3 -c 'import xdist' 2> /dev/null; then parallel=(-n "$workers" --dist loadgroup); fi
  step "$name" "$seconds" python3 -m pytest -v "${parallel[@]}" -p benchmarks.gpu_faults -p no:cacheprovider -o faulthandler_timeout=40 \
    --continue-on-collection-errors --junitxml "$work/$name.xml" "$@"
  { # its part of the table
    grep -E '^(FAILED|ERROR) ' "$work/$name.log" | head -n 12
    tail -n 1 "$work/$name.log"
  } 2> /dev/null | cut -c 1-200 > "$work/$name.txt"
}

fields=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem
nvidia-smi --query-gpu=$fields --format=csv > "$work/machine.csv" 2>&1
((!build)) || step build 110 python3 -m pip install -v --disable-pip-version-check --no-build-isolation --no-deps -e .

# A step's seconds are a limit. The last step gets what the others leave.
case $stage in
  smoke)
    step info 30 python3 -m segops info
    suite native 40 smoke --backend native --jobs "$few"
    suite memcheck 35 smoke --backend native --tool memcheck --tiny
    suite headline 50 headline --backend native
    suite triton 90 smoke --backend triton --jobs "$many"
    ;;
  check)
    if [[ -n $only ]]; then
      tests tests 75 "tests/$only"
    else
      ops=(benchmarks/bench_*.py)
      ops=("${ops[@]#benchmarks/bench_}")
      ops=("${ops[@]%.py}")
      tests tests 75 "${ops[@]/#/tests/}"
      tests tests-models 40 tests/models
    fi
    suite racecheck 25 smoke --backend native --tool racecheck --tiny
    suite synccheck 25 smoke --backend native --tool synccheck --tiny
    suite ncu 30 kernels --backend native --tool ncu
    suite compiled 70 compiled --backend native
    [[ -n $only ]] || tests tests-train 60 tests/train
    ;;
  retime)
    suite native 25 smoke --backend native --tiny --jobs "$few"
    suite headline 60 headline --backend native
    ;;
  train)
    suite train 170 train --backend native
    ;;
esac

machine='a CPU, in rehearsal'
[[ $device == cpu ]] || machine=$(tail -n 1 "$work/machine.csv")
{
  printf '\n== %s of %s on %s, %d s\n' "$stage" "${commit:-$(git rev-parse --short HEAD)}" "$machine" "$SECONDS"
  for name in "${names[@]}"; do
    if [[ -s $work/$name.txt ]]; then
      printf -- '-- %s\n' "$name" && cat "$work/$name.txt"
    elif [[ " ${failed[*]-} " == *" $name "* && -e $work/$name.log ]]; then
      printf -- '-- %s, from its log\n' "$name"
      { grep -im 5 error "$work/$name.log"; tail -n 5 "$work/$name.log"; } | cut -c 1-200
    fi
  done
  printf -- '-- steps\n' && cat "$work/steps.txt"
  if ((${#failed[@]})); then echo "FAILED: ${failed[*]}"; else echo 'all steps passed'; fi
} > "$work/summary.txt"
if tar -czf "$out/$stage.tar.gz" -C "$scratch" "$stage"; then echo "evidence: $out/$stage.tar.gz"; else failed+=(tar); fi
cat "$work/summary.txt"
((!${#failed[@]}))
