# make demo    set up and show the main job on the example model
# make test    set up, then lint, types and tests
# make bench   time and memory of conversion at real width, beside stock llama.cpp
# make wheel   a wheel in dist/, to install without a clone
# make bench-quality   measured mixes beside hand-made and stock ones, refined and plain, by KL divergence

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
BIN := $(VENV)/bin
TINY := examples/dots1-tiny

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench bench-quality wheel lint types clean

demo: $(VENV)/.installed
	@$(BIN)/python tools/demo.py $(TINY) $(BUILD)

test: lint types
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.bench_convert --work $(BUILD)/bench --sample 8

bench-quality: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.bench_quality examples/dots1-tiny examples/dots1-deep \
		--work $(BUILD)/quality --svg $(BUILD)/quality.svg

wheel: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(BUILD) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# llama-cpp-python is compiled here, with the RPC backend, and without AMX, whose kernels gcc 12 makes
# end with SIGILL. pip may hand back a wheel that was built with other flags or for another processor,
# so the build is asked what it can do, and made again if it must be.
NO_AMX = $(shell grep -qs amx_tile /proc/cpuinfo && echo -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
COMPILE = CFLAGS="$(CFLAGS) $(NO_AMX)" CXXFLAGS="$(CXXFLAGS) $(NO_AMX)" \
	CMAKE_ARGS="-DGGML_RPC=on -DLLAVA_BUILD=off" $(BIN)/pip install --quiet \
	--no-binary llama-cpp-python

$(VENV)/.installed: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing; llama.cpp is compiled the first time, which takes some minutes"
	$(COMPILE) --editable .
	$(BIN)/python tools/check_engine.py || \
		$(COMPILE) --force-reinstall --no-deps --no-cache-dir llama-cpp-python
	$(BIN)/python tools/check_engine.py
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-binary llama-cpp-python --editable '.[hub,serve,torch,dev]'
	touch $@
