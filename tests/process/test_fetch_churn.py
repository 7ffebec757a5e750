"""Peers that come and go, as real processes: who is new joins, who comes back is used again; driven by progress."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fastcas.fetch.download import DownloadResult, Progress, download
from fastcas.ids import Link, PeerAddr
from tests.support.evil_peer import content_of
from tests.support.nodes import Node, free_port, run_fastcas, start_node

SIZE = 12 << 20
CONTENT = content_of(SIZE)
RATE = "6M"  # a node's upload: the download outlasts the changes


class Change:
    """Lets a test wait for a share of the file to be here."""

    def __init__(self) -> None:
        self._done = 0
        self._moved = asyncio.Event()

    def __call__(self, now: Progress) -> None:
        self._done = now.bytes_done
        self._moved.set()

    async def beyond(self, share: float) -> None:
        """Return when more than that share of the file is here."""
        while self._done < share * SIZE:
            self._moved.clear()
            await self._moved.wait()


@pytest.mark.slow
def test_download_goes_on_with_whoever_is_there(tmp_path: Path) -> None:
    source, out = tmp_path / "file", tmp_path / "out"
    source.write_bytes(CONTENT)
    ports = [free_port(), free_port()]
    stored = [run_fastcas("store", str(source), "--storage-dir", str(tmp_path / name)) for name in "ab"]
    assert all(done.returncode == 0 for done in stored), stored
    link = Link.parse(stored[0].stdout.split("Link: ")[1].strip())
    peers = tuple(PeerAddr("127.0.0.1", port) for port in ports)

    async def start(at: int) -> Node:
        arguments = ("--port", str(ports[at]), "--max-upload", RATE)
        return await asyncio.to_thread(start_node, tmp_path / "ab"[at], *arguments)

    async def work() -> DownloadResult:
        here = Change()
        nodes = [await start(0)]
        task = asyncio.create_task(
            download(Link(link.file_hash, link.manifest_hash, peers=peers), out, discovery=None, progress=here)
        )
        try:
            async with asyncio.timeout(90):
                await here.beyond(0.1)
                nodes[0].kill()  # nobody is left
                nodes.append(await start(1))  # who was never there before
                await here.beyond(0.4)
                nodes[1].kill()
                nodes.append(await start(0))  # who was there before
                return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for node in nodes:
                await asyncio.to_thread(node.stop)

    result = asyncio.run(work())
    assert out.read_bytes() == CONTENT
    assert set(result.bytes_by_peer) == set(peers)
    assert not result.banned
