"""Clients of `node.sock`: `ControlClient` for commands, `AsyncControlClient` for programs with an event loop.

Each raises the error class that the agent raised, with its message. Closing a client cancels what it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcas.errors import NodeUnavailable, PermissionDenied
from fastcas.node import wire
from fastcas.node.folder import socket_address
from fastcas.store.paths import shown

__all__ = ["AsyncControlClient", "ControlClient"]

OnProgress = Callable[[dict[str, Any]], None]
READ_SIZE = 256 * 1024


def _connect(root: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with socket_address(root) as address:
            sock.connect(address)
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        sock.close()
        raise NodeUnavailable(f"{shown(root)}: no node is running on this storage folder") from exc
    except PermissionError as exc:
        sock.close()
        raise PermissionDenied(f"{shown(root)}: the node's control socket belongs to another user") from exc
    except BaseException:
        sock.close()
        raise
    return sock


def _ended(op: str) -> NodeUnavailable:
    return NodeUnavailable(f"{op}: the node ended before it answered")


class ControlClient:
    """A blocking connection to a node. One request at a time.

    Raises:
        NodeUnavailable: No node runs on that folder.
        PermissionDenied: It is another user's.
    """

    def __init__(self, root: Path) -> None:
        self._sock = _connect(root)
        self._reader = wire.FrameReader()
        self._ids = itertools.count(1)

    def call(
        self, op: str, args: dict[str, Any], fds: Sequence[int] = (), on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Send one request and return its answer; blocks until then.

        Args:
            op: Name of the operation.
            args: msgpack-able arguments.
            fds: Descriptors to hand over; they stay the caller's, too.
            on_progress: Called with each interim answer.
        Raises:
            FastCASError: What the agent raised.
            NodeUnavailable: The node ended meanwhile.
        """
        number = next(self._ids)
        frame = memoryview(wire.pack_frame({"id": number, "op": op, "args": args, "n_fds": len(fds)}))
        try:
            sent = socket.send_fds(self._sock, [frame], list(fds)) if fds else 0
            self._sock.sendall(frame[sent:])
            while data := self._sock.recv(READ_SIZE):
                for message in self._reader.feed(data):
                    if message.get("id") != number:
                        continue
                    if "progress" not in message:
                        return _result(message)
                    if on_progress is not None:
                        on_progress(message["progress"])
        except (BrokenPipeError, ConnectionResetError):
            pass
        raise _ended(op)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._sock.close()

    def __enter__(self) -> ControlClient:
        """Return self."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()


class AsyncControlClient:
    """A connection to a node for one event loop; any number of requests side by side."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[str, asyncio.Future[dict[str, Any]], OnProgress | None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, root: Path) -> AsyncControlClient:
        """Connect to the node of a storage folder.

        Raises:
            NodeUnavailable, PermissionDenied: As `ControlClient`.
        """
        client = cls()
        sock = _connect(root)
        sock.setblocking(False)
        reader, client._writer = await asyncio.open_unix_connection(sock=sock)
        client._task = asyncio.get_running_loop().create_task(client._read(reader))
        return client

    async def call(self, op: str, args: dict[str, Any], on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Send one request and return its answer. Cancelling the call leaves the connection usable.

        Raises:
            FastCASError: What the agent raised.
            NodeUnavailable: The node ended, or ends meanwhile.
        """
        if self._writer is None or self._task is None or self._task.done():
            raise _ended(op)
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (op, future, on_progress)
        try:
            self._writer.write(wire.pack_frame({"id": number, "op": op, "args": args, "n_fds": 0}))
            return _result(await future)
        except asyncio.CancelledError:
            if not self._writer.is_closing():
                self._writer.write(
                    wire.pack_frame({"id": 0, "op": "cancel", "args": {"request": number}, "n_fds": 0})
                )
            raise
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """Hang up; what is outstanding raises NodeUnavailable. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self._writer = None

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = wire.FrameReader()
        try:
            while data := await reader.read(READ_SIZE):
                for message in frames.feed(data):
                    entry = self._waiting.get(message.get("id", 0))
                    if entry is None:
                        continue
                    _, future, on_progress = entry
                    if "progress" in message:
                        if on_progress is not None:
                            on_progress(message["progress"])
                    elif not future.done():
                        future.set_result(message)
        except OSError:
            pass
        finally:
            for op, future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(_ended(op))


def _result(message: dict[str, Any]) -> dict[str, Any]:
    if "ok" not in message:
        raise wire.error_from_map(message)
    result = message["ok"]
    return result if isinstance(result, dict) else {}
