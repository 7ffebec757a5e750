"""A TCP proxy that does to a peer's answers what bad networks do: delay, throttle, cut, reset, flip a bit, swallow.

What goes to the peer is passed on as it is; faults strike the bytes that come back, counted per connection. The first
`n_faulty` connections meet the fault, later ones do not: what breaks once must not break the download.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from dataclasses import dataclass
from types import TracebackType

from fastcas.ids import PeerAddr

__all__ = ["Fault", "TcpFaultProxy"]

PIECE_B = 4096


@dataclass(frozen=True)
class Fault:
    """What happens to the answers on one connection. Offsets are bytes of the stream of answers.

    Attributes:
        cut_at: FIN there. reset_at: RST there. swallow_at: From there on nothing arrives, and nobody hangs up.
        flip_at: The lowest bit of that byte is flipped. flip_every: Of each so-manieth byte.
        delay_s: Before each piece. rate_Bps: At most so fast.
    """

    cut_at: float = math.inf
    reset_at: float = math.inf
    swallow_at: float = math.inf
    flip_at: float = math.inf
    flip_every: int = 0
    delay_s: float = 0.0
    rate_Bps: float = math.inf

    def spoil(self, at: int, data: bytes) -> bytes:
        """Return a piece of the stream that begins at `at` with its flipped bits."""
        out = bytearray(data)
        if at <= self.flip_at < at + len(data):
            out[int(self.flip_at) - at] ^= 1
        if self.flip_every:
            for i in range(-(at + 1) % self.flip_every, len(data), self.flip_every):
                out[i] ^= 1
        return bytes(out)


class TcpFaultProxy:
    """Use as `async with TcpFaultProxy(addr, Fault(...)) as proxy`, then connect to `proxy.addr`."""

    def __init__(self, target: PeerAddr, fault: Fault, *, n_faulty: float = math.inf) -> None:
        self.target = target
        self.fault = fault
        self.n_faulty = n_faulty
        self.n_connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def addr(self) -> PeerAddr:
        """Where it listens."""
        assert self._server is not None
        return PeerAddr("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> TcpFaultProxy:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        fault = self.fault if self.n_connections <= self.n_faulty else Fault()
        upstream: asyncio.StreamWriter | None = None
        asking: asyncio.Task[None] | None = None
        try:
            answers, upstream = await asyncio.open_connection(self.target.ip, self.target.port)
            asking = asyncio.create_task(_ask(reader, upstream))
            await _answer(answers, writer, fault)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            if asking is not None:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            for side in (writer, upstream):
                if side is not None:
                    side.close()
                    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                        await side.wait_closed()


async def _ask(reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> None:
    while data := await reader.read(PIECE_B):
        upstream.write(data)
        await upstream.drain()


async def _answer(answers: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
    at = 0
    end = min(fault.cut_at, fault.reset_at, fault.swallow_at)
    while at < end and (data := await answers.read(int(min(PIECE_B, end - at)))):
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.rate_Bps < math.inf:
            await asyncio.sleep(len(data) / fault.rate_Bps)
        writer.write(fault.spoil(at, data))
        await writer.drain()
        at += len(data)
    if at >= fault.swallow_at:
        while await answers.read(PIECE_B):
            pass
        await asyncio.Event().wait()
    if at >= fault.reset_at:
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
