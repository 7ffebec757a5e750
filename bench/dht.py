"""What does discovery cost, what does it find, what does it survive? The DHT's table of targets.

    python -m bench.dht [--only announce,find,lookup,churn,sybil,mirror,memory,stock,rpc,hostile]

Up to mirror everything runs in virtual time (announce, find and lookup among 1,000 nodes; one-way latency log-normal,
median 40 ms): seconds there are virtual, the same on every machine. The others are measured here and now. All of it
takes about four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from kademlia.network import Server

from bench.dht_rows import AT_LEAST, AT_MOST, line
from bench.dht_rpc import bench_rpc
from bench.dht_stock import N_KEYS, bench_stock
from bench.interleaved import cpu_name
from fastcas.dht.announcer import chunk_holders
from fastcas.dht.budgets import HOLDERS_CHUNK
from fastcas.dht.provided import keys_of
from fastcas.dht.regions import allocate, id_key
from fastcas.dht.server import FcServer
from tests.support.dht_attack import is_found, key_of, plant, remove
from tests.support.dht_churn import Churn, Hour
from tests.support.dht_hostile import caught
from tests.support.dht_sim import LookupFigures, ideal_network, kill_share, measure_lookups
from tests.support.dht_spoof import Mirror, Spoofer, full_node
from tests.support.virtual_net import VirtualNet, run

N_NODES = 1000
N_SOUGHT = 5000
N_OFFERED = 20_000
N_NETWORKS = 3
N_NETWORKS_HALF_DEAD = 12
N_LOOKUPS = 200
N_JUDGED = 5000  # keys whose holders are compared with brute force
N_SPOOFED = 100_000
N_HONEST, N_PLANTED, N_SYBIL_KEYS = 500, 20, 20
SYBIL_KINDS = ("file", "chunk", "metadata")
CHURN_NODES, CHURN_HOURS = 24, 4
N_HOSTILE = 100_000


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
          f"{chunk_holders(N_OFFERED)} holders")  # fmt: skip
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

        n = N_NETWORKS if dead < 0.5 else N_NETWORKS_HALF_DEAD
        runs = [run(body, seed=seed) for seed in range(1, n + 1)]
        found, findable, n_rpcs, seconds = (sum(column) / n for column in zip(*runs, strict=True))
        line(f"{dead:.0%} of the nodes dead: found, mean of {n} networks", found / N_SOUGHT, AT_LEAST, target, digits=4)
        line("... in the worst of these networks", min(row[0] for row in runs) / N_SOUGHT, AT_LEAST, target, digits=4)
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


def bench_churn() -> None:
    """Print hours in which nodes live for an hour each; `make dht-churn` has 24 of them."""

    async def body(net: VirtualNet) -> list[Hour]:
        churn = Churn(net, CHURN_NODES, 3600.0)
        task = await churn.start()
        hours = [await churn.hour() for _ in range(CHURN_HOURS)]
        task.cancel()
        return hours

    hours = run(body)
    print(f"churn: {CHURN_NODES} nodes, median session 60 min, {CHURN_HOURS} h (24 h and 40 nodes: make dht-churn)")
    checks, half = sum(hour.checks for hour in hours), len(hours) // 2
    first, last = (sum(hour.p50_s for hour in part) / half for part in (hours[:half], hours[half:]))
    line("files found", sum(hour.found for hour in hours) / checks, AT_LEAST, 0.99, digits=4)
    line("drift: p50 of the second half ÷ of the first", last / first, AT_MOST, 1.5)
    line("datagrams per second and node, the worst hour", max(hour.messages for hour in hours), AT_MOST, 0.5)


def bench_sybil() -> None:
    """Print whether providers are found although 20 nodes are planted next to each key."""

    async def body(net: VirtualNet) -> dict[str, int]:
        nodes = await ideal_network(net, N_HONEST)
        found = dict.fromkeys(SYBIL_KINDS, 0)
        for number in range(N_SYBIL_KEYS):
            content = random.Random(f"content {number}").randbytes(32)
            for kind in SYBIL_KINDS:
                publisher, seeker = net.rng.sample(nodes, 2)
                planted = await plant(net, nodes, key_of(kind, content), N_PLANTED)
                found[kind] += await is_found(publisher, seeker, kind, content)
                remove(planted, nodes)
        return found

    print(f"{N_PLANTED} nodes planted next to each of {N_SYBIL_KEYS} keys, {N_HONEST} honest (more: make dht-attacks)")
    for kind, count in run(body).items():
        line(f"{kind}: provider found", count / N_SYBIL_KEYS, AT_LEAST, 0.95)


def bench_hostile() -> None:
    """Print what mutated datagrams do to a node; `make dht-hostile` sends 1,000,000."""
    print(f"{N_HOSTILE:,} mutated datagrams to a node (1,000,000: make dht-hostile)")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-k", "mutated", "tests/faults/test_dht_hostile.py"]
    environment = {**os.environ, "FASTCAS_DHT_HOSTILE": str(N_HOSTILE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print("".join(f"  {text}\n" for text in done.stdout.splitlines() if "mutated datagrams at" in text), end="")
    line("tests of it that failed", done.returncode, AT_MOST, 0, digits=0)


def bench_memory() -> None:
    """Print the memory of 1,000,000 hints, measured by a process of its own."""
    subprocess.run([sys.executable, "-m", "bench.dht_memory"], check=True)


SIMULATED = {
    "announce": bench_announce,
    "find": bench_find,
    "lookup": bench_lookups,
    "churn": bench_churn,
    "sybil": bench_sybil,
    "mirror": bench_mirror,
}
MEASURED = {
    "memory": bench_memory,
    "stock": lambda: bench_stock(N_KEYS, 4.0),
    "rpc": lambda: bench_rpc(5),
    "hostile": bench_hostile,
}
PARTS = SIMULATED | MEASURED


def run_part(name: str) -> str:
    """Run one part in a process of its own; return what it printed."""
    command = [sys.executable, "-m", "bench.dht", "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: part {name} ended with {done.returncode}")
    return done.stdout


def run_all(names: list[str]) -> None:
    """Run the simulated parts two at a time, since virtual time does not mind; then the others one by one."""
    seen = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for text in pool.map(run_part, [name for name in names if name in SIMULATED]):
            print(f"\n{text}", end="", flush=True)
            seen.append(text)
    for name in names:
        if name in MEASURED:
            text = run_part(name)
            print(f"\n{text}", end="", flush=True)
            seen.append(text)
    everything = "".join(seen)
    print(f"\n{everything.count(': met')} targets met, {everything.count(': MISSED')} missed")


def main() -> None:
    """Parse the command line, run the parts, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), type=lambda text: text.split(","))
    options = parser.parse_args()
    unknown = set(options.only) - set(PARTS)
    if unknown:
        raise SystemExit(f"bench: part {unknown.pop()!r}: expected some of {', '.join(PARTS)}")
    if len(options.only) == 1:
        PARTS[options.only[0]]()
        return
    start, run_id = time.monotonic(), time.strftime("%Y%m%d-%H%M%S")
    print(f"run {run_id}: {cpu_name()}, {os.cpu_count()} CPUs; python {sys.version.split()[0]}")
    run_all(options.only)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
