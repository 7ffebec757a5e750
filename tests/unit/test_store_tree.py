"""Directories: what goes in comes out, and what cannot go in is named before anything is stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.errors import FastCASError, FileChanged, NotFound, UsageError
from fastcas.store import Collection, Store, StoredFile
from fastcas.store import tree as tree_module
from fastcas.store.beneath import make_dirs_beneath, open_beneath
from tests.support.store_rig import Mirror, blob_files, check_replay, data_of, followed, sha, temps


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def make_tree(root: Path, files: dict[str, bytes], dirs: tuple[str, ...] = ()) -> Path:
    root.mkdir(exist_ok=True)
    for name in dirs:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


FILES = {
    "README": b"hello\n",
    "empty": b"",
    "bin/run": b"#!/bin/sh\n",
    "data/small-64k": data_of(65_536, 1),
    "data/large": data_of(65_537, 2),
    "data/deep/er/huge": data_of(900_000, 3),
    "data/same": data_of(65_537, 2),
    ".hidden": b"x",
}


def unpack(mirror: Mirror, stored: StoredFile) -> tuple[dict[str, bytes], Collection]:
    """Put a tree together the way a client would."""
    collection = Collection.decode(mirror.content(bytes.fromhex(stored.manifest_hash)))
    packs = [mirror.content(pack.manifest_hash) for pack in collection.packs]
    out = {entry.path: mirror.content(entry.manifest_hash) for entry in collection.files}
    for small in collection.small:
        out[small.path] = packs[small.pack][small.offset : small.offset + small.size] if small.size else b""
        assert sha(out[small.path]) == small.sha256
    for entry in collection.files:
        assert sha(out[entry.path]) == entry.file_hash
    return out, collection


@pytest.mark.parametrize("parity", [None, (4, 2)])
@pytest.mark.parametrize("in_place", [False, True])
def test_tree_comes_back_whole(store: Store, tmp_path: Path, parity: tuple[int, int] | None, in_place: bool) -> None:
    mirror = followed(store)
    root = make_tree(tmp_path / "tree", FILES, ("void", "void/inner"))
    (root / "bin/run").chmod(0o755)
    seen: list[tuple[int, int]] = []
    stored = store.store_tree(
        root, parity=parity, in_place=in_place, progress=lambda done, total: seen.append((done, total))
    )
    files, collection = unpack(mirror, stored)
    assert files == FILES
    assert set(collection.dirs) == {"bin", "data", "data/deep", "data/deep/er", "void", "void/inner"}
    assert {entry.path for entry in (*collection.files, *collection.small) if entry.executable} == {"bin/run"}
    total = sum(len(data) for data in FILES.values())
    assert (stored.size, stored.is_collection, stored.name) == (total, True, "tree")
    assert seen[-1] == (total, total)
    row = store.file(bytes.fromhex(stored.file_hash))
    assert row is not None
    assert row.is_collection
    assert sum(row.is_member for row in store.files()) == 3
    check_replay(store, mirror)


def test_tree_is_one_blob_and_few_manifests(store: Store, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree", {f"f{i:03}": b"%d" % i for i in range(300)})
    stored = store.store_tree(tmp_path / "tree")
    assert len(blob_files(store.root)) == 1
    assert store.stats()["manifests"] == 2
    assert stored.new_bytes == store.stats()["stored"]


def test_same_tree_twice_has_one_hash_and_takes_no_space(store: Store, tmp_path: Path) -> None:
    first = store.store_tree(make_tree(tmp_path / "a", FILES))
    second = store.store_tree(make_tree(tmp_path / "b", dict(reversed(FILES.items()))))
    assert first.file_hash == second.file_hash
    assert (second.new_bytes, second.already_stored) == (0, True)
    assert len(blob_files(store.root)) == 1


@pytest.mark.parametrize(
    ("limit", "what"),
    [("COLLECTION_FILES_MAX", r"\d files and \d folders"),
     ("COLLECTION_DIRS_MAX", r"\d folders or more, limit \d+ and"),
     ("COLLECTION_SIZE_MAX", r"takes \d+ B, limit \d+ B")],
)  # fmt: skip
def test_what_nobody_could_read_again_is_not_stored(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, what: str
) -> None:
    root = make_tree(tmp_path / "tree", FILES, ("void", "void/inner"))
    mirror = followed(store)
    stored = store.store_tree(root)
    collection = unpack(mirror, stored)[1]
    exact = {"COLLECTION_FILES_MAX": len(FILES), "COLLECTION_DIRS_MAX": len(collection.dirs),
             "COLLECTION_SIZE_MAX": len(collection.encode())}[limit]  # fmt: skip
    monkeypatch.setattr(tree_module, limit, exact)
    assert store.store_tree(root).already_stored
    monkeypatch.setattr(tree_module, limit, exact - 1)
    with pytest.raises(UsageError, match=f"tree: .*{what}.*nothing of it was stored"):
        store.store_tree(root)


def test_small_files_spill_into_several_packs(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "PACK_B", 50_000)
    mirror = followed(store)
    content = {f"f{i}": data_of(20_000, i) for i in range(7)}
    files, collection = unpack(mirror, store.store_tree(make_tree(tmp_path / "t", content)))
    assert files == content
    assert len(collection.packs) == 3


def test_in_place_tree_links_large_files_only(store: Store, tmp_path: Path) -> None:
    stored = store.store_tree(make_tree(tmp_path / "tree", FILES), in_place=True)
    assert store.stats()["linked"] == 65_537 * 2 + 900_000
    assert stored.new_bytes < 70_000 + 6_000


def test_empty_directory_is_stored(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    (tmp_path / "void").mkdir()
    files, collection = unpack(mirror, store.store_tree(tmp_path / "void", name="nothing"))
    assert (files, collection.dirs) == ({}, ())


def test_removing_a_tree_removes_members_that_nothing_else_needs(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    make_tree(tmp_path / "tree", FILES)
    keep = store.store_file(tmp_path / "tree/data/large")
    stored = store.store_tree(tmp_path / "tree")
    store.remove(bytes.fromhex(stored.file_hash))
    store.gc(lambda: None)
    assert [row.file_hash.hex() for row in store.files()] == [keep.file_hash]
    assert mirror.content(bytes.fromhex(keep.manifest_hash)) == FILES["data/large"]
    check_replay(store, mirror)


def test_member_removed_by_name_stays_for_its_tree(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    make_tree(tmp_path / "tree", FILES)
    member = store.store_file(tmp_path / "tree/data/large")
    stored = store.store_tree(tmp_path / "tree")
    store.remove(bytes.fromhex(member.file_hash))
    store.gc(lambda: None)
    assert unpack(mirror, stored)[0] == FILES


def test_bad_entries_are_named_and_nothing_is_stored(store: Store, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", FILES)
    (root / "link").symlink_to("README")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    (root / "a:b").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xff")).write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        store.store_tree(root)
    text = str(caught.value)
    for part in (
        "'link' is a symbolic link",
        "'loop'",
        "'pipe' is neither",
        "'a:b'",
        "bad",
        "nothing of it was stored",
    ):
        assert part in text
    assert "README" not in text
    assert text.isprintable()
    assert store.files() == blob_files(store.root) == temps(store.root) == []


def test_names_for_posix_only_need_the_option(store: Store, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", {"a:b": b"1", "A:B": b"2", "aux.c": b"3"})
    with pytest.raises(UsageError):
        store.store_tree(root)
    assert store.store_tree(root, posix_names=True).n_chunks == 1


def test_names_that_differ_in_case_only_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the same"):
        store.store_tree(make_tree(tmp_path / "tree", {"a": b"", "A": b""}))


def test_tree_of_a_file_or_of_nothing_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(UsageError, match="expected a directory"):
        store.store_tree(tmp_path / "f")
    with pytest.raises(NotFound):
        store.store_tree(tmp_path / "absent")


@pytest.mark.parametrize("victim", ["README", "data/large", "data/deep/er/huge"])
def test_tree_that_changes_while_it_is_stored_is_not_half_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    root = make_tree(tmp_path / "tree", FILES)
    scan = tree_module._scan

    def scan_then_edit(*args: object) -> None:
        scan(*args)  # type: ignore[arg-type]
        if args[1] == "":
            (root / victim).write_bytes(b"edited")

    monkeypatch.setattr(tree_module, "_scan", scan_then_edit)
    with pytest.raises(FileChanged, match=victim):
        store.store_tree(root)
    assert store.files() == blob_files(store.root) == temps(store.root) == []


def test_file_replaced_by_a_link_after_the_scan_is_not_followed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(tmp_path / "tree", FILES)
    (tmp_path / "secret").write_bytes(FILES["data/large"])
    scan = tree_module._scan

    def scan_then_swap(*args: object) -> None:
        scan(*args)  # type: ignore[arg-type]
        if args[1] == "":
            (root / "data/large").unlink()
            (root / "data/large").symlink_to(tmp_path / "secret")

    monkeypatch.setattr(tree_module, "_scan", scan_then_swap)
    with pytest.raises(FastCASError, match="large"):
        store.store_tree(root)
    assert store.files() == []


def test_open_beneath_stays_below(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    root = os.open(tmp_path / "in", os.O_RDONLY | os.O_DIRECTORY)
    try:
        make_dirs_beneath(root, "a/b/c")
        make_dirs_beneath(root, "a/b/c")
        os.close(open_beneath(root, "a/b/c/f", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        assert (tmp_path / "in/a/b/c/f").is_file()
        for path in ("../out/f", "a/../../out/f", "/etc/passwd", "", "a//f", ".", "a/\0"):
            with pytest.raises(UsageError):
                open_beneath(root, path, os.O_WRONLY | os.O_CREAT)
        for path in ("link/f", "link"):
            with pytest.raises(FastCASError):
                open_beneath(root, path, os.O_WRONLY | os.O_CREAT)
            with pytest.raises((FastCASError, OSError)):
                make_dirs_beneath(root, path)
    finally:
        os.close(root)
    assert list((tmp_path / "out").iterdir()) == []
