"""Parity in a download: which parity chunks to ask for when data chunks are nowhere, and the rebuilding.

Parity chunks have hashes but no links: what they rebuild is checked like anything else before it counts.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter, deque
from collections.abc import Sequence

from fastcas.fetch._receiver import Job
from fastcas.fetch.scheduler import bits
from fastcas.ids import short
from fastcas.metadata import Manifest

__all__ = ["ParityPlan"]

SHOWN = 3  # stripes, and chunks of each, that a message names


class ParityPlan:
    """The stripes of one file. Chunk sets are integers, bit i = chunk i.

    Memory: for as long as it lives, one stripe's shards from the first rebuild on.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Start with nothing asked for and nothing here. The manifest has parity."""
        self.manifest = manifest
        self._asked = 0
        self._n_data: Counter[int] = Counter()  # chunks that are here, by stripe
        self._n_parity: Counter[int] = Counter()
        self._ready: deque[int] = deque()
        self._seen: set[int] = set()
        self._fd = -1
        self._shards: list[memoryview] = []

    def close(self) -> None:
        """Give the memory back. Not while `rebuild` runs. Idempotent."""
        self._shards = []
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def to_ask(self, unheld: int, held: int, here: int) -> list[int]:
        """Return parity chunks to fetch, as many per stripe as it lacks data chunks that nobody has.

        One that was asked for counts only while somebody still has it.

        Args:
            unheld: Data chunks that nobody has. held: Chunks that somebody has. here: Chunks that we have.
        """
        out = []
        for number in sorted({self.manifest.stripe_of(index) for index in bits(unheld)}):
            data, parity = self.manifest.stripe(number)
            lacking = sum(unheld >> i & 1 for i in data)
            ours = [i for i in parity if (here | self._asked & held) >> i & 1]
            more = [i for i in parity if held >> i & 1 and i not in ours]
            for index in more[: max(0, lacking - len(ours))]:
                self._asked |= 1 << index
                out.append(index)
        return out

    def stand_in(self, index: int, have: int, here: int) -> int | None:
        """Return a parity chunk to fetch in place of a data chunk that is late, None if there is none.

        Args:
            index: Chunk that is late. have: What the peer has that is to be asked. here: Chunks that we have.
        """
        if index >= self.manifest.n_chunks:
            return None
        _, parity = self.manifest.stripe(self.manifest.stripe_of(index))
        for i in parity:
            if have >> i & 1 and not (here | self._asked) >> i & 1:
                self._asked |= 1 << i
                return i
        return None

    def add(self, index: int) -> None:
        """Chunk `index` is here and right; each is said once. Cost: constant."""
        manifest = self.manifest
        number = manifest.stripe_of(index)
        (self._n_data if index < manifest.n_chunks else self._n_parity)[number] += 1
        if not self._n_parity[number] or number in self._seen:
            return
        n = len(manifest.stripe(number)[0])
        if self._n_data[number] < n <= self._n_data[number] + self._n_parity[number]:
            self._seen.add(number)
            self._ready.append(number)

    def next_ready(self) -> int | None:
        """Return a stripe that lacks data and has shards enough, None if there is none; each is named once."""
        while self._ready:
            number = self._ready.popleft()
            if self._n_data[number] < len(self.manifest.stripe(number)[0]):
                return number
        return None

    def rebuild(self, stripe: int, here: int, fd: int, parity_fd: int, job: Job) -> list[tuple[int, int]]:
        """Rebuild a stripe's missing data chunks, check them and write those that are right. Blocks.

        Args:
            here: Chunks that lie in the part file (`fd`) and the parity file.
        Returns:
            (chunk number, check bits) of each rebuilt chunk.
        Raises:
            OSError: The part file cannot be read or written.
        Cost: no buffer but the plan's own.
        """
        from fastcas.parity import ReedSolomon  # rarely needed: not loaded before

        manifest, size = self.manifest, self.manifest.chunk_size
        data, parity = manifest.stripe(stripe)
        length = manifest.length_of(data[0])
        slots = self._slots(length)
        shards: list[memoryview | None] = []
        for slot, index in zip(slots, data, strict=False):
            is_here = here >> index & 1
            shards.append(slot if is_here else None)
            if is_here:
                _read(fd, slot[: manifest.length_of(index)], index * size)
                slot[manifest.length_of(index) :] = bytes(length - manifest.length_of(index))
        for slot in slots[len(data) : manifest.k]:
            slot[:] = bytes(length)
            shards.append(slot)
        for slot, index in zip(slots[manifest.k :], parity, strict=True):
            is_here = here >> index & 1
            shards.append(slot if is_here else None)
            if is_here:
                _read(parity_fd, slot, (index - manifest.n_chunks) * size)
        ReedSolomon(manifest.k, manifest.m).reconstruct(shards, slots)
        return [
            (index, job.take(index, self._fd, at * size, True))
            for at, index in enumerate(data)
            if not here >> index & 1
        ]

    def _slots(self, length: int) -> list[memoryview]:
        """Return k + m buffers of `length` bytes in shared memory, a chunk apart, from which the job can read."""
        manifest = self.manifest
        if not self._shards:
            total = (manifest.k + manifest.m) * manifest.chunk_size
            self._fd = os.memfd_create("fastcas-rebuild", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, total)
            view = memoryview(mmap.mmap(self._fd, total))
            self._shards = [
                view[at : at + manifest.chunk_size] for at in range(0, total, manifest.chunk_size)
            ]
        return [shard[:length] for shard in self._shards]

    def explain(self, missing: int, held: int) -> str:
        """Say which stripes cannot be had: those with missing data whose chunks are too few, here and elsewhere.

        Args:
            missing: Data chunks that are not here. held: Chunks that are here or that somebody has.
        Returns:
            Text for the error that ends a download; empty when every stripe has enough.
        """
        parts = []
        for number in sorted({self.manifest.stripe_of(index) for index in bits(missing)}):
            data, parity = self.manifest.stripe(number)
            lost = [i for i in (*data, *parity) if not held >> i & 1]
            n_left = len(data) + len(parity) - len(lost)
            if n_left < len(data):
                parts.append(
                    f"stripe #{number} has {n_left} of the {len(data)} chunks it needs, nobody has {self._names(lost)}"
                )
        more = len(parts) - SHOWN
        return "; ".join(parts[:SHOWN]) + (f"; and {more} more stripes" if more > 0 else "")

    def _names(self, chunks: Sequence[int]) -> str:
        names = [f"#{i} ({short(self.manifest.hash_of(i))})" for i in chunks[: SHOWN + self.manifest.m]]
        return ", ".join(names) + (", …" if len(names) < len(chunks) else "")


def _read(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view`; what was checked there before cannot be shorter now."""
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise OSError(5, "the part file became shorter")
        done += n
