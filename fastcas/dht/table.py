"""The routing table: `kademlia`'s buckets, with verified contacts only and exact answers.

What differs from the package: only contacts that signed a challenge enter (`add_verified`), others wait in the
bucket's replacement cache; at most 2 contacts per subnet in a bucket and 10 in the table (local and private
addresses exempt); a contact that answers moves to the end of its bucket; one lost packet removes nobody; bucket
edges are consistent; the neighbours of a target are the exact nearest ones; the number of buckets is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from kademlia.routing import KBucket, RoutingTable

from fastcas.dht.budgets import BUCKETS_MAX, FAILURES_MAX, KSIZE, PER_SUBNET_BUCKET, PER_SUBNET_TABLE
from fastcas.dht.contacts import Address, Contact, is_shared, subnet_of

__all__ = ["FcBucket", "FcTable"]

LAST_ID = (1 << 160) - 1


class FcBucket(KBucket):  # type: ignore[misc]
    """One bucket: verified contacts in order of their last answer, and candidates that are not verified."""

    range: tuple[int, int]
    nodes: dict[bytes, Contact]
    replacement_nodes: dict[bytes, Contact]
    ksize: int
    max_replacement_nodes: int
    last_updated: float

    def split(self) -> tuple[FcBucket, FcBucket]:
        """Return the two halves; every contact keeps its standing and its place in the order."""
        low, high = self.range
        middle = (low + high) // 2
        halves = FcBucket(low, middle, self.ksize), FcBucket(middle + 1, high, self.ksize)
        for half in halves:
            half.last_updated = self.last_updated
        for source, name in ((self.nodes, "nodes"), (self.replacement_nodes, "replacement_nodes")):
            for node_id, contact in source.items():
                half = halves[0] if contact.long_id <= middle else halves[1]
                getattr(half, name)[node_id] = contact
        return halves

    def remember(self, contact: Contact) -> None:
        """Keep an unverified contact as a candidate; the oldest candidate goes when there are too many."""
        self.replacement_nodes.pop(contact.id, None)
        self.replacement_nodes[contact.id] = contact
        while len(self.replacement_nodes) > self.max_replacement_nodes:
            del self.replacement_nodes[next(iter(self.replacement_nodes))]

    def allows(self, contact: Contact) -> bool:
        """Whether the subnet rule of this bucket admits a contact."""
        if is_shared(contact.ip):
            return True
        subnet = subnet_of(contact.ip)
        same = sum(1 for other in self.nodes.values() if other.id != contact.id and subnet_of(other.ip) == subnet)
        return same < PER_SUBNET_BUCKET


class FcTable(RoutingTable):  # type: ignore[misc]
    """The routing table of one node. `on_change` is called after a contact came or went.

    Attributes:
        version: Differs whenever the contacts differ.
    """

    buckets: list[FcBucket]
    node: Contact
    ksize: int

    def __init__(
        self, protocol: object, node: Contact, *, ksize: int = KSIZE, on_change: Callable[[], None] | None = None
    ) -> None:
        """Start empty around `node`."""
        self._subnets: dict[bytes, int] = {}
        self._by_address: dict[Address, bytes] = {}
        self._on_change = on_change
        self.version = 0
        super().__init__(protocol, ksize, node)

    def flush(self) -> None:
        """Forget every contact."""
        self.version += 1
        self.buckets = [FcBucket(0, LAST_ID, self.ksize)]
        self._subnets.clear()
        self._by_address.clear()

    def __len__(self) -> int:
        """Return the number of verified contacts."""
        return sum(len(bucket.nodes) for bucket in self.buckets)

    def __iter__(self) -> Iterator[Contact]:
        """Iterate over the verified contacts, by bucket."""
        return chain.from_iterable(bucket.nodes.values() for bucket in self.buckets)

    def get_all_nodes(self) -> list[Contact]:
        """Return the verified contacts."""
        return list(self)

    def get(self, node_id: bytes) -> Contact | None:
        """Return the verified contact with an id."""
        return self.bucket_of(node_id).nodes.get(node_id)

    def at(self, address: Address) -> Contact | None:
        """Return the verified contact at an address."""
        node_id = self._by_address.get(address)
        return None if node_id is None else self.get(node_id)

    def bucket_of(self, node_id: bytes) -> FcBucket:
        """Return the bucket whose range holds a 20-byte id."""
        return self.buckets[self._index(int.from_bytes(node_id))]

    def get_bucket_for(self, node: Contact) -> int:
        """Return the index of the bucket whose range holds a contact."""
        return self._index(node.long_id)

    def _index(self, long_id: int) -> int:
        low, high = 0, len(self.buckets) - 1
        while low < high:
            middle = (low + high) // 2
            if long_id <= self.buckets[middle].range[1]:
                high = middle
            else:
                low = middle + 1
        return low

    def is_new_node(self, node: Contact) -> bool:
        """Whether a contact is neither in the table nor among the candidates."""
        bucket = self.bucket_of(node.id)
        return node.id not in bucket.nodes and node.id not in bucket.replacement_nodes

    def wants(self, contact: Contact) -> bool:
        """Whether a contact would enter if it proved itself now: worth a challenge."""
        if contact.id == self.node.id:
            return False
        bucket = self.bucket_of(contact.id)
        known = bucket.nodes.get(contact.id)
        if known is not None:
            return known.failures > 0
        if not self._subnet_has_room(contact) or not bucket.allows(contact):
            return False
        return len(bucket.nodes) < self.ksize or self._may_split(bucket) or self._worst(bucket) is not None

    def add_contact(self, node: Contact) -> None:
        """Keep an unproven contact as a candidate; it enters by `add_verified` only."""
        bucket = self.bucket_of(node.id)
        if node.id != self.node.id and node.id not in bucket.nodes:
            bucket.remember(node)

    def add_verified(self, contact: Contact, now: float) -> bool:
        """Enter a contact that has just signed a challenge; False when there is no room for it.

        A known id at a new address moves there: the signature proves that it is the same node.
        """
        if contact.id == self.node.id:
            return False
        contact.is_verified = True
        contact.last_seen = now
        contact.failures = 0
        known = self.get(contact.id)
        if known is not None:
            self._take_out(known)
        occupant = self.at(contact.address)
        if occupant is not None:
            self._take_out(occupant)  # the address answers under another id: the old one is gone
        while True:
            bucket = self.bucket_of(contact.id)
            if not self._subnet_has_room(contact) or not bucket.allows(contact):
                return False
            if len(bucket.nodes) < self.ksize:
                break
            if self._may_split(bucket):
                self.split_bucket(self.buckets.index(bucket))
                continue
            worst = self._worst(bucket)
            if worst is None:
                bucket.remember(contact)
                return False
            self._take_out(worst)
        bucket.replacement_nodes.pop(contact.id, None)
        bucket.nodes[contact.id] = contact
        self.version += 1
        self._by_address[contact.address] = contact.id
        subnet = subnet_of(contact.ip)
        self._subnets[subnet] = self._subnets.get(subnet, 0) + 1
        self._changed()
        return True

    def note_answer(self, contact: Contact, now: float) -> None:
        """Record an answer: the contact is good and goes to the end of its bucket. O(1)."""
        contact.failures = 0
        contact.last_seen = now
        bucket = self.bucket_of(contact.id)
        known = bucket.nodes.get(contact.id)
        if known is not None and known.address == contact.address:
            known.failures = 0
            known.last_seen = now
            bucket.nodes[contact.id] = bucket.nodes.pop(contact.id)

    def note_failure(self, contact: Contact) -> None:
        """Record an unanswered request; the second in a row removes the contact."""
        contact.failures += 1
        bucket = self.bucket_of(contact.id)
        known = bucket.nodes.get(contact.id)
        if known is not None and known.address == contact.address:
            known.failures = max(known.failures, contact.failures)
            if known.failures >= FAILURES_MAX:
                self.remove_contact(known)
        elif bucket.replacement_nodes.get(contact.id) == contact:
            del bucket.replacement_nodes[contact.id]

    def remove_contact(self, node: Contact) -> None:
        """Remove a contact; a candidate takes its place only after it has proved itself."""
        self.bucket_of(node.id).replacement_nodes.pop(node.id, None)
        known = self.get(node.id)
        if known is not None:
            self._take_out(known)
            self._changed()

    def candidates_for(self, node: Contact) -> list[Contact]:
        """Return the unproven contacts of a contact's bucket, newest first."""
        return list(self.bucket_of(node.id).replacement_nodes.values())[::-1]

    def candidates_near(self, target: int) -> list[Contact]:
        """Return the unproven contacts of the bucket around a target."""
        return list(self.buckets[self._index(target)].replacement_nodes.values())

    def stalest(self) -> Contact | None:
        """Return the verified contact that has been silent longest."""
        return min(self, key=lambda contact: contact.last_seen, default=None)

    def find_neighbors(self, node: Contact, k: int | None = None, exclude: Contact | None = None) -> list[Contact]:
        """Return the exact `k` verified contacts nearest to a node."""
        return self.nearest(node.long_id, k or self.ksize, exclude=None if exclude is None else exclude.address)

    def nearest(self, target: int, k: int, *, exclude: Address | None = None) -> list[Contact]:
        """Return the exact `k` verified contacts nearest to a target (XOR), nearest first.

        Cost: sorts the buckets, and the contacts of as many as are needed.
        """
        found: list[Contact] = []
        for bucket in self._by_distance(target):
            contacts = [contact for contact in bucket.nodes.values() if contact.address != exclude]
            found += sorted(contacts, key=lambda contact: contact.long_id ^ target)
            if len(found) >= k:
                break
        return found[:k]

    def nearest_to_tell(self, target: int, k: int, asker: Address) -> list[Contact]:
        """Return `k` contacts for a reply: the nearest that owe no answer, then the nearest that do."""
        owing: list[Contact] = []
        found: list[Contact] = []
        for bucket in self._by_distance(target):
            for contact in sorted(bucket.nodes.values(), key=lambda contact: contact.long_id ^ target):
                if contact.address != asker:
                    (owing if contact.failures else found).append(contact)
            if len(found) >= k:
                break
        return (found + owing)[:k]

    def _by_distance(self, target: int) -> list[FcBucket]:
        """Return the buckets in order of distance; each is a range of distances, since it is one of prefixes."""

        def distance(bucket: FcBucket) -> int:
            low, high = bucket.range
            return (low ^ target) & ~(high - low)

        return sorted(self.buckets, key=distance)

    def lonely_buckets(self) -> list[FcBucket]:
        """Return the buckets in which nobody has answered for long; the package's refresh asks for them."""
        return [bucket for bucket in self.buckets if not bucket.nodes]

    def _subnet_has_room(self, contact: Contact) -> bool:
        return is_shared(contact.ip) or self._subnets.get(subnet_of(contact.ip), 0) < PER_SUBNET_TABLE

    def _may_split(self, bucket: FcBucket) -> bool:
        low, high = bucket.range
        return low <= self.node.long_id <= high and high > low and len(self.buckets) < BUCKETS_MAX

    @staticmethod
    def _worst(bucket: FcBucket) -> Contact | None:
        """Return a contact that owes an answer, the most silent one."""
        owing = [contact for contact in bucket.nodes.values() if contact.failures]
        return min(owing, key=lambda contact: contact.last_seen, default=None)

    def _take_out(self, contact: Contact) -> None:
        self.version += 1
        del self.bucket_of(contact.id).nodes[contact.id]
        if self._by_address.get(contact.address) == contact.id:
            del self._by_address[contact.address]
        subnet = subnet_of(contact.ip)
        self._subnets[subnet] -= 1
        if not self._subnets[subnet]:
            del self._subnets[subnet]

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()
