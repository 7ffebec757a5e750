"""Downloads of a node: fetched, seeded while they run, and seeded in place when they are finished.

One `Downloads` per agent, in the loop's thread. A download belongs to the request that asked for it: when its
caller goes away it is cancelled, and the part file with its journal stays for the next attempt.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcas.errors import FastCASError, Interrupted
from fastcas.fetch.pacing import Pace
from fastcas.ids import Link, PeerAddr, short
from fastcas.limits import STALL_TIMEOUT_S
from fastcas.metadata import Manifest
from fastcas.node.announcer import WHOLE, Announcement, Announcer
from fastcas.node.download_report import ProgressRelay, result_to_map
from fastcas.node.local_chunks import TableChunks
from fastcas.node.publisher import Publish, Publisher
from fastcas.node.reservation import Reservation
from fastcas.node.seeding import Seeding
from fastcas.node.store_thread import StoreThread
from fastcas.peers.discovery import Discovery
from fastcas.store import Store

if TYPE_CHECKING:
    from fastcas.fetch import FetchedTree, Progress
    from fastcas.fetch.choosing import Choice

__all__ = ["Downloads", "Running"]

log = logging.getLogger(__name__)

REGISTER_S = 2.0


@dataclass
class Running:
    """A download in progress, for `status`."""

    file_hash: bytes
    name: str
    started_at: float
    done: int = 0
    total: int = 0
    rate_Bps: float = 0.0
    peers: int = 0
    waiting_on: str = ""

    def to_map(self) -> dict[str, Any]:
        """Return it as `status` shows it."""
        return {
            "file_hash": self.file_hash.hex(), "name": self.name, "done": self.done, "total": self.total,
            "rate_Bps": int(self.rate_Bps), "peers": self.peers, "waiting_on": self.waiting_on,
        }  # fmt: skip


class Downloads:
    """Runs downloads for the agent.

    Args:
        store, thread, publisher, publish, announcer: The agent's parts.
        node_id: Ours, 40 hex digits.
        data_port: Returns our TCP port, None while nothing is served.
        discovery: Returns where to ask for peers, None where there are only the named ones.
        callers: Returns [(node_id, ip, port)] of those who asked our workers for a file.
        named_peers: That the user named, to be asked for every file.
        max_download_Bps: Limit of all downloads together, bytes per second.
        is_busy: Whether our workers' uplink has more to send than it should, see `download`.
    """

    def __init__(
        self,
        *,
        store: Store,
        thread: StoreThread,
        publisher: Publisher,
        publish: Publish,
        announcer: Announcer,
        node_id: str,
        data_port: Callable[[], int | None],
        discovery: Callable[[], Discovery | None],
        callers: Callable[[bytes], list[tuple[str, str, int]]],
        named_peers: Sequence[PeerAddr] = (),
        max_download_Bps: int | None = None,
        is_busy: Callable[[], bool] | None = None,
    ) -> None:
        self._store = store
        self._thread = thread
        self._publisher = publisher
        self._publish = publish
        self._announcer = announcer
        self._node_id = node_id
        self._data_port = data_port
        self._discovery = discovery
        self._callers = callers
        self._is_busy = is_busy
        self._named_peers = tuple(named_peers)
        self._pace = Pace(max_download_Bps) if max_download_Bps else None
        self._tasks: set[asyncio.Future[None]] = set()
        self._closing = threading.Event()
        self._numbers = itertools.count(1)
        self._running: dict[int, Running] = {}

    async def close(self) -> None:
        """Wait for nothing more to be registered. Idempotent."""
        self._closing.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def running(self) -> list[dict[str, Any]]:
        """Return the downloads in progress."""
        return [entry.to_map() for entry in self._running.values()]

    async def get(
        self,
        link: Link,
        out: Path | None,
        *,
        folder: Path,
        peers: list[PeerAddr],
        timeout_s: float,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        raw: bool = False,
        force: bool = False,
        origins: Sequence[str] = (),
        max_download_Bps: int | None = None,
        seed_from: Sequence[Path] = (),
        choice: Choice | None = None,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Fetch a file or collection, and seed it where it is.

        Args:
            link: What to fetch.
            out: File or folder to create; None: what it is called, in `folder`.
            folder: See `out`.
            peers: To ask beside those that were named for all files.
            timeout_s: For the first peer and the manifest. stall_timeout_s: Without a byte from anybody.
            raw: A collection is an ordinary file.
            force: Replace a destination with other content.
            origins: URLs for what no peer has.
            max_download_Bps: A limit beside the node's.
            seed_from: Files and folders in which chunks may lie.
            choice: Which files of a collection; None: all.
            on_progress: Gets plain maps.
        Returns:
            `result_to_map` of the download.
        Raises:
            FastCASError: As `fastcas.fetch.download`; the part file is kept where it can be resumed.
        """
        # The receiver and its kernels are loaded when the first download needs them.
        from fastcas.fetch.download import download

        running = Running(link.file_hash, link.name or (out.name if out else ""), time.monotonic())
        number = next(self._numbers)
        self._running[number] = running
        local = TableChunks(self._publisher)
        seeding = Seeding(self._store, self._thread, self._publisher, self._publish, self._on_offered)

        reservation = Reservation(self._store, self._thread.run)
        relay = ProgressRelay(on_progress)
        pace = self._pace if max_download_Bps is None else Pace(max_download_Bps, self._pace)
        known = await self._thread.run(self._store.manifests_of, link.file_hash) if origins else []

        def progress(now: Progress) -> None:
            running.done, running.total, running.rate_Bps = now.bytes_done, now.bytes_total, now.rate_Bps
            running.peers, running.waiting_on = now.peers, now.waiting_on
            relay(now)

        try:
            result = await download(
                link, out, discovery=self._discovery(), peers=[*peers, *self._named_peers], local=local,
                node_id=self._node_id, data_port=self._data_port(), timeout_s=timeout_s,
                stall_timeout_s=stall_timeout_s, hooks=seeding, progress=progress, raw=raw, force=force, folder=folder,
                callers=self._callers, origins=origins, pace=pace, known=known, reserve=reservation,
                seed_from=seed_from, choice=choice, is_busy=self._is_busy,
            )  # fmt: skip
            registering = [
                asyncio.ensure_future(self._register(path, manifest, path.name))
                for path, manifest, is_proven in seeding.finished
                if is_proven
            ]
            registering += [asyncio.ensure_future(self._register_tree(tree)) for tree in seeding.trees]
            for task in registering:
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            if registering:
                # The store may be busy for long; the user has the file already.
                await asyncio.wait(registering, timeout=REGISTER_S)
        finally:
            await seeding.close()
            await reservation.release()
            local.close()
            self._running.pop(number, None)
        log.info(
            "fetched file=%s size=%d seconds=%.2f peers=%d", short(link.file_hash), result.size, result.seconds,
            len(result.bytes_by_peer),
        )  # fmt: skip
        return result_to_map(result)

    def _on_offered(self, manifest: Manifest) -> None:
        if self._data_port() is not None:
            self._announcer.announce([Announcement(manifest.file_hash, manifest.manifest_hash, "", manifest.size, 1)])

    async def _register(self, path: Path, manifest: Manifest, name: str) -> None:
        """Seed a finished file in place. A failure is logged: the user has the file."""
        try:
            await self._thread.run(self._store.register_linked, path, manifest, name, verified=True)
        except (FastCASError, OSError) as error:
            log.warning("finished file is not seeded path=%s error=%s", path, error)
            return
        self._announcer.announce(
            [Announcement(manifest.file_hash, manifest.manifest_hash, name, manifest.size, WHOLE)]
        )

    async def _register_tree(self, tree: FetchedTree) -> None:
        """Serve a finished collection. A failure is logged: the user has the folder."""
        manifest = tree.manifest

        def progress(done: int, total: int) -> None:
            if self._closing.is_set():
                raise Interrupted(f"{tree.name}: the node ends; the folder is not seeded")

        try:
            await self._thread.run(
                self._store.register_tree, tree.path, tree.collection, manifest, tree.name, members=tree.members,
                identities=tree.identities, progress=progress,
            )  # fmt: skip
        except (FastCASError, OSError) as error:
            log.warning("finished collection is not seeded path=%s error=%s", tree.path, error)
            return
        whole = [Announcement(manifest.file_hash, manifest.manifest_hash, tree.name, manifest.size, WHOLE)]
        whole += [Announcement(pack.file_hash, pack.manifest_hash, "", pack.size) for pack in tree.collection.packs]
        whole += [Announcement(file.file_hash, file.manifest_hash, "", file.size) for file in tree.collection.files]
        self._announcer.announce(whole)
