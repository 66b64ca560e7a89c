# Owns: the commands of daily work, each complete from a bare clone. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
# _build.py has the flags, and the extension knows its version.
SOURCES := $(shell find csrc) setup.py pyproject.toml rnnfast/_build.py rnnfast/_version.py
CPP = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cuh' '*.cpp' '*.cu')

.DEFAULT_GOAL := help
.PHONY: help demo examples test mutate build docs lint format nvcc-check bench gpu-check clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# The stamps say what was done last; they lie in .venv, and go with it.
.venv/deps: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements-dev.txt
	@touch $@

# The virtual environment's ninja must be the one that is found.
.venv/built: export PATH := $(CURDIR)/$(BIN):$(PATH)
.venv/built: .venv/deps $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
	@$(BIN)/python -c 'import rnnfast; print(rnnfast.show_config())'

build: .venv/built ## the virtual environment, with the package built in place

demo: .venv/built ## train a character model, a GRU, on text beside torch.nn
	$(BIN)/python examples/char_lm.py --demo

examples: .venv/built ## every application for under a minute each, on data that needs no download
	$(BIN)/python examples/char_lm.py --epochs 1 --hidden 64 --compare --out runs/examples/char_lm
	$(BIN)/python examples/news.py --epochs 1 --compare --out runs/examples/news
	$(BIN)/python examples/names.py --epochs 6 --compare --baseline --predict Kowalczyk Rossi --out runs/examples/names
	$(BIN)/python examples/forecast.py --horizon 3 --compare --out runs/examples/forecast
	$(BIN)/python examples/forecast.py --task classify --compare --out runs/examples/classify
	$(BIN)/python examples/own_cell.py

# Two processes, a core each; threads that wait give theirs to the other.
test: .venv/built ## all tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

mutate: .venv/built ## remove every barrier, wait and fence of the CUDA kernels in turn; the simulator must notice
	cd tests && ../$(BIN)/python -m cuda_sim.mutate

docs: .venv/built ## the reference of all functions and classes as pages, build/docs/index.html
	$(BIN)/sphinx-build -q -W -b html docs/api build/docs

lint: .venv/deps ## style of Python, C++ and CUDA; types of the package
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: .venv/deps ## put the style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

nvcc-check: .venv/deps ## compile the CUDA sources, which needs nvcc and no GPU
	$(BIN)/python -m pytest tests/test_nvcc.py -q

bench: .venv/built ## time the layers against torch.nn on the CPU
	$(BIN)/python benchmarks/run.py --device cpu

gpu-check: ## on a machine with a GPU, in the Python that has its torch: build for it, test, time, in 8 minutes
	$(PYTHON) benchmarks/gpu_check.py

clean: ## remove everything that was made
	rm -rf .venv build dist *.egg-info rnnfast/*.so rnnfast/not_built.txt .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks \
	  tests/cuda_sim/build
