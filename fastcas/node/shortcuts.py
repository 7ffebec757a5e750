"""`fastcas.store` and `fastcas.get`: one synchronous call each, with or without a node on the storage folder."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastcas.config import default_storage, storage_root
from fastcas.errors import NotFound, PermissionDenied, UsageError
from fastcas.fetch.origin import parse_origin
from fastcas.ids import PeerAddr, parse_chunk_size, parse_member, parse_parity, parse_peer, parse_rate
from fastcas.limits import FETCH_TIMEOUT_S, STALL_TIMEOUT_S
from fastcas.metadata import check_chunking
from fastcas.node.access import open_access
from fastcas.store import StoredFile
from fastcas.store.paths import shown

__all__ = ["Peer", "Progress", "get", "peer_text", "rate_of", "store"]

T = TypeVar("T")
Peer = str | tuple[str, int] | PeerAddr
Progress = Callable[[dict[str, Any]], None]


def store(
    path: str | os.PathLike[str],
    *,
    storage_dir: str | os.PathLike[str] | None = None,
    chunk_size: int | str | None = None,
    chunking: str = "fixed",
    parity: tuple[int, int] | str | None = None,
    in_place: bool = False,
    progress: Progress | None = None,
) -> StoredFile:
    """Store a file or directory; a node that runs on the storage folder announces it at once.

    Args:
        path: File or directory.
        storage_dir: Storage folder; default `$FASTCAS_STORAGE`, else `./storage`; made if it is not there.
        chunk_size: Bytes, or text such as "1MiB"; None or "auto": automatic. Cut by content: of the average chunk.
        chunking: "fixed", or "cdc": cut by content, so that another version shares what did not change; no parity.
        parity: (k, m) or "k+m", None: no parity.
        in_place: Seed from the file where it is.
        progress: Called with {"done", "total"} in bytes.
    Raises:
        NotFound, PermissionDenied, FileChanged: The path.
        UsageError: An argument.
        StoreLocked, StoreFull, StoreError: The storage folder.
    """
    size = parse_chunk_size(chunk_size) if isinstance(chunk_size, str) else chunk_size
    shape = parse_parity(parity) if isinstance(parity, str) else parity
    check_chunking(chunking, shape)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise NotFound(f"{shown(path)}: no such file or directory") from exc
    except PermissionError as exc:
        raise PermissionDenied(f"{shown(path)}: permission denied") from exc
    except OSError as exc:
        raise UsageError(f"path: {shown(path)}: {exc.strerror}") from exc
    is_dir = os.path.isdir(f"/proc/self/fd/{fd}")
    real = os.path.realpath(path)
    args = {
        "path": os.fsencode(real), "name": os.path.basename(real), "is_dir": is_dir, "chunk_size": size,
        "chunking": chunking, "parity": list(shape) if shape is not None else None, "in_place": in_place,
    }  # fmt: skip

    def work() -> StoredFile:
        access = open_access(storage_root(storage_dir or default_storage()), create=True)
        try:
            return StoredFile(**access.call("store", args, [] if is_dir else [fd], progress))
        finally:
            access.close()

    try:
        return _beside_a_loop(work)
    finally:
        os.close(fd)


def get(
    ref: str,
    out: str | os.PathLike[str] | None = None,
    *,
    peers: Sequence[Peer] = (),
    bootstrap: Sequence[Peer] = (),
    storage_dir: str | os.PathLike[str] | None = None,
    timeout: float = FETCH_TIMEOUT_S,
    stall_timeout: float = STALL_TIMEOUT_S,
    force: bool = False,
    origins: Sequence[str] = (),
    max_download: int | str | None = None,
    seed_from: Sequence[str | os.PathLike[str]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Fetch a file or collection by hash or link and return where it is.

    Args:
        ref: 64-hex hash, or a fastcas:// link; followed by /path: that file of the collection.
        out: File (for a directory: folder) to create; None: the stored name in the current folder.
        peers: Nodes to ask, "host:port" or (host, port).
        bootstrap: DHT nodes to ask through.
        storage_dir: As for `store`; a node that runs there fetches the file and serves it from then on.
        timeout: Seconds for the first peer and the manifest.
        stall_timeout: Seconds with next to nothing from anybody, after which the download ends.
        force: Replace a destination with other content.
        origins: URLs of HTTP servers that have the file, for chunks that no peer has.
        max_download: Limit of the rate, bytes per second or text such as "10M".
        seed_from: Files and folders, such as the version before: chunks that lie in them are not fetched.
        include, exclude: Patterns for the files of a collection, as in `fastcas.fetch.choosing`; without: all.
        progress: Called with {"done", "total", "rate_Bps", "peers", "waiting_on"}.
    Raises:
        UsageError: An argument.
        NoPeers, NotFound: Nobody has it, or the collection has no such file.
        DestinationExists: The destination has other content; it was left alone.
        FastCASError: As `fastcas.fetch.download`; the part file is kept where it can be resumed.
    """
    args = {
        "ref": str(parse_member(ref)), "out": os.fsencode(os.path.abspath(out)) if out is not None else None,
        "folder": os.fsencode(os.getcwd()), "peers": [peer_text(p) for p in peers],
        "bootstrap": [peer_text(p) for p in bootstrap], "timeout_s": timeout,
        "stall_timeout_s": stall_timeout, "force": force,
        "origins": [parse_origin(url, "origins") for url in origins],
        "max_download_Bps": rate_of(max_download),
        "seed_from": [os.fsencode(os.path.abspath(path)) for path in seed_from],
        "include": list(include), "exclude": list(exclude),
    }  # fmt: skip

    if include or exclude:
        from fastcas.fetch.choosing import choice_of

        choice_of(args)

    def work() -> Path:
        access = open_access(storage_root(storage_dir or default_storage()), optional=True)
        try:
            return Path(access.call("get", args, on_progress=progress)["path"])
        finally:
            access.close()

    return _beside_a_loop(work)


def rate_of(rate: int | str | None) -> int | None:
    """Return a limit in bytes per second, given as a number or as text.

    Raises:
        UsageError: Neither.
    """
    return None if rate is None else parse_rate(str(rate), "max_download")


def peer_text(peer: Peer) -> str:
    """Return a peer as "host:port", checked."""
    text = peer if isinstance(peer, str) else str(peer if isinstance(peer, PeerAddr) else PeerAddr(*peer))
    return str(parse_peer(text, "peer"))


def _beside_a_loop(work: Callable[[], T]) -> T:
    """Do blocking work here, or in a thread where this thread runs an event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work).result()
