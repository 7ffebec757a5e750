"""Whether a node's uplink is busy, from its workers' counters."""

from __future__ import annotations

from fastcas.limits import UPLINK_WAIT_S
from fastcas.node.uplink import is_busy
from fastcas.table import Counters


def test_busy_is_more_than_the_uplinks_send_in_a_tenth_of_a_second_all_workers_together() -> None:
    counters = Counters.create(4)
    counters.set(1, "uplink_rate", 10_000_000)
    counters.set(2, "uplink_rate", 10_000_000)
    counters.set(3, "queue_bytes", 1 << 40)  # not one of the workers
    limit = int(20_000_000 * UPLINK_WAIT_S)
    counters.set(1, "queue_bytes", limit)
    assert not is_busy(counters, [1, 2])
    counters.set(2, "queue_bytes", 1)
    assert is_busy(counters, [1, 2])
    counters.close()


def test_an_uplink_that_nobody_has_measured_is_not_busy() -> None:
    counters = Counters.create(2)
    counters.set(1, "queue_bytes", 1 << 30)
    assert not is_busy(counters, [1])
    assert not is_busy(counters, [])
    counters.close()
