"""A network of many DHT nodes in virtual time, ready at once, and what lookups in it cost and find.

`ideal_network` fills routing tables as a long-lived network would (up to 20 contacts per distance, chosen at
random), which takes a second for 1,000 nodes instead of the minute that joining takes. `kill_share` lets a part vanish
without a word. `measure_lookups` compares with brute force over the nodes that are alive.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastcas.dht.budgets import KSIZE
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.server import FcServer
from tests.support.virtual_net import VirtualNet, address_of, true_nearest

CONCURRENT = 20  # lookups at the same time; each is by another node


@dataclass(frozen=True, slots=True)
class LookupFigures:
    """What a number of lookups found and cost.

    Attributes:
        recall: Share of the truly nearest live nodes that were found, mean over the lookups.
        hops: Replies in the chain to the farthest of the nodes found, mean.
        rpcs: Requests per lookup, mean.
        rpcs_max: Requests of the most expensive one.
        p50_s, p99_s: Virtual seconds per lookup.
    """

    recall: float
    hops: float
    rpcs: float
    rpcs_max: int
    p50_s: float
    p99_s: float

    def __str__(self) -> str:
        return (
            f"recall {self.recall:.4f}  hops {self.hops:.2f}  rpcs {self.rpcs:.1f} (max {self.rpcs_max})  "
            f"p50 {self.p50_s:.2f} s  p99 {self.p99_s:.2f} s"
        )


async def ideal_network(net: VirtualNet, n: int, *, first: int = 1, serves: bool = True) -> list[FcServer]:
    """Return `n` listening nodes with full tables; nothing runs on them yet (`start` begins their upkeep)."""
    nodes = [await net.node(first + number, serves=serves) for number in range(n)]
    fill_tables(net, nodes)
    return nodes


def fill_tables(net: VirtualNet, nodes: Sequence[FcServer]) -> None:
    """Give every node up to 20 random contacts for each number of leading bits that it shares with others."""
    known = sorted((node.protocol.source_node.long_id, address_of(node)) for node in nodes)
    ids = [long_id for long_id, _ in known]
    for node in nodes:
        own = node.protocol.source_node.long_id
        low, high = 0, len(ids)
        for bit in range(159, -1, -1):
            if high - low <= 1:
                break
            middle = bisect_left(ids, (own >> bit | 1) << bit, low, high)
            lower, upper = (low, middle), (middle, high)
            others, (low, high) = (lower, upper) if own >> bit & 1 else (upper, lower)
            chosen = net.rng.sample(range(*others), min(KSIZE, others[1] - others[0]))
            for long_id, address in (known[index] for index in chosen):
                node.protocol.router.add_verified(Contact(long_id.to_bytes(20), *address), net.loop.time())


def kill_share(
    net: VirtualNet, nodes: Sequence[FcServer], share: float, *, keep: Iterable[FcServer] = ()
) -> list[FcServer]:
    """Let a random share of `nodes` vanish silently, none of `keep`; return the living."""
    kept = set(keep)
    mortal = [node for node in nodes if node not in kept and not node.is_closed]
    net.kill(net.rng.sample(mortal, round(share * len(nodes))))
    return [node for node in nodes if not node.is_closed]


async def measure_lookups(
    net: VirtualNet, nodes: Sequence[FcServer], n: int, *, k: int = KSIZE, living: Sequence[FcServer] | None = None
) -> LookupFigures:
    """Make `n` lookups of random targets, each from another of `nodes` as far as they go.

    Args:
        net: The network.
        nodes: Who asks: nodes that are alive.
        n: How many lookups.
        k: How many nearest nodes each must find.
        living: Against whom the result is compared; `nodes` by default.
    """
    truth = nodes if living is None else living
    seekers = net.rng.sample(list(nodes), len(nodes))
    recalls, hops, rpcs, seconds = [], [], [], []

    async def one(number: int) -> None:
        seeker = seekers[number % len(seekers)]
        target = random.Random(f"target {number}").getrandbits(160)
        start = net.loop.time()
        result = await Lookup(seeker.protocol, target, k=k).run()
        seconds.append(net.loop.time() - start)
        nearest = set(true_nearest([node for node in truth if node is not seeker], target, k))
        recalls.append(len(nearest & {contact.id for contact in result.nodes}) / len(nearest))
        rpcs.append(result.n_asked)
        hops.append(result.hops)

    for start in range(0, n, CONCURRENT):
        async with asyncio.TaskGroup() as group:
            for number in range(start, min(start + CONCURRENT, n)):
                group.create_task(one(number))
    seconds.sort()
    return LookupFigures(
        sum(recalls) / n,
        sum(hops) / n,
        sum(rpcs) / n,
        max(rpcs),
        seconds[n // 2],
        seconds[min(n * 99 // 100, n - 1)],
    )


def main() -> None:
    """Print the figures of lookups among 1,000 nodes with dead ones and with loss."""
    from tests.support.virtual_net import run

    for share, loss in ((0.0, 0.0), (0.1, 0.0), (0.3, 0.0), (0.5, 0.0), (0.0, 0.05), (0.5, 0.05)):

        async def body(net: VirtualNet, share: float = share) -> LookupFigures:
            nodes = await ideal_network(net, 1000)
            living = kill_share(net, nodes, share)
            return await measure_lookups(net, living, 200)

        print(f"dead {share:3.0%}  loss {loss:3.0%}  {run(body, loss=loss)}", flush=True)


if __name__ == "__main__":
    main()
