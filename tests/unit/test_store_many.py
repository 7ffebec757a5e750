"""Many files at a time: packs read by C code, files hashed on all cores, manifests flushed together, large copies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.errors import ChunkCorrupt, FileChanged, NotFound, StoreError, UsageError
from fastcas.store import Store
from fastcas.store._files import read_files
from fastcas.store.core import identity_of
from fastcas.store.in_place import Job, _groups, hash_in_place
from fastcas.store.packs import PackPart, PackSource
from fastcas.store.paths import Folder
from fastcas.store.sources import FileSource, open_user_file
from tests.support.store_rig import KIB, blob_files, check_replay, data_of, followed, sha, temps

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folders that come and go between the files, 1.9 MiB in all: more than is read at once."""
    root = tmp_path / "tree"
    for i in range(60):
        folder = root / ("" if i % 7 == 0 else f"d{i // 10}/e{i % 2}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{i}").write_bytes(data_of(1 + i * 1091, i))
    return root


def parts_of(root: Path) -> list[PackPart]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [PackPart(str(p.relative_to(root)), p.stat().st_size, identity_of(p.stat())) for p in paths]


def source_of(root: Path, parts: list[PackPart]) -> PackSource:
    return PackSource(os.open(root, os.O_RDONLY), str(root), parts)


@pytest.mark.parametrize("step", [4099, MIB, 8 * MIB])
def test_pack_source_joins_files_of_many_folders(tree: Path, step: int) -> None:
    parts = parts_of(tree)
    source = source_of(tree, parts)
    out = bytearray()
    buffer = memoryview(bytearray(step))
    while n := source.readinto(buffer):
        out += buffer[:n]
    source.finish()
    source.close()
    assert out == b"".join((tree / part.path).read_bytes() for part in parts)
    assert [part.digest for part in parts] == [sha((tree / part.path).read_bytes()) for part in parts]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("grow", FileChanged),
        ("touch", FileChanged),
        ("replace", FileChanged),
        ("remove", NotFound),
        ("link", UsageError),
        ("fifo", UsageError),
        ("folder", UsageError),
    ],
)
def test_pack_source_refuses_what_is_not_the_file_it_was(tree: Path, change: str, error: type[Exception]) -> None:
    parts = parts_of(tree)
    path = tree / parts[30].path
    data = path.read_bytes()
    if change == "grow":
        path.write_bytes(data + b"x")
    elif change == "touch":
        os.utime(path, ns=(1, 1))
    else:
        path.rename(tree.parent / "old")
    if change == "replace":
        path.write_bytes(data)
    elif change == "link":
        path.symlink_to(tree.parent / "old")
    elif change == "fifo":
        os.mkfifo(path)
    elif change == "folder":
        path.mkdir()
    source = source_of(tree, parts)
    with pytest.raises(error, match=path.name):
        source.readinto(memoryview(bytearray(4 * MIB)))
    source.close()


def test_pack_source_checks_expected_hashes_and_its_end(tree: Path) -> None:
    parts = parts_of(tree)
    parts[3].expected = bytes(32)
    source = source_of(tree, parts)
    with pytest.raises(NotFound, match="not read to its end"):
        source.finish()
    with pytest.raises(ChunkCorrupt, match="expected SHA-256 00000000"):
        source.readinto(memoryview(bytearray(4 * MIB)))


@pytest.mark.parametrize(
    ("names", "sizes", "room"), [([b"a"], [], 9), ([b"a\0b"], [1], 9), ([b"a"], [10], 9), ([b"a"], [1 << 50], 9)]
)
def test_read_files_refuses_bad_arguments(tmp_path: Path, names: list[bytes], sizes: list[int], room: int) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UsageError, match="nothing was read"):
        read_files(fd, names, sizes, [None] * len(sizes), bytearray(room))
    os.close(fd)


SIZES = [65 * KIB, 100 * KIB, 256 * KIB, 256 * KIB + 1, 66 * KIB, 4 * MIB, 5 * MIB + 7, 70 * KIB, 12 * MIB]


def test_files_in_place_get_the_manifests_that_they_get_alone(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i, size in enumerate(SIZES * 3):
        (folder / f"{i:02}").write_bytes(data_of(size, i))
    seen: list[tuple[int, int]] = []
    mirror = followed(store)
    stored = store.store_tree(folder, in_place=True, progress=lambda done, total: seen.append((done, total)))
    assert stored.size == sum(SIZES * 3)
    assert seen[-1][0] >= stored.size and [done for done, _ in seen] == sorted(done for done, _ in seen)
    check_replay(store, mirror)
    with Store.open(tmp_path / "other", create=True) as other:
        for path in folder.iterdir():
            alone = other.store_file(path, in_place=True)
            (manifest,) = store.manifests_of(sha(path.read_bytes()))
            assert manifest.manifest_hash.hex() == alone.manifest_hash


@pytest.mark.parametrize("others", [100 * KIB, 2 * MIB])
def test_file_that_changes_while_others_are_hashed_ends_it(tmp_path: Path, others: int) -> None:
    """With files of some chunks beside it, it goes through the kernel side by side with one."""
    paths = [tmp_path / str(i) for i in range(40)]
    for path in paths:
        path.write_bytes(bytes(5 * MIB if path.name == "7" else others))

    def open_it(path: Path) -> FileSource:
        if path.name == "7":
            os.truncate(path, 5 * MIB)
            source = FileSource(open_user_file(path), str(path), os.fsencode(path))
            os.truncate(path, MIB)
            return source
        return FileSource(open_user_file(path), str(path), os.fsencode(path))

    jobs = [Job(path.stat().st_size, lambda path=path: open_it(path)) for path in paths]
    with pytest.raises(FileChanged, match="/7: changed while it was read"):
        list(hash_in_place(jobs, None))


def test_two_at_a_time_as_long_as_there_is_enough_for_every_core() -> None:
    kib256, mib = 256 * KIB, MIB
    sizes = [2 * mib] * 5 + [300 * KIB, 100 * KIB, 100 * KIB] + [2 * mib, 65 * mib] + [2 * mib] * 6
    jobs = [Job(size, lambda: pytest.fail("opened")) for size in sizes]
    units = [kib256] * len(jobs)
    groups = list(_groups(jobs, units, 12))
    assert groups == [
        (0, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 9), (9, 10), (10, 12), (12, 13), (13, 14), (14, 15), (15, 16),
    ]  # fmt: skip
    assert list(_groups(jobs[:4], [kib256, kib256, mib, mib], 4)) == [(0, 2), (2, 3), (3, 4)]
    assert list(_groups(jobs[:2], [kib256, 2 * kib256], 2)) == [(0, 1), (1, 2)]
    assert list(_groups([], [], -5)) == []


def test_failed_flush_of_many_manifests_stores_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}").write_bytes(data_of(70 * KIB, i))
    for failing in (0, 1):
        left = [failing]

        def sync(self: Folder, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise StoreError("flush failed")

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "sync", sync)
            with pytest.raises(StoreError, match="flush failed"):
                store.store_tree(folder)
        manifests = [path for path in (store.root / "manifests").rglob("*") if path.is_file()]
        assert manifests == blob_files(store.root) == temps(store.root) == store.files() == []
    assert store.store_tree(folder).new_bytes > 40 * 70 * KIB


def test_large_copy_past_the_page_cache_keeps_every_byte(tmp_path: Path) -> None:
    """Known chunks in the middle make offsets and lengths that are no whole blocks."""
    first = data_of(100 * KIB + 5, 1)
    large = data_of(40 * MIB, 2) + first[:5]
    (tmp_path / "a").write_bytes(first)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(first)
    (tmp_path / "tree" / "b").write_bytes(large)
    with Store.open(tmp_path / "store", create=True) as store:
        store.store_file(tmp_path / "a")
        stored = store.store_tree(tmp_path / "tree")
        assert stored.new_bytes >= len(large)
        alone = store.store_file(tmp_path / "tree" / "b")
        assert (alone.new_bytes, alone.file_hash) == (0, sha(large).hex())
        assert store.verify().n_damaged == 0
