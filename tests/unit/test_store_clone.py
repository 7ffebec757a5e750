"""Copies that share blocks, on real xfs and btrfs on a loop device (root), and what happens where that cannot be."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.store import Store
from fastcas.store.clone import clone_prefix
from tests.support.store_rig import blob_files, check_replay, data_of, followed, sha, temps

MIB = 1 << 20
SIZE = 8 * MIB + 12_345


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new file system of that kind, 320 MiB."""
    work = tmp_path_factory.mktemp(f"ingest-{request.param}")
    image, folder = work / "image", work / "mnt"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    folder.mkdir()
    subprocess.run([f"/usr/sbin/mkfs.{request.param}", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def place(mounted: Path, request: pytest.FixtureRequest) -> Path:
    folder = mounted / request.node.name
    folder.mkdir()
    return folder


def shared_extents(path: Path) -> int:
    """How many extents of a file are shared with others, by filefrag."""
    os.sync()
    out = subprocess.run(["/usr/sbin/filefrag", "-v", str(path)], capture_output=True, text=True, check=True).stdout
    return sum("shared" in line for line in out.splitlines())


def test_a_copy_shares_blocks_and_reads_back(place: Path) -> None:
    data = data_of(SIZE, 1)
    path = place / "f"
    path.write_bytes(data)
    with Store.open(place / "store", create=True) as store:
        mirror = followed(store)
        stored = store.store_file(path)
        assert (stored.file_hash, stored.new_bytes, stored.cloned_bytes) == (sha(data).hex(), SIZE, SIZE)
        (blob,) = blob_files(store.root)
        assert shared_extents(blob) > 0
        path.write_bytes(bytes(SIZE))
        assert mirror.content(bytes.fromhex(stored.manifest_hash)) == data
        assert store.verify().n_damaged == 0
        check_replay(store, mirror)
    assert Store.rebuild(place / "store").files == 1


def test_known_and_repeated_chunks_are_not_kept_twice(place: Path) -> None:
    unit = 256 << 10
    first, second = data_of(2 * MIB, 2), data_of(2 * MIB, 3)
    (place / "a").write_bytes(first)
    (place / "b").write_bytes(first + second + second)
    with Store.open(place / "store", create=True) as store:
        mirror = followed(store)
        store.store_file(place / "a")
        before = {blob.name for blob in blob_files(store.root)}
        stored = store.store_file(place / "b")
        assert (stored.new_bytes, stored.cloned_bytes) == (2 * MIB, 2 * MIB)
        assert mirror.content(bytes.fromhex(stored.manifest_hash)) == first + second + second
        (blob,) = [blob for blob in blob_files(store.root) if blob.name not in before]
        assert blob.stat().st_blocks * 512 <= 2 * MIB + unit
        again = store.store_file(place / "b")
        assert (again.new_bytes, again.cloned_bytes, again.already_stored) == (0, 0, True)
        assert len(blob_files(store.root)) == 2 and temps(store.root) == []
        assert store.verify().n_damaged == 0


def test_a_tree_shares_blocks_of_its_large_files(place: Path) -> None:
    tree = place / "tree"
    tree.mkdir()
    sizes = {"one": SIZE, "two": 3 * MIB + 1, "small": 1000}
    for seed, (name, size) in enumerate(sizes.items()):
        (tree / name).write_bytes(data_of(size, 10 + seed))
    with Store.open(place / "store", create=True) as store:
        mirror = followed(store)
        stored = store.store_tree(tree)
        assert stored.cloned_bytes == SIZE + 3 * MIB + 1
        assert stored.new_bytes > stored.cloned_bytes
        for name in ("one", "two"):
            content = (tree / name).read_bytes()
            (manifest,) = store.manifests_of(sha(content))
            assert mirror.content(manifest.manifest_hash) == content
        assert store.verify().n_damaged == 0


def test_what_is_hashed_is_the_copy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cloned something else would be found out: the hash is that of what is kept."""
    data, other = data_of(2 * MIB, 20), data_of(2 * MIB, 21)
    path = place / "f"
    path.write_bytes(data)
    (place / "other").write_bytes(other)
    wrong = os.open(place / "other", os.O_RDONLY)
    monkeypatch.setattr("fastcas.store.blobs.clone_prefix", lambda source, *rest: clone_prefix(wrong, *rest))
    with Store.open(place / "store", create=True) as store:
        assert store.store_file(path).file_hash == sha(other).hex()
    os.close(wrong)


@pytest.mark.parametrize("options", [{"parity": (4, 2)}, {"chunking": "cdc"}, {"in_place": True}])
def test_other_ways_of_storing_copy_nothing_by_cloning(place: Path, options: dict[str, object]) -> None:
    path = place / "f"
    path.write_bytes(data_of(SIZE, 30))
    with Store.open(place / "store", create=True) as store:
        stored = store.store_file(path, **options)  # type: ignore[arg-type]
        assert stored.cloned_bytes == 0
        assert store.verify().n_damaged == 0


def test_another_file_system_is_copied_to(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(data_of(SIZE, 40))
    with Store.open(place / "store", create=True) as store:
        stored = store.store_file(path)
        assert (stored.new_bytes, stored.cloned_bytes) == (SIZE, 0)
        assert store.verify().n_damaged == 0


def test_clone_prefix_takes_whole_blocks(place: Path) -> None:
    data = data_of(64_000, 50)
    (place / "a").write_bytes(data)
    source = os.open(place / "a", os.O_RDONLY)
    target = os.open(place / "b", os.O_RDWR | os.O_CREAT)
    try:
        assert clone_prefix(source, 0, 64_000, target, 0) == 64_000  # ends with the file
        assert clone_prefix(source, 0, 9_000, target, 65_536) == 8_192
        assert clone_prefix(source, 1, 9_000, target, 131_072) == 0
        assert clone_prefix(source, 0, 100, target, 131_072) == 0
        assert os.pread(target, 64_000, 0) == data
        assert os.pread(target, 8_192, 65_536) == data[:8_192]
    finally:
        os.close(source)
        os.close(target)


def test_without_shared_blocks_files_are_copied(tmp_path: Path) -> None:
    """tmp_path's file system (ext4 where this runs) cannot clone; nothing is said about it."""
    path = Path("/dev/shm") / f"ingest-clone-{os.getpid()}"
    path.write_bytes(data_of(SIZE, 60))
    try:
        with Store.open(tmp_path / "store", create=True) as store:
            stored = store.store_file(path)
            assert (stored.new_bytes, stored.cloned_bytes) == (SIZE, 0)
            assert temps(store.root) == []
    finally:
        path.unlink()
