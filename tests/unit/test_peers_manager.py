"""`P2PPeerManager` over a memory network: the quick reference's methods and their raising twins."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import pytest

from fastcas.errors import ChunkNotFound, ManifestNotFound, ManifestUnknown, NodeUnavailable, NoPeers, UsageError
from fastcas.metadata import FileMetadata, Manifest
from fastcas.peers.discovery import MemoryDiscovery, MemoryNetwork, PeerHint, StaticDiscovery
from fastcas.peers.manager import ChunkPeer, P2PPeerManager

HASHES = [hashlib.sha256(bytes([i])).hexdigest() for i in range(4)]
ME = PeerHint("a" * 40, "10.0.0.1", 9000, "memory")
CONTENT = b"hello"
DIGEST = hashlib.sha256(CONTENT).digest()
MANIFEST = Manifest(DIGEST, len(CONTENT), 16384, DIGEST, b"")
META = FileMetadata.from_manifest(MANIFEST, "hello.txt")


class Rig:
    def __init__(self) -> None:
        self.net = MemoryNetwork()
        self.server = P2PPeerManager(
            MemoryDiscovery(self.net, ME),
            local=lambda: [DIGEST],
            find_manifest=lambda meta: MANIFEST if meta.data_chunks == META.data_chunks else None,
        )
        self.asked: list[bytes | None] = []
        self.client = P2PPeerManager(MemoryDiscovery(self.net), fetch_manifest=self.fetch)

    async def fetch(self, file_hash: bytes, manifest_hash: bytes | None, peers: Sequence[PeerHint]) -> Manifest | None:
        self.asked.append(manifest_hash)
        return MANIFEST if manifest_hash in (None, MANIFEST.manifest_hash) else None


def test_registered_chunks_are_found_by_others() -> None:
    async def body() -> None:
        rig = Rig()
        assert await rig.server.register_chunks_in_dht(HASHES[:2])
        peers = await rig.client.find_peers_with_chunk(HASHES[0])
        assert peers == [ChunkPeer("a" * 40, "10.0.0.1", 9000)]
        assert (peers[0].node_id, peers[0].ip, peers[0].port) == ("a" * 40, "10.0.0.1", 9000)
        found = await rig.client.find_peers_with_chunks(HASHES[:3])
        assert [len(found[text]) for text in HASHES[:3]] == [1, 1, 0]
        assert await rig.client.fetch_peers_with_chunk(HASHES[1]) == peers
        with pytest.raises(ChunkNotFound, match=HASHES[2][:8]):
            await rig.client.fetch_peers_with_chunk(HASHES[2])
        with pytest.raises(ChunkNotFound, match="1 of 3"):
            await rig.client.fetch_peers_with_chunks(HASHES[:3])
        assert rig.client.get_peers_with_capacity() == peers
        assert await rig.client.find_peers_with_chunks([]) == {}
        assert rig.server.local_chunks == {DIGEST.hex()}
        assert rig.client.local_chunks == set()

    asyncio.run(body())


@pytest.mark.parametrize("bad", ["", "abc123", "G" * 64, "A" * 64, HASHES[0] + "0"])
def test_malformed_hashes_are_usage_errors_everywhere(bad: str) -> None:
    async def body() -> None:
        manager = Rig().server
        for call in (
            manager.find_peers_with_chunk(bad),
            manager.find_peers_with_chunks([HASHES[0], bad]),
            manager.register_chunks_in_dht([bad]),
            manager.find_peers_with_file(bad),
            manager.discover_file(bad),
            manager.publish_file_metadata(FileMetadata(bad, "x", 1, [])),
            manager.publish_file_metadata(FileMetadata(HASHES[0], "x", 1, [bad])),
        ):
            with pytest.raises(UsageError):
                await call

    asyncio.run(body())


def test_published_file_is_discovered_with_its_name_and_chunks() -> None:
    async def body() -> None:
        rig = Rig()
        await rig.server.discovery.announce_files([(DIGEST, 1000)])
        assert await rig.server.publish_file_metadata(META)
        assert await rig.client.discover_file(DIGEST.hex()) == META
        assert rig.asked == [MANIFEST.manifest_hash]
        assert await rig.client.fetch_peers_with_file(DIGEST.hex()) == [ChunkPeer("a" * 40, "10.0.0.1", 9000)]

    asyncio.run(body())


def test_lying_record_is_passed_over_for_what_the_swarm_offers() -> None:
    async def body() -> None:
        rig = Rig()
        await rig.server.discovery.announce_files([(DIGEST, 1000)])
        await rig.server.discovery.put_metadata(DIGEST, "liar", 1, bytes(32))
        found = await rig.client.discover_file(DIGEST.hex())
        assert found is not None
        assert found.data_chunks == META.data_chunks
        assert rig.asked == [bytes(32), None]

    asyncio.run(body())


def test_what_cannot_be_published_or_discovered_is_false_none_or_a_typed_error() -> None:
    async def body() -> None:
        rig = Rig()
        other = FileMetadata(DIGEST.hex(), "x", 5, [HASHES[0]])
        assert not await rig.server.publish_file_metadata(other)
        with pytest.raises(ManifestUnknown):
            await rig.server.announce_file_metadata(other)
        with pytest.raises(ManifestUnknown):
            await rig.client.announce_file_metadata(META)
        assert await rig.client.discover_file(HASHES[3]) is None
        with pytest.raises(NoPeers):
            await rig.client.fetch_file_metadata(HASHES[3])
        await rig.server.discovery.announce_files([(bytes.fromhex(HASHES[3]), 1000)])
        with pytest.raises(ManifestNotFound):
            await rig.client.fetch_file_metadata(HASHES[3])
        with pytest.raises(NoPeers):
            await rig.client.fetch_peers_with_file(HASHES[2])
        assert not await P2PPeerManager(StaticDiscovery([])).register_chunks_in_dht(HASHES)

    asyncio.run(body())


class Gone(StaticDiscovery):
    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        raise NodeUnavailable("DHT process: no answer")

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        raise NodeUnavailable("DHT process: no answer")


def test_absent_dht_is_false_or_node_unavailable() -> None:
    async def body() -> None:
        async def find(meta: FileMetadata) -> Manifest | None:
            return MANIFEST

        manager = P2PPeerManager(Gone([]), find_manifest=find)
        assert not await manager.register_chunks_in_dht(HASHES)
        with pytest.raises(NodeUnavailable):
            await manager.announce_chunks(HASHES)
        assert not await manager.publish_file_metadata(META)
        with pytest.raises(NodeUnavailable):
            await manager.announce_file_metadata(META)
        await manager.close()

    asyncio.run(body())
