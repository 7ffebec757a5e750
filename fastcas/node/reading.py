"""`fastcas.open`: a file in the network as a seekable, read-only file object; every byte proven before it is seen.

The event loop runs in a thread of its own. A node on the storage folder is asked like a peer and for peers; without
one, a store that has the whole file is read instead of the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastcas.config import default_storage, storage_root
from fastcas.errors import (
    FastCASError,
    IntegrityError,
    Interrupted,
    NodeUnavailable,
    StoreLocked,
    StoreNotFound,
    UsageError,
)
from fastcas.fetch.choosing import member_of
from fastcas.fetch.download import Settings
from fastcas.fetch.member import checked_small
from fastcas.fetch.ordered import READ_AHEAD, OrderedFetch
from fastcas.fetch.origin import parse_origin
from fastcas.fetch.pacing import Pace
from fastcas.ids import Link, PeerAddr, parse_member, parse_peer, short
from fastcas.limits import COLLECTION_SIZE_MAX, FETCH_TIMEOUT_S, MIB, STALL_TIMEOUT_S
from fastcas.metadata import Manifest
from fastcas.node.access import check_reachable, dht_client
from fastcas.node.control_client import AsyncControlClient
from fastcas.node.download_report import ProgressRelay
from fastcas.node.listeners import reachable_host
from fastcas.node.node_discovery import NodeDiscovery
from fastcas.node.shortcuts import Peer, Progress, peer_text, rate_of
from fastcas.peers.discovery import Discovery
from fastcas.store import Store
from fastcas.store.collection import MAGIC, Collection, FileEntry
from fastcas.store.paths import shown

__all__ = ["open", "open_raw"]

T = TypeVar("T")


def open(
    ref: str,
    *,
    peers: Sequence[Peer] = (),
    bootstrap: Sequence[Peer] = (),
    storage_dir: str | os.PathLike[str] | None = None,
    timeout: float = FETCH_TIMEOUT_S,
    stall_timeout: float = STALL_TIMEOUT_S,
    origins: Sequence[str] = (),
    max_download: int | str | None = None,
    progress: Progress | None = None,
) -> io.BufferedReader:
    """Open a file in the network for reading. By link bytes come at once, wherever it is read.

    On a bare hash a byte is handed out only when everything from it to the end has been fetched and checked. What was
    fetched lies in a temporary file (of at most the file's size) until the object is closed.

    Args:
        ref: 64-hex hash, or a fastcas:// link; followed by /path: that file of the collection. A collection itself is
            read as the file that describes it.
        peers, bootstrap, storage_dir, timeout, stall_timeout, origins, max_download: As for `fastcas.get`.
        progress: Called with what `fastcas.get` tells its own, while bytes are fetched, from a thread that fetches: it
            must not read the object. "done" is what was fetched of the whole, which is never all where parts were read.
    Raises:
        UsageError: An argument.
        NoPeers, NotFound: Nobody has it, or the collection has no such file.
        FastCASError: Also from reading: as `fastcas.fetch.download`.
    """
    args = {
        "ref": str(parse_member(ref)), "peers": [peer_text(p) for p in peers],
        "bootstrap": [peer_text(p) for p in bootstrap], "timeout_s": timeout, "stall_timeout_s": stall_timeout,
        "origins": [parse_origin(url, "origins") for url in origins], "max_download_Bps": rate_of(max_download),
    }  # fmt: skip
    root = storage_root(storage_dir or default_storage())
    return io.BufferedReader(open_raw(args, root, keeps=True, progress=progress), MIB)


def open_raw(args: dict[str, Any], root: Path, *, keeps: bool, progress: Progress | None = None) -> RawReader:
    """`open` with the arguments of a `get` request.

    Args:
        root: Storage folder; it need not be there.
        keeps: What was read can be read again; if not, its space is given back.
        progress: See `open`.
    """
    link = parse_member(str(args["ref"]))
    with contextlib.suppress(StoreNotFound, StoreLocked):
        store = Store.open(root)
        try:
            here = _in_store(store, link)
        except BaseException:
            store.close()
            raise
        if here is not None:
            return RawReader(here)
        store.close()
    relay = ProgressRelay(progress) if progress is not None else None
    return RawReader(_NetworkSource(args, link, root, keeps=keeps, progress=relay))


def _in_store(store: Store, link: Link) -> _StoreSource | None:
    """A file that the store has whole, or a file of a collection that it has."""
    row = store.file(link.file_hash)
    manifest = store.manifest(link.manifest_hash or row.manifest_hash) if row and row.is_complete else None
    if row is None or manifest is None:
        return None
    source = _StoreSource(store, manifest)
    if link.path is None:
        return source
    if not row.is_collection:
        raise _no_collection(link)
    collection = Collection.decode(source.read(0, source.size))
    entry = member_of(collection, link.path, link.file_hash)
    if isinstance(entry, FileEntry):
        member = store.manifest(entry.manifest_hash)
        return None if member is None else _StoreSource(store, member)
    data = b""
    if entry.size:
        pack = store.manifest(collection.packs[entry.pack].manifest_hash)
        if pack is None:
            return None
        data = _StoreSource(store, pack).read(entry.offset, entry.offset + entry.size)
    return _StoreSource(store, manifest, checked_small(entry, data))


def _no_collection(link: Link) -> UsageError:
    path = shown(link.path or "")
    return UsageError(f"REF: {short(link.file_hash)} is a file and no collection, so it has no '{path}'")


class RawReader(io.RawIOBase):
    """Unbuffered reading, from several threads if need be: each read takes the bytes after those of the one before.

    `close` may come from any thread; whoever reads meanwhile gets ValueError.
    """

    def __init__(self, source: _StoreSource | _NetworkSource) -> None:
        self._source = source
        self._position = 0
        self._reading = threading.Lock()
        self.size: int = source.size

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True; a jump costs nothing until something is read there."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; beyond the end nothing is read."""
        self._check_open()
        with self._reading:
            base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence)
            if base is None or base + offset < 0:
                raise ValueError(f"seek: expected a position in the file, got offset {offset}, whence {whence}")
            self._position = base + offset
            return self._position

    def tell(self) -> int:
        """Return the position."""
        self._check_open()
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position, at most 16 MiB; 0 at the end."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        with self._reading:
            n = max(0, min(len(view), self.size - self._position, READ_AHEAD))
            if n == 0:
                return 0
            try:
                done = self._source.read_into(view[:n], self._position)
            except FastCASError:
                self._check_open()
                raise
            self._position += done
            return done

    def close(self) -> None:
        """Stop fetching and free everything. Idempotent."""
        if not self.closed:
            super().close()
            self._source.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


class _StoreSource:
    """A file that the store has; `content` where it is small and was read already."""

    def __init__(self, store: Store, manifest: Manifest, content: bytes | None = None) -> None:
        self._store = store
        self._manifest = manifest
        self._content = content
        self._lock = threading.Lock()
        self._is_closed = False
        self.size = manifest.size if content is None else len(content)

    def read(self, start: int, end: int) -> bytes:
        data = memoryview(bytearray(end - start))
        at = 0
        while at < len(data):
            at += self.read_into(data[at:], start + at)
        return bytes(data)

    def read_into(self, view: memoryview, start: int) -> int:
        if self._content is not None:
            return _copy(self._content[start:], view)
        index = self._manifest.chunk_at(start)
        skip = start - self._manifest.offset_of(index)
        with self._lock:  # the store is one thread's, and must not be closed meanwhile
            if self._is_closed:
                raise Interrupted("closed")
            data = self._store.read_chunk(self._manifest.hash_of(index))
        if data is None:
            raise IntegrityError(f"chunk {short(self._manifest.hash_of(index))}: damaged in the store; verify --repair")
        return _copy(memoryview(data)[skip:], view)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._store.close()


def _copy(data: bytes | memoryview, view: memoryview) -> int:
    n = min(len(data), len(view))
    view[:n] = data[:n]
    return n


@contextlib.asynccontextmanager
async def _opened(link: Link, settings: Settings, *, read_ahead: int = READ_AHEAD) -> AsyncIterator[OrderedFetch]:
    fetch = OrderedFetch(link, settings, keeps=True, read_ahead=read_ahead)
    try:
        await fetch.open()
        yield fetch
    finally:
        await fetch.close()


class _NetworkSource:
    """A file that others have, fetched by a thread with an event loop."""

    def __init__(
        self, args: dict[str, Any], link: Link, root: Path, *, keeps: bool, progress: ProgressRelay | None
    ) -> None:
        self._progress = progress
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._fetch: OrderedFetch | None = None
        self._content: bytes | None = None  # of a small file, which is read at once
        self._task: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastcas-open", daemon=True)
        self._thread.start()
        try:
            self.size = self._call(self._open(args, link, root, keeps=keeps))
        except BaseException:
            self.close()
            raise

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._is_closed:
                work.close()
                raise Interrupted("closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _open(self, args: dict[str, Any], link: Link, root: Path, *, keeps: bool) -> int:
        opened: asyncio.Future[None] = self._loop.create_future()
        self._task = self._loop.create_task(self._live(args, link, root, keeps, opened))
        await asyncio.wait([opened, self._task], return_when=asyncio.FIRST_COMPLETED)
        if not opened.done():
            self._task.result()
        if self._content is not None:
            return len(self._content)
        assert self._fetch is not None and self._fetch.manifest is not None
        return self._fetch.manifest.size

    async def _live(
        self, args: dict[str, Any], link: Link, root: Path, keeps: bool, opened: asyncio.Future[None]
    ) -> None:
        peers = [parse_peer(str(text), "--peer") for text in args.get("peers", [])]
        rate = args.get("max_download_Bps")
        async with contextlib.AsyncExitStack() as stack:
            try:
                discovery: Discovery | None = await self._ask_node(root, peers, stack)
            except NodeUnavailable:
                check_reachable(link, peers, args)
                is_needed = not peers and not link.peers
                discovery = await stack.enter_async_context(dht_client(args, link, is_needed=is_needed))
            settings = Settings(
                discovery=discovery, peers=peers, timeout_s=float(args["timeout_s"]),
                stall_timeout_s=float(args["stall_timeout_s"]), origins=args["origins"],
                pace=Pace(rate) if rate else None,
            )  # fmt: skip
            if link.path is not None:
                link, settings = await self._find_member(link, link.path, settings)
            if self._content is None:
                fetch = OrderedFetch(link, replace(settings, progress=self._progress), keeps=keeps)
                stack.push_async_callback(fetch.close)
                await fetch.open()
                self._fetch = fetch
            opened.set_result(None)
            await self._closing.wait()

    async def _find_member(self, link: Link, path: str, settings: Settings) -> tuple[Link, Settings]:
        """Read a collection; returns the link of its file at `path`, and whom to ask for it.

        A small file is cut out of its pack here.
        """
        async with _opened(replace(link, path=None), replace(settings, origins=settings.origins_of_file())) as listing:
            assert listing.manifest is not None
            size = listing.manifest.size
            if size > COLLECTION_SIZE_MAX or await listing.read(0, min(size, len(MAGIC))) != MAGIC:
                raise _no_collection(link)
            collection = Collection.decode(await listing.read(0, size))
            peers = listing.peers()
        entry = member_of(collection, path, link.file_hash)
        settings = replace(settings, peers=peers, origins=settings.origins_of_member(path))
        if isinstance(entry, FileEntry):
            return Link(entry.file_hash, entry.manifest_hash), settings
        data = b""
        if entry.size:
            pack = collection.packs[entry.pack]
            of_pack = replace(settings, origins=())
            async with _opened(Link(pack.file_hash, pack.manifest_hash), of_pack, read_ahead=0) as fetch:
                data = await fetch.read(entry.offset, entry.offset + entry.size)
        self._content = checked_small(entry, data)
        return link, settings

    async def _ask_node(self, root: Path, peers: list[PeerAddr], stack: contextlib.AsyncExitStack) -> Discovery:
        """Let a node that runs on the storage folder be a peer, and find others.

        Raises:
            NodeUnavailable: None runs there.
        """
        client = await AsyncControlClient.connect(root)
        stack.push_async_callback(client.close)
        data = (await client.call("status", {}))["data"]
        if data["port"]:
            peers.append(PeerAddr(reachable_host(data["host"]) or "127.0.0.1", data["port"]))
        return NodeDiscovery(client)

    def read_into(self, view: memoryview, start: int) -> int:
        if self._content is not None:
            return _copy(self._content[start:], view)
        assert self._fetch is not None
        self._call(self._fetch.ready(start, start + len(view)))
        with self._lock:
            if self._is_closed:
                raise Interrupted("closed")
            return self._fetch.read_into(view, start)

    async def _end(self) -> None:
        self._closing.set()
        if self._fetch is None and self._content is None and self._task is not None:
            self._task.cancel()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
