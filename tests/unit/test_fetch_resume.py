"""Resume and destinations: what is there is used, nothing is overwritten, nothing is lost to kill -9."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import ChunkNotFound, DestinationExists, StoreFull, StoreLocked
from fastcas.fetch.download import DownloadResult, FetchedTree, Progress, download
from fastcas.ids import Link
from fastcas.metadata import Manifest
from tests.support.evil_peer import Peer, content_of

CHUNK = 16384
CONTENT = content_of(100 * CHUNK + 5)


def run(work: Any) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


async def get(link: Link, out: Path, **options: Any) -> DownloadResult:
    """Download without discovery."""
    return await download(link, out, discovery=None, **options)


async def wait_for_file(path: Path) -> None:
    """Return when a file exists."""
    for _ in range(2000):
        if await asyncio.to_thread(path.exists):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(path)


async def interrupted(out: Path, after: int) -> None:
    """Fetch the first part of the file, then give up."""
    async with Peer(CONTENT, have=set(range(after))) as peer:
        with pytest.raises(ChunkNotFound):
            await get(peer.link(), out, stall_timeout_s=0.3)


@pytest.mark.parametrize("trust", [False, True])
def test_resume_fetches_only_what_is_missing(tmp_path: Path, trust: bool) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        await interrupted(out, 60)
        async with Peer(CONTENT) as peer:
            result = await get(peer.link(), out, trust_resume=trust)
            assert result.resumed_bytes == 60 * CHUNK
            assert peer.n_chunks_served == 41

    run(work)
    assert out.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_part_file_is_noticed_and_repaired(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        await interrupted(out, 60)
        part = tmp_path / "out.fastcas-part"
        with part.open("r+b") as file:
            file.seek(7 * CHUNK + 3)
            file.write(b"rot")
        async with Peer(CONTENT) as peer:
            result = await get(peer.link(), out)
            assert result.resumed_bytes == 59 * CHUNK

    run(work)
    assert out.read_bytes() == CONTENT


def test_damaged_journal_costs_a_rehash(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        await interrupted(out, 60)
        journal = tmp_path / "out.fastcas-journal"
        journal.write_bytes(b"\0" + journal.read_bytes()[1:])
        async with Peer(CONTENT) as peer:
            result = await get(peer.link(), out)
            assert result.resumed_bytes == 60 * CHUNK

    run(work)
    assert out.read_bytes() == CONTENT


def test_resume_after_kill_9_refetches_at_most_what_was_in_flight(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom fastcas.fetch.download import download\n"
        "from fastcas.ids import Link\n"
        "asyncio.run(download(Link.parse(sys.argv[1]), Path(sys.argv[2]), discovery=None))\n"
    )

    async def work() -> None:
        async with Peer(CONTENT, behaviour="silent", evil_when=lambda nth: nth > 50) as peer:
            child = subprocess.Popen([sys.executable, "-c", script, str(peer.link()), str(out)])  # noqa: ASYNC220
            try:
                journal = tmp_path / "out.fastcas-journal"
                while not journal.exists() or journal.stat().st_size < 64 + 50 * 16:
                    assert child.poll() is None
                    await asyncio.sleep(0.01)
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait()
        async with Peer(CONTENT) as peer:
            result = await get(peer.link(), out)
            assert result.resumed_bytes > 49 * CHUNK
            assert peer.n_chunks_served == 51

    run(work)
    assert out.read_bytes() == CONTENT


def test_destination_with_the_same_content_needs_nobody(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(CONTENT)

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            link = peer.link()
        result = await get(link, out)
        assert result.size == len(CONTENT)
        assert isinstance(result.manifest, Manifest)

    run(work)


def test_destination_with_other_content_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            with pytest.raises(DestinationExists, match="left alone"):
                await get(peer.link(), out)
            assert not peer.asked
            assert out.read_bytes() == b"mine"
            await get(peer.link(), out, force=True)

    run(work)
    assert out.read_bytes() == CONTENT


def test_destination_folder_is_created_and_a_folder_is_not_replaced(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            await get(peer.link(), tmp_path / "a" / "b" / "out")
            with pytest.raises(DestinationExists, match="folder"):
                await get(peer.link(), tmp_path / "a")

    run(work)
    assert (tmp_path / "a" / "b" / "out").read_bytes() == CONTENT


def test_two_downloads_to_the_same_destination_do_not_mix(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            peer.gate.clear()
            first = asyncio.create_task(get(peer.link(), tmp_path / "out"))
            await wait_for_file(tmp_path / "out.fastcas-part")
            with pytest.raises(StoreLocked):
                await get(peer.link(), tmp_path / "out")
            peer.gate.set()
            await first

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_cancelled_download_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT, behaviour="silent", evil_when=lambda nth: nth > 30) as peer:
            seen = asyncio.Event()

            def progress(now: Progress) -> None:
                if now.bytes_done > 29 * CHUNK:
                    seen.set()

            task = asyncio.create_task(get(peer.link(), out, progress=progress))
            await seen.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with Peer(CONTENT) as peer:
            assert (await get(peer.link(), out)).resumed_bytes > 29 * CHUNK

    run(work)
    assert out.read_bytes() == CONTENT


def test_full_disk_keeps_the_part_file_and_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            with pytest.raises(StoreFull, match="part file is kept"):
                await get(peer.link(), tmp_path / "out")

    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK * 10, hard))
    try:
        run(work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert not (tmp_path / "out").exists()


class _Local:
    """Chunks of one file of this machine."""

    def __init__(self, path: Path, hashes: dict[bytes, tuple[int, int]]) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.hashes = hashes

    def open_extent(self, chunk_hash: bytes) -> tuple[int, int, int] | None:
        found = self.hashes.get(chunk_hash)
        return None if found is None else (self.fd, *found)


def test_chunks_of_this_machine_are_used_and_checked(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    source.write_bytes(CONTENT[: 40 * CHUNK] + b"x" + CONTENT[40 * CHUNK + 1 : 50 * CHUNK])

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            here = {peer.manifest.hash_of(i): (i * CHUNK, CHUNK) for i in range(50)}
            local = _Local(source, here)
            try:
                result = await get(peer.link(bare=True), out, local=local)
            finally:
                os.close(local.fd)
            assert result.local_bytes == 49 * CHUNK
            assert peer.n_chunks_served == 52

    run(work)
    assert out.read_bytes() == CONTENT


class _Hooks:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.chunks: set[int] = set()

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        assert part_path.exists()
        self.calls.append("manifest")

    def on_chunk(self, index: int) -> None:
        self.chunks.add(index)

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        assert path.exists()
        self.calls.append(f"finished {content_proven}")

    def on_tree(self, tree: FetchedTree) -> None:
        self.calls.append("tree")

    def member(self) -> _Hooks:
        return self

    def end(self) -> None:
        """Not of interest."""


def test_hooks_and_progress_tell_the_story(tmp_path: Path) -> None:
    hooks = _Hooks()
    seen: list[Progress] = []

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            await get(peer.link(), tmp_path / "out", hooks=hooks, progress=seen.append)

    run(work)
    assert hooks.calls == ["manifest", "finished True"]
    assert hooks.chunks == set(range(101))
    assert seen[-1].bytes_done == len(CONTENT)


def test_without_a_destination_the_stored_name_is_used_safely(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            link = Link(peer.manifest.file_hash, name="../../evil", peers=(peer.addr,))
            result = await download(link, None, discovery=None, folder=tmp_path / "here")
            assert result.path == tmp_path / "here" / "evil"

    run(work)
