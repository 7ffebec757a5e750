"""Verify and repair: flipped bits, truncated, replaced and swapped files, parity, copies, peers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastcas.errors import UsageError
from fastcas.store import Store, VerifyReport
from tests.support.store_rig import UNIT, Mirror, blob_files, check_replay, flip, followed, put


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def place(store: Store, key: bytes) -> tuple[Path, int]:
    blob, offset, _ = store._core.catalog.extents_of(key)[0]
    return Path(os.fsdecode(store._core.path_of(blob))), offset


def kinds(report: VerifyReport) -> list[tuple[str, str]]:
    return [(damage.kind, damage.repaired_by) for damage in report.damages]


def test_verify_of_a_whole_store_is_clean(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path, 10, (4, 2))
    put(store, tmp_path, 3, in_place=True)
    seen: list[tuple[int, int]] = []
    report = store.verify(progress=lambda done, total: seen.append((done, total)))
    assert report.is_clean
    assert (report.chunks, report.manifests) == (10 + 6 + 3, 2)
    assert seen[-1] == (report.bytes, report.bytes)


def test_every_flipped_bit_is_found(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 20)
    for i in range(20):
        path, offset = place(store, manifest.hash_of(i))
        flip(path, offset + (i * 997) % manifest.length_of(i), i % 8)
    report = store.verify()
    assert kinds(report) == [("chunk", "")] * 20
    assert {damage.hash for damage in report.damages} == {manifest.hash_of(i) for i in range(20)}
    assert mirror.chunks == {}
    assert mirror.files == {}
    assert len(list((store.root / "quarantine").iterdir())) == 20
    again = store.verify()
    assert kinds(again) == [("missing", "")] * 20
    assert not again.is_clean


@pytest.mark.parametrize("lost", list(itertools.combinations(range(6), 2)) + [(i,) for i in range(6)])
def test_every_pattern_within_the_parity_is_healed(store: Store, tmp_path: Path, lost: tuple[int, ...]) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 4, (4, 2))
    for i in lost:
        path, offset = place(store, manifest.hash_of(i))
        flip(path, offset + 3)
    report = store.verify(repair=True)
    assert kinds(report) == [("chunk", "parity")] * len(lost)
    assert report.is_clean
    assert mirror.content(manifest.manifest_hash) == data
    assert store.verify().is_clean
    check_replay(store, mirror)


def test_short_last_stripe_is_healed(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 9, (4, 2))
    for i in (8, 13):
        path, offset = place(store, manifest.hash_of(i))
        flip(path, offset)
    assert store.verify(repair=True).is_clean
    assert mirror.content(manifest.manifest_hash) == data


def test_one_loss_too_many_is_said_not_guessed(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 4, (4, 2))
    for i in (0, 1, 4):
        path, offset = place(store, manifest.hash_of(i))
        flip(path, offset)
    report = store.verify(repair=True)
    assert not report.is_clean
    assert all("3 of 4 shards are left, need 1 more" in damage.reason for damage in report.damages)
    assert manifest.file_hash not in mirror.files
    check_replay(store, mirror)


def test_peers_heal_what_parity_cannot(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 4, (4, 2))
    chunks = {manifest.hash_of(i): data[i * UNIT : (i + 1) * UNIT] for i in range(4)}
    for i in (0, 1, 2):
        path, offset = place(store, manifest.hash_of(i))
        flip(path, offset)
    asked: list[bytes] = []

    def fetch(key: bytes) -> bytes | None:
        asked.append(key)
        return chunks.get(key)

    report = store.verify(repair=True, fetch=fetch)
    assert report.is_clean
    assert "peer" in {damage.repaired_by for damage in report.damages}
    assert mirror.content(manifest.manifest_hash) == data
    assert mirror.files == {manifest.file_hash: manifest.manifest_hash}
    assert asked
    check_replay(store, mirror)


@pytest.mark.parametrize("lie", [b"", b"wrong", b"x" * UNIT, None])
def test_lying_peer_heals_nothing(store: Store, tmp_path: Path, lie: bytes | None) -> None:
    _, manifest = put(store, tmp_path, 2)
    path, offset = place(store, manifest.hash_of(0))
    flip(path, offset)
    report = store.verify(repair=True, fetch=lambda key: lie)
    assert kinds(report) == [("chunk", "")]
    assert store.read_chunk(manifest.hash_of(0)) is None


def test_lost_chunk_comes_back_in_a_later_repair(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 2)
    path, offset = place(store, manifest.hash_of(0))
    flip(path, offset)
    assert not store.verify(repair=True).is_clean
    assert manifest.file_hash not in mirror.files
    report = store.verify(repair=True, fetch=lambda key: data[:UNIT])
    assert kinds(report) == [("missing", "peer")]
    assert mirror.content(mirror.files[manifest.file_hash]) == data


def test_damaged_copy_is_healed_from_a_linked_file(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 3)
    put(store, tmp_path, 3, in_place=True)
    path, offset = place(store, manifest.hash_of(1))
    flip(path, offset)
    report = store.verify(repair=True)
    assert kinds(report) == [("chunk", "copy")]
    (tmp_path / "f3").unlink()
    assert mirror.content(manifest.manifest_hash) == data


def test_users_file_is_never_written(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 4, (4, 2), in_place=True)
    path = tmp_path / "f4"
    info = path.stat()
    flip(path, 7)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    damaged = path.read_bytes()
    report = store.verify(repair=True)
    assert kinds(report) == [("chunk", "parity")]
    assert path.read_bytes() == damaged
    assert place(store, manifest.hash_of(0))[0] != path
    assert list((store.root / "quarantine").iterdir()) == []


@pytest.mark.parametrize("change", ["edited", "touched", "truncated", "moved", "replaced"])
def test_changed_users_file_is_withdrawn_and_its_chunks_missing(store: Store, tmp_path: Path, change: str) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 4, in_place=True)
    path = tmp_path / "f4"
    data = path.read_bytes()
    if change == "edited":
        path.write_bytes(b"edited")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "truncated":
        os.truncate(path, len(data) - 1)
    else:
        path.rename(tmp_path / "elsewhere")
    if change == "replaced":
        path.write_bytes(data)
    report = store.verify()
    assert kinds(report) == [("missing", "")] * 4
    assert mirror.chunks == {}
    assert mirror.files == {}
    assert store.find_extents(manifest.hash_of(0)) == []


def test_bytes_of_a_users_file_changed_behind_its_times_are_withdrawn(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 4, in_place=True)
    path = tmp_path / "f4"
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"other bytes")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = store.verify()
    assert report.n_damaged == 1 and not report.is_clean
    assert store.find_extents(manifest.hash_of(0)) == []
    assert manifest.hash_of(0) not in mirror.chunks
    assert manifest.hash_of(1) in mirror.chunks
    assert mirror.files == {}


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [Path.unlink, replace_by_directory, replace_by_link, replace_by_fifo])
def test_blob_that_is_gone_or_replaced_is_all_damage(
    store: Store, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 3)
    chunks = {manifest.hash_of(i): data[i * UNIT : (i + 1) * UNIT] for i in range(3)}
    harm(blob_files(store.root)[0])
    report = store.verify(repair=True, fetch=chunks.get)
    assert kinds(report) == [("chunk", "peer")] * 3
    assert mirror.content(mirror.files[manifest.file_hash]) == data
    assert store.verify().is_clean


@pytest.mark.parametrize("end", [0, 1, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT])
@pytest.mark.parametrize("repair", [False, True])
def test_truncated_blob_keeps_what_is_left(store: Store, tmp_path: Path, end: int, repair: bool) -> None:
    mirror = followed(store)
    _, manifest = put(store, tmp_path, 3)
    blob = blob_files(store.root)[0]
    blob.chmod(0o600)
    os.truncate(blob, end)
    report = store.verify(repair=repair)
    lost = [damage.hash for damage in report.damages if damage.kind == "chunk"]
    assert lost == [manifest.hash_of(i) for i in range(end // UNIT, 3)]
    for i in range(end // UNIT):
        assert store.read_chunk(manifest.hash_of(i)) is not None
    assert mirror.chunks.keys() == {manifest.hash_of(i) for i in range(end // UNIT)}
    check_replay(store, mirror)


def test_extended_blob_and_damaged_index_are_written_again(store: Store, tmp_path: Path) -> None:
    data, manifest = put(store, tmp_path, 3)
    blob = blob_files(store.root)[0]
    whole = blob.read_bytes()
    for at in (len(data), len(data) + 50, len(whole) - 64, len(whole) - 1):
        flip(blob, at, 2)
        assert kinds(store.verify()) == [("index", "")]
        assert kinds(store.verify(repair=True)) == [("index", "catalog")]
        assert blob.read_bytes() == whole
        assert blob.stat().st_mode & 0o777 == 0o400
    blob.chmod(0o600)
    with open(blob, "ab") as file:
        file.write(b"more")
    assert kinds(store.verify(repair=True)) == [("index", "catalog")]
    assert blob.read_bytes() == whole
    assert store.read_chunk(manifest.hash_of(2)) == data[2 * UNIT :]


def test_swapped_blobs_are_found(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path, 2)
    put(store, tmp_path, 3)
    one, two = blob_files(store.root)
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    report = store.verify()
    assert len([damage for damage in report.damages if damage.kind == "chunk"]) == 5


def test_damaged_manifest_comes_back_from_a_peer(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data, manifest = put(store, tmp_path, 3)
    path = store.root / "manifests" / manifest.manifest_hash.hex()[:2] / manifest.manifest_hash.hex()
    flip(path, 70)
    report = store.verify(repair=True)
    assert kinds(report) == [("manifest", "")]
    report = store.verify(repair=True, fetch={manifest.manifest_hash: manifest.data}.get)
    assert kinds(report) == [("manifest", "peer")]
    assert mirror.content(manifest.manifest_hash) == data
    check_replay(store, mirror)


def test_subsets_together_read_everything_once(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path, 30)
    parts = [store.verify(subset=(i, 4)) for i in range(1, 5)]
    assert sum(part.chunks for part in parts) == 30
    assert sum(part.manifests for part in parts) == 1
    assert all(part.chunks < 30 for part in parts)


@pytest.mark.parametrize("subset", [(0, 4), (5, 4), (1, 0)])
def test_subset_out_of_range_is_refused(store: Store, subset: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="subset"):
        store.verify(subset=subset)


def test_load_hides_what_a_lost_blob_held(store: Store, tmp_path: Path) -> None:
    _, manifest = put(store, tmp_path, 3)
    _, other = put(store, tmp_path, 4)
    place(store, manifest.hash_of(0))[0].unlink()
    mirror = Mirror()
    store.load(mirror)
    assert mirror.files == {other.file_hash: other.manifest_hash}
    mirror.check()
    assert store.find_extents(manifest.hash_of(0)) != []
    assert store.read_chunk(manifest.hash_of(0)) is None
