"""An iterative lookup with a sliding window: finds the live nodes nearest to a target, within budgets.

There is no round barrier: as soon as an answer comes or a request is slow, the next nearest unasked contact is
asked. One reply cannot end, stall or blow up a lookup: a bad one only costs its sender its place. After silence the
window is wider and more contacts are asked for per reply. Budgets: 120 requests, 10 s, a bounded shortlist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastcas.dht.budgets import (
    ALPHA,
    ALPHA_MAX,
    CONTACTS_PER_REPLY,
    CONTACTS_PER_REPLY_MAX,
    KSIZE,
    LOOKUP_RPCS_MAX,
    LOOKUP_S,
)
from fastcas.dht.contacts import Contact, is_shared, parse_contacts, subnet_of
from fastcas.dht.network_size import crowds
from fastcas.dht.protocol import FcProtocol, Reply
from fastcas.dht.shortlist import Entry, Shortlist, State
from fastcas.dht.wire import OK, Field, check

__all__ = ["Lookup", "LookupResult"]

_NODES = (Field(bytes, 0, 1200), Field(bytes, 0, 1200))

Question = Callable[[Contact], tuple[str, list[Any]]]
OnReply = Callable[[Contact, list[Any]], tuple[bytes, bytes] | None]


@dataclass(frozen=True, slots=True)
class LookupResult:
    """What a lookup found.

    Attributes:
        nodes: The nearest live nodes, nearest first.
        n_asked: Requests, retransmissions not counted.
        is_cut: Whether a budget or `stop` ended it.
        hops: Replies in the longest chain that led to one of `nodes`; 0 where all were known before.
    """

    nodes: list[Contact]
    n_asked: int
    is_cut: bool
    hops: int


class Lookup:
    """One lookup. Without a question it asks `fn`.

    Args:
        protocol: Sends for us.
        target: The 160-bit number to approach.
        k: How many live nodes to find.
        radius: Find also everybody up to this distance from the target, within the budgets.
        question: Returns (name, args) for a contact.
        on_reply: Gets the elements of each good reply; returns its (nodes4, nodes6), or None if it is malformed.
        seeds: Contacts known besides the routing table's.
    """

    def __init__(
        self,
        protocol: FcProtocol,
        target: int,
        *,
        k: int = KSIZE,
        radius: int = 0,
        question: Question | None = None,
        on_reply: OnReply | None = None,
        seeds: Iterable[Contact] = (),
    ) -> None:
        """Fill the shortlist from the table and the seeds."""
        self._protocol = protocol
        self._target = target
        self._k = k
        self._question = question if question is not None else self._find_nodes
        self._on_reply = on_reply if on_reply is not None else _nodes_of
        self._list = Shortlist(target, k, radius, crowds(protocol.estimated_nodes()))
        self._events: asyncio.Queue[None] = asyncio.Queue()
        self._n_asked = 0
        self._n_in_flight = 0
        self._n_slow = 0
        self._n_silent = 0
        self._stop = False
        nearest = protocol.router.nearest(target, 2 * max(k, KSIZE))
        for contact in (*nearest, *seeds, *protocol.router.candidates_near(target)):
            if not protocol.is_own(contact):
                self._list.add(contact)
        self._list.begin_with(self._starts(nearest))

    def _starts(self, nearest: list[Contact]) -> Iterable[Contact]:
        """Return the nearest contact and others of different buckets and subnets: one liar is not all we hear."""
        buckets: set[tuple[int, int]] = set()
        subnets: set[bytes] = set()
        for contact in nearest:
            bucket, subnet = self._protocol.router.bucket_of(contact.id).range, subnet_of(contact.ip)
            if bucket not in buckets and (subnet not in subnets or is_shared(contact.ip)):
                buckets.add(bucket)
                subnets.add(subnet)
                yield contact

    @property
    def is_crowded(self) -> bool:
        """Whether so many contacts are said to be near the target that somebody must have planted some."""
        return self._list.is_crowded()

    def stop(self) -> None:
        """Ask nobody else; `run` returns what is known."""
        self._stop = True
        self._events.put_nowait(None)

    async def run(self, *, deadline_s: float = LOOKUP_S) -> LookupResult:
        """Return the `k` nearest live nodes, and those within the radius, that could be found within the budgets."""
        loop = asyncio.get_running_loop()
        end = loop.time() + min(deadline_s, LOOKUP_S)
        is_cut = False
        while not self._stop:
            self._ask_more()
            if self._list.is_complete() or self._n_in_flight == 0:
                break
            try:
                async with asyncio.timeout_at(end):
                    await self._events.get()
            except TimeoutError:
                is_cut = True
                break
        is_cut = is_cut or self._stop or self._n_asked >= LOOKUP_RPCS_MAX
        self._stop = True
        found = self._list.live()
        hops = max((entry.hops for entry in found), default=0)
        self._protocol.counters["lookups"] += 1
        self._protocol.counters["lookup_hops"] += hops
        if not is_cut and self._k >= KSIZE:
            nearest = found[: self._k]
            distances = [entry.distance for entry in nearest]
            self._protocol.size.note(self._target, distances, is_all=len(nearest) < self._k)
        return LookupResult([entry.contact for entry in found], self._n_asked, is_cut, hops)

    def _ask_more(self) -> None:
        window = min(ALPHA + self._n_silent // 2, ALPHA_MAX)
        while self._n_in_flight - self._n_slow < window and self._n_asked < LOOKUP_RPCS_MAX:
            entry = self._list.next_to_ask()
            if entry is None:
                return
            self._ask(entry)

    def _ask(self, entry: Entry) -> None:
        """Send the question; to one of too many contacts near the target a challenge first: ids can be made up."""
        entry.state = State.ASKED
        self._n_asked += 1
        self._n_in_flight += 1
        contact = entry.contact
        slow = False

        def on_slow() -> None:
            nonlocal slow
            slow = True
            self._n_slow += 1
            self._n_silent += 1
            if entry.state is State.ASKED:
                entry.state = State.SLOW
            self._events.put_nowait(None)

        def ended() -> None:
            self._n_in_flight -= 1
            if slow:
                self._n_slow -= 1
            self._events.put_nowait(None)

        def proved(future: asyncio.Future[Contact | None]) -> None:
            if future.cancelled() or future.result() is None:
                entry.settle(State.DEAD)
            else:
                entry.state = State.NEW
            ended()

        def answered(future: asyncio.Future[Reply | None]) -> None:
            self._take(entry, None if future.cancelled() else future.result())
            ended()

        if self._list.is_suspicious(entry) and self._protocol.who_signed_at(contact.address) != contact.id:
            self._protocol.prove(contact, on_slow).add_done_callback(proved)
            return
        name, args = self._question(contact)
        self._protocol.ask(contact, name, args, on_slow=on_slow).add_done_callback(answered)

    def _take(self, entry: Entry, reply: Reply | None) -> None:
        nodes = None if reply is None or reply.status != OK else self._on_reply(entry.contact, reply.elements)
        if nodes is None:
            entry.settle(State.DEAD)
            return
        entry.settle(State.LIVE)
        ip = entry.contact.ip
        own_id = self._protocol.identity.node_id
        for contact in parse_contacts(*nodes, giver_ip=ip, own_id=own_id, limit=CONTACTS_PER_REPLY_MAX):
            if not self._protocol.is_own(contact):
                self._list.add(contact, entry)

    def _find_nodes(self, contact: Contact) -> tuple[str, list[Any]]:
        count = CONTACTS_PER_REPLY_MAX if self._n_silent else CONTACTS_PER_REPLY
        return "fn", [self._target.to_bytes(20), count]


def _nodes_of(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
    return (elements[0], elements[1]) if check(elements, _NODES) else None
