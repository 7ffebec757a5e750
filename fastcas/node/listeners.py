"""Listening sockets of a node: a probe that finds a taken port, then N SO_REUSEPORT listeners on it.

SO_REUSEPORT lets every process of the same user bind the port again, so that two nodes would silently share it;
the probe binds without it and fails with the port's name. Never accepts a connection.
"""

from __future__ import annotations

import errno
import ipaddress
import socket

from fastcas.errors import ConfigError, NetworkError, PermissionDenied, PortInUse
from fastcas.limits import LISTEN_BACKLOG

__all__ = ["open_listeners", "probe_udp", "reachable_host"]


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise ConfigError(f"--host: expected an IP address to bind, got {host!r}") from None


def _bind(sock: socket.socket, host: str, port: int, what: str) -> None:
    try:
        sock.bind((host, port))
    except OSError as exc:
        where = f"{what} port {port} of {host}"
        if exc.errno == errno.EADDRINUSE:
            raise PortInUse(f"Port already in use: {where}; use a different port number") from exc
        if exc.errno == errno.EACCES:
            raise PermissionDenied(f"{where}: binding it is not permitted") from exc
        raise NetworkError(f"{where}: cannot bind: {exc.strerror}") from exc


def open_listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """Return `count` non-blocking listeners on one TCP port, each with its own accept queue.

    Args:
        host: IPv4 or IPv6 literal.
        port: TCP port, 0 = a free one (the same for all).
        count: How many, at least 1.
    Raises:
        PortInUse: Somebody listens there; nothing was opened.
        PermissionDenied, NetworkError, ConfigError: The address cannot be bound.
    """
    family = _family(host)
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        # SO_REUSEADDR lets connections of an earlier node linger in TIME_WAIT; a live listener still conflicts.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, host, port, "TCP")
        port = probe.getsockname()[1]
    listeners: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            listeners.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(sock, host, port, "TCP")
        for sock in listeners:
            sock.listen(LISTEN_BACKLOG)
    except BaseException:
        for sock in listeners:
            sock.close()
        raise
    return listeners


def probe_udp(host: str, port: int) -> None:
    """Raise PortInUse if UDP `port` of `host` is taken at the moment; 0 is always free."""
    if port:
        with socket.socket(_family(host), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            _bind(probe, host, port, "UDP")


def reachable_host(host: str) -> str | None:
    """Return `host` if others can be told it as it is, None for a wildcard address."""
    try:
        return None if ipaddress.ip_address(host).is_unspecified else host
    except ValueError:
        return host
