"""The collection: a directory as one byte string, so that it is chunked, found and proven like any file.

Goals: one byte string per tree (canonical: two equal trees have equal hashes); a small file costs 70 bytes and
its path, not a manifest of its own; a decoder that accepts nothing that could be written outside the target.
Non-goals: times, owners, links, devices.

Format, version 1. Numbers are little-endian; arrays follow each other without padding.

    offset  size  field
    0       21    the line "fastcas-collection 1\\n"
    21      4     n_packs
    25      4     n_dirs
    29      4     n_files
    33      4     n_small
    37      ..    n_packs packs, n_dirs directories, n_files files, n_small small files

    pack       size (8), file_hash (32), manifest_hash (32)
    directory  path
    file       mode (1): 0 = 0644, 1 = 0755 · size (8) · file_hash (32) · manifest_hash (32) · path
    small      mode (1) · pack (4) · offset in the pack (8) · size (4), <= 65,536 · SHA-256 (32) · path
    path       length in bytes (2), 1..4096, then that many bytes of UTF-8

A pack is an ordinary file that holds small files back to back. A small file of size 0 has pack 0 and offset 0 and
needs no pack; its SHA-256 is that of nothing. Each of the three lists is sorted by the path's bytes, without
repeats. Every directory is listed, parents included, the root is not; the parent of every path is a listed
directory. Nothing follows the last entry.

Path rules (`check_path`): relative, `/` between components, NFC, a component 1..255 bytes, depth <= 64; no empty,
`.` or `..` component, no backslash, no control, bidi or other invisible character. Unless `posix_names`: none of
`< > : " | ? *`, no component that starts or ends with a space or ends with a dot, none of Windows' reserved names.
No two paths of a collection are equal after NFC and casefolding (with `posix_names`: equal at all). One violation
rejects the whole collection.
"""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from fastcas.errors import CollectionCorrupt
from fastcas.ids import escape_for_terminal
from fastcas.limits import (
    COLLECTION_DIRS_MAX,
    COLLECTION_FILES_MAX,
    COLLECTION_SIZE_MAX,
    FILE_SIZE_MAX,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
)
from fastcas.metadata import EMPTY_SHA256

__all__ = [
    "DEPTH_MAX",
    "MAGIC",
    "SMALL_MAX",
    "Collection",
    "FileEntry",
    "PackEntry",
    "SmallEntry",
    "check_path",
    "check_paths",
]

MAGIC = b"fastcas-collection 1\n"
SMALL_MAX = 64 << 10
DEPTH_MAX = 64
_COUNTS = struct.Struct("<IIII")
_PACK = struct.Struct("<Q32s32s")
_FILE = struct.Struct("<BQ32s32sH")
_SMALL = struct.Struct("<BIQI32sH")
_PATH = struct.Struct("<H")

_PLAIN = re.compile(r"[A-Za-z0-9_+@=-][A-Za-z0-9_.+@=-]*(?:/[A-Za-z0-9_+@=-][A-Za-z0-9_.+@=-]*)*", re.ASCII)
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_NOT_PORTABLE = re.compile(r'[<>:"|?*]')
_RESERVED = re.compile(r"(?:con|prn|aux|nul|clock\$|conin\$|conout\$|(?:com|lpt)[0-9¹²³])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PackEntry:
    """An ordinary file that holds small files back to back."""

    file_hash: bytes
    manifest_hash: bytes
    size: int


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file with a manifest of its own."""

    path: str
    executable: bool
    size: int
    file_hash: bytes
    manifest_hash: bytes


@dataclass(frozen=True, slots=True)
class SmallEntry:
    """A file of at most 64 KiB that lies in a pack (`pack` is its number, `offset` in bytes)."""

    path: str
    executable: bool
    size: int
    sha256: bytes
    pack: int
    offset: int


@dataclass(frozen=True)
class Collection:
    """A directory tree. `encode` sorts; `decode` accepts only what `encode` could have written."""

    packs: tuple[PackEntry, ...] = ()
    dirs: tuple[str, ...] = ()
    files: tuple[FileEntry, ...] = ()
    small: tuple[SmallEntry, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files of the tree."""
        return sum(entry.size for entry in self.files) + sum(entry.size for entry in self.small)

    def encode(self) -> bytes:
        """Return the canonical bytes. The paths are the caller's to check (`check_paths`)."""
        out = [MAGIC, _COUNTS.pack(len(self.packs), len(self.dirs), len(self.files), len(self.small))]
        out += [_PACK.pack(pack.size, pack.file_hash, pack.manifest_hash) for pack in self.packs]
        for raw in sorted(path.encode() for path in self.dirs):
            out += (_PATH.pack(len(raw)), raw)
        for raw, file in sorted((entry.path.encode(), entry) for entry in self.files):
            out += (_FILE.pack(file.executable, file.size, file.file_hash, file.manifest_hash, len(raw)), raw)
        for raw, small in sorted((entry.path.encode(), entry) for entry in self.small):
            out.append(
                _SMALL.pack(small.executable, small.pack, small.offset, small.size, small.sha256, len(raw)) + raw
            )
        return b"".join(out)

    @classmethod
    def decode(cls, data: bytes | memoryview, *, posix_names: bool = False) -> Collection:
        """Parse canonical bytes.

        Args:
            data: The whole content, at most 512 MiB.
            posix_names: Allow names that only other systems cannot have.
        Raises:
            CollectionCorrupt: Anything is out of order; nothing of it may be used.
        """
        if len(data) > COLLECTION_SIZE_MAX:
            raise CollectionCorrupt(f"collection: {len(data)} B, limit {COLLECTION_SIZE_MAX} B")
        reader = _Reader(bytes(data))
        if reader.take(len(MAGIC)) != MAGIC:
            raise CollectionCorrupt("collection: wrong first line")
        n_packs, n_dirs, n_files, n_small = reader.unpack(_COUNTS)
        if n_dirs > COLLECTION_DIRS_MAX or n_files + n_small > COLLECTION_FILES_MAX or n_packs > n_small:
            raise CollectionCorrupt(
                f"collection: {n_packs} packs, {n_dirs} folders, {n_files} + {n_small} files; "
                f"limit {COLLECTION_FILES_MAX} files and {COLLECTION_DIRS_MAX} folders"
            )
        packs = []
        for _ in range(n_packs):
            size, file_hash, manifest_hash = reader.unpack(_PACK)
            if not 0 < size <= FILE_SIZE_MAX:
                raise CollectionCorrupt(f"collection: a pack of {size} B")
            packs.append(PackEntry(file_hash, manifest_hash, size))
        dirs = [reader.path(reader.unpack(_PATH)[0]) for _ in range(n_dirs)]
        files = [reader.file() for _ in range(n_files)]
        small = [reader.small(packs) for _ in range(n_small)]
        reader.end()
        for paths in (dirs, [entry.path for entry in files], [entry.path for entry in small]):
            raws = [path.encode() for path in paths]
            if any(a >= b for a, b in pairwise(raws)):
                raise CollectionCorrupt("collection: paths out of order or repeated")
        check_paths(dirs, [entry.path for entry in files] + [entry.path for entry in small], posix_names=posix_names)
        return cls(tuple(packs), tuple(dirs), tuple(files), tuple(small))


class _Reader:
    """A cursor over the bytes; every step checks what is left first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, n: int) -> bytes:
        end = self._at + n
        if end > len(self._data):
            raise CollectionCorrupt(f"collection: ends at {len(self._data)} B, expected at least {end} B")
        part = self._data[self._at : end]
        self._at = end
        return part

    def unpack(self, shape: struct.Struct) -> tuple:  # type: ignore[type-arg]
        return shape.unpack(self.take(shape.size))

    def path(self, length: int) -> str:
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            shown = escape_for_terminal(raw.decode("utf-8", "backslashreplace"))
            raise CollectionCorrupt(f"collection: path is not UTF-8: '{shown}'") from exc

    def file(self) -> FileEntry:
        mode, size, file_hash, manifest_hash, length = self.unpack(_FILE)
        if mode > 1 or size > FILE_SIZE_MAX:
            raise CollectionCorrupt(f"collection: a file of mode {mode} and {size} B")
        return FileEntry(self.path(length), bool(mode), size, file_hash, manifest_hash)

    def small(self, packs: list[PackEntry]) -> SmallEntry:
        mode, pack, offset, size, digest, length = self.unpack(_SMALL)
        if mode > 1 or size > SMALL_MAX:
            raise CollectionCorrupt(f"collection: a small file of mode {mode} and {size} B")
        if size == 0:
            fits = pack == 0 and offset == 0 and digest == EMPTY_SHA256
        else:
            fits = pack < len(packs) and offset + size <= packs[pack].size
        if not fits:
            raise CollectionCorrupt(f"collection: a small file of {size} B at {offset} lies outside pack {pack}")
        return SmallEntry(self.path(length), bool(mode), size, digest, pack, offset)

    def end(self) -> None:
        if self._at != len(self._data):
            raise CollectionCorrupt(f"collection: {len(self._data) - self._at} B after the last entry")


def check_path(path: str, *, posix_names: bool = False) -> None:
    """Check one path against the rules above.

    Raises:
        CollectionCorrupt: With the rule and the path, escaped.
    """
    why = _violation(path, posix_names)
    if why:
        raise CollectionCorrupt(f"collection: path {why}: '{escape_for_terminal(path)[:200]}'")


def check_paths(dirs: Iterable[str], files: Iterable[str], *, posix_names: bool = False) -> None:
    """Check all paths of a tree, alone and against each other.

    Raises:
        CollectionCorrupt: With the offending paths (the first eight), escaped.
    """
    folders = list(dirs)
    leaves = list(files)
    bad = []
    for path in _both(folders, leaves):
        why = _violation(path, posix_names)
        if why:
            bad.append(f"'{escape_for_terminal(path)[:200]}' {why}")
            if len(bad) == 8:
                break
    if bad:
        raise CollectionCorrupt(f"collection: {'; '.join(bad)}; nothing of it was used")
    seen: set[str] = set()
    known = set(folders)
    for path in _both(folders, leaves):
        folded = path if posix_names else _fold(path)
        if folded in seen:
            raise CollectionCorrupt(f"collection: two paths are the same but for case: '{escape_for_terminal(path)}'")
        seen.add(folded)
        parent = path.rpartition("/")[0]
        if parent and parent not in known:
            raise CollectionCorrupt(f"collection: the folder of '{escape_for_terminal(path)}' is not listed")


def _both(first: list[str], second: list[str]) -> Iterator[str]:
    yield from first
    yield from second


def _fold(path: str) -> str:
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _violation(path: str, posix_names: bool) -> str:
    """Return which rule a path breaks, "" for none."""
    parts = path.split("/")
    if len(parts) > DEPTH_MAX:
        return f"is deeper than {DEPTH_MAX}"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if not 0 < len(raw) <= PATH_BYTES_MAX:
        return f"is {len(raw)} B long, limit {PATH_BYTES_MAX}"
    if len(raw) > NAME_BYTES_MAX and any(len(part.encode()) > NAME_BYTES_MAX for part in parts):
        return f"has a component over {NAME_BYTES_MAX} B"
    if not _PLAIN.fullmatch(path):
        if any(part in ("", ".", "..") for part in parts):
            return "has an empty, . or .. component"
        if _FORBIDDEN.search(path):
            return "has a backslash, a control or an invisible character"
        if not unicodedata.is_normalized("NFC", path):
            return "is not in Unicode's NFC form"
        if not posix_names and _NOT_PORTABLE.search(path):
            return 'has one of < > : " | ? *'
    if not posix_names:
        for part in parts:
            if part[-1] in ". " or part[0] == " ":
                return "has a component that starts or ends with a space, or ends with a dot"
            if _RESERVED.fullmatch(part.partition(".")[0].rstrip(" ")):
                return "has a name that is reserved on other systems"
    return ""
