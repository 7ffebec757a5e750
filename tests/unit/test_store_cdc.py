"""Chunks cut by content in the store: every shape reads back, versions share, in place, repair, the tree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from fastcas.errors import FileChanged, UsageError
from fastcas.hashing import Cutter
from fastcas.store import Store
from fastcas.store.collection import Collection
from tests.support.store_rig import KIB, blob_files, check_replay, data_of, followed, sha

AVERAGE = 64 * KIB
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def lengths_of(data: bytes, average: int = AVERAGE) -> list[int]:
    """What the cutter says, fed at once."""
    ends = [0, *Cutter(average).feed(data)]
    if ends[-1] != len(data):
        ends.append(len(data))
    return [b - a for a, b in pairwise(ends)]


# Around the buffers of 8 MiB, around the shortest and the longest chunk, and zeros (chunks of the longest).
@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", data_of(16383), data_of(16384), data_of(AVERAGE * 4), bytes(AVERAGE * 4), bytes(AVERAGE * 4 + 1),
        bytes(8 * MIB), data_of(8 * MIB), data_of(8 * MIB + 1), data_of(17 * MIB + 5), bytes(9 * MIB) + data_of(MIB),
    ],
    ids=lambda data: f"{len(data)}-{data[:1].hex()}",
)  # fmt: skip
@pytest.mark.parametrize("in_place", [False, True])
def test_any_content_reads_back_with_the_cutter_s_lengths(
    store: Store, tmp_path: Path, data: bytes, in_place: bool
) -> None:
    mirror = followed(store)
    stored = store.store_file(write(tmp_path / "f", data), chunk_size=AVERAGE, chunking="cdc", in_place=in_place)
    assert stored.file_hash == sha(data).hex()
    assert stored.chunking == ("cdc" if data else "fixed")
    manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    assert [manifest.length_of(i) for i in range(manifest.n_chunks)] == lengths_of(data)
    assert mirror.content(manifest.manifest_hash) == data
    mirror.check()
    check_replay(store, mirror)
    assert store.verify().is_clean


def test_a_new_version_shares_what_did_not_change(store: Store, tmp_path: Path) -> None:
    old = data_of(6 * MIB)
    new = old[: 2 * MIB] + b"inserted" + old[2 * MIB :]
    store.store_file(write(tmp_path / "old", old), chunk_size=AVERAGE, chunking="cdc")
    stored = store.store_file(write(tmp_path / "new", new), chunk_size=AVERAGE, chunking="cdc")
    assert 0 < stored.new_bytes <= 2 * 4 * AVERAGE
    again = store.store_file(write(tmp_path / "new", new), chunk_size=AVERAGE, chunking="cdc")
    assert again.already_stored


def test_parity_is_refused_before_anything_is_read(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "f", data_of(100_000))
    with pytest.raises(UsageError, match="cannot have parity"):
        store.store_file(path, chunking="cdc", parity=(4, 2))
    with pytest.raises(UsageError, match="cannot have parity"):
        store.store_tree(tmp_path, chunking="cdc", parity=(4, 2))
    assert store.files() == [] and not blob_files(store.root)


def test_a_damaged_chunk_is_found_and_repaired_from_another_copy(store: Store, tmp_path: Path) -> None:
    data = data_of(3 * MIB)
    stored = store.store_file(write(tmp_path / "f", data), chunk_size=AVERAGE, chunking="cdc")
    manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    blob = blob_files(store.root)[0]
    raw = bytearray(blob.read_bytes())
    at = raw.index(data[manifest.offset_of(5) : manifest.offset_of(5) + 64])
    raw[at] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(raw)
    report = store.verify()
    assert [damage.hash for damage in report.damages] == [manifest.hash_of(5)]
    good = {manifest.hash_of(5): data[manifest.offset_of(5) : manifest.offset_of(6)]}
    assert store.verify(repair=True, fetch=good.get).is_clean
    assert store.verify().is_clean


def test_an_unverified_file_is_proven_chunk_by_chunk(store: Store, tmp_path: Path) -> None:
    data = data_of(5 * MIB)
    stored = store.store_file(write(tmp_path / "f", data), chunk_size=AVERAGE, chunking="cdc")
    manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    store.register_linked(write(tmp_path / "same", data), manifest, "same", verified=False)
    with pytest.raises(FileChanged):
        store.register_linked(
            write(tmp_path / "other", data[:-1] + bytes([data[-1] ^ 1])), manifest, "other", verified=False
        )


def test_a_tree_is_cut_by_content_throughout_and_can_be_adopted(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, size in (("a", 3 * MIB), ("b", 100_000), ("small", 5_000), ("empty", 0)):
        write(tree / name, data_of(size, size))
    with Store.open(tmp_path / "one", create=True) as one:
        stored = one.store_tree(tree, chunking="cdc", chunk_size=AVERAGE)
        top = one.manifest(bytes.fromhex(stored.manifest_hash))
        assert top is not None and top.is_cdc
        content = b"".join(one.read_chunk(top.hash_of(i)) or b"" for i in range(top.n_chunks))
        collection = Collection.decode(content)
        members = {row.manifest_hash: one.manifest(row.manifest_hash) for row in one.files()}
        assert all(manifest is not None and manifest.is_cdc for manifest in members.values())
    with Store.open(tmp_path / "two", create=True) as two:
        known = {key: manifest for key, manifest in members.items() if manifest is not None}
        adopted = two.register_tree(tree, collection, top, "tree", members=known, identities={})
        assert adopted.file_hash == stored.file_hash
        assert two.verify().is_clean
