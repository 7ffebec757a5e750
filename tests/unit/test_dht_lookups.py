"""What lookups among 1,000 nodes find and cost: all alive, some silently dead, some loss."""

from __future__ import annotations

import pytest

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
