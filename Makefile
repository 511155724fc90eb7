# Each target sets up what it needs, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread: two on a busy machine can be ten times slower.
ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test check attack bench sweep clean

help:
	@echo "make demo    compress a network on Fashion-MNIST and show what became of it (4 minutes)"
	@echo "make test    run the test suite"
	@echo "make check   ruff, mypy, and the native kernels under sanitizers"
	@echo "make attack  damage files in 10,000 ways, and kill the process that writes one 200 times (2 minutes)"
	@echo "make bench   measure files, projection, kernels, a step, whole networks, and ADMM against one-shot (80 minutes)"
	@echo "make sweep   the trials behind the defaults of Phases (40 minutes)"

# torch first and pinned, so that nothing else brings another build of it
# The native kernels are built by the way, where there is a compiler; a change of theirs builds them again.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard lightning_muws/runtime/native/src/*.cpp lightning_muws/runtime/native/src/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plots,dev]"
	@touch $@

demo: $(READY)
	$(ENV) $(BIN)/python examples/01_fashion_mnist.py $(ARGS)

test: $(READY)
	$(ENV) $(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	tests/runtime/sanitize.sh $(CURDIR)/$(BIN)/python

attack: $(READY)
	$(ENV) $(BIN)/python -m tests.support.fuzz_file 10000
	$(ENV) $(BIN)/python -m tests.support.kill_writer 200

bench: $(READY)
	$(BIN)/python -m pip install --quiet zstandard zipnn || echo "without zstandard and zipnn, which files are compared to"
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/file.py
	$(ENV) $(BIN)/python examples/benchmarks/projection.py
	$(ENV) $(BIN)/python examples/benchmarks/kernels.py
	$(ENV) $(BIN)/python examples/benchmarks/cost.py
	$(ENV) $(BIN)/python examples/benchmarks/whole_networks.py
	$(ENV) $(BIN)/python examples/benchmarks/whole_networks.py --networks ResNet-18 --shares 0.75 0.9 --threads 2
	$(ENV) $(BIN)/python examples/benchmarks/export.py
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/admm_or_one_shot.py $(ARGS)

sweep: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/sweep.py $(ARGS)

clean:
	rm -rf $(VENV) output .mypy_cache .ruff_cache .pytest_cache .hypothesis
