# Each target installs what it needs; the second run skips that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread: on a busy machine two can be ten times slower.
ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Processes that run tests side by side.
JOBS ?= 2
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

# The reader in C (docs/c.md): needs a C++ compiler and nothing else.
CXX ?= c++
CODER := lightning_muws/artifact/src
READER := $(wildcard $(CODER)/reader/*.cpp) $(addprefix $(CODER)/,rans.cpp planes.cpp blocks.cpp bytes.cpp)
READER_HEADERS := $(wildcard $(CODER)/*.h $(CODER)/reader/*.h lightning_muws/runtime/native/src/*.h)
READER_FLAGS := -std=c++17 -O3 -fPIC -fvisibility=hidden -DMUWS_PUBLIC=

.PHONY: help lib demo test check docs attack memory bench bench-size bench-weighting bench-methods bench-drop bench-speed bench-compress bench-coder bench-large bench-trained bench-peers check-resume sweep clean

help:
	@echo "make demo    compress a network on Fashion-MNIST and print a summary (6 minutes)"
	@echo "make test    run the test suite"
	@echo "make check   ruff, mypy, sanitizers, the documentation, and the sdist and the wheel"
	@echo "make docs    build the documentation into site/"
	@echo "make lib     build the library for C, build/libmuws.so and build/muws.h; it needs a C++ compiler alone (1 minute)"
	@echo "make attack  damage files in 1,110,000 ways and sources in 8,000, and kill a writing process 200 times (30 minutes)"
	@echo "make memory  measure the memory that files of 384 MB take to write (2 minutes)"
	@echo "make bench   measure files, projection, kernels, a step, whole networks, OpenVINO and ONNX Runtime, and ADMM against one-shot (2 hours)"
	@echo "make bench-size  accuracy at 10, 20, 50 and 100 times smaller, against the dense network's lossy file (2 hours)"
	@echo "make bench-weighting  compare ways to weigh layers, and block shapes, on three trained networks (40 minutes)"
	@echo "make bench-methods  compare the training methods, for three seeds (2 hours)"
	@echo "make bench-drop  whether max_drop is kept, for three seeds and three drops (45 minutes)"
	@echo "make bench-speed  ask for speedups of 1.5, 2 and 3, and measure them (10 minutes)"
	@echo "make bench-compress  compression without training of two pretrained networks (an hour)"
	@echo "make bench-coder  MB a second that files are saved and loaded at, with and without the native coder, and by the reader in C; and its layers beside torch's (3 minutes)"
	@echo "make bench-large  pack and verify a checkpoint of a billion weights (3 minutes and 8 GB of disk)"
	@echo "make bench-trained  compress and fine-tune a denoiser and a sentence encoder (2 hours; it fetches their weights and photographs, 120 MB)"
	@echo "make bench-peers  accuracy per byte against quantisation, Deep Compression, NNC and eight pruning tools (6 hours; it can be interrupted)"
	@echo "make check-resume  kill and resume MiniLM in transformers.Trainer, and load its folder without Lightning (4 minutes)"
	@echo "make sweep   the trials behind the defaults of Phases (40 minutes)"

# torch comes first and pinned, so that nothing else installs another build of it.
# With a compiler, this also builds the native kernels; a change of their source builds them again.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard lightning_muws/*/src/*.cpp lightning_muws/*/src/*.h lightning_muws/runtime/native/src/*.cpp lightning_muws/runtime/native/src/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plots,dev,docs]"
	@touch $@

demo: $(READY)
	$(ENV) $(BIN)/python examples/01_fashion_mnist.py $(ARGS)

test: $(READY)
	$(ENV) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/python .ci/long_files.py
	$(MKDOCS) build --quiet --strict --site-dir $(VENV)/site
	$(ENV) .ci/package $(CURDIR)/$(BIN)/python
	tests/runtime/sanitize.sh $(CURDIR)/$(BIN)/python 250
	tests/artifact/sanitize.sh
	tests/artifact/fuzz_reader.sh

lib: build/libmuws.so build/muws.h

build/libmuws.so: $(READER:$(CODER)/%.cpp=build/objects/%.o)
	$(CXX) -shared $^ -o $@

build/objects/%.o: $(CODER)/%.cpp $(READER_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(READER_FLAGS) -c $< -o $@

build/bench_reader: examples/benchmarks/reader.c build/libmuws.so build/muws.h
	$(CC) -std=c99 -O2 $< -Ibuild -Lbuild -lmuws -Wl,-rpath,$(CURDIR)/build -o $@

build/bench_layers: examples/benchmarks/layers.c build/libmuws.so build/muws.h
	$(CC) -std=c99 -O3 -march=native -ffast-math $< -Ibuild -Lbuild -lmuws -Wl,-rpath,$(CURDIR)/build -o $@

build/muws.h: $(CODER)/reader/muws.h
	@mkdir -p build
	cp $< $@

docs: $(READY)
	$(MKDOCS) build --quiet --strict
	@echo "open site/index.html"

attack: $(READY)
	$(ENV) $(BIN)/python -m tests.support.fuzz_file 10000
	$(ENV) $(BIN)/python -m tests.support.fuzz_streams 100000
	$(ENV) $(BIN)/python -m tests.support.fuzz_sources 2000
	$(ENV) $(BIN)/python -m tests.support.kill_writer 200
	$(ENV) MUWS_ATTACK=1 $(BIN)/python -m pytest -q tests/artifact/test_native_reader.py -k thousand
	tests/runtime/sanitize.sh $(CURDIR)/$(BIN)/python 4000
	tests/artifact/fuzz_reader.sh 1000000

memory: $(READY)
	$(ENV) $(BIN)/python -m tests.support.peak_memory 384

bench: $(READY)
	$(BIN)/python -m pip install --quiet zstandard zipnn blosc2 || echo "zstandard, zipnn and blosc2 are missing: file sizes are not compared with theirs"
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/file.py
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/tensors.py
	$(ENV) $(BIN)/python examples/benchmarks/projection.py
	$(ENV) $(BIN)/python examples/benchmarks/kernels.py
	$(ENV) $(BIN)/python examples/benchmarks/cost.py
	$(ENV) $(BIN)/python examples/benchmarks/whole_networks.py
	$(ENV) $(BIN)/python examples/benchmarks/whole_networks.py --networks ResNet-18 --shares 0.75 0.9 --threads 2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt openvino nncf onnx onnxscript onnxruntime || echo "OpenVINO or ONNX Runtime cannot be installed: they are left out"
	$(ENV) $(BIN)/python examples/benchmarks/peers.py
	$(ENV) $(BIN)/python examples/benchmarks/peers.py --networks ResNet-18 --threads 2
	$(ENV) $(BIN)/python examples/benchmarks/export.py
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/methods.py --methods admm one_shot --targets 90/5 95/2.5 $(ARGS)

bench-size: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/budget.py $(ARGS)

bench-weighting: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/weighting.py $(ARGS)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/shapes.py $(ARGS)

bench-methods: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/methods.py $(ARGS)

bench-drop: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/drop.py $(ARGS)

bench-speed: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/speedup.py $(ARGS)

bench-compress: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/compress.py $(ARGS)

bench-coder: $(READY)
	@$(BIN)/python -m pip install --quiet zipnn || echo "zipnn is missing: speeds are not compared with its"
	@$(MAKE) --silent build/bench_reader build/bench_layers || echo "no C compiler: the library for C is not timed"
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/coder.py $(ARGS)
	@test ! -x build/bench_layers || $(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/layers.py

bench-large: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/large.py $(ARGS)

bench-trained: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/trained.py $(ARGS)

bench-peers: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/contest.py $(ARGS)

check-resume: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/resume.py

sweep: $(READY)
	$(ENV) PYTHONPATH=examples $(BIN)/python examples/benchmarks/sweep.py $(ARGS)

clean:
	rm -rf $(VENV) output site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
