"""Helpers of the store's tests: a listener that mirrors what is live and checks the rules, and damage on disk."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcas.metadata import Manifest
from fastcas.store import Store

KIB = 1 << 10
UNIT = 16 * KIB
INTERESTING_SIZES = (0, 1, 16383, 16384, 16385, 3 * 16384, 3 * 16384 + 7, 65535, 65536, 65537, 5 * 65536, 300_001)


def data_of(size: int, seed: int = 1) -> bytes:
    """Bytes that do not repeat, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Mirror:
    """A listener that keeps what it was told and fails on anything a chunk table could not follow."""

    def __init__(self) -> None:
        self.blobs: dict[int, tuple[bytes, int, int, int, int, bool]] = {}
        self.ever: set[int] = set()
        self.chunks: dict[bytes, tuple[int, int, int]] = {}
        self.manifests: dict[bytes, tuple[int, int, int]] = {}
        self.files: dict[bytes, bytes] = {}
        self.n_calls = 0
        self.expected = 0

    def on_load(self, n: int) -> None:
        assert not self.ever, "too late to make room"
        self.expected = n

    def on_blob(
        self, number: int, path: bytes, device: int, inode: int, size: int, mtime_ns: int, linked: bool
    ) -> None:
        assert number not in self.ever, f"blob {number} reported twice"
        assert os.path.isabs(path)
        self.ever.add(number)
        self.blobs[number] = (path, device, inode, size, mtime_ns, linked)

    def on_chunks(self, blob: int, keys: bytes, offsets: array[int], lengths: array[int]) -> None:
        self.n_calls += 1
        assert blob in self.blobs
        assert len(keys) == 32 * len(offsets) == 32 * len(lengths)
        for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            assert offset + length <= self.blobs[blob][3]
            self.chunks[keys[32 * i : 32 * i + 32]] = (blob, offset, length)

    def on_manifest(self, manifest_hash: bytes, blob: int, offset: int, length: int) -> None:
        assert blob in self.blobs
        if self.manifests.get(manifest_hash) != (blob, offset, length):
            # A file's entry names the place of its manifest, so it has to be reported again.
            self.files = {key: value for key, value in self.files.items() if value != manifest_hash}
        self.manifests[manifest_hash] = (blob, offset, length)

    def on_file(self, file_hash: bytes, manifest_hash: bytes) -> None:
        assert manifest_hash in self.manifests
        self.files[file_hash] = manifest_hash

    def on_chunks_removed(self, keys: bytes) -> None:
        for at in range(0, len(keys), 32):
            self.chunks.pop(keys[at : at + 32], None)

    def on_blob_removed(self, number: int) -> None:
        self.blobs.pop(number, None)

    def on_manifest_removed(self, manifest_hash: bytes) -> None:
        self.manifests.pop(manifest_hash, None)

    def on_file_removed(self, file_hash: bytes) -> None:
        self.files.pop(file_hash, None)

    def read(self, place: tuple[int, int, int]) -> bytes:
        """What a worker would send."""
        blob, offset, length = place
        with open(self.blobs[blob][0], "rb") as file:
            file.seek(offset)
            return file.read(length)

    def check(self) -> None:
        """Everything that is live reads back as its own name, and every file is whole."""
        for key, place in self.chunks.items():
            assert sha(self.read(place)) == key
        for key, place in self.manifests.items():
            assert sha(self.read(place)) == key
        for file_hash, manifest_hash in self.files.items():
            assert sha(self.content(manifest_hash)) == file_hash

    def content(self, manifest_hash: bytes) -> bytes:
        """A file's bytes, as a client would put them together."""
        manifest = Manifest.decode(self.read(self.manifests[manifest_hash]))
        return b"".join(self.read(self.chunks[manifest.hash_of(i)]) for i in range(manifest.n_chunks))


def followed(store: Store) -> Mirror:
    """Attach a mirror that starts with what is live."""
    mirror = Mirror()
    store.load(mirror)
    store.listener = mirror
    return mirror


def check_replay(store: Store, mirror: Mirror) -> None:
    """A replay says the same as what was said step by step."""
    fresh = Mirror()
    store.load(fresh)
    assert fresh.expected >= len(fresh.chunks) + len(fresh.manifests) + len(fresh.files)
    assert fresh.chunks.keys() == mirror.chunks.keys()
    assert fresh.manifests.keys() == mirror.manifests.keys()
    assert fresh.files == mirror.files
    fresh.check()
    mirror.check()


def blob_files(root: Path) -> list[Path]:
    """Every owned blob on disk."""
    return sorted(root.glob("hashed_files/??/*.blob"))


def temps(root: Path) -> list[Path]:
    """Temporary files that were left behind."""
    return [path for path in root.rglob(".tmp-*") if path.is_file()]


def owned_bytes(root: Path) -> int:
    """Disk blocks that the owned blobs take, in bytes."""
    return sum(path.stat().st_blocks * 512 for path in blob_files(root))


def flip(path: Path | str, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file, whatever its mode."""
    path = Path(path)
    mode = path.stat().st_mode
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
    path.chmod(mode)


def chunks_of(manifest: Manifest) -> Iterator[bytes]:
    """Every chunk hash, data then parity."""
    return (manifest.hash_of(i) for i in range(manifest.n_total))


def put(
    store: Store, folder: Path, n_chunks: int, parity: tuple[int, int] | None = None, **options: Any
) -> tuple[bytes, Manifest]:
    """Store a file of `n_chunks` chunks of UNIT bytes, the last one short; return its bytes and its manifest."""
    data = data_of(n_chunks * UNIT - 5, n_chunks)
    path = folder / f"f{n_chunks}"
    path.write_bytes(data)
    stored = store.store_file(path, **{"chunk_size": UNIT, "parity": parity, **options})
    manifest = store.manifest(bytes.fromhex(stored.manifest_hash))
    assert manifest is not None
    return data, manifest


def counted_files(root: Path) -> dict[int, int]:
    """What counts against a quota: disk blocks in bytes by inode. Raises FileNotFoundError if something goes away."""
    trees = ("hashed_files", "manifests", "quarantine")
    files = (path for tree in trees for path in (root / tree).rglob("*") if not path.name.startswith("catalog-"))
    infos = [path.lstat() for path in files]
    return {info.st_ino: info.st_blocks * 512 for info in infos if stat.S_ISREG(info.st_mode)}


def disk_bytes(root: Path) -> int:
    """The bytes on disk that count against a quota."""
    return sum(counted_files(root).values())
