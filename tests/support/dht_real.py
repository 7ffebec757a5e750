"""A process with many real DHT nodes: `python -m tests.support.dht_real GROUP COUNT PORT`.

Each node listens on 127.GROUP.x.y:PORT. Reads lines on stdin and answers each with one line on stdout:

    join IP N        join all nodes through a node, ten at a time; then the fewest contacts of any, once all have N
    announce SEED N  node 0 announces N chunks; how many are held
    find SEED N      the last node looks for the same chunks; how many it finds
    files SEED N     every node announces one file of N; then how many of them the last node finds
    drops            datagrams that the kernel dropped at these nodes' sockets
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import uvloop

from fastcas.dht.peerlist import Peer
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy
from tests.support.waiting import until

JOIN_S = 90.0


def ip_of(group: int, number: int) -> str:
    """Return the address of a node."""
    return f"127.{group}.{number // 250}.{number % 250 + 1}"


class Group:
    """The nodes of this process."""

    def __init__(self, group: int, port: int) -> None:
        self.group = group
        self.port = port
        self.nodes: list[FcServer] = []

    async def open(self, count: int) -> None:
        for number in range(count):
            node = FcServer(policy=AddressPolicy(own=()))
            await node.listen(self.port, ip_of(self.group, number))
            node.announcer.set_data_port(9000)
            self.nodes.append(node)

    async def join(self, ip: str, wanted: int) -> int:
        for start in range(0, len(self.nodes), 10):
            batch = self.nodes[start : start + 10]
            for node in batch:
                node.start([(ip, self.port)])
            await asyncio.gather(*(asyncio.wait_for(node.joined.wait(), JOIN_S) for node in batch))
        await until(lambda: self.fewest() >= wanted, f"{wanted} contacts each", JOIN_S)
        return self.fewest()

    def fewest(self) -> int:
        return min(len(node.protocol.router) for node in self.nodes)

    async def announce(self, seed: int, count: int) -> int:
        return await self.nodes[0].announcer.announce_chunks(keys_of(random.Random(seed).randbytes(32 * count)))

    async def find(self, seed: int, count: int) -> int:
        hashes = random.Random(seed).randbytes(32 * count)
        return await self.nodes[-1].finder.find_chunks(hashes, 4, 60.0, lambda news: None)

    async def files(self, seed: int, count: int) -> int:
        files = [random.Random(seed + number).randbytes(32) for number in range(count)]
        await asyncio.gather(
            *(
                node.announcer.announce_files([(files[number % count], 1000)])
                for number, node in enumerate(self.nodes[:-1])
            )
        )
        found = 0
        for file in files:
            peers: set[Peer] = set()
            await self.nodes[-1].finder.find_file(file, 8, 10.0, peers.update)
            found += bool(peers)
        return found

    def drops(self) -> int:
        """Return the last column of /proc/net/udp, summed over our sockets."""
        ours = {f"{int.from_bytes(bytes(map(int, ip_of(self.group, i).split('.'))), 'little'):08X}:{self.port:04X}"
                for i in range(len(self.nodes))}  # fmt: skip
        rows = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
        return sum(int(row[-1]) for row in rows if row[1] in ours)


async def main() -> None:
    group = Group(int(sys.argv[1]), int(sys.argv[3]))
    await group.open(int(sys.argv[2]))
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        match line.split():
            case ["join", ip, wanted]:
                answer = await group.join(ip, int(wanted))
            case ["announce", seed, count]:
                answer = await group.announce(int(seed), int(count))
            case ["find", seed, count]:
                answer = await group.find(int(seed), int(count))
            case ["files", seed, count]:
                answer = await group.files(int(seed), int(count))
            case ["drops"]:
                answer = group.drops()
            case _:
                raise SystemExit(f"dht_real: {line!r}")
        print(answer, flush=True)
    for node in group.nodes:
        node.stop()


if __name__ == "__main__":
    uvloop.run(main())
