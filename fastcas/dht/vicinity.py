"""Everybody around a target, also when somebody has planted nodes there.

A lookup ends with the 20 nearest nodes; 20 planted ones hide all others, since their neighbours have no room for
more in their replies. So where more nodes are than there should be, the key space around the target is looked at piece
by piece: one lookup into each half that the target is not in, from the size in which 20 nodes are expected down.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from fastcas.dht.budgets import KSIZE
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.network_size import expected_distance, is_crowded
from fastcas.dht.protocol import FcProtocol

__all__ = ["Vicinity"]


class Vicinity:
    """The surroundings of one target, as far as 20 nodes are expected.

    Args:
        protocol: Sends for us.
        target: The 160-bit number.
    """

    def __init__(self, protocol: FcProtocol, target: int) -> None:
        """Judge by the estimated size of the network; nothing is sent."""
        self._protocol = protocol
        self._target = target
        self._n_nodes = protocol.estimated_nodes()
        self.reach = expected_distance(KSIZE, self._n_nodes)
        # Numbers that share so many leading bits with the target are at most twice as far as `reach`.
        self.depth = max(160 - self.reach.bit_length(), 0)

    def is_crowded(self, nodes: Sequence[Contact]) -> bool:
        """Whether more nodes are near the target than there should be; `nodes` are the nearest ones in order."""
        return is_crowded([node.long_id ^ self._target for node in nodes], self._n_nodes)

    async def everybody(self, nodes: Sequence[Contact]) -> tuple[list[Contact], int]:
        """Return the live nodes around the target, nearest first, and the number of bits within which they are all.

        Cost: about seven lookups; their budgets hold.
        """
        found = {node.id: node for node in nodes}
        expected = self._n_nodes / (1 << self.depth)
        async with asyncio.TaskGroup() as group:
            tasks = []
            for bit in range(159 - self.depth, -1, -1):
                expected /= 2
                if expected < 0.25:
                    break
                piece = ((self._target >> bit) ^ 1) << bit | secrets.randbits(bit)
                k = min(KSIZE, 4 + round(2 * expected))
                tasks.append((bit, k, group.create_task(Lookup(self._protocol, piece, k=k, seeds=nodes).run())))
        depth = self.depth
        for bit, k, task in tasks:
            inside = [node for node in task.result().nodes if (node.long_id ^ self._target) >> bit == 1]
            if len(inside) >= k:
                depth = 160 - bit  # more than expected: there may be others in this piece
            found.update((node.id, node) for node in inside)
        return sorted(found.values(), key=lambda node: node.long_id ^ self._target), depth
