"""Parity while storing: what it computes for every shape of the last stripe, the memory it takes, bad shapes."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import UsageError
from fastcas.limits import MIB
from fastcas.parity import ReedSolomon
from fastcas.store import Store, ingest
from tests.support.store_rig import KIB, data_of, sha

UNIT = 16 * KIB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def parity_of(data: bytes, unit: int, k: int, m: int) -> list[bytes]:
    """The definition, stripe by stripe: shards padded with zeros to the length of the stripe's first chunk."""
    out: list[bytes] = []
    for first in range(0, len(data), k * unit):
        stripe = data[first : first + k * unit]
        length = min(unit, len(stripe))
        shards = [stripe[i * unit : (i + 1) * unit].ljust(length, b"\0")[:length] for i in range(k)]
        out += ReedSolomon(k, m).encode(shards)
    return out


def sizes(k: int) -> list[int]:
    stripe = k * UNIT
    around = [UNIT, stripe, 2 * stripe, 5 * stripe]
    return sorted({0, 1, 2, *(at + by for at in around for by in (-1, 0, 1, UNIT)), 7 * stripe + UNIT + 3, 9 * MIB + 5})


@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 2), (10, 4)])
def test_parity_is_that_of_the_definition_for_every_last_stripe(store: Store, tmp_path: Path, k: int, m: int) -> None:
    for size in sizes(k):
        data = data_of(size, size)
        path = tmp_path / "f"
        path.write_bytes(data)
        stored = store.store_file(path, chunk_size=UNIT, parity=(k, m))
        manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
        assert manifest is not None
        expected = parity_of(data, UNIT, k, m)
        assert manifest.parity_hashes == b"".join(map(sha, expected)), size
        kept = {sha(chunk): chunk for chunk in expected}
        assert all(store.read_chunk(key) == chunk for key, chunk in kept.items())


def test_buffers_keep_the_bound_whatever_the_shape() -> None:
    shapes = [(0, 0), (1, 1), (1, 64), (4, 2), (10, 4), (16, 4), (191, 64), (254, 1)]
    for (k, m), log in itertools.product(shapes, range(14, 25)):
        unit = 1 << log
        for size in (1, unit, unit + 1, 3 * unit, max(k, 1) * unit + 1, 1000 * unit):
            layout = ingest.Layout.of(size, unit, k, m)
            total = layout.n_slots * (layout.data_size + layout.parity_size)
            assert total <= 3 * ((k + m) * unit if m else max(unit, 4 * MIB)), (k, m, unit, size)
            assert layout.n_steps * layout.step >= size
            assert layout.data_size >= min(size, layout.step)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "m", "unit"), [(10, 4, MIB), (4, 2, 2 * MIB), (10, 4, UNIT)])
def test_memory_while_storing_keeps_the_bound(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, m: int, unit: int
) -> None:
    made: list[int] = []

    class Counted(ingest._Slot):
        def __init__(self, layout: ingest.Layout) -> None:
            super().__init__(layout)
            made.append(len(self.view) + len(self.parity))

    monkeypatch.setattr(ingest, "_Slot", Counted)
    path = tmp_path / "f"
    path.write_bytes(data_of(48 * MIB + 77))
    bound = 3 * (k + m) * unit
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store.store_file(path, chunk_size=unit, parity=(k, m))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert len(made) == 3
    assert sum(made) <= bound
    n_chunks = -(-path.stat().st_size // unit) * (k + m) // k
    assert peak <= bound + MIB + 300 * n_chunks  # hashes, the manifest, places in the blob


@pytest.mark.parametrize(
    ("size", "chunk_size", "parity", "named"),
    [
        (1, None, (0, 1), "K >= 1"),
        (1, None, (4, 0), "M <= 64"),
        (1, None, (-1, 4), "K >= 1"),
        (1, None, (200, 60), "K\\+M <= 255"),
        (1, None, (4, 65), "M <= 64"),
        (1, 16 * MIB, (100, 10), "stripe"),
        (200_000 * UNIT, UNIT, (1, 64), "manifest"),
    ],
)
def test_bad_shape_is_refused_before_anything_is_read(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    chunk_size: int | None,
    parity: tuple[int, int],
    named: str,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a buffer was made")

    monkeypatch.setattr(ingest, "_Slot", never)
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(size)
    with pytest.raises(UsageError, match=named):
        store.store_file(path, chunk_size=chunk_size, parity=parity)
    assert store.files() == []
