# `make` sets up .venv, `make demo` shows an answer, `make report` what compression costs, `make test` runs what every change must pass.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
GPTQMODEL := .venv-gptqmodel
AUTOROUND := .venv-autoround

MINUTES ?= 10

.PHONY: all demo report test test-all fuzz lint format kernels gptqmodel autoround clean

all: $(READY)

# torch first and pinned: left to the resolver it may bring another build than the one we test with.
$(READY): pyproject.toml $(wildcard vlmdeploy/kernels/cpu/*.cpp vlmdeploy/kernels/cpu/*.h vlmdeploy/kernels/cpu/*.inl)
	$(PYTHON) -m venv .venv
	rm -f vlmdeploy/kernels/cpu/_operators.*  # a build that fails would leave the old one
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[cpu,toolchain,digits,report,rtx,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/digits/make_data.py --split calib --count 120 --out demo/calib --force
	$(BIN)/vlmdeploy export --ckpt examples/digits/checkpoint --target ort-int4 --calib demo/calib --out demo/bundle --force
	$(BIN)/python examples/digits/demo.py --bundle demo/bundle --out demo

# Six versions of the digits model, compared: demo/sweep/report/report.html. Stopped, it goes on where it was.
report: $(READY) demo/report-calib demo/report-test
	$(BIN)/vlmdeploy sweep --ckpt examples/digits/checkpoint --grid examples/digits/grid.toml --calib demo/report-calib \
	  --data demo/report-test --title "The digits model: six versions" --out demo/sweep

demo/report-%: | $(READY)
	$(BIN)/python examples/digits/make_data.py --split $* --count $(if $(filter calib,$*),150,300) --out $@ --force

# Test files side by side, one thread each; the slow ones measure memory and time out on busy machines, so alone.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test-all: test
	$(BIN)/python -m pytest -q -m slow

# Attacks on everything that reads what came from outside, and on every write; what is found is kept in fuzz/corpus.
fuzz: $(READY)
	$(BIN)/pip install --quiet -e ".[fuzz]" || echo "no Atheris for this machine: inputs are changed blindly"
	$(BIN)/python -m fuzz --minutes $(MINUTES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The compiled kernels of the package, anew from their Triton source: the same bytes, without a GPU, in two minutes.
kernels: $(READY)
	$(BIN)/python -m vlmdeploy.kernels.compile

# GPTQModel, to compare with and to rewrite its fixture. It asks for a newer torch, would bring a CUDA build and does
# not need it: so without its dependencies, and then only the packages that it imports. pip complains of the others.
gptqmodel: $(GPTQMODEL)/.ready

$(GPTQMODEL)/.ready:
	$(PYTHON) -m venv $(GPTQMODEL)
	$(GPTQMODEL)/bin/pip install --quiet torch==2.13.0
	$(GPTQMODEL)/bin/pip install --quiet --no-deps gptqmodel==7.7.0
	$(GPTQMODEL)/bin/pip install --quiet torch==2.13.0 accelerate==1.15.0 defuser==0.0.28 device-smi==0.5.7 \
	  logbar==0.4.15 packaging==26.3 pillow==13.0.0 pypcre==0.6.4 requests==2.34.2 threadpoolctl==3.8.0 \
	  tokenicer==0.0.14 transformers==5.24.0
	touch $@

# AutoRound, for the same purpose.
autoround: $(AUTOROUND)/.ready

$(AUTOROUND)/.ready:
	$(PYTHON) -m venv $(AUTOROUND)
	$(AUTOROUND)/bin/pip install --quiet torch==2.13.0
	$(AUTOROUND)/bin/pip install --quiet auto-round==0.16.1 transformers==5.24.0
	touch $@

clean:
	rm -rf .venv $(GPTQMODEL) $(AUTOROUND) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
