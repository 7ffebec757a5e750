"""Files cut by content on their way here: proven at the end, the rule for bare hashes, resume, local seed files."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import ChunkNotFound, ManifestCorrupt
from fastcas.fetch.download import DownloadResult, download
from fastcas.ids import Link
from fastcas.metadata import Manifest
from fastcas.store.content_cuts import ContentCuts
from tests.support.evil_peer import Peer, content_of

AVERAGE = 65536
CONTENT = content_of(20 * AVERAGE + 777)
OLD = CONTENT[: 5 * AVERAGE] + b"inserted" + CONTENT[6 * AVERAGE :]


def cut_manifest(content: bytes) -> Manifest:
    """The manifest of a content that is cut by content."""
    cuts = ContentCuts(len(content), AVERAGE)
    cuts.hash_content(memoryview(content))
    cuts.cut(memoryview(bytearray(content)), 0)
    return cuts.manifest()


MANIFEST = cut_manifest(CONTENT)


class CutPeer(Peer):
    """A peer with chunks that are cut by content."""

    def __init__(self, content: bytes = CONTENT, **options: Any) -> None:
        options.setdefault("manifest", cut_manifest(content))
        super().__init__(content, **options)
        self.truth = self.manifest

    def bytes_of(self, index: int) -> bytes:
        return self.content[self.truth.offset_of(index) : self.truth.offset_of(index + 1)]


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


async def get(link: Link, out: Path, **options: Any) -> DownloadResult:
    """Download without discovery."""
    return await download(link, out, discovery=None, **options)


@pytest.mark.parametrize("bare", [False, True])
def test_a_file_cut_by_content_arrives_and_is_proven(tmp_path: Path, bare: bool) -> None:
    proven: list[bool] = []

    class Hooks:
        def on_manifest(self, manifest: Manifest, part_path: Path) -> None: ...
        def on_chunk(self, index: int) -> None: ...
        def on_tree(self, tree: object) -> None: ...
        def member(self) -> Any: ...
        def end(self) -> None: ...
        def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
            proven.append(content_proven)

    async def work() -> None:
        async with CutPeer() as peer:
            result = await get(peer.link(bare=bare), tmp_path / "out", hooks=Hooks())
            assert result.manifest == MANIFEST
            assert sum(result.bytes_by_peer.values()) == len(CONTENT)

    run(work)
    assert proven == [True]
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("bare", [False, True])
def test_a_manifest_whose_chunks_are_another_content_is_convicted(tmp_path: Path, bare: bool) -> None:
    lie = replace(MANIFEST, file_hash=hashlib.sha256(b"something else").digest())

    async def work() -> None:
        async with CutPeer(manifest=lie) as liar:
            with pytest.raises(ManifestCorrupt, match=r"not of|no manifest"):
                await get(liar.link(bare=bare), tmp_path / "out")

    run(work)
    assert sorted(tmp_path.iterdir()) == []


def test_a_bare_hash_takes_the_manifest_with_links_where_one_is_offered(tmp_path: Path) -> None:
    async def work() -> None:
        async with CutPeer() as cut, Peer(CONTENT, chunk_size=AVERAGE) as fixed:
            link = Link(MANIFEST.file_hash, peers=(cut.addr, fixed.addr))
            result = await get(link, tmp_path / "out")
            assert result.manifest == fixed.manifest
            assert cut.n_chunks_served == 0

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_lie_beside_an_honest_manifest_is_never_even_tried(tmp_path: Path) -> None:
    async def work() -> None:
        file_hash = hashlib.sha256(CONTENT).digest()
        lie = replace(cut_manifest(OLD), file_hash=file_hash)
        async with CutPeer(OLD, manifest=lie) as liar, Peer(CONTENT, chunk_size=AVERAGE) as fixed:
            await get(Link(file_hash, peers=(liar.addr, fixed.addr)), tmp_path / "out")
            assert liar.n_chunks_served == 0

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_after_a_convicted_manifest_another_one_cut_by_content_is_tried(tmp_path: Path) -> None:
    async def work() -> None:
        lie = replace(cut_manifest(OLD), file_hash=MANIFEST.file_hash)
        async with CutPeer(OLD, manifest=lie) as liar, CutPeer() as honest:
            result = await get(Link(MANIFEST.file_hash, peers=(liar.addr, honest.addr)), tmp_path / "out")
            assert result.manifest == MANIFEST

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("behaviour", ["wrong_bytes", "wrong_last_byte", "zeros", "short", "other_chunk"])
def test_wrong_bytes_ban_the_peer_and_the_good_one_completes(tmp_path: Path, behaviour: str) -> None:
    async def work() -> None:
        async with CutPeer(behaviour=behaviour) as evil, CutPeer() as good:
            link = replace(good.link(), peers=(evil.addr, good.addr))
            result = await get(link, tmp_path / "out")
            assert not evil.n_chunk_requests or evil.addr in result.banned

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("journal", ["kept", "damaged"])
def test_resume_takes_what_is_there(tmp_path: Path, journal: str) -> None:
    have = set(range(4, MANIFEST.n_chunks))
    there = sum(MANIFEST.length_of(i) for i in have)

    async def work() -> None:
        async with CutPeer(have=have) as peer:
            with pytest.raises(ChunkNotFound):
                await get(peer.link(), tmp_path / "out", stall_timeout_s=0.3)
        if journal == "damaged":  # what lies in the part file is found by its holes, and hashed
            path = tmp_path / "out.fastcas-journal"
            data = bytearray(path.read_bytes())
            data[60] ^= 1
            path.write_bytes(data)
        async with CutPeer() as peer:
            result = await get(peer.link(), tmp_path / "out")
            assert result.resumed_bytes == there
            assert sum(result.bytes_by_peer.values()) == len(CONTENT) - result.resumed_bytes

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("bare", [False, True])
def test_seed_from_an_older_version_fetches_the_difference_only(tmp_path: Path, bare: bool) -> None:
    (tmp_path / "old").write_bytes(OLD)
    shared = {cut_manifest(OLD).hash_of(i) for i in range(cut_manifest(OLD).n_chunks)}
    missing = sum(MANIFEST.length_of(i) for i in range(MANIFEST.n_chunks) if MANIFEST.hash_of(i) not in shared)

    async def work() -> None:
        async with CutPeer() as peer:
            result = await get(peer.link(bare=bare), tmp_path / "out", seed_from=[tmp_path / "old"])
            assert sum(result.bytes_by_peer.values()) == missing < len(CONTENT) / 2
            assert result.local_bytes == len(CONTENT) - missing

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_seed_from_a_folder_finds_fixed_chunks_at_their_places(tmp_path: Path) -> None:
    folder = tmp_path / "seeds" / "below"
    folder.mkdir(parents=True)
    (folder / "head").write_bytes(CONTENT[: 3 * AVERAGE] + b"other" * AVERAGE)
    (folder / "tail").write_bytes(bytes(AVERAGE) + CONTENT[19 * AVERAGE :])
    (folder / "shifted").write_bytes(b"x" + CONTENT[6 * AVERAGE : 9 * AVERAGE])
    (folder / "loop").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")

    async def work() -> None:
        async with Peer(CONTENT, chunk_size=AVERAGE) as peer:
            result = await get(peer.link(), tmp_path / "out", seed_from=[tmp_path / "seeds"])
            assert result.local_bytes == 3 * AVERAGE + len(CONTENT) - 19 * AVERAGE
            assert sum(result.bytes_by_peer.values()) == len(CONTENT) - result.local_bytes

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_a_seed_file_that_changes_after_it_was_looked_at_costs_a_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcas.fetch import seeds

    (tmp_path / "old").write_bytes(OLD)
    fill = seeds._Index.fill

    def fill_then_change(*arguments: Any) -> None:
        fill(*arguments)
        (tmp_path / "old").write_bytes(bytes(3 * AVERAGE) + OLD[3 * AVERAGE : -AVERAGE])

    monkeypatch.setattr(seeds._Index, "fill", fill_then_change)

    async def work() -> None:
        async with CutPeer() as peer:
            result = await get(peer.link(), tmp_path / "out", seed_from=[tmp_path / "old"])
            assert result.local_bytes > 0 and result.banned == {}
            assert sum(result.bytes_by_peer.values()) == len(CONTENT) - result.local_bytes

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT
