"""One search for many chunks: asks the holders of each region, rank by rank."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import HOLDERS_ASKED, HOLDERS_CHUNK, KEYS_PER_QUERY, WINDOW_TOTAL
from fastcas.dht.caches import RegionMap
from fastcas.dht.contacts import Contact
from fastcas.dht.peerlist import MayUse, Peer, parse_index, parse_peers
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.regions import Region, allocate, id_key, within_reach
from fastcas.dht.wire import OK, Field, check

__all__ = ["ChunkSearch"]

FEW_KEYS = 1000  # up to here a key is asked of three holders even after the first answer
_BLOB = Field(bytes, 0, 1200)
_GP = (_BLOB, _BLOB, _BLOB, Field(int, 0, 255), _BLOB, _BLOB)


class ChunkSearch:
    """Asks for the keys of regions until they are found or nobody is left to ask.

    Args:
        protocol: Sends for us.
        may_use: Whether a peer's address may be contacted.
        keys: uint64[n], sorted and distinct.
        is_missed: bool[n]: an earlier search found nobody a short while ago, so that three holders are enough.
        want: Peers per key.
        found: The peers of each key, kept by `take`.
        take: Gets {row: peers} of every reply, None for what must not be used.
        regions: Forgets regions in which most holders are gone.
    """

    def __init__(
        self,
        protocol: FcProtocol,
        may_use: MayUse,
        keys: npt.NDArray[np.uint64],
        is_missed: npt.NDArray[np.bool_],
        want: int,
        found: list[set[Peer]],
        take: Callable[[dict[int, list[Peer | None]]], None],
        regions: RegionMap,
    ) -> None:
        """Prepare; nothing is sent."""
        self._protocol = protocol
        self._may_use = may_use
        self._keys = keys
        self._is_missed = is_missed
        self._want = want
        self._found = found
        self._take = take
        self._regions = regions
        self._window = asyncio.Semaphore(WINDOW_TOTAL)
        self._sure = HOLDERS_ASKED if len(keys) <= FEW_KEYS else 1

    async def region(self, region: Region) -> None:
        """Ask for a region's keys: of each rank of holders what is still missing, or wants more answers.

        Where somebody may have planted nodes, everybody around is asked, whatever the planted ones said.
        """
        if not region.nodes:
            return
        keys = self._keys[region.first : region.last]
        ids = np.array([id_key(node.id) for node in region.nodes], dtype=np.uint64)
        nearest = allocate(keys, ids, HOLDERS_CHUNK)
        takes = within_reach(keys, ids, nearest, self._protocol.estimated_nodes(), HOLDERS_CHUNK)
        np.put_along_axis(takes, nearest, False, axis=1)  # these are asked first, by rank
        asked = silent = 0
        for rank in range(nearest.shape[1]):
            rows = np.flatnonzero([self._is_open(region.first + row, rank) for row in range(len(keys))])
            if not len(rows):
                break
            holders = nearest[rows, rank]
            answered = await self._ask_all(region, [(int(n), rows[holders == n]) for n in np.unique(holders)])
            asked += len(answered)
            silent += answered.count(False)
        await self._ask_all(region, [(int(n), np.flatnonzero(takes[:, n])) for n in np.flatnonzero(takes.any(axis=0))])
        if 2 * silent > asked:
            self._regions.drop(int(keys[0]))

    def _is_open(self, row: int, rank: int) -> bool:
        """Whether a key needs the answer of the holder at a rank."""
        if not self._found[row]:
            return rank < HOLDERS_ASKED or not self._is_missed[row]
        return rank < self._sure and len(self._found[row]) < self._want

    async def _ask_all(self, region: Region, parts: list[tuple[int, npt.NDArray[np.intp]]]) -> list[bool]:
        """Ask nodes of a region for rows of it; return of each datagram's worth whether it was answered."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._ask(region.nodes[number], rows[start : start + KEYS_PER_QUERY] + region.first))
                for number, rows in parts
                for start in range(0, len(rows), KEYS_PER_QUERY)
            ]
        return [task.result() for task in tasks]

    async def _ask(self, node: Contact, rows: npt.NDArray[np.intp]) -> bool:
        """Ask one holder for a datagram's worth of keys; a reply that answers only some is continued."""
        while len(rows):
            keys = self._keys[rows].astype(">u8").tobytes()
            async with self._window:
                reply = await self._protocol.ask(node, "gp", [b"", keys, min(self._want, 255)])
            if reply is None:
                return False
            if reply.status != OK or not check(reply.elements, _GP):
                return True
            peers4, peers6, index, answered = reply.elements[:4]
            peers = parse_peers(peers4, peers6, node.ip, self._may_use)
            lists = parse_index(index, answered, len(peers))
            if not lists or len(lists) > len(rows):
                return True
            self._take({int(row): [peers[i] for i in picks] for row, picks in zip(rows, lists, strict=False)})
            rows = rows[len(lists) :]
        return True
