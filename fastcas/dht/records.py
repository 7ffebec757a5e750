"""Records held for others: chunk hints, file swarms, signed metadata. Soft state: expires, bounded, never saved.

A provider's address is always the source address that its datagram came from; it declares only its TCP data port.
Writers have shown a token, so the address is theirs. Times are the clock's seconds; metadata also carries a Unix
time, because it is signed by somebody whose clock is not ours.

Chunk hints are 8-byte keys in sorted packed arrays (`_Segment`, 16 bytes per hint) below a small dictionary that
takes the newest; segments of about the same size are merged, so a key costs a few binary searches.
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
YOUNG_MAX = 32_768  # hints in the dictionary before they become a segment


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
        self._next_number = 0
        self._young: dict[int, dict[int, int]] = {}
        self._n_young = 0
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
            self._merge(everything=True)
            if self.n_hints + count > self._limit and not self._make_room(node_id, ip, udp_port, count):
                return 0
        provider = self._provider(node_id, ip, udp_port)
        provider.data_port = data_port
        expires = int(self._clock() - self._zero) + clamp_ttl(ttl_s)
        number = provider.number
        added = 0
        for key in np.frombuffer(keys, dtype=">u8").tolist():
            holders = self._young.get(key)
            if holders is None:
                holders = self._young[key] = {}
            if number not in holders:
                if len(holders) >= PROVIDERS_PER_KEY:
                    continue
                added += 1
            holders[number] = max(holders.get(number, 0), expires)
        self._n_young += added
        provider.n_hints += added
        self._subnets[subnet] = self._subnets.get(subnet, 0) + added
        if self._n_young >= YOUNG_MAX:
            self._settle()
        return count

    def get(self, key: int, limit: int) -> list[Provider]:
        """Return up to `limit` live announcers of a key, chosen at random."""
        now = int(self._clock() - self._zero)
        numbers = {n for n, expires in self._young.get(key, {}).items() if expires > now}
        wanted = np.uint64(key)
        for segment in self._segments:
            start = int(np.searchsorted(segment.keys, wanted, side="left"))
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

    def _provider(self, node_id: bytes, ip: str, udp_port: int) -> Provider:
        provider = self._by_source.get((node_id, ip, udp_port))
        if provider is None:
            provider = Provider(node_id, ip, udp_port, 0, self._next_number)
            self._next_number += 1
            self._by_source[node_id, ip, udp_port] = provider
            self._providers[provider.number] = provider
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
        if self._young:
            self._segments.append(_segment_of(self._young))
        self._young.clear()
        self._n_young = 0
        while len(self._segments) > 1 and len(self._segments[-2].keys) < 2 * len(self._segments[-1].keys):
            self._merge()

    def _merge(self, *, everything: bool = False) -> None:
        """Merge the two youngest segments, or all there is: drops expired, withdrawn, repeated and excess hints."""
        if everything:
            if self._young:
                self._segments.append(_segment_of(self._young))
            self._young.clear()
            self._n_young = 0
        merged = self._segments if everything else self._segments[-2:]
        if not merged:
            return
        keys = np.concatenate([s.keys for s in merged])
        numbers = np.concatenate([s.providers for s in merged])
        expires = np.concatenate([s.expires for s in merged])
        now = int(self._clock() - self._zero)
        live = np.array([n for n, p in self._providers.items() if not p.is_withdrawn], dtype=np.uint32)
        before = np.bincount(numbers, minlength=self._next_number) if len(numbers) else np.zeros(0, dtype=np.intp)
        order = np.lexsort((~expires, numbers, keys))
        keys, numbers, expires = keys[order], numbers[order], expires[order]
        keep = (expires > now) & np.isin(numbers, live)
        if len(keys):
            same = (keys[1:] == keys[:-1]) & (numbers[1:] == numbers[:-1])
            keep[1:] &= ~same
        keys, numbers, expires = keys[keep], numbers[keep], expires[keep]
        if len(keys):
            starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
            rank = np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
            few = rank < PROVIDERS_PER_KEY
            keys, numbers, expires = keys[few], numbers[few], expires[few]
        after = np.bincount(numbers, minlength=self._next_number) if len(numbers) else np.zeros_like(before)
        del self._segments[0 if everything else -2 :]
        if len(keys):
            self._segments.append(_Segment(keys, numbers, expires))
        for number in np.flatnonzero(before != after).tolist():
            provider = self._providers[number]
            lost = int(before[number] - after[number])
            provider.n_hints -= lost
            if not provider.is_withdrawn:
                self._credit(provider, lost)
        if everything:
            self._forget_empty()

    def _forget_empty(self) -> None:
        for number, provider in list(self._providers.items()):
            if provider.is_withdrawn or provider.n_hints <= 0:
                del self._providers[number]
                if self._by_source.get((provider.node_id, provider.ip, provider.udp_port)) is provider:
                    del self._by_source[provider.node_id, provider.ip, provider.udp_port]

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


def _segment_of(young: dict[int, dict[int, int]]) -> _Segment:
    flat = sorted((k, n, e) for k, holders in young.items() for n, e in holders.items())
    keys, numbers, expires = zip(*flat, strict=True)
    return _Segment(
        np.array(keys, dtype=np.uint64), np.array(numbers, dtype=np.uint32), np.array(expires, dtype=np.uint32)
    )


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
