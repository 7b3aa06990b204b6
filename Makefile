# Each target is what CI runs. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := all

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BUILT  := $(VENV)/.built
JOBS   ?= 2

# make run
PORT        ?= 8080
MASTER_PORT ?= 9333
DIR         ?= run/data

# make crash
KILL_ROUNDS   ?= 200
CRASH_SAMPLES ?= 5000

# make fuzz: seconds for each target; make fuzz-py: for each edge
FUZZ_S ?= 60

# make audit
PIP_AUDIT ?= 2.10.1

C_SOURCES  := $(wildcard csrc/*.c csrc/*.h)
PY_SOURCES := $(shell find pyvolume proto -name '*.py' -not -path 'pyvolume/pb/*' 2>/dev/null)

.PHONY: all help system-packages venv build run test test-py test-c crash compat lint fmt asan tsan fuzz fuzz-py audit bench docs man wheel sdist clean distclean

all: build lint test ## build, lint and test

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

system-packages: ## install the system packages that are missing, or say which
	@tools/dev/system-packages

$(STAMP): requirements.lock
	@$(MAKE) --no-print-directory system-packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pyvolume needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@touch $@

venv: $(STAMP) ## the virtual environment with what the lock file names

$(BUILT): $(STAMP) $(C_SOURCES) build_ffi.py setup.py pyproject.toml $(wildcard proto/*)
	$(BIN)/python proto/generate.py
	$(BIN)/python build_ffi.py
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

build: $(BUILT) ## compile the engine, generate the protocol modules, install in development mode

run: build ## development master and one server, a sample upload and read, then serve until Ctrl-C
	@exec $(BIN)/python tools/dev/run.py --port $(PORT) --master-port $(MASTER_PORT) --dir $(DIR)

test: build test-c lint test-py compat asan-quick ## everything CI runs

# A test that fails while others press on the machine is run once more alone, and named; what fails twice has failed.
TWICE = || { test $$? -eq 1 && echo "Failed among others, once more alone:" && \
    $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none; }

test-py: build ## the Python tests; those of HTTP with the fast lane and without
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q $(TWICE)
	export PYVOLUME_TEST_LANE=off; $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q tests/conformance -k http $(TWICE)

test-c: system-packages ## C unit tests and the committed fuzz corpora
	$(MAKE) -s -C csrc test

crash: build ## the long forms of the crash and race tests: KILL_ROUNDS kills, CRASH_SAMPLES power cuts for each workload
	PYVOLUME_KILL_ROUNDS=$(KILL_ROUNDS) PYVOLUME_CRASH_SAMPLES=$(CRASH_SAMPLES) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -o faulthandler_timeout=0 tests/crash tests/race

compat: build ## replay what a Go server answered, and open the volumes it made
	$(BIN)/python -m tools.compat --known-gaps tools/compat/known-gaps.txt

lint: build ## ruff with its security rules, mypy, import layers, clang-format, strict C warnings, hardening of the engine, known weaknesses
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.[ch] csrc/test/*.[ch] csrc/fuzz/*.[ch])
	$(MAKE) -s -C csrc check
	$(BIN)/python tools/dev/hardening.py pyvolume/_pv.*.so
	$(BIN)/python tools/dev/audit.py

audit: venv ## look dependencies up in the lists of known weaknesses (needs a network)
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
	    $(VENV)-audit/bin/python -m pip install -q --disable-pip-version-check pip-audit==$(PIP_AUDIT); }
	$(BIN)/python tools/dev/audit.py --command $(VENV)-audit/bin/pip-audit

fmt: venv ## format Python and C
	$(BIN)/ruff check --fix . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.[ch] csrc/test/*.[ch] csrc/fuzz/*.[ch])

asan: system-packages ## C tests under AddressSanitizer and UBSan
	$(MAKE) -s -C csrc asan

.PHONY: asan-quick
asan-quick: asan

tsan: system-packages ## C stress tests under ThreadSanitizer
	$(MAKE) -s -C csrc tsan

fuzz: system-packages ## libFuzzer targets, FUZZ_S seconds each (needs clang)
	$(MAKE) -s -C csrc fuzz FUZZ_S=$(FUZZ_S)

fuzz-py: build ## hostile input for the Python edges, FUZZ_S seconds for each
	PYVOLUME_FUZZ_S=$(FUZZ_S) $(BIN)/python -m pytest -q --timeout 0 -o faulthandler_timeout=0 -p no:logging tests/property/test_edges.py

bench: build ## benchmark tables; WEED_BIN and WEED_VOLUME_RUST add the references, measured in turns
	$(BIN)/python -m tools.bench

docs: build ## check that the documents name every flag and RPC
	$(BIN)/python -m pytest -q tests/unit/test_docs.py

man: build ## pyvolume.1 from the flag table
	@mkdir -p build
	$(BIN)/argparse-manpage --module pyvolume.cli --function manpage_parser --project-name pyvolume \
		--description "volume server for SeaweedFS clusters" --manual-title "pyvolume" --format single-commands-section \
		--include packaging/pyvolume.1.include --output build/pyvolume.1

wheel: build ## a wheel in dist/ with libisal in it, for every Python from 3.11 on
	@rm -rf build/wheel build/lib* build/temp*
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip -w dist build/wheel/*.whl

sdist: build ## a source distribution in dist/; building from it needs a C compiler and libisal-dev
	@mkdir -p dist
	$(BIN)/python -c 'import setuptools.build_meta as b; print(b.build_sdist("dist"))' | tail -1

clean: ## remove what was built
	rm -rf build dist pyvolume/pb pyvolume/_pv.* csrc/build *.egg-info $(BUILT)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV) $(VENV)-audit
