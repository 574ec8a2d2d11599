# make test | check | test-all | test-newest | test-oldest | lock | demo | bench | serve-proof | gpu-kit
# Each target creates its environment when it is missing and installs what constraints.txt locks.
# Two test files run at a time, because much of the suite waits for ranks to start.
# PYTHON: the interpreter of new environments. VENV: the environment's folder.
# SERVERS: the folder of the servers' environments.
# TORCH_INDEX: an index that carries CPU builds of torch, for machines whose default index only has CUDA builds.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV ?= .venv
SERVERS ?= .servers
BIN := $(VENV)/bin
UV := .venv-uv/bin/uv
PYTEST := -m pytest -n 2 --dist loadfile
QUICK := -m "not slow and not gpu"
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: test test-all test-newest test-oldest lock check demo bench serve-proof gpu-kit clean

test test-newest test-oldest bench demo serve-proof: export DS_ACCELERATOR ?= cpu
test-all: export DS_ACCELERATOR ?= $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
# One thread per process: two test processes and their ranks share the cores.
test test-all test-newest test-oldest: export OMP_NUM_THREADS ?= 1

test: $(VENV)/installed
	$(BIN)/python $(PYTEST) $(QUICK) $(ARGS)

test-all: $(VENV)/installed $(VENV)/oracle/triton
	$(BIN)/python $(PYTEST) $(ARGS)

# The newest and the oldest releases that pyproject.toml allows, each in an environment of its own; gigabytes to download.
# Name the newest and the oldest Python there is with PYTHON: releases of packages depend on it.
RESOLUTION_newest := highest
RESOLUTION_oldest := lowest-direct
test-newest test-oldest: test-%: $(UV)
	$(PYTHON) -m venv --clear .venv-$*
	$(UV) pip install --quiet --python .venv-$* --resolution $(RESOLUTION_$*) --editable ".[test,demo]"
	$(UV) pip install --quiet --python .venv-$* --resolution $(RESOLUTION_$*) --no-deps --target .venv-$*/oracle --group oracle
	.venv-$*/bin/python $(PYTEST) $(QUICK) --versions $(ARGS)

# torch is locked at the release of which there are CPU builds for CI; everything else is the newest that fits.
lock: $(UV)
	echo torch==2.13.0 | $(UV) pip compile --quiet --universal --upgrade --fork-strategy fewest --all-extras --group oracle \
	  --no-annotate --custom-compile-command "make lock" --output-file constraints.txt pyproject.toml -

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks --all $(ARGS)

# Servers and lmms-eval in environments of their own (a download of 3 GB; llama.cpp is compiled), started on what was
# trained, and compared: docs/serving.md.
serve-proof: $(VENV)/installed
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python -m benchmarks.serving --environments $(SERVERS) $(ARGS)
	$(BIN)/python -m benchmarks.pages

# What a CUDA machine without a network lacks; then, there: bash benchmarks/gpu/run.sh [minutes]
gpu-kit: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu.kit gpu-kit

# The whole way on two CPU cores, each command printed before it runs; fails when held-out digits are not learned.
demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/moetune demo runs/demo

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"moetune needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# an index of torch builds carries few other packages, so torch comes from it alone
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[test,demo]"
	@# the judges of tests in a folder of their own: torchvision cannot be imported beside a CPU torch, and Kubernetes'
	@# client would bring a dozen packages; the names are those of the group oracle in pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --target $(VENV)/oracle torchvision kubeflow-training kubernetes \
	  durationpy oauthlib python-dateutil requests-oauthlib six websocket-client bitsandbytes
	@touch $@

# Half a gigabyte, which only slow tests use.
$(VENV)/oracle/triton: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/oracle triton

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet uv

clean:
	rm -rf .venv .venv-* .servers gpu-kit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
