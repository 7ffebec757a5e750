"""What searches remember: who is where in the key space, who had what, and searches that run already.

Pure but for `SingleFlight`; times are the caller's clock in seconds. Nothing here makes a search report less than it
could find: an entry only says that asking a few of the nearest nodes is enough for now, or that a peer was there a
moment ago.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fastcas.dht.budgets import (
    CACHED_KEYS_MAX,
    CACHED_REGIONS_MAX,
    MISS_FIRST_S,
    MISS_LAST_S,
    PROVIDERS_FEW_S,
    PROVIDERS_S,
    REGION_S,
)
from fastcas.dht.contacts import Contact
from fastcas.dht.peerlist import Peer

__all__ = ["Known", "ProviderCache", "RegionMap", "SingleFlight"]

News = TypeVar("News")


@dataclass(frozen=True, slots=True)
class _Range:
    last: int
    until: float
    n_contacts: int
    nodes: list[Contact]


class RegionMap:
    """Ranges of 64-bit keys and the live nodes in and around them; ranges do not overlap.

    A range counts for 10 minutes, and until the network has visibly doubled: newcomers take over keys.

    Args:
        clock: Monotonic time, seconds.
        n_contacts: Size of the routing table.
    """

    def __init__(self, clock: Callable[[], float], n_contacts: Callable[[], int]) -> None:
        """Start empty."""
        self._clock = clock
        self._n_contacts = n_contacts
        self._firsts: list[int] = []
        self._regions: list[_Range] = []

    def __len__(self) -> int:
        """Return the number of ranges, expired ones included until they are met."""
        return len(self._firsts)

    def put(self, first: int, last: int, nodes: list[Contact]) -> None:
        """Remember that `nodes` are the nearest to the keys first..last; what overlaps is forgotten.

        Cost: a move of the tail of a list of at most 20,000.
        """
        low = bisect_right(self._firsts, first) - 1
        if low < 0 or self._regions[low].last < first:
            low += 1
        high = bisect_right(self._firsts, last)
        self._firsts[low:high] = [first]
        self._regions[low:high] = [_Range(last, self._clock() + REGION_S, self._n_contacts(), nodes)]
        if len(self._firsts) > CACHED_REGIONS_MAX:
            oldest = min(range(len(self._regions)), key=lambda place: self._regions[place].until)
            self._delete(oldest)

    def get(self, key: int) -> tuple[int, list[Contact]] | None:
        """Return the last key of the range around `key` and the nodes there, or None. Cost: O(log n)."""
        place = self._place(key)
        if place is None:
            return None
        known = self._regions[place]
        if known.until <= self._clock() or self._n_contacts() >= 2 * known.n_contacts + 1:
            self._delete(place)
            return None
        return known.last, known.nodes

    def drop(self, key: int) -> None:
        """Forget the range around a key: too many of its nodes are gone."""
        place = self._place(key)
        if place is not None:
            self._delete(place)

    def _place(self, key: int) -> int | None:
        place = bisect_right(self._firsts, key) - 1
        return place if place >= 0 and key <= self._regions[place].last else None

    def _delete(self, place: int) -> None:
        del self._firsts[place]
        del self._regions[place]


@dataclass(frozen=True, slots=True)
class Known:
    """What an earlier search found.

    Attributes:
        peers: Who had it; nobody after a search that found nobody.
        is_fresh: Found within the last minute.
    """

    peers: tuple[Peer, ...]
    is_fresh: bool


@dataclass(slots=True)
class _Entry:
    peers: tuple[Peer, ...]
    since: float
    until: float
    pause_s: float = 0.0


class ProviderCache:
    """Per key the peers that a complete search found, or that it found nobody. At most 200,000 keys."""

    def __init__(self, clock: Callable[[], float], *, limit: int = CACHED_KEYS_MAX) -> None:
        """Start empty."""
        self._clock = clock
        self._limit = limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys, expired ones included."""
        return len(self._entries)

    def note(self, key: Hashable, peers: Collection[Peer]) -> None:
        """Remember the result of a complete search.

        It counts for 10 minutes. That nobody was found counts for 30 s, twice as long after each further miss, at
        most 5 minutes.
        """
        now = self._clock()
        before = self._entries.pop(key, None)
        if peers:
            entry = _Entry(tuple(peers), now, now + PROVIDERS_S)
        else:
            repeated = before is not None and not before.peers
            pause_s = min(2.0 * before.pause_s, MISS_LAST_S) if before is not None and repeated else MISS_FIRST_S
            entry = _Entry((), now, now + pause_s, pause_s)
        self._entries[key] = entry
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def get(self, key: Hashable) -> Known | None:
        """Return what still counts of an earlier search, None if there is nothing."""
        entry = self._entries.get(key)
        now = self._clock()
        if entry is None or entry.until <= now:
            return None
        return Known(entry.peers, now - entry.since < PROVIDERS_FEW_S)

    def forget(self, key: Hashable) -> None:
        """Search anew next time."""
        self._entries.pop(key, None)


@dataclass(slots=True)
class _Flight(Generic[News]):
    task: asyncio.Task[None]
    news: list[News] = field(default_factory=list)
    listeners: list[Callable[[News], None]] = field(default_factory=list)


class SingleFlight(Generic[News]):
    """Searches that run: who asks for the same at the same time hears the same one. Belongs to one event loop."""

    def __init__(self) -> None:
        """Start with none."""
        self._flights: dict[Hashable, _Flight[News]] = {}

    def __len__(self) -> int:
        """Return the number of searches that run."""
        return len(self._flights)

    async def share(
        self,
        key: Hashable,
        search: Callable[[Callable[[News], None]], Awaitable[None]],
        on_news: Callable[[News], None],
        deadline_s: float,
    ) -> bool:
        """Begin a search, or join the one that runs under `key`, for at most `deadline_s`; whether it ended.

        Who joins gets the earlier news first. A search is cancelled when nobody listens any more.

        Raises:
            Exception: What the search raised.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._begin(key, search)
        for news in list(flight.news):
            on_news(news)
        flight.listeners.append(on_news)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(flight.task)
        except TimeoutError:
            return False
        finally:
            flight.listeners.remove(on_news)
            if not flight.listeners and not flight.task.done():
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()
        return True

    def _begin(self, key: Hashable, search: Callable[[Callable[[News], None]], Awaitable[None]]) -> _Flight[News]:
        async def fly() -> None:
            try:
                await search(tell)
            finally:
                if self._flights.get(key) is flight:
                    del self._flights[key]

        def tell(news: News) -> None:
            flight.news.append(news)
            for listener in list(flight.listeners):
                listener(news)

        flight: _Flight[News] = _Flight(asyncio.get_running_loop().create_task(fly()))
        self._flights[key] = flight
        return flight
