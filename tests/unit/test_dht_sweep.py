"""Announcing in virtual time: what a sweep costs and where it puts keys, pacing, refusals, budget, restarts, policy."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from fastcas.dht.announcer import chunk_holders
from fastcas.dht.budgets import BACKOFF_MAX_S, HOLDERS_CHUNK_MAX, NODES_FOR_ALL_CHUNKS
from fastcas.dht.contacts import Contact
from fastcas.dht.holders import HolderBook, Pacer
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from fastcas.dht.sweep import sparse_keys
from tests.support.sweep_net import U64, full_network, placed_share, traffic
from tests.support.virtual_net import DATA_PORT, VirtualNet, address_of, run

FILE = bytes(range(32))


def some_keys(n: int, seed: int = 7) -> U64:
    return keys_of(random.Random(seed).randbytes(32 * n))


async def found_chunks(node: FcServer, hashes: bytes) -> int:
    return await node.finder.find_chunks(hashes, 4, 60.0, lambda news: None)


@pytest.mark.slow
def test_100000_keys_in_1000_nodes_within_time_requests_bytes_and_places() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await full_network(net, 1000)
        keys = some_keys(100_000)
        with traffic(net) as seen:
            assert await nodes[3].announcer.announce_chunks(keys) == len(keys)
        assert seen.seconds <= 10.0
        assert seen.requests <= 9000
        assert seen.bytes <= 10e6
        assert seen.ap_keys / seen.ap >= 100
        assert net.largest <= 1200
        assert placed_share(nodes, nodes[3], keys[::5]) >= 0.99
        report = nodes[3].announcer.last_report
        assert report is not None
        assert report.bytes == pytest.approx(seen.bytes, rel=0.1)
        assert report.n_nodes >= 950

    run(body)


@pytest.mark.slow
def test_keys_far_apart_are_placed_one_by_one_for_fewer_requests_than_by_regions() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await full_network(net, 300)
        costs = []
        for number in range(4):
            publisher = nodes[10 * number]
            with traffic(net) as seen:
                assert await publisher.announcer.announce_chunks(some_keys(1, seed=number)) == 1
            costs.append(seen.requests)
            assert placed_share(nodes, publisher, some_keys(1, seed=number)) == 1.0
        assert sum(costs) / 4 <= 28  # a region of 20 nodes takes 34

    run(body)


def test_few_keys_get_twelve_holders_and_many_eight() -> None:
    assert [chunk_holders(n) for n in (0, 1, 20_000, 66_666, 80_000, 100_000, 10_000_000)] == [12, 12, 12, 12, 10, 8, 8]

    async def body(net: VirtualNet) -> None:
        nodes = await full_network(net, 100)
        keys = some_keys(500)
        assert await nodes[3].announcer.announce_chunks(keys) == len(keys)
        assert placed_share(nodes, nodes[3], keys, 12) >= 0.99
        assert sum(node.protocol.hints.n_hints for node in nodes) <= 12 * len(keys)

    run(body)


def test_sparse_keys_are_those_without_two_neighbours_within_twenty_nodes() -> None:
    rng = random.Random(3)
    keys = np.array(sorted(rng.getrandbits(64) for _ in range(300)), dtype=np.uint64)
    reach = (1 << 64) * 20 // 1000 // 2
    expected = [sum(abs(int(a) - int(b)) <= reach for b in keys) <= 2 for a in keys]
    assert sparse_keys(keys, 1000).tolist() == expected
    assert 0 < sum(expected) < 300
    assert not sparse_keys(keys, 40).any()


def test_datagrams_are_paced() -> None:
    async def body(net: VirtualNet) -> float:
        pacer = Pacer(2000.0, net.loop.time)
        await asyncio.sleep(10.0)
        start = net.loop.time()
        await asyncio.gather(*(pacer.take() for _ in range(1000)))
        return net.loop.time() - start

    assert 0.47 <= run(body) <= 0.5


def test_a_holder_that_refuses_is_left_alone_twice_as_long_each_time() -> None:
    now = 0.0
    book = HolderBook(lambda: now)
    holder, other = Contact(b"a" * 20, "10.0.0.1", 1), Contact(b"b" * 20, "10.0.0.2", 1)
    pauses = []
    for _ in range(10):
        book.refused(holder, 60)
        start = now
        while book.is_waiting(holder):
            now += 10.0
        pauses.append(now - start)
    assert pauses == [60, 120, 240, 480, 960, 1920] + [BACKOFF_MAX_S] * 4
    assert not book.is_waiting(other)
    book.stored(holder, 100.0, 0)
    book.refused(holder, 60)
    now += 60.0
    assert not book.is_waiting(holder)  # it had accepted in between
    book.refused(holder, 1 << 40)
    now += BACKOFF_MAX_S
    assert not book.is_waiting(holder)
    book.stored(other, 50.0, 5)
    assert book.is_waiting(other)  # it took the records and asks for a pause all the same
    book.stored(holder, 1000.0, 0)
    assert book.current(9) == [holder, other]
    now += 51.0
    assert book.current(9) == [holder]
    assert book.current(0) == []


@pytest.mark.slow
def test_records_of_a_full_holder_go_to_the_next_nearest_and_it_is_not_asked_until_it_wants() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(14)
        publisher = nodes[1]
        key = some_keys(1)
        nearest = sorted(nodes, key=lambda node: int(key[0]) << 96 ^ node.protocol.source_node.long_id)
        full = next(node for node in nearest if node is not publisher)
        full.protocol.hints._limit = 0

        async def requests() -> int:
            before = publisher.protocol.counters["rpc_ap"]
            await publisher.announcer.announce_chunks(key)
            return publisher.protocol.counters["rpc_ap"] - before

        first = await requests()
        holders = [node for node in nodes if node.protocol.hints.n_hints]
        assert full not in holders
        assert len(holders) + (publisher in nearest[:HOLDERS_CHUNK_MAX]) == HOLDERS_CHUNK_MAX
        assert first == len(holders) + 1
        for pause_s, asks in ((30, 0), (31, 1), (100, 0), (21, 1)):
            await asyncio.sleep(pause_s)
            assert await requests() == len(holders) + asks
        full.protocol.hints._limit = 10
        await asyncio.sleep(241)
        await publisher.announcer.announce_chunks(key)
        assert full.protocol.hints.n_hints == 1

    run(body)


@pytest.mark.slow
def test_after_the_first_announcement_the_traffic_is_spread_and_keeps_to_the_budget() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(5)
        keys = some_keys(20_000)
        rate_Bps = 5 * len(keys) * 8 / (1.3 * 3600)  # without what is around the keys
        publisher = await net.node(999, announce_rate_Bps=rate_Bps)
        publisher.start([address_of(nodes[0])])
        publisher.announcer.set_snapshot(keys)
        await asyncio.sleep(60)
        assert placed_share([*nodes, publisher], publisher, keys) >= 0.99
        cycle_s = publisher.announcer._cycle.cycle_s(len(keys))
        assert 1.2 * 3600 < cycle_s < 1.6 * 3600
        with traffic(net) as idle:
            await asyncio.sleep(60)
        assert idle.ap_keys < 2 * 5 * len(keys) / 64
        per_ten_minutes = []
        for _ in range(8):
            with traffic(net) as seen:
                await asyncio.sleep(600)
            per_ten_minutes.append(seen.ap_keys)
        # Each slice has a lookup of its own, so a key costs more than it did in the first sweep, and all takes longer.
        longer_s = publisher.announcer._cycle.cycle_s(len(keys))
        assert cycle_s <= longer_s <= 1.5 * cycle_s
        expected = 5 * len(keys) * 600 / longer_s
        assert np.mean(per_ten_minutes) == pytest.approx(expected, rel=0.15)
        assert max(per_ten_minutes) <= 1.4 * expected
        assert min(per_ten_minutes) >= 0.6 * expected
        assert placed_share([*nodes, publisher], publisher, keys) >= 0.99

    run(body)


@pytest.mark.slow
def test_a_killed_node_that_comes_back_announces_nothing_that_its_holders_still_have(tmp_path: Path) -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        keys = some_keys(3000)

        async def start() -> FcServer:
            node = await net.node(999, state_path=tmp_path / "dht.state")
            node.start([address_of(nodes[0])])
            await asyncio.sleep(1)
            node.announcer.set_snapshot(keys)
            return node

        first = await start()
        await asyncio.sleep(20)
        assert first.protocol.counters["rpc_ap"] > 100
        net.kill([first])
        await asyncio.sleep(120)
        second = await start()
        await asyncio.sleep(20)
        assert second.protocol.counters["rpc_ap"] == 0
        assert placed_share([*nodes, second], second, keys) >= 0.99
        await second.close()  # a clean exit withdraws, so the next start has to announce all of it
        third = await start()
        await asyncio.sleep(20)
        assert third.protocol.counters["rpc_ap"] > 100
        assert placed_share([*nodes, third], third, keys) >= 0.99
        net.kill([third])
        await asyncio.sleep(3 * 3600)  # now the records are gone
        fourth = await start()
        await asyncio.sleep(20)
        assert fourth.protocol.counters["rpc_ap"] > 100
        assert placed_share([*nodes, fourth], fourth, keys) >= 0.99

    run(body)


@pytest.mark.slow
def test_joining_a_network_announces_once_and_not_each_time_the_table_grows() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(25)
        node = await net.node(999)
        node.announcer.set_snapshot(some_keys(5000))
        node.start([address_of(nodes[0])])
        await asyncio.sleep(30)
        sent = node.protocol.counters["rpc_ap"]
        assert placed_share([*nodes, node], node, some_keys(5000)) >= 0.99
        copies = HOLDERS_CHUNK_MAX * 5000 / 130
        assert sent <= 1.6 * copies

    run(body)


def test_everything_is_withdrawn_on_a_clean_exit_however_long_ago_it_was_announced() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await full_network(net, 50)  # without the upkeep that would renew tokens
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        await nodes[1].announcer.announce_chunks(keys_of(FILE))
        assert sum(node.protocol.swarms.n_records for node in nodes) >= 19
        await asyncio.sleep(20 * 60)  # tokens last ten minutes
        await nodes[1].close()
        assert sum(node.protocol.swarms.n_records for node in nodes) == 0
        assert await found_chunks(nodes[5], FILE) == 0

    run(body)


@pytest.mark.slow
def test_withdrawing_is_told_to_current_holders_only() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        net.kill(nodes[2:4])
        await asyncio.sleep(2.5 * 3600)
        before = nodes[1].protocol.counters["rpc_wd"]
        await nodes[1].announcer.withdraw([FILE])
        assert nodes[1].protocol.counters["rpc_wd"] - before == 3

    run(body)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "by_snapshot", "by_name"), [("off", 0, 0), ("rare", 0, 12), ("all", 12, 12)])
def test_policy_decides_which_chunks_are_announced(policy: str, by_snapshot: int, by_name: int) -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(20)
        node = await net.node(999, announce=policy)
        node.start([address_of(nodes[0])])
        await asyncio.sleep(5)
        stored, named = some_keys(100), some_keys(1, seed=9)
        node.announcer.set_snapshot(stored)
        await asyncio.sleep(5)
        copies = sum(n.protocol.hints.n_hints for n in nodes)
        assert copies == pytest.approx(by_snapshot * 100, rel=0.1)
        assert await node.announcer.announce_chunks(named) == (1 if by_name else 0)
        assert sum(n.protocol.hints.n_hints for n in nodes) - copies in ((by_name - 1, by_name) if by_name else (0,))
        assert await node.announcer.announce_chunks(stored[:1]) == (1 if by_name else 0)
        assert await node.announcer.announce_files([(FILE, 1000)]) == 1
        found: set[object] = set()
        await nodes[3].finder.find_file(FILE, 8, 5.0, found.update)
        assert len(found) == 1

    run(body)


def test_auto_is_all_in_small_networks_and_rare_in_large_ones() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        counts = iter((1, NODES_FOR_ALL_CHUNKS, NODES_FOR_ALL_CHUNKS + 1, 9000, 7999, 10_000))
        node.announcer._count_nodes = lambda: next(counts)
        assert [node.announcer.chunk_policy for _ in range(6)] == ["all", "all", "rare", "rare", "all", "all"]

    run(body)


def test_data_port_that_comes_later_brings_everything_out_once() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(10)
        node = await net.node(999, serves=False)
        node.start([address_of(nodes[0])])
        node.announcer.set_snapshot(some_keys(1000))
        assert await node.announcer.announce_files([(FILE, 1000)]) == 0
        await asyncio.sleep(10)
        assert sum(n.protocol.hints.n_hints for n in nodes) == 0
        node.announcer.set_data_port(DATA_PORT)
        await asyncio.sleep(10)
        assert placed_share([*nodes, node], node, some_keys(1000)) == 1.0
        assert sum(n.protocol.swarms.n_records for n in nodes) == 10
        sent = node.protocol.counters["rpc_ap"]
        node.announcer.set_data_port(DATA_PORT + 1)
        await asyncio.sleep(10)
        assert node.protocol.counters["rpc_ap"] >= 1.9 * sent
        key = int(some_keys(1000)[0])
        ports = {provider.data_port for n in nodes for provider in n.protocol.hints.get(key, 8)}
        assert ports == {DATA_PORT + 1}

    run(body)
