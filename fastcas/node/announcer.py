"""Tells the network what this node has: files and their metadata at once, chunk keys as snapshots, nothing at the end.

The DHT process repeats what it was told until that is withdrawn; a new DHT process is told everything again.
Owns one task that works through what is to be said. Never waits for the network in anybody's way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from fastcas.errors import FastCASError
from fastcas.ids import short
from fastcas.peers.discovery import Discovery

__all__ = ["Announcement", "Announcer"]

log = logging.getLogger(__name__)

WITHDRAW_S = 2.0
RETRY_S = 5.0
WHOLE = 1000


@dataclass(frozen=True, slots=True)
class Announcement:
    """A file as others should know it: `have` in thousandths; name and size only matter for a whole file."""

    file_hash: bytes
    manifest_hash: bytes
    name: str
    size: int
    have: int = WHOLE


class Announcer:
    """Belongs to the loop's thread. `discovery` may be absent: then nothing is ever said."""

    def __init__(self, discovery: Callable[[], Discovery | None]) -> None:
        self._discovery = discovery
        self._todo: dict[bytes, Announcement] = {}
        self._said: dict[bytes, Announcement] = {}
        self._gone: set[bytes] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    def announce(self, items: list[Announcement]) -> None:
        """Say that these files are here."""
        for item in items:
            self._todo[item.file_hash] = item
            self._gone.discard(item.file_hash)
        self._idle.clear()
        self._wake.set()

    def repeat(self) -> None:
        """Say everything again: there is a new DHT process. What is only partly here nobody else remembers."""
        self._todo = self._said | self._todo
        if self._todo:
            self._idle.clear()
            self._wake.set()

    def withdraw(self, file_hash: bytes) -> None:
        """Say that a file is here no more."""
        self._todo.pop(file_hash, None)
        self._said.pop(file_hash, None)
        self._gone.add(file_hash)
        self._idle.clear()
        self._wake.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until everything is said; False if that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Withdraw everything, within 2 s, and end. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        discovery = self._discovery()
        if discovery is not None:
            try:
                async with asyncio.timeout(WITHDRAW_S):
                    await discovery.withdraw(everything=True)
            except (FastCASError, OSError, TimeoutError) as error:
                log.info("could not withdraw announcements error=%s", error)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            discovery = self._discovery()
            if discovery is None:
                self._todo.clear()
                self._gone.clear()
                self._idle.set()
                continue
            items, self._todo = self._todo, {}
            self._said |= items
            gone, self._gone = self._gone, set()
            try:
                await self._say(discovery, items, gone)
            except (FastCASError, OSError) as error:
                log.warning("announcing failed files=%d error=%s", len(items), error)
                self._todo = items | self._todo
                self._gone |= gone
                await asyncio.sleep(RETRY_S)
                self._wake.set()
            if not self._todo and not self._gone:
                self._idle.set()

    async def _say(self, discovery: Discovery, items: dict[bytes, Announcement], gone: set[bytes]) -> None:
        if gone:
            await discovery.withdraw(sorted(gone))
        if items:
            stored = await discovery.announce_files([(item.file_hash, item.have) for item in items.values()])
            log.info("announced files=%d stored=%d", len(items), stored)
        for item in items.values():
            if item.have == WHOLE:
                stored = await discovery.put_metadata(item.file_hash, item.name, item.size, item.manifest_hash)
                log.debug("metadata file=%s stored=%d", short(item.file_hash), stored)
