# What a person or a machine does with this repository. `make help` lists it.
# Not a build system: pip installs, pytest tests. Read next: CONTRIBUTING.md.

SHELL   := /bin/bash
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.overleap-installed
NATIVE  := CMakeLists.txt $(wildcard overleap/kernels/cpu/src/*)
CLIENTS := build/clients
TOKENS  ?= 131072
WORKERS ?= 2

# One thread per worker: with several, two workers on two cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-hours clients check format docs bench clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## create .venv and install the locked packages (repeats only when they change)

$(STAMP): requirements.lock pyproject.toml $(NATIVE)
	@[ -n "$(PYTHON)" ] || { echo "error: no python3 found" >&2; \
	  echo "hint: install Python 3.11 or newer, or run make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$("$(PYTHON)" --version) is too old, 3.11 is needed" >&2; \
	  echo "hint: run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV) >/dev/null || { \
	  echo "error: $(PYTHON) cannot create a virtual environment with pip in it" >&2; \
	  echo "hint: on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'from overleap.kernels import shortfall; print(shortfall() or "native kernels are built")'
	@touch $@

demo: $(STAMP) ## read a long document with the bundled model and answer questions (TOKENS=N)
	@$(BIN)/overleap demo --tokens $(TOKENS)

test: $(STAMP) ## run the test suite
	$(PYTEST)

# Exit code 5 says that no test carries the mark, which is not a failure.
test-slow: $(STAMP) ## run the tests that take minutes
	$(PYTEST) -m slow --timeout 3600 || [ $$? -eq 5 ]

test-hours: $(STAMP) ## run what Triton's interpreter takes hours for; no part of CI
	$(PYTEST) -m hours --timeout 36000

clients: $(STAMP) ## install other people's programs, which tests/clients hold the server against
	@test -x $(CLIENTS)/venv/bin/python || "$(PYTHON)" -m venv $(CLIENTS)/venv
	$(CLIENTS)/venv/bin/python -m pip install -q --disable-pip-version-check \
	  llm==0.36 llm-comply==0.5.0 'lm_eval[api]==0.4.13' transformers==5.24.0
	npm install --silent --no-audit --no-fund --prefix $(CLIENTS) openai@6.49.0 axe-core@4.14.1

check: $(STAMP) ## formatting, lint, types, and the rules of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -s tests/test_architecture.py tests/test_docs.py

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write docs/reference from the code
	$(BIN)/python docs/generate.py

bench: $(STAMP) ## measure speed and memory on this machine, and beside transformers
	@$(BIN)/overleap bench
	@$(BIN)/overleap bench bench-122m-release --backend auto --backend torch --versus transformers \
	  --depth 8192 --rounds 1

clean: ## remove caches and build output, keep .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find overleap tests -name __pycache__ -type d -prune -exec rm -rf {} +
