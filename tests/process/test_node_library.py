"""`P2PNode` and the one-liners, as programs use them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import fastcas
from fastcas import FileMetadata, P2PNode
from fastcas.errors import (
    DestinationExists,
    NodeUnavailable,
    NoPeers,
    NotFound,
    PortInUse,
    StoreLocked,
    UsageError,
)
from tests.support.nodes import free_port, read_line, start_node
from tests.support.waiting import is_running, wait_until

pytestmark = pytest.mark.slow


def write_random(path: Path, size: int) -> str:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@contextlib.asynccontextmanager
async def running(storage: Path, **settings: object) -> AsyncIterator[P2PNode]:
    """A node of this program on free ports, serving."""
    import socket

    given: dict[str, object] = {
        "node_id": "MyNode", "server_host": "127.0.0.1", "server_port": 0, "workers": 1,
        "dht_port": free_port(socket.SOCK_DGRAM), "storage_dir": str(storage / "hashed_files"),
    }  # fmt: skip
    node = P2PNode(**(given | settings))  # type: ignore[arg-type]
    try:
        await node.initialize()
        node.start_server()
        yield node
    finally:
        await node.shutdown()


def test_node_serves_finds_and_downloads(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 1_000_000)

    async def main() -> None:
        async with running(tmp_path / "a") as first:
            await asyncio.to_thread(fastcas.store, source, storage_dir=tmp_path / "a")
            bootstrap = [("127.0.0.1", first.dht_node.port)]
            async with running(tmp_path / "b", bootstrap=bootstrap) as second:
                assert await second.download_file_from_peers(file_hash, tmp_path / "out") is True
                assert (tmp_path / "out" / "source.bin").read_bytes() == source.read_bytes()
                nodes = second.dht_node.routing_table.get_all_nodes()
                assert [(node.ip, node.port) for node in nodes] == bootstrap
                manager = second.peer_manager
                await asyncio.to_thread(wait_until, lambda: len(manager.local_chunks) == 4, "its chunks are known")
                found = await second.peer_manager.discover_file(file_hash)
                assert found is not None
                assert (found.original_name, found.size, len(found.data_chunks)) == ("source.bin", 1_000_000, 4)
                assert await second.peer_manager.publish_file_metadata(found) is True
                peers = await second.peer_manager.find_peers_with_chunk(found.data_chunks[0])
                assert ("127.0.0.1", second.server_port) in {(peer.ip, peer.port) for peer in peers}
                data = await second.downloader.download_chunk(found.data_chunks[0], "127.0.0.1", first.server_port)
                assert data == source.read_bytes()[:262144]

    asyncio.run(main())


def test_unknown_hash_gives_false_and_the_twin_raises(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a", use_dht=False) as node:
            assert await node.download_file_from_peers("ab" * 32, tmp_path / "out") is False
            with pytest.raises(NoPeers, match="no peer has " + "ab" * 32):
                await node.fetch_file_from_peers("ab" * 32, tmp_path / "out", timeout_s=1)
            with pytest.raises(UsageError):
                await node.download_file_from_peers("abc123", tmp_path / "out")
            unknown = FileMetadata("ab" * 32, "x", 1, ["cd" * 32])
            assert await node.peer_manager.publish_file_metadata(unknown) is False

    asyncio.run(main())


def test_start_server_names_a_taken_port_and_can_be_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a", use_dht=False) as first:
            second = P2PNode(
                server_host="127.0.0.1", server_port=first.server_port, storage_dir=tmp_path / "b", use_dht=False,
                workers=1,
            )  # fmt: skip
            with pytest.raises(NodeUnavailable):
                second.start_server()
            await second.initialize()
            try:
                with pytest.raises(PortInUse, match="Port already in use"):
                    second.start_server()
            finally:
                await second.shutdown()
                await second.shutdown()

    asyncio.run(main())


def test_second_node_on_the_folder_raises_store_locked(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path / "a", use_dht=False):
            second = P2PNode(storage_dir=tmp_path / "a", use_dht=False)
            with pytest.raises(StoreLocked, match="in use"):
                await second.initialize()

    asyncio.run(main())


def test_malformed_settings_raise_usage_errors(tmp_path: Path) -> None:
    for settings in ({"server_port": 70000}, {"workers": 1000}, {"bootstrap": [("a b", 1)]}, {"node_id": "a b"}):
        with pytest.raises(UsageError):
            P2PNode(storage_dir=tmp_path, **settings)  # type: ignore[arg-type]


def test_node_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from fastcas import P2PNode\n"
        "async def main():\n"
        f"    node = P2PNode(server_host='127.0.0.1', server_port=0, storage_dir={str(tmp_path / 's')!r}, workers=1,\n"
        "                   use_dht=False)\n"
        "    await node.initialize()\n"
        "    node.start_server()\n"
        "    print(node.pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        supervisor = int(read_line(process.stdout, 30))
        assert is_running(supervisor)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not is_running(supervisor), "the node ends", budget_s=10)


def test_handle_survives_the_agents_death(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    write_random(source, 300_000)

    async def main() -> None:
        async with running(tmp_path / "a", use_dht=False) as node:
            os.kill((await node.status())["agent_pid"], signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: _stores(source, tmp_path / "a"), "a new agent stores")
            manager = node.peer_manager
            await asyncio.to_thread(wait_until, lambda: len(manager.local_chunks) == 2, "its chunks are known")

    asyncio.run(main())


def _stores(source: Path, storage: Path) -> bool:
    try:
        fastcas.store(source, storage_dir=storage)
    except (NodeUnavailable, StoreLocked):
        return False
    return True


def test_one_liners_without_a_node(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 500_000)
    stored = fastcas.store(source, storage_dir=tmp_path / "s", chunk_size="64KiB", parity=(4, 2))
    assert (stored.file_hash, stored.n_chunks, stored.n_parity) == (file_hash, 8, 4)
    seen: list[dict[str, object]] = []
    out = fastcas.get(file_hash, tmp_path / "out.bin", storage_dir=tmp_path / "s", progress=seen.append)
    assert out.read_bytes() == source.read_bytes()
    assert seen[-1]["done"] == 500_000
    with pytest.raises(NotFound, match="no peer has"):
        fastcas.get("ab" * 32, tmp_path / "x", storage_dir=tmp_path / "s")
    with pytest.raises(NotFound):
        fastcas.store(tmp_path / "missing", storage_dir=tmp_path / "s")
    (tmp_path / "other").write_text("other")
    with pytest.raises(DestinationExists):
        fastcas.get(file_hash, tmp_path / "other", storage_dir=tmp_path / "s")
    assert (tmp_path / "other").read_text() == "other"


def test_one_liners_work_inside_a_running_loop(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    write_random(source, 500_000)
    with start_node(tmp_path / "a") as node:

        async def main() -> None:
            stored = fastcas.store(source, storage_dir=tmp_path / "a")
            assert f"peer={node.peer}" in stored.link
            out = fastcas.get(stored.link, tmp_path / "out.bin", storage_dir=tmp_path / "none")
            assert out.read_bytes() == source.read_bytes()

        asyncio.run(main())
