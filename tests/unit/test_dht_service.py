"""The owner's side of a DHT node: ring requests of every shape, full rings, the state file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fastcas.dht.contacts import Contact
from fastcas.dht.server import FcServer
from fastcas.dht.service import DhtService
from fastcas.dht.state import SavedState, load_state, save_state
from fastcas.errors import NetworkError, PortInUse
from fastcas.peers.policy import AddressPolicy
from fastcas.peers.ring_discovery import RingDiscovery
from fastcas.table import Ring

HASH = bytes(range(32))
BUDGET_S = 10.0


class Owner:
    """The other ends of a service's rings."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.requests, self.answers = Ring.create(capacity), Ring.create(capacity)
        self.arrived = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.answers.eventfd, self.arrived.set)

    async def take(self, n: int) -> list[dict[str, Any]]:
        got: list[dict[str, Any]] = []
        async with asyncio.timeout(BUDGET_S):
            while len(got) < n:
                await self.arrived.wait()
                self.arrived.clear()
                got += [msgpack.unpackb(raw, strict_map_key=False) for raw in self.answers.drain()]
        return got

    async def ask(self, request: Any) -> dict[str, Any]:
        assert self.requests.push(msgpack.packb(request))
        return (await self.take(1))[0]

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.answers.eventfd)
        self.requests.close()
        self.answers.close()


@asynccontextmanager
async def service(capacity: int = 1 << 20) -> AsyncIterator[tuple[FcServer, Owner]]:
    owner = Owner(capacity)
    server = FcServer(policy=AddressPolicy(own=()))
    await server.listen(0, "127.0.0.1")
    server.start()
    serving = DhtService(
        server,
        Ring.attach(owner.requests.memfd, owner.requests.eventfd),
        Ring.attach(owner.answers.memfd, owner.answers.eventfd),
    )
    serving.attach()
    try:
        yield server, owner
    finally:
        await serving.close()
        await serving.close()
        await server.close()
        await server.close()
        owner.close()


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "nonsense"},
        {},
        {"op": None},
        {"op": "find_file"},
        {"op": "find_file", "file_hash": b"short", "want": 1, "deadline_s": 1.0},
        {"op": "find_file", "file_hash": HASH, "want": "many", "deadline_s": 1.0},
        {"op": "find_chunks", "keys": b"x" * 33, "want": 1, "deadline_s": 1},
        {"op": "announce_files", "files": [[HASH]]},
        {"op": "announce_files", "files": [[b"x", 1]]},
        {"op": "announce_chunks", "keys": b"x"},
        {"op": "withdraw", "files": ["x"]},
        {"op": "put_metadata", "file_hash": HASH, "name": "n" * 300, "size": 1, "manifest_hash": HASH},
        {"op": "put_metadata", "file_hash": HASH, "name": "n", "size": 1, "manifest_hash": b"x"},
        {"op": "get_metadata", "file_hash": HASH},
        {"op": "bootstrap", "peers": [["host", 70000]]},
        {"op": "bootstrap", "peers": ["host"]},
    ],
    ids=lambda request_: str(request_.get("op")),
)
def test_malformed_requests_get_a_usage_error_and_the_service_goes_on(request_: dict[str, Any]) -> None:
    async def body() -> None:
        async with service() as (_, owner):
            answer = await owner.ask({"id": 5, **request_})
            assert (answer["id"], answer["ok"], answer["error"]) == (5, False, "UsageError")
            assert (await owner.ask({"id": 6, "op": "routing"})) == {"id": 6, "ok": True, "nodes": []}

    asyncio.run(body())


def test_requests_without_a_number_are_dropped_and_counted() -> None:
    async def body() -> None:
        async with service() as (server, owner):
            for raw in (b"\xc1", b"", msgpack.packb([1]), msgpack.packb({"op": "stats"}), msgpack.packb({"id": "x"})):
                assert owner.requests.push(raw)
            answer = await owner.ask({"id": 1, "op": "stats"})
            assert answer["bad_ring_requests"] == 5
            assert (answer["contacts"], answer["nodes_estimated"], answer["port"]) == (0, 1, server.port)

    asyncio.run(body())


def test_answers_that_find_the_ring_full_come_later_in_order() -> None:
    async def body() -> None:
        async with service(4096) as (_, owner):
            loop = asyncio.get_running_loop()
            loop.remove_reader(owner.answers.eventfd)
            for number in range(60):
                assert owner.requests.push(msgpack.packb({"id": number, "op": "stats"}))
            owner.arrived.set()
            loop.add_reader(owner.answers.eventfd, owner.arrived.set)
            assert [answer["id"] for answer in await owner.take(60)] == list(range(60))

    asyncio.run(body())


def test_alone_node_answers_everything_at_once_through_the_ring_backend() -> None:
    async def body() -> None:
        async with service() as (server, owner):
            asyncio.get_running_loop().remove_reader(owner.answers.eventfd)
            ring = RingDiscovery(owner.requests, owner.answers, owns_rings=False)
            server.announcer.set_data_port(9000)
            assert await ring.announce_files([(HASH, 1000)]) == 1
            assert await ring.announce_chunks([HASH, bytes(32)]) == 2
            assert await ring.put_metadata(HASH, "name", 5, bytes(32)) == 1
            assert [hint async for hint in ring.find_file_peers(HASH, 4, 5.0)] == []  # it does not find itself
            assert [pair async for pair in ring.find_chunk_peers([HASH], 4, 5.0)] == []
            assert await ring.bootstrap([("127.0.0.1", server.port)]) == 0  # our own address
            assert server.protocol.own_addresses == {("127.0.0.1", server.port)}
            await ring.withdraw([HASH])
            assert (await ring.stats())["files_offered"] == 0
            await ring.withdraw(chunks=[HASH])
            assert (await ring.stats())["chunks_offered"] == 1
            await ring.withdraw(everything=True)
            assert (await ring.stats())["chunks_offered"] == 0
            await ring.close()

    asyncio.run(body())


def test_taken_port_and_foreign_address_are_typed_errors() -> None:
    async def body() -> None:
        async with service() as (server, _):
            other = FcServer(policy=AddressPolicy(own=()))
            with pytest.raises(PortInUse, match=str(server.port)):
                await other.listen(server.port, "127.0.0.1")
            with pytest.raises(NetworkError):
                await other.listen(0, "8.8.8.8")
            with pytest.raises(NetworkError, match="no-such-host"):
                await other.listen(0, "no-such-host.invalid")
            await other.close()

    asyncio.run(body())


def test_state_file_round_trip_is_private_and_damage_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dht.state"
    assert load_state(path) == SavedState()
    contacts = [Contact(bytes([i]) * 20, f"10.0.0.{i}", 8000 + i) for i in range(1, 6)]
    save_state(path, [*contacts, Contact(b"x" * 20, "fd00::7", 9)])
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_state(path).addresses == [*(c.address for c in contacts), ("fd00::7", 9)]
    save_state(path, contacts * 200)
    assert len(load_state(path).addresses) == 400
    assert [p.name for p in tmp_path.iterdir()] == ["dht.state"]
    assert caplog.text == ""
    data = path.read_bytes()
    for bad in (b"", data[:10], data[:-1], data + b"x", b"X" + data[1:], data[:20] + b"\xff" + data[21:]):
        caplog.clear()
        path.write_bytes(bad)
        assert load_state(path) == SavedState()
        assert caplog.text.count("damaged") == 1
    path.unlink()
    path.mkdir()
    caplog.clear()
    assert load_state(path) == SavedState()
    assert "cannot be read" in caplog.text
