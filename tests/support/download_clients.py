"""Keep-alive clients that download one file over and over: python download_clients.py HOST PORT TARGET SHA256 COUNT

Each keeps its connection as long as it lives. A connection that ends early (RST, EOF) is made anew and the download
asked for again at once, as a client must; that is a retry. A download fails when it was tried TRIES times, when its
bytes or its status are wrong, or when a connection is refused. Ends with its stdin: every client finishes the download
it is in. Prints {"downloads", "retries", "failed": [text…]} as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys

import uvloop

TRIES = 30
ANSWER_S = 30.0  # without a byte for so long, a download hangs
PIECE = 1 << 18


class WrongAnswerError(Exception):
    """What came is not what was asked for."""


class Clients:
    """The crowd and its figures."""

    def __init__(self, host: str, port: int, target: str, digest: str) -> None:
        self._where = (host, port)
        self._request = f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        self._digest = digest
        self.stopping = False
        self.downloads = 0
        self.retries = 0
        self.failed: list[str] = []

    async def _answer(self, reader: asyncio.StreamReader) -> bool:
        """Read one response; whether the connection stays open. EOFError when it ends before its length."""
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ANSWER_S)
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
        if not head.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswerError(head.split(b"\r\n")[0].decode())
        left, seen = int(fields["Content-Length"]), hashlib.sha256()
        while left:
            piece = await asyncio.wait_for(reader.read(min(left, PIECE)), ANSWER_S)
            if not piece:
                raise EOFError
            seen.update(piece)
            left -= len(piece)
        if seen.hexdigest() != self._digest:
            raise WrongAnswerError("wrong bytes")
        return fields.get("Connection") != "close"

    async def run(self) -> None:
        """Be one client."""
        writer: asyncio.StreamWriter | None = None
        while not self.stopping:
            for _ in range(TRIES):
                try:
                    if writer is None:
                        reader, writer = await asyncio.open_connection(*self._where, limit=1 << 20)
                    writer.write(self._request)
                    stays = await self._answer(reader)
                except (EOFError, ConnectionResetError, BrokenPipeError):
                    self.retries += 1
                    writer = self._drop(writer)
                    continue
                except (WrongAnswerError, TimeoutError, OSError) as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                    writer = self._drop(writer)
                    break
                self.downloads += 1
                if not stays:
                    writer = self._drop(writer)
                break
            else:
                self.failed.append(f"tried {TRIES} times")
        self._drop(writer)

    @staticmethod
    def _drop(writer: asyncio.StreamWriter | None) -> None:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.transport.abort()


async def main(host: str, port: str, target: str, digest: str, count: str) -> None:
    clients = Clients(host, int(port), target, digest)

    async def wait_for_stop() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        clients.stopping = True

    await asyncio.gather(wait_for_stop(), *(clients.run() for _ in range(int(count))))
    sys.stdout.write(json.dumps({"downloads": clients.downloads, "retries": clients.retries, "failed": clients.failed}))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
