"""What a scripted peer does wrong beyond its chunks: on accept, in `/swarm`, in NEXT, with manifests, between answers.

Each way is a coroutine (peer, detail, writer) registered for one kind of request; `accept` runs before any request.
`evil_peer.Peer(behaviour=NAME)` looks its behaviour up here.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from tests.support.evil_peer import Peer

__all__ = ["WAYS", "HangUp", "head"]

Way = Callable[["Peer", Any, asyncio.StreamWriter], Awaitable[None]]
WAYS: dict[str, tuple[str, Way]] = {}
MANIFEST_MAX = 16 << 20


class HangUp(Exception):
    """Ends a connection from inside a behaviour."""


def head(status: str, length: int | str | None, *fields: str) -> bytes:
    """Return a response head."""
    lines = [f"HTTP/1.1 {status}"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join([*lines, *fields]) + "\r\n\r\n").encode()


def reset(w: asyncio.StreamWriter) -> None:
    """Let the connection end with RST."""
    sock: socket.socket = w.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise HangUp


def way(kind: str) -> Callable[[Way], Way]:
    def register(function: Way) -> Way:
        WAYS[getattr(function, "__name__", "")] = (kind, function)
        return function

    return register


async def forever() -> None:
    await asyncio.Event().wait()


# --- accept ---


@way("accept")
async def rst_storm(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    reset(w)


@way("accept")
async def half_open(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    await forever()


@way("accept")
async def speaks_first(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", 2) + b"ok")


@way("accept")
async def banner(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    await forever()


# --- chunks ---


@way("chunks")
async def silent_after_some(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    if peer.n_chunk_requests > 3:
        await forever()
    w.write(head("200 OK", len(data)) + data)


@way("chunks")
async def out_of_order(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    held, peer.held = peer.held, data
    if held is not None:
        peer.held = None
        w.write(head("200 OK", len(data)) + data + head("200 OK", len(held)) + held)


@way("chunks")
async def answers_twice(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write((head("200 OK", len(data)) + data) * 2)


@way("chunks")
async def slow_headers(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    for byte in head("200 OK", len(data)):
        w.write(bytes([byte]))
        await w.drain()
        await asyncio.sleep(0.1)
    w.write(data)


@way("chunks")
async def endless_interim(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    while True:
        w.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        await w.drain()


@way("chunks")
async def lengths_differ(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", len(data), f"Content-Length: {len(data) + 1}") + data)


@way("chunks")
async def length_list(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", f"{len(data)}, {len(data)}") + data)


@way("chunks")
async def length_overflow(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", (1 << 64) + len(data)) + data)


@way("chunks")
async def length_signed(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", f"+{len(data)}") + data)


@way("chunks")
async def length_hex(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", f"0x{len(data):x}") + data)


@way("chunks")
async def nul_status(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 O\0K", len(data)) + data)


@way("chunks")
async def other_range(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    body = data[1:] + data[:1]
    w.write(head("206 Partial Content", len(body), f"Content-Range: bytes 1-{len(body)}/{len(body) + 1}") + body)


@way("chunks")
async def multipart(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    body = b"--x\r\nContent-Type: text/plain\r\n\r\n" + data + b"\r\n--x--\r\n"
    w.write(head("206 Partial Content", len(body), "Content-Type: multipart/byteranges; boundary=x") + body)


@way("chunks")
async def content_location(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    """Not believed, not followed, not harmful."""
    peer.n_chunks_served += 1
    w.write(head("200 OK", len(data), "Content-Location: http://169.254.169.254/latest") + data)


@way("chunks")
async def redirect_to_itself(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("307 Temporary Redirect", 0, f"Location: http://{peer.addr}/chunks/{'0' * 64}"))


@way("chunks")
async def upgrade(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")


@way("chunks")
async def reset_in_body(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", len(data)) + data[:-1])
    await w.drain()
    reset(w)


@way("chunks")
async def endless_body(peer: Peer, data: bytes, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", len(data)))
    while True:
        w.write(data)
        await w.drain()


# --- /swarm ---


@way("swarm")
async def swarm_garbage(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    body = random.Random(1).randbytes(5000)
    w.write(head("200 OK", len(body)) + body)


@way("swarm")
async def swarm_bomb(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    body = b"\x91" * 100_000  # lists in lists
    w.write(head("200 OK", len(body)) + body)


@way("swarm")
async def swarm_claims_billions(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    body = b"\x82\xa1v\x01\xa5peers\xdd\xff\xff\xff\xff"  # a list of 2^32 - 1 peers follows
    w.write(head("200 OK", len(body)) + body)


@way("swarm")
async def swarm_huge(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", 1 << 30))
    while True:
        w.write(bytes(1 << 16))
        await w.drain()


@way("swarm")
async def swarm_silent(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    await forever()


@way("swarm")
async def swarm_busy(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("503 Service Unavailable", 0))


@way("swarm")
async def swarm_redirect(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("301 Moved Permanently", 0, "Location: http://169.254.169.254/latest/meta-data/"))


async def lie(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter, **changed: Any) -> None:
    told = peer.swarm_map(options)
    told.update(changed)
    body = msgpack.packb(told)
    w.write(head("200 OK", len(body)) + body)


@way("swarm")
async def swarm_negative_numbers(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, g=-1, new=[-1])


@way("swarm")
async def swarm_chunks_that_are_not(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, all=False, new=[1 << 40])


@way("swarm")
async def swarm_short_bitfield(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, all=False, have=b"\xff")


@way("swarm")
async def swarm_long_bitfield(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, all=False, have=b"\xff" * 25_000)


@way("swarm")
async def swarm_has_nothing(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    """Claims everything in one answer and nothing in the next."""
    peer.n_lies += 1
    n_bytes = -(-peer.manifest.n_total // 8)
    await lie(peer, options, w, all=False, have=(b"\xff" if peer.n_lies % 2 else b"\0") * n_bytes)


@way("swarm")
async def swarm_lying_peers(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    bad = ["169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::ffff:127.0.0.1", "100.64.0.1"]
    known = [[None, ip, 8080] for ip in bad] + [[None, "127.0.0.1", 22]]
    known += [[f"{i:040x}", "127.0.0.1", 1024 + i] for i in range(5)]
    await lie(peer, options, w, peers=known)


@way("swarm")
async def swarm_thousands_of_peers(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, peers=[[None, f"192.0.2.{i % 255}", 2000 + i] for i in range(5000)])


@way("swarm")
async def swarm_malformed_peers(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, peers=[["x", "not an address", 99999999]])


@way("swarm")
async def swarm_says_it_is_another(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, node_id="\x1b[31m" * 100)


@way("swarm")
async def swarm_many_manifests(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await lie(peer, options, w, manifests=[random.Random(i).randbytes(32) for i in range(1000)])


# --- manifests ---


@way("manifests")
async def manifest_wrong_bytes(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    data = peer.manifest.data
    w.write(head("200 OK", len(data)) + data[:-1] + bytes([data[-1] ^ 1]))


@way("manifests")
async def manifest_missing(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("404 Not Found", 0))


@way("manifests")
async def manifest_too_big(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", MANIFEST_MAX + 1) + bytes(1 << 20))


@way("manifests")
async def manifest_never_ends(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    """As large as is allowed, all but its last byte."""
    w.write(head("200 OK", MANIFEST_MAX))
    for _ in range(MANIFEST_MAX >> 16):
        w.write(bytes(65535))
        await w.drain()
    while True:
        w.write(b"x")
        await w.drain()
        await asyncio.sleep(0.05)


@way("manifests")
async def manifest_silent(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    await forever()


@way("manifests")
async def manifest_empty(peer: Peer, _: Any, w: asyncio.StreamWriter) -> None:
    w.write(head("200 OK", 0))


# --- NEXT ---


@way("next")
async def next_without_a_number(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    data = peer.bytes_of(0)
    w.write(head("200 OK", len(data)) + data)


@way("next")
async def next_past_the_end(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    data = peer.bytes_of(0)
    w.write(head("200 OK", len(data), f"X-Fastcas-Chunk: {1 << 40}") + data)


@way("next")
async def next_two_numbers(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    data = peer.bytes_of(0)
    w.write(head("200 OK", len(data), "X-Fastcas-Chunk: 0", "X-Fastcas-Chunk: 1") + data)


@way("next")
async def next_wrong_number(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    data = peer.bytes_of(0)
    w.write(head("200 OK", len(data), "X-Fastcas-Chunk: 1") + data)


@way("next")
async def next_always_the_same(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    data = peer.bytes_of(0)
    w.write(head("200 OK", len(data), "X-Fastcas-Chunk: 0") + data)


@way("next")
async def next_silent(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    await forever()


@way("next")
async def next_always_nothing(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    w.write(head("204 No Content", None))


@way("next")
async def next_busy(peer: Peer, options: dict[str, str], w: asyncio.StreamWriter) -> None:
    w.write(head("503 Service Unavailable", 0))
