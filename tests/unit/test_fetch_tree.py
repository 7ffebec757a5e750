"""Collections: a whole folder arrives or nothing; what is there is left alone; bad names create nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fastcas.errors import DestinationExists, FastCASError, IntegrityError
from fastcas.fetch.download import FetchedTree, download
from fastcas.ids import Link
from fastcas.metadata import Manifest
from fastcas.store.collection import SmallEntry
from tests.support.fetching import run
from tests.support.library import WANTED, library, tree_of


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
        self.members: list[_Hooks] = []
        self.n_ends = 0

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
        self.members.append(_Hooks())
        return self.members[-1]

    def end(self) -> None:
        self.n_ends += 1


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
    assert [member.n_ends for member in hooks.members] == [1, 1] and hooks.n_ends == 1
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
