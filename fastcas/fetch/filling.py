"""The chunks of one file on their way into its part file: from this machine, from peers, from parity.

`scheduler` decides whom to ask for what, the receiver fetches and checks, `trust` judges, `localwork` and `rebuild` get
chunks without asking anybody, `patience` says when nothing more is to be hoped for.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from fastcas.errors import FastCASError
from fastcas.fetch._receiver import Answer, Job
from fastcas.fetch.alarm import Alarm
from fastcas.fetch.crowd import Crowd
from fastcas.fetch.download import LocalChunks, Progress, Settings
from fastcas.fetch.explain import Meter
from fastcas.fetch.localwork import check_batch
from fastcas.fetch.origins import LACKING_S, Origins
from fastcas.fetch.partfile import PartFile, storage_error
from fastcas.fetch.patience import SLOW_BPS, TICK_S, Patience, stuck, too_slow
from fastcas.fetch.rebuild import ParityPlan
from fastcas.fetch.receiver import HASH_OK, AsyncReceiver, Outcome, describe
from fastcas.fetch.remote import Remote
from fastcas.fetch.scheduler import Ask, Scheduler, bits, to_set
from fastcas.fetch.swarmview import next_target
from fastcas.fetch.tasks import TaskSet
from fastcas.fetch.trust import Chain, Verdict, convicted, judge
from fastcas.ids import short
from fastcas.metadata import Manifest

if TYPE_CHECKING:
    from fastcas.fetch.seeds import SeedFiles

__all__ = ["Filling"]

LOCAL_BATCH = 16  # chunks checked per visit to a thread
OTHERS_S = 1.0  # others who started with us are known by then
PARITY_AFTER_S = 1.0  # nobody has had a data chunk for so long: parity is asked for
REPORTS = 20  # of progress per file at least, however fast it comes
OK = Outcome.OK
CUTS_MAX = 3  # answers cut short in a row before the peer is banned


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
        meter: Meter,
    ) -> None:
        """Ask for nothing before `run`.

        Args:
            meter: Is told what is waited for.
        """
        self.manifest = manifest
        self.chain = chain
        self.resumed_bytes = 0
        self.local_bytes = 0
        self._settings = settings
        self._crowd = crowd
        self._receiver = receiver
        self._tasks = TaskSet(f"file {short(manifest.file_hash)}", self.fail)
        self._part = part
        # Who serves chunks needs their own hashes, too; for the content the links are enough.
        serves = settings.hooks is not None or settings.data_port is not None
        self._job = Job(
            manifest, part.fd, part.parity_fd, direct_fd=part.direct_fd, check_links=chain.is_checked,
            links_alone=not serves,
        )  # fmt: skip
        self._data = chain.wanted
        self._n_data = manifest.n_chunks
        missing = self._data & ~to_set(part.candidates, manifest.n_chunks)
        self._held_back = missing if settings.seeds is not None else 0  # chunk set: peers are asked after seed files
        is_new = missing == self._data
        others_until = time.monotonic() + OTHERS_S if settings.data_port and is_new else -math.inf
        mean = -(-manifest.size // manifest.n_chunks) if manifest.is_cdc else manifest.chunk_size
        self._scheduler = Scheduler(
            manifest.n_total, mean, wanted=missing & ~self._held_back, rng=random.Random(), others_until=others_until
        )
        self._scheduler.allowed = chain.allowed()
        self._scheduler.is_busy = settings.is_busy
        self._meter = meter
        self._pace = settings.pace
        urls = settings.origins_of_file()
        self.origins = Origins(
            urls, manifest, self._job, self._scheduler, self._pace, self._settle, self._tasks
        ) if urls else None  # fmt: skip
        self._parity = ParityPlan(manifest) if manifest.n_parity else None
        if self._parity is not None:
            self._scheduler.stand_in = self._parity_for
        self._local_parity = 0  # chunk set: parity that lies elsewhere on this machine
        self._rebuilding: asyncio.Task[None] | None = None
        self._here = 0  # chunk set: checked and in its place
        self._bytes_done = 0
        self._report_at = 0
        self._unlisted: list[int] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._local_work: asyncio.Task[None] | None = None
        self._alarm = Alarm(self._pump)
        self._patience = Patience(settings.stall_timeout_s, time.monotonic(), self._received())
        self._unheld_since: float | None = None
        self._is_paced = False  # the limit of the rate held something back

    async def run(self) -> None:
        """Return when every data chunk is in its place and right; afterwards nothing is written any more."""
        crowd = self._crowd
        crowd.on_have, crowd.on_ban = self._on_have, self._on_ban
        self._receiver.on_batch = self._after_batch
        crowd.use(self.manifest)
        self._meter.threads(self._receiver.core.times())
        self._local_work = self._tasks.spawn(self._take_local())
        try:
            while not self._ended.done():
                await asyncio.wait([self._ended], timeout=TICK_S)
                if not self._ended.done():
                    self._tick()
            self._ended.result()
        finally:
            self._meter.switch("disk", time.monotonic())
            self._meter.threads(self._receiver.core.times())
            self._receiver.on_batch = crowd.on_have = crowd.on_ban = None
            self._alarm.cancel()
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
        remote.on_answers = self._on_answers
        self._scheduler.add_peer(remote.addr)
        if not self.chain.takes_any:
            self._scheduler.peers[remote.addr].gives_next = False
        self._scheduler.set_have(remote.addr, remote.have, is_seed=remote.is_seed)
        if remote.came_back:
            remote.came_back = False
            self._scheduler.came_back(remote.addr)
            self._pump()
        elif remote.have & self._scheduler.free:
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
        by_peer: dict[Hashable, list[int]] = {}
        chunks: list[int] = []
        of_peer: Hashable = None  # whose the list is: most asks in a row are of one peer
        for ask in self._decide(now):
            peer, index = ask.peer, ask.index
            if index is not None:
                if peer is not of_peer:
                    of_peer, chunks = peer, by_peer.setdefault(peer, [])
                chunks.append(index)
            else:
                target = next_target(
                    manifest.file_hash, manifest.manifest_hash, self.chain.first_allowed,
                    data_port=self._settings.data_port, node_id=self._settings.node_id,
                )  # fmt: skip
                self._crowd.remotes[peer].ask_next(self._job, target)  # type: ignore[index]
        for peer, chunks in by_peer.items():
            self._crowd.remotes[peer].ask_chunks(self._job, chunks)  # type: ignore[index]
        cause, n_unheld = self._waits_for()
        at = self._scheduler.wake_at(now)
        if cause == "max_download" and self._pace is not None:
            free_at = now + self._pace.wait_s(manifest.chunk_size)
            at = free_at if at is None else min(at, free_at)
        self._meter.switch(cause, now, n_unheld)
        if at is not None:
            self._alarm.set(at, now)

    def _decide(self, now: float) -> list[Ask]:
        """What to ask for, within what the limit of the rate allows."""
        pace, scheduler, manifest = self._pace, self._scheduler, self.manifest
        if pace is None:
            return scheduler.decide(now)
        n = pace.chunks(now, manifest.chunk_size)
        if n == 0:
            self._is_paced = True
            return []
        most = scheduler.max_in_flight
        scheduler.max_in_flight = min(most, scheduler.n_in_flight + n)
        asks = scheduler.decide(now)
        scheduler.max_in_flight = most
        pace.spend(sum(self._length_of(ask.index) for ask in asks))
        self._is_paced = bool(asks) and pace.chunks(now, manifest.chunk_size) == 0
        return asks

    def _length_of(self, index: int | None) -> int:
        return self.manifest.chunk_size if index is None else self.manifest.length_of(index)

    def _waits_for(self) -> tuple[str, int]:
        """What the download waits for (`explain.CAUSES`), and the chunks that nobody has where it is that."""
        scheduler = self._scheduler
        if self._is_paced:
            return "max_download", 0
        if scheduler.n_in_flight or any(peer.n_next for peer in scheduler.peers.values()):
            return "peer_upload", 0
        if self.origins is not None and self.origins.n_asked:
            return "origin_upload", 0
        if (self._local_work is not None and not self._local_work.done()) or self._is_rebuilding():
            return "local", 0
        if not self.is_short():
            return "reader", 0
        n_unheld = scheduler.unheld().bit_count()
        return ("unheld", n_unheld) if n_unheld else ("peer_upload", 0)

    def is_short(self) -> bool:
        """Whether anything may be fetched that is not here: not, while whoever reads the result is slower."""
        return bool(self._scheduler.wanted & self._scheduler.allowed)

    def look_again(self) -> None:
        """What `chain` allows has changed."""
        self._scheduler.allowed = self.chain.allowed()
        self._pump()

    def _after_batch(self) -> None:  # hot
        self._list_written()
        if self._here & self._data == self._data and not self._ended.done():
            self._ended.set_result(None)
        if self._parity is not None and not self._is_rebuilding() and (ready := self._parity.next_ready()) is not None:
            self._rebuilding = self._tasks.spawn(self._rebuild(self._parity, ready))
        self._pump()
        if self._bytes_done >= self._report_at:
            self._report(time.monotonic())

    def _on_answers(self, remote: Remote, answers: list[Answer]) -> None:  # hot
        now = time.monotonic()
        right: list[Answer] = []
        for answer in answers:
            if answer.outcome == OK:
                if answer.chosen:
                    self._scheduler.asked(remote.addr, answer.chunk, now)
                if judge(answer.flags, is_data=answer.chunk < self._n_data) is Verdict.RIGHT:
                    right.append(answer)
                    continue
            if right:  # what came before a failure counts before it
                self._on_right(remote, right, now)
                right = []
            self._on_failure(remote, answer, now)
        if right:
            self._on_right(remote, right, now)

    def _on_right(self, remote: Remote, answers: list[Answer], now: float) -> None:  # hot
        if self._ended.done():
            return
        chunks = [answer.chunk for answer in answers]
        n_bytes = sum([answer.length for answer in answers])
        remote.n_bytes += n_bytes
        remote.n_cut = 0
        self._scheduler.completed(remote.addr, chunks, now, n_bytes, answers[-1].connect_us / 1e6)
        self._chunks_here(chunks)

    def _on_failure(self, remote: Remote, answer: Answer, now: float) -> None:
        """A request that brought no chunk, or one that is not what the manifest says."""
        index = None if answer.chosen else answer.chunk
        if self._pace is not None and answer.outcome != OK:
            self._pace.spend(answer.length - self._length_of(index))
        if self._ended.done():
            return
        scheduler, key, outcome = self._scheduler, remote.addr, answer.outcome
        if outcome in (Outcome.OK, Outcome.CORRUPT):
            if index is None:
                index = answer.chunk
                if outcome != OK:
                    scheduler.asked(key, index, now)
            scheduler.lost(key, index)
            if judge(answer.flags, is_data=index < self._n_data) is Verdict.PEER:
                self._crowd.ban(remote, f"chunk {short(self.manifest.hash_of(index))}: {describe(answer)}")
            else:
                self.fail(convicted(self.manifest, index, str(key)))
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

    def _chunks_here(self, chunks: Iterable[int]) -> None:  # hot
        """These chunks are in their places and right."""
        listed, hooks = self._part.candidates, self._settings.hooks
        for index in chunks:
            bit = 1 << index
            if self._here & bit:
                continue
            self._here |= bit
            if self._parity is not None:
                self._parity.add(index)
            if index >= self._n_data:
                continue
            self._bytes_done += self.manifest.length_of(index)
            if self.chain.is_checked and self.chain.link_holds(index):
                self._scheduler.allowed = self.chain.allowed()
            if not listed.get(index):  # else the journal lists it already
                self._unlisted.append(index)
            if hooks is not None:
                hooks.on_chunk(index)

    def _list_written(self) -> None:
        unlisted, self._unlisted = self._unlisted, []
        try:
            self._part.journal.add(unlisted, link_checked=self.chain.is_checked)
        except OSError as exc:
            self.fail(storage_error(exc, str(self._part.journal.path), "the part file is kept and can be resumed"))

    # --- chunks without peers ---

    async def _take_local(self) -> None:
        """Check what the part file has already, then take what lies elsewhere on this machine."""
        part, manifest = self._part, self.manifest
        trust = self._settings.trust_resume and part.same_boot
        doubtful: list[int] = []
        for index, link_checked in sorted(part.candidates.items()):
            if trust and (link_checked or not self.chain.is_checked):
                self.resumed_bytes += manifest.length_of(index)
                self._chunks_here([index])
            else:
                doubtful.append(index)
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
        if judge(flags, is_data=index < self._n_data) is Verdict.RIGHT:
            self._scheduler.done(index)
            self._chunks_here([index])
            self._after_batch()
            return self.manifest.length_of(index)
        if flags & HASH_OK:
            self.fail(convicted(self.manifest, index, where))
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

    def _parity_for(self, index: int, have: int) -> int | None:
        """A parity chunk that a peer can give while chunk `index` is late elsewhere."""
        if self._parity is None or self.chain.first_allowed:
            return None
        chunk = self._parity.stand_in(index, have, self._here)
        if chunk is not None:
            self._scheduler.want(chunk)
        return chunk

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
                self._chunks_here([index])
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
        # Where we hold back ourselves, silence is no stall.
        local_busy = self._local_work is not None and not self._local_work.done()
        local_busy = local_busy or self._is_paced or not self.is_short()
        self._patience.tick(now, self._received(), self._here.bit_count(), is_held=local_busy)
        usable = [(self._crowd.remotes[peer.key], bool(peer.in_flight)) for peer in self._scheduler.usable_peers()]  # type: ignore[index]
        for remote in too_slow(usable, now):
            self._crowd.ban(remote, f"slower than {SLOW_BPS} B/s over 30 s")
        if self._parity is not None:
            self._use_parity(self._parity, now)
        self._pump()
        if self.origins is not None:
            self._use_origins(self.origins, now)
        self._report(now)
        is_idle = not local_busy and not self._is_rebuilding() and not self._scheduler.n_in_flight
        hopeless = is_idle and self._crowd.is_hopeless() and not (self.origins and self.origins.can_help())
        if hopeless or self._patience.is_over:
            self.fail(self._stuck(stalled=not hopeless))

    def _received(self) -> int:
        """Bytes of chunks that came from anybody."""
        return self._crowd.received() + (self.origins.n_received if self.origins is not None else 0)

    def _use_origins(self, origins: Origins, now: float) -> None:
        """Let the origins have the chunks that nobody has who can be asked soon."""
        scheduler, held = self._scheduler, 0
        for peer in scheduler.usable_peers():
            if peer.rest_until - now < LACKING_S:
                held |= peer.have
        lacking = scheduler.free & scheduler.allowed & self._data & ~held
        origins.offer(lacking, now, nobody_comes=self._crowd.is_hopeless())

    def _stuck(self, *, stalled: bool) -> FastCASError:
        missing = self._scheduler.wanted & self._data
        lost = self._parity.explain(missing, self._here | self._held()) if self._parity is not None else ""
        did = self._crowd.what_peers_did()
        if self.origins is not None:
            did += f"; {self.origins.what_they_did()}"
        stalled = stalled and not self._scheduler.unheld()
        return stuck(self.manifest, missing, lost, did, self._settings.stall_timeout_s if stalled else None)

    def _report(self, now: float) -> None:
        """Tell the progress callback: at each tick, and whenever another twentieth of the file is here."""
        self._report_at = self._bytes_done + max(self.manifest.size // REPORTS, 1)
        if self._settings.progress is None:
            return
        scheduler = self._scheduler
        waiting_on = ""
        if self._patience.is_quiet(now):
            unheld = scheduler.unheld().bit_count()
            if unheld:
                waiting_on = f"{unheld} chunks that nobody has"
            else:
                waiting_on = f"{scheduler.n_in_flight} chunks in flight" if scheduler.n_in_flight else "peers"
        n_peers = len(scheduler.usable_peers())
        rate = self._patience.rate_Bps
        self._settings.progress(Progress(self._bytes_done, self.manifest.size, rate, n_peers, waiting_on))
