"""Storing many records with the nodes that are responsible for them: grouped by holder, many records per datagram.

Owns the windows: datagrams in flight in all (256) and per holder (4, growing to 32 while it keeps up, halved when
it does not). A holder that fails twice is replaced by the next nearest one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import WINDOW_NODE_FIRST, WINDOW_NODE_MAX, WINDOW_TOTAL, WRITE_HARD_S
from fastcas.dht.contacts import Contact
from fastcas.dht.protocol import FcProtocol, Reply
from fastcas.dht.regions import Region, allocate, id_key, walk, within_reach
from fastcas.dht.wire import FULL, OK

__all__ = ["Sweep", "SweepReport"]

log = logging.getLogger(__name__)

Batch = Callable[[npt.NDArray[np.intp]], tuple[str, list[Any]]]


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What became of a sweep.

    Attributes:
        n_stored: Records that somebody holds (this node counts).
        copies: Copies stored with others.
        holders: Who holds any of them.
        lookups, datagrams: What it cost.
    """

    n_stored: int
    copies: int
    holders: set[Contact]
    lookups: int
    datagrams: int


class Sweep:
    """One sweep over records with sorted, distinct 64-bit keys.

    Args:
        protocol: Sends for us.
        keys: uint64[n], sorted.
        r: Holders per record.
        per_datagram: Records in one datagram.
        batch: Returns (name, arguments) of the request that stores the records at some positions.
        counts_self: Whether this node is a holder for what it is nearest to (it answers for its own records).
    """

    def __init__(
        self,
        protocol: FcProtocol,
        keys: npt.NDArray[np.uint64],
        *,
        r: int,
        per_datagram: int,
        batch: Batch,
        counts_self: bool,
    ) -> None:
        """Prepare; `run` does it."""
        self._protocol = protocol
        self._keys = keys
        self._r = r
        self._per_datagram = per_datagram
        self._batch = batch
        self._counts_self = counts_self
        self._copies = np.zeros(len(keys), dtype=np.uint16)
        self._own = np.zeros(len(keys), dtype=bool)
        self._holders: set[Contact] = set()
        self._datagrams = 0
        self._total = asyncio.Semaphore(WINDOW_TOTAL)
        self._windows: dict[Contact, _Window] = {}

    async def run(self) -> SweepReport:
        """Walk the regions and store everything; never raises for what other nodes do."""
        lookups = await walk(self._protocol, self._keys, self._region, r=self._r)
        stored = int(np.count_nonzero((self._copies > 0) | self._own))
        return SweepReport(stored, int(self._copies.sum()), self._holders, lookups, self._datagrams)

    async def _region(self, region: Region) -> None:
        positions = np.arange(region.first, region.last, dtype=np.intp)
        me = len(region.nodes)
        ids = [id_key(node.id) for node in region.nodes]
        if self._counts_self:
            ids.append(id_key(self._protocol.identity.node_id))
        if not ids:
            return
        keys = self._keys[region.first : region.last]
        places = np.array(ids, dtype=np.uint64)
        nearest = allocate(keys, places, min(2 * self._r, len(ids)))
        takes = within_reach(keys, places, nearest, self._protocol.estimated_nodes(), self._r)
        if self._counts_self:
            self._own[positions[takes[:, me]]] = True
        async with asyncio.TaskGroup() as group:
            for number, node in enumerate(region.nodes):
                mine = np.flatnonzero(takes[:, number])
                if len(mine):
                    group.create_task(self._store_or_replace(region, node, mine, nearest))

    async def _store_or_replace(
        self, region: Region, node: Contact, rows: npt.NDArray[np.intp], nearest: npt.NDArray[np.intp]
    ) -> None:
        """Store the region's records at `rows` with a node; what it does not take goes to the next nearest."""
        failed = await self._store(node, rows + region.first)
        for rank in range(self._r, nearest.shape[1]):
            if not len(failed):
                return
            again: list[npt.NDArray[np.intp]] = []
            substitutes = nearest[failed - region.first, rank]
            for number in np.unique(substitutes).tolist():
                positions = failed[substitutes == number]
                if number == len(region.nodes):
                    self._own[positions] = True
                else:
                    again.append(await self._store(region.nodes[number], positions))
            failed = np.concatenate(again) if again else np.zeros(0, dtype=np.intp)

    async def _store(self, node: Contact, positions: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Send records to one holder; return the positions that it did not take."""
        window = self._windows.get(node)
        if window is None:
            window = self._windows[node] = _Window()
        parts = [positions[i : i + self._per_datagram] for i in range(0, len(positions), self._per_datagram)]
        failed: list[npt.NDArray[np.intp]] = []
        misses = 0
        async with asyncio.TaskGroup() as group:

            async def send(part: npt.NDArray[np.intp]) -> None:
                nonlocal misses
                reply: Reply | None = None
                try:
                    async with self._total:
                        name, args = self._batch(part)
                        reply = await self._protocol.write(node, name, args, hard_s=WRITE_HARD_S)
                    self._datagrams += 1
                finally:
                    window.release(kept_up=reply is not None)
                if _accepted(reply):
                    self._copies[part] += 1
                    self._holders.add(node)
                    misses = 0
                else:
                    failed.append(part)
                    misses += 2 if reply is not None and reply.status == FULL else 1

            for part in parts:
                await window.acquire()
                if misses >= 2:
                    window.release(kept_up=False)
                    failed.append(part)
                else:
                    group.create_task(send(part))
        return np.concatenate(failed) if failed else np.zeros(0, dtype=np.intp)


def _accepted(reply: Reply | None) -> bool:
    match reply:
        case Reply(status=status, elements=[int(count), *_]):
            return status == OK and count > 0
    return False


class _Window:
    """How many datagrams may be on their way to one holder."""

    def __init__(self) -> None:
        self._size = float(WINDOW_NODE_FIRST)
        self._in_flight = 0
        self._waiters: list[asyncio.Future[None]] = []

    async def acquire(self) -> None:
        while self._in_flight >= int(self._size):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        self._in_flight += 1

    def release(self, *, kept_up: bool) -> None:
        self._in_flight -= 1
        self._size = min(self._size + 1.0 / 4.0, WINDOW_NODE_MAX) if kept_up else max(self._size / 2.0, 1.0)
        while self._waiters and self._in_flight < int(self._size):
            waiter = self._waiters.pop(0)
            if not waiter.done():
                waiter.set_result(None)
                break
