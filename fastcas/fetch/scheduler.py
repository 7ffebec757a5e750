"""Who is asked for which chunk, and when: pure decisions.

In: what peers have, answers, the time. Out: a list of `Ask`. Owns: the state of every chunk (wanted, in flight,
here) and of every peer (window, rate, back-off, ban). Never: sockets, a clock or randomness of its own; the same
object runs in the simulator.

Sets of chunks are Python integers (`chunksets`), so that rarest-first is exact without an index to maintain.

Rules (numbers of the distribution strategy in docs/P2P_ARCHITECTURE.md):
* a chunk is in flight at one peer only; one more request only when a peer has nothing else to be asked for and every
  request before is later than three times its expectation; who delivered last goes first, and a chunk that can stand
  in for the late one (parity) is asked for instead;
* requests in flight per peer = max(k, ceil(rate * round trip * 2 / chunk)); k = 1 with eight or more other
  leechers, 2 with some, 4 with none; all peers together stay below the memory cap;
* rarest first, ties at random; with nobody but seeds, runs of consecutive chunks (kind to disks on both sides);
* busy: 50 ms of rest; failures: 0.5 s doubled up to 30 s, and a minute after three in a row while others are there;
* busy ourselves (`is_busy`): no NEXT while anything else is in flight; what is new must not wait for us to pass it on;
* NEXT: while other leechers exist, a seed is asked to choose (rules 4-12) until it has nothing new. One that does not
  answer for two seconds does not count, and the others may be asked by name meanwhile.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from fastcas import limits
from fastcas.fetch.chunksets import any_member, bits, from_bitfield, lowest_bits, to_set
from fastcas.fetch.peerstate import HEDGE_MIN_S, RATE_WINDOW_S, PeerState, late_chunks, oldest_request

__all__ = ["Ask", "PeerState", "Scheduler", "bits", "from_bitfield", "lowest_bits", "to_set"]

BUSY_S = 0.05
FAILURE_MIN_S = 0.5
FAILURE_MAX_S = 30.0
ALONE_MAX_S = 2.0  # the same when nobody else is left to ask
PARK_S = 60.0
PARK_AFTER = 3
CROWD = 8  # so many other leechers are asked for one chunk at a time each
CROWD_IN_FLIGHT = 32  # and for so many together: more would only be refused, unless rates and round trips ask for it
NEXT_AGAIN_S = 0.5
NEXT_BY_NAME_S = 1.0
NEXT_SILENT_S = 2.0  # so long a seed may take to choose before it does not count
STAND_IN_S = 2.0  # so long a stand-in may take before the late chunk is asked for again after all
STALE_MIN = 4  # chosen chunks that were here already, before a seed's choices are doubted
STALE_SHARE = 8  # and more than one in so many


@dataclass(slots=True)
class Ask:
    """One request to make: chunk `index` of `peer`, or (None) a chunk that the peer chooses."""

    peer: Hashable
    index: int | None


class Scheduler:
    """Decides for one file. Times are any monotonic seconds that the caller passes in."""

    def __init__(
        self,
        n_chunks: int,
        chunk_size: int,
        *,
        wanted: int,
        rng: random.Random,
        memory_max: int = limits.RECEIVE_MEMORY_MAX,
        others_until: float = -math.inf,
    ) -> None:
        """Start with nobody to ask.

        `is_busy`, if set, says whether others wait for our own uplink, as "busy" is answered by it (rule 9).
        `stand_in`, if set, is called with a late chunk and what a peer has; it returns a chunk to ask that peer for
        instead, one that nobody was asked for, or None.

        Args:
            n_chunks: Data and parity chunks.
            chunk_size: Bytes.
            wanted: The chunks to fetch.
            rng: Source of all randomness.
            memory_max: Bytes in flight, all peers together (at least four chunks).
            others_until: Until then seeds are asked for NEXT even while no leecher is known: those who start with us
                have not been found yet, and what everybody asks for by name is sent to everybody.
        """
        self.n_chunks = n_chunks
        self.chunk_size = chunk_size
        self.full = (1 << n_chunks) - 1
        self.wanted = wanted
        self.free = wanted
        self.allowed = self.full
        self.peers: dict[Hashable, PeerState] = {}
        self.max_in_flight = max(4, memory_max // chunk_size)
        self.n_in_flight = 0
        self.n_leechers = 0
        self.stand_in: Callable[[int, int], int | None] | None = None
        self.is_busy: Callable[[], bool] | None = None
        self._stood_in: dict[int, float] = {}  # late chunk -> until when its stand-in is waited for
        self._others_until = others_until
        self._held_back_until = -math.inf  # NEXT is to be thought of again then
        self._rng = rng
        self._holders: dict[int, int] = {}  # chunk -> requests in flight
        self._levels: list[int] = [self.full]  # _levels[c] = chunks that exactly c partial peers have
        self._usable: list[PeerState] | None = []  # not banned, with something; None: to be listed again
        self._seeds: list[PeerState] = []  # those of them that are seeds
        self._oldest_at = -math.inf  # no request in flight is older

    # --- peers ---

    def add_peer(self, key: Hashable) -> None:
        """Know a peer, without anything to ask it for yet. A banned one stays banned."""
        if key not in self.peers:
            self.peers[key] = PeerState(key, cursor=self._rng.randrange(max(1, self.n_chunks)))

    def set_have(self, key: Hashable, have: int, *, is_seed: bool) -> None:
        """Replace what a peer has.

        Args:
            have: Chunk set.
            is_seed: It has the whole file, so it may be asked for NEXT, and says nothing about rarity. One that was a
                leecher stays one: asked for NEXT it would give what others have long had.
        """
        peer = self.peers[key]
        have &= self.full
        is_seed = is_seed and not peer.is_leecher
        old_counted = 0 if peer.is_seed else peer.have
        new_counted = 0 if is_seed else have
        if added := new_counted & ~old_counted:
            self._shift(added, 1)
        if removed := old_counted & ~new_counted:
            self._shift(removed, -1)
        self.n_leechers += (not is_seed) - peer.is_leecher
        if is_seed != peer.is_seed or (not have) != (not peer.have):
            self._usable = None
        peer.have = have
        peer.is_seed = is_seed
        peer.is_leecher = not is_seed

    def _shift(self, chunks: int, by: int) -> None:
        """Move chunks one level of rarity up or down."""
        levels = self._levels
        order = range(len(levels) - 1, -1, -1) if by > 0 else range(len(levels))
        for level in order:
            moved = levels[level] & chunks
            if not moved:
                continue
            levels[level] ^= moved
            if level + by == len(levels):
                levels.append(0)
            levels[level + by] |= moved
            chunks ^= moved
            if not chunks:
                return

    def ban(self, key: Hashable, reason: str) -> None:
        """Never ask a peer again; what it was asked for is free again."""
        self.disconnect(key)
        self.peers[key].banned = reason

    def disconnect(self, key: Hashable) -> None:
        """Forget what a peer has and what it was asked for; it may come back with `set_have`."""
        peer = self.peers[key]
        for index in list(peer.in_flight):
            self.lost(key, index)
        peer.n_next = 0
        self.set_have(key, 0, is_seed=False)
        self.n_leechers -= 1
        peer.is_leecher = False

    # --- answers ---

    def asked(self, key: Hashable, index: int, now: float) -> None:
        """A NEXT answer turned out to be chunk `index`; it is counted as if it had been asked for by number.

        A seed whose choices are often here already (others ask it by name, or it lies) is not asked to choose again.
        """
        peer = self.peers[key]
        peer.n_next = max(0, peer.n_next - 1)
        peer.next_since = now
        peer.n_chosen += 1
        peer.nothing_new_at = None
        if not self.free >> index & 1:
            peer.n_stale += 1
            if peer.n_stale >= STALE_MIN and peer.n_stale * STALE_SHARE > peer.n_chosen:
                peer.gives_next = False
        self._take(peer, [index], now)

    def done(self, index: int) -> None:
        """Chunk `index` is here (from a peer or from this machine)."""
        mask = ~(1 << index)
        self.wanted &= mask
        self.free &= mask

    def want(self, index: int) -> None:
        """Chunk `index` is needed after all."""
        bit = 1 << index
        self.wanted |= bit
        if index not in self._holders:
            self.free |= bit

    def completed(self, key: Hashable, chunks: Iterable[int], now: float, size: int, connect_s: float) -> None:  # hot
        """A peer delivered chunks that are right.

        Args:
            size: Bytes, all together.
            connect_s: How long its connection took to open: a round trip.
        """
        peer = self.peers[key]
        here = 0
        for index in chunks:
            here |= 1 << index
            self._release(peer, index)
        self.wanted &= ~here
        self.free &= ~here
        peer.n_failures = 0
        peer.measure(size, now, connect_s, self.chunk_size)

    def busy(self, key: Hashable, index: int | None, now: float) -> None:
        """The peer has no upload slot: the chunk is free again, the peer rests for 50 ms."""
        self.lost(key, index)
        peer = self.peers[key]
        peer.rest_until = max(peer.rest_until, now + BUSY_S)

    def missing(self, key: Hashable, index: int) -> None:
        """The peer does not have chunk `index`, whatever it said."""
        self.lost(key, index)
        peer = self.peers[key]
        self.set_have(key, peer.have & ~(1 << index), is_seed=False)

    def nothing_new(self, key: Hashable, now: float) -> None:
        """A seed answered NEXT with 204."""
        peer = self.peers[key]
        peer.n_next = max(0, peer.n_next - 1)
        peer.next_since = peer.next_refused_at = now
        if peer.nothing_new_at is None:
            peer.nothing_new_at = now

    def no_next(self, key: Hashable) -> None:
        """A seed does not know NEXT: an ordinary peer from now on."""
        peer = self.peers[key]
        peer.n_next = 0
        peer.gives_next = False

    def lost(self, key: Hashable, index: int | None) -> None:
        """A request came to nothing, without blame."""
        peer = self.peers[key]
        if index is None:
            peer.n_next = max(0, peer.n_next - 1)
        else:
            self._release(peer, index)
            if index not in self._holders:
                self.free |= self.wanted & (1 << index)

    def failed(self, key: Hashable, index: int | None, now: float) -> bool:
        """A request failed at the network: the peer rests, longer each time.

        Returns:
            Whether this is a new failure, not one more request that went down with those before.
        """
        self.lost(key, index)
        is_new = self.peers[key].rest_until <= now
        self.rest(key, now)
        return is_new

    def rest(self, key: Hashable, now: float) -> float:
        """Let a peer rest after a network failure; returns until when."""
        peer = self.peers[key]
        if peer.rest_until > now:  # the other requests of the same broken connection
            return peer.rest_until
        peer.n_failures += 1
        others = any(p is not peer and p.rest_until <= now for p in self._list_usable())
        pause = min(FAILURE_MAX_S if others else ALONE_MAX_S, FAILURE_MIN_S * 2.0 ** min(peer.n_failures - 1, 10))
        if others and peer.n_failures >= PARK_AFTER:
            pause = PARK_S
        peer.rest_until = now + pause * (0.5 + 0.5 * self._rng.random())
        return peer.rest_until

    def came_back(self, key: Hashable) -> None:
        """A peer that could not be reached answers again: its failures are forgotten."""
        peer = self.peers[key]
        peer.n_failures = 0
        peer.rest_until = 0.0

    # --- decisions ---

    def decide(self, now: float) -> list[Ask]:  # hot
        """Return the requests to make now; they count as made. Cost: one pass over the usable peers."""
        asks: list[Ask] = []
        floor = self._floor()
        free = self.free & self.allowed
        open_peers: list[PeerState] = []
        rooms: list[int] = []
        depths = 0
        is_anyone_ready = False
        for peer in self._list_usable():
            if peer.rest_until > now:
                continue
            is_anyone_ready = True
            depth = peer.depth
            depths += depth
            if peer.have & free:
                room = (floor if floor > depth else depth) - len(peer.in_flight)
                if room > 0:
                    open_peers.append(peer)
                    rooms.append(room)
        if not is_anyone_ready:
            self._cut_rests(now)
            return asks
        self._ask_next(now, asks)
        most = self.max_in_flight
        if self.n_leechers >= CROWD:
            most = min(most, max(CROWD_IN_FLIGHT, depths))
        fruitless: list[PeerState] = []
        draw = self._rng.random
        while open_peers and self.n_in_flight < most:
            at = int(draw() * len(open_peers)) if len(open_peers) > 1 else 0
            peer = open_peers[at]
            at_once = 1 if len(open_peers) > 1 else min(rooms[at], most - self.n_in_flight)
            chunks = self._pick(peer, at_once, now)
            if not chunks:
                fruitless.append(peer)
                del open_peers[at], rooms[at]
                continue
            self._take(peer, chunks, now)
            asks += [Ask(peer.key, index) for index in chunks]
            rooms[at] -= len(chunks)
            if not rooms[at]:
                del open_peers[at], rooms[at]
        if self.n_in_flight and now - self._oldest_at >= HEDGE_MIN_S:
            self._oldest_at = oldest_request(self.peers.values(), now)
            if now - self._oldest_at >= HEDGE_MIN_S:
                self._hedge(self._idle(free, fruitless, now), now, asks)
        return asks

    def wake_at(self, now: float) -> float | None:
        """Return when `decide` may have something new without an answer, or None."""
        at = math.inf
        free = self.free & self.allowed
        for peer in self._list_usable():
            if now < peer.rest_until < at and peer.have & free:
                at = peer.rest_until
        if self.n_in_flight and len(self.peers) > 1:
            at = min(at, now + HEDGE_MIN_S)
        if now < self._held_back_until < at:
            at = self._held_back_until
        if self.n_leechers and self.free:
            at = min(at, now + NEXT_AGAIN_S)
        elif now < self._others_until < at:
            at = self._others_until
        return at if at < math.inf else None

    def usable_peers(self) -> list[PeerState]:
        """Peers that are not banned and have something."""
        return list(self._list_usable())

    def unheld(self) -> int:
        """Return the wanted chunks that no usable peer has, as a chunk set."""
        held = 0
        for peer in self._list_usable():
            held |= peer.have
        return self.wanted & ~held

    def late(self, key: Hashable, now: float) -> float:
        """Return for how many seconds a peer's oldest request has been out, 0 without any."""
        in_flight = self.peers[key].in_flight
        return now - min(in_flight.values()) if in_flight else 0.0

    # --- inside ---

    def _list_usable(self) -> list[PeerState]:
        if self._usable is None:
            self._usable = [peer for peer in self.peers.values() if peer.banned is None and peer.have]
            self._seeds = [peer for peer in self._usable if peer.is_seed]
        return self._usable

    def _floor(self) -> int:
        if self.n_leechers >= CROWD:
            return 1
        return 2 if self.n_leechers else 4

    def _take(self, peer: PeerState, chunks: list[int], now: float) -> None:  # hot
        in_flight, holders = peer.in_flight, self._holders
        if not in_flight and now - peer.delivered_at > RATE_WINDOW_S:
            peer.window_started, peer.window_bytes = now, 0  # the pause says nothing about its rate
        taken = 0
        for index in chunks:
            if index not in in_flight:
                in_flight[index] = now
                holders[index] = holders.get(index, 0) + 1
                taken |= 1 << index
                self.n_in_flight += 1
        self.free &= ~taken

    def _release(self, peer: PeerState, index: int) -> None:  # hot
        if peer.in_flight.pop(index, None) is None:
            return
        self.n_in_flight -= 1
        left = self._holders.pop(index) - 1
        if left:
            self._holders[index] = left

    def _pick(self, peer: PeerState, n: int, now: float) -> list[int]:
        """Return chunks to ask a peer for: at most `n`, and one where others must have their say after it."""
        candidates = peer.have & self.free & self.allowed
        if candidates and peer.is_seed and peer.gives_next and (self.n_leechers or now < self._others_until):
            candidates = self._of_seed(peer, candidates, now)
        if not candidates:
            return []
        if self.n_leechers == 0:
            return peer.follow(candidates, n)
        for level in self._levels:
            rarest = candidates & level
            if rarest:
                return [any_member(rarest, self._rng)]
        return [any_member(candidates, self._rng)]

    def _of_seed(self, peer: PeerState, candidates: int, now: float) -> int:
        """What may be asked of a NEXT seed by name: nothing before its first 204; then what leechers have too, and
        what nobody has offered for a second."""
        if peer.nothing_new_at is None:
            is_stuck = not peer.n_next and any(self._is_silent(other, now) for other in self.peers.values())
            return candidates if is_stuck else 0
        if now - peer.nothing_new_at >= NEXT_BY_NAME_S:
            return candidates
        return candidates & ~self._levels[0]

    def _ask_next(self, now: float, asks: list[Ask]) -> None:
        """Rule 8 (two more than the formula stands for "as soon as the header arrives") and rule 12's churn."""
        unheld = self.free & self.allowed & self._levels[0]
        if not unheld or not (self.n_leechers or now < self._others_until):
            return
        seeds = [peer for peer in self._seeds if peer.rest_until <= now and peer.gives_next]
        if not seeds:
            return
        least = math.ceil(4 / (self.n_leechers + 1)) + 1
        most = {id(peer): max(2, peer.depth) for peer in seeds}
        want = max(least, *most.values()) - sum(peer.n_next for peer in seeds if not self._is_silent(peer, now))
        if want > 0 and self.n_in_flight and self.is_busy is not None and self.is_busy():
            self._held_back_until = now + BUSY_S
            return
        while want > 0:
            able = [
                peer
                for peer in seeds
                if peer.n_next < most[id(peer)]
                and not self._is_silent(peer, now)
                and (peer.nothing_new_at is None or (peer.n_next == 0 and now - peer.next_refused_at >= NEXT_AGAIN_S))
            ]
            if not able:
                return
            peer = self._rng.choice(able)
            if not peer.n_next:
                peer.next_since = now
            peer.n_next += 1
            asks.append(Ask(peer.key, None))
            want -= 1

    def _is_silent(self, peer: PeerState, now: float) -> bool:
        """Whether a seed that was asked to choose has not done so for long."""
        return peer.n_next > 0 and now - peer.next_since >= NEXT_SILENT_S

    def _idle(self, free: int, fruitless: list[PeerState], now: float) -> list[PeerState]:
        """Who can be asked for nothing that is free, and waits for nothing."""
        candidates = [peer for peer in self._list_usable() if peer.rest_until <= now and not peer.have & free]
        return [
            peer
            for peer in candidates + fruitless
            if not peer.in_flight and (not peer.n_next or self._is_silent(peer, now))
        ]

    def _hedge(self, idle: list[PeerState], now: float, asks: list[Ask]) -> None:
        """Ask idle peers for what is late elsewhere, the latest first."""
        if not idle:
            return
        late = late_chunks(self.peers.values(), self.wanted, self.chunk_size, self._stood_in, now)
        idle.sort(key=lambda peer: peer.delivered_at, reverse=True)  # who never delivered may never do
        for peer in idle:
            if not late or self.n_in_flight >= self.max_in_flight:
                return
            # A seed that still gives what nobody has is everybody's bottleneck.
            gives = peer.is_seed and peer.gives_next and self.n_leechers and peer.nothing_new_at is None
            patience_s = NEXT_BY_NAME_S if gives and not self._is_silent(peer, now) else 0.0
            index = self._instead_of_late(peer, late, patience_s, now)
            if index is not None:
                self._take(peer, [index], now)
                asks.append(Ask(peer.key, index))

    def _instead_of_late(self, peer: PeerState, late: dict[int, float], patience_s: float, now: float) -> int | None:
        """The latest chunk that a peer has, or what stands in for one; it is taken out of `late`."""
        for index in sorted(late, key=late.__getitem__, reverse=True):
            if late[index] < patience_s:
                return None
            if self.stand_in is not None and (other := self.stand_in(index, peer.have)) is not None:
                self._stood_in[index] = now + STAND_IN_S
                del late[index]
                return other
            if peer.have >> index & 1:
                del late[index]
                return index
        return None

    def _cut_rests(self, now: float) -> None:
        """Nobody can be asked: who rests because others were there rests no longer than if there had been none."""
        for peer in self._list_usable():
            if peer.rest_until > now + ALONE_MAX_S:
                peer.rest_until = now + ALONE_MAX_S * (0.5 + 0.5 * self._rng.random())
