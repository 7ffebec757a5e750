"""Storing many records with the nodes that are responsible for them: grouped by holder, many records per datagram.

Owns the windows: datagrams in flight in all (256) and per holder (4, growing to 32 while it keeps up, halved when
it does not). A holder that fails twice, has no room, or asked us to wait is replaced by the next nearest one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import (
    KSIZE,
    SPARSE_KEYS,
    WALKERS,
    WINDOW_NODE_FIRST,
    WINDOW_NODE_MAX,
    WINDOW_TOTAL,
    WRITE_HARD_S,
)
from fastcas.dht.contacts import Contact
from fastcas.dht.holders import HolderBook, Pacer
from fastcas.dht.lookup import Lookup
from fastcas.dht.protocol import FcProtocol, Reply
from fastcas.dht.regions import Region, allocate, id_key, walk, within_reach
from fastcas.dht.vicinity import Vicinity
from fastcas.dht.wire import FULL, OK

__all__ = ["NOTHING_SENT", "Sweep", "SweepReport", "sparse_keys"]

log = logging.getLogger(__name__)

Batch = Callable[[npt.NDArray[np.intp]], tuple[str, list[Any]]]


WRITE_BYTES = 171  # of a request and its answer beside the records, IP and UDP headers included
LOOKUP_RPC_BYTES = 1000  # of one request of a walk and its answer


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What became of a sweep.

    Attributes:
        n_stored: Records that somebody holds (this node counts).
        copies: Copies stored with others.
        n_nodes: Nodes that the walk met: about the size of the network when the keys lie everywhere.
        lookups, datagrams: What it cost; datagrams are those with records.
        bytes: Estimate of all traffic, both directions, IP and UDP headers included.
    """

    n_stored: int
    copies: int
    n_nodes: int
    lookups: int
    datagrams: int
    bytes: int


NOTHING_SENT = SweepReport(0, 0, 0, 0, 0, 0)


class Sweep:
    """One sweep over records with sorted, distinct 64-bit keys.

    Args:
        protocol: Sends for us.
        keys: uint64[n], sorted.
        r: Holders per record.
        per_datagram: Records in one datagram.
        batch: Returns (name, arguments) of the request that stores the records at some positions.
        counts_self: Whether this node is a holder for what it is nearest to (it answers for its own records).
        ttl_s: For how long the records are stored.
        pacer: Spaces the datagrams.
        book: Learns who holds the records, and knows who asked to wait.
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
        ttl_s: float,
        pacer: Pacer,
        book: HolderBook,
    ) -> None:
        """Prepare; `run` does it."""
        self._protocol = protocol
        self._keys = keys
        self._r = r
        self._per_datagram = per_datagram
        self._batch = batch
        self._counts_self = counts_self
        self._ttl_s = ttl_s
        self._pacer = pacer
        self._book = book
        self._copies = np.zeros(len(keys), dtype=np.uint16)
        self._own = np.zeros(len(keys), dtype=bool)
        self._met: set[Contact] = set()
        self._datagrams = 0
        self._bytes = 0
        self._total = asyncio.Semaphore(WINDOW_TOTAL)
        self._windows: dict[Contact, _Window] = {}

    async def run(self) -> SweepReport:
        """Store everything; never raises for what other nodes do."""
        n_nodes = self._protocol.estimated_nodes() if self._r < KSIZE else 0
        sparse = sparse_keys(self._keys, n_nodes)
        dense = np.flatnonzero(~sparse)

        async def dense_region(region: Region) -> None:
            await self._region(dense[region.first : region.last], region.nodes)

        asked_before = self._protocol.counters["rpc_fn"]
        async with asyncio.TaskGroup() as group:
            walking = group.create_task(walk(self._protocol, self._keys[dense], dense_region, r=self._r))
            alone = group.create_task(self._one_by_one(np.flatnonzero(sparse)))
        # Lookups of others meanwhile, a table that is refreshed say, are counted, too.
        self._bytes += LOOKUP_RPC_BYTES * (self._protocol.counters["rpc_fn"] - asked_before)
        stored = int(np.count_nonzero((self._copies > 0) | self._own))
        lookups = walking.result() + alone.result()
        return SweepReport(
            stored, int(self._copies.sum()), len(self._met), lookups, self._datagrams, self._bytes
        )

    async def _one_by_one(self, positions: npt.NDArray[np.intp]) -> int:
        """Store keys that have no neighbours: a lookup that only finds their own holders is cheaper than a region."""
        todo = iter(positions.tolist())

        async def walker() -> None:
            for position in todo:
                target = int(self._keys[position]) << 96
                nodes = (await Lookup(self._protocol, target, k=self._r).run()).nodes
                vicinity = Vicinity(self._protocol, target)
                if vicinity.is_crowded(nodes):  # somebody planted nodes there: whoever is behind them holds it, too
                    nodes, _ = await vicinity.everybody(nodes)
                await self._region(np.array([position], dtype=np.intp), nodes)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(WALKERS, len(positions))):
                group.create_task(walker())
        return len(positions)

    async def _region(self, positions: npt.NDArray[np.intp], nodes: list[Contact]) -> None:
        """Store the records at `positions` with the nearest of the `nodes` found there."""
        self._met.update(nodes)
        me = len(nodes)
        ids = [id_key(node.id) for node in nodes]
        if self._counts_self:
            ids.append(id_key(self._protocol.identity.node_id))
        if not ids:
            return
        keys, places = self._keys[positions], np.array(ids, dtype=np.uint64)
        nearest = allocate(keys, places, min(2 * self._r, len(ids)))
        takes = within_reach(keys, places, nearest, self._protocol.estimated_nodes(), self._r)
        if self._counts_self:
            self._own[positions[takes[:, me]]] = True
        region = _Allocated(positions, nodes, nearest)
        async with asyncio.TaskGroup() as group:
            for number in range(len(nodes)):
                rows = np.flatnonzero(takes[:, number])
                if len(rows):
                    group.create_task(self._store_or_replace(region, number, rows))

    async def _store_or_replace(self, region: _Allocated, number: int, rows: npt.NDArray[np.intp]) -> None:
        """Store the region's records at `rows` with a node; what it does not take goes to the next nearest."""
        failed = await self._store(region, number, rows)
        for rank in range(self._r, region.nearest.shape[1]):
            if not len(failed):
                return
            again: list[npt.NDArray[np.intp]] = []
            substitutes = region.nearest[failed, rank]
            for substitute in np.unique(substitutes).tolist():
                mine = failed[substitutes == substitute]
                if substitute == len(region.nodes):
                    self._own[region.positions[mine]] = True
                else:
                    again.append(await self._store(region, substitute, mine))
            failed = np.concatenate(again) if again else np.zeros(0, dtype=np.intp)

    async def _store(
        self, region: _Allocated, number: int, rows: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.intp]:
        """Send the region's records at `rows` to one of its nodes; return the rows that it did not take."""
        node = region.nodes[number]
        window = self._windows.get(node)
        if window is None:
            window = self._windows[node] = _Window()
        parts = [rows[i : i + self._per_datagram] for i in range(0, len(rows), self._per_datagram)]
        failed: list[npt.NDArray[np.intp]] = []
        misses = 0
        async with asyncio.TaskGroup() as group:

            async def send(part: npt.NDArray[np.intp]) -> None:
                nonlocal misses
                positions = region.positions[part]
                reply: Reply | None = None
                try:
                    async with self._total:
                        reply = await self._write(node, positions)
                finally:
                    window.release(kept_up=reply is not None)
                accepted, retry_after_s = _verdict(reply)
                if accepted:
                    self._copies[positions] += 1
                    self._book.stored(node, self._ttl_s, retry_after_s)
                    misses = 0
                else:
                    failed.append(part)
                    misses += 1
                if retry_after_s and not accepted:
                    self._book.refused(node, retry_after_s)

            for part in parts:
                await window.acquire()
                if misses >= 2 or self._book.is_waiting(node):
                    window.release(kept_up=False)
                    failed.append(part)
                else:
                    group.create_task(send(part))
        return np.concatenate(failed) if failed else np.zeros(0, dtype=np.intp)

    async def _write(self, node: Contact, part: npt.NDArray[np.intp]) -> Reply | None:
        has_token = self._protocol.has_token(node.address)
        await self._pacer.take(1 if has_token else 2)
        name, args = self._batch(part)
        self._datagrams += 1
        self._bytes += WRITE_BYTES + sum(len(arg) for arg in args if isinstance(arg, bytes))
        return await self._protocol.write(node, name, args, hard_s=WRITE_HARD_S)


@dataclass(frozen=True, slots=True)
class _Allocated:
    """Records and who is to hold them.

    Attributes:
        positions: Of the records among all keys.
        nodes: Whom to ask; one more number, len(nodes), is this node itself.
        nearest: For each record the numbers of its nearest nodes, nearest first.
    """

    positions: npt.NDArray[np.intp]
    nodes: list[Contact]
    nearest: npt.NDArray[np.intp]


def sparse_keys(keys: npt.NDArray[np.uint64], n_nodes: int) -> npt.NDArray[np.bool_]:
    """Return which keys have fewer than `SPARSE_KEYS` others within the span of 20 nodes around them."""
    if n_nodes <= 2 * KSIZE:
        return np.zeros(len(keys), dtype=bool)
    reach = np.uint64((1 << 64) * KSIZE // n_nodes // 2)
    low = np.where(keys > reach, keys - reach, np.uint64(0))
    high = np.where(keys < np.uint64((1 << 64) - 1) - reach, keys + reach, np.uint64((1 << 64) - 1))
    around = np.searchsorted(keys, high, side="right") - np.searchsorted(keys, low, side="left")
    return around <= SPARSE_KEYS


def _verdict(reply: Reply | None) -> tuple[bool, int]:
    """Return whether records were taken, and for how many seconds their holder wants no more."""
    match reply:
        case Reply(status=status, elements=[int(count), *rest]):
            asked = rest[0] if rest and isinstance(rest[0], int) else 0
            return status == OK and count > 0, max(asked, 0) if status in (OK, FULL) else 0
    return False, 0


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
