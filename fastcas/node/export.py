"""Write a file or collection that the store holds to a place of the user's, without any peer.

Every chunk is checked against its hash as it is copied; the file appears under its name only when it is whole. Runs
in the store's thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastcas.errors import DestinationExists, FastCASError, UsageError
from fastcas.fetch.choosing import Choice, Chosen, chosen_of, member_of
from fastcas.fetch.partfile import PartFile, has_content, prepare_folder, safe_name, storage_error
from fastcas.ids import Link, short
from fastcas.metadata import Manifest
from fastcas.store import Store
from fastcas.store.beneath import beneath, make_dirs_beneath, open_beneath
from fastcas.store.collection import Collection, FileEntry, SmallEntry

__all__ = ["export"]

Progress = Callable[[int, int], None]


class _DamagedError(Exception):
    """A chunk of the local copy cannot be read."""


def export(
    store: Store, link: Link, out: Path | None, folder: Path, *, raw: bool, force: bool, progress: Progress,
    choice: Choice | None = None,
) -> dict[str, Any] | None:
    """Copy what a link names out of the store.

    Args:
        store: Where it may be.
        link: File or collection; a manifest hash, where given, must be one that is here.
        out: File or folder to create; None: what it is called, in `folder`.
        raw: A collection is an ordinary file.
        force: Replace a destination with other content.
        progress: Called with (bytes done, bytes total).
        choice: Which files of the collection; None: all.
    Returns:
        What `get` returns, or None when the store does not hold all of it, or its copy is damaged.
    Raises:
        DestinationExists: The destination has other content; it was left alone.
        NotFound: The collection has no file at the link's path, or none that is chosen.
        UsageError: Something is to be chosen of a file that is no collection.
        StoreFull, PermissionDenied, StoreError: The disk refuses.
    """
    started = time.monotonic()
    row = store.file(link.file_hash)
    if row is None or not row.is_complete:
        return None
    manifest = store.manifest(link.manifest_hash or row.manifest_hash)
    if manifest is None:
        return None
    if out is None:
        out = folder / safe_name(link.path or link.name or row.name, link.file_hash.hex())
    wants_part = link.path is not None or choice is not None
    if wants_part and not row.is_collection:
        raise UsageError(f"REF: {short(link.file_hash)} is a file and no collection, so nothing can be chosen of it")
    chosen: Chosen | None = None
    file_hash = link.file_hash
    try:
        if row.is_collection and (wants_part or not raw):
            tree = Collection.decode(_read(store, manifest, 0, manifest.size))
            if link.path is not None:
                entry = member_of(tree, link.path, link.file_hash)
                size, file_hash = entry.size, entry.file_hash if isinstance(entry, FileEntry) else entry.sha256
                chosen = Chosen((entry.path,), size, len(tree.files) + len(tree.small), tree.size)
                _export_member(store, tree, entry, out, force=force, progress=progress)
            else:
                part = tree if choice is None else choice.apply(tree)
                chosen = None if choice is None else chosen_of(tree, part)
                size = _export_tree(store, part, out, force=force, progress=progress)
        else:
            size = manifest.size
            _export_file(store, manifest, out, force=force, progress=progress)
    except _DamagedError:
        return None  # peers may have what is damaged here
    store.touch([link.file_hash])
    return {
        "path": str(out), "file_hash": file_hash.hex(), "manifest_hash": manifest.manifest_hash.hex(),
        "size": size, "seconds": round(time.monotonic() - started, 3), "bytes_by_peer": {}, "fetched_bytes": 0,
        "resumed_bytes": 0, "local_bytes": size, "banned": {}, "bytes_by_origin": {}, "failed_origins": {},
        "explained": {"limited_by": "disk", "shares": {"disk": 1.0}, "n_unheld": 0},
        "chosen": chosen.to_map() if chosen is not None else None,
    }  # fmt: skip


def _export_file(store: Store, manifest: Manifest, out: Path, *, force: bool, progress: Progress) -> None:
    if out.is_dir():
        raise DestinationExists(f"{out}: a folder; it was left alone")
    same = has_content(out, manifest.file_hash)
    if same:
        return
    if same is False and not force:
        raise DestinationExists(
            f"{out}: exists with other content than {short(manifest.file_hash)}; it was left alone"
        )
    prepare_folder(out.parent)
    part = PartFile(out, manifest)
    try:
        done = 0
        for index, data in _chunks(store, manifest, range(manifest.n_chunks)):
            try:
                os.pwrite(part.fd, data, manifest.offset_of(index))
            except OSError as exc:
                raise storage_error(exc, str(part.path), "the part file is kept") from exc
            done += len(data)
            progress(done, manifest.size)
        part.finish(force=force)
    finally:
        part.close()


def _export_member(
    store: Store, tree: Collection, entry: FileEntry | SmallEntry, out: Path, *, force: bool, progress: Progress
) -> None:
    """Copy one file of a collection to a place of its own."""
    if isinstance(entry, FileEntry):
        _export_file(store, _manifest(store, entry.manifest_hash), out, force=force, progress=progress)
    else:
        if out.is_dir():
            raise DestinationExists(f"{out}: a folder; it was left alone")
        prepare_folder(out.parent)
        _write_small(out, _small(store, tree, entry), force=force)
    if not out.is_symlink():
        out.chmod(_mode(entry))


def _small(store: Store, tree: Collection, entry: SmallEntry) -> bytes:
    if not entry.size:
        return b""
    return _read(store, _manifest(store, tree.packs[entry.pack].manifest_hash), entry.offset, entry.size)


def _mode(entry: FileEntry | SmallEntry) -> int:
    return 0o755 if entry.executable else 0o644


def _export_tree(store: Store, tree: Collection, out: Path, *, force: bool, progress: Progress) -> int:
    if out.exists() and not out.is_dir():
        raise DestinationExists(f"{out}: exists and is no folder; it was left alone")
    try:
        out.mkdir(parents=True, exist_ok=True)
        root = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise storage_error(exc, str(out), "the folder is incomplete") from exc
    try:
        _fill_tree(store, tree, root, out, force=force, progress=progress)
    finally:
        os.close(root)
    return tree.size


def _fill_tree(store: Store, tree: Collection, root: int, out: Path, *, force: bool, progress: Progress) -> None:
    for folder in tree.dirs:
        make_dirs_beneath(root, folder)
    done = 0
    for entry in tree.files:
        with _place(root, out, entry.path) as path:
            _export_file(store, _manifest(store, entry.manifest_hash), path, force=force, progress=_ignore)
        _set_mode(root, entry)
        done += entry.size
        progress(done, tree.size)
    for small in tree.small:
        data = _small(store, tree, small)
        with _place(root, out, small.path) as path:
            _write_small(path, data, force=force)
        _set_mode(root, small)
        done += small.size
        progress(done, tree.size)


@contextlib.contextmanager
def _place(root: int, out: Path, path: str) -> Iterator[Path]:
    """Yield where a member goes, by way of an open folder to which no symbolic link has led.

    Raises:
        FastCASError: As raised inside, with the member's place as its user knows it.
    """
    with beneath(root, path) as (folder, name):
        way = Path(f"/proc/self/fd/{folder}")
        if stat.S_ISLNK(_mode_of(name, folder)):
            raise DestinationExists(f"{out / path}: a symbolic link; it was left alone")
        try:
            yield way / name
        except FastCASError as exc:
            raise type(exc)(str(exc).replace(f"{way}/", f"{(out / path).parent}/")) from exc


def _mode_of(name: str, folder: int) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


def _write_small(path: Path, data: bytes, *, force: bool) -> None:
    same = has_content(path, hashlib.sha256(data).digest())
    if same:
        return
    if same is False and not force:
        raise DestinationExists(f"{path}: exists with other content; it was left alone")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(path, flags, 0o644), "wb") as file:
            file.write(data)
    except OSError as exc:
        raise storage_error(exc, str(path), "the folder is incomplete") from exc


def _set_mode(root: int, entry: FileEntry | SmallEntry) -> None:
    file = open_beneath(root, entry.path, os.O_RDONLY)
    try:
        os.fchmod(file, _mode(entry))
    except OSError as exc:
        raise storage_error(exc, entry.path, "the folder is incomplete") from exc
    finally:
        os.close(file)


def _manifest(store: Store, manifest_hash: bytes) -> Manifest:
    manifest = store.manifest(manifest_hash)
    if manifest is None:
        raise _DamagedError
    return manifest


def _read(store: Store, manifest: Manifest, offset: int, size: int) -> bytes:
    if size == 0:
        return b""
    first, last = manifest.chunk_at(offset), manifest.chunk_at(offset + size - 1)
    data = b"".join(chunk for _, chunk in _chunks(store, manifest, range(first, last + 1)))
    return data[offset - manifest.offset_of(first) :][:size]


def _chunks(store: Store, manifest: Manifest, indexes: range) -> Iterator[tuple[int, bytes]]:
    for index in indexes:
        data = store.read_chunk(manifest.hash_of(index))
        if data is None:
            raise _DamagedError
        yield index, data


def _ignore(done: int, total: int) -> None:
    """Progress of a member is not shown by itself."""
