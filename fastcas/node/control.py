"""The control socket `node.sock`: requests of the same user's commands and programs, answered by the agent.

Frames as in `wire.py`. A request is {id, op, args, n_fds}; the answers are any number of {id, progress} and at last
{id, ok} or {id, error, message, exit_code}; {op: "cancel", args: {request}} ends one without an answer. Requests of
one connection run side by side; when it ends they are cancelled. Owns the socket, the connections and the
descriptors that came with a request until its handler is done.
Never: answers another user (0600 and SO_PEERCRED), or does anything itself.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastcas.errors import FastCASError, LocalProtocolError
from fastcas.node import wire
from fastcas.node.folder import socket_address

__all__ = ["ControlServer", "Request"]

log = logging.getLogger(__name__)

READ_SIZE = 256 * 1024
FDS_MAX = 64
PROGRESS_BACKLOG = 1 << 20  # bytes of unread answers beyond which progress is dropped
CONNECTIONS_MAX = 256

Handler = Callable[["Request"], Awaitable[dict[str, Any]]]


class Request:
    """One request while it runs.

    Attributes:
        op: What is asked.
        args: Its arguments, from outside: to be checked by the handler.
        fds: Descriptors that came with it; closed when the handler returns.
        cancelled: Set when the caller went away; for code that runs in a thread.
    """

    def __init__(self, connection: _Connection, number: Any, op: str, args: dict[str, Any], fds: list[int]) -> None:
        self.op = op
        self.args = args
        self.fds = fds
        self.cancelled = threading.Event()
        self._connection = connection
        self.number = number

    def progress(self, values: dict[str, Any]) -> None:
        """Send an interim answer; dropped while the caller does not read. From the loop's thread only."""
        self._connection.send({"id": self.number, "progress": values}, droppable=True)


class ControlServer:
    """Listens on a folder's `node.sock` and gives each request to `handler`."""

    def __init__(self, root: Path, handler: Handler) -> None:
        self._root = root
        self._handler = handler
        self._socket: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Bind and listen. The caller holds the folder's lock, so a socket that is there is a dead node's."""
        self._loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with socket_address(self._root) as address:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(address)
                os.fchmod(sock.fileno(), 0o600)  # the mode that bind gives to the name
                sock.bind(address)
                os.chmod(address, 0o600)
            sock.listen(64)
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        self._loop.add_reader(sock, self._accept)

    async def close(self) -> None:
        """Take the name away, cancel what runs, close every connection. Idempotent."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError, FastCASError), socket_address(self._root) as address:
                os.unlink(address)
        for connection in list(self._connections):
            connection.close()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            sock, _ = self._socket.accept()
        except OSError as exc:
            log.warning("control socket: accept failed error=%s", exc.strerror)
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("iII", credentials)
        if uid not in (os.geteuid(), 0) or len(self._connections) >= CONNECTIONS_MAX:
            log.warning("control socket: refused uid=%d connections=%d", uid, len(self._connections))
            sock.close()
            return
        sock.setblocking(False)
        connection = _Connection(sock, self._loop, self._begin, self._connections.discard)
        self._connections.add(connection)

    def _begin(self, connection: _Connection, request: Request, number: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(self._run(connection, request, number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, connection: _Connection, request: Request, number: Any) -> None:
        try:
            answer: dict[str, Any] = {"id": number, "ok": await self._handler(request)}
        except FastCASError as error:
            answer = {"id": number, **wire.error_to_map(error)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.exception("control request failed op=%s", request.op)
            answer = {"id": number, **wire.error_to_map(LocalProtocolError(f"{request.op}: {error!r}"))}
        except OSError as error:
            log.exception("control request failed op=%s", request.op)
            answer = {"id": number, **wire.error_to_map(FastCASError(f"{request.op}: {error}"))}
        finally:
            for fd in request.fds:
                os.close(fd)
            request.fds = []
        connection.send(answer)


class _Connection:
    """One caller: bytes and descriptors in, frames out."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        begin: Callable[[_Connection, Request, Any], asyncio.Task[None]],
        on_close: Callable[[_Connection], None],
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._begin = begin
        self._on_close = on_close
        self._reader = wire.FrameReader()
        self._fds: list[int] = []
        self._out = bytearray()
        self._writing = False
        self._closed = False
        self._running: dict[asyncio.Task[None], Request] = {}
        loop.add_reader(sock, self._readable)

    def send(self, message: dict[str, Any], *, droppable: bool = False) -> None:
        """Queue a frame; a droppable one only while the caller keeps up."""
        if self._closed or (droppable and len(self._out) > PROGRESS_BACKLOG):
            return
        try:
            self._out += wire.pack_frame(message)
        except LocalProtocolError as error:
            self._out += wire.pack_frame({"id": message["id"], **wire.error_to_map(error)})
        self._write()

    def close(self) -> None:
        """Close, and cancel what the caller asked for."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        if self._writing:
            self._loop.remove_writer(self._sock)
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for task, request in self._running.items():
            request.cancelled.set()
            task.cancel()
        self._on_close(self)

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                READ_SIZE, socket.CMSG_SPACE(4 * FDS_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds.extend(fds)
        if not data or flags & socket.MSG_CTRUNC or len(self._fds) > FDS_MAX:
            self.close()
            return
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except LocalProtocolError as error:
            log.warning("control socket: closed a connection: %s", error)
            self.close()

    def _take(self, message: dict[str, Any]) -> None:
        number, op, args, n_fds = (message.get(key) for key in ("id", "op", "args", "n_fds"))
        if not isinstance(op, str) or not isinstance(args, dict) or not isinstance(n_fds, int):
            raise LocalProtocolError("control message: expected id, op, args, n_fds")
        if not 0 <= n_fds <= len(self._fds):
            raise LocalProtocolError(f"control message: {n_fds} descriptors announced, {len(self._fds)} came")
        if op == "cancel":
            self._cancel(args.get("request"))
            return
        fds, self._fds = self._fds[:n_fds], self._fds[n_fds:]
        request = Request(self, number, op, args, fds)
        task = self._begin(self, request, number)
        self._running[task] = request
        task.add_done_callback(lambda done: self._running.pop(done, None))

    def _cancel(self, number: Any) -> None:
        for task, request in self._running.items():
            if request.number == number:
                request.cancelled.set()
                task.cancel()

    def _write(self) -> None:
        try:
            while self._out:
                sent = self._sock.send(memoryview(self._out)[:READ_SIZE])
                del self._out[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        wanted = bool(self._out)
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._sock, self._write)
            else:
                self._loop.remove_writer(self._sock)
