"""An HTTP server with Range in plain asyncio that serves one content well, or misbehaves as its name says."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable

__all__ = ["OriginServer"]


class OriginServer:
    """Use as `async with OriginServer(content) as server`. `behaviour` names what it does instead of serving well."""

    def __init__(
        self,
        content: bytes,
        behaviour: str = "good",
        *,
        location: str = "",
        target: str = "/file.bin",
        context: ssl.SSLContext | None = None,
        when: Callable[[int], bool] = lambda nth: True,
    ) -> None:
        self.content = content
        self.behaviour = behaviour
        self.location = location
        self.target = target
        self.context = context
        self.when = when
        self.ranges: list[tuple[int, int]] = []
        self.n_connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> OriginServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def url(self) -> str:
        return f"{'https' if self.context else 'http'}://{self.host}{self.target}"

    @property
    def folder(self) -> str:
        """URL of the folder that is served: one file is in it."""
        return f"http://{self.host}/"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode()
                assert "Accept-Encoding: identity\r\n" in request
                assert request.startswith(f"GET {self.target} HTTP/1.1\r\n")
                match = re.search(r"\r\nRange: bytes=(\d+)-(\d+)\r\n", request)
                assert match is not None
                await self._answer(int(match[1]), int(match[2]) + 1, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError, EOFError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, start: int, end: int, writer: asyncio.StreamWriter) -> None:
        self.ranges.append((start, end))
        size, body = len(self.content), self.content[start:end]
        status, fields = "206 Partial Content", {"Content-Range": f"bytes {start}-{end - 1}/{size}", "ETag": '"1"'}
        behaviour = self.behaviour if self.when(len(self.ranges)) else "good"
        match behaviour:
            case "no_range":
                status, body = "200 OK", self.content
                del fields["Content-Range"]
            case "wrong_range":
                fields["Content-Range"] = f"bytes {start + 1}-{end}/{size}"
            case "no_content_range":
                del fields["Content-Range"]
            case "wrong_size":
                fields["Content-Range"] = f"bytes {start}-{end - 1}/{size + 1}"
            case "range_416":
                status, body, fields["Content-Range"] = "416 Range Not Satisfiable", b"", f"bytes */{start}"
            case "not_found":
                status, body = "404 Not Found", b"gone"
            case "forbidden":
                status, body = "403 Forbidden", b"no"
            case "etag":
                fields["ETag"] = f'"{len(self.ranges)}"'
            case "gzip":
                fields["Content-Encoding"] = "gzip"
            case "wrong_bytes":
                body = bytes([body[0] ^ 1]) + body[1:]
            case "short":
                fields["Content-Length"] = str(len(body) - 1)
            case "chunked":
                fields["Transfer-Encoding"] = "chunked"
            case "garbage":
                writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
                raise EOFError
            case "big_head":
                fields["X"] = "x" * 20000
            case "truncated":
                writer.write(_head(status, fields, len(body)) + body[: len(body) // 2])
                await writer.drain()
                raise EOFError
            case "busy":
                status, body = "503 Service Unavailable", b""
            case "redirect":
                status, body, fields = "302 Found", b"elsewhere", {"Location": self.location}
            case "closes":
                writer.write(_head(status, fields | {"Connection": "close"}, len(body)) + body)
                await writer.drain()
                raise EOFError
            case "hangs_up":  # a kept connection that is closed without a word
                writer.write(_head(status, fields, len(body)) + body)
                await writer.drain()
                raise EOFError
        writer.write(_head(status, fields, len(body)) + body)


def _head(status: str, fields: dict[str, str], length: int) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{k}: {v}" for k, v in ({"Content-Length": str(length)} | fields).items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
