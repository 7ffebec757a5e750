"""Parity in a download: which parity chunks to ask for when data chunks are nowhere, and the rebuilding.

Parity chunks have hashes but no links: what they rebuild is checked like anything else before it counts.
"""

from __future__ import annotations

import os

from fastcas.fetch._receiver import Job
from fastcas.fetch.scheduler import bits
from fastcas.metadata import Manifest

__all__ = ["ParityPlan"]


class ParityPlan:
    """The stripes of one file. Chunk sets are integers, bit i = chunk i."""

    def __init__(self, manifest: Manifest) -> None:
        """Start with nothing asked for. The manifest has parity."""
        self.manifest = manifest
        self._asked = 0
        self._started: set[int] = set()

    def to_ask(self, unheld: int, held: int, here: int) -> list[int]:
        """Return parity chunks to fetch, as many per stripe as it lacks data chunks that nobody has.

        Args:
            unheld: Data chunks that nobody has. held: Chunks that somebody has. here: Chunks that we have.
        """
        out = []
        for number in sorted({self.manifest.stripe_of(index) for index in bits(unheld)}):
            data, parity = self.manifest.stripe(number)
            lacking = sum(unheld >> i & 1 for i in data)
            ours = [i for i in parity if (here | self._asked) >> i & 1]
            more = [i for i in parity if held >> i & 1 and i not in ours]
            for index in more[: max(0, lacking - len(ours))]:
                self._asked |= 1 << index
                out.append(index)
        return out

    def ready(self, here: int) -> int | None:
        """Return a stripe that lacks data and has shards enough to be rebuilt, or None."""
        touched = sorted({self.manifest.stripe_of(index) for index in bits(self._asked & here)})
        for number in touched:
            if number in self._started:
                continue
            data, parity = self.manifest.stripe(number)
            n_data = sum(here >> i & 1 for i in data)
            if n_data < len(data) and n_data + sum(here >> i & 1 for i in parity) >= len(data):
                return number
        return None

    def started(self, stripe: int) -> None:
        """A rebuild of this stripe is under way: `ready` does not name it again."""
        self._started.add(stripe)

    def rebuild(self, stripe: int, here: int, fd: int, parity_fd: int, job: Job) -> list[tuple[int, int]]:
        """Rebuild a stripe's missing data chunks, check them and write those that are right. Blocks.

        Args:
            here: Chunks that lie in the part file (`fd`) and the parity file.
        Returns:
            (chunk number, check bits) of each rebuilt chunk.
        """
        from fastcas.parity import ReedSolomon  # rarely needed: not loaded before

        manifest, size = self.manifest, self.manifest.chunk_size
        data, parity = manifest.stripe(stripe)
        length = manifest.length_of(data[0])
        shards: list[bytes | None] = []
        for index in data:
            shard = os.pread(fd, manifest.length_of(index), index * size) if here >> index & 1 else None
            shards.append(None if shard is None else shard.ljust(length, b"\0"))
        shards += [bytes(length)] * (manifest.k - len(data))
        for index in parity:
            at = (index - manifest.n_chunks) * size
            shards.append(os.pread(parity_fd, length, at) if here >> index & 1 else None)
        whole = ReedSolomon(manifest.k, manifest.m).reconstruct(shards)
        out = []
        scratch = os.memfd_create("fastcas-rebuild", os.MFD_CLOEXEC)
        try:
            for slot, index in enumerate(data):
                if not here >> index & 1:
                    os.pwrite(scratch, memoryview(whole[slot])[: manifest.length_of(index)], 0)
                    out.append((index, job.take(index, scratch, 0, True)))
        finally:
            os.close(scratch)
        return out
