"""A download killed at its N-th system call of every kind: never a wrong byte, and the next one goes on from there.

By link, by bare hash, with chunks that only parity brings back, and of a collection. `make kill-points` goes through
every N of every kind in every state (FASTCAS_KILL_POINTS=all), here a few of each.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastcas.fetch import filling
from fastcas.fetch.download import download
from fastcas.ids import Link
from fastcas.store.collection import Collection, FileEntry, PackEntry, SmallEntry
from tests.support.evil_peer import Peer, content_of
from tests.support.fetch_crash_rig import Rig, rig
from tests.support.library import Library, tree_of

IS_LONG = os.environ.get("FASTCAS_KILL_POINTS") == "all"
CHUNK = 16384
CONTENT = content_of(40 * CHUNK + 5)
N_HALF = 20
PATIENCE = 2  # downloads in a row that came through: no thread makes so many calls of the kind
PARITY_AFTER_S = 0.05  # nobody else will come
KINDS = (
    "openat", "mkdir", "flock", "fallocate", "ftruncate", "pwrite64", "pread64", "lseek", "fsync", "renameat2",
    "unlink", "close", "clone3", "socket", "connect", "sendto", "recvfrom", "epoll_ctl", "epoll_wait", "read", "write",
    "futex", "newfstatat", "fcntl", "madvise", "eventfd2", "pipe2", "mmap", "rename", "renameat", "unlinkat",
    "fchmod", "sync", "rmdir",
)  # fmt: skip
FEW = {
    "link": (
        ("fresh", "pwrite64", (1, 2, 3, 9)), ("fresh", "fallocate", (1,)), ("fresh", "flock", (1,)),
        ("fresh", "ftruncate", (1, 2)), ("fresh", "fsync", (1, 2)), ("fresh", "renameat2", (1,)),
        ("fresh", "unlink", (1,)), ("resumed", "pwrite64", (1, 2, 5)), ("resumed", "recvfrom", (12,)),
        ("resumed", "unlink", (1,)), ("damaged", "pwrite64", (1, 2, 3)), ("damaged", "ftruncate", (1,)),
        ("other", "pwrite64", (1, 2, 3)),
    ),
    "bare": (
        ("fresh", "pwrite64", (1, 2, 9)), ("fresh", "fsync", (1,)), ("fresh", "renameat2", (1,)),
        ("resumed", "pwrite64", (1, 4)), ("resumed", "recvfrom", (9,)), ("damaged", "pwrite64", (2,)),
    ),
    "parity": (
        ("fresh", "pwrite64", (1, 9, 20, 40)), ("fresh", "fsync", (1,)), ("fresh", "renameat2", (1,)),
        ("resumed", "pwrite64", (1, 12)), ("resumed", "pread64", (3,)),
    ),
    "collection": (
        ("fresh", "pwrite64", (1, 8, 15)), ("fresh", "fsync", (1, 4)), ("fresh", "renameat2", (1,)),
        ("fresh", "rename", (1,)), ("fresh", "renameat", (1, 3)), ("fresh", "fchmod", (1, 4)), ("fresh", "sync", (1,)),
        ("fresh", "unlinkat", (1,)), ("fresh", "mkdir", (2, 4)), ("resumed", "renameat", (2,)),
        ("resumed", "pwrite64", (2,)), ("resumed", "unlink", (2,)),
    ),
}  # fmt: skip
COUNT: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def total() -> Iterator[None]:
    """Say at the end how many downloads there were, and how many of them were killed."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    print(f"\n{COUNT.total()} downloads in {seconds:.0f} s: {dict(COUNT)}; 0 wrong bytes, all resumed")


@dataclass
class Scene:
    """What is fetched, and in which states that can begin: folder templates by name."""

    made: Rig
    link: Link
    states: dict[str, Path | None]
    parity_after_s: float | None = None

    async def kill_and_resume(self, state: str, kind: str, n: int) -> int:
        """Strike once; returns the exit status. Whatever it is, the next download is right and uses what was there."""
        made, template = self.made, self.states[state]
        made.lay(template)
        order = {} if self.parity_after_s is None else {"parity_after_s": self.parity_after_s}
        struck = await made.strike(self.link, kind, f"signal=SIGKILL:when={n}", **order)
        assert struck.status in (-9, 0), (kind, n, struck)
        self.check(struck.status, f"{kind} {n}")
        await self.resume(n_least=N_HALF if template is not None else 0)
        return struck.status

    def check(self, status: int, where: str) -> None:
        out = self.made.out
        if out.exists():
            assert out.read_bytes() == CONTENT, where
        else:
            assert status == -9

    async def resume(self, n_least: int) -> None:
        await self.made.resume(self.link, n_least=n_least, rebuilds=self.parity_after_s is not None)


class TreeScene(Scene):
    """A collection: the folder is there whole, or not at all."""

    @property
    def _library(self) -> Library:
        assert isinstance(self.made.peer, Library)
        return self.made.peer

    def check(self, status: int, where: str) -> None:
        out = self.made.out
        if out.exists():
            assert tree_of(out) == TREE, where
        else:
            assert status == -9

    async def resume(self, n_least: int) -> None:
        made, library = self.made, self._library
        work = made.out.with_name("out.fastcas-tree")
        was_there = made.out.exists()
        whole = {hashlib.sha256(path.read_bytes()).digest() for path in [*work.glob("file-?"), *work.glob("pack-?")]}
        n_whole = sum(peer.manifest.n_chunks for peer in library.peers if peer.manifest.file_hash in whole)
        before = [peer.n_chunks_served for peer in library.peers]
        await download(self.link, made.out, discovery=None)
        served = [peer.n_chunks_served - n for peer, n in zip(library.peers, before, strict=True)]
        assert tree_of(made.out) == TREE
        assert {path.stat().st_mode & 0o777 for path in made.out.rglob("*") if path.is_file()} == {0o644}
        assert [path.name for path in made.out.parent.iterdir()] == ["out"]
        assert sum(served[1:]) <= (0 if was_there else N_MEMBER_CHUNKS - n_whole)


async def half_done(made: Rig, link: Link, folder: Path, **order: float) -> Path:
    """Make a template of a download that stopped half way."""
    await made.strike(link, "close", "delay_enter=0:when=60000", stall_timeout_s=0.2, **order)
    shutil.copytree(made.out.parent, folder)
    return folder


@asynccontextmanager
async def file_scene(folder: Path, *, bare: bool) -> AsyncIterator[Scene]:
    async with rig(folder, Peer(CONTENT)) as made:
        states: dict[str, Path | None] = {"fresh": None}
        async with Peer(CONTENT, have=set(range(41 - N_HALF, 41) if bare else range(N_HALF))) as half:
            template = await half_done(made, half.link(bare=bare), folder / "states" / "resumed")
        assert len(made.listed()) == N_HALF
        states["resumed"] = template
        for name, at in (("damaged", 3), ("other", 9)):  # the magic; the manifest's hash, check sum wrong
            shutil.copytree(template, folder / "states" / name)
            states[name] = folder / "states" / name
            journal = folder / "states" / name / made.journal.name
            data = bytearray(journal.read_bytes())
            data[at] ^= 1
            journal.write_bytes(data)
        yield Scene(made, made.peer.link(bare=bare), states)


@asynccontextmanager
async def parity_scene(folder: Path) -> AsyncIterator[Scene]:
    """Chunks 1, 6 and 11 lie nowhere: their stripes of four are rebuilt."""
    have = set(range(41 + 22)) - {1, 6, 11}
    async with rig(folder, Peer(CONTENT, k=4, m=2, have=have)) as made:
        async with Peer(CONTENT, k=4, m=2, have=set(range(20, 41))) as half:
            template = await half_done(made, half.link(), folder / "states" / "resumed")
        assert len(made.listed()) >= N_HALF
        yield Scene(made, made.peer.link(), {"fresh": None, "resumed": template}, PARITY_AFTER_S)


MEMBERS = {
    "a/one": content_of(3 * CHUNK, 41), "a/two": content_of(2 * CHUNK + 9, 42), "b/c/three": content_of(70_000, 43),
}  # fmt: skip
SMALLS = {"a/s1": b"small", "b/c/s2": content_of(5000, 44), "s3": b""}
TREE = MEMBERS | SMALLS
PACK = SMALLS["a/s1"] + SMALLS["b/c/s2"]
N_MEMBER_CHUNKS = sum(-(-len(data) // CHUNK) for data in (*MEMBERS.values(), PACK))


def make_library() -> Library:
    """Return a library of the tree."""
    manifests = {path: Peer(data).manifest for path, data in MEMBERS.items()}
    files = tuple(FileEntry(path, False, m.size, m.file_hash, m.manifest_hash) for path, m in manifests.items())
    at = {"a/s1": 0, "b/c/s2": 5, "s3": 0}
    small = tuple(
        SmallEntry(path, False, len(data), hashlib.sha256(data).digest(), 0, at[path]) for path, data in SMALLS.items()
    )
    pack = Peer(PACK).manifest
    packs = (PackEntry(pack.file_hash, pack.manifest_hash, pack.size),)
    return Library(Collection(packs, ("a", "b", "b/c"), files, small).encode(), *MEMBERS.values(), PACK)


@asynccontextmanager
async def collection_scene(folder: Path) -> AsyncIterator[Scene]:
    async with rig(folder, make_library()) as made:
        assert isinstance(made.peer, Library)
        lacking = made.peer.peers[-1]
        lacking.have = set()  # the pack
        template = await half_done(made, made.peer.link(), folder / "states" / "resumed")
        lacking.have = None
        assert (template / "out.fastcas-tree" / "file-0").exists()
        yield TreeScene(made, made.peer.link(), {"fresh": None, "resumed": template})


SCENES = {
    "link": lambda folder: file_scene(folder, bare=False),
    "bare": lambda folder: file_scene(folder, bare=True),
    "parity": parity_scene,
    "collection": collection_scene,
}


@pytest.mark.parametrize("kind", KINDS if IS_LONG else ("a few",))
@pytest.mark.parametrize("what", SCENES)
def test_killed_at_any_call_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: str
) -> None:
    if what == "parity":
        monkeypatch.setattr(filling, "PARITY_AFTER_S", PARITY_AFTER_S)

    async def few() -> None:
        async with SCENES[what](tmp_path) as scene:
            n_killed = 0
            for state, kind, points in FEW[what]:
                for n in points:
                    n_killed += await scene.kill_and_resume(state, kind, n) == -9
            assert n_killed >= len(FEW[what]) // 2
            COUNT[f"{what} killed"] += n_killed

    async def all_points() -> None:
        async with SCENES[what](tmp_path) as scene:
            for state in scene.states:
                n, n_passed = 1, 0
                while n_passed < PATIENCE:
                    status = await scene.kill_and_resume(state, kind, n)
                    n, n_passed = n + 1, n_passed + 1 if status == 0 else 0
                    COUNT[f"{what} {'killed' if status else 'came through'}"] += 1

    asyncio.run(all_points() if IS_LONG else few())
