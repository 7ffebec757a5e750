"""A lookup's shortlist: who is known, who was asked, who told us, and whom to ask next. Pure: no network, no clock.

Contacts count in order of distance. Three rules bound what others can do to it: at most 2 contacts per subnet and one
per address (shared networks exempt); who named many contacts of which hardly any lives is not believed any more, so
that what only such nodes named neither is asked nor waited for; and the first to be asked come from different buckets.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from fastcas.dht.budgets import ALPHA, LIES_MAX, PER_SUBNET_BUCKET, SHORTLIST_MAX
from fastcas.dht.contacts import Address, Contact, is_shared, subnet_of

__all__ = ["Entry", "Shortlist", "State"]

GIVERS_MAX = 4


class State(Enum):
    """What is known of a contact."""

    NEW = auto()
    ASKED = auto()
    SLOW = auto()  # asked, no answer within its retransmission time
    LIVE = auto()
    DEAD = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """One contact of a lookup.

    Attributes:
        distance: XOR distance to the target.
        hops: Replies in the chain that led to it; 0 for what the lookup began with.
        givers: Who named it, at most four; nobody for what the lookup began with.
        n_named_live, n_named_dead: Of the contacts that it named, how many answered and how many did not.
    """

    contact: Contact
    distance: int
    hops: int
    state: State = State.NEW
    givers: list[Entry] = field(default_factory=list)
    n_named_live: int = 0
    n_named_dead: int = 0

    @property
    def is_liar(self) -> bool:
        """Whether what it names is not worth asking."""
        return self.n_named_dead >= LIES_MAX + 3 * self.n_named_live

    @property
    def is_doubtful(self) -> bool:
        """Whether only liars named it."""
        return bool(self.givers) and all(giver.is_liar for giver in self.givers)

    def settle(self, state: State) -> None:
        """Record how asking it ended; those who named it get the credit or the blame."""
        self.state = state
        for giver in self.givers:
            self._rate(giver)

    def name_again(self, giver: Entry) -> None:
        """Record that another node named it."""
        if self.givers and len(self.givers) < GIVERS_MAX:
            self.givers.append(giver)
            self._rate(giver)

    def _rate(self, giver: Entry) -> None:
        if self.state is State.LIVE:
            giver.n_named_live += 1
        elif self.state is State.DEAD:
            giver.n_named_dead += 1


class Shortlist:
    """The contacts of one lookup, nearest first.

    Args:
        target: The 160-bit number to approach.
        k: How many live ones are wanted.
        radius: Besides these, everybody known up to this distance.
        crowds: (count, distance): so many contacts nearer than that are too many to be true.
    """

    def __init__(self, target: int, k: int, radius: int = 0, crowds: Sequence[tuple[int, int]] = ()) -> None:
        """Start empty."""
        self._crowds = crowds
        self._target = target
        self._k = k
        self._radius = radius
        self._entries: dict[bytes, Entry] = {}
        self._order: list[tuple[int, bytes]] = []
        self._addresses: set[Address] = set()
        self._subnets: dict[bytes, int] = {}
        self._starts: list[Entry] = []

    def add(self, contact: Contact, giver: Entry | None = None) -> None:
        """Take a contact that `giver` named, unless a rule forbids it. Cost: O(log n) and a move of the tail."""
        known = self._entries.get(contact.id)
        if known is not None:
            if giver is not None and known.contact == contact:
                known.name_again(giver)
            return
        distance = contact.long_id ^ self._target
        if len(self._order) >= SHORTLIST_MAX and distance > self._order[-1][0]:
            return
        if contact.address in self._addresses:
            return
        if not is_shared(contact.ip):
            subnet = subnet_of(contact.ip)
            if self._subnets.get(subnet, 0) >= PER_SUBNET_BUCKET:
                return
            self._subnets[subnet] = self._subnets.get(subnet, 0) + 1
        self._addresses.add(contact.address)
        entry = Entry(contact, distance, giver.hops + 1 if giver is not None else 0)
        if giver is not None:
            entry.givers.append(giver)
        self._entries[contact.id] = entry
        insort(self._order, (distance, contact.id))
        if len(self._order) > SHORTLIST_MAX:
            del self._order[-1]

    def begin_with(self, starts: Iterable[Contact]) -> None:
        """Ask these first, whatever their distance, and wait for them; those that are on the list."""
        self._starts = [self._entries[c.id] for c in starts if c.id in self._entries][:ALPHA]

    def next_to_ask(self) -> Entry | None:
        """Return the next contact worth asking now, or None."""
        for entry in self._starts:
            if entry.state is State.NEW:
                return entry
        near = 0
        for distance, node_id in self._order:
            if near >= self._k and distance > self._radius:
                return None
            entry = self._entries[node_id]
            if entry.state is State.DEAD or entry.state is State.SLOW or entry.is_doubtful:
                continue
            if entry.state is State.NEW:
                return entry
            near += 1
        return None

    def is_suspicious(self, entry: Entry) -> bool:
        """Whether an entry is one of too many near the target. Cost: O(crowd and what is dead in it)."""
        return any(entry.distance < limit and self._has_within(count, limit) for count, limit in self._crowds)

    def is_crowded(self) -> bool:
        """Whether there are too many contacts near the target to be true; the made up ones among them not yet dead."""
        return any(self._has_within(count, limit) for count, limit in self._crowds)

    def _has_within(self, count: int, distance: int) -> bool:
        for other_distance, node_id in self._order:
            if other_distance >= distance:
                return False
            other = self._entries[node_id]
            if other.state is not State.DEAD and not other.is_doubtful:
                count -= 1
                if not count:
                    return True
        return False

    def is_complete(self) -> bool:
        """Whether the `k` nearest that may live, and all within the radius, have answered."""
        if any(entry.state is State.NEW or entry.state is State.ASKED for entry in self._starts):
            return False
        live = 0
        for distance, node_id in self._order:
            if live >= self._k and distance > self._radius:
                return True
            entry = self._entries[node_id]
            if entry.state is State.LIVE:
                live += 1
            elif entry.state is not State.DEAD and not entry.is_doubtful:
                return False
        return True

    def live(self) -> list[Entry]:
        """Return the `k` nearest that answered and all others within the radius, nearest first."""
        found: list[Entry] = []
        for distance, node_id in self._order:
            if len(found) >= self._k and distance > self._radius:
                break
            if self._entries[node_id].state is State.LIVE:
                found.append(self._entries[node_id])
        return found
