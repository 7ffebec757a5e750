"""TableOwner: growth, rebuilds, and readers in another process that never miss."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterator

import pytest

from fastcas.errors import UsageError
from fastcas.table import TableOwner, TableReader, write_keys
from tests.support.table_child import child, receive

BLOB = {"device": 1, "inode": 2, "size": 3, "mtime_ns": 4}


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


class Follower:
    """What a worker does: moves to each new table when it is told of it."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.reader: TableReader | None = None

    def __call__(self, fd: int, number: int) -> None:
        self.close()
        self.numbers.append(number)
        self.reader = TableReader(fd)

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


@pytest.fixture
def follower() -> Iterator[Follower]:
    made = Follower()
    yield made
    made.close()


def test_owner_grows_past_any_number_and_tells_each_time(follower: Follower) -> None:
    owner = TableOwner(follower)
    assert owner.number == 1
    for n in range(5000):
        owner.put_chunk(key(n), n, n, n)
        if follower.reader is not None and n % 100 == 0:
            assert follower.reader.lookup_chunk(key(n)) == (n, n, n)
    assert len(follower.numbers) > 5 and follower.numbers == list(range(2, owner.number + 1))
    assert follower.reader is not None
    assert follower.reader.lookup_many(b"".join(map(key, range(5000)))) == 5000
    assert 5000 * 6 / 5 <= owner.n_slots <= 5000 * 4 / 3
    owner.close()
    owner.close()


def test_a_bulk_load_makes_one_new_table(follower: Follower) -> None:
    owner = TableOwner(follower)
    n = 20_000
    keys = random.Random(2).randbytes(32 * n)
    owner.put_chunks(keys, 1, array("Q", range(n)), array("I", [9] * n))
    assert follower.numbers == [2]
    owner.put_chunks(keys, 1, array("Q", range(n)), array("I", [9] * n))
    assert owner.n_live == n
    assert owner.remove_chunks(keys[: 32 * 1000]) == 1000
    assert owner.remove_chunks(keys[: 32 * 1000]) == 0
    assert owner.lookup_chunk(keys[32 * 1000 : 32 * 1001]) == (1, 1000, 9)
    owner.close()
    sized = TableOwner(n_chunks=n)
    sized.put_chunks(keys, 1, array("Q", range(n)), array("I", [9] * n))
    assert sized.number == 1
    sized.close()


def test_thousands_of_puts_and_removes_stay_small(follower: Follower) -> None:
    owner = TableOwner(follower)
    for n in range(20_000):
        owner.put_chunk(key(n), 1, n, 1)
        if n >= 300:
            assert owner.remove_chunk(key(n - 300))
        assert owner.n_tombstones <= owner.n_slots // 4
    assert owner.n_slots == 1024
    assert owner.n_live == 300
    assert all(owner.lookup_chunk(key(n)) == (1, n, 1) for n in range(19_700, 20_000))
    assert 60 < owner.number < 400
    owner.close()


def test_owner_shrinks_when_most_is_gone() -> None:
    owner = TableOwner()
    for n in range(10_000):
        owner.put_chunk(key(n), 1, n, 1)
    for n in range(9_900):
        owner.remove_chunk(key(n))
    assert owner.n_slots <= 2048
    assert all(owner.lookup_chunk(key(n)) == (1, n, 1) for n in range(9_900, 10_000))
    owner.close()


def test_blob_directory_and_path_heap_grow(follower: Follower) -> None:
    owner = TableOwner(follower)
    for number in range(1000):
        owner.put_blob(number, b"p%d/" % number + b"x" * 200, **BLOB)
    owner.put_blob(1_000_000, b"far away", **BLOB)
    assert follower.reader is not None
    for number in (0, 500, 999):
        entry = follower.reader.blob(number)
        assert entry is not None and entry.path == b"p%d/" % number + b"x" * 200
    assert owner.blob(1_000_000) is not None
    before = owner.number
    owner.put_blob(999, b"p999/" + b"x" * 200, **BLOB)
    assert owner.number == before, "the same again"
    owner.close()


def test_blob_numbers_can_be_used_anew(follower: Follower) -> None:
    owner = TableOwner(follower)
    owner.put_blob(5, b"part", **BLOB, growing=True)
    owner.put_chunk(key(1), 5, 0, 1)
    owner.put_blob(5, b"finished", **BLOB, linked=True)
    assert follower.numbers == [2]
    assert follower.reader is not None
    entry = follower.reader.blob(5)
    assert entry is not None and (entry.path, entry.linked, entry.growing) == (b"finished", True, False)
    assert follower.reader.lookup_chunk(key(1)) == (5, 0, 1)
    assert owner.remove_blob(5)
    owner.put_blob(5, b"another", **BLOB)
    assert owner.number == 3
    for bad in (lambda: owner.put_blob(1 << 28, b"x", **BLOB), lambda: owner.put_blob(1, b"", **BLOB)):
        with pytest.raises(UsageError):
            bad()
    owner.close()


def test_withdrawn_paths_do_not_fill_the_heap_for_good() -> None:
    owner = TableOwner()
    for number in range(3000):
        owner.put_blob(number % 200, b"%d/" % number + b"x" * 1000, **BLOB)
    sizes = os.fstat(owner.fd).st_size
    assert sizes < 4 << 20
    owner.close()


def test_files_and_manifests_survive_growth_and_moves() -> None:
    owner = TableOwner()
    owner.put_manifest(key(1), 1, 0, 10)
    owner.put_file(key(2), key(1))
    owner.put_manifest(key(1), 2, 5, 10)
    for n in range(100, 3000):
        owner.put_chunk(key(n), 1, n, n)
    assert owner.number > 1
    assert owner.lookup_file(key(2)) == (key(1), (2, 5, 10))
    assert owner.lookup_manifest(key(1)) == (2, 5, 10)
    assert owner.remove_file(key(2)) and owner.remove_manifest(key(1))
    assert owner.lookup_file(key(2)) is None
    owner.close()


def test_epoch_goes_on_from_table_to_table() -> None:
    owner = TableOwner()
    assert owner.advance() == 1
    owner.reserve(10_000)
    assert (owner.number, owner.epoch, owner.advance()) == (2, 1, 2)
    owner.close()


def test_a_refused_put_still_hands_a_new_table_on(follower: Follower) -> None:
    owner = TableOwner(follower)
    for n in range(owner.n_slots * 5 // 6):
        owner.put_chunk(key(n), 1, n, n)
    assert owner.number == 1
    with pytest.raises(UsageError):
        owner.put_chunk(key(1000), 1, 1, 1 << 30)
    assert follower.numbers == [2] and owner.number == 2
    owner.close()


@pytest.mark.slow
def test_readers_in_another_process_never_miss_while_the_table_grows() -> None:
    def chunk(n: int) -> tuple[bytes, int, int, int]:
        k = random.Random(n).randbytes(32)
        return k, k[0], int.from_bytes(k[1:5], "little"), 1 + k[5]

    with child("look") as (channel, _):
        owner = TableOwner(lambda fd, number: channel.send({"op": "table", "number": number}, [fd]))
        first = [chunk(n) for n in range(500)]
        for entry in first:
            owner.put_chunk(*entry)
        channel.send({"op": "table", "number": 1}, [owner.fd])
        keys_fd = write_keys(entry[0] for entry in first)
        channel.send({"op": "keys"}, [keys_fd])
        os.close(keys_fd)
        assert receive(channel)[0] == {"op": "looking"}
        for n in range(500, 30_000):
            owner.put_chunk(*chunk(n))
            if n % 3 == 0:
                owner.remove_chunk(chunk(n)[0])
            channel.flush()
        channel.send({"op": "stop"})
        while channel.wants_write:
            channel.flush()
        message, _ = receive(channel)
        assert message["misses"] == 0
        assert message["tables"] == owner.number > 5
        assert isinstance(message["rounds"], int) and message["rounds"] > 0
        owner.close()
