"""`cat` and liars: on a bare hash not a byte before the links to the end hold; and what a slow reader costs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastcas.metadata import Manifest
from tests.support.evil_peer import Peer, content_of, make_manifest
from tests.support.fetching import run
from tests.support.library import BIG, library
from tests.support.nodes import start_node
from tests.support.origin_server import OriginServer
from tests.support.seeds import link_of

pytestmark = pytest.mark.slow

CHUNK = 16384
MIB = 1 << 20
CONTENT = content_of(200 * CHUNK + 77)
OTHER = content_of(len(CONTENT), 9)
PEAK_MIB = 192


async def cat(ref: str, *arguments: str) -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fastcas", "cat", ref, "--storage-dir", "/nonexistent", *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out, error.decode()


def lie_at_the_end() -> tuple[bytes, Manifest]:
    """Another file altogether, under this one's hash: every chunk and every link is right but the last link."""
    return OTHER, replace(make_manifest(OTHER), file_hash=make_manifest(CONTENT).file_hash)


def lie_at_the_beginning() -> tuple[bytes, Manifest]:
    """One wrong chunk, the first: every link is right but the second."""
    truth, other = make_manifest(CONTENT), make_manifest(OTHER)
    lie = replace(
        truth, hashes=other.hashes[:32] + truth.hashes[32:], midstates=other.midstates[:32] + truth.midstates[32:]
    )
    return OTHER[:CHUNK] + CONTENT[CHUNK:], lie


@pytest.mark.parametrize("make", [lie_at_the_end, lie_at_the_beginning])
def test_liar_alone_gets_not_a_byte_to_stdout(make: object) -> None:
    assert callable(make)
    content, manifest = make()

    async def work() -> None:
        async with Peer(content, manifest=manifest) as liar:
            status, out, error = await cat(manifest.file_hash.hex(), "--peer", str(liar.addr))
            assert (status, out) == (5, b""), error
            assert liar.n_chunks_served > 0 and "contradicts itself" in error and "Traceback" not in error

    run(work)


@pytest.mark.parametrize("make", [lie_at_the_end, lie_at_the_beginning])
def test_liar_beside_a_good_peer_changes_nothing(make: object) -> None:
    assert callable(make)
    content, manifest = make()

    async def work() -> None:
        async with Peer(content, manifest=manifest) as liar, Peer(CONTENT) as good:
            ref = manifest.file_hash.hex()
            status, out, error = await cat(ref, "--peer", str(liar.addr), "--peer", str(good.addr))
            assert (status, out == CONTENT) == (0, True), error

    run(work)


def test_bytes_before_the_last_link_wait_for_it() -> None:
    """Everything is here but the last chunk: nothing is handed out; then it comes, and all of it is."""

    async def work() -> None:
        n = make_manifest(CONTENT).n_chunks
        async with Peer(CONTENT, have=set(range(n - 1))) as peer:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fastcas", "cat", peer.link(bare=True).file_hash.hex(), "--peer", str(peer.addr),
                "--storage-dir", "/nonexistent", stdout=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None
            reading = asyncio.create_task(process.stdout.read(1))
            while peer.n_chunks_served < n - 1:  # noqa: ASYNC110 - the peer has no event for that
                await asyncio.sleep(0.01)
            await asyncio.wait([reading], timeout=0.5)
            assert not reading.done()
            peer.have = None
            assert await reading + await process.stdout.read() == CONTENT
            assert await process.wait() == 0

    run(work)


def test_origin_of_a_folder_helps_cat_too() -> None:
    lib, _ = library()
    lib.peers[1].have = set(range(5))

    async def work() -> None:
        async with lib, OriginServer(BIG, target="/a/big.bin") as server:
            status, out, error = await cat(f"{lib.link()}/a/big.bin", "--origin", server.folder)
            assert (status, out == BIG) == (0, True), error
            assert server.ranges

    run(work)


def test_memory_of_cat_stays_bounded_with_a_slow_reader(tmp_path: Path) -> None:
    size, block = 1024 * MIB, content_of(MIB - 8, 3)
    digest = hashlib.sha256()
    with (tmp_path / "big").open("wb") as file:
        for i in range(size // MIB):
            file.write(i.to_bytes(8, "little") + block)
            digest.update(i.to_bytes(8, "little") + block)
    with start_node(tmp_path / "node") as node:
        link = link_of(node, tmp_path / "big", "--in-place")
        process = subprocess.Popen(
            [sys.executable, "-m", "fastcas", "cat", link, "--storage-dir", "/nonexistent"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        got = hashlib.sha256()
        with process.stdout as stream:
            for _ in range(10):  # slow: what is fetched meanwhile must not pile up
                got.update(stream.read(MIB))
                time.sleep(0.1)
            on_disk = spooled(process.pid)
            for _ in range(size // MIB - 11):
                got.update(stream.read(MIB))
            status = Path(f"/proc/{process.pid}/status").read_text()
            got.update(stream.read())
        assert process.wait(30) == 0
    assert got.digest() == digest.digest()
    (tmp_path / "big").unlink()
    peak_mib = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024
    print(f"\ncat of 1 GiB: peak {peak_mib:.0f} MiB of memory, {on_disk / MIB:.0f} MiB of temporary file")
    assert peak_mib <= PEAK_MIB
    assert 0 < on_disk <= 64 * MIB


def spooled(pid: int) -> int:
    """Return the bytes on disk of a process's files without a name."""
    taken = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if "(deleted)" in os.readlink(fd) and "memfd" not in os.readlink(fd):
            taken += fd.stat().st_blocks * 512
    return taken
