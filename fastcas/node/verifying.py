"""Verification as people and nodes run it: slices of a `Scrub` with pauses for a rate, and peers to heal from.

`run_scrub` drives one scrub; the store's work is done where `run` says (the agent's store thread, or right here), so
that between two slices others have their turn. `RepairPeers` finds and asks the peers. `Scrubber` is the timer of a
node: it goes on where it stopped before a restart.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastcas.errors import FastCASError, Interrupted, NotFound, PeerTimeout, PeerUnreachable
from fastcas.ids import PeerAddr, short
from fastcas.limits import SCRUB_EVERY_S, SCRUB_RATE_BPS, SCRUB_START_S
from fastcas.peers.discovery import Discovery
from fastcas.store import Damage, Scrub, Store, VerifyReport, Wanted

if TYPE_CHECKING:
    from fastcas.fetch import P2PChunkDownloader

__all__ = ["RepairPeers", "Run", "Scrubber", "report_to_map", "run_scrub"]

log = logging.getLogger(__name__)

Run = Callable[..., Awaitable[Any]]
DAMAGES_SHOWN = 1000
SLICE_B = 64 << 20
ASK_AT_ONCE = 4  # chunks of at most 16 MiB in memory
FETCH_S = 10.0
FIND_S = 5.0
PEERS_WANT = 8
STRIKES_MAX = 2  # failures to answer at all before a peer is asked no more
RETRY_S = 3600.0
STATE = "scrub-timer"


def report_to_map(report: VerifyReport) -> dict[str, Any]:
    """Return a report as people and scripts see it."""
    return {
        "chunks": report.chunks, "bytes": report.bytes, "manifests": report.manifests,
        "resumed_bytes": report.resumed_bytes, "damages": [_damage(item) for item in report.damages[:DAMAGES_SHOWN]],
        "n_damaged": report.n_damaged, "n_repaired": report.n_repaired, "is_clean": report.is_clean,
    }  # fmt: skip


def _damage(item: Damage) -> dict[str, Any]:
    return {
        "kind": item.kind, "hash": item.hash.hex(), "path": item.path, "offset": item.offset, "length": item.length,
        "reason": item.reason, "repaired_by": item.repaired_by,
    }  # fmt: skip


async def run_scrub(
    scrub: Scrub,
    run: Run,
    *,
    peers: RepairPeers | None = None,
    rate_Bps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: threading.Event | None = None,
) -> VerifyReport:
    """Drive a scrub to its end.

    Args:
        run: Awaits `run(function, *args)`, where the store is at home.
        peers: Who is asked for what this machine cannot heal.
        rate_Bps: Bytes to read per second at most, None: as fast as it goes.
        progress: Gets (bytes done, bytes total).
        cancelled: Set = stop.
    Raises:
        Interrupted: `cancelled` was set; a scrub with a name can be gone on with.
    """
    started, before = time.monotonic(), scrub.report.bytes
    limit_B = min(SLICE_B, max(1, rate_Bps // 2)) if rate_Bps else SLICE_B
    try:
        while await run(scrub.step, limit_B):
            if peers is not None:
                await _ask(scrub, run, peers)
            report = scrub.report
            if progress is not None:
                progress(report.bytes, max(scrub.total, report.bytes))
            if cancelled is not None and cancelled.is_set():
                raise Interrupted(f"verify: stopped after {report.bytes} of {scrub.total} B")
            if rate_Bps:
                ahead_s = (report.bytes - before) / rate_Bps - (time.monotonic() - started)
                await asyncio.sleep(max(0.0, ahead_s))
        if progress is not None:
            progress(scrub.report.bytes, scrub.report.bytes)
        return scrub.report
    finally:
        await asyncio.shield(run(scrub.close))


async def _ask(scrub: Scrub, run: Run, peers: RepairPeers) -> None:
    limit = asyncio.Semaphore(ASK_AT_ONCE)

    async def one(item: Wanted) -> None:
        async with limit:
            data = await peers.fetch(item)
            if data is not None:
                await run(scrub.give, item, data)

    while wanted := await run(scrub.requests):
        await asyncio.gather(*(one(item) for item in wanted))


class RepairPeers:
    """Finds peers and asks them for chunks and manifests. Belongs to one loop; `close` when done.

    Args:
        named: Asked for everything, first.
        discovery: Where to look for others, None: nowhere.
        node_id: Ours, not to be asked.
    """

    def __init__(
        self, named: Sequence[PeerAddr] = (), discovery: Discovery | None = None, node_id: str | None = None
    ) -> None:
        self._named = list(named)
        self._discovery = discovery
        self._node_id = node_id
        self._downloader: P2PChunkDownloader | None = None
        self._found: dict[bytes, list[PeerAddr]] = {}
        self._strikes: dict[PeerAddr, int] = {}

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._downloader is not None:
            self._downloader.close()

    async def fetch(self, wanted: Wanted) -> bytes | None:
        """Return what is wanted from the first peer that has it, proven; None if nobody does."""
        for peer in await self._peers(wanted):
            if self._strikes.get(peer, 0) >= STRIKES_MAX:
                continue
            try:
                return await self._from(peer, wanted)
            except NotFound:
                continue
            except (PeerUnreachable, PeerTimeout) as error:
                self._strikes[peer] = self._strikes.get(peer, 0) + 1
                log.info("peer does not help peer=%s error=%s", peer, error)
            except FastCASError as error:
                log.warning("peer does not help peer=%s error=%s", peer, error)
        return None

    async def _from(self, peer: PeerAddr, wanted: Wanted) -> bytes:
        # The receiver and its kernels are loaded when the first damage needs them.
        if not wanted.is_manifest:
            if self._downloader is None:
                from fastcas.fetch import P2PChunkDownloader

                self._downloader = P2PChunkDownloader(timeout=FETCH_S)
            return await self._downloader.fetch_chunk(wanted.hash.hex(), peer.ip, peer.port)
        from fastcas.fetch.manifests import find_manifest

        manifest = await find_manifest(wanted.file_hash or b"", wanted.hash, [peer], timeout_s=FETCH_S)
        return manifest.data

    async def _peers(self, wanted: Wanted) -> list[PeerAddr]:
        """Those named, then those that have the file, or (where no file is known) the chunk."""
        if self._discovery is None:
            return self._named
        key = wanted.file_hash or wanted.hash
        if key not in self._found:
            found: list[PeerAddr] = []
            try:
                if wanted.file_hash is not None:
                    async for hint in self._discovery.find_file_peers(key, PEERS_WANT, FIND_S):
                        if hint.node_id is None or hint.node_id != self._node_id:
                            found.append(hint.addr)
                else:
                    async for _, hint in self._discovery.find_chunk_peers([key], PEERS_WANT, FIND_S):
                        found.append(hint.addr)
            except FastCASError as error:
                log.info("no peers found of=%s error=%s", short(key), error)
            self._found[key] = found
        return [*self._named, *(peer for peer in self._found[key] if peer not in self._named)]


class Scrubber:
    """Verifies and heals a node's store on a timer, in slices, slowly.

    Args:
        store, run: The store, and how to work on it.
        peers: Makes what heals from the network.
        changed: Called when something was healed or found damaged.
        every_s, rate_Bps, start_s: When and how fast.
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        peers: Callable[[], RepairPeers],
        changed: Callable[[], None] = lambda: None,
        *,
        every_s: float = SCRUB_EVERY_S,
        rate_Bps: int = SCRUB_RATE_BPS,
        start_s: float = SCRUB_START_S,
    ) -> None:
        self._store, self._run, self._peers, self._changed = store, run, peers, changed
        self._every_s, self._rate_Bps, self._start_s = every_s, rate_Bps, start_s
        self._task: asyncio.Task[None] | None = None
        self.state: dict[str, Any] = {}

    def start(self) -> None:
        """Begin to wait for the next time."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Stop; what is under way goes on after the next start. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def to_map(self) -> dict[str, Any]:
        """Return what `status` shows: when the last one ended and what it found."""
        return dict(self.state)

    async def _work(self) -> None:
        self.state = _state(await self._run(self._store.fact, STATE))
        if "finished_at" not in self.state:  # a new store: what was just written is not read again at once
            self.state = {"finished_at": int(time.time()), "n_damaged": 0, "n_repaired": 0}
            await self._run(self._store.remember, STATE, json.dumps(self.state).encode())
        await asyncio.sleep(self._start_s)
        while True:
            due_s = self.state["finished_at"] + self._every_s - time.time()
            if due_s > 0:
                await asyncio.sleep(min(due_s, RETRY_S))  # the clock may be set meanwhile
                continue
            try:
                await self._once()
            except FastCASError as error:
                log.warning("scrub failed, it is tried again later error=%s", error)
                await asyncio.sleep(RETRY_S)

    async def _once(self) -> None:
        peers = self._peers()
        try:
            scrub = await self._run(lambda: self._store.scrub(repair=True, ask=True, name="timer"))
            report = await run_scrub(scrub, self._run, peers=peers, rate_Bps=self._rate_Bps)
        finally:
            peers.close()
        for item in report.damages:
            log.warning(
                "scrub found damage kind=%s hash=%s path=%s repaired_by=%s reason=%s", item.kind, short(item.hash),
                item.path, item.repaired_by or "nothing", item.reason,
            )  # fmt: skip
        log.info("scrub done bytes=%d damaged=%d repaired=%d", report.bytes, report.n_damaged, report.n_repaired)
        if report.n_damaged:
            self._changed()
        self.state = {
            "finished_at": int(time.time()), "bytes": report.bytes, "n_damaged": report.n_damaged,
            "n_repaired": report.n_repaired,
        }  # fmt: skip
        await self._run(self._store.remember, STATE, json.dumps(self.state).encode())


def _state(data: bytes | None) -> dict[str, Any]:
    """Read what was remembered; what cannot be read counts as never scrubbed."""
    try:
        values = json.loads(data or b"{}")
        return {name: int(value) for name, value in values.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
