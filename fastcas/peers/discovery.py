"""The discovery seam: one protocol for every way to find peers, and the backends that need no other process.

A backend yields *hints*: addresses that may have a file or a chunk. Hints stream, in the order in which they
become known; an iterator ends when the backend has nothing more to say or the deadline is over. Metadata hints
are what some publisher claims about a file; the manifest that they name is fetched and proven elsewhere.

`StaticDiscovery` knows the addresses that the user named, `MemoryDiscovery` is a whole network in one object
(one process, several nodes), `CompositeDiscovery` races any number of backends and merges what they say.
`fastcas.peers.ring_discovery` has the backend that talks to a DHT process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from fastcas.errors import FastCASError
from fastcas.ids import PeerAddr

__all__ = [
    "CompositeDiscovery",
    "Discovery",
    "MemoryDiscovery",
    "MemoryNetwork",
    "MetadataHint",
    "NodeHint",
    "PeerHint",
    "StaticDiscovery",
]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeerHint:
    """Somebody who may have what was asked for.

    Attributes:
        node_id: 40 lower-case hex digits, or None where only an address is known.
        ip: Literal IP address (a host name only where the user named it).
        port: TCP data port.
        source: Who said so: "dht", "static", "memory", "link", "swarm".
    """

    node_id: str | None
    ip: str
    port: int
    source: str

    @property
    def addr(self) -> PeerAddr:
        """The data address alone."""
        return PeerAddr(self.ip, self.port)


@dataclass(frozen=True, slots=True)
class NodeHint:
    """One entry of a routing table: a DHT node and its UDP address."""

    node_id: str
    ip: str
    port: int


@dataclass(frozen=True, slots=True)
class MetadataHint:
    """What one publisher says about a file. A hint: name and size are for people, the manifest is still unproven.

    Attributes:
        name: File name as published, unescaped.
        size: Bytes.
        manifest_hash: SHA-256 of the manifest, 32 bytes.
        publisher: Public key (64 hex digits) that signed the record, or the backend's name.
    """

    name: str
    size: int
    manifest_hash: bytes
    publisher: str


@runtime_checkable
class Discovery(Protocol):
    """How to find peers, and how to be found. Hashes are 32 bytes; deadlines are seconds from the call."""

    @property
    def name(self) -> str:
        """Short name for messages and statistics."""
        ...

    def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Stream up to about `want` peers that may have (part of) the file."""
        ...

    def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Stream (chunk hash, peer) pairs, up to about `want` peers for each chunk."""
        ...

    async def announce_files(self, items: Sequence[tuple[bytes, int]]) -> int:
        """Say that this node has `have` thousandths of each file, until withdrawn; return records stored now."""
        ...

    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        """Say that this node has these chunks; return how many are known to somebody."""
        ...

    async def withdraw(
        self, files: Sequence[bytes] = (), *, chunks: Sequence[bytes] = (), everything: bool = False
    ) -> None:
        """Take back announcements: of these files and chunks, or all of them. Chunks may take hours to be forgotten."""
        ...

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Publish name, size and manifest of a file; return how many hold the record."""
        ...

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Return what publishers say about a file, at most one hint per publisher."""
        ...

    async def routing(self) -> list[NodeHint]:
        """Return the DHT nodes in the routing table (empty for backends without one)."""
        ...

    async def stats(self) -> dict[str, Any]:
        """Return counters for people; keys are the backend's own."""
        ...

    async def close(self) -> None:
        """Release everything; idempotent."""
        ...


class StaticDiscovery:
    """The peers that the user named: everybody of them may have everything. Announces nowhere."""

    name = "static"

    def __init__(self, peers: Iterable[PeerAddr | tuple[str, int]], *, source: str = "static") -> None:
        """Remember `peers`, in this order, without duplicates."""
        hints = (PeerHint(None, p.ip, p.port, source) if isinstance(p, PeerAddr) else PeerHint(None, *p, source)
                 for p in peers)  # fmt: skip
        self._hints = list(dict.fromkeys(hints))

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Yield all named peers; `want` does not cut what the user named."""
        for hint in self._hints:
            yield hint

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Yield every (chunk, named peer) pair."""
        for digest in hashes:
            for hint in self._hints:
                yield digest, hint

    async def announce_files(self, items: Sequence[tuple[bytes, int]]) -> int:
        """Announce nowhere: 0."""
        return 0

    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        """Announce nowhere: 0."""
        return 0

    async def withdraw(
        self, files: Sequence[bytes] = (), *, chunks: Sequence[bytes] = (), everything: bool = False
    ) -> None:
        """Nothing was announced."""

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Publish nowhere: 0."""
        return 0

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Know nothing about files."""
        return []

    async def routing(self) -> list[NodeHint]:
        """Have no routing table."""
        return []

    async def stats(self) -> dict[str, Any]:
        """Return the number of named peers."""
        return {"peers": len(self._hints)}

    async def close(self) -> None:
        """Hold nothing."""


@dataclass
class MemoryNetwork:
    """What all `MemoryDiscovery` objects of one test or one process share."""

    files: dict[bytes, dict[PeerHint, int]] = field(default_factory=dict)
    chunks: dict[bytes, set[PeerHint]] = field(default_factory=dict)
    metadata: dict[bytes, dict[str, MetadataHint]] = field(default_factory=dict)
    members: dict[str, NodeHint] = field(default_factory=dict)


class MemoryDiscovery:
    """One member of a `MemoryNetwork`; without `me` it only asks. Loses nothing, expires nothing, waits for nobody."""

    name = "memory"

    def __init__(self, network: MemoryNetwork, me: PeerHint | None = None) -> None:
        """Join `network` as `me`, or as somebody who only asks."""
        self._network = network
        self._me = me
        if me is not None and me.node_id is not None:
            network.members[me.node_id] = NodeHint(me.node_id, me.ip, me.port)

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Yield the announcers of a file but for ourselves, fullest first."""
        known = self._network.files.get(file_hash, {})
        for hint in sorted(known, key=lambda h: (-known[h], h.ip, h.port))[: want + 1]:
            if hint != self._me:
                yield hint

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Yield the announcers of each chunk but for ourselves."""
        for digest in hashes:
            for hint in list(self._network.chunks.get(digest, ()))[: want + 1]:
                if hint != self._me:
                    yield digest, hint

    async def announce_files(self, items: Sequence[tuple[bytes, int]]) -> int:
        """Record the files under our name; 0 for somebody who only asks."""
        if self._me is None:
            return 0
        for file_hash, have in items:
            self._network.files.setdefault(file_hash, {})[self._me] = have
        return len(items)

    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        """Record the chunks under our name; 0 for somebody who only asks."""
        if self._me is None:
            return 0
        for key in keys:
            self._network.chunks.setdefault(key, set()).add(self._me)
        return len(keys)

    async def withdraw(
        self, files: Sequence[bytes] = (), *, chunks: Sequence[bytes] = (), everything: bool = False
    ) -> None:
        """Forget these files and chunks under our name, or all that we announced."""
        if self._me is None:
            return
        for file_hash in list(self._network.files) if everything else files:
            self._network.files.get(file_hash, {}).pop(self._me, None)
        for key in list(self._network.chunks) if everything else chunks:
            self._network.chunks.get(key, set()).discard(self._me)

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Keep one hint per publisher."""
        publisher = self._me.node_id if self._me is not None and self._me.node_id else "memory"
        hint = MetadataHint(name, size, manifest_hash, publisher)
        self._network.metadata.setdefault(file_hash, {})[publisher] = hint
        return 1

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Return every publisher's hint."""
        return list(self._network.metadata.get(file_hash, {}).values())

    async def routing(self) -> list[NodeHint]:
        """Return the other members."""
        mine = self._me.node_id if self._me else None
        return [node for node_id, node in self._network.members.items() if node_id != mine]

    async def stats(self) -> dict[str, Any]:
        """Return the sizes of the shared maps."""
        net = self._network
        return {"files": len(net.files), "chunks": len(net.chunks), "nodes": len(net.members)}

    async def close(self) -> None:
        """Leave the members; what was announced stays until withdrawn."""
        if self._me is not None and self._me.node_id is not None:
            self._network.members.pop(self._me.node_id, None)


class CompositeDiscovery:
    """Several backends as one: finds race and merge, announcements go to everybody.

    A backend that fails is logged and left out of that one answer; the others go on. Closing it closes them all.
    """

    name = "composite"

    def __init__(self, backends: Iterable[Discovery], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Combine `backends`; `clock` gives seconds, monotonic."""
        self.backends: list[Discovery] = list(backends)
        self._clock = clock

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Yield the first answers of all backends, one per address."""
        streams = [(b.name, b.find_file_peers(file_hash, want, deadline_s)) for b in self.backends]
        seen: set[PeerAddr] = set()
        async with aclosing(self._race(streams, deadline_s)) as hints:
            async for hint in hints:
                if hint.addr not in seen:
                    seen.add(hint.addr)
                    yield hint

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Yield the first answers of all backends, one per (chunk, address)."""
        streams = [(b.name, b.find_chunk_peers(hashes, want, deadline_s)) for b in self.backends]
        seen: set[tuple[bytes, PeerAddr]] = set()
        async with aclosing(self._race(streams, deadline_s)) as pairs:
            async for digest, hint in pairs:
                if (digest, hint.addr) not in seen:
                    seen.add((digest, hint.addr))
                    yield digest, hint

    async def _race(self, streams: list[tuple[str, AsyncIterator[T]]], deadline_s: float) -> AsyncGenerator[T, None]:
        """Merge streams as they speak, until all have ended or the deadline is over."""
        queue: asyncio.Queue[tuple[T] | None] = asyncio.Queue()

        async def pump(name: str, stream: AsyncIterator[T]) -> None:
            try:
                async for item in stream:
                    queue.put_nowait((item,))
            except (FastCASError, OSError) as exc:
                log.warning("discovery backend failed backend=%s error=%s", name, exc)
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.ensure_future(pump(name, stream)) for name, stream in streams]
        end = self._clock() + deadline_s
        running = len(tasks)
        try:
            while running:
                try:
                    async with asyncio.timeout(max(end - self._clock(), 0.0)):
                        entry = await queue.get()
                except TimeoutError:
                    return
                if entry is None:
                    running -= 1
                else:
                    yield entry[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _all(self, calls: list[tuple[str, Coroutine[Any, Any, T]]]) -> list[T]:
        """Await every call; log and drop the ones that fail."""
        results = await asyncio.gather(*(call for _, call in calls), return_exceptions=True)
        good: list[T] = []
        for (name, _), result in zip(calls, results, strict=True):
            if isinstance(result, FastCASError | OSError):
                log.warning("discovery backend failed backend=%s error=%s", name, result)
            elif isinstance(result, BaseException):
                raise result
            else:
                good.append(result)
        return good

    async def announce_files(self, items: Sequence[tuple[bytes, int]]) -> int:
        """Announce everywhere; return the sum."""
        return sum(await self._all([(b.name, b.announce_files(items)) for b in self.backends]))

    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        """Announce everywhere; return the best backend's count."""
        return max(await self._all([(b.name, b.announce_chunks(keys)) for b in self.backends]), default=0)

    async def withdraw(
        self, files: Sequence[bytes] = (), *, chunks: Sequence[bytes] = (), everything: bool = False
    ) -> None:
        """Withdraw everywhere."""
        await self._all([(b.name, b.withdraw(files, chunks=chunks, everything=everything)) for b in self.backends])

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Publish everywhere; return the sum."""
        return sum(
            await self._all([(b.name, b.put_metadata(file_hash, name, size, manifest_hash)) for b in self.backends])
        )

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Return all backends' hints, without repetition."""
        answers = await self._all([(b.name, b.get_metadata(file_hash, deadline_s)) for b in self.backends])
        return list(dict.fromkeys(hint for answer in answers for hint in answer))

    async def routing(self) -> list[NodeHint]:
        """Return all backends' nodes, without repetition."""
        answers = await self._all([(b.name, b.routing()) for b in self.backends])
        return list(dict.fromkeys(node for answer in answers for node in answer))

    async def stats(self) -> dict[str, Any]:
        """Return {backend name: its counters}."""
        names = [b.name for b in self.backends]
        return dict(zip(names, await asyncio.gather(*(b.stats() for b in self.backends)), strict=True))

    async def close(self) -> None:
        """Close every backend."""
        await self._all([(b.name, b.close()) for b in self.backends])
