# All targets run in .venv, which is created when it is first needed.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/ready

.PHONY: help repro test check torture

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

repro: $(READY) ## Run the pipeline; stages that have not changed are skipped
	dvc repro

test: $(READY) ## Run all tests
	python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(READY) ## Check lint, formatting and types
	ruff check .
	ruff format --check .
	mypy

torture: $(READY) ## Kill training at 55 random moments and check that it resumes
	python -m tools.torture

$(READY): pyproject.toml constraints.txt .dvc/plots/make_page.py
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	python .dvc/plots/make_page.py
	touch $@
