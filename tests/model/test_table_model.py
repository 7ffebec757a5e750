"""The chunk table against a dict, the ring against a deque: random operations, then compare everything."""

from __future__ import annotations

from array import array
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastcas.errors import TableFull, UsageError
from fastcas.table import ChunkTable, GivenBoard, Ring, TableOwner, TableReader

KEYS = st.integers(0, 40).map(lambda n: bytes([n]) * 32)
PLACES = st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 16 << 20))
BLOBS = st.integers(0, 6)


class OwnerMachine(RuleBasedStateMachine):
    """TableOwner, and a reader that moves to each new table, both equal to dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = TableOwner(self.move)
        self.reader = TableReader(self.owner.fd)
        self.chunks: dict[bytes, tuple[int, int, int]] = {}
        self.manifests: dict[bytes, tuple[int, int, int]] = {}
        self.files: dict[bytes, bytes] = {}
        self.blobs: dict[int, bytes] = {}
        self.next_key = 1000

    def move(self, fd: int, number: int) -> None:
        self.reader.close()
        self.reader = TableReader(fd)

    @rule(key=KEYS, place=PLACES)
    def put_chunk(self, key: bytes, place: tuple[int, int, int]) -> None:
        self.owner.put_chunk(key, *place)
        self.chunks[key] = place

    @rule(n=st.integers(0, 600), blob=st.integers(0, 3))
    def put_many(self, n: int, blob: int) -> None:
        keys = [(self.next_key + i).to_bytes(32, "little") for i in range(n)]
        self.next_key += n
        self.owner.put_chunks(b"".join(keys), blob, array("Q", range(n)), array("I", range(n)))
        self.chunks.update((key, (blob, i, i)) for i, key in enumerate(keys))

    @rule(share=st.integers(1, 4))
    def remove_many(self, share: int) -> None:
        gone = list(self.chunks)[::share]
        assert self.owner.remove_chunks(b"".join(gone)) == len(gone)
        for key in gone:
            del self.chunks[key]

    @rule(key=KEYS)
    def remove_chunk(self, key: bytes) -> None:
        assert self.owner.remove_chunk(key) == (self.chunks.pop(key, None) is not None)

    @rule(key=KEYS, place=PLACES)
    def put_manifest(self, key: bytes, place: tuple[int, int, int]) -> None:
        self.owner.put_manifest(key, *place)
        self.manifests[key] = place

    @rule(key=KEYS)
    def remove_manifest(self, key: bytes) -> None:
        """Files of a manifest go with it, as the store removes them."""
        for file_hash in [f for f, m in self.files.items() if m == key]:
            assert self.owner.remove_file(file_hash)
            del self.files[file_hash]
        assert self.owner.remove_manifest(key) == (self.manifests.pop(key, None) is not None)

    @rule(file_hash=KEYS, manifest_hash=KEYS)
    def put_file(self, file_hash: bytes, manifest_hash: bytes) -> None:
        try:
            self.owner.put_file(file_hash, manifest_hash)
        except UsageError:
            assert manifest_hash not in self.manifests
        else:
            self.files[file_hash] = manifest_hash

    @rule(file_hash=KEYS)
    def remove_file(self, file_hash: bytes) -> None:
        assert self.owner.remove_file(file_hash) == (self.files.pop(file_hash, None) is not None)

    @rule(number=BLOBS | st.integers(0, 2000), path=st.binary(min_size=1, max_size=40))
    def put_blob(self, number: int, path: bytes) -> None:
        path = path.replace(b"\0", b"0")
        self.owner.put_blob(number, path, device=1, inode=number, size=2, mtime_ns=3)
        self.blobs[number] = path

    @rule(number=BLOBS)
    def remove_blob(self, number: int) -> None:
        assert self.owner.remove_blob(number) == (self.blobs.pop(number, None) is not None)

    @rule()
    def advance(self) -> None:
        before = self.owner.epoch
        assert self.owner.advance() == self.reader.epoch == before + 1

    @invariant()
    def all_is_there_and_nothing_else(self) -> None:
        assert self.reader.n_live == len(self.chunks) + len(self.manifests) + len(self.files)
        assert self.reader.n_tombstones * 4 <= self.reader.n_slots
        assert self.reader.lookup_many(b"".join(self.chunks)) == len(self.chunks)
        for n in range(41):
            key = bytes([n]) * 32
            assert self.reader.lookup_chunk(key) == self.chunks.get(key)
            assert self.reader.lookup_manifest(key) == self.manifests.get(key)
            manifest_hash = self.files.get(key)
            expected = None if manifest_hash is None else (manifest_hash, self.manifests[manifest_hash])
            assert self.reader.lookup_file(key) == expected
        for number in {*range(7), *self.blobs}:
            entry = self.reader.blob(number)
            assert (None if entry is None else entry.path) == self.blobs.get(number)

    def teardown(self) -> None:
        for key, place in self.chunks.items():
            assert self.owner.lookup_chunk(key) == place
        self.reader.close()
        self.owner.close()


class FixedTableMachine(RuleBasedStateMachine):
    """The smallest ChunkTable: full soon, never wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ChunkTable(64, 1, 1)
        self.reader = TableReader(self.table.fd)
        self.model: dict[bytes, tuple[int, int, int]] = {}
        self.tombstones = 0

    @rule(key=KEYS, place=PLACES)
    def put(self, key: bytes, place: tuple[int, int, int]) -> None:
        full = len(self.model) + self.tombstones >= 56 and self.model.get(key) != place
        try:
            self.table.put_chunk(key, *place)
        except TableFull:
            assert full
        else:
            assert not full
            self.tombstones += key in self.model and self.model[key] != place
            self.model[key] = place

    @rule(key=KEYS)
    def remove(self, key: bytes) -> None:
        there = self.model.pop(key, None) is not None
        assert self.table.remove_chunk(key) == there
        self.tombstones += there

    @invariant()
    def equal(self) -> None:
        assert (self.reader.n_live, self.reader.n_tombstones) == (len(self.model), self.tombstones)
        for n in range(41):
            assert self.reader.lookup_chunk(bytes([n]) * 32) == self.model.get(bytes([n]) * 32)

    def teardown(self) -> None:
        self.reader.close()
        self.table.close()


class RingMachine(RuleBasedStateMachine):
    """Ring against a deque, with both ends attached anew now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Ring.create(4096)
        self.producer = Ring.attach(self.made.memfd, self.made.eventfd)
        self.consumer = Ring.attach(self.made.memfd, self.made.eventfd)
        self.model: deque[bytes] = deque()

    def used(self) -> int:
        return sum(8 + (len(message) + 7) // 8 * 8 for message in self.model)

    @rule(length=st.integers(0, 2048) | st.integers(0, 40), fill=st.integers(0, 255))
    def push(self, length: int, fill: int) -> None:
        message = bytes([fill]) * length
        fits = self.used() + 8 + (length + 7) // 8 * 8 <= 4096
        assert self.producer.push(message) == fits
        if fits:
            self.model.append(message)

    @rule()
    def pop(self) -> None:
        assert self.consumer.pop() == (self.model.popleft() if self.model else None)

    @precondition(lambda self: self.used() < 4096)
    @rule()
    def drain(self) -> None:
        assert self.consumer.drain() == list(self.model)
        self.model.clear()

    @rule()
    def attach_anew(self) -> None:
        self.producer.close()
        self.consumer.close()
        self.producer = Ring.attach(self.made.memfd, self.made.eventfd)
        self.consumer = Ring.attach(self.made.memfd, self.made.eventfd)

    def teardown(self) -> None:
        for ring in (self.made, self.producer, self.consumer):
            ring.close()


class BoardMachine(RuleBasedStateMachine):
    """GivenBoard against sets."""

    SIZES = {b"a" * 32: 1, b"b" * 32: 64, b"c" * 32: 200}  # noqa: RUF012
    NAMES = st.sampled_from(sorted(SIZES))

    def __init__(self) -> None:
        super().__init__()
        self.board = GivenBoard.create(4, 64)
        self.given: dict[bytes, set[int]] = {name: set() for name in self.SIZES}

    @rule(name=NAMES, i=st.integers(0, 199))
    def claim(self, name: bytes, i: int) -> None:
        i %= self.SIZES[name]
        assert self.board.claim(name, self.SIZES[name], i) == (i not in self.given[name])
        self.given[name].add(i)

    @rule(name=NAMES, start=st.integers(0, 199), pick=st.integers(0, 2**64 - 1))
    def claim_from(self, name: bytes, start: int, pick: int) -> None:
        n = self.SIZES[name]
        start %= n
        left = [i for i in range(start, n) if i not in self.given[name]]
        chosen = self.board.claim_from(name, n, start, pick)
        assert chosen == (left[pick % len(left)] if left else None)
        if chosen is not None:
            self.given[name].add(chosen)

    @rule(name=NAMES, i=st.integers(0, 300))
    def clear(self, name: bytes, i: int) -> None:
        self.board.clear(name, i)
        self.given[name].discard(i)

    @invariant()
    def equal(self) -> None:
        for name, n in self.SIZES.items():
            assert {i for i in range(n) if self.board.is_given(name, i)} == self.given[name]

    def teardown(self) -> None:
        self.board.close()


_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestOwner = OwnerMachine.TestCase
TestOwner.settings = _SETTINGS
TestFixedTable = FixedTableMachine.TestCase
TestFixedTable.settings = settings(_SETTINGS, stateful_step_count=120)
TestRing = RingMachine.TestCase
TestRing.settings = settings(_SETTINGS, stateful_step_count=60)
TestBoard = BoardMachine.TestCase
TestBoard.settings = _SETTINGS
