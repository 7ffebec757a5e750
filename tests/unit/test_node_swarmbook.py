"""Peers that fall silent are asked again, and forgotten when they do not answer."""

from __future__ import annotations

import asyncio
from typing import Any

from fastcas.node.swarmbook import AGAIN_S, SILENT_S, SwarmBook

FILE = b"f" * 32
ME = "1" * 40
OTHER = "2" * 40


async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def test_silent_peer_stays_while_it_answers_and_goes_when_it_does_not() -> None:
    async def main() -> None:
        now = [0.0]
        published: asyncio.Queue[dict[bytes, Any]] = asyncio.Queue()
        book = SwarmBook(ME, published.put_nowait, lambda: now[0])
        server = await asyncio.start_server(healthy, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        book.on_peer({"op": "peer", "file_hash": FILE, "node_id": OTHER, "ip": "127.0.0.1", "port": port})
        async with asyncio.timeout(10):
            assert FILE in await published.get()
        now[0] = SILENT_S - 1
        book._recheck()
        assert not book._tasks  # it was seen lately
        now[0] = AGAIN_S
        book._recheck()
        assert len(book._tasks) == 1
        await asyncio.gather(*book._tasks)
        assert book.peers_of(FILE) == [(OTHER, "127.0.0.1", port)]
        server.close()
        await server.wait_closed()
        book._recheck()
        assert not book._tasks  # one address not too often
        now[0] += AGAIN_S
        book._recheck()
        async with asyncio.timeout(10):
            assert await published.get() == {}
        assert book.peers_of(FILE) == []
        await book.close()

    asyncio.run(main())
