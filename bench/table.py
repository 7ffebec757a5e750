"""How many chunk lookups per second does one core do at 1 M chunks? Run: pytest bench/table.py

Batches of keys that are there (in random order) and that are not, against the design's target of 5 M lookups/s
on one core; beside them single lookups through Python, and filling the table.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastcas.table import TableOwner, TableReader

N = 1_000_000
TARGET_PER_S = 5e6


@pytest.fixture(scope="module")
def table() -> Iterator[tuple[TableReader, bytes]]:
    rng = random.Random(1)
    keys = rng.randbytes(32 * N)
    owner = TableOwner()
    owner.put_chunks(keys, 1, array("Q", range(N)), array("I", [1]) * N)
    reader = TableReader(owner.fd)
    order = list(range(N))
    rng.shuffle(order)
    yield reader, b"".join(keys[32 * i : 32 * i + 32] for i in order)
    reader.close()
    owner.close()


def report(capsys: pytest.CaptureFixture[str], benchmark: Any, what: str, n: int, *, target: bool = False) -> None:
    rate = n / benchmark.stats.stats.median
    ratio = f", {rate / TARGET_PER_S:.1f} x the target of {TARGET_PER_S / 1e6:.0f} M/s" if target else ""
    with capsys.disabled():
        print(f"\n{what}: {rate / 1e6:.1f} M/s{ratio}")


def test_lookup_many_present(
    table: tuple[TableReader, bytes], benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, keys = table
    assert benchmark.pedantic(reader.lookup_many, (keys,), rounds=7, warmup_rounds=1) == N
    report(capsys, benchmark, f"lookup_many, {N:,} chunks in {reader.n_slots:,} slots, all present", N, target=True)


def test_lookup_many_absent(
    table: tuple[TableReader, bytes], benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, _ = table
    others = random.Random(2).randbytes(32 * N)
    assert benchmark.pedantic(reader.lookup_many, (others,), rounds=7, warmup_rounds=1) == 0
    report(capsys, benchmark, f"lookup_many, {N:,} chunks in {reader.n_slots:,} slots, none present", N, target=True)


def test_lookup_chunk_from_python(
    table: tuple[TableReader, bytes], benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, keys = table
    n = 100_000
    some = [keys[32 * i : 32 * i + 32] for i in range(n)]

    def look(lookup: Callable[[bytes], object]) -> None:
        for key in some:
            lookup(key)

    benchmark.pedantic(look, (reader.lookup_chunk,), rounds=7, warmup_rounds=1)
    report(capsys, benchmark, "lookup_chunk, one call per key", n)


def test_put_chunks(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    keys = random.Random(3).randbytes(32 * N)
    offsets, lengths = array("Q", range(N)), array("I", [1]) * N

    def load() -> None:
        owner = TableOwner()
        owner.put_chunks(keys, 1, offsets, lengths)
        owner.close()

    benchmark.pedantic(load, rounds=3)
    report(capsys, benchmark, f"put_chunks, {N:,} into an empty table", N)
