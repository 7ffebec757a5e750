"""Healing: the right bytes of damaged chunks, from another copy, from the stripe's parity, or handed in by others.

They are written into new owned blobs; a user's own file is never written. Nothing counts before its SHA-256 is right:
each shard that goes into a rebuild, and each chunk that comes out of it. Owns one blob in the making.
Never: asks the network, decides what is damaged (scrub.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastcas.hashing import sha256
from fastcas.ids import short
from fastcas.metadata import Manifest
from fastcas.store.blobs import BlobWriter
from fastcas.store.catalog import OWNED, BlobRow
from fastcas.store.core import Core
from fastcas.store.quota import BLOCK_B
from fastcas.store.types import Identity

__all__ = ["Healer", "Places"]

SHOWN = 20  # lost chunks of a stripe that a message names


@dataclass(slots=True)
class Places:
    """Where some chunks belong.

    Attributes:
        of: (manifest hash, chunk number) of each, in the manifests that can be read.
        files: The file of each of those manifests.
        are_complete: Every manifest could be read.
    """

    of: dict[bytes, list[tuple[bytes, int]]] = field(default_factory=dict)
    files: dict[bytes, bytes] = field(default_factory=dict)
    are_complete: bool = True

    @classmethod
    def find(cls, core: Core, keys: Iterable[bytes]) -> Places:
        """Look for chunks in all manifests. Cost: one read of every manifest."""
        wanted, places = set(keys), cls()
        for row in core.catalog.manifests() if wanted else ():
            manifest = core.try_manifest(row)
            if manifest is None:
                places.are_complete = False
                continue
            for hashes, first in ((manifest.hashes, 0), (manifest.parity_hashes, manifest.n_chunks)):
                for at in range(0, len(hashes), 32):
                    key = hashes[at : at + 32]
                    if key in wanted:
                        places.of.setdefault(key, []).append((row.hash, first + at // 32))
                        places.files[row.hash] = row.file_hash
        return places

    def file_of(self, key: bytes) -> bytes | None:
        """Return a file that has the chunk, None if no manifest lists it."""
        found = self.of.get(key)
        return self.files[found[0][0]] if found else None


class Healer:
    """Brings chunks back. What it wrote is visible after `publish`; `close` when done."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._blob = BlobWriter(core.folder, core.catalog.catalog_id)
        self._how: dict[bytes, str] = {}
        self._scratch = memoryview(b"")

    def close(self) -> None:
        """Remove what was not published. Idempotent."""
        self._blob.discard()

    def how(self, key: bytes) -> str:
        """Return how a chunk was brought back: "copy", "parity", "peer", or "" when it was not."""
        return self._how.get(key, "")

    def heal(self, key: bytes, places: Places) -> str:
        """Bring a chunk back from this machine: `how` says it. Returns why it could not be done, "" when it was."""
        if key in self._how:
            return ""
        if self._core.owned_good(key):
            self._how[key] = "copy"
            return ""
        data = self._core.read_chunk(key)
        if data is not None:
            self._keep(key, data, "copy")
            return ""
        why = "no parity covers it"
        for manifest_hash, index in places.of.get(key, ()):
            manifest = self._manifest(manifest_hash)
            if manifest is None or not manifest.k:
                continue
            why = self._rebuild(manifest, manifest.stripe_of(index), key)
            if key in self._how:
                return ""
        return why

    def siblings(self, key: bytes, places: Places) -> list[tuple[bytes, int, bytes]]:
        """Return (hash, length, file hash) of the other chunks of a chunk's stripes that are not here."""
        out = []
        for manifest_hash, index in places.of.get(key, ()):
            manifest = self._manifest(manifest_hash)
            if manifest is None or not manifest.k:
                continue
            data, parity = manifest.stripe(manifest.stripe_of(index))
            names = {manifest.hash_of(i): manifest.length_of(i) for i in (*data, *parity) if i != index}
            here = self._core.catalog.present(list(names))
            out += [(name, n, manifest.file_hash) for name, n in names.items() if name not in here]
        return out

    def give(self, key: bytes, length: int, data: bytes | None) -> bool:
        """Take a chunk's bytes from somebody else; returns whether they are right."""
        if data is None or len(data) != length or sha256(data) != key:
            return False
        if key not in self._how:
            self._keep(key, data, "peer")
        return True

    def _manifest(self, manifest_hash: bytes) -> Manifest | None:
        row = self._core.catalog.manifest(manifest_hash)
        return self._core.try_manifest(row) if row is not None else None

    def _keep(self, key: bytes, data: bytes | memoryview, how: str) -> None:
        room = self._core.room()
        self._blob.allow(None if room is None else room // BLOCK_B * BLOCK_B - BLOCK_B)  # whole blocks count
        offset = self._blob.reserve(key, len(data))
        self._blob.write([memoryview(data)], offset, 0)
        self._core.took(len(data))
        self._how[key] = how

    def _rebuild(self, manifest: Manifest, number: int, key: bytes) -> str:
        """Rebuild a stripe and keep what was lost of it. Returns why that could not be done."""
        data, parity = manifest.stripe(number)
        length = manifest.length_of(data[0])
        slots: list[int | None] = [*data, *([None] * (manifest.k - len(data))), *parity]
        shards: list[bytes | None] = []
        for index in slots:
            piece = bytes(length) if index is None else self._core.read_chunk(manifest.hash_of(index))
            shards.append(None if piece is None else piece.ljust(length, b"\0"))
        lost = [(at, index) for at, index in enumerate(slots) if shards[at] is None and index is not None]
        if len(lost) > manifest.m:
            return _too_few(manifest, number, [index for _, index in lost])
        out: list[memoryview | None] = [None] * len(slots)
        if len(self._scratch) < len(lost) * length:
            self._scratch = memoryview(bytearray(len(lost) * length))
        for n, (at, _) in enumerate(lost):
            out[at] = self._scratch[n * length : (n + 1) * length]
        from fastcas.parity import ReedSolomon  # brings numpy: a command that needs none must not wait for it

        ReedSolomon(manifest.k, manifest.m).reconstruct(shards, out)
        for at, index in lost:
            view = out[at]
            assert view is not None
            name, rebuilt = manifest.hash_of(index), view[: manifest.length_of(index)]
            if name not in self._how and sha256(rebuilt) == name:
                self._keep(name, rebuilt, "parity")
        return "" if key in self._how else "what parity rebuilt does not have the chunk's hash"

    def publish(self) -> bool:
        """Make what was brought back durable and visible; returns whether there was anything."""
        core, catalog, writer = self._core, self._core.catalog, self._blob
        name = writer.publish()
        if name is None:
            return False
        self._blob = BlobWriter(core.folder, catalog.catalog_id)
        path, identity = os.fsencode(name), Identity(0, 0, writer.size, 0)
        rows = [
            (bytes(writer.keys[32 * i : 32 * i + 32]), offset, length)
            for i, (offset, length) in enumerate(zip(writer.offsets, writer.lengths, strict=True))
        ]
        try:
            with catalog.transaction():
                number = catalog.add_blob(OWNED, path, identity)
                catalog.add_extents(number, writer.keys, writer.offsets, writer.lengths)
                catalog.many("DELETE FROM lost WHERE hash=?", ((row[0],) for row in rows))
        except BaseException:
            core.folder.discard(name)
            raise
        core.say_blob(BlobRow(number, OWNED, path, identity, None))
        core.say_chunks(number, rows)
        return True


def _too_few(manifest: Manifest, number: int, lost: list[int]) -> str:
    total = manifest.k + manifest.m
    have = total - len(lost)
    names = [f"#{i} ({short(manifest.hash_of(i))})" for i in lost[:SHOWN]]
    return (
        f"unrepairable: stripe #{number} of file {short(manifest.file_hash)}: {have} of {manifest.k} shards are left, "
        f"need {manifest.k - have} more; lost: {', '.join(names)}{', …' if len(lost) > SHOWN else ''}"
    )
