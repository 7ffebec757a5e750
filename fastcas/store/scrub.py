"""Verify: read everything, compare it with its hash, and heal what can be healed.

What is found damaged is taken out of the catalog at once (so that nobody is served it), a copy of the bytes goes to
quarantine/, and with `repair` the right bytes are looked for: in another extent, in the stripe's parity, then from
`fetch`. They are written into a new owned blob; a user's own file is never written. A user's file that changed is
withdrawn. A blob's index is written again from the catalog; a manifest only `fetch` can bring back.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator

from fastcas.errors import CatalogCorrupt, FastCASError, TooFewShards
from fastcas.hashing import digest_many, sha256
from fastcas.ids import short
from fastcas.metadata import Manifest
from fastcas.parity import ReedSolomon
from fastcas.store.blobs import BlobWriter, check_index, rewrite_index
from fastcas.store.catalog import LINKED, OWNED, BlobRow, ManifestRow
from fastcas.store.core import Core, manifest_name
from fastcas.store.maintain import drop_extents, renumber, withdraw
from fastcas.store.paths import MANIFEST_DIR, QUARANTINE_DIR, shown
from fastcas.store.types import Damage, Identity, Progress, VerifyReport

__all__ = ["Fetch", "verify"]

log = logging.getLogger(__name__)
SPAN_B = 8 << 20  # bytes read at once
Fetch = Callable[[bytes], "bytes | None"]
_Bad = tuple[int, int, bytes, str]  # offset, length, hash, reason


def verify(
    core: Core, *, repair: bool, fetch: Fetch | None, progress: Progress | None, subset: tuple[int, int] | None
) -> VerifyReport:
    """See `Store.verify`."""
    report = VerifyReport()
    healer = _Healer(core, fetch) if repair else None
    total = core.catalog.value("SELECT sum(length) FROM extents")
    try:
        for row in core.catalog.manifests():
            if _chosen(row.hash, subset):
                _check_manifest(core, row, fetch if repair else None, report)
        for blob in core.catalog.blobs(OWNED, LINKED):
            bad = _check_blob(core, blob, subset, report, progress, total)
            if blob.kind == OWNED:
                _check_size_and_index(core, blob, bad, healer is not None, subset, report)
            for offset, length, key, reason in bad:
                how = healer.heal(key, length) if healer else ("", "")
                report.damages.append(
                    Damage(
                        "chunk",
                        key,
                        shown(core.path_of(blob)),
                        offset,
                        length,
                        "; ".join(filter(None, (reason, how[1]))),
                        how[0],
                    )
                )
        _check_missing(core, healer, subset, report)
        if healer is not None:
            healer.publish()
        _mark_complete(core)
    finally:
        if healer is not None:
            healer.close()
    return report


def _chosen(key: bytes, subset: tuple[int, int] | None) -> bool:
    return subset is None or int.from_bytes(key[:4], "big") % subset[1] == subset[0] - 1


def _check_blob(
    core: Core,
    blob: BlobRow,
    subset: tuple[int, int] | None,
    report: VerifyReport,
    progress: Progress | None,
    total: int,
) -> list[_Bad]:
    """Read the chosen extents of a blob; drop and return what is damaged."""
    if blob.kind == LINKED and core.stat_of(blob) is None:
        withdraw(core, blob, "changed or gone")
        return []
    fd = -1
    with contextlib.suppress(FastCASError, OSError):
        if blob.kind == LINKED:
            fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        else:
            fd = core.folder.open(os.fsdecode(blob.path))
    bad: list[_Bad] = []
    try:
        rows = core.catalog.query(
            "SELECT offset, length, hash FROM extents WHERE blob=? ORDER BY offset, length", (blob.number,)
        )
        for span in _spans(row for row in rows if _chosen(row[2], subset)):
            pieces = _read_span(fd, span)
            good = [piece for piece in pieces if piece is not None]
            digests = iter(digest_many(good))
            for (offset, length, key), piece in zip(span, pieces, strict=True):
                if piece is None:
                    bad.append((offset, length, key, "cannot be read whole"))
                elif (digest := next(digests)) != key:
                    bad.append((offset, length, key, f"expected SHA-256 {short(key)}, got {short(digest)}"))
                    _quarantine(core, blob, offset, key, piece)
                report.chunks += 1
                report.bytes += length
            if progress is not None:
                progress(report.bytes, total)
    finally:
        if fd >= 0:
            os.close(fd)
    if bad:
        drop_extents(core, blob, [row[:3] for row in bad])
    return bad


def _spans(rows: Iterable[tuple[int, int, bytes]]) -> Iterator[list[tuple[int, int, bytes]]]:
    """Group extents that follow each other, up to SPAN_B together."""
    span: list[tuple[int, int, bytes]] = []
    size = 0
    for row in rows:
        if span and (row[0] != span[-1][0] + span[-1][1] or size + row[1] > SPAN_B):
            yield span
            span, size = [], 0
        span.append(row)
        size += row[1]
    if span:
        yield span


def _read_span(fd: int, span: list[tuple[int, int, bytes]]) -> list[memoryview | None]:
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
    """Keep damaged bytes of an owned blob; a full disk must not stop the scrub."""
    if blob.kind == OWNED:
        name = f"{QUARANTINE_DIR}/{key.hex()}-{blob.number}-{offset}"
        try:
            core.folder.write_file(QUARANTINE_DIR, name, piece, 0o400)
        except FastCASError as exc:
            log.warning("damaged chunk was not kept chunk=%s error=%s", short(key), exc)


def _check_size_and_index(
    core: Core, blob: BlobRow, bad: list[_Bad], repair: bool, subset: tuple[int, int] | None, report: VerifyReport
) -> None:
    """Shrink a blob that lost its end to what is left; check its index and write it again."""
    if subset is not None and blob.number % subset[1] != subset[0] - 1:
        return
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
    if repair:
        rewrite_index(core.folder, name, size, core.catalog.catalog_id, extents)
        how = "catalog"
    if short_by > 0:
        renumber(core, blob, size)
    report.damages.append(Damage("index", b"", shown(core.path_of(blob)), size, 0, reason, how))


def _check_manifest(core: Core, row: ManifestRow, fetch: Fetch | None, report: VerifyReport) -> None:
    report.manifests += 1
    try:
        core.load_manifest(row)
        return
    except FastCASError as exc:
        reason = str(exc)
    how = ""
    data = fetch(row.hash) if fetch is not None else None
    name = manifest_name(row.hash)
    if data is not None and len(data) == row.length and sha256(data) == row.hash:
        core.folder.write_file(MANIFEST_DIR, name, data, 0o400)
        old = core.catalog.blob(row.blob)
        if old is not None:
            renumber(core, old, row.length)
        how = "peer"
    report.damages.append(Damage("manifest", row.hash, shown(core.folder.path(name)), 0, row.length, reason, how))


def _check_missing(core: Core, healer: _Healer | None, subset: tuple[int, int] | None, report: VerifyReport) -> None:
    """Report (and heal) data chunks of files that have no extent and were not just found damaged."""
    told = {damage.hash for damage in report.damages}
    for (manifest_hash,) in core.catalog.query("SELECT manifest FROM files"):
        row = core.catalog.manifest(manifest_hash)
        manifest = core.try_manifest(row) if row is not None else None
        if manifest is None:
            continue
        keys = {manifest.hash_of(i): manifest.length_of(i) for i in range(manifest.n_chunks)}
        here = core.catalog.present(list(keys))
        for key, length in keys.items():
            if key not in here and key not in told and _chosen(key, subset):
                told.add(key)
                how = healer.heal(key, length) if healer else ("", "")
                reason = "no copy on this machine" + (f"; {how[1]}" if how[1] else "")
                report.damages.append(Damage("missing", key, "", 0, length, reason, how[0]))


def _mark_complete(core: Core) -> None:
    """Mark manifests complete again whose data chunks are all here, and report their files."""
    catalog = core.catalog
    for row in catalog.manifests():
        manifest = core.try_manifest(row) if not row.complete else None
        if manifest is None:
            continue
        keys = list({manifest.hash_of(i) for i in range(manifest.n_chunks)})
        if len(catalog.present(keys)) < len(keys):
            continue
        with catalog.transaction():
            catalog.execute("UPDATE manifests SET complete=1 WHERE hash=?", (row.hash,))
        if core.listener is not None and catalog.query("SELECT 1 FROM files WHERE manifest=?", (row.hash,)):
            core.listener.on_file(row.file_hash, row.hash)


class _Healer:
    """Finds the right bytes of chunks and writes them into one new owned blob."""

    def __init__(self, core: Core, fetch: Fetch | None) -> None:
        self._core, self._fetch = core, fetch
        self._blob = BlobWriter(core.folder, core.catalog.catalog_id)
        self._stripes: dict[bytes, list[tuple[bytes, int]]] | None = None
        self._how: dict[bytes, str] = {}

    def close(self) -> None:
        self._blob.discard()

    def heal(self, key: bytes, length: int) -> tuple[str, str]:
        """Return (how it was healed, "") or ("", why not)."""
        if key in self._how:
            return self._how[key], ""
        if self._core.owned_good(key):
            return "copy", ""
        data = self._core.read_chunk(key)
        if data is not None:
            return self._keep(key, data, "copy"), ""
        why = self._from_parity(key)
        if key in self._how:
            return self._how[key], ""
        data = self._fetch(key) if self._fetch is not None else None
        if data is not None and len(data) == length and sha256(data) == key:
            return self._keep(key, data, "peer"), ""
        return "", why

    def _keep(self, key: bytes, data: bytes | memoryview, how: str) -> str:
        offset = self._blob.reserve(key, len(data))
        self._blob.write([memoryview(data)], offset, 0)
        self._how[key] = how
        return how

    def _places(self, key: bytes) -> list[tuple[bytes, int]]:
        """Return (manifest hash, chunk number) of the chunk in manifests with parity."""
        if self._stripes is None:
            self._stripes = {}
            for row in self._core.catalog.manifests():
                manifest = self._core.try_manifest(row) if row.n_parity else None
                for i in range(manifest.n_total if manifest else 0):
                    assert manifest is not None
                    self._stripes.setdefault(manifest.hash_of(i), []).append((row.hash, i))
        return self._stripes.get(key, [])

    def _from_parity(self, key: bytes) -> str:
        """Rebuild the chunk's stripe; keeps what was lost of it. Returns why it could not be done."""
        why = "no parity covers it"
        for manifest_hash, index in self._places(key):
            row = self._core.catalog.manifest(manifest_hash)
            manifest = self._core.try_manifest(row) if row is not None else None
            if manifest is None:
                continue
            why = self._rebuild(manifest, manifest.stripe_of(index), key)
            if key in self._how:
                return ""
        return why

    def _rebuild(self, manifest: Manifest, number: int, key: bytes) -> str:
        data, parity = manifest.stripe(number)
        length = manifest.length_of(data[0])
        shards: list[bytes | None] = []
        for index in data:
            piece = self._core.read_chunk(manifest.hash_of(index))
            shards.append(None if piece is None else piece.ljust(length, b"\0"))
        n_lost = shards.count(None)
        shards += [bytes(length)] * (manifest.k - len(data))
        shards += [self._core.read_chunk(manifest.hash_of(index)) for index in parity]
        have = len(shards) - shards.count(None)
        if have < manifest.k:
            return f"unrepairable: {have} of {manifest.k} shards are left, need {manifest.k - have} more"
        try:
            whole = ReedSolomon(manifest.k, manifest.m).reconstruct(shards)
        except TooFewShards as exc:
            return str(exc)
        lost = [i for i in data if shards[i - data[0]] is None] if n_lost else []
        lost += [i for at, i in enumerate(parity) if shards[manifest.k + at] is None]
        for index in lost:
            at = index - data[0] if index in data else manifest.k + index - parity[0]
            piece = bytes(memoryview(whole[at])[: manifest.length_of(index)])
            name = manifest.hash_of(index)
            if name not in self._how and sha256(piece) == name:
                self._keep(name, piece, "parity")
        return "" if key in self._how else "what parity rebuilt does not have the chunk's hash"

    def publish(self) -> None:
        """Make the new blob durable and visible."""
        core, catalog, writer = self._core, self._core.catalog, self._blob
        name = writer.publish()
        if name is None:
            return
        path, identity = os.fsencode(name), Identity(0, 0, writer.size, 0)
        try:
            with catalog.transaction():
                number = catalog.add_blob(OWNED, path, identity)
                catalog.add_extents(number, writer.keys, writer.offsets, writer.lengths)
        except BaseException:
            core.folder.discard(name)
            raise
        core.say_blob(BlobRow(number, OWNED, path, identity, None))
        core.say_chunks(
            number,
            [
                (bytes(writer.keys[32 * i : 32 * i + 32]), offset, length)
                for i, (offset, length) in enumerate(zip(writer.offsets, writer.lengths, strict=True))
            ],
        )
