"""The UDP socket: a datagram transport that no datagram and no bad address can close.

asyncio's own transport treats an unexpected exception while sending as fatal and reads one datagram per loop turn.
This one reads up to 64 at a time, counts what the network complains about, and reports a lost socket once, so
that its owner can open another.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from fastcas.dht.budgets import DATAGRAM_MAX, SOCKET_BUFFER

__all__ = ["UdpTransport", "open_udp"]

BATCH = 64
# What the network says about single datagrams; anything else means that the socket is gone.
PASSING = frozenset(
    (
        errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EPERM,
        errno.EACCES, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL, errno.EAFNOSUPPORT,
        errno.EADDRNOTAVAIL, errno.EPROTO, errno.ETIMEDOUT, errno.ENOPROTOOPT,
    )
)  # fmt: skip


class UdpTransport(asyncio.DatagramTransport):
    """Reads for a protocol and sends for it; owns the socket."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.DatagramProtocol,
        on_lost: Callable[[OSError], None],
    ) -> None:
        """Take over a bound non-blocking socket and begin to read."""
        super().__init__()
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._on_lost = on_lost
        self._closed = False
        loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                data, addr = self._sock.recvfrom(DATAGRAM_MAX + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                self._note(exc)
                return
            self._protocol.datagram_received(data, addr)
            if self._closed:
                return

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send one datagram, or drop it when the kernel has no room: the asker asks again."""
        if self._closed:
            return
        try:
            self._sock.sendto(data, addr)
        except (BlockingIOError, InterruptedError):
            self._protocol.error_received(OSError(errno.ENOBUFS, "send buffer full"))
        except OSError as exc:
            self._note(exc)

    def _note(self, exc: OSError) -> None:
        self._protocol.error_received(exc)
        if exc.errno not in PASSING and not self._closed:
            self.close()
            self._on_lost(exc)

    def is_closing(self) -> bool:
        """Whether the socket is closed."""
        return self._closed

    def close(self) -> None:
        """Close the socket; idempotent."""
        if not self._closed:
            self._closed = True
            if self._sock.fileno() >= 0:
                self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def abort(self) -> None:
        """Close the socket."""
        self.close()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return "sockname" or "socket"."""
        if name == "sockname" and not self._closed:
            return self._sock.getsockname()
        return self._sock if name == "socket" else default


def open_udp(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.DatagramProtocol,
    ip: str,
    port: int,
    on_lost: Callable[[OSError], None],
) -> asyncio.DatagramTransport:
    """Return a transport bound to a literal address; IPv6 sockets take IPv6 only.

    Raises:
        OSError: Port taken, address not ours, no rights.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        sock.bind((ip, port))
    except BaseException:
        sock.close()
        raise
    return UdpTransport(loop, sock, protocol, on_lost)
