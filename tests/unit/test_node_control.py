"""The control socket against callers that break its rules: the connection ends, the server goes on."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fastcas.errors import LocalProtocolError
from fastcas.node.control import ControlServer, Request
from fastcas.node.wire import FrameReader, pack_frame


async def echo(request: Request) -> dict[str, Any]:
    """Answer what came, and whether the descriptors are closed in children."""
    return {"op": request.op, "cloexec": [fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in request.fds]}


def with_server(tmp_path: Path, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` beside a server on tmp_path/node.sock, with a budget."""

    async def main() -> None:
        server = ControlServer(tmp_path, echo)
        server.start()
        try:
            async with asyncio.timeout(20):
                await work()
        finally:
            await server.close()

    asyncio.run(main())


async def connect(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(tmp_path / "node.sock"))
    return sock


async def answer_to(sock: socket.socket) -> dict[str, Any] | None:
    """Return the next message, None at the end of the stream."""
    reader = FrameReader()
    while True:
        data = await asyncio.get_running_loop().sock_recv(sock, 65536)
        if not data:
            return None
        for message in reader.feed(data):
            return message


def test_descriptors_of_a_request_are_not_inherited_by_children(tmp_path: Path) -> None:
    async def work() -> None:
        sock = await connect(tmp_path)
        read_end, write_end = os.pipe()
        try:
            frame = pack_frame({"id": 1, "op": "x", "args": {}, "n_fds": 2})
            sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read_end, write_end]))])
            assert await answer_to(sock) == {"id": 1, "ok": {"op": "x", "cloexec": [1, 1]}}
        finally:
            os.close(read_end)
            os.close(write_end)
            sock.close()

    with_server(tmp_path, work)


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        framed(b"\x81\x91\x01\x02"),  # a list as a key
        framed(b"\x91" * 3000),
        framed(b"\xc1"),
        framed(msgpack.packb([1, 2])),
        framed(msgpack.packb({"id": 1, "op": "x", "args": {}, "n_fds": 3})),
        framed(msgpack.packb({"id": 1, "op": 5, "args": {}, "n_fds": 0})),
    ],
)
def test_malformed_message_ends_its_connection_only(tmp_path: Path, data: bytes) -> None:
    async def work() -> None:
        bad, good = await connect(tmp_path), await connect(tmp_path)
        try:
            bad.send(data)
            assert await answer_to(bad) is None
            good.send(pack_frame({"id": 7, "op": "y", "args": {}, "n_fds": 0}))
            assert await answer_to(good) == {"id": 7, "ok": {"op": "y", "cloexec": []}}
        finally:
            bad.close()
            good.close()

    with_server(tmp_path, work)


def test_unhashable_key_is_a_protocol_error() -> None:
    with pytest.raises(LocalProtocolError):
        FrameReader().feed(framed(b"\x81\x91\x01\x02"))
