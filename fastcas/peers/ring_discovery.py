"""`RingDiscovery`: the discovery backend that talks to a DHT process over two shared-memory rings.

A request is one msgpack map {id, op, …} on the request ring, an answer one map {id, ok, …} on the answer ring,
several of them (`more`) for a stream. What is outstanding is remembered as bytes, so that it is asked again when
the DHT process was replaced and new rings came (`replace_rings`); so are the chunks that were announced, which nobody
else remembers. The other side may be dead or hostile: every
answer is checked for its shape and an ill-formed one is dropped and counted.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from fastcas.errors import FastCASError, LocalProtocolError, NodeUnavailable, UsageError
from fastcas.peers.discovery import MetadataHint, NodeHint, PeerHint

__all__ = ["RingDiscovery", "RingLike"]

log = logging.getLogger(__name__)

KEYS_PER_REQUEST = 8192  # 256 KiB of hashes: well below a ring's largest message
FILES_PER_REQUEST = 4096
NAMED_MAX = 1_000_000  # chunks that a new DHT process is told again: about 100 B each
ANSWER_GRACE_S = 2.0  # beyond the deadline that the DHT process was given
CALL_DEADLINE_S = 15.0
ANNOUNCE_DEADLINE_S = 60.0
RING_FULL_POLL_S = 0.005
MAX_PEERS_PER_ANSWER = 65_536


class RingLike(Protocol):
    """What is used of `fastcas.table.Ring`."""

    @property
    def eventfd(self) -> int:
        """Signalled by the producer."""
        ...

    def push(self, message: bytes, /) -> bool:
        """Append a message; False when there is no room."""
        ...

    def drain(self) -> list[bytes]:
        """Clear the eventfd and take every message."""
        ...

    def close(self) -> None:
        """Unmap."""
        ...


@dataclass(slots=True)
class _Outstanding:
    payload: bytes
    answers: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)


class RingDiscovery:
    """Discovery through a DHT process. Belongs to one event loop; attaches to it on first use.

    Finds never raise for a slow or absent DHT process: the stream just ends at its deadline. Announcing and asking
    for facts raises `NodeUnavailable` then.
    """

    name = "dht"

    def __init__(self, req_ring: RingLike, ans_ring: RingLike, *, owns_rings: bool = True) -> None:
        """Use `req_ring` (to the DHT process) and `ans_ring` (from it); `close` closes them if `owns_rings`."""
        self._req = req_ring
        self._ans = ans_ring
        self._owns_rings = owns_rings
        # Never those of an asker before us, whose answers may still be on the way.
        self._ids = itertools.count(time.monotonic_ns())
        self._outstanding: dict[int, _Outstanding] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._named: set[bytes] = set()
        self._repeating: asyncio.Task[None] | None = None
        self.dropped_answers = 0

    def replace_rings(self, req_ring: RingLike, ans_ring: RingLike) -> None:
        """Go over to a new DHT process: everything outstanding is asked, and all announced chunks are told again."""
        self._detach()
        if self._owns_rings:
            self._req.close()
            self._ans.close()
        self._req = req_ring
        self._ans = ans_ring
        if self._loop is not None and not self._closed:
            self._loop.add_reader(ans_ring.eventfd, self._on_answers)
            for entry in self._outstanding.values():
                if not req_ring.push(entry.payload):
                    log.warning("new request ring is full; a request waits for its deadline")
            if self._named:
                self._stop_repeating()
                self._repeating = self._loop.create_task(self._repeat_named())

    # --- Discovery ---

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Stream the swarm's peers as the lookup meets them."""
        request = {"op": "find_file", "file_hash": file_hash, "want": want, "deadline_s": deadline_s}
        seen: set[PeerHint] = set()
        async with aclosing(self._stream(request, deadline_s)) as answers:
            async for answer in answers:
                for hint in _peers_in(answer):
                    if hint is not None and hint not in seen:
                        seen.add(hint)
                        yield hint

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Stream (chunk, peer) pairs; many chunks cost few datagrams."""
        for batch in _batches(hashes, KEYS_PER_REQUEST):
            request = {"op": "find_chunks", "keys": b"".join(batch), "want": want, "deadline_s": deadline_s}
            async with aclosing(self._stream(request, deadline_s)) as answers:
                async for answer in answers:
                    for index, hint in _chunk_pairs(answer, len(batch)):
                        yield batch[index], hint

    async def announce_files(self, items: Sequence[tuple[bytes, int]]) -> int:
        """Announce files now; the DHT process repeats it until withdrawn."""
        stored = 0
        for batch in _batches(items, FILES_PER_REQUEST):
            answer = await self._call({"op": "announce_files", "files": [list(i) for i in batch]}, ANNOUNCE_DEADLINE_S)
            stored += _number(answer, "stored")
        return stored

    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        """Announce chunks now; return how many are stored with somebody. They are repeated until withdrawn."""
        if len(self._named) + len(keys) <= NAMED_MAX:
            self._named.update(keys)
        else:
            log.warning("more than %d chunks announced by name: a new DHT process is not told %d", NAMED_MAX, len(keys))
        return await self._announce_chunks(keys)

    async def _announce_chunks(self, keys: Sequence[bytes]) -> int:
        stored = 0
        for batch in _batches(keys, KEYS_PER_REQUEST):
            answer = await self._call({"op": "announce_chunks", "keys": b"".join(batch)}, ANNOUNCE_DEADLINE_S)
            stored += _number(answer, "stored")
        return stored

    async def withdraw(
        self, files: Sequence[bytes] = (), *, chunks: Sequence[bytes] = (), everything: bool = False
    ) -> None:
        """Take back announcements."""
        self._named.difference_update(self._named if everything else chunks)
        for batch in _batches(chunks, KEYS_PER_REQUEST):
            await self._call({"op": "withdraw_chunks", "keys": b"".join(batch)}, CALL_DEADLINE_S)
        if files or everything:
            await self._call({"op": "withdraw", "files": list(files), "all": everything}, CALL_DEADLINE_S)

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Publish a signed record."""
        request = {"op": "put_metadata", "file_hash": file_hash, "name": name, "size": size,
                   "manifest_hash": manifest_hash}  # fmt: skip
        return _number(await self._call(request, CALL_DEADLINE_S), "stored")

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Return the records whose signatures held."""
        request = {"op": "get_metadata", "file_hash": file_hash, "deadline_s": deadline_s}
        answer = await self._call(request, deadline_s + ANSWER_GRACE_S)
        hints = []
        for record in _list_in(answer, "records"):
            match record:
                case {
                    "name": str(name),
                    "size": int(size),
                    "manifest_hash": bytes(digest),
                    "publisher": str(publisher),
                } if (  # fmt: skip
                    len(digest) == 32 and size >= 0
                ):
                    hints.append(MetadataHint(name, size, digest, publisher))
                case _:
                    self.dropped_answers += 1
        return hints

    async def routing(self) -> list[NodeHint]:
        """Return the verified contacts of the DHT process."""
        answer = await self._call({"op": "routing"}, CALL_DEADLINE_S)
        hints = (_peer_of(entry) for entry in _list_in(answer, "nodes"))
        return [NodeHint(h.node_id, h.ip, h.port) for h in hints if h is not None and h.node_id is not None]

    async def stats(self) -> dict[str, Any]:
        """Return the DHT process's counters."""
        answer = await self._call({"op": "stats"}, CALL_DEADLINE_S)
        return {key: value for key, value in answer.items() if isinstance(key, str) and key not in ("id", "ok")}

    async def bootstrap(self, peers: Sequence[tuple[str, int]]) -> int:
        """Join the network through these addresses; return how many contacts there are afterwards.

        0 after a call with addresses means that none of them answered.
        """
        answer = await self._call({"op": "bootstrap", "peers": [list(p) for p in peers]}, ANNOUNCE_DEADLINE_S)
        return _number(answer, "contacts")

    async def close(self) -> None:
        """Stop listening; every waiting call ends with `NodeUnavailable`, every stream just ends. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._stop_repeating()
        self._detach()
        for entry in self._outstanding.values():
            entry.answers.put_nowait({"ok": False, "error": "NodeUnavailable", "message": "DHT process: closed"})
        if self._owns_rings:
            self._req.close()
            self._ans.close()

    # --- a new DHT process ---

    async def _repeat_named(self) -> None:
        try:
            stored = await self._announce_chunks(sorted(self._named))
        except FastCASError as error:
            log.warning("chunks could not be announced again n=%d error=%s", len(self._named), error)
        else:
            log.info("chunks announced again n=%d stored=%d", len(self._named), stored)

    def _stop_repeating(self) -> None:
        task, self._repeating = self._repeating, None
        if task is not None:
            task.cancel()

    # --- requests and answers ---

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._ans.eventfd)

    def _on_answers(self) -> None:
        try:
            messages = self._ans.drain()
        except LocalProtocolError as exc:
            log.error("answer ring is unusable: %s; waiting for new rings", exc)
            self._detach()
            return
        for raw in messages:
            try:
                answer = msgpack.unpackb(raw, strict_map_key=False)
            except (ValueError, TypeError, msgpack.UnpackException):
                answer = None
            if not isinstance(answer, dict) or not isinstance(answer.get("id"), int):
                self.dropped_answers += 1
                continue
            entry = self._outstanding.get(answer["id"])
            if entry is not None:
                entry.answers.put_nowait(answer)

    async def _send(self, request: dict[str, Any]) -> tuple[int, _Outstanding]:
        """Push a request, waiting for room; the caller bounds the wait and removes the entry."""
        if self._closed:
            raise NodeUnavailable("DHT process: closed")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._ans.eventfd, self._on_answers)
        number = next(self._ids)
        entry = _Outstanding(msgpack.packb({"id": number, **request}))
        try:
            while not self._req.push(entry.payload):
                await asyncio.sleep(RING_FULL_POLL_S)
                if self._closed:
                    raise NodeUnavailable("DHT process: closed")
        except ValueError as exc:
            raise LocalProtocolError(f"DHT request {request['op']}: {len(entry.payload)} B do not fit: {exc}") from exc
        self._outstanding[number] = entry
        return number, entry

    async def _call(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Return the one answer to a request, or raise its error."""
        number = 0
        try:
            async with asyncio.timeout(deadline_s):
                number, entry = await self._send(request)
                answer = await entry.answers.get()
        except TimeoutError:
            raise NodeUnavailable(
                f"DHT process: no answer to {request['op']} within {deadline_s:.0f} s; nothing is known to be stored"
            ) from None
        finally:
            self._outstanding.pop(number, None)
        if answer.get("ok") is not True:
            raise _error_in(answer)
        return answer

    async def _stream(self, request: dict[str, Any], deadline_s: float) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answers to a request until the last one, an error, or the deadline."""
        number = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s + ANSWER_GRACE_S
        try:
            async with asyncio.timeout_at(end):
                number, entry = await self._send(request)
            while True:
                async with asyncio.timeout_at(end):
                    answer = await entry.answers.get()
                if answer.get("ok") is not True:
                    log.debug("find ended op=%s error=%s", request["op"], answer.get("message"))
                    return
                yield answer
                if answer.get("more") is not True:
                    return
        except (TimeoutError, NodeUnavailable):
            return
        finally:
            self._outstanding.pop(number, None)


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _list_in(answer: dict[str, Any], key: str) -> list[Any]:
    value = answer.get(key)
    return value[:MAX_PEERS_PER_ANSWER] if isinstance(value, list) else []


def _number(answer: dict[str, Any], key: str) -> int:
    value = answer.get(key)
    return value if isinstance(value, int) and value >= 0 else 0


def _error_in(answer: dict[str, Any]) -> FastCASError:
    message = str(answer.get("message", "no message"))
    kinds: dict[str, type[FastCASError]] = {"UsageError": UsageError, "NodeUnavailable": NodeUnavailable}
    return kinds.get(str(answer.get("error")), LocalProtocolError)(message)


def _peer_of(entry: Any) -> PeerHint | None:
    """Return a hint for [node_id, ip, port], or None for any other shape."""
    match entry:
        case [str() | None as node_id, str(ip), int(port)] if 1 <= port <= 65535:
            try:
                ipaddress.ip_address(ip)
            except ValueError:
                return None
            return PeerHint(node_id, ip, port, "dht")
    return None


def _peers_in(answer: dict[str, Any]) -> list[PeerHint | None]:
    return [_peer_of(entry) for entry in _list_in(answer, "peers")]


def _chunk_pairs(answer: dict[str, Any], n_keys: int) -> Iterator[tuple[int, PeerHint]]:
    peers = _peers_in(answer)
    for found in _list_in(answer, "found"):
        match found:
            case [int(key_index), list(peer_indexes)] if 0 <= key_index < n_keys:
                for index in peer_indexes:
                    if isinstance(index, int) and 0 <= index < len(peers):
                        hint = peers[index]
                        if hint is not None:
                            yield key_index, hint
