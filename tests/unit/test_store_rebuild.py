"""`rebuild`: the catalog is a cache of manifests and blobs; whatever happens to it, a new one says the same."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcas.errors import CatalogCorrupt, StoreFull, StoreLocked, StoreNotFound
from fastcas.store import Store
from fastcas.store import rebuild as rebuild_module
from tests.support.store_rig import UNIT, blob_files, check_replay, data_of, disk_bytes, flip, followed, put, sha, temps


def _filled(folder: Path) -> Path:
    """A store with a file with parity, a tree, an in-place file, an empty file, a hole and a pin; returns its root."""
    root = folder / "st"
    (folder / "tree/sub").mkdir(parents=True)
    (folder / "tree/sub/large").write_bytes(data_of(100_000, 11))
    (folder / "tree/small").write_bytes(b"small")
    (folder / "tree/none").write_bytes(b"")
    (folder / "user").write_bytes(data_of(70_000, 12))
    (folder / "nothing").write_bytes(b"")
    with Store.open(root, create=True) as store:
        put(store, folder, 7, (4, 2))
        data, manifest = put(store, folder, 3)
        (folder / "mixed").write_bytes(data_of(2 * UNIT, 13) + data[:UNIT])
        mixed = store.store_file(folder / "mixed", chunk_size=UNIT)
        store.remove(manifest.file_hash)
        store.gc(lambda: None)  # leaves a hole beside the chunk that `mixed` shares
        store.store_tree(folder / "tree", chunk_size=UNIT)
        store.store_file(folder / "user", chunk_size=UNIT, in_place=True)
        store.store_file(folder / "nothing")
        store.pin(bytes.fromhex(mixed.file_hash))
        store._core.catalog.remember("marker", b"old")
    return root


def _said(store: Store) -> tuple[object, ...]:
    mirror = followed(store)
    mirror.check()
    check_replay(store, mirror)
    return mirror.chunks.keys(), mirror.manifests.keys(), mirror.files


@pytest.mark.parametrize("damage", ["none", "garbage", "page", "gone", "short"])
def test_new_catalog_says_what_the_old_one_said(tmp_path: Path, damage: str) -> None:
    root = _filled(tmp_path)
    with Store.open(root) as store:
        before, rows = _said(store), {row.file_hash: row for row in store.files()}
    path = root / "catalog.db"
    whole = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"\x5a" * len(whole))
    elif damage == "page":
        path.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 8192) + whole[-4096:])
    elif damage == "short":
        path.write_bytes(whole[:5000])
    elif damage == "gone":
        path.unlink()
    if damage != "none":
        for create in (False, True):
            with pytest.raises(CatalogCorrupt, match="fastcas rebuild"):
                Store.open(root, create=create)
    report = Store.rebuild(root)
    assert len(report.left_out) == (0 if damage == "none" else 1)  # the in-place file's manifest
    assert temps(root) == []
    assert (report.old_catalog is None) == (damage == "gone")
    with Store.open(root) as store:
        after = {row.file_hash: row for row in store.files()}
        assert store._core.catalog.fact("marker") is None
        if damage == "none":  # names, pins and users' files are known to the old catalog alone
            assert _said(store) == before
            assert {key: (row.name, row.pinned, row.path) for key, row in after.items()} == {
                key: (row.name, row.pinned, row.path) for key, row in rows.items()
            }
        in_place = sha((tmp_path / "user").read_bytes())
        mirror = followed(store)
        owned = {key for key in rows if key != in_place}
        assert owned <= mirror.files.keys()
        assert {key for key, row in after.items() if row.is_collection} == {
            key for key, row in rows.items() if row.is_collection
        }
        assert {key for key, row in after.items() if row.is_member} == {k for k, row in rows.items() if row.is_member}
        assert all(row.name or row.is_member for row in after.values())
        for row in list(after.values()):
            if row.is_collection:
                store.remove(row.file_hash)
        store.gc(mirror.check)
        assert {key for key in mirror.files if key in owned} == {
            key for key in owned if not rows[key].is_collection and not rows[key].is_member
        }
        assert store.verify().is_clean or in_place not in mirror.files


def test_damaged_chunk_is_not_believed_and_parity_mends_it(tmp_path: Path) -> None:
    root = tmp_path / "st"
    with Store.open(root, create=True) as store:
        data, manifest = put(store, tmp_path, 7, (4, 2))
        _, offset, _ = store._core.catalog.extents_of(manifest.hash_of(2))[0]
    flip(blob_files(root)[0], offset)
    report = Store.rebuild(root)
    assert (report.files, report.incomplete) == (1, 1)
    with Store.open(root) as store:
        assert not store.has_chunk(manifest.hash_of(2))
        assert store.verify(repair=True).is_clean
        assert followed(store).content(manifest.manifest_hash) == data


@pytest.mark.parametrize("at", ["trailer", "entries"])
def test_blob_without_its_index_is_walked(tmp_path: Path, at: str) -> None:
    root = tmp_path / "st"
    with Store.open(root, create=True) as store:
        _, gone = put(store, tmp_path, 2)
        data, manifest = put(store, tmp_path, 6)
        _, second, _ = store._core.catalog.extents_of(manifest.hash_of(1))[0]
        big = store._core.path_of(store._core.catalog.extents_of(manifest.hash_of(0))[0][0])
    flip(os.fsdecode(big), os.stat(big).st_size - (1 if at == "trailer" else 64 + 40))
    flip(os.fsdecode(big), second)
    report = Store.rebuild(root)
    assert [path for path, _ in report.left_out] == [os.fsdecode(big)]
    with Store.open(root) as store:
        here = [store.has_chunk(manifest.hash_of(i)) for i in range(manifest.n_chunks)]
        assert here == [True, False, True, True, True, True]
        assert gone.file_hash in followed(store).files
        assert any(damage.kind == "index" for damage in store.verify(repair=True).damages)
        assert sha(data) == manifest.file_hash


def test_damaged_manifest_and_foreign_files_are_left_out_by_name(tmp_path: Path) -> None:
    root = tmp_path / "st"
    with Store.open(root, create=True) as store:
        _, manifest = put(store, tmp_path, 2)
        put(store, tmp_path, 5)
    name = manifest.manifest_hash.hex()
    flip(root / "manifests" / name[:2] / name, 50)
    folder = root / "hashed_files" / "zz"
    folder.mkdir()
    os.mkfifo(folder / "fifo.blob")
    (folder / "link.blob").symlink_to("/etc/passwd")
    report = Store.rebuild(root)
    assert {Path(path).name for path, _ in report.left_out} == {name, "fifo.blob", "link.blob"}
    with Store.open(root) as store:
        assert len(store.files()) == 1


def test_rebuild_is_refused_without_a_store_and_beside_another(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("absent", "empty"):
        with pytest.raises(StoreNotFound, match=folder):
            Store.rebuild(tmp_path / folder)
    assert list((tmp_path / "empty").iterdir()) == []
    with Store.open(tmp_path / "st", create=True), pytest.raises(StoreLocked):
        Store.rebuild(tmp_path / "st")


def test_rebuild_that_fails_leaves_the_old_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _filled(tmp_path)
    whole = (root / "catalog.db").read_bytes()

    def full(*_: object) -> None:
        raise StoreFull("no space left")

    collections: Callable[..., None] = full
    monkeypatch.setattr(rebuild_module._Rebuild, "_collections", collections)
    with pytest.raises(StoreFull):
        Store.rebuild(root)
    assert (root / "catalog.db").read_bytes() == whole
    assert temps(root) == []
    with Store.open(root) as store:
        followed(store).check()


@pytest.mark.parametrize("is_old_there", [True, False])
def test_removed_files_stay_removed_although_gc_never_ran(tmp_path: Path, is_old_there: bool) -> None:
    root = tmp_path / "st"
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/large").write_bytes(data_of(100_000, 11))
    with Store.open(root, create=True) as store:
        _, kept = put(store, tmp_path, 3)
        _, gone = put(store, tmp_path, 5)
        tree = store.store_tree(tmp_path / "tree", chunk_size=UNIT)
        store.remove(gone.file_hash)
        store.remove(bytes.fromhex(tree.file_hash))
    if not is_old_there:
        (root / "catalog.db").unlink()
    Store.rebuild(root)
    with Store.open(root) as store:
        assert [row.file_hash for row in store.files()] == [kept.file_hash]
        mirror = followed(store)
        store.gc(mirror.check)
        assert len(blob_files(root)) == 1
        put(store, tmp_path, 5)
        assert gone.file_hash in mirror.files


def test_quota_outlives_the_catalog_and_old_catalogs_do_not_count(tmp_path: Path) -> None:
    root = _filled(tmp_path)
    with Store.open(root) as store:
        store.quota.set_limit(disk_bytes(root) + 4096)
        store.remember("filler", bytes(200_000))
    for _ in range(2):
        Store.rebuild(root)
        with Store.open(root) as store:
            assert store.quota.limit is not None
            assert store.stats()["used"] == disk_bytes(root) <= store.quota.limit
    assert len(list((root / "quarantine").glob("catalog-*.db"))) == 2


def test_unfinished_rebuild_leaves_no_second_name_of_the_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _filled(tmp_path)

    def killed(*_: object) -> None:
        raise StoreFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(rebuild_module, "_install", killed)
        with pytest.raises(StoreFull):
            Store.rebuild(root)
    assert list((root / "quarantine").iterdir()) == []
    os.link(root / "catalog.db", root / "quarantine/catalog-killed.db")
    Store.rebuild(root)
    assert len(list((root / "quarantine").glob("catalog-*"))) == 1
    assert (root / "catalog.db").stat().st_nlink == 1


def test_old_catalog_is_kept_with_its_log(tmp_path: Path) -> None:
    root = _filled(tmp_path)
    report = Store.rebuild(root)
    assert report.old_catalog is not None
    with sqlite3.connect(report.old_catalog) as db:
        assert db.execute("SELECT count(*) FROM names").fetchone()[0] > 0
    db.close()
