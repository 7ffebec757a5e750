"""The user's own files as blobs: part files while they grow, finished downloads, and their identity.

A linked blob is believed as long as device, inode, size and mtime_ns stay as they were when it was linked.
Never: writes to a user's file.
"""

from __future__ import annotations

import os
import time

from fastcas.errors import FileChanged
from fastcas.hashing import digest_many
from fastcas.metadata import Manifest
from fastcas.store.catalog import GROWING, LINKED
from fastcas.store.collection import MAGIC
from fastcas.store.core import Core, identity_of, manifest_name
from fastcas.store.ingest import Entry, Staged, insert_linked, stored_file
from fastcas.store.maintain import forget_growing, withdraw
from fastcas.store.paths import os_errors, shown
from fastcas.store.sources import open_user_file
from fastcas.store.types import Identity, StoredFile

__all__ = ["add_manifest", "begin_linked", "make_way", "prove", "register_linked"]

VERIFY_B = 8 << 20


def make_way(core: Core, path: bytes, identity: Identity) -> None:
    """Withdraw what the catalog has at a path unless it is a linked blob of the same identity."""
    old = core.catalog.blob_at(path)
    if old is not None and (old.kind != LINKED or old.identity != identity):
        withdraw(core, old, "replaced")


def add_manifest(core: Core, manifest: Manifest) -> None:
    """Keep a manifest and report it. Nothing is said about its chunks; `gc` drops it if no file comes to need it."""
    row = core.catalog.manifest(manifest.manifest_hash)
    if row is None or not core.folder.exists(manifest_name(row.hash)):
        core.write_manifest(manifest)
        with core.catalog.transaction():
            row = core.insert_manifest(manifest, complete=row is not None and row.complete, written=True)
        core.say_manifest(row)
        core.say_files_of(row)


def begin_linked(core: Core, path: str | os.PathLike[str], manifest: Manifest) -> int:
    """Give a part file a blob number and keep its manifest; the caller reports it to the table as growing."""
    fd = open_user_file(path)
    try:
        identity = identity_of(os.fstat(fd))
    finally:
        os.close(fd)
    add_manifest(core, manifest)
    absolute = os.fsencode(os.path.realpath(path))
    old = core.catalog.blob_at(absolute)
    if old is not None:
        withdraw(core, old, "replaced")
    with core.catalog.transaction():
        return core.catalog.add_blob(GROWING, absolute, identity, manifest.manifest_hash)


def register_linked(
    core: Core, path: str | os.PathLike[str], manifest: Manifest, name: str, *, verified: bool
) -> StoredFile:
    """Seed a finished file in place, under a manifest that its bytes are known, or here proven, to match."""
    fd = open_user_file(path)
    try:
        info = os.fstat(fd)
        if info.st_size != manifest.size:
            raise FileChanged(f"{shown(path)}: expected {manifest.size} B, got {info.st_size} B; it is not seeded")
        if not verified:
            prove(fd, path, manifest)
        with os_errors(path, "reading it"):
            is_collection = os.pread(fd, len(MAGIC), 0) == MAGIC
            identity = identity_of(os.fstat(fd))
        if identity != identity_of(info):
            raise FileChanged(f"{shown(path)}: changed while it was checked; it is not seeded")
    finally:
        os.close(fd)
    absolute = os.fsencode(os.path.realpath(path))
    catalog = core.catalog
    grown = [
        blob.number
        for blob in catalog.blobs(GROWING)
        if (blob.identity.device, blob.identity.inode) == (identity.device, identity.inode)
    ]
    before = catalog.manifest(manifest.manifest_hash)
    entry = Entry(Staged(manifest, 0, absolute, identity), name, is_collection)
    entry.already_stored = before is not None and before.complete
    make_way(core, absolute, identity)
    written = before is None or not core.folder.exists(manifest_name(before.hash))
    if written:
        core.write_manifest(manifest)
    with catalog.transaction():
        news = insert_linked(core, absolute, identity, manifest)
        row = core.insert_manifest(manifest, complete=True, written=written)
        catalog.put_file(row.file_hash, row.hash, manifest.size, int(time.time()), is_collection, name)
    core.say_news([news])
    if written:
        core.say_manifest(row)
    if core.listener is not None:
        core.listener.on_file(row.file_hash, row.hash)
    forget_growing(core, grown)
    return stored_file(entry)


def prove(fd: int, path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Hash every chunk of an open file against the manifest. Raises FileChanged."""
    group = max(1, VERIFY_B // manifest.chunk_size)
    for first in range(0, manifest.n_chunks, group):
        end = min(first + group, manifest.n_chunks)
        start, stop = manifest.offset_of(first), min(manifest.offset_of(end), manifest.size)
        with os_errors(path, "reading it"):
            data = memoryview(os.pread(fd, stop - start, start))
        places = [manifest.offset_of(i) - start for i in range(first, end)]
        digests = digest_many([data[at:to] for at, to in zip(places, [*places[1:], stop - start], strict=True)])
        if b"".join(digests) != manifest.hashes[32 * first : 32 * end]:
            raise FileChanged(f"{shown(path)}: bytes {start}..{stop} are not those of the manifest; it is not seeded")
