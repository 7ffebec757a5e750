# Every target sets up what it needs: a virtual environment in .venv, the compiled extensions, and for tests
# and benches the Debian tools that they drive (installed only where they are missing).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.built
SOURCES := $(shell find csrc fastcas -name '*.c' -o -name '*.h' -o -name '*.pyx' -o -name '*.pxd')
C_FILES := $(shell find csrc -name '*.c')
C_WARNINGS := -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror

.PHONY: demo test fuzz kill-workers heal bench bench-kernels lint build tools bench-tools clean parity-patterns
.PHONY: evil-peers kill-points store-kill-points power-cuts dht-hostile dht-real dht-attacks dht-churn bench-dht
.PHONY: bench-swarm swarm-sim bench-dedup bench-ingest

build: $(STAMP)

# The tree goes onto the path, without the import hook that would make each start slower than an installed package's.
$(STAMP): pyproject.toml setup.py $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		--config-settings editable_mode=compat
	touch $@

demo: build
	$(PY) -m bench.demo

tools:
	tests/support/install_tools.sh test

bench-tools: build
	tests/support/install_tools.sh bench
	$(PY) -m pip install --quiet --disable-pip-version-check libtorrent==2.1.1 zfec==1.6.0.0 pyeclib==1.8.0

# Tests that mind no neighbour run on all cores; those of processes, ports and memory each have the machine to themselves
SIDE_BY_SIDE := tests/unit tests/kernels tests/model tests/native tests/fuzz tests/faults/test_store_faults.py
test: build tools
	$(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(SIDE_BY_SIDE)
	$(PY) -m pytest -q $(addprefix --ignore=,$(SIDE_BY_SIDE))

# The hostile-traffic harnesses for FUZZ_S seconds each with new seeds, then libFuzzer for FUZZ_SECONDS per target.
FUZZ_S ?= 60
FUZZ_SECONDS ?= 3600
fuzz: build
	FASTCAS_FUZZ_S=$(FUZZ_S) FASTCAS_TEST_SEED=$$(date +%s) $(PY) -m pytest -q tests/native
	tests/support/install_tools.sh fuzz
	FUZZ_SECONDS=$(FUZZ_SECONDS) tests/fuzz/run.sh

# 500 worker kills and 20 reloads under 200 downloading connections
kill-workers: build
	FASTCAS_WORKER_KILLS=500 FASTCAS_KILL_CLIENTS=200 $(PY) -m pytest -q -s --timeout 1800 \
	    tests/faults/test_serve_kills.py -k "worker_kills or hup"

# A download killed at every call of every kind, in four states, and resumed: over a thousand kills
kill-points: build
	FASTCAS_KILL_POINTS=all $(PY) -m pytest -q -s --timeout 1800 tests/faults/test_fetch_kills.py

# Nine hostile peers of ten, in every way they have: time and memory against the good peer alone
evil-peers: build
	$(PY) -m bench.evil_peers

# Files that heal, end to end, with a 256 MiB file: offline and across three nodes
heal: build
	FASTCAS_HEAL_MIB=256 $(PY) -m pytest -q --timeout 900 tests/process/test_healing.py

# The store killed at each of some 2,000 system calls of ingest, removal, gc, eviction, migrate and rebuild; about ten
# minutes. In slices: KILL_ONLY=migrate-pwrite64 FASTCAS_KILL_RANGE="1 240"
KILL_ONLY ?= many_files
store-kill-points: build tools
	FASTCAS_KILL_POINTS=1 $(PY) -m pytest -q -s --timeout 1800 tests/faults/test_store_faults.py \
	    -k "many_files and $(KILL_ONLY)"

# 60 power cuts of an ext4 on a loop device under a writing store, 300 under plain files beside it; needs root
power-cuts: build
	FASTCAS_POWER_CUTS=60 $(PY) -m pytest -q -s --timeout 1800 tests/faults/test_store_power.py

# A DHT node against 100,000 spoofed requests and 1,000,000 mutated datagrams; prints the rates
dht-hostile: build
	FASTCAS_DHT_HOSTILE=1000000 $(PY) -m pytest -q -s tests/faults/test_dht_hostile.py

# 4 processes of 100 DHT nodes each on 127.x.y.z:8468, and a lossy network; prints times and dropped datagrams
dht-real: build
	FASTCAS_DHT_REAL=1 $(PY) -m pytest -q -s tests/process/test_dht_real.py

# Every pattern of losses of the codes in the test, on bytes; 100,000 of 32+8; and galois as a further oracle.
parity-patterns: build
	$(PY) -m pip install --quiet --disable-pip-version-check galois==0.4.11
	FASTCAS_PARITY_PATTERNS=all $(PY) -m pytest -q tests/kernels/test_parity_patterns.py

# 8, 20 and 40 nodes planted next to each of 20 keys of every kind among 500, and 10 % and 20 % that lie
dht-attacks: build
	FASTCAS_DHT_KEYS=20 $(PY) -m pytest -q -s --timeout 900 tests/unit/test_dht_attacks.py

# 24 virtual hours of 40 nodes that live for an hour each (median), about four minutes
dht-churn: build
	FASTCAS_CHURN_NODES=40 FASTCAS_CHURN_HOURS=24 $(PY) -m pytest -q -s --timeout 1800 tests/unit/test_dht_churn.py

bench: bench-tools
	$(PY) -m bench.fetch
	$(PY) -m bench.serve
	$(PY) -m bench.serve_more
	$(PY) -m bench.slow_clients
	$(PY) -m bench.kernels
	$(PY) -m bench.dht
	$(PY) -m pytest -q bench/table.py

# Bytes that a new version takes: fastcas, casync, rsync on two releases of a wheel from the package index
bench-dedup: bench-tools
	$(PY) -m bench.dedup

# Storing beside openssl and cp, a folder of small files, start-up with a million chunks; about three minutes
bench-ingest: bench-tools
	$(PY) -m bench.ingest

# Every target of discovery in one table, about four minutes; the long campaigns are dht-hostile, dht-churn, dht-attacks
bench-dht: build
	$(PY) -m bench.dht

# Swarms of real nodes in rate-limited network namespaces, beside libtorrent; root only, about five minutes
bench-swarm: bench-tools
	$(PY) -m bench.swarm

# Swarms of 10 to 10,000 leechers in virtual time, alike, with thin uplinks and with churn: 25 minutes of one core, 400 MiB
swarm-sim: build
	$(PY) -m tests.support.swarm_sim --chunks 256 10 30 100 300 1000
	$(PY) -m tests.support.swarm_sim --chunks 256 --kind alike 3000
	$(PY) -m tests.support.swarm_sim --chunks 128 --kind alike --kind churn 10000

bench-kernels: bench-tools
	$(PY) -m bench.kernels
	$(PY) -m pytest -q bench/micro_sha256.py bench/micro_gf256.py

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	@for file in $(C_FILES); do \
	    gcc -std=c11 -D_GNU_SOURCE -Icsrc -fsyntax-only $(C_WARNINGS) $$file || exit 1; \
	done; echo "C: $(words $(C_FILES)) files, no warnings"

clean:
	rm -rf build dist *.egg-info $(VENV)/.built
	find fastcas -name '*.so' -delete
