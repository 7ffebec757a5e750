"""The chunks of one file on their way into its part file: from this machine, from peers, from parity.

`scheduler` decides whom to ask for what, the receiver fetches and checks, `trust` judges, `localwork` and `rebuild` get
chunks without asking anybody. Owns the decision to give up.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable

from fastcas import limits
from fastcas.errors import ChunkNotFound, FastCASError, ManifestCorrupt, Stalled
from fastcas.fetch._receiver import Job
from fastcas.fetch.crowd import Crowd
from fastcas.fetch.download import LocalChunks, Progress, Settings
from fastcas.fetch.localwork import check_batch
from fastcas.fetch.partfile import PartFile, storage_error
from fastcas.fetch.rebuild import ParityPlan
from fastcas.fetch.receiver import HASH_OK, LINK_OK, Answer, AsyncReceiver, Outcome, describe
from fastcas.fetch.remote import Remote
from fastcas.fetch.scheduler import Ask, Scheduler, bits, lowest_bits
from fastcas.fetch.seeds import SeedFiles
from fastcas.fetch.swarmview import next_target
from fastcas.fetch.tasks import TaskSet
from fastcas.fetch.trust import Chain, Verdict, judge
from fastcas.ids import short
from fastcas.metadata import Manifest

__all__ = ["Filling", "ManifestConvictedError"]

TICK_S = 0.25
LOCAL_BATCH = 16  # chunks checked per visit to a thread
SLOW_BPS = 4 * limits.KIB
SLOW_WINDOW_S = 30.0
PARITY_AFTER_S = 1.0  # nobody has had a data chunk for so long: parity is asked for
REPORTS = 20  # of progress per file at least, however fast it comes
CUTS_MAX = 3  # answers cut short in a row before the peer is banned
QUIET_S = 1.0  # after so long without a byte, progress says what is waited for


class ManifestConvictedError(ManifestCorrupt):
    """Between this module and `filefetch` only: try another manifest."""


class Filling:
    """The chunks of one manifest on their way into one part file."""

    def __init__(
        self,
        manifest: Manifest,
        part: PartFile,
        chain: Chain,
        crowd: Crowd,
        receiver: AsyncReceiver,
        settings: Settings,
    ) -> None:
        """Ask for nothing before `run`."""
        self.manifest = manifest
        self.chain = chain
        self.resumed_bytes = 0
        self.local_bytes = 0
        self._settings = settings
        self._crowd = crowd
        self._receiver = receiver
        self._tasks = TaskSet(f"file {short(manifest.file_hash)}", self.fail)
        self._part = part
        self._job = Job(manifest, part.fd, part.parity_fd)
        self._data = (1 << manifest.n_chunks) - 1
        missing = self._data & ~sum(1 << index for index in part.candidates)
        self._held_back = missing if settings.seeds is not None else 0  # chunk set: peers are asked after seed files
        mean = -(-manifest.size // manifest.n_chunks) if manifest.is_cdc else manifest.chunk_size
        self._scheduler = Scheduler(manifest.n_total, mean, wanted=missing & ~self._held_back, rng=random.Random())
        self._scheduler.allowed = chain.allowed()
        self._parity = ParityPlan(manifest) if manifest.n_parity else None
        self._local_parity = 0  # chunk set: parity that lies elsewhere on this machine
        self._rebuilding: asyncio.Task[None] | None = None
        self._here = 0  # chunk set: checked and in its place
        self._bytes_done = 0
        self._report_at = 0
        self._unlisted: list[tuple[int, bool]] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._local_work: asyncio.Task[None] | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._last_byte = self._last_tick = time.monotonic()
        self._n_here = 0
        self._patience_s = settings.stall_timeout_s
        self._n_received = self._crowd.received()
        self._rate = 0.0
        self._unheld_since: float | None = None

    async def run(self) -> None:
        """Return when every data chunk is in its place and right; afterwards nothing is written any more."""
        crowd = self._crowd
        crowd.on_have, crowd.on_ban = self._on_have, self._on_ban
        self._receiver.on_batch = self._after_batch
        crowd.use(self.manifest)
        self._local_work = self._tasks.spawn(self._take_local())
        try:
            while not self._ended.done():
                await asyncio.wait([self._ended], timeout=TICK_S)
                if not self._ended.done():
                    self._tick()
            self._ended.result()
        finally:
            self._receiver.on_batch = crowd.on_have = crowd.on_ban = None
            if self._wake is not None:
                self._wake.cancel()
            if not self._ended.done():
                self._ended.cancel()
            await self._tasks.close()
            await crowd.quiet()
            self._list_written()
            if self._parity is not None:
                self._parity.close()

    def fail(self, error: FastCASError) -> None:
        """End `run` with an error, unless it has ended."""
        if not self._ended.done():
            self._ended.set_exception(error)

    # --- chunks from peers ---

    def _on_have(self, remote: Remote) -> None:
        self._scheduler.add_peer(remote.addr)
        self._scheduler.set_have(remote.addr, remote.have, is_seed=remote.is_seed)
        self._pump()

    def _on_ban(self, remote: Remote) -> None:
        self._scheduler.add_peer(remote.addr)
        self._scheduler.ban(remote.addr, remote.banned or "")

    def _pump(self) -> None:  # hot
        """Make the requests that the scheduler decides on."""
        if self._ended.done():
            return
        manifest = self.manifest
        now = time.monotonic()
        for ask in self._scheduler.decide(now):
            remote = self._crowd.remotes[ask.peer]  # type: ignore[index]
            if ask.index is None:
                target = next_target(
                    manifest.file_hash, manifest.manifest_hash, self.chain.first_allowed,
                    data_port=self._settings.data_port, node_id=self._settings.node_id,
                )  # fmt: skip
                remote.ask_next(self._job, target, self._answer_to(remote, ask))
            else:
                remote.ask_chunk(self._job, ask.index, manifest.hash_of(ask.index), self._answer_to(remote, ask))
        if self._wake is None and (at := self._scheduler.wake_at(now)) is not None:
            self._wake = asyncio.get_running_loop().call_later(max(0.001, at - now), self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._pump()

    def _answer_to(self, remote: Remote, ask: Ask) -> Callable[[Answer], None]:
        return lambda answer: self._on_answer(remote, ask.index, answer)

    def _after_batch(self) -> None:  # hot
        self._list_written()
        if self._here & self._data == self._data and not self._ended.done():
            self._ended.set_result(None)
        if self._parity is not None and not self._is_rebuilding() and (ready := self._parity.next_ready()) is not None:
            self._rebuilding = self._tasks.spawn(self._rebuild(self._parity, ready))
        self._pump()
        if self._bytes_done >= self._report_at:
            self._report(time.monotonic())

    def _on_answer(self, remote: Remote, index: int | None, answer: Answer) -> None:  # hot
        if self._ended.done():
            return
        scheduler, manifest, key, outcome = self._scheduler, self.manifest, remote.addr, answer.outcome
        now = time.monotonic()
        if outcome in (Outcome.OK, Outcome.CORRUPT):
            if index is None:
                index = answer.chunk
                scheduler.asked(key, index, now)
            verdict = judge(answer.flags, is_data=index < manifest.n_chunks)
            if verdict is Verdict.RIGHT:
                remote.n_bytes += answer.length
                remote.n_cut = 0
                scheduler.completed(key, index, now, answer.length, answer.connect_us / 1e6)
                self._chunk_here(index)
                return
            scheduler.lost(key, index)
            if verdict is Verdict.PEER:
                self._crowd.ban(remote, f"chunk {short(manifest.hash_of(index))}: {describe(answer)}")
            else:
                self.fail(_convicted(manifest, index, str(key)))
        elif outcome == Outcome.BUSY:
            scheduler.busy(key, index, now)
        elif index is None and outcome == Outcome.NOTHING:
            scheduler.nothing_new(key, now)
        elif index is None and outcome in (Outcome.NOT_FOUND, Outcome.STATUS):
            scheduler.no_next(key)
        elif index is not None and outcome in (Outcome.NOT_FOUND, Outcome.NOTHING):
            scheduler.missing(key, index)
            remote.have, remote.is_seed = remote.have & ~(1 << index), False
        elif outcome in (Outcome.LOST, Outcome.CANCELLED):
            scheduler.lost(key, index)
        elif outcome == Outcome.REFUSED or (outcome == Outcome.STATUS and answer.detail < 500):
            scheduler.lost(key, index)
            self._crowd.ban(remote, f"{self._subject(index)}: {describe(answer)}")
        elif outcome in (Outcome.WRITE_FAILED, Outcome.NO_MEMORY):
            error = OSError(answer.detail, os.strerror(answer.detail))
            self.fail(storage_error(error, str(self._part.path), "the part file is kept and can be resumed"))
        else:
            remote.did = f"{self._subject(index)}: {describe(answer)}"
            if scheduler.failed(key, index, now) and outcome in (Outcome.TRUNCATED, Outcome.STALLED):
                remote.n_cut += 1  # its bytes would count as progress for ever
                if remote.n_cut == CUTS_MAX:
                    self._crowd.ban(remote, f"{remote.did}, for the {CUTS_MAX}rd time in a row")

    def _subject(self, index: int | None) -> str:
        return "next chunk" if index is None else f"chunk {short(self.manifest.hash_of(index))}"

    def _chunk_here(self, index: int) -> None:  # hot
        """Chunk `index` is in its place and right."""
        bit = 1 << index
        if self._here & bit:
            return
        self._here |= bit
        if self._parity is not None:
            self._parity.add(index)
        if index >= self.manifest.n_chunks:
            return
        self._bytes_done += self.manifest.length_of(index)
        if self.chain.link_holds(index):
            self._scheduler.allowed = self.chain.allowed()
        self._unlisted.append((index, True))
        if self._settings.hooks is not None:
            self._settings.hooks.on_chunk(index)

    def _list_written(self) -> None:
        unlisted, self._unlisted = self._unlisted, []
        try:
            self._part.journal.add(unlisted)
        except OSError as exc:
            self.fail(storage_error(exc, str(self._part.journal.path), "the part file is kept and can be resumed"))

    # --- chunks without peers ---

    async def _take_local(self) -> None:
        """Check what the part file has already, then take what lies elsewhere on this machine."""
        part, manifest = self._part, self.manifest
        trust = self._settings.trust_resume and part.same_boot
        doubtful: list[int] = []
        for index, link_checked in sorted(part.candidates.items()):
            if trust and link_checked:
                self.resumed_bytes += manifest.length_of(index)
                self._chunk_here(index)
            else:
                doubtful.append(index)
        self._unlisted.clear()  # the journal lists them already
        for at in range(0, len(doubtful), LOCAL_BATCH):
            batch = [(index, part.fd, manifest.offset_of(index)) for index in doubtful[at : at + LOCAL_BATCH]]
            for index, flags in await check_batch(self._job, batch, write=False):
                self.resumed_bytes += self._settle(index, flags, "the part file")
        if self._settings.local is not None:
            await self._take_extents(self._settings.local)
        if self._settings.seeds is not None:
            await self._take_seeds(self._settings.seeds)
        self._after_batch()

    async def _take_extents(self, local: LocalChunks) -> None:
        """Copy what lies elsewhere on this machine; those chunks are not asked of peers meanwhile."""
        manifest, scheduler = self.manifest, self._scheduler
        free = scheduler.free | self._held_back
        here = [i for i in range(manifest.n_chunks) if free >> i & 1 and local.open_extent(manifest.hash_of(i))]
        for i in range(manifest.n_chunks, manifest.n_total):
            self._local_parity |= int(local.open_extent(manifest.hash_of(i)) is not None) << i
        for index in here:
            scheduler.done(index)
        for at in range(0, len(here), LOCAL_BATCH):
            batch: list[tuple[int, int, int]] = []
            try:
                for index in here[at : at + LOCAL_BATCH]:
                    extent = local.open_extent(manifest.hash_of(index))
                    if extent is not None and extent[2] == manifest.length_of(index):
                        batch.append((index, os.dup(extent[0]), extent[1]))
                    else:
                        scheduler.want(index)
                for index, flags in await check_batch(self._job, batch, write=True):
                    self.local_bytes += self._settle(index, flags, "this machine")
            finally:
                for _, fd, _ in batch:
                    os.close(fd)

    async def _take_seeds(self, seeds: SeedFiles) -> None:
        """Copy what lies in the files that the user named, then let peers be asked for the rest."""
        async for index, flags in seeds.take(self._job, self.manifest, self._held_back & ~self._here):
            self.local_bytes += self._settle(index, flags, "a local file")
        for index in bits(self._held_back & ~self._here):
            self._scheduler.want(index)
        self._held_back = 0

    def _settle(self, index: int, flags: int, where: str) -> int:
        """Count a chunk of this machine if it is right, else fetch it; returns the bytes that count."""
        if flags & HASH_OK and flags & LINK_OK:
            self._scheduler.done(index)
            self._chunk_here(index)
            self._after_batch()
            return self.manifest.length_of(index)
        if flags & HASH_OK:
            self.fail(_convicted(self.manifest, index, where))
        self._scheduler.want(index)
        self._pump()
        return 0

    def _use_parity(self, plan: ParityPlan, now: float) -> None:
        """Data chunks that nobody has: get their stripes' parity, from this machine or from peers."""
        unheld = self._scheduler.unheld() & self._data
        if not unheld or not self._scheduler.usable_peers():
            self._unheld_since = None
        elif self._unheld_since is None:
            self._unheld_since = now
        elif now - self._unheld_since >= PARITY_AFTER_S:
            asked = plan.to_ask(unheld, self._held() | self._local_parity, self._here)
            ours = [index for index in asked if self._local_parity >> index & 1]
            for index in asked:
                if index not in ours:
                    self._scheduler.want(index)
            if ours and self._settings.local is not None:
                self._tasks.spawn(self._take_parity(self._settings.local, ours))

    def _held(self) -> int:
        """The chunks that somebody has who can be asked."""
        held = 0
        for peer in self._scheduler.usable_peers():
            held |= peer.have
        return held

    async def _take_parity(self, local: LocalChunks, chunks: list[int]) -> None:
        """Copy parity chunks that lie on this machine; what is damaged there is asked of peers."""
        for index in chunks:
            flags = 0
            extent = local.open_extent(self.manifest.hash_of(index))
            if extent is not None and extent[2] == self.manifest.length_of(index):
                fd = os.dup(extent[0])
                try:
                    ((_, flags),) = await check_batch(self._job, [(index, fd, extent[1])], write=True)
                finally:
                    os.close(fd)
            if flags & HASH_OK:
                self._chunk_here(index)
            else:
                self._local_parity &= ~(1 << index)
                self._scheduler.want(index)
        self._after_batch()

    def _is_rebuilding(self) -> bool:
        return self._rebuilding is not None and not self._rebuilding.done()

    async def _rebuild(self, plan: ParityPlan, stripe: int | None) -> None:
        """Rebuild stripes, one after the other, while any is ready."""
        part = self._part
        while stripe is not None and not self._ended.done():
            work = asyncio.ensure_future(
                asyncio.to_thread(plan.rebuild, stripe, self._here, part.fd, part.parity_fd, self._job)
            )
            try:
                rebuilt = await asyncio.shield(work)
            except OSError as exc:
                raise storage_error(exc, str(part.path), "the part file is kept and can be resumed") from exc
            except asyncio.CancelledError:
                await asyncio.wait([work])  # the thread uses our descriptors until then
                raise
            for index, flags in rebuilt:
                self.local_bytes += self._settle(index, flags, "parity")
            stripe = plan.next_ready()

    # --- time ---

    def _tick(self) -> None:
        """Four times a second: rates, slow peers, parity, and whether anybody can still help."""
        now = time.monotonic()
        received = self._crowd.received()
        local_busy = self._local_work is not None and not self._local_work.done()
        if received > self._n_received or local_busy:
            self._last_byte = now
        self._lose_patience(now, received - self._n_received, is_progress=local_busy)
        sample = max(0, received - self._n_received) / TICK_S
        self._rate = sample if self._rate == 0 else 0.8 * self._rate + 0.2 * sample
        self._n_received = received
        self._shed_slow(now)
        if self._parity is not None:
            self._use_parity(self._parity, now)
        self._pump()
        self._report(now)
        is_idle = not local_busy and not self._is_rebuilding() and not self._scheduler.n_in_flight
        hopeless = is_idle and self._crowd.is_hopeless()
        if hopeless or self._patience_s <= 0:
            self.fail(self._stuck(stalled=not hopeless))

    def _lose_patience(self, now: float, n_bytes: int, *, is_progress: bool) -> None:
        """Bytes buy time at 4 KiB/s, a chunk that is right buys all of it: who only trickles is given up, too."""
        limit_s = self._settings.stall_timeout_s
        n_here = self._here.bit_count()
        if is_progress or n_here > self._n_here:
            self._patience_s = limit_s
        else:
            lost_s = min(now - self._last_tick, 4 * TICK_S)  # a longer tick was our own pause
            self._patience_s = min(limit_s, self._patience_s - lost_s + max(0, n_bytes) / SLOW_BPS)
        self._last_tick, self._n_here = now, n_here

    def _shed_slow(self, now: float) -> None:
        """Drop a peer that gave less than 4 KiB/s over 30 s while others could be asked instead."""
        usable = self._scheduler.usable_peers()
        for peer in usable:
            remote = self._crowd.remotes[peer.key]  # type: ignore[index]
            if not peer.in_flight:
                remote.shed_mark = None
                continue
            got = remote.received()
            if remote.shed_mark is None:
                remote.shed_mark = (now, got)
            elif now - remote.shed_mark[0] >= SLOW_WINDOW_S:
                if got - remote.shed_mark[1] < SLOW_BPS * SLOW_WINDOW_S and len(usable) > 1:
                    self._crowd.ban(remote, f"slower than {SLOW_BPS} B/s over {SLOW_WINDOW_S:g} s")
                remote.shed_mark = (now, got)

    def _stuck(self, *, stalled: bool) -> FastCASError:
        manifest, scheduler = self.manifest, self._scheduler
        missing = scheduler.wanted & self._data
        n = missing.bit_count()
        shown = ", ".join(f"#{i} ({short(manifest.hash_of(i))})" for i in lowest_bits(missing, 3))
        lost = self._parity.explain(missing, self._here | self._held()) if self._parity is not None else ""
        lost += "; " if lost else ""
        text = (
            f"file {short(manifest.file_hash)}: {n} of {manifest.n_chunks} chunks are missing: {shown}"
            f"{', …' if n > 3 else ''}; {lost}{self._crowd.what_peers_did()}; the part file is kept and can be resumed"
        )
        if stalled and not scheduler.unheld():
            return Stalled(f"less than {SLOW_BPS} B/s for {self._settings.stall_timeout_s:g} s: {text}")
        return ChunkNotFound(text)

    def _report(self, now: float) -> None:
        """Tell the progress callback: at each tick, and whenever another twentieth of the file is here."""
        self._report_at = self._bytes_done + max(self.manifest.size // REPORTS, 1)
        if self._settings.progress is None:
            return
        scheduler = self._scheduler
        waiting_on = ""
        if now - self._last_byte >= QUIET_S:
            unheld = scheduler.unheld().bit_count()
            if unheld:
                waiting_on = f"{unheld} chunks that nobody has"
            else:
                waiting_on = f"{scheduler.n_in_flight} chunks in flight" if scheduler.n_in_flight else "peers"
        n_peers = len(scheduler.usable_peers())
        self._settings.progress(Progress(self._bytes_done, self.manifest.size, self._rate, n_peers, waiting_on))


def _convicted(manifest: Manifest, index: int, where: str) -> ManifestConvictedError:
    return ManifestConvictedError(
        f"manifest {short(manifest.manifest_hash)}: chunk #{index} from {where} satisfies its hash or its link but not "
        f"both, so the manifest contradicts itself; it is not used"
    )
