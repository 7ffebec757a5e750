"""A fetched folder becomes a stored collection: the same manifests, members without names, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastcas.errors import ChunkCorrupt, FileChanged, UsageError
from fastcas.metadata import Manifest
from fastcas.store import Collection, Identity, Store, StoredFile
from tests.support.store_rig import blob_files, check_replay, data_of, followed

FILES = {
    "README": b"hello\n",
    "empty": b"",
    "bin/run": b"#!/bin/sh\n",
    "data/large": data_of(65_537, 2),
    "data/huge": data_of(900_000, 3),
    "data/same": data_of(65_537, 2),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def make_tree(root: Path) -> Path:
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def published(tmp_path: Path, **shape: object) -> tuple[StoredFile, Collection, dict[bytes, Manifest]]:
    """Store the tree elsewhere; returns what a client knows after it fetched it."""
    with Store.open(tmp_path / "origin", create=True) as origin:
        stored = origin.store_tree(make_tree(tmp_path / "tree"), **shape)  # type: ignore[arg-type]
        manifests = {row.manifest_hash: origin.manifest(row.manifest_hash) for row in origin.files()}
        top = manifests[bytes.fromhex(stored.manifest_hash)]
        assert top is not None
        content = b"".join(origin.read_chunk(top.hash_of(i)) or b"" for i in range(top.n_chunks))
    return stored, Collection.decode(content), {key: value for key, value in manifests.items() if value is not None}


def identities_of(root: Path, collection: Collection) -> dict[str, Identity]:
    out = {}
    for entry in collection.files:
        info = (root / entry.path).stat()
        out[entry.path] = Identity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    return out


@pytest.mark.parametrize("shape", [{}, {"chunk_size": 16384, "parity": (4, 2)}], ids=["automatic", "own shape"])
@pytest.mark.parametrize("is_proven", [True, False])
def test_fetched_tree_is_served_like_a_stored_one(
    store: Store, tmp_path: Path, shape: dict[str, object], is_proven: bool
) -> None:
    stored, collection, manifests = published(tmp_path, **shape)
    mirror = followed(store)
    here = make_tree(tmp_path / "here")
    top = manifests[bytes.fromhex(stored.manifest_hash)]
    identities = identities_of(here, collection) if is_proven else {}
    adopted = store.register_tree(here, collection, top, "tree", members=manifests, identities=identities)
    assert (adopted.link, adopted.size) == (stored.link, stored.size)
    for key in manifests:
        assert mirror.content(key)
    check_replay(store, mirror)
    assert len(blob_files(store.root)) == 1
    assert store.stats()["linked"] == 2 * 65_537 + 900_000
    (named,) = [row for row in store.files() if row.name]
    assert (named.name, named.is_collection, named.is_complete) == ("tree", True, True)
    assert all(row.is_member and row.is_complete for row in store.files() if not row.name)

    assert store.remove(bytes.fromhex(stored.file_hash))
    store.gc(lambda: None)
    assert store.files() == []
    assert blob_files(store.root) == []
    assert store.stats()["chunks"] == 0
    assert (here / "data/huge").read_bytes() == FILES["data/huge"]
    check_replay(store, mirror)


def test_manifests_of_the_automatic_shape_need_not_be_known(store: Store, tmp_path: Path) -> None:
    stored, collection, manifests = published(tmp_path)
    top = manifests[bytes.fromhex(stored.manifest_hash)]
    here = make_tree(tmp_path / "here")
    assert store.register_tree(here, collection, top, "t", members={}, identities={}).link.startswith(
        stored.link.partition("&name=")[0]
    )
    assert all(row.is_complete for row in store.files())


@pytest.mark.parametrize("path", ["README", "data/huge"])
@pytest.mark.parametrize("is_known", [True, False])
def test_changed_file_keeps_the_whole_folder_out(store: Store, tmp_path: Path, path: str, is_known: bool) -> None:
    stored, collection, manifests = published(tmp_path)
    here = make_tree(tmp_path / "here")
    identities = identities_of(here, collection) if is_known else {}
    (here / path).write_bytes(bytes(len(FILES[path])))
    with pytest.raises((FileChanged, ChunkCorrupt), match=path):
        store.register_tree(
            here, collection, manifests[bytes.fromhex(stored.manifest_hash)], "t", members=manifests,
            identities=identities,
        )  # fmt: skip
    assert store.files() == []
    assert blob_files(store.root) == []


def test_pack_with_bytes_of_no_file_is_refused(store: Store, tmp_path: Path) -> None:
    stored, collection, manifests = published(tmp_path)
    here = make_tree(tmp_path / "here")
    fewer = replace(collection, small=tuple(item for item in collection.small if item.path != "README"))
    with pytest.raises(UsageError, match="pack 0"):
        store.register_tree(
            here, fewer, manifests[bytes.fromhex(stored.manifest_hash)], "t", members=manifests, identities={}
        )
    assert store.files() == []
