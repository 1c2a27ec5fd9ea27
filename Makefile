# make setup | test | ranks | slow | isa | ptx | reliability | native-test | aot | demo | docs | bench | bench-check | lint : each
# works on a clean clone with Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup test ranks slow isa ptx reliability native-test aot demo docs bench bench-check lint clean

setup: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) \
		else f"Python 3.11 to 3.13 is needed, {v[0]}.{v[1]} found: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[triton,test,lint,docs]'
	@touch $@

# A thread a process: they share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: setup
	$(PYTEST) -m 'not slow and not ranks'

# What takes several processes, two of them at a time.
ranks: setup
	$(PYTEST) -m 'ranks and not slow'

# What is long, and what draws its examples, with ten times as many of them.
slow: setup
	$(PYTEST) -m 'slow or hypothesis' --hypothesis-profile thorough

# What multiplies, on every instruction set of this CPU in turn.
isa: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/instruction_sets.py -n auto --maxprocesses 8

# Kernels as compiled for every architecture, executed and spoilt: a sample of docs/proved.md's tables.
ptx: setup
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests $(BIN)/python -m ptx.campaign

# The table of docs/reliability.md, from the tests that keep its promises.
reliability: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability.py -n auto --maxprocesses 8

# Warnings are errors here and not in setup.py: no newer compiler is to stop an installation.
native-test:
	@if ! command -v cmake >/dev/null; then echo 'native-test: skipped, CMake was not found'; else \
	set -ex; \
	cmake -S . -B build/native-test -DCMAKE_BUILD_TYPE=Debug -DDERTA_SANITIZE=ON \
		-DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DCMAKE_CUDA_ARCHITECTURES=75; \
	cmake --build build/native-test --parallel; \
	ctest --test-dir build/native-test --output-on-failure; fi

aot: setup
	$(BIN)/derta bench resources

demo: setup
	$(BIN)/derta demo

# Warnings are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What a CPU can say in a few minutes; MACHINE names the folder of results.
MACHINE ?= $(shell uname -m)-$(shell nproc)-cores
bench: setup
	$(BIN)/python -m benchmarks.head_loss --machine $(MACHINE) --repetitions 3 --groups 'in short'
	$(BIN)/python -m benchmarks.attention --machine $(MACHINE) --repetitions 3 \
		--groups 'short branches' 'long branches'
	$(BIN)/python -m benchmarks.step --machine $(MACHINE) --repetitions 2 --groups 'in short'
	$(BIN)/python -m benchmarks.longest --machine $(MACHINE)

# Is one pass still as much faster than separate ones as it was? A third is noise on a busy machine.
bench-check: setup
	$(BIN)/python -m benchmarks.one_pass --machine check --out build/bench --repetitions 3 \
		--groups 'four branches'
	$(BIN)/python -m benchmarks.compare benchmarks/results/xeon-2-cores/one_pass.json \
		build/bench/one_pass.json --band 0.33

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
