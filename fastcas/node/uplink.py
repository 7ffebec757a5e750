"""Whether this node's uplink has more to send than it should: what its workers count, all of them together.

The same rule by which a worker answers "busy" (csrc/engine/slots.c), read from the counters in shared memory, which are
at most 20 ms old while anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastcas.limits import UPLINK_WAIT_S
from fastcas.table import Counters

__all__ = ["is_busy"]


def is_busy(counters: Counters, slots: Iterable[int]) -> bool:
    """Return whether more waits than the uplink sends in UPLINK_WAIT_S; not while its rate is not known.

    Args:
        counters: The node's.
        slots: Of its workers.
    """
    waiting = rate = 0
    for slot in slots:
        waiting += counters.get(slot, "queue_bytes")
        rate += counters.get(slot, "uplink_rate")
    return rate > 0 and waiting > UPLINK_WAIT_S * rate
