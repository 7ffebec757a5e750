"""Storing a directory: scan it, pack its small files, ingest the rest, publish everything together.

The scan refuses what a collection cannot hold (links, FIFOs, sockets, devices, names that `collection.check_path`
forbids, unreadable folders) with all such names in one error. Files of at most 64 KiB go into packs in the order
of their paths; a pack is closed once it has 64 MiB. All blobs, manifests and the collection become visible in one
commit, so a tree is never half there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from fastcas.errors import CollectionCorrupt, FileChanged, PermissionDenied, UsageError
from fastcas.limits import COLLECTION_DIRS_MAX, COLLECTION_FILES_MAX, COLLECTION_SIZE_MAX
from fastcas.metadata import EMPTY_SHA256, FIXED
from fastcas.store.beneath import beneath
from fastcas.store.collection import (
    DEPTH_MAX,
    SMALL_MAX,
    Collection,
    FileEntry,
    PackEntry,
    SmallEntry,
    check_path,
    check_paths,
)
from fastcas.store.core import Core, identity_of
from fastcas.store.in_place import Job, hash_in_place
from fastcas.store.ingest import Entry, Ingest, Staged, stored_file
from fastcas.store.linked import make_way
from fastcas.store.packs import PackPart, PackSource
from fastcas.store.paths import os_errors, shown, translate
from fastcas.store.quota import Quota, ingest_bound
from fastcas.store.sources import BytesSource, FileSource, open_user_file
from fastcas.store.types import Identity, Progress, StoredFile

__all__ = ["store_tree"]

PACK_B = 64 << 20
ENTRY_B = 80  # of a collection per file, beside its path
BAD_SHOWN = 20
BAD_LISTED = 1000


@dataclass(slots=True)
class _Leaf:
    path: str
    executable: bool
    identity: Identity


@dataclass(slots=True)
class _Scan:
    root: str
    dirs: list[str] = field(default_factory=list)
    leaves: list[_Leaf] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    n_denied: int = 0

    def refuse(self, path: str, why: str) -> None:
        self.bad.append((shown(path), why))

    def check_counts(self) -> None:
        """Refuse what no one could read again."""
        if len(self.leaves) > COLLECTION_FILES_MAX or len(self.dirs) > COLLECTION_DIRS_MAX:
            raise UsageError(
                f"{self.root}: {len(self.leaves)} files and {len(self.dirs)} folders or more, limit"
                f" {COLLECTION_FILES_MAX} and {COLLECTION_DIRS_MAX}; nothing of it was stored"
            )


def _scan(dir_fd: int, prefix: str, depth: int, out: _Scan, posix_names: bool) -> None:
    with os.scandir(dir_fd) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        path = prefix + entry.name
        try:
            check_path(path, posix_names=posix_names)
        except CollectionCorrupt as exc:
            out.refuse(path, str(exc).removeprefix("collection: path ").partition(": '")[0])
            continue
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(info.st_mode):
            if not os.access(entry.name, os.R_OK, dir_fd=dir_fd, effective_ids=True):
                out.n_denied += 1
                out.refuse(path, "cannot be read (Permission denied)")
            out.leaves.append(_Leaf(path, bool(info.st_mode & 0o111), identity_of(info)))
        elif stat.S_ISDIR(info.st_mode) and depth < DEPTH_MAX:
            out.dirs.append(path)
            try:
                fd = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
            except OSError as exc:
                out.n_denied += exc.errno == errno.EACCES
                out.refuse(path, f"cannot be opened ({exc.strerror})")
                continue
            try:
                _scan(fd, path + "/", depth + 1, out, posix_names)
            finally:
                os.close(fd)
        else:
            what = "is a symbolic link" if stat.S_ISLNK(info.st_mode) else "is neither a file nor a folder"
            out.refuse(path, what if not stat.S_ISDIR(info.st_mode) else f"is deeper than {DEPTH_MAX}")
    out.check_counts()


def _packs(leaves: list[_Leaf]) -> Iterator[list[_Leaf]]:
    pack: list[_Leaf] = []
    size = 0
    for leaf in leaves:
        pack.append(leaf)
        size += leaf.identity.size
        if size >= PACK_B:
            yield pack
            pack, size = [], 0
    if pack:
        yield pack


def store_tree(
    core: Core,
    quota: Quota,
    path: str | os.PathLike[str],
    *,
    name: str | None,
    chunk_size: int | None,
    chunking: str,
    parity: tuple[int, int] | None,
    in_place: bool,
    posix_names: bool,
    progress: Progress | None,
) -> StoredFile:
    """See `Store.store_tree`."""
    root = os.path.realpath(path)
    try:
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError as exc:
        raise UsageError(f"{shown(path)}: expected a directory") from exc
    except OSError as exc:
        raise translate(exc, path, "opening it") from exc
    try:
        scan = _Scan(shown(path))
        with os_errors(path, "listing it"):
            _scan(root_fd, "", 1, scan, posix_names)
        if scan.bad:
            more = f" and {len(scan.bad) - BAD_SHOWN} more" if len(scan.bad) > BAD_SHOWN else ""
            names = "; ".join(f"'{bad}' {why}" for bad, why in scan.bad[:BAD_SHOWN])
            kind = PermissionDenied if scan.n_denied == len(scan.bad) else UsageError
            raise kind(f"{shown(path)}: cannot be stored: {names}{more}; nothing of it was stored").about(
                *((shown(os.path.join(root, bad)), why) for bad, why in scan.bad[:BAD_LISTED])
            )
        try:
            check_paths(scan.dirs, [leaf.path for leaf in scan.leaves], posix_names=posix_names)
        except CollectionCorrupt as exc:
            raise UsageError(f"{shown(path)}: cannot be stored: {exc}") from exc
        title = name or shown(os.path.basename(root) or "root")
        return _ingest(core, quota, root_fd, root, title, scan, chunk_size, chunking, parity, in_place, progress)
    finally:
        os.close(root_fd)


def _ingest(
    core: Core,
    quota: Quota,
    root_fd: int,
    root: str,
    title: str,
    scan: _Scan,
    chunk_size: int | None,
    chunking: str,
    parity: tuple[int, int] | None,
    in_place: bool,
    progress: Progress | None,
) -> StoredFile:
    total = sum(leaf.identity.size for leaf in scan.leaves)
    done = 0

    def step(of_file: int, _: int) -> None:
        if progress is not None:
            progress(done + of_file, total)

    small = [leaf for leaf in scan.leaves if 0 < leaf.identity.size <= SMALL_MAX]
    large = [leaf for leaf in scan.leaves if leaf.identity.size > SMALL_MAX]
    entries: list[Entry] = []
    files: list[FileEntry] = []
    smalls = [
        SmallEntry(leaf.path, leaf.executable, 0, EMPTY_SHA256, 0, 0) for leaf in scan.leaves if not leaf.identity.size
    ]
    packs: list[PackEntry] = []
    bound = sum(
        ingest_bound(leaf.identity.size, chunk_size, parity, chunking=chunking, in_place=in_place) for leaf in large
    )
    for pack in _packs(small):
        bound += ingest_bound(sum(leaf.identity.size for leaf in pack), chunk_size, parity, chunking=chunking)
    described = sum(2 * len(leaf.path) + ENTRY_B for leaf in scan.leaves) + sum(2 * len(path) + 2 for path in scan.dirs)
    bound += ingest_bound(described, chunk_size, parity, chunking=chunking)
    with quota.admit(bound, title) as budget, Ingest(core, budget) as ingest, ExitStack() as stack:
        for pack in _packs(small):
            parts = [PackPart(leaf.path, leaf.identity.size, leaf.identity) for leaf in pack]
            together = PackSource(root_fd, root, parts)
            try:
                staged = ingest.add(together, chunk_size=chunk_size, chunking=chunking, parity=parity, progress=step)
            finally:
                together.close()
            offset = 0
            for leaf, part in zip(pack, parts, strict=True):
                smalls.append(SmallEntry(leaf.path, leaf.executable, part.size, part.digest, len(packs), offset))
                offset += part.size
            manifest = staged.manifest
            packs.append(PackEntry(manifest.file_hash, manifest.manifest_hash, manifest.size))
            entries.append(Entry(staged, None))
            done += manifest.size
        begun = done

        def beside(n: int) -> None:
            if progress is not None:
                progress(begun + n, total)

        def one_by_one() -> Generator[Staged, None, None]:
            for leaf in large:
                source = _open(root_fd, root, leaf)
                try:
                    yield ingest.add(
                        source, chunk_size=chunk_size, chunking=chunking, parity=parity, in_place=in_place,
                        progress=step,
                    )  # fmt: skip
                finally:
                    source.close()

        if in_place and parity is None and chunking == FIXED and len(large) > 1:
            jobs = [Job(leaf.identity.size, partial(_open, root_fd, root, leaf)) for leaf in large]
            read = hash_in_place(jobs, chunk_size, beside)
        else:
            read = one_by_one()
        stack.callback(read.close)
        paths = [os.fsencode(os.path.join(root, leaf.path)) for leaf in large] if in_place else []
        taken = core.catalog.taken(paths)
        for leaf, staged in zip(large, read, strict=True):
            if staged.path in taken:
                make_way(core, staged.path, leaf.identity)
            manifest = staged.manifest
            ingest.keep(manifest)
            files.append(
                FileEntry(leaf.path, leaf.executable, manifest.size, manifest.file_hash, manifest.manifest_hash)
            )
            entries.append(Entry(staged, None))
            done += manifest.size
        data = Collection(tuple(packs), tuple(scan.dirs), tuple(files), tuple(smalls)).encode()
        if len(data) > COLLECTION_SIZE_MAX:
            raise UsageError(
                f"{shown(root)}: the list of its files takes {len(data)} B, limit {COLLECTION_SIZE_MAX} B;"
                " nothing of it was stored"
            )
        staged = ingest.add(BytesSource(data, title), chunk_size=chunk_size, chunking=chunking, parity=parity)
        members = sorted({entry.staged.manifest.manifest_hash for entry in entries})
        top = Entry(staged, title, is_collection=True, members=members)
        new_bytes = staged.new_bytes + sum(entry.staged.new_bytes for entry in entries)
        ingest.publish([*entries, top])
    staged.new_bytes = new_bytes
    staged.cloned_bytes += sum(entry.staged.cloned_bytes for entry in entries)
    top.already_stored = top.already_stored and new_bytes == 0
    return stored_file(top, total)


def _open(root_fd: int, root: str, leaf: _Leaf) -> FileSource:
    absolute = os.path.join(root, leaf.path)
    with beneath(root_fd, leaf.path) as (fd, name):
        source = FileSource(open_user_file(name, fd, follow=False), shown(absolute), os.fsencode(absolute))
    if source.identity != leaf.identity:
        source.close()
        raise FileChanged(f"{source.label}: changed before it was read; nothing of it was stored").about(
            (source.label, "changed before it was read")
        )
    return source
