"""Every Python block of the quick reference runs, with only its placeholders filled in."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import hashlib
import inspect
import io
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastcas
from fastcas import P2PChunkDownloader, P2PClient, P2PNode
from tests.contract.quick_reference import Facts, filled_in, python_blocks
from tests.support.nodes import Node, free_port, read_line, run_fastcas, start_node
from tests.support.waiting import until

pytestmark = pytest.mark.slow

CHUNK = 512 << 10
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(2 * CHUNK)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[tuple[Node, Facts]]:
    """A node with a file of two chunks (1,048,576 bytes, as the reference's example) and one of a single chunk."""
    folder = tmp_path_factory.mktemp("world")
    document, other = folder / "document.pdf", folder / "other.bin"
    document.write_bytes(content)
    other.write_bytes(content[:5000])
    with start_node(folder / "node", dht=True) as node:
        for path in (document, other):
            done = run_fastcas("store", str(path), "--chunk-size", "512KiB", "--storage-dir", str(node.storage))
            assert done.returncode == 0, done.stderr
        hashes = [hashlib.sha256(part).hexdigest() for part in (content[:CHUNK], content[CHUNK:], content[:5000])]
        assert node.dht_port is not None
        whole = hashlib.sha256(content).hexdigest()
        yield node, Facts(whole, (hashes[0], hashes[1], hashes[2]), node.port, node.dht_port, folder)


def block_with(text: str) -> str:
    """Return the one block that contains a text."""
    (block,) = [block for block in python_blocks() if text in block]
    return block


def test_every_block_has_its_test_here() -> None:
    source = Path(__file__).read_text()
    for block in python_blocks():
        try:
            compile(block, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError:
            assert "Node1: port 9000" in block  # a list of ports, no program
            continue
        marks = [mark for mark in MARKS if mark in block]
        assert len(marks) == 1, (marks, block)
        assert source.count(marks[0]) >= 2, f"no test runs the block with {marks[0]}"


MARKS = [
    "asyncio.sleep(1)",
    "Replace with actual hash",
    "Find peers for all chunks",
    "Download from specific peer",
    "Setup & register local chunks",
    'await client.download_file("file_hash")',
    "Found {len(peers)} peers",
    'peer_ip="192.168.1.100"',
    "results = await downloader.download_chunks_parallel(peers_map)",
    '"chunk_hash_1", "chunk_hash_2", "chunk_hash_3"',
    "file_meta = FileMetadata(",
    "File not found in network",
    "Increase parallel connections",
    "Check peer count",
    "Check what nodes are in DHT",
    "# Simple test",
]


async def run_block(block: str, names: dict[str, Any]) -> str:
    """Run a block with top-level await; `names` gets what it defines. Returns what it printed."""
    printed = io.StringIO()
    code = compile(block, "quick-reference", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    with contextlib.redirect_stdout(printed):
        result = eval(code, names)
        if inspect.isawaitable(result):
            await result
    return printed.getvalue()


def run_with_node(facts: Facts, tmp_path: Path, block: str, *, shows_table: bool = False) -> tuple[dict[str, Any], str]:
    """Run a block beside a node that has the file and has joined the DHT; its manager and a downloader are there.

    With `shows_table` it runs once the node object has its copy of the routing table, which is up to a second old.
    """
    storage = tmp_path / "own"
    fastcas.store(facts.folder / "document.pdf", storage_dir=storage, chunk_size=CHUNK)

    async def main() -> tuple[dict[str, Any], str]:
        node = P2PNode(
            server_host="127.0.0.1", server_port=0, dht_port=free_port(socket.SOCK_DGRAM), storage_dir=storage,
            workers=1, bootstrap=[("127.0.0.1", facts.dht_port)],
        )  # fmt: skip
        downloader = P2PChunkDownloader(str(tmp_path), timeout=30, max_connections=5)
        try:
            await node.initialize()
            node.start_server()
            manager = node.peer_manager
            await manager.register_chunks_in_dht(list(facts.chunks[:2]))
            names = {
                "node": node, "manager": manager, "peer_manager": manager, "downloader": downloader,
                "P2PChunkDownloader": P2PChunkDownloader, "peer_port": facts.data_port,
                "chunk_peers": await manager.find_peers_with_chunks(list(facts.chunks)),
            }  # fmt: skip
            if shows_table:
                await until(node.dht_node.routing_table.get_all_nodes, "the copy of the routing table has somebody")
            printed = await run_block(filled_in(block, facts), names)
            return names, printed
        finally:
            downloader.close()
            await node.shutdown()

    return asyncio.run(main())


def test_start_a_node(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, facts = world
    port = free_port()
    mine = Facts(facts.file_hash, facts.chunks, port, free_port(socket.SOCK_DGRAM), tmp_path)
    program = filled_in(block_with("asyncio.sleep(1)"), mine)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    assert process.stdout is not None
    with process.stdout:
        assert read_line(process.stdout, 30) == f"✓ Node running on port {port}\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_store_a_file(world: tuple[Node, Facts], tmp_path: Path) -> None:
    path = tmp_path / "myfile.txt"
    path.write_text("my file\n")
    digest = hashlib.sha256(b"my file\n").hexdigest()
    done = run_fastcas("store", str(path), "--storage-dir", str(tmp_path / "storage"))
    assert done.stdout.splitlines()[0] == f"File stored with hash: {digest}"


def test_download_from_the_network(world: tuple[Node, Facts], content: bytes, tmp_path: Path) -> None:
    _, facts = world
    mine = Facts(facts.file_hash, facts.chunks, facts.data_port, facts.dht_port, tmp_path)
    program = filled_in(block_with("Replace with actual hash"), mine)
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "downloads" / "document.pdf").read_bytes() == content


def test_peer_manager(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, facts = world
    names, printed = run_with_node(facts, tmp_path, block_with("Find peers for all chunks"))
    assert f"Peer at 127.0.0.1:{names['node'].server_port}" in printed
    assert set(names["chunk_peers"]) == set(facts.chunks)
    assert all(names["chunk_peers"][chunk] for chunk in facts.chunks[:2])


def test_chunk_downloader(world: tuple[Node, Facts], content: bytes, tmp_path: Path) -> None:
    names, _ = run_with_node(world[1], tmp_path, block_with("Download from specific peer"))
    assert names["data"] == content[:CHUNK]
    assert list(names["results"].values()) == [content[:CHUNK], content[CHUNK:]]
    names["downloader"].close()


def test_node(world: tuple[Node, Facts], content: bytes, tmp_path: Path) -> None:
    _, facts = world
    mine = Facts(facts.file_hash, facts.chunks, facts.data_port, facts.dht_port, tmp_path)
    block = filled_in(block_with("Setup & register local chunks"), mine).replace(
        "P2PNode(...)",
        f"P2PNode(server_host='127.0.0.1', server_port=0, dht_port={free_port(socket.SOCK_DGRAM)}, workers=1, "
        f"storage_dir={str(tmp_path / 's')!r}, bootstrap=[('127.0.0.1', {facts.dht_port})])",
    )
    names: dict[str, Any] = {}
    asyncio.run(run_block(block, names))
    assert names["success"] is True
    assert (tmp_path / "out" / "document.pdf").read_bytes() == content


def test_client(world: tuple[Node, Facts], content: bytes, tmp_path: Path) -> None:
    _, facts = world
    mine = Facts(facts.file_hash, facts.chunks, facts.data_port, facts.dht_port, tmp_path)
    names: dict[str, Any] = {}
    asyncio.run(run_block(filled_in(block_with('await client.download_file("file_hash")'), mine), names))
    assert isinstance(names["client"], P2PClient)
    assert (tmp_path / "downloads" / "document.pdf").read_bytes() == content


def test_find_which_peers_have_a_chunk(world: tuple[Node, Facts], tmp_path: Path) -> None:
    names, printed = run_with_node(world[1], tmp_path, block_with("Found {len(peers)} peers"))
    assert f"Found {len(names['peers'])} peers" in printed
    assert f"  - 127.0.0.1:{names['node'].server_port}" in printed


def test_download_a_chunk(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, printed = run_with_node(world[1], tmp_path, block_with('peer_ip="192.168.1.100"'))
    assert printed == f"Downloaded {CHUNK} bytes\n"


def test_download_chunks_in_parallel(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, facts = world
    block = block_with("results = await downloader.download_chunks_parallel(peers_map)")
    for port in (9001, 9002):
        block = block.replace(str(port), "9000")
    _, printed = run_with_node(facts, tmp_path, block)
    assert printed.splitlines() == [f"✓ Downloaded {chunk[:8]}..." for chunk in facts.chunks]


def test_register_chunks(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, printed = run_with_node(world[1], tmp_path, block_with('"chunk_hash_1", "chunk_hash_2", "chunk_hash_3"'))
    assert printed == "Registered 3 chunks in DHT\n"


def test_publish_file_metadata(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, printed = run_with_node(world[1], tmp_path, block_with("file_meta = FileMetadata("))
    assert printed == "✓ File metadata published to DHT\n"


def test_discover_a_file(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, printed = run_with_node(world[1], tmp_path, block_with("File not found in network"))
    assert printed == f"Found: document.pdf\nSize: {2 * CHUNK} bytes\nChunks: 2\n"


def test_speed_up_downloads(world: tuple[Node, Facts], tmp_path: Path) -> None:
    names, _ = run_with_node(world[1], tmp_path, block_with("Increase parallel connections"))
    assert names["downloader"].max_connections == 10
    assert len(names["peers_map"]) == 2


def test_monitor_performance(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, facts = world
    _, printed = run_with_node(facts, tmp_path, block_with("Check peer count"))
    assert printed.startswith("Network: ")
    assert all(f"{chunk[:8]}...: " in printed for chunk in facts.chunks)


def test_debug_peer_discovery(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, facts = world
    _, printed = run_with_node(facts, tmp_path, block_with("Check what nodes are in DHT"), shows_table=True)
    assert f"Node: 127.0.0.1:{facts.dht_port}\n" in printed
    assert "Local chunks: 2\n" in printed
    assert "Known peers: " in printed


def test_test_a_chunk_download(world: tuple[Node, Facts], tmp_path: Path) -> None:
    _, printed = run_with_node(world[1], tmp_path, block_with("# Simple test"))
    assert printed == f"✓ Downloaded {CHUNK} bytes\n"
