"""The publisher hands on a new chunk table only when it must."""

import asyncio
import os
from array import array
from typing import Any

from fastcas.node.publisher import Publisher
from fastcas.table import Counters

BATCH, N_BATCHES = 1000, 20


def test_a_load_that_was_announced_makes_one_table() -> None:
    handed: list[str] = []

    def publish(
        to: str, key: str, message: dict[str, Any] | None, fds: list[int], forward: dict[str, Any] | None
    ) -> None:
        for fd in fds:
            os.close(fd)
        handed.append(key)

    async def load(announced: int) -> int:
        handed.clear()
        publisher = Publisher(asyncio.get_running_loop(), publish, Counters.create(1))
        publisher.publish_loaded()
        publisher.on_load(announced)
        publisher.on_blob(1, b"/blob", 1, 1, BATCH * N_BATCHES, 1, False)
        for i in range(N_BATCHES):
            keys = os.urandom(32 * BATCH)
            publisher.on_chunks(1, keys, array("Q", range(i * BATCH, (i + 1) * BATCH)), array("I", [1] * BATCH))
        await asyncio.sleep(0)
        publisher.close()
        return len(handed)

    assert asyncio.run(load(BATCH * N_BATCHES)) == 2  # the empty one, and one for all
    assert asyncio.run(load(0)) > 4
