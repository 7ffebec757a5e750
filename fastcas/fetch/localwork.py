"""Work on this machine's own bytes, off the loop: checking chunks that are here, hashing a file that exists."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from fastcas.errors import StoreFull
from fastcas.fetch._receiver import Job
from fastcas.hashing import ChunkHasher, Sha256
from fastcas.metadata import Manifest, choose_chunk_size

__all__ = ["check_batch", "hash_content", "hash_existing"]

READ_B = 1 << 20


async def check_batch(job: Job, chunks: Sequence[tuple[int, int, int]], *, write: bool) -> list[tuple[int, int]]:
    """Check chunks that lie in files of this machine, in a thread.

    Args:
        job: Whose chunks they should be.
        chunks: (chunk number, fd, offset) each.
        write: Copy those whose hash is right to their place in the job.
    Returns:
        (chunk number, check bits) each; 0 bits where it could not be read.
    Raises:
        StoreFull: The destination has no room.
    """
    work = asyncio.get_running_loop().run_in_executor(None, _check_batch, job, chunks, write)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])  # the caller's descriptors are in use until then
        raise


def _check_batch(job: Job, chunks: Sequence[tuple[int, int, int]], write: bool) -> list[tuple[int, int]]:
    out = []
    for index, fd, offset in chunks:
        try:
            flags = job.take(index, fd, offset, write)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoreFull(f"chunk #{index}: {exc.strerror}; the part file is kept and can be resumed") from exc
            flags = 0
        out.append((index, flags))
    return out


async def hash_content(fd: int, size: int) -> bytes:
    """Return the SHA-256 of a file's first `size` bytes (less where it is shorter), read in a thread.

    Raises:
        OSError: It cannot be read.
    """
    work = asyncio.get_running_loop().run_in_executor(None, _hash_content, fd, size)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])  # the descriptor is in use until then
        raise


def _hash_content(fd: int, size: int) -> bytes:
    content = Sha256()
    buffer = memoryview(bytearray(READ_B))
    at = 0
    while at < size and (n := os.preadv(fd, [buffer[: size - at]], at)):
        content.update(buffer[:n])
        at += n
    return content.digest()


def hash_existing(path: Path) -> Manifest:
    """Return the manifest of a finished file, cut as a publisher would by default. Reads it once; blocks."""
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        file.seek(0)
        chunk_size = choose_chunk_size(size)
        hasher = ChunkHasher(chunk_size)
        buffer = bytearray(READ_B)
        while n := file.readinto(buffer):
            hasher.update(memoryview(buffer)[:n])
    hashes, midstates, file_hash, n_read = hasher.finish()
    return Manifest(file_hash, n_read, chunk_size, hashes, midstates)
