"""What lookups among 1,000 nodes find and cost: all alive, some silently dead, some loss."""

from __future__ import annotations

import random

import pytest

from fastcas.dht.provided import chunk_key, keys_of
from tests.support.dht_sim import ideal_network, kill_share, measure_lookups
from tests.support.virtual_net import VirtualNet, run

LOOKUPS = 40


@pytest.mark.slow
def test_lookups_find_the_nearest_20_of_1000_whatever_part_is_silently_dead() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, 1000)
        figures = await measure_lookups(net, nodes, LOOKUPS)
        assert figures.recall >= 0.99, figures
        assert figures.rpcs <= 30, figures
        assert figures.p99_s <= 1.0, figures
        net.loss = 0.05
        figures = await measure_lookups(net, nodes, LOOKUPS)
        assert figures.recall >= 0.98, figures
        assert figures.p50_s <= 1.0, figures
        net.loss = 0.0
        for dead, recall, p50_s, p99_s in ((0.1, 0.99, 1.5, 2.5), (0.3, 0.95, 2.5, 4.0), (0.5, 0.90, 3.5, 6.0)):
            living = [node for node in nodes if not node.is_closed]
            living = kill_share(net, living, (dead * 1000 - (1000 - len(living))) / len(living))
            assert len(living) == round(1000 * (1 - dead))
            figures = await measure_lookups(net, living, LOOKUPS)
            assert figures.recall >= recall, (dead, figures)
            assert figures.p50_s <= p50_s, (dead, figures)
            assert figures.p99_s <= p99_s, (dead, figures)
            assert figures.rpcs_max <= 120, (dead, figures)

    run(body)


@pytest.mark.slow
def test_every_chunk_that_a_living_node_knows_of_is_found_whatever_part_is_dead() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, 300)
        hashes = random.Random(7).randbytes(32 * 2000)
        publisher, *others = nodes
        assert await publisher.announcer.announce_chunks(keys_of(hashes)) == 2000
        for n_dead, share in ((0, 1.0), (90, 0.999), (150, 0.99)):
            living = [node for node in others if not node.is_closed]
            net.kill(net.rng.sample(living, n_dead - (len(others) - len(living))))
            living = [node for node in living if not node.is_closed]
            keys = [chunk_key(hashes[at : at + 32]) for at in range(0, len(hashes), 32)]
            held = sum(any(node.protocol.hints.get(key, 1) for node in living) for key in keys)
            start = net.loop.time()
            found = await net.rng.choice(living).finder.find_chunks(hashes, 4, 60.0, lambda news: None)
            assert found >= share * 2000, n_dead
            assert found >= held - 2, n_dead
            assert net.loop.time() - start <= 10.0, n_dead

    run(body)
