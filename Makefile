# The commands of the README, each with its set-up. Python 3.10 or newer and the package registry are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: demo test slow lint types figures tensorboard clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(INSTALLED)  ## forget an art style of the embedded CLIP, into runs/demo
	$(BIN)/slug-lightning fit --config configs/demo.yaml

test: $(INSTALLED)  ## tests and doctests, with branch coverage, as many at once as there are cores (at most four)
	$(BIN)/python -m pytest --cov --cov-fail-under=90 --numprocesses auto --maxprocesses 4

slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## of the installed wheel: from the root a type checker would see half the package
	BIN=$(abspath $(BIN)) sh tests/check_types.sh

figures: $(INSTALLED)  ## the pictures of the README, from a run of the demo
	$(BIN)/python benchmarks/readme_figures.py

tensorboard: $(INSTALLED)
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
