"""What the catalog says about files: rows for people, pins, when each was last used, and the sums of `status`."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastcas.ids import Link
from fastcas.store.catalog import LINKED, OWNED
from fastcas.store.core import Core
from fastcas.store.types import FileRow

__all__ = ["file_row", "file_rows", "pin", "stats", "touch"]

_FILES = """
SELECT f.hash, f.manifest,
    (SELECT name FROM names WHERE file=f.hash ORDER BY stored_at DESC, name LIMIT 1),
    f.size, m.chunk_size, m.n_chunks, m.n_parity, f.stored_at, f.is_collection,
    EXISTS(SELECT 1 FROM pins WHERE file=f.hash), m.complete,
    EXISTS(SELECT 1 FROM members WHERE manifest=f.manifest),
    (SELECT path FROM blobs WHERE kind=1 AND manifest=f.manifest LIMIT 1)
FROM files f JOIN manifests m ON m.hash=f.manifest
"""


def file_rows(core: Core) -> list[FileRow]:
    """Return every file, members of collections included, the latest first."""
    return [_row(row) for row in core.catalog.query(_FILES + " ORDER BY f.stored_at DESC, f.hash")]


def file_row(core: Core, file_hash: bytes) -> FileRow | None:
    """Return one file, None if it is not known."""
    rows = core.catalog.query(_FILES + " WHERE f.hash=?", (file_hash,))
    return _row(rows[0]) if rows else None


def pin(core: Core, file_hash: bytes, pinned: bool) -> bool:
    """Pin a file, or no longer. Returns False if it is not known."""
    if not core.catalog.query("SELECT 1 FROM files WHERE hash=?", (file_hash,)):
        return False
    with core.catalog.transaction():
        if pinned:
            core.catalog.execute("INSERT OR IGNORE INTO pins VALUES(?, strftime('%s', 'now'))", (file_hash,))
        else:
            core.catalog.execute("DELETE FROM pins WHERE file=?", (file_hash,))
    return True


def touch(core: Core, file_hashes: Iterable[bytes], at: int) -> None:
    """Note that files were asked for at a time (seconds since 1970); eviction takes the longest unused first."""
    with core.catalog.transaction():
        core.catalog.many(
            "INSERT OR REPLACE INTO used SELECT hash, ?2 FROM files WHERE hash=?1",
            ((file_hash, at) for file_hash in file_hashes),
        )


def stats(core: Core) -> dict[str, int]:
    """See `Store.stats`."""
    value = core.catalog.value
    by_kind = {
        kind: value("SELECT sum(length) FROM extents WHERE blob IN (SELECT number FROM blobs WHERE kind=?)", (kind,))
        for kind in (OWNED, LINKED)
    }
    logical = value("SELECT sum(size) FROM files")
    n_chunks, distinct = core.catalog.query(
        "SELECT count(*), sum(n) FROM (SELECT max(length) AS n FROM extents GROUP BY hash)"
    )[0]
    return {
        "logical": logical,
        "stored": by_kind[OWNED],
        "linked": by_kind[LINKED],
        "shared": max(0, logical - (distinct or 0)),
        "files": value("SELECT count(*) FROM files"),
        "incomplete": value("SELECT count(*) FROM files f JOIN manifests m ON m.hash=f.manifest WHERE NOT complete"),
        "chunks": n_chunks,
        "blobs": value("SELECT count(*) FROM blobs WHERE kind IN (0, 1)"),
        "manifests": value("SELECT count(*) FROM manifests"),
    }


def _row(row: tuple) -> FileRow:  # type: ignore[type-arg]
    file_hash, manifest_hash, name, size, chunk_size, n_chunks, n_parity, stored_at = row[:8]
    return FileRow(
        file_hash=file_hash,
        manifest_hash=manifest_hash,
        name=name or "",
        size=size,
        chunk_size=chunk_size,
        n_chunks=n_chunks,
        n_parity=n_parity,
        stored_at=stored_at,
        is_collection=bool(row[8]),
        pinned=bool(row[9]),
        is_complete=bool(row[10]),
        is_member=bool(row[11]),
        link=str(Link(file_hash, manifest_hash, name or None, size)),
        path=None if row[12] is None else os.fsdecode(row[12]),
    )
