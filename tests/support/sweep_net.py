"""A virtual network with routing tables as good as they get; what a sweep in it costs and where it puts keys."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import HOLDERS_CHUNK, KSIZE
from fastcas.dht.contacts import Contact
from fastcas.dht.regions import allocate, id_key
from fastcas.dht.server import FcServer
from fastcas.dht.wire import REQUEST, decode
from tests.support.virtual_net import VirtualNet, address_of

U64 = npt.NDArray[np.uint64]


async def full_network(net: VirtualNet, n: int, *, first: int = 1) -> list[FcServer]:
    """Return `n` listening nodes that know up to 20 others at each distance; nothing runs on them yet."""
    nodes = [await net.node(first + number) for number in range(n)]
    known = sorted((node.protocol.source_node.long_id, address_of(node)) for node in nodes)
    ids = [long_id for long_id, _ in known]
    for node in nodes:
        own, low, high = node.protocol.source_node.long_id, 0, len(ids)
        for bit in range(159, -1, -1):
            if high - low <= 1:
                break
            middle = bisect_left(ids, (own >> bit | 1) << bit, low, high)
            others, (low, high) = ((low, middle), (middle, high)) if own >> bit & 1 else ((middle, high), (low, middle))
            for index in net.rng.sample(range(*others), min(KSIZE, others[1] - others[0])):
                node.protocol.router.add_verified(Contact(known[index][0].to_bytes(20), *known[index][1]), 1.0)
    return nodes


@dataclass
class Traffic:
    """What went over the wires in a while: seconds, requests and keys per datagram of `ap`, bytes with headers."""

    seconds: float = 0.0
    datagrams: int = 0
    bytes: int = 0
    requests: int = 0
    ap: int = 0
    ap_keys: int = 0


@contextmanager
def traffic(net: VirtualNet) -> Iterator[Traffic]:
    """Count everything that is sent inside the block. Retransmissions count as requests."""
    seen = Traffic()
    before, start = Counter(net.count), net.loop.time()

    def tap(source: tuple[str, int], target: tuple[str, int], data: bytes) -> None:
        if data[0] == REQUEST:
            seen.requests += 1
            body = decode(data)
            if body is not None and body[0] == "ap":
                seen.ap += 1
                seen.ap_keys += len(body[1][6]) // 8

    net.taps.append(tap)
    try:
        yield seen
    finally:
        net.taps.remove(tap)
        seen.seconds = net.loop.time() - start
        seen.datagrams = net.count["datagrams"] - before["datagrams"]
        seen.bytes = net.count["bytes"] - before["bytes"]


def placed_share(nodes: Sequence[FcServer], publisher: FcServer, keys: U64, r: int = HOLDERS_CHUNK) -> float:
    """Return which share of all copies that should exist lie with the `r` nodes that really are nearest.

    Args:
        nodes: All nodes that are alive. The publisher answers for its own keys and counts as holding them.
        publisher: Whose keys they are.
        keys: Sorted distinct keys of the publisher's; all of them are looked at.
        r: Copies per key.
    """
    ids = np.array([id_key(node.identity.node_id) for node in nodes], dtype=np.uint64)
    nearest = allocate(keys, ids, r)
    right = 0
    for number, node in enumerate(nodes):
        mine = keys[(nearest == number).any(axis=1)]
        if node is publisher:
            right += len(mine)
        else:
            right += sum(1 for key in mine.tolist() if node.protocol.hints.get(key, 64))
    return right / nearest.size
