# The commands of the README and of docs/, each with its set-up. Python 3.10 or newer and the package registry are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
# Printed at the end: the 25 slowest tests, and every skip with its reason.
PYTEST = python -m pytest --durations 25 -rs
# Each worker gets a stretch of neighbouring tests, so that what a module caches is made once. Load groups would say it better, but
# pytest-xdist 3.8 ignores them under pytest 9.2.
AT_ONCE = --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test newest lowest slow lint types figures tensorboard constraints clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
		--constraints constraints.txt --build-constraints constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)  ## forget an art style of the embedded CLIP, into runs/demo
	$(BIN)/slug-lightning fit --config configs/demo.yaml

test: $(INSTALLED)  ## tests and doctests with the known-good set, with branch coverage, as many at once as there are cores (at most four)
	$(BIN)/$(PYTEST) $(AT_ONCE) --cov --cov-fail-under=95

# The other two legs, each in an environment of its own, made anew: what the registry has now, and the floors of pyproject.toml.
newest: RESOLUTION = highest
lowest: RESOLUTION = lowest-direct
newest lowest:
	$(PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/python -m pip install --quiet uv
	.venv-$@/bin/uv pip install --quiet --python .venv-$@/bin/python --compile-bytecode --resolution $(RESOLUTION) --editable ".[dev]"
	.venv-$@/bin/uv pip list --quiet --python .venv-$@/bin/python
	.venv-$@/bin/$(PYTEST) $(AT_ONCE)

slow: $(INSTALLED)  ## the tests that take minutes, and the property tests with all their examples
	$(BIN)/$(PYTEST) -m "slow or hypothesis" --hypothesis-profile thorough

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## and which package uses which, of the installed wheel: from the root both checks would see half the package
	BIN=$(abspath $(BIN)) sh tests/check_wheel.sh

figures: $(INSTALLED)  ## the pictures of the README and of docs/clip.md, from a run of the demo
	$(BIN)/python benchmarks/readme_figures.py

tensorboard: $(INSTALLED)
	$(BIN)/tensorboard --logdir runs

constraints:  ## the known-good set anew: all that .[dev] brings in, for every Python and platform, less what constraints.in holds back
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv
	.venv-uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --strip-extras \
		--no-annotate --custom-compile-command "make constraints" --constraints constraints.in pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest .venv-uv build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis
