"""Verify: read everything, compare it with its hash, and heal what can be healed, slice by slice.

A `Scrub` is one verification. Between its slices the store does other work, so nothing that was read from the catalog
is kept from one to the next. What is found damaged is taken out of the catalog by the end of the slice (so that nobody
is served it), a copy of the bytes goes to quarantine/, and with `repair` the right bytes are looked for (heal.py). A
user's file that changed is withdrawn. A blob's index is written again from the catalog; a manifest only others can
bring back. What others can bring is asked for in rounds: first the damaged data and manifests themselves, then what
would let a stripe's parity rebuild them.

Order: manifests by hash, blobs by number, then what files and the list of lost chunks miss. A scrub with a name
remembers how far it came in the catalog, and one of the same name goes on from there. Never: touches the network.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastcas.errors import CatalogCorrupt, FastCASError
from fastcas.hashing import digest_many, sha256
from fastcas.ids import short
from fastcas.limits import SCRUB_SAVE_S, SCRUB_SLICE_S, VERIFY_RESUME_S
from fastcas.store.blobs import check_index, rewrite_index
from fastcas.store.catalog import LINKED, OWNED, BlobRow
from fastcas.store.core import Core, manifest_name
from fastcas.store.heal import Healer, Places
from fastcas.store.maintain import drop_extents, hide, renumber, withdraw
from fastcas.store.paths import MANIFEST_DIR, QUARANTINE_DIR, shown
from fastcas.store.quota import manifest_bound
from fastcas.store.types import Damage, VerifyReport, Wanted

__all__ = ["Scrub"]

log = logging.getLogger(__name__)
SPAN_B = 8 << 20  # bytes read at once
SPAN_ROWS = 512
BAD_PER_SLICE = 64  # damages after which a slice ends: each costs a file in quarantine
KEYS_PER_STEP = 4096
MANIFESTS, BLOBS, MISSING = "manifests", "blobs", "missing"
_Row = tuple[int, int, bytes]  # offset, length, hash


@dataclass(slots=True)
class _Open:
    """A damage whose repair is not decided yet."""

    damage: Damage
    file_hash: bytes | None = None


class Scrub:
    """One verification; use as a context manager, in the store's thread.

        while scrub.step():
            while wanted := scrub.requests():
                ...scrub.give(item, data)...

    Args:
        repair: Bring back what is damaged.
        ask: Others can be asked: `requests` says for what.
        subset: (i, n): only the i-th of n parts, by chunk hash.
        name: Remember under this name where it stops, None: nowhere.
        restart: Begin at the start, whatever was remembered.

    Attributes:
        report: What was found so far.
        total: Bytes there are to read, as of the beginning.
    """

    def __init__(
        self,
        core: Core,
        *,
        repair: bool = False,
        ask: bool = False,
        subset: tuple[int, int] | None = None,
        name: str | None = None,
        restart: bool = False,
    ) -> None:
        self._core = core
        self._repair, self._ask, self._subset = repair, repair and ask, subset
        self._name = f"scrub:{name}" if name else None
        self.report = VerifyReport()
        self.total = core.catalog.value("SELECT sum(length) FROM extents") // (subset[1] if subset else 1)
        self._phase, self._last = MANIFESTS, b""
        self._blob, self._offset, self._length = 0, -1, 0
        if self._name and not restart:
            self._resume(core.catalog.fact(self._name))
        self._healer = Healer(core)
        self._opened: dict[bytes, _Open] = {}
        self._told: set[bytes] = set()
        self._asked: set[bytes] = set()
        self._span_B = SPAN_B
        self._saved_at = time.monotonic()
        self._is_finished = False
        self._walk: Iterator[None] | None = self._all()

    def __enter__(self) -> Scrub:
        """Return self."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop here; a scrub with a name can be gone on with. Idempotent."""
        self._healer.close()
        if not self._is_finished and self._walk is not None:
            self._walk = None
            with contextlib.suppress(FastCASError):
                self._save()

    # --- slices ---

    def step(self, limit_B: int = 64 << 20) -> bool:
        """Do a slice: about `limit_B` bytes, and a fraction of a second.

        Returns:
            Whether there is more to do. Call `requests` in between where others can be asked.
        """
        if self._is_finished:
            return False
        self._conclude()
        self._span_B = max(1, min(SPAN_B, limit_B))
        deadline, end = time.monotonic() + SCRUB_SLICE_S, self.report.bytes + limit_B
        if self._walk is None:
            self._finish()
            return False
        for _ in self._walk:
            if time.monotonic() >= deadline or self.report.bytes >= end or len(self._opened) >= BAD_PER_SLICE:
                break
            if self._phase == MANIFESTS and self._opened:
                break  # what follows reads manifests: others have their chance to bring this one back before
        else:
            self._walk = None
        if self._repair and self._opened:
            self._heal(Places.find(self._core, self._opened))
        if not self._ask:
            self._conclude()
        if self._name and self._walk is not None and time.monotonic() - self._saved_at >= SCRUB_SAVE_S:
            self._save()
        return True

    def requests(self) -> list[Wanted]:
        """Return what others should be asked for next; empty when this slice's damages are decided."""
        if not self._ask or not self._opened:
            return []
        places = Places.find(self._core, self._opened)
        self._heal(places)
        mine = [
            Wanted(key, item.damage.length, item.file_hash or places.file_of(key), item.damage.kind == "manifest")
            for key, item in self._opened.items()
        ]
        wanted = [item for item in mine if item.hash not in self._asked]
        if not wanted:
            for key in self._opened:
                for name, length, file_hash in self._healer.siblings(key, places):
                    if name not in self._asked:
                        self._asked.add(name)
                        wanted.append(Wanted(name, length, file_hash, False))
        self._asked.update(item.hash for item in wanted)
        return wanted

    def give(self, wanted: Wanted, data: bytes | None) -> bool:
        """Take what somebody sent for a request; returns whether it is right."""
        if not wanted.is_manifest:
            return self._healer.give(wanted.hash, wanted.length, data)
        core = self._core
        row = core.catalog.manifest(wanted.hash)
        if row is None or data is None or len(data) != row.length or sha256(data) != row.hash:
            return False
        room = core.room()
        if room is not None and manifest_bound(len(data)) > room:
            core.folder.unlink(manifest_name(row.hash))  # the damaged one makes way for its like
        core.folder.write_file(MANIFEST_DIR, manifest_name(row.hash), data, 0o400)
        old = core.catalog.blob(row.blob)
        if old is not None:
            renumber(core, old, row.length)
        self._decide(wanted.hash, "peer")
        return True

    # --- healing ---

    def _heal(self, places: Places) -> None:
        """Bring back what this machine can of what is open, after what was given."""
        self._healer.publish()
        for key, item in list(self._opened.items()):
            if item.damage.kind != "manifest":
                why = self._healer.heal(key, places)
                if not why:
                    self._decide(key, self._healer.how(key))
                elif why not in item.damage.reason:
                    reason = item.damage.reason.split("; unrepairable")[0]
                    item.damage = replace(item.damage, reason=f"{reason}; {why}")
        self._healer.publish()
        _mark_complete(self._core)

    def _decide(self, key: bytes, how: str) -> None:
        item = self._opened.pop(key, None)
        if item is not None:
            self.report.damages.append(replace(item.damage, repaired_by=how) if how else item.damage)

    def _conclude(self) -> None:
        """What is still open stays damaged."""
        for key in list(self._opened):
            self._decide(key, "")

    def _found(self, damage: Damage, file_hash: bytes | None = None) -> None:
        self._told.add(damage.hash)
        self._opened[damage.hash] = _Open(damage, file_hash)

    def _finish(self) -> None:
        _mark_complete(self._core)
        self._is_finished = True
        if self._name:
            self._core.catalog.remember(self._name, None)

    # --- where it stands ---

    def _save(self) -> None:
        if self._name is None:
            return
        report = self.report
        state = {
            "v": 1, "saved_at": int(time.time()), "phase": self._phase, "last": self._last.hex(),
            "blob": self._blob, "offset": self._offset, "length": self._length,
            "chunks": report.chunks, "bytes": report.bytes, "manifests": report.manifests,
            "repaired": report.n_repaired,
        }  # fmt: skip
        self._core.catalog.remember(self._name, json.dumps(state).encode())
        self._saved_at = time.monotonic()

    def _resume(self, data: bytes | None) -> None:
        """Go on from what was saved; what cannot be read, or is too old to say much, is ignored."""
        try:
            state = json.loads(data or b"null")
            if state["v"] != 1 or not 0 <= time.time() - state["saved_at"] <= VERIFY_RESUME_S:
                return
            phase, last = str(state["phase"]), bytes.fromhex(state["last"])
            stand = int(state["blob"]), int(state["offset"]), int(state["length"])
            before = VerifyReport(int(state["chunks"]), int(state["bytes"]), int(state["manifests"]))
            before.repaired_before, before.resumed_bytes = int(state["repaired"]), before.bytes
        except (ValueError, TypeError, KeyError):
            return
        if phase in (MANIFESTS, BLOBS, MISSING):
            self._phase, self._last, self.report = phase, last, before
            self._blob, self._offset, self._length = stand

    # --- the walk: every `yield` is a place to stop ---

    def _all(self) -> Iterator[None]:
        if self._phase == MANIFESTS:
            yield from self._manifests()
            self._phase = BLOBS
        if self._phase == BLOBS:
            yield from self._blobs()
            self._phase, self._last = MISSING, b""
        yield from self._files()
        yield from self._lost()

    def _chosen(self, key: bytes) -> bool:
        subset = self._subset
        return subset is None or int.from_bytes(key[:4], "big") % subset[1] == subset[0] - 1

    def _manifests(self) -> Iterator[None]:
        core, catalog = self._core, self._core.catalog
        while rows := catalog.query("SELECT hash FROM manifests WHERE hash>? ORDER BY hash LIMIT 1", (self._last,)):
            row = catalog.manifest(rows[0][0])
            if row is not None and self._chosen(row.hash):
                self.report.manifests += 1
                try:
                    core.load_manifest(row)
                except FastCASError as exc:
                    path = shown(core.folder.path(manifest_name(row.hash)))
                    self._found(Damage("manifest", row.hash, path, 0, row.length, str(exc)), row.file_hash)
            self._last = rows[0][0]
            yield

    def _blobs(self) -> Iterator[None]:
        catalog = self._core.catalog
        while True:
            blob = catalog.blob(self._blob) if self._offset >= 0 else None
            if blob is None:
                rows = catalog.query(
                    "SELECT min(number) FROM blobs WHERE number>? AND kind IN (?,?)", (self._blob, OWNED, LINKED)
                )
                if rows[0][0] is None:
                    return
                self._blob, self._offset, self._length = rows[0][0], -1, 0
                blob = catalog.blob(self._blob)
                if blob is None:
                    continue
            yield from self._extents(blob)
            self._offset = -1

    def _extents(self, blob: BlobRow) -> Iterator[None]:
        """Read the chosen extents of a blob from where the scrub stands; drop what is damaged."""
        core = self._core
        if blob.kind == LINKED and core.stat_of(blob) is None:
            withdraw(core, blob, "changed or gone")
            yield
            return
        while rows := core.catalog.query(
            "SELECT offset, length, hash FROM extents WHERE blob=? AND (offset, length)>(?,?)"
            " ORDER BY offset, length LIMIT ?",
            (blob.number, self._offset, self._length, SPAN_ROWS),
        ):
            chosen = [row for row in rows if self._chosen(row[2])]
            span = _span(chosen, self._span_B)
            self._offset, self._length, _ = span[-1] if len(span) < len(chosen) else rows[-1]
            if span:
                self._check(blob, span)
            yield
        if blob.kind == OWNED and (self._subset is None or blob.number % self._subset[1] == self._subset[0] - 1):
            self._check_size_and_index(blob)
        yield

    def _check(self, blob: BlobRow, span: Sequence[_Row]) -> None:
        core = self._core
        fd = -1
        with contextlib.suppress(FastCASError, OSError):
            if blob.kind == LINKED:
                fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            else:
                fd = core.folder.open(os.fsdecode(blob.path))
        try:
            pieces = _read_span(fd, span)
        finally:
            if fd >= 0:
                os.close(fd)
        digests = iter(digest_many([piece for piece in pieces if piece is not None]))
        bad: list[_Row] = []
        for row, piece in zip(span, pieces, strict=True):
            offset, length, key = row
            self.report.chunks += 1
            self.report.bytes += length
            reason = ""
            if piece is None:
                reason = "cannot be read whole"
            elif (digest := next(digests)) != key:
                reason = f"expected SHA-256 {short(key)}, got {short(digest)}"
                _quarantine(core, blob, offset, key, piece)
            if reason:
                bad.append(row)
                self._found(Damage("chunk", key, shown(core.path_of(blob)), offset, length, reason))
        if bad:
            drop_extents(core, blob, bad)

    def _check_size_and_index(self, blob: BlobRow) -> None:
        """Shrink a blob that lost its end to what is left; check its index and write it again."""
        core = self._core
        name = os.fsdecode(blob.path)
        try:
            fd = core.folder.open(name)
        except FastCASError:
            return
        try:
            short_by = blob.size - os.fstat(fd).st_size
            try:
                check_index(fd)
                return
            except CatalogCorrupt as exc:
                reason = str(exc)
        finally:
            os.close(fd)
        extents = core.catalog.query(
            "SELECT hash, offset, length FROM extents WHERE blob=? ORDER BY offset", (blob.number,)
        )
        size = blob.size
        if short_by > 0:
            if not extents:
                return
            size = extents[-1][1] + extents[-1][2]
        how = ""
        if self._repair:
            rewrite_index(core.folder, name, size, core.catalog.catalog_id, extents)
            how = "catalog"
        if short_by > 0:
            renumber(core, blob, size)
        self.report.damages.append(Damage("index", b"", shown(core.path_of(blob)), size, 0, reason, how))

    def _files(self) -> Iterator[None]:
        """Data chunks of files that have no extent."""
        core = self._core
        while rows := core.catalog.query(
            "SELECT hash, manifest FROM files WHERE hash>? ORDER BY hash LIMIT 1", (self._last,)
        ):
            row = core.catalog.manifest(rows[0][1])
            manifest = core.try_manifest(row) if row is not None else None
            for first in range(0, manifest.n_chunks if manifest is not None else 0, KEYS_PER_STEP):
                assert manifest is not None
                some = range(first, min(first + KEYS_PER_STEP, manifest.n_chunks))
                keys = {manifest.hash_of(i): manifest.length_of(i) for i in some}
                if self._missing(keys, manifest.file_hash) and row is not None and row.complete:
                    hide(core, row.hash)
                yield
            self._last = rows[0][0]
            yield

    def _lost(self) -> Iterator[None]:
        """What was lost earlier, parity above all, and is still needed."""
        catalog, last = self._core.catalog, b""
        while rows := catalog.query(
            "SELECT hash, length FROM lost WHERE hash>? ORDER BY hash LIMIT ?", (last, BAD_PER_SLICE)
        ):
            last = rows[-1][0]
            here = catalog.present([row[0] for row in rows])
            places = Places.find(self._core, (row[0] for row in rows if row[0] not in here))
            needed = {row[0]: row[1] for row in rows if row[0] not in here}
            if places.are_complete:
                needed = {key: length for key, length in needed.items() if key in places.of}
            with catalog.transaction():
                catalog.many("DELETE FROM lost WHERE hash=?", ((row[0],) for row in rows if row[0] not in needed))
            self._missing(needed, None)
            yield

    def _missing(self, lengths: dict[bytes, int], file_hash: bytes | None) -> bool:
        """Report which of these chunks are not here; returns whether there are any."""
        here = self._core.catalog.present(list(lengths))
        for key, length in lengths.items():
            if key not in here and key not in self._told and self._chosen(key):
                self._found(Damage("missing", key, "", 0, length, "no copy on this machine"), file_hash)
        return len(here) < len(lengths)


def _span(rows: Sequence[_Row], limit_B: int) -> list[_Row]:
    """Return the first extents that follow each other, up to `limit_B` together, one at least."""
    span: list[_Row] = []
    size = 0
    for row in rows:
        if span and (row[0] != span[-1][0] + span[-1][1] or size + row[1] > limit_B):
            break
        span.append(row)
        size += row[1]
    return span


def _read_span(fd: int, span: Sequence[_Row]) -> list[memoryview | None]:
    """Read adjacent extents: at once, or one by one where that fails. None: not readable whole."""
    if fd < 0:
        return [None] * len(span)
    start, size = span[0][0], sum(row[1] for row in span)
    try:
        data = memoryview(os.pread(fd, size, start))
        if len(data) == size:
            return [data[offset - start : offset - start + length] for offset, length, _ in span]
    except OSError:
        log.warning("span cannot be read at once offset=%d length=%d", start, size)
    out: list[memoryview | None] = []
    for offset, length, _ in span:
        try:
            piece = os.pread(fd, length, offset)
        except OSError:
            piece = b""
        out.append(memoryview(piece) if len(piece) == length else None)
    return out


def _quarantine(core: Core, blob: BlobRow, offset: int, key: bytes, piece: memoryview) -> None:
    """Keep damaged bytes of an owned blob; a full disk or quota must not stop the scrub."""
    room = core.room()
    if blob.kind == OWNED and room is not None and manifest_bound(len(piece)) > room:
        log.warning("damaged chunk was not kept chunk=%s: the quota leaves %d B", short(key), room)
    elif blob.kind == OWNED:
        name = f"{QUARANTINE_DIR}/{key.hex()}-{blob.number}-{offset}"
        try:
            core.folder.write_file(QUARANTINE_DIR, name, piece, 0o400)
            core.took(len(piece))
        except FastCASError as exc:
            log.warning("damaged chunk was not kept chunk=%s error=%s", short(key), exc)


def _mark_complete(core: Core) -> None:
    """Mark manifests complete again whose data chunks are all here, and report their files."""
    catalog = core.catalog
    for (manifest_hash,) in catalog.query("SELECT hash FROM manifests WHERE NOT complete"):
        row = catalog.manifest(manifest_hash)
        manifest = core.try_manifest(row) if row is not None else None
        if row is None or manifest is None:
            continue
        keys = list({manifest.hash_of(i) for i in range(manifest.n_chunks)})
        if len(catalog.present(keys)) < len(keys):
            continue
        with catalog.transaction():
            catalog.execute("UPDATE manifests SET complete=1 WHERE hash=?", (row.hash,))
        if core.listener is not None and catalog.query("SELECT 1 FROM files WHERE manifest=?", (row.hash,)):
            core.listener.on_file(row.file_hash, row.hash)
