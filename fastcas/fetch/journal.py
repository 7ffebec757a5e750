"""The journal beside a part file: which chunks of which manifest lie in it. A hint that survives kill -9.

`NAME.fastcas-journal`, little-endian:

    offset  size  field
    0       8     magic "FCASJRN1"
    8       32    manifest hash
    40      16    boot id of the machine (records of another boot may be ahead of the disk)
    56      8     xxh3_64 of bytes 0..55
    then records of 16 bytes: 4 chunk number, 4 flags (1 = link checked), 8 xxh3_64(manifest hash + these 8 bytes)

A record is appended after the chunk's bytes were written. A torn or damaged record is skipped, a damaged or missing
header makes every chunk of the part file a candidate: both cost a re-hash, never an error. A kill takes nothing away
that was listed: a resumed download appends to its journal, a new journal gets its header last. The file is locked
(flock) while a download writes, so that two never share a part file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fastcas.errors import StoreLocked

__all__ = ["Journal", "Listed"]

MAGIC = b"FCASJRN1"
HEADER = struct.Struct("<8s32s16sQ")
RECORD = struct.Struct("<IIQ")
RECORD_HEAD = struct.Struct("<II")
LINK_CHECKED = 1


def _boot_id() -> bytes:
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


@dataclass(frozen=True, slots=True)
class Listed:
    """What an old journal says.

    Attributes:
        chunks: Chunk number -> whether its link was checked too.
        is_ours: It was written for the same manifest; otherwise `chunks` is empty.
        readable: Its header is intact; if not, any chunk may be in the part file.
        same_boot: Written since the machine started: what it lists is in the file.
    """

    chunks: dict[int, bool]
    is_ours: bool
    readable: bool
    same_boot: bool


class Journal:
    """An open journal, locked."""

    def __init__(self, path: Path, manifest_hash: bytes) -> None:
        """Open or create it, and lock it.

        Raises:
            StoreLocked: Another download writes this part file.
            OSError: It cannot be opened.
        """
        self.path = path
        self._manifest_hash = manifest_hash
        self._end = -1  # where the next record goes; below 0: there is no journal of ours yet
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._fd)
            if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreLocked(f"{path}: another download writes the same destination; nothing was changed") from exc
            raise

    def read(self, n_chunks: int) -> Listed:
        """Return what it lists of the manifest it was opened for. Damage is skipped."""
        most = HEADER.size + RECORD.size * 4 * max(n_chunks, 1)
        data = os.pread(self._fd, most + 1, 0)
        if not HEADER.size <= len(data) <= most:  # nothing, or far more than any download lists
            return Listed({}, is_ours=True, readable=False, same_boot=False)
        magic, manifest_hash, boot, check = HEADER.unpack_from(data)
        if magic != MAGIC or check != xxhash.xxh3_64_intdigest(data[: HEADER.size - 8]):
            return Listed({}, is_ours=True, readable=False, same_boot=False)
        same_boot = boot == _boot_id() and any(boot)
        if manifest_hash != self._manifest_hash:
            return Listed({}, is_ours=False, readable=True, same_boot=same_boot)
        chunks: dict[int, bool] = {}
        self._end = HEADER.size + (len(data) - HEADER.size) // RECORD.size * RECORD.size
        for at in range(HEADER.size, self._end, RECORD.size):
            index, flags, check = RECORD.unpack_from(data, at)
            if index < n_chunks and check == self._check(data[at : at + 8]):
                chunks[index] = chunks.get(index, False) or bool(flags & LINK_CHECKED)
        return Listed(chunks, is_ours=True, readable=True, same_boot=same_boot)

    def start(self, listed: Sequence[tuple[int, bool]] = ()) -> None:
        """Begin a new journal that lists these chunks; one that was read and is good needs no start.

        Raises:
            OSError: The disk refuses; what is there then counts as damaged.
        """
        records = self._records(listed)
        head = MAGIC + self._manifest_hash + _boot_id()
        # Killed at any point: without a header everything in the part file is a candidate.
        if os.fstat(self._fd).st_size:
            self._write(bytes(HEADER.size), 0)
        self._write(records, HEADER.size)
        os.ftruncate(self._fd, HEADER.size + len(records))
        self._write(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)), 0)
        self._end = HEADER.size + len(records)

    def add(self, chunks: Sequence[int], *, link_checked: bool) -> None:
        """Append chunks whose bytes have been written. One write.

        Raises:
            OSError: The disk refuses. What it took of these records is overwritten by the next.
        """
        if chunks:
            records = self._records([(index, link_checked) for index in chunks])
            self._write(records, self._end)
            self._end += len(records)

    def _records(self, chunks: Sequence[tuple[int, bool]]) -> bytes:
        out = bytearray()
        for index, link_checked in chunks:
            flags = LINK_CHECKED if link_checked else 0
            out += RECORD.pack(index, flags, self._check(RECORD_HEAD.pack(index, flags)))
        return bytes(out)

    def _check(self, head: bytes) -> int:
        return xxhash.xxh3_64_intdigest(self._manifest_hash + head)

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, at)
            view, at = view[n:], at + n

    def remove(self) -> None:
        """Delete it: the download is finished."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock and close. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
