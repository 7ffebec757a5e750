"""The quota: never exceeded, the longest unused unpinned files go first, and nothing goes in vain."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastcas.errors import StoreFull
from fastcas.store import Store
from fastcas.store import listing as listing_module
from tests.support.store_rig import KIB, Mirror, check_replay, data_of, flip, followed, put, sha

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "st", create=True)


def on_disk(store: Store) -> int:
    """What `du` says of the folders that count."""
    trees = ("hashed_files", "manifests", "quarantine")
    return sum(
        path.stat().st_blocks * 512 for tree in trees for path in (store.root / tree).rglob("*") if path.is_file()
    )


def add(store: Store, folder: Path, seed: int, size: int = MIB, *, at: int | None = None, **options: object) -> bytes:
    """Store `size` bytes as `f<seed>`; `at`: when that was."""
    data = data_of(size, seed)
    (folder / f"f{seed}").write_bytes(data)
    store.store_file(folder / f"f{seed}", chunk_size=65536, **options)  # type: ignore[arg-type]
    if at is not None:
        with store._core.catalog.transaction():
            store._core.catalog.execute("UPDATE files SET stored_at=? WHERE hash=?", (at, sha(data)))
    return sha(data)


def names(store: Store) -> set[str]:
    return {row.name for row in store.files()}


def test_longest_unused_goes_first_and_pinned_stays(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    store.quota.set_limit(4 * MIB + MIB // 2)
    evicted: list[bytes] = []
    store.quota.on_evicted = evicted.extend
    store.quota.barrier = mirror.check
    hashes = [add(store, tmp_path, seed, at=seed) for seed in range(1, 5)]
    store.pin(hashes[0])
    listing_module.touch(store._core, [hashes[1]], 10)
    assert evicted == []
    add(store, tmp_path, 5, at=5)
    assert evicted == [hashes[2]]
    add(store, tmp_path, 6, 2 * MIB, at=20)
    assert evicted == [hashes[2], hashes[3], sha(data_of(MIB, 5))]
    assert names(store) == {"f1", "f2", "f6"}
    assert on_disk(store) <= 4 * MIB + MIB // 2
    check_replay(store, mirror)


def test_what_cannot_fit_is_refused_and_nothing_is_evicted(store: Store, tmp_path: Path) -> None:
    store.quota.set_limit(3 * MIB)
    pinned = add(store, tmp_path, 1)
    store.pin(pinned)
    add(store, tmp_path, 2)
    with pytest.raises(StoreFull, match=r"quota of 3145728 B") as caught:
        add(store, tmp_path, 3, 2 * MIB + MIB // 2)
    assert caught.value.exit_code == 8
    assert names(store) == {"f1", "f2"}
    with pytest.raises(StoreFull):
        store.quota.set_limit(MIB // 2)
    assert store.quota.limit == 3 * MIB
    assert followed(store).files.keys() == {pinned, sha(data_of(MIB, 2))}


def test_what_is_here_already_evicts_nothing(store: Store, tmp_path: Path) -> None:
    store.quota.set_limit(3 * MIB)
    add(store, tmp_path, 1, 2 * MIB)
    add(store, tmp_path, 2, MIB // 2)
    stored = store.store_file(tmp_path / "f1", chunk_size=65536)
    assert stored.already_stored
    assert names(store) == {"f1", "f2"}
    (tmp_path / "f1").write_bytes(data_of(2 * MIB, 9))  # the same name with other content does not get around it
    with pytest.raises(StoreFull):
        store.store_file(tmp_path / "f1", chunk_size=65536)
    assert on_disk(store) <= 3 * MIB


def test_limit_is_remembered_and_lowering_it_evicts(store: Store, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        add(store, tmp_path, seed, at=seed)
    store.quota.set_limit(2 * MIB + MIB // 2)
    assert names(store) == {"f2", "f3"}
    store.close()
    with Store.open(tmp_path / "st") as store:
        assert store.quota.limit == 2 * MIB + MIB // 2
        assert store.stats()["used"] == on_disk(store)
        add(store, tmp_path, 4)
        assert names(store) == {"f3", "f4"}
        store.quota.set_limit(None)
    with Store.open(tmp_path / "st") as store:
        assert store.quota.limit is None


def test_collections_go_whole_and_in_place_files_stay(store: Store, tmp_path: Path) -> None:
    store.quota.set_limit(3 * MIB)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/large").write_bytes(data_of(MIB, 21))
    (tmp_path / "tree/small").write_bytes(b"small")
    user = add(store, tmp_path, 7, at=1, in_place=True)
    tree = store.store_tree(tmp_path / "tree", chunk_size=65536)
    with store._core.catalog.transaction():
        store._core.catalog.execute("UPDATE files SET stored_at=2")
    add(store, tmp_path, 8, 2 * MIB, at=3)
    rows = {row.file_hash: row for row in store.files()}
    assert user in rows
    assert bytes.fromhex(tree.file_hash) not in rows
    assert {row.name for row in rows.values()} == {"f7", "f8"}


def test_reservation_is_kept_free_from_others(store: Store, tmp_path: Path) -> None:
    store.quota.set_limit(3 * MIB)
    add(store, tmp_path, 1)
    store.quota.reserve(MIB)
    assert names(store) == {"f1"}
    with pytest.raises(StoreFull):
        add(store, tmp_path, 2, 2 * MIB + MIB // 2)
    add(store, tmp_path, 3)
    assert names(store) == {"f3"}
    store.quota.release(MIB)
    add(store, tmp_path, 4)
    assert names(store) == {"f3", "f4"}
    with pytest.raises(StoreFull):
        store.quota.reserve(4 * MIB)


def test_parity_and_repair_count(store: Store, tmp_path: Path) -> None:
    store.quota.set_limit(2 * MIB)
    with pytest.raises(StoreFull):
        add(store, tmp_path, 1, MIB + MIB // 2, parity=(2, 1))
    _, manifest = put(store, tmp_path, 20, (4, 2))
    store.pin(manifest.file_hash)
    store.quota.set_limit(on_disk(store) + 8192)
    blob, offset, _ = store._core.catalog.extents_of(manifest.hash_of(3))[0]
    flip(store._core.path_of(blob).decode(), offset)
    with pytest.raises(StoreFull, match="quota"):
        store.verify(repair=True)
    store.quota.set_limit(None)
    assert store.verify(repair=True).is_clean


def test_damage_is_healed_within_the_quota_and_kept_where_there_is_room(store: Store, tmp_path: Path) -> None:
    data, manifest = put(store, tmp_path, 20, (4, 2))
    for room, is_kept in ((64 * KIB, True), (40 * KIB, False)):
        quarantine = store.root / "quarantine"
        before = len(list(quarantine.iterdir()))
        store.quota.set_limit(on_disk(store) + room)
        assert store.quota.limit is not None
        blob, offset, _ = store._core.catalog.extents_of(manifest.hash_of(3))[0]
        flip(store._core.path_of(blob).decode(), offset)
        if is_kept:
            assert store.verify(repair=True).is_clean
        else:
            with pytest.raises(StoreFull, match="quota"):
                store.verify(repair=True)
        assert len(list(quarantine.iterdir())) - before == 1
        assert on_disk(store) <= store.quota.limit
    blob, offset, _ = store._core.catalog.extents_of(manifest.hash_of(7))[0]
    flip(store._core.path_of(blob).decode(), offset)
    store.quota.set_limit(on_disk(store) + 8192)  # no room for the damaged bytes
    with pytest.raises(StoreFull, match="quota"):
        store.verify(repair=True)
    assert on_disk(store) <= (store.quota.limit or 0)
    store.quota.set_limit(None)
    assert store.verify(repair=True).is_clean
    assert followed(store).content(manifest.manifest_hash) == data


def test_damaged_manifest_is_replaced_within_the_quota(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 3)
    text = manifest.manifest_hash.hex()
    flip(store.root / "manifests" / text[:2] / text, 60)
    store.quota.set_limit(None)
    limit = on_disk(store)
    store.quota.limit = limit
    assert store.verify(repair=True, fetch=lambda key: manifest.data).is_clean
    assert on_disk(store) <= limit


def test_never_exceeded_by_any_order_of_commands(store: Store, tmp_path: Path) -> None:
    chooser = random.Random(5)
    limit = 3 * MIB
    store.quota.set_limit(limit)
    mirror: Mirror = followed(store)
    store.quota.barrier = mirror.check
    refused = 0
    for number in range(60):
        seed = chooser.randrange(12)
        try:
            add(
                store, tmp_path, seed, chooser.choice([1, 70_000, 300_000, MIB, 2 * MIB]),
                parity=chooser.choice([None, None, (3, 1)]), at=number,
            )  # fmt: skip
        except StoreFull:
            refused += 1
        rows = store.files()
        if rows and chooser.random() < 0.2:
            store.pin(chooser.choice(rows).file_hash, chooser.random() < 0.5)
        if rows and chooser.random() < 0.1:
            store.remove(chooser.choice(rows).file_hash)
        assert on_disk(store) <= limit
    check_replay(store, mirror)
    assert refused
