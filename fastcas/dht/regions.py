"""The key space region by region: which live nodes are responsible for which of many sorted keys.

One lookup finds the 20 live nodes nearest to a key, and thereby all nodes below a common prefix; every own key
below that prefix is allocated to its nearest nodes without another lookup. In a small network one lookup covers
everything. Where more nodes are around a key than there should be, all of the key's vicinity becomes the region.
Keys are the top 64 bits of 160-bit keys; distances on them decide like distances on all bits but for
ids that share 64 bits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import HOLDERS_CHUNK, KSIZE, WALKERS
from fastcas.dht.caches import RegionMap
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.network_size import crowds, expected_distance
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.vicinity import Vicinity

__all__ = ["Region", "allocate", "depth_of", "id_key", "span", "walk", "within_reach"]

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


def within_reach(keys: U64, ids: U64, nearest: npt.NDArray[np.intp], n_nodes: int, r: int) -> npt.NDArray[np.bool_]:
    """Return bool[len(keys), len(ids)]: which ids are responsible for which keys.

    These are the `r` nearest, and everybody up to the distance at which the 20th nearest is expected, where somebody
    may have planted nodes: for each key with r = 20, else for keys with far more nodes near them than there should be.

    Args:
        keys, ids: 64-bit.
        nearest: What `allocate` returned for at least `r`.
        n_nodes: Estimated size of the network.
        r: Holders per key.
    """
    takes = np.zeros((len(keys), len(ids)), dtype=bool)
    np.put_along_axis(takes, nearest[:, :r], True, axis=1)
    wide = np.arange(len(keys)) if r >= KSIZE else np.flatnonzero(_crowded(keys, ids, nearest, n_nodes))
    reach = np.uint64(min(expected_distance(KSIZE, n_nodes), (1 << 160) - 1) >> 96)
    takes[wide] |= (keys[wide, None] ^ ids[None, :]) <= reach
    return takes


def _crowded(keys: U64, ids: U64, nearest: npt.NDArray[np.intp], n_nodes: int) -> npt.NDArray[np.bool_]:
    """Return which keys have far more ids near them than there should be."""
    crowded = np.zeros(len(keys), dtype=bool)
    for count, limit in crowds(n_nodes):
        if count <= nearest.shape[1]:
            crowded |= keys ^ ids[nearest[:, count - 1]] < np.uint64(limit >> 96)
    return crowded


async def walk(
    protocol: FcProtocol,
    keys: U64,
    on_region: Callable[[Region], Awaitable[None]],
    *,
    walkers: int = WALKERS,
    r: int = HOLDERS_CHUNK,
    regions: RegionMap | None = None,
) -> int:
    """Cover sorted distinct `keys` with regions, calling `on_region` for each; return the number of walks.

    The first lookup decides: if it covers everything that was all, else several walkers share the rest.
    `on_region` runs beside the walk, and all of its calls have ended when this returns. With `r` = 20 every region
    reaches as far as 20 nodes are expected, else half as far: these are found anyway if nobody lies. What `regions`
    knows is not looked up again; it learns what was.
    """
    if not len(keys):
        return 0
    known: dict[bytes, Contact] = {}
    lookups = 0

    async def one(first: int, limit: int) -> int:
        """Cover a region that begins at keys[first]; return where it ends, at most `limit`."""
        nonlocal lookups
        mapped = regions.get(int(keys[first])) if regions is not None else None
        if mapped is not None:
            last = min(_end(keys, first, mapped[0]), limit)
            group.create_task(_call(on_region, Region(first, last, mapped[1])))
            return last
        target = int(keys[first]) << 96
        seeds = _nearest_known(known.values(), target)
        vicinity = Vicinity(protocol, target)
        radius = vicinity.reach if r >= KSIZE else vicinity.reach // 2
        nodes = (await Lookup(protocol, target, k=KSIZE, radius=radius, seeds=seeds).run()).nodes
        depth = depth_of(target, nodes)
        if vicinity.is_crowded(nodes):
            nodes, depth = await vicinity.everybody(nodes)
        elif regions is not None and nodes:
            regions.put(*span(target, depth), nodes)
        lookups += 1
        for contact in nodes:
            known[contact.id] = contact
        last = min(_end(keys, first, span(target, depth)[1]), limit)
        group.create_task(_call(on_region, Region(first, last, nodes)))
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


def depth_of(target: int, nodes: list[Contact]) -> int:
    """Return how many bits a key must share with the target so that `nodes` has all who share them, too."""
    if len(nodes) < KSIZE:
        return 0
    return min(160 - (nodes[-1].long_id ^ target).bit_length() + 1, 64)


def span(target: int, depth: int) -> tuple[int, int]:
    """Return the first and the last 64-bit key that share `depth` bits with a 160-bit target."""
    below = (1 << (64 - depth)) - 1
    return (target >> 96) & ~below, (target >> 96) | below


def _end(keys: U64, first: int, last_key: int) -> int:
    """Return the position after the last key up to `last_key`, at least the one after `first`."""
    return max(int(np.searchsorted(keys, np.uint64(last_key), side="right")), first + 1)
