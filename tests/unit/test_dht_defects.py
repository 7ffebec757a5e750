"""What a hostile network may send: none of it closes, stalls or turns the node against others.

Each test replays a defect of the stock `kademlia` 2.2.3 / `rpcudp` 5.0.1 (the numbers are those of the design's list)
against our node.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from kademlia.network import Server
from kademlia.protocol import KademliaProtocol
from kademlia.routing import KBucket, RoutingTable
from rpcudp.protocol import RPCProtocol

from fastcas.dht.contacts import Contact, parse_contact, parse_contacts
from fastcas.dht.identity import Identity, challenge_text
from fastcas.dht.lookup import Lookup
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from fastcas.dht.state import SavedState, load_state
from fastcas.dht.wire import REPLY, REQUEST, decode, encode, pack_observed
from fastcas.errors import UsageError
from fastcas.peers.policy import AddressPolicy
from tests.support.virtual_net import Address, VirtualNet, address_of, run, true_nearest

ATTACKER = ("203.0.113.5", 4444)
SEED = int(os.environ.get("FASTCAS_TEST_SEED", "1"))


class Attacker(asyncio.DatagramProtocol):
    """A host that signs pings correctly and answers everything else as `answer(name, args)` says."""

    def __init__(self, net: VirtualNet, address: Address, answer: Callable[[str, list[Any]], Any]) -> None:
        self.identity = Identity(b"attacker".ljust(32))
        self.address = address
        self.answer = answer
        self.got: list[bytes] = []
        self.n_asked = 0
        self.transport = net.open(net.loop, self, *address, lambda exc: None)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.append(data)
        if data[0] != REQUEST:
            return
        self.n_asked += 1
        name, args = msgpack.unpackb(data[21:])
        head = [0, pack_observed(*addr), b"t" * 8]
        if name == "ping":
            text = challenge_text(args[4], self.identity.node_id, head[1], bytes(8))
            body: Any = [*head, self.identity.node_id, self.identity.public, self.identity.sign(text)]
        else:
            body = self.answer(name, args)
            if isinstance(body, list):
                body = head + body
        raw = body if isinstance(body, bytes) else b"\x01" + data[1:21] + msgpack.packb(body)
        self.transport.sendto(raw, addr)

    def send(self, target: Address, body: Any, *, kind: int = REQUEST) -> int:
        raw = body if isinstance(body, bytes) else bytes((kind,)) + random.randbytes(20) + msgpack.packb(body)
        self.transport.sendto(raw, target)
        return len(raw)


@contextlib.contextmanager
def no_loop_errors() -> Iterator[None]:
    """Fail when anything reaches the loop's exception handler."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    yield
    assert errors == []


async def wait_for_pong(asker: FcServer, port: int) -> None:
    """Ping until there is a signed answer; a busy machine may need more than one second."""
    async with asyncio.timeout(20):
        while await asker.protocol.ping(("127.0.0.1", port)) is None:
            pass


def request(name: str, *args: Any, token: bytes = b"", node_id: bytes = b"A" * 20, flags: int = 0) -> list[Any]:
    return [name, [1, flags, node_id, token, *args]]


HOSTILE_NODES: list[list[Any]] = [
    [[[b"B" * 20, "10.0.0.9", 70000]], b""],
    [[[b"B" * 20, "localhost", 1]], b""],
    [b"B" * 20 + bytes([10, 0, 0, 9]) + (0).to_bytes(2), b""],
    [b"B" * 20 + bytes(4) + (99).to_bytes(2), b""],
    [b"B" * 20 + b"\xff" * 4 + (99).to_bytes(2), b""],
    [b"B" * 20 + bytes([224, 0, 0, 1]) + (99).to_bytes(2), b""],
    [b"B" * 20 + bytes([127, 0, 0, 1]) + (99).to_bytes(2), b""],
    [b"B" * 25, b"C" * 37],
    [b"", b"B" * 20 + bytes(15) + b"\x01" + (99).to_bytes(2)],
    [b"", b"B" * 20 + bytes(10) + b"\xff\xff\x0a\x00\x00\x09" + (99).to_bytes(2)],
    [None, None],
    ["x", {}],
    [],
    [b"\x00" * 5],
]


@pytest.mark.parametrize("nodes", HOSTILE_NODES, ids=range(len(HOSTILE_NODES)))
def test_defects_1_2_7_hostile_contacts_in_a_reply_are_never_contacted_and_end_no_lookup(nodes: list[Any]) -> None:
    async def body(net: VirtualNet) -> None:
        honest = await net.grow(3)
        attacker = Attacker(net, ("10.66.0.1", 8468), lambda name, args: nodes)
        assert await honest[0].protocol.ping(attacker.address) is not None
        targets: set[Address] = set()
        net.taps.append(lambda source, target, data: targets.add(target))
        with no_loop_errors():
            result = await Lookup(honest[0].protocol, 5).run()
        assert {c.id for c in result.nodes} >= set(true_nearest(honest[1:], 5, 2))
        assert targets <= {*map(address_of, honest), attacker.address}
        assert not honest[0].protocol.transport.is_closing()

    run(body)


def test_defect_3_a_request_gets_one_small_reply_and_nothing_else_however_much_is_stored() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        node.start()
        for number in range(500):
            node.protocol.hints.put(b"P" * 20, "10.1.1.1", 1, 9000, random.randbytes(8 * 100), 3600)
            node.protocol.swarms.put(random.randbytes(20), b"P" * 20, "10.1.1.1", number + 1, 9000, 1000, 3600)
        attacker = Attacker(net, ATTACKER, lambda name, args: [])
        size = attacker.send(address_of(node), request("ping", bytes(16)))
        await asyncio.sleep(30)
        assert len(attacker.got) == 1
        assert len(attacker.got[0]) <= 3 * size

    run(body)


@pytest.mark.slow
def test_defect_3_bytes_out_to_an_unproven_address_stay_below_three_times_bytes_in() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(30)
        victim = nodes[0]
        rng = random.Random(SEED)
        await nodes[1].announcer.announce_files([(bytes(32), 1000)])
        await nodes[1].announcer.put_metadata(bytes(32), "name" * 50, 1, bytes(32))
        stored = rng.randbytes(32 * 1000)
        await nodes[1].announcer.announce_chunks(keys_of(stored))
        out: dict[Address, int] = {}
        sent: dict[Address, int] = {}
        net.taps.append(lambda source, target, data: out.update({target: out.get(target, 0) + len(data)}))
        shapes: list[Callable[[], list[Any]]] = [
            lambda: request("ping", rng.randbytes(16)),
            lambda: request("fn", rng.randbytes(20), 20),
            lambda: request("gs", rng.choice(list(victim.protocol.swarms._keys) or [bytes(20)]), 255),
            lambda: request("gm", rng.choice(list(victim.protocol.metadata._keys) or [bytes(20)]), 0),
            lambda: request("gp", b"", stored[:8] + stored[32:40] * rng.randrange(1, 90), 255),
            lambda: request("ap", 9000, 3600, rng.randbytes(8), token=rng.randbytes(8)),
            lambda: request("wd", 0, b"", node_id=rng.randbytes(20)),
        ]
        attackers = [Attacker(net, (f"203.0.{i}.5", 4444), lambda name, args: []) for i in range(50)]
        for _ in range(40):
            for attacker in attackers:
                size = attacker.send(address_of(victim), rng.choice(shapes)())
                sent[attacker.address] = sent.get(attacker.address, 0) + size
            await asyncio.sleep(0.2)
        await asyncio.sleep(10)
        for attacker in attackers:
            assert 0 < out[attacker.address] <= 3 * sent[attacker.address]
            assert all(data[0] == REPLY for data in attacker.got)
        assert len(victim.protocol.router) <= 30

    run(body)


def test_defect_4_repeated_contacts_that_do_not_fit_cause_no_traffic() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(3)
        node = nodes[0]
        node.protocol.hints.put(b"P" * 20, "10.1.1.1", 1, 9000, random.randbytes(800), 3600)
        before = node.protocol.counters["datagrams_out"]
        for number in range(1000):
            node.protocol.welcome_if_new(Contact(random.Random(number).randbytes(20), "10.2.2.2", number + 1))
        assert node.protocol.counters["datagrams_out"] == before
        assert len(node.protocol.router) == 2

    run(body)


MALFORMED: list[bytes] = [
    b"",
    b"\x00",
    b"\x00" * 21,
    b"\x00" * 22,
    b"\x00" + b"i" * 20 + b"\x91" * 1000,
    b"\x00" + b"i" * 20 + b"\x91" * 60_000,
    b"\x00" + b"i" * 20 + b"\xdd\xff\xff\xff\xff",
    b"\x00" + b"i" * 20 + b"\xdf\xff\xff\xff\xff",
    b"\x00" + b"i" * 20 + b"\xc6\xff\xff\xff\xff",
    b"\x00" + b"i" * 20 + b"\xc1",
    b"\x00" + b"i" * 20 + b"\xd9\x04\xff\xfe\xfd\xfc",
    b"\x00" + b"i" * 20 + msgpack.packb(["ping"]),
    b"\x00" + b"i" * 20 + msgpack.packb(["ping", []]),
    b"\x00" + b"i" * 20 + msgpack.packb(["ping", {}]),
    b"\x00" + b"i" * 20 + msgpack.packb([{}, []]),
    b"\x00" + b"i" * 20 + msgpack.packb(["__init__", [1, 0, b"A" * 20, b""]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["stun", [1, 0, b"A" * 20, b""]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["ping", [1, 0, "A" * 20, b"", bytes(16)]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["ping", [1, 0, b"A" * 21, b"", bytes(16)]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["ping", [-1, 0, b"A" * 20, b"", bytes(16)]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["ping", [True, 0, b"A" * 20, b"", bytes(16)]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["fn", [1, 0, b"A" * 20, b"", b"x" * 20, 10**18]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["fn", [1, 0, b"A" * 20, b"", b"x" * 19, 20]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["gp", [1, 0, b"A" * 20, b"", b"x", b"y" * 9, 1]]),
    b"\x00" + b"i" * 20 + msgpack.packb(["pm", [1, 0, b"A" * 20, b"", b"k" * 20, 1, 2, 3, 4, 5]]),
    b"\x01" + b"i" * 20 + msgpack.packb([0, b"", b""]),
    b"\x02" + b"i" * 20 + msgpack.packb([0, b"", b""]),
    os.urandom(1200),
]


def test_defect_5_malformed_datagrams_on_a_real_socket_leave_it_open_and_raise_nothing() -> None:
    async def body() -> None:
        node, friend = [FcServer(policy=AddressPolicy(own=())) for _ in range(2)]
        await node.listen(0, "127.0.0.1")
        await friend.listen(0, "127.0.0.1")
        rng = random.Random(SEED)
        with no_loop_errors(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
            attacker.bind(("127.0.0.1", 0))
            attacker.setblocking(False)
            good = encode(REQUEST, b"i" * 20, request("fn", b"x" * 20, 20))
            mutated = [
                bytes(b if rng.random() > 0.05 else rng.randrange(256) for b in good)[: rng.randrange(20, 90)]
                for _ in range(2000)
            ]
            for datagram in [*MALFORMED, *mutated]:
                attacker.sendto(datagram, ("127.0.0.1", node.port))
                await asyncio.sleep(0)
            await wait_for_pong(friend, node.port)
            assert not node.protocol.transport.is_closing()
            assert node.protocol.counters["drop_malformed"] >= len(MALFORMED) // 2
        await node.close()
        await friend.close()

    asyncio.run(body())


def test_defect_1_impossible_addresses_given_to_send_leave_the_real_socket_open() -> None:
    async def body() -> None:
        node = FcServer(policy=AddressPolicy(own=()))
        await node.listen(0, "127.0.0.1")
        with no_loop_errors():
            impossible: list[Any] = [
                ("127.0.0.1", 70000), ("127.0.0.1", -1), ("localhost", 9), ("127.0.0.1\0", 9), ("::1", 9),
                ("255.255.255.255", 9), ("240.0.0.1", 9),
            ]  # fmt: skip
            for address in impossible:
                node.protocol._send(b"x" * 30, address)
            await asyncio.sleep(0)
            assert not node.protocol.transport.is_closing()
            await wait_for_pong(node, node.port)
        await node.close()

    asyncio.run(body())


def test_lost_socket_is_opened_again_on_the_same_port() -> None:
    async def body() -> None:
        node, friend = [FcServer(policy=AddressPolicy(own=())) for _ in range(2)]
        await node.listen(0, "127.0.0.1")
        await friend.listen(0, "127.0.0.1")
        port = node.port
        transport = node.protocol.transport
        transport._note(OSError(5, "input/output error"))
        assert transport.is_closing()
        await wait_for_pong(friend, port)
        assert node.port == port
        assert node.protocol.counters["rebinds"] == 1
        await node.close()
        await friend.close()

    asyncio.run(body())


def test_defect_6_ever_closer_contacts_end_at_the_budget() -> None:
    async def body(net: VirtualNet) -> None:
        node = (await net.grow(2))[0]
        made = 0

        def closer(name: str, args: list[Any]) -> list[Any]:
            nonlocal made
            target = int.from_bytes(args[4])
            blob = b""
            for _ in range(20):
                made += 1
                near = (target ^ ((1 << 120) >> (made // 40 % 100)) ^ made).to_bytes(20)
                ip = bytes([10, 200 + made // 65536, made // 256 % 256, made % 256])
                address = (socket.inet_ntoa(ip), 5000)
                if address not in net.hosts:
                    Attacker(net, address, closer)
                blob += near + ip + (5000).to_bytes(2)
            return [blob, b""]

        first = Attacker(net, ("10.66.0.1", 8468), closer)
        assert await node.protocol.ping(first.address) is not None
        start = net.loop.now
        result = await Lookup(node.protocol, 12345).run()
        assert result.n_asked <= 120
        assert net.loop.now - start <= 10.5
        assert result.is_cut

    run(body)


def test_defect_8_writes_without_a_token_or_with_another_sources_token_store_nothing() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        node.start()
        thief = Attacker(net, ("10.66.0.1", 5000), lambda name, args: [])
        owner = Attacker(net, ("10.66.0.2", 5000), lambda name, args: [])
        owner.send(address_of(node), request("fn", bytes(20), 1))
        await asyncio.sleep(1)
        token = msgpack.unpackb(owner.got[0][21:])[2]
        writes = [
            ("ap", 9000, 3600, bytes(8)),
            ("as", 9000, 3600, bytes(22)),
            ("pm", bytes(20), bytes(32), 1, 2_000_000_000, b"v", bytes(64)),
            ("wd", 0, b""),
        ]
        for write in writes:
            thief.send(address_of(node), request(*write))
            thief.send(address_of(node), request(*write, token=token))
            thief.send(address_of(node), request(*write, token=bytes(8)))
        await asyncio.sleep(1)
        assert [msgpack.unpackb(data[21:])[0] for data in thief.got] == [1] * 12
        assert (node.protocol.hints.n_hints, node.protocol.swarms.n_records, node.protocol.metadata.n_keys) == (0, 0, 0)
        owner.send(address_of(node), request("ap", 9000, 3600, bytes(8), token=token))
        await asyncio.sleep(1)
        assert node.protocol.hints.n_hints == 1
        await asyncio.sleep(11 * 60)
        owner.send(address_of(node), request("ap", 9000, 3600, b"12345678", token=token))
        await asyncio.sleep(1)
        assert node.protocol.hints.n_hints == 1

    run(body)


def test_defect_8_provider_address_is_the_observed_source() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(2)
        owner = Attacker(net, ("10.66.0.2", 5000), lambda name, args: [])
        owner.send(address_of(nodes[0]), request("fn", bytes(20), 1))
        await asyncio.sleep(1)
        token = msgpack.unpackb(owner.got[0][21:])[2]
        owner.send(address_of(nodes[0]), request("ap", 9000, 3600, bytes(8), token=token))
        await asyncio.sleep(1)
        found = [provider.ip for provider in nodes[0].protocol.hints.get(0, 16)]
        assert found == ["10.66.0.2"]

    run(body)


def test_defect_9_lookups_store_nothing_on_others() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(6)
        await nodes[1].announcer.put_metadata(bytes(32), "x", 1, bytes(32))
        writes: list[str] = []
        net.taps.append(lambda source, target, data: writes.extend(
            name for name in ("ap", "as", "pm", "wd") if data[0] == REQUEST and data[23:25] == name.encode()
        ))  # fmt: skip
        assert len(await nodes[5].finder.get_metadata(bytes(32), 10.0)) == 1
        assert writes == []

    run(body)


def test_defect_10_a_pickled_state_file_is_reported_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    path.write_bytes(pickle.dumps({"neighbors": [("10.0.0.1", 1)]}))
    assert load_state(path) == SavedState()
    assert "damaged" in caplog.text


def test_defect_11_senders_that_do_not_prove_themselves_enter_no_table() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        node.start()
        liar = Attacker(net, ("10.66.0.1", 5000), lambda name, args: [])
        for number in range(50):
            liar.send(address_of(node), request("fn", bytes(20), 1, node_id=bytes([number + 1]) * 20))
        await asyncio.sleep(5)
        for number, data in enumerate(list(liar.got)):
            token = msgpack.unpackb(data[21:])[2]
            claimed = bytes([number + 1]) * 20
            liar.send(address_of(node), request("fn", bytes(20), 1, node_id=claimed, token=token))
        await asyncio.sleep(5)
        assert {c.id for c in node.protocol.router} <= {liar.identity.node_id}
        assert len(node.protocol.router) <= 1

    run(body)


def test_defect_22_replies_from_another_address_and_late_replies_are_dropped() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        node.start()
        with no_loop_errors():
            silent = Attacker(net, ("10.66.0.1", 5000), lambda name, args: b"")
            other = Attacker(net, ("10.66.0.2", 5000), lambda name, args: [])
            future = node.protocol.request(silent.address, "fn", [bytes(20), 1])
            await asyncio.sleep(0.2)
            message_id = silent.got[0][1:21]
            other.send(address_of(node), encode(REPLY, message_id, [0, b"", b"", b"", b""]))
            assert await future is None
            cancelled = node.protocol.request(silent.address, "fn", [bytes(20), 1])
            cancelled.cancel()
            await asyncio.sleep(1)
            silent.send(address_of(node), encode(REPLY, silent.got[-1][1:21], [0, b"", b"", b"", b""]))
            await asyncio.sleep(1)
            assert node.protocol.n_outstanding == 0
            assert node.protocol.counters["drop_unasked"] >= 2

    run(body)


def test_defect_23_misspelt_attributes_are_errors() -> None:
    async def body(net: VirtualNet) -> None:
        node = await net.node(1)
        with pytest.raises(AttributeError):
            node.protocol.find_nodes  # noqa: B018
        with pytest.raises(UsageError):
            await node.set("key", "value")

    run(body)


def test_rate_limit_drops_a_flood_from_one_address_and_serves_others() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await net.grow(2)
        flood = Attacker(net, ATTACKER, lambda name, args: [])
        for _ in range(1000):
            flood.send(address_of(nodes[0]), request("ping", bytes(16)))
        await asyncio.sleep(3)
        assert len(flood.got) <= 120
        assert await nodes[1].protocol.ping(address_of(nodes[0])) is not None

    run(body)


def test_parse_contact_refuses_what_cannot_be_a_node() -> None:
    own = b"O" * 20

    def parsed(ip: bytes, port: int = 9, node_id: bytes = b"N" * 20, giver: str = "10.0.0.1") -> Contact | None:
        return parse_contact(node_id, ip, port, giver_ip=giver, own_id=own)

    assert parsed(bytes([10, 0, 0, 2])) is not None
    assert parsed(bytes([127, 0, 0, 1]), giver="127.0.0.5") is not None
    assert parsed(bytes(15) + b"\x01", giver="::1") is not None
    for ip in (b"", b"abc", bytes(4), b"\xff" * 4, bytes([239, 1, 1, 1]), bytes([0, 1, 1, 1]), bytes(16),
               b"\xff\x02" + bytes(14), b"\xfe\x80" + bytes(13) + b"\x01", bytes([127, 0, 0, 1])):  # fmt: skip
        assert parsed(ip) is None
    assert parsed(bytes([10, 0, 0, 2]), port=0) is None
    assert parsed(bytes([10, 0, 0, 2]), port=65536) is None
    assert parsed(bytes([10, 0, 0, 2]), node_id=own) is None
    assert parsed(bytes([10, 0, 0, 2]), node_id=b"N" * 21) is None
    assert parse_contacts(b"x" * 27, b"", giver_ip="10.0.0.1", own_id=own, limit=20) == []


def test_decode_never_raises() -> None:
    rng = random.Random(SEED)
    for datagram in MALFORMED:
        decode(datagram)
    for _ in range(5000):
        decode(rng.randbytes(rng.randrange(0, 120)))
    assert decode(b"\x00" * 21 + msgpack.packb({"a": 1})) is None
    assert decode(b"\x00" * 21 + msgpack.packb([1, 2])) == [1, 2]


def test_names_that_are_overridden_exist_in_the_packages() -> None:
    for cls, names in {
        RPCProtocol: ("datagram_received", "connection_made", "__getattr__", "_accept_response", "_timeout"),
        KademliaProtocol: ("welcome_if_new", "handle_call_response", "get_refresh_ids", "rpc_ping", "rpc_store"),
        RoutingTable: ("flush", "get_bucket_for", "is_new_node", "add_contact", "remove_contact", "find_neighbors",
                       "lonely_buckets", "split_bucket"),
        KBucket: ("split", "add_node", "remove_node", "touch_last_updated"),
        Server: ("listen", "stop", "bootstrap", "bootstrap_node", "bootstrappable_neighbors", "get", "set",
                 "set_digest", "save_state", "load_state", "refresh_table", "_refresh_table", "_create_protocol"),
    }.items():  # fmt: skip
        for name in names:
            assert name in vars(cls), f"{cls.__name__}.{name}"
    assert issubclass(FcProtocol, KademliaProtocol)
