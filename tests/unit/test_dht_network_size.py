"""The estimate of a network's size against networks whose size is known, and against planted nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

import pytest

from fastcas.dht.contacts import Contact
from fastcas.dht.network_size import NetworkSize, expected_distance, from_table, is_crowded
from tests.support.dht_sim import ideal_network, measure_lookups
from tests.support.virtual_net import VirtualNet, run

SPACE = 1 << 160


def distances(ids: list[int], target: int, k: int = 20) -> list[int]:
    return sorted(number ^ target for number in ids)[:k]


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 1000, 5000])
def test_estimate_is_within_a_quarter_after_32_lookups(n: int) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        ids = [rng.getrandbits(160) for _ in range(n)]
        size = NetworkSize()
        for _ in range(32):
            target = rng.getrandbits(160)
            size.note(target, distances(ids, target), is_all=False)
        assert 0.75 * n <= size.estimate(from_table(ids[0], ids[1:], n)) <= 1.25 * n, seed


def test_network_smaller_than_a_lookup_is_counted() -> None:
    size = NetworkSize()
    assert size.estimate(from_table(0, [], 20)) == 0
    assert size.estimate(from_table(0, [5, 9], 20)) == 2
    size.note(1, [3, 4, 5], is_all=True)
    assert size.estimate(from_table(0, [3], 20)) == 3
    size.note(2, [3, 4, 5], is_all=False)
    assert size.n_samples == 1


def test_planted_nodes_around_targets_and_around_us_change_little() -> None:
    rng = random.Random(1)
    ids = [rng.getrandbits(160) for _ in range(1000)]
    size = NetworkSize()
    own = least, most = from_table(0, ids, 20)
    assert 500 <= least <= most <= 2500
    planted = from_table(0, ids + [rng.getrandbits(140) for _ in range(40)], 20)
    assert planted[0] == least
    for _ in range(31):
        target = rng.getrandbits(160)
        size.note(target, distances(ids, target), is_all=False)
    before = size.estimate(own)
    assert size.estimate(planted) == before
    for _ in range(100):
        size.note(77, list(range(1, 21)), is_all=False)
    assert abs(size.estimate(own) - before) < 0.1 * before
    for target in range(100):
        size.note(target, list(range(1, 21)), is_all=False)
    assert size.estimate(own) <= 1.5 * most


def test_estimate_follows_a_network_that_grows() -> None:
    rng = random.Random(3)
    ids = [rng.getrandbits(160) for _ in range(1000)]
    size = NetworkSize()
    for _ in range(32):
        target = rng.getrandbits(160)
        size.note(target, distances(ids[:100], target), is_all=False)
    assert size.estimate(from_table(0, ids, 20)) >= 400


@pytest.mark.slow
def test_crowd_is_seen_and_chance_is_not() -> None:
    rng = random.Random(2)
    ids = [rng.getrandbits(160) for _ in range(1000)]
    by_chance = 0
    for _ in range(1000):
        target = rng.getrandbits(160)
        near = distances(ids, target)
        by_chance += is_crowded(near, 1000)
        planted = [target ^ rng.getrandbits(140) for _ in range(8)]
        assert is_crowded(distances(ids + planted, target), 1000)
    assert by_chance <= 3
    assert not is_crowded([1, 2, 3], 3)
    assert expected_distance(20, 10) == SPACE
    assert expected_distance(20, 40) == SPACE // 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 1000])
def test_node_that_made_lookups_knows_the_size_of_its_network(n: int) -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, n)
        for node in nodes[:5]:
            await measure_lookups(net, [node], 20, living=nodes)
            assert 0.75 * n <= node.estimated_nodes <= 1.25 * n
            assert node.statistics()["nodes_estimated"] == node.estimated_nodes

    run(body)


def test_estimate_is_worked_out_again_after_the_table_or_the_samples_changed_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(own_id: int, ids: Iterable[int], full: int) -> tuple[float, float]:
        calls.append(1)
        return from_table(own_id, ids, full)

    monkeypatch.setattr("fastcas.dht.protocol.from_table", counted)

    async def body(net: VirtualNet) -> None:
        protocol = (await net.node(1)).protocol
        rng = random.Random(3)

        def change(number: int) -> None:
            contacts = list(protocol.router)
            match rng.randrange(4):
                case 0 if contacts:
                    protocol.router.remove_contact(rng.choice(contacts))
                case 1 if number >= 200:  # before, the table alone decides
                    target, ids = rng.getrandbits(160), [rng.getrandbits(160) for _ in range(99)]
                    protocol.size.note(target, distances(ids, target), is_all=False)
                case 2 if contacts:  # it moved to another address
                    protocol.router.add_verified(Contact(rng.choice(contacts).id, "10.9.9.9", rng.randrange(1, 9)), 1.0)
                case _:
                    protocol.router.add_verified(Contact(rng.randbytes(20), f"10.1.1.{rng.randrange(255)}", 1), 1.0)

        for number in range(300):
            change(number)
            n_calls = len(calls)
            found = {protocol.estimated_nodes() for _ in range(5)}
            assert len(calls) <= n_calls + 1
            own = from_table(protocol.source_node.long_id, (contact.long_id for contact in protocol.router), 20)
            assert found == {protocol.size.estimate(own) + 1}

    run(body)


@pytest.mark.slow
def test_nodes_know_the_size_within_a_factor_of_two_soon_after_many_joined_at_the_same_time() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(120)
        await asyncio.sleep(20)
        estimates = sorted(node.estimated_nodes for node in nodes)
        # Tables that filled in a storm are uneven; the refreshes of the next hour bring them within a quarter.
        assert estimates[12] >= 120 / 2
        assert estimates[-12] <= 2 * 120
        assert 0.75 * 120 <= estimates[60] <= 1.25 * 120

    run(body)
