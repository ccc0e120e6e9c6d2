# `make` sets up .venv, `make demo` shows an answer, `make test` runs what every change must pass.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: all demo test test-all lint format clean

all: $(READY)

# torch first and pinned: left to the resolver it may bring another build than the one we test with.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[cpu,toolchain,digits,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/vlmdeploy export --ckpt examples/digits/checkpoint --target ort-int4 --quant rtn --out demo/bundle --force
	$(BIN)/python examples/digits/demo.py --bundle demo/bundle --out demo

test: $(READY) lint
	$(BIN)/python -m pytest -q

test-all: $(READY) lint
	$(BIN)/python -m pytest -q -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
