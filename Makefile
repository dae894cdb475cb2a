# make setup     .venv with everything, segops built and installed editable; a matter of minutes the first time, nothing after
# make demo      what segops is, in five minutes: MODEL=name trains another model than pacnet, DATA=folder trains on images/{train,val}/ID.jpg and labels/{train,val}/ID.png
# make test      linters and the test suite, a process for each core: ARGS="tests/pac -k concat" runs a part of it
# make test-all  also what takes long: Triton's compilations for GPUs, every variant of the models, instruction sets that this CPU
#                is too new for (needs qemu-x86_64), `make sanitize`, and the suite on the newest PyTorch, which it installs
# make sanitize  the CUDA kernels, run by the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer
# make bench     the benchmark suite, results under benchmarks/results
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml MANIFEST.in constraints.txt $(shell find csrc -type f)

.PHONY: setup demo lint test test-all newest sanitize bench clean

setup: $(VENV)/installed

# Two steps: the build needs torch, and without isolation it finds the one that is installed. Then what may fail.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "setuptools>=77" wheel "pybind11>=2.13" ninja numpy torch torchvision
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt pydensecrf2 || echo "no pydensecrf2, which is built from source: what compares with it is left out"
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

test: lint
	$(BIN)/python -m tests $(ARGS)

# Each runs, whatever became of the one before.
test-all: lint
	status=0; \
	$(BIN)/python -m tests --all || status=1; \
	$(MAKE) sanitize || status=1; \
	$(MAKE) newest || status=1; \
	exit $$status

# The suite on the newest PyTorch, in a copy with an environment of its own.
newest:
	rm -rf build/newest && mkdir -p build/newest
	git ls-files --cached --others --exclude-standard > build/newest.files
	while read -r file; do if test -f "$$file"; then echo "$$file"; fi; done < build/newest.files | tar -cf - -T - | tar -xf - -C build/newest
	grep -v '^torch\(vision\)\{0,1\}==' constraints.txt > build/newest/constraints.txt
	$(MAKE) -C build/newest setup
	cd build/newest && $(BIN)/python -m tests

sanitize: setup
	$(BIN)/python -m tests.emulation $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf build dist *.egg-info segops/*.so $(VENV)/installed .pytest_cache .ruff_cache .hypothesis
