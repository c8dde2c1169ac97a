# `make demo` and `make test` are all a newcomer needs; both are quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: compatibility demo test lint bench cluster exhaustive coverage factor-coverage rate-coverage ranges interrupts survive clean

demo: $(VENV)/.installed
	$(BIN)/flipproof demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4  # each takes 1.5 GB

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

factor-coverage: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.factor_coverage

# every verb on every network of docs/compatibility.md: an hour of one core
compatibility: $(VENV)/.installed-dev
	$(BIN)/python -m flipproof.reproduce.compatibility --out docs/compatibility.md

# how often the intervals of estimate_rates hold the truth: docs/results/rates
rate-coverage: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.rate_coverage

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

# how often intervals hold the truth, by simulation: docs/results/coverage
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.coverage

# workers, scheduler and driver that are killed, stopped, restarted and cut off, in network namespaces if they can be had
cluster: $(VENV)/.installed-dev
	CLUSTER=1 $(BIN)/pytest tests/engine/test_cluster.py

# every single bit of ResNet-20 on 100 images: a day on two cores; interrupt it and run it again. DATA=folder with CIFAR-10
# and the checkpoint
exhaustive: $(VENV)/.installed-dev
	$(BIN)/python -m flipproof.reproduce.exhaustive --data-root $(or $(DATA),data) --shards 1:1 --of 1 --workers 2 --by-hand 2000

# a thousand trials of every stateful model against fresh copies
survive: $(VENV)/.installed-dev
	TRIALS=1000 $(BIN)/pytest tests/campaigns/test_nothing_survives.py -k thousand

# Ctrl-C at every function entry of every call: hours on one core. `make interrupts EVERY=10` tries a tenth.
EVERY ?= 1
interrupts: $(VENV)/.installed-dev
	$(BIN)/python tests/interrupt_points.py $(EVERY)
ranges: $(VENV)/.installed-dev  # DATA=folder that holds MNIST/raw
	$(BIN)/python -m benchmarks.ranges --data-root $(or $(DATA),data)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flipproof needs Python 3.11 or newer; $$($(PYTHON) --version) is first on PATH. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
