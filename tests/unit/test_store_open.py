"""Opening a store: roots, lock, identity, and catalogs that cannot be used."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fastcas.errors import (
    CatalogCorrupt,
    LocalProtocolError,
    PermissionDenied,
    StoreError,
    StoreLocked,
    StoreNotFound,
)
from fastcas.store import Store
from tests.support.store_rig import data_of, followed, temps


def test_open_of_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="absent"):
        Store.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_open_of_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="not a fastcas store"):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_open_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    for create in (False, True):
        with pytest.raises(StoreNotFound):
            Store.open(tmp_path / "f", create=create)


def test_hashed_files_means_its_parent(tmp_path: Path) -> None:
    with Store.open(tmp_path / "st" / "hashed_files", create=True) as store:
        assert store.root == tmp_path / "st"
    with Store.open(tmp_path / "st") as store:
        assert store.root == tmp_path / "st"


def test_close_is_idempotent_and_gives_the_lock_up(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "st", create=True)
    store.close()
    store.close()
    assert store.lock_fd == -1
    Store.open(tmp_path / "st").close()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    (tmp_path / "f").write_bytes(data_of(100_000))
    with Store.open(tmp_path / "st", create=True) as store:
        store.store_file(tmp_path / "f", parity=(2, 1))
        store.verify()
    with pytest.raises(StoreNotFound):
        Store.open(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_second_open_in_this_process_is_refused_with_the_holder(tmp_path: Path) -> None:
    with (
        Store.open(tmp_path / "st", create=True),
        pytest.raises(StoreLocked, match=f"in use by process {os.getpid()}"),
    ):
        Store.open(tmp_path / "st")


def test_second_process_is_refused_with_the_holder(tmp_path: Path) -> None:
    code = f"from fastcas.store import Store; Store.open({str(tmp_path / 'st')!r}, create=True)"
    with Store.open(tmp_path / "st", create=True):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "StoreLocked" in done.stderr
    assert f"process {os.getpid()}" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_inherited_lock_is_taken_over(tmp_path: Path) -> None:
    first = Store.open(tmp_path / "st", create=True)
    shared = os.dup(first.lock_fd)
    first.close()
    with Store.open(tmp_path / "st", lock_fd=shared) as second:
        assert second.lock_fd not in (-1, shared)
    with pytest.raises(StoreLocked):
        Store.open(tmp_path / "st")
    os.close(shared)
    Store.open(tmp_path / "st").close()


def test_inherited_descriptor_of_another_file_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path / "st", create=True).close()
    with open(tmp_path / "other", "wb") as file, pytest.raises(LocalProtocolError, match="not this folder's LOCK"):
        Store.open(tmp_path / "st", lock_fd=file.fileno())


def test_inherited_descriptor_without_the_lock_is_refused(tmp_path: Path) -> None:
    with (
        Store.open(tmp_path / "st", create=True),
        open(tmp_path / "st" / "LOCK", "rb") as file,
        pytest.raises(StoreLocked),
    ):
        Store.open(tmp_path / "st", lock_fd=file.fileno())


def test_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()
    (tmp_path / "victim").write_bytes(b"keep")
    (tmp_path / "st" / "LOCK").symlink_to(tmp_path / "victim")
    with pytest.raises(Exception, match="LOCK"):
        Store.open(tmp_path / "st", create=True)
    assert (tmp_path / "victim").read_bytes() == b"keep"


def test_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    with Store.open(tmp_path / "st", create=True) as store:
        seed = store.identity()
        assert len(seed) == 32
        assert store.identity() == seed
    with Store.open(tmp_path / "st") as store:
        assert store.identity() == seed
    assert (tmp_path / "st" / "node.key").read_bytes() == seed


def test_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path / "st", create=True) as store:
        store.identity()
    (tmp_path / "st" / "node.key").chmod(0o644)
    with Store.open(tmp_path / "st") as store, pytest.raises(PermissionDenied, match="0600"):
        store.identity()


def test_identity_of_another_length_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path / "st", create=True) as store:
        store.identity()
    (tmp_path / "st" / "node.key").write_bytes(b"x" * 31)
    with Store.open(tmp_path / "st") as store, pytest.raises(StoreError, match="expected 32 B, got 31 B"):
        store.identity()


def test_orphan_temps_are_removed_at_open(tmp_path: Path) -> None:
    Store.open(tmp_path / "st", create=True).close()
    for tree in (".", "hashed_files", "manifests", "quarantine"):
        (tmp_path / "st" / tree / ".tmp-0123").write_bytes(b"torn")
    (tmp_path / "st" / "hashed_files" / ("a" * 64)).write_bytes(b"older layout")
    Store.open(tmp_path / "st").close()
    assert temps(tmp_path / "st") == []
    assert (tmp_path / "st" / "hashed_files" / ("a" * 64)).exists()


def test_store_survives_reopening_and_moving(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data_of(100_000))
    with Store.open(tmp_path / "st", create=True) as store:
        stored = store.store_file(tmp_path / "f")
    (tmp_path / "st").rename(tmp_path / "moved")
    with Store.open(tmp_path / "moved") as store:
        assert followed(store).content(bytes.fromhex(stored.manifest_hash)) == data_of(100_000)
        assert store.verify().is_clean


def _stored(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(data_of(2_000_000))
    with Store.open(tmp_path / "st", create=True) as store:
        store.store_file(tmp_path / "f", chunk_size=16384)
    return tmp_path / "st" / "catalog.db"


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be one" * 100, b"SQLite format 3\0" + b"\xff" * 8000]
)
def test_catalog_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = _stored(tmp_path)
    path.write_bytes(content)
    for create in (False, True):
        with pytest.raises(CatalogCorrupt, match=r"catalog\.db"):
            Store.open(tmp_path / "st", create=create)
    assert path.read_bytes() == content


def test_database_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()
    db = sqlite3.connect(tmp_path / "st" / "catalog.db")
    db.execute("CREATE TABLE theirs(x)")
    db.commit()
    db.close()
    with pytest.raises(CatalogCorrupt, match="not a fastcas catalog"):
        Store.open(tmp_path / "st", create=True)


def test_catalog_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = _stored(tmp_path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=2")
    db.close()
    with pytest.raises(CatalogCorrupt, match="schema version 2, expected 1"):
        Store.open(tmp_path / "st")


def test_damaged_catalog_pages_never_end_in_a_foreign_exception(tmp_path: Path) -> None:
    path = _stored(tmp_path)
    whole = path.read_bytes()
    outcomes = set()
    for page in range(0, len(whole), 4096):
        path.write_bytes(whole[:page] + b"\x5a" * 4096 + whole[page + 4096 :])
        try:
            with Store.open(tmp_path / "st") as store:
                followed(store).check()
                store.stats()
                store.files()
        except CatalogCorrupt:
            outcomes.add("corrupt")
        except AssertionError:
            outcomes.add("wrong")
        else:
            outcomes.add("ok")
    assert "corrupt" in outcomes
    assert "wrong" not in outcomes


def test_catalog_cut_short_is_refused(tmp_path: Path) -> None:
    path = _stored(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CatalogCorrupt), Store.open(tmp_path / "st") as store:
        followed(store)
        store.stats()


def test_pin_and_stats_count(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data_of(100_000))
    with Store.open(tmp_path / "st", create=True) as store:
        stored = store.store_file(tmp_path / "f", chunk_size=16384)
        file_hash = bytes.fromhex(stored.file_hash)
        assert store.pin(file_hash)
        assert not store.pin(b"x" * 32)
        row = store.file(file_hash)
        assert row is not None
        assert row.pinned
        assert store.pin(file_hash, pinned=False)
        row = store.file(file_hash)
        assert row is not None
        assert not row.pinned
        assert row in store.files()
        keys = b"".join(store.chunk_hashes())
        assert len(keys) == 32 * 7
        assert sorted(keys[i : i + 32] for i in range(0, len(keys), 32)) == [
            keys[i : i + 32] for i in range(0, len(keys), 32)
        ]
        assert store.stats() == {
            "logical": 100_000, "stored": 100_000, "linked": 0, "shared": 0, "files": 1, "incomplete": 0,
            "chunks": 7, "blobs": 1, "manifests": 1, "quota": 0, "used": 0,
        }  # fmt: skip
