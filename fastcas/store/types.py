"""What the store hands out: values, reports, and the listener that mirrors it into the chunk table.

Hashes are 32 bytes, except in `StoredFile`, which goes to people and is all strings.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

__all__ = [
    "Damage",
    "Extent",
    "FileRow",
    "GcReport",
    "Identity",
    "MigrateReport",
    "Progress",
    "RebuildReport",
    "StoreListener",
    "StoredFile",
    "VerifyReport",
    "Wanted",
]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes total), at most once per buffer of some MiB."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What `store_file`, `store_tree` and `register_linked` say about a file.

    Attributes:
        file_hash: SHA-256 of the content, 64 hex digits.
        manifest_hash: SHA-256 of its manifest, 64 hex digits.
        link: fastcas:// link without peers.
        name: The name it was stored under.
        size: Bytes of content; for a directory, of all its files together.
        chunk_size: Bytes per chunk; cut by content: of the longest that there may be.
        n_chunks: Data chunks.
        n_parity: Parity chunks.
        new_bytes: Bytes of chunks that owned blobs got, copied or cloned.
        cloned_bytes: Bytes of these that share the blocks of the user's file on disk (reflink).
        already_stored: The store held exactly this before; nothing but the name was added.
        is_collection: The file is a directory's collection.
        path: The user's file for one that is seeded in place, else None.
        chunking: "fixed", or "cdc": cut by content.
    """

    file_hash: str
    manifest_hash: str
    link: str
    name: str
    size: int
    chunk_size: int
    n_chunks: int
    n_parity: int
    new_bytes: int
    already_stored: bool
    is_collection: bool
    path: str | None
    cloned_bytes: int = 0
    chunking: str = "fixed"


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one chunk lies: blob number, byte offset and length in bytes."""

    blob: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Identity:
    """What must stay the same for a linked file's chunks to be believed."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file that the store knows.

    Attributes:
        file_hash: SHA-256 of the content, 32 bytes.
        manifest_hash: The manifest it is served under, 32 bytes.
        name: The latest name, "" for a member of a collection that was never stored by itself.
        size: Bytes of content.
        chunk_size: Bytes per chunk.
        n_chunks: Data chunks.
        n_parity: Parity chunks.
        stored_at: Seconds since 1970.
        is_collection: The content is a collection.
        pinned: Never evicted.
        is_complete: Every data chunk has an extent.
        is_member: Belongs to a collection of this store.
        link: fastcas:// link without peers.
        path: The user's file where it is seeded in place, else None.
    """

    file_hash: bytes
    manifest_hash: bytes
    name: str
    size: int
    chunk_size: int
    n_chunks: int
    n_parity: int
    stored_at: int
    is_collection: bool
    pinned: bool
    is_complete: bool
    is_member: bool
    link: str
    path: str | None


@dataclass(slots=True)
class GcReport:
    """What `gc` freed: chunks and bytes without a manifest, blobs unlinked, holes punched, manifests dropped."""

    chunks: int = 0
    bytes_freed: int = 0
    blobs_unlinked: int = 0
    holes_punched: int = 0
    manifests: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that `verify` found wrong.

    Attributes:
        kind: "chunk", "manifest", "index" (a blob's own table of contents), or "missing" (no extent at all).
        hash: The chunk's or manifest's hash; for "index" empty.
        path: The file on disk, escaped for a terminal; "" for "missing".
        offset: Byte offset in that file.
        length: Bytes.
        reason: What was found.
        repaired_by: "copy", "parity", "peer", "catalog", or "" when it is still damaged.
    """

    kind: str
    hash: bytes
    path: str
    offset: int
    length: int
    reason: str
    repaired_by: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a verification would like to have from others.

    Attributes:
        hash: Of the chunk or manifest.
        length: Bytes.
        file_hash: A file that it belongs to, where one is known.
        is_manifest: It is a manifest.
    """

    hash: bytes
    length: int
    file_hash: bytes | None
    is_manifest: bool


@dataclass(slots=True)
class VerifyReport:
    """What `verify` read and found. `is_clean` is False while damage remains unrepaired.

    Attributes:
        chunks, bytes, manifests: What was checked, before an interruption, too.
        damages: What was found since the last interruption.
        repaired_before: Damages that were found and repaired before it.
        resumed_bytes: Bytes that were checked before it.
    """

    chunks: int = 0
    bytes: int = 0
    manifests: int = 0
    damages: list[Damage] = field(default_factory=list)
    repaired_before: int = 0
    resumed_bytes: int = 0

    @property
    def n_damaged(self) -> int:
        """Everything found damaged, repaired or not."""
        return len(self.damages) + self.repaired_before

    @property
    def n_repaired(self) -> int:
        """How much of it is whole again."""
        return sum(1 for damage in self.damages if damage.repaired_by) + self.repaired_before

    @property
    def is_clean(self) -> bool:
        """Nothing damaged is left."""
        return self.n_repaired == self.n_damaged


@dataclass(slots=True)
class MigrateReport:
    """What `migrate` took over, and what it left out: (subject, reason) each, escaped for a terminal."""

    files: list[StoredFile] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0


@dataclass(slots=True)
class RebuildReport:
    """What `rebuild` found.

    Attributes:
        files, incomplete, manifests, blobs, chunks, bytes: What the new catalog has; chunks and bytes of owned blobs.
        left_out: (path, reason) of blobs and manifests that are damaged or of no use, escaped for a terminal.
        old_catalog: Where the old catalog is kept, None if there was none.
    """

    files: int = 0
    incomplete: int = 0
    manifests: int = 0
    blobs: int = 0
    chunks: int = 0
    bytes: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)
    old_catalog: str | None = None


class StoreListener(Protocol):
    """Follows what is live. Called in the store's thread, after the commit; must not call the store back."""

    def on_load(self, n: int) -> None:
        """About n chunks, manifests and files in all are reported next."""

    def on_blob(
        self, number: int, path: bytes, device: int, inode: int, size: int, mtime_ns: int, linked: bool
    ) -> None:
        """A blob can be read at an absolute path. An owned blob is at least `size` bytes long."""

    def on_chunks(self, blob: int, keys: bytes, offsets: array[int], lengths: array[int]) -> None:
        """Chunks (32 bytes of `keys` each) lie in `blob`; replaces what was said about them before."""

    def on_manifest(self, manifest_hash: bytes, blob: int, offset: int, length: int) -> None:
        """A manifest's bytes lie there."""

    def on_file(self, file_hash: bytes, manifest_hash: bytes) -> None:
        """A file is complete under a manifest that was reported before."""

    def on_chunks_removed(self, keys: bytes) -> None:
        """These chunks lie nowhere any more."""

    def on_blob_removed(self, number: int) -> None:
        """A blob must not be read any more."""

    def on_manifest_removed(self, manifest_hash: bytes) -> None:
        """A manifest is gone."""

    def on_file_removed(self, file_hash: bytes) -> None:
        """A file is gone, or no longer complete."""
