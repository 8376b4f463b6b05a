#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds, tries, benchmarks, tests and sanitizes on the GPU at hand, offline, with the plain python3. `make gpu` runs it.
#
#   STAGES="build smoke bench beyond test sanitize"   any of them, always in this order
#   OUT=benchmarks/results/<gpu name>    where log.txt, summary.txt, gpu.json, beyond.json and table.md go
#   TOTAL=535                            seconds for all stages together
#   TEST_ARGS                            more arguments for pytest
#   KPFUSED_COMMIT                       the commit, for the head of the tables, where the checkout has no .git
#   DEVICE=cpu                           tries the script where no GPU is: figures mean nothing then
#
# In two calls, each stage with the time that it can use: STAGES="build smoke bench beyond" in seven minutes or so, then,
# at once, while the build is still there, TOTAL=330 STAGES="test sanitize". With the same OUT, the second adds to the log
# and the summary of the first; where OUT is emptied between calls, fetch what the first wrote before the second.
#
# Needs a CUDA torch >= 2.11, nvcc, ninja, pybind11, pytest and hypothesis; with pytest-xdist tests run in parallel.
# Nothing runs on a build that failed. All else runs whatever became of what ran before; the script fails if anything
# failed.
# shellcheck disable=SC2329 # functions are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

ALL="build smoke bench beyond test sanitize"
STAGES=${STAGES:-$ALL}
TOTAL=${TOTAL:-535}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
# For nvcc, and for AOTInductor, which links against the stubs of the driver there.
if [[ -d $CUDA_HOME ]]; then export CUDA_HOME PATH="$PATH:$CUDA_HOME/bin"; fi

# Seconds that a stage may take, and those kept for it while others run before it. Together, `least` leaves 165 to build.
declare -A most=([build]=220 [smoke]=40 [bench]=260 [beyond]=80 [test]=240 [sanitize]=150)
declare -A least=([build]=0 [smoke]=20 [bench]=180 [beyond]=60 [test]=60 [sanitize]=50)
# Tests that run on the device, by their names: those that take a device have it in theirs.
ON_DEVICE="cuda or nccl or test_streams or test_graph_capture or not_the_current_one"

wanted() { [[ " $STAGES " == *" $1 "* ]]; }

# The limit of a stage: its own, less what later ones are to have of the total.
limit() {
  local own=${most[$1]} left=$((TOTAL - SECONDS)) other later=0
  for other in $ALL; do
    if ((later)) && wanted "$other"; then left=$((left - least[$other])); fi
    if [[ $other == "$1" ]]; then later=1; fi
  done
  ((own < left)) || own=$left
  ((own > 20)) || own=20
  echo "$own"
}

# run TITLE SECONDS FUNCTION ARGUMENTS...: runs it with a time limit, and notes how it went. When time is up it is
# interrupted, so that what it has found is still printed. `timeout` runs programs, not functions: the function is called
# by this script, run anew.
run() {
  local title=$1 seconds=$2 start=$SECONDS code note="ok"
  shift 2
  echo "== $title (at most $seconds s)" | tee -a "$log"
  timeout --signal=INT --kill-after=15 "$seconds" bash benchmarks/gpu.sh --stage "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  if ((code == 124 || code == 137)); then
    note="FAILED, out of time"
  elif ((code != 0)); then
    note="FAILED, exit code $code"
  fi
  echo "$title: $note, $((SECONDS - start)) s" >>"$summary"
  return "$code"
}

build() {
  local architecture
  if [[ $DEVICE == cuda ]]; then
    architecture=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
    export TORCH_CUDA_ARCH_LIST=$architecture KPFUSED_CUDA=1
  fi
  "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m kpfused.info
}

smoke() { interruptible -m benchmarks.sanitize_cases --device "$DEVICE"; }

bench() {
  local options=(--json "$OUT/gpu.json" --seconds "$1" --device "$DEVICE")
  if [[ $DEVICE != cuda ]]; then options+=(--dry-run --samples 2); fi
  interruptible -m benchmarks.gpu "${options[@]}"
}

beyond() {
  local options=(--json "$OUT/beyond.json" --device "$DEVICE")
  if [[ $DEVICE != cuda ]]; then options+=(--dry-run --rounds 2); fi
  interruptible -m benchmarks.beyond "${options[@]}"
}

# tests SELECTION DISTRIBUTION FILES...
tests() {
  local parallel=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 8 --dist "$2"); fi
  export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2 # of each of eight workers
  # shellcheck disable=SC2086 # several arguments in one variable
  interruptible -m pytest "${@:3}" -q -p no:cacheprovider --tb=short -k "$1" "${parallel[@]}" ${TEST_ARGS:-}
}

# The four tools run at the same time, each for at most so many seconds: each watches a process of its own.
sanitize() {
  local tool code=0 status work
  local -A processes=()
  if ! command -v compute-sanitizer >/dev/null || [[ $DEVICE != cuda ]]; then
    echo "compute-sanitizer: not available; memcheck, racecheck, initcheck and synccheck did not run"
    return 0
  fi
  compute-sanitizer --version | tail -n 2
  work=$(mktemp -d)
  for tool in memcheck racecheck initcheck synccheck; do
    # Errors of the kernels, not of calls that torch makes to find out what a device can do.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 "$1" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      $([[ $tool == memcheck ]] && echo --report-api-errors no) \
      "$PYTHON" -m benchmarks.sanitize_cases >"$work/$tool" 2>&1 &
    processes[$tool]=$!
  done
  for tool in memcheck racecheck initcheck synccheck; do
    wait "${processes[$tool]}"
    status=$?
    case $status in
      0) echo "-- $tool: no errors" ;;
      124 | 137) echo "-- $tool: out of time" ;;
      *) echo "-- $tool: exit code $status" ;;
    esac
    ((status == 0)) || code=1
    head -c 20000 "$work/$tool"
  done
  rm -r "$work"
  return "$code"
}

# Python, with a SIGINT that interrupts it even where this script runs in the background and so ignores it.
interruptible() { env --default-signal=INT "$PYTHON" "$@"; }

if [[ ${1:-} == --stage ]]; then
  shift
  "$@"
  exit
fi

# The tables of what was measured, and how each stage went; the end, wherever it comes.
finish() {
  local tables=() file
  for file in "$OUT"/gpu.json "$OUT"/beyond.json; do
    if [[ -s $file ]]; then tables+=("$file"); fi
  done
  if ((${#tables[@]})); then "$PYTHON" benchmarks/table.py "${tables[@]}" >"$OUT/table.md" || failed=1; fi
  echo "== results in $OUT"
  cat "$summary"
  exit "$failed"
}

# The rest of the tests runs where there is no GPU too: to be out of time there is noted, but no failure. Last come those
# that take minutes to compile.
all_tests() {
  local until=$((SECONDS + $1)) slow=(tests/test_native.py tests/test_simt.py)
  run "test, on the device" "$1" tests "$ON_DEVICE" worksteal tests "${slow[@]/#/--ignore=}" || failed=1
  other_tests "test, the rest" $((until - SECONDS)) tests "${slow[@]/#/--ignore=}"
  other_tests "test, kernels on the CPU" $((until - SECONDS)) "${slow[@]}"
}

# other_tests TITLE SECONDS FILES...
other_tests() {
  local before
  if (($2 < 20)); then
    echo "$1: no time left" >>"$summary"
    return
  fi
  before=$(wc -l <"$log")
  run "$1" "$2" tests "not ($ON_DEVICE)" loadscope "${@:3}"
  case $? in
    0) ;;
    124 | 137)
      if tail -n "+$before" "$log" | grep -E '^(FAILED|ERROR) ' >/dev/null; then
        failed=1
      else
        sed -i '$s/FAILED, out/unfinished, out/' "$summary"
      fi
      ;;
    *) failed=1 ;;
  esac
}

SECONDS=0
name=$("$PYTHON" -c 'import re, sys, torch
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "dry-run"
print(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))' "$DEVICE") || {
  echo "gpu.sh: $PYTHON has no torch that sees a CUDA device" >&2
  exit 1
}
OUT=${OUT:-benchmarks/results/$name}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/log.txt summary=$OUT/summary.txt
failed=0
if wanted build; then rm -f "$OUT"/{log.txt,summary.txt,gpu.json,beyond.json,table.md}; fi
echo "$name: $STAGES" | tee -a "$log" >>"$summary"
export OUT STAGES TOTAL PYTHON DEVICE

for stage in $ALL; do
  wanted "$stage" || continue
  seconds=$(limit "$stage")
  case $stage in
    build)
      run build "$seconds" build || {
        failed=1
        finish
      }
      ;;
    smoke) run smoke "$seconds" smoke || failed=1 ;;
    bench) run bench "$seconds" bench "$((seconds > 45 ? seconds - 25 : 20))" || failed=1 ;;
    beyond) run beyond "$seconds" beyond || failed=1 ;;
    test) all_tests "$seconds" ;;
    sanitize) run sanitize "$seconds" sanitize "$((seconds - 10))" || failed=1 ;;
  esac
done
finish
