"""Announcing 100,000 chunk keys beside the stock library's `set()`: 50 real nodes on loopback UDP, in one run.

    python -m bench.dht_stock [--keys 100000] [--seconds 4]

Either network is 50 nodes in one event loop, each on its own 127.x.y.z, joined through the first one; all senders and
all receivers share that one thread. The stock side stores keys one after the other and 8 at a time, on asyncio's own
loop and on uvloop, for some seconds each; its best rate counts. Ours announces all keys once, by a sweep.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop
from kademlia.network import Server

from bench.dht_rows import AT_LEAST, line
from bench.interleaved import cpu_name
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy

N_NODES = 50
N_KEYS = 100_000
PORT = 8468
TARGET = 200.0

Run = Callable[[Coroutine[Any, Any, float]], float]


def address(network: int, number: int) -> str:
    """Return the IP of a node."""
    return f"127.{network}.0.{number + 1}"


async def stock_rate(network: int, at_once: int, seconds: float) -> float:
    """Return how many keys a second one of 50 stock nodes sets."""
    nodes = [Server() for _ in range(N_NODES)]
    for number, node in enumerate(nodes):
        await node.listen(PORT, interface=address(network, number))
        if number:
            await node.bootstrap([(address(network, 0), PORT)])
    rng = random.Random(1)
    done = 0
    start = time.perf_counter()

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() - start < seconds:
            await nodes[7].set(rng.randbytes(32).hex(), "127.0.0.1:9000")
            done += 1

    await asyncio.gather(*(worker() for _ in range(at_once)))
    rate = done / (time.perf_counter() - start)
    for node in nodes:
        node.stop()
    return rate


async def our_rate(n_keys: int) -> float:
    """Return how many keys a second one of 50 nodes announces."""
    nodes = [FcServer(policy=AddressPolicy(own=())) for _ in range(N_NODES)]
    for number, node in enumerate(nodes):
        await node.listen(PORT, address(90, number))
        node.announcer.set_data_port(9000)
        if number:
            await node.bootstrap([(address(90, 0), PORT)])
    keys = keys_of(random.Random(1).randbytes(32 * n_keys))
    start = time.perf_counter()
    stored = await nodes[7].announcer.announce_chunks(keys)
    seconds = time.perf_counter() - start
    copies = sum(node.protocol.hints.n_hints for node in nodes)
    if stored != n_keys:
        raise SystemExit(f"bench: only {stored:,} of {n_keys:,} keys are held by anybody")
    print(f"  ours, a sweep: {n_keys:,} keys in {seconds:.2f} s, {copies / n_keys:.2f} copies each with others")
    for node in nodes:
        node.stop()
    return n_keys / seconds


def bench_stock(n_keys: int, seconds: float) -> None:
    """Print both rates and their ratio."""
    for name in ("kademlia", "rpcudp", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    print(f"100,000 chunk keys against the stock library's set(), {N_NODES} real nodes on loopback UDP")
    ours = uvloop.run(our_rate(n_keys))
    best = 0.0
    for loop, runner, network in (("asyncio", asyncio.run, 91), ("uvloop", uvloop.run, 93)):
        for at_once in (1, 8):
            rate = runner(stock_rate(network + (at_once > 1), at_once, seconds))
            best = max(best, rate)
            print(f"  stock on {loop}, {at_once} at a time: {rate:,.0f} keys/s")
    print(f"  ours {ours:,.0f} keys/s")
    line("ours ÷ the best of stock", ours / best, AT_LEAST, TARGET, digits=0)


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=N_KEYS)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d')}")
    bench_stock(options.keys, options.seconds)


if __name__ == "__main__":
    main()
