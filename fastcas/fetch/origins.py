"""The origins of one download: which chunks they are asked for, and what becomes of the bytes.

An origin is asked only for chunks that have been lacking for a while: nobody who can be asked has them. Runs of
consecutive chunks are one request. Bytes go into a buffer of this process, and to their place only through the same
check as any others. Owns its lines (four, all origins together) and their buffers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from fastcas.errors import FastCASError, StoreError, UsageError
from fastcas.fetch._receiver import Job
from fastcas.fetch.origin import Origin, OriginLine
from fastcas.fetch.pacing import Pace
from fastcas.fetch.partfile import storage_error
from fastcas.fetch.scheduler import Scheduler
from fastcas.fetch.tasks import TaskSet
from fastcas.limits import MIB
from fastcas.metadata import Manifest

__all__ = ["LACKING_S", "Origins"]

LINES = 4
RUN_BYTES = 4 * MIB  # per request: at 50 ms round trip four lines still carry 320 MB/s
LACKING_S = 1.0  # nobody has had a chunk for so long
PARITY_S = 3.0  # the same where parity may bring it back first


class Origins:
    """Fetches what the swarm lacks.

    Args:
        urls: Checked by `parse_origin`.
        manifest, job, scheduler, pace: Of the download. A chunk that an origin is asked for is not wanted of peers.
        settle: Called with (chunk, check bits, origin); returns the bytes that count, 0 when they are wrong.
        tasks: Where the lines run.
    """

    def __init__(
        self,
        urls: Sequence[str],
        manifest: Manifest,
        job: Job,
        scheduler: Scheduler,
        pace: Pace | None,
        settle: Callable[[int, int, str], int],
        tasks: TaskSet,
    ) -> None:
        named = frozenset(urlsplit(url).hostname or "" for url in urls)
        self.origins = [Origin(url, named) for url in urls]
        self._manifest = manifest
        self._job = job
        self._scheduler = scheduler
        self._pace = pace
        self._settle = settle
        self._tasks = tasks
        self._lacking = 0
        self._seen: deque[tuple[float, int]] = deque()
        self._n_lines = 0
        self._turn = 0
        self.n_asked = 0  # chunks that are being fetched

    @property
    def n_received(self) -> int:
        """Bytes that came from origins, right or wrong."""
        return sum(origin.n_received for origin in self.origins)

    def can_help(self) -> bool:
        """Whether any origin may still be asked."""
        return any(origin.failed is None for origin in self.origins)

    def what_they_did(self) -> str:
        """Return what each origin did last, for the error that ends the download."""
        return "; ".join(f"{origin.shown}: {origin.did}" for origin in self.origins)

    def offer(self, lacking: int, now: float, *, nobody_comes: bool) -> None:
        """Say which chunks lack at the moment; those that have for long enough are fetched.

        Args:
            lacking: Wanted chunks that nobody has who can be asked, and that are in flight nowhere.
            nobody_comes: No peer can turn up any more: waiting is no use.
        """
        self._seen.append((now, lacking))
        after = PARITY_S if self._manifest.n_parity else LACKING_S
        while len(self._seen) > 1 and self._seen[1][0] <= now - after:
            self._seen.popleft()
        ready = lacking
        for _, earlier in self._seen:
            ready &= earlier
        if not nobody_comes and self._seen[0][0] > now - after:
            ready = 0
        self._lacking = ready
        while self._n_lines < min(LINES, ready.bit_count()) and self._usable(now):
            self._n_lines += 1
            self._tasks.spawn(self._line())

    def _usable(self, now: float) -> list[Origin]:
        return [origin for origin in self.origins if origin.failed is None and origin.rest_until <= now]

    def _take_run(self, now: float) -> range:
        """The next chunks to ask for, taken from everybody else; empty when there is nothing to ask for now."""
        self._lacking &= self._scheduler.free & self._scheduler.allowed
        if not self._lacking:
            return range(0)
        size = self._manifest.chunk_size
        most = max(1, RUN_BYTES // size)
        if self._pace is not None:
            most = min(most, self._pace.chunks(now, size))
        first = (self._lacking & -self._lacking).bit_length() - 1
        end = first
        while end - first < most and self._lacking >> end & 1:
            end += 1
        run = range(first, end)
        for index in run:
            self._scheduler.done(index)
            self._lacking &= ~(1 << index)
            self.n_asked += 1
        if self._pace is not None:
            self._pace.spend(sum(self._manifest.length_of(index) for index in run))
        return run

    async def _line(self) -> None:
        """Fetch runs while there are any."""
        line = OriginLine()
        buffer = os.memfd_create("fastcas-origin", os.MFD_CLOEXEC)
        try:
            while usable := self._usable(time.monotonic()):
                run = self._take_run(time.monotonic())
                if not run:
                    break
                origin = usable[self._turn % len(usable)]
                self._turn += 1
                left = list(run)
                try:
                    await self._fetch(line, origin, buffer, left)
                except (StoreError, UsageError):
                    raise  # our own disk
                except FastCASError as exc:
                    origin.note(exc, time.monotonic())
                finally:
                    self.n_asked -= len(left)
                    for index in left:
                        self._scheduler.want(index)
        finally:
            self._n_lines -= 1
            line.close()
            os.close(buffer)

    async def _fetch(self, line: OriginLine, origin: Origin, buffer: int, left: list[int]) -> None:
        """Fetch the chunks of `left` and remove from it those that are in their place."""
        manifest = self._manifest
        begin = manifest.offset_of(left[0])
        end = manifest.offset_of(left[-1]) + manifest.length_of(left[-1])
        written = 0

        def take(piece: bytes) -> None:
            nonlocal written
            os.pwrite(buffer, piece, written)
            written += len(piece)

        error: FastCASError | None = None
        try:
            try:
                await line.read(origin, begin, end, manifest.size, take)
            except FastCASError as exc:
                error = exc  # what came before it counts
            for index in list(left):
                at = manifest.offset_of(index) - begin
                length = manifest.length_of(index)
                if written < at + length:
                    break
                flags = await self._check(index, buffer, at)
                left.remove(index)
                self.n_asked -= 1
                if not self._settle(index, flags, origin.shown):
                    origin.give_up(f"chunk #{index}: wrong bytes")
                    return
                origin.succeeded(length)
            if error is not None:
                raise error
        finally:
            if self._pace is not None and written < end - begin:
                self._pace.spend(written - (end - begin))

    async def _check(self, index: int, buffer: int, at: int) -> int:
        """Check a chunk and write it to its place, in a thread."""
        work = asyncio.get_running_loop().run_in_executor(None, self._job.take, index, buffer, at, True)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # it uses the buffer until then
            raise
        except OSError as exc:
            raise storage_error(exc, f"chunk #{index}", "the part file is kept and can be resumed") from exc
