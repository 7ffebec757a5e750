"""The catalog: the SQLite database that is the durable truth about what lies where.

Schema version 1 (`PRAGMA user_version`), application id "FCAS". WAL, synchronous=FULL, exclusive locking: the
folder's flock allows one process anyway, and this way no shared-memory file is needed.

    blobs      number (never used twice), kind, path (relative to the root; absolute for the user's own files),
               identity of a user's file, size (of an owned blob: bytes of chunks)
    extents    (blob, offset, length) -> chunk hash; a chunk may have several
    manifests  hash -> file, blob, shape, and whether every data chunk has an extent
    files      content hash -> the manifest that it is served under
    names, pins, members (collection -> manifests of its files), garbage (ranges to be freed after the barrier)
    lost       chunks of owned blobs that were found damaged or gone and are not back yet
    used       file -> when it was last asked for, seconds since 1970; eviction goes by it
    meta       catalog_id; where an interrupted verification stopped

Device and inode numbers are unsigned 64-bit; SQLite's are signed: they are stored as two's complement.
Never: touches a blob. Every sqlite3 error becomes one of ours here.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from fastcas.errors import CatalogCorrupt, FastCASError, PermissionDenied, StoreError, StoreFull, StoreLocked
from fastcas.store.paths import shown
from fastcas.store.types import Identity

__all__ = ["ADVICE", "GROWING", "LINKED", "MANIFEST", "OWNED", "BlobRow", "Catalog", "ManifestRow"]

SCHEMA_VERSION = 1
APPLICATION_ID = 0x46434153
ADVICE = "; `fastcas rebuild` makes a new catalog from manifests and blobs"
CHECKED_B = 16 << 20  # a catalog up to this size is checked whole when it is opened, in about 50 ms
OWNED, LINKED, GROWING, MANIFEST = range(4)
BATCH = 500  # keys per IN (...)
LOAD_BATCH = 65_536  # rows per step of a replay

SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE blobs(
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind INTEGER NOT NULL, path BLOB NOT NULL UNIQUE,
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    manifest BLOB);
CREATE INDEX blobs_by_manifest ON blobs(manifest) WHERE manifest IS NOT NULL;
CREATE TABLE extents(
    blob INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY(blob, offset, length)) WITHOUT ROWID;
CREATE INDEX extents_by_hash ON extents(hash);
CREATE TABLE manifests(
    hash BLOB PRIMARY KEY, file BLOB NOT NULL, blob INTEGER NOT NULL, length INTEGER NOT NULL,
    chunk_size INTEGER NOT NULL, n_chunks INTEGER NOT NULL, n_parity INTEGER NOT NULL,
    complete INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX manifests_by_file ON manifests(file);
CREATE TABLE files(
    hash BLOB PRIMARY KEY, manifest BLOB NOT NULL, size INTEGER NOT NULL, stored_at INTEGER NOT NULL,
    is_collection INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE names(
    file BLOB NOT NULL, name TEXT NOT NULL, stored_at INTEGER NOT NULL, PRIMARY KEY(file, name)) WITHOUT ROWID;
CREATE TABLE pins(file BLOB PRIMARY KEY, pinned_at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE members(
    collection BLOB NOT NULL, manifest BLOB NOT NULL, PRIMARY KEY(collection, manifest)) WITHOUT ROWID;
CREATE INDEX members_by_manifest ON members(manifest);
CREATE TABLE garbage(
    blob INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY(blob, offset, length)) WITHOUT ROWID;
"""
# Also made in catalogs that were written without them; they remember lost parity, and when files were used.
LATER = (
    "CREATE TABLE IF NOT EXISTS lost(hash BLOB PRIMARY KEY, length INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS used(file BLOB PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class BlobRow:
    """One blob. `path` as stored; `identity` means something for LINKED and GROWING only."""

    number: int
    kind: int
    path: bytes
    identity: Identity
    manifest: bytes | None

    @property
    def size(self) -> int:
        """Bytes that must be there."""
        return self.identity.size


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One manifest and where its bytes lie."""

    hash: bytes
    file_hash: bytes
    blob: int
    length: int
    chunk_size: int
    n_chunks: int
    n_parity: int
    complete: bool


def _signed(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _unsigned(number: int) -> int:
    return number % (1 << 64)


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _blob_row(row: tuple[int, int, bytes, int, int, int, int, bytes | None]) -> BlobRow:
    number, kind, path, device, inode, size, mtime_ns, manifest = row
    return BlobRow(number, kind, path, Identity(_unsigned(device), _unsigned(inode), size, mtime_ns), manifest)


def _manifest_row(row: tuple[bytes, bytes, int, int, int, int, int, int]) -> ManifestRow:
    return ManifestRow(row[0], row[1], row[2], row[3], row[4], row[5], row[6], bool(row[7]))


_BLOB_COLUMNS = "number, kind, path, device, inode, size, mtime_ns, manifest"
_MANIFEST_COLUMNS = "hash, file, blob, length, chunk_size, n_chunks, n_parity, complete"


class _Errors:
    """Turns what goes wrong in the block into ours; a class, because a store of many files enters thousands."""

    __slots__ = ("_action", "_catalog")

    def __init__(self, catalog: Catalog, action: str) -> None:
        self._catalog, self._action = catalog, action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, sqlite3.Error):
            raise self._catalog.translate(exc, self._action) from exc
        if isinstance(exc, OSError):
            raise PermissionDenied(f"{shown(self._catalog.path)}: {exc.strerror} while {self._action}") from exc


class Catalog:
    """Typed queries on catalog.db. Writes only inside `transaction()`.

    Args:
        path: The database file.
        create: Make it if it is missing.
    Raises:
        CatalogCorrupt: Not a catalog, damaged, or of a newer version; it is left as it is.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        with self._errors("opening it"):
            if create and not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            self._db = sqlite3.connect(
                f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False, timeout=2.0
            )
        try:
            with self._errors("opening it"):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise StoreError(f"{shown(self.path)}: the file system does not support SQLite's WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA cache_size=-65536")
        db.execute("PRAGMA temp_store=MEMORY")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        empty = not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if version == 0 and empty:
            db.executescript(
                f"BEGIN IMMEDIATE;{SCHEMA}"
                f"INSERT INTO meta VALUES('catalog_id', x'{secrets.token_hex(16)}');"
                f"PRAGMA application_id={APPLICATION_ID};PRAGMA user_version={SCHEMA_VERSION};COMMIT;"
            )
        elif db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise CatalogCorrupt(f"{shown(self.path)}: not a fastcas catalog; it was left as it is{ADVICE}")
        elif version != SCHEMA_VERSION:
            raise CatalogCorrupt(
                f"{shown(self.path)}: schema version {version}, expected {SCHEMA_VERSION}; it was left as it is"
            )
        if self.path.stat().st_size <= CHECKED_B:
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                what = " ".join(str(found).split())
                raise CatalogCorrupt(f"{shown(self.path)}: damaged ({what}); the blobs are untouched{ADVICE}")
        row = db.execute("SELECT value FROM meta WHERE key='catalog_id'").fetchone()
        if row is None or len(row[0]) != 16:
            raise CatalogCorrupt(f"{shown(self.path)}: no catalog id; the blobs are untouched{ADVICE}")
        self.catalog_id: bytes = row[0]
        for statement in LATER:
            db.execute(statement)

    def close(self) -> None:
        """Close the database. Idempotent."""
        self._db.close()

    def _errors(self, action: str) -> _Errors:
        return _Errors(self, action)

    def translate(self, exc: sqlite3.Error, action: str) -> FastCASError:
        """Return our error for one of SQLite's met while doing `action`."""
        who = shown(self.path)
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return StoreFull(f"{who}: no space left on the disk while {action}; the catalog is as before")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            return PermissionDenied(f"{who}: {exc} while {action}; the catalog is as before")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreLocked(f"{who}: in use by another process")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA):
            return CatalogCorrupt(f"{who}: damaged ({exc}) while {action}; the blobs are untouched{ADVICE}")
        if isinstance(exc, sqlite3.OperationalError) and "no such" in str(exc):
            return CatalogCorrupt(f"{who}: damaged ({exc}) while {action}; the blobs are untouched{ADVICE}")
        return StoreError(f"{who}: {exc} while {action}; the catalog is as before")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes of the block are durable together when it ends, or none of them happened."""
        with self._errors("writing to it"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise

    def query(self, sql: str, args: Sequence[object] = ()) -> list[tuple]:  # type: ignore[type-arg]
        """Return all rows of a SELECT."""
        with self._errors("reading it"):
            return self._db.execute(sql, args).fetchall()

    def value(self, sql: str, args: Sequence[object] = ()) -> int:
        """Return the one number of a SELECT, 0 for NULL."""
        with self._errors("reading it"):
            return int(self._db.execute(sql, args).fetchone()[0] or 0)

    def execute(self, sql: str, args: Sequence[object] = ()) -> int:
        """Run one statement inside a transaction; returns how many rows it changed."""
        with self._errors("writing to it"):
            return self._db.execute(sql, args).rowcount

    def many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Run one statement for many rows inside a transaction."""
        with self._errors("writing to it"):
            self._db.executemany(sql, rows)

    # --- small facts ---

    def fact(self, key: str) -> bytes | None:
        """Return what was remembered under a key."""
        rows = self.query("SELECT value FROM meta WHERE key=?", (key,))
        return bytes(rows[0][0]) if rows else None

    def remember(self, key: str, value: bytes | None) -> None:
        """Remember a small value under a key, or (None) forget it. A transaction of its own."""
        with self.transaction():
            if value is None:
                self.execute("DELETE FROM meta WHERE key=?", (key,))
            else:
                self.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (key, value))

    # --- blobs ---

    def add_blob(self, kind: int, path: bytes, identity: Identity, manifest: bytes | None = None) -> int:
        """Insert a blob; returns its number, which was never used before."""
        with self._errors("writing to it"):
            cursor = self._db.execute(
                "INSERT INTO blobs(kind, path, device, inode, size, mtime_ns, manifest) VALUES(?,?,?,?,?,?,?)",
                (kind, path, _signed(identity.device), _signed(identity.inode), identity.size, identity.mtime_ns,
                 manifest),
            )  # fmt: skip
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def blob(self, number: int) -> BlobRow | None:
        """Return blob `number`."""
        rows = self.query(f"SELECT {_BLOB_COLUMNS} FROM blobs WHERE number=?", (number,))
        return _blob_row(rows[0]) if rows else None

    def blob_at(self, path: bytes) -> BlobRow | None:
        """Return the blob of a path."""
        rows = self.query(f"SELECT {_BLOB_COLUMNS} FROM blobs WHERE path=?", (path,))
        return _blob_row(rows[0]) if rows else None

    def taken(self, paths: Sequence[bytes]) -> set[bytes]:
        """Return which of the paths belong to blobs."""
        found: set[bytes] = set()
        for at in range(0, len(paths), BATCH):
            part = paths[at : at + BATCH]
            found.update(row[0] for row in self.query(f"SELECT path FROM blobs WHERE path IN ({_marks(part)})", part))
        return found

    def blobs(self, *kinds: int) -> list[BlobRow]:
        """Return all blobs of these kinds, by number."""
        rows = self.query(f"SELECT {_BLOB_COLUMNS} FROM blobs WHERE kind IN ({_marks(kinds)}) ORDER BY number", kinds)
        return [_blob_row(row) for row in rows]

    def has_extents(self, blob: int) -> bool:
        """Whether any chunk lies in the blob."""
        return bool(self.value("SELECT EXISTS(SELECT 1 FROM extents WHERE blob=?)", (blob,)))

    # --- chunks ---

    def add_extents(self, blob: int, keys: bytes | bytearray, offsets: array[int], lengths: array[int]) -> None:
        """Insert extents of one blob; `keys` is 32 bytes each. Existing ones are replaced."""
        data = bytes(keys)
        hashes = [data[at : at + 32] for at in range(0, len(data), 32)]
        self.many(
            "INSERT OR REPLACE INTO extents VALUES(?,?,?,?)",
            zip(repeat(blob, len(hashes)), offsets, lengths, hashes, strict=True),
        )

    def extents_of(self, key: bytes) -> list[tuple[BlobRow, int, int]]:
        """Return (blob, offset, length) of each extent of a chunk, owned blobs first."""
        rows = self.query(
            "SELECT b.number, b.kind, b.path, b.device, b.inode, b.size, b.mtime_ns, b.manifest, e.offset, e.length"
            " FROM extents e JOIN blobs b ON b.number=e.blob WHERE e.hash=? ORDER BY b.kind, b.number, e.offset",
            (key,),
        )
        return [(_blob_row(row[:8]), row[8], row[9]) for row in rows]

    def owned(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Return which of the keys lie in owned blobs, and in which one."""
        found: dict[bytes, int] = {}
        for at in range(0, len(keys), BATCH):
            part = keys[at : at + BATCH]
            found.update(
                self.query(
                    "SELECT e.hash, e.blob FROM extents e JOIN blobs b ON b.number=e.blob"
                    f" WHERE b.kind=0 AND e.hash IN ({_marks(part)})",
                    part,
                )
            )
        return found

    def present(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return which of the keys have an extent anywhere."""
        found: set[bytes] = set()
        for at in range(0, len(keys), BATCH):
            part = keys[at : at + BATCH]
            rows = self.query(f"SELECT hash FROM extents WHERE hash IN ({_marks(part)})", part)
            found.update(row[0] for row in rows)
        return found

    def scan(self, sql: str, args: Sequence[object] = (), batch: int = LOAD_BATCH) -> Iterator[list[tuple]]:  # type: ignore[type-arg]
        """Yield a SELECT's rows in batches. The tables it reads must not be written meanwhile."""
        with self._errors("reading it"):
            cursor = self._db.execute(sql, args)
            try:
                while rows := cursor.fetchmany(batch):
                    yield rows
            finally:
                cursor.close()

    # --- manifests and files ---

    def manifest(self, manifest_hash: bytes) -> ManifestRow | None:
        """Return a manifest's row."""
        rows = self.query(f"SELECT {_MANIFEST_COLUMNS} FROM manifests WHERE hash=?", (manifest_hash,))
        return _manifest_row(rows[0]) if rows else None

    def manifests(self, file_hash: bytes | None = None) -> list[ManifestRow]:
        """Return the manifests of one file, complete ones first, or all of them."""
        where, args = ("", ()) if file_hash is None else (" WHERE file=?", (file_hash,))
        rows = self.query(f"SELECT {_MANIFEST_COLUMNS} FROM manifests{where} ORDER BY complete DESC, hash", args)
        return [_manifest_row(row) for row in rows]

    def put_manifest(self, row: ManifestRow) -> None:
        """Insert or replace a manifest's row."""
        self.execute(
            "INSERT OR REPLACE INTO manifests VALUES(?,?,?,?,?,?,?,?)",
            (row.hash, row.file_hash, row.blob, row.length, row.chunk_size, row.n_chunks, row.n_parity, row.complete),
        )

    def put_file(
        self, file_hash: bytes, manifest_hash: bytes, size: int, stored_at: int, is_collection: bool, name: str | None
    ) -> None:
        """Insert a file, or move it to another manifest; adds the name unless it is None."""
        self.execute(
            "INSERT INTO files VALUES(?,?,?,?,?) ON CONFLICT(hash) DO UPDATE SET manifest=excluded.manifest",
            (file_hash, manifest_hash, size, stored_at, is_collection),
        )
        if name is not None:
            self.execute("INSERT OR REPLACE INTO names VALUES(?,?,?)", (file_hash, name, stored_at))
