"""The peer book: what this process has learned about peers by itself. Pure: no sockets, an injected clock.

Owns, per data address: node id, where the address came from, measured rate, failures in a row with the time
before which it is not asked again, and a ban with its reason and expiry. Bounded: the entry that was touched
longest ago goes first, banned ones last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastcas.ids import PeerAddr
from fastcas.limits import BAN_S
from fastcas.peers.discovery import PeerHint

__all__ = ["MAX_PEERS", "PARK_AFTER", "PARK_S", "PeerBook", "PeerEntry"]

MAX_PEERS = 10_000
BACKOFF_FIRST_S = 0.5  # after the first failure in a row, doubled by each further one
BACKOFF_LAST_S = 30.0
PARK_AFTER = 3  # failures in a row after which a peer is left alone for PARK_S
PARK_S = 60.0
RATE_WEIGHT = 0.3  # of the newest sample in the moving average


@dataclass(slots=True)
class PeerEntry:
    """One peer. Times are the book's clock, seconds.

    Attributes:
        rate_Bps: Moving average of what it delivered, 0.0 before the first delivery.
        failures: Network failures since the last success.
        retry_at: Not to be asked before.
    """

    addr: PeerAddr
    node_id: str | None = None
    source: str = "static"
    rate_Bps: float = 0.0
    n_bytes: int = 0
    failures: int = 0
    retry_at: float = 0.0
    banned_until: float = 0.0
    ban_reason: str = ""


class PeerBook:
    """Addresses, rates, failures and bans of peers; every operation is O(1) but for `rank`."""

    def __init__(self, clock: Callable[[], float], *, max_peers: int = MAX_PEERS) -> None:
        """Start empty. `clock` gives seconds, monotonic."""
        self._clock = clock
        self._max = max_peers
        self._entries: OrderedDict[PeerAddr, PeerEntry] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of peers in the book."""
        return len(self._entries)

    def get(self, addr: PeerAddr) -> PeerEntry | None:
        """Return what is known about an address."""
        return self._entries.get(addr)

    def add(self, hint: PeerHint) -> PeerEntry:
        """Remember a hint; what was measured before stays."""
        entry = self._touch(hint.addr)
        if hint.node_id is not None:
            entry.node_id = hint.node_id
        entry.source = hint.source
        return entry

    def note_success(self, addr: PeerAddr, n_bytes: int, seconds: float) -> None:
        """Record a delivery of `n_bytes` verified bytes in `seconds`."""
        entry = self._touch(addr)
        entry.failures = 0
        entry.retry_at = 0.0
        entry.n_bytes += n_bytes
        if seconds > 0 and n_bytes:
            sample = n_bytes / seconds
            entry.rate_Bps = sample if not entry.rate_Bps else entry.rate_Bps + RATE_WEIGHT * (sample - entry.rate_Bps)

    def note_failure(self, addr: PeerAddr) -> float:
        """Record a network failure; return the seconds for which the peer is left alone."""
        entry = self._touch(addr)
        entry.failures += 1
        pause_s = min(BACKOFF_FIRST_S * 2.0 ** min(entry.failures - 1, 30), BACKOFF_LAST_S)
        if entry.failures >= PARK_AFTER:
            pause_s = PARK_S
        entry.retry_at = self._clock() + pause_s
        return pause_s

    def ban(self, addr: PeerAddr, reason: str, for_s: float = BAN_S) -> None:
        """Ban a peer that lied, with the reason that people are shown."""
        entry = self._touch(addr)
        entry.banned_until = self._clock() + for_s
        entry.ban_reason = reason

    def ban_reason(self, addr: PeerAddr) -> str | None:
        """Return why an address is banned, or None when it is not (any more)."""
        entry = self._entries.get(addr)
        if entry is None or entry.banned_until <= self._clock():
            return None
        return entry.ban_reason

    def banned(self) -> dict[PeerAddr, str]:
        """Return every banned address with its reason."""
        now = self._clock()
        return {e.addr: e.ban_reason for e in self._entries.values() if e.banned_until > now}

    def is_usable(self, addr: PeerAddr) -> bool:
        """Whether an address may be asked now: unknown, or neither banned nor paused."""
        entry = self._entries.get(addr)
        if entry is None:
            return True
        now = self._clock()
        return entry.banned_until <= now and entry.retry_at <= now

    def rank(self, addrs: Iterable[PeerAddr]) -> list[PeerAddr]:
        """Return the usable ones, fastest first, then those not measured yet in the given order. Cost: O(n log n)."""
        usable = [addr for addr in dict.fromkeys(addrs) if self.is_usable(addr)]
        return sorted(usable, key=self._preference)

    def with_capacity(self) -> list[PeerEntry]:
        """Return the peers that delivered and may be asked now, fastest first, then the untried ones."""
        usable = [e for e in self._entries.values() if self.is_usable(e.addr)]
        return sorted(usable, key=lambda e: self._preference(e.addr))

    def _preference(self, addr: PeerAddr) -> tuple[int, float]:
        entry = self._entries.get(addr)
        return (0, 0.0) if entry is None else (entry.failures, -entry.rate_Bps)

    def _touch(self, addr: PeerAddr) -> PeerEntry:
        entry = self._entries.get(addr)
        if entry is None:
            entry = self._entries[addr] = PeerEntry(addr)
            if len(self._entries) > self._max:
                self._evict(keep=addr)
        else:
            self._entries.move_to_end(addr)
        return entry

    def _evict(self, keep: PeerAddr) -> None:
        now = self._clock()
        victim = next((a for a, e in self._entries.items() if a != keep and e.banned_until <= now), None)
        if victim is None:
            victim = next(iter(self._entries))
        del self._entries[victim]
