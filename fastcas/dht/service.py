"""Serving the owner: requests from its ring, answers on the other one (shapes: docs of `RingDiscovery`).

Every request is one bounded task, because it may take a walk through the network; answers that find the ring full
wait in order. A malformed request is answered with an error, never with silence and never with an exception.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import numpy as np

from fastcas.dht.announcer import parse_metadata_value
from fastcas.dht.peerlist import Peer
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from fastcas.errors import FastCASError, LocalProtocolError, UsageError
from fastcas.peers.ring_discovery import RingLike

__all__ = ["DhtService"]

log = logging.getLogger(__name__)

Answer = dict[str, Any]
Emit = Callable[[Answer], None]

TASKS_MAX = 1024
BACKLOG_MAX = 4096  # answers that wait for room in the ring
RETRY_S = 0.005
DEADLINE_MAX_S = 60.0
JOIN_SHARE = 0.5  # of a search's deadline may pass waiting for the first contact


class DhtService:
    """Answers one owner's requests with one node."""

    def __init__(self, server: FcServer, requests: RingLike, answers: RingLike) -> None:
        """Serve requests from `requests` on `answers`; `attach` begins."""
        self._server = server
        self._requests = requests
        self._answers = answers
        self._tasks: set[asyncio.Task[None]] = set()
        self._backlog: deque[bytes] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Begin to read requests."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._requests.eventfd, self._on_requests)
        self._on_requests()

    async def close(self) -> None:
        """Stop reading and end what is being worked on; closes the rings. Idempotent."""
        if self._loop is None:
            return
        self._loop.remove_reader(self._requests.eventfd)
        self._loop = None
        if self._retry is not None:
            self._retry.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._requests.close()
        self._answers.close()

    def _on_requests(self) -> None:
        try:
            messages = self._requests.drain()
        except LocalProtocolError as exc:
            log.error("request ring is unusable: %s; waiting for a new owner", exc)
            if self._loop is not None:
                self._loop.remove_reader(self._requests.eventfd)
            return
        for raw in messages:
            try:
                request = msgpack.unpackb(raw, strict_map_key=False)
            except (ValueError, TypeError, msgpack.UnpackException):
                request = None
            if not isinstance(request, dict) or not isinstance(request.get("id"), int):
                self._server.protocol.counters["bad_ring_requests"] += 1
                continue
            if len(self._tasks) >= TASKS_MAX:
                self._emit({"id": request["id"], **_failure(LocalProtocolError("DHT process: too many requests"))})
                continue
            task = asyncio.get_running_loop().create_task(self._serve(request["id"], request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, number: int, request: dict[Any, Any]) -> None:
        def emit(answer: Answer) -> None:
            self._emit({"id": number, "ok": True, **answer})

        try:
            last = await self._answer(request, emit)
        except FastCASError as exc:
            self._emit({"id": number, **_failure(exc)})
        except Exception as exc:
            log.exception("request failed op=%s", request.get("op"))
            self._emit({"id": number, **_failure(LocalProtocolError(f"DHT process: {type(exc).__name__}: {exc}"))})
        else:
            emit(last)

    def _emit(self, answer: Answer) -> None:
        data: bytes = msgpack.packb(answer)
        if self._backlog or not self._push(data):
            if len(self._backlog) >= BACKLOG_MAX:
                self._server.protocol.counters["answers_lost"] += 1
                return
            self._backlog.append(data)
            self._arm()

    def _push(self, data: bytes) -> bool:
        try:
            return self._answers.push(data)
        except (UsageError, LocalProtocolError) as exc:
            log.error("answer of %d B is lost: %s", len(data), exc)
            return True

    def _arm(self) -> None:
        if self._retry is None and self._loop is not None:
            self._retry = self._loop.call_later(RETRY_S, self._drain_backlog)

    def _drain_backlog(self) -> None:
        self._retry = None
        while self._backlog and self._push(self._backlog[0]):
            self._backlog.popleft()
        if self._backlog:
            self._arm()

    # --- operations ---

    async def _answer(self, request: dict[Any, Any], emit: Emit) -> Answer:
        """Return the last answer to a request, after emitting partial ones."""
        server = self._server
        match request:
            case {
                "op": "find_file",
                "file_hash": bytes(file_hash),
                "want": int(want),
                "deadline_s": int() | float() as s,
            }:
                _need(len(file_hash) == 32, "file_hash: expected 32 B")
                return await self._find_file(file_hash, max(want, 1), _deadline(s), emit)
            case {"op": "find_chunks", "keys": bytes(keys), "want": int(want), "deadline_s": int() | float() as s}:
                _need(len(keys) % 32 == 0, "keys: expected a multiple of 32 B")
                return await self._find_chunks(keys, max(want, 1), _deadline(s), emit)
            case {"op": "announce_files", "files": list(files)}:
                return {"stored": await server.announcer.announce_files(_files_in(files))}
            case {"op": "announce_chunks", "keys": bytes(keys)}:
                _need(len(keys) % 32 == 0, "keys: expected a multiple of 32 B")
                stored = await server.announcer.announce_chunks(keys_of(keys)) if keys else 0
                return {"keys": len(keys) // 32, "stored": stored}
            case {"op": "withdraw_chunks", "keys": bytes(keys)}:
                _need(len(keys) % 32 == 0, "keys: expected a multiple of 32 B")
                server.announcer.withdraw_chunks(keys_of(keys))
                return {}
            case {"op": "withdraw"}:
                return await self._withdraw(request)
            case {
                "op": "put_metadata",
                "file_hash": bytes(file_hash),
                "name": str(name),
                "size": int(size),
                "manifest_hash": bytes(manifest_hash),
            }:
                _need(len(file_hash) == 32, "file_hash: expected 32 B")
                return {"stored": await server.announcer.put_metadata(file_hash, name, size, manifest_hash)}
            case {"op": "get_metadata", "file_hash": bytes(file_hash), "deadline_s": int() | float() as s}:
                _need(len(file_hash) == 32, "file_hash: expected 32 B")
                return await self._get_metadata(file_hash, _deadline(s))
            case {"op": "routing"}:
                return {"nodes": [[c.id.hex(), c.ip, c.port] for c in server.protocol.router]}
            case {"op": "stats"}:
                return server.statistics()
            case {"op": "bootstrap", "peers": list(peers)}:
                return {"contacts": await server.bootstrap(_addresses_in(peers))}
        raise UsageError(f"DHT request: unknown or malformed operation {str(request.get('op'))[:32]!r}")

    async def _wait_for_network(self, deadline_s: float) -> float:
        """Wait for the first contact while the node is still joining; return what is left of the deadline."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(JOIN_SHARE * deadline_s):
                await self._server.joined.wait()
        except TimeoutError:
            pass
        return max(deadline_s - (loop.time() - start), 0.1)

    async def _find_file(self, file_hash: bytes, want: int, deadline_s: float, emit: Emit) -> Answer:
        left_s = await self._wait_for_network(deadline_s)
        await self._server.finder.find_file(
            file_hash, want, left_s, lambda peers: emit({"peers": _shown(peers), "more": True})
        )
        return {"peers": [], "more": False}

    async def _find_chunks(self, keys: bytes, want: int, deadline_s: float, emit: Emit) -> Answer:
        def on_found(news: dict[int, list[Peer]]) -> None:
            peers = list(dict.fromkeys(peer for row in news.values() for peer in row))
            place = {peer: index for index, peer in enumerate(peers)}
            found = [[position, [place[peer] for peer in row]] for position, row in news.items()]
            emit({"peers": _shown(peers), "found": found, "more": True})

        if keys:
            left_s = await self._wait_for_network(deadline_s)
            await self._server.finder.find_chunks(keys, want, left_s, on_found)
        return {"peers": [], "found": [], "more": False}

    async def _get_metadata(self, file_hash: bytes, deadline_s: float) -> Answer:
        left_s = await self._wait_for_network(deadline_s)
        records = []
        for record in await self._server.finder.get_metadata(file_hash, left_s):
            fields = parse_metadata_value(record.value)
            if fields is not None:
                name, size, manifest_hash = fields
                records.append(
                    {"name": name, "size": size, "manifest_hash": manifest_hash, "publisher": record.public.hex()}
                )
        return {"records": records}

    async def _withdraw(self, request: dict[Any, Any]) -> Answer:
        if request.get("all") is True:
            await self._server.announcer.withdraw(None)
        else:
            files = request.get("files") or []
            _need(
                isinstance(files, list) and all(isinstance(f, bytes) and len(f) == 32 for f in files),
                "files: expected a list of 32-byte hashes",
            )
            await self._server.announcer.withdraw(files)
        return {}


def snapshot_keys(view: memoryview) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return the sorted 64-bit keys of a key snapshot (32 bytes per chunk hash)."""
    return keys_of(bytes(view)) if len(view) else np.zeros(0, dtype=np.uint64)


def _shown(peers: Iterable[Peer]) -> list[list[Any]]:
    return [[peer.node_id.hex(), peer.ip, peer.port] for peer in peers]


def _failure(exc: FastCASError) -> Answer:
    return {"ok": False, "error": type(exc).__name__, "message": str(exc)}


def _need(claim: bool, message: str) -> None:
    if not claim:
        raise UsageError(f"DHT request: {message}")


def _deadline(seconds: float) -> float:
    return min(max(float(seconds), 0.1), DEADLINE_MAX_S)


def _files_in(files: list[Any]) -> list[tuple[bytes, int]]:
    found = []
    for entry in files:
        match entry:
            case [bytes(file_hash), int(have)] if len(file_hash) == 32:
                found.append((file_hash, have))
            case _:
                raise UsageError("DHT request: files: expected [[hash of 32 B, thousandths]...]")
    return found


def _addresses_in(peers: list[Any]) -> list[tuple[str, int]]:
    found = []
    for entry in peers:
        match entry:
            case [str(host), int(port)] if 1 <= port <= 65535 and len(host) <= 253:
                found.append((host, port))
            case _:
                raise UsageError("DHT request: peers: expected [[host, port]...]")
    return found
