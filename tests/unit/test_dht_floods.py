"""Attacks on what a node holds and waits for: floods of records, stolen tokens, slow answers, clocks, cancellations."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgpack
import pytest

from fastcas.dht.budgets import HINTS_MAX, PER_SUBNET_SWARM, PROVIDERS_MAX, RPC_HARD_S, SUBNET_SHARE
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.provided import keys_of, metadata_key
from fastcas.dht.records import HintStore
from fastcas.dht.server import FcServer
from fastcas.dht.wire import REQUEST, encode
from tests.support.virtual_net import Address, VirtualNet, address_of, run


class Host(asyncio.DatagramProtocol):
    """An address that sends what it is told and keeps what it gets, or answers after a while."""

    def __init__(self, net: VirtualNet, address: Address, *, answer_after_s: float | None = None) -> None:
        self.net = net
        self.got: list[list[Any]] = []
        self.answer_after_s = answer_after_s
        self.transport = net.open(net.loop, self, *address, lambda exc: None)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if data[0] != REQUEST:
            self.got.append(msgpack.unpackb(data[21:]))
        elif self.answer_after_s is not None:
            reply = b"\x01" + data[1:21] + msgpack.packb([0, bytes(6), b"t" * 8, b"", b""])
            self.net.loop.call_later(self.answer_after_s, self.transport.sendto, reply, addr)

    def ask(self, target: Address, name: str, *args: Any, token: bytes = b"", node_id: bytes = b"H" * 20) -> None:
        request = encode(REQUEST, random.randbytes(20), [name, [1, 1, node_id, token, *args]])
        self.transport.sendto(request, target)

    async def token(self, node: FcServer, node_id: bytes = b"H" * 20) -> bytes:
        self.got.clear()
        self.ask(address_of(node), "fn", bytes(20), 1, bytes(400), node_id=node_id)
        await asyncio.sleep(1.0)
        return bytes(self.got[-1][2])


def test_token_of_another_address_port_or_id_or_an_old_one_writes_nothing() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        owner, elsewhere, other_port = [
            Host(net, address) for address in (("8.8.8.8", 5000), ("9.9.9.9", 5000), ("8.8.8.8", 5001))
        ]
        token = await owner.token(node)
        for host in (elsewhere, other_port):
            host.ask(address_of(node), "ap", 9000, 3600, bytes(8), token=token)
        owner.ask(address_of(node), "ap", 9000, 3600, bytes(8), token=token, node_id=b"I" * 20)
        await asyncio.sleep(1.0)
        assert node.protocol.hints.n_hints == 0
        assert [host.got[-1][0] for host in (elsewhere, other_port, owner)] == [1, 1, 1]
        owner.ask(address_of(node), "ap", 9000, 3600, bytes(8), token=token)
        await asyncio.sleep(1.0)
        assert node.protocol.hints.n_hints == 1
        await asyncio.sleep(600.0)
        owner.ask(address_of(node), "ap", 9000, 3600, b"another!", token=token)
        await asyncio.sleep(1.0)
        assert (owner.got[-1][0], node.protocol.hints.n_hints) == (1, 1)

    run(body)


def test_a_provider_is_at_the_address_it_wrote_from_whatever_it_says() -> None:
    """There is no field for an address; what looks like one is padding, and the port is the declared data port."""

    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(3)
        liar = Host(net, ("10.66.0.1", 5000))
        key = bytes(range(32))
        for node in nodes:
            token = await liar.token(node)
            liar.ask(address_of(node), "ap", 9100, 3600, key[:8], "7.7.7.7", b"\x07" * 6, token=token)
            await asyncio.sleep(1.0)
        found: list[Any] = []
        await nodes[0].finder.find_chunks(key, 16, 5.0, lambda news: found.extend(news[0]))
        assert {(peer.ip, peer.port) for peer in found} == {("10.66.0.1", 9100)}

    run(body)


@pytest.mark.slow
def test_flood_of_stores_is_capped_and_honest_records_survive() -> None:
    """Ten /24s of attackers write as fast as they may, under many ids; 1,000 honest keys of 10 nodes must stay."""

    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        store = node.protocol.hints = node.protocol._handlers._hints = HintStore(net.loop.time, limit=20_000)
        rng = random.Random(1)
        honest = {rng.getrandbits(64): number for number in range(10) for _ in range(100)}
        for key, number in honest.items():
            assert store.put(bytes((number,)) * 20, f"77.1.{number}.1", 8468, 9000, key.to_bytes(8), 86_400)
        file = rng.randbytes(20)
        for number in range(3):
            assert node.protocol.swarms.put(file, bytes((number,)) * 20, f"77.1.{number}.1", 8468, 9000, 1000, 7200)
        hosts = [Host(net, (f"66.1.{number % 10}.{number // 10 + 1}", 5000)) for number in range(100)]
        tokens = [await host.token(node) for host in hosts]
        for _ in range(40):
            for host, token in zip(hosts, tokens, strict=True):
                host.ask(address_of(node), "ap", 9000, 86_400, rng.randbytes(8 * 130), token=token)
                host.ask(address_of(node), "as", 9000, 86_400, (file + b"\x03\xe8") * 20, token=token)
            await asyncio.sleep(1.0)
        assert node.protocol.counters["answered"] > 4_000
        assert store.n_hints <= 20_000
        kept = sum(any(p.node_id == bytes((n,)) * 20 for p in store.get(key, 64)) for key, n in honest.items())
        assert kept >= 0.99 * len(honest)
        for number in range(10):
            subnet = f"66.1.{number}".encode()
            mine = [p for p in store._providers.values() if p.ip.encode().startswith(subnet) and not p.is_withdrawn]
            assert sum(p.n_hints for p in mine) <= 20_000 * SUBNET_SHARE
        members = [provider.ip for provider, _ in node.protocol.swarms.get(file, 64)]
        assert {f"77.1.{number}.1" for number in range(3)} <= set(members)
        assert len(members) <= 3 + 10 * PER_SUBNET_SWARM

    run(body)


def test_announcers_are_bounded_in_all_and_per_subnet_and_their_numbers_are_used_again() -> None:
    now = 0.0
    store = HintStore(lambda: now, limit=HINTS_MAX)
    accepted = sum(
        store.put(number.to_bytes(20), "66.1.1.1", 8468, 9000, number.to_bytes(8), 3600)
        for number in range(int(1.5 * PROVIDERS_MAX * SUBNET_SHARE))
    )
    assert accepted == PROVIDERS_MAX * SUBNET_SHARE
    for number in range(2 * PROVIDERS_MAX):
        store.put(number.to_bytes(20), f"10.0.{number % 250}.1", 8468, 9000, number.to_bytes(8), 3600)
    assert store.n_providers == PROVIDERS_MAX
    assert store.put(b"n" * 20, "77.1.1.1", 8468, 9000, bytes(8), 3600) == 0
    now = 4000.0
    assert store.put(b"n" * 20, "77.1.1.1", 8468, 9000, bytes(8), 3600) == 1
    assert (store.n_providers, store._next_number) == (1, PROVIDERS_MAX)


def test_answers_at_the_hard_limit_end_lookups_in_time_and_are_worth_nothing() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        slow = [Host(net, (f"10.66.0.{i}", 8468), answer_after_s=RPC_HARD_S) for i in range(1, 21)]
        rng = random.Random(1)
        seeds = [Contact(rng.randbytes(20), *host.transport.address) for host in slow]
        start = net.loop.now
        result = await Lookup(nodes[0].protocol, 1 << 159, seeds=seeds).run()
        assert net.loop.now - start <= 10.0
        assert {c.id for c in result.nodes} == {n.identity.node_id for n in nodes[1:]}
        await asyncio.sleep(3.0)
        assert nodes[0].protocol.counters["drop_unasked"] >= 1
        assert nodes[0].protocol.n_outstanding == 0

    run(body)


def test_jump_of_the_wall_clock_changes_no_record_held_and_no_lookup() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        file, hashes = bytes(32), random.Random(1).randbytes(32 * 200)
        await nodes[1].announcer.announce_chunks(keys_of(hashes))
        await nodes[1].announcer.announce_files([(file, 1000)])
        await nodes[1].announcer.put_metadata(file, "name", 1, file)
        for jump_s in (-10 * 365 * 86_400.0, 3600.0):
            for node in nodes:
                node.protocol.metadata._wall = lambda jump_s=jump_s: 1_800_000_000.0 + net.loop.now + jump_s
            assert await nodes[4].finder.find_chunks(hashes, 4, 10.0, lambda news: None) == 200
            assert await nodes[4].finder.find_file(file, 4, 10.0, lambda peers: None) == 1
            assert len(await nodes[4].finder.get_metadata(file, 10.0)) == 1
            assert all(node.protocol.metadata.get(metadata_key(file)) for node in nodes if node is not nodes[1])
            assert all(node.protocol.n_outstanding == 0 for node in nodes)

    run(body)


@pytest.mark.slow
def test_100_000_cancelled_requests_and_lookups_leave_nothing_behind() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        silent = Host(net, ("10.66.0.1", 8468))
        protocol = node.protocol
        for _ in range(100):
            before = protocol.n_outstanding
            calls = [protocol.request(silent.transport.address, "fn", [bytes(20), 1]) for _ in range(900)]
            for call in calls:
                call.cancel()
            assert protocol.n_outstanding == before
            seeds = [Contact(bytes((1 + i,)) * 20, *silent.transport.address) for i in range(4)]
            lookups = [asyncio.ensure_future(Lookup(protocol, 5, seeds=seeds).run()) for _ in range(100)]
            await asyncio.sleep(0)
            for lookup in lookups:
                lookup.cancel()
            await asyncio.gather(*lookups, return_exceptions=True)
            await asyncio.sleep(0.05)
        await asyncio.sleep(2 * RPC_HARD_S)
        assert protocol.n_outstanding == 0
        assert protocol.counters["drop_outstanding"] == 0
        assert protocol._calls._due == []

    run(body)
