"""The older layout: chunks as `hashed_files/<hash>` with a `cas_index.json`. Accepted shapes: docs/MIGRATION_GUIDE.md.

Every file is read through once more, each old chunk is checked against its name and the whole against the file's
hash; then it is an ordinary file of this store, cut anew. Never: changes the older folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastcas.errors import FastCASError, Interrupted, NotFound, StoreError, StoreFull, UsageError
from fastcas.ids import escape_for_terminal
from fastcas.store.core import Core
from fastcas.store.ingest import Entry, Ingest, stored_file
from fastcas.store.paths import BLOB_DIR, os_errors, shown
from fastcas.store.quota import Quota, ingest_bound
from fastcas.store.sources import ChainSource, Part, open_user_file
from fastcas.store.types import MigrateReport, Progress

__all__ = ["index_json", "migrate"]

INDEX = "cas_index.json"
INDEX_MAX = 1 << 30  # bytes of JSON that we read
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAMES = ("original_name", "name", "filename", "file_name")
_CHUNKS = ("data_chunks", "chunks", "chunk_hashes")
_HASHES = ("file_hash", "hash", "sha256")


@dataclass(slots=True)
class _Old:
    """One file as the older index has it."""

    file_hash: str
    name: str
    size: int | None
    chunks: list[str] = field(default_factory=list)


def migrate(core: Core, quota: Quota, old_dir: str | os.PathLike[str], progress: Progress | None) -> MigrateReport:
    """See `Store.migrate`."""
    folder, index = _find(Path(os.path.abspath(old_dir)))
    report = MigrateReport()
    used: set[str] = set()
    items = list(_files(_read_index(index), report))
    total = sum(item.size or 0 for item in items)

    def step(of_file: int) -> None:
        if progress is not None:
            progress(report.bytes + of_file, max(total, report.bytes + of_file))

    for item in items:
        used.add(item.file_hash)
        used.update(item.chunks)
        try:
            _import(core, quota, folder, item, report, step)
        except (StoreFull, Interrupted):
            raise
        except FastCASError as exc:
            report.left_out.append((f"{item.file_hash} {escape_for_terminal(item.name)}".strip(), str(exc)))
    with os_errors(folder, "listing it"):
        left = sorted(name for name in os.listdir(folder) if _HEX.fullmatch(name) and name not in used)
    report.left_out += [(name, "no file of the index needs it") for name in left]
    return report


def _find(old: Path) -> tuple[Path, Path]:
    """Return (folder of the chunks, index). `old` is the folder of both, its parent, or hashed_files itself."""
    for folder in (old / BLOB_DIR, old):
        for index in (old / INDEX, folder / INDEX, folder.parent / INDEX):
            if folder.is_dir() and index.is_file():
                return folder, index
    raise NotFound(f"{shown(old)}: no {INDEX} here, expected the older layout (a folder with {INDEX} and {BLOB_DIR}/)")


def _read_index(index: Path) -> object:
    fd = open_user_file(index)
    with open(fd, "rb") as file, os_errors(index, "reading it"):
        data = file.read(INDEX_MAX + 1)
    if len(data) > INDEX_MAX:
        raise UsageError(f"{shown(index)}: over {INDEX_MAX} B")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{shown(index)}: not JSON ({escape_for_terminal(str(exc))}); nothing was imported") from exc


def _files(index: object, report: MigrateReport) -> Iterator[_Old]:
    """Yield the files of any accepted shape; entries that make no sense go into the report."""
    if isinstance(index, dict) and isinstance(index.get("files"), (dict, list)):
        index = index["files"]
    if isinstance(index, dict):
        pairs = [(key, value) for key, value in index.items() if _HEX.fullmatch(key) or isinstance(value, dict)]
    elif isinstance(index, list):
        pairs = [("", value) for value in index]
    else:
        raise UsageError(f"{INDEX}: expected an object or a list at the top; nothing was imported")
    for key, value in pairs:
        item = _entry(key, value)
        if isinstance(item, str):
            report.left_out.append((escape_for_terminal(key[:80]) or "entry", item))
        else:
            yield item


def _entry(key: str, value: object) -> _Old | str:
    """Return one file of the index, or why it is none."""
    if isinstance(value, list):
        value = {"chunks": value}
    elif isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        return "expected an object, a list of chunk hashes or a name"
    file_hash = key if _HEX.fullmatch(key) else next((value[name] for name in _HASHES if name in value), None)
    if not isinstance(file_hash, str) or not _HEX.fullmatch(file_hash):
        return "no file hash of 64 lower-case hex digits"
    listed: object = next((value[name] for name in _CHUNKS if value.get(name)), [])
    if not isinstance(listed, list):
        return "its chunks are not a list"
    chunks = []
    for chunk in listed:
        if isinstance(chunk, dict):
            chunk = next((chunk[name] for name in ("hash", "chunk_hash", "sha256") if name in chunk), None)
        if not isinstance(chunk, str) or not _HEX.fullmatch(chunk):
            return "one of its chunks has no hash of 64 lower-case hex digits"
        chunks.append(chunk)
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), "")
    size = value.get("size", value.get("file_size"))
    return _Old(file_hash, name, size if type(size) is int and size >= 0 else None, chunks)


def _import(
    core: Core, quota: Quota, folder: Path, item: _Old, report: MigrateReport, progress: Callable[[int], None]
) -> None:
    """Read one old file through and publish it. Raises what makes it impossible; nothing of it is kept then."""
    parts = []
    for chunk in item.chunks or ([] if item.size == 0 else [item.file_hash]):
        path = folder / chunk
        fd = open_user_file(path, follow=False)
        size = os.fstat(fd).st_size
        os.close(fd)
        parts.append(Part(shown(path), size, _opener(path), expected=bytes.fromhex(chunk)))
    source = ChainSource(parts, item.file_hash)
    if item.size is not None and item.size != source.size:
        raise StoreError(f"expected {item.size} B, its chunks have {source.size} B; left out")
    with quota.admit(ingest_bound(source.size, None, None), item.name) as budget, Ingest(core, budget) as ingest:
        try:
            staged = ingest.add(source, progress=lambda done, _: progress(done))
        finally:
            source.close()
        if staged.manifest.file_hash.hex() != item.file_hash:
            raise StoreError(
                f"expected SHA-256 {item.file_hash[:8]}, its chunks give {staged.manifest.file_hash[:4].hex()}"
            )
        entry = Entry(staged, escape_for_terminal(item.name) or item.file_hash)
        ingest.publish([entry])
    report.files.append(stored_file(entry))
    report.bytes += staged.manifest.size


def _opener(path: Path) -> Callable[[], int]:
    return lambda: open_user_file(path, follow=False)


def index_json(core: Core) -> dict[str, object]:
    """See `Store.index_json`."""
    files: dict[str, object] = {}
    for file_hash, name, stored_at, manifest_hash in core.catalog.query(
        "SELECT f.hash, (SELECT name FROM names WHERE file=f.hash ORDER BY stored_at DESC, name LIMIT 1),"
        " f.stored_at, f.manifest FROM files f ORDER BY f.hash"
    ):
        row = core.catalog.manifest(manifest_hash)
        manifest = core.try_manifest(row) if row is not None else None
        if manifest is None:
            continue
        n = manifest.n_chunks
        files[file_hash.hex()] = {
            "original_name": name or "",
            "size": manifest.size,
            "chunk_size": manifest.chunk_size,
            "manifest_hash": manifest_hash.hex(),
            "data_chunks": [manifest.hash_of(i).hex() for i in range(n)],
            "parity_chunks": [manifest.hash_of(n + i).hex() for i in range(manifest.n_parity)],
            "stored_at": stored_at,
        }
    return {"version": 1, "files": files}
