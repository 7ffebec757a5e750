"""A collection that was fetched becomes one that is stored, from the folder where its files are now.

The large files are seeded in place. The packs are put together again from the small files, and the collection from
its entries: both are owned. Everything is published in one commit, after each manifest came out as it was listed,
so what is served is what was fetched, or nothing is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from operator import attrgetter

from fastcas.errors import FileChanged, UsageError
from fastcas.ids import short
from fastcas.limits import CHUNK_SIZE_AUTO, CHUNK_SIZE_MIN
from fastcas.metadata import FIXED, Manifest
from fastcas.store.beneath import open_beneath
from fastcas.store.catalog import GROWING
from fastcas.store.collection import Collection, FileEntry, SmallEntry
from fastcas.store.core import Core
from fastcas.store.ingest import Entry, Ingest, Staged, stored_file
from fastcas.store.linked import make_way
from fastcas.store.maintain import forget_growing
from fastcas.store.packs import PackPart, PackSource
from fastcas.store.paths import shown, translate
from fastcas.store.quota import Quota, ingest_bound
from fastcas.store.sources import BytesSource, FileSource, Source, require_regular
from fastcas.store.types import Identity, Progress, StoredFile

__all__ = ["register_tree", "tree_bound"]


def register_tree(
    core: Core,
    quota: Quota,
    path: str | os.PathLike[str],
    collection: Collection,
    manifest: Manifest,
    name: str,
    *,
    members: Mapping[bytes, Manifest],
    identities: Mapping[str, Identity],
    progress: Progress | None,
) -> StoredFile:
    """See `Store.register_tree`."""
    root = os.path.realpath(path)
    try:
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise translate(exc, path, "opening it") from exc
    try:
        return _Adoption(core, quota, root, root_fd, members, progress).run(collection, manifest, name, identities)
    finally:
        os.close(root_fd)


def tree_bound(collection: Collection) -> int:
    """Return what serving a fetched collection takes on disk at most: packs, its description, manifests."""
    described = len(collection.encode())
    return (
        sum(ingest_bound(pack.size, CHUNK_SIZE_MIN, None) for pack in collection.packs)
        + sum(ingest_bound(file.size, CHUNK_SIZE_AUTO, None, in_place=True) for file in collection.files)
        + ingest_bound(described, CHUNK_SIZE_MIN, None)
    )


class _Adoption:
    """One tree on its way into the catalog."""

    def __init__(
        self, core: Core, quota: Quota, root: str, root_fd: int, members: Mapping[bytes, Manifest],
        progress: Progress | None,
    ) -> None:
        self._core = core
        self._quota = quota
        self._root = root
        self._root_fd = root_fd
        self._members = members
        self._progress = progress
        self._done = 0
        self._total = 0
        self._chunking = FIXED

    def run(
        self, collection: Collection, manifest: Manifest, name: str, identities: Mapping[str, Identity]
    ) -> StoredFile:
        self._total = collection.size
        self._chunking = manifest.chunking
        small: list[list[SmallEntry]] = [[] for _ in collection.packs]
        for item in collection.small:
            if item.size:
                small[item.pack].append(item)
        with self._quota.admit(tree_bound(collection), held=True) as budget, Ingest(self._core, budget) as ingest:
            entries = []
            for number, pack in enumerate(collection.packs):
                parts = self._parts(number, small[number], pack.size)
                source = PackSource(self._root_fd, self._root, parts)
                try:
                    staged = self._read(ingest, source, self._members.get(pack.manifest_hash), pack.manifest_hash)
                finally:
                    source.close()
                entries.append(Entry(staged, None))
            entries += [
                Entry(self._large(ingest, entry, identities.get(entry.path)), None) for entry in collection.files
            ]
            content = BytesSource(collection.encode(), name)
            staged = self._read(ingest, content, manifest, manifest.manifest_hash)
            listed = sorted({entry.staged.manifest.manifest_hash for entry in entries})
            top = Entry(staged, name, is_collection=True, members=listed)
            ingest.publish([*entries, top])
        inodes = {
            (entry.staged.identity.device, entry.staged.identity.inode) for entry in entries if entry.staged.identity
        }
        grown = [
            blob.number
            for blob in self._core.catalog.blobs(GROWING)
            if (blob.identity.device, blob.identity.inode) in inodes
        ]
        forget_growing(self._core, grown)
        return stored_file(top, collection.size)

    def _open(self, path: str) -> int:
        fd = open_beneath(self._root_fd, path, os.O_RDONLY)
        try:
            require_regular(os.fstat(fd), shown(os.path.join(self._root, path)))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _step(self, of_file: int) -> None:
        if self._progress is not None:
            self._progress(min(self._done + of_file, self._total), self._total)

    def _parts(self, number: int, small: list[SmallEntry], size: int) -> list[PackPart]:
        """The files of one pack, back to back. Raises UsageError where they are not the whole of it."""
        parts = []
        at = 0
        for entry in sorted(small, key=attrgetter("offset")):
            if entry.offset != at:
                break
            parts.append(PackPart(entry.path, entry.size, expected=entry.sha256))
            at += entry.size
        if at != size or len(parts) != len(small):
            raise UsageError(f"{shown(self._root)}: pack {number} is not just its files, one by one; it is not seeded")
        return parts

    def _read(
        self,
        ingest: Ingest,
        source: Source,
        shape: Manifest | None,
        manifest_hash: bytes,
        *,
        in_place: bool = False,
    ) -> Staged:
        """Read a source under the shape of a manifest, or the collection's automatic one, and check what came out."""
        parity = (shape.k, shape.m) if shape is not None and shape.k else None
        staged = ingest.add(
            source, chunk_size=shape.wanted_size if shape is not None else None,
            chunking=shape.chunking if shape is not None else self._chunking, parity=parity, in_place=in_place,
            progress=lambda done, _: self._step(done),
        )  # fmt: skip
        if staged.manifest.manifest_hash != manifest_hash:
            raise FileChanged(
                f"{source.label}: its manifest is not {short(manifest_hash)}, which the collection lists; "
                "nothing of the folder is seeded"
            )
        self._done += staged.manifest.size
        return staged

    def _large(self, ingest: Ingest, entry: FileEntry, proven: Identity | None) -> Staged:
        """A file with a manifest of its own, in place; read again unless it is as it was when it was proven."""
        absolute = os.path.join(self._root, entry.path)
        source = FileSource(self._open(entry.path), shown(absolute), os.fsencode(absolute))
        try:
            identity = source.identity
            assert identity is not None
            if source.size != entry.size or (proven is not None and identity != proven):
                raise FileChanged(f"{source.label}: changed since it was fetched; nothing of the folder is seeded")
            make_way(self._core, os.fsencode(absolute), identity)
            manifest = self._members.get(entry.manifest_hash)
            if manifest is None or proven is None:
                return self._read(ingest, source, manifest, entry.manifest_hash, in_place=True)
        finally:
            source.close()
        self._done += entry.size
        self._step(0)
        return Staged(manifest, 0, os.fsencode(absolute), identity)
