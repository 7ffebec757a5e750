"""Hashing many files that stay where they are, on all cores.

Nothing is copied, so no file waits for another: each core's thread takes the next group of files, reads and hashes it
without the interpreter's lock, and hands the manifests on in order. A group is one file; or two that go through the
kernel side by side, as long as there is enough for every core; or neighbours of one chunk each that fit a buffer
together.
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
from typing import NoReturn

from fastcas.errors import Interrupted
from fastcas.hashing import digest_many
from fastcas.metadata import Manifest, choose_chunk_size
from fastcas.store._pass import CHANGED_WHILE, STOPPED, Tally, pass_files
from fastcas.store.ingest import BUFFER_B, Staged, cut_short
from fastcas.store.paths import translate
from fastcas.store.sources import FileSource

__all__ = ["Job", "hash_in_place"]

THREADS_MAX = 16
STEP_B = 1 << 20  # of one file, read and hashed at a time: a tenth less CPU than 4 MiB
SIDE_BY_SIDE = 4  # chunks of each of two files that the kernel takes at a time
PAIR_MAX_B = 64 << 20  # of each: at the end no core waits long for another
PAIRS_MIN = 4  # for each core that two at a time leave to do
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
    n_threads = min(len(os.sched_getaffinity(0)), THREADS_MAX)
    groups = _groups(jobs, units, len(jobs) - 2 * PAIRS_MIN * n_threads)
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
            work.tally.stop()
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
            progress(work.tally.n_bytes)
        if staged is not None:
            return staged


def _groups(jobs: Sequence[Job], units: Sequence[int], pairs_end: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of files that are hashed together; no pair begins at `pairs_end` or later."""
    begin = 0
    while begin < len(jobs):
        end = begin + 1
        if jobs[begin].size <= units[begin]:
            total = jobs[begin].size
            while end < len(jobs) and jobs[end].size <= units[end] and total + jobs[end].size <= BUFFER_B:
                total += jobs[end].size
                end += 1
        elif begin < pairs_end and end < len(jobs) and units[begin] == units[end]:
            least = SIDE_BY_SIDE * units[begin]
            if 2 * least <= BUFFER_B and all(least <= jobs[i].size <= PAIR_MAX_B for i in (begin, end)):
                end += 1
        yield begin, end
        begin = end


class _Work:
    """What the threads of one call share."""

    def __init__(self, buffer_size: int) -> None:
        self._buffer_size = buffer_size
        self._local = threading.local()
        self.tally = Tally()

    def run(self, jobs: Sequence[Job], units: Sequence[int]) -> list[Staged]:
        """Hash one group in the thread that calls."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, self._buffer_size))  # no page before it is used
        sources: list[FileSource] = []
        try:
            for job in jobs:
                sources.append(job.open())
                if sources[-1].size != job.size:
                    raise cut_short(sources[-1], sources[-1].size, job.size)
            if jobs[0].size > units[0]:
                return self._pass(sources, units[0], buffer)
            return self._together(sources, units, buffer)
        finally:
            for source in sources:
                source.close()

    def _pass(self, sources: Sequence[FileSource], unit: int, buffer: memoryview) -> list[Staged]:
        """Hash one file, or two side by side."""
        step = max(STEP_B, unit) if len(sources) == 1 else 2 * max(STEP_B, SIDE_BY_SIDE * unit)
        sizes = [source.size for source in sources]
        done, why, failed, got = pass_files([source.fd for source in sources], sizes, unit, buffer[:step], self.tally)
        if why:
            self._refuse(sources[failed], why, got)
        staged = []
        for source, (hashes, midstates, content) in zip(sources, done, strict=True):
            source.skip(source.size)
            chain = midstates[: len(hashes) - 32]  # after the last chunk it is the content's hash but for the padding
            staged.append(self._staged(source, Manifest(content, source.size, unit, hashes, chain)))
        return staged

    def _together(self, sources: Sequence[FileSource], units: Sequence[int], buffer: memoryview) -> list[Staged]:
        views, at = [], 0
        for source in sources:
            views.append(buffer[at : at + source.size])
            got = source.readinto(views[-1])
            if got != source.size:
                self._refuse(source, CHANGED_WHILE, got)
            at += source.size
        staged = []
        for source, unit, digest in zip(sources, units, digest_many(views), strict=True):
            staged.append(self._staged(source, Manifest(digest, source.size, unit, digest, b"")))
        self.tally.add(at)
        return staged

    @staticmethod
    def _refuse(source: FileSource, why: int, got: int) -> NoReturn:
        """Raise what stands for a file that could not be read to its end."""
        if why == STOPPED:
            raise Interrupted(f"{source.label}: not read to its end; nothing of it was stored")
        if why > 0:
            raise translate(OSError(why, os.strerror(why)), source.label, "reading it")
        source.skip(source.size)
        source.finish()
        raise cut_short(source, got, source.size)

    @staticmethod
    def _staged(source: FileSource, manifest: Manifest) -> Staged:
        source.finish()
        return Staged(manifest, 0, source.path, source.identity)
