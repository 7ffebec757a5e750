"""Each row of the quick reference's troubleshooting table: provoked, its message read, its solution tried."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
from pathlib import Path

import pytest

from fastcas import P2PChunkDownloader, P2PClient, P2PNode
from fastcas.errors import ChunkNotFound, NetworkError, NoPeers, PeerUnreachable, PortInUse
from fastcas.ids import Link, PeerAddr
from tests.contract.quick_reference import troubleshooting
from tests.support.nodes import free_port, run_fastcas, start_node

pytestmark = pytest.mark.slow


def write_random(path: Path, size: int) -> str:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_every_row_has_its_test_here() -> None:
    assert list(troubleshooting()) == [
        "Connection refused", "DHT bootstrap failed", "Chunk not found", "Download slow", "Port already in use",
        "File not found",
    ]  # fmt: skip


def test_connection_refused_until_the_peer_runs(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    chunk = write_random(source, 1000)
    port = free_port()

    async def main() -> None:
        downloader = P2PChunkDownloader(tmp_path, timeout=10)
        node = P2PNode(server_host="127.0.0.1", server_port=port, storage_dir=tmp_path / "s", use_dht=False, workers=1)
        try:
            with pytest.raises(PeerUnreachable, match=f"127.0.0.1:{port}: Connection refused"):
                await downloader.fetch_chunk(chunk, "127.0.0.1", port)
            assert await downloader.download_chunk(chunk, "127.0.0.1", port) is None
            await node.initialize()
            done = await asyncio.to_thread(run_fastcas, "store", str(source), "--storage-dir", str(tmp_path / "s"))
            assert done.returncode == 0, done.stderr
            node.start_server()
            assert await downloader.download_chunk(chunk, "127.0.0.1", port) == source.read_bytes()
        finally:
            downloader.close()
            await node.shutdown()

    asyncio.run(main())


def test_dht_bootstrap_failed_until_a_node_runs(tmp_path: Path) -> None:
    port = free_port(socket.SOCK_DGRAM)

    async def join() -> None:
        client = P2PClient(dht_bootstrap_nodes=[("127.0.0.1", port)], download_dir=str(tmp_path))
        try:
            await client.initialize()
        finally:
            await client.shutdown()

    with pytest.raises(NetworkError, match=f"DHT bootstrap failed: no answer from 127.0.0.1:{port}"):
        asyncio.run(join())
    done = run_fastcas("get", "ab" * 32, "--bootstrap", f"127.0.0.1:{port}", "--storage-dir", str(tmp_path / "no"))
    assert done.returncode == 6
    assert "DHT bootstrap failed" in done.stderr
    with start_node(tmp_path / "s", "--dht-port", str(port), dht=True):
        asyncio.run(join())


def test_chunk_not_found_until_it_is_stored_and_registered(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    chunk = write_random(source, 1000)

    async def main() -> None:
        downloader = P2PChunkDownloader(tmp_path, timeout=10)
        node = P2PNode(
            server_host="127.0.0.1", server_port=0, dht_port=free_port(socket.SOCK_DGRAM), storage_dir=tmp_path / "s",
            workers=1,
        )  # fmt: skip
        try:
            await node.initialize()
            node.start_server()
            with pytest.raises(ChunkNotFound):
                await node.peer_manager.fetch_peers_with_chunk(chunk)
            with pytest.raises(ChunkNotFound, match="Chunk not found"):
                await downloader.fetch_with_retry(chunk, [("127.0.0.1", node.server_port)], 1)
            done = await asyncio.to_thread(run_fastcas, "store", str(source), "--storage-dir", str(tmp_path / "s"))
            assert done.returncode == 0, done.stderr
            await node.peer_manager.register_chunks_in_dht([chunk])
            (peer,) = await node.peer_manager.fetch_peers_with_chunk(chunk)
            assert await downloader.download_chunk(chunk, peer.ip, peer.port) == source.read_bytes()
        finally:
            downloader.close()
            await node.shutdown()

    asyncio.run(main())


def test_download_from_one_peer_says_so_and_more_nodes_share_it(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 16 << 20)
    with contextlib.ExitStack() as stack:
        # Limited, so that one of them cannot have sent everything before the other is asked.
        nodes = [stack.enter_context(start_node(tmp_path / f"n{i}", "--max-upload", "12M")) for i in range(2)]
        for node in nodes:
            done = run_fastcas("store", str(source), "--storage-dir", str(node.storage))
            assert done.returncode == 0, done.stderr
        for count in (1, 2):
            # The two know nothing of each other: only the named ones are asked.
            peers = [word for node in nodes[:count] for word in ("--peer", node.peer)]
            out = str(tmp_path / f"out{count}.bin")
            done = run_fastcas("get", file_hash, "-o", out, *peers, "--storage-dir", str(tmp_path / "no"))
            assert done.returncode == 0, done.stderr
            assert f", {count} peer{'s' if count > 1 else ''}: " in done.stderr
            assert all(f"from {node.peer}" in done.stderr for node in nodes[:count])


def test_port_already_in_use_until_another_is_taken(tmp_path: Path) -> None:
    async def main(port: int) -> None:
        node = P2PNode(server_host="127.0.0.1", server_port=port, storage_dir=tmp_path / "s", use_dht=False, workers=1)
        try:
            await node.initialize()
            node.start_server()
        finally:
            await node.shutdown()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"^Port already in use: TCP port {port} .*different port number"):
            asyncio.run(main(port))
    asyncio.run(main(free_port()))


def test_file_not_found_until_it_is_published(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 1000)
    with start_node(tmp_path / "s", dht=True) as node:
        bootstrap = ["--bootstrap", f"127.0.0.1:{node.dht_port}", "--storage-dir", str(tmp_path / "no")]
        done = run_fastcas("get", file_hash, "-o", str(tmp_path / "out"), "--timeout", "2", *bootstrap)
        assert done.returncode == 3
        assert f"no peer has {file_hash}" in done.stderr

        async def discover() -> None:
            where = [("127.0.0.1", node.dht_port or 0)]
            client = P2PClient(dht_bootstrap_nodes=where, download_dir=str(tmp_path / "d"))
            await client.initialize()
            try:
                assert await client.peer_manager.discover_file(file_hash) is None
                with pytest.raises(NoPeers):
                    await client.peer_manager.fetch_file_metadata(file_hash)
            finally:
                await client.shutdown()

        asyncio.run(discover())
        assert run_fastcas("store", str(source), "--storage-dir", str(node.storage)).returncode == 0

        async def fetch_through_the_link_alone() -> None:
            link = Link(bytes.fromhex(file_hash), dht=(PeerAddr("127.0.0.1", node.dht_port or 0),))
            async with P2PClient(download_dir=tmp_path / "e") as client:
                path = await client.download_file(str(link))
                assert path is not None
                assert path.read_bytes() == source.read_bytes()

        asyncio.run(fetch_through_the_link_alone())
        done = run_fastcas("get", file_hash, "-o", str(tmp_path / "out"), *bootstrap)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out").read_bytes() == source.read_bytes()
