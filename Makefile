# Each target sets up what it needs, so that one command is enough on a fresh machine with Python 3.11 or later.
# PYTHON picks the interpreter (make test PYTHON=python3.12), VENV the place of the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^ *"\(torch>=[^"]*\)",/\1/p' pyproject.toml)

# Nothing from outside the environment, and one thread a process: two test runs on one machine must not fight.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1
test: export OMP_NUM_THREADS ?= 1

.PHONY: demo test check

demo: $(VENV)/installed
	$(BIN)/posttrain grpo --config recipes/nano/grpo.yaml --output runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# torch comes first, so that no other package can pull in another build of it.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; give it as: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -e '.[test]'
	touch $@
