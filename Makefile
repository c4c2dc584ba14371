# make demo   sets everything up, then a small model learns arithmetic by DAPO (6 to 9 minutes on two cores)
# make test   sets everything up and runs all tests
# Both can be run again at no cost. PYTHON names the interpreter to start from; TORCH_INDEX an index with CPU builds of torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
SEED ?= 0
PARALLEL ?= single
RANKS ?= 2
STARTED := $(shell date +%s)
export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-fast check bench clean

setup: $(VENV)/.complete

# uv reads neither pip's variables nor pip's configuration, so where a CPU build of torch may lie is passed on.
$(VENV)/.complete: requirements/cpu.txt requirements/overrides.txt pyproject.toml
	@echo "== setup: Python environment in $(VENV) (about 1 minute, once)"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"{sys.executable} is Python {v[0]}.{v[1]}; requirements/cpu.txt is for 3.11: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --requirements requirements/cpu.txt --overrides requirements/overrides.txt \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} $${TORCH_INDEX:+--extra-index-url "$$TORCH_INDEX" --index-strategy unsafe-best-match}
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup
	@PATH="$(abspath $(BIN)):$$PATH" RUN=$(RUN) SEED=$(SEED) PARALLEL=$(PARALLEL) RANKS=$(RANKS) STARTED=$(STARTED) bash examples/demo/run.sh

test: setup
	@echo "== test: the whole suite (CPU; tests marked gpu are skipped without a CUDA device)"
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not vllm"

check: setup
	@echo "== check: ruff (lint, format), mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/verifier.py
	$(BIN)/python benchmarks/rollout.py

clean:
	rm -rf $(VENV) runs build *.egg-info
