# make run [ARGS="..."]: one run, set up first where needed. make test: everything that must hold.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a user puts beside it is none of lint's business.
OURS := saexp experiments tests
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test format lint types layers pytest wheel clean

run: $(VENV)/.installed
	$(BIN)/python -m saexp $(ARGS)

test: lint types layers pytest

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

format: $(VENV)/.installed-dev
	$(BIN)/ruff format $(OURS)
	$(BIN)/ruff check --fix $(OURS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(OURS)
	$(BIN)/ruff check $(OURS)

types: $(VENV)/.installed-dev
	$(BIN)/pyright

layers: $(VENV)/.installed-dev
	$(BIN)/lint-imports

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache
