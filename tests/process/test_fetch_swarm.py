"""A swarm while it is at work, with real nodes: who is found during a download joins it, parts are served at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fastcas.fetch.download import Progress, download
from fastcas.ids import Link, PeerAddr
from fastcas.node.control_client import AsyncControlClient
from tests.process.test_serve_swarm import ask, publish_log, swarm
from tests.support.evil_peer import Peer, content_of
from tests.support.nodes import Node, run_fastcas, start_node
from tests.support.serve_rig import content, manifest_of, read_response, rig
from tests.support.waiting import until, wait_until

pytestmark = pytest.mark.slow

MIB = 1 << 20
CHUNK = 1 << 18


def store(node: Node, source: Path) -> dict[str, Any]:
    """Store a file in place on a node; returns what `fastcas store --json` says."""
    done = run_fastcas("store", str(source), "--in-place", "--storage-dir", str(node.storage), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


class Fetch:
    """A node's download of a file, begun by `start`; `seen` is its last progress."""

    def __init__(self, node: Node, ref: str, out: Path, peers: list[str]) -> None:
        self.node, self.ref, self.out, self.peers = node, ref, out, peers
        self.seen: dict[str, Any] = {"done": 0, "peers": 0}

    async def run(self) -> dict[str, Any]:
        client = await AsyncControlClient.connect(self.node.storage)
        args = {"ref": self.ref, "out": os.fsencode(self.out), "folder": os.fsencode(self.out.parent),
                "peers": self.peers, "timeout_s": 30.0}  # fmt: skip
        try:
            return await client.call("get", args, self.seen.update)
        finally:
            await client.close()


def test_peer_that_is_announced_during_the_download_joins(tmp_path: Path) -> None:
    source, out = tmp_path / "file", tmp_path / "out"
    source.write_bytes(random.Random(7).randbytes(24 * MIB))

    async def work(stack: contextlib.ExitStack) -> None:
        limits = ("--max-upload", "1M")
        seed = stack.enter_context(start_node(tmp_path / "a", *limits, dht=True))
        where = ("--bootstrap", f"127.0.0.1:{seed.dht_port}")
        taker = stack.enter_context(start_node(tmp_path / "b", *where, dht=True))
        late = stack.enter_context(start_node(tmp_path / "c", *where, dht=True))
        file_hash = store(seed, source)["file_hash"]
        fetch = Fetch(taker, file_hash, out, [])  # nobody is named: discovery alone
        task = asyncio.create_task(fetch.run())
        await until(lambda: fetch.seen["done"] > MIB, "the download runs")
        assert fetch.seen["peers"] == 1
        await asyncio.to_thread(store, late, source)
        stored = time.monotonic()
        await until(lambda: fetch.seen["peers"] == 2, "the new peer has joined")
        joined_s = time.monotonic() - stored
        assert fetch.seen["done"] < source.stat().st_size
        result = await task
        assert set(result["bytes_by_peer"]) == {seed.peer, late.peer}
        print(f"\njoined {joined_s:.2f} s after it had the file (at most 5 wanted)")

    with contextlib.ExitStack() as stack:
        asyncio.run(work(stack))
    assert out.read_bytes() == source.read_bytes()


def test_leecher_serves_its_first_chunks_while_it_downloads(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(random.Random(8).randbytes(8 * MIB))

    async def work(stack: contextlib.ExitStack) -> None:
        seed = stack.enter_context(start_node(tmp_path / "a", "--max-upload", "1M"))
        middle = stack.enter_context(start_node(tmp_path / "b"))
        link = Link.parse(store(seed, source)["link"])
        fetch = Fetch(middle, link.file_hash.hex(), tmp_path / "out-b", [seed.peer])
        task = asyncio.create_task(fetch.run())
        first = asyncio.Event()

        def progress(now: Progress) -> None:
            if now.bytes_done:
                first.set()

        # Only `middle` is named. It has nothing of the file yet; of whom it knows, the seed is one, so what counts is
        # that bytes came from it while it was far from the end.
        await until(lambda: fetch.seen["done"] >= CHUNK, "the leecher has a chunk")
        begun = time.monotonic()
        only = Link(link.file_hash, link.manifest_hash, peers=(PeerAddr(middle.host, middle.port),))
        last = asyncio.create_task(download(only, tmp_path / "out-c", discovery=None, progress=progress))
        async with asyncio.timeout(30):
            await first.wait()
        assert fetch.seen["done"] < 8 * MIB
        print(f"\nfirst chunk out of a part file after {time.monotonic() - begun:.2f} s")
        result = await last
        assert result.bytes_by_peer[PeerAddr(middle.host, middle.port)] > 0
        assert not (await task)["banned"]

    with contextlib.ExitStack() as stack:
        asyncio.run(work(stack))
    assert (tmp_path / "out-b").read_bytes() == (tmp_path / "out-c").read_bytes() == source.read_bytes()


def test_news_of_a_chunk_reaches_who_waits_for_it(tmp_path: Path) -> None:
    """How soon depends on how fast chunks come; on a clock of its own: tests/unit/test_serve_swarm_news.py."""
    n = 40
    with rig(tmp_path) as made:
        manifest = manifest_of(content(n * 16384), 16384)
        made.publish()
        log = publish_log(made, manifest)
        query = f"?m={manifest.manifest_hash.hex()}"
        wait_until(lambda: swarm(made, manifest, query), "map")
        delays = []
        with made.worker.connect() as sock:
            for number in range(n):
                ask(sock, f"/swarm/{manifest.file_hash.hex()}{query}&since={number}&wait_ms=5000")
                assert swarm(made, manifest, query)["g"] == number  # the question waits
                appended = time.monotonic()
                log.append(number)
                assert msgpack.unpackb(read_response(sock)[2])["new"] == [number]
                delays.append(time.monotonic() - appended)
        log.close()
    delays.sort()
    median_ms, longest_ms, chunk_ms = 1e3 * statistics.median(delays), 1e3 * delays[-1], CHUNK * 8 / 100e3
    print(f"\nnews of a chunk: median {median_ms:.1f} ms, longest {longest_ms:.1f} ms; at 100 Mbit/s {chunk_ms:.0f}")


class Coming(Peer):
    """A good peer that is up for a while, down for a while, at the same port, and sends no faster than `rate_Bps`."""

    up_s = down_s = 5.0
    rate_Bps = 40_000.0

    def __init__(self, data: bytes, **options: Any) -> None:
        super().__init__(data, **options)
        self._free_at = 0.0

    async def _chunk(self, name: str, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        self._free_at = max(loop.time(), self._free_at) + self.manifest.chunk_size / self.rate_Bps
        await asyncio.sleep(self._free_at - loop.time())
        await super()._chunk(name, writer)

    async def come_and_go(self, phase: float) -> None:
        """Be up and down until cancelled; `phase` of a turn has passed already. The peer must have been started."""
        port = self.addr.port
        is_up, left_s = phase < 0.5, (self.up_s + self.down_s) * (0.5 - phase % 0.5)
        while True:
            if not is_up:
                await self.stop()
            await asyncio.sleep(left_s)
            if not is_up:
                await self.start(port)
            is_up, left_s = not is_up, self.down_s if is_up else self.up_s


@pytest.mark.timeout(180)
def test_fifty_peers_that_come_and_go(tmp_path: Path) -> None:
    """Row N8: each is up for 5 s and down for 5 s; half of them at a time could send the file in 10 s."""
    data = content_of(10 * MIB)

    async def once(out: Path, n: int, *, churn: bool) -> float:
        peers = [Coming(data) for _ in range(n)]
        for peer in peers:
            await peer.start()
        link = peers[0].link(peers=tuple(peer.addr for peer in peers))
        going = [asyncio.create_task(p.come_and_go(i / n)) for i, p in enumerate(peers)] if churn else []
        try:
            return (await download(link, out, discovery=None)).seconds
        finally:
            for task in going:
                task.cancel()
            await asyncio.gather(*going, return_exceptions=True)
            for peer in peers:
                await peer.stop()

    steady_s = asyncio.run(once(tmp_path / "steady", 25, churn=False))
    churned_s = asyncio.run(once(tmp_path / "churned", 50, churn=True))
    assert (tmp_path / "steady").read_bytes() == (tmp_path / "churned").read_bytes() == data
    ratio = churned_s / steady_s
    print(f"\n50 peers up 5 s, down 5 s: {churned_s:.1f} s; 25 that stay: {steady_s:.1f} s; ratio {ratio:.2f}")
