# make demo   sets up .venv and runs the main job: softmax against differential attention on real text, with verdicts
# make test   the same set-up, then the whole test suite
# make check  lint and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of PyTorch is enough for everything here. Where pip would fetch the CUDA build (several GB) and you do
# not want it, name PyTorch's index of CPU wheels: make demo TORCH_INDEX=<address from the PyTorch start page>
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TORCH_FLAGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: setup setup-dev demo test check clean

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "torchstone needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_FLAGS) "$(TORCH)"
	touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/torchstone compare recipes/tiny.yaml \
	  --arm diff-v1:model.block.mixer=differential \
	  --arm 'diff-v2:model.block.mixer={kind: differential, version: v2}' \
	  --seeds 3 --out runs/demo

test: setup-dev
	sh tests/browser/install-chromium.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info

.PHONY: results
results: setup
	$(BIN)/python docs/generate.py
