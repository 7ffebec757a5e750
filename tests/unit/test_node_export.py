"""Copies out of the store: into folders with traps, and what a command leaves of its reservation when it fails."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import DestinationExists, FastCASError, NotFound, StoreError, UsageError
from fastcas.fetch.choosing import Choice
from fastcas.ids import Link, parse_member
from fastcas.node.access import FolderAccess
from fastcas.node.export import export
from fastcas.node.reading import open_raw
from fastcas.store import Store
from tests.support.evil_peer import Peer, content_of
from tests.support.library import tree_of

BIG = content_of(300_000, 3)
TREE = {"in/big.bin": BIG, "in/small": b"small", "top": b"top", "bin/tool": b"#!/bin/sh\n"}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    for path, data in TREE.items():
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_bytes(data)
    (tmp_path / "tree/bin/tool").chmod(0o755)
    with Store.open(tmp_path / "s", create=True) as store:
        store.stored = store.store_tree(tmp_path / "tree")  # type: ignore[attr-defined]
        yield store


def copy(store: Any, out: Path, *, path: str | None = None, force: bool = False, choice: Any = None) -> Any:
    link = Link(bytes.fromhex(store.stored.file_hash), path=path)
    return export(
        store, link, out, out.parent, raw=False, force=force, choice=choice, progress=lambda done, total: None
    )


def test_copy_is_the_tree_with_its_modes(store: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second finds everything there
        assert copy(store, out)["chosen"] is None
        assert tree_of(out) == TREE
    assert (out / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (out / "in/small").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("trap", ["in", "in/big.bin", "in/small"])
def test_symbolic_link_in_the_destination_is_never_followed(
    store: Any, tmp_path: Path, trap: str, force: bool
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "big.bin").write_bytes(BIG)  # the very content: nothing to refuse but the way
    (outside / "small").write_bytes(b"small")
    for file in outside.iterdir():
        file.chmod(0o600)
    way = tmp_path / "out" / trap
    way.parent.mkdir(parents=True)
    way.symlink_to(outside if trap == "in" else outside / way.name)
    with pytest.raises(FastCASError if trap == "in" else DestinationExists) as caught:
        copy(store, tmp_path / "out", force=force)
    assert caught.value.exit_code != 1 and trap in str(caught.value)
    assert tree_of(outside) == {"big.bin": BIG, "small": b"small"}
    assert {file.stat().st_mode & 0o777 for file in outside.iterdir()} == {0o600}


@pytest.mark.parametrize("path", ["in/big.bin", "in/small"])
def test_other_content_is_left_alone_and_named_by_its_own_path(store: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "out/in").mkdir(parents=True)
    (tmp_path / "out" / path).write_bytes(b"mine")
    with pytest.raises(DestinationExists, match=str(tmp_path / "out" / path)):
        copy(store, tmp_path / "out")
    assert (tmp_path / "out" / path).read_bytes() == b"mine"
    copy(store, tmp_path / "out", force=True)
    assert tree_of(tmp_path / "out") == TREE


def test_error_of_the_disk_names_the_place_as_its_user_knows_it(store: Any, tmp_path: Path) -> None:
    (tmp_path / "out/in/big.bin.fastcas-part").mkdir(parents=True)
    with pytest.raises(StoreError, match=str(tmp_path / "out/in/big.bin")) as caught:
        copy(store, tmp_path / "out")
    assert "/proc/" not in str(caught.value)


def test_part_of_a_stored_tree(store: Any, tmp_path: Path) -> None:
    result = copy(store, tmp_path / "out", choice=Choice(["in"], ["*.bin"]))
    assert tree_of(tmp_path / "out") == {"in/small": b"small"}
    assert (result["size"], result["chosen"]["files"], result["chosen"]["paths"]) == (5, 1, ["in/small"])
    assert json.dumps(result["chosen"])
    for path, data in TREE.items():
        out = tmp_path / path.replace("/", "-")
        assert copy(store, out, path=path)["size"] == len(data)
        assert out.read_bytes() == data
    assert (tmp_path / "bin-tool").stat().st_mode & 0o777 == 0o755
    for wrong in ({"path": "in"}, {"path": "nope"}, {"choice": Choice(["nope"])}):
        with pytest.raises(NotFound):
            copy(store, tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()


def test_nothing_can_be_chosen_of_a_file(store: Any, tmp_path: Path) -> None:
    stored = store.store_file(tmp_path / "tree/in/big.bin")
    with pytest.raises(UsageError, match="no collection"):
        export(
            store, Link(bytes.fromhex(stored.file_hash), path="x"), tmp_path / "o", tmp_path, raw=False, force=False,
            progress=lambda done, total: None,
        )  # fmt: skip


def test_download_that_fails_gives_its_reservation_back(store: Any, tmp_path: Path) -> None:
    store.quota.set_limit(1 << 30)

    async def work() -> None:
        async with Peer(content_of(50_000), have=set()) as peer:
            access = FolderAccess(tmp_path / "s", store)
            args = {
                "ref": str(peer.link()), "out": os.fsencode(tmp_path / "o"), "folder": os.fsencode(tmp_path),
                "timeout_s": 5.0, "stall_timeout_s": 0.5,
            }  # fmt: skip
            await asyncio.to_thread(access.call, "get", args)

    with pytest.raises(FastCASError, match="chunks are missing"):
        asyncio.run(work())
    store.quota.reserve((1 << 30) - store.quota.used())  # all that is free


def test_file_of_the_store_is_read_by_many_threads(store: Any, tmp_path: Path) -> None:
    """Each read takes what comes after the one before: together they have every byte once."""
    big = content_of(40 * 16384 + 77, 9)
    (tmp_path / "f").write_bytes(big)
    stored = store.store_file(tmp_path / "f", chunk_size=16384)
    store.close()
    with open_raw({"ref": stored.file_hash}, tmp_path / "s", keeps=True) as file:
        pieces: list[bytes] = []
        go = threading.Barrier(8)

        def read() -> None:
            buffer = bytearray(5000)
            go.wait()
            while n := file.readinto(buffer):
                pieces.append(bytes(buffer[:n]))

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(map(len, pieces)) == len(big)
        assert sorted(pieces) == sorted(pieces_of(big))


def pieces_of(content: bytes) -> list[bytes]:
    """What reads of 5,000 bytes return: each ends where a chunk of 16 KiB does."""
    out = []
    for start in range(0, len(content), 16384):
        chunk = content[start : start + 16384]
        out += [chunk[at : at + 5000] for at in range(0, len(chunk), 5000)]
    return out


def test_close_waits_for_the_read_of_another_thread(store: Any, tmp_path: Path) -> None:
    store.close()
    link = parse_member(f"{store.stored.file_hash}/in/big.bin")
    file = open_raw({"ref": str(link)}, tmp_path / "s", keeps=True)
    source = file._source
    inside, go_on = threading.Event(), threading.Event()
    real = source._store.read_chunk  # type: ignore[union-attr]

    def slow(key: bytes) -> bytes | None:
        inside.set()
        go_on.wait(20)
        return real(key)

    source._store.read_chunk = slow  # type: ignore[union-attr]
    got: list[int] = []
    reading = threading.Thread(target=lambda: got.append(file.readinto(bytearray(1000))))
    reading.start()
    inside.wait(20)
    closing = threading.Thread(target=file.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    go_on.set()
    reading.join(20)
    closing.join(20)
    assert got == [1000] and file.closed
