"""The agent's chunk table: a writer that never gets full.

Owns the current `ChunkTable`. When the slots, the blob directory or the path heap run out, when tombstones take
more than a quarter of the slots, or when a blob number is used anew, it copies what is live into a new memfd and
hands that on; workers move over when they get it. Slots are never reused within one memfd, so readers need no
locks (architecture §3).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastcas.errors import UsageError
from fastcas.table._table import ChunkTable

if TYPE_CHECKING:
    from fastcas.table._table import Bytes, Place
    from fastcas.table.entries import BlobEntry

__all__ = ["TableOwner"]

SLOTS_MIN = 1024
BLOBS_MIN = 256
HEAP_MIN = 65536
BLOBS_MAX = 1 << 28
FULL, FULL_OF = 5, 6  # of the slots may be taken before a new table is made


def _slots_for(n_live: int, n_slots: int) -> int:
    """Return how many slots a table gets that must hold n_live entries, given how many it had.

    At most 3/4 full, so that a table that is rebuilt at its old size has room for a twelfth of its slots in changes
    before the next time; smaller only when it would be less than 3/8 full, so that it does not swing. 58 to 64 B per
    chunk while it grows, 128 B at worst.
    """
    need = max(SLOTS_MIN, -(-n_live * 4 // 3))
    return n_slots if need <= n_slots < 2 * need else need


class TableOwner:
    """A growing chunk table; the methods of `ChunkTable`, without TableFull.

    Safe to call from several threads: a lock makes the calls one after the other.
    """

    def __init__(
        self, on_new_table: Callable[[int, int], None] | None = None, *, n_chunks: int = 0, secret: bytes | None = None
    ) -> None:
        """Make the first, empty table (number 1).

        Args:
            on_new_table: Called with (fd, number) of every table after the first, in the thread of the call that
                made it necessary, before that call returns and with what it put already in it. The descriptor is
                borrowed: send or duplicate it before returning. Must not call back into the owner.
            n_chunks: Make room for so many entries at once.
            secret: 16 bytes that key the slot hash of all tables; random by default.
        """
        self._on_new_table = on_new_table
        self._secret = secret
        self._lock = threading.RLock()
        self._number = 1
        self._table = ChunkTable(_slots_for(n_chunks, SLOTS_MIN), BLOBS_MIN, HEAP_MIN, secret=secret)

    @property
    def fd(self) -> int:
        """Descriptor of the current table; the owner's, valid until the next table."""
        return self._table.fd

    @property
    def number(self) -> int:
        """How many memfds there have been: 1 for the first table."""
        return self._number

    @property
    def n_live(self) -> int:
        """Entries that can be found."""
        with self._lock:
            return self._table.n_live

    @property
    def n_tombstones(self) -> int:
        """Slots taken by removed entries."""
        with self._lock:
            return self._table.n_tombstones

    @property
    def n_slots(self) -> int:
        """Slots of the current table."""
        with self._lock:
            return self._table.n_slots

    @property
    def epoch(self) -> int:
        """The current epoch; it is carried from table to table."""
        with self._lock:
            return self._table.epoch

    def put_chunk(self, key: Bytes, blob: int, offset: int, length: int) -> None:
        """Insert a chunk, or replace its place."""
        with self._changing(1):
            self._table.put_chunk(key, blob, offset, length)

    def put_chunks(self, keys: Bytes, blob: int, offsets: array[int], lengths: array[int]) -> None:
        """Insert many chunks of one blob: uint8[n * 32], uint64[n] (`array("Q")`), uint32[n] (`array("I")`)."""
        with self._changing(len(offsets)):
            self._table.put_chunks(keys, blob, offsets, lengths)

    def put_manifest(self, key: Bytes, blob: int, offset: int, length: int) -> None:
        """Insert a manifest, or replace its place; files that lead to it follow."""
        with self._changing(1):
            self._table.put_manifest(key, blob, offset, length)

    def put_file(self, file_hash: Bytes, manifest_hash: Bytes) -> None:
        """Let a file lead to a manifest that is in the table (else UsageError)."""
        with self._changing(1):
            self._table.put_file(file_hash, manifest_hash)

    def remove_chunk(self, key: Bytes) -> bool:
        """Remove a chunk; False when it was not there."""
        with self._changing(0):
            return self._table.remove_chunk(key)

    def remove_chunks(self, keys: Bytes) -> int:
        """Remove the chunks in uint8[n * 32]; return how many were there."""
        view = memoryview(keys).cast("B")
        if len(view) % 32:
            raise UsageError(f"keys: expected a multiple of 32 bytes, got {len(view)}")
        with self._changing(0):
            return sum(self._table.remove_chunk(view[at : at + 32]) for at in range(0, len(view), 32))

    def remove_manifest(self, key: Bytes) -> bool:
        """Remove a manifest; files that lead to it are not found until it is put again."""
        with self._changing(0):
            return self._table.remove_manifest(key)

    def remove_file(self, key: Bytes) -> bool:
        """Remove a file; False when it was not there."""
        with self._changing(0):
            return self._table.remove_file(key)

    def put_blob(
        self,
        number: int,
        path: bytes,
        *,
        device: int,
        inode: int,
        size: int,
        mtime_ns: int,
        linked: bool = False,
        growing: bool = False,
    ) -> None:
        """Register a blob, or replace what is registered under its number.

        Raises:
            UsageError: Number not below 2^28, or path empty, with a NUL, or over 4096 bytes.
        Cost: a new table when the number was used before in this one.
        """
        if not 0 <= number < BLOBS_MAX or not 1 <= len(path) <= 4096 or b"\0" in path:
            raise UsageError(f"blob {number}: number or path ({len(path)} B) out of range, not registered")
        with self._changing(0):
            table = self._table
            there = table.blob(number)
            if there is not None and there == (number, path, device, inode, size, mtime_ns, linked, growing):
                return
            if number >= table.n_blobs or table.blob_was_used(number) or table.heap_used + len(path) > table.heap_size:
                self._rebuild(0, blobs=number + 1, heap=len(path), without_blob=number)
            self._table.put_blob(
                number, path, device=device, inode=inode, size=size, mtime_ns=mtime_ns, linked=linked, growing=growing
            )

    def remove_blob(self, number: int) -> bool:
        """Withdraw a blob; False when it was not there. Entries that name it stay until they are removed."""
        with self._lock:
            return self._table.remove_blob(number)

    def lookup_chunk(self, key: Bytes) -> Place | None:
        """Return where a chunk lies, or None."""
        with self._lock:
            return self._table.lookup_chunk(key)

    def lookup_manifest(self, key: Bytes) -> Place | None:
        """Return where a manifest lies, or None."""
        with self._lock:
            return self._table.lookup_manifest(key)

    def lookup_file(self, key: Bytes) -> tuple[bytes, Place] | None:
        """Return the hash and place of a file's manifest, or None."""
        with self._lock:
            return self._table.lookup_file(key)

    def blob(self, number: int) -> BlobEntry | None:
        """Return a blob's entry, or None."""
        with self._lock:
            return self._table.blob(number)

    def reserve(self, n: int) -> None:
        """Make room for n more entries at once, so that a bulk load makes one new table, not ten."""
        with self._changing(n):
            pass

    def advance(self) -> int:
        """Advance the epoch after removals and return it.

        What was removed before may be reclaimed on disk once every worker's `epoch_safe` counter has reached it
        and its `epoch_table` is `number`.
        """
        with self._lock:
            return self._table.advance()

    def close(self) -> None:
        """Unmap the current table. Idempotent; readers keep theirs."""
        with self._lock:
            self._table.close()

    @contextmanager
    def _changing(self, n_new: int) -> Iterator[None]:
        """Hold the lock; make room for n_new entries before, sweep tombstones after, hand a new table on."""
        with self._lock:
            before = self._number
            try:
                table = self._table
                if (table.n_live + table.n_tombstones + n_new) * FULL_OF > table.n_slots * FULL:
                    self._rebuild(n_new)
                yield
                if self._table.n_tombstones * 4 > self._table.n_slots:
                    self._rebuild(0)
            finally:
                if self._number != before and self._on_new_table is not None:
                    self._on_new_table(self._table.fd, self._number)

    def _rebuild(self, n: int, *, blobs: int = 0, heap: int = 0, without_blob: int | None = None) -> None:
        """Copy what is live into a new table with room for n more entries, blob number blobs - 1, heap more bytes."""
        old = self._table
        end, path_bytes = old.blob_usage()
        n_blobs = old.n_blobs
        while n_blobs < max(end, blobs):
            n_blobs *= 2
        heap_size = HEAP_MIN
        while heap_size < 2 * (path_bytes + heap):
            heap_size *= 2
        new = ChunkTable(_slots_for(old.n_live + n, old.n_slots), n_blobs, heap_size, secret=self._secret)
        try:
            new.copy_from(old, without_blob=without_blob)
        except BaseException:
            new.close()
            raise
        self._table = new
        old.close()
        self._number += 1
