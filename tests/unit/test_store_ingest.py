"""Ingest: every size and shape, sharing, in place, sources that change, and the values people see."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.errors import FileChanged, NotFound, PermissionDenied, StoreError, StoreFull, UsageError
from fastcas.ids import Link
from fastcas.metadata import SHA256_IV
from fastcas.parity import ReedSolomon
from fastcas.store import Store
from fastcas.store.catalog import LINKED, OWNED
from fastcas.store.ingest import Ingest
from fastcas.store.paths import os_errors
from fastcas.store.sources import BytesSource, ChainSource, FileSource, Part, open_user_file
from tests.support.store_rig import (
    INTERESTING_SIZES,
    KIB,
    Mirror,
    blob_files,
    check_replay,
    chunks_of,
    data_of,
    followed,
    owned_bytes,
    sha,
    temps,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("parity", [None, (1, 1), (3, 2), (10, 4)])
@pytest.mark.parametrize("chunk_size", [None, 16 * KIB, 64 * KIB])
def test_store_file_of_any_size_reads_back(
    store: Store, tmp_path: Path, chunk_size: int | None, parity: tuple[int, int] | None
) -> None:
    mirror = followed(store)
    for size in INTERESTING_SIZES:
        data = data_of(size, size)
        stored = store.store_file(write(tmp_path / f"f{size}", data), chunk_size=chunk_size, parity=parity)
        assert stored.file_hash == sha(data).hex()
        assert (stored.size, stored.name, stored.is_collection, stored.path) == (size, f"f{size}", False, None)
        manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
        assert manifest is not None
        assert (manifest.n_chunks, manifest.n_parity) == (stored.n_chunks, stored.n_parity)
        chain = SHA256_IV
        for i in range(manifest.n_chunks):
            unit = manifest.chunk_size
            assert manifest.hash_of(i) == sha(data[i * unit : (i + 1) * unit])
            assert manifest.chain_before(i) == chain
            chain = manifest.chain_after(i)
        assert mirror.content(manifest.manifest_hash) == data
        for key in chunks_of(manifest):
            assert store.read_chunk(key) is not None
    check_replay(store, mirror)
    assert temps(store.root) == []


def test_parity_chunks_are_those_of_the_code(store: Store, tmp_path: Path) -> None:
    data = data_of(9 * 16 * KIB + 100)
    stored = store.store_file(write(tmp_path / "f", data), chunk_size=16 * KIB, parity=(4, 2))
    manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    assert (manifest.n_chunks, manifest.n_parity) == (10, 6)
    for number in range(manifest.n_stripes):
        chunks, parity = manifest.stripe(number)
        length = manifest.length_of(chunks[0])
        shards = [data[i * 16 * KIB : (i + 1) * 16 * KIB].ljust(length, b"\0") for i in chunks]
        shards += [bytes(length)] * (4 - len(shards))
        expected = [sha(bytes(row)) for row in ReedSolomon(4, 2).encode(shards)]
        assert [manifest.hash_of(i) for i in parity] == expected


def test_file_larger_than_the_buffers_reads_back(store: Store, tmp_path: Path) -> None:
    data = data_of(17 * 1024 * KIB + 12_345)
    seen: list[tuple[int, int]] = []
    stored = store.store_file(
        write(tmp_path / "f", data), parity=(10, 2), progress=lambda done, total: seen.append((done, total))
    )
    assert stored.file_hash == sha(data).hex()
    assert seen[-1] == (len(data), len(data))
    assert seen == sorted(seen)
    assert followed(store).content(bytes.fromhex(stored.manifest_hash)) == data


def test_same_content_twice_takes_no_space_twice(store: Store, tmp_path: Path) -> None:
    data = data_of(3_000_000)
    first = store.store_file(write(tmp_path / "a", data))
    before = (blob_files(store.root), owned_bytes(store.root))
    second = store.store_file(write(tmp_path / "b", data))
    assert (blob_files(store.root), owned_bytes(store.root)) == before
    assert (first.already_stored, second.already_stored) == (False, True)
    assert (first.new_bytes, second.new_bytes) == (3_000_000, 0)
    assert first.manifest_hash == second.manifest_hash
    row = store.file(bytes.fromhex(first.file_hash))
    assert row is not None
    assert row.name in ("a", "b")


def test_repeats_within_a_file_are_stored_once(store: Store, tmp_path: Path) -> None:
    chunk = data_of(64 * KIB)
    stored = store.store_file(write(tmp_path / "f", chunk * 40 + b"end"), chunk_size=64 * KIB)
    assert stored.n_chunks == 41
    assert stored.new_bytes == 64 * KIB + 3
    assert followed(store).content(bytes.fromhex(stored.manifest_hash)) == chunk * 40 + b"end"


def test_shared_chunks_of_two_files_are_stored_once(store: Store, tmp_path: Path) -> None:
    a, b, c = (data_of(64 * KIB, i) for i in range(3))
    store.store_file(write(tmp_path / "1", a + b), chunk_size=64 * KIB)
    stored = store.store_file(write(tmp_path / "2", b + c), chunk_size=64 * KIB)
    assert stored.new_bytes == 64 * KIB
    assert store.stats()["stored"] == 3 * 64 * KIB
    assert store.stats()["shared"] == 64 * KIB


def test_in_place_copies_no_data_chunk(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data = data_of(200_000)
    path = write(tmp_path / "f", data)
    stored = store.store_file(path, chunk_size=16 * KIB, in_place=True)
    assert (stored.new_bytes, stored.path) == (0, str(path))
    assert blob_files(store.root) == []
    blob, _, _ = mirror.chunks[sha(data[: 16 * KIB])]
    info = path.stat()
    assert mirror.blobs[blob] == (
        os.fsencode(path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, True,
    )  # fmt: skip
    assert mirror.content(bytes.fromhex(stored.manifest_hash)) == data
    check_replay(store, mirror)


def test_in_place_twice_adds_nothing(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    path = write(tmp_path / "f", data_of(200_000))
    store.store_file(path, in_place=True)
    blobs = dict(mirror.blobs)
    assert store.store_file(path, in_place=True).already_stored
    assert mirror.blobs == blobs


def test_in_place_with_parity_owns_only_the_parity(store: Store, tmp_path: Path) -> None:
    data = data_of(100_000)
    stored = store.store_file(write(tmp_path / "f", data), chunk_size=16 * KIB, parity=(4, 2), in_place=True)
    assert stored.new_bytes == 2 * 16 * KIB + 2 * 16 * KIB
    manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    kinds = [store._core.catalog.extents_of(key)[0][0].kind for key in chunks_of(manifest)]
    assert kinds == [LINKED] * 7 + [OWNED] * 4


def test_copy_is_not_satisfied_by_linked_chunks(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    data = data_of(200_000)
    path = write(tmp_path / "f", data)
    store.store_file(path, in_place=True)
    stored = store.store_file(path)
    assert stored.new_bytes == 200_000
    path.write_bytes(b"edited")
    assert mirror.content(bytes.fromhex(stored.manifest_hash)) == data
    check_replay(store, mirror)


def test_in_place_after_an_edit_replaces_the_old_chunks(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    path = write(tmp_path / "f", data_of(200_000, 1))
    old = store.store_file(path, in_place=True)
    path.write_bytes(data_of(200_000, 2))
    new = store.store_file(path, in_place=True)
    row = store.file(bytes.fromhex(old.file_hash))
    assert row is not None
    assert not row.is_complete
    assert bytes.fromhex(old.file_hash) not in mirror.files
    assert bytes.fromhex(new.file_hash) in mirror.files
    check_replay(store, mirror)


def test_a_second_cutting_of_a_file_is_a_second_manifest(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    path = write(tmp_path / "f", data_of(200_000))
    one = store.store_file(path, chunk_size=16 * KIB)
    two = store.store_file(path, chunk_size=64 * KIB)
    assert one.file_hash == two.file_hash
    assert one.manifest_hash != two.manifest_hash
    manifests = store.manifests_of(bytes.fromhex(one.file_hash))
    assert {m.manifest_hash.hex() for m in manifests} == {one.manifest_hash, two.manifest_hash}
    assert len(store.files()) == 1
    check_replay(store, mirror)


def test_stored_file_has_a_link_that_parses(store: Store, tmp_path: Path) -> None:
    stored = store.store_file(write(tmp_path / "ä b.bin", b"x" * 100))
    link = Link.parse(stored.link)
    assert link.file_hash.hex() == stored.file_hash
    assert link.manifest_hash is not None
    assert link.manifest_hash.hex() == stored.manifest_hash
    assert (link.name, link.size) == ("ä b.bin", 100)


def test_descriptor_of_the_caller_is_read_from_its_start_and_left_open(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "f", data_of(50_000))
    with open(path, "rb") as file:
        os.lseek(file.fileno(), 1000, os.SEEK_SET)
        stored = store.store_file(path, fd=file.fileno(), name="given")
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 1000
    assert (stored.file_hash, stored.name) == (sha(data_of(50_000)).hex(), "given")


def test_in_place_by_descriptor_of_another_file_is_refused(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"one")
    with open(write(tmp_path / "g", b"two"), "rb") as file, pytest.raises(FileChanged, match="another file"):
        store.store_file(path, fd=file.fileno(), in_place=True)
    assert store.files() == []


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(store: Store, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/null")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    with pytest.raises(UsageError):
        store.store_file(path)
    assert store.files() == []


def test_missing_file_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        store.store_file(tmp_path / "absent")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="loop"):
        store.store_file(tmp_path / "loop")


def test_name_with_control_characters_is_kept_escaped(store: Store, tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/a\x1b[2J\xff"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    assert store.store_file(os.fsdecode(raw)).name == "a\\x1b[2J\\xff"


class Meddler(FileSource):
    """A file that something happens to after the first buffer."""

    def __init__(self, path: Path, meddle: object) -> None:
        super().__init__(open_user_file(path), str(path), os.fsencode(path))
        self._meddle = meddle

    def readinto(self, view: memoryview) -> int:
        n = super().readinto(view)
        if callable(self._meddle):
            self._meddle()
            self._meddle = None
        return n


@pytest.mark.parametrize("size", [100_000, 10 << 20])
@pytest.mark.parametrize("change", ["shrink", "grow", "touch", "rewrite"])
def test_file_that_changes_while_it_is_read_stores_nothing(
    store: Store, tmp_path: Path, size: int, change: str
) -> None:
    path = write(tmp_path / "f", data_of(size))

    def meddle() -> None:
        if change == "shrink":
            os.truncate(path, size // 2)
        elif change == "grow":
            with open(path, "ab") as file:
                file.write(b"more")
        elif change == "touch":
            os.utime(path, ns=(1, 1))
        else:
            with open(path, "r+b") as file:
                file.write(b"other")
            os.utime(path, ns=(2, 2))

    source = Meddler(path, meddle)
    try:
        with pytest.raises(FileChanged, match="nothing of it was stored"), Ingest(store._core) as ingest:
            ingest.add(source)
    finally:
        source.close()
    assert store.files() == []
    assert blob_files(store.root) == temps(store.root) == []


def test_file_that_shrank_to_whole_buffers_is_noticed(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "f", data_of(9 << 20))
    source = Meddler(path, lambda: os.truncate(path, 4 << 20))
    try:
        with pytest.raises(FileChanged), Ingest(store._core) as ingest:
            ingest.add(source)
    finally:
        source.close()
    assert temps(store.root) == []


def test_ingest_left_without_publish_leaves_nothing(store: Store) -> None:
    with Ingest(store._core) as ingest:
        ingest.add(BytesSource(data_of(100_000), "bytes"))
        assert len(temps(store.root)) == 1
    assert temps(store.root) == blob_files(store.root) == []
    assert store.stats()["chunks"] == 0


def test_failed_commit_takes_the_blob_away(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "f", data_of(100_000))

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._core.catalog, "put_file", fail)
        with pytest.raises(KeyboardInterrupt):
            store.store_file(path)
    assert blob_files(store.root) == temps(store.root) == []
    assert store.stats()["chunks"] == store.stats()["manifests"] == 0
    assert store.store_file(path).new_bytes == 100_000


def test_owned_blobs_are_read_only_in_private_folders(store: Store, tmp_path: Path) -> None:
    store.store_file(write(tmp_path / "f", data_of(100_000)))
    store.identity()
    (blob,) = blob_files(store.root)
    assert blob.stat().st_mode & 0o777 == 0o400
    assert {folder.stat().st_mode & 0o777 for folder in store.root.rglob("*") if folder.is_dir()} == {0o700}
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert (store.root / "node.key").stat().st_mode & 0o777 == 0o600
    assert (store.root / "catalog.db").stat().st_mode & 0o777 == 0o600


def test_lost_blob_does_not_satisfy_a_new_store(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "f", data_of(100_000))
    store.store_file(path)
    blob_files(store.root)[0].unlink()
    assert store.store_file(path).new_bytes == 100_000
    mirror = Mirror()
    store.load(mirror)
    mirror.check()
    assert len(mirror.files) == 1


def test_a_replay_begins_with_how_much_follows(store: Store, tmp_path: Path) -> None:
    data = data_of(100_000)
    store.store_file(write(tmp_path / "owned", data))
    store.store_file(write(tmp_path / "linked", data + data_of(50_000, 2)), in_place=True)  # shares chunks
    mirror = Mirror()
    store.load(mirror)
    assert mirror.expected == len(mirror.chunks) + len(mirror.manifests) + len(mirror.files) > 0


def test_lost_manifest_is_written_again(store: Store, tmp_path: Path) -> None:
    mirror = followed(store)
    path = write(tmp_path / "f", data_of(100_000))
    stored = store.store_file(path)
    (store.root / "manifests" / stored.manifest_hash[:2] / stored.manifest_hash).unlink()
    store.store_file(path)
    check_replay(store, mirror)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 5, 0], [1, 2, 3], [70_000, 0, 1], [16384, 16384]])
@pytest.mark.parametrize("step", [1, 7, 16384, 1 << 20])
def test_chain_source_joins_files(tmp_path: Path, sizes: list[int], step: int) -> None:
    if step == 1 and sum(sizes) > 1000:
        step = 4099
    paths = [write(tmp_path / str(i), data_of(size, i)) for i, size in enumerate(sizes)]
    parts = [Part(str(path), path.stat().st_size, lambda path=path: open_user_file(path)) for path in paths]
    source = ChainSource(parts, "chain")
    out = b""
    buffer = memoryview(bytearray(step))
    while n := source.readinto(buffer):
        out += buffer[:n]
    source.finish()
    source.close()
    assert out == b"".join(path.read_bytes() for path in paths)
    assert [part.digest for part in parts] == [sha(path.read_bytes()) for path in paths]


def test_chain_source_notices_a_file_that_shrank(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"x" * 100)
    source = ChainSource([Part("f", 200, lambda: open_user_file(path))], "chain")
    with pytest.raises(FileChanged, match="expected 200 B, got 100 B"):
        source.readinto(memoryview(bytearray(500)))
    source.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, PermissionDenied),
        (errno.EPERM, PermissionDenied),
        (errno.EROFS, PermissionDenied),
        (errno.ENOENT, NotFound),
        (errno.ELOOP, UsageError),
        (errno.ENAMETOOLONG, UsageError),
        (errno.EIO, StoreError),
    ],
)
def test_os_errors_are_translated_and_name_the_path(code: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"/a\\x1b/b.*reading it") as caught, os_errors("/a\x1b/b", "reading it"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is error


def test_failed_flush_on_the_way_stores_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write(tmp_path / "f", data_of(20 << 20))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StoreError, match="Input/output error while writing chunks"):
            store.store_file(path)
    assert len(calls) == 1
    assert blob_files(store.root) == temps(store.root) == store.files() == []
    assert store.store_file(path).new_bytes == 20 << 20
