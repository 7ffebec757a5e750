"""Which files of a collection are wanted: by patterns, or one by its path. Pure.

A pattern is compared with a file's path in the collection, `/` between components, case and all:

* `*` stands for any characters but `/`, `?` for one, `[…]` for one of a set, `[!…]` for one outside it; `**` as a whole
  component for any number of components, none included;
* a pattern without `/` is compared with the name of the file and of each folder that it lies in: `*.txt` are all text
  files, `docs` is everything in any folder of that name; one with `/` begins at the collection's root, and a leading
  `/` says just that;
* a pattern that fits a folder takes all that is below it; one that ends with `/` fits folders only.

A file is chosen if a pattern of `include` fits it (or there is none) and no pattern of `exclude` does.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastcas.errors import NotFound, UsageError
from fastcas.ids import escape_for_terminal, short
from fastcas.limits import PATH_BYTES_MAX
from fastcas.metadata import Manifest
from fastcas.store.collection import Collection, FileEntry, SmallEntry

__all__ = ["Choice", "Chosen", "choice_of", "chosen_of", "chunks_of_ranges", "member_of", "ranges_of_packs"]

PATTERNS_MAX = 1000
PATHS_SHOWN = 1000  # in what `--json` says


@dataclass(frozen=True)
class Chosen:
    """What was chosen of a collection.

    Attributes:
        paths: Of the files, sorted.
        size: Bytes of them. n_total, size_total: Files and bytes of the whole collection.
    """

    paths: tuple[str, ...]
    size: int
    n_total: int
    size_total: int

    def to_map(self) -> dict[str, Any]:
        """Return it for `--json`; of more than 1,000 paths the first."""
        return {
            "files": len(self.paths), "size": self.size, "files_total": self.n_total, "size_total": self.size_total,
            "paths": list(self.paths[:PATHS_SHOWN]),
        }  # fmt: skip


class Choice:
    """The patterns of one command. Raises UsageError where one cannot fit anything."""

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        for name, patterns in (("--include", include), ("--exclude", exclude)):
            if len(patterns) > PATTERNS_MAX:
                raise UsageError(f"{name}: {len(patterns)} patterns, limit {PATTERNS_MAX}")
        self._include = [_Pattern(text, "--include") for text in include]
        self._exclude = [_Pattern(text, "--exclude") for text in exclude]

    def fits(self, path: str) -> bool:
        """Whether a file is chosen."""
        parts = path.split("/")
        return (not self._include or any(pattern.fits(parts) for pattern in self._include)) and not any(
            pattern.fits(parts) for pattern in self._exclude
        )

    def apply(self, collection: Collection) -> Collection:
        """Return the collection with the chosen files, the folders that they lie in, and all packs.

        Raises:
            NotFound: No file is chosen.
        """
        files = tuple(entry for entry in collection.files if self.fits(entry.path))
        small = tuple(entry for entry in collection.small if self.fits(entry.path))
        if not files and not small:
            n = len(collection.files) + len(collection.small)
            raise NotFound(f"--include, --exclude: none of the collection's {n} files is chosen; nothing was fetched")
        needed = _folders_of([*(entry.path for entry in files), *(entry.path for entry in small)])
        return replace(collection, dirs=tuple(d for d in collection.dirs if d in needed), files=files, small=small)


class _Pattern:
    def __init__(self, text: str, argument: str) -> None:
        shown = escape_for_terminal(text[:100])
        if not text.strip("/") or len(text.encode(errors="replace")) > PATH_BYTES_MAX:
            raise UsageError(f"{argument}: expected a pattern of 1 to {PATH_BYTES_MAX} B, got '{shown}'")
        self._folders_only = text.endswith("/")
        parts = text.removesuffix("/").removeprefix("/").split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise UsageError(f"{argument}: expected no empty, . or .. component, got '{shown}'")
        if "/" not in text.removesuffix("/"):
            parts.insert(0, "**")
        # None stands for **; what fnmatch makes of one component takes no more than a few passes over a name.
        self._parts = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in parts]

    def fits(self, parts: Sequence[str]) -> bool:
        """Whether the pattern fits the path or a folder that it lies in. Cost: components of both, multiplied."""
        end = len(self._parts)
        at = self._skip({0})
        for number, name in enumerate(parts):
            following = set()
            for i in at:
                part = self._parts[i] if i < end else ""
                if part is None:
                    following.add(i)
                elif isinstance(part, re.Pattern) and part.match(name):
                    following.add(i + 1)
            at = self._skip(following)
            is_folder = number < len(parts) - 1
            if end in at and (is_folder or not self._folders_only):
                return True
        return False

    def _skip(self, at: set[int]) -> set[int]:
        """Add the places behind each ** that may stand for nothing."""
        reached = set(at)
        for i in sorted(at):
            while i < len(self._parts) and self._parts[i] is None:
                i += 1
                reached.add(i)
        return reached


def choice_of(args: Mapping[str, Any]) -> Choice | None:
    """Return what a request's `include` and `exclude` choose; None: everything.

    Raises:
        UsageError: A pattern cannot be used.
    """
    include, exclude = ([str(text) for text in args.get(name, ())] for name in ("include", "exclude"))
    return Choice(include, exclude) if include or exclude else None


def member_of(collection: Collection, path: str, file_hash: bytes) -> FileEntry | SmallEntry:
    """Return what a collection lists under a path.

    Raises:
        NotFound: No file has it.
    """
    entries: list[FileEntry | SmallEntry] = [*collection.files, *collection.small]
    for entry in entries:
        if entry.path == path:
            return entry
    shown = escape_for_terminal(path)
    hint = f"a folder, which --include '/{shown}/' fetches" if path in collection.dirs else "no such file"
    raise NotFound(f"collection {short(file_hash)}: '{shown}': {hint}; nothing was fetched")


def chosen_of(collection: Collection, part: Collection) -> Chosen:
    """Return what `part` has of a collection."""
    paths = [*(entry.path for entry in part.files), *(entry.path for entry in part.small)]
    return Chosen(tuple(sorted(paths)), part.size, len(collection.files) + len(collection.small), collection.size)


def ranges_of_packs(part: Collection) -> dict[int, list[tuple[int, int]]]:
    """Return by number of a pack the (offset, size) of what lies in it; packs that are not needed are left out."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for entry in part.small:
        if entry.size:
            ranges.setdefault(entry.pack, []).append((entry.offset, entry.size))
    return ranges


def chunks_of_ranges(manifest: Manifest, ranges: Iterable[tuple[int, int]]) -> int:
    """Return the chunk set of the data chunks in which these (offset, size) lie; sizes are not 0."""
    chunks = 0
    for offset, size in ranges:
        first, last = manifest.chunk_at(offset), manifest.chunk_at(offset + size - 1)
        chunks |= (1 << (last + 1)) - (1 << first)
    return chunks


def _folders_of(paths: Iterable[str]) -> set[str]:
    folders: set[str] = set()
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in folders:
            folders.add(path)
    return folders
