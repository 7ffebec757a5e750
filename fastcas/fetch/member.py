"""One file of a collection by its path: the collection is read, then that file alone is fetched.

The path is only looked up among those that the collection lists; it never names anything on this machine. Of the pack
of a small file only the chunks are fetched in which it lies. What is needed on the way lies in hidden files beside the
destination, where an interrupted attempt is continued, and is removed at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fastcas.errors import DestinationExists, IntegrityError, NotFound
from fastcas.fetch._receiver import rename_noreplace
from fastcas.fetch.choosing import Chosen, chunks_of_ranges, member_of
from fastcas.fetch.download import DownloadResult, Settings
from fastcas.fetch.filefetch import FileFetch
from fastcas.fetch.partfile import has_content, prepare_folder, safe_name, storage_error
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.ids import Link, escape_for_terminal, short
from fastcas.limits import COLLECTION_SIZE_MAX
from fastcas.store.collection import Collection, FileEntry, PackEntry, SmallEntry

__all__ = ["checked_small", "fetch_member"]


async def fetch_member(
    link: Link, path: str, out: Path | None, settings: Settings, receiver: AsyncReceiver
) -> DownloadResult:
    """Fetch the file that a collection has at `path`.

    Args:
        link: Of the collection.
        out: File to create; None: the last component of the path, in the folder of `settings`.
    Returns:
        The result; `file_hash` is the file's own, `manifest` of a small file the collection's.
    Raises:
        NotFound: The collection has no such file.
        UsageError: The REF is no collection.
        FastCASError: As `download`.
    """
    started = time.monotonic()
    if out is None:
        out = (settings.folder or Path.cwd()) / safe_name(path, short(link.file_hash))
    # By the destination's name: several files of one collection may be fetched at once.
    beside = out.with_name(f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]}.fastcas")
    listing = FileFetch(
        replace(link, path=None), beside,
        replace(
            settings, hooks=None, progress=None, reserve=None, raw=False, is_part_of_tree=True,
            origins=settings.origins_of_file(),
        ),
        receiver,
    )  # fmt: skip
    listed = await listing.run()
    assert listing.part is not None
    try:
        data = await asyncio.to_thread(listing.part.read_all, COLLECTION_SIZE_MAX + 1)
    finally:
        listing.part.close()
    try:
        collection = Collection.decode(data)
        entry = member_of(collection, path, link.file_hash)
    except (IntegrityError, NotFound):
        listing.part.discard()
        raise
    peers = tuple(
        remote.addr for remote in listing.crowd.remotes.values() if remote.banned is None and not remote.lacks_file
    )
    settings = replace(settings, peers=peers, raw=True, known=(), origins=settings.origins_of_member(path))
    if isinstance(entry, FileEntry):
        done = await FileFetch(Link(entry.file_hash, entry.manifest_hash), out, settings, receiver).run()
    else:
        pack = collection.packs[entry.pack] if entry.size else None
        done = replace(listed, path=out, file_hash=entry.sha256, size=entry.size)
        await _small(entry, pack, beside.with_name(beside.name + "-pack"), done, settings, receiver)
    await asyncio.to_thread(_set_mode, out, entry)
    await asyncio.to_thread(listing.part.discard)
    if done.manifest is not listed.manifest:
        for peer, n_bytes in listed.bytes_by_peer.items():
            done.bytes_by_peer[peer] = done.bytes_by_peer.get(peer, 0) + n_bytes
        done.banned.update(listed.banned)
        done.explained.add(listed.explained)
    done.seconds = time.monotonic() - started
    done.chosen = Chosen((path,), entry.size, len(collection.files) + len(collection.small), collection.size)
    return done


async def _small(
    entry: SmallEntry, pack: PackEntry | None, place: Path, done: DownloadResult, settings: Settings,
    receiver: AsyncReceiver,
) -> None:  # fmt: skip
    """Put a small file at its place, `done.path`, and add to `done` what that took."""
    out = done.path
    same = await asyncio.to_thread(_content_there, out, entry)
    if same:
        return
    if same is False and not settings.force:
        raise DestinationExists(f"{out}: exists with other content than {short(entry.sha256)}; it was left alone")
    data = b""
    if pack is not None:
        ranges = [(entry.offset, entry.size)]
        fetch = FileFetch(
            Link(pack.file_hash, pack.manifest_hash), place,
            replace(
                settings, hooks=None, progress=None, reserve=None, force=True, origins=(),
                wanted=lambda manifest: chunks_of_ranges(manifest, ranges),
            ),
            receiver,
        )  # fmt: skip
        fetched = await fetch.run()
        for peer, n_bytes in fetched.bytes_by_peer.items():
            done.bytes_by_peer[peer] = done.bytes_by_peer.get(peer, 0) + n_bytes
        done.banned.update(fetched.banned)
        done.explained.add(fetched.explained)
        done.local_bytes += fetched.local_bytes
        data = await asyncio.to_thread(_cut_out, place, entry)
    await asyncio.to_thread(_write, out, checked_small(entry, data), force=settings.force)


def checked_small(entry: SmallEntry, data: bytes) -> bytes:
    """Return the bytes of a small file.

    Raises:
        IntegrityError: They are not what the collection says.
    """
    if hashlib.sha256(data).digest() != entry.sha256:
        shown = escape_for_terminal(entry.path)
        raise IntegrityError(f"'{shown}': its bytes in pack {entry.pack} have another hash; nothing was handed out")
    return data


def _content_there(out: Path, entry: SmallEntry) -> bool | None:
    if out.is_dir():
        raise DestinationExists(f"{out}: a folder; it was left alone")
    return has_content(out, entry.sha256)


def _cut_out(place: Path, entry: SmallEntry) -> bytes:
    try:
        with place.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        place.unlink()
    except OSError as exc:
        raise storage_error(exc, str(place), "what was fetched is kept") from exc
    return data


def _write(out: Path, data: bytes, *, force: bool) -> None:
    """Make a file with these bytes: whole, or not at all."""
    prepare_folder(out.parent)
    try:
        fd, name = tempfile.mkstemp(dir=out.parent, prefix=".fastcas-")
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            if force:
                os.replace(name, out)
            else:
                rename_noreplace(name, out)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except FileExistsError:
        raise DestinationExists(f"{out}: appeared meanwhile; it was left alone") from None
    except OSError as exc:
        raise storage_error(exc, str(out), "nothing was written") from exc


def _set_mode(out: Path, entry: FileEntry | SmallEntry) -> None:
    if out.is_symlink():
        return  # to a file of the user's that has the content already
    try:
        fd = os.open(out, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.fchmod(fd, 0o755 if entry.executable else 0o644)
        finally:
            os.close(fd)
    except OSError as exc:
        raise storage_error(exc, str(out), "the file is there, with another mode") from exc
