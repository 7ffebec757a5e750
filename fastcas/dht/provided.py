"""What this node itself has to offer: chunk keys, files with their thousandths, metadata records. Nothing expires.

Chunk keys are kept as the sorted top 64 bits of the chunk hashes: that is what is announced, and it is enough to
order them by distance. Answers about these keys carry the "self" marker: whoever asks uses the address that
the answer came from.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastcas.dht.records import MetadataRecord

__all__ = ["OwnFile", "Provided", "chunk_key", "metadata_key", "swarm_key"]

U64 = npt.NDArray[np.uint64]


def chunk_key(chunk_hash: bytes) -> int:
    """Return the 64-bit key of a chunk: the first 8 bytes of its hash, so that hash order is DHT order."""
    return int.from_bytes(chunk_hash[:8])


def swarm_key(file_hash: bytes) -> bytes:
    """Return the 20-byte key under which the peers of a file are found."""
    return hashlib.sha256(b"fc1:swarm:" + file_hash).digest()[:20]


def metadata_key(file_hash: bytes) -> bytes:
    """Return the 20-byte key of a file's metadata: `digest("file_metadata:<hex>")` of the kademlia package."""
    return hashlib.sha1(b"file_metadata:" + file_hash.hex().encode("ascii"), usedforsecurity=False).digest()


def keys_of(hashes: bytes) -> U64:
    """Return the distinct sorted 64-bit keys of 32-byte hashes, back to back."""
    rows = np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32)[:, :8]
    return np.unique(np.ascontiguousarray(rows).view(">u8").ravel().astype(np.uint64))


@dataclass(slots=True)
class OwnFile:
    """A file that this node announces."""

    file_hash: bytes
    have: int


class Provided:
    """Chunk keys, files and metadata of this node; `data_port` 0 means that it serves nothing."""

    def __init__(self) -> None:
        """Offer nothing yet."""
        self.data_port = 0
        self.snapshot: U64 = np.zeros(0, dtype=np.uint64)
        self.extra: U64 = np.zeros(0, dtype=np.uint64)
        self.files: dict[bytes, OwnFile] = {}
        self.metadata: dict[bytes, MetadataRecord] = {}
        self._all = (self.snapshot, self.extra, self.snapshot)

    @property
    def chunk_keys(self) -> U64:
        """All chunk keys, sorted. Cost: a merge after a change, else nothing."""
        snapshot, extra, both = self._all
        if snapshot is not self.snapshot or extra is not self.extra:
            both = np.union1d(self.snapshot, self.extra) if len(self.extra) else self.snapshot
            self._all = (self.snapshot, self.extra, both)
        return both

    def has_chunk(self, key: int) -> bool:
        """Whether this node serves a chunk. Cost: two binary searches."""
        return bool(self.data_port) and (_contains(self.snapshot, key) or _contains(self.extra, key))

    def have_of(self, key: bytes) -> int | None:
        """Return the thousandths that this node has of the file under a swarm key, or None."""
        own = self.files.get(key)
        return own.have if own is not None and self.data_port else None


def _contains(keys: U64, key: int) -> bool:
    at = int(np.searchsorted(keys, np.uint64(key)))
    return at < len(keys) and int(keys[at]) == key
