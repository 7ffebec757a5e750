"""Records held for others: chunk hints, file swarms, signed metadata. Soft state: expires, bounded, never saved.

A provider's address is always the source address that its datagram came from; it declares only its TCP data port.
Writers have shown a token, so the address is theirs. Times are the clock's seconds; metadata also carries a Unix
time, because it is signed by somebody whose clock is not ours.

Chunk hints are 8-byte keys in sorted packed arrays (`_Segment`, 16 bytes per hint) below a small dictionary that
takes the newest; segments of about the same size are merged, so a key costs a few binary searches. Announcers are
known by small numbers, which are used again when nothing refers to them any more.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import (
    HINTS_MAX,
    METADATA_KEYS_MAX,
    METADATA_PER_KEY,
    METADATA_VALUE_MAX,
    PER_SUBNET_SWARM,
    PROVIDERS_MAX,
    PROVIDERS_PER_KEY,
    SUBNET_SHARE,
    SWARM_RECORDS_MAX,
    TTL_MAX_S,
    TTL_MIN_S,
)
from fastcas.dht.contacts import is_shared, subnet_of
from fastcas.dht.identity import metadata_text, verify

__all__ = ["HintStore", "MetadataRecord", "MetadataStore", "Provider", "SwarmStore"]

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
YOUNG_MAX = 16_384  # hints in the dictionary before they become a segment: about 1.5 MB
TIDY_UP_PAUSE_S = 5.0


@dataclass(slots=True)
class Provider:
    """Who announced: DHT node id, observed source address, declared data port, and where it stands in the store."""

    node_id: bytes
    ip: str
    udp_port: int
    data_port: int
    number: int = -1
    n_hints: int = 0
    is_withdrawn: bool = False


@dataclass(slots=True)
class _Segment:
    keys: U64
    providers: U32
    expires: U32


def clamp_ttl(ttl_s: int) -> int:
    """Return a time to live within the limits, seconds."""
    return max(TTL_MIN_S, min(ttl_s, TTL_MAX_S))


class HintStore:
    """8-byte chunk keys and who announced them."""

    def __init__(self, clock: Callable[[], float], *, limit: int = HINTS_MAX, rng: random.Random | None = None) -> None:
        """Start empty; `limit` bounds the number of hints."""
        self._clock = clock
        self._zero = clock() - 1.0
        self._limit = limit
        self._rng = rng if rng is not None else random.Random()
        self._providers: dict[int, Provider] = {}
        self._by_source: dict[tuple[bytes, str, int], Provider] = {}
        self._subnets: dict[bytes, int] = {}
        self._subnet_providers: dict[bytes, int] = {}
        self._next_number = 0
        self._free_numbers: list[int] = []
        self._young: dict[int, int] = {}  # key: announcer << 32 | expiry
        self._crowd: dict[int, dict[int, int]] = {}  # further announcers of young keys: {announcer: expiry}
        self._n_young = 0
        self._tidied_up_at = clock() - TIDY_UP_PAUSE_S
        self._segments: list[_Segment] = []

    @property
    def n_hints(self) -> int:
        """Number of hints held, expired ones included until the next merge."""
        return self._n_young + sum(len(segment.keys) for segment in self._segments)

    @property
    def n_providers(self) -> int:
        """Number of distinct announcers."""
        return len(self._by_source)

    def put(self, node_id: bytes, ip: str, udp_port: int, data_port: int, keys: bytes, ttl_s: int) -> int:
        """Store the 8-byte keys of one announcer; return how many were accepted (0 when full or over its share)."""
        count = len(keys) // 8
        subnet = subnet_of(ip)
        if not is_shared(ip) and self._subnets.get(subnet, 0) + count > self._limit * SUBNET_SHARE:
            return 0
        if self.n_hints + count > self._limit:
            if not self._may_tidy_up():
                return 0
            self._merge(everything=True)
            if self.n_hints + count > self._limit and not self._make_room(node_id, ip, udp_port, count):
                return 0
        provider = self._provider(node_id, ip, udp_port)
        if provider is None:
            return 0
        provider.data_port = data_port
        expires = int(self._clock() - self._zero) + clamp_ttl(ttl_s)
        number = provider.number
        packed = number << 32 | expires
        young = self._young
        added = 0
        for key in np.frombuffer(keys, dtype=">u8").tolist():
            known = young.get(key)
            if known is None:
                young[key] = packed
                added += 1
            elif known >> 32 == number:
                young[key] = max(known, packed)
            else:
                added += self._crowd_in(key, number, expires)
        self._n_young += added
        provider.n_hints += added
        self._subnets[subnet] = self._subnets.get(subnet, 0) + added
        if self._n_young >= YOUNG_MAX:
            self._settle()
        return count

    def _crowd_in(self, key: int, number: int, expires: int) -> bool:
        """Add one more announcer of a young key; False when it is there already, or they are too many."""
        others = self._crowd.setdefault(key, {})
        if number not in others and len(others) + 1 >= PROVIDERS_PER_KEY:
            return False
        is_new = number not in others
        others[number] = max(others.get(number, 0), expires)
        return is_new

    def get(self, key: int, limit: int) -> list[Provider]:
        """Return up to `limit` live announcers of a key, chosen at random."""
        now = int(self._clock() - self._zero)
        numbers = {n for n, expires in self._crowd.get(key, {}).items() if expires > now}
        first = self._young.get(key)
        if first is not None and first & 0xFFFFFFFF > now:
            numbers.add(first >> 32)
        wanted = np.uint64(key)
        for segment in self._segments:
            start = int(segment.keys.searchsorted(wanted))
            while start < len(segment.keys) and segment.keys[start] == wanted:
                if segment.expires[start] > now:
                    numbers.add(int(segment.providers[start]))
                start += 1
        found = [p for p in (self._providers.get(n) for n in numbers) if p is not None and not p.is_withdrawn]
        return found if len(found) <= limit else self._rng.sample(found, limit)

    def withdraw(self, node_id: bytes, ip: str, udp_port: int) -> int:
        """Forget everything of one announcer; return the number of its hints."""
        provider = self._by_source.pop((node_id, ip, udp_port), None)
        if provider is None:
            return 0
        provider.is_withdrawn = True
        self._credit(provider, provider.n_hints)
        return provider.n_hints

    def _provider(self, node_id: bytes, ip: str, udp_port: int) -> Provider | None:
        """Return the entry of an announcer, a new one if need be; None when there are too many."""
        source = (node_id, ip, udp_port)
        provider = self._by_source.get(source)
        if provider is not None:
            return provider
        subnet = subnet_of(ip)
        share = self._subnet_providers.get(subnet, 0) + 1
        if not is_shared(ip) and share > PROVIDERS_MAX * SUBNET_SHARE:
            return None
        if len(self._providers) >= PROVIDERS_MAX:
            if self._may_tidy_up():
                self._merge(everything=True)
            if len(self._providers) >= PROVIDERS_MAX:
                return None
        if self._free_numbers:
            number = self._free_numbers.pop()
        else:
            number, self._next_number = self._next_number, self._next_number + 1
        provider = self._by_source[source] = self._providers[number] = Provider(node_id, ip, udp_port, 0, number)
        self._subnet_providers[subnet] = share
        return provider

    def _credit(self, provider: Provider, count: int) -> None:
        subnet = subnet_of(provider.ip)
        left = self._subnets.get(subnet, 0) - count
        if left > 0:
            self._subnets[subnet] = left
        else:
            self._subnets.pop(subnet, None)

    def _settle(self) -> None:
        """Turn the dictionary into a segment and merge segments until each is over twice the next younger one."""
        self._pack_young()
        while len(self._segments) > 1 and len(self._segments[-2].keys) < 2 * len(self._segments[-1].keys):
            self._merge()

    def _pack_young(self) -> None:
        if not self._young:
            return
        crowd = [(k, n << 32 | e) for k, others in self._crowd.items() for n, e in others.items()]
        more_keys, more_values = zip(*crowd, strict=True) if crowd else ((), ())
        count = len(self._young) + len(crowd)
        keys = np.fromiter((*self._young.keys(), *more_keys), dtype=np.uint64, count=count)
        values = np.fromiter((*self._young.values(), *more_values), dtype=np.uint64, count=count)
        order = np.argsort(keys, kind="stable")
        values = values[order]
        numbers = (values >> np.uint64(32)).astype(np.uint32)
        self._segments.append(_Segment(keys[order], numbers, values.astype(np.uint32)))
        self._young.clear()
        self._crowd.clear()
        self._n_young = 0

    def _merge(self, *, everything: bool = False) -> None:
        """Merge the two youngest segments, or all there is: drops expired, withdrawn, repeated and excess hints.

        Cost: about 50 ns per hint. Memory: twice the merged segments for a moment.
        """
        if everything:
            self._pack_young()
        merged = self._segments if everything else self._segments[-2:]
        keys = np.concatenate([np.zeros(0, dtype=np.uint64), *(s.keys for s in merged)])
        numbers = np.concatenate([np.zeros(0, dtype=np.uint32), *(s.providers for s in merged)])
        expires = np.concatenate([np.zeros(0, dtype=np.uint32), *(s.expires for s in merged)])
        del merged, self._segments[0 if everything else -2 :]
        before = np.bincount(numbers, minlength=self._next_number)
        order = np.argsort(keys, kind="stable")  # runs that are sorted already: a merge
        keys, numbers, expires = keys[order], numbers[order], expires[order]
        keep = expires > int(self._clock() - self._zero)
        is_live = np.zeros(self._next_number, dtype=bool)
        is_live[[n for n, provider in self._providers.items() if not provider.is_withdrawn]] = True
        keep &= is_live[numbers]
        if not keep.all():
            keys, numbers, expires = keys[keep], numbers[keep], expires[keep]
        keys, numbers, expires = _without_repeats(keys, numbers, expires)
        after = np.bincount(numbers, minlength=self._next_number)
        if len(keys):
            self._segments.append(_Segment(keys, numbers, expires))
        for number in np.flatnonzero(before != after).tolist():
            provider = self._providers[number]
            lost = int(before[number] - after[number])
            provider.n_hints -= lost
            if not provider.is_withdrawn:
                self._credit(provider, lost)
        if everything:
            self._forget_those_without_hints(after)

    def _forget_those_without_hints(self, n_hints: npt.NDArray[np.intp]) -> None:
        """Forget announcers and free their numbers; only when everything that is held has just been counted."""
        for number in [number for number in self._providers if not n_hints[number]]:
            provider = self._providers.pop(number)
            self._free_numbers.append(number)
            source = (provider.node_id, provider.ip, provider.udp_port)
            if self._by_source.get(source) is provider:
                del self._by_source[source]
            subnet = subnet_of(provider.ip)
            self._subnet_providers[subnet] -= 1
            if not self._subnet_providers[subnet]:
                del self._subnet_providers[subnet]

    def _may_tidy_up(self) -> bool:
        """Whether it is time to look for room again: that may cost 100 ms, and a full store is asked all the time."""
        now = self._clock()
        if now - self._tidied_up_at < TIDY_UP_PAUSE_S:
            return False
        self._tidied_up_at = now
        return True

    def _make_room(self, node_id: bytes, ip: str, udp_port: int, count: int) -> bool:
        """Drop the largest announcer when it holds far more than the one that asks; whether there is room then."""
        largest = max(self._by_source.values(), key=lambda p: p.n_hints, default=None)
        asking = self._by_source.get((node_id, ip, udp_port))
        held = asking.n_hints if asking is not None else 0
        if largest is None or largest is asking or largest.n_hints <= 2 * (held + count):
            return False
        self.withdraw(largest.node_id, largest.ip, largest.udp_port)
        self._merge(everything=True)
        return self.n_hints + count <= self._limit


def _without_repeats(keys: U64, numbers: U32, expires: U32) -> tuple[U64, U32, U32]:
    """Return rows sorted by key with one row per key and announcer, the last to expire, and 64 at most per key."""
    same = keys[1:] == keys[:-1]
    if not same.any():
        return keys, numbers, expires
    crowded = np.zeros(len(keys), dtype=bool)
    crowded[1:] |= same
    crowded[:-1] |= same
    rows = np.flatnonzero(crowded)
    rows = rows[np.lexsort((~expires[rows], numbers[rows], keys[rows]))]
    again = (keys[rows][1:] == keys[rows][:-1]) & (numbers[rows][1:] == numbers[rows][:-1])
    rows = rows[np.r_[True, ~again]]
    starts = np.flatnonzero(np.r_[True, keys[rows][1:] != keys[rows][:-1]])
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    kept = ~crowded
    kept[rows[rank < PROVIDERS_PER_KEY]] = True
    return keys[kept], numbers[kept], expires[kept]


@dataclass(slots=True)
class _Member:
    provider: Provider
    have: int
    expires: float


class SwarmStore:
    """Who has (part of) a file: 20-byte key to announcers with their thousandths."""

    def __init__(
        self, clock: Callable[[], float], *, limit: int = SWARM_RECORDS_MAX, rng: random.Random | None = None
    ) -> None:
        """Start empty; `limit` bounds the number of records."""
        self._clock = clock
        self._limit = limit
        self._rng = rng if rng is not None else random.Random()
        self._keys: OrderedDict[bytes, dict[tuple[bytes, str, int], _Member]] = OrderedDict()
        self.n_records = 0

    def put(self, key: bytes, node_id: bytes, ip: str, udp_port: int, data_port: int, have: int, ttl_s: int) -> bool:
        """Store one record; False when the key or the store is full."""
        now = self._clock()
        members = self._keys.get(key)
        if members is None:
            members = self._keys[key] = {}
        self._keys.move_to_end(key)
        source = (node_id, ip, udp_port)
        known = members.get(source)
        if known is not None:
            known.provider.data_port, known.have, known.expires = data_port, have, now + clamp_ttl(ttl_s)
            return True
        if not self._has_room(members, ip, now):
            if not members:
                del self._keys[key]
            return False
        members[source] = _Member(Provider(node_id, ip, udp_port, data_port), have, now + clamp_ttl(ttl_s))
        self.n_records += 1
        return True

    def get(self, key: bytes, limit: int) -> list[tuple[Provider, int]]:
        """Return up to `limit` live (announcer, thousandths), chosen at random."""
        members = self._keys.get(key)
        if members is None:
            return []
        self._expire(key, members, self._clock())
        found = [(member.provider, member.have) for member in members.values()]
        return found if len(found) <= limit else self._rng.sample(found, limit)

    def withdraw(self, node_id: bytes, ip: str, udp_port: int, keys: list[bytes] | None = None) -> int:
        """Forget the records of one announcer, all or those of `keys`; return how many."""
        source = (node_id, ip, udp_port)
        removed = 0
        for key in list(self._keys) if keys is None else keys:
            members = self._keys.get(key)
            if members is not None and members.pop(source, None) is not None:
                removed += 1
                if not members:
                    del self._keys[key]
        self.n_records -= removed
        return removed

    def _expire(self, key: bytes, members: dict[tuple[bytes, str, int], _Member], now: float) -> None:
        for source in [s for s, member in members.items() if member.expires <= now]:
            del members[source]
            self.n_records -= 1
        if not members:
            self._keys.pop(key, None)

    def _has_room(self, members: dict[tuple[bytes, str, int], _Member], ip: str, now: float) -> bool:
        for source in [s for s, member in members.items() if member.expires <= now]:
            del members[source]
            self.n_records -= 1
        if len(members) >= PROVIDERS_PER_KEY:
            return False
        if not is_shared(ip):
            subnet = subnet_of(ip)
            if sum(1 for m in members.values() if subnet_of(m.provider.ip) == subnet) >= PER_SUBNET_SWARM:
                return False
        if self.n_records >= self._limit:
            for key in list(self._keys)[:1024]:
                if self._keys[key] is not members:
                    self._expire(key, self._keys[key], now)
        return self.n_records < self._limit


@dataclass(frozen=True, slots=True)
class MetadataRecord:
    """What a publisher says about a file, signed. `seq` orders a publisher's own records; `expires` is Unix time."""

    public: bytes
    seq: int
    expires: int
    value: bytes
    signature: bytes = field(repr=False)

    def holds(self, key: bytes) -> bool:
        """Whether the signature is the publisher's for this key. Cost: 140 us."""
        return verify(self.public, self.signature, metadata_text(key, self.seq, self.expires, self.value))


class MetadataStore:
    """Signed records: 20-byte key to at most 8 alternatives, one per publisher key."""

    def __init__(
        self, clock: Callable[[], float], wall: Callable[[], float], *, limit: int = METADATA_KEYS_MAX
    ) -> None:
        """Start empty; `wall` gives Unix time, `limit` bounds the number of keys."""
        self._clock = clock
        self._wall = wall
        self._limit = limit
        self._keys: OrderedDict[bytes, dict[bytes, tuple[MetadataRecord, float]]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        """Whether there is any record, live or not, under a key."""
        return key in self._keys

    @property
    def n_keys(self) -> int:
        """Number of keys with records."""
        return len(self._keys)

    def put(self, key: bytes, record: MetadataRecord) -> bool:
        """Store a record; False when it is too large, expired, too far ahead, older, forged, or there is no room."""
        left_s = record.expires - self._wall()
        if len(record.value) > METADATA_VALUE_MAX or not 0 < left_s <= TTL_MAX_S:
            return False
        now = self._clock()
        alternatives = self._keys.get(key, {})
        for public in [p for p, (_, until) in alternatives.items() if until <= now]:
            del alternatives[public]
        known = alternatives.get(record.public)
        if known is not None and known[0].seq > record.seq:
            return False
        if known is None and len(alternatives) >= METADATA_PER_KEY:
            return False
        if not record.holds(key):
            return False
        if key not in self._keys:
            self._drop_expired(now)
            if len(self._keys) >= self._limit:
                return False
            self._keys[key] = alternatives
        alternatives[record.public] = (record, now + left_s)
        return True

    def get(self, key: bytes) -> list[MetadataRecord]:
        """Return the live records of a key."""
        now = self._clock()
        return [record for record, until in self._keys.get(key, {}).values() if until > now]

    def _drop_expired(self, now: float) -> None:
        """Look at the oldest keys and drop those without a live record; the others go to the end of the queue."""
        for key in list(self._keys)[:16]:
            if all(until <= now for _, until in self._keys[key].values()):
                del self._keys[key]
            else:
                self._keys.move_to_end(key)
