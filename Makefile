PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles the modules that it imports; compiling all of them first doubles the time of an installation.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export HF_HUB_DISABLE_TELEMETRY := 1

# Shapes are checked where arrays cross function borders; not around every operation that the engine follows.
CHECKED := fisherscope.comparison,fisherscope.data,fisherscope.fisher.contributions,fisherscope.fisher.kernels,fisherscope.landscape,fisherscope.masks,fisherscope.objectives,fisherscope.plots,fisherscope.scores,fisherscope.stability

.PHONY: demo test test-all browser-check lint bench gpu-check fake-gpu-check clean

demo: $(VENV)/.core
	$(BIN)/fisherscope demo --out figures/demo --overwrite

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --nbmake -m "not slow and not gpu and not browser" --jaxtyping-packages=$(CHECKED),beartype.beartype

test-all: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --nbmake -m "not gpu and not browser" --jaxtyping-packages=$(CHECKED),beartype.beartype

# Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver); fails where there is none.
browser-check: $(VENV)/.dev
	$(BIN)/pytest -m browser tests/test_browser.py

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/fisher.py --out benchmarks/results
	$(BIN)/python benchmarks/landscape.py --out benchmarks/results

# On a machine with a GPU and its own torch, transformers and pytest; installs nothing.
gpu-check:
	PYTHONPATH=. python3 -m pytest -p no:cacheprovider -W default -m gpu tests/test_gpu.py tests/test_kernels.py
	PYTHONPATH=. python3 benchmarks/kernels.py --device cuda --out benchmarks/results
	PYTHONPATH=. python3 benchmarks/fisher.py --device cuda --precision bf16 --rounds 3 --cases BERT GPT-2 --out benchmarks/results
	PYTHONPATH=. python3 benchmarks/fisher.py --device cuda --precision tf32 --rounds 3 --cases BERT GPT-2 --out benchmarks/results

# The tests of gpu-check on a CUDA device in CPU memory: finds tensors left on another device, says nothing of speed.
# Needs g++ and a build of torch without CUDA, of the version in constraints.txt.
fake-gpu-check: $(VENV)/.dev
	PYTHONPATH=tests TRITON_INTERPRET=1 $(BIN)/pytest -p fake_cuda -p no:cacheprovider -m gpu tests/test_gpu.py tests/test_kernels.py

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fisherscope needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version`; name another with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/pip setup.cfg constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/pip setup.cfg constraints.txt
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
