"""What every backend of the `Discovery` seam has to do, asked of each: in memory, and through real DHT nodes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import pytest

from fastcas.dht.server import FcServer
from fastcas.dht.service import DhtService
from fastcas.peers.discovery import CompositeDiscovery, Discovery, MemoryDiscovery, MemoryNetwork, PeerHint
from fastcas.peers.policy import AddressPolicy
from fastcas.peers.ring_discovery import RingDiscovery
from fastcas.table import Ring

BUDGET_S = 10.0
DATA_PORT = 9000
Backends = Callable[[], AbstractAsyncContextManager[list[Discovery]]]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


FILE, MANIFEST = digest("file"), digest("manifest")
ONLY_B = digest("chunk that only b has")
CHUNKS = [digest(f"chunk {i}") for i in range(300)]


@asynccontextmanager
async def in_memory() -> AsyncIterator[list[Discovery]]:
    """Three members of one network in this process."""
    net = MemoryNetwork()
    yield [MemoryDiscovery(net, PeerHint(f"{i}" * 40, "127.0.0.1", DATA_PORT + i, "memory")) for i in range(3)]


@asynccontextmanager
async def kademlia() -> AsyncIterator[list[Discovery]]:
    """Three DHT nodes on loopback, each behind its own rings as in a DHT process."""
    async with AsyncExitStack() as stack:
        found: list[Discovery] = []
        servers: list[FcServer] = []
        for number in range(3):
            server = FcServer(policy=AddressPolicy(own=()))
            stack.push_async_callback(server.close)
            await server.listen(0, "127.0.0.1")
            server.announcer.set_data_port(DATA_PORT + number)
            requests, answers = Ring.create(), Ring.create()
            ends = [Ring.attach(ring.memfd, ring.eventfd) for ring in (requests, answers)]
            service = DhtService(server, *ends)
            service.attach()
            stack.push_async_callback(service.close)
            server.start([("127.0.0.1", servers[0].port)] if servers else [])
            servers.append(server)
            backend = RingDiscovery(requests, answers)
            stack.push_async_callback(backend.close)
            found.append(backend)
        async with asyncio.timeout(BUDGET_S):
            while any([len(await backend.routing()) < 2 for backend in found]):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.01)
        yield found


@asynccontextmanager
async def composed() -> AsyncIterator[list[Discovery]]:
    """The memory network, with a second one beside it that knows nothing."""
    async with in_memory() as members:
        yield [CompositeDiscovery([member, MemoryDiscovery(MemoryNetwork())]) for member in members]


async def file_ports(backend: Discovery, file_hash: bytes = FILE) -> set[int]:
    return {hint.port async for hint in backend.find_file_peers(file_hash, 16, 3.0)}


async def chunk_ports(backend: Discovery, hashes: list[bytes]) -> dict[bytes, set[int]]:
    found: dict[bytes, set[int]] = {}
    async for key, hint in backend.find_chunk_peers(hashes, 16, 3.0):
        found.setdefault(key, set()).add(hint.port)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backends", [in_memory, kademlia, composed])
def test_contract_of_the_seam(backends: Backends) -> None:
    async def body() -> None:
        async with backends() as (a, b, asker):
            assert isinstance(asker, Discovery)
            assert await file_ports(asker) == set()
            assert await chunk_ports(asker, CHUNKS[:3]) == {}
            assert await asker.get_metadata(FILE, 3.0) == []

            assert await a.announce_files([(FILE, 1000)]) >= 1
            assert await b.announce_files([(FILE, 250)]) >= 1
            assert await file_ports(asker) == {DATA_PORT, DATA_PORT + 1}
            assert await file_ports(a) == {DATA_PORT + 1}  # nobody finds himself

            assert await a.announce_chunks(CHUNKS) == len(CHUNKS)
            assert await b.announce_chunks([CHUNKS[0], ONLY_B]) == 2
            assert await a.announce_chunks([]) == 0
            found = await chunk_ports(asker, [*CHUNKS, digest("unknown")])
            assert set(found) == set(CHUNKS)
            assert found[CHUNKS[0]] == {DATA_PORT, DATA_PORT + 1}
            assert found[CHUNKS[1]] == {DATA_PORT}

            assert await a.put_metadata(FILE, "näme.bin", 5, MANIFEST) >= 1
            (hint,) = await asker.get_metadata(FILE, 3.0)
            assert (hint.name, hint.size, hint.manifest_hash) == ("näme.bin", 5, MANIFEST)

            assert len(await asker.routing()) == 2
            assert all(node.ip == "127.0.0.1" for node in await asker.routing())
            assert await asker.stats()

            await a.withdraw([FILE])
            assert await file_ports(asker) == {DATA_PORT + 1}
            await a.withdraw(chunks=CHUNKS[1:2])
            assert (await chunk_ports(asker, CHUNKS[:1]))[CHUNKS[0]] == {DATA_PORT, DATA_PORT + 1}
            await b.withdraw(everything=True)
            assert await file_ports(asker) == set()
            assert await chunk_ports(asker, [ONLY_B]) == {}  # what was found before may be remembered for a while
            await asker.close()
            await asker.close()

    asyncio.run(body())
