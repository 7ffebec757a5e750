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
from dataclasses import dataclass, replace
from pathlib import Path

from fastcas.errors import DestinationExists, FastCASError, IntegrityError, ManifestCorrupt, NotFound
from fastcas.fetch._receiver import rename_noreplace
from fastcas.fetch.choosing import chosen_of, chunks_of_ranges, ranges_of_packs
from fastcas.fetch.download import DownloadHooks, DownloadResult, FetchedTree, Progress
from fastcas.fetch.filefetch import FileFetch
from fastcas.fetch.partfile import PART_SUFFIX, safe_name, storage_error
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.fetch.shared import SharedReceiver
from fastcas.ids import Link, escape_for_terminal, short
from fastcas.limits import COLLECTION_SIZE_MAX, MANIFEST_SIZE_MAX, RECEIVE_MEMORY_MAX
from fastcas.metadata import Manifest
from fastcas.store.beneath import beneath, make_dirs_beneath, open_beneath
from fastcas.store.collection import Collection, FileEntry
from fastcas.store.core import identity_of
from fastcas.store.types import Identity

__all__ = ["fetch_tree"]

MEMBERS_AT_ONCE = 8
WORK_SUFFIX = ".fastcas-tree"
MODES = {False: 0o644, True: 0o755}


@dataclass(frozen=True)
class _Member:
    """A file or pack to fetch: where to, and how many bytes of it count."""

    link: Link
    path: Path
    size: int
    origins: Sequence[str] = ()
    ranges: Sequence[tuple[int, int]] | None = None  # of a pack of which not everything is needed

    def wanted(self, manifest: Manifest) -> int:
        assert self.ranges is not None
        return chunks_of_ranges(manifest, self.ranges)


class _MemberHooks:
    """Passes a file's events on, but for its end: that is told of the whole folder."""

    def __init__(self, outer: DownloadHooks, unproven: set[Path]) -> None:
        self._outer = outer
        self._unproven = unproven

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        self._outer.on_manifest(manifest, part_path)

    def on_chunk(self, index: int) -> None:
        self._outer.on_chunk(index)

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        if not content_proven:
            self._unproven.add(path)

    def on_tree(self, tree: FetchedTree) -> None:
        raise AssertionError("a collection's files are fetched raw")

    def member(self) -> DownloadHooks:
        raise AssertionError("a collection's files have no members")

    def end(self) -> None:
        self._outer.end()


async def fetch_tree(fetch: FileFetch, content: DownloadResult) -> DownloadResult:
    """Fetch what a collection lists, into the folder that `fetch` was to create.

    Args:
        fetch: The finished download of the collection's content; its part file is still open and is removed.
        content: Its result.
    Raises:
        CollectionCorrupt: The content breaks the format or a path rule; nothing was created.
        NotFound: No file of it is chosen; likewise.
        DestinationExists: The folder exists with other content, and was left alone.
        FastCASError: As `download`; what is there is continued by the next attempt.
    """
    assert fetch.part is not None
    part, settings, out = fetch.part, fetch.settings, fetch.part.out
    try:
        collection = Collection.decode(await asyncio.to_thread(part.read_all, COLLECTION_SIZE_MAX + 1))
    finally:
        part.close()
    try:
        chosen = collection if settings.choice is None else settings.choice.apply(collection)
    except NotFound:
        part.discard()
        raise
    if settings.choice is not None:
        content = replace(content, chosen=chosen_of(collection, chosen))
    tree = _Tree(fetch, content, collection, chosen, out)
    if fetch.over_folder:
        if await asyncio.to_thread(_same_tree, out, chosen):
            part.discard()
            await asyncio.to_thread(_clear_leftovers, out)
            if settings.hooks is not None and settings.choice is None:
                settings.hooks.on_tree(FetchedTree(out, _name(fetch, out), collection, content.manifest, {}, {}))
            return replace(content, path=out, size=chosen.size)
        if not settings.force:
            part.discard()
            raise DestinationExists(
                f"{out}: exists with other content than {short(fetch.file_hash)}; it was left alone"
            )
    if settings.reserve is not None and settings.choice is None:
        await settings.reserve(content.manifest, collection)
    result = await tree.run()
    if settings.hooks is not None:
        settings.hooks.end()  # its content's part file goes
    part.discard()
    return result


class _Tree:
    """One collection being fetched, or part of it."""

    def __init__(
        self, fetch: FileFetch, content: DownloadResult, whole: Collection, collection: Collection, out: Path
    ) -> None:
        self._fetch = fetch
        self._whole = whole
        self._collection = collection
        self._out = out
        self._work = out.with_name(out.name + WORK_SUFFIX)
        self._tree = self._work / "tree"
        self._result = replace(content, path=out, size=collection.size)
        # Numbers are those of the whole collection, so that an attempt with another choice finds what is here.
        self._numbers = {entry.path: number for number, entry in enumerate(whole.files)}
        self._members: dict[bytes, Manifest] = {}
        self._identities: dict[str, Identity] = {}
        self._started = time.monotonic() - content.seconds
        self._done: dict[Path, int] = {}
        self._rates: dict[Path, float] = {}
        self._total = 0
        self._unproven: set[Path] = set()
        self._peers = tuple(
            remote.addr
            for remote in fetch.crowd.remotes.values()
            if remote.banned is None and not remote.lacks_file  # whether it answered since the manifest came or not
        )

    async def run(self) -> DownloadResult:
        await asyncio.to_thread(self._prepare)
        members = self._members_to_fetch()
        self._total = sum(member.size for member in members)
        await self._fetch_all(members)
        await asyncio.to_thread(self._place)
        self._tell()
        self._result.seconds = time.monotonic() - self._started
        return self._result

    def _file_path(self, entry: FileEntry) -> Path:
        return self._work / f"file-{self._numbers[entry.path]}"

    def _members_to_fetch(self) -> list[_Member]:
        members = [
            _Member(
                Link(entry.file_hash, entry.manifest_hash), self._file_path(entry), entry.size,
                self._fetch.settings.origins_of_member(entry.path),
            )
            for entry in self._collection.files
        ]  # fmt: skip
        needed = ranges_of_packs(self._collection)
        for number, pack in enumerate(self._collection.packs):
            link, path = Link(pack.file_hash, pack.manifest_hash), self._work / f"pack-{number}"
            if self._collection is self._whole:
                members.append(_Member(link, path, pack.size))
            elif number in needed:
                size = sum(size for _, size in needed[number])
                members.append(_Member(link, path, size, ranges=needed[number]))
        return members

    async def _fetch_all(self, members: Sequence[_Member]) -> None:
        """Fetch several at once, so that nobody waits for the round trips of each; in all at most what memory may hold.

        The first error ends the others; what they have is kept.
        """
        shared = SharedReceiver(self._fetch.receiver)
        running: dict[asyncio.Task[None], int] = {}

        async def one_ended() -> None:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del running[task]
                task.result()

        try:
            for member in members:
                while running and (
                    len(running) >= MEMBERS_AT_ONCE or sum(running.values()) + member.size > RECEIVE_MEMORY_MAX
                ):
                    await one_ended()
                running[asyncio.ensure_future(self._file(member, shared.share()))] = member.size
            while running:
                await one_ended()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            shared.close()

    async def _file(self, member: _Member, receiver: AsyncReceiver) -> None:
        outer = self._fetch.settings.hooks
        hooks = None if outer is None else _MemberHooks(outer.member(), self._unproven)
        settings = replace(
            self._fetch.settings,
            peers=self._peers,
            hooks=hooks,
            progress=self._progress(member),
            raw=True,
            reserve=None,  # all of it is reserved
            force=True,  # inside our own work folder
            origins=member.origins,
            known=(),
            choice=None,
            is_part_of_tree=False,
            wanted=None if member.ranges is None else member.wanted,
        )
        try:
            done = await FileFetch(member.link, member.path, settings, receiver).run()
        finally:
            self._rates.pop(member.path, None)
            if hooks is not None:
                hooks.end()
        if hooks is not None:
            await asyncio.to_thread(self._remember, member.link, member.path, done.manifest)
        self._done[member.path] = member.size
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

    def _progress(self, member: _Member) -> Callable[[Progress], None] | None:
        outer = self._fetch.settings.progress
        if outer is None:
            return None

        def report(now: Progress) -> None:
            self._done[member.path] = min(now.bytes_done, member.size)
            self._rates[member.path] = now.rate_Bps
            done, rate = sum(self._done.values()), sum(self._rates.values())
            outer(replace(now, bytes_done=done, bytes_total=self._total, rate_Bps=rate))

        return report

    def _tell(self) -> None:
        """Say that the folder is there; of a part of a collection, that its files are."""
        hooks = self._fetch.settings.hooks
        if hooks is None:
            return
        if self._fetch.settings.choice is None:
            hooks.on_tree(
                FetchedTree(
                    self._out, _name(self._fetch, self._out), self._collection, self._result.manifest, self._members,
                    self._identities,
                )
            )  # fmt: skip
            return
        for entry in self._collection.files:
            manifest = self._members.get(entry.manifest_hash)
            if manifest is not None and entry.path in self._identities:
                hooks.on_finished(self._out / entry.path, manifest, True)

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
            self._take_back()
            fd = os.open(self._tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise storage_error(exc, str(self._work), "nothing was fetched") from exc
        try:
            for path in self._collection.dirs:
                make_dirs_beneath(fd, path)
        finally:
            os.close(fd)

    def _take_back(self) -> None:
        """Begin with an empty tree: what an interrupted attempt had placed goes back to its number. Blocks."""
        if not any(self._tree.iterdir()):
            return
        fd = os.open(self._tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            for entry in self._whole.files:
                with suppress(FileNotFoundError, FastCASError), beneath(fd, entry.path) as (folder_fd, name):
                    os.rename(name, self._file_path(entry), src_dir_fd=folder_fd)
        finally:
            os.close(fd)
        shutil.rmtree(self._tree)
        self._tree.mkdir(mode=0o700)

    def _place(self) -> None:
        """Cut the small files out of the packs, set the modes, and put the folder at its place. Blocks."""
        fd = os.open(self._tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._unpack(fd)
            for entry in self._collection.files:
                with beneath(fd, entry.path) as (folder_fd, name):
                    os.rename(self._file_path(entry), name, dst_dir_fd=folder_fd)
                identity = _set_mode(fd, entry)
                if self._file_path(entry) not in self._unproven:
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
        needed = ranges_of_packs(self._collection)
        packs = {number: os.open(self._work / f"pack-{number}", os.O_RDONLY) for number in needed}
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
            for pack in packs.values():
                os.close(pack)

    def _move_into(self) -> None:
        """Forced: files go over those of the same path, everything else in the folder is left alone."""
        fd = os.open(self._out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in self._collection.dirs:
                make_dirs_beneath(fd, path)
            for path in _paths(self._collection):
                with beneath(fd, path) as (folder_fd, name):
                    os.replace(self._tree / path, name, dst_dir_fd=folder_fd)
        finally:
            os.close(fd)


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


def _clear_leftovers(out: Path) -> None:
    """Remove the work folder of an attempt that was killed when its files were at their places already. Blocks.

    One in which something is still being fetched, or that is not ours, is left alone.
    """
    work = out.with_name(out.name + WORK_SUFFIX)
    with suppress(OSError):
        status = work.lstat()
        tree = work / "tree"
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or any(work.glob("*" + PART_SUFFIX)):
            return
        if not any(files for _, _, files in os.walk(tree)):
            shutil.rmtree(work)


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
