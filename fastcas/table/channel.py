"""Messages and descriptors between two processes of a node, over a SOCK_SEQPACKET pair.

One packet is one message: a msgpack map of at most 64 KiB with `str` (or `bytes`) keys, plus at most 64
descriptors in SCM_RIGHTS. Sending never blocks: what the socket does not take waits in a bounded queue, which
holds duplicates of the descriptors. The end of the peer is reported in exactly one place, to whoever receives;
messages sent to a peer that is gone are dropped.

Owns the socket and the duplicates in its queue. Never owns a descriptor that was handed to `send`, nor one that
`recv` returned.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.limits import CHANNEL_MESSAGE_MAX

__all__ = ["FDS_MAX", "Channel"]

log = logging.getLogger(__name__)

Message = dict[str, Any]

FDS_MAX = 64  # descriptors per message; the kernel's own limit (SCM_MAX_FD) is 253
QUEUE_BYTES_MAX = 16 << 20  # a peer that reads nothing for this long is broken
QUEUE_FDS_MAX = 1024
BATCH = 64  # messages per loop callback, so that a busy peer does not starve the loop
_FD_SIZE = array.array("i").itemsize
_ANCILLARY_SIZE = socket.CMSG_SPACE(FDS_MAX * _FD_SIZE)
# The peer's end is closed; recv tells, so send does not.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Channel:
    """One end of a channel; see the module's description."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected SOCK_SEQPACKET socket; use `pair` or `from_fd`."""
        sock.setblocking(False)
        self._sock = sock
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued_bytes = 0
        self._queued_fds = 0
        self._peer_gone = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[Message, list[int]], None] | None = None
        self._on_eof: Callable[[], None] | None = None
        self._writer_armed = False

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return two connected ends, both close-on-exec (pass one on with `pass_fds`).

        Raises:
            OSError: No descriptors left.
        """
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Take over the descriptor of an end, and make it close-on-exec.

        Raises:
            UsageError: Not a SOCK_SEQPACKET socket of the AF_UNIX family; the descriptor stays open.
        """
        try:
            sock = socket.socket(fileno=fd)
        except OSError as exc:
            raise UsageError(f"channel: descriptor {fd} is not a socket ({exc.strerror})") from exc
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
            sock.detach()
            raise UsageError(f"channel: descriptor {fd} is not a local packet socket")
        os.set_inheritable(fd, False)
        return cls(sock)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether messages wait in the queue: call `flush` when the socket is writable."""
        return bool(self._queue)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message, or queue it; never blocks.

        Args:
            message: A map that msgpack can encode, at most 64 KiB encoded.
            fds: At most 64 descriptors. They are the caller's as before, and may be closed at once.
        Raises:
            LocalProtocolError: Message too long, too many descriptors, or the peer has not read for so long that
                the queue is full; nothing was sent.
            OSError: The kernel refused a descriptor (EBADF, EMFILE, ETOOMANYREFS); nothing was sent.
        """
        data = msgpack.packb(message)
        if len(data) > CHANNEL_MESSAGE_MAX:
            raise LocalProtocolError(
                f"channel: message of {len(data)} B exceeds {CHANNEL_MESSAGE_MAX} B; it was not sent"
            )
        if len(fds) > FDS_MAX:
            raise LocalProtocolError(f"channel: message with {len(fds)} descriptors exceeds {FDS_MAX}; it was not sent")
        if self._sock.fileno() < 0:
            raise UsageError("channel: closed")
        if self._peer_gone:
            return
        if not self._queue and self._send_now(data, fds):
            return
        if self._queued_bytes + len(data) > QUEUE_BYTES_MAX or self._queued_fds + len(fds) > QUEUE_FDS_MAX:
            raise LocalProtocolError(
                f"channel: the peer does not read, {self._queued_bytes} B and {self._queued_fds} descriptors are "
                "queued; the message was not sent"
            )
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            _close_all(copies)
            raise
        self._queue.append((data, copies))
        self._queued_bytes += len(data)
        self._queued_fds += len(copies)
        self._arm_writer()

    def flush(self) -> None:
        """Send as much of the queue as the socket takes.

        Raises:
            OSError: The kernel refused a message's descriptors (ETOOMANYREFS); that message is dropped.
        """
        try:
            while self._queue:
                data, fds = self._queue[0]
                try:
                    if not self._send_now(data, fds):
                        break
                except OSError:
                    self._drop_first()
                    raise
                self._drop_first()
        finally:
            self._arm_writer()

    def recv(self) -> tuple[Message, list[int]] | None:
        """Return the next message and its descriptors (close-on-exec, the caller's from now on).

        Returns:
            None when nothing has arrived.
        Raises:
            EOFError: The peer's end is closed and everything it sent was read.
            LocalProtocolError: Not a msgpack map, too long, or descriptors lost (we have no room for more); the
                descriptors that came were closed.
        """
        if self._sock.fileno() < 0:
            raise UsageError("channel: closed")
        try:
            data, ancillary, flags, _ = self._recvmsg()
        except (BlockingIOError, InterruptedError):
            return None
        fds = _received_fds(ancillary)
        try:
            if flags & socket.MSG_CTRUNC:
                raise LocalProtocolError(f"channel: descriptors were lost on receipt, {len(fds)} came")
            if flags & socket.MSG_TRUNC:
                raise LocalProtocolError(f"channel: a message longer than {CHANNEL_MESSAGE_MAX} B came")
            if not data:
                raise EOFError("channel: the peer closed its end")
            return _decode(data), fds
        except (LocalProtocolError, EOFError):
            _close_all(fds)
            raise

    def attach_to(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Message, list[int]], None],
        on_eof: Callable[[], None],
    ) -> None:
        """Let `loop` receive and flush: works with asyncio and uvloop.

        Args:
            on_message: Gets each message and its descriptors, which are its own. What it raises goes to the
                loop's exception handler; the next message comes all the same.
            on_eof: Called once, after the channel has detached itself: the peer is gone, or it broke the
                protocol (logged). The socket stays open until `close`.
        Raises:
            UsageError: Attached already, or closed.
        """
        if self._loop is not None or self._sock.fileno() < 0:
            raise UsageError("channel: attached already, or closed")
        self._loop, self._on_message, self._on_eof = loop, on_message, on_eof
        loop.add_reader(self._sock.fileno(), self._readable)
        self._arm_writer()

    def detach(self) -> None:
        """Undo `attach_to`; nothing happens when not attached."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        if not loop.is_closed():
            loop.remove_reader(self._sock.fileno())
            if self._writer_armed:
                loop.remove_writer(self._sock.fileno())
        self._writer_armed = False
        self._on_message = self._on_eof = None

    def close(self) -> None:
        """Detach, close the socket and drop what is queued. Idempotent."""
        if self._sock.fileno() >= 0:
            self.detach()
            self._sock.close()
        self._drop_queue()

    def _send_now(self, data: bytes, fds: Sequence[int]) -> bool:
        """Give one packet to the kernel; True when it is done with (sent, or the peer is gone)."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            if exc.errno not in _GONE:
                raise
            self._peer_gone = True
            self._drop_queue()
        return True

    def _recvmsg(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        try:
            return self._sock.recvmsg(CHANNEL_MESSAGE_MAX, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            # The peer left without reading all of ours. The error is reported once; what it sent is still there.
            return self._sock.recvmsg(CHANNEL_MESSAGE_MAX, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)

    def _drop_first(self) -> None:
        if self._queue:
            data, fds = self._queue.popleft()
            self._queued_bytes -= len(data)
            self._queued_fds -= len(fds)
            _close_all(fds)

    def _drop_queue(self) -> None:
        while self._queue:
            self._drop_first()

    def _arm_writer(self) -> None:
        if self._loop is None or self._writer_armed == bool(self._queue):
            return
        self._writer_armed = bool(self._queue)
        if self._writer_armed:
            self._loop.add_writer(self._sock.fileno(), self.flush)
        else:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(BATCH):
            # on_message may detach or close.
            on_message, on_eof = self._on_message, self._on_eof
            if on_message is None or on_eof is None:
                return
            try:
                received = self.recv()
            except (EOFError, LocalProtocolError) as exc:
                if isinstance(exc, LocalProtocolError):
                    log.error("the other end broke the channel's protocol, it is dropped: %s", exc)
                self.detach()
                on_eof()
                return
            if received is None:
                return
            on_message(*received)


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return list(fds)


def _decode(data: bytes) -> Message:
    try:
        message = msgpack.unpackb(data, strict_map_key=True)
    except ValueError as exc:
        raise LocalProtocolError(f"channel: {len(data)} B that are not msgpack came ({exc})") from exc
    if not isinstance(message, dict):
        raise LocalProtocolError(f"channel: expected a map, got {type(message).__name__}")
    return message
