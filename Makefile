# make quickstart   train, sample and export a small model on the embedded corpus
# make test         the test suite on the CPU           make test-gpu   the tests that need a GPU
# make test-slow    what takes minutes or fetches peers
# make check        format, lint, types, imports        make bench      throughput on this machine
# make fuzz         hostile files and settings, thousands of each kind, other ones every time
# make faults       300 real runs under the faults of a machine (ARGS="--rounds N --jobs J --out FILE")
#
# VENV=dir        another environment than .venv        PYTHON=path     the interpreter that makes it
# CUDA=cuda13|cuda12|cpu   instead of what the driver says
# ARGS="..."      more options for quickstart, bench, faults PYTEST_ARGS="..."   more options for pytest

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-gpu test-slow fuzz faults check bench

VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=

supported = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(supported)' 2>/dev/null && echo "$$p" && break; done)
endif

# "CUDA Version" in nvidia-smi's heading is the newest that the driver can run.
ifndef CUDA
driver := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1)
CUDA := $(if $(driver),$(shell [ $(driver) -ge 13 ] && echo cuda13 || { [ $(driver) -eq 12 ] && echo cuda12; } || echo cpu),cpu)
endif
gpu_extra := $(if $(filter cuda12 cuda13,$(CUDA)),$(CUDA))

comma := ,
install = "$(VENV)/bin/python" -m pip install --quiet -e ".$(if $(strip $(1)),[$(subst $() ,$(comma),$(strip $(1)))])"

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed-$(CUDA)
	"$(VENV)/bin/python" scripts/train.py --config configs/quickstart.py $(ARGS)

test: $(VENV)/.installed-$(CUDA)-test
	"$(VENV)/bin/python" -m pytest -n 2 --dist worksteal -m "not gpu and not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-$(CUDA)-test
	"$(VENV)/bin/python" -m pytest -n 2 --dist worksteal -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-$(CUDA)-test
	STELLARBYTE_TEST_GPU=1 "$(VENV)/bin/python" -m pytest -n 4 --dist worksteal -m gpu $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-$(CUDA)-test
	HYPOTHESIS_PROFILE=long "$(VENV)/bin/python" -m pytest tests/fuzz $(PYTEST_ARGS)

check: $(VENV)/.installed-$(CUDA)-test-dev
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/pyright" --pythonpath "$(VENV)/bin/python"
	"$(VENV)/bin/lint-imports"

bench: $(VENV)/.installed-$(CUDA)
	"$(VENV)/bin/python" scripts/benchmark.py $(ARGS)

faults: $(VENV)/.installed-$(CUDA)-test
	PYTHONPATH=tests "$(VENV)/bin/python" -m faults $(ARGS)

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c '$(supported)' || { echo "error: $(PYTHON) is not a Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

# The stamps name what is installed; a changed pyproject.toml installs again.
$(VENV)/.installed-$(CUDA): pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) for $(CUDA) ..."
	@$(call install,$(gpu_extra))
	@touch "$@"

$(VENV)/.installed-$(CUDA)-test: pyproject.toml | $(VENV)/bin/python
	@echo "installing the test extra into $(VENV) for $(CUDA) ..."
	@$(call install,$(gpu_extra) test)
	@touch "$(VENV)/.installed-$(CUDA)" "$@"

$(VENV)/.installed-$(CUDA)-test-dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing the test and dev extras into $(VENV) for $(CUDA) ..."
	@$(call install,$(gpu_extra) test dev)
	@touch "$(VENV)/.installed-$(CUDA)" "$(VENV)/.installed-$(CUDA)-test" "$@"
