"""Real nodes on real sockets: many of them in several processes, and a few behind a network that damages everything.

Short in `make test` (2 processes of 20 nodes); `make dht-real` runs 4 processes of 100 on port 8468.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from fastcas.dht.peerlist import Peer
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy
from tests.support.dht_real import ip_of
from tests.support.lossy_proxy import MTU_PAYLOAD, LossyProxy
from tests.support.waiting import until

WHOLE = bool(os.environ.get("FASTCAS_DHT_REAL"))
N_PROCESSES, N_EACH, PORT = (4, 100, 8468) if WHOLE else (2, 20, 28468)
N_CHUNKS = 100_000 if WHOLE else 5_000
N_FILES = 50 if WHOLE else 10
FIRST_GROUP = 100


class Child:
    """One process of nodes; `ask` sends a line and returns the number that comes back."""

    def __init__(self, group: int) -> None:
        command = [sys.executable, "-m", "tests.support.dht_real", str(group), str(N_EACH), str(PORT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def udp_counters() -> dict[str, int]:
    """Return the kernel's UDP counters."""
    lines = [line.split()[1:] for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Udp:")]
    return {name: int(value) for name, value in zip(lines[0], lines[1], strict=True)}


@pytest.fixture
def children() -> Iterator[list[Child]]:
    with ExitStack() as stack:
        found = []
        for number in range(N_PROCESSES):
            child = Child(FIRST_GROUP + number)
            stack.callback(child.close)
            found.append(child)
        yield found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_of_real_nodes_join_announce_and_find(children: list[Child]) -> None:
    before, start = udp_counters(), time.monotonic()
    with ThreadPoolExecutor(N_PROCESSES) as pool:
        fewest = min(pool.map(lambda child: child.ask(f"join {ip_of(FIRST_GROUP, 0)} 20"), children))
        joined_s = time.monotonic() - start
        start = time.monotonic()
        stored = list(pool.map(lambda c: c[1].ask(f"announce {c[0]} {N_CHUNKS}"), enumerate(children)))
        announced_s = time.monotonic() - start
        start = time.monotonic()
        others = [*children[1:], children[0]]
        found = list(pool.map(lambda c: c[1].ask(f"find {c[0]} {N_CHUNKS // 10}"), enumerate(others)))
        found_s = time.monotonic() - start
        files = list(pool.map(lambda c: c[1].ask(f"files {1000 * c[0]} {N_FILES}"), enumerate(children)))
    drops = sum(child.ask("drops") for child in children)
    after = udp_counters()
    n_in, n_full = (after[name] - before[name] for name in ("InDatagrams", "RcvbufErrors"))
    print(
        f"\n{N_PROCESSES} processes of {N_EACH} nodes: joined in {joined_s:.1f} s, at least {fewest} contacts each; "
        f"{N_PROCESSES} x {N_CHUNKS:,} chunks announced in {announced_s:.1f} s, {N_CHUNKS // 10:,} each found in "
        f"{found_s:.1f} s; {n_in:,} datagrams, {n_full} RcvbufErrors on the host, {drops} of them at these nodes"
    )
    assert fewest >= 20
    assert stored == [N_CHUNKS] * N_PROCESSES
    assert min(found) >= 0.999 * (N_CHUNKS // 10)
    assert files == [N_FILES] * N_PROCESSES
    assert drops <= n_in // 1000


@pytest.mark.slow
def test_nodes_join_announce_and_find_through_a_network_that_loses_repeats_reorders_and_damages() -> None:
    async def body() -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        proxy = LossyProxy(seed=1)
        nodes = [FcServer(policy=AddressPolicy(own=())) for _ in range(12)]
        faces = []
        try:
            for number, node in enumerate(nodes):
                await node.listen(0, f"127.121.0.{number + 1}")
                node.announcer.set_data_port(9000)
                inner = (f"127.121.0.{number + 1}", node.port)
                faces.append(await proxy.stand_for(inner, (f"127.120.0.{number + 1}", 0)))
            for node in nodes:
                node.start(faces[:2])
            # A damaged signature keeps a contact out for half a minute: nobody needs all the others at once.
            await until(lambda: min(len(n.protocol.router) for n in nodes) >= 8, "8 of 11 contacts each", 60)
            known = {contact.address for node in nodes for contact in node.protocol.router}
            assert known <= set(faces)
            hashes, file = random.Random(1).randbytes(32 * 2000), bytes(32)
            assert await nodes[1].announcer.announce_chunks(keys_of(hashes)) == 2000
            await nodes[1].announcer.announce_files([(file, 1000)])
            await nodes[1].announcer.put_metadata(file, "a name", 77, file)
            peers: set[Peer] = set()
            await nodes[9].finder.find_file(file, 4, 20.0, peers.update)
            assert {peer.ip for peer in peers} == {faces[1][0]}
            assert [record.public for record in await nodes[9].finder.get_metadata(file, 20.0)] == [
                nodes[1].identity.public
            ]
            assert await nodes[9].finder.find_chunks(hashes, 4, 30.0, lambda news: None) >= 0.999 * 2000
            for fault in ("lost", "repeated", "late", "damaged"):
                assert proxy.count[fault] > 0, proxy.count
            assert proxy.count["too big"] == 0
            nodes[0].protocol.transport.sendto(bytes(MTU_PAYLOAD + 1), faces[1])
            await until(lambda: proxy.count["too big"], "a datagram over the MTU at the proxy")
            assert errors == []
        finally:
            for node in nodes:
                node.stop()
            proxy.close()
            await asyncio.sleep(0)

    asyncio.run(body())
