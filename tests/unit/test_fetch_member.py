"""Part of a collection: only what was chosen is fetched, of packs the chunks that are needed; nothing is left over."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import DestinationExists, IntegrityError, NotFound, UsageError
from fastcas.fetch.choosing import Choice
from fastcas.fetch.download import DownloadResult, download
from fastcas.ids import Link
from fastcas.metadata import Manifest
from fastcas.store.collection import Collection, FileEntry, PackEntry, SmallEntry
from tests.support.evil_peer import Peer, content_of
from tests.support.fetching import run
from tests.support.library import BIG, SMALLS, WANTED, Library, library, tree_of

CHUNK = 16384
PACK = content_of(10 * CHUNK, 8)  # ten chunks; three small files lie in it


def wide() -> Library:
    """A library with a pack of many chunks."""
    packed, big = Peer(PACK).manifest, Peer(BIG).manifest
    at = {"early": 100, "over": CHUNK - 5, "late": 9 * CHUNK + 7}
    small = tuple(
        SmallEntry(path, False, 20, hashlib.sha256(PACK[offset : offset + 20]).digest(), 0, offset)
        for path, offset in sorted(at.items())
    )
    files = (FileEntry("big", False, len(BIG), big.file_hash, big.manifest_hash),)
    pack = PackEntry(packed.file_hash, packed.manifest_hash, packed.size)
    return Library(Collection((pack,), (), files, small).encode(), BIG, PACK)


def served(lib: Library) -> list[int]:
    """Return how many chunks each peer gave: of the collection, the file, the pack."""
    return [peer.n_chunks_served for peer in lib.peers]


def fetch(lib: Library, out: Path | None, *, path: str | None = None, **options: Any) -> DownloadResult:
    async def work() -> DownloadResult:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, name="tree", peers=(lib.addr,), path=path)
            return await download(link, out, discovery=None, **options)

    result: DownloadResult = run(work)
    return result


def test_only_chosen_members_are_fetched(tmp_path: Path) -> None:
    lib, _ = library()
    result = fetch(lib, tmp_path / "out", choice=Choice(["*.bin"]))
    assert tree_of(tmp_path / "out") == {"a/big.bin": BIG}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert served(lib)[2] == 0 and not any(lib.peers[2].asked.values())
    assert result.chosen is not None and result.chosen.paths == ("a/big.bin",)
    assert (result.size, result.chosen.n_total, result.chosen.size_total) == (
        len(BIG), 4, sum(len(data) for data in WANTED.values())
    )  # fmt: skip


@pytest.mark.parametrize(("wanted", "n_chunks"), [(["early"], 1), (["over"], 2), (["early", "late"], 2)])
@pytest.mark.parametrize("through_path", [False, True])
@pytest.mark.parametrize("as_node", [False, True])
def test_of_a_pack_only_the_chunks_that_are_needed_are_fetched(
    tmp_path: Path, wanted: list[str], n_chunks: int, through_path: bool, as_node: bool
) -> None:
    lib = wide()
    us: dict[str, Any] = {"data_port": 9, "node_id": "ab" * 20} if as_node else {}  # nodes let seeds choose chunks
    if not through_path:
        fetch(lib, tmp_path / "out", choice=Choice(wanted), **us)
        assert set(tree_of(tmp_path / "out")) == set(wanted)
    elif len(wanted) > 1:
        return
    else:
        fetch(lib, tmp_path / "out", path=wanted[0], **us)
        entry = next(e for e in Collection.decode(lib.peers[0].content).small if e.path == wanted[0])
        assert (tmp_path / "out").read_bytes() == PACK[entry.offset : entry.offset + 20]
    assert served(lib)[1:] == [0, n_chunks]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_small_files_of_one_chunk_cost_that_chunk(tmp_path: Path) -> None:
    lib, _ = library()
    fetch(lib, tmp_path / "out", choice=Choice(["tiny.txt", "empty"]))
    assert tree_of(tmp_path / "out") == {"a/tiny.txt": b"tiny", "empty": b""}
    assert not (tmp_path / "out/a/b").exists()
    assert (tmp_path / "out/a/tiny.txt").stat().st_mode & 0o777 == 0o755


def test_nothing_chosen_is_not_found_and_leaves_nothing(tmp_path: Path) -> None:
    lib, _ = library()
    with pytest.raises(NotFound, match="none of the collection's 4 files") as caught:
        fetch(lib, tmp_path / "out", choice=Choice(["nope"]))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(WANTED))
def test_one_file_by_its_path(tmp_path: Path, path: str) -> None:
    lib, _ = library()
    result = fetch(lib, None, path=path, folder=tmp_path)
    assert result.path == tmp_path / path.rpartition("/")[2]
    assert result.path.read_bytes() == WANTED[path]
    assert result.file_hash == hashlib.sha256(WANTED[path]).digest()
    assert result.path.stat().st_mode & 0o777 == (0o755 if path in ("a/big.bin", "a/tiny.txt") else 0o644)
    assert list(tmp_path.iterdir()) == [result.path]
    n_big = lib.peers[1].manifest.n_chunks if path == "a/big.bin" else 0
    assert served(lib)[1:] == [n_big, int(path in ("a/tiny.txt", "a/b/other"))]


@pytest.mark.parametrize("path", ["nope", "a/big.bin/below", "a", "a/b", "A/big.bin", "big.bin"])
def test_member_that_is_not_there_is_not_found_and_leaves_nothing(tmp_path: Path, path: str) -> None:
    lib, _ = library()
    with pytest.raises(NotFound, match="nothing was fetched") as caught:
        fetch(lib, tmp_path / "out", path=path)
    assert caught.value.exit_code == 3
    assert ("--include" in str(caught.value)) == (path in ("a", "a/b"))
    assert list(tmp_path.iterdir()) == []
    assert served(lib)[1:] == [0, 0]


@pytest.mark.parametrize("how", [{"path": "x"}, {"choice": Choice(["x"])}])
def test_file_that_is_no_collection_is_a_usage_error(tmp_path: Path, how: Any) -> None:
    with pytest.raises(UsageError, match="no collection"):
        fetch(Library(BIG), tmp_path / "out", **how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["a/big.bin", "a/tiny.txt"])
def test_destination_with_other_content_is_left_alone_unless_forced(tmp_path: Path, path: str) -> None:
    lib, _ = library()
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    with pytest.raises(DestinationExists, match="left alone"):
        fetch(lib, out, path=path)
    assert out.read_bytes() == b"mine"
    fetch(lib, out, path=path, force=True)
    assert out.read_bytes() == WANTED[path]
    before = served(lib)[1:]
    fetch(lib, out, path=path)
    assert served(lib)[1:] == before


def test_more_is_put_beside_what_was_chosen_before_only_when_forced(tmp_path: Path) -> None:
    lib, _ = library()
    out = tmp_path / "out"
    fetch(lib, out, choice=Choice(["tiny.txt"]))
    fetch(lib, out, choice=Choice(["tiny.txt"]))
    with pytest.raises(DestinationExists):
        fetch(lib, out, choice=Choice(["empty"]))
    fetch(lib, out, choice=Choice(["empty"]), force=True)
    assert tree_of(out) == {"a/tiny.txt": b"tiny", "empty": b""}


def test_small_file_with_another_hash_is_not_written(tmp_path: Path) -> None:
    lib, _ = library(small=(SmallEntry("a/tiny.txt", False, 4, bytes(32), 0, 1000),))
    with pytest.raises(IntegrityError, match=r"tiny\.txt"):
        fetch(lib, tmp_path / "out", path="a/tiny.txt")
    assert not (tmp_path / "out").exists()


def test_wider_attempt_that_was_interrupted_leaves_nothing_in_a_narrower_one(tmp_path: Path) -> None:
    lib, _ = library()
    tree = tmp_path / "out.fastcas-tree" / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "other").write_bytes(SMALLS["a/b/other"])
    (tree / "a" / "big.bin").write_bytes(BIG)
    fetch(lib, tmp_path / "out", choice=Choice(["big.bin"]))
    assert tree_of(tmp_path / "out") == {"a/big.bin": BIG}
    assert not (tmp_path / "out/a/b").exists()
    assert served(lib)[1] == 0  # it was here


def test_attempt_with_another_choice_finds_what_is_here(tmp_path: Path) -> None:
    """Files are numbered by the whole collection."""
    first = content_of(100_000, 30)
    big, other = Peer(BIG).manifest, Peer(first).manifest
    files = tuple(
        FileEntry(path, False, manifest.size, manifest.file_hash, manifest.manifest_hash)
        for path, manifest in (("a/aaa", other), ("a/big.bin", big))
    )
    lib, _ = library(files=files)
    work = tmp_path / "out.fastcas-tree"
    work.mkdir(mode=0o700)
    (work / "file-1").write_bytes(BIG)
    fetch(lib, tmp_path / "out", choice=Choice(["big.bin"]))
    assert served(lib)[1] == 0
    assert tree_of(tmp_path / "out") == {"a/big.bin": BIG}


class _Hooks:
    def __init__(self) -> None:
        self.finished: list[tuple[Path, bool]] = []

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """Not of interest."""

    def on_chunk(self, index: int) -> None:
        """Not of interest."""

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        assert hashlib.sha256(path.read_bytes()).digest() == manifest.file_hash
        self.finished.append((path, content_proven))

    def on_tree(self, tree: object) -> None:
        raise AssertionError("the collection is not whole")

    def member(self) -> _Hooks:
        return self

    def end(self) -> None:
        """Not of interest."""


@pytest.mark.parametrize("how", [{"path": "a/big.bin"}, {"choice": Choice(["big.bin", "tiny.txt"])}])
def test_large_files_of_a_part_are_told_of_at_their_places(tmp_path: Path, how: Any) -> None:
    lib, _ = library()
    hooks = _Hooks()
    fetch(lib, tmp_path / "out", hooks=hooks, **how)
    place = tmp_path / "out" / "a/big.bin" if "choice" in how else tmp_path / "out"
    assert hooks.finished == [(place, True)]


def test_several_files_of_one_collection_at_once(tmp_path: Path) -> None:
    lib, _ = library()

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            await asyncio.gather(
                *(download(replace(link, path=path), None, discovery=None, folder=tmp_path) for path in WANTED)
            )

    run(work)
    assert tree_of(tmp_path) == {path.rpartition("/")[2]: data for path, data in WANTED.items()}
