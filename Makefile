# Everything a newcomer needs. Only Python 3.11+ and make are required; the package index is the only network used.
#   make demo   install, materialize the demo region, compare with its known truth
#   make ui     the Dagster UI on http://127.0.0.1:3000 with the same store
#   make test   install and run the tests
#   make test-pgstac  the search through pgstac; wants PostgreSQL with PostGIS on this machine
#   make faults every fault of docs/faults.md, kill -9 a hundred times, and a table (about an hour)
#   make lint   style, types and the contract between rooms
#   make audit  known vulnerabilities of the dependencies, where PyPI's data can be reached
#   make docs   the site with tutorial and reference, in site/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DL4GAM_HOME ?= $(CURDIR)/dl4gam_home
REGION ?= demo
PORT ?= 3000

.PHONY: help install demo ui test test-pgstac faults audit lint docs clean

help:
	@sed -n '2,9p' Makefile | cut -c3-

$(VENV)/.made:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself: a CPU build where the index has one, so that nothing else pulls in a larger one.
$(VENV)/.installed: $(VENV)/.made setup.cfg pyproject.toml .ci/torch-requirement.txt
	$(BIN)/python -m pip install --quiet -r .ci/torch-requirement.txt
	$(BIN)/python -m pip install --quiet --constraint .ci/torch-requirement.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint .ci/torch-requirement.txt -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint .ci/torch-requirement.txt -e '.[lint]'
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/dl4gam demo

ui: $(VENV)/.installed
	$(BIN)/dl4gam ui --region $(REGION) --port $(PORT)

test: $(VENV)/.test
	$(BIN)/python -m pytest dl4gam_assets_tests

test-pgstac: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --constraint .ci/torch-requirement.txt -e '.[test-pgstac]'
	$(BIN)/python -m pytest -rs dl4gam_assets_tests/imagery/test_pgstac.py

faults: $(VENV)/.test
	$(BIN)/python -m dl4gam_assets_tests.faults

audit: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.7'
	$(BIN)/python .ci/audit

lint: $(VENV)/.lint $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff . > /dev/null || (echo "run: $(BIN)/ruff format ." && false)
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint .ci/torch-requirement.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file .ci/mkdocs.yml

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
