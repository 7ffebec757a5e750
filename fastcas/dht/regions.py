"""The key space region by region: which live nodes are responsible for which of many sorted keys.

One lookup finds the 20 live nodes nearest to a key, and thereby all nodes below a common prefix; every own key
below that prefix is allocated to its nearest nodes without another lookup. In a small network one lookup covers
everything. Keys are the top 64 bits of 160-bit keys; distances on them decide like distances on all bits but for
ids that share 64 bits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import KSIZE, WALKERS
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.protocol import FcProtocol

__all__ = ["Region", "allocate", "walk"]

U64 = npt.NDArray[np.uint64]
ROWS = 16_384  # keys per block of the distance matrix: 20 nodes x 16,384 x 8 B = 2.6 MB


@dataclass(frozen=True, slots=True)
class Region:
    """A run of sorted keys and the live nodes that are nearest to them.

    Attributes:
        first, last: The run is keys[first:last].
        nodes: Live nodes, nearest to the run's first key first; without this node.
    """

    first: int
    last: int
    nodes: list[Contact]


def allocate(keys: U64, ids: U64, r: int) -> npt.NDArray[np.intp]:
    """Return intp[len(keys), min(r, len(ids))]: for each key the positions of its nearest ids, nearest first.

    Cost: 0.3 us per key at 20 ids.
    """
    r = min(r, len(ids))
    nearest = np.empty((len(keys), r), dtype=np.intp)
    for start in range(0, len(keys), ROWS):
        distance = keys[start : start + ROWS, None] ^ ids[None, :]
        if r < len(ids):
            part = np.argpartition(distance, r - 1, axis=1)[:, :r]
        else:
            part = np.broadcast_to(np.arange(r), distance.shape)
        order = np.argsort(np.take_along_axis(distance, part, axis=1), axis=1, kind="stable")
        nearest[start : start + ROWS] = np.take_along_axis(part, order, axis=1)
    return nearest


def id_key(node_id: bytes) -> int:
    """Return the top 64 bits of a node id."""
    return int.from_bytes(node_id[:8])


async def walk(
    protocol: FcProtocol, keys: U64, on_region: Callable[[Region], Awaitable[None]], *, walkers: int = WALKERS
) -> int:
    """Cover sorted distinct `keys` with regions, calling `on_region` for each; return the number of lookups.

    The first lookup decides: if it covers everything that was all, else several walkers share the rest.
    `on_region` runs beside the walk, and all of its calls have ended when this returns.
    """
    if not len(keys):
        return 0
    known: dict[bytes, Contact] = {}
    lookups = 0

    async def one(first: int, limit: int) -> int:
        """Cover a region that begins at keys[first]; return where it ends, at most `limit`."""
        nonlocal lookups
        target = int(keys[first]) << 96
        seeds = _nearest_known(known.values(), target)
        result = await Lookup(protocol, target, k=KSIZE, seeds=seeds).run()
        lookups += 1
        for contact in result.nodes:
            known[contact.id] = contact
        last = min(_region_end(keys, first, target, result.nodes), limit)
        group.create_task(_call(on_region, Region(first, last, result.nodes)))
        return last

    async def walker(first: int, limit: int) -> None:
        while first < limit:
            first = await one(first, limit)

    async with asyncio.TaskGroup() as group:
        done = await one(0, len(keys))
        left = len(keys) - done
        if left:
            bounds = [done + left * i // walkers for i in range(walkers + 1)]
            for first, limit in pairwise(bounds):
                if first < limit:
                    group.create_task(walker(first, limit))
    return lookups


async def _call(on_region: Callable[[Region], Awaitable[None]], region: Region) -> None:
    await on_region(region)


def _nearest_known(known: Iterable[Contact], target: int) -> list[Contact]:
    return sorted(known, key=lambda contact: contact.long_id ^ target)[:KSIZE]


def _region_end(keys: U64, first: int, target: int, nodes: list[Contact]) -> int:
    """Return the position after the last key for which `nodes` is known to be complete."""
    if len(nodes) < KSIZE:
        return len(keys)
    common = 160 - (nodes[-1].long_id ^ target).bit_length()
    depth = min(common + 1, 64)
    last_key = (target >> 96) | ((1 << (64 - depth)) - 1)
    return max(int(np.searchsorted(keys, np.uint64(last_key), side="right")), first + 1)
