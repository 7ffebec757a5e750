"""An iterative lookup with a sliding window: finds the live nodes nearest to a target, within budgets.

There is no round barrier: as soon as an answer comes or a request is slow, the next nearest unasked contact is
asked. One reply cannot end, stall or blow up a lookup: a bad one only costs its sender its place. Budgets: 120
requests, 10 s, a bounded shortlist, at most 2 contacts per subnet and one per address (shared networks exempt).
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from fastcas.dht.budgets import (
    ALPHA,
    CONTACTS_PER_REPLY,
    KSIZE,
    LOOKUP_RPCS_MAX,
    LOOKUP_S,
    PER_SUBNET_BUCKET,
    SHORTLIST_MAX,
)
from fastcas.dht.contacts import Address, Contact, is_shared, parse_contacts, subnet_of
from fastcas.dht.protocol import FcProtocol, Reply
from fastcas.dht.wire import OK, Field, check

__all__ = ["Lookup", "LookupResult"]

_NODES = (Field(bytes, 0, 1200), Field(bytes, 0, 1200))

Question = Callable[[Contact], tuple[str, list[Any]]]
OnReply = Callable[[Contact, list[Any]], tuple[bytes, bytes] | None]


class _State(Enum):
    NEW = auto()
    ASKED = auto()
    SLOW = auto()  # asked, no answer within its retransmission time
    LIVE = auto()
    DEAD = auto()


@dataclass(slots=True)
class _Entry:
    contact: Contact
    hops: int
    state: _State = _State.NEW


@dataclass(frozen=True, slots=True)
class LookupResult:
    """What a lookup found.

    Attributes:
        nodes: The nearest live nodes, nearest first.
        n_asked: Requests, retransmissions not counted.
        is_cut: Whether a budget ended it.
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
        self._entries: dict[bytes, _Entry] = {}
        self._order: list[tuple[int, bytes]] = []
        self._addresses: set[Address] = set()
        self._subnets: dict[bytes, int] = {}
        self._events: asyncio.Queue[None] = asyncio.Queue()
        self._n_asked = 0
        self._n_in_flight = 0
        self._n_slow = 0
        self._stop = False
        for contact in protocol.router.nearest(target, max(k, KSIZE)):
            self._add(contact, 0)
        for contact in seeds:
            self._add(contact, 0)

    def stop(self) -> None:
        """Ask nobody else; `run` returns what is known."""
        self._stop = True
        self._events.put_nowait(None)

    async def run(self, *, deadline_s: float = LOOKUP_S) -> LookupResult:
        """Return the `k` nearest live nodes that could be found within the budgets."""
        loop = asyncio.get_running_loop()
        end = loop.time() + min(deadline_s, LOOKUP_S)
        is_cut = False
        while not self._stop:
            self._ask_more()
            if self._is_complete():
                break
            if self._n_in_flight == 0:
                break
            try:
                async with asyncio.timeout_at(end):
                    await self._events.get()
            except TimeoutError:
                is_cut = True
                break
        self._stop = True
        self._protocol.counters["lookups"] += 1
        found = self._live()
        hops = max((entry.hops for entry in found), default=0)
        self._protocol.counters["lookup_hops"] += hops
        is_cut = is_cut or self._n_asked >= LOOKUP_RPCS_MAX
        return LookupResult([entry.contact for entry in found], self._n_asked, is_cut, hops)

    def _live(self) -> list[_Entry]:
        found = []
        for _, node_id in self._order:
            entry = self._entries[node_id]
            if entry.state is _State.LIVE:
                found.append(entry)
                if len(found) == self._k:
                    break
        return found

    def _is_complete(self) -> bool:
        """Whether the `k` nearest contacts that are not dead have all answered."""
        live = 0
        for _, node_id in self._order:
            state = self._entries[node_id].state
            if state is _State.LIVE:
                live += 1
                if live == self._k:
                    return True
            elif state is not _State.DEAD:
                return False
        return True

    def _ask_more(self) -> None:
        near = 0
        for _, node_id in list(self._order):
            if self._n_in_flight - self._n_slow >= ALPHA or self._n_asked >= LOOKUP_RPCS_MAX:
                return
            entry = self._entries[node_id]
            if entry.state is _State.NEW:
                self._ask(entry)
            if entry.state is not _State.DEAD and entry.state is not _State.SLOW:
                near += 1
                if near >= self._k:
                    return

    def _ask(self, entry: _Entry) -> None:
        entry.state = _State.ASKED
        self._n_asked += 1
        self._n_in_flight += 1
        slow = False

        def on_slow() -> None:
            nonlocal slow
            slow = True
            self._n_slow += 1
            if entry.state is _State.ASKED:
                entry.state = _State.SLOW
            self._events.put_nowait(None)

        def answered(future: asyncio.Future[Reply | None]) -> None:
            self._n_in_flight -= 1
            if slow:
                self._n_slow -= 1
            self._take(entry, None if future.cancelled() else future.result())
            self._events.put_nowait(None)

        name, args = self._question(entry.contact)
        self._protocol.ask(entry.contact, name, args, on_slow=on_slow).add_done_callback(answered)

    def _take(self, entry: _Entry, reply: Reply | None) -> None:
        nodes = None if reply is None or reply.status != OK else self._on_reply(entry.contact, reply.elements)
        if nodes is None:
            entry.state = _State.DEAD
            return
        entry.state = _State.LIVE
        ip = entry.contact.ip
        own_id = self._protocol.identity.node_id
        for contact in parse_contacts(*nodes, giver_ip=ip, own_id=own_id, limit=CONTACTS_PER_REPLY):
            self._add(contact, entry.hops + 1)

    def _add(self, contact: Contact, hops: int) -> None:
        if self._protocol.is_own(contact) or contact.id in self._entries or contact.address in self._addresses:
            return
        distance = contact.long_id ^ self._target
        if len(self._order) >= SHORTLIST_MAX and distance > self._order[-1][0]:
            return
        if not is_shared(contact.ip):
            subnet = subnet_of(contact.ip)
            if self._subnets.get(subnet, 0) >= PER_SUBNET_BUCKET:
                return
            self._subnets[subnet] = self._subnets.get(subnet, 0) + 1
        self._addresses.add(contact.address)
        self._entries[contact.id] = _Entry(contact, hops)
        insort(self._order, (distance, contact.id))
        if len(self._order) > SHORTLIST_MAX:
            del self._order[-1]

    def _find_nodes(self, contact: Contact) -> tuple[str, list[Any]]:
        return "fn", [self._target.to_bytes(20), CONTACTS_PER_REPLY]


def _nodes_of(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
    return (elements[0], elements[1]) if check(elements, _NODES) else None
