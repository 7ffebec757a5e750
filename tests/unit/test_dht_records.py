"""Records held for others: expiry, caps, withdrawal, signatures; tokens and rates of those who write them."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

from fastcas.dht.announcer import metadata_value, parse_metadata_value
from fastcas.dht.budgets import PROVIDERS_PER_KEY, TTL_MAX_S
from fastcas.dht.guard import NetworkKey, SourceBuckets, TokenBucket, TokenJar
from fastcas.dht.identity import Identity, id_of, metadata_text
from fastcas.dht.provided import chunk_key, keys_of, metadata_key, swarm_key
from fastcas.dht.records import HintStore, MetadataRecord, MetadataStore, SwarmStore
from fastcas.errors import UsageError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def keys_from(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8) for number in numbers)


def node(number: int) -> bytes:
    return number.to_bytes(20)


def test_hints_match_a_dictionary_through_settling_merging_expiry_and_withdrawal() -> None:
    clock = Clock()
    rng = random.Random(3)
    store = HintStore(clock, rng=rng)
    model: dict[int, dict[bytes, float]] = defaultdict(dict)
    universe = [rng.getrandbits(64) for _ in range(40_000)]
    for step in range(400):
        who = node(rng.randrange(6) + 1)
        batch = rng.sample(universe, 300)
        ttl_s = rng.choice([60, 3600, 90_000])
        store.put(who, "10.0.0.1", int.from_bytes(who), 9000, keys_from(*batch), ttl_s)
        for key in batch:
            model[key][who] = max(model[key].get(who, 0.0), clock.now + ttl_s)
        clock.now += rng.random() * 20
        if step % 97 == 96:
            store.withdraw(who, "10.0.0.1", int.from_bytes(who))
            for holders in model.values():
                holders.pop(who, None)
    clock.now += 3
    for key in rng.sample(universe, 3000):
        # Times are whole seconds in the store: leave out what expires within one.
        sure = {who for who, until in model[key].items() if until > clock.now + 2}
        possible = {who for who, until in model[key].items() if until > clock.now - 2}
        got = {provider.node_id for provider in store.get(key, 64)}
        assert sure <= got <= possible


def test_hints_cost_at_most_40_bytes_each_when_settled() -> None:
    store = HintStore(Clock())
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 1 << 63, size=200_000, dtype=np.uint64).astype(">u8")
    for start in range(0, len(keys), 130):
        store.put(node(1), "10.0.0.1", 1, 9000, keys[start : start + 130].tobytes(), 3600)
    packed = sum(s.keys.nbytes + s.providers.nbytes + s.expires.nbytes for s in store._segments)
    assert packed <= 16 * store.n_hints
    assert store.n_hints == len(set(keys.tolist()))
    for start in range(0, len(keys), 130):
        store.put(node(1), "10.0.0.1", 1, 9000, keys[start : start + 130].tobytes(), 3600)
    store._merge(everything=True)
    assert store.n_hints == len(set(keys.tolist()))  # announcing again adds nothing
    assert store.get(int(keys[777]), 16)[0].data_port == 9000


def test_hint_caps_hold_per_key_per_subnet_and_in_all() -> None:
    clock = Clock()
    store = HintStore(clock, limit=10_000)
    for number in range(1, 200):
        store.put(node(number), "10.0.0.1", number, 9000, keys_from(7), 3600)
    assert len(store.get(7, 255)) == PROVIDERS_PER_KEY
    assert len(store.get(7, 16)) == 16
    accepted = sum(
        store.put(node(500 + i), f"8.8.8.{i}", 1, 9000, random.Random(i).randbytes(8 * 100), 3600) for i in range(20)
    )
    assert accepted == 1000  # a tenth of all
    for number in range(300):
        store.put(node(1000), "10.0.0.2", 1, 9000, random.Random(1000 + number).randbytes(8 * 100), 3600)
    assert store.n_hints <= 10_000
    new = keys_from(*range(99, 249))
    assert store.put(node(2000), "10.0.0.3", 1, 9000, new, 3600) == 0  # room is not looked for all the time
    clock.now += 6
    assert store.put(node(2000), "10.0.0.3", 1, 9000, new, 3600) == 150  # the greedy one made room
    assert [p.node_id for p in store.get(99, 16)] == [node(2000)]


def test_swarm_records_expire_are_capped_per_subnet_and_withdrawn() -> None:
    clock = Clock()
    store = SwarmStore(clock, limit=100)
    key = node(9)
    for number in range(1, 30):
        store.put(key, node(number), f"8.8.8.{number}", 1, 9000, 500, 3600)
    assert len(store.get(key, 255)) == 8
    assert store.put(key, node(50), "10.0.0.1", 1, 9001, 1000, 60)
    assert store.put(key, node(50), "10.0.0.1", 1, 9002, 10, 60)
    assert [(p.data_port, have) for p, have in store.get(key, 255) if p.node_id == node(50)] == [(9002, 10)]
    clock.now += 61
    assert all(p.node_id != node(50) for p, _ in store.get(key, 255))
    assert store.withdraw(node(1), "8.8.8.1", 1) == 1
    assert store.withdraw(node(1), "8.8.8.1", 1, [key]) == 0
    clock.now += 3600
    assert store.get(key, 255) == []
    assert store.n_records == 0
    for number in range(300):
        store.put(number.to_bytes(20), node(1), "10.0.0.1", 1, 9000, 1, 3600)
    assert store.n_records == 100
    clock.now += 3601
    assert store.put(b"n" * 20, node(1), "10.0.0.1", 1, 9000, 1, 3600)


def record(identity: Identity, key: bytes, *, seq: int = 1, expires: int = 5000, value: bytes = b"v") -> MetadataRecord:
    return MetadataRecord(identity.public, seq, expires, value, identity.sign(metadata_text(key, seq, expires, value)))


def test_metadata_takes_eight_publishers_newest_first_and_only_good_signatures() -> None:
    clock = Clock()
    store = MetadataStore(clock, lambda: clock.now + 1000, limit=3)
    key, publishers = node(1), [Identity(bytes([i]) * 32) for i in range(9)]
    for identity in publishers[:8]:
        assert store.put(key, record(identity, key))
    assert not store.put(key, record(publishers[8], key))
    assert store.put(key, record(publishers[0], key, seq=5, value=b"new"))
    assert not store.put(key, record(publishers[0], key, seq=4, value=b"old"))
    assert {r.value for r in store.get(key) if r.public == publishers[0].public} == {b"new"}

    other = node(2)
    good = record(publishers[0], other)
    assert not store.put(other, record(publishers[0], key))  # signed for another key
    forged = MetadataRecord(good.public, good.seq, good.expires, b"forged", good.signature)
    assert not store.put(other, forged)
    assert not store.put(other, MetadataRecord(publishers[1].public, 1, 5000, b"v", good.signature))
    assert not store.put(other, record(publishers[0], other, expires=1000))
    assert not store.put(other, record(publishers[0], other, expires=1200 + TTL_MAX_S))
    assert not store.put(other, record(publishers[0], other, value=bytes(901)))
    assert other not in store
    assert store.put(other, good)
    clock.now += 5000
    assert store.get(other) == []
    for number in range(3, 6):
        assert store.put(node(number), record(publishers[0], node(number), expires=9000))
    assert not store.put(node(7), record(publishers[0], node(7), expires=9000))


def test_metadata_value_round_trip_and_refusals() -> None:
    value = metadata_value("na\udcffme ü", 77, bytes(32))
    parsed = parse_metadata_value(value)
    assert parsed is not None
    assert parsed[1:] == (77, bytes(32))
    with pytest.raises(UsageError):
        metadata_value("x" * 256, 1, bytes(32))
    for bad in (b"", b"\xc1", b"\x91" * 800, metadata_value("x", 1, bytes(32))[:-1], b"\x80", bytes(901)):
        assert parse_metadata_value(bad) is None


def test_tokens_hold_for_one_source_and_five_to_ten_minutes() -> None:
    clock = Clock()
    jar = TokenJar(clock)
    token = jar.token("10.0.0.1", 5, node(1))
    assert jar.holds(token, "10.0.0.1", 5, node(1))
    assert not jar.holds(token, "10.0.0.2", 5, node(1))
    assert not jar.holds(token, "10.0.0.1", 6, node(1))
    assert not jar.holds(token, "10.0.0.1", 5, node(2))
    assert not jar.holds(b"", "10.0.0.1", 5, node(1))
    clock.now += 301
    assert jar.token("10.0.0.1", 5, node(1)) != token
    assert jar.holds(token, "10.0.0.1", 5, node(1))
    clock.now += 301
    assert not jar.holds(token, "10.0.0.1", 5, node(1))
    token = jar.token("10.0.0.1", 5, node(1))
    clock.now += 10_000
    assert not jar.holds(token, "10.0.0.1", 5, node(1))


def test_sources_are_limited_by_address_and_local_ones_by_port() -> None:
    clock = Clock()
    buckets = SourceBuckets(clock, lambda ip: ip.startswith("127."))
    assert sum(buckets.admit("8.8.8.8", port) for port in range(1, 1001)) == 100
    assert buckets.admit("8.8.4.4", 1)
    clock.now += 1
    assert sum(buckets.admit("8.8.8.8", 1) for _ in range(100)) == 0  # banned after three times the burst
    clock.now += 301
    buckets.prove("8.8.8.8", 1)
    assert sum(buckets.admit("8.8.8.8", 1) for _ in range(3000)) == 2000
    assert all(sum(buckets.admit("127.0.0.1", port) for _ in range(9000)) == 9000 for port in (1, 2))
    assert sum(buckets.admit("2a00::1", 1) + buckets.admit("2a00::2", 1) for _ in range(100)) == 100


def test_token_bucket_refills_at_its_rate() -> None:
    bucket = TokenBucket(10.0, 5.0, 0.0)
    assert [bucket.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert [bucket.take(0.25) for _ in range(3)] == [True, True, False]


def test_network_key_opens_only_its_own_datagrams() -> None:
    one, two = NetworkKey(b"one"), NetworkKey(b"two")
    sealed = one.seal(b"hello")
    assert one.open(sealed) == b"hello"
    assert two.open(sealed) is None
    assert one.open(sealed[:-1]) is None
    assert one.open(b"") is None
    assert one.net_id != two.net_id


def test_keys_are_those_of_the_format() -> None:
    import hashlib

    digest = bytes(range(32))
    assert metadata_key(digest) == hashlib.sha1(b"file_metadata:" + digest.hex().encode()).digest()
    assert swarm_key(digest) == hashlib.sha256(b"fc1:swarm:" + digest).digest()[:20]
    assert chunk_key(digest) == 0x0001020304050607
    assert keys_of(digest + bytes(32)).tolist() == [0, chunk_key(digest)]
    identity = Identity(bytes(32))
    assert identity.node_id == hashlib.sha256(b"fc1:id" + identity.public).digest()[:20] == id_of(identity.public)
