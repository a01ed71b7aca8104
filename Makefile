# Three commands to know: `make chat` talks to the built-in model, `make serve` serves it with a page for the browser,
# `make test` checks everything. Each makes a virtual environment in .venv first (scripts/set_up.py says what it takes). A
# Python that already has a torch (a vendor's build for Ascend, DCU or ROCm, say) keeps it: the environment then sees the
# system's packages. TORCH=cpu, TORCH=default or TORCH=https://... says which torch is taken otherwise.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/* csrc/isa/*/*)
SET_UP := $(PYTHON) scripts/set_up.py --venv $(VENV)

.PHONY: chat serve test lint types tests csrc-check gpu-check gpu-sources npu-check agents browser wheel recipes-check demo bench benchmarks clean

chat: $(VENV)/.chat
	$(BIN)/qwenrt chat

serve: $(VENV)/.chat
	$(BIN)/qwenrt serve

test: lint types tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

# A process for each core, each file of tests in one of them. `make tests WORKERS=0` runs all in one.
WORKERS ?= auto
tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# The C++ tests with every instruction set: sanitizers, NEON under qemu, AVX-512 through SIMDe. Minutes; what this
# machine lacks is skipped and named.
csrc-check: $(VENV)/.dev
	$(BIN)/python -m pytest tests/csrc -m 'slow or not slow' -rs

# Without an NPU: torch_npu's real wheel (downloaded once, into build/) over a stand-in for CANN, for each processor.
# NPU_CHECK="--releases 2.9.0 2.10.0" tries other releases than that of the torch installed here (0.9 GB each);
# --optional is for machines whose index may have no such wheel.
NPU_CHECK ?=
npu-check: $(VENV)/.dev
	$(BIN)/python -m tests.npu.check build/npu-check $(NPU_CHECK)

# On a machine with an NVIDIA or AMD GPU: all that only it can show, the most important first, in nine minutes, with the torch
# and the Triton that are there. report.json in OUT is written again after each step; docs/devices.md is made of such reports.
OUT ?= gpu-check
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m qwenrt.conformance.gpu --out $(OUT) --budget 500

# The kernels for GPUs on a machine without one: interpreted beside their definitions, and compiled for NVIDIA's and AMD's.
# Fetches two versions of Triton (1.7 GB, in ~/.cache/qwenrt-triton or where QWENRT_TRITON_CACHE says), then some minutes.
gpu-sources: $(VENV)/.dev
	$(BIN)/python scripts/gpu_sources.py $(GPU_SOURCES)

# The server against Claude Code, Codex and Qwen Code from npm and against clients from PyPI that cannot live beside each
# other: an environment for each (1.5 GB, in ~/.cache/qwenrt-clients or where QWENRT_CLIENT_ENVS says; needs Node.js 20),
# then some minutes, with a scripted model and where the system allows it in a network without a way out.
agents: $(VENV)/.dev
	$(BIN)/python scripts/client_envs.py
	$(BIN)/python -m pytest tests/agents -m agents -rs

# The page of `qwenrt serve` in a headless Chromium of this machine (on the path, or where QWENRT_BROWSER says). Installs
# playwright (165 MB, no browser) and fetches axe-core, which judges accessibility, from npm; then some minutes.
browser: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e '.[dev,browser]'
	$(BIN)/python scripts/client_envs.py axe
	$(BIN)/python -m pytest tests/browser -m browser -rs

# Trains the built-in model again from its seed.
demo: $(VENV)/.dev
	$(BIN)/python scripts/build_demo.py

bench: $(VENV)/.chat
	$(BIN)/qwenrt bench --shape Qwen-1_8B --quantize int4

# qwenrt and its peers in turn on the same shapes (an hour), then docs/performance.md. llama.cpp is built from source.
benchmarks: $(VENV)/.bench
	$(BIN)/python -m benchmarks

# The wheel that may be given to others, in dist/: for every Linux from manylinux_2_27 on, where GNU's compiler makes it.
wheel: $(VENV)/.release
	$(BIN)/python scripts/build_wheel.py

# What deploy/ holds, judged by the linters of its formats.
recipes-check: $(VENV)/.release
	$(BIN)/python -m pytest tests/test_recipes.py -rs

$(VENV)/.chat: $(SOURCES)
	@$(SET_UP) --extras cli,server
	@touch $@

$(VENV)/.dev: $(SOURCES)
	@$(SET_UP) --extras dev
	@touch $@ $(VENV)/.chat

$(VENV)/.release: $(SOURCES)
	@$(SET_UP) --extras dev,release
	@touch $@ $(VENV)/.chat $(VENV)/.dev

$(VENV)/.bench: $(SOURCES)
	@$(SET_UP) --extras cli,server,bench
	@touch $@ $(VENV)/.chat

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
