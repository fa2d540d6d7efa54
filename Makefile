# Two commands for a fresh clone: `make demo` and `make test`. Needs Python >= 3.11, git and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test coverage lint bench clean

demo: $(VENV)/.installed
	$(BIN)/lightning-neuro demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report=term

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/communities.py
	$(BIN)/python benchmarks/observers.py
	$(BIN)/python benchmarks/topology.py
	$(BIN)/python benchmarks/paths.py
	for part in topology paths communities drift; do $(BIN)/python benchmarks/uses.py $$part; done
	$(BIN)/python benchmarks/refinement.py
	$(BIN)/python benchmarks/refinement_samples.py
	$(BIN)/python benchmarks/figures.py
	$(BIN)/python benchmarks/riding.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/artefacts.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/overhead.py --network resnet18

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lightning_neuro needs Python >= 3.11; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	@touch $@

# The dev extra holds everything the plain install does, so it satisfies `make demo` as well.
$(VENV)/.installed-dev: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
