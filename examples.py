"""Every task of the quick reference, runnable: `python examples.py` does them all, `python examples.py NAME…` some.

One node is started in a temporary folder (free ports, so that nothing of yours is in the way), a file is stored in
it, and each example below works with the two. Nothing is left behind.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import fastcas
from fastcas import FileMetadata, P2PChunkDownloader, P2PClient, P2PNode


class World:
    """What the examples share: a running node, a stored file, a folder for results."""

    def __init__(
        self, node: P2PNode, stored: fastcas.StoredFile, meta: FileMetadata, folder: Path, dht_port: int
    ) -> None:
        self.node = node
        self.stored = stored
        self.meta = meta
        self.folder = folder
        self.dht_port = dht_port
        self.data_port = node.server_port


def free_port(kind: int) -> int:
    """Return a port of 127.0.0.1 that is free at the moment."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def download_a_file(world: World) -> None:
    """A client that only downloads: finds the node through the DHT by the file's hash alone."""
    client = P2PClient(
        dht_bootstrap_nodes=[("127.0.0.1", world.dht_port)], download_dir=str(world.folder / "downloads")
    )
    await client.initialize()
    path = await client.download_file(world.stored.file_hash)
    print(f"  downloaded to {path}")
    await client.shutdown()


async def one_line(world: World) -> None:
    """The same as one synchronous call, with a link."""
    path = await asyncio.to_thread(
        fastcas.get, world.stored.link, world.folder / "one-line.bin", peers=[f"127.0.0.1:{world.data_port}"]
    )
    print(f"  fastcas.get wrote {path}, {path.stat().st_size} bytes")


async def find_peers(world: World) -> None:
    """Which peers have a chunk, or many chunks."""
    manager = world.node.peer_manager
    chunks = world.meta.data_chunks
    await manager.register_chunks_in_dht(chunks)
    for peer in await manager.find_peers_with_chunk(chunks[0]):
        print(f"  {chunks[0][:8]} is at {peer.ip}:{peer.port}")
    for chunk_hash, peers in (await manager.find_peers_with_chunks(chunks[:3])).items():
        print(f"  {chunk_hash[:8]}...: {len(peers)} peers")
    print(f"  local chunks: {len(manager.local_chunks)}, known peers: {len(manager.get_peers_with_capacity())}")


async def download_chunks(world: World) -> None:
    """Single chunks: from one peer, many in parallel, with fallback."""
    here = ("127.0.0.1", world.data_port)
    nobody = ("127.0.0.1", free_port(socket.SOCK_STREAM))
    chunks = world.meta.data_chunks
    downloader = P2PChunkDownloader(str(world.folder / "chunks"), timeout=30, max_connections=5)
    data = await downloader.download_chunk(chunks[0], *here)
    print(f"  one chunk: {len(data) if data else 'failed'} bytes")
    results = await downloader.download_chunks_parallel({chunk: [nobody, here] for chunk in chunks})
    print(f"  in parallel: {sum(r is not None for r in results.values())} of {len(chunks)}")
    data = await downloader.download_with_retry(chunks[-1], [nobody, here], max_retries=3)
    print(f"  with a dead peer first: {len(data) if data else 'failed'} bytes")


async def publish_and_discover(world: World) -> None:
    """File metadata in the DHT."""
    manager = world.node.peer_manager
    print(f"  published: {await manager.publish_file_metadata(world.meta)}")
    found = await manager.discover_file(world.stored.file_hash)
    if found:
        print(f"  found: {found.original_name}, {found.size} bytes, {len(found.data_chunks)} chunks")
    nothing = await manager.discover_file("00" * 32)
    print(f"  a hash that nobody published: {nothing}")


async def download_into_a_node(world: World) -> None:
    """A second node joins the first, downloads the file and serves it from then on."""
    second = P2PNode(
        node_id="Second",
        server_host="127.0.0.1",
        server_port=free_port(socket.SOCK_STREAM),
        dht_port=free_port(socket.SOCK_DGRAM),
        storage_dir=str(world.folder / "second" / "hashed_files"),
        workers=1,
        bootstrap=[("127.0.0.1", world.dht_port)],
    )
    await second.initialize()
    second.start_server()
    print(
        f"  success: {await second.download_file_from_peers(world.stored.file_hash, str(world.folder / 'second-out'))}"
    )
    for contact in second.dht_node.routing_table.get_all_nodes():
        print(f"  DHT contact: {contact.ip}:{contact.port}")
    await second.shutdown()


EXAMPLES: list[Callable[[World], Awaitable[None]]] = [
    download_a_file,
    one_line,
    find_peers,
    download_chunks,
    publish_and_discover,
    download_into_a_node,
]


async def main(names: list[str]) -> None:
    """Start a node, store a file in it, run the chosen examples, shut down."""
    unknown = set(names) - {example.__name__ for example in EXAMPLES}
    if unknown:
        raise SystemExit(f"examples.py: no example called {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="fastcas-examples-") as temporary:
        folder = Path(temporary)
        storage = folder / "storage" / "hashed_files"
        dht_port = free_port(socket.SOCK_DGRAM)
        node = P2PNode(
            node_id="MyNode",
            server_host="127.0.0.1",
            server_port=free_port(socket.SOCK_STREAM),
            dht_port=dht_port,
            storage_dir=str(storage),
            workers=2,
        )
        await node.initialize()
        node.start_server()
        print(f"node MyNode serves on port {node.server_port}")
        try:
            document = folder / "document.bin"
            document.write_bytes(b"".join(i.to_bytes(4, "little") for i in range(300_000)))
            stored = await asyncio.to_thread(fastcas.store, document, storage_dir=storage)
            print(f"stored {stored.file_hash}\n  {stored.link}")
            meta = await node.peer_manager.discover_file(stored.file_hash)
            assert meta is not None
            world = World(node, stored, meta, folder, dht_port)
            for example in EXAMPLES:
                if not names or example.__name__ in names:
                    print(f"{example.__name__}: {(example.__doc__ or '').splitlines()[0]}")
                    await example(world)
        finally:
            await node.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
