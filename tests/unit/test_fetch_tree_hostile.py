"""Collections and folders of other people's making: names at the limit, and work folders that are not ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import DestinationExists
from fastcas.fetch.download import download
from fastcas.ids import Link
from fastcas.store.collection import FileEntry
from tests.support.evil_peer import Peer
from tests.support.fetching import run
from tests.support.library import BIG, library, tree_of


def fetch(lib: Any, out: Path) -> None:
    """Fetch the library's collection to `out`."""

    async def work() -> None:
        async with lib:
            link = Link(lib.peers[0].manifest.file_hash, peers=(lib.addr,))
            await download(link, out, discovery=None)

    run(work)


def test_longest_names_arrive_too(tmp_path: Path) -> None:
    big = Peer(BIG).manifest
    name = "a/" + "n" * 255
    entry = FileEntry(name, False, len(BIG), big.file_hash, big.manifest_hash)
    lib, _ = library(dirs=("a",), files=(entry,), small=(), packs=())
    fetch(lib, tmp_path / "out")
    assert tree_of(tmp_path / "out") == {name: BIG}


@pytest.mark.parametrize("made", ["work folder", "tree in it"])
def test_work_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str) -> None:
    """Its owner could put links into it, and so lead the files elsewhere."""
    work = tmp_path / "out.fastcas-tree"
    work.mkdir(mode=0o700)
    if made == "tree in it":
        (work / "tree").mkdir(mode=0o700)
    real = os.geteuid()
    calls = iter([real] if made == "tree in it" else [])
    monkeypatch.setattr("fastcas.fetch.tree.os.geteuid", lambda: next(calls, real + 1))
    lib, _ = library()
    with pytest.raises(DestinationExists, match="somebody else"):
        fetch(lib, tmp_path / "out")
    assert tree_of(work) == {}


def test_interrupted_tree_is_continued(tmp_path: Path) -> None:
    lib, _ = library()
    moved = tmp_path / "out.fastcas-tree" / "tree" / "a"
    moved.mkdir(parents=True)
    (moved / "big.bin").write_bytes(BIG)  # it was at its place when the machine stopped
    fetch(lib, tmp_path / "out")
    assert (tmp_path / "out/a/big.bin").read_bytes() == BIG
    assert f"/chunks/{Peer(BIG).manifest.hash_of(0).hex()}" not in lib.asked
