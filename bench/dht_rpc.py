"""How many RPCs a second does one thread do that is both ends, over real UDP on loopback, beside stock kademlia?

    python -m bench.dht_rpc [--rounds N]

Two nodes live in one event loop, 64 requests are always on their way. Each round runs every contender once, in turn;
the figures are medians of the rounds, in answered requests per second of wall time. Ours runs on uvloop, as the DHT
process does; stock `kademlia` 2.2.3 with rpcudp 5.0.1 runs on asyncio's own loop, as its documentation shows, and on
uvloop. An answer of ours that is late or dropped ends the bench.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable

import uvloop
from kademlia.network import Server
from kademlia.node import Node

from bench.dht_rows import AT_LEAST, line
from bench.interleaved import cpu_name
from fastcas.dht.contacts import Contact
from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy

WINDOW = 64
WARM_UP = 500
N_CONTACTS = 200  # offered to the answering node's table; as many enter as its buckets take
TARGET_PER_S = 15_000
KEYS = 130

Call = Callable[[], Awaitable[bool]]


class Contender:
    """One pair of nodes on a loop of its own; `rate` runs it for a while."""

    def __init__(self, make: Callable[[], Awaitable[Call]], *, on_uvloop: bool) -> None:
        """Set up the pair by `make`, which returns what does one RPC."""
        self._loop = uvloop.new_event_loop() if on_uvloop else asyncio.SelectorEventLoop()
        self._call = self._loop.run_until_complete(make())
        self._loop.run_until_complete(self._pump(WARM_UP))

    def rate(self, n: int) -> float:
        """Do `n` RPCs; return how many per second."""
        start = time.perf_counter()
        self._loop.run_until_complete(self._pump(n))
        return n / (time.perf_counter() - start)

    async def _pump(self, n: int) -> None:
        left = n

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                if not await self._call():
                    raise SystemExit("bench: an RPC was not answered")

        await asyncio.gather(*(worker() for _ in range(WINDOW)))


def contact_values(n: int) -> list[tuple[bytes, str, int]]:
    """Return ids and addresses of `n` made-up nodes."""
    rng = random.Random(1)
    return [(rng.randbytes(20), f"127.1.{i // 250}.{i % 250 + 1}", 8468) for i in range(n)]


async def ours(name: str, n_contacts: int) -> Call:
    """Return a call of one of our RPCs: a request with a token, as after the first exchange."""
    asker, answerer = (FcServer(policy=AddressPolicy(own=())) for _ in range(2))
    await asker.listen(0, "127.0.0.1")
    await answerer.listen(0, "127.0.0.1")
    for values in contact_values(n_contacts):
        answerer.protocol.router.add_verified(Contact(*values), 0.0)
    address = ("127.0.0.1", answerer.port)
    contact = await asker.protocol.ping(address)
    assert contact is not None
    rng = random.Random(2)
    targets = [rng.randbytes(20) for _ in range(256)]
    batches = [rng.randbytes(8 * KEYS) for _ in range(256)]
    arguments = {
        "fn": lambda: [rng.choice(targets), 20],
        "ap": lambda: [9000, 3600, rng.choice(batches)],
        "ping": lambda: [rng.choice(targets)[:16]],
    }[name]

    async def call() -> bool:
        reply = await asker.protocol.ask(contact, name, arguments())
        return reply is not None and reply.status == 0

    return call


async def stock(name: str, n_contacts: int) -> Call:
    """Return a call of one of the package's RPCs."""
    asker, answerer = Server(), Server()
    await asker.listen(0, "127.0.0.1")
    await answerer.listen(0, "127.0.0.1")
    for values in contact_values(n_contacts):
        answerer.protocol.router.add_contact(Node(*values))
    address = answerer.transport.get_extra_info("sockname")
    rng = random.Random(2)
    targets = [rng.randbytes(20) for _ in range(256)]
    arguments = {
        "ping": lambda: (),
        "find_node": lambda: (rng.choice(targets),),
        "store": lambda: (rng.choice(targets), b"127.0.0.1:9000"),
    }[name]

    async def call() -> bool:
        answered, _ = await getattr(asker.protocol, name)(address, asker.node.id, *arguments())
        return bool(answered)

    return call


# what is compared: ours and the package's nearest thing
ROWS: list[tuple[str, tuple[str, int], tuple[str, int] | None]] = [
    ("the smallest exchange (fn of an empty table | ping)", ("fn", 0), ("ping", 0)),
    ("20 contacts of a full table (fn | find_node)", ("fn", N_CONTACTS), ("find_node", N_CONTACTS)),
    (f"storing ({KEYS} keys by ap | one value by store)", ("ap", N_CONTACTS), ("store", N_CONTACTS)),
    ("signed ping", ("ping", 0), None),
]


def bench_rpc(rounds: int) -> None:
    """Print the table and the targets."""
    print(f"RPCs per second, both ends in one thread, {WINDOW} in flight; medians of {rounds} interleaved rounds")
    print(f"  {'':52} {'ours':>8} {'stock':>8} {'stock, uvloop':>14} {'ours / stock':>13}")
    for what, (our_name, our_contacts), theirs in ROWS:
        contenders = [(Contender(lambda n=our_name, c=our_contacts: ours(n, c), on_uvloop=True), 4000)]
        if theirs is not None:
            for on_uvloop in (False, True):
                make = lambda n=theirs[0], c=theirs[1]: stock(n, c)  # noqa: E731
                contenders.append((Contender(make, on_uvloop=on_uvloop), 2000))
        rates: list[list[float]] = [[] for _ in contenders]
        for _ in range(rounds):
            for (contender, n), found in zip(contenders, rates, strict=True):
                found.append(contender.rate(n))
        medians = [statistics.median(found) for found in rates]
        mine = medians[0]
        others = [f"{rate:,.0f}" for rate in medians[1:]] or ["", ""]
        ratio = f"{mine / medians[1]:.1f} x" if theirs is not None else ""
        print(f"  {what:52} {mine:8,.0f} {others[0]:>8} {others[1]:>14} {ratio:>13}")
        if our_name == "fn":
            line("... per second", mine, AT_LEAST, TARGET_PER_S, digits=0)


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d')}")
    bench_rpc(rounds)


if __name__ == "__main__":
    main()
