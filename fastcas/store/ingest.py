"""Ingest: one read of the source gives chunk hashes, midstates, content hash and parity; then all of it is
published at once.

    reader thread ──buffer──▶ store's thread: hash, look up, plan ──runs of new chunks──▶ writer thread
                        └───▶ parity thread: encode, hash ──parity chunks──┘

Three buffers go round, so reading, hashing, encoding and writing overlap. A chunk that an owned blob holds already is
not written again, nor is one that came earlier in the same ingest; `in place` writes no data chunk at all. Parity is
encoded from the same buffers and is always owned. Where the file system can share blocks between files, a large file
without parity is cloned into the blob first and read from there: what is hashed is what is kept.
Publish order (architecture §7): blob (temp, write, fsync, rename, fsync folder), manifests likewise, catalog
commit, listener. Until the commit nothing refers to what was written, and an error takes it away again. A thread
inserts the catalog's rows while the files are made durable; the commit waits for both.
Memory: three buffers (fewer for a file that needs fewer). With parity each is one stripe, 3 * (k + m) * chunk size in
all; without, 4 MiB or one larger chunk. Cut by content: 8 MiB and the longest chunk, of which what has no end yet is
carried over to the next buffer.
"""

from __future__ import annotations

import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastcas.errors import FileChanged
from fastcas.hashing import Sha256, chunk_passes, digest_many, sha256
from fastcas.ids import Link
from fastcas.metadata import (
    CDC,
    EMPTY_SHA256,
    FIXED,
    SHA256_IV,
    Manifest,
    check_chunking,
    check_parity,
    choose_average,
    choose_chunk_size,
)
from fastcas.store.blobs import BlobWriter
from fastcas.store.catalog import LINKED, OWNED, BlobRow
from fastcas.store.content_cuts import ContentCuts
from fastcas.store.core import Core, News, manifest_name
from fastcas.store.file_batch import FileBatch
from fastcas.store.paths import MANIFEST_DIR
from fastcas.store.sources import FileSource, Source
from fastcas.store.types import Identity, Progress, StoredFile

__all__ = ["BUFFER_B", "Entry", "Hashes", "Ingest", "Staged", "cut_short", "insert_linked", "stored_file"]

BUFFER_B = 4 << 20
HASH_BUFFER_B = 1 << 20  # where nothing is written: a core's own cache holds it, a tenth faster than 4 MiB
CDC_BUFFER_B = 8 << 20  # eight chunks of 1 MiB are hashed side by side
SLOTS = 3
CLONE_MIN_B = 1 << 20  # a smaller file is copied sooner than its pages are flushed
_ZEROS = bytes(1 << 16)
_T = TypeVar("_T")
_Encoded = tuple[list[bytes], list[memoryview]]


@dataclass(slots=True)
class Staged:
    """One source that was read: its manifest, and where a file that is seeded in place lies."""

    manifest: Manifest
    new_bytes: int
    path: bytes | None = None
    identity: Identity | None = None
    cloned_bytes: int = 0


@dataclass(slots=True)
class Entry:
    """One file to publish. `name` None: it is known only as a member of a collection."""

    staged: Staged
    name: str | None
    is_collection: bool = False
    members: list[bytes] = field(default_factory=list)
    already_stored: bool = False


class _Inline(Executor):
    """Runs at once in the calling thread: a source of one buffer is not worth a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file's stripes lie in the buffers of its ingest.

    Attributes:
        unit: Bytes per chunk; of a file with one chunk, that chunk's.
        step: Bytes of the file per buffer: one stripe, or without parity some chunks.
        n_steps: Buffers to fill, one after the other.
        n_slots: Buffers that there are.
        data_size: Bytes of one for data, padding of short stripes included.
        parity_size: Bytes of one for parity.
        headroom: Bytes of one before its data, for what is carried over.
    """

    unit: int
    step: int
    n_steps: int
    n_slots: int
    data_size: int
    parity_size: int
    headroom: int = 0

    @classmethod
    def of_content(cls, size: int, longest: int) -> Layout:
        """Return the layout of a file of `size` > 0 bytes that is cut by content."""
        step = min(CDC_BUFFER_B, size)
        n_steps = -(-size // step)
        return cls(longest, step, n_steps, min(n_steps, SLOTS), step, 0, longest if n_steps > 1 else 0)

    @classmethod
    def of(cls, size: int, chunk_size: int, k: int, m: int, *, hash_only: bool = False) -> Layout:
        """Return the layout of a file of `size` bytes; k = m = 0 without parity, `hash_only`: none of it is written."""
        unit = min(chunk_size, size)
        if unit == 0:
            return cls(0, 0, 0, 0, 0, 0)
        width = k if m else max(1, (HASH_BUFFER_B if hash_only else BUFFER_B) // chunk_size)
        step = width * chunk_size
        n_steps = -(-size // step)
        data_size = width * unit if m else min(step, size)
        return cls(unit, step, n_steps, min(n_steps, SLOTS), data_size, m * unit)


def _pages(size: int) -> mmap.mmap | bytearray:
    """Return zeroed memory that begins with a page, so that it can be written past the page cache."""
    return mmap.mmap(-1, size) if size else bytearray()


class _Slot:
    """One buffer, the parity of its stripes, and the work that still reads from them."""

    def __init__(self, layout: Layout) -> None:
        self.room = memoryview(_pages(layout.headroom + layout.data_size))
        self.view = self.room[layout.headroom :]
        self.parity = memoryview(bytearray(layout.parity_size))
        self.pending: Future[Any] | None = None

    def settle(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None


class _Parity:
    """Encodes the stripes of one file, one buffer each, in any one thread at a time."""

    def __init__(self, k: int, m: int) -> None:
        from fastcas.parity import ReedSolomon  # brings numpy: a command that needs none must not wait for it

        self._code = ReedSolomon(k, m)
        self._k, self._m = k, m
        self.hashes = bytearray()

    def encode(self, slot: _Slot, length: int, unit: int) -> tuple[list[bytes], list[memoryview]]:
        """Encode the stripe in the first `length` bytes of a buffer; what is behind them is overwritten.

        Returns:
            Hashes and bytes of the parity chunks; the bytes lie in the slot.
        """
        end = self._k * unit
        for at in range(length, end, len(_ZEROS)):
            slot.view[at:end][: len(_ZEROS)] = _ZEROS[: end - at]
        size = min(unit, length)  # a stripe with a single, shorter chunk has shards of that length
        data = [slot.view[at : at + size] for at in range(0, end, unit)]
        shards = self._code.encode(data, [slot.parity[at : at + size] for at in range(0, self._m * unit, unit)])
        keys = digest_many(shards)
        self.hashes += b"".join(keys)
        return keys, shards


class Hashes:
    """Chunk hashes, midstates and content hash of one file that is cut into chunks of one size, fed in order."""

    def __init__(self, size: int, chunk_size: int) -> None:
        self._size, self._chunk_size = size, chunk_size
        self._left = -(-size // chunk_size)
        self._chain = SHA256_IV
        self.done = 0
        self.chunks = bytearray()
        self.midstates = bytearray()
        self.file_hash = EMPTY_SHA256

    def feed(self, data: memoryview) -> list[bytes]:  # hot
        """Return the hashes of the next chunks, back to back in `data`: one pass over all whole ones."""
        n_chunks = -(-len(data) // self._chunk_size)
        self._left -= n_chunks
        end = len(data) // self._chunk_size * self._chunk_size
        hashes, midstates = chunk_passes(data[:end], self._chunk_size, self._chain)
        self._chain = midstates[-32:] or self._chain
        self.midstates += midstates
        self.done += end
        keys = [hashes[at : at + 32] for at in range(0, len(hashes), 32)]
        if not self._left:
            chunk = data[end:]
            if chunk:
                keys.append(sha256(chunk))
            else:
                del self.midstates[-32:]  # after the last chunk it is the content's hash but for the padding
            self.file_hash = Sha256(self._chain, self.done).update(chunk).digest() if self.done else keys[0]
        self.chunks += b"".join(keys)
        return keys

    def manifest(self, k: int = 0, m: int = 0, parity: bytes = b"") -> Manifest:
        """Return the manifest, once everything was fed."""
        return Manifest(
            self.file_hash, self._size, self._chunk_size, bytes(self.chunks), bytes(self.midstates), k, m, parity
        )


def cut_short(source: Source, got: int, size: int) -> FileChanged:
    """Return the error for a file that ended before its size."""
    return FileChanged(f"{source.label}: ended after {got} B of {size} B; nothing of it was stored").about(
        (source.label, "changed while it was read")
    )


class Ingest:
    """One ingest: any number of sources into at most one owned blob, published at once.

    Use as a context manager: leaving it without `publish` removes what was written. `budget`: bytes that the blob may
    take, None: any number.
    """

    def __init__(self, core: Core, budget: int | None = None) -> None:
        self._core = core
        self._blob = BlobWriter(core.folder, core.catalog.catalog_id, budget, sends_soon=core.listener is not None)
        self._manifests = FileBatch(core.folder, MANIFEST_DIR, 0o400)
        self._may_clone = True
        self._has_owned = bool(core.catalog.value("SELECT EXISTS(SELECT 1 FROM blobs WHERE kind=0)"))

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, *exc: object) -> None:
        self._blob.discard()
        self._manifests.discard()

    def add(
        self,
        source: Source,
        *,
        chunk_size: int | None = None,
        chunking: str = FIXED,
        parity: tuple[int, int] | None = None,
        in_place: bool = False,
        progress: Progress | None = None,
    ) -> Staged:
        """Read a source to its end and stage it.

        Args:
            source: What to read; not closed here.
            chunk_size: Bytes per chunk, cut by content of the average one; None: automatic.
            chunking: "fixed", or "cdc": cut by content.
            parity: (k, m), None: no parity; never with "cdc".
            in_place: The data chunks stay in the source's own file.
            progress: Called after each buffer.
        Raises:
            FileChanged: The source changed while it was read.
            UsageError: Chunk size, chunking or parity shape.
            StoreFull, StoreError: Writing failed.
        """
        check_chunking(chunking, parity)
        size = source.size
        if chunking == CDC:
            average = choose_average(size, chunk_size)
            if size:
                return self._add_by_content(source, ContentCuts(size, average), in_place, progress)
            chunk_size = None
        unit = choose_chunk_size(size, chunk_size)
        k, m = parity or (0, 0)
        if parity is not None:
            check_parity(size, unit, k, m)
        hashes = Hashes(size, unit)
        code = _Parity(k, m) if parity else None
        n_before = len(self._blob.lengths)
        cloned = self._clone(source) if parity is None and not in_place else None
        layout = Layout.of(size, unit, k, m, hash_only=in_place or cloned is not None)
        for data, encoding, slot, writer in self._buffers(source, layout, code, progress):
            fed = hashes.done
            keys = hashes.feed(data)
            if cloned is not None:
                self._place(keys, [min(unit, len(data) - at) for at in range(0, len(data), unit)], cloned + fed)
                continue
            chunks = [data[at : at + unit] for at in range(0, len(data), unit)]
            runs = [] if in_place else self._plan(keys, chunks)
            if encoding is not None:
                runs += self._plan(*encoding.result())
            if runs:
                length = sum(len(run) for run in runs)
                offset = self._blob.size - length
                slot.pending = writer.submit(self._blob.write, runs, offset, size - hashes.done)
        manifest = hashes.manifest(k, m, bytes(code.hashes) if code else b"")
        staged = self._staged(source, manifest, n_before, in_place)
        staged.cloned_bytes = staged.new_bytes if cloned is not None else 0
        return staged

    def _clone(self, source: Source) -> int | None:
        """Copy a file by sharing its blocks; it is read, and hashed, from the copy. None where that cannot be."""
        if not self._may_clone or not isinstance(source, FileSource) or source.size < CLONE_MIN_B:
            return None
        offset = self._blob.clone(source.fd, source.size)
        self._may_clone = offset is not None
        if offset is not None:
            source.read_from(self._blob.read_fd(), offset)
        return offset

    def _place(self, keys: Sequence[bytes], lengths: Sequence[int], offset: int) -> None:
        """Take the new ones of consecutive chunks that lie in the blob already; the others' blocks are given back."""
        fresh = self._fresh(keys, lengths)
        for key, length in zip(keys, lengths, strict=True):
            if fresh.pop(key, None) is not None:
                self._blob.place(key, offset, length)
            else:
                self._blob.punch(offset, length)
            offset += length

    def _add_by_content(self, source: Source, cuts: ContentCuts, in_place: bool, progress: Progress | None) -> Staged:
        """The same for chunks that end where the content says so; the content is hashed beside the chunks."""
        size, n_before = source.size, len(self._blob.lengths)
        layout = Layout.of_content(size, cuts.longest)
        with ThreadPoolExecutor(1, "fastcas-hash") if layout.n_steps > 1 else _Inline() as hasher:
            for data, _, slot, writer in self._buffers(source, layout, None, progress):
                content = hasher.submit(cuts.hash_content, data)
                keys, chunks = cuts.cut(slot.room[: layout.headroom + len(data)], layout.headroom)
                runs = [] if in_place else self._plan(keys, chunks)
                if runs:
                    offset = self._blob.size - sum(len(run) for run in runs)
                    slot.pending = writer.submit(self._blob.write, runs, offset, size - cuts.done)
                content.result()
        return self._staged(source, cuts.manifest(), n_before, in_place)

    def _staged(self, source: Source, manifest: Manifest, n_before: int, in_place: bool) -> Staged:
        source.finish()
        staged = Staged(manifest, sum(self._blob.lengths[n_before:]))
        if in_place:
            staged.path, staged.identity = source.path, source.identity
        return staged

    def _buffers(
        self, source: Source, layout: Layout, code: _Parity | None, progress: Progress | None
    ) -> Iterator[tuple[memoryview, Future[_Encoded] | None, _Slot, Executor]]:
        """Yield the source's bytes, buffer by buffer, reading one buffer ahead; their parity is being encoded."""
        size, unit, step, n_steps = source.size, layout.unit, layout.step, layout.n_steps
        slots = [_Slot(layout) for _ in range(layout.n_slots)]
        with ExitStack() as stack:

            def executor(name: str) -> Executor:
                return stack.enter_context(ThreadPoolExecutor(1, name)) if n_steps > 1 else _Inline()

            reader, writer, encoder = executor("fastcas-read"), executor("fastcas-write"), executor("fastcas-parity")
            ahead = reader.submit(source.readinto, slots[0].view[: min(step, size)]) if slots else None
            for i in range(n_steps):
                slot, want = slots[i % SLOTS], min(step, size - i * step)
                assert ahead is not None
                got = ahead.result()
                if got != want:
                    source.finish()
                    raise cut_short(source, i * step + got, size)
                encoding = encoder.submit(code.encode, slot, want, unit) if code is not None else None
                if i + 1 < n_steps:
                    following = slots[(i + 1) % SLOTS]
                    following.settle()
                    ahead = reader.submit(source.readinto, following.view[: min(step, size - (i + 1) * step)])
                yield slot.view[:want], encoding, slot, writer
                if progress is not None:
                    progress(i * step + want, size)
            for slot in slots:
                slot.settle()

    def _plan(self, keys: Sequence[bytes], chunks: Sequence[memoryview]) -> list[memoryview]:
        """Reserve places for the chunks that no owned blob holds; returns their bytes in that order."""
        fresh = self._fresh(keys, chunks)
        for key, chunk in fresh.items():
            self._blob.reserve(key, len(chunk))
        return list(fresh.values())

    def _fresh(self, keys: Sequence[bytes], values: Sequence[_T]) -> dict[bytes, _T]:
        """Return the chunks, with what belongs to each, that no owned blob holds and that are not in this one yet."""
        places = self._blob.places
        fresh = {key: value for key, value in zip(keys, values, strict=True) if key not in places}
        if fresh and self._has_owned:
            for key in self._core.owned_intact(list(fresh)):
                del fresh[key]
        return fresh

    def keep(self, manifest: Manifest) -> bool:
        """Write a manifest that the store lacks, so that `publish` only has to name it; returns whether it lacks it."""
        name = manifest_name(manifest.manifest_hash)
        if name in self._manifests:
            return True
        row = self._core.catalog.manifest(manifest.manifest_hash)
        if row is not None and self._core.folder.exists(name):
            return False
        self._manifests.add(name, manifest.data)
        return True

    def publish(self, entries: Sequence[Entry]) -> None:
        """Make everything durable and visible together; sets `already_stored` of each entry.

        Raises:
            StoreFull, StoreError: Nothing became visible, and what was written is removed.
        """
        core, catalog = self._core, self._core.catalog
        made: list[str] = []
        now = int(time.time())
        fresh: dict[bytes, None] = {}
        for entry in entries:
            manifest = entry.staged.manifest
            row = catalog.manifest(manifest.manifest_hash)
            entry.already_stored = bool(row and row.complete) and entry.staged.new_bytes == 0
            if self.keep(manifest):
                fresh[manifest.manifest_hash] = None
        try:
            with catalog.transaction(), ThreadPoolExecutor(1, "fastcas-insert") as pool:
                inserted = pool.submit(self._insert, entries, now, set(fresh))
                blob_name = self._blob.publish()
                if blob_name is not None:
                    made.append(blob_name)
                made += self._manifests.publish()
                news = inserted.result()
        except BaseException:
            for name in made:
                core.folder.discard(name)
            raise
        if core.listener is not None:
            core.say_news(news)
            for manifest_hash in fresh:
                if (row := catalog.manifest(manifest_hash)) is not None:
                    core.say_manifest(row)
            for entry in entries:
                core.listener.on_file(entry.staged.manifest.file_hash, entry.staged.manifest.manifest_hash)

    def _insert(self, entries: Sequence[Entry], now: int, written: set[bytes]) -> list[News]:
        core, catalog, writer = self._core, self._core.catalog, self._blob
        news: list[News] = []
        if writer.offsets:
            path = os.fsencode(writer.name)
            number = catalog.add_blob(OWNED, path, Identity(0, 0, writer.size, 0))
            catalog.add_extents(number, writer.keys, writer.offsets, writer.lengths)
            rows = [
                (bytes(writer.keys[32 * i : 32 * i + 32]), offset, length)
                for i, (offset, length) in enumerate(zip(writer.offsets, writer.lengths, strict=True))
            ]
            news.append(News(BlobRow(number, OWNED, path, Identity(0, 0, writer.size, 0), None), rows))
        for entry in entries:
            staged = entry.staged
            if staged.path is not None and staged.identity is not None:
                news.append(insert_linked(core, staged.path, staged.identity, staged.manifest))
            manifest_hash = staged.manifest.manifest_hash
            row = core.insert_manifest(staged.manifest, complete=True, written=manifest_hash in written)
            written.discard(manifest_hash)
            catalog.put_file(row.file_hash, row.hash, staged.manifest.size, now, entry.is_collection, entry.name)
            if entry.members:
                catalog.many(
                    "INSERT OR IGNORE INTO members VALUES(?,?)", [(row.file_hash, member) for member in entry.members]
                )
        return news


def insert_linked(core: Core, path: bytes, identity: Identity, manifest: Manifest) -> News:
    """Insert a user's file as a linked blob with all data chunks; inside a transaction.

    Returns:
        The blob if it is new, and for a listener the chunks that lay nowhere before. The path must not belong to a
        blob of another identity (`linked.make_way` first).
    """
    catalog = core.catalog
    n = manifest.n_chunks
    lengths = array("I", map(manifest.length_of, range(n)))
    offsets = array("Q", map(manifest.offset_of, range(n)))
    rows: dict[bytes, tuple[bytes, int, int]] = {}
    if core.listener is not None:
        keys = [manifest.hashes[32 * i : 32 * i + 32] for i in range(n)]
        known = catalog.present(keys)
        rows = {
            key: (key, offset, length)
            for key, offset, length in zip(keys, offsets, lengths, strict=True)
            if key not in known
        }
    old = catalog.blob_at(path)
    if old is None:
        number = catalog.add_blob(LINKED, path, identity, manifest.manifest_hash)
    else:
        number = old.number
        catalog.execute("UPDATE blobs SET manifest=? WHERE number=?", (manifest.manifest_hash, number))
    catalog.add_extents(number, manifest.hashes, offsets, lengths)
    return News(BlobRow(number, LINKED, path, identity, None), list(rows.values()), is_new=old is None)


def stored_file(entry: Entry, size: int | None = None) -> StoredFile:
    """Return what people are told about a published entry; `size` overrides it for a collection."""
    manifest = entry.staged.manifest
    name = entry.name or ""
    path = entry.staged.path
    return StoredFile(
        file_hash=manifest.file_hash.hex(),
        manifest_hash=manifest.manifest_hash.hex(),
        link=str(Link(manifest.file_hash, manifest.manifest_hash, name or None, manifest.size)),
        name=name,
        size=manifest.size if size is None else size,
        chunk_size=manifest.chunk_size,
        chunking=manifest.chunking,
        n_chunks=manifest.n_chunks,
        n_parity=manifest.n_parity,
        new_bytes=entry.staged.new_bytes,
        cloned_bytes=entry.staged.cloned_bytes,
        already_stored=entry.already_stored,
        is_collection=entry.is_collection,
        path=None if path is None else os.fsdecode(path),
    )
