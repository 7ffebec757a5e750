"""What does discovery cost, what does it find, what does it survive? The DHT's table of targets.

    python -m bench.dht [--only announce,find,lookup,mirror,memory,stock,rpc]

announce, find and lookup run in a simulated network of 1,000 nodes in virtual time (one-way latency log-normal, median
40 ms): seconds there are virtual, the same on every machine. mirror, memory, stock and rpc are measured here and now.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time

import numpy as np
from kademlia.network import Server

from bench.dht_rpc import bench_rpc
from bench.dht_stock import N_KEYS, bench_stock
from bench.interleaved import cpu_name
from fastcas.dht.budgets import HOLDERS_CHUNK
from fastcas.dht.provided import keys_of
from fastcas.dht.regions import allocate, id_key
from fastcas.dht.server import FcServer
from tests.support.dht_hostile import caught
from tests.support.dht_sim import LookupFigures, ideal_network, kill_share, measure_lookups
from tests.support.dht_spoof import Mirror, Spoofer, full_node
from tests.support.virtual_net import VirtualNet, run

N_NODES = 1000
N_SOUGHT = 5000
N_OFFERED = 20_000
N_NETWORKS = 3
N_LOOKUPS = 200
N_JUDGED = 5000  # keys whose holders are compared with brute force
N_SPOOFED = 20_000
AT_MOST, AT_LEAST = "<=", ">="


def line(what: str, measured: float, relation: str, target: float, *, digits: int = 2, unit: str = "") -> None:
    """Print one line of the table."""
    met = measured <= target if relation == AT_MOST else measured >= target
    unit = f" {unit}" if unit else ""
    verdict = "met" if met else "MISSED"
    print(f"  {what:52} {measured:12,.{digits}f}{unit:5} target {relation} {target:,g}{unit}: {verdict}", flush=True)


# --- the simulated network ---


def placed_right(nodes: list[FcServer], publisher: FcServer, hashes: bytes) -> float:
    """Return the share of (key, one of its 8 nearest nodes) where that node has the key; the publisher counts."""
    ids = np.array([id_key(node.identity.node_id) for node in nodes], dtype=np.uint64)
    keys = keys_of(hashes)[:: max(1, len(hashes) // 32 // N_JUDGED)]
    right = total = 0
    for key, holders in zip(keys.tolist(), allocate(keys, ids, HOLDERS_CHUNK).tolist(), strict=True):
        for number in holders:
            node = nodes[number]
            held = node.protocol.hints.get(key, 64)
            right += node is publisher or any(p.node_id == publisher.identity.node_id for p in held)
            total += 1
    return right / total


async def announced(net: VirtualNet, n_keys: int) -> tuple[list[FcServer], FcServer, bytes]:
    """Return a network in which one node has announced `n_keys` chunks, that node, and the hashes."""
    nodes = await ideal_network(net, N_NODES)
    publisher = nodes[7]
    hashes = random.Random(5).randbytes(32 * n_keys)
    await publisher.announcer.announce_chunks(keys_of(hashes))
    return nodes, publisher, hashes


def bench_announce() -> None:
    """Print what announcing 100,000 chunks costs, and whether they lie where they belong."""

    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, N_NODES)
        publisher = nodes[7]
        hashes = random.Random(5).randbytes(32 * N_KEYS)
        counters, before = publisher.protocol.counters, net.count["bytes"]
        start, wall = net.loop.now, time.perf_counter()
        stored = await publisher.announcer.announce_chunks(keys_of(hashes))
        seconds, wall = net.loop.now - start, time.perf_counter() - wall
        report = publisher.announcer.last_report
        assert report is not None
        print(f"{N_KEYS:,} chunks announced among {N_NODES:,} simulated nodes, r = {HOLDERS_CHUNK}")
        print(f"  {stored:,} held, {report.copies / N_KEYS:.2f} copies each with others, {report.lookups} lookups, "
              f"{counters['rpc_fn']:,} + {counters['rpc_ap']:,} RPCs, {counters['retransmits']:,} sent again; "
              f"{wall:.1f} s of this thread for all {N_NODES:,} nodes")  # fmt: skip
        line("virtual time", seconds, AT_MOST, 10.0, unit="s")
        line("RPCs", counters["requests"], AT_MOST, 9000, digits=0)
        line("bytes both ways, IP and UDP headers too", (net.count["bytes"] - before) / 1e6, AT_MOST, 10.0, unit="MB")
        line("placed right", placed_right(nodes, publisher, hashes), AT_LEAST, 0.99, digits=4)

    run(body)


def reachable(nodes: list[FcServer], keys: list[int]) -> int:
    """Return how many keys are held by a living one of their 16 nearest nodes: nobody can find more."""
    ids = np.array([id_key(node.identity.node_id) for node in nodes], dtype=np.uint64)
    rows = allocate(np.array(keys, dtype=np.uint64), ids, 2 * HOLDERS_CHUNK).tolist()
    return sum(
        any(not nodes[n].is_closed and nodes[n].protocol.hints.get(key, 1) for n in row)
        for key, row in zip(keys, rows, strict=True)
    )


def bench_find() -> None:
    """Print how many of 5,000 announced chunks are found when nodes are dead, and what that costs."""
    print(f"find_peers_with_chunks of {N_SOUGHT:,} keys of {N_OFFERED:,} announced, {N_NODES:,} simulated nodes, "
          f"{N_NETWORKS} networks")  # fmt: skip
    for dead, target in ((0.0, 1.0), (0.3, 0.999), (0.5, 0.99)):

        async def body(net: VirtualNet, dead: float = dead) -> tuple[int, int, int, float]:
            nodes, publisher, hashes = await announced(net, N_OFFERED)
            seeker = nodes[500]
            kill_share(net, nodes, dead, keep=(publisher, seeker))
            before, start = seeker.protocol.counters["requests"], net.loop.now
            sought = hashes[: 32 * N_SOUGHT]
            found = await seeker.finder.find_chunks(sought, 4, 60.0, lambda news: None)
            n_rpcs, seconds = seeker.protocol.counters["requests"] - before, net.loop.now - start
            return found, reachable(nodes, keys_of(sought).tolist()), n_rpcs, seconds

        runs = [run(body, seed=seed) for seed in range(1, N_NETWORKS + 1)]
        found, findable, n_rpcs, seconds = (sum(column) / N_NETWORKS for column in zip(*runs, strict=True))
        line(f"{dead:.0%} of the nodes dead: found", found / N_SOUGHT, AT_LEAST, target, digits=4)
        print(f"  {found / findable:.4f} of what living nodes hold, {n_rpcs:,.0f} RPCs, {seconds:.1f} s virtual; "
              f"each network {', '.join(f'{row[0] / N_SOUGHT:.4f}' for row in runs)}")  # fmt: skip


def bench_lookups() -> None:
    """Print single lookups with dead nodes and with loss."""
    print(f"single lookups of the 20 nearest, {N_NODES:,} simulated nodes, {N_LOOKUPS} lookups each")
    rows: list[tuple[float, float, float, float | None, float | None]] = [
        (0.0, 0.0, 0.99, None, 1.0), (0.1, 0.0, 0.99, 1.5, 2.5), (0.3, 0.0, 0.95, None, 4.0),
        (0.5, 0.0, 0.90, None, None), (0.0, 0.05, 0.98, 1.0, None),
    ]  # fmt: skip
    for dead, loss, recall, p50_s, p99_s in rows:

        async def body(net: VirtualNet, dead: float = dead) -> LookupFigures:
            nodes = await ideal_network(net, N_NODES)
            return await measure_lookups(net, kill_share(net, nodes, dead), N_LOOKUPS)

        figures = run(body, loss=loss)
        print(f"  {dead:.0%} dead, {loss:.0%} loss: {figures}")
        line("recall", figures.recall, AT_LEAST, recall, digits=4)
        if p50_s is not None:
            line("p50", figures.p50_s, AT_MOST, p50_s, unit="s")
        if p99_s is not None:
            line("p99", figures.p99_s, AT_MOST, p99_s, unit="s")


# --- here and now ---


async def stock_mirror() -> float:
    """Return bytes out per byte in of a stock node with 500 values of 1 kB that gets one ping."""
    node = Server()
    await node.listen(0, "127.0.0.1")
    socket_, mirror = node.transport, Mirror()
    node.protocol.transport = mirror
    for number in range(500):
        node.storage[number.to_bytes(20)] = bytes(1000)
    ping = b"\x00" + bytes(20) + b"\x92\xa4ping\x91\xc4\x14" + bytes(range(20))
    node.protocol.datagram_received(ping, ("203.0.113.5", 4444))
    await asyncio.sleep(1.0)
    node.stop()
    socket_.close()
    for future, timer in node.protocol._outstanding.values():
        timer.cancel()
        future.cancel()
    return sum(size for size, _ in mirror.sent) / len(ping)


def bench_mirror() -> None:
    """Print what unproven addresses get for their bytes, here and from the stock library."""
    caught()

    async def body(net: VirtualNet) -> None:
        mirror = Mirror()
        spoofer = Spoofer(*await full_node(net, mirror, 1), 1)
        bytes_in = bytes_out = 0
        worst = 0.0
        for number in range(N_SPOOFED):
            source = spoofer.source()
            data = spoofer.datagram(source)
            mirror.sent.clear()
            spoofer.node.protocol.datagram_received(data, source)
            out = sum(size for size, _ in mirror.sent)
            bytes_in, bytes_out, worst = bytes_in + len(data), bytes_out + out, max(worst, out / max(len(data), 1))
            if number % 100 == 0:
                await asyncio.sleep(1.0)
        print(f"amplification: {N_SPOOFED:,} random requests of every kind from spoofed addresses")
        line("bytes out per byte in, the worst single request", worst, AT_MOST, 3.0)
        line("all together", bytes_out / bytes_in, AT_MOST, 3.0)

    run(body)
    print(f"  {'stock, 500 values of 1 kB, one ping':52} {asyncio.run(stock_mirror()):12,.0f}")


def bench_memory() -> None:
    """Print the memory of 1,000,000 hints, measured by a process of its own."""
    subprocess.run([sys.executable, "-m", "bench.dht_memory"], check=True)


PARTS = {
    "announce": bench_announce,
    "find": bench_find,
    "lookup": bench_lookups,
    "mirror": bench_mirror,
    "memory": bench_memory,
    "stock": lambda: bench_stock(N_KEYS, 4.0),
    "rpc": lambda: bench_rpc(7),
}


def main() -> None:
    """Parse the command line, run the parts, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), type=lambda text: text.split(","))
    options = parser.parse_args()
    unknown = set(options.only) - set(PARTS)
    if unknown:
        raise SystemExit(f"bench: part {unknown.pop()!r}: expected some of {', '.join(PARTS)}")
    run_id = time.strftime("%Y%m%d-%H%M%S")
    print(f"run {run_id}: {cpu_name()}, {os.cpu_count()} CPUs; python {sys.version.split()[0]}")
    for name in options.only:
        print(flush=True)
        PARTS[name]()


if __name__ == "__main__":
    main()
