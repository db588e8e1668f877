PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
# Workers for the tests; the doctests and the tests share one run. A file stays with a worker, which
# compiles its programs once, until another has nothing left to do.
JOBS ?= 2
SHARED = -n $(JOBS) --dist worksteal

.PHONY: help setup demo test test-fast test-all test-skyrl test-easydel test-lowest lint types bench bench-peers bench-device bench-chips test-chips notebooks notebook-pod docs readme build clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is written last: an interrupted set-up starts again.
$(VENV)/.complete: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "gpo_jax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). \
	Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv module \
	(Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	@touch $@

$(VENV)/.notebooks: $(VENV)/.complete
	$(BIN)/python -m pip install --quiet --editable ".[notebooks]"
	@touch $@

$(VENV)/.docs: $(VENV)/.complete
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

$(VENV)/.clients: $(VENV)/.complete
	$(BIN)/python -m pip install --quiet --editable ".[examples,notebooks,docs,tunix]"
	@touch $@

# Its own environment: SkyRL needs Python 3.12, and brings torch.
.venv-skyrl/.complete: pyproject.toml
	$(PYTHON312) -m venv --clear .venv-skyrl
	.venv-skyrl/bin/python -m pip install --quiet --upgrade "pip>=24"
	.venv-skyrl/bin/python -m pip install --quiet --editable ".[dev,skyrl]" flatbuffers
	@touch $@

# Its own environment: EasyDeL pins JAX and Flax, and needs pillow and torch without saying so.
.venv-easydel/.complete: pyproject.toml
	$(PYTHON) -m venv --clear .venv-easydel
	.venv-easydel/bin/python -m pip install --quiet --upgrade "pip>=24"
	.venv-easydel/bin/python -m pip install --quiet --editable ".[dev]" easydel pillow torch
	@touch $@

# The floors of the dependencies and of the demo's, read from pyproject.toml.
.venv-lowest/.complete: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade "pip>=24"
	.venv-lowest/bin/python -c 'import tomllib; \
	  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  floors = project["dependencies"] + project["optional-dependencies"]["demo"]; \
	  print("\n".join(floors).replace(">=", "=="))' > .venv-lowest/floors.txt
	.venv-lowest/bin/python -m pip install --quiet --editable ".[demo,dev]" \
	  --constraint .venv-lowest/floors.txt
	@touch $@

setup: $(VENV)/.complete  ## Make the virtual environment

demo: setup  ## A small policy learns to add, in about 3 minutes
	$(BIN)/python -m examples.demo $(ARGS)

test: setup  ## Run the tests, the doctests and the README
	$(BIN)/python -m pytest $(SHARED) -m "not slow" $(ARGS)

FAST := $(addprefix tests/unit/test_,$(addsuffix .py,traits layers types inputs slots levels surrogates metrics))
test-fast: setup  ## Run a quick part of them, for the inner loop: about a minute
	$(BIN)/python -m pytest $(SHARED) -m "not slow" -q $(FAST) $(ARGS)

test-all: $(VENV)/.clients  ## Run the slow tests too, with every client and compiler installed: an hour or more
	OPTIMIZE=1 $(BIN)/python -m pytest $(SHARED) $(ARGS)
	@if $(PYTHON312) -c '' 2>/dev/null; then $(MAKE) test-skyrl; \
	else echo "skipped: SkyRL needs Python 3.12; name one, make test-all PYTHON312=..."; fi
	$(MAKE) test-easydel
	$(MAKE) test-chips

test-easydel: .venv-easydel/.complete  ## Run the test that needs EasyDeL
	.venv-easydel/bin/python -m pytest $(ARGS) tests/integration/test_examples.py -k easydel

test-skyrl: .venv-skyrl/.complete  ## Run the tests that need SkyRL or torch, on Python 3.12
	.venv-skyrl/bin/python -m pytest $(ARGS) tests/integration/test_skyrl.py tests/integration/test_checkpoints.py

# Old versions of other packages deprecate each other's names.
test-lowest: .venv-lowest/.complete  ## Run the tests with the oldest supported versions
	.venv-lowest/bin/python -m pytest $(SHARED) -m "not slow" -W default::DeprecationWarning $(ARGS)

lint: setup  ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## Check the types
	$(BIN)/pyrefly check

bench: setup  ## Time and weigh losses beside plain JAX, half an hour; ARGS="--only A", "--quick"
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers:  ## Make the environment of other packages, which `make bench` then times too
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet chex google-tunix liger-kernel torch trl

bench-device: setup  ## Parity and times on this accelerator, beside torch and Liger if installed
	$(BIN)/python -m benchmarks.device $(ARGS)

# Its own environment: where TPUs' library is installed, JAX looks for TPUs. To compile for a GPU the
# plugin and its assembler are enough.
.venv-chips/.complete: pyproject.toml
	$(PYTHON) -m venv --clear .venv-chips
	.venv-chips/bin/python -m pip install --quiet --upgrade "pip>=24"
	.venv-chips/bin/python -m pip install --quiet --editable ".[dev,notebooks,tpu]" \
	  jax-cuda12-plugin nvidia-cuda-nvcc-cu12
	@touch $@

bench-chips: .venv-chips/.complete  ## Compile steps for TPUs and GPUs that are not here, and weigh them; half an hour
	.venv-chips/bin/python -m benchmarks.chips --out benchmarks $(ARGS)

test-chips: .venv-chips/.complete  ## Test what compilers make of steps for TPUs and GPUs, in about 10 minutes
	OPTIMIZE=1 JAX_PLATFORMS=cpu .venv-chips/bin/python -m pytest -p no:cacheprovider tests/chips $(ARGS)

notebooks: $(VENV)/.notebooks  ## Execute the notebooks in place
	$(BIN)/python -m nbconvert --execute --inplace --to notebook --ExecutePreprocessor.record_timing=False $(filter-out notebooks/06_pod.ipynb,$(wildcard notebooks/*.ipynb))

notebook-pod: .venv-chips/.complete  ## Execute the notebook that compiles for a pod, 15 minutes
	.venv-chips/bin/python -m nbconvert --execute --inplace --to notebook --ExecutePreprocessor.record_timing=False notebooks/06_pod.ipynb

docs: $(VENV)/.docs  ## Build the documentation, docs/_build/html/index.html; warnings are errors
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

readme: setup  ## Write what the pages list about the presets, from the code
	$(BIN)/python docs/tables.py $(ARGS)

build: setup  ## Build the wheel and the source distribution
	$(BIN)/python -m build --no-isolation

clean:  ## Remove what was built, the virtual environment included
	rm -rf $(VENV) .venv-skyrl .venv-easydel .venv-lowest .venv-peers .venv-chips dist build docs/_build docs/notebooks .pytest_cache .ruff_cache .hypothesis bench-output demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
