"""Who holds records of ours, who asked us to wait, and how fast we may send: what one sweep leaves to the next.

Pure but for the pause of `Pacer`; all times are the caller's clock in seconds (monotonic).
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from fastcas.dht.budgets import BACKOFF_MAX_S, BACKOFF_MIN_S, HOLDERS_MAX, PACE_BURST_S
from fastcas.dht.contacts import Address, Contact

__all__ = ["HolderBook", "Pacer"]


class Pacer:
    """Spaces datagrams out: `rate` per second, short bursts allowed."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        """Allow `rate` datagrams per second."""
        self._rate = rate
        self._clock = clock
        self._free_at = clock()

    async def take(self, count: int = 1) -> None:
        """Wait until `count` more datagrams may be sent."""
        now = self._clock()
        self._free_at = max(self._free_at, now - PACE_BURST_S) + count / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class HolderBook:
    """The nodes that hold records of one kind, until these expire, and those that have no room at the moment."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Know nobody yet."""
        self._clock = clock
        self._until: dict[Contact, float] = {}
        self._waiting: dict[Address, tuple[float, float]] = {}

    def stored(self, holder: Contact, ttl_s: float, retry_after_s: int) -> None:
        """Note that a holder took records for `ttl_s`; it may ask to be left alone for a while all the same."""
        self._until[holder] = self._clock() + ttl_s
        if len(self._until) > HOLDERS_MAX:
            self._forget_expired()
            while len(self._until) > HOLDERS_MAX:
                del self._until[next(iter(self._until))]
        if retry_after_s > 0:
            self.refused(holder, retry_after_s)
        else:
            self._waiting.pop(holder.address, None)

    def refused(self, holder: Contact, retry_after_s: int) -> None:
        """Note that a holder has no room: it is not asked again for so long, twice as long each further time."""
        last_s = self._waiting.get(holder.address, (0.0, 0.0))[1]
        pause_s = min(max(float(retry_after_s), 2.0 * last_s, BACKOFF_MIN_S), BACKOFF_MAX_S)
        self._waiting[holder.address] = (self._clock() + pause_s, pause_s)
        if len(self._waiting) > HOLDERS_MAX:
            del self._waiting[next(iter(self._waiting))]

    def is_waiting(self, holder: Contact) -> bool:
        """Whether a holder asked us to wait and that time is not over."""
        entry = self._waiting.get(holder.address)
        return entry is not None and self._clock() < entry[0]

    def current(self, limit: int) -> list[Contact]:
        """Return up to `limit` nodes that hold unexpired records, those that hold them longest first."""
        self._forget_expired()
        return heapq.nlargest(limit, self._until, key=self._until.__getitem__)

    def clear(self) -> None:
        """Forget who holds what; who asked to wait is remembered."""
        self._until.clear()

    def _forget_expired(self) -> None:
        now = self._clock()
        for holder in [holder for holder, until in self._until.items() if until <= now]:
            del self._until[holder]
