"""The download's timer rings at the earliest of what was asked for, and once."""

import asyncio
import time

from fastcas.fetch.alarm import Alarm

FAR_S = 3600.0


class Bell:
    """Counts the rings of an alarm, and waits for one."""

    def __init__(self) -> None:
        self.n = 0
        self._rang = asyncio.Event()
        self.alarm = Alarm(self.ring)

    def ring(self) -> None:
        self.n += 1
        self._rang.set()

    def wish(self, *delays: float) -> None:
        now = time.monotonic()
        for delay in delays:
            self.alarm.set(now + delay, now)

    async def wait(self) -> None:
        async with asyncio.timeout(30):
            await self._rang.wait()
        self._rang.clear()


async def rings(*delays: float) -> int:
    """Return how often an alarm has rung soon after its first ring."""
    bell = Bell()
    bell.wish(*delays)
    await bell.wait()
    after = Bell()
    after.wish(0.02)
    await after.wait()
    bell.alarm.cancel()
    return bell.n


def test_an_earlier_wish_takes_the_place_of_a_later_one() -> None:
    assert asyncio.run(rings(FAR_S, 0.01)) == 1


def test_a_later_wish_leaves_the_earlier_one() -> None:
    assert asyncio.run(rings(0.01, FAR_S)) == 1


def test_wishes_for_the_same_time_ring_once() -> None:
    assert asyncio.run(rings(0.01, 0.01, 0.011)) == 1


def test_a_wish_for_what_is_past_rings() -> None:
    assert asyncio.run(rings(-5.0)) == 1


def test_an_alarm_that_rang_or_was_cancelled_can_be_set_again() -> None:
    async def run() -> int:
        bell = Bell()
        for _ in range(3):
            bell.wish(0.0)
            await bell.wait()
        bell.wish(FAR_S)
        bell.alarm.cancel()
        bell.wish(FAR_S, 0.0)
        await bell.wait()
        return bell.n

    assert asyncio.run(run()) == 4
