# One virtual environment for everything; .venv/stamp is newer than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install check format test test-all clean

help:
	@echo "make install   .venv with the package and its development tools"
	@echo "make check     formatting, lint and types"
	@echo "make test      the tests (under 8 minutes on 2 cores)"
	@echo "make test-all  the slow ones too"

install: $(VENV)/stamp

$(VENV)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

check: $(VENV)/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" --durations 15

test-all: $(VENV)/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu" --durations 15

clean:
	rm -rf $(VENV) build dist src/*.egg-info
