"""A file's proven bytes in the order in which somebody reads them, without a destination.

Chunks go into a file without a name in the folder for temporary files; what is allowed to be fetched is a window that
moves with the reader. By link a chunk may be read at once; on a bare hash only when every link from it to the end has
been checked (architecture §5.2), so that everything behind the first byte read is fetched first.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fastcas.errors import FastCASError, Interrupted, StoreError, UsageError
from fastcas.fetch.crowd import Crowd
from fastcas.fetch.download import DownloadHooks, FetchedTree, Settings
from fastcas.fetch.explain import Meter
from fastcas.fetch.filling import Filling
from fastcas.fetch.journal import Journal
from fastcas.fetch.partfile import PartFile, storage_error
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.fetch.tasks import TaskSet
from fastcas.fetch.trust import Chain, ManifestConvictedError
from fastcas.ids import Link, PeerAddr, short
from fastcas.limits import MIB
from fastcas.metadata import Manifest

__all__ = ["READ_AHEAD", "OrderedFetch"]

READ_AHEAD = 16 * MIB  # behind what is read
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class _NoJournal(Journal):
    """A file without a name is never resumed."""

    def __init__(self) -> None:
        self._fd = -1

    def add(self, chunks: object, *, link_checked: bool) -> None:
        """List nothing."""


class _Spool(PartFile):
    """Where the chunks lie until they are read: gone when it is closed."""

    def __init__(self, manifest: Manifest) -> None:
        """Open it, sparse.

        Raises:
            StoreFull, PermissionDenied, StoreError: The folder for temporary files refuses.
        """
        self.path = Path(tempfile.gettempdir())
        self.candidates = {}
        self.same_boot = False
        self.fd = self.direct_fd = self.parity_fd = -1
        self.journal = _NoJournal()
        try:
            with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as parity:
                self.fd = os.dup(file.fileno())
                if manifest.n_parity:
                    self.parity_fd = os.dup(parity.fileno())
            os.ftruncate(self.fd, manifest.size)
        except OSError as exc:
            self.close()
            raise storage_error(exc, f"{self.path}: temporary file", "nothing was fetched") from exc

    def forget(self, start: int, end: int) -> None:
        """Give the space of these bytes back, where the file system can."""
        _fallocate(self.fd, _PUNCH_HOLE, start, end - start)


class _Window(Chain):
    """A chain of which only what is read next may be fetched.

    Attributes:
        first, end: Chunks of the window.
    """

    def __init__(self, manifest: Manifest, *, trusted: bool, by_link: bool) -> None:
        super().__init__(manifest, trusted=trusted)
        self._chunks = manifest.n_chunks
        self.by_link = by_link
        self.takes_any = False
        self.first, self.end = 0, 0

    def allowed(self) -> int:
        """See `Chain`: within the window; on a bare hash all that is behind it is part of it."""
        window = (1 << (self.end if self.by_link else self._chunks)) - (1 << self.first)
        parity = -1 << self._chunks  # is wanted only where data lacks
        return super().allowed() & (window | parity)


class OrderedFetch:
    """One file being read, in one event loop. `open` once, then `ready` and `read_into`, at last `close`.

    Attributes:
        manifest: Known after `open`.
    """

    def __init__(self, link: Link, settings: Settings, *, keeps: bool, read_ahead: int = READ_AHEAD) -> None:
        """Prepare; inside the loop that will be used.

        Args:
            link: What to read. settings: As for a download; `local` and `hooks` are not used. Its `progress` counts
                what was fetched, of the whole file.
            keeps: What was read may be read again; if not, its space is given back.
            read_ahead: Bytes behind what is read that are fetched meanwhile.
        """
        self.link = link
        self._read_ahead = read_ahead
        self.manifest: Manifest | None = None
        self._settings = replace(settings, hooks=self, local=None)
        self._keeps = keeps
        self._receiver = AsyncReceiver()
        self._tasks = TaskSet(f"file {short(link.file_hash)}", self._fail)
        self._crowd = Crowd(link, self._settings, self._receiver, random.Random(), self._tasks)
        self._news = asyncio.Event()
        self._here = 0
        self._forgotten = 0
        self._error: FastCASError | None = None

    async def open(self) -> None:
        """Find somebody who has the file, and its manifest.

        Raises:
            NoPeers, ManifestCorrupt: As `download`.
        """
        self._crowd.find()
        await self._begin()
        self._tasks.spawn(self._run())

    async def _begin(self) -> None:
        manifest, giver = await self._crowd.wait_for_manifest(lambda waiting_on: None)
        by_link = self.link.manifest_hash is not None
        if manifest.is_cdc and manifest.n_chunks > 1 and not by_link:
            raise UsageError(
                f"file {short(self.link.file_hash)}: cut by content, so its hash proves no byte before the last one is "
                f"here; nothing was handed out. Read it by its link, or get it as a whole"
            )
        self.manifest, self._giver = manifest, giver
        trusted = by_link or giver.source in ("user", "link")
        self._chain = _Window(manifest, trusted=trusted, by_link=by_link)
        self._spool = await asyncio.to_thread(_Spool, manifest)
        self._here = 0
        self._filling: Filling | None = None
        if manifest.n_chunks:
            meter = Meter(time.monotonic())
            self._filling = Filling(
                manifest, self._spool, self._chain, self._crowd, self._receiver, self._settings, meter
            )

    async def _run(self) -> None:
        try:
            while self._filling is not None:
                try:
                    await self._filling.run()
                    return
                except ManifestConvictedError as exc:
                    first, end = self._chain.first, self._chain.end
                    assert self.manifest is not None
                    self._crowd.convict(self.manifest, self._giver, str(exc))
                    self._spool.close()
                    await self._begin()  # what was handed out was proven; the rest comes by another manifest
                    self._chain.first, self._chain.end = first, end
        except FastCASError as exc:
            self._fail(exc)
        finally:
            self._news.set()

    def _fail(self, error: FastCASError) -> None:
        if self._error is None:
            self._error = error
        self._crowd.fail(error)
        self._news.set()

    async def ready(self, start: int, end: int) -> None:
        """Return when bytes start..end-1 of the file may be handed out.

        Raises:
            FastCASError: As `download`.
        """
        while not self._is_ready(start, end):
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()

    def _is_ready(self, start: int, end: int) -> bool:
        assert self.manifest is not None
        first, last = self._chunks_before(start + 1) - 1, self._chunks_before(end)
        ahead = min(self.manifest.n_chunks, self._chunks_before(end + self._read_ahead) if self._read_ahead else last)
        if (first, ahead) != (self._chain.first, self._chain.end):
            self._chain.first, self._chain.end = first, ahead
            if self._filling is not None:
                self._filling.look_again()
        if not self._chain.by_link:
            return self._chain.proven_from <= first
        wanted = (1 << last) - (1 << first)
        return self._here & wanted == wanted

    def _chunks_before(self, offset: int) -> int:
        """The number of chunks that begin before `offset`."""
        assert self.manifest is not None
        return self.manifest.chunk_at(min(offset, self.manifest.size) - 1) + 1 if offset > 0 else 0

    def peers(self) -> tuple[PeerAddr, ...]:
        """Return those who can be asked."""
        return tuple(
            remote.addr
            for remote in self._crowd.remotes.values()
            if remote.banned is None and not remote.lacks_file
        )

    async def read(self, start: int, end: int) -> bytes:
        """Return bytes start..end-1, once they are ready.

        Raises:
            FastCASError: As `download`.
        """
        data = memoryview(bytearray(end - start))
        at = 0
        while at < len(data):
            step = min(READ_AHEAD, len(data) - at)
            await self.ready(start + at, start + at + step)
            n = await asyncio.to_thread(self.read_into, data[at : at + step], start + at)
            if n == 0:
                raise StoreError(f"{self._spool.path}: temporary file: shorter than what was written")
            at += n
        return bytes(data)

    def read_into(self, view: memoryview, start: int) -> int:
        """Copy bytes that are `ready`; returns how many. From any thread."""
        try:
            n = os.preadv(self._spool.fd, [view], start)
        except OSError as exc:
            raise storage_error(exc, f"{self._spool.path}: temporary file", "nothing of it was handed out") from exc
        assert self.manifest is not None
        if not self._keeps and not self.manifest.n_parity:
            upto = self.manifest.offset_of(self.manifest.chunk_at(min(start + n, self.manifest.size - 1)))
            if upto > self._forgotten:
                self._spool.forget(self._forgotten, upto)
                self._forgotten = upto
        return n

    async def close(self) -> None:
        """Stop, and let whoever waits in `ready` know. Idempotent."""
        self._fail(Interrupted(f"file {short(self.link.file_hash)}: closed"))
        await self._tasks.close()
        self._crowd.close()
        self._receiver.close()
        if self.manifest is not None:
            self._spool.close()

    # --- DownloadHooks ---

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """Not called: there is no part file."""

    def on_chunk(self, index: int) -> None:
        """A chunk is here."""
        self._here |= 1 << index
        self._news.set()

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        """Not called: nothing is put at a place."""

    def on_tree(self, tree: FetchedTree) -> None:
        """Not called: a collection is read as a file."""

    def member(self) -> DownloadHooks:
        """Not called, likewise."""
        raise AssertionError("a collection is read as a file")

    def end(self) -> None:
        """Not called, likewise."""
