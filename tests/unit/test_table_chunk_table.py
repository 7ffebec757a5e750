"""ChunkTable and TableReader: lookups, seals, hostile tables."""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
from array import array
from collections.abc import Callable

import pytest

from fastcas.errors import LocalProtocolError, TableFull, UsageError
from fastcas.table import BlobEntry, ChunkTable, TableReader, memfd

LENGTH_MAX = 16 << 20


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def blob_at(inode: int, path: bytes = b"hashed_files/ab/x.blob") -> dict[str, int]:
    return {"device": 1, "inode": inode, "size": 1 << 40, "mtime_ns": -5}


def writable_copy(fd: int) -> tuple[int, mmap.mmap]:
    size = os.fstat(fd).st_size
    copy = memfd.create("copy", size)
    os.pwrite(copy, os.pread(fd, size, 0), 0)
    memfd.seal(copy, writable_by_others=True)
    return copy, mmap.mmap(copy, size)


def test_types_of_one_key_are_apart() -> None:
    table = ChunkTable()
    reader = TableReader(table.fd)
    table.put_chunk(key(1), 3, 1 << 63, LENGTH_MAX)
    table.put_manifest(key(1), 4, 0, 0)
    table.put_file(key(1), key(1))
    for view in (table, reader):
        assert view.lookup_chunk(key(1)) == (3, 1 << 63, LENGTH_MAX)
        assert view.lookup_manifest(key(1)) == (4, 0, 0)
        assert view.lookup_file(key(1)) == (key(1), (4, 0, 0))
        assert view.lookup_chunk(key(2)) is None
        assert (view.n_live, view.n_tombstones, view.n_slots) == (3, 0, 1024)
    assert table.remove_manifest(key(1))
    assert not table.remove_manifest(key(1))
    assert reader.lookup_file(key(1)) is None
    assert reader.lookup_chunk(key(1)) == (3, 1 << 63, LENGTH_MAX)
    assert table.remove_chunk(key(1)) and table.remove_file(key(1))
    assert (reader.n_live, reader.n_tombstones) == (0, 3)
    table.close()
    reader.close()


def test_keys_that_share_everything_but_the_last_bit_are_apart() -> None:
    table = ChunkTable(4096)
    for n in range(2000):
        table.put_chunk(key(n), n, n, n)
    assert all(table.lookup_chunk(key(n)) == (n, n, n) for n in range(2000))
    assert table.lookup_chunk(key(2000)) is None
    table.close()


def test_replacing_takes_a_new_slot_and_the_same_place_takes_none() -> None:
    table = ChunkTable()
    table.put_chunk(key(1), 1, 1, 1)
    table.put_chunk(key(1), 1, 1, 1)
    assert (table.n_live, table.n_tombstones) == (1, 0)
    table.put_chunk(key(1), 2, 2, 2)
    assert (table.n_live, table.n_tombstones, table.lookup_chunk(key(1))) == (1, 1, (2, 2, 2))
    table.close()


def test_files_follow_their_manifest_when_it_moves() -> None:
    table = ChunkTable()
    table.put_manifest(key(1), 1, 0, 100)
    table.put_file(key(2), key(1))
    table.put_manifest(key(1), 9, 50, 100)
    assert table.lookup_file(key(2)) == (key(1), (9, 50, 100))
    table.remove_manifest(key(1))
    assert table.lookup_file(key(2)) is None
    table.put_manifest(key(1), 7, 0, 100)
    assert table.lookup_file(key(2)) == (key(1), (7, 0, 100))
    table.put_manifest(key(3), 8, 0, 100)
    table.put_file(key(2), key(3))
    assert table.lookup_file(key(2)) == (key(3), (8, 0, 100))
    with pytest.raises(UsageError, match="not in the chunk table"):
        table.put_file(key(2), key(4))
    copy = ChunkTable()
    copy.copy_from(table)
    assert copy.lookup_file(key(2)) == (key(3), (8, 0, 100))
    table.close()
    copy.close()


def test_table_is_full_at_seven_eighths_and_still_answers() -> None:
    table = ChunkTable(64)
    for n in range(56):
        table.put_chunk(key(n), n, n, n)
    with pytest.raises(TableFull):
        table.put_chunk(key(56), 1, 1, 1)
    with pytest.raises(TableFull):
        table.put_chunk(key(0), 1, 1, 1)
    table.remove_chunk(key(0))
    with pytest.raises(TableFull):
        table.put_chunk(key(56), 1, 1, 1)
    assert table.lookup_many(b"".join(key(n) for n in range(60))) == 55
    with pytest.raises(TableFull):
        table.put_chunks(key(1) + key(99), 5, array("Q", [1, 2]), array("I", [1, 2]))
    table.close()


def test_put_chunks_and_lookup_many_agree_with_single_calls() -> None:
    table = ChunkTable(8192)
    n = 3000
    keys = random.Random(1).randbytes(32 * n)
    table.put_chunks(keys, 7, array("Q", range(n)), array("I", range(n)))
    assert all(table.lookup_chunk(keys[32 * i : 32 * i + 32]) == (7, i, i) for i in range(n))
    assert table.lookup_many(keys) == n
    assert table.lookup_many(keys[: 32 * 17] + bytes(32 * 5)) == 17
    assert table.lookup_many(b"") == 0
    table.put_chunks(b"", 7, array("Q"), array("I"))
    for call in (
        lambda: table.lookup_many(bytes(31)),
        lambda: table.put_chunks(bytes(64), 1, array("Q", [1]), array("I", [1])),
        lambda: table.put_chunks(bytes(32), 1, array("Q", [1]), array("I", [1, 2])),
        lambda: table.put_chunk(bytes(31), 1, 1, 1),
        lambda: table.put_chunk(bytes(32), 1, 1, LENGTH_MAX + 1),
        lambda: table.lookup_chunk(bytes(33)),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(ValueError):
        table.put_chunks(bytes(32), 1, array("I", [1]), array("I", [1]))
    with pytest.raises(OverflowError):
        table.put_chunk(bytes(32), 1 << 32, 1, 1)
    table.close()


def test_blobs_are_registered_once_and_withdrawn_for_good() -> None:
    table = ChunkTable(64, 4, 100)
    reader = TableReader(table.fd)
    table.put_blob(0, b"/a/\xff", **blob_at(7))
    table.put_blob(3, b"b", **blob_at(8), linked=True, growing=True)
    assert reader.blob(0) == BlobEntry(0, b"/a/\xff", 1, 7, 1 << 40, -5, False, False)
    assert reader.blob(3) == BlobEntry(3, b"b", 1, 8, 1 << 40, -5, True, True)
    assert reader.blob(1) is None and reader.blob(4) is None and reader.blob(0xFFFFFFFF) is None
    assert table.blob_usage() == (4, 5)
    with pytest.raises(UsageError):
        table.put_blob(0, b"again", **blob_at(9))
    assert table.remove_blob(0) and not table.remove_blob(0) and not table.remove_blob(9)
    assert reader.blob(0) is None
    assert table.blob_was_used(0) and not table.blob_was_used(1)
    with pytest.raises(UsageError):
        table.put_blob(0, b"again", **blob_at(9))
    for path in (b"", b"a\0b", bytes(4097)):
        with pytest.raises(UsageError):
            table.put_blob(1, path, **blob_at(9))
    with pytest.raises(TableFull):
        table.put_blob(1, b"x" * 96, **blob_at(9))
    with pytest.raises(TableFull):
        table.put_blob(4, b"x", **blob_at(9))
    table.put_blob(1, b"x" * 95, **blob_at(9))
    assert reader.blob(3) is not None
    table.close()
    reader.close()


def test_copy_keeps_what_is_live_and_the_epoch() -> None:
    table = ChunkTable()
    table.put_blob(1, b"one", **blob_at(1))
    table.put_blob(2, b"two", **blob_at(2))
    table.put_blob(3, b"three", **blob_at(3))
    table.remove_blob(2)
    for n in range(100):
        table.put_chunk(key(n), 1, n, n)
    for n in range(50):
        table.remove_chunk(key(n))
    assert [table.advance(), table.advance(), table.epoch] == [1, 2, 2]
    copy = ChunkTable()
    copy.copy_from(table, without_blob=3)
    assert (copy.n_live, copy.n_tombstones, copy.epoch) == (50, 0, 2)
    assert [copy.lookup_chunk(key(n)) for n in range(100)] == [None] * 50 + [(1, n, n) for n in range(50, 100)]
    assert (copy.blob(1), copy.blob(2), copy.blob(3)) == (table.blob(1), None, None)
    copy.put_blob(2, b"new", **blob_at(9))
    copy.put_blob(3, b"new", **blob_at(9))
    small = ChunkTable(64, 2)
    with pytest.raises(TableFull):
        small.copy_from(table)
    with pytest.raises(UsageError):
        table.copy_from(table)
    for view in (table, copy, small):
        view.close()


def test_nobody_but_the_writer_can_change_a_table() -> None:
    table = ChunkTable()
    size = os.fstat(table.fd).st_size
    again = os.open(f"/proc/self/fd/{table.fd}", os.O_RDWR)
    for fd in (table.fd, again):
        for refused in (
            lambda fd=fd: os.ftruncate(fd, 0),
            lambda fd=fd: os.ftruncate(fd, size - 1),
            lambda fd=fd: os.ftruncate(fd, size + 1),
            lambda fd=fd: os.pwrite(fd, b"x", 0),
            lambda fd=fd: mmap.mmap(fd, size),
            lambda fd=fd: memfd.seal(fd, writable_by_others=True),
        ):
            with pytest.raises(PermissionError):
                refused()
    os.close(again)
    table.put_chunk(key(1), 1, 1, 1)
    assert table.lookup_chunk(key(1)) == (1, 1, 1)
    table.close()


def test_readers_outlive_the_writer_and_closed_views_refuse_use() -> None:
    table = ChunkTable()
    table.put_chunk(key(1), 1, 2, 3)
    reader = TableReader(table.fd)
    table.close()
    table.close()
    assert table.fd == -1
    assert reader.lookup_chunk(key(1)) == (1, 2, 3)
    reader.close()
    for call in (lambda: reader.lookup_chunk(key(1)), lambda: table.put_chunk(key(1), 1, 1, 1), lambda: table.n_live):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_a_batch_in_another_thread_keeps_the_table_open() -> None:
    table = ChunkTable(1 << 16)
    n = 40_000
    keys = random.Random(1).randbytes(32 * n)
    table.put_chunks(keys, 1, array("Q", bytes(8 * n)), array("I", bytes(4 * n)))
    many = keys * 25
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(table.lookup_many(many)))
    thread.start()
    refused = 0
    while thread.is_alive():
        try:
            table.put_chunk(key(1), 1, 1, 1)
        except UsageError:
            refused += 1
    thread.join()
    assert results == [25 * n]
    table.close()


@pytest.mark.parametrize("shape", [(63, 1, 0), (32, 1, 0), (1 << 33, 1, 0), (64, 0, 0), (64, 1, 1 << 41)])
def test_shapes_out_of_range_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        ChunkTable(*shape)
    with pytest.raises(UsageError, match="16 bytes"):
        ChunkTable(secret=b"short")


@pytest.mark.parametrize("n_slots", [64, 65, 97, 1000, 1025])
def test_any_number_of_slots_is_filled_and_found(n_slots: int) -> None:
    """Probes go on from the last slot to the first, whatever their number is."""
    for secret in range(20):
        table = ChunkTable(n_slots, secret=bytes([secret]) * 16)
        reader = TableReader(table.fd)
        held = 0
        with pytest.raises(TableFull):
            while True:
                table.put_chunk(key(held), 1, held, held)
                held += 1
        assert held == n_slots // 8 * 7
        assert [reader.lookup_chunk(key(n)) for n in range(held)] == [(1, n, n) for n in range(held)]
        assert [reader.lookup_chunk(key(held + n)) for n in range(held)] == [None] * held
        assert reader.lookup_many(b"".join(map(key, range(2 * held)))) == held
        for n in range(0, held, 2):
            assert table.remove_chunk(key(n))
        assert reader.lookup_many(b"".join(map(key, range(2 * held)))) == held // 2
        reader.close()
        table.close()


HEADER: list[tuple[int, str, list[int]]] = [
    (0, "<Q", [0]),
    (8, "<I", [0, 1, 3]),
    (12, "<I", [0, 47, 64]),
    (16, "<Q", [0, 1, 512, 2048, 1000, 1 << 32, (1 << 64) - 1]),
    (24, "<Q", [0, 4095, 1 << 40, (1 << 64) - 48]),
    (32, "<Q", [0, 255, 257, 1 << 28, (1 << 64) - 1]),
    (40, "<Q", [0, 1 << 40, (1 << 64) - 64]),
    (48, "<Q", [0, 1 << 40]),
    (56, "<Q", [0, 65537, 1 << 40, (1 << 64) - 1]),
    (80, "<Q", [0, 4096, 1 << 62]),
]


def test_a_damaged_header_is_refused() -> None:
    table = ChunkTable()
    copy, shared = writable_copy(table.fd)
    TableReader(copy).close()
    original = shared[:256]
    for offset, form, values in HEADER:
        for value in values:
            struct.pack_into(form, shared, offset, value)
            with pytest.raises(LocalProtocolError):
                TableReader(copy)
            shared[:256] = original
    shared.close()
    os.close(copy)
    table.close()


def test_what_could_still_shrink_is_refused() -> None:
    table = ChunkTable()
    size = os.fstat(table.fd).st_size
    unsealed = memfd.create("unsealed", size)
    os.pwrite(unsealed, os.pread(table.fd, size, 0), 0)
    with pytest.raises(LocalProtocolError):
        TableReader(unsealed)
    os.close(unsealed)
    with open("/proc/self/exe", "rb") as file, pytest.raises(OSError):
        TableReader(file.fileno())
    table.close()


def damage_anything(rng: random.Random, shared: mmap.mmap) -> None:
    shared[rng.randrange(96, len(shared))] = rng.randrange(256)


def damage_slots(rng: random.Random, shared: mmap.mmap) -> None:
    at = 4096 + 48 * rng.randrange(64)
    offset, size = rng.choice([(32, 8), (40, 4), (44, 4), (0, 32)])
    shared[at + offset : at + offset + size] = rng.randbytes(size)


def damage_blobs(rng: random.Random, shared: mmap.mmap) -> None:
    at = 4096 + 48 * 64 + 64 * rng.randrange(8)
    offset, size = rng.choice([(32, 8), (40, 4), (44, 4)])
    value = rng.choice([rng.randbytes(size), b"\xff" * size, (rng.randrange(400)).to_bytes(size, "little")])
    shared[at + offset : at + offset + size] = value


@pytest.mark.parametrize("damage", [damage_anything, damage_slots, damage_blobs])
def test_random_bytes_make_lookups_miss_but_never_crash(damage: Callable[[random.Random, mmap.mmap], None]) -> None:
    rng = random.Random(int(os.environ.get("FASTCAS_TEST_SEED", "4")))
    table = ChunkTable(64, 8, 256)
    for n in range(8):
        table.put_blob(n, b"path/%d" % n, **blob_at(n))
    for n in range(20):
        table.put_chunk(key(n), n % 8, n, n)
        table.put_manifest(key(n), n % 8, n, n)
    table.put_file(key(1), key(2))
    copy, shared = writable_copy(table.fd)
    reader = TableReader(copy)
    everything = b"".join(key(n) for n in range(30))
    for _ in range(4000):
        damage(rng, shared)
        assert 0 <= reader.lookup_many(everything) <= 30
        for place in (reader.lookup_chunk(key(rng.randrange(20))), reader.lookup_manifest(key(rng.randrange(20)))):
            assert place is None or place[2] <= LENGTH_MAX
        reader.lookup_file(key(1))
        blob = reader.blob(rng.randrange(8))
        assert blob is None or (1 <= len(blob.path) <= 256 and b"\0" not in blob.path)
    reader.close()
    shared.close()
    os.close(copy)
    table.close()
