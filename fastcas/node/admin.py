"""Status for machines: `GET /status` (JSON) and `GET /metrics` (Prometheus text) on 127.0.0.1, nothing else.

One request per connection. Loopback only; no request changes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastcas.errors import PortInUse

__all__ = ["AdminServer", "metrics_text"]

REQUEST_S = 5.0
REQUEST_MAX = 8192


def metrics_text(status: dict[str, Any]) -> str:
    """Return the status as Prometheus text: one counter per name and worker, and the node's own figures."""
    lines: list[str] = []
    for name in ("files", "chunks", "logical", "stored", "linked"):
        lines += [f"# TYPE fastcas_store_{name} gauge", f"fastcas_store_{name} {status['store'].get(name, 0)}"]
    lines += ["# TYPE fastcas_uptime_seconds gauge", f"fastcas_uptime_seconds {status['uptime_s']:.0f}"]
    lines += ["# TYPE fastcas_downloads gauge", f"fastcas_downloads {len(status['downloads'])}"]
    names = sorted({name for worker in status["workers"] for name in worker["counters"]})
    for name in names:
        kind = "gauge" if name in ("active", "heartbeat_ns", "epoch_safe", "epoch_table") else "counter"
        lines.append(f"# TYPE fastcas_worker_{name} {kind}")
        for worker in status["workers"]:
            lines.append(f'fastcas_worker_{name}{{slot="{worker["slot"]}"}} {worker["counters"].get(name, 0)}')
    return "\n".join(lines) + "\n"


class AdminServer:
    """Serves what `status` returns."""

    def __init__(self, port: int, status: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._port = port
        self._status = status
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            PortInUse: The port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=REQUEST_MAX)
        except OSError as exc:
            raise PortInUse(f"Port already in use: admin TCP port {self._port} of 127.0.0.1") from exc

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = await self._answer(head.split(b"\r\n", 1)[0])
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, request_line: bytes) -> tuple[str, str, bytes]:
        match request_line.split(b" "):
            case [b"GET", b"/status", _]:
                return "200 OK", "application/json", json.dumps(await self._status()).encode()
            case [b"GET", b"/metrics", _]:
                return "200 OK", "text/plain; version=0.0.4", metrics_text(await self._status()).encode()
        return "404 Not Found", "text/plain", b"/status and /metrics are here\n"
