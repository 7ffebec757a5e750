"""Nodes come and go: what is published stays found, lookups do not slow down, upkeep stays cheap.

`FASTCAS_CHURN_NODES` and `FASTCAS_CHURN_HOURS` set the size and the virtual hours (make dht-churn: 40 nodes, 24 h).
"""

from __future__ import annotations

import os

import pytest

from tests.support.dht_churn import Churn, Hour
from tests.support.virtual_net import VirtualNet, run

NODES = int(os.environ.get("FASTCAS_CHURN_NODES", "24"))
HOURS = int(os.environ.get("FASTCAS_CHURN_HOURS", "1"))


@pytest.mark.slow
def test_network_with_sessions_of_an_hour_keeps_finding_at_the_same_speed_and_cost() -> None:
    async def body(net: VirtualNet) -> list[Hour]:
        churn = Churn(net, NODES, 3600.0)
        task = await churn.start()
        hours = []
        for number in range(HOURS):
            hours.append(await churn.hour())
            print(f"\nhour {number + 1:2}  {hours[-1]}", flush=True)
        task.cancel()
        return hours

    hours = run(body)
    checks = sum(hour.checks for hour in hours)
    assert checks >= 50 * HOURS
    assert sum(hour.found for hour in hours) >= 0.99 * checks
    assert sum(hour.replaced for hour in hours) >= 0.3 * NODES * HOURS
    assert max(hour.messages for hour in hours) <= 0.5
    for hour in hours:
        assert sum(hour.recalls) / len(hour.recalls) >= 0.97
        assert hour.p50_s <= 2.0
        assert hour.p99_s <= 4.0
    third = -(-len(hours) // 3)
    first, last = hours[:third], hours[-third:]
    assert sum(hour.p50_s for hour in last) <= 1.5 * sum(hour.p50_s for hour in first)
