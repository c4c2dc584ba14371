# make demo   sets everything up, then a small model learns arithmetic by DAPO (6 to 9 minutes on two cores)
# make test   sets everything up and runs all tests
# make docs   builds the documentation into build/docs, warnings being errors
# make clean  removes the environment and build/, and leaves runs/
# The set-up and a finished demo are not done twice. A Python 3.11 is looked for, or fetched; PYTHON=<path> names one (requirements/setup.sh).
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
DOCS := build/docs
EXPERIMENT ?= demo
RUN ?= runs/$(EXPERIMENT)
SEED ?= 0
PARALLEL ?=
RANKS ?= 2
STARTED := $(shell date +%s)
export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore
export TOKENIZERS_PARALLELISM ?= false
# Compiled modules are kept, whatever the shell says: half of each process's start would go into compiling torch, Megatron or vLLM.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-fast check container docs bench faults kills matrix nodes clean

setup: $(VENV)/.complete

$(VENV)/.complete: requirements/cpu.txt requirements/overrides.txt requirements/setup.sh pyproject.toml
	@sh requirements/setup.sh $(VENV) "$(PYTHON)"
	@touch $@

demo: setup
	@PATH="$(abspath $(BIN)):$$PATH" EXPERIMENT=$(EXPERIMENT) RUN=$(RUN) SEED=$(SEED) PARALLEL=$(PARALLEL) RANKS=$(RANKS) STARTED=$(STARTED) bash examples/demo/run.sh

test: setup
	@echo "== test: the whole suite (CPU; tests marked gpu are skipped without a CUDA device)"
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not vllm"

check: setup
	@echo "== check: ruff (lint, format), mypy, hadolint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

container: setup
	@PATH="$(abspath $(BIN)):$$PATH" sh requirements/try_container.sh build/container

docs: setup
	@echo "== docs: $(DOCS)/index.html"
	@$(BIN)/mkdocs build --strict --quiet --site-dir $(DOCS)

bench: setup
	$(BIN)/python benchmarks/verifier.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/controller.py
	$(BIN)/python benchmarks/sampler.py
	$(BIN)/python benchmarks/versus_trl.py

faults: setup
	$(BIN)/python benchmarks/rank_faults.py

kills: setup
	$(BIN)/python benchmarks/kill_resume.py

matrix: setup
	$(BIN)/python benchmarks/parallelism.py --table docs/parallelism.md

nodes: setup
	@echo "== nodes: one job on several hosts under a real Slurm, as root; installs Debian's slurm-wlm, munge and iproute2"
	$(BIN)/python benchmarks/nodes.py

clean:
	rm -rf $(VENV) build *.egg-info
