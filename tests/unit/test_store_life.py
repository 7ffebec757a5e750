"""Life cycle: linked files, part files, removal, gc with its barrier, and what the listener hears."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.errors import FileChanged, ManifestCorrupt
from fastcas.metadata import Manifest
from fastcas.store import Store, StoredFile
from tests.support.store_rig import KIB, Mirror, blob_files, check_replay, data_of, flip, followed, owned_bytes, sha

UNIT = 16 * KIB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


@pytest.fixture
def mirror(store: Store) -> Mirror:
    return followed(store)


def put(store: Store, path: Path, data: bytes, *, in_place: bool = False) -> StoredFile:
    path.write_bytes(data)
    return store.store_file(path, chunk_size=UNIT, in_place=in_place)


def manifest_for(store: Store, path: Path, data: bytes) -> Manifest:
    """A manifest of data that the store does not hold."""
    with Store.open(path, create=True) as other:
        (path / "f").write_bytes(data)
        stored = other.store_file(path / "f", chunk_size=UNIT)
        manifest = other.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    return manifest


def nothing() -> None:
    """A barrier for a store that nobody reads from."""


def test_finished_download_seeds_in_place(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    data = data_of(100_000)
    manifest = manifest_for(store, tmp_path / "other", data)
    part = tmp_path / "out.fastcas-part"
    part.write_bytes(data)
    number = store.begin_linked(part, manifest)
    assert mirror.manifests.keys() == {manifest.manifest_hash}
    assert mirror.files == {}
    info = part.stat()
    mirror.on_blob(number, os.fsencode(part), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, True)
    part.rename(tmp_path / "out")
    stored = store.register_linked(tmp_path / "out", manifest, "out")
    assert stored.path == str(tmp_path / "out")
    assert number not in mirror.blobs
    assert mirror.content(mirror.files[manifest.file_hash]) == data
    assert blob_files(store.root) == []
    row = store.file(manifest.file_hash)
    assert row is not None
    assert (row.name, row.path, row.is_complete) == ("out", str(tmp_path / "out"), True)
    check_replay(store, mirror)


def test_register_again_changes_nothing(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    data = data_of(100_000)
    manifest = manifest_for(store, tmp_path / "other", data)
    (tmp_path / "out").write_bytes(data)
    assert not store.register_linked(tmp_path / "out", manifest, "out").already_stored
    blobs = dict(mirror.blobs)
    assert store.register_linked(tmp_path / "out", manifest, "out").already_stored
    assert mirror.blobs == blobs


@pytest.mark.parametrize("wrong", [b"", b"x" * 100_000, data_of(99_999), data_of(100_000)[:-1] + b"x"])
def test_register_of_other_bytes_is_refused(store: Store, mirror: Mirror, tmp_path: Path, wrong: bytes) -> None:
    manifest = manifest_for(store, tmp_path / "other", data_of(100_000))
    (tmp_path / "out").write_bytes(wrong)
    with pytest.raises(FileChanged, match="not seeded"):
        store.register_linked(tmp_path / "out", manifest, "out", verified=False)
    assert mirror.files == {}
    assert store.files() == []


def test_abandoned_part_file_is_forgotten(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    manifest = manifest_for(store, tmp_path / "other", data_of(50_000))
    (tmp_path / "part").write_bytes(b"")
    first = store.begin_linked(tmp_path / "part", manifest)
    second = store.begin_linked(tmp_path / "part", manifest)
    assert first != second
    store.abandon_linked(second)
    assert store._core.catalog.blob(second) is None
    assert store.gc(nothing).manifests == 1
    assert mirror.manifests == {}


def test_gc_keeps_the_manifest_of_a_part_file_until_reopen(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", create=True) as store:
        manifest = manifest_for(store, tmp_path / "other", data_of(50_000))
        (tmp_path / "part").write_bytes(b"")
        store.begin_linked(tmp_path / "part", manifest)
        assert store.gc(nothing).manifests == 0
        assert store.manifest(manifest.manifest_hash) == manifest
    with Store.open(tmp_path / "store") as store:
        assert store.gc(nothing).manifests == 1
        assert store.manifest(manifest.manifest_hash) is None


@pytest.mark.parametrize("change", ["edit", "touch", "truncate", "remove", "replace"])
@pytest.mark.parametrize("noticed_by", ["load", "open_extent", "withdraw"])
def test_changed_users_file_is_never_announced(
    store: Store, mirror: Mirror, tmp_path: Path, change: str, noticed_by: str
) -> None:
    data = data_of(100_000)
    stored = put(store, tmp_path / "f", data, in_place=True)
    path = tmp_path / "f"
    if change == "edit":
        flip(path, 5)
        os.utime(path, ns=(1, 1))
    elif change == "touch":
        os.utime(path, ns=(1, 1))
    elif change == "truncate":
        os.truncate(path, 99_999)
    elif change == "remove":
        path.unlink()
    else:
        (tmp_path / "new").write_bytes(data)
        (tmp_path / "new").rename(path)
    key = sha(data[:UNIT])
    if noticed_by == "load":
        fresh = Mirror()
        store.load(fresh)
        assert fresh.chunks == {}
        assert fresh.files == {}
        return
    if noticed_by == "open_extent":
        assert store.open_extent(key) is None
    else:
        store.withdraw_blob(mirror.chunks[key][0], "identity changed")
    assert mirror.chunks == {}
    assert mirror.blobs.keys() == {mirror.manifests[bytes.fromhex(stored.manifest_hash)][0]}
    assert mirror.files == {}
    assert not store.has_chunk(key)
    row = store.file(bytes.fromhex(stored.file_hash))
    assert row is not None
    assert not row.is_complete
    assert store.stats()["incomplete"] == 1


def test_withdrawn_chunks_fall_back_to_the_copy(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    data = data_of(100_000)
    put(store, tmp_path / "f", data, in_place=True)
    linked = mirror.chunks[sha(data[:UNIT])][0]
    put(store, tmp_path / "g", data)
    (tmp_path / "f").unlink()
    store.withdraw_blob(linked, "gone")
    assert mirror.content(mirror.files[sha(data)]) == data
    check_replay(store, mirror)


def test_withdrawn_owned_blob_keeps_what_fits(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    data = data_of(3 * UNIT)
    put(store, tmp_path / "f", data)
    number = mirror.chunks[sha(data[:UNIT])][0]
    store.withdraw_blob(number, "a false alarm changes nothing")
    assert len(mirror.chunks) == 3
    blob = blob_files(store.root)[0]
    blob.chmod(0o600)
    os.truncate(blob, UNIT)
    store.withdraw_blob(number, "shorter than an extent")
    assert mirror.chunks.keys() == {sha(data[:UNIT])}
    store.withdraw_blob(123_456, "unknown numbers are ignored")
    check_replay(store, mirror)


def test_open_extent_gives_a_readable_place(store: Store, tmp_path: Path) -> None:
    data = data_of(100_000)
    put(store, tmp_path / "f", data)
    for at in range(0, 100_000, UNIT):
        found = store.open_extent(sha(data[at : at + UNIT]))
        assert found is not None
        fd, offset, length = found
        assert os.pread(fd, length, offset) == data[at : at + UNIT]
    assert store.open_extent(b"x" * 32) is None
    assert store.find_extents(sha(data[:UNIT]))[0].length == UNIT


def test_remove_and_gc_free_the_space(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    stored = put(store, tmp_path / "f", data_of(1_000_000))
    file_hash = bytes.fromhex(stored.file_hash)
    assert store.remove(file_hash)
    assert not store.remove(file_hash)
    assert mirror.files == {}
    assert mirror.manifests == {}
    report = store.gc(nothing)
    assert (report.chunks, report.blobs_unlinked, report.bytes_freed) == (62, 1, 1_000_000)
    assert blob_files(store.root) == []
    assert mirror.chunks == {}
    assert mirror.blobs == {}
    assert not list((store.root / "manifests").rglob("?" * 64))
    assert store.stats()["chunks"] == 0


def test_removed_manifest_is_off_the_disk_at_once_and_back_with_its_file(
    store: Store, mirror: Mirror, tmp_path: Path
) -> None:
    data = data_of(3 * UNIT)
    stored = put(store, tmp_path / "f", data)
    path = store.root / "manifests" / stored.manifest_hash[:2] / stored.manifest_hash
    assert path.exists()
    store.remove(bytes.fromhex(stored.file_hash))
    assert not path.exists()
    put(store, tmp_path / "f", data)
    assert path.exists()
    store.gc(nothing)
    assert mirror.content(bytes.fromhex(stored.manifest_hash)) == data
    check_replay(store, mirror)


def test_gc_punches_holes_between_living_chunks(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    shared, own = data_of(64 * UNIT, 1), data_of(64 * UNIT, 2)
    first = put(store, tmp_path / "both", shared + own)
    second = put(store, tmp_path / "shared", shared)
    assert second.new_bytes == 0
    store.remove(bytes.fromhex(first.file_hash))
    before = owned_bytes(store.root)
    report = store.gc(nothing)
    assert (report.chunks, report.holes_punched, report.blobs_unlinked) == (64, 1, 0)
    assert owned_bytes(store.root) <= before - 60 * UNIT
    assert mirror.content(bytes.fromhex(second.manifest_hash)) == shared
    assert blob_files(store.root)[0].stat().st_mode & 0o777 == 0o400
    assert store.verify().is_clean
    assert store.store_file(tmp_path / "both", chunk_size=UNIT).new_bytes == 64 * UNIT
    check_replay(store, mirror)


def test_gc_frees_only_after_listener_and_barrier(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    data = data_of(4 * UNIT)
    stored = put(store, tmp_path / "f", data)
    blob = blob_files(store.root)[0]
    store.remove(bytes.fromhex(stored.file_hash))
    seen: list[bool] = []

    def barrier() -> None:
        seen.append(mirror.chunks == {} and mirror.blobs == {} and blob.read_bytes().startswith(data))

    store.gc(barrier)
    assert seen == [True]
    assert not blob.exists()


def test_gc_stopped_at_the_barrier_is_finished_by_the_next(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    keep = data_of(2 * UNIT, 1)
    first = put(store, tmp_path / "both", keep + data_of(64 * UNIT, 2))
    put(store, tmp_path / "keep", keep)
    third = put(store, tmp_path / "third", data_of(2 * UNIT, 3))
    store.remove(bytes.fromhex(first.file_hash))
    store.remove(bytes.fromhex(third.file_hash))

    def stop() -> None:
        raise KeyboardInterrupt

    before = owned_bytes(store.root)
    with pytest.raises(KeyboardInterrupt):
        store.gc(stop)
    assert owned_bytes(store.root) == before
    report = store.gc(nothing)
    assert (report.chunks, report.holes_punched, report.blobs_unlinked) == (0, 1, 1)
    assert owned_bytes(store.root) < before
    check_replay(store, mirror)


def test_gc_never_touches_a_users_file(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    data = data_of(10 * UNIT)
    stored = put(store, tmp_path / "f", data, in_place=True)
    store.remove(bytes.fromhex(stored.file_hash))
    report = store.gc(nothing)
    assert (report.chunks, report.bytes_freed, report.blobs_unlinked) == (10, 0, 0)
    assert (tmp_path / "f").read_bytes() == data
    assert mirror.blobs == {}


def test_gc_with_an_unreadable_manifest_frees_nothing_until_it_is_given_up(store: Store, tmp_path: Path) -> None:
    stored = put(store, tmp_path / "f", data_of(4 * UNIT))
    other = put(store, tmp_path / "g", data_of(5 * UNIT))
    flip(store.root / "manifests" / stored.manifest_hash[:2] / stored.manifest_hash, 70)
    store.remove(bytes.fromhex(other.file_hash))
    with pytest.raises(ManifestCorrupt, match=f"damaged.*fastcas rm {stored.file_hash}"):
        store.gc(nothing)
    assert len(blob_files(store.root)) == 2
    store.remove(bytes.fromhex(stored.file_hash))
    assert store.gc(nothing).blobs_unlinked == 2


def test_gc_keeps_pinned_and_twice_named_files(store: Store, tmp_path: Path) -> None:
    data = data_of(4 * UNIT)
    stored = put(store, tmp_path / "f", data)
    put(store, tmp_path / "g", data)
    assert store.gc(nothing).chunks == 0
    assert store.remove(bytes.fromhex(stored.file_hash))
    assert store.gc(nothing).chunks == 4


def test_gc_removes_a_blob_that_a_crash_left_uncommitted(store: Store, tmp_path: Path) -> None:
    stored = put(store, tmp_path / "f", data_of(4 * UNIT))
    number = store.find_extents(sha(data_of(4 * UNIT)[:UNIT]))[0].blob
    with store._core.catalog.transaction():
        for table, column in (("blobs", "number"), ("extents", "blob")):
            store._core.catalog.execute(f"DELETE FROM {table} WHERE {column}=?", (number,))
    store.remove(bytes.fromhex(stored.file_hash))
    assert len(blob_files(store.root)) == 1
    assert store.gc(nothing).blobs_unlinked == 1
    assert blob_files(store.root) == []


def test_gc_keeps_blobs_of_another_catalog(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", create=True) as store:
        put(store, tmp_path / "f", data_of(4 * UNIT))
    (tmp_path / "store" / "catalog.db").unlink()
    shutil.rmtree(tmp_path / "store" / "manifests")
    with Store.open(tmp_path / "store", create=True) as store:
        assert store.gc(nothing).blobs_unlinked == 0
        assert len(blob_files(store.root)) == 1


def test_add_manifest_is_reported_once_and_kept_readable(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    manifest = manifest_for(store, tmp_path / "other", data_of(50_000))
    store.add_manifest(manifest)
    store.add_manifest(manifest)
    assert store.manifests_of(manifest.file_hash) == [manifest]
    assert mirror.manifests.keys() == {manifest.manifest_hash}
    assert store.files() == []
    assert store.manifest(b"x" * 32) is None


def test_load_reports_each_chunk_once_in_large_batches(store: Store, tmp_path: Path) -> None:
    data = data_of(200 * UNIT)
    put(store, tmp_path / "f", data)
    put(store, tmp_path / "f", data, in_place=True)
    fresh = Mirror()
    store.load(fresh)
    assert len(fresh.chunks) == 200
    assert fresh.n_calls == 1
    fresh.check()


def test_empty_file_linked_and_owned_survives_gc_and_reload(store: Store, mirror: Mirror, tmp_path: Path) -> None:
    put(store, tmp_path / "f", b"", in_place=True)
    store.gc(nothing)
    assert mirror.content(mirror.files[sha(b"")]) == b""
    check_replay(store, mirror)
