# Everything from a fresh clone: `make demo`, `make test`. Needs python3 (3.10 or newer, with venv) and a C++17 compiler
# with OpenMP; the rest is installed into .venv. Variables you may want to set:
#   PYTHON=python3.12        which Python makes the environment
#   TORCH=torch==2.13.0      which torch; installed first and alone, from whichever index serves your machine
#   PYTEST_ARGS="-k vote"    passed to pytest
#   WORKERS=2                processes that share the tests
#   OLDEST_PYTHON=python3.10 which Python is the oldest, for `make test-oldest`
#   DEMO_ARGS="--help"       passed to `mvp-ext demo`
#   BENCH=runs/bench         where `make bench` puts its results
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
WORKERS ?= 2
DEMO_ARGS ?=
OLDEST_PYTHON ?= python3.10
OLDEST ?= .venv-oldest
BENCH ?= runs/bench

PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
PACKAGE := pyproject.toml setup.py CMakeLists.txt MANIFEST.in $(shell find mvp_ext csrc -type f \
	\( -name '*.py' -o -name '*.typed' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc' \) 2>/dev/null)
CPP := $(shell find csrc tests -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc' \) 2>/dev/null)

.PHONY: help install develop demo bench test test-oldest lint docs ptxas sanitize aarch64 format wheel info clean
help:
	@echo "make demo     install, then the main job on real images; leaves runs/demo/report.html"
	@echo "make test     install, then the test suite against the installed package"
	@echo "make bench    every kernel against torch's own ops for a short time each, then the promises kept and missed"
	@echo "make lint     ruff, clang-format, mypy, typos, who may import what"
	@echo "make docs     the documentation, as a site in build/site"
	@echo "make ptxas    compile the CUDA kernels with nvcc; no warning, no spill, no local memory"
	@echo "make sanitize the CPU kernels under AddressSanitizer and UBSan, every instruction set of this machine"
	@echo "make aarch64  compile the CPU kernels for aarch64 and, with qemu-user, run them (a cross compiler is needed)"
	@echo "make test-oldest   the fast tests with the oldest Python and libraries that pyproject.toml promises"
	@echo "make develop  an editable install in $(VENV) (rebuild the kernels by running it again)"
	@echo "make info     versions, build flags, devices;   make wheel, make format, make clean"

# torch first and alone: nothing that comes later may replace a CPU build by the registry's CUDA build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

# Beside the libraries: who does not build the documentation need not have its tools.
$(VENV)/.docs: $(VENV)/.dependencies
	$(BIN)/python scripts/requirements.py docs > $(VENV)/requirements-docs.txt
	$(PIP) -r $(VENV)/requirements-docs.txt
	@touch $@

# The libraries, once; then the package itself, again whenever a source changed (CMake rebuilds only what did).
$(VENV)/.dependencies: $(VENV)/.torch pyproject.toml
	$(BIN)/python scripts/requirements.py dev bench deploy hf remote ray > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	@touch $@

# build/lib is setuptools' copy of the modules: left alone, a module that was deleted here would still be installed.
$(VENV)/.installed: $(VENV)/.dependencies $(PACKAGE)
	rm -rf build/lib* *.egg-info
	$(PIP) --no-deps --force-reinstall .
	@touch $@

install: $(VENV)/.installed

develop: $(VENV)/.dependencies
	$(PIP) --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed

demo: install
	$(BIN)/mvp-ext demo $(DEMO_ARGS)

# Ten ops in ten minutes: what a case's few rounds say is rough, and the committed results took longer.
bench: install
	@mkdir -p $(BENCH)
	@for file in benchmarks/bench_*.py; do \
		op=$${file#benchmarks/bench_}; op=$${op%.py}; \
		$(BIN)/python $$file --seconds 0.05 --budget 50 --out $(BENCH)/$$op.json || exit 1; \
	done
	$(BIN)/python benchmarks/results.py $(BENCH)

# From inside $(VENV), so that `import mvp_ext` finds what was installed and not the source tree, also in the
# processes that tests start. Threads that wait for each other sleep: where they spin, processes that share the cores
# hold each other up, and tests of kernels take three times as long. A worker a core has one thread, where a test asks
# for no more.
test: install
	cd $(VENV) && OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 bin/pytest -c ../pyproject.toml --rootdir=.. ../tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# In an environment of its own. Neither the emulator nor the study: they ask nothing of a library that the rest does not.
$(OLDEST)/.dependencies: pyproject.toml scripts/requirements.py
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python scripts/requirements.py --oldest > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet -r $(OLDEST)/requirements.txt pytest pytest-xdist
	@touch $@

test-oldest: $(OLDEST)/.dependencies
	rm -rf build/lib* *.egg-info
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall .
	cd $(OLDEST) && bin/pytest -c $(CURDIR)/pyproject.toml --rootdir=$(CURDIR) $(CURDIR)/tests -n $(WORKERS) --dist loadfile \
		--ignore=$(CURDIR)/tests/benchmarks --ignore=$(CURDIR)/tests/test_packaging.py -k "not emulator" $(PYTEST_ARGS)

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/typos
	$(BIN)/python scripts/result_pages.py --check
	$(BIN)/python scripts/cli_page.py --check

# Needs no network once its tools are there.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

ptxas: $(VENV)/.dependencies
	$(BIN)/python scripts/check_ptxas.py

# In build/sanitized, with a module of its own.
sanitize: $(VENV)/.dependencies
	$(BIN)/python scripts/sanitize.py --jobs $(WORKERS)

aarch64: install
	cd $(VENV) && bin/python ../scripts/check_aarch64.py

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/.dependencies
	rm -rf build/lib* *.egg-info
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

info: install
	cd $(VENV) && bin/python -m mvp_ext

clean:
	rm -rf build dist *.egg-info mvp_ext/_C.*.so
