"""The C receiver on an asyncio loop: listeners get the finished requests, and errors get words.

Owns the receiver's threads and its place in the loop. Everything that the package asks of a peer's data port goes
through here. Never decides whom to ask for what (that is the scheduler).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from enum import IntEnum

from fastcas import limits
from fastcas.errors import (
    ChunkCorrupt,
    FastCASError,
    NetworkError,
    NotFound,
    PeerBusy,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
)
from fastcas.fetch import _receiver
from fastcas.fetch._receiver import Answer
from fastcas.ids import PeerAddr

__all__ = ["HASH_OK", "HAS_LINK", "LINK_ALONE", "LINK_OK", "Answer", "AsyncReceiver", "Outcome", "describe", "error_of"]

HASH_OK = 1
LINK_OK = 2
HAS_LINK = 4
LINK_ALONE = 8


class Outcome(IntEnum):
    """How a request ended (csrc/receiver/receiver.h)."""

    OK = 0
    NOTHING = 1
    BUSY = 2
    NOT_FOUND = 3
    STATUS = 4
    CORRUPT = 5
    REFUSED = 6
    UNREACHABLE = 7
    CONNECT_TIMEOUT = 8
    FIRST_TIMEOUT = 9
    STALLED = 10
    RESET = 11
    TRUNCATED = 12
    WRITE_FAILED = 13
    NO_MEMORY = 14
    LOST = 15
    CANCELLED = 16


_REFUSALS = {
    1: "not an HTTP/1.1 status line",
    2: "malformed header",
    3: f"headers over {limits.RESPONSE_HEADERS_MAX} B",
    4: "interim response",
    5: "redirect",
    6: "Transfer-Encoding",
    7: "Content-Encoding",
    8: "no Content-Length",
    9: "malformed or repeated Content-Length",
    10: "Content-Length is not the expected one",
    11: "chunk number is missing or not in the file",
    12: "bytes that nobody asked for",
}


def describe(answer: Answer) -> str:
    """Return what happened in words, for messages: "Connection refused", "redirect", ..."""
    match answer.outcome:
        case Outcome.BUSY:
            return "busy (503)"
        case Outcome.NOT_FOUND:
            return "not found (404)"
        case Outcome.NOTHING:
            return "nothing (204)"
        case Outcome.STATUS:
            return f"status {answer.detail}"
        case Outcome.CORRUPT:
            return f"wrong bytes (SHA-256 {(answer.body or b'').hex()[:8]}, {answer.length} B)"
        case Outcome.REFUSED:
            return f"broke the protocol: {_REFUSALS.get(answer.detail, answer.detail)}"
        case Outcome.CONNECT_TIMEOUT:
            return f"no connection within {limits.CONNECT_S:g} s"
        case Outcome.FIRST_TIMEOUT:
            return "no answer in time"
        case Outcome.STALLED:
            return f"stalled after {answer.length} B"
        case Outcome.RESET:
            return os.strerror(answer.detail) if answer.detail else "closed the connection without an answer"
        case Outcome.TRUNCATED:
            return f"closed the connection after {answer.length} B of an answer"
        case Outcome.UNREACHABLE | Outcome.WRITE_FAILED | Outcome.NO_MEMORY:
            return os.strerror(answer.detail)
        case Outcome.LOST:
            return "connection lost"
        case Outcome.CANCELLED:
            return "cancelled"
        case _:
            return "ok"


def error_of(answer: Answer, subject: str, peer: PeerAddr) -> FastCASError:
    """Return the typed error of a request that did not end well.

    Args:
        answer: The finished request.
        subject: What was asked for, e.g. "chunk 3fa9c1d2".
        peer: Who was asked.
    """
    text = f"{subject}: {peer}: {describe(answer)}"
    match answer.outcome:
        case Outcome.CORRUPT:
            return ChunkCorrupt(f"{text}; nothing was stored")
        case Outcome.REFUSED:
            return RemoteProtocolError(text)
        case Outcome.BUSY:
            return PeerBusy(text)
        case Outcome.NOT_FOUND | Outcome.NOTHING:
            return NotFound(text)
        case Outcome.CONNECT_TIMEOUT | Outcome.FIRST_TIMEOUT | Outcome.STALLED:
            return PeerTimeout(text)
        case Outcome.UNREACHABLE | Outcome.RESET | Outcome.TRUNCATED | Outcome.LOST | Outcome.CANCELLED:
            return PeerUnreachable(text)
        case Outcome.STATUS:
            return RemoteProtocolError(text)
        case _:
            return NetworkError(text)


class AsyncReceiver:
    """The receiver's threads, attached to the running loop.

    Create it inside the loop that will use it. `on_batch`, if set, is called once after each batch of finished
    requests: the place to ask for more.
    """

    def __init__(
        self,
        *,
        n_threads: int | None = None,
        memory_max: int = limits.RECEIVE_MEMORY_MAX,
        connect_s: float = limits.CONNECT_S,
        first_byte_s: float = limits.FIRST_BYTE_S,
        stall_s: float = limits.STALL_FETCH_S,
    ) -> None:
        """Start the threads: as many as there are cores for us, two by default.

        Args:
            n_threads: Receiving threads.
            memory_max: Bytes of chunk buffers.
            connect_s, first_byte_s, stall_s: Deadlines of one request, seconds.
        """
        if n_threads is None:
            n_threads = min(2, len(os.sched_getaffinity(0)))
        self.loop = asyncio.get_running_loop()
        self.core = _receiver.Receiver(n_threads, memory_max, connect_s, first_byte_s, stall_s)
        self.on_batch: Callable[[], None] | None = None
        self._numbers = itertools.count(1)
        self._listeners: dict[int, Callable[[list[Answer]], None]] = {}
        self._fd = self.core.fileno()
        self._closed = False
        self.loop.add_reader(self._fd, self._on_ready)

    def _on_ready(self) -> None:  # hot
        listeners = self._listeners
        for number, answers in self.core.drain().items():
            callback = listeners.get(number)
            if callback is not None:
                callback(answers)
        if self.on_batch is not None:
            self.on_batch()

    def listen(self, callback: Callable[[list[Answer]], None]) -> int:
        """Return the number of a listener for requests: `callback` gets their answers, in the loop's thread.

        Answers that came together come in one call, the oldest first.
        """
        number = next(self._numbers)
        self._listeners[number] = callback
        return number

    def forget(self, listener: int) -> None:
        """Ignore the answers that a listener has not got yet. Idempotent."""
        self._listeners.pop(listener, None)

    def open(self, peer: PeerAddr, node_id: str | None = None) -> _receiver.Connection:
        """Return a new connection to a peer whose address is literal; it dials on its first request."""
        return self.core.open(peer.ip, peer.port, node_id)

    async def get(
        self,
        connection: _receiver.Connection,
        target: str,
        *,
        max_length: int,
        expected_hash: bytes | None = None,
        first_byte_s: float = 0.0,
    ) -> Answer:
        """Ask for a small body and wait for the answer, whatever it is; deadlines are the receiver's.

        Args:
            connection: Where to ask; cancelling the wait does not close it.
            target: Path and query.
            max_length: Longer bodies are refused, bytes.
            expected_hash: What the body must hash to.
            first_byte_s: Deadline for the first byte; 0 = the receiver's.
        """
        future: asyncio.Future[Answer] = self.loop.create_future()

        def arrived(answers: list[Answer]) -> None:
            if not future.done():
                future.set_result(answers[0])

        number = self.listen(arrived)
        try:
            connection.get(number, target.encode(), max_length, expected_hash, first_byte_s)
            return await future
        finally:
            self.forget(number)

    def close(self) -> None:
        """Stop the threads and leave the loop. Idempotent; outstanding requests are never answered."""
        if self._closed:
            return
        self._closed = True
        self._listeners.clear()
        if not self.loop.is_closed():
            self.loop.remove_reader(self._fd)
        self.core.close()
