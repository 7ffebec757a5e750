"""`P2PChunkDownloader` and `P2PClient`: the quick reference's blocks, and their twins that raise."""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import (
    ChunkCorrupt,
    ChunkNotFound,
    NetworkError,
    NoPeers,
    PeerBusy,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    UsageError,
)
from fastcas.fetch import P2PChunkDownloader, P2PClient
from fastcas.fetch.manifests import find_manifest
from fastcas.ids import PeerAddr
from fastcas.peers.dht_process import DhtProcess
from fastcas.peers.discovery import MemoryDiscovery, MemoryNetwork
from tests.support.evil_peer import Peer, content_of

CONTENT = content_of(5 * 16384 + 1)
DIGEST = hashlib.sha256(CONTENT[:16384]).hexdigest()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


async def gone() -> tuple[str, int]:
    """Return an address where nobody listens."""
    async with Peer(CONTENT) as peer:
        return peer.addr.ip, peer.addr.port


def test_quick_reference_download_chunk() -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            downloader = P2PChunkDownloader("downloads", timeout=30, max_connections=5)
            data = await downloader.download_chunk(DIGEST, "127.0.0.1", peer.addr.port)
            assert data == CONTENT[:16384]
            data = await downloader.download_chunk(chunk_hash=DIGEST, peer_ip="127.0.0.1", peer_port=peer.addr.port)
            assert data == CONTENT[:16384]
            assert peer.n_connections == 1
            downloader.close()

    run(work)


def test_quick_reference_parallel_and_retry() -> None:
    async def work() -> None:
        async with Peer(CONTENT) as one, Peer(CONTENT, behaviour="wrong_bytes") as liar:
            downloader = P2PChunkDownloader("downloads", timeout=30, max_connections=5)
            hashes = [one.manifest.hash_of(i).hex() for i in range(6)]
            peers_map = {h: [(liar.addr.ip, liar.addr.port), (one.addr.ip, one.addr.port)] for h in hashes}
            peers_map[bytes(32).hex()] = [(one.addr.ip, one.addr.port)]
            results = await downloader.download_chunks_parallel(peers_map)
            assert [results[h] for h in hashes] == [one.bytes_of(i) for i in range(6)]
            assert results[bytes(32).hex()] is None
            data = await downloader.download_with_retry(
                DIGEST, [await gone(), (one.addr.ip, one.addr.port)], max_retries=3
            )  # fmt: skip
            assert data == CONTENT[:16384]
            assert one.n_connections <= 5
            downloader.close()

    run(work)


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("wrong_bytes", ChunkCorrupt),
        ("not_found", ChunkNotFound),
        ("busy", PeerBusy),
        ("silent", PeerTimeout),
        ("redirect", RemoteProtocolError),
        ("chunked", RemoteProtocolError),
        ("huge_length", RemoteProtocolError),
        ("close_early", PeerUnreachable),
        ("reset", PeerUnreachable),
    ],
)
def test_whatever_goes_wrong_is_none_or_typed(behaviour: str, error: type[Exception]) -> None:
    async def work() -> None:
        async with Peer(CONTENT, behaviour=behaviour) as peer:
            downloader = P2PChunkDownloader(timeout=0.5)
            address = (peer.addr.ip, peer.addr.port)
            assert await downloader.download_chunk(DIGEST, *address) is None
            with pytest.raises(error):
                await downloader.fetch_chunk(DIGEST, *address)
            assert await downloader.download_with_retry(DIGEST, [address], max_retries=1) is None
            downloader.close()

    run(work)


def test_nobody_there_says_connection_refused() -> None:
    async def work() -> None:
        downloader = P2PChunkDownloader()
        address = await gone()
        assert await downloader.download_chunk(DIGEST, *address) is None
        with pytest.raises(PeerUnreachable, match="Connection refused"):
            await downloader.fetch_chunk(DIGEST, *address)
        with pytest.raises(ChunkNotFound, match=r"Chunk not found.*Connection refused"):
            await downloader.fetch_with_retry(DIGEST, [address], 1)
        downloader.close()

    run(work)


def test_malformed_arguments_are_usage_errors() -> None:
    async def work() -> None:
        downloader = P2PChunkDownloader()
        with pytest.raises(UsageError, match="chunk_hash"):
            await downloader.download_chunk("xyz", "127.0.0.1", 9000)
        with pytest.raises(UsageError, match="peer_port"):
            await downloader.download_chunk(DIGEST, "127.0.0.1", 0)
        with pytest.raises(UsageError, match="max_retries"):
            await downloader.download_with_retry(DIGEST, [], max_retries=0)
        with pytest.raises(UsageError):
            P2PChunkDownloader(timeout=0)
        with pytest.raises(UsageError):
            P2PChunkDownloader(max_connections=0)

    run(work)


def test_one_downloader_serves_several_loops_and_needs_no_close() -> None:
    kept = [P2PChunkDownloader()]

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            assert await kept[0].download_chunk(DIGEST, peer.addr.ip, peer.addr.port) is not None

    run(work)
    run(work)
    n_threads = len(list(Path("/proc/self/task").iterdir()))
    kept.clear()
    gc.collect()
    assert len(list(Path("/proc/self/task").iterdir())) < n_threads


def test_client_fetches_from_static_peers(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            client = P2PClient(download_dir=tmp_path / "downloads", peers=[("127.0.0.1", peer.addr.port)])
            await client.initialize()
            path = await client.download_file(peer.manifest.file_hash.hex())
            assert path == tmp_path / "downloads" / peer.manifest.file_hash.hex()
            assert path.read_bytes() == CONTENT
            assert await client.download_file(peer.manifest.file_hash.hex()) == path
            named = await client.fetch_file(peer.link(), tmp_path / "named")
            assert named.path == tmp_path / "named"
            await client.shutdown()
            await client.shutdown()

    run(work)


def test_client_returns_none_and_the_twin_raises(tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            Peer(CONTENT) as peer,
            P2PClient(download_dir=tmp_path, peers=[peer.addr], timeout_s=0.5) as client,
        ):
            assert await client.download_file("00" * 32) is None
            with pytest.raises(NoPeers, match="no peer has 0000"):
                await client.fetch_file("00" * 32)
            with pytest.raises(UsageError):
                await client.download_file("abc")

    run(work)


def test_manifest_alone() -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer, Peer(CONTENT, behaviour="manifest_wrong_bytes") as liar:
            found = await find_manifest(peer.manifest.file_hash, None, [liar.addr, peer.addr])
            assert found == peer.manifest
            with pytest.raises(Exception, match="no manifest"):
                await find_manifest(bytes(32), None, [peer.addr], timeout_s=1)

    run(work)


def test_client_joins_through_the_dht_nodes_of_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Any] = []

    class Discovery(MemoryDiscovery):
        async def bootstrap(self, peers: Sequence[tuple[str, int]]) -> int:
            joined.append(list(peers))
            return 1

    class Process(DhtProcess):
        discovery = Discovery(MemoryNetwork())  # type: ignore[assignment]
        is_alive = True  # type: ignore[assignment]

        async def start(self) -> None:
            joined.append(self._bootstrap)
            self.contacts = 1

    monkeypatch.setattr("fastcas.fetch.client.DhtProcess", Process)

    async def work() -> None:
        async with Peer(CONTENT) as peer, P2PClient(download_dir=tmp_path / "a", timeout_s=0.2) as client:
            named = replace(peer.link(), dht=(PeerAddr("10.0.0.1", 1),))
            await client.fetch_file(named)
            assert joined == []  # the peers of the link are enough
            for port in (2, 3):
                assert (
                    await client.download_file(str(replace(named, peers=(), dht=(PeerAddr("10.0.0.1", port),)))) is None
                )

    run(work)
    assert joined == [[("10.0.0.1", 2)], [("10.0.0.1", 3)]]


def test_client_without_an_answering_bootstrap_node_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        client = P2PClient(dht_bootstrap_nodes=[("127.0.0.1", 1)], download_dir=tmp_path)
        with pytest.raises(NetworkError, match="DHT bootstrap failed"):
            await client.initialize()
        await client.shutdown()

    run(work)
