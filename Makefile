# `make sweep` and `make test` are the first two commands of the README; each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
PLAN ?= configs/sweeps/default.yaml

.PHONY: setup test check pytest gpu-test cluster-test sweep report bench clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"engram needs Python 3.11 or later, found {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

# Lint, types, import contracts, then the tests on all cores.
test: check pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The tests that need a CUDA device, by name; they skip themselves without one.
gpu-test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -vv -m gpu

# Sweeps on a Slurm of two nodes that the tests start on this machine: needs slurm-wlm and munge.
cluster-test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m cluster tests/cluster

# The main job: trains the points of PLAN and writes the report. Finished points are kept and skipped.
sweep: setup
	HF_HUB_OFFLINE=1 $(BIN)/engram sweep plan $(PLAN)
	HF_HUB_OFFLINE=1 $(BIN)/engram sweep run $(PLAN)
	HF_HUB_OFFLINE=1 $(BIN)/engram sweep report $(PLAN)

# Every comparison under benchmarks/, one after the other; each also runs alone. Results go to benchmarks/results/.
bench: setup
	set -e; for benchmark in $(filter-out benchmarks/harness.py,$(wildcard benchmarks/*.py)); do \
	  HF_HUB_OFFLINE=1 $(BIN)/python $$benchmark; \
	done

clean:
	rm -rf .venv .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
