"""Downloads that need parity: chunks that exist nowhere, peers that each lack others, liars, one loss too many."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import ChunkNotFound
from fastcas.fetch import filling
from fastcas.fetch.download import DownloadResult, download
from fastcas.fetch.rebuild import ParityPlan
from fastcas.ids import short
from fastcas.metadata import Manifest
from tests.support.evil_peer import Peer, content_of, make_manifest, parity_chunks

UNIT = 16384
K, M = 4, 2


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for parity at the first tick that finds data nowhere."""
    monkeypatch.setattr(filling, "PARITY_AFTER_S", 0.05)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


def members(manifest: Manifest) -> Iterator[list[int]]:
    """The chunks of each stripe, data then parity."""
    for number in range(manifest.n_stripes):
        data, parity = manifest.stripe(number)
        yield [*data, *parity]


def without(manifest: Manifest, count: int, first: int = 0) -> set[int]:
    """All chunks but `count` of each stripe, other ones in each stripe."""
    lost: set[int] = set()
    for number, chunks in enumerate(members(manifest)):
        lost.update(chunks[(first + number + i) % len(chunks)] for i in range(count))
    return set(range(manifest.n_total)) - lost


async def fetch(out: Path, *peers: Peer, bare: bool = False, **options: Any) -> DownloadResult:
    link = peers[0].link(bare=bare, peers=tuple(peer.addr for peer in peers))
    return await download(link, out, discovery=None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("bare", [False, True])
def test_m_chunks_of_every_stripe_exist_nowhere(tmp_path: Path, bare: bool) -> None:
    content = content_of(160 * K * UNIT - 77)  # so many that a stripe per tick would not get there

    async def work() -> None:
        manifest = make_manifest(content, UNIT, K, M)
        async with Peer(content, k=K, m=M, have=without(manifest, M)) as peer:
            result = await fetch(tmp_path / "out", peer, bare=bare)
            assert result.local_bytes > 0

    run(work)
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.slow
def test_peers_that_each_lack_other_chunks_are_enough_together(tmp_path: Path) -> None:
    content = content_of(9 * K * UNIT + 5)

    async def work() -> None:
        manifest = make_manifest(content, UNIT, K, M)
        there = without(manifest, M)
        async with contextlib.AsyncExitStack() as stack:
            peers = [
                await stack.enter_async_context(
                    Peer(content, k=K, m=M, have={i for i in there if i % 3 != third})
                )
                for third in range(3)
            ]
            await fetch(tmp_path / "out", *peers)

    run(work)
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("size", [1, UNIT - 1, UNIT, UNIT + 1, K * UNIT, K * UNIT + 1])
def test_small_files_come_from_parity_alone(tmp_path: Path, size: int) -> None:
    content = content_of(size)

    async def work() -> None:
        manifest = make_manifest(content, UNIT, K, M)
        n = manifest.n_chunks
        lost = {0} if n < K else {0, n - 1}
        have = set(range(manifest.n_total)) - lost
        async with Peer(content, k=K, m=M, have=have) as peer:
            await fetch(tmp_path / "out", peer)

    run(work)
    assert (tmp_path / "out").read_bytes() == content


class LyingParity(Peer):
    """Right data, wrong parity."""

    def bytes_of(self, index: int) -> bytes:
        data = super().bytes_of(index)
        return data if index < self.truth.n_chunks else bytes(byte ^ 1 for byte in data)


def test_lying_shard_convicts_its_peer_and_is_not_decoded(tmp_path: Path) -> None:
    content = content_of(3 * K * UNIT)

    async def work() -> None:
        manifest = make_manifest(content, UNIT, K, M)
        have = without(manifest, 1)
        async with LyingParity(content, k=K, m=M, have=have) as liar, Peer(content, k=K, m=M, have=have) as good:
            first = await fetch(tmp_path / "out", liar, good)
            assert set(first.banned) <= {liar.addr}
        only_parity = {i for i in range(manifest.n_total) if i >= manifest.n_chunks or i % K}
        async with LyingParity(content, k=K, m=M, have=only_parity) as liar:
            with pytest.raises(ChunkNotFound) as caught:
                await fetch(tmp_path / "none", liar)
            assert "wrong bytes" in str(caught.value)
            assert "stripe #0 has 3 of the 4 chunks it needs" in str(caught.value)

    run(work)
    assert (tmp_path / "out").read_bytes() == content
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_one_loss_too_many_names_the_stripe_and_its_chunks(tmp_path: Path) -> None:
    content = content_of(3 * K * UNIT)

    async def work() -> None:
        manifest = make_manifest(content, UNIT, K, M)
        lost = [4, 6, manifest.stripe(1)[1][1]]
        have = set(range(manifest.n_total)) - set(lost)
        async with Peer(content, k=K, m=M, have=have) as peer:
            with pytest.raises(ChunkNotFound) as caught:
                await fetch(tmp_path / "out", peer, stall_timeout_s=1.0)
        message = str(caught.value)
        assert "stripe #1 has 3 of the 4 chunks it needs" in message
        for index in lost:
            assert f"#{index} ({short(manifest.hash_of(index))})" in message
        assert "stripe #0" not in message

    run(work)
    assert not (tmp_path / "out").exists()


class Chunks:
    """`LocalChunks` with some chunks in one file."""

    def __init__(self, path: Path, chunks: dict[bytes, bytes]) -> None:
        self.places: dict[bytes, tuple[int, int]] = {}
        data = bytearray()
        for key, chunk in chunks.items():
            self.places[key] = (len(data), len(chunk))
            data += chunk
        path.write_bytes(data)
        self.fd = os.open(path, os.O_RDONLY)

    def open_extent(self, digest: bytes) -> tuple[int, int, int] | None:
        place = self.places.get(digest)
        return None if place is None else (self.fd, *place)


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [False, True])
def test_parity_of_this_machine_is_used(tmp_path: Path, is_damaged: bool) -> None:
    content = content_of(2 * K * UNIT)

    async def work() -> None:
        manifest = make_manifest(content, UNIT, K, M)
        chunks = parity_chunks(content, UNIT, K, M)
        n = manifest.n_chunks
        kept = {manifest.hash_of(n + i): bytes(chunk) for i, chunk in enumerate(chunks)}
        if is_damaged:
            kept[manifest.hash_of(n)] = bytes(UNIT)
        local = Chunks(tmp_path / "local", kept)
        have = set(range(manifest.n_total)) - {0, 1, 4, 5}
        if not is_damaged:
            have -= set(range(n, manifest.n_total))
        try:
            async with Peer(content, k=K, m=M, have=have) as peer:
                await fetch(tmp_path / "out", peer, local=local)
        finally:
            os.close(local.fd)

    run(work)
    assert (tmp_path / "out").read_bytes() == content


def test_plan_asks_again_elsewhere_when_the_holder_is_gone() -> None:
    manifest = make_manifest(content_of(K * UNIT), UNIT, K, M)
    plan = ParityPlan(manifest)
    data, parity = 0b1110, 0b110000
    assert plan.to_ask(0b0001, data | parity, data) == [4]
    assert plan.to_ask(0b0001, data | parity, data) == []
    assert plan.to_ask(0b0001, data | 0b100000, data) == [5]


def test_plan_names_a_stripe_once_and_only_when_it_lacks_data() -> None:
    manifest = make_manifest(content_of(2 * K * UNIT), UNIT, K, M)
    plan = ParityPlan(manifest)
    for index in (0, 1, 2):
        plan.add(index)
        assert plan.next_ready() is None
    plan.add(8)
    assert plan.next_ready() == 0
    plan.add(9)
    assert plan.next_ready() is None
    for index in (10, 4, 5, 6):
        plan.add(index)
    plan.add(7)  # came from a peer meanwhile
    assert plan.next_ready() is None


def test_parity_stands_in_for_a_chunk_that_its_only_holder_does_not_give(tmp_path: Path) -> None:
    out = tmp_path / "out"
    content = content_of(24 * 16384 + 5)

    async def work() -> None:
        everything = set(range(make_manifest(content, k=4, m=2).n_total))
        async with (
            Peer(content, k=4, m=2, have={0}, behaviour="silent") as holder,
            Peer(content, k=4, m=2, have=everything - {0}) as other,
        ):
            link = other.link(peers=(holder.addr, other.addr))
            result = await download(link, out, discovery=None, stall_timeout_s=8.0)
            assert result.local_bytes == 16384
            assert set(result.bytes_by_peer) == {other.addr}

    asyncio.run(work())
    assert out.read_bytes() == content
