"""Keeping catalog and disk in step: replay, withdrawal, removal, and giving space back.

What is kept: a file with a name or a pin, and every member of a collection that is kept. `remove` takes names and
manifests away; `gc` then frees the chunks that no manifest needs. A range is punched, or a blob unlinked, only
after the listener was told and the caller's barrier has passed (architecture §3): a response in flight would
otherwise carry zeros with a valid length. Holes that are due are rows in `garbage`, so a crash forgets none.
Never: writes or unlinks a user's own file.
"""

from __future__ import annotations

import logging
import os
import re
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fastcas.errors import CatalogCorrupt, FastCASError
from fastcas.store.blobs import check_index, open_for_change
from fastcas.store.catalog import GROWING, LINKED, MANIFEST, OWNED, BlobRow
from fastcas.store.core import Core, manifest_name
from fastcas.store.paths import BLOB_DIR, MANIFEST_DIR, is_held, os_errors, punch_hole
from fastcas.store.types import GcReport, StoreListener

__all__ = ["drop_extents", "forget_growing", "gc", "hide", "load", "remove", "renumber", "withdraw"]

log = logging.getLogger(__name__)

HELD_S = 2.0  # one gc waits at most so long for pages that somebody holds
HELD_POLL_S = 0.02
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)


def load(core: Core, listener: StoreListener) -> None:
    """Report everything that is live, in large batches: blobs and their chunks, manifests, files.

    A user's file that changed is withdrawn first. An owned blob that is gone or too short is not reported, nor is
    a file that needs it: scrub decides what becomes of it.
    Cost: one pass over the catalog, one stat per blob and manifest.
    """
    catalog = core.catalog
    for blob in catalog.blobs(LINKED):
        if core.stat_of(blob) is None:
            withdraw(core, blob, "changed or gone")
    twice: set[bytes] = set()
    n_distinct = catalog.value("SELECT count(DISTINCT hash) FROM extents")
    if catalog.value("SELECT count(*) FROM extents") != n_distinct:
        twice.update(row[0] for row in catalog.query("SELECT hash FROM extents GROUP BY hash HAVING count(*) > 1"))
    listener.on_load(
        n_distinct + catalog.value("SELECT (SELECT count(*) FROM manifests) + (SELECT count(*) FROM files)")
    )
    told: set[bytes] = set()
    unfit: list[int] = []
    before, core.listener = core.listener, listener
    try:
        for blob in catalog.blobs(OWNED, LINKED):
            if not catalog.has_extents(blob.number):
                continue
            if not core.say_blob(blob):
                log.warning("blob is gone or too short blob=%d", blob.number)
                unfit.append(blob.number)
                continue
            for rows in catalog.scan(
                "SELECT hash, offset, length FROM extents WHERE blob=? ORDER BY offset", (blob.number,)
            ):
                if twice:
                    rows = [row for row in rows if row[0] not in told]
                    told.update(twice.intersection(row[0] for row in rows))
                if rows:
                    keys, offsets, lengths = zip(*rows, strict=True)
                    listener.on_chunks(blob.number, b"".join(keys), array("Q", offsets), array("I", lengths))
        hidden = _needing(core, _only_in(core, unfit)) if unfit else set()
        live = {row.hash: row for row in catalog.manifests() if core.say_manifest(row)}
        for file_hash, manifest_hash in catalog.query("SELECT hash, manifest FROM files"):
            row = live.get(manifest_hash)
            if row is not None and row.complete and manifest_hash not in hidden:
                listener.on_file(file_hash, manifest_hash)
    finally:
        core.listener = before


def _only_in(core: Core, unfit: Sequence[int]) -> set[bytes]:
    """Return the chunks that lie in none but unfit blobs."""
    keys: set[bytes] = set()
    for number in unfit:
        keys.update(row[0] for row in core.catalog.query("SELECT hash FROM extents WHERE blob=?", (number,)))
    return {key for key in keys if all(blob.number in unfit for blob, _, _ in core.catalog.extents_of(key))}


def _needing(core: Core, keys: set[bytes]) -> set[bytes]:
    """Return the complete manifests that list one of these chunks as data."""
    found = set()
    if keys:
        for row in core.catalog.manifests():
            manifest = core.try_manifest(row) if row.complete else None
            if manifest is not None and any(
                manifest.hashes[at : at + 32] in keys for at in range(0, len(manifest.hashes), 32)
            ):
                found.add(row.hash)
    return found


def drop_extents(
    core: Core, blob: BlobRow, extents: Iterable[tuple[int, int, bytes]] | None = None, *, forget: bool = False
) -> None:
    """Take (offset, length, hash) extents of a blob, or all of them, out of the catalog and tell the listener.

    Files that are not whole without them become incomplete. Ranges of an owned blob become garbage for `gc`, its
    chunks are remembered as lost until they are back.

    Args:
        forget: Delete the blob's row as well.
    """
    catalog = core.catalog
    rows: list[tuple[int, int, bytes]]
    if extents is None:
        rows = catalog.query("SELECT offset, length, hash FROM extents WHERE blob=?", (blob.number,))
    else:
        rows = list(extents)
    keys = [row[2] for row in rows]
    with catalog.transaction():
        catalog.many(
            "DELETE FROM extents WHERE blob=? AND offset=? AND length=?", ((blob.number, o, n) for o, n, _ in rows)
        )
        if blob.kind == OWNED:
            if not forget:
                catalog.many("INSERT OR IGNORE INTO garbage VALUES(?,?,?)", ((blob.number, o, n) for o, n, _ in rows))
            catalog.many("INSERT OR IGNORE INTO lost VALUES(?,?)", ((key, n) for _, n, key in rows))
        if forget:
            catalog.execute("DELETE FROM blobs WHERE number=?", (blob.number,))
            catalog.execute("DELETE FROM garbage WHERE blob=?", (blob.number,))
        lost = set(keys) - catalog.present(list(dict.fromkeys(keys)))
        moved, gone = _mark_incomplete(core, _needing(core, lost))
    core.forget_fd(blob.number)
    core.say_moved_or_lost(keys)
    listener = core.listener
    if listener is not None:
        for file_hash, manifest_hash in moved:
            listener.on_file(file_hash, manifest_hash)
        for file_hash in gone:
            listener.on_file_removed(file_hash)
        if forget:
            listener.on_blob_removed(blob.number)


def _mark_incomplete(core: Core, manifests: Iterable[bytes]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """Mark manifests; returns files that moved to another complete one, and files that have none left."""
    catalog = core.catalog
    moved, gone = [], []
    for manifest_hash in manifests:
        catalog.execute("UPDATE manifests SET complete=0 WHERE hash=?", (manifest_hash,))
    for manifest_hash in manifests:
        for (file_hash,) in catalog.query("SELECT hash FROM files WHERE manifest=?", (manifest_hash,)):
            best = catalog.manifests(file_hash)[0]
            if best.complete:
                catalog.execute("UPDATE files SET manifest=? WHERE hash=?", (best.hash, file_hash))
                moved.append((file_hash, best.hash))
            else:
                gone.append(file_hash)
    return moved, gone


def hide(core: Core, manifest_hash: bytes) -> None:
    """Mark a manifest incomplete whose chunks went while it could not be read, and tell the listener."""
    with core.catalog.transaction():
        moved, gone = _mark_incomplete(core, [manifest_hash])
    if core.listener is not None:
        for file_hash, other in moved:
            core.listener.on_file(file_hash, other)
        for file_hash in gone:
            core.listener.on_file_removed(file_hash)


def withdraw(core: Core, blob: BlobRow, reason: str) -> None:
    """Stop believing a blob. A user's file is forgotten; of an owned one, what no longer fits is dropped."""
    log.warning("blob withdrawn blob=%d reason=%s", blob.number, reason)
    if blob.kind in (LINKED, GROWING):
        drop_extents(core, blob, forget=True)
        return
    if blob.kind != OWNED or core.stat_of(blob) is not None:
        return
    try:
        size = os.stat(blob.path, dir_fd=core.folder.fd, follow_symlinks=False).st_size
    except OSError:
        size = 0
    rows = core.catalog.query(
        "SELECT offset, length, hash FROM extents WHERE blob=? AND offset + length > ?", (blob.number, size)
    )
    drop_extents(core, blob, rows)
    left = core.catalog.value("SELECT max(offset + length) FROM extents WHERE blob=?", (blob.number,))
    if left:
        renumber(core, blob, left)


def renumber(core: Core, blob: BlobRow, size: int) -> None:
    """Give a blob of ours whose file became another (shorter, or written anew) a new number and size.

    Readers keep the old number's identity, so it is withdrawn, never changed.
    """
    catalog = core.catalog
    with catalog.transaction():
        catalog.execute("DELETE FROM blobs WHERE number=?", (blob.number,))
        number = catalog.add_blob(blob.kind, blob.path, replace(blob.identity, size=size), blob.manifest)
        for table in ("extents", "garbage", "manifests"):
            catalog.execute(f"UPDATE {table} SET blob=? WHERE blob=?", (number, blob.number))
    core.forget_fd(blob.number)
    fresh = catalog.blob(number)
    if fresh is not None and core.say_blob(fresh):
        core.say_chunks(number, catalog.query("SELECT hash, offset, length FROM extents WHERE blob=?", (number,)))
        for (manifest_hash,) in catalog.query("SELECT hash FROM manifests WHERE blob=?", (number,)):
            row = catalog.manifest(manifest_hash)
            if row is not None:
                core.say_manifest(row, new_blob=False)
                core.say_files_of(row)
    if core.listener is not None:
        core.listener.on_blob_removed(blob.number)


def forget_growing(core: Core, numbers: Iterable[int] | None = None) -> None:
    """Forget part files: those given, or all (at start: whoever wrote them is gone)."""
    catalog = core.catalog
    rows = catalog.blobs(GROWING)
    wanted = None if numbers is None else set(numbers)
    doomed = [blob for blob in rows if wanted is None or blob.number in wanted]
    if not doomed:
        return
    with catalog.transaction():
        catalog.many("DELETE FROM blobs WHERE number=?", ((blob.number,) for blob in doomed))
    for blob in doomed:
        core.forget_fd(blob.number)
        if core.listener is not None:
            core.listener.on_blob_removed(blob.number)


def remove(core: Core, file_hash: bytes) -> bool:
    """Drop a file's names, pin and manifests, and the collection members that nothing else keeps.

    A file that a kept collection needs loses only its names. Its chunks stay until `gc`; manifests leave the disk at
    once (readers have read them whole), so that a catalog made anew does not list the file again.

    Returns:
        False if the file is not known.
    """
    catalog = core.catalog
    if not catalog.query("SELECT 1 FROM files WHERE hash=?", (file_hash,)):
        return False
    gone: list[bytes] = []
    manifests: list[bytes] = []
    with catalog.transaction():
        catalog.execute("DELETE FROM names WHERE file=?", (file_hash,))
        catalog.execute("DELETE FROM pins WHERE file=?", (file_hash,))
        while doomed := catalog.query(
            "SELECT hash FROM files f WHERE NOT EXISTS(SELECT 1 FROM names WHERE file=f.hash)"
            " AND NOT EXISTS(SELECT 1 FROM pins WHERE file=f.hash)"
            " AND NOT EXISTS(SELECT 1 FROM manifests m JOIN members ON members.manifest=m.hash WHERE m.file=f.hash)"
        ):
            gone += [row[0] for row in doomed]
            for (doomed_hash,) in doomed:
                manifests += [row.hash for row in catalog.manifests(doomed_hash)]
            catalog.many("DELETE FROM members WHERE collection=?", doomed)
            catalog.many("DELETE FROM manifests WHERE file=?", doomed)
            catalog.many("DELETE FROM files WHERE hash=?", doomed)
    if core.listener is not None:
        for doomed_hash in gone:
            core.listener.on_file_removed(doomed_hash)
        for manifest_hash in manifests:
            core.listener.on_manifest_removed(manifest_hash)
    for manifest_hash in manifests:
        core.folder.discard(manifest_name(manifest_hash))
    return True


def gc(core: Core, barrier: Callable[[], None]) -> GcReport:
    """Free what no manifest needs.

    Args:
        barrier: Returns when no response can still read what the listener was told is gone.
    Raises:
        ManifestCorrupt: A manifest cannot be read, so what it needs is unknown; nothing was freed.
    """
    catalog, report = core.catalog, GcReport()
    _drop_loose_manifests(core, report)
    _mark(core)
    dead = catalog.query(
        "SELECT e.blob, e.offset, e.length, e.hash FROM extents e"
        " WHERE e.hash NOT IN (SELECT hash FROM temp.needed) ORDER BY e.blob, e.offset"
    )
    with catalog.transaction():
        catalog.many("DELETE FROM extents WHERE blob=? AND offset=? AND length=?", (row[:3] for row in dead))
        catalog.many(
            "INSERT OR IGNORE INTO garbage SELECT ?1, ?2, ?3 FROM blobs WHERE number=?1 AND kind=0",
            (row[:3] for row in dead),
        )
        catalog.execute("DELETE FROM lost WHERE hash NOT IN (SELECT hash FROM temp.needed)")
        catalog.execute("DELETE FROM temp.needed")
    report.chunks = len({row[3] for row in dead})
    core.say_moved_or_lost([row[3] for row in dead])
    empty = catalog.query(
        "SELECT number FROM blobs b WHERE kind IN (0, 1) AND NOT EXISTS(SELECT 1 FROM extents WHERE blob=b.number)"
        " AND NOT EXISTS(SELECT 1 FROM manifests WHERE hash=b.manifest AND n_chunks=0)"
    )
    stale = catalog.query(
        "SELECT number FROM blobs b WHERE kind=3 AND NOT EXISTS(SELECT 1 FROM manifests WHERE blob=b.number)"
    )
    doomed = [blob for (number,) in empty + stale if (blob := catalog.blob(number)) is not None]
    for blob in doomed:
        core.forget_fd(blob.number)
        if core.listener is not None:
            core.listener.on_blob_removed(blob.number)
    barrier()
    for blob in doomed:
        if blob.kind in (OWNED, MANIFEST):
            report.bytes_freed += blob.size if blob.kind == OWNED else 0
            report.blobs_unlinked += blob.kind == OWNED
            core.folder.unlink(os.fsdecode(blob.path))
    with catalog.transaction():
        catalog.many("DELETE FROM blobs WHERE number=?", ((blob.number,) for blob in doomed))
        catalog.many("DELETE FROM garbage WHERE blob=?", ((blob.number,) for blob in doomed))
    _punch(core, report)
    report.blobs_unlinked += _sweep_orphans(core)
    return report


def _drop_loose_manifests(core: Core, report: GcReport) -> None:
    """Drop manifests that belong to no file and to no part file."""
    catalog = core.catalog
    loose = catalog.query(
        "SELECT hash FROM manifests m WHERE NOT EXISTS(SELECT 1 FROM files WHERE hash=m.file)"
        " AND NOT EXISTS(SELECT 1 FROM blobs WHERE kind=2 AND manifest=m.hash)"
    )
    with catalog.transaction():
        catalog.many("DELETE FROM manifests WHERE hash=?", loose)
    report.manifests = len(loose)
    if core.listener is not None:
        for (manifest_hash,) in loose:
            core.listener.on_manifest_removed(manifest_hash)


def _mark(core: Core) -> None:
    """Fill temp.needed with every chunk that a manifest lists."""
    catalog = core.catalog
    catalog.execute("CREATE TEMP TABLE IF NOT EXISTS needed(hash BLOB PRIMARY KEY) WITHOUT ROWID")
    with catalog.transaction():
        catalog.execute("DELETE FROM temp.needed")
        for row in catalog.manifests():
            manifest = core.load_manifest(row)
            for hashes in (manifest.hashes, manifest.parity_hashes):
                needed = [hashes[at : at + 32] for at in range(0, len(hashes), 32)]
                catalog.many("INSERT OR IGNORE INTO temp.needed VALUES(?)", ((key,) for key in sorted(needed)))


def _punch(core: Core, report: GcReport) -> None:
    """Give back the ranges that are due in blobs that live on.

    What has left a worker may still be in a socket's queue: that is waited for, but not for ever (a mapping looks the
    same, and a client may never read; its own hash tells it then).
    """
    catalog = core.catalog
    deadline = time.monotonic() + HELD_S
    for (number,) in catalog.query("SELECT DISTINCT blob FROM garbage"):
        blob = catalog.blob(number)
        ranges = _merged(catalog.query("SELECT offset, length FROM garbage WHERE blob=? ORDER BY offset", (number,)))
        if blob is not None and core.stat_of(blob) is not None:
            name = os.fsdecode(blob.path)
            fd = open_for_change(core.folder, name)
            try:
                with os_errors(core.folder.path(name), "punching a hole"):
                    for offset, length in ranges:
                        while is_held(fd, offset, length) and time.monotonic() < deadline:
                            time.sleep(HELD_POLL_S)
                        if punch_hole(fd, offset, length):
                            report.holes_punched += 1
                            report.bytes_freed += length
                    os.fsync(fd)
            finally:
                os.close(fd)
        with catalog.transaction():
            catalog.execute("DELETE FROM garbage WHERE blob=?", (number,))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges, sorted by offset, that touch."""
    out: list[tuple[int, int]] = []
    for offset, length in ranges:
        if out and out[-1][0] + out[-1][1] == offset:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((offset, length))
    return out


def _sweep_orphans(core: Core) -> int:
    """Unlink what this catalog wrote but never committed (a crash between rename and commit); returns how many blobs.

    Manifests can be had again, so whose they are is not asked.
    """
    known = {row.path for row in core.catalog.blobs(OWNED, MANIFEST)}
    n = 0
    for prefix in core.folder.names(MANIFEST_DIR):
        for leaf in core.folder.names(f"{MANIFEST_DIR}/{prefix}") if len(prefix) == 2 else ():
            name = f"{MANIFEST_DIR}/{prefix}/{leaf}"
            if _HASH.fullmatch(leaf) and os.fsencode(name) not in known:
                core.folder.unlink(name)
    for prefix in core.folder.names(BLOB_DIR):
        if len(prefix) != 2:
            continue
        for leaf in core.folder.names(f"{BLOB_DIR}/{prefix}"):
            name = f"{BLOB_DIR}/{prefix}/{leaf}"
            if not leaf.endswith(".blob") or os.fsencode(name) in known:
                continue
            try:
                fd = core.folder.open(name)
            except FastCASError:
                continue
            try:
                ours = check_index(fd) == core.catalog.catalog_id
            except CatalogCorrupt:
                ours = False
            finally:
                os.close(fd)
            if ours:
                core.folder.unlink(name)
                n += 1
    return n
