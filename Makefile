# Every target sets up what it needs: a virtual environment in .venv, the compiled extensions, and for tests
# and benches the Debian tools that they drive (installed only where they are missing).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.built
SOURCES := $(shell find csrc fastcas -name '*.c' -o -name '*.h' -o -name '*.pyx' -o -name '*.pxd')
C_FILES := $(shell find csrc -name '*.c')
C_WARNINGS := -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror

.PHONY: demo test fuzz bench bench-kernels lint build tools bench-tools clean

build: $(STAMP)

$(STAMP): pyproject.toml setup.py $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: build
	$(PY) -m bench.demo

tools:
	tests/support/install_tools.sh test

bench-tools: build
	tests/support/install_tools.sh bench
	$(PY) -m pip install --quiet --disable-pip-version-check libtorrent==2.1.1

test: build tools
	$(PY) -m pytest -q

# The hostile-traffic harnesses for FUZZ_S seconds each, with new seeds.
FUZZ_S ?= 60
fuzz: build
	FASTCAS_FUZZ_S=$(FUZZ_S) FASTCAS_TEST_SEED=$$(date +%s) $(PY) -m pytest -q tests/native

bench: bench-tools
	$(PY) -m bench.fetch
	$(PY) -m bench.serve
	$(PY) -m bench.kernels
	$(PY) -m pytest -q bench/table.py

bench-kernels: build
	$(PY) -m bench.kernels

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	@for file in $(C_FILES); do \
	    gcc -std=c11 -D_GNU_SOURCE -Icsrc -fsyntax-only $(C_WARNINGS) $$file || exit 1; \
	done; echo "C: $(words $(C_FILES)) files, no warnings"

clean:
	rm -rf build dist *.egg-info $(VENV)/.built
	find fastcas -name '*.so' -delete
