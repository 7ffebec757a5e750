"""What the store says becomes what the workers see: the agent's only writer of the chunk table.

A `StoreListener` that writes into the `TableOwner`, publishes each new table, keeps the entries of part files, and
answers for the store when space may be reclaimed. Blob numbers are the store's, those of part files, too. A lock
makes the writers one: the store's thread and the loop's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat as stat_module
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcas.errors import NodeUnavailable
from fastcas.table import Counters, TableOwner

__all__ = ["Publish", "Publisher"]

log = logging.getLogger(__name__)

Publish = Callable[[str, str, dict[str, Any] | None, list[int], dict[str, Any] | None], None]
"""publish(to, key, message, fds, forward); takes the fds over. In the loop's thread only."""

BARRIER_S = 35.0  # a response may take DRAIN_S; whoever takes longer keeps its bytes, and we keep the disk space
BARRIER_POLL_S = 0.01


class Publisher:
    """Owns the table. `on_…` methods are called in the store's thread, the others in either."""

    def __init__(self, loop: asyncio.AbstractEventLoop, publish: Publish, counters: Counters) -> None:
        self._loop = loop
        self._publish = publish
        self._counters = counters
        self._lock = threading.Lock()
        self._workers: frozenset[int] = frozenset()
        # The table numbers of one agent never repeat those of the one before it.
        self._base = (time.monotonic_ns() // 1_000_000) << 16
        self._holding = True
        self._table = TableOwner(self._on_new_table)
        self.on_keys_changed: Callable[[], None] = lambda: None

    # ---- StoreListener ----

    def on_load(self, n: int) -> None:
        """Make room for n entries."""
        with self._lock:
            self._table.reserve(n)

    def on_blob(
        self, number: int, path: bytes, device: int, inode: int, size: int, mtime_ns: int, linked: bool
    ) -> None:
        """Name a blob of the store to the workers."""
        with self._lock:
            self._table.put_blob(number, path, device=device, inode=inode, size=size, mtime_ns=mtime_ns, linked=linked)

    def on_chunks(self, blob: int, keys: bytes, offsets: array[int], lengths: array[int]) -> None:
        """Make chunks of a blob servable."""
        with self._lock:
            self._table.put_chunks(keys, blob, offsets, lengths)
        self._keys_changed()

    def on_manifest(self, manifest_hash: bytes, blob: int, offset: int, length: int) -> None:
        """Make a manifest servable."""
        with self._lock:
            self._table.put_manifest(manifest_hash, blob, offset, length)

    def on_file(self, file_hash: bytes, manifest_hash: bytes) -> None:
        """Make a complete file servable."""
        with self._lock:
            self._table.put_file(file_hash, manifest_hash)

    def on_chunks_removed(self, keys: bytes) -> None:
        """Take chunks away."""
        with self._lock:
            self._table.remove_chunks(keys)
        self._keys_changed()

    def on_blob_removed(self, number: int) -> None:
        """Take a blob away."""
        with self._lock:
            self._table.remove_blob(number)

    def on_manifest_removed(self, manifest_hash: bytes) -> None:
        """Take a manifest away."""
        with self._lock:
            self._table.remove_manifest(manifest_hash)

    def on_file_removed(self, file_hash: bytes) -> None:
        """Take a file away."""
        with self._lock:
            self._table.remove_file(file_hash)

    # ---- part files ----

    def begin_partial(self, number: int, path: Path) -> None:
        """Name a growing part file to the workers, under a number that the store gave it."""
        status = os.stat(path)
        with self._lock:
            self._table.put_blob(
                number, os.fsencode(path), device=status.st_dev, inode=status.st_ino, size=status.st_size,
                mtime_ns=status.st_mtime_ns, linked=True, growing=True,
            )  # fmt: skip

    def put_partial(self, number: int, key: bytes, offset: int, length: int) -> bool:
        """Make a verified chunk of a part file servable; False if the store serves that chunk already."""
        with self._lock:
            if self._table.lookup_chunk(key) is not None:
                return False
            self._table.put_chunk(key, number, offset, length)
            return True

    def end_partial(self, number: int, keys: list[bytes]) -> None:
        """Take a part file and those of its chunks away that still point to it."""
        with self._lock:
            for key in keys:
                place = self._table.lookup_chunk(key)
                if place is not None and place[0] == number:
                    self._table.remove_chunk(key)
            self._table.remove_blob(number)

    # ---- lookups ----

    def has_file(self, file_hash: bytes) -> bool:
        """Whether a whole file is served."""
        with self._lock:
            return self._table.lookup_file(file_hash) is not None

    def find_extent(self, key: bytes) -> tuple[str, int, int, int, int] | None:
        """Return (path, device, inode, offset, length) of a chunk, or None."""
        with self._lock:
            place = self._table.lookup_chunk(key)
            entry = self._table.blob(place[0]) if place is not None else None
        if place is None or entry is None:
            return None
        return os.fsdecode(entry.path), entry.device, entry.inode, place[1], place[2]

    # ---- publication ----

    def publish_loaded(self) -> None:
        """Hand the table to the workers: what was loaded is complete. Later growth is handed on as it happens."""
        with self._lock:
            # Epochs go on from where the workers are: one that is still busy with an earlier agent's table must
            # not count as having passed an epoch of this one.
            reached = max((self._counters.get(slot, "epoch_safe") for slot in self._workers), default=0)
            while self._table.epoch <= reached:
                self._table.advance()
            self._holding = False
            self._hand_on(self._table.fd, self._table.number)

    def _on_new_table(self, fd: int, number: int) -> None:
        if not self._holding:
            self._hand_on(fd, number)

    def _hand_on(self, fd: int, number: int) -> None:
        copy = os.dup(fd)
        message = {"op": "table", "number": self._base + number}
        self._loop.call_soon_threadsafe(self._publish, "workers", "table", message, [copy], None)

    def _keys_changed(self) -> None:
        self._loop.call_soon_threadsafe(self.on_keys_changed)

    # ---- reclaiming ----

    def set_workers(self, slots: frozenset[int]) -> None:
        """Say which workers live, by counter slot."""
        self._workers = slots

    def barrier(self) -> None:
        """Return when no worker can be sending anything that was taken away before the call. In the store's thread.

        Raises:
            NodeUnavailable: A worker did not get there within 35 s; nothing may be reclaimed.
        """
        with self._lock:
            epoch = self._table.advance()
            number = self._base + self._table.number
        deadline = time.monotonic() + BARRIER_S
        while True:
            late = [slot for slot in self._workers if not self._has_passed(slot, epoch, number)]
            if not late:
                return
            if time.monotonic() > deadline:
                raise NodeUnavailable(
                    f"gc: {len(late)} workers are still sending from before the removal after {BARRIER_S:.0f} s; "
                    "the space is kept, run gc again"
                )
            time.sleep(BARRIER_POLL_S)

    def _has_passed(self, slot: int, epoch: int, number: int) -> bool:
        # A table that was replaced meanwhile has a higher number and contains the removals, too.
        return self._counters.get(slot, "epoch_table") >= number and self._counters.get(slot, "epoch_safe") >= epoch

    def close(self) -> None:
        """Unmap the table; workers keep theirs."""
        with self._lock:
            self._table.close()


def is_same_file(fd: int, device: int, inode: int) -> bool:
    """Whether an open descriptor is the regular file of that identity."""
    status = os.fstat(fd)
    return stat_module.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) == (device, inode)
