"""How soon a long poll hears of a new chunk: the service on a loop of virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import pytest

from fastcas.serve._engine import Parked
from fastcas.serve.swarm import SwarmService
from fastcas.table import HaveLog

FILE, MANIFEST = b"f" * 32, b"m" * 32
CHUNK_S = 0.02  # 256 KiB at 100 Mbit/s


class Loop:
    """The timers of an event loop; time passes in `run_until` only."""

    def __init__(self) -> None:
        self.now = 0.0
        self.n_fired = 0
        self._timers: list[tuple[float, int, Callable[..., None], tuple[Any, ...], list[bool]]] = []

    def call_later(self, delay: float, call: Callable[..., None], *args: Any) -> SimpleNamespace:
        is_cancelled = [False]
        heapq.heappush(self._timers, (self.now + delay, len(self._timers) + self.n_fired, call, args, is_cancelled))
        return SimpleNamespace(cancel=lambda: is_cancelled.__setitem__(0, True))

    def run_until(self, end: float) -> None:
        while self._timers and self._timers[0][0] <= end:
            self.now, _, call, args, is_cancelled = heapq.heappop(self._timers)
            if not is_cancelled[0]:
                self.n_fired += 1
                call(*args)
        self.now = end


class Peer:
    """Somebody who asks again as soon as it has an answer; `heard` has (chunk number, when)."""

    def __init__(self, n: int) -> None:
        self.loop = Loop()
        self.heard: list[tuple[int, float]] = []
        engine = SimpleNamespace(lookup_file=lambda key: None, statistics=lambda: {"sending": 0}, respond=self._hear)
        self.service = SwarmService(
            cast(Any, engine), cast(Any, self.loop), "ab" * 20, lambda message: None, None, clock=lambda: self.loop.now
        )
        self.log = HaveLog.create(FILE, MANIFEST, n)
        self.service.add_log(HaveLog.attach(self.log.fd))
        self._ask(0)

    def _ask(self, since: int) -> None:
        query = f"m={MANIFEST.hex()}&since={since}&wait_ms=5000".encode()
        parked = SimpleNamespace(handle=since, path=f"/swarm/{FILE.hex()}".encode(), query=query, ip="10.0.0.1")
        self.service.answer(cast(Parked, parked))

    def _hear(self, handle: int, status: int, fields: bytes, body: bytes) -> bool:
        answer = msgpack.unpackb(body)
        assert status == 200
        self.heard += [(number, self.loop.now) for number in answer["new"]]
        self._ask(answer["g"])
        return True


@pytest.mark.parametrize("every_s", [CHUNK_S, 1.0])
def test_news_takes_a_small_part_of_the_time_from_chunk_to_chunk(every_s: float) -> None:
    peer = Peer(50)
    came: list[float] = []
    for number in range(50):
        peer.loop.run_until(peer.loop.now + every_s)
        came.append(peer.loop.now)
        peer.log.append(number)
    peer.loop.run_until(peer.loop.now + every_s)
    assert [number for number, _ in peer.heard] == list(range(50))
    delays = [at - came[number] for number, at in peer.heard][1:]  # nothing is known of the first chunk's pace
    assert max(delays) <= every_s / 5


def test_who_waits_for_nothing_costs_little() -> None:
    peer = Peer(1)
    peer.loop.run_until(4.0)
    assert peer.loop.n_fired <= 4.0 / 0.02 + 1
