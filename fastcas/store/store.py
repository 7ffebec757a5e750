"""`Store`: the one door to the storage folder; the work is done in the modules beside it."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from fastcas.errors import (
    CatalogCorrupt,
    FileChanged,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreNotFound,
    UsageError,
)
from fastcas.ids import short
from fastcas.metadata import FIXED, Manifest
from fastcas.store import adopt as _adopt
from fastcas.store import ingest as _ingest
from fastcas.store import linked as _linked
from fastcas.store import listing as _listing
from fastcas.store import lock as _lock
from fastcas.store import maintain as _maintain
from fastcas.store import migrate as _migrate
from fastcas.store import tree as _tree
from fastcas.store.catalog import ADVICE, Catalog
from fastcas.store.collection import Collection
from fastcas.store.core import Core
from fastcas.store.paths import BLOB_DIR, MANIFEST_DIR, QUARANTINE_DIR, Folder, root_of, shown
from fastcas.store.quota import Quota, ingest_bound, manifest_bound
from fastcas.store.rebuild import CATALOG
from fastcas.store.rebuild import rebuild as _rebuild
from fastcas.store.scrub import Scrub
from fastcas.store.sources import FileSource, open_user_file
from fastcas.store.types import (
    Extent,
    FileRow,
    GcReport,
    Identity,
    MigrateReport,
    Progress,
    RebuildReport,
    StoredFile,
    StoreListener,
    VerifyReport,
)

__all__ = ["Store"]

_T = TypeVar("_T")

KEY = "node.key"
HASHES_PER_BATCH = 65_536


class Store:
    """An open storage folder. All methods are called from one thread at a time; `close` when done.

    `listener` follows what becomes live or goes away, after each commit; `load` replays what is live already.
    """

    def __init__(self, core: Core, lock_fd: int) -> None:
        self._core = core
        self._lock_fd = lock_fd
        self._quota = Quota(core)
        self._identity: bytes | None = None

    @classmethod
    def open(cls, root: str | os.PathLike[str], *, create: bool = False, lock_fd: int | None = None) -> Store:
        """Open a storage folder and hold its lock.

        Args:
            root: The folder, or its `hashed_files`.
            create: Make it if it is not there yet.
            lock_fd: An inherited descriptor of its LOCK that holds the lock; stays the caller's.
        Raises:
            StoreNotFound: No such folder, or not a store (and not `create`).
            StoreLocked: Another process has it; raised at once, with its process id.
            PermissionDenied: The operating system refuses.
            CatalogCorrupt: The catalog is damaged or of another version; nothing was changed.
        """
        folder = Folder(root_of(root), create=create)
        lock = -1
        try:
            if not folder.exists(CATALOG):
                if _has_manifests(folder):
                    raise CatalogCorrupt(f"{shown(folder.path(CATALOG))}: gone; the blobs are untouched{ADVICE}")
                if not create:
                    raise StoreNotFound(f"{shown(folder.root)}: not a fastcas store (no {CATALOG})")
            lock = _lock.acquire(folder) if lock_fd is None else _lock.adopt(folder, lock_fd)
            for name in (BLOB_DIR, MANIFEST_DIR, QUARANTINE_DIR):
                folder.make_dir(name)
            folder.sweep_temps()
            catalog = Catalog(folder.path(CATALOG), create=create)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            folder.close()
            raise
        store = cls(Core(folder, catalog), lock)
        try:
            _maintain.forget_growing(store._core)
            folder.make_reserve()
        except BaseException:
            store.close()
            raise
        return store

    @staticmethod
    def rebuild(root: str | os.PathLike[str], *, progress: Progress | None = None) -> RebuildReport:
        """Make a new catalog from manifests and blobs alone; names and pins from the old one where it can be read.

        Every chunk is read and checked against its hash. The old catalog stays in quarantine/.

        Args:
            root: The folder, or its `hashed_files`.
            progress: Called with (bytes done, bytes total).
        Raises:
            StoreNotFound: No such folder, or nothing of a store in it.
            StoreLocked: A node or command works on it.
            StoreFull, StoreError, PermissionDenied: Writing failed; the old catalog is as it was.
        Cost: one read of everything that is stored.
        """
        folder = Folder(root_of(root), create=False)
        lock = -1
        try:
            if not folder.exists(CATALOG) and not _has_manifests(folder):
                raise StoreNotFound(f"{shown(folder.root)}: not a fastcas store (no {CATALOG}, no manifests)")
            lock = _lock.acquire(folder)
            for name in (BLOB_DIR, MANIFEST_DIR, QUARANTINE_DIR):
                folder.make_dir(name)
            folder.sweep_temps()
            return _rebuild(folder, progress)
        finally:
            if lock >= 0:
                os.close(lock)
            folder.close()

    def close(self) -> None:
        """Close everything and give the lock up (unless others share it). Idempotent."""
        if self._lock_fd >= 0:
            self._core.close()
            self._core.folder.close()
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """The storage folder, absolute."""
        return self._core.folder.root

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, for a child to inherit; -1 once closed."""
        return self._lock_fd

    @property
    def listener(self) -> StoreListener | None:
        """Who is told, after each commit and in the calling thread, what became live or went away."""
        return self._core.listener

    @listener.setter
    def listener(self, listener: StoreListener | None) -> None:
        self._core.listener = listener

    def identity(self) -> bytes:
        """Return the node's 32-byte Ed25519 seed from node.key (mode 0600), made on first use.

        Raises:
            PermissionDenied, StoreError: It cannot be read, or is not 32 bytes.
        """
        if self._identity is None:
            folder = self._core.folder
            if not folder.exists(KEY):
                folder.write_file(".", KEY, secrets.token_bytes(32), 0o600)
            fd = folder.open(KEY)
            try:
                if os.fstat(fd).st_mode & 0o077:
                    raise PermissionDenied(f"{shown(folder.path(KEY))}: readable by others, expected mode 0600")
                seed = os.pread(fd, 33, 0)
            finally:
                os.close(fd)
            if len(seed) != 32:
                raise StoreError(f"{shown(folder.path(KEY))}: expected 32 B, got {len(seed)} B")
            self._identity = seed
        return self._identity

    # --- quota ---

    @property
    def quota(self) -> Quota:
        """The limit of this folder, reservations, and who waits for workers and hears of evictions."""
        return self._quota

    @contextlib.contextmanager
    def _admit_manifest(self, manifest: Manifest) -> Iterator[None]:
        """A manifest must fit by itself: whoever wants its file has reserved more. Raises StoreFull."""
        bound = manifest_bound(len(manifest.data))
        with self._quota.admit(bound, held=True) as budget:
            if budget is not None and budget < bound and self._core.catalog.manifest(manifest.manifest_hash) is None:
                raise StoreFull(
                    f"manifest {short(manifest.manifest_hash)}: {bound} B more than the quota of {self._quota.limit} B "
                    "allows; it was not kept"
                )
            yield

    # --- storing ---

    def store_file(
        self,
        path: str | os.PathLike[str],
        *,
        fd: int | None = None,
        name: str | None = None,
        chunk_size: int | None = None,
        chunking: str = FIXED,
        parity: tuple[int, int] | None = None,
        in_place: bool = False,
        progress: Progress | None = None,
    ) -> StoredFile:
        """Store one file. It is read once; chunks that owned blobs hold already are not written again.

        Args:
            path: The file; for messages, its name, and for seeding in place.
            fd: Open for reading, the caller's; None: `path` is opened.
            name: The name to keep, None: the path's last component.
            chunk_size: Bytes per chunk, cut by content of the average one; None: automatic.
            chunking: "fixed", or "cdc": cut by content, so that another version shares what did not change.
            parity: (k, m), None: no parity.
            in_place: Seed from the user's file; nothing but parity is copied.
            progress: Called with (bytes done, bytes total).
        Raises:
            FileChanged: It changed while it was read; nothing was stored.
            NotFound, PermissionDenied, UsageError: The path; or it is not a regular file.
            StoreFull, StoreError: Writing failed; nothing was stored.
        Cost: one pass of two interleaved SHA-256, one write of new chunks, four fsyncs.
        """
        absolute = os.path.realpath(path)
        if fd is None:
            source = FileSource(open_user_file(path), shown(path), os.fsencode(absolute))
        else:
            source = FileSource(fd, shown(path), os.fsencode(absolute), owned=False)
        try:
            assert source.identity is not None
            if in_place:
                self._check_same(absolute, source)
                _linked.make_way(self._core, os.fsencode(absolute), source.identity)
            title = name or shown(os.path.basename(absolute))
            bound = ingest_bound(source.size, chunk_size, parity, chunking=chunking, in_place=in_place)
            with self._quota.admit(bound, title) as budget, _ingest.Ingest(self._core, budget) as ingest:
                staged = ingest.add(
                    source, chunk_size=chunk_size, chunking=chunking, parity=parity, in_place=in_place,
                    progress=progress,
                )  # fmt: skip
                if in_place:
                    self._check_same(absolute, source)
                entry = _ingest.Entry(staged, title)
                ingest.publish([entry])
        finally:
            source.close()
        return _ingest.stored_file(entry)

    @staticmethod
    def _check_same(absolute: str, source: FileSource) -> None:
        try:
            info = os.stat(absolute)
        except OSError as exc:
            raise FileChanged(f"{source.label}: not at its path any more; nothing of it was stored") from exc
        if source.identity is None or (info.st_dev, info.st_ino) != (source.identity.device, source.identity.inode):
            raise FileChanged(f"{source.label}: another file is at this path; nothing of it was stored")

    def store_tree(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        chunk_size: int | None = None,
        chunking: str = FIXED,
        parity: tuple[int, int] | None = None,
        in_place: bool = False,
        posix_names: bool = False,
        progress: Progress | None = None,
    ) -> StoredFile:
        """Store a directory as a collection; its file_hash is the collection's.

        Args:
            path: The directory.
            name: The name to keep, None: the path's last component.
            chunk_size: Bytes per chunk of every file, cut by content of the average one; None: automatic for each.
            chunking: "fixed", or "cdc": every file is cut by content.
            parity: (k, m) for every file, None: no parity.
            in_place: Seed files over 64 KiB from where they are; smaller ones are packed all the same.
            posix_names: Allow names that other systems cannot have.
            progress: Called with (bytes done, bytes total).
        Raises:
            UsageError: Something in it cannot be stored; all such names are listed, nothing was stored.
            FileChanged, StoreFull, StoreError, PermissionDenied: As for `store_file`; nothing was stored.
        """
        return _tree.store_tree(
            self._core, self._quota, path, name=name, chunk_size=chunk_size, chunking=chunking, parity=parity,
            in_place=in_place,
            posix_names=posix_names, progress=progress,
        )  # fmt: skip

    def begin_linked(self, path: str | os.PathLike[str], manifest: Manifest) -> int:
        """Give a part file a blob number of its own and keep its manifest, so that it can seed while it grows.

        The caller tells the table about the blob (growing) and its chunks; the listener hears of the manifest
        only. The number is forgotten by `register_linked` of the same inode, `abandon_linked`, or at the next
        open.
        """
        with self._admit_manifest(manifest):
            return _linked.begin_linked(self._core, path, manifest)

    def abandon_linked(self, number: int) -> None:
        """Forget a part file's blob; the listener hears of its removal."""
        _maintain.forget_growing(self._core, [number])

    def register_linked(
        self, path: str | os.PathLike[str], manifest: Manifest, name: str, *, verified: bool = True
    ) -> StoredFile:
        """Seed a finished file in place.

        Args:
            path: Where it is; its device, inode, size and mtime are recorded.
            manifest: Its manifest.
            name: The name to keep.
            verified: The caller has checked every chunk; else it is read and checked here.
        Raises:
            FileChanged: Size or bytes are not the manifest's.
        """
        with self._admit_manifest(manifest):
            return _linked.register_linked(self._core, path, manifest, name, verified=verified)

    def register_tree(
        self,
        path: str | os.PathLike[str],
        collection: Collection,
        manifest: Manifest,
        name: str,
        *,
        members: Mapping[bytes, Manifest],
        identities: Mapping[str, Identity],
        progress: Progress | None = None,
    ) -> StoredFile:
        """Serve a collection that was fetched: large files in place, the packs and the collection from owned blobs.

        Args:
            path: The folder with the collection's files.
            collection: What it is.
            manifest: Of the collection's content.
            name: The name to keep; members get none, and go with the collection.
            members: By manifest hash, of packs and large files; of one that is missing the automatic shape is tried.
            identities: By path, of the large files that are proven and need no second look while they have it.
            progress: Called with (bytes done, bytes total).
        Raises:
            FileChanged: The folder's files are not the collection's; nothing of it is served.
            UsageError: A pack holds bytes of no file.
            StoreFull, StoreError, NotFound, PermissionDenied: As for `store_tree`; nothing of it is served.
        Cost: one read and one write of the small files, one commit; no byte of the large files that are proven.
        """
        return _adopt.register_tree(
            self._core, self._quota, path, collection, manifest, name, members=members,
            identities=identities, progress=progress,
        )  # fmt: skip

    def add_manifest(self, manifest: Manifest) -> None:
        """Keep a manifest and report it. `gc` drops it again if neither a file nor a part file needs it."""
        with self._admit_manifest(manifest):
            _linked.add_manifest(self._core, manifest)

    # --- asking ---

    def manifest(self, manifest_hash: bytes) -> Manifest | None:
        """Return a manifest, None if it is not here.

        Raises:
            ManifestCorrupt: Its bytes on disk are damaged.
        """
        row = self._core.catalog.manifest(manifest_hash)
        return None if row is None else self._core.load_manifest(row)

    def manifests_of(self, file_hash: bytes) -> list[Manifest]:
        """Return the readable manifests of a file, those with all data chunks here first."""
        rows = self._core.catalog.manifests(file_hash)
        return [manifest for row in rows if (manifest := self._core.try_manifest(row)) is not None]

    def files(self) -> list[FileRow]:
        """Return every file, members of collections included, the latest first."""
        return _listing.file_rows(self._core)

    def file(self, file_hash: bytes) -> FileRow | None:
        """Return one file, None if it is not known."""
        return _listing.file_row(self._core, file_hash)

    def pin(self, file_hash: bytes, pinned: bool = True) -> bool:
        """Keep a file whatever happens to its names, or no longer. Returns False if it is not known."""
        return _listing.pin(self._core, file_hash, pinned)

    def touch(self, file_hashes: Iterable[bytes]) -> None:
        """Note that files were asked for now; eviction takes the longest unused first."""
        _listing.touch(self._core, file_hashes, int(time.time()))

    def has_chunk(self, key: bytes) -> bool:
        """Whether the catalog knows an extent of the chunk."""
        return bool(self._core.catalog.present([key]))

    def find_extents(self, key: bytes) -> list[Extent]:
        """Return every extent of a chunk, owned blobs first."""
        return [Extent(blob.number, offset, length) for blob, offset, length in self._core.catalog.extents_of(key)]

    def open_extent(self, key: bytes) -> tuple[int, int, int] | None:
        """Return (descriptor, offset, length) of a chunk, None if no blob that still fits has it.

        The descriptor is the store's: valid until the next call, never to be closed. The bytes are not checked.
        """
        for blob, offset, length in self._core.catalog.extents_of(key):
            fd = self._core.open_blob(blob)
            if fd is not None:
                return fd, offset, length
            _maintain.withdraw(self._core, blob, "changed or gone")
        return None

    def read_chunk(self, key: bytes) -> bytes | None:
        """Return a chunk's bytes, checked against its hash; None if no extent has them."""
        return self._core.read_chunk(key)

    def chunk_hashes(self) -> Iterator[bytes]:
        """Yield the hashes of all chunks here, sorted, without repeats, 32 bytes each, in batches."""
        for rows in self._core.catalog.scan("SELECT DISTINCT hash FROM extents ORDER BY hash", (), HASHES_PER_BATCH):
            yield b"".join([row[0] for row in rows])

    def stats(self) -> dict[str, int]:
        """Return counts and bytes.

        logical: content of all named files and members; stored: chunk bytes in owned blobs; linked: in users'
        files; shared: what the chunks of all files would take without sharing, less what they take; quota: the limit, 0
        for none; used: what counts against it, 0 without one.
        """
        used = self._quota.used() if self._quota.limit is not None else 0
        return _listing.stats(self._core) | {"quota": self._quota.limit or 0, "used": used}

    def load(self, listener: StoreListener) -> None:
        """Replay everything that is live to a listener, in large batches.

        A user's file that changed since it was linked is withdrawn first and never reported.
        """
        _maintain.load(self._core, listener)

    # --- keeping ---

    def remove(self, file_hash: bytes) -> bool:
        """Drop a file's names and manifests; `gc` then frees its chunks. False if it is not known."""
        return self._with_reserve(lambda: _maintain.remove(self._core, file_hash))

    def gc(self, barrier: Callable[[], None]) -> GcReport:
        """Free the chunks that no manifest needs: punch holes, unlink empty blobs.

        Args:
            barrier: Called after the listener heard what is gone (again, if the disk was full); returns when no
                response can still be reading it.
        Raises:
            ManifestCorrupt: A manifest cannot be read; nothing was freed.
        """
        report = self._with_reserve(lambda: _maintain.gc(self._core, barrier))
        self._quota.forget()
        self._core.folder.make_reserve()
        return report

    def _with_reserve(self, call: Callable[[], _T]) -> _T:
        """Run what frees space; where even that needs some, give up the reserve and run it again."""
        try:
            return call()
        except StoreFull:
            if not self._core.folder.spend_reserve():
                raise
            return call()

    def verify(
        self,
        *,
        repair: bool = False,
        fetch: Callable[[bytes], bytes | None] | None = None,
        progress: Progress | None = None,
        subset: tuple[int, int] | None = None,
    ) -> VerifyReport:
        """Read every chunk and manifest and check it against its hash.

        Args:
            repair: Replace damaged chunks from another copy, from parity, or from `fetch`; never writes a user's
                file. Damaged bytes are kept in quarantine/.
            fetch: Called with the hash of a chunk or manifest; returns its bytes or None.
            progress: Called with (bytes done, bytes total).
            subset: (i, n): only the i-th of n parts, 1 <= i <= n, by chunk hash.
        Raises:
            UsageError: `subset` is out of range.
        """
        with self.scrub(repair=repair, ask=fetch is not None, subset=subset) as scrub:
            while scrub.step():
                while wanted := scrub.requests():
                    for item in wanted:
                        scrub.give(item, fetch(item.hash) if fetch is not None else None)
                if progress is not None:
                    progress(scrub.report.bytes, max(scrub.total, scrub.report.bytes))
            if progress is not None:
                progress(scrub.report.bytes, scrub.report.bytes)
            return scrub.report

    def scrub(
        self,
        *,
        repair: bool = False,
        ask: bool = False,
        subset: tuple[int, int] | None = None,
        name: str | None = None,
        restart: bool = False,
    ) -> Scrub:
        """Begin a verification that goes on in slices, between which the store does other work.

        Args:
            repair, subset: As for `verify`.
            ask: What this machine cannot heal is asked for by `Scrub.requests`.
            name: Under which it can be gone on with, by another scrub of that name, after an interruption.
            restart: Begin at the start all the same.
        Raises:
            UsageError: `subset` is out of range.
        """
        if subset is not None and not 1 <= subset[0] <= subset[1]:
            raise UsageError(f"subset: expected I/N with 1 <= I <= N, got {subset[0]}/{subset[1]}")
        return Scrub(self._core, repair=repair, ask=ask, subset=subset, name=name, restart=restart)

    def fact(self, key: str) -> bytes | None:
        """Return what was remembered under a key."""
        return self._core.catalog.fact(key)

    def remember(self, key: str, value: bytes | None) -> None:
        """Remember a small value across restarts, None: forget it."""
        self._core.catalog.remember(key, value)

    def incomplete(self) -> list[Manifest]:
        """Return the manifests of files that lack data chunks, as far as they can be read."""
        rows = self._core.catalog.query(
            "SELECT m.hash FROM files f JOIN manifests m ON m.hash=f.manifest WHERE NOT m.complete"
        )
        found = (self._core.catalog.manifest(row[0]) for row in rows)
        return [m for row in found if row is not None and (m := self._core.try_manifest(row)) is not None]

    def withdraw_blob(self, number: int, reason: str) -> None:
        """Stop believing a blob that a worker found changed, shortened or gone. Unknown numbers are ignored.

        A user's file is forgotten; of an owned blob, the extents that do not fit its file any more are dropped.
        """
        blob = self._core.catalog.blob(number)
        if blob is not None:
            _maintain.withdraw(self._core, blob, reason)

    def migrate(self, old_dir: str | os.PathLike[str], *, progress: Progress | None = None) -> MigrateReport:
        """Import the older layout (`hashed_files/<hash>` with `cas_index.json`); see docs/MIGRATION_GUIDE.md.

        Every byte is checked against its name; what is left out is in the report.
        Raises:
            NotFound: No such folder, or no index in it.
            UsageError: The index is not one of the accepted shapes.
        """
        return _migrate.migrate(self._core, self._quota, old_dir, progress)

    def index_json(self) -> dict[str, object]:
        """Return what `cas_index.json` of the older layout would say about this store."""
        return _migrate.index_json(self._core)


def _has_manifests(folder: Folder) -> bool:
    return any(
        folder.names(f"{MANIFEST_DIR}/{prefix}") for prefix in folder.names(MANIFEST_DIR) if len(prefix) == 2
    )
