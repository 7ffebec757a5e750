"""The small files of a folder as one source: read many at a time, hashed many at a time.

A pack holds small files back to back. They are read whole into a staging buffer by C code that holds no lock, hashed
side by side in the kernel's lanes, and copied from there into the buffers of the ingest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from fastcas.errors import ChunkCorrupt, FileChanged, NotFound
from fastcas.hashing import digest_many
from fastcas.store._files import CHANGED_BEFORE, CHANGED_WHILE, read_files
from fastcas.store.beneath import beneath
from fastcas.store.paths import shown, translate
from fastcas.store.sources import irregular
from fastcas.store.types import Identity

__all__ = ["PackPart", "PackSource"]

STAGING_B = 1 << 20  # at least one file of the largest size that packs take


@dataclass(slots=True)
class PackPart:
    """One small file, not empty.

    Attributes:
        path: Relative to the source's folder, `/` between components.
        size: Bytes that it has.
        identity: What it must still be when it is opened, None: only the size counts.
        expected: The SHA-256 that its bytes must have, None: any.
        digest: Its SHA-256, once it was read.
    """

    path: str
    size: int
    identity: Identity | None = None
    expected: bytes | None = None
    digest: bytes = b""


class PackSource:
    """Small files of one tree back to back; `PackPart.digest` of each is set on the way.

    Args:
        root_fd: The tree's folder; stays the caller's.
        root: Its path, for messages.
        parts: At most 64 KiB each. Neighbours in one folder are read together.
    """

    def __init__(self, root_fd: int, root: str, parts: Sequence[PackPart]) -> None:
        self._root_fd, self._root = root_fd, root
        self._parts = parts
        self._next = 0
        self._folder: str | None = None
        self._folder_fd = -1
        self._staging = memoryview(bytearray(STAGING_B))
        self._ready = self._staging[:0]
        self.size = sum(part.size for part in parts)
        self.label = shown(root)
        self.path: bytes | None = None
        self.identity: Identity | None = None

    def readinto(self, view: memoryview) -> int:
        """Fill `view` across file borders.

        Raises:
            FileChanged: A file is not, or did not stay, what it was.
            NotFound, PermissionDenied, UsageError, StoreError: It cannot be opened or read, or is no regular file.
            ChunkCorrupt: Its bytes are not those that were expected.
        """
        done = 0
        while done < len(view):
            if not self._ready:
                if self._next == len(self._parts):
                    break
                self._stage()
            n = min(len(self._ready), len(view) - done)
            view[done : done + n] = self._ready[:n]
            self._ready = self._ready[n:]
            done += n
        return done

    def _stage(self) -> None:
        """Read as many files as the staging buffer holds, and hash them."""
        first, used = self._next, 0
        while self._next < len(self._parts):
            folder, group = self._group(len(self._staging) - used)
            if not group:
                break
            self._read(folder, group, self._staging[used:])
            used += sum(part.size for part in group)
            self._next += len(group)
        self._ready = self._staging[:used]
        at = 0
        views = []
        for part in self._parts[first : self._next]:
            views.append(self._staging[at : at + part.size])
            at += part.size
        for part, digest in zip(self._parts[first : self._next], digest_many(views), strict=True):
            part.digest = digest
            if part.expected is not None and digest != part.expected:
                raise ChunkCorrupt(
                    f"{self._label(part)}: expected SHA-256 {part.expected[:4].hex()}, got {digest[:4].hex()};"
                    " nothing of it was stored"
                )

    def _group(self, room: int) -> tuple[str, list[PackPart]]:
        """Return the next files that lie in one folder and fit, and that folder."""
        folder = self._parts[self._next].path.rpartition("/")[0]
        group = []
        for at in range(self._next, len(self._parts)):
            part = self._parts[at]
            room -= part.size
            if room < 0 or part.path.rpartition("/")[0] != folder:
                break
            group.append(part)
        return folder, group

    def _read(self, folder: str, group: Sequence[PackPart], out: memoryview) -> None:
        if folder != self._folder:
            self.close()
            with beneath(self._root_fd, group[0].path) as (fd, _):
                self._folder_fd = os.dup(fd)
            self._folder = folder
        skip = len(folder) + 1 if folder else 0
        n, why, got = read_files(
            self._folder_fd, [os.fsencode(part.path[skip:]) for part in group], [part.size for part in group],
            [part.identity for part in group], out,
        )  # fmt: skip
        if n < len(group):
            raise self._error(group[n], why, got)

    def _label(self, part: PackPart) -> str:
        return shown(os.path.join(self._root, part.path))

    def _error(self, part: PackPart, why: int, got: int) -> Exception:
        label = self._label(part)
        if why > 0:
            return translate(OSError(why, os.strerror(why)), os.path.join(self._root, part.path), "reading it")
        if why not in (CHANGED_BEFORE, CHANGED_WHILE):
            return irregular(label, "no file")
        when = "before it was read" if why == CHANGED_BEFORE else "while it was read"
        modified = ", modified meanwhile" if got == part.size else ""
        return FileChanged(
            f"{label}: changed {when} (expected {part.size} B, got {got} B{modified}); nothing of it was stored"
        ).about((label, f"changed {when}"))

    def finish(self) -> None:
        """Every file was compared when it was read. Raises NotFound if not all of them were."""
        if self._ready or self._next != len(self._parts):
            raise NotFound(f"{self.label}: not read to its end")

    def close(self) -> None:
        """Close the folder that is open. Idempotent."""
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
        self._folder_fd, self._folder = -1, None
