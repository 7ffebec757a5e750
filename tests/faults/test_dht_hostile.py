"""A node on a hostile network: floods of mutated datagrams, lying neighbours, spoofed sources that want a mirror.

Short in `make test`; the whole campaign is `make dht-hostile` (FASTCAS_DHT_HOSTILE = number of mutated datagrams).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy
from tests.support.dht_hostile import NAMES, EvilNode, Mutator, caught
from tests.support.dht_spoof import Mirror, Spoofer, full_node
from tests.support.virtual_net import Address, VirtualNet, run
from tests.support.waiting import until

N_MUTATED = int(os.environ.get("FASTCAS_DHT_HOSTILE", "20000"))
WHOLE = N_MUTATED > 20_000
SEED = int(os.environ.get("FASTCAS_TEST_SEED", "1"))
N_RPCS = 100_000 if WHOLE else 10_000
ATTACK_PER_S = 8_000.0
ROUNDS = 20 if WHOLE else 2  # of being left alone and being attacked, in turn: other load on the machine meets both
ALONE_S = 2.0 if WHOLE else 0.2
GOODPUT = 0.8  # of the good lookups per second are to be left
RSS_GROWTH_MAX = 20 << 20


@pytest.fixture(autouse=True)
def samples() -> None:
    """Catch the samples now: it takes an event loop of its own."""
    caught()


# --- amplification ---


@pytest.mark.slow
def test_any_mix_of_requests_sends_at_most_three_times_its_bytes_to_unproven_addresses() -> None:
    async def body(net: VirtualNet) -> None:
        mirror = Mirror()
        node, short, long = await full_node(net, mirror, SEED)
        spoofer = Spoofer(node, short, long, SEED)
        answered: Counter[str] = Counter()
        bytes_in = bytes_out = 0
        worst = 0.0
        for number in range(N_RPCS):
            source = spoofer.source()
            data = spoofer.datagram(source)
            mirror.sent.clear()
            node.protocol.datagram_received(data, source)
            bytes_in += len(data)
            out = sum(size for size, _ in mirror.sent)
            assert len(mirror.sent) <= 1
            assert out <= 3 * len(data), data
            if out:
                assert mirror.sent[0][1] == source
                bytes_out += out
                worst = max(worst, out / len(data))
                name = data[23:25] if data[22] == 0xA2 else data[23:27]
                answered[name.decode("latin-1")] += 1
            if number % 100 == 0:
                await asyncio.sleep(1.0)  # what the node would send by itself later counts too
                assert mirror.sent == [] or number == 0 or len(mirror.sent) == bool(out)
        assert bytes_out <= 3 * bytes_in
        assert all(answered[name] > N_RPCS // 200 for name in NAMES), answered
        assert node.protocol.n_outstanding == 0
        print(f"\n{N_RPCS:,} RPCs: {bytes_out / bytes_in:.2f} bytes out per byte in, {worst:.2f} at worst; {answered}")

    run(body)


# --- mutated datagrams on a real socket ---


def rss() -> int:
    """Return this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Rate:
    """Good lookups in a while: seconds of wall time, and of this process's CPU time, which no other program touches."""

    lookups: int
    wall_s: float
    cpu_s: float

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.lookups + other.lookups, self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    @property
    def per_s(self) -> float:
        return self.lookups / self.wall_s

    @property
    def per_cpu_s(self) -> float:
        return self.lookups / self.cpu_s


class Stand:
    """A victim, a friend that looks things up through it, and a third node among liars, all in this loop."""

    def __init__(self) -> None:
        self.victim, self.friend, self.curious = [FcServer(policy=AddressPolicy(own=())) for _ in range(3)]
        self.nodes = (self.victim, self.friend, self.curious)
        self.liars: list[EvilNode] = []
        self.liar_addresses: list[Address] = []
        self.n_lookups = 0

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        for node in self.nodes:
            await node.listen(0, "127.0.0.1")
        await self.friend.bootstrap([("127.0.0.1", self.victim.port)])
        for number in range(4):
            liar = EvilNode(Mutator(SEED + number, caught()))
            ip = f"127.77.0.{number + 1}"
            transport, _ = await loop.create_datagram_endpoint(lambda liar=liar: liar, local_addr=(ip, 0))
            self.liars.append(liar)
            self.liar_addresses.append(transport.get_extra_info("sockname")[:2])

    async def look_up(self) -> None:
        """Look up, as a good neighbour, for ever."""
        rng = random.Random(SEED)
        while True:
            result = await Lookup(self.friend.protocol, rng.getrandbits(160)).run()
            assert [c.id for c in result.nodes] == [self.victim.identity.node_id]
            self.n_lookups += 1

    async def ask_liars(self) -> None:
        """Search through liars, for ever."""
        rng = random.Random(SEED)
        while True:
            target = rng.randbytes(32)
            for address in self.liar_addresses:
                contact = Contact(rng.randbytes(20), *address)
                self.curious.protocol.router.add_verified(contact, asyncio.get_running_loop().time())
            await Lookup(self.curious.protocol, int.from_bytes(target[:20])).run(deadline_s=1.0)
            await self.curious.finder.find_file(target, 8, 1.0, lambda peers: None)
            await self.curious.finder.get_metadata(target, 1.0)
            await self.curious.finder.find_chunks(target * 5, 4, 1.0, lambda news: None)
            await asyncio.sleep(0.1)

    def close(self) -> None:
        for liar in self.liars:
            liar.transport.close()
        for node in self.nodes:
            node.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mutated_datagrams_close_nothing_raise_nothing_and_cost_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[dict[str, Any]] = []

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        stand = Stand()
        await stand.open()
        try:
            await measure(stand)
        finally:
            stand.close()

    async def measure(stand: Stand) -> None:
        tasks = [asyncio.create_task(stand.look_up()), asyncio.create_task(stand.ask_liars())]

        async def rate(work: Awaitable[object]) -> Rate:
            """Return what was looked up while something else happened."""
            before, wall, cpu = stand.n_lookups, time.monotonic(), time.process_time()
            await work
            return Rate(stand.n_lookups - before, time.monotonic() - wall, time.process_time() - cpu)

        async def attack(count: int) -> None:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(b"%d\n" % count)
            assert await child.stdout.readline() == b"sent\n"

        arguments = [str(stand.victim.port), str(ATTACK_PER_S), str(SEED)]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.dht_hostile", *arguments, stdin=PIPE, stdout=PIPE
        )
        assert child.stdin is not None and child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
        await attack(5_000)  # caches and tables of sources fill up
        got, grown = stand.victim.protocol.counters["datagrams_in"], rss()
        alone, during = Rate(0, 0.0, 0.0), Rate(0, 0.0, 0.0)
        for _ in range(ROUNDS):
            alone += await rate(asyncio.sleep(ALONE_S))
            during += await rate(attack(N_MUTATED // ROUNDS))
        grown = rss() - grown
        got = stand.victim.protocol.counters["datagrams_in"] - got
        child.stdin.close()
        assert await child.wait() == 0
        for task in tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert got >= N_MUTATED
        assert not stand.victim.protocol.transport.is_closing()
        assert await stand.friend.protocol.ping(("127.0.0.1", stand.victim.port)) is not None
        assert stand.victim.protocol.counters["drop_malformed"] > N_MUTATED // 10
        assert sum(liar.n_answered for liar in stand.liars) > 20
        await until(lambda: not any(node.protocol.n_outstanding for node in stand.nodes), "nothing outstanding")
        assert grown < RSS_GROWTH_MAX
        counters = {name: n for name, n in stand.victim.protocol.counters.items() if name.startswith("drop")}
        # What a datagram costs does not depend on how much of a core other programs leave us; the rates do.
        cost_s = (during.cpu_s - during.lookups / alone.per_cpu_s) / N_MUTATED
        left = 1.0 - ATTACK_PER_S * cost_s
        print(
            f"\n{N_MUTATED:,} mutated datagrams at {N_MUTATED / during.wall_s:,.0f}/s: RSS grew by "
            f"{grown / (1 << 20):.1f} MiB; good lookups {alone.per_s:,.0f}/s alone, {during.per_s:,.0f}/s meanwhile "
            f"({during.per_s / alone.per_s:.0%}), with {alone.cpu_s / alone.wall_s:.0%} of a core; "
            f"{1e6 * cost_s:.1f} us of CPU per hostile datagram: of a whole core {left:.0%} are left at "
            f"{ATTACK_PER_S:,.0f}/s (target >= {GOODPUT:.0%}: {'met' if left >= GOODPUT else 'MISSED'}); {counters}"
        )
        if WHOLE:
            assert left >= GOODPUT

    uvloop.run(body())
    assert errors == []
    assert [record for record in caplog.records if record.exc_info] == []
