"""What every part of the store shares: folder, catalog, listener, open blobs, and reading what lies in them.

Owns: a small cache of open blob descriptors; the checks that a blob is still what the catalog says.
Never: decides what to keep (maintain.py) or writes chunks (ingest.py).
"""

from __future__ import annotations

import logging
import os
import stat
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastcas.errors import FastCASError, ManifestCorrupt
from fastcas.hashing import sha256
from fastcas.ids import short
from fastcas.metadata import Manifest
from fastcas.store.catalog import GROWING, LINKED, MANIFEST, OWNED, BlobRow, Catalog, ManifestRow
from fastcas.store.paths import MANIFEST_DIR, Folder, os_errors, shown
from fastcas.store.types import Identity, StoreListener

__all__ = ["Core", "News", "identity_of", "manifest_name"]

log = logging.getLogger(__name__)
OPEN_BLOBS = 32


def identity_of(info: os.stat_result) -> Identity:
    """Return the identity in a stat result."""
    return Identity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def manifest_name(manifest_hash: bytes) -> str:
    """Return where a manifest's bytes lie below the root."""
    text = manifest_hash.hex()
    return f"{MANIFEST_DIR}/{text[:2]}/{text}"


@dataclass(frozen=True, slots=True)
class News:
    """A blob with chunks, (hash, offset, length) each, that a commit made live."""

    blob: BlobRow
    rows: list[tuple[bytes, int, int]]
    is_new: bool = True


class Core:
    """Folder, catalog and listener of one open store."""

    def __init__(self, folder: Folder, catalog: Catalog) -> None:
        self.folder = folder
        self.catalog = catalog
        self.listener: StoreListener | None = None
        self.room: Callable[[], int | None] = lambda: None  # bytes that the quota leaves, None: any number
        self.took: Callable[[int], None] = lambda n: None  # tells the quota of bytes written without `Quota.admit`
        self._open: OrderedDict[int, int] = OrderedDict()

    def close(self) -> None:
        """Close every descriptor and the catalog."""
        while self._open:
            os.close(self._open.popitem()[1])
        self.catalog.close()

    # --- blobs ---

    def path_of(self, blob: BlobRow) -> bytes:
        """Return a blob's absolute path."""
        if blob.kind in (LINKED, GROWING):
            return blob.path
        return os.path.join(os.fsencode(self.folder.root), blob.path)

    def stat_of(self, blob: BlobRow) -> os.stat_result | None:
        """Return the stat of a blob's file if it is there, regular, and still fit to hold its extents."""
        try:
            if blob.kind in (LINKED, GROWING):
                info = os.stat(blob.path)
            else:
                info = os.stat(blob.path, dir_fd=self.folder.fd, follow_symlinks=False)
        except OSError:
            return None
        return info if stat.S_ISREG(info.st_mode) and self.fits(blob, info) else None

    def fits(self, blob: BlobRow, info: os.stat_result) -> bool:
        """Whether a stat result belongs to the blob: a user's file unchanged, an owned one long enough."""
        if blob.kind == LINKED:
            return identity_of(info) == blob.identity
        if blob.kind == GROWING:
            return (info.st_dev, info.st_ino) == (blob.identity.device, blob.identity.inode)
        return info.st_size >= blob.size

    def open_blob(self, blob: BlobRow) -> int | None:
        """Return a cached descriptor of a blob whose file still fits, else None. The cache closes it."""
        fd = self._open.get(blob.number)
        if fd is None:
            try:
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                if blob.kind in (LINKED, GROWING):
                    fd = os.open(blob.path, flags)
                else:
                    fd = os.open(blob.path, flags | os.O_NOFOLLOW, dir_fd=self.folder.fd)
            except OSError as exc:
                log.warning("blob cannot be opened blob=%d error=%s", blob.number, exc.strerror)
                return None
            self._open[blob.number] = fd
            while len(self._open) > OPEN_BLOBS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(blob.number)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or not self.fits(blob, info):
            self.forget_fd(blob.number)
            return None
        return fd

    def forget_fd(self, number: int) -> None:
        """Close the cached descriptor of a blob, if there is one."""
        fd = self._open.pop(number, None)
        if fd is not None:
            os.close(fd)

    def read_extent(self, blob: BlobRow, offset: int, length: int) -> bytes | None:
        """Return the bytes of an extent, None if they cannot be read whole. Not checked against any hash."""
        fd = self.open_blob(blob)
        if fd is None:
            return None
        try:
            data = os.pread(fd, length, offset)
        except OSError as exc:
            log.warning("extent cannot be read blob=%d offset=%d error=%s", blob.number, offset, exc.strerror)
            return None
        return data if len(data) == length else None

    def read_chunk(self, key: bytes) -> bytes | None:
        """Return a chunk's bytes from any extent whose bytes hash right."""
        for blob, offset, length in self.catalog.extents_of(key):
            data = self.read_extent(blob, offset, length)
            if data is not None and sha256(data) == key:
                return data
        return None

    def owned_good(self, key: bytes) -> bool:
        """Whether an owned blob holds the chunk with the right bytes."""
        for blob, offset, length in self.catalog.extents_of(key):
            if blob.kind == OWNED:
                data = self.read_extent(blob, offset, length)
                if data is not None and sha256(data) == key:
                    return True
        return False

    # --- manifests ---

    def load_manifest(self, row: ManifestRow) -> Manifest:
        """Read and check a manifest's bytes.

        Raises:
            ManifestCorrupt: They are not what their hash says.
        """
        name = manifest_name(row.hash)
        fd = self.folder.open(name)
        try:
            with os_errors(self.folder.path(name), "reading it"):
                data = os.pread(fd, row.length + 1, 0)
        finally:
            os.close(fd)
        if len(data) != row.length or sha256(data) != row.hash:
            raise ManifestCorrupt(
                f"manifest {short(row.hash)}: {shown(self.folder.path(name))} is damaged "
                f"({len(data)} B, expected {row.length} B); `fastcas verify --repair` may fetch it, "
                f"`fastcas rm {row.file_hash.hex()}` gives the file up"
            )
        return Manifest.decode(data)

    def try_manifest(self, row: ManifestRow) -> Manifest | None:
        """Return a manifest, or None with a warning in the log when it cannot be read."""
        try:
            return self.load_manifest(row)
        except FastCASError as exc:
            log.warning("manifest cannot be read manifest=%s error=%s", short(row.hash), exc)
            return None

    def write_manifest(self, manifest: Manifest) -> str:
        """Write a manifest's bytes durably; returns the name below the root."""
        name = manifest_name(manifest.manifest_hash)
        self.folder.write_file(MANIFEST_DIR, name, manifest.data, 0o400)
        return name

    def insert_manifest(self, manifest: Manifest, *, complete: bool, written: bool) -> ManifestRow:
        """Insert the rows of a manifest; inside a transaction.

        Args:
            complete: Every data chunk has an extent.
            written: Its file was just written, so that it needs a blob number of its own.
        """
        path = os.fsencode(manifest_name(manifest.manifest_hash))
        length = len(manifest.data)
        if written:
            self.catalog.execute("DELETE FROM blobs WHERE path=?", (path,))
        blob = None if written else self.catalog.blob_at(path)
        number = blob.number if blob else self.catalog.add_blob(MANIFEST, path, Identity(0, 0, length, 0))
        row = ManifestRow(
            manifest.manifest_hash, manifest.file_hash, number, length, manifest.chunk_size, manifest.n_chunks,
            manifest.n_parity, complete,
        )  # fmt: skip
        self.catalog.put_manifest(row)
        return row

    # --- telling the listener ---

    def say_blob(self, blob: BlobRow) -> bool:
        """Report a blob; returns False (and reports nothing) if its file does not fit any more."""
        info = self.stat_of(blob)
        if info is None:
            return False
        if self.listener is not None:
            size = info.st_size if blob.kind == LINKED else blob.size
            self.listener.on_blob(
                blob.number, self.path_of(blob), info.st_dev, info.st_ino, size, info.st_mtime_ns, blob.kind == LINKED
            )
        return True

    def say_chunks(self, blob: int, rows: Sequence[tuple[bytes, int, int]]) -> None:
        """Report (hash, offset, length) rows of one blob."""
        if self.listener is not None and rows:
            keys, offsets, lengths = zip(*rows, strict=True)
            self.listener.on_chunks(blob, b"".join(keys), array("Q", offsets), array("I", lengths))

    def say_news(self, news: Iterable[News]) -> None:
        """Report what a commit made live."""
        for item in news:
            if item.is_new:
                self.say_blob(item.blob)
            self.say_chunks(item.blob.number, item.rows)

    def say_manifest(self, row: ManifestRow, *, new_blob: bool = True) -> bool:
        """Report a manifest and the blob that it is; returns False if its file is gone.

        Files that were served under it are reported again by the caller: `say_files_of`.
        """
        if new_blob:
            blob = self.catalog.blob(row.blob)
            if blob is None or not self.say_blob(blob):
                return False
        if self.listener is not None:
            self.listener.on_manifest(row.hash, row.blob, 0, row.length)
        return True

    def say_files_of(self, row: ManifestRow) -> None:
        """Report the file that is served under a complete manifest whose place changed."""
        if self.listener is not None and row.complete:
            for (file_hash,) in self.catalog.query("SELECT hash FROM files WHERE manifest=?", (row.hash,)):
                self.listener.on_file(file_hash, row.hash)

    def say_moved_or_lost(self, keys: Iterable[bytes]) -> list[bytes]:
        """Report chunks that lost an extent: their next best place, or that there is none. Returns the lost ones."""
        lost = []
        for key in dict.fromkeys(keys):
            for blob, offset, length in self.catalog.extents_of(key):
                if self.stat_of(blob) is not None:
                    self.say_chunks(blob.number, [(key, offset, length)])
                    break
            else:
                lost.append(key)
        if lost and self.listener is not None:
            self.listener.on_chunks_removed(b"".join(lost))
        return lost

    def owned_intact(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return which keys lie in owned blobs whose files still fit."""
        found = self.catalog.owned(keys)
        good = {}
        for number in set(found.values()):
            blob = self.catalog.blob(number)
            good[number] = blob is not None and blob.kind == OWNED and self.stat_of(blob) is not None
        return {key for key, number in found.items() if good[number]}
