"""Collections: a whole folder arrives or nothing; what is there is left alone; bad names create nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import DestinationExists, FastCASError, IntegrityError
from fastcas.fetch.download import FetchedTree, download
from fastcas.ids import Link, PeerAddr
from fastcas.metadata import Manifest
from fastcas.store.collection import Collection, FileEntry, PackEntry, SmallEntry
from tests.support.evil_peer import Peer, content_of, head

BIG = content_of(200_000, 5)
SMALLS = {"a/tiny.txt": b"tiny", "a/b/other": content_of(1000, 6), "empty": b""}


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


class Library:
    """One data port that serves several files: routes each request to the `Peer` of that file."""

    def __init__(self, *contents: bytes) -> None:
        self.peers = [Peer(content) for content in contents]
        self.asked: list[str] = []

    async def __aenter__(self) -> Library:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def addr(self) -> PeerAddr:
        return PeerAddr("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                target = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                self.asked.append(target)
                name = target.split("?")[0].split("/")[2]
                for peer in self.peers:
                    if (
                        name in (peer.manifest.file_hash.hex(), peer.manifest.manifest_hash.hex())
                        or name in peer._index
                    ):
                        await peer._answer(target, writer)
                        break
                else:
                    writer.write(head("404 Not Found", 0))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def library(**changes: Any) -> tuple[Library, bytes]:
    """Return a library with a collection of one big and some small files, and the collection's content."""
    pack = SMALLS["a/b/other"] + SMALLS["a/tiny.txt"]
    big, packed = Peer(BIG).manifest, Peer(pack).manifest
    small = [
        SmallEntry("a/b/other", False, 1000, hashlib.sha256(SMALLS["a/b/other"]).digest(), 0, 0),
        SmallEntry("a/tiny.txt", True, 4, hashlib.sha256(b"tiny").digest(), 0, 1000),
        SmallEntry("empty", False, 0, hashlib.sha256(b"").digest(), 0, 0),
    ]
    parts: dict[str, Any] = {
        "packs": (PackEntry(packed.file_hash, packed.manifest_hash, packed.size),),
        "dirs": ("a", "a/b"),
        "files": (FileEntry("a/big.bin", True, len(BIG), big.file_hash, big.manifest_hash),),
        "small": tuple(small),
    }
    content = Collection(**(parts | changes)).encode()
    return Library(content, BIG, pack), content


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of a folder's files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WANTED = SMALLS | {"a/big.bin": BIG}


def test_tree_arrives_with_modes_and_nothing_else(tmp_path: Path) -> None:
    async def work() -> None:
        lib, _ = library()
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, name="tree", peers=(lib.addr,))
            result = await download(link, None, discovery=None, folder=tmp_path)
            assert result.path == tmp_path / "tree"
            assert result.size == sum(len(data) for data in WANTED.values())
            lib.asked.clear()
            again = await download(link, tmp_path / "tree", discovery=None)
            assert again.path == tmp_path / "tree"
            assert sum("/chunks/" in target for target in lib.asked) == 1

    run(work)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
    assert tree_of(tmp_path / "tree") == WANTED
    assert (tmp_path / "tree/a/big.bin").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "tree/a/tiny.txt").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "tree/a/b/other").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "tree").stat().st_mode & 0o777 == 0o755


def test_raw_gives_the_collections_own_bytes(tmp_path: Path) -> None:
    lib, content = library()

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            await download(link, tmp_path / "out", discovery=None, raw=True)

    run(work)
    assert (tmp_path / "out").read_bytes() == content


def test_existing_folder_with_other_content_is_left_alone_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "tiny.txt").write_bytes(b"mine")
    (out / "keep").write_bytes(b"keep")
    lib, _ = library()

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            with pytest.raises(DestinationExists, match="left alone"):
                await download(link, out, discovery=None)
            assert tree_of(out) == {"a/tiny.txt": b"mine", "keep": b"keep"}
            await download(link, out, discovery=None, force=True)

    run(work)
    assert tree_of(out) == WANTED | {"keep": b"keep"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a//b", ".", "a\\b", "con", "a\u202eb"])
def test_bad_names_create_nothing(tmp_path: Path, path: str) -> None:
    empty = hashlib.sha256(b"").digest()
    lib, _ = library(small=(SmallEntry(path, False, 0, empty, 0, 0),), packs=(), files=())

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            with pytest.raises(FastCASError, match="collection"):
                await download(link, tmp_path / "in" / "out", discovery=None)

    run(work)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "in" / "out").exists()
    assert not (tmp_path / "in" / "out.fastcas-tree").exists()


def test_small_file_that_is_not_what_it_says_is_not_written(tmp_path: Path) -> None:
    lib, _ = library(
        small=(SmallEntry("a/tiny.txt", False, 4, bytes(32), 0, 1000),),
    )

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            with pytest.raises(IntegrityError, match=r"tiny\.txt"):
                await download(link, tmp_path / "out", discovery=None)

    run(work)
    assert not (tmp_path / "out").exists()


class _Hooks:
    """Remembers which trees it was told of."""

    def __init__(self) -> None:
        self.trees: list[FetchedTree] = []

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """Not of interest."""

    def on_chunk(self, index: int) -> None:
        """Not of interest."""

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        raise AssertionError(f"{path} is told of with its folder")

    def on_tree(self, tree: FetchedTree) -> None:
        assert tree_of(tree.path) == WANTED
        self.trees.append(tree)

    def member(self) -> _Hooks:
        return self

    def end(self) -> None:
        """Not of interest."""


def test_whole_tree_is_told_with_the_manifests_of_its_members(tmp_path: Path) -> None:
    lib, content = library()
    hooks = _Hooks()

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, name="tree", peers=(lib.addr,))
            await download(link, tmp_path / "out", discovery=None, hooks=hooks)
            await download(link, tmp_path / "out", discovery=None, hooks=hooks)

    run(work)
    first, again = hooks.trees
    assert (first.name, first.path, first.collection.encode()) == ("tree", tmp_path / "out", content)
    assert first.manifest == lib.peers[0].manifest
    assert set(first.members) == {peer.manifest.manifest_hash for peer in lib.peers[1:]}
    info = (tmp_path / "out/a/big.bin").stat()
    assert first.identities["a/big.bin"].inode == info.st_ino
    assert first.identities["a/big.bin"].mtime_ns == info.st_mtime_ns
    assert (again.name, again.path, again.collection) == (first.name, first.path, first.collection)


def test_manifests_of_an_interrupted_attempt_are_known_to_the_next(tmp_path: Path) -> None:
    lib, _ = library()
    hooks = _Hooks()
    big = lib.peers[1].manifest

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            held, lib.peers[2:] = lib.peers[2:], []
            with pytest.raises(FastCASError):
                await download(link, tmp_path / "out", discovery=None, hooks=hooks, timeout_s=0.5)
            lib.peers += held
            lib.asked.clear()
            await download(link, tmp_path / "out", discovery=None, hooks=hooks)

    run(work)
    (tree,) = hooks.trees
    assert tree.members[big.manifest_hash] == big
    assert not any(big.file_hash.hex() in target for target in lib.asked)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
