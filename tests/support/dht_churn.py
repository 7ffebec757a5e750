"""A network whose nodes come and go for hours of virtual time, and whether it keeps finding what is published.

Sessions last as long as chance has it (exponential), end without a word, and a new node with a new identity joins at
once in the place of the old one. A few nodes stay and publish; what they publish is looked for by random others.
`python -m tests.support.dht_churn` prints a line per virtual hour.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from dataclasses import dataclass, field

from fastcas.dht.lookup import Lookup
from fastcas.dht.peerlist import Peer
from fastcas.dht.server import FcServer
from tests.support.dht_sim import ideal_network
from tests.support.virtual_net import VirtualNet, address_of, run, true_nearest

PUBLISHERS = 5
FILES_EACH = 4
CHECKS_PER_HOUR = 60


@dataclass(slots=True)
class Hour:
    """What happened in one virtual hour.

    Attributes:
        found, checks: How many of the searches for a published file found its publisher.
        recalls: Shares of the truly nearest live nodes that lookups found.
        seconds: How long these lookups took.
        replaced: How many nodes died and were replaced.
        messages: Datagrams per second and node, the searches included.
    """

    found: int = 0
    checks: int = 0
    recalls: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    replaced: int = 0
    messages: float = 0.0

    def __str__(self) -> str:
        return (
            f"found {self.found}/{self.checks}  recall {sum(self.recalls) / len(self.recalls):.4f}  "
            f"p50 {self.p50_s:.2f} s  p99 {self.p99_s:.2f} s  "
            f"replaced {self.replaced}  messages {self.messages:.3f}/s/node"
        )

    @property
    def p50_s(self) -> float:
        """Median seconds of a lookup."""
        return sorted(self.seconds)[len(self.seconds) // 2]

    @property
    def p99_s(self) -> float:
        """Seconds of all but the slowest hundredth."""
        return sorted(self.seconds)[len(self.seconds) * 99 // 100]


class Churn:
    """One network that lives for hours.

    Args:
        net: Carries it.
        n: How many nodes there always are.
        median_s: Median session.
    """

    def __init__(self, net: VirtualNet, n: int, median_s: float) -> None:
        """Prepare; `start` makes the nodes."""
        self._net = net
        self._n = n
        self._mean_s = median_s / math.log(2)
        self._rng = random.Random(net.rng.random())
        self._next_number = n + 1
        self._files: list[tuple[bytes, FcServer]] = []
        self._mortals: list[FcServer] = []
        self._replaced = 0

    async def start(self) -> asyncio.Task[None]:
        """Make the network and publish; return the task that lets nodes come and go."""
        nodes = await ideal_network(self._net, self._n)
        for node in nodes:
            node.start()
            await asyncio.sleep(0.5)
        publishers, self._mortals = nodes[:PUBLISHERS], nodes[PUBLISHERS:]
        for publisher in publishers:
            files = [self._rng.randbytes(32) for _ in range(FILES_EACH)]
            self._files += [(file_hash, publisher) for file_hash in files]
            await publisher.announcer.announce_files([(file_hash, 1000) for file_hash in files])
        return asyncio.get_running_loop().create_task(self._replace())

    @property
    def _living(self) -> list[FcServer]:
        return [node for node in self._net.nodes if not node.is_closed]

    async def _replace(self) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(len(self._mortals) / self._mean_s))
            place = self._rng.randrange(len(self._mortals))
            self._net.kill([self._mortals[place]])
            self._net.nodes.remove(self._mortals[place])
            friends = self._rng.sample(self._living, 2)
            newcomer = await self._net.node(self._next_number)
            self._next_number += 1
            newcomer.start([address_of(friend) for friend in friends])
            self._mortals[place] = newcomer
            self._replaced += 1

    async def hour(self) -> Hour:
        """Live for an hour, searching all the time."""
        hour = Hour()
        replaced, datagrams = self._replaced, self._net.count["datagrams"]
        for _ in range(CHECKS_PER_HOUR):
            await asyncio.sleep(3600 / CHECKS_PER_HOUR)
            await self._check(hour)
        hour.replaced = self._replaced - replaced
        hour.messages = (self._net.count["datagrams"] - datagrams) / 3600 / self._n
        return hour

    async def _check(self, hour: Hour) -> None:
        settled = [node for node in self._living if node.joined.is_set() and len(node.protocol.router) >= 20]
        file_hash, publisher = self._rng.choice(self._files)
        seeker = self._rng.choice([node for node in settled if node is not publisher])
        peers: list[Peer] = []
        await seeker.finder.find_file(file_hash, 32, 10.0, peers.extend)
        if seeker.is_closed:
            return
        hour.checks += 1
        hour.found += any(peer.node_id == publisher.identity.node_id for peer in peers)
        target = self._rng.getrandbits(160)
        start = self._net.loop.time()
        result = await Lookup(seeker.protocol, target).run()
        if not seeker.is_closed:
            nearest = set(true_nearest([node for node in self._living if node is not seeker], target, 20))
            hour.recalls.append(len(nearest & {node.id for node in result.nodes}) / len(nearest))
            hour.seconds.append(self._net.loop.time() - start)


def main() -> None:
    """Print a line per hour: `python -m tests.support.dht_churn [nodes [hours [median session in minutes]]]`."""
    n, hours, minutes = [int(text) for text in sys.argv[1:]] + [100, 24, 60][len(sys.argv) - 1 :]

    async def body(net: VirtualNet) -> None:
        churn = Churn(net, n, 60.0 * minutes)
        task = await churn.start()
        for number in range(hours):
            start = time.process_time()
            print(f"hour {number + 1:2}  {await churn.hour()}  cpu {time.process_time() - start:.1f} s", flush=True)
        task.cancel()

    run(body)


if __name__ == "__main__":
    main()
