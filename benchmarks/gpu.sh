#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds, tests, sanitizes and benchmarks on the GPU at hand, offline, with the plain python3. `make gpu` runs it.
#
#   STAGES="build test sanitize bench beyond"   any of them, in this order
#   OUT=benchmarks/results/<gpu name>    where logs, JSON and the table go
#   TOTAL=520                            seconds for all stages together
#   TEST_ARGS                            more arguments for pytest
#   DEVICE=cpu                           tries the script where no GPU is: figures mean nothing then
#
# Needs a CUDA torch >= 2.11, nvcc, ninja, pybind11, pytest and hypothesis. Every stage runs, whatever became of those
# before it; the script fails if one failed.
# shellcheck disable=SC2329 # functions are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

STAGES=${STAGES:-build test sanitize bench beyond}
TOTAL=${TOTAL:-520}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH="$PATH:$CUDA_HOME/bin"

wanted() { [[ " $STAGES " == *" $1 "* ]]; }

# Seconds for a stage: its own limit, less what later stages need of the total.
limit() {
  local own=$1 left=$((TOTAL - SECONDS))
  shift
  while (($#)); do
    if wanted "$1"; then left=$((left - $2)); fi
    shift 2
  done
  ((own < left)) || own=$left
  ((own > 20)) || own=20
  echo "$own"
}

# stage NAME SECONDS COMMAND...: runs it with a log and a time limit, and notes how it went.
stage() {
  local title=$1 seconds=$2 start=$SECONDS code
  shift 2
  echo "== $title (at most $seconds s)"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$OUT/$title.log"
  code=${PIPESTATUS[0]}
  local note="ok"
  if ((code != 0)); then
    failed=1
    note="FAILED, exit code $code"
    if ((code == 124 || code == 137)); then note="FAILED, out of time"; fi
  fi
  echo "$title: $note, $((SECONDS - start)) s" >>"$summary"
}

build() {
  local architecture
  if [[ $DEVICE == cuda ]]; then
    architecture=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
    export TORCH_CUDA_ARCH_LIST=$architecture KPFUSED_CUDA=1
  fi
  "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m kpfused.info
}

run_tests() {
  local parallel=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 8 --dist loadscope); fi
  # shellcheck disable=SC2086 # several arguments in one variable
  "$PYTHON" -m pytest tests -q -p no:cacheprovider "${parallel[@]}" ${TEST_ARGS:-}
}

# The four tools run at the same time: each watches a process of its own.
sanitize() {
  local tool code=0 work
  local -A processes=()
  "$PYTHON" -m benchmarks.sanitize_cases --device "$DEVICE" || return 1 # unwatched: is the program itself right?
  if ! command -v compute-sanitizer >/dev/null || [[ $DEVICE != cuda ]]; then
    echo "compute-sanitizer: not available; memcheck, racecheck, initcheck and synccheck did not run"
    return 0
  fi
  compute-sanitizer --version | tail -n 2
  work=$(mktemp -d)
  for tool in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.sanitize_cases >"$work/$tool" 2>&1 &
    processes[$tool]=$!
  done
  for tool in memcheck racecheck initcheck synccheck; do
    if wait "${processes[$tool]}"; then
      echo "-- $tool: no errors"
    else
      echo "-- $tool: exit code $?"
      code=1
    fi
    head -c 20000 "$work/$tool"
  done
  rm -r "$work"
  return "$code"
}

bench() {
  local options=(--json "$OUT/gpu.json" --seconds "$1" --device "$DEVICE")
  if [[ $DEVICE != cuda ]]; then options+=(--dry-run --samples 2); fi
  "$PYTHON" -m benchmarks.gpu "${options[@]}"
}

beyond() {
  local options=(--json "$OUT/beyond.json" --device "$DEVICE")
  if [[ $DEVICE != cuda ]]; then options+=(--dry-run --rounds 2); fi
  "$PYTHON" -m benchmarks.beyond "${options[@]}"
}

# `timeout` runs programs, not functions: a stage is this script called with the function's name.
if [[ ${1:-} == --stage ]]; then
  shift
  "$@"
  exit
fi

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
summary=$OUT/summary.txt
: >"$summary"
failed=0
export OUT STAGES TOTAL PYTHON DEVICE

if wanted build; then
  stage build "$(limit 200 test 60 sanitize 40 bench 120 beyond 30)" bash benchmarks/gpu.sh --stage build
fi
if wanted test; then
  stage test "$(limit 240 sanitize 60 bench 130 beyond 30)" bash benchmarks/gpu.sh --stage run_tests
fi
if wanted sanitize; then
  stage sanitize "$(limit 150 bench 130 beyond 30)" bash benchmarks/gpu.sh --stage sanitize
fi
if wanted bench; then
  seconds=$(limit 245 beyond 30)
  stage bench "$seconds" bash benchmarks/gpu.sh --stage bench "$((seconds > 45 ? seconds - 25 : 20))"
fi
if wanted beyond; then
  stage beyond "$(limit 60)" bash benchmarks/gpu.sh --stage beyond
fi
tables=()
for file in "$OUT"/gpu.json "$OUT"/beyond.json; do
  if [[ -s $file ]]; then tables+=("$file"); fi
done
if ((${#tables[@]})); then "$PYTHON" benchmarks/table.py "${tables[@]}" >"$OUT/table.md" || failed=1; fi

echo "== results in $OUT"
cat "$summary"
exit "$failed"
