# The commands themselves stand in .ci/, which needs no make; .venv is one environment for everything.
export PYTHON ?= python3

DEMO ?= runs/demo
BENCH ?= runs/bench.md

.PHONY: help install demo check format test test-all test-gpu fuzz coverage mutants bench docs clean

help:
	@echo "make install   .venv with the package and its development tools"
	@echo "make demo      the whole idea at work in minutes; the report is $(DEMO)/report.html"
	@echo "make check     formatting, lint and types"
	@echo "make test      the tests (under 8 minutes on 2 cores)"
	@echo "make test-all  the slow ones too"
	@echo "make test-gpu  those that need a GPU"
	@echo "make fuzz      10,000 damaged files and more, for the night"
	@echo "make coverage  which lines and branches the tests run"
	@echo "make mutants   300 small mistakes, one at a time, and how many the tests notice (two hours at most)"
	@echo "make bench     what it costs beside what one would take instead; the tables are $(BENCH) (under 15 minutes)"
	@echo "make docs      the pages of docs/ brought up to date with the code, and as a site in build/site"
	@echo "make format    formatting and what lint can mend"

install:
	bash .ci/install

demo: install
	.venv/bin/mivpg demo --out $(DEMO)

check: install
	bash .ci/check

format: install
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test: install
	bash .ci/test

test-all: install
	bash .ci/test "not gpu"

test-gpu: install
	bash .ci/test gpu

fuzz: install
	MIVPG_FUZZ_CASES=10000 .venv/bin/python -m pytest -q tests/test_fuzz.py

coverage: install
	bash .ci/coverage

mutants: install
	bash .ci/mutants

bench: install
	mkdir -p $(dir $(BENCH))
	bash -o pipefail -c 'bash .ci/bench $(dir $(BENCH)) | tee $(BENCH)'

docs: install
	.venv/bin/python docs/refresh.py
	PYTHONPATH=docs .venv/bin/zensical build --clean

clean:
	rm -rf .venv build dist src/*.egg-info
