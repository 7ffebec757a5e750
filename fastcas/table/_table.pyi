"""The chunk table (csrc/table/table.h): hashes to places on disk, in shared memory.

One writer, any number of lock-free readers in any process. A table has a fixed size; `fastcas.table.owner`
grows it by making new ones. Descriptors that are passed in are borrowed: they may be closed after the call.

All methods raise UsageError on a closed view or a malformed argument, OverflowError where a number does not fit
its field. `key` is always 32 bytes.
"""

from typing import TypeAlias, final

from fastcas.table.entries import BlobEntry

Place: TypeAlias = tuple[int, int, int]  # blob number, offset, length in bytes
Bytes: TypeAlias = bytes | bytearray | memoryview

class _View:
    @property
    def fd(self) -> int:
        """Descriptor of the memfd, the view's own; -1 once closed."""
    @property
    def n_slots(self) -> int:
        """Slots, used or not."""
    @property
    def n_blobs(self) -> int:
        """Capacity of the blob directory: numbers below it can be put."""
    @property
    def heap_size(self) -> int:
        """Bytes for all paths together."""
    @property
    def n_live(self) -> int:
        """Entries that can be found: chunks, manifests and files."""
    @property
    def n_tombstones(self) -> int:
        """Slots that were removed or replaced; they stay used."""
    @property
    def epoch(self) -> int:
        """The current epoch (counters.h says what it is for)."""
    def lookup_chunk(self, key: Bytes) -> Place | None:
        """Return where a chunk lies, or None. Cost: one or two cache misses."""
    def lookup_manifest(self, key: Bytes) -> Place | None:
        """Return where a manifest lies, or None."""
    def lookup_file(self, key: Bytes) -> tuple[bytes, Place] | None:
        """Return the hash and the place of a file's manifest, or None."""
    def lookup_many(self, keys: Bytes) -> int:
        """Return how many of the chunks in `keys` (uint8[n * 32]) are there.

        Cost: about 50 ns per key at 1 M chunks (bench/table.py); releases the GIL.
        """
    def blob(self, number: int) -> BlobEntry | None:
        """Return a blob's entry, or None when there is no live one of that number."""
    def close(self) -> None:
        """Unmap. Idempotent.

        Raises:
            UsageError: A batch is running in another thread; nothing was closed.
        """

@final
class TableReader(_View):
    def __init__(self, fd: int) -> None:
        """Map the table in `fd` read-only.

        Raises:
            LocalProtocolError: Not a chunk table, another format version, or a memfd that can still shrink.
            OSError: Not a memfd, or no memory.
        """

@final
class ChunkTable(_View):
    """The writer's view. Not for several threads at once; one process."""

    def __init__(
        self, n_slots: int = 1024, n_blobs: int = 256, heap_size: int = 65536, *, secret: bytes | None = None
    ) -> None:
        """Make an empty table in a new memfd, sealed so that only this view writes it.

        Args:
            n_slots: 64..2^32; 48 B each.
            n_blobs: 1..2^28; 64 B each, where used.
            heap_size: Bytes for paths, at most 2^40.
            secret: 16 bytes that key the slot hash; random by default.
        """
    @property
    def heap_used(self) -> int:
        """Bytes of the path heap in use, withdrawn blobs included."""
    def put_chunk(self, key: Bytes, blob: int, offset: int, length: int) -> None:
        """Insert a chunk, or replace its place; `length` at most 16 MiB.

        Raises:
            TableFull: 7/8 of the slots are live or tombstones; nothing changed.
        """
    def put_chunks(self, keys: Bytes, blob: int, offsets: object, lengths: object) -> None:
        """Insert many chunks of one blob.

        Args:
            keys: uint8[n * 32].
            offsets: uint64[n], C-contiguous (`array("Q")`).
            lengths: uint32[n], C-contiguous (`array("I")`).
        Raises:
            TableFull: As put_chunk; the chunks before the one that did not fit are in.
        Cost: no allocation; releases the GIL.
        """
    def put_manifest(self, key: Bytes, blob: int, offset: int, length: int) -> None:
        """Insert a manifest, or replace its place; files that point to it follow. Raises TableFull."""
    def put_file(self, file_hash: Bytes, manifest_hash: Bytes) -> None:
        """Let `file_hash` lead to a manifest, in place of the one before. Raises TableFull.

        Raises:
            UsageError: The manifest is not in the table.
        """
    def remove_chunk(self, key: Bytes) -> bool:
        """Leave a tombstone; False when it was not there."""
    def remove_manifest(self, key: Bytes) -> bool:
        """Leave a tombstone; files that lead to it are not found until it is put again."""
    def remove_file(self, key: Bytes) -> bool:
        """Leave a tombstone; False when it was not there."""
    def put_blob(
        self,
        number: int,
        path: bytes,
        *,
        device: int,
        inode: int,
        size: int,
        mtime_ns: int,
        linked: bool = False,
        growing: bool = False,
    ) -> None:
        """Register a blob.

        Raises:
            UsageError: The number was used in this table before, or path is empty, has a NUL or over 4096 bytes.
            TableFull: Directory or heap.
        """
    def remove_blob(self, number: int) -> bool:
        """Withdraw a blob; its number cannot be used again in this table. Entries that name it stay."""
    def blob_was_used(self, number: int) -> bool:
        """Return whether the number is or was registered in this table, so that it cannot be put again."""
    def blob_usage(self) -> tuple[int, int]:
        """Return one more than the highest live blob number, and the bytes of all live paths. One pass."""
    def advance(self) -> int:
        """Advance the epoch and return it: what was removed before is out of reach for lookups in it."""
    def copy_from(self, other: _View, *, without_blob: int | None = None) -> None:
        """Copy all live entries of another table into this empty one, and its epoch.

        Args:
            without_blob: Leave this blob's directory entry out, so that its number can be put anew.
        Raises:
            TableFull: Too small; this table is to be thrown away.
        Cost: one pass; releases the GIL.
        """
