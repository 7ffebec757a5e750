"""The part file: where a download's chunks lie until it is finished, and how it becomes the file.

`NAME.fastcas-part` beside the destination, preallocated, with its journal; finished by fsync, rename (never over
another file unless forced) and fsync of the folder. Owns both files; OSError is translated here. Every method
blocks on the disk: call them off the loop.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from fastcas.errors import (
    DestinationExists,
    FastCASError,
    PermissionDenied,
    StoreError,
    StoreFull,
    StoreLocked,
    UsageError,
)
from fastcas.fetch._receiver import rename_noreplace
from fastcas.fetch.journal import Journal, Listed
from fastcas.ids import escape_for_terminal, short
from fastcas.limits import NAME_BYTES_MAX
from fastcas.metadata import Manifest

__all__ = [
    "PART_SUFFIX",
    "PartFile",
    "clear_leftovers",
    "has_content",
    "prepare_folder",
    "safe_name",
    "storage_error",
]

PART_SUFFIX = ".fastcas-part"
JOURNAL_SUFFIX = ".fastcas-journal"
READ_B = 1 << 20


def storage_error(exc: OSError, subject: str, consequence: str) -> FastCASError:
    """Return the typed error of a failed disk operation, "<subject>: <reason>; <consequence>"."""
    text = f"{subject}: {os.strerror(exc.errno or 0)}; {consequence}"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(text)
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(text)
    if exc.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return UsageError(text)
    return StoreError(text)


def safe_name(name: str | None, fallback: str) -> str:
    """Return a name from the network as a single path component: what it cannot be is replaced, never obeyed."""
    text = (name or "").replace("\\", "/").rsplit("/", 1)[-1].replace("\0", "")
    text = escape_for_terminal(text).replace("\\", "_").strip(" ")
    room = NAME_BYTES_MAX - len(JOURNAL_SUFFIX)
    text = os.fsencode(text)[:room].decode(errors="ignore") if len(os.fsencode(text)) > room else text
    return fallback if text in ("", ".", "..") else text


def prepare_folder(folder: Path) -> None:
    """Create the destination's folder where it is missing.

    Raises:
        UsageError: The path leads through something that is no folder.
        PermissionDenied, StoreFull, StoreError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise UsageError(f"{folder}: expected a folder; nothing was fetched") from exc
    except OSError as exc:
        raise storage_error(exc, str(folder), "nothing was fetched") from exc


def has_content(path: Path, file_hash: bytes) -> bool | None:
    """Whether the regular file at `path` has this content; None when nothing is there. Reads it once.

    Raises:
        DestinationExists: Something else than a regular file is there.
        PermissionDenied, StoreError: It cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise DestinationExists(f"{path}: a dangling symbolic link; it was left alone") from None
        return None
    except OSError as exc:
        raise storage_error(exc, str(path), "it was left alone") from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DestinationExists(f"{path}: exists and is no regular file; it was left alone")
        digest = hashlib.sha256()
        buffer = bytearray(READ_B)
        with os.fdopen(os.dup(fd), "rb", buffering=0) as file:
            while n := file.readinto(buffer):
                digest.update(memoryview(buffer)[:n])
        return digest.digest() == file_hash
    except OSError as exc:
        raise storage_error(exc, str(path), "it was left alone") from exc
    finally:
        os.close(fd)


def clear_leftovers(out: Path) -> None:
    """Remove what a download leaves beside its finished file when it is killed between the rename and the end.

    A part file with bytes of its own, and whatever a running download holds, is left alone.
    """
    part, journal = out.with_name(out.name + PART_SUFFIX), out.with_name(out.name + JOURNAL_SUFFIX)
    with suppress(OSError, StoreLocked):
        if not journal.exists() or (part.exists() and not part.samefile(out)):
            return
        lock = Journal(journal, bytes(32))
        try:
            part.unlink(missing_ok=True)
            lock.remove()
        finally:
            lock.close()


class PartFile:
    """One destination being filled. `fd` is open until `close`.

    `direct_fd` is the same file past the page cache, -1 where that is not wanted or not possible.
    """

    def __init__(self, out: Path, manifest: Manifest, *, is_direct: bool = False) -> None:
        """Open (or create) the part file and its journal, and preallocate.

        Args:
            out: The destination.
            manifest: What is fetched.
            is_direct: Open `direct_fd`, too: a big file that nobody reads at once must not evict what others read.
        Raises:
            StoreLocked: Another download writes the same destination.
            StoreFull: No room; what was there is kept.
            PermissionDenied, StoreError: The folder refuses.
        """
        self.out = out
        self.path = out.with_name(out.name + PART_SUFFIX)
        self._manifest = manifest
        self.fd = -1
        self.direct_fd = -1
        self.parity_fd = -1
        self.candidates: dict[int, bool] = {}
        self.same_boot = False
        try:
            self.journal = Journal(out.with_name(out.name + JOURNAL_SUFFIX), manifest.manifest_hash)
        except OSError as exc:
            raise storage_error(exc, str(out), "nothing was fetched") from exc
        try:
            self._open()
            if is_direct:
                self.direct_fd = self._open_direct()
        except OSError as exc:
            self.close()
            raise storage_error(
                exc, f"{self.path}: {manifest.size} B", "the part file is kept and can be resumed"
            ) from exc
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        n = self._manifest.n_chunks
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self.fd = os.open(self.path, flags, 0o644)
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EEXIST, "not a regular file")
        listed = self.journal.read(n)
        self.candidates, self.same_boot = self._candidates(listed, status)
        if not self.candidates and status.st_size:
            os.ftruncate(self.fd, 0)
        if not (listed.readable and self.candidates):
            self.journal.start(sorted(self.candidates.items()))
        if self._manifest.size:
            self._allocate()
        if self._manifest.n_parity:
            import tempfile

            # Without a name: parity is fetched again after a restart, it is rarely needed and small.
            with tempfile.TemporaryFile(dir=self.path.parent) as file:
                self.parity_fd = os.dup(file.fileno())

    def _candidates(self, listed: Listed, status: os.stat_result) -> tuple[dict[int, bool], bool]:
        """Chunks that may lie in the part file already, and whether the journal can be believed about them."""
        if not listed.is_ours or status.st_size != self._manifest.size:
            return {}, False
        if listed.readable:
            return listed.chunks, listed.same_boot
        manifest = self._manifest
        found: dict[int, bool] = {}
        at = 0
        while at < status.st_size:  # a hole was never written
            try:
                at = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(self.fd, at, os.SEEK_HOLE)
            first, last = manifest.chunk_at(at), manifest.chunk_at(min(end, manifest.size) - 1)
            found.update(dict.fromkeys(range(first, last + 1), False))
            at = max(end, at + 1)
        return found, False

    def _open_direct(self) -> int:
        """The part file for direct writing, or -1: the file system cannot, or /proc is not there."""
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        return -1

    def _allocate(self) -> None:
        size = self._manifest.size
        try:
            os.posix_fallocate(self.fd, 0, size)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(self.fd, size)

    def starts_with(self, prefix: bytes) -> bool:
        """Whether the content begins with `prefix`."""
        return os.pread(self.fd, len(prefix), 0) == prefix

    def read_all(self, limit: int) -> bytes:
        """Return the content, at most `limit` bytes."""
        out = bytearray()
        while len(out) < limit:
            piece = os.pread(self.fd, min(READ_B, limit - len(out)), len(out))
            if not piece:
                break
            out += piece
        return bytes(out)

    def finish(self, *, force: bool) -> None:
        """Make the part file the file: fsync, rename, fsync the folder; remove the journal.

        Raises:
            DestinationExists: The destination appeared meanwhile, with other content; the part file is kept.
            StoreError: The disk refused; after a failed fsync the part file is not to be trusted and is removed.
        """
        out = self.out
        try:
            os.ftruncate(self.fd, self._manifest.size)
            os.fsync(self.fd)
        except OSError as exc:
            self.discard()
            raise storage_error(exc, str(self.path), "it cannot be trusted and was removed") from exc
        try:
            if force:
                os.rename(self.path, out)
            else:
                self._rename()
        except OSError as exc:
            raise storage_error(exc, str(out), "the part file is kept") from exc
        with suppress(OSError):  # harmless beside the finished file, and removed when it is next asked for
            self.journal.remove()
        try:
            folder = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as exc:
            raise storage_error(exc, str(out), "the file is there, but a power cut may take it away") from exc

    def _rename(self) -> None:
        try:
            try:
                rename_noreplace(self.path, self.out)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                os.link(self.path, self.out)  # file systems without RENAME_NOREPLACE
                os.unlink(self.path)
        except FileExistsError:
            if not has_content(self.out, self._manifest.file_hash):
                raise DestinationExists(
                    f"{self.out}: exists with other content than {short(self._manifest.file_hash)}; "
                    f"it was left alone, the part file is kept"
                ) from None
            os.unlink(self.path)

    def discard(self) -> None:
        """Remove part file and journal."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.journal.remove()

    def close(self) -> None:
        """Close the descriptors; the files stay. Idempotent."""
        for fd in (self.fd, self.direct_fd, self.parity_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.direct_fd = self.parity_fd = -1
        self.journal.close()
