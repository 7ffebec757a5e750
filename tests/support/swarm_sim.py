"""Swarms in virtual time: the real `Scheduler` of every leecher and the real given board of every seed.

What is modelled: uplinks that serve so many transfers at once in turns of a quantum, one queue, "busy" (rules 1 to 5 of
the strategy in docs/P2P_ARCHITECTURE.md), downlinks with a short backlog, half a round trip each way, looks at what
neighbours have every POLL_S. What is not: headers (a real wire adds 4.5 %), slow start, loss, CPU. Every leecher knows
the seed and all others, above a hundred 30 random ones or so. Marks on the board are never taken back.

    python -m tests.support.swarm_sim [--chunks 64] [--kind alike|mixed|churn]... [--slow 0.3] [--churn 0.1] N...

One line a run: the bound, the last and the median leecher's time ÷ the bound, what the seed sent ÷ the file; the
excess: the last one's time above the bound in times that the seed's uplink takes for a chunk, and that ÷ log2 N;
requests refused ("busy") per chunk and leecher.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import math
import random
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fastcas.fetch.scheduler import Scheduler
from fastcas.limits import UPLOAD_SLOTS
from fastcas.table import GivenBoard

MBIT = 1e6 / 8
POLL_S = 0.1
WAKE_S = 0.01  # a leecher that waits for the end of a rest looks at most so often
WAIT_S = 0.085
BACKLOG_S = 0.03
QUANTA = 4  # per chunk
KNOWN_ALL = 100
KNOWN_SOME = 15  # that everybody picks; those who picked us are known, too
MANIFEST = bytes(32)


@dataclass(frozen=True)
class Swarm:
    """What to run. Rates in Mbit/s; `leave` are leechers that vanish half-way, replaced by new ones if `replaced`."""

    ups: tuple[float, ...]
    down: float
    seed_up: float
    n_chunks: int = 256
    chunk_size: int = 1 << 18
    rtt_s: float = 0.001
    leave: int = 0
    replaced: bool = False
    seed: int = 1

    def bound_s(self) -> float:
        """The least time in which all leechers can have the file, seconds."""
        size = self.n_chunks * self.chunk_size
        total = (self.seed_up + sum(self.ups)) * MBIT
        return max(size / (self.seed_up * MBIT), size / (self.down * MBIT), len(self.ups) * size / total)


@dataclass
class Outcome:
    """What became of it.

    Attributes:
        ratio: The last leecher's time ÷ the bound; median: that of half of them.
        seed_sent: In file sizes.
        n_refused: Requests that were answered "busy".
    """

    ratio: float
    median: float
    seed_sent: float
    n_events: int
    n_duplicates: int
    n_refused: int


@dataclass(eq=False, slots=True)
class _Host:
    number: int
    up: float
    down: float
    scheduler: Scheduler | None = None
    board: GivenBoard | None = None
    have: int = 0
    generation: int = 0
    neighbours: list[_Host] = field(default_factory=list)
    seen: dict[int, int] = field(default_factory=dict)
    queue: deque[tuple[_Host, int | None]] = field(default_factory=deque)
    active: deque[list[int | _Host | bool]] = field(default_factory=deque)
    waiting: float = 0.0
    sending: bool = False
    down_free: float = 0.0
    alive: bool = True
    done_at: float | None = None
    wake: float = math.inf
    n_sent: int = 0


class Simulation:
    """One run. Deterministic for a seed."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.rng = random.Random(swarm.seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = itertools.count()
        self._full = (1 << swarm.n_chunks) - 1
        self.n_duplicates = 0
        self.n_refused = 0
        self.seed = _Host(0, swarm.seed_up * MBIT, swarm.down * MBIT, have=self._full, generation=1)
        self.seed.board = GivenBoard.create()
        self.leechers: list[_Host] = []
        for up in swarm.ups:
            self._join(up)
        n = len(self.leechers)
        for host in self.leechers:
            known = self.leechers if n <= KNOWN_ALL else self.rng.sample(self.leechers, KNOWN_SOME)
            self._introduce(host, known)
        self.stayers = list(self.leechers)
        if swarm.leave:
            self.stayers, leaving = self.leechers[: -swarm.leave], self.leechers[-swarm.leave :]
            for host in leaving:
                self.at(swarm.bound_s() * self.rng.uniform(0.3, 0.7), self._vanish, host)

    def at(self, when: float, what: Callable[..., None], *arguments: object) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (when, next(self._count), what, arguments))

    def run(self) -> Outcome:
        """Return when every leecher that stays has everything; AssertionError if that takes twenty bounds."""
        bound = self.swarm.bound_s()
        left = len(self.stayers)
        stayers = set(map(id, self.stayers))
        self._finished: Callable[[_Host], None] = lambda host: None
        ends: list[float] = []

        def finished(host: _Host) -> None:
            if id(host) in stayers:
                ends.append(self.now)

        self._finished = finished
        n_events = 0
        while len(ends) < left:
            assert self._events, "nothing is left to do, and not everybody has everything"
            self.now, _, what, arguments = heapq.heappop(self._events)
            assert self.now < 20 * bound, f"only {len(ends)} of {left} finished"
            what(*arguments)
            n_events += 1
        ends.sort()
        sent = self.seed.n_sent / self.swarm.n_chunks
        return Outcome(
            ends[-1] / bound, ends[len(ends) // 2] / bound, sent, n_events, self.n_duplicates, self.n_refused
        )

    # --- who is there ---

    def _join(self, up: float) -> _Host:
        host = _Host(len(self.leechers) + 1, up * MBIT, self.swarm.down * MBIT)
        host.scheduler = Scheduler(
            self.swarm.n_chunks, self.swarm.chunk_size, wanted=self._full, rng=random.Random(self.rng.getrandbits(64)),
            others_until=self.now + 1.0,
        )  # fmt: skip
        host.scheduler.is_busy = lambda: _is_busy(host)
        self.leechers.append(host)
        self._learn(host, self.seed)
        self.at(self.now + POLL_S * self.rng.random(), self._look, host)
        return host

    def _introduce(self, host: _Host, known: list[_Host]) -> None:
        for other in known:
            if other is not host and other.number not in host.seen:
                self._learn(host, other)
                self._learn(other, host)

    def _learn(self, host: _Host, other: _Host) -> None:
        host.neighbours.append(other)
        host.seen[other.number] = -1

    def _vanish(self, host: _Host) -> None:
        if host.done_at is not None:
            return
        host.alive = False
        host.queue.clear()
        host.active.clear()
        for other in host.neighbours:
            if other.scheduler is not None and host.number in other.scheduler.peers:
                self.at(self.now + self.swarm.rtt_s, self._lose, other, host)
        if self.swarm.replaced:
            fresh = self._join(host.up / MBIT)
            living = [
                h for h in self.rng.sample(self.leechers[:-1], min(4 * KNOWN_SOME, len(self.leechers) - 1)) if h.alive
            ]
            self._introduce(fresh, living[: 2 * KNOWN_SOME])

    def _lose(self, host: _Host, gone: _Host) -> None:
        assert host.scheduler is not None
        host.scheduler.ban(gone.number, "gone")
        self._pump(host)

    # --- a leecher ---

    def _look(self, host: _Host) -> None:
        """See what the neighbours have by now."""
        scheduler = host.scheduler
        if not host.alive or host.done_at is not None or scheduler is None:
            return
        useful = False
        for other in host.neighbours:
            if other.alive and host.seen[other.number] != other.generation:
                host.seen[other.number] = other.generation
                scheduler.add_peer(other.number)
                scheduler.set_have(other.number, other.have, is_seed=other is self.seed)
                useful = True
        if useful:
            self._pump(host)
        self.at(self.now + POLL_S * (0.75 + 0.5 * self.rng.random()), self._look, host)

    def _pump(self, host: _Host) -> None:
        scheduler = host.scheduler
        if scheduler is None or not host.alive or host.done_at is not None:
            return
        for ask in scheduler.decide(self.now):
            number = ask.peer
            assert isinstance(number, int)
            server = self.seed if number == 0 else self.leechers[number - 1]
            self.at(self.now + self.swarm.rtt_s / 2, self._arrive, server, host, ask.index)
        wake = scheduler.wake_at(self.now)
        if wake is not None:
            wake = max(wake, self.now + WAKE_S)
            if wake < host.wake:
                host.wake = wake
                self.at(wake, self._woken, host)

    def _woken(self, host: _Host) -> None:
        if host.wake == self.now:  # else an earlier one took this one's place
            host.wake = math.inf
            self._pump(host)

    def _answer(self, host: _Host, server: _Host, index: int | None, kind: str) -> None:
        scheduler = host.scheduler
        if scheduler is None or not host.alive or not server.alive:
            return
        if kind == "busy":
            scheduler.busy(server.number, index, self.now)
        elif kind == "nothing":
            scheduler.nothing_new(server.number, self.now)
        elif kind == "missing" and index is not None:
            scheduler.missing(server.number, index)
        self._pump(host)

    def _deliver(self, host: _Host, server: _Host, index: int, chosen: bool) -> None:
        scheduler = host.scheduler
        if scheduler is None or not host.alive:
            return
        if server.alive:
            if chosen:
                scheduler.asked(server.number, index, self.now)
            scheduler.completed(server.number, [index], self.now, self.swarm.chunk_size, self.swarm.rtt_s)
        scheduler.done(index)
        self.n_duplicates += host.have >> index & 1
        host.have |= 1 << index
        host.generation += 1
        if host.have == self._full:
            if host.done_at is None:
                host.done_at = self.now
                self._finished(host)
            return
        self._pump(host)

    # --- a server ---

    def _arrive(self, server: _Host, client: _Host, index: int | None) -> None:
        if not server.alive:
            return  # the client hears of it by `_lose`
        back = self.now + self.swarm.rtt_s / 2
        if index is not None:
            if not server.have >> index & 1:
                self.at(back, self._answer, client, server, index, "missing")
                return
            if _is_busy(server):
                self.n_refused += 1
                self.at(back, self._answer, client, server, index, "busy")
                return
        server.waiting += self.swarm.chunk_size
        server.queue.append((client, index))
        self._start(server)

    def _start(self, server: _Host) -> None:
        while server.queue and len(server.active) < UPLOAD_SLOTS:
            client, index = server.queue.popleft()
            chosen = index is None
            if index is None and server.board is not None:
                index = server.board.claim_from(MANIFEST, self.swarm.n_chunks, 0, self.rng.getrandbits(32))
            if index is None:
                server.waiting -= self.swarm.chunk_size
                self.at(self.now + self.swarm.rtt_s / 2, self._answer, client, server, None, "nothing")
                continue
            server.active.append([client, index, chosen, QUANTA])
        if server.active and not server.sending:
            server.sending = True
            self._send(server)

    def _send(self, server: _Host) -> None:
        """Send one quantum of the next transfer whose receiver can take it."""
        if not server.active:
            server.sending = False
            return
        for _ in range(len(server.active)):
            client = server.active[0][0]
            if client.down_free - self.now <= BACKLOG_S:
                break
            server.active.rotate(-1)
        else:
            soonest = min(entry[0].down_free for entry in server.active) - BACKLOG_S
            self.at(max(soonest, self.now + 1e-4), self._send, server)
            return
        quantum = self.swarm.chunk_size / QUANTA
        self.at(self.now + quantum / server.up, self._sent, server, server.active[0], quantum)

    def _sent(self, server: _Host, entry: list, quantum: float) -> None:
        if not server.alive:
            return
        client, index, chosen, left = entry
        server.waiting -= quantum
        client.down_free = max(self.now, client.down_free) + quantum / client.down
        entry[3] = left - 1
        if left == 1:
            server.active.popleft()
            server.n_sent += 1
            self.at(client.down_free + self.swarm.rtt_s / 2, self._deliver, client, server, index, chosen)
            self._start(server)
        else:
            server.active.rotate(-1)
        self._send(server)


def _is_busy(host: _Host) -> bool:
    """Rule 2: more waits than the uplink sends in WAIT_S."""
    return bool(host.active) and host.waiting > WAIT_S * host.up


def simulate(swarm: Swarm) -> Outcome:
    """Run one swarm."""
    return Simulation(swarm).run()


KINDS = ("alike", "mixed", "churn")
HEAD = (
    f"{'kind':6} {'N':>6} {'chunks':>6} {'bound':>8} {'last':>6} {'median':>6} {'seed':>6} {'excess':>7} "
    f"{'/log2 N':>7} {'refused':>7} {'events':>10} {'CPU':>7} {'memory':>8}"
)


def row(kind: str, swarm: Swarm) -> str:
    """Run one swarm and return its line of the table; `HEAD` names the columns."""
    n = len(swarm.ups)
    begun = time.process_time()
    got = simulate(swarm)
    spent_s = time.process_time() - begun
    excess = (got.ratio - 1) * swarm.bound_s() * swarm.seed_up * MBIT / swarm.chunk_size
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{kind:6} {n:6} {swarm.n_chunks:6} {swarm.bound_s():6.2f} s {got.ratio:6.3f} {got.median:6.3f} "
        f"{got.seed_sent:4.2f} F {excess:7.1f} {excess / math.log2(n):7.2f} "
        f"{got.n_refused / n / swarm.n_chunks:7.1f} {got.n_events:10} {spent_s:5.0f} s {mib:4.0f} MiB"
    )


def main() -> None:
    """Print how the ratio grows with N: links alike, some of them thin, and churn besides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="+")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all of them")
    parser.add_argument("--slow", type=float, default=0.3, help="share of the leechers with a fifth of the uplink")
    parser.add_argument("--churn", type=float, default=0.1, help="share that vanishes half-way and is replaced")
    options = parser.parse_args()
    gc.disable()  # there is little to find, and a look at ten million objects takes seconds
    print(HEAD, flush=True)
    for n in options.n:
        for kind in options.kind or KINDS:
            rng = random.Random(n)
            slow = 0.0 if kind == "alike" else options.slow
            leave = int(options.churn * n) if kind == "churn" else 0
            ups = tuple(20.0 if rng.random() < slow else 100.0 for _ in range(n))
            print(row(kind, Swarm(ups, 200.0, 100.0, options.chunks, leave=leave, replaced=True)), flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
