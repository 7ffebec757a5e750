"""What do 1,000,000 chunk hints cost that a node holds for others, and how fast are they taken in and looked up?

    python -m bench.dht_memory

Runs in a process of its own: RSS growth counts everything, allocator slack and dictionaries included. The hints come
as they would: 1,000 announcers, 130 random keys per datagram, in turn.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from bench.dht_rows import AT_MOST, line
from fastcas.dht.records import HintStore

N_HINTS = 1_000_000
N_ANNOUNCERS = 1_000
KEYS = 130
TARGET_MB = 40.0


def status(field: str) -> int:
    """Return a field of /proc/self/status, bytes."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(field + ":"):
            return int(text.split()[1]) * 1024
    raise SystemExit(f"bench: /proc/self/status has no {field}")


def main() -> None:
    """Fill a store and print."""
    rng = random.Random(1)
    store = HintStore(time.monotonic)
    store.put(b"0" * 20, "10.0.0.1", 1, 9000, rng.randbytes(8 * KEYS), 86_400)
    before = status("VmRSS")
    start = time.perf_counter()
    n = 0
    while store.n_hints < N_HINTS - KEYS:
        number = n % N_ANNOUNCERS
        ip = f"10.{number >> 8}.{number & 255}.7"
        store.put(number.to_bytes(20), ip, 8468, 9000, rng.randbytes(8 * KEYS), 86_400)
        n += 1
    filled_s = time.perf_counter() - start
    after, peak = status("VmRSS"), status("VmHWM")
    start = time.perf_counter()
    for _ in range(20_000):
        store.get(rng.getrandbits(64), 16)
    asked_s = time.perf_counter() - start
    grown = (after - before) / 1e6
    print(f"memory for {store.n_hints:,} hints of {store.n_providers:,} announcers (RSS growth of a fresh process)")
    most = (peak - before) / 1e6
    line("growth", grown, AT_MOST, TARGET_MB, unit="MB")
    print(f"  {grown * 1e6 / store.n_hints:.1f} B each; while filling at most {most:.1f} MB")
    per_datagram, per_key = filled_s / n * 1e6, asked_s / 20_000 * 1e6
    print(f"  taken in {per_datagram:.0f} us per datagram of {KEYS} keys, looked up {per_key:.1f} us per key")


if __name__ == "__main__":
    main()
