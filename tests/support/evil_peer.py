"""A scripted peer: a data port in plain asyncio that serves one file well, or misbehaves on request.

`Peer(content)` answers like a node. `behaviour` names what it does instead: to chunk requests a method `_evil_<name>`
below, elsewhere one of `evil_ways.WAYS`. It counts what was asked of it. With `knows_next` off it gives chunks by
their names alone, so that its behaviour is met whoever asks; `gate` holds its chunks back while it is cleared.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack

from fastcas.hashing import ChunkHasher
from fastcas.ids import Link, PeerAddr
from fastcas.metadata import Manifest
from tests.support.evil_ways import WAYS, HangUp, head, reset

__all__ = ["BEHAVIOURS", "WAYS", "Peer", "content_of", "make_manifest"]


def content_of(size: int, seed: int = 1) -> bytes:
    """Return `size` pseudo-random bytes."""
    return random.Random(seed).randbytes(size)


def make_manifest(content: bytes, chunk_size: int = 16384, k: int = 0, m: int = 0) -> Manifest:
    """Return the manifest of a content, with parity chunks' hashes if asked for."""
    hasher = ChunkHasher(chunk_size)
    hasher.update(content)
    hashes, midstates, file_hash, size = hasher.finish()
    parity = b"".join(hashlib.sha256(chunk).digest() for chunk in parity_chunks(content, chunk_size, k, m))
    return Manifest(file_hash, size, chunk_size, hashes, midstates, k, m, parity)


def parity_chunks(content: bytes, chunk_size: int, k: int, m: int) -> list[bytes]:
    """Return the parity chunks of a content, stripe by stripe."""
    if not k:
        return []
    from fastcas.parity import ReedSolomon

    out: list[bytes] = []
    chunks = [content[at : at + chunk_size] for at in range(0, len(content), chunk_size)]
    for first in range(0, len(chunks), k):
        stripe = chunks[first : first + k]
        length = len(stripe[0])
        shards = [chunk.ljust(length, b"\0") for chunk in stripe] + [bytes(length)] * (k - len(stripe))
        out += [bytes(shard) for shard in ReedSolomon(k, m).encode(shards)]
    return out


class Peer:
    """One data port. Use as `async with Peer(...) as peer`."""

    def __init__(
        self,
        content: bytes,
        *,
        chunk_size: int = 16384,
        k: int = 0,
        m: int = 0,
        behaviour: str = "good",
        have: set[int] | None = None,
        manifest: Manifest | None = None,
        proven: bool = True,
        known_peers: list[list[Any]] | None = None,
        evil_when: Callable[[int], bool] = lambda nth: True,
        node_id: str | None = None,
        knows_next: bool = True,
    ) -> None:
        self.content = content
        self.manifest = manifest or make_manifest(content, chunk_size, k, m)
        self.truth = make_manifest(content, chunk_size, k, m)
        self.parity = parity_chunks(content, chunk_size, k, m)
        self.behaviour = behaviour
        self.have = have
        self.proven = proven
        self.known_peers = known_peers or []
        self.evil_when = evil_when
        self.knows_next = knows_next
        self.asked_for_chunk = asyncio.Event()
        self.node_id = node_id or hashlib.sha1(random.randbytes(8)).hexdigest()
        self.asked: Counter[str] = Counter()
        self.n_chunks_served = 0
        self.n_connections = 0
        self.n_chunk_requests = 0
        self.n_lies = 0
        self.held: bytes | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.trickle_s = 1.0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._index = {self.manifest.hash_of(i).hex(): i for i in range(self.manifest.n_total)}
        self.given: set[int] = set()

    # --- life ---

    async def __aenter__(self) -> Peer:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        """Listen on loopback."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def addr(self) -> PeerAddr:
        """Where it listens."""
        assert self._server is not None
        return PeerAddr("127.0.0.1", self._server.sockets[0].getsockname()[1])

    def link(self, *, bare: bool = False, peers: tuple[PeerAddr, ...] | None = None) -> Link:
        """Return a link to its file."""
        return Link(
            self.manifest.file_hash,
            None if bare else self.manifest.manifest_hash,
            "file.bin",
            peers=(self.addr,) if peers is None else peers,
        )

    # --- serving ---

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        try:
            await self._misbehaves("accept", None, writer)
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                await self._answer(request.split(b" ")[1].decode(), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError, HangUp):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, target: str, writer: asyncio.StreamWriter) -> None:
        path, _, query = target.partition("?")
        kind, name = path.split("/")[1:3] if path.count("/") > 1 else (path[1:], "")
        self.asked[kind if not path.endswith("/next") else "next"] += 1
        options = dict(pair.split("=", 1) for pair in query.split("&") if pair)
        way = "next" if path.endswith("/next") else kind
        if way != "chunks" and await self._misbehaves(way, options, writer):
            return
        if kind == "chunks":
            await self._chunk(name, writer)
        elif kind == "manifests" and name == self.manifest.manifest_hash.hex():
            await self._manifest(writer)
        elif kind == "swarm" and path.endswith("/next"):
            await self._next(options, writer)
        elif kind == "swarm" and name == self.manifest.file_hash.hex():
            writer.write(self._swarm(options))
        elif kind == "health":
            writer.write(head("200 OK", 2) + b"ok")
        else:
            writer.write(head("404 Not Found", 0))

    async def _misbehaves(self, kind: str, detail: Any, writer: asyncio.StreamWriter) -> bool:
        found = WAYS.get(self.behaviour)
        if found is None or found[0] != kind:
            return False
        await found[1](self, detail, writer)
        return True

    def swarm_map(self, options: dict[str, str]) -> dict[str, Any]:
        """Return what a good peer says in `/swarm`."""
        n = self.manifest.n_total
        out: dict[str, Any] = {
            "v": 1,
            "node_id": self.node_id,
            "manifests": [self.manifest.manifest_hash] if self.proven else [],
            "peers": self.known_peers,
        }
        if options.get("m") == self.manifest.manifest_hash.hex():
            out["g"] = len(self.have) if self.have is not None else n
            if self.have is None:
                out["all"] = True
            elif "since" in options:
                out["new"] = sorted(self.have)
            else:
                field = bytearray(-(-n // 8))
                for i in self.have:
                    field[i // 8] |= 0x80 >> i % 8
                out["have"] = bytes(field)
        return out

    def _swarm(self, options: dict[str, str]) -> bytes:
        body: bytes = msgpack.packb(self.swarm_map(options))
        return head("200 OK", len(body)) + body

    async def _manifest(self, writer: asyncio.StreamWriter) -> None:
        data = self.manifest.data
        writer.write(head("200 OK", len(data)) + data)

    def bytes_of(self, index: int) -> bytes:
        """Return the true bytes of a chunk."""
        n = self.truth.n_chunks
        if index >= n:
            return self.parity[index - n]
        return self.content[index * self.truth.chunk_size : (index + 1) * self.truth.chunk_size]

    async def _chunk(self, name: str, writer: asyncio.StreamWriter) -> None:
        index = self._index.get(name)
        if index is None or (self.have is not None and index not in self.have):
            writer.write(head("404 Not Found", 0))
            return
        await self.gate.wait()
        data = self.bytes_of(index)
        self.n_chunk_requests += 1
        self.asked_for_chunk.set()
        if self.behaviour != "good" and self.evil_when(self.n_chunk_requests):
            if await self._misbehaves("chunks", data, writer):
                return
            evil = getattr(self, f"_evil_{self.behaviour}", None)
            if evil is not None:
                await evil(index, data, writer)
                return
        self.n_chunks_served += 1
        writer.write(head("200 OK", len(data), "ETag: x", "Cache-Control: public") + data)

    async def _next(self, options: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if not self.knows_next:
            writer.write(head("404 Not Found", 0))
            return
        left = [i for i in range(int(options["from"]), self.manifest.n_chunks) if i not in self.given]
        if not left:
            writer.write(head("204 No Content", None))
            return
        index = random.choice(left)
        self.given.add(index)
        data = self.bytes_of(index)
        self.n_chunks_served += 1
        writer.write(head("200 OK", len(data), f"X-Fastcas-Chunk: {index}") + data)

    # --- misbehaviour ---

    async def _evil_wrong_bytes(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)) + bytes([data[0] ^ 1]) + data[1:])

    async def _evil_wrong_last_byte(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)) + data[:-1] + bytes([data[-1] ^ 0x80]))

    async def _evil_zeros(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)) + bytes(len(data)))

    async def _evil_other_chunk(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        other = self.bytes_of((index + 1) % self.truth.n_chunks).ljust(len(data), b"\0")[: len(data)]
        w.write(head("200 OK", len(data)) + other)

    async def _evil_short(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data) - 1) + data[:-1])

    async def _evil_long(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data) + 1) + data + b"x")

    async def _evil_huge_length(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", 1 << 45) + data)

    async def _evil_negative_length(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", -len(data)) + data)

    async def _evil_two_lengths(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data), f"Content-Length: {len(data)}") + data)

    async def _evil_no_length(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", None) + data)
        await w.drain()
        raise HangUp

    async def _evil_extra_bytes(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)) + data + b"unasked")

    async def _evil_chunked(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        body = f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n"
        w.write(head("200 OK", None, "Transfer-Encoding: chunked") + body)

    async def _evil_chunked_and_length(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data), "Transfer-Encoding: chunked") + data)

    async def _evil_gzip(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data), "Content-Encoding: gzip") + data)

    async def _evil_redirect(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("302 Found", 0, "Location: http://169.254.169.254/"))

    async def _evil_partial(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("206 Partial Content", len(data), f"Content-Range: bytes 1-{len(data)}/{len(data)}") + data)

    async def _evil_interim(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        for _ in range(100):
            w.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        w.write(head("200 OK", len(data)) + data)

    async def _evil_endless_headers(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            w.write(b"X-Filler: " + b"x" * 1000 + b"\r\n")
            await w.drain()

    async def _evil_endless_line(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(b"HTTP/1.1 200 ")
        while True:
            w.write(b"x" * 4096)
            await w.drain()

    async def _evil_garbage(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(random.Random(index).randbytes(4096))

    async def _evil_http2(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

    async def _evil_http10(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)).replace(b"HTTP/1.1", b"HTTP/1.0") + data)

    async def _evil_bare_lf(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)).replace(b"\r\n", b"\n") + data)

    async def _evil_folded_header(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data), "X-A: b", " folded") + data)

    async def _evil_space_before_colon(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data), "X-A : b") + data)

    async def _evil_nul_header(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data), "X-A: \0") + data)

    async def _evil_forbidden(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("403 Forbidden", 0))

    async def _evil_error_page(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("500 Internal Server Error", 5) + b"sorry")

    async def _evil_huge_error_page(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("404 Not Found", 1 << 30) + bytes(1 << 16))

    async def _evil_not_found(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("404 Not Found", 9) + b"not found")

    async def _evil_empty_204(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("204 No Content", None))

    async def _evil_busy(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("503 Service Unavailable", 0, "Retry-After: 0"))

    async def _evil_close_early(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)) + data[: len(data) // 2])
        await w.drain()
        raise HangUp

    async def _evil_close_in_head(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data))[:20])
        await w.drain()
        raise HangUp

    async def _evil_close_at_once(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        raise HangUp

    async def _evil_reset(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        reset(w)

    async def _evil_stall(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)) + data[:100])
        await w.drain()
        await asyncio.Event().wait()

    async def _evil_silent(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def _evil_trickle(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        w.write(head("200 OK", len(data)))
        for byte in data:
            w.write(bytes([byte]))
            await w.drain()
            await asyncio.sleep(self.trickle_s)

    async def _evil_close_after(self, index: int, data: bytes, w: asyncio.StreamWriter) -> None:
        """Not evil: a server without keep-alive."""
        self.n_chunks_served += 1
        w.write(head("200 OK", len(data), "Connection: close") + data)
        await w.drain()
        raise HangUp


BEHAVIOURS = sorted(name.removeprefix("_evil_") for name in dir(Peer) if name.startswith("_evil_"))
