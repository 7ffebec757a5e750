"""A new catalog from what lies on disk: manifests, owned blobs, and nothing that was not read and hashed here.

Every manifest is checked against its name, every chunk of every blob against its hash; a blob whose table of contents
is damaged is walked with the lengths that manifests know. Names, pins and the places of users' files stand in no
manifest: they are taken from the old catalog as far as it can be read (a name as it is, a user's file only after it
was hashed again); a file without a name is called by its hash. Files that were removed but not yet collected by `gc`
come back.

The new catalog is written as a temporary file and renamed over the old one, which stays in quarantine/. A kill at any
time leaves the old catalog or the new one. Never: changes a blob, a manifest or a user's file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sqlite3
import stat
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastcas.errors import CatalogCorrupt, CollectionCorrupt, FastCASError, ManifestCorrupt, StoreError
from fastcas.hashing import digest_many, sha256
from fastcas.ids import escape_for_terminal
from fastcas.limits import CHUNK_SIZE_MAX, COLLECTION_SIZE_MAX, MANIFEST_SIZE_MAX
from fastcas.metadata import Manifest
from fastcas.store.blobs import decode_index, index_start
from fastcas.store.catalog import OWNED, Catalog
from fastcas.store.collection import MAGIC, Collection
from fastcas.store.core import Core, identity_of, manifest_name
from fastcas.store.ingest import insert_linked
from fastcas.store.linked import prove
from fastcas.store.paths import BLOB_DIR, MANIFEST_DIR, OLD_CATALOG, QUARANTINE_DIR, Folder, os_errors, shown
from fastcas.store.quota import QUOTA_FACT
from fastcas.store.sources import open_user_file
from fastcas.store.types import Identity, Progress, RebuildReport

__all__ = ["CATALOG", "rebuild"]

log = logging.getLogger(__name__)

CATALOG = "catalog.db"
BATCH_B = 8 << 20  # bytes of chunks hashed in one call
LENGTHS_MAX = 32  # chunk lengths that are tried where a blob has no table of contents
_Entry = tuple[bytes, int, int]


@dataclass(slots=True)
class _Old:
    """What the old catalog still says. Hints, all of them."""

    names: dict[bytes, list[tuple[str, int]]] = field(default_factory=dict)
    pins: dict[bytes, int] = field(default_factory=dict)
    used: dict[bytes, int] = field(default_factory=dict)
    linked: dict[bytes, list[bytes]] = field(default_factory=dict)
    quota: bytes | None = None


def rebuild(folder: Folder, progress: Progress | None) -> RebuildReport:
    """Make catalog.db anew. The folder's lock is held by the caller.

    Args:
        folder: The storage folder.
        progress: Called with (bytes done, bytes total).
    Raises:
        StoreFull, StoreError, PermissionDenied: Writing failed; the old catalog is as it was, or the new one is whole.
    """
    report = RebuildReport()
    kept = _keep_old(folder)
    old = _salvage(folder, kept) if kept is not None else _Old()
    fd, temp = folder.create_temp(".")
    os.close(fd)
    try:
        core = Core(folder, Catalog(folder.path(temp), create=True))
        try:
            _Rebuild(core, old, report, progress).run()
        finally:
            core.close()
        if folder.exists(f"{temp}-wal"):  # closing it said nothing of what failed
            who = shown(folder.path(CATALOG))
            raise StoreError(f"{who}: the new one could not be written whole; nothing was changed")
        fd = folder.open(temp)
        try:
            _install(folder, fd, temp)
        finally:
            os.close(fd)
    except BaseException:
        for suffix in ("", "-wal", "-journal"):
            folder.discard(temp + suffix)
        _forget_links(folder)
        raise
    report.old_catalog = None if kept is None else str(folder.path(kept))
    return report


def _install(folder: Folder, fd: int, temp: str) -> None:
    """Put the new catalog into the old one's place. Whatever fails, one of them is there whole."""
    folder.unlink(f"{CATALOG}-wal")  # its changes are in the old catalog since that was read
    with os_errors(folder.path(CATALOG), "making it durable"):
        os.fchmod(fd, 0o600)
        os.fsync(fd)
        os.rename(temp, CATALOG, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
        os.fsync(folder.fd)


def _forget_links(folder: Folder) -> None:
    """Remove names in quarantine/ of the catalog that is in use: a rebuild that did not end left them."""
    with contextlib.suppress(OSError, FastCASError):
        current = os.stat(CATALOG, dir_fd=folder.fd, follow_symlinks=False)
        for leaf in folder.names(QUARANTINE_DIR):
            name = f"{QUARANTINE_DIR}/{leaf}"
            if name.startswith(OLD_CATALOG) and os.path.samestat(
                os.stat(name, dir_fd=folder.fd, follow_symlinks=False), current
            ):
                folder.discard(name)
                folder.discard(f"{name}-wal")


def _keep_old(folder: Folder) -> str | None:
    """Give the old catalog and its log a second name in quarantine/; returns it, None where there is none."""
    if not folder.exists(CATALOG):
        return None
    _forget_links(folder)
    kept = f"{OLD_CATALOG}{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}.db"
    for suffix in ("-wal", ""):
        with os_errors(folder.path(kept), "keeping the old catalog"), contextlib.suppress(FileNotFoundError):
            os.link(CATALOG + suffix, kept + suffix, src_dir_fd=folder.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
    return kept


def _salvage(folder: Folder, kept: str) -> _Old:
    """Read what can be read of names, pins, uses and users' files."""
    old = _Old()

    def names(file: bytes, name: str, at: int) -> None:
        old.names.setdefault(bytes(file), []).append((str(name), int(at)))

    def linked(manifest: bytes, path: bytes) -> None:
        old.linked.setdefault(bytes(manifest), []).append(bytes(path))

    def quota(value: bytes) -> None:
        old.quota = bytes(value) if len(value) == 8 else None

    tables = (
        ("SELECT file, name, stored_at FROM names", names),
        ("SELECT file, pinned_at FROM pins", lambda file, at: old.pins.update({bytes(file): int(at)})),
        ("SELECT file, at FROM used", lambda file, at: old.used.update({bytes(file): int(at)})),
        ("SELECT manifest, path FROM blobs WHERE kind=1 AND manifest IS NOT NULL", linked),
        (f"SELECT value FROM meta WHERE key='{QUOTA_FACT}'", quota),
    )
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{folder.path(kept).as_uri()}?mode=rw", uri=True)) as db,
    ):
        for sql, take in tables:
            with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
                for row in db.execute(sql):
                    with contextlib.suppress(ValueError, TypeError):
                        take(*row)
    return old


class _Rebuild:
    """One new catalog in the making."""

    def __init__(self, core: Core, old: _Old, report: RebuildReport, progress: Progress | None) -> None:
        self._core = core
        self._old = old
        self._report = report
        self._progress = progress
        self._done = 0
        self._total = 0
        self._ids: Counter[bytes] = Counter()
        self._lengths: list[int] | None = None
        self._known: set[bytes] = set()

    def run(self) -> None:
        catalog = self._core.catalog
        blobs = self._names(BLOB_DIR, ".blob")
        self._total = sum(size for _, size in blobs)
        for name, size in blobs:
            self._blob(name)
            self._done += size
            self._say(0)
        if self._ids:  # so that gc knows the blobs of the old catalog as its own
            catalog.remember("catalog_id", self._ids.most_common(1)[0][0])
        if self._old.quota is not None:
            catalog.remember(QUOTA_FACT, self._old.quota)
        for manifest, stored_at in self._manifests():
            self._manifest(manifest, stored_at)
        self._collections()
        with catalog.transaction():
            catalog.execute(
                "INSERT OR IGNORE INTO names SELECT f.hash, lower(hex(f.hash)), f.stored_at FROM files f"
                " WHERE NOT EXISTS(SELECT 1 FROM names WHERE file=f.hash)"
                " AND NOT EXISTS(SELECT 1 FROM members WHERE manifest=f.manifest)"
            )
        self._report.files = catalog.value("SELECT count(*) FROM files")
        self._report.incomplete = catalog.value(
            "SELECT count(*) FROM files f JOIN manifests m ON m.hash=f.manifest WHERE NOT complete"
        )

    def _say(self, more: int) -> None:
        if self._progress is not None:
            self._progress(min(self._done + more, self._total), self._total)

    def _leave_out(self, name: str, reason: str) -> None:
        self._report.left_out.append((shown(self._core.folder.path(name)), reason))

    def _names(self, tree: str, suffix: str) -> list[tuple[str, int]]:
        """Return (name below the root, size) of the files of a tree with its two-letter folders, sorted."""
        folder, found = self._core.folder, []
        for prefix in sorted(folder.names(tree)):
            if len(prefix) != 2:
                continue
            for leaf in sorted(folder.names(f"{tree}/{prefix}")):
                if leaf.endswith(suffix):
                    name = f"{tree}/{prefix}/{leaf}"
                    with contextlib.suppress(OSError):
                        info = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
                        found.append((name, info.st_size if stat.S_ISREG(info.st_mode) else 0))
        return found

    # --- blobs ---

    def _blob(self, name: str) -> None:
        try:
            fd = self._core.folder.open(name)
        except FastCASError as exc:
            self._leave_out(name, str(exc))
            return
        try:
            with os_errors(self._core.folder.path(name), "reading it"):
                try:
                    catalog_id, entries = decode_index(fd)
                    size = index_start(fd)
                    self._ids[catalog_id] += 1
                except CatalogCorrupt as exc:
                    self._leave_out(name, f"{exc}; its chunks were looked for with the lengths of the manifests")
                    entries = list(self._walk(fd))
                    size = max((offset + length for _, offset, length in entries), default=0)
                good = list(self._proven(fd, entries))
        except FastCASError as exc:
            self._leave_out(name, str(exc))
            return
        finally:
            os.close(fd)
        if good:
            catalog = self._core.catalog
            with catalog.transaction():
                number = catalog.add_blob(OWNED, os.fsencode(name), Identity(0, 0, size, 0))
                catalog.add_extents(
                    number, b"".join(key for key, _, _ in good), array("Q", [offset for _, offset, _ in good]),
                    array("I", [length for _, _, length in good]),
                )  # fmt: skip
            self._report.blobs += 1
            self._report.chunks += len(good)
            self._report.bytes += sum(length for _, _, length in good)

    def _proven(self, fd: int, entries: list[_Entry]) -> Iterator[_Entry]:
        """Yield the entries whose bytes have their hash. A hole that gc punched has not, so that is no damage."""
        batch: list[tuple[_Entry, bytes]] = []
        size = 0
        for entry in [*entries, None]:
            if entry is not None and entry[2] <= CHUNK_SIZE_MAX:
                batch.append((entry, os.pread(fd, entry[2], entry[1])))
                size += entry[2]
            if batch and (entry is None or size >= BATCH_B):
                digests = digest_many([data for _, data in batch])
                yield from (item for (item, _), digest in zip(batch, digests, strict=True) if digest == item[0])
                self._say(batch[-1][0][1])
                batch, size = [], 0

    def _walk(self, fd: int) -> Iterator[_Entry]:
        """Find chunks in a blob without a table of contents: they lie back to back, and manifests know them."""
        if self._lengths is None:
            lengths: Counter[int] = Counter()
            for manifest, _ in self._manifests(tell=False):
                for i in range(manifest.n_total):
                    self._known.add(manifest.hash_of(i))
                    lengths[manifest.length_of(i)] += 1
            self._lengths = [length for length, _ in lengths.most_common(LENGTHS_MAX)]
        at, end = 0, os.fstat(fd).st_size
        while at < end:
            skips = (0, *self._lengths)  # past a chunk that is damaged or punched
            found = next((entry for skip in skips if (entry := self._chunk_at(fd, at + skip)) is not None), None)
            if found is None:
                return
            yield found
            at = found[1] + found[2]

    def _chunk_at(self, fd: int, offset: int) -> _Entry | None:
        assert self._lengths is not None
        data = memoryview(os.pread(fd, max(self._lengths, default=0), offset))
        for length in self._lengths:
            if 0 < length <= len(data) and (key := sha256(data[:length])) in self._known:
                return key, offset, length
        return None

    # --- manifests ---

    def _manifests(self, *, tell: bool = True) -> Iterator[tuple[Manifest, int]]:
        """Yield the manifests on disk that are what their names say, with the time of their writing."""
        for name, _ in self._names(MANIFEST_DIR, ""):
            try:
                fd = self._core.folder.open(name)
                try:
                    with os_errors(self._core.folder.path(name), "reading it"):
                        data = os.pread(fd, MANIFEST_SIZE_MAX + 1, 0)
                        stored_at = int(os.fstat(fd).st_mtime)
                finally:
                    os.close(fd)
                if sha256(data).hex() != name.rsplit("/", 1)[-1]:
                    raise ManifestCorrupt("its bytes are not those that its name says")
                manifest = Manifest.decode(data)
            except FastCASError as exc:
                if tell:
                    self._leave_out(name, str(exc))
                continue
            yield manifest, stored_at

    def _manifest(self, manifest: Manifest, stored_at: int) -> None:
        core, catalog, old = self._core, self._core.catalog, self._old
        linked = [found for path in old.linked.get(manifest.manifest_hash, []) if (found := _unchanged(path, manifest))]
        keys = [manifest.hash_of(i) for i in range(manifest.n_chunks)]
        names = old.names.get(manifest.file_hash, [])
        here = set(keys) if linked else catalog.present(keys)
        if keys and not here and not names:
            self._leave_out(manifest_name(manifest.manifest_hash), "none of its chunks is here; gc removes it")
            return
        complete = len(here) == len(set(keys))
        with catalog.transaction():
            for path, identity in linked:
                insert_linked(core, path, identity, manifest)
            row = core.insert_manifest(manifest, complete=complete, written=False)
            best = catalog.manifests(manifest.file_hash)[0]
            catalog.put_file(row.file_hash, best.hash, manifest.size, stored_at, False, None)
            catalog.many("INSERT OR IGNORE INTO names VALUES(?,?,?)", ((row.file_hash, name, at) for name, at in names))
            if row.file_hash in old.pins:
                catalog.execute("INSERT OR IGNORE INTO pins VALUES(?,?)", (row.file_hash, old.pins[row.file_hash]))
            if row.file_hash in old.used:
                catalog.execute("INSERT OR REPLACE INTO used VALUES(?,?)", (row.file_hash, old.used[row.file_hash]))
            total = {manifest.hash_of(i): manifest.length_of(i) for i in range(manifest.n_total)}
            gone = total.keys() - (here | catalog.present(list(total)))
            catalog.many("INSERT OR IGNORE INTO lost VALUES(?,?)", ((key, total[key]) for key in gone))
        self._report.manifests += 1

    def _collections(self) -> None:
        """Find the files that are collections, and what belongs to them."""
        core, catalog = self._core, self._core.catalog
        rows = catalog.query(
            "SELECT f.hash, f.manifest FROM files f JOIN manifests m ON m.hash=f.manifest"
            " WHERE m.complete AND f.size>=?",
            (len(MAGIC),),
        )
        for file_hash, manifest_hash in rows:
            row = catalog.manifest(manifest_hash)
            manifest = core.try_manifest(row) if row is not None else None
            if manifest is None or manifest.size > COLLECTION_SIZE_MAX:
                continue
            first = core.read_chunk(manifest.hash_of(0))
            if first is None or not first.startswith(MAGIC):
                continue
            pieces = [core.read_chunk(manifest.hash_of(i)) or b"" for i in range(manifest.n_chunks)]
            try:
                collection = Collection.decode(b"".join(pieces), posix_names=True)
            except CollectionCorrupt as exc:
                log.info("file begins like a collection and is none error=%s", escape_for_terminal(str(exc)))
                continue
            members = {pack.manifest_hash for pack in collection.packs}
            members |= {file.manifest_hash for file in collection.files}
            with catalog.transaction():
                catalog.execute("UPDATE files SET is_collection=1 WHERE hash=?", (file_hash,))
                catalog.many("INSERT OR IGNORE INTO members VALUES(?,?)", ((file_hash, member) for member in members))


def _unchanged(path: bytes, manifest: Manifest) -> tuple[bytes, Identity] | None:
    """Return a user's file with its identity if it still has a manifest's content."""
    try:
        fd = open_user_file(path)
    except FastCASError:
        return None
    try:
        identity = identity_of(os.fstat(fd))
        if identity.size != manifest.size:
            return None
        prove(fd, os.fsdecode(path), manifest)
        return (path, identity) if identity_of(os.fstat(fd)) == identity else None
    except FastCASError:
        return None
    finally:
        os.close(fd)
