"""Hashing many files that stay where they are, on all cores.

Nothing is copied, so no file waits for another: each core's thread takes the next group of files, reads and hashes it
without the interpreter's lock, and hands the manifests on in order. A group is one file, or neighbours of one chunk
each that fit a buffer together: those go side by side through the kernel's lanes.
Memory: one buffer of 4 MiB, or one chunk if that is larger, per thread; of a larger file it is filled in steps that a
core's own cache holds.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from fastcas.errors import Interrupted
from fastcas.hashing import digest_many
from fastcas.metadata import Manifest, choose_chunk_size
from fastcas.store.ingest import BUFFER_B, Hashes, Staged, cut_short
from fastcas.store.sources import FileSource

__all__ = ["Job", "hash_in_place"]

THREADS_MAX = 16
STEP_B = 1 << 20  # read and hashed at a time: a tenth less CPU than 4 MiB
POLL_S = 0.1  # between two reports of progress


@dataclass(frozen=True, slots=True)
class Job:
    """One file that is not empty: its size, and how it is opened; the hashing thread closes it."""

    size: int
    open: Callable[[], FileSource]


def hash_in_place(
    jobs: Sequence[Job], chunk_size: int | None, progress: Callable[[int], None] | None = None
) -> Generator[Staged, None, None]:
    """Hash files on all cores; yields what came of each, in order.

    Args:
        jobs: Files of fixed chunks and without parity.
        chunk_size: Bytes per chunk, None: automatic for each.
        progress: Called now and then, in the caller's thread, with how many bytes are done.
    Raises:
        FileChanged: A file changed while it was read.
        UsageError: Chunk size; a file that would have too many chunks.
        What `Job.open` raises.
    """
    units = [choose_chunk_size(job.size, chunk_size) for job in jobs]
    groups = _groups(jobs, units)
    n_threads = min(len(os.sched_getaffinity(0)), THREADS_MAX)
    work = _Work(max([BUFFER_B, *units]))
    waiting: deque[Future[list[Staged]]] = deque()
    with ThreadPoolExecutor(n_threads, "fastcas-hash") as pool:
        try:
            for begin, end in groups:
                waiting.append(pool.submit(work.run, jobs[begin:end], units[begin:end]))
                if len(waiting) > 2 * n_threads:
                    yield from _next(waiting, work, progress)
            while waiting:
                yield from _next(waiting, work, progress)
        finally:
            work.is_over = True
            for future in waiting:
                future.cancel()


def _next(waiting: deque[Future[list[Staged]]], work: _Work, progress: Callable[[int], None] | None) -> list[Staged]:
    future = waiting.popleft()
    while True:
        staged: list[Staged] | None
        try:
            staged = future.result(None if progress is None else POLL_S)
        except FutureTimeoutError:
            staged = future.result() if future.done() else None
        if progress is not None:
            progress(work.done)
        if staged is not None:
            return staged


def _groups(jobs: Sequence[Job], units: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of files that are hashed together."""
    begin = total = 0
    for at, job in enumerate(jobs):
        if at > begin and (job.size > units[at] or total + job.size > BUFFER_B):
            yield begin, at
            begin, total = at, 0
        total += job.size
        if job.size > units[at]:
            yield begin, at + 1
            begin, total = at + 1, 0
    if begin < len(jobs):
        yield begin, len(jobs)


class _Work:
    """What the threads of one call share."""

    def __init__(self, buffer_size: int) -> None:
        self._buffer_size = buffer_size
        self._local = threading.local()
        self._lock = threading.Lock()
        self.done = 0
        self.is_over = False

    def run(self, jobs: Sequence[Job], units: Sequence[int]) -> list[Staged]:
        """Hash one group in the thread that calls."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, self._buffer_size))  # no page before it is used
        if len(jobs) == 1:
            return [self._one(jobs[0], units[0], buffer)]
        return self._together(jobs, units, buffer)

    def _one(self, job: Job, unit: int, buffer: memoryview) -> Staged:
        step = max(1, STEP_B // unit) * unit
        source = job.open()
        try:
            hashes = Hashes(source.size, unit)
            for at in range(0, source.size, step):
                view = buffer[: min(step, source.size - at)]
                self._fill(source, view, at)
                hashes.feed(view)
                self._count(len(view))
            return self._staged(source, hashes.manifest())
        finally:
            source.close()

    def _together(self, jobs: Sequence[Job], units: Sequence[int], buffer: memoryview) -> list[Staged]:
        sources: list[FileSource] = []
        try:
            views, at = [], 0
            for job in jobs:
                source = job.open()
                sources.append(source)
                if source.size != job.size:
                    raise cut_short(source, source.size, job.size)
                views.append(buffer[at : at + job.size])
                self._fill(source, views[-1], 0)
                at += job.size
            staged = []
            for source, unit, digest in zip(sources, units, digest_many(views), strict=True):
                staged.append(self._staged(source, Manifest(digest, source.size, unit, digest, b"")))
            self._count(at)
            return staged
        finally:
            for source in sources:
                source.close()

    def _fill(self, source: FileSource, view: memoryview, at: int) -> None:
        if self.is_over:
            raise Interrupted(f"{source.label}: not read to its end; nothing of it was stored")
        got = source.readinto(view)
        if got != len(view):
            source.finish()
            raise cut_short(source, at + got, source.size)

    @staticmethod
    def _staged(source: FileSource, manifest: Manifest) -> Staged:
        source.finish()
        return Staged(manifest, 0, source.path, source.identity)

    def _count(self, n: int) -> None:
        with self._lock:
            self.done += n
