"""Fetch one file: `download` is the whole flow of architecture §5.1, `FileFetch` its state.

find peers -> manifest -> part file -> chunks (from this machine, from peers, from parity) -> proven -> renamed.
Owns the order of these steps and the decision to give up, with words that say what each peer did. The parts do the
work: `scheduler` decides, `remote` talks, the receiver fetches and checks, `partfile` keeps, `trust` judges.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastcas import limits
from fastcas.errors import (
    ChunkNotFound,
    DestinationExists,
    FastCASError,
    ManifestCorrupt,
    NoPeers,
    Stalled,
)
from fastcas.fetch._receiver import Job
from fastcas.fetch.localwork import check_batch, hash_existing
from fastcas.fetch.partfile import PartFile, has_content, prepare_folder, safe_name, storage_error
from fastcas.fetch.rebuild import ParityPlan
from fastcas.fetch.receiver import HASH_OK, LINK_OK, Answer, AsyncReceiver, Outcome, describe
from fastcas.fetch.remote import Remote, Source
from fastcas.fetch.scheduler import Ask, Scheduler, lowest_bits
from fastcas.fetch.swarmview import SwarmAnswer, next_target
from fastcas.fetch.trust import Chain, Verdict, judge
from fastcas.ids import Link, PeerAddr, escape_for_terminal, short
from fastcas.metadata import Manifest
from fastcas.peers.policy import AddressPolicy

if TYPE_CHECKING:
    from fastcas.peers.discovery import Discovery

__all__ = ["DownloadHooks", "DownloadResult", "FileFetch", "LocalChunks", "Progress", "download"]

log = logging.getLogger(__name__)

TICK_S = 0.25
DISCOVERY_WANT = 50
DISCOVERY_PAUSE_S = 3.0
DISCOVERY_DEADLINE_S = 10.0
NAME_DEADLINE_S = 2.0
PEERS_MAX = 100
LOCAL_BATCH = 16  # chunks checked per visit to a thread
SLOW_BPS = 4 * limits.KIB
SLOW_WINDOW_S = 30.0
PARITY_AFTER_S = 1.0  # nobody has had a data chunk for so long: parity is asked for
COLLECTION_LINE = b"fastcas-collection 1\n"


class LocalChunks(Protocol):
    """Chunks that are on this machine already."""

    def open_extent(self, chunk_hash: bytes) -> tuple[int, int, int] | None:
        """Return (fd, offset, length) of a chunk, or None. The fd stays the provider's, valid until the next call."""


class DownloadHooks(Protocol):
    """Called in the loop's thread while a download runs."""

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """The manifest is known and the part file exists."""

    def on_chunk(self, index: int) -> None:
        """Chunk `index` is in the part file, checked against its own hash."""

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        """The file is at its place; `content_proven`: every link was checked."""


@dataclass(frozen=True)
class Progress:
    """A moment of a download.

    Attributes:
        bytes_done: Proven bytes in the part file.
        bytes_total: Size of the file; 0 while unknown.
        rate_Bps: From peers, over the last seconds.
        peers: That can be asked at the moment.
        waiting_on: What it waits for, "" while bytes flow.
    """

    bytes_done: int
    bytes_total: int
    rate_Bps: float
    peers: int
    waiting_on: str


@dataclass
class DownloadResult:
    """A finished download.

    Attributes:
        path: The file (or folder, for a collection).
        resumed_bytes: Found in an earlier part file. local_bytes: Taken from this machine.
        banned: Peers that lied or broke the protocol, with the reason.
    """

    path: Path
    file_hash: bytes
    manifest: Manifest
    size: int
    seconds: float
    bytes_by_peer: dict[PeerAddr, int] = field(default_factory=dict)
    resumed_bytes: int = 0
    local_bytes: int = 0
    banned: dict[PeerAddr, str] = field(default_factory=dict)


@dataclass
class Settings:
    """What a download was asked to do; see `download`."""

    discovery: Discovery | None = None
    peers: Sequence[PeerAddr] = ()
    local: LocalChunks | None = None
    node_id: str | None = None
    data_port: int | None = None
    timeout_s: float = limits.FETCH_TIMEOUT_S
    stall_timeout_s: float = limits.STALL_TIMEOUT_S
    hooks: DownloadHooks | None = None
    progress: Callable[[Progress], None] | None = None
    trust_resume: bool = False
    force: bool = False
    raw: bool = False
    folder: Path | None = None


async def download(
    link: Link,
    out: Path | None,
    *,
    discovery: Discovery | None,
    peers: Sequence[PeerAddr] = (),
    local: LocalChunks | None = None,
    node_id: str | None = None,
    data_port: int | None = None,
    timeout_s: float = limits.FETCH_TIMEOUT_S,
    stall_timeout_s: float = limits.STALL_TIMEOUT_S,
    hooks: DownloadHooks | None = None,
    progress: Callable[[Progress], None] | None = None,
    trust_resume: bool = False,
    force: bool = False,
    raw: bool = False,
    folder: Path | None = None,
) -> DownloadResult:
    """Fetch a file from everybody who has it, prove it, and put it at its place.

    Args:
        link: File hash, and what helps: manifest hash, peers, name.
        out: File to create; None = the stored name, made safe, in `folder` (the current one by default).
        discovery: How to find more peers; None = only those of `link` and `peers`.
        peers: That the user named; their addresses are not filtered, their manifests trusted for scheduling.
        local: Chunks of this machine, taken first, with the same checks.
        node_id, data_port: Ours, if we serve: told to the peers.
        timeout_s: Bounds the wait for the first peer and the manifest, seconds.
        stall_timeout_s: Without a byte from anybody for so long, the download ends.
        hooks, progress: Called in the loop's thread.
        trust_resume: Do not hash again what the journal lists (of the same boot).
        force: Replace a destination with other content.
        raw: A collection is an ordinary file.
    Returns:
        The result; for a collection, of the folder.
    Raises:
        NoPeers: Nobody has the file, or no manifest, within `timeout_s`.
        ChunkNotFound: Nobody is left who has what is missing; the part file is kept.
        Stalled: No byte for `stall_timeout_s`; the part file is kept.
        ManifestCorrupt: The manifest contradicts the content or itself.
        DestinationExists: The destination has other content; nothing was fetched.
        StoreFull, PermissionDenied, StoreLocked, StoreError: The disk refuses; the part file is kept.
    """
    settings = Settings(
        discovery, tuple(peers), local, node_id, data_port, timeout_s, stall_timeout_s, hooks, progress,
        trust_resume,
        force,
        raw,
        folder,
    )  # fmt: skip
    receiver = AsyncReceiver()
    try:
        fetch = FileFetch(link, out, settings, receiver)
        result = await fetch.run()
        if fetch.is_collection:
            from fastcas.fetch.tree import fetch_tree

            return await fetch_tree(fetch, result)
        return result
    finally:
        receiver.close()


class FileFetch:
    """One file being fetched. Use `run` once, in the receiver's loop."""

    def __init__(self, link: Link, out: Path | None, settings: Settings, receiver: AsyncReceiver) -> None:
        self.link = link
        self.file_hash = link.file_hash
        self.out = out
        self.settings = settings
        self.receiver = receiver
        self.node_id = settings.node_id
        self.data_port = settings.data_port
        self.manifest: Manifest | None = None
        self.remotes: dict[PeerAddr, Remote] = {}
        self.is_collection = False
        self.over_folder = False
        self.part: PartFile | None = None
        self._rng = random.Random()
        self._policy = AddressPolicy()
        self._scheduler: Scheduler | None = None
        self._chain: Chain | None = None
        self._job: Job | None = None
        self._parity: ParityPlan | None = None
        self._pending_journal: list[tuple[int, bool]] = []
        self._here = 0  # chunk set: checked and in the part file
        self._offer: asyncio.Future[tuple[Manifest, Remote]] | None = None
        self._refused_manifests: dict[bytes, str] = {}
        self._claim: tuple[Remote, float] | None = None
        self._finished: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._local_work: asyncio.Task[None] | None = None
        self._discovering = False
        self._discovered_once = settings.discovery is None
        self._last_byte = 0.0
        self._n_received = 0
        self._rate = 0.0
        self._unheld_since: float | None = None
        self._resumed_bytes = 0
        self._local_bytes = 0
        self._bytes_done = 0
        self._wake: asyncio.TimerHandle | None = None
        self._filling = asyncio.Event()

    # --- the flow ---

    async def run(self) -> DownloadResult:
        """Fetch the file; see `download`."""
        started = time.monotonic()
        if self.out is not None:
            manifest = await self._existing(self.out)
            if manifest is not None:
                return DownloadResult(self.out, self.file_hash, manifest, manifest.size, time.monotonic() - started)
        self.receiver.on_batch = self._after_batch
        try:
            self._find_peers()
            while True:
                manifest, giver = await self._first_manifest()
                try:
                    await self._fill(manifest, giver)
                    break
                except _ManifestConvictedError as exc:
                    self._convict(manifest, giver, str(exc))
            path = await self._finish()
        finally:
            await self._close()
        content_proven = self._chain is None or self._chain.content_proven
        if self.settings.hooks is not None and not self.is_collection:
            self.settings.hooks.on_finished(path, manifest, content_proven)
        return DownloadResult(
            path,
            self.file_hash,
            manifest,
            manifest.size,
            time.monotonic() - started,
            {remote.addr: remote.n_bytes for remote in self.remotes.values() if remote.n_bytes},
            self._resumed_bytes,
            self._local_bytes,
            self.banned(),
        )

    def banned(self) -> dict[PeerAddr, str]:
        """Return the banned peers with the reasons."""
        return {remote.addr: remote.banned for remote in self.remotes.values() if remote.banned is not None}

    async def _existing(self, out: Path) -> Manifest | None:
        """The manifest of the destination where it has the content already; other content is refused."""
        self.over_folder = await asyncio.to_thread(os.path.isdir, out)
        if self.over_folder and not self.settings.raw:
            return None  # the same collection may be there: that is known once its content is
        same = await asyncio.to_thread(has_content, out, self.file_hash)
        if same:
            return await asyncio.to_thread(hash_existing, out)
        if same is False and not self.settings.force:
            raise DestinationExists(
                f"{out}: exists with other content than {short(self.file_hash)}; it was left alone, nothing was fetched"
            )
        return None

    async def _first_manifest(self) -> tuple[Manifest, Remote]:
        """Wait for a manifest that may be believed so far."""
        self._offer = asyncio.get_running_loop().create_future()
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or self._nobody_can_help():
                    break
                await asyncio.wait([self._offer], timeout=min(TICK_S, left))
                self._report("a peer that has the file")
                if self._offer.done():
                    return self._offer.result()
        finally:
            self._offer = None
        if self._refused_manifests:
            reasons = "; ".join(self._refused_manifests.values())
            raise ManifestCorrupt(f"file {short(self.file_hash)}: no manifest is left to try: {reasons}")
        raise NoPeers(f"no peer has {self.file_hash.hex()}: {self._what_peers_did()}")

    async def _fill(self, manifest: Manifest, giver: Remote) -> None:
        """Get every chunk of the manifest into the part file."""
        out = await self._destination()
        self.manifest = manifest
        if self.part is None:
            prepare_folder(out.parent)
            self.part = await asyncio.to_thread(PartFile, out, manifest)
        else:
            part = self.part
            await asyncio.to_thread(part.close)
            self.part = await asyncio.to_thread(PartFile, out, manifest)
        if self.settings.hooks is not None:
            self.settings.hooks.on_manifest(manifest, self.part.path)
        self._bytes_done = self._here = 0
        self._resumed_bytes = self._local_bytes = 0
        if manifest.n_chunks == 0:
            return
        trusted = self.link.manifest_hash is not None or giver.source in ("user", "link")
        self._job = Job(manifest, self.part.fd, self.part.parity_fd)
        self._chain = Chain(manifest, trusted=trusted)
        all_data = (1 << manifest.n_chunks) - 1
        listed = sum(1 << index for index in self.part.candidates)
        self._scheduler = Scheduler(manifest.n_total, manifest.chunk_size, wanted=all_data & ~listed, rng=self._rng)
        self._scheduler.allowed = self._chain.allowed()
        self._parity = ParityPlan(manifest) if manifest.n_parity else None
        self._finished = asyncio.get_running_loop().create_future()
        self._last_byte = time.monotonic()
        self._local_work = self._spawn(self._take_local(manifest, self.part))
        for remote in self.remotes.values():
            remote.generation, remote.lacks_file, remote.answered = None, False, False
        self._filling.set()
        try:
            while not self._finished.done():
                await asyncio.wait([self._finished], timeout=TICK_S)
                if not self._finished.done():
                    self._tick()
            self._finished.result()
        finally:
            await self._stop_filling()

    async def _stop_filling(self) -> None:
        self._scheduler = None
        self._finished = None
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if self._local_work is not None:
            self._local_work.cancel()
            await asyncio.gather(self._local_work, return_exceptions=True)
            self._local_work = None
        self._job = None
        self._flush_journal()

    async def _finish(self) -> Path:
        assert self.part is not None and self.manifest is not None
        part = self.part
        self._report("the disk")
        if not self.settings.raw and await asyncio.to_thread(part.starts_with, COLLECTION_LINE):
            self.is_collection = True
            return part.path
        if self.over_folder:
            await asyncio.to_thread(part.discard)
            raise DestinationExists(
                f"{part.out}: is a folder, and {short(self.file_hash)} is a file; it was left alone"
            )
        await asyncio.to_thread(part.finish, force=self.settings.force)
        return part.out

    async def _close(self) -> None:
        """Stop talking. The part file stays unless the download finished."""
        self.receiver.on_batch = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for remote in self.remotes.values():
            remote.close()
        if self.part is not None:
            self._flush_journal()
            if not self.is_collection:
                self.part.close()

    async def _destination(self) -> Path:
        if self.out is None:
            name = self.link.name
            if name is None and self.settings.discovery is not None:
                with suppress(FastCASError, TimeoutError):
                    async with asyncio.timeout(NAME_DEADLINE_S + 1):
                        hints = await self.settings.discovery.get_metadata(self.file_hash, NAME_DEADLINE_S)
                    name = hints[0].name if hints else None
            self.out = (self.settings.folder or Path.cwd()) / safe_name(name, self.file_hash.hex())
            await self._existing(self.out)
        return self.out

    # --- peers ---

    def _find_peers(self) -> None:
        for addr in self.settings.peers:
            self._spawn(self._add_named(addr, "user"))
        for addr in self.link.peers:
            self._spawn(self._add_named(addr, "link"))
        if self.settings.discovery is not None:
            self._discovering = True
            self._spawn(self._discover(self.settings.discovery))

    async def _add_named(self, addr: PeerAddr, source: Source) -> None:
        """A peer that the user named: host names are resolved, addresses are not filtered."""
        if addr.is_literal:
            self._add(addr, source)
            return
        try:
            found = await asyncio.get_running_loop().getaddrinfo(addr.ip, addr.port, type=1)
        except OSError as exc:
            remote = Remote(addr, source, self.receiver, did=f"cannot resolve {addr.ip}: {exc.strerror}")
            remote.answered = remote.lacks_file = True
            self.remotes[addr] = remote
            return
        for *_, sockaddr in found[:1]:
            self._add(PeerAddr(str(sockaddr[0]), addr.port), source)

    def _add(self, addr: PeerAddr, source: Source, node_id: str | None = None) -> None:
        if addr in self.remotes or len(self.remotes) >= PEERS_MAX or (node_id is not None and node_id == self.node_id):
            return
        remote = Remote(addr, source, self.receiver, self.node_id, node_id)
        self.remotes[addr] = remote
        if self._scheduler is not None:
            self._scheduler.add_peer(addr)
        self._spawn(remote.converse(self, self._rng))

    async def _discover(self, discovery: Discovery) -> None:
        """Ask for peers again and again: those who come later join."""
        while True:
            try:
                async with asyncio.timeout(DISCOVERY_DEADLINE_S + 5):
                    async for hint in discovery.find_file_peers(self.file_hash, DISCOVERY_WANT, DISCOVERY_DEADLINE_S):
                        addr = PeerAddr(hint.ip, hint.port)
                        named = hint.source in ("static", "link")
                        if named or self._policy.refusal(addr.ip, addr.port, giver_ip="127.0.0.1") is None:
                            await self._add_named(addr, "user" if named else "discovery")
            except (FastCASError, TimeoutError) as exc:
                log.debug("discovery failed backend=%s error=%s", discovery.name, exc)
            self._discovered_once = True
            await asyncio.sleep(DISCOVERY_PAUSE_S)

    def manifest_to_ask(self, remote: Remote, offered: tuple[bytes, ...]) -> bytes | None:
        """See `SwarmListener`: the link's manifest, or the first that was not refused; one peer at a time."""
        if self._offer is None or self._offer.done() or not remote.may_offer:
            return None
        now = time.monotonic()
        if self._claim is not None and self._claim[0] is not remote and now < self._claim[1]:
            return None
        named = self.link.manifest_hash
        choice = [named] if named is not None else [m for m in offered if m not in self._refused_manifests]
        if not choice or choice[0] in self._refused_manifests:
            return None
        self._claim = (remote, now + 1.0)
        return choice[0]

    def on_manifest(self, remote: Remote, manifest: Manifest) -> None:
        """See `SwarmListener`."""
        self._claim = None
        if self._offer is not None and not self._offer.done():
            self._offer.set_result((manifest, remote))

    def on_swarm(self, remote: Remote, answer: SwarmAnswer) -> None:
        """See `SwarmListener`."""
        if answer.node_id is not None and answer.node_id == self.node_id:
            self._ban(remote, "is this node itself")
            return
        for node_id, addr in answer.peers:
            if self._policy.refusal(addr.ip, addr.port, giver_ip=remote.addr.ip) is None:
                self._add(addr, "swarm", node_id)
        if self._scheduler is None or self.manifest is None or answer.generation is None:
            return
        remote.generation = answer.generation
        full = (1 << self.manifest.n_total) - 1
        have = full if answer.is_seed else answer.have if answer.have is not None else remote.have
        for index in answer.new:
            have |= 1 << index
        data = (1 << self.manifest.n_chunks) - 1
        remote.have, remote.is_seed = have, have & data == data
        self._scheduler.add_peer(remote.addr)
        self._scheduler.set_have(remote.addr, have, is_seed=remote.is_seed)
        self._pump()

    def on_misconduct(self, remote: Remote, reason: str) -> None:
        """See `SwarmListener`."""
        self._ban(remote, reason)

    async def pause(self, seconds: float) -> None:
        """See `SwarmListener`."""
        if self._filling.is_set():
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._filling.wait()

    def on_silence(self, remote: Remote) -> None:
        """See `SwarmListener`."""
        if self._claim is not None and self._claim[0] is remote:
            self._claim = None

    def _ban(self, remote: Remote, reason: str) -> None:
        if remote.banned is not None:
            return
        remote.banned = remote.did = reason
        log.info("peer banned peer=%s reason=%s", remote.addr, escape_for_terminal(reason))
        if self._scheduler is not None:
            self._scheduler.add_peer(remote.addr)
            self._scheduler.ban(remote.addr, reason)
        remote.close()

    def _convict(self, manifest: Manifest, giver: Remote, reason: str) -> None:
        """A manifest contradicts the content: never tried again, its first source offers no more."""
        self._refused_manifests[manifest.manifest_hash] = reason
        giver.may_offer = False
        giver.did = reason
        self.manifest = None
        self._filling.clear()
        if self.part is not None:
            self.part.restart()
        for remote in self.remotes.values():
            remote.generation, remote.have, remote.is_seed = None, 0, False
            remote.close()

    # --- chunks ---

    def _pump(self) -> None:  # hot
        """Make the requests that the scheduler decides on."""
        scheduler, job, manifest = self._scheduler, self._job, self.manifest
        if scheduler is None or job is None or manifest is None:
            return
        now = time.monotonic()
        for ask in scheduler.decide(now):
            remote = self.remotes[ask.peer]  # type: ignore[index]
            if ask.index is None:
                assert self._chain is not None
                target = next_target(
                    self.file_hash, manifest.manifest_hash, self._chain.first_allowed,
                    data_port=self.data_port, node_id=self.node_id,
                )  # fmt: skip
                remote.ask_next(job, target, self._answer_to(remote, ask, scheduler))
            else:
                remote.ask_chunk(job, ask.index, manifest.hash_of(ask.index), self._answer_to(remote, ask, scheduler))
        if self._wake is None and (at := scheduler.wake_at(now)) is not None:
            self._wake = asyncio.get_running_loop().call_later(max(0.001, at - now), self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._pump()

    def _answer_to(self, remote: Remote, ask: Ask, scheduler: Scheduler) -> Callable[[Answer], None]:
        def arrived(answer: Answer) -> None:
            if self._scheduler is scheduler:
                self._on_chunk(remote, ask, answer)

        return arrived

    def _after_batch(self) -> None:  # hot
        self._flush_journal()
        self._pump()
        self._check_complete()

    def _on_chunk(self, remote: Remote, ask: Ask, answer: Answer) -> None:  # hot
        scheduler, manifest = self._scheduler, self.manifest
        assert scheduler is not None and manifest is not None
        now = time.monotonic()
        key, index, outcome = remote.addr, ask.index, answer.outcome
        if index is None and outcome in (Outcome.OK, Outcome.CORRUPT) and answer.chunk < manifest.n_total:
            index = answer.chunk
            scheduler.asked(key, index, now)
        if outcome in (Outcome.OK, Outcome.CORRUPT):
            assert index is not None
            verdict = judge(answer.flags, is_data=index < manifest.n_chunks)
            if verdict is Verdict.RIGHT:
                remote.n_bytes += answer.length
                scheduler.completed(key, index, now, answer.length, answer.connect_us / 1e6)
                self._chunk_here(index)
            elif verdict is Verdict.PEER:
                scheduler.lost(key, index)
                self._ban(remote, f"chunk {short(manifest.hash_of(index))}: {describe(answer)}")
            else:
                scheduler.lost(key, index)
                self._fail(_convicted(manifest, index, remote.addr))
            return
        if outcome == Outcome.BUSY:
            scheduler.busy(key, index, now)
        elif outcome == Outcome.NOTHING and index is None:
            scheduler.nothing_new(key, now)
        elif outcome in (Outcome.NOT_FOUND, Outcome.NOTHING):
            if index is None:
                scheduler.no_next(key)
            else:
                scheduler.missing(key, index)
                remote.have &= ~(1 << index)
                remote.is_seed = False
        elif outcome in (Outcome.LOST, Outcome.CANCELLED):
            scheduler.lost(key, index)
        elif outcome == Outcome.STATUS and index is None:
            scheduler.no_next(key)
        elif outcome == Outcome.REFUSED or (outcome == Outcome.STATUS and answer.detail < 500):
            scheduler.lost(key, index)
            self._ban(remote, f"{self._subject(index)}: {describe(answer)}")
        elif outcome in (Outcome.WRITE_FAILED, Outcome.NO_MEMORY):
            scheduler.lost(key, index)
            assert self.part is not None
            error = OSError(answer.detail, os.strerror(answer.detail))
            self._fail(storage_error(error, str(self.part.path), "the part file is kept and can be resumed"))
        else:
            remote.did = f"{self._subject(index)}: {describe(answer)}"
            scheduler.failed(key, index, now)

    def _subject(self, index: int | None) -> str:
        assert self.manifest is not None
        return "next chunk" if index is None else f"chunk {short(self.manifest.hash_of(index))}"

    def _chunk_here(self, index: int) -> None:  # hot
        """Chunk `index` is in its place and right."""
        manifest, chain, scheduler = self.manifest, self._chain, self._scheduler
        assert manifest is not None and chain is not None and scheduler is not None
        bit = 1 << index
        if self._here & bit:
            return
        self._here |= bit
        if index < manifest.n_chunks:
            self._bytes_done += manifest.length_of(index)
            if chain.link_holds(index):
                scheduler.allowed = chain.allowed()
            self._pending_journal.append((index, True))
            if self.settings.hooks is not None:
                self.settings.hooks.on_chunk(index)

    def _flush_journal(self) -> None:
        if self._pending_journal and self.part is not None:
            pending, self._pending_journal = self._pending_journal, []
            try:
                self.part.journal.add(pending)
            except OSError as exc:
                self._fail(storage_error(exc, str(self.part.journal.path), "the part file is kept"))

    def _check_complete(self) -> None:
        manifest = self.manifest
        if self._finished is None or self._finished.done() or manifest is None:
            return
        data = (1 << manifest.n_chunks) - 1
        if self._here & data == data:
            self._finished.set_result(None)

    def _fail(self, error: FastCASError) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(error)

    # --- this machine's own bytes ---

    async def _take_local(self, manifest: Manifest, part: PartFile) -> None:
        """Check what a part file has already, then take what lies elsewhere on this machine."""
        job, scheduler = self._job, self._scheduler
        assert job is not None and scheduler is not None
        size = manifest.chunk_size
        trust = self.settings.trust_resume and part.same_boot
        doubtful: list[int] = []
        for index, link_checked in sorted(part.candidates.items()):
            if trust and link_checked:
                self._resumed_bytes += manifest.length_of(index)
                self._chunk_here(index)
                scheduler.done(index)
            else:
                doubtful.append(index)
        self._pending_journal.clear()  # the journal lists them already
        for at in range(0, len(doubtful), LOCAL_BATCH):
            batch = [(index, part.fd, index * size) for index in doubtful[at : at + LOCAL_BATCH]]
            for index, flags in await check_batch(job, batch, write=False):
                if self._settle(index, flags, "the part file"):
                    self._resumed_bytes += manifest.length_of(index)
        if self.settings.local is not None:
            await self._take_extents(manifest, self.settings.local, job, scheduler)
        self._after_batch()

    async def _take_extents(self, manifest: Manifest, local: LocalChunks, job: Job, scheduler: Scheduler) -> None:
        """Copy what lies elsewhere on this machine; those chunks are not asked of peers meanwhile."""
        here = [
            i for i in range(manifest.n_chunks) if scheduler.free >> i & 1 and local.open_extent(manifest.hash_of(i))
        ]
        for index in here:
            scheduler.done(index)
        for at in range(0, len(here), LOCAL_BATCH):
            batch = []
            try:
                for index in here[at : at + LOCAL_BATCH]:
                    extent = local.open_extent(manifest.hash_of(index))
                    if extent is not None and extent[2] == manifest.length_of(index):
                        batch.append((index, os.dup(extent[0]), extent[1]))
                    else:
                        scheduler.want(index)
                for index, flags in await check_batch(job, batch, write=True):
                    if self._settle(index, flags, "this machine"):
                        self._local_bytes += manifest.length_of(index)
            finally:
                for _, fd, _ in batch:
                    os.close(fd)

    def _settle(self, index: int, flags: int, where: str) -> bool:
        """Count a chunk of this machine if it is right, else fetch it. A link that fails convicts the manifest."""
        scheduler, manifest = self._scheduler, self.manifest
        if scheduler is None or manifest is None:
            return False
        if flags & HASH_OK and flags & LINK_OK:
            scheduler.done(index)
            self._chunk_here(index)
            self._after_batch()
            return True
        if flags & HASH_OK:
            self._fail(_convicted(manifest, index, where))
        scheduler.want(index)
        self._pump()
        return False

    # --- time ---

    def _tick(self) -> None:
        """Four times a second: rates, slow peers, parity, and whether anybody can still help."""
        scheduler, manifest = self._scheduler, self.manifest
        assert scheduler is not None and manifest is not None
        now = time.monotonic()
        received = sum(remote.received() for remote in self.remotes.values())
        if received > self._n_received:
            self._last_byte = now
        sample = max(0, received - self._n_received) / TICK_S
        self._rate = sample if self._rate == 0 else 0.8 * self._rate + 0.2 * sample
        self._n_received = received
        local_busy = self._local_work is not None and not self._local_work.done()
        if local_busy:
            self._last_byte = now
        self._shed_slow(scheduler, now)
        self._use_parity(scheduler, manifest, now)
        self._pump()
        self._check_complete()
        self._report("" if now - self._last_byte < 1.0 else self._waiting_on(scheduler))
        if local_busy or scheduler.n_in_flight:
            if now - self._last_byte < self.settings.stall_timeout_s:
                return
        elif not self._nobody_can_help() and now - self._last_byte < self.settings.stall_timeout_s:
            return
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(self._stuck(scheduler, manifest, now))

    def _shed_slow(self, scheduler: Scheduler, now: float) -> None:
        """Drop a peer that gave less than 4 KiB/s over 30 s while others could be asked instead."""
        usable = scheduler.usable_peers()
        for peer in usable:
            remote = self.remotes[peer.key]  # type: ignore[index]
            if not peer.in_flight:
                remote.shed_mark = None
                continue
            got = remote.received()
            if remote.shed_mark is None:
                remote.shed_mark = (now, got)
            elif now - remote.shed_mark[0] >= SLOW_WINDOW_S:
                if got - remote.shed_mark[1] < SLOW_BPS * SLOW_WINDOW_S and len(usable) > 1:
                    self._ban(remote, f"slower than {SLOW_BPS} B/s over {SLOW_WINDOW_S:g} s")
                remote.shed_mark = (now, got)

    def _use_parity(self, scheduler: Scheduler, manifest: Manifest, now: float) -> None:
        """Data chunks that nobody has: ask for their stripes' parity, rebuild when there is enough."""
        plan, part, job = self._parity, self.part, self._job
        if plan is None or part is None or job is None:
            return
        ready = plan.ready(self._here)
        if ready is not None:
            plan.started(ready)
            self._spawn(self._rebuild(plan, ready, part, job))
        unheld = scheduler.unheld() & ((1 << manifest.n_chunks) - 1)
        if not unheld or not any(remote.answered for remote in self.remotes.values()):
            self._unheld_since = None
        elif self._unheld_since is None:
            self._unheld_since = now
        elif now - self._unheld_since >= PARITY_AFTER_S:
            held = 0
            for peer in scheduler.usable_peers():
                held |= peer.have
            for index in plan.to_ask(unheld, held, self._here):
                scheduler.want(index)

    async def _rebuild(self, plan: ParityPlan, stripe: int, part: PartFile, job: Job) -> None:
        try:
            rebuilt = await asyncio.to_thread(plan.rebuild, stripe, self._here, part.fd, part.parity_fd, job)
        except FastCASError as exc:
            self._fail(exc)
            return
        except OSError as exc:
            self._fail(storage_error(exc, str(part.path), "the part file is kept"))
            return
        for index, flags in rebuilt:
            if self._settle(index, flags, "parity"):
                self._local_bytes += plan.manifest.length_of(index)

    def _nobody_can_help(self) -> bool:
        """Whether everybody known has said no for good, and nobody else will be found."""
        if self.settings.discovery is not None:
            return False
        named = len(self.remotes) >= 1 or not (self.settings.peers or self.link.peers)
        if not named or any(not remote.answered for remote in self.remotes.values()):
            return False
        return all(remote.banned is not None or self._is_hopeless(remote) for remote in self.remotes.values())

    def _is_hopeless(self, remote: Remote) -> bool:
        if remote.lacks_file:
            return True
        if self.manifest is None:
            return not remote.may_offer
        scheduler = self._scheduler
        if scheduler is None or remote.addr not in scheduler.peers:
            return False
        return remote.is_seed and not remote.have & scheduler.wanted

    def _stuck(self, scheduler: Scheduler, manifest: Manifest, now: float) -> FastCASError:
        missing = scheduler.wanted & ((1 << manifest.n_chunks) - 1)
        n = missing.bit_count()
        shown = ", ".join(f"#{i} ({short(manifest.hash_of(i))})" for i in lowest_bits(missing, 3))
        text = (
            f"file {short(self.file_hash)}: {n} of {manifest.n_chunks} chunks are missing: {shown}"
            f"{', …' if n > 3 else ''}; {self._what_peers_did()}; the part file is kept and can be resumed"
        )
        if now - self._last_byte >= self.settings.stall_timeout_s and self._bytes_done and not scheduler.unheld():
            return Stalled(f"{text}; no byte for {self.settings.stall_timeout_s:g} s")
        return ChunkNotFound(text)

    def _waiting_on(self, scheduler: Scheduler) -> str:
        unheld = scheduler.unheld().bit_count()
        if unheld:
            return f"{unheld} chunks that nobody has"
        return "peers" if not scheduler.n_in_flight else f"{scheduler.n_in_flight} chunks in flight"

    def _what_peers_did(self) -> str:
        if not self.remotes:
            return "no peer was found" if self.settings.discovery else "no peer is known"
        shown = [f"{remote.addr}: {remote.did}" for remote in list(self.remotes.values())[:8]]
        more = len(self.remotes) - len(shown)
        return "; ".join(shown) + (f"; and {more} more peers" if more > 0 else "")

    def _report(self, waiting_on: str) -> None:
        if self.settings.progress is None:
            return
        total = self.manifest.size if self.manifest is not None else self.link.size or 0
        n_peers = len(self._scheduler.usable_peers()) if self._scheduler is not None else 0
        self.settings.progress(Progress(self._bytes_done, total, self._rate, n_peers, waiting_on))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            error = exc if isinstance(exc, FastCASError) else FastCASError(f"file {short(self.file_hash)}: {exc!r}")
            error.__cause__ = exc if error is not exc else exc.__cause__
            if self._offer is not None and not self._offer.done():
                self._offer.set_exception(error)
            self._fail(error)


class _ManifestConvictedError(ManifestCorrupt):
    """Inside `FileFetch` only: try another manifest."""


def _convicted(manifest: Manifest, index: int, where: object) -> _ManifestConvictedError:
    return _ManifestConvictedError(
        f"manifest {short(manifest.manifest_hash)}: chunk #{index} from {where} satisfies its hash or its link but not "
        f"both, so the manifest contradicts itself; it is not used"
    )
