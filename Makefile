# Each target sets up what it needs, so that one command is enough on a fresh machine with Python 3.11 or later.
# PYTHON picks the interpreter (make test PYTHON=python3.12), VENV the place of the environment, VLLM that of the
# one that the tests' judges are served from (make test VLLM=/path/to/it takes one that is there).

PYTHON ?= python3
VENV ?= .venv
VLLM ?= .venv-vllm
BIN := $(VENV)/bin
# One worker more than there are cores, since tests often wait for a process of their own.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
# A file's tests stay together, since they share what they make first; files come in the order of tests/conftest.py.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TORCH := $(shell sed -n 's/^ *"\(torch>=[^"]*\)",/\1/p' pyproject.toml)

# Nothing from outside the environment, and one thread a process: two test runs on one machine must not fight.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1
test test-long test-vllm coverage chaos fuzz mutations: export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-long test-vllm browser check coverage chaos fuzz mutations gpu
.DELETE_ON_ERROR:

# A demo that was stopped carries on, and one that is finished says where its report is.
DEMO ?= runs/demo
PROCESSES ?= 2
demo: $(VENV)/installed
	@$(BIN)/posttrain demo --output $(DEMO) --processes $(PROCESSES)

# The real vLLM is among the tests where it has a build for the CPU.
PLATFORM := $(shell uname -sm)
ifeq ($(PLATFORM),Linux x86_64)
test test-vllm: export POSTTRAIN_VLLM = $(abspath $(VLLM))/bin/vllm
test: $(VENV)/installed $(VLLM)/bin/vllm browser
	$(PYTEST) -m "not vllm and not long"
	$(BIN)/python -m pytest -m vllm

test-vllm: $(VENV)/installed $(VLLM)/bin/vllm
	$(BIN)/python -m pytest -m vllm
else
test: $(VENV)/installed browser
	@echo "Left out: the tests with the real vLLM. They need Linux x86_64, and this is $(PLATFORM)."
	$(PYTEST) -m "not vllm and not long"

test-vllm:
	@echo "The tests with the real vLLM need Linux x86_64, and this is $(PLATFORM)."; exit 2
endif

# Runs of several processes, whole pipelines, compiled models, the commands of the docs. CI runs them after `test`.
test-long: $(VENV)/installed browser
	$(PYTEST) -m long

# The page of posttrain annotate and reports are tested in a Chromium, which root on Debian installs. Elsewhere one that
# is there is taken, and without one those tests are left out.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium; \
	else false; fi || echo "Left out: the tests in a browser. They need chromium on the path."

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.audit

# Branch coverage of the formulas, pool, checkpoints and the judges' client, by their own tests: 95 % of each.
coverage: $(VENV)/installed
	$(BIN)/python -m tests.cover

# Faults that the tests leave out: kills, full disks, damaged files, 2,000 malformed inputs (see tests/chaos).
chaos: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadscope tests/chaos

# Every command with the recipes of recipes/k2, on K2 at true size with random weights: some forty minutes on a GPU of
# 80 GB and 40 GB of memory for the model (POSTTRAIN_GPU_PARTS=/disk puts it elsewhere). Left out where there is no GPU.
gpu: $(VENV)/installed
	$(BIN)/python -m pytest -v -s tests/gpu
	$(BIN)/python -m tests.gpu.table runs/gpu.jsonl

# Files that people bring, damaged: POSTTRAIN_FUZZ of each kind. Each is read as what it is, or refused with one line.
fuzz: export POSTTRAIN_FUZZ ?= 1000
fuzz: $(VENV)/installed
	$(BIN)/python -m pytest -v tests/fuzz

# Mistakes planted into formulas, each of which the tests of their numbers must find.
mutations: $(VENV)/installed
	$(BIN)/python -m tests.chaos.mutations

# torch comes first, so that no other package can pull in another build of it.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; give it as: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

# One that was made here is made again when its script has changed; one that was named is taken as it is.
$(VLLM)/bin/vllm: $(if $(filter file,$(origin VLLM)),rewards/make_vllm_env.sh)
	PYTHON=$(PYTHON) rewards/make_vllm_env.sh cpu $(VLLM)
	touch $@
