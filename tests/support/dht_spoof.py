"""Spoofed sources that want a node to send more than it got, and a node that has much to send.

`full_node` has a full table and many records; `Spoofer` makes requests of every name that come from addresses which
never show a token of theirs; `Mirror` keeps what the node sends.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from fastcas.dht.contacts import Contact
from fastcas.dht.identity import Identity, metadata_text
from fastcas.dht.records import MetadataRecord
from fastcas.dht.server import FcServer
from fastcas.dht.wire import REQUEST, encode
from fastcas.peers.policy import AddressPolicy
from tests.support.dht_hostile import NAMES, Mutator, caught
from tests.support.virtual_net import WALL_ZERO, Address, VirtualNet


class Mirror(asyncio.DatagramTransport):
    """A socket that keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, Address]] = []

    def sendto(self, data: Any, addr: Any = None) -> None:
        self.sent.append((len(data), addr))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("10.0.0.1", 8468) if name == "sockname" else default


async def full_node(net: VirtualNet, mirror: Mirror, seed: int) -> tuple[FcServer, list[bytes], list[bytes]]:
    """Return a node with a full table and many records, its 8-byte keys and its 20-byte keys."""
    rng = random.Random(seed)
    policy = AddressPolicy(own=(), allow_private=True)
    node = FcServer(policy=policy, open_transport=lambda *args: mirror, wall=lambda: WALL_ZERO + net.loop.now)
    net.nodes.append(node)
    await node.listen(8468, "10.0.0.1")
    node.protocol.add_transport(16, mirror)
    node.announcer.set_data_port(9000)
    for number in range(2000):
        ip = f"10.1.{number // 250}.{number % 250}" if number % 3 else f"fd00::{number:x}"
        node.protocol.router.add_verified(Contact(rng.randbytes(20), ip, 8468), net.loop.now)
    short = [rng.randbytes(8) for _ in range(200)]
    long = [rng.randbytes(20) for _ in range(200)]
    for number in range(64):
        who, ip = rng.randbytes(20), f"10.2.0.{number + 1}" if number % 2 else f"fd01::{number:x}"
        node.protocol.hints.put(who, ip, 8468, 9000, b"".join(short), 86_400)
        for key in long:
            node.protocol.swarms.put(key, who, ip, 8468, 9000, 500, 86_400)
    publishers = [Identity(bytes((number,)) * 32) for number in range(8)]
    for key in long[:20]:
        for publisher in publishers:
            expires, value = int(WALL_ZERO) + 86_400, rng.randbytes(900)
            signature = publisher.sign(metadata_text(key, 1, expires, value))
            assert node.protocol.metadata.put(key, MetadataRecord(publisher.public, 1, expires, value, signature))
    return node, short, long


class Spoofer:
    """Makes requests of every name with plausible, random and mutated arguments, never with a token of its address."""

    def __init__(self, node: FcServer, short: list[bytes], long: list[bytes], seed: int) -> None:
        self.rng = random.Random(seed)
        self.node = node
        self.short, self.long = short, long
        self.mutator = Mutator(seed, caught())

    def source(self) -> Address:
        rng = self.rng
        ip = rng.choice(
            (
                f"{rng.choice((8, 77, 190))}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}",
                f"10.9.{rng.randrange(4)}.{rng.randrange(1, 255)}",
                f"127.0.0.{rng.randrange(1, 255)}",
                f"2a00:{rng.randrange(1 << 16):x}::1",
            )
        )
        return ip, rng.choice((8468, rng.randrange(1, 65536)))

    def datagram(self, source: Address) -> bytes:
        rng = self.rng
        if rng.random() < 0.1:
            return self.mutator.datagram()
        name = rng.choice((*NAMES, *NAMES, "store", "find_value"))
        key, n_keys = rng.choice((*self.long, rng.randbytes(20))), rng.choice((1, 2, 30, 96, 140))
        args: list[Any] = {
            "ping": [rng.randbytes(16)],
            "fn": [key, rng.choice((1, 8, 20, 64))],
            "gp": [rng.choice((b"", key)), b"".join(rng.choices(self.short, k=n_keys)), rng.choice((1, 16, 255))],
            "gs": [key, rng.choice((1, 16, 255))],
            "gm": [rng.choice(self.long[:20]), rng.choice((0, 0, 1, 7))],
            "ap": [9000, 3600, rng.randbytes(8 * n_keys)],
            "as": [9000, 3600, rng.randbytes(22 * rng.randrange(1, 40))],
            "pm": [key, bytes(32), 1, int(WALL_ZERO) + 999, rng.randbytes(rng.randrange(1, 900)), bytes(64)],
            "wd": [rng.choice((0, 1)), b""],
            "store": [key, b"value"],
            "find_value": [key],
        }[name]
        if rng.random() < 0.1:
            args[rng.randrange(len(args))] = rng.choice((b"", 0, 1 << 40, "x", key, []))
        if rng.random() < 0.4:
            args.append(bytes(rng.choice((8, 100, 400, 900))))
        other = (source[0], source[1] % 65535 + 1)
        node_id = rng.choice((b"S" * 20, rng.randbytes(20), self.node.identity.node_id))
        stolen = self.node.protocol._tokens.token(*other, node_id)
        token = rng.choice((b"", b"", rng.randbytes(8), stolen))
        return encode(REQUEST, rng.randbytes(20), [name, [1, rng.choice((0, 1, 2, 255)), node_id, token, *args]])
