"""Owned blobs: the new chunks of one ingest, back to back, and a table of contents behind them.

    offset    size  field
    0         ..    chunks, in the order in which they were written
    index_at  48*n  one entry per chunk, by offset: hash (32), offset (8), length (4), zero (4)
    ..        64    trailer: magic "FCASBLB1", index_at (8), n (8), catalog id (16), xxh3-64 of the entries (8),
                    zero (8), xxh3-64 of the trailer's first 56 bytes (8)

Little-endian. The index lets the catalog be made again from blobs and manifests alone; nothing else reads it. A
hole that gc punched leaves its entry behind, so an entry says where a chunk was written, not that it is still
there. The catalog's `size` of an owned blob is index_at: what must be there for its chunks.

Owns: the temporary file until it is published. Never: changes a published chunk.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from array import array
from collections.abc import Sequence

import xxhash

from fastcas.errors import CatalogCorrupt, StoreError, StoreFull
from fastcas.store.clone import block_of, clone_prefix
from fastcas.store.paths import BLOB_DIR, Folder, os_errors, punch_hole, shown, write_all

__all__ = [
    "BlobWriter", "check_index", "decode_index", "encode_index", "index_start", "open_for_change", "rewrite_index",
]  # fmt: skip

MAGIC = b"FCASBLB1"
ENTRY = struct.Struct("<32sQII")
TRAILER = struct.Struct("<8sQQ16sQQQ")
_TRAILER_BODY = TRAILER.size - 8
IOV_MAX = 1024
RESERVE_B = 64 << 20  # preallocated ahead of the writes, so that a full disk is met before bytes are copied
FLUSH_B = 16 << 20  # flushed in the writer's thread while the next bytes are hashed: the last fsync finds little left
DIRECT_B = 32 << 20  # from so many bytes still to come on, the page cache is not filled with what nobody asks for yet
BLOCK_B = 4096
CLOSED, REFUSED = -1, -2
INDEX_READ_MAX = 1 << 30  # bytes of index that we are willing to read


def encode_index(
    index_at: int, catalog_id: bytes, keys: bytes | bytearray, offsets: array[int], lengths: array[int]
) -> bytes:
    """Return index and trailer for chunks given in the order of their offsets."""
    out = bytearray(ENTRY.size * len(offsets) + TRAILER.size)
    at = 0
    for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        ENTRY.pack_into(out, at, keys[32 * i : 32 * i + 32], offset, length, 0)
        at += ENTRY.size
    digest = xxhash.xxh3_64_intdigest(memoryview(out)[:at])
    TRAILER.pack_into(out, at, MAGIC, index_at, len(offsets), catalog_id, digest, 0, 0)
    struct.pack_into("<Q", out, at + _TRAILER_BODY, xxhash.xxh3_64_intdigest(out[at : at + _TRAILER_BODY]))
    return bytes(out)


def _trailer(fd: int) -> tuple[int, int, bytes, int, int]:
    """Return (index_at, n, catalog id, digest, file size) of a blob, or raise CatalogCorrupt."""
    end = os.fstat(fd).st_size
    data = os.pread(fd, TRAILER.size, end - TRAILER.size) if end >= TRAILER.size else b""
    if len(data) != TRAILER.size:
        raise CatalogCorrupt(f"blob index: expected a trailer of {TRAILER.size} B, file has {end} B")
    magic, index_at, n, catalog_id, digest, zero, own = TRAILER.unpack(data)
    if magic != MAGIC or zero or own != xxhash.xxh3_64_intdigest(data[:_TRAILER_BODY]):
        raise CatalogCorrupt("blob index: the trailer is damaged")
    if ENTRY.size * n > INDEX_READ_MAX or index_at + ENTRY.size * n + TRAILER.size != end:
        raise CatalogCorrupt(f"blob index: {n} entries at {index_at} do not fit a file of {end} B")
    return index_at, n, catalog_id, digest, end


def check_index(fd: int) -> bytes:
    """Check a blob's index; returns the id of the catalog that wrote it.

    Raises:
        CatalogCorrupt: It is damaged, or the file is no owned blob.
    """
    return decode_index(fd)[0]


def index_start(fd: int) -> int:
    """Return where a blob's chunks end and its index begins. Raises CatalogCorrupt."""
    return _trailer(fd)[0]


def decode_index(fd: int) -> tuple[bytes, list[tuple[bytes, int, int]]]:
    """Return (catalog id, [(hash, offset, length)…]) of a blob.

    Raises:
        CatalogCorrupt: It is damaged, or the file is no owned blob.
    """
    index_at, n, catalog_id, digest, _ = _trailer(fd)
    data = os.pread(fd, ENTRY.size * n, index_at)
    if len(data) != ENTRY.size * n or xxhash.xxh3_64_intdigest(data) != digest:
        raise CatalogCorrupt("blob index: the entries are damaged")
    entries = []
    for key, offset, length, zero in ENTRY.iter_unpack(data):
        if zero or offset + length > index_at:
            raise CatalogCorrupt("blob index: an entry lies outside the chunks")
        entries.append((key, offset, length))
    return catalog_id, entries


class BlobWriter:
    """One owned blob in the making. Nothing is created on disk before the first chunk.

    `reserve` is called in the store's thread, `write` in any one thread at a time.

    Args:
        folder: The storage folder.
        catalog_id: 16 bytes for the trailer.
        budget: Bytes that it may take on disk, None: any number.
        sends_soon: A node serves the chunks at once: they go through the page cache, however many they are.
    """

    def __init__(
        self, folder: Folder, catalog_id: bytes, budget: int | None = None, *, sends_soon: bool = True
    ) -> None:
        self._budget = budget
        self._sends_soon = sends_soon
        self._direct = CLOSED
        self._folder = folder
        self._catalog_id = catalog_id
        self._fd = -1
        self._temp = ""
        random_name = secrets.token_hex(16)
        self.name = f"{BLOB_DIR}/{random_name[:2]}/{random_name}.blob"
        self._reserved = 0
        self._unflushed = 0
        self._is_broken = False
        self.size = 0
        self.keys = bytearray()
        self.offsets: array[int] = array("Q")
        self.lengths: array[int] = array("I")
        self.places: dict[bytes, int] = {}

    def allow(self, more: int | None) -> None:
        """Set how many bytes may follow, index included; None: any number."""
        self._budget = None if more is None else self.size + more

    def reserve(self, key: bytes, length: int) -> int:
        """Give a new chunk its offset; the caller writes its bytes there before `publish`."""
        if self._fd < 0:
            self._fd, self._temp = self._folder.create_temp(BLOB_DIR)
        offset = self.size
        self.place(key, offset, length)
        self.size += length
        return offset

    def clone(self, source: int, size: int) -> int | None:
        """Append a whole file by sharing its blocks; nothing of it is a chunk before `place` says so.

        Returns:
            Where it begins, None where that cannot be: then nothing happened.
        """
        if self._fd < 0:
            self._fd, self._temp = self._folder.create_temp(BLOB_DIR)
        block = block_of(self._fd)
        offset = -(-self.size // block) * block
        end = offset + size + ENTRY.size * len(self.offsets) + TRAILER.size
        if self._budget is not None and end > self._budget:
            return None
        if clone_prefix(source, 0, size, self._fd, offset) != size:
            return None
        self.size = offset + size
        self._reserved = max(self._reserved, self.size)
        return offset

    def place(self, key: bytes, offset: int, length: int) -> None:
        """Say that a new chunk lies in what was cloned; in the order of the offsets."""
        self.places[key] = len(self.offsets)
        self.keys += key
        self.offsets.append(offset)
        self.lengths.append(length)

    def read_fd(self) -> int:
        """Return the descriptor of what is there so far, for reading; valid until `publish`."""
        return self._fd

    def punch(self, offset: int, length: int) -> None:
        """Give back what was cloned and is no new chunk, where the file system can."""
        with os_errors(self._folder.path(self._temp), "punching a hole"):
            punch_hole(self._fd, offset, length)

    def write(self, views: Sequence[memoryview], offset: int, expected: int) -> None:
        """Write views back to back at `offset`. `expected`: bytes that may follow in all, for preallocation."""
        if self._is_broken:
            raise StoreError(
                f"{shown(self._folder.path(self._temp))}: an earlier write failed; nothing is written to it"
            )
        try:
            with os_errors(self._folder.path(self._temp), "writing chunks"):
                length = sum(len(view) for view in views)
                self._preallocate(offset + length, expected)
                done = self._write_direct(views, offset, expected)
                views, offset = views[done:], offset + sum(len(view) for view in views[:done])
                for at in range(0, len(views), IOV_MAX):
                    part = views[at : at + IOV_MAX]
                    total = sum(len(view) for view in part)
                    n = os.pwritev(self._fd, part, offset)
                    if n < total:
                        write_all(self._fd, b"".join(part)[n:], offset + n)
                    offset += total
                    self._unflushed += total
                if self._unflushed >= FLUSH_B:
                    os.fdatasync(self._fd)
                    self._unflushed = 0
        except StoreError:
            self._is_broken = True
            raise

    def _write_direct(self, views: Sequence[memoryview], offset: int, expected: int) -> int:
        """Write leading views of whole blocks past the page cache, where that pays and can be; returns how many."""
        if self._sends_soon or self._direct == REFUSED or offset % BLOCK_B or len(views) > IOV_MAX:
            return 0
        if self._direct == CLOSED and expected < DIRECT_B:
            return 0
        whole = next((i for i, view in enumerate(views) if len(view) % BLOCK_B), len(views))
        if not whole:
            return 0
        try:
            if self._direct < 0:
                self._direct = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            total = sum(len(view) for view in views[:whole])
            n = os.pwritev(self._direct, views[:whole], offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # what a file system says that has no such way, or of memory in odd places
                raise
            self._close_direct()
            return 0
        if n < total:
            write_all(self._fd, b"".join(views[:whole])[n:], offset + n)
        return whole

    def _close_direct(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)
        self._direct = REFUSED

    def _preallocate(self, end: int, expected: int) -> None:
        if end <= self._reserved:
            return
        ahead = min(RESERVE_B, max(expected, 0))
        if self._budget is not None:
            room = self._budget - end - ENTRY.size * len(self.offsets) - TRAILER.size
            if room < 0:
                raise StoreFull(
                    f"{shown(self._folder.path(self._temp))}: quota reached after {end} B; nothing of it was stored"
                )
            ahead = min(ahead, room)
        try:
            os.posix_fallocate(self._fd, self._reserved, end + ahead - self._reserved)
            self._reserved = end + ahead
        except OSError as exc:
            if exc.errno != errno.ENOSPC or not ahead:
                raise
            # Less than the look-ahead may be enough: what follows can turn out to be known already.
            os.posix_fallocate(self._fd, self._reserved, end - self._reserved)
            self._reserved = end

    def publish(self) -> str | None:
        """Write the index, make the blob durable under its `name`; returns it, or None without chunks.

        On any error the file is gone.
        """
        if not self.offsets:
            self.discard()
            return None
        try:
            index = encode_index(self.size, self._catalog_id, self.keys, self.offsets, self.lengths)
            with os_errors(self._folder.path(self._temp), "writing the index"):
                write_all(self._fd, index, self.size)
                os.ftruncate(self._fd, self.size + len(index))
            self._folder.publish(self._fd, self._temp, self.name, 0o400)
        except BaseException:
            self.discard()
            raise
        self._close_direct()
        os.close(self._fd)
        self._fd = -1
        return self.name

    def discard(self) -> None:
        """Remove what is there. Idempotent; does nothing after `publish`."""
        self._close_direct()
        if self._fd >= 0:
            self._folder.discard(self._temp)
            os.close(self._fd)
            self._fd = -1


def rewrite_index(
    folder: Folder, name: str, size: int, catalog_id: bytes, extents: Sequence[tuple[bytes, int, int]]
) -> None:
    """Write a damaged index again from what the catalog knows: (hash, offset, length) by offset."""
    keys = b"".join(entry[0] for entry in extents)
    offsets = array("Q", [entry[1] for entry in extents])
    lengths = array("I", [entry[2] for entry in extents])
    index = encode_index(size, catalog_id, keys, offsets, lengths)
    fd = open_for_change(folder, name)
    try:
        with os_errors(folder.path(name), "rewriting the index"):
            write_all(fd, index, size)
            os.ftruncate(fd, size + len(index))
            os.fsync(fd)
    finally:
        os.close(fd)


def open_for_change(folder: Folder, name: str) -> int:
    """Open an owned blob (mode 0400) for writing; its mode is 0400 again when this returns."""
    fd = folder.open(name)
    try:
        with os_errors(folder.path(name), "opening it for writing"):
            os.fchmod(fd, 0o600)
            try:
                return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            finally:
                os.fchmod(fd, 0o400)
    finally:
        os.close(fd)
