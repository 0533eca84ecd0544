# Every target sets up what it needs: a virtual environment with all packages, and the native modules.
#   make demo      prune, compensate and recover a small network on real images; writes runs/demo/
#   make test      lint, types and all tests but the slow ones, in TEST_PROCESSES=2 processes
#   make test-all  the slow ones too, some of which are timed: in one process
#   make lint      ruff, mypy, clang-format
#   make sanitize  tests of the native modules under AddressSanitizer and UBSan, built in a temporary folder; those of
#                  the emulated CUDA module too
#   make emulate   the CUDA kernels and their host code on the CPU, by the operator tests; needs no GPU and no
#                  CUDA toolkit
#   make wheel-test  one wheel, audited, its operator tests under several releases of torch (TORCHES='2.11.0? latest')
#   make bench     benchmarks; writes runs/benchmarks-*.json, renders docs/benchmarks.md (NOTE='words on the run')
#   make coverage  prune every model of torchvision, timm, transformers, eleven more libraries and the toys; writes
#                  docs/results/coverage-*.json and docs/coverage.md (SUITES='timm toys' chooses,
#                  PEER=1 runs Torch-Pruning on the same models)
#   make docs      build the documentation into site/
#   make prune-speed  time pruning beside Torch-Pruning on the torchvision networks both do; writes
#                  docs/results/prune-speed-torchvision.json and docs/coverage.md
#   make clean     remove what was built and all results (keeps the environment)
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the environment's folder, and
# PIP_INSTALL_ARGS passes options to every `pip install`, for example a local wheel folder.

PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.chanprune-installed
NATIVE_SOURCES := $(shell find csrc -type f)
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_INSTALL_ARGS)

.PHONY: help install demo test test-all lint sanitize emulate wheel-test bench coverage prune-speed docs clean

help:
	@sed -n 's/^#   make/make/p' Makefile

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and on its own: the native modules are compiled against the very copy that will
# load them, so their build must see it (hence no build isolation).
$(INSTALLED): setup.py pyproject.toml $(NATIVE_SOURCES) | $(BIN)/python
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) torch torchvision pybind11 ninja setuptools wheel
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/chanprune demo

# Of two processes one works while the other waits, on a file or on processes of its own.
TEST_PROCESSES ?= 2
test: lint
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist worksteal

test-all: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

sanitize: $(INSTALLED)
	$(BIN)/python tools/sanitize.py -q
	$(BIN)/python tools/emulate_cuda.py --sanitize -q

emulate: $(INSTALLED)
	$(BIN)/python tools/emulate_cuda.py -q

# Releases with a question mark may be missing on the package index.
TORCHES ?= 2.11.0? 2.13.0? latest
wheel-test: $(INSTALLED)
	$(BIN)/python tools/wheel_test.py --torch $(TORCHES)

# One process per operator: each measures the machine's bandwidth anew beside its own rows. Threads
# keep to their cores: on a busy machine two would otherwise take turns on one.
OPERATORS := channel_norms slice_channels kd_kl_div
# glibc keeps what is freed: results would else be fresh pages of the system in one round and old
# ones in the next, and a page fault costs more than copying the page.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=68719476736
bench: $(INSTALLED)
	mkdir -p runs
	set -e; for op in $(OPERATORS); do \
	  OMP_PROC_BIND=true $(KEEP_MEMORY) $(BIN)/python -m pytest benchmarks/ops/bench_$$op.py --benchmark-only \
	    --benchmark-json=runs/benchmarks-$$op.json; \
	done
	$(BIN)/python benchmarks/render.py docs '$(NOTE)' $(OPERATORS:%=runs/benchmarks-%.json)

SUITES ?= torchvision timm transformers families multimodal libraries toys
coverage: $(INSTALLED)
	$(PIP_INSTALL) -e '.[coverage,libraries]' --no-build-isolation
	set -e; for suite in $(SUITES); do \
	  $(BIN)/python -m benchmarks.coverage --suite $$suite $(if $(PEER),--peer torch-pruning) \
	    --json docs/results/coverage-$$suite.json || test $$? -eq 1; \
	done
	$(BIN)/python -m benchmarks.coverage.render docs/results docs/coverage.md

docs: $(INSTALLED)
	$(PIP_INSTALL) -e '.[docs]' --no-build-isolation
	$(BIN)/python -m mkdocs build --strict

prune-speed: $(INSTALLED)
	$(PIP_INSTALL) -e '.[coverage]' --no-build-isolation
	$(BIN)/python -m benchmarks.prune_speed --exact docs/results/coverage-torchvision.json \
	  --json docs/results/prune-speed-torchvision.json
	$(BIN)/python -m benchmarks.coverage.render docs/results docs/coverage.md

clean:
	rm -rf site build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f chanprune_ext/*.so $(INSTALLED)
