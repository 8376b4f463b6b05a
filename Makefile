# Two commands for newcomers: `make demo` and `make test`. `make help` lists the rest.
# Needs Python >= 3.10, a C++ compiler, make and a package index; nvcc where CUDA kernels are wanted.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# The module is built in place, so the checkout is the package.
export PYTHONPATH := $(CURDIR)

SOURCES := setup.py kpfused/version.py $(shell find csrc -type f)
READY := $(VENV)/.ready
BUILT := build/.built
RESULTS := benchmarks/results/cpu
FRESH_CUDA := build/.cuda

.PHONY: help demo test lint types unit sanitize build bench info gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | column -t -s:

demo: build  ## train a small network to find landmarks on photographs; writes out/landmarks.png
	$(PY) examples/landmarks.py

test: lint types unit  ## lint, types, and every test

lint: $(READY)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: build  ## mypy, strict
	$(PY) -m mypy

unit: build  ## the tests, sanitized kernels included
	$(PY) -m pytest

sanitize: $(READY)  ## CPU and CUDA kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer only
	$(PY) -m pytest tests/test_native.py tests/test_simt.py

build: $(BUILT)  ## compile kpfused._C in place

bench: build  ## CPU benchmarks beside the peers; rewrites the table in README.md
	mkdir -p $(RESULTS)
	$(PY) -m pytest benchmarks --benchmark-json=$(RESULTS)/speed.json
	$(PY) -m benchmarks.memory --json $(RESULTS)/memory.json
	$(PY) -m benchmarks.host_time --json $(RESULTS)/host_time.json
	$(PY) -m benchmarks.beyond --json $(RESULTS)/beyond.json
	$(PY) benchmarks/table.py $(addprefix $(RESULTS)/,speed.json memory.json host_time.json beyond.json) --readme README.md

info: build  ## versions, architectures, flags
	$(PY) -m kpfused.info

gpu:  ## build, try, benchmark, test and sanitize on a GPU with the plain python3 (STAGES="build smoke bench beyond ...")
	bash benchmarks/gpu.sh

clean:  ## remove what was built; keeps the virtual environment
	rm -rf build kpfused/*.so

$(READY): requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# With a CPU build of torch, ninja is not told which headers a CUDA source includes: compile them all when one changes.
$(FRESH_CUDA): $(wildcard csrc/*.h csrc/cuda/*)
	rm -rf build/temp.*/csrc/cuda
	mkdir -p build && touch $@

$(BUILT): $(READY) $(SOURCES) $(FRESH_CUDA)
	$(PY) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@
