"""What each command does to a store: one method per command, plain maps in and out.

Used by the agent in its store thread, and by the command line on a folder without a node, in its own process.
Arguments come from outside and are checked here. Never touches the network itself: what needs it is handed in.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcas.errors import Interrupted, NotFound, PermissionDenied, UsageError
from fastcas.ids import Link, PeerAddr, parse_ref, short
from fastcas.metadata import FIXED
from fastcas.store import FileRow, Scrub, Store, StoredFile
from fastcas.store.paths import shown

__all__ = ["LOCAL_OPERATIONS", "Operations", "file_row_to_map", "seeds_of"]

OnProgress = Callable[[dict[str, Any]], None]
Progress = Callable[[int, int], None]

LOCAL_OPERATIONS = frozenset({"store", "ls", "info", "rm", "gc", "migrate", "index", "stats", "pin", "unpin"})


def file_row_to_map(row: FileRow) -> dict[str, Any]:
    """Return a row as people and scripts see it: hashes in hex."""
    values = {name: getattr(row, name) for name in _ROW_FIELDS}
    values["path"] = None if row.path is None else shown(row.path)
    return values | {"file_hash": row.file_hash.hex(), "manifest_hash": row.manifest_hash.hex()}


_ROW_FIELDS = tuple(item.name for item in dataclasses.fields(FileRow))


def seeds_of(args: dict[str, Any]) -> list[Path]:
    """Return the files and folders to seed from of a `get`, absolute.

    Raises:
        NotFound, PermissionDenied, UsageError: One cannot be used; nothing was fetched.
    """
    return [_seed(os.fsdecode(path)) for path in args.get("seed_from", [])]


def _seed(path: str) -> Path:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise NotFound(f"--seed-from: {shown(path)}: no such file or directory") from exc
    except PermissionError as exc:
        raise PermissionDenied(f"--seed-from: {shown(path)}: permission denied") from exc
    except (OSError, ValueError) as exc:
        raise UsageError(f"--seed-from: {shown(path)}: {getattr(exc, 'strerror', exc)}") from exc
    try:
        mode = os.fstat(fd).st_mode
    finally:
        os.close(fd)
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(f"--seed-from: {shown(path)}: expected a file or a directory")
    return Path(os.path.realpath(path))


class Operations:
    """The commands on one open store. Methods run in the store's thread.

    Args:
        store: The store.
        barrier: Returns when no process reads what was removed before; without a node there is none.
        advertised: Addresses that a link to a stored file should name: data ports, and UDP ports of DHT nodes.
    """

    def __init__(
        self,
        store: Store,
        *,
        barrier: Callable[[], None] = lambda: None,
        advertised: Callable[[], tuple[Sequence[PeerAddr], Sequence[PeerAddr]]] = lambda: ((), ()),
    ) -> None:
        self.store = store
        self._barrier = barrier
        self._advertised = advertised

    def run(
        self,
        op: str,
        args: dict[str, Any],
        fds: Sequence[int] = (),
        on_progress: OnProgress | None = None,
        cancelled: threading.Event | None = None,
    ) -> dict[str, Any]:
        """Do one of `LOCAL_OPERATIONS`.

        Args:
            op: Which.
            args: Its arguments.
            fds: For `store` of a file: an open descriptor of it.
            on_progress: Gets {"done", "total"} in bytes, in this thread.
            cancelled: Checked at every progress; set = stop.
        Raises:
            UsageError: An argument is malformed.
            Interrupted: `cancelled` was set.
            FastCASError: What the store raises.
        """
        if op not in LOCAL_OPERATIONS:
            raise UsageError(f"operation: {op!r} is unknown")

        def progress(done: int, total: int) -> None:
            if cancelled is not None and cancelled.is_set():
                raise Interrupted(f"{op}: stopped after {done} of {total} B; nothing of it was stored")
            if on_progress is not None:
                on_progress({"done": done, "total": total})

        result: dict[str, Any] = getattr(self, "_do_" + op)(args, list(fds), progress)
        return result

    def row_of(self, ref: Any) -> FileRow:
        """Return the row of a REF.

        Raises:
            UsageError: Malformed.
            NotFound: The store has no such file.
        """
        link = parse_ref(str(ref))
        row = self.store.file(link.file_hash)
        if row is None:
            raise NotFound(f"file {short(link.file_hash)}: not in this store")
        return row

    def _do_store(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        path = os.fsdecode(args["path"])
        if "quota" in args:
            self.store.quota.set_limit(None if args["quota"] is None else int(args["quota"]))
        parity = args.get("parity")
        shape = (int(parity[0]), int(parity[1])) if parity else None
        chunk_size, chunking = args.get("chunk_size"), str(args.get("chunking", FIXED))
        in_place = bool(args.get("in_place"))
        stored: StoredFile
        if args.get("is_dir"):
            stored = self.store.store_tree(
                path, chunk_size=chunk_size, chunking=chunking, parity=shape, in_place=in_place, progress=progress
            )
        else:
            stored = self.store.store_file(
                path, fd=fds[0] if fds else None, name=args.get("name"), chunk_size=chunk_size, chunking=chunking,
                parity=shape, in_place=in_place, progress=progress,
            )  # fmt: skip
        peers, dht = self._advertised()
        link = dataclasses.replace(Link.parse(stored.link), peers=tuple(peers), dht=tuple(dht))
        where = None if stored.path is None else shown(stored.path)
        return dataclasses.asdict(stored) | {"link": str(link), "path": where}

    def _do_ls(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        return {"files": [file_row_to_map(row) for row in self.store.files()]}

    def _do_info(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        row = self.row_of(args.get("ref"))
        manifests = [
            {
                "manifest_hash": manifest.manifest_hash.hex(),
                "chunk_size": manifest.chunk_size,
                "chunking": manifest.chunking,
                "n_chunks": manifest.n_chunks,
                "n_parity": manifest.n_parity,
                "parity": f"{manifest.k}+{manifest.m}" if manifest.k else None,
            }
            for manifest in self.store.manifests_of(row.file_hash)
        ]
        return {"file": file_row_to_map(row), "manifests": manifests}

    def _do_rm(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        row = self.row_of(args.get("ref"))
        self.store.remove(row.file_hash)
        return {"file_hash": row.file_hash.hex(), "name": row.name, "size": row.size}

    def _do_pin(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        return self._set_pin(args, True)

    def _do_unpin(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        return self._set_pin(args, False)

    def _set_pin(self, args: dict[str, Any], pinned: bool) -> dict[str, Any]:
        row = self.row_of(args.get("ref"))
        self.store.pin(row.file_hash, pinned)
        return {"file_hash": row.file_hash.hex(), "name": row.name, "pinned": pinned}

    def _do_gc(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        return dataclasses.asdict(self.store.gc(self._barrier))

    def begin_verify(self, args: dict[str, Any], *, can_ask: bool) -> Scrub:
        """Begin what `verify` asks for; who calls drives it (`run_scrub`).

        Args:
            args: repair, subset [i, n] or None, restart. One without a subset goes on where one like it stopped.
            can_ask: There are peers to ask.
        Raises:
            UsageError: The subset.
        """
        subset = args.get("subset")
        return self.store.scrub(
            repair=bool(args.get("repair")), ask=can_ask, subset=(int(subset[0]), int(subset[1])) if subset else None,
            name=None if subset else "verify", restart=bool(args.get("restart")),
        )  # fmt: skip

    def _do_migrate(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        report = self.store.migrate(os.fsdecode(args["path"]), progress=progress)
        return {
            "files": [dataclasses.asdict(item) for item in report.files],
            "left_out": [list(item) for item in report.left_out],
            "bytes": report.bytes,
        }

    def _do_index(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        return {"index": self.store.index_json()}

    def _do_stats(self, args: dict[str, Any], fds: list[int], progress: Progress) -> dict[str, Any]:
        return dict(self.store.stats())
