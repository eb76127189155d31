# Everything below runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/ready

.PHONY: help repro test check torture

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

repro: $(READY) ## Run the pipeline: what has changed since the last time, and nothing else
	dvc repro

test: $(READY) ## Run all tests
	python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(READY) ## Lint, formatting and types
	ruff check .
	ruff format --check .
	mypy

torture: $(READY) ## Kill and resume the training at 55 random moments
	python -m tools.torture

$(READY): pyproject.toml constraints.txt .dvc/plots/make_page.py
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	python .dvc/plots/make_page.py
	touch $@
