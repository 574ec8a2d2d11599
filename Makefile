# make test | check | test-all | demo | bench. Each creates .venv when it is missing and installs what it needs.
# Two files of tests run at a time: much of the suite waits for ranks to start. test-all has one, for its real hosts.
# TORCH_INDEX: an index that carries CPU builds of torch, where the default one only has CUDA builds.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
BIN := .venv/bin
export DS_ACCELERATOR ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: test test-all check demo bench clean

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-all: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed
	$(BIN)/python -m benchmarks --suite cpu $(ARGS)

# The whole way on two CPU cores, each command printed before it runs; fails when held-out digits are not learned.
demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/moetune demo runs/demo

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"moetune needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch>=2.13,<2.14"
	$(BIN)/pip install --quiet --editable ".[test,demo]"
	@# the judge of the image and video tests, in a folder of its own: beside a CPU torch it cannot be imported
	$(BIN)/pip install --quiet --no-deps --target .venv/oracle torchvision==0.28.0
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
