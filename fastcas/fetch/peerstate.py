"""What the scheduler knows of one peer: what it has and was asked for, how fast it is, what of it is late."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field

from fastcas.fetch.chunksets import lowest

__all__ = ["HEDGE_MIN_S", "RATE_WINDOW_S", "PeerState", "late_chunks", "oldest_request"]

HEDGE_FACTOR = 3.0
HEDGE_MIN_S = 0.5  # below, jitter of a healthy peer would look late
TURNAROUND_S = 0.016  # our own part of a round trip: waiting to be checked with others, the write, the decision
RATE_WINDOW_S = 0.1
FIRST_WINDOW_S = 0.0125  # of an unknown peer; each window is twice as long as the one before, up to RATE_WINDOW_S
FIRST_WINDOW_CHUNKS = 8  # fewer say too little: such a window goes on, up to RATE_WINDOW_S
WINDOW_MAX = 512


@dataclass(slots=True)
class PeerState:
    """What the scheduler knows of one peer."""

    key: Hashable
    have: int = 0
    is_seed: bool = False
    is_leecher: bool = False
    in_flight: dict[int, float] = field(default_factory=dict)
    rate_Bps: float = 0.0
    rtt_s: float = 0.0
    rest_until: float = 0.0
    n_failures: int = 0
    banned: str | None = None
    cursor: int = 0
    gives_next: bool = True
    n_next: int = 0
    n_chosen: int = 0
    n_stale: int = 0
    nothing_new_at: float | None = None  # the first 204 since it last chose a chunk
    next_refused_at: float = -math.inf  # the last one
    next_since: float = 0.0
    window_started: float = 0.0
    window_bytes: int = 0
    window_s: float = FIRST_WINDOW_S
    delivered_at: float = -math.inf
    depth: int = 0  # requests in flight that its rate and round trip ask for

    def follow(self, candidates: int, n: int) -> list[int]:
        """Return the next of some chunks (not none) at or after where this peer's run goes on, else from the first one
        on: one at least, `n` at most."""
        at = self.cursor
        ahead = candidates >> at
        if not ahead:
            at, ahead = 0, candidates
        out: list[int] = []
        while ahead and len(out) < n:
            skip = lowest(ahead)
            out.append(at + skip)
            at += skip + 1
            ahead >>= skip + 1
        self.cursor = at
        return out

    def measure(self, size: int, now: float, connect_s: float, chunk_size: int) -> None:  # hot
        """It delivered `size` bytes over a connection that took `connect_s` to open (0: not known): its rate and round
        trip, and how many requests in flight they ask for."""
        self.window_bytes += size
        self.delivered_at = now
        elapsed = now - self.window_started
        is_nearer = connect_s > 0 and (connect_s < self.rtt_s or not self.rtt_s)
        if is_nearer:
            self.rtt_s = connect_s
        if elapsed >= self.window_s and (
            elapsed >= RATE_WINDOW_S or self.window_bytes >= FIRST_WINDOW_CHUNKS * chunk_size
        ):
            self.window_s = min(RATE_WINDOW_S, 2 * self.window_s)
            sample = self.window_bytes / elapsed
            self.rate_Bps = max(sample, 0.5 * (self.rate_Bps + sample))  # rises at once, falls slowly
            self.window_started, self.window_bytes = now, 0
        elif not is_nearer:
            return
        depth = math.ceil(self.rate_Bps * (self.rtt_s + TURNAROUND_S) * 2 / chunk_size)
        self.depth = min(WINDOW_MAX, depth)


def oldest_request(peers: Collection[PeerState], now: float) -> float:
    """Return when the oldest request in flight was made; without any, now. Cost: one look at each peer."""
    return min((next(iter(peer.in_flight.values())) for peer in peers if peer.in_flight), default=now)


def late_chunks(
    peers: Collection[PeerState], wanted: int, chunk_size: int, stood_in: Mapping[int, float], now: float
) -> dict[int, float]:
    """Return the chunks whose every request is later than three times its expectation: by how much the latest one is.

    Args:
        peers: All of them.
        wanted: Chunk set: others are never late.
        chunk_size: Bytes.
        stood_in: Chunk: until when something that stands in for it is waited for.
        now: Seconds.
    """
    late: dict[int, float] = {}
    in_time: set[int] = set()
    typical = _typical_rate(peers)
    for peer in peers:
        if not peer.in_flight:
            continue
        rate = peer.rate_Bps or typical
        expected = peer.rtt_s + len(peer.in_flight) * chunk_size / rate if rate else HEDGE_MIN_S
        limit = max(HEDGE_MIN_S, HEDGE_FACTOR * expected)
        for index, since in peer.in_flight.items():
            by = now - since - limit
            if by < 0 or not wanted >> index & 1 or stood_in.get(index, now) > now:
                in_time.add(index)
            else:
                late[index] = max(by, late.get(index, 0.0))
    for index in in_time:
        late.pop(index, None)
    return late


def _typical_rate(peers: Collection[PeerState]) -> float:
    rates = sorted(peer.rate_Bps for peer in peers if peer.rate_Bps)
    return rates[len(rates) // 2] if rates else 0.0
