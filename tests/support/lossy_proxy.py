"""A UDP network that loses, repeats, reorders, delays and damages: a proxy between real nodes on loopback.

Every node is bound to an address of its own that nobody else learns, and is known to the others by a socket of the
proxy. What a node sends to another's socket leaves from its own one, so that sources are what the others know. The
same seed makes the same decisions; their times are the real ones.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

Address = tuple[str, int]
MTU_PAYLOAD = 1232  # IPv6's smallest MTU less IP and UDP headers


class _Side(asyncio.DatagramProtocol):
    """The proxy's socket that stands for one node."""

    def __init__(self, proxy: LossyProxy, node: Address) -> None:
        self.proxy = proxy
        self.node = node

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.proxy.carry(addr[:2], self, data)


class LossyProxy:
    """Rates are shares of all datagrams; `delay_s` is the longest ordinary delay, late ones take ten times as long."""

    def __init__(
        self,
        *,
        seed: int = 1,
        loss: float = 0.05,
        repeat: float = 0.02,
        late: float = 0.05,
        damage: float = 0.02,
        delay_s: float = 0.004,
    ) -> None:
        self.rng = random.Random(seed)
        self.loss, self.repeat, self.late, self.damage = loss, repeat, late, damage
        self.delay_s = delay_s
        self.count: Counter[str] = Counter()
        self._sides: dict[Address, _Side] = {}

    async def stand_for(self, node: Address, face: Address) -> Address:
        """Be `face` to the others for the node at `node`; return the face."""
        loop = asyncio.get_running_loop()
        _, side = await loop.create_datagram_endpoint(lambda: _Side(self, node), local_addr=face)
        self._sides[node] = side
        bound: Address = side.transport.get_extra_info("sockname")[:2]
        return bound

    def carry(self, source: Address, to: _Side, data: bytes) -> None:
        self.count["datagrams"] += 1
        side = self._sides.get(source)
        if side is None:
            self.count["from strangers"] += 1
        elif len(data) > MTU_PAYLOAD:
            self.count["too big"] += 1
        elif self.rng.random() < self.loss:
            self.count["lost"] += 1
        else:
            n_copies = 1 + (self.rng.random() < self.repeat)
            self.count["repeated"] += n_copies - 1
            for _ in range(n_copies):
                self._forward(side, to.node, data)

    def _forward(self, side: _Side, node: Address, data: bytes) -> None:
        if data and self.rng.random() < self.damage:
            self.count["damaged"] += 1
            at = self.rng.randrange(len(data))
            data = data[:at] + bytes((data[at] ^ 1 << self.rng.randrange(8),)) + data[at + 1 :]
        delay_s = self.rng.random() * self.delay_s
        if self.rng.random() < self.late:
            self.count["late"] += 1
            delay_s += 10 * self.delay_s
        asyncio.get_running_loop().call_later(delay_s, side.transport.sendto, data, node)

    def close(self) -> None:
        for side in self._sides.values():
            side.transport.close()
