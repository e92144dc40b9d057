# Every target makes its own virtual environment: only Python >= 3.10 and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: test test-faults test-slow demo demo-image demo-dense study lint wheel clean

test: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not faults"

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m "faults"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

demo: $(VENV)/.demo
	$(BIN)/python -m tools.study.demo --output runs/demo

demo-image: $(VENV)/.demo
	$(BIN)/python -m tools.study.demo_image --output runs/demo-image

demo-dense: $(VENV)/.dense
	$(BIN)/python -m tools.study.demo_dense --output runs/demo-dense

study: $(VENV)/.demo
	$(BIN)/python -m tools.study --output runs/study

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) dist runs/demo runs/demo-image runs/demo-dense

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP_INSTALL) -e ".[demo]"
	touch $@

$(VENV)/.dense: $(VENV)/.demo
	$(PIP_INSTALL) -e ".[dense]"
	touch $@

$(VENV)/.dev: $(VENV)/.dense
	$(PIP_INSTALL) -e ".[dev,demo,dense,torchcodec,slurm]"
	touch $@
