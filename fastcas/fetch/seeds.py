"""`--seed-from`: local files in which chunks of a download may lie, such as the version before.

They are cut as the manifest says (by content, or at multiples of its chunk size) and hashed; what is found is copied
into the part file with the same checks as anything else, so a file that changes meanwhile costs a fetch, never a
wrong byte. An index is made once for each way of cutting, and serves all files of a collection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from fastcas.errors import FastCASError
from fastcas.fetch._receiver import Job
from fastcas.fetch.localwork import check_batch
from fastcas.fetch.scheduler import bits
from fastcas.hashing import digest_many
from fastcas.limits import FILE_SIZE_MAX, SEED_CHUNKS_MAX
from fastcas.metadata import CDC, Manifest
from fastcas.store.content_cuts import ContentCuts
from fastcas.store.paths import shown

__all__ = ["SeedFiles"]

log = logging.getLogger(__name__)

BUFFER_B = 8 << 20
BATCH = 16  # chunks copied per visit to a thread
OFFSET_BITS = FILE_SIZE_MAX.bit_length()


class SeedFiles:
    """Files that may have chunks. One per download; belongs to the loop's thread."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Remember where to look; nothing is read before `take`."""
        self._paths = tuple(paths)
        self._indexes: dict[tuple[str, int], _Index] = {}

    async def take(self, job: Job, manifest: Manifest, wanted: int) -> AsyncIterator[tuple[int, int]]:
        """Copy the wanted chunks that are found to their places in the job.

        Args:
            wanted: Chunk set, data chunks only.
        Yields:
            (chunk number, check bits) of each that was found; bits 0 where it could not be read again.
        Raises:
            StoreFull: The destination has no room.
        Cost: reads every file once for each way of cutting, and once more what is copied.
        """
        way = (manifest.chunking, manifest.wanted_size)
        index = self._indexes.get(way)
        if index is None:
            index = self._indexes[way] = _Index()
            stop = threading.Event()
            filling = asyncio.ensure_future(asyncio.to_thread(index.fill, stop, self._paths, *way))
            try:
                await asyncio.shield(filling)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([filling])
                raise
        found = [
            (number, *place) for number in bits(wanted) if (place := index.find(manifest.hash_of(number))) is not None
        ]
        for at in range(0, len(found), BATCH):
            with ExitStack() as stack:
                chunks = []
                for number, path, offset in found[at : at + BATCH]:
                    try:
                        fd = _open(path)
                    except OSError:
                        yield number, 0
                        continue
                    stack.callback(os.close, fd)
                    chunks.append((number, fd, offset))
                for result in await check_batch(job, chunks, write=True):
                    yield result


class _Index:
    """Where chunks lie: hash -> number of the file and offset in one integer."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._places: dict[bytes, int] = {}

    def find(self, key: bytes) -> tuple[str, int] | None:
        """Return (path, offset) of a chunk, or None."""
        place = self._places.get(key)
        return None if place is None else (self._files[place >> OFFSET_BITS], place & ((1 << OFFSET_BITS) - 1))

    def fill(self, stop: threading.Event, paths: Sequence[Path], chunking: str, size: int) -> None:
        """Cut and hash every file; what cannot be read is left out. Blocks."""
        for path in (name for root in paths for name in _files_below(root)):
            if stop.is_set():
                return
            try:
                self._add(path, chunking, size, stop)
            except (OSError, FastCASError) as exc:
                log.warning("seed file is left out path=%s error=%s", shown(path), exc)
            if len(self._places) >= SEED_CHUNKS_MAX:
                log.warning("seed files have more than %d chunks, the rest is not looked at", SEED_CHUNKS_MAX)
                return

    def _add(self, path: str, chunking: str, size: int, stop: threading.Event) -> None:
        fd = _open(path)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or not 0 < info.st_size <= FILE_SIZE_MAX:
                return
            base = len(self._files) << OFFSET_BITS
            self._files.append(path)
            for offset, key in _chunks(fd, info.st_size, chunking, size):
                self._places.setdefault(key, base | offset)
                if stop.is_set() or len(self._places) >= SEED_CHUNKS_MAX:
                    return
        finally:
            os.close(fd)


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)


def _files_below(root: Path) -> Iterator[str]:
    """Yield a file, or every file below a folder, without following links."""
    if not root.is_dir():
        yield str(root)
        return
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))


def _chunks(fd: int, size: int, chunking: str, chunk_size: int) -> Iterator[tuple[int, bytes]]:  # hot
    """Yield (offset, hash) of each chunk of a file."""
    cuts = ContentCuts(size, chunk_size) if chunking == CDC else None
    begin = cuts.longest if cuts is not None else 0
    step = max(BUFFER_B, chunk_size)
    room = (memoryview(bytearray(begin + step)), memoryview(bytearray(begin + step)))  # one holds what is carried over
    read_to = at = 0
    for number in range(-(-size // step)):
        buffer = room[number % 2]
        length = _fill(fd, buffer[begin : begin + min(step, size - read_to)], read_to)
        if length == 0:
            return
        read_to += length
        if cuts is not None:
            keys, chunks = cuts.cut(buffer[: begin + length], begin)
        else:
            chunks = [buffer[i : min(i + chunk_size, length)] for i in range(0, length, chunk_size)]
            keys = digest_many(chunks)
        for key, chunk in zip(keys, chunks, strict=True):
            yield at, key
            at += len(chunk)


def _fill(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view) and (n := os.preadv(fd, [view[done:]], offset + done)):
        done += n
    return done
