"""Where ingest reads from: one file, bytes in memory, or many files one after the other.

A source knows its size beforehand and is read once, front to back. `finish` says whether what was read is what
was there all the time: a file that shrank, grew or was written to meanwhile raises `FileChanged`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastcas.errors import ChunkCorrupt, FileChanged, NotFound, UsageError
from fastcas.hashing import Sha256
from fastcas.store.core import identity_of
from fastcas.store.paths import os_errors, shown, translate
from fastcas.store.types import Identity

__all__ = [
    "BytesSource", "ChainSource", "FileSource", "Part", "Source", "irregular", "open_user_file", "require_regular",
]  # fmt: skip


class Source(Protocol):
    """A byte string of known size, read once."""

    size: int
    label: str
    path: bytes | None
    identity: Identity | None

    def readinto(self, view: memoryview) -> int:
        """Fill `view` with the next bytes; fewer only at the end. Called in one thread at a time."""

    def finish(self) -> None:
        """Check that nothing changed while it was read. Raises FileChanged."""

    def close(self) -> None:
        """Give descriptors back. Idempotent."""


def require_regular(info: os.stat_result, label: str) -> None:
    """Refuse everything but a regular file.

    Raises:
        UsageError: A directory, FIFO, socket or device.
    """
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFLNK: "a symbolic link",
    }
    if not stat.S_ISREG(info.st_mode):
        raise irregular(label, kinds.get(stat.S_IFMT(info.st_mode), "no file"))


def irregular(label: str, what: str) -> UsageError:
    """Return the error for `what` in place of a regular file."""
    return UsageError(f"{label}: {what}, expected a regular file").about((label, f"is {what}"))


def open_user_file(path: str | os.PathLike[str] | bytes, dir_fd: int | None = None, *, follow: bool = True) -> int:
    """Open a user's regular file for reading, never blocking on a FIFO.

    Raises:
        NotFound, PermissionDenied, UsageError: It is not there, not readable, or not a regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags, dir_fd=dir_fd)
    except OSError as exc:
        raise translate(exc, path, "opening it") from exc
    try:
        require_regular(os.fstat(fd), shown(path))
    except UsageError:
        os.close(fd)
        raise
    return fd


class FileSource:
    """One regular file, by descriptor. Positions are explicit, so a descriptor shared with others is fine.

    Args:
        fd: Open for reading; owned by the source if `owned`.
        label: The path as messages show it.
        path: The absolute path for seeding in place, else None.
    """

    def __init__(self, fd: int, label: str, path: bytes | None = None, *, owned: bool = True) -> None:
        self._fd, self._owned = fd, owned
        self.label, self.path = label, path
        info = os.fstat(fd)
        require_regular(info, label)
        self.identity: Identity | None = identity_of(info)
        self.size = info.st_size
        self._offset = 0
        self._copy, self._base = fd, 0
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def fd(self) -> int:
        """The descriptor of the file, for cloning it."""
        return self._fd

    def read_from(self, fd: int, offset: int) -> None:
        """Read a copy, which begins at `offset` of an open file, in place of the file. Before the first read only."""
        self._copy, self._base = fd, offset

    def readinto(self, view: memoryview) -> int:
        """Fill `view`; fewer bytes only at the end of the file."""
        done = 0
        with os_errors(self.label, "reading it"):
            while done < len(view):
                n = os.preadv(self._copy, [view[done:]], self._base + self._offset)
                if n == 0:
                    break
                done += n
                self._offset += n
        return done

    def skip(self, n: int) -> None:
        """Count bytes that were read in another way, through the descriptor."""
        self._offset += n

    def finish(self) -> None:
        """Compare size and modification time with those before the first read."""
        now = identity_of(os.fstat(self._fd))
        if now != self.identity or self._offset != self.size:
            raise FileChanged(
                f"{self.label}: changed while it was read (expected {self.size} B, got {now.size} B"
                f"{'' if now.size != self.size else ', modified meanwhile'}); nothing of it was stored"
            ).about((self.label, "changed while it was read"))

    def close(self) -> None:
        """Close the descriptor if it is ours. Idempotent."""
        if self._owned and self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class BytesSource:
    """Bytes that are in memory already."""

    def __init__(self, data: bytes, label: str) -> None:
        self._data = memoryview(data)
        self._offset = 0
        self.size, self.label = len(data), label
        self.path: bytes | None = None
        self.identity: Identity | None = None

    def readinto(self, view: memoryview) -> int:
        """Copy the next bytes into `view`."""
        part = self._data[self._offset : self._offset + len(view)]
        view[: len(part)] = part
        self._offset += len(part)
        return len(part)

    def finish(self) -> None:
        """Bytes in memory do not change."""

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(slots=True)
class Part:
    """One file of a chain.

    Attributes:
        label: The path as messages show it.
        size: Bytes that it had when the chain was made.
        open: Returns a descriptor of a regular file, which the chain closes.
        identity: What it must still be when it is opened, None: only the size counts.
        expected: The SHA-256 that its bytes must have, or None.
        digest: Its SHA-256, once it was read.
    """

    label: str
    size: int
    open: Callable[[], int]
    identity: Identity | None = None
    expected: bytes | None = None
    digest: bytes = b""


class ChainSource:
    """Many files back to back; each is hashed by itself on the way (`Part.digest`). One is open at a time."""

    def __init__(self, parts: Sequence[Part], label: str) -> None:
        self._parts = parts
        self._next = 0
        self._file: FileSource | None = None
        self._hash = Sha256()
        self._left = 0
        self.size = sum(part.size for part in parts)
        self.label = label
        self.path: bytes | None = None
        self.identity: Identity | None = None

    def readinto(self, view: memoryview) -> int:
        """Fill `view` across file borders."""
        done = 0
        while self._next < len(self._parts):
            part = self._parts[self._next]
            if self._file is None:
                if done == len(view) and part.size:
                    return done
                self._start(part)
                assert self._file is not None
            if self._left:
                if done == len(view):
                    return done
                n = self._file.readinto(view[done : done + self._left])
                self._hash.update(view[done : done + n])
                done += n
                self._left -= n
                if n == 0:
                    self._file.finish()
            if self._left == 0:
                self._end(part)
        return done

    def _start(self, part: Part) -> None:
        self._file = FileSource(part.open(), part.label)
        self._left = part.size
        self._hash = Sha256()
        if self._file.size != part.size or (part.identity is not None and self._file.identity != part.identity):
            raise FileChanged(
                f"{part.label}: changed before it was read (expected {part.size} B, got {self._file.size} B);"
                " nothing of it was stored"
            ).about((part.label, "changed before it was read"))

    def _end(self, part: Part) -> None:
        assert self._file is not None
        self._file.finish()
        self._file.close()
        self._file = None
        self._next += 1
        part.digest = self._hash.digest()
        if part.expected is not None and part.digest != part.expected:
            raise ChunkCorrupt(
                f"{part.label}: expected SHA-256 {part.expected[:4].hex()}, got {part.digest[:4].hex()};"
                " nothing of it was stored"
            )

    def finish(self) -> None:
        """Every file was compared when its end was reached; read what is left of empty ones."""
        if self.readinto(memoryview(bytearray(0))) or self._next != len(self._parts):
            raise NotFound(f"{self.label}: not read to its end")

    def close(self) -> None:
        """Close the file that is open. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
