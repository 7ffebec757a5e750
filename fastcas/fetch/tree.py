"""A collection: its content is fetched like any file, then the files that it lists, into one folder.

The tree is built in `NAME.fastcas-tree` (mode 0700, ours alone) beside the destination, and renamed when it is whole;
an interrupted one is continued. Files arrive there under names of ours. Names of the collection were checked by the
decoder; they are only used below an open descriptor, component by component, without following links.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fastcas.errors import DestinationExists, FastCASError, IntegrityError, ManifestCorrupt
from fastcas.fetch._receiver import rename_noreplace
from fastcas.fetch.download import DownloadHooks, DownloadResult, FetchedTree, Progress
from fastcas.fetch.filefetch import FileFetch
from fastcas.fetch.partfile import safe_name, storage_error
from fastcas.ids import Link, escape_for_terminal, short
from fastcas.limits import COLLECTION_SIZE_MAX, MANIFEST_SIZE_MAX
from fastcas.metadata import Manifest
from fastcas.store.beneath import beneath, make_dirs_beneath, open_beneath
from fastcas.store.collection import Collection, FileEntry
from fastcas.store.core import identity_of
from fastcas.store.types import Identity

__all__ = ["fetch_tree"]

WORK_SUFFIX = ".fastcas-tree"
MODES = {False: 0o644, True: 0o755}


class _TreeHooks:
    """Passes a file's events on, but for its end: that is told of the whole folder."""

    def __init__(self, outer: DownloadHooks) -> None:
        self._outer = outer
        self.unproven: set[Path] = set()

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        self._outer.on_manifest(manifest, part_path)

    def on_chunk(self, index: int) -> None:
        self._outer.on_chunk(index)

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        if not content_proven:
            self.unproven.add(path)

    def on_tree(self, tree: FetchedTree) -> None:
        raise AssertionError("a collection's files are fetched raw")


async def fetch_tree(fetch: FileFetch, content: DownloadResult) -> DownloadResult:
    """Fetch what a collection lists, into the folder that `fetch` was to create.

    Args:
        fetch: The finished download of the collection's content; its part file is still open and is removed.
        content: Its result.
    Raises:
        CollectionCorrupt: The content breaks the format or a path rule; nothing was created.
        DestinationExists: The folder exists with other content, and was left alone.
        FastCASError: As `download`; what is there is continued by the next attempt.
    """
    assert fetch.part is not None
    part, settings, out = fetch.part, fetch.settings, fetch.part.out
    try:
        collection = Collection.decode(await asyncio.to_thread(part.read_all, COLLECTION_SIZE_MAX + 1))
    finally:
        part.close()
    tree = _Tree(fetch, content, collection, out)
    if fetch.over_folder:
        if await asyncio.to_thread(_same_tree, out, collection):
            part.discard()
            if settings.hooks is not None:
                settings.hooks.on_tree(FetchedTree(out, _name(fetch, out), collection, content.manifest, {}, {}))
            return replace(content, path=out, size=collection.size)
        if not settings.force:
            part.discard()
            raise DestinationExists(
                f"{out}: exists with other content than {short(fetch.file_hash)}; it was left alone"
            )
    if settings.reserve is not None:
        await settings.reserve(content.manifest, collection)
    result = await tree.run()
    part.discard()
    return result


class _Tree:
    """One collection being fetched."""

    def __init__(self, fetch: FileFetch, content: DownloadResult, collection: Collection, out: Path) -> None:
        self._fetch = fetch
        self._collection = collection
        self._out = out
        self._work = out.with_name(out.name + WORK_SUFFIX)
        self._tree = self._work / "tree"
        self._result = replace(content, path=out, size=collection.size)
        self._members: dict[bytes, Manifest] = {}
        self._identities: dict[str, Identity] = {}
        self._started = time.monotonic() - content.seconds
        self._done = 0
        hooks = fetch.settings.hooks
        self._hooks = None if hooks is None else _TreeHooks(hooks)
        self._peers = tuple(
            remote.addr
            for remote in fetch.crowd.remotes.values()
            if remote.banned is None and not remote.lacks_file  # whether it answered since the manifest came or not
        )

    async def run(self) -> DownloadResult:
        await asyncio.to_thread(self._prepare)
        collection = self._collection
        for number, entry in enumerate(collection.files):
            origins = self._fetch.settings.origins_of_member(entry.path)
            link = Link(entry.file_hash, entry.manifest_hash)
            await self._file(link, self._work / f"file-{number}", origins, counts=True)
        for number, pack in enumerate(collection.packs):
            await self._file(Link(pack.file_hash, pack.manifest_hash), self._work / f"pack-{number}", [], counts=False)
        await asyncio.to_thread(self._place)
        if self._fetch.settings.hooks is not None:
            tree = FetchedTree(
                self._out, _name(self._fetch, self._out), collection, self._result.manifest, self._members,
                self._identities,
            )  # fmt: skip
            self._fetch.settings.hooks.on_tree(tree)
        self._result.seconds = time.monotonic() - self._started
        return self._result

    async def _file(self, link: Link, path: Path, origins: Sequence[str], *, counts: bool) -> None:
        settings = replace(
            self._fetch.settings,
            peers=self._peers,
            hooks=self._hooks,
            progress=self._progress(self._fetch.settings.progress),
            raw=True,
            reserve=None,  # all of it is reserved
            force=True,  # inside our own work folder
            origins=origins,
            known=(),
        )
        done = await FileFetch(link, path, settings, self._fetch.receiver).run()
        if self._hooks is not None:
            await asyncio.to_thread(self._remember, link, path, done.manifest)
        self._done += done.size
        result = self._result
        for peer, n_bytes in done.bytes_by_peer.items():
            result.bytes_by_peer[peer] = result.bytes_by_peer.get(peer, 0) + n_bytes
        result.resumed_bytes += done.resumed_bytes
        result.local_bytes += done.local_bytes
        result.banned.update(done.banned)
        for url, n_bytes in done.bytes_by_origin.items():
            result.bytes_by_origin[url] = n_bytes
        result.failed_origins.update(done.failed_origins)
        result.explained.add(done.explained)
        self._peers = tuple(peer for peer in self._peers if peer not in done.banned)

    def _progress(self, outer: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
        if outer is None:
            return None
        total = sum(entry.size for entry in self._collection.files) + sum(p.size for p in self._collection.packs)
        before = self._done

        def report(now: Progress) -> None:
            outer(replace(now, bytes_done=before + now.bytes_done, bytes_total=total))

        return report

    def _remember(self, link: Link, path: Path, manifest: Manifest) -> None:
        """Keep a member's manifest, in a file for another attempt, too. Blocks."""
        kept = path.with_name(path.name + ".manifest")
        if manifest.manifest_hash == link.manifest_hash:
            self._members[manifest.manifest_hash] = manifest
            try:
                kept.write_bytes(manifest.data)
            except OSError as exc:
                raise storage_error(exc, str(kept), "what was fetched is kept") from exc
            return
        with suppress(OSError, ManifestCorrupt), kept.open("rb") as file:  # fetched by an earlier attempt
            earlier = Manifest.decode(file.read(MANIFEST_SIZE_MAX + 1))
            if earlier.manifest_hash == link.manifest_hash:
                self._members[earlier.manifest_hash] = earlier

    def _prepare(self) -> None:
        """Make the work folder and every folder of the tree. Blocks."""
        try:
            for folder in (self._work, self._tree):
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
                status = folder.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    raise DestinationExists(f"{folder}: exists and is no folder; it was left alone")
                if status.st_uid != os.geteuid():  # who could lead us elsewhere with links
                    raise DestinationExists(f"{folder}: belongs to somebody else; it was left alone")
            fd = os.open(self._tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise storage_error(exc, str(self._work), "nothing was fetched") from exc
        try:
            for path in self._collection.dirs:
                make_dirs_beneath(fd, path)
            for number, entry in enumerate(self._collection.files):  # an interrupted attempt had placed it already
                with suppress(FileNotFoundError), beneath(fd, entry.path) as (folder_fd, name):
                    os.rename(name, self._work / f"file-{number}", src_dir_fd=folder_fd)
        finally:
            os.close(fd)

    def _place(self) -> None:
        """Cut the small files out of the packs, set the modes, and put the folder at its place. Blocks."""
        fd = os.open(self._tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._unpack(fd)
            for number, entry in enumerate(self._collection.files):
                with beneath(fd, entry.path) as (folder_fd, name):
                    os.rename(self._work / f"file-{number}", name, dst_dir_fd=folder_fd)
                identity = _set_mode(fd, entry)
                if self._hooks is None or self._work / f"file-{number}" not in self._hooks.unproven:
                    self._identities[entry.path] = identity
            os.fchmod(fd, 0o755)
        except OSError as exc:
            raise storage_error(exc, str(self._work), "what was fetched is kept") from exc
        finally:
            os.close(fd)
        os.sync()
        try:
            if self._fetch.over_folder:
                self._move_into()
            else:
                rename_noreplace(self._tree, self._out)
            shutil.rmtree(self._work)
        except FileExistsError:
            raise DestinationExists(
                f"{self._out}: appeared meanwhile; it was left alone, {self._work} is kept"
            ) from None
        except OSError as exc:
            raise storage_error(exc, str(self._out), "what was fetched is kept") from exc

    def _unpack(self, fd: int) -> None:
        packs = [os.open(self._work / f"pack-{i}", os.O_RDONLY) for i in range(len(self._collection.packs))]
        try:
            for entry in self._collection.small:
                data = os.pread(packs[entry.pack], entry.size, entry.offset) if entry.size else b""
                if hashlib.sha256(data).digest() != entry.sha256:
                    shown = escape_for_terminal(entry.path)
                    raise IntegrityError(f"'{shown}': its bytes in pack {entry.pack} have another hash; not written")
                file = open_beneath(fd, entry.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODES[entry.executable])
                try:
                    view = memoryview(data)
                    while view:
                        view = view[os.write(file, view) :]
                    os.fchmod(file, MODES[entry.executable])
                finally:
                    os.close(file)
        finally:
            for pack in packs:
                os.close(pack)

    def _move_into(self) -> None:
        """Forced: files go over those of the same path, everything else in the folder is left alone."""
        fd = os.open(self._out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in self._collection.dirs:
                make_dirs_beneath(fd, path)
        finally:
            os.close(fd)
        for path in _paths(self._collection):
            os.replace(self._tree / path, self._out / path)


def _name(fetch: FileFetch, out: Path) -> str:
    """What the collection is called: by its link, else as its folder."""
    return safe_name(fetch.link.name, out.name)


def _set_mode(fd: int, entry: FileEntry) -> Identity:
    """Set a finished file's mode; returns its identity, which a rename does not change."""
    file = open_beneath(fd, entry.path, os.O_RDONLY)
    try:
        os.fchmod(file, MODES[entry.executable])
        return identity_of(os.fstat(file))
    finally:
        os.close(file)


def _same_tree(out: Path, collection: Collection) -> bool:
    """Whether a folder has every file of the collection with its content (what else it has does not matter)."""
    fd = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return (
            all((out / path).is_dir() for path in collection.dirs)
            and all(_same_file(fd, entry.path, entry.size, entry.file_hash) for entry in collection.files)
            and all(_same_file(fd, small.path, small.size, small.sha256) for small in collection.small)
        )
    finally:
        os.close(fd)


def _paths(collection: Collection) -> list[str]:
    return [entry.path for entry in collection.files] + [small.path for small in collection.small]


def _same_file(fd: int, path: str, size: int, sha256: bytes) -> bool:
    try:
        file = open_beneath(fd, path, os.O_RDONLY)
    except FastCASError:
        return False
    with os.fdopen(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        return hashlib.file_digest(stream, "sha256").digest() == sha256
