"""The discovery backends that need no network, the composite, and the ring backend against a scripted process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack
import pytest

from fastcas.errors import LocalProtocolError, NodeUnavailable, UsageError
from fastcas.ids import PeerAddr
from fastcas.peers.discovery import (
    CompositeDiscovery,
    Discovery,
    MemoryDiscovery,
    MemoryNetwork,
    MetadataHint,
    NodeHint,
    PeerHint,
    StaticDiscovery,
)
from fastcas.peers.ring_discovery import RingDiscovery
from fastcas.table import Ring
from tests.support.waiting import until

FILE, OTHER = bytes(range(32)), bytes(32)
A = PeerHint("a" * 40, "10.0.0.1", 9000, "memory")
B = PeerHint("b" * 40, "10.0.0.2", 9000, "memory")


async def listed(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def test_every_backend_is_a_discovery() -> None:
    requests, answers = Ring.create(), Ring.create()
    ring = RingDiscovery(requests, answers)
    for backend in (StaticDiscovery([]), MemoryDiscovery(MemoryNetwork()), CompositeDiscovery([]), ring):
        assert isinstance(backend, Discovery)
    asyncio.run(ring.close())


def test_static_yields_every_named_peer_once_for_everything() -> None:
    async def body() -> None:
        static = StaticDiscovery([PeerAddr("10.0.0.1", 1), ("host.example", 2), ("10.0.0.1", 1)])
        assert [h.addr for h in await listed(static.find_file_peers(FILE, 1, 1.0))] == [
            PeerAddr("10.0.0.1", 1),
            PeerAddr("host.example", 2),
        ]
        assert len(await listed(static.find_chunk_peers([FILE, OTHER], 1, 1.0))) == 4
        assert await static.announce_files([(FILE, 1000)]) == 0
        assert await static.announce_chunks([FILE]) == 0
        assert await static.put_metadata(FILE, "x", 1, OTHER) == 0
        assert await static.get_metadata(FILE, 1.0) == []
        assert await static.routing() == []
        assert await static.stats() == {"peers": 2}
        await static.withdraw(everything=True)
        await static.close()

    asyncio.run(body())


def test_memory_network_finds_others_but_not_oneself_and_withdraws() -> None:
    async def body() -> None:
        net = MemoryNetwork()
        a, b, asker = MemoryDiscovery(net, A), MemoryDiscovery(net, B), MemoryDiscovery(net)
        assert await a.announce_files([(FILE, 1000)]) == 1
        assert await b.announce_files([(FILE, 10)]) == 1
        assert await a.announce_chunks([FILE, OTHER]) == 2
        assert await asker.announce_files([(FILE, 1)]) == await asker.announce_chunks([FILE]) == 0
        assert await listed(asker.find_file_peers(FILE, 8, 1.0)) == [A, B]
        assert await listed(a.find_file_peers(FILE, 8, 1.0)) == [B]
        assert await listed(b.find_chunk_peers([FILE], 8, 1.0)) == [(FILE, A)]
        assert await a.put_metadata(FILE, "name", 5, OTHER) == 1
        assert await b.get_metadata(FILE, 1.0) == [MetadataHint("name", 5, OTHER, "a" * 40)]
        assert await a.routing() == [NodeHint("b" * 40, "10.0.0.2", 9000)]
        assert await a.stats() == {"files": 1, "chunks": 2, "nodes": 2}
        await a.withdraw([FILE], chunks=[OTHER])
        assert await listed(asker.find_file_peers(FILE, 8, 1.0)) == [B]
        assert await listed(asker.find_chunk_peers([FILE, OTHER], 8, 1.0)) == [(FILE, A)]
        await a.withdraw(everything=True)
        assert await listed(asker.find_chunk_peers([FILE], 8, 1.0)) == []
        await a.close()
        assert await b.routing() == []

    asyncio.run(body())


class Slow(MemoryDiscovery):
    """Never says anything; `failing` ones raise."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(MemoryNetwork())
        self.error = error
        self.ended = False

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        try:
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
            yield A
        finally:
            self.ended = True

    async def announce_files(self, items: Any) -> int:
        raise NodeUnavailable("gone") if self.error is None else self.error


def test_composite_streams_first_answers_merges_addresses_and_survives_failures() -> None:
    async def body() -> None:
        net = MemoryNetwork()
        await MemoryDiscovery(net, A).announce_files([(FILE, 1000)])
        slow, broken = Slow(), Slow(NodeUnavailable("gone"))
        same = StaticDiscovery([(A.ip, A.port), (B.ip, B.port)])
        composite = CompositeDiscovery([slow, broken, MemoryDiscovery(net), same])
        hints = await listed(composite.find_file_peers(FILE, 8, 0.05))
        assert [h.addr for h in hints] == [A.addr, B.addr]
        assert slow.ended and broken.ended
        assert await composite.announce_files([(FILE, 1)]) == 0
        assert await composite.announce_chunks([FILE]) == 0
        pairs = await listed(composite.find_chunk_peers([FILE, FILE], 8, 1.0))
        assert len(pairs) == 2
        assert set(await composite.stats()) == {"memory", "static"}
        assert await composite.get_metadata(FILE, 1.0) == []
        assert [n.ip for n in await composite.routing()] == [A.ip]
        await composite.withdraw(everything=True)
        await composite.close()

    asyncio.run(body())


def test_composite_does_not_hide_bugs_of_a_backend() -> None:
    async def body() -> None:
        with pytest.raises(ZeroDivisionError):
            await CompositeDiscovery([Slow(ZeroDivisionError())]).announce_files([])

    asyncio.run(body())


class Script:
    """The DHT process's end of two rings: answers each request as `reply(request)` says."""

    def __init__(self, reply: Callable[[dict[str, Any]], list[Any]]) -> None:
        self.mine = Ring.create(1 << 16), Ring.create(1 << 16)
        self.requests = Ring.attach(self.mine[0].memfd, self.mine[0].eventfd)
        self.answers = Ring.attach(self.mine[1].memfd, self.mine[1].eventfd)
        self.reply = reply
        self.seen: list[dict[str, Any]] = []
        asyncio.get_running_loop().add_reader(self.requests.eventfd, self.read)

    def read(self) -> None:
        for raw in self.requests.drain():
            request = msgpack.unpackb(raw)
            self.seen.append(request)
            for answer in self.reply(request):
                data = answer if isinstance(answer, bytes) else msgpack.packb({"id": request["id"], **answer})
                assert self.answers.push(data)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.requests.eventfd)
        self.requests.close()
        self.answers.close()


def test_ring_streams_partial_answers_and_drops_what_is_malformed() -> None:
    async def body() -> None:
        script = Script(
            lambda request: [
                b"\xc1",
                msgpack.packb([1]),
                {"ok": True, "more": True, "peers": [["a" * 40, "10.0.0.1", 9000], ["x", "localhost", 1], 5]},
                {
                    "ok": True,
                    "more": True,
                    "peers": [[A.node_id, A.ip, A.port], [None, "::1", 2], ["b", "1.1.1.1", 0]],
                },
                {"ok": True, "peers": [["c" * 40, "10.0.0.3", 70000]]},
            ]
        )
        ring = RingDiscovery(*script.mine)
        hints = await listed(ring.find_file_peers(FILE, 8, 5.0))
        assert [(h.node_id, h.ip, h.port, h.source) for h in hints] == [
            ("a" * 40, "10.0.0.1", 9000, "dht"),
            (None, "::1", 2, "dht"),
        ]
        assert ring.dropped_answers == 2
        await ring.close()
        script.close()

    asyncio.run(body())


def test_ring_chunk_answers_name_keys_and_peers_by_position_within_bounds() -> None:
    async def body() -> None:
        script = Script(
            lambda request: [
                {
                    "ok": True,
                    "peers": [["a" * 40, "10.0.0.1", 9000], "junk"],
                    "found": [[0, [0, 1, 7]], [1, [0]], [2, [0]], [-1, [0]], "junk", [0]],
                }
            ]
        )
        ring = RingDiscovery(*script.mine)
        pairs = await listed(ring.find_chunk_peers([FILE, OTHER], 8, 5.0))
        assert [(digest, hint.ip) for digest, hint in pairs] == [(FILE, "10.0.0.1"), (OTHER, "10.0.0.1")]
        await ring.close()
        script.close()

    asyncio.run(body())


def test_ring_calls_return_numbers_and_raise_typed_errors() -> None:
    def reply(request: dict[str, Any]) -> list[Any]:
        match request["op"]:
            case "announce_files":
                return [{"ok": True, "stored": 2}]
            case "announce_chunks":
                return [{"ok": True, "keys": 1, "stored": len(request["keys"]) // 32}]
            case "put_metadata":
                return [{"ok": False, "error": "UsageError", "message": "name too long"}]
            case "get_metadata":
                good = {"name": "n", "size": 1, "manifest_hash": OTHER, "publisher": "p"}
                return [{"ok": True, "records": [good, {**good, "size": -1}, {**good, "manifest_hash": b"x"}, 7]}]
            case "routing":
                return [{"ok": True, "nodes": [["a" * 40, "10.0.0.1", 8468], [None, "10.0.0.1", 1]]}]
            case "stats":
                return [{"ok": True, "lookups": 3}]
            case "bootstrap":
                return [{"ok": True, "contacts": 4}]
            case "withdraw":
                return [{"ok": False, "error": "Weird", "message": "no"}]
        raise AssertionError(request)

    async def body() -> None:
        script = Script(reply)
        ring = RingDiscovery(*script.mine)
        assert await ring.announce_files([(FILE, 1000), (OTHER, 1)]) == 2
        assert await ring.announce_chunks([os.urandom(32) for _ in range(100)]) == 100
        with pytest.raises(UsageError, match="name too long"):
            await ring.put_metadata(FILE, "x" * 300, 1, OTHER)
        assert await ring.get_metadata(FILE, 1.0) == [MetadataHint("n", 1, OTHER, "p")]
        assert await ring.routing() == [NodeHint("a" * 40, "10.0.0.1", 8468)]
        assert await ring.stats() == {"lookups": 3}
        assert await ring.bootstrap([("h", 1)]) == 4
        with pytest.raises(LocalProtocolError):
            await ring.withdraw([FILE])
        with pytest.raises(LocalProtocolError, match="do not fit"):
            await ring.announce_chunks([os.urandom(32) for _ in range(2000)])
        await ring.close()
        script.close()

    asyncio.run(body())


def test_ring_tells_a_new_process_the_chunks_that_were_announced_and_not_withdrawn() -> None:
    async def body() -> None:
        scripts = [Script(lambda request: [{"ok": True, "stored": 1}]) for _ in range(3)]
        ring = RingDiscovery(*scripts[0].mine)
        assert await ring.announce_chunks([FILE]) == await ring.announce_chunks([OTHER]) == 1
        ring.replace_rings(*scripts[1].mine)
        await until(lambda: bool(scripts[1].seen), "the new process was told")
        await ring.withdraw(chunks=[FILE])
        ring.replace_rings(*scripts[2].mine)
        await until(lambda: bool(scripts[2].seen), "the next process was told")
        await ring.withdraw(everything=True)
        ring.replace_rings(*(last := Script(lambda request: [{"ok": True}])).mine)
        assert await ring.stats() == {}
        told = [[request.get("keys") for request in script.seen] for script in (*scripts[1:], last)]
        assert told == [[OTHER + FILE, FILE], [OTHER, None], [None]]
        await ring.close()
        for script in (*scripts, last):
            script.close()

    asyncio.run(body())


def test_ring_asks_again_on_new_rings_and_ends_what_waits_when_closed() -> None:
    async def body() -> None:
        silent, speaking = Script(lambda request: []), Script(lambda request: [{"ok": True, "lookups": 1}])
        ring = RingDiscovery(*silent.mine)
        asking = asyncio.ensure_future(ring.stats())
        async with asyncio.timeout(10):
            while not silent.seen:  # noqa: ASYNC110 - the other end of the ring is not ours to signal
                await asyncio.sleep(0)
        ring.replace_rings(*speaking.mine)
        assert await asking == {"lookups": 1}
        assert speaking.seen == silent.seen

        ring.replace_rings(*Script(lambda request: []).mine)
        finding = asyncio.ensure_future(listed(ring.find_file_peers(FILE, 1, 30.0)))
        asking = asyncio.ensure_future(ring.stats())
        await asyncio.sleep(0)
        await ring.close()
        await ring.close()
        assert await finding == []
        with pytest.raises(NodeUnavailable):
            await asking
        with pytest.raises(NodeUnavailable):
            await ring.stats()
        silent.close()
        speaking.close()

    asyncio.run(body())
