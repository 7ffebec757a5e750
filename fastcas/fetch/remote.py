"""One peer of a download: its connections, what it said, what it did. The conversation on `/swarm`.

Owns a control connection (swarm, manifests: a long poll must not hold up chunks) and up to three data connections.
Never decides what is asked for: it tells the download what the peer has, and carries out the scheduler's asks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fastcas.errors import FastCASError, IntegrityError, NotFound, PeerBusy, RemoteProtocolError
from fastcas.fetch._receiver import Answer, Connection, Job
from fastcas.fetch.http_small import ask_swarm, fetch_manifest
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.fetch.swarmview import SwarmAnswer
from fastcas.ids import PeerAddr, short
from fastcas.limits import CONNECTIONS_PER_PEER, FIRST_BYTE_S
from fastcas.metadata import Manifest

__all__ = ["Remote", "SwarmListener"]

DATA_CONNECTIONS = CONNECTIONS_PER_PEER - 1  # the control connection is the fourth
REQUESTS_PER_CONNECTION = 4  # more in flight open another connection
POLL_PARTIAL_S = 0.1
WAIT_MS = 2000
ABSENT_S = 2.0  # until a peer that does not have the file is asked again
FAILURE_MIN_S = 0.5
FAILURE_MAX_S = 5.0

Source = Literal["user", "link", "discovery", "swarm"]


class SwarmListener(Protocol):
    """What a peer's conversation reports to, and asks of, the download."""

    receiver: AsyncReceiver
    file_hash: bytes
    node_id: str | None
    data_port: int | None
    manifest: Manifest | None

    def manifest_to_ask(self, remote: Remote, offered: tuple[bytes, ...]) -> bytes | None:
        """Return which manifest to fetch from this peer, if one is still needed."""

    def on_manifest(self, remote: Remote, manifest: Manifest) -> None:
        """A peer gave a manifest that hashes right and describes the file."""

    def on_swarm(self, remote: Remote, answer: SwarmAnswer) -> None:
        """A peer said what it has and whom it knows."""

    def on_misconduct(self, remote: Remote, reason: str) -> None:
        """A peer broke the protocol or lied: it is to be banned."""

    def on_silence(self, remote: Remote) -> None:
        """A peer cannot be reached at the moment."""

    def poll_s(self, remote: Remote) -> float:
        """Return how long to wait before a peer is asked again what it has, seconds."""

    async def pause(self, seconds: float) -> None:
        """Wait, but not beyond the moment in which a manifest becomes known."""


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


class _Line:
    """One data connection, and the listener of the requests on it."""

    __slots__ = ("_on_answers", "_receiver", "connection", "is_dropped", "listener", "n_outstanding")

    def __init__(
        self, addr: PeerAddr, our_id: str | None, receiver: AsyncReceiver, on_answers: Callable[[list[Answer]], None]
    ) -> None:
        self._receiver = receiver
        self._on_answers = on_answers
        self.connection = receiver.open(addr, our_id)
        self.listener = receiver.listen(self._arrived)
        self.n_outstanding = 0
        self.is_dropped = False

    def _arrived(self, answers: list[Answer]) -> None:  # hot
        self.n_outstanding -= len(answers)
        self._on_answers(answers)
        if self.is_dropped and not self.n_outstanding:
            self._receiver.forget(self.listener)

    def drop(self) -> None:
        """Close the connection; outstanding requests come back as cancelled."""
        self.connection.close()
        self.is_dropped = True
        if not self.n_outstanding:
            self._receiver.forget(self.listener)


@dataclass(eq=False)
class Remote:
    """One peer. `did` is what it did last, in words, for the error that names everybody; `n_cut` counts answers that it
    cut short since its last right chunk; `came_back`: it answered after it could not be reached; `on_answers` hears of
    the chunks that it was asked for, those that came together in one call."""

    addr: PeerAddr
    source: Source
    receiver: AsyncReceiver
    our_id: str | None = None
    node_id: str | None = None
    did: str = "not asked yet"
    answered: bool = False
    lacks_file: bool = False
    may_offer: bool = True
    offered: tuple[bytes, ...] = ()
    banned: str | None = None
    n_bytes: int = 0
    n_cut: int = 0
    generation: int | None = None
    have: int = 0
    is_seed: bool = False
    was_silent: bool = False
    came_back: bool = False
    on_answers: Callable[[Remote, list[Answer]], None] | None = None
    lines: list[_Line] = field(default_factory=list)
    control: Connection | None = None
    _n_received_before: int = 0
    _n_outstanding: int = 0
    _idle: asyncio.Event = field(default_factory=_set_event)
    shed_mark: tuple[float, int] | None = None

    # --- chunks ---

    def ask_chunks(self, job: Job, chunks: list[int]) -> None:  # hot
        """Queue requests for chunks, on the connections with the fewest outstanding.

        Neighbours stay together, so that they are written together.
        """
        shares: dict[_Line, int] = {}
        for _ in chunks:
            line = self._line()
            line.n_outstanding += 1
            shares[line] = shares.get(line, 0) + 1
        self._n_outstanding += len(chunks)
        self._idle.clear()
        at = 0
        for line, n in shares.items():
            line.connection.get_chunks(line.listener, job, chunks[at : at + n])
            at += n

    def ask_next(self, job: Job, target: str) -> None:
        """Queue a request for a chunk that the peer chooses; it may wait for its turn there."""
        line = self._line()
        line.n_outstanding += 1
        self._n_outstanding += 1
        self._idle.clear()
        line.connection.get_next(line.listener, job, target.encode(), 3 * FIRST_BYTE_S)

    def _line(self) -> _Line:
        """The data connection for one more request."""
        best = None
        for line in self.lines:
            if best is None or line.n_outstanding < best.n_outstanding:
                best = line
        n = len(self.lines)
        if best is None or (
            n < DATA_CONNECTIONS
            and (best.n_outstanding >= REQUESTS_PER_CONNECTION or (n == 1 and best.n_outstanding))
        ):
            best = _Line(self.addr, self.our_id, self.receiver, self._arrived)
            self.lines.append(best)
        return best

    def _arrived(self, answers: list[Answer]) -> None:  # hot
        self._n_outstanding -= len(answers)
        if not self._n_outstanding:
            self._idle.set()
        if self.on_answers is not None:
            self.on_answers(self, answers)

    def received(self) -> int:
        """Bytes of chunks that came from this peer, right or wrong, complete or not."""
        return self._n_received_before + sum(line.connection.n_received for line in self.lines)

    def hang_up(self) -> None:
        """Close the data connections that have requests out; those come back as cancelled."""
        for line in list(self.lines):
            if line.n_outstanding:
                self._drop(line)

    async def wait_idle(self) -> None:
        """Wait until every request for a chunk has come back."""
        await self._idle.wait()

    def interrupt(self) -> None:
        """End what the conversation waits for; it begins anew after a pause."""
        self._close_control()

    def close(self) -> None:
        """Close every connection; outstanding requests come back as cancelled."""
        for line in list(self.lines):
            self._drop(line)
        self._close_control()

    def _drop(self, line: _Line) -> None:
        self._n_received_before += line.connection.n_received
        line.drop()
        self.lines.remove(line)

    def _close_control(self) -> None:
        if self.control is not None:
            self.control.close()
            self.control = None

    # --- conversation ---

    async def converse(self, listener: SwarmListener, rng: random.Random) -> None:
        """Talk to the peer until cancelled or banned: manifest if needed, then what it has, again and again."""
        n_failures = 0
        while self.banned is None:
            try:
                pause = await self._exchange(listener, rng)
                n_failures = 0
            except NotFound:
                self.lacks_file, self.answered = True, True
                self.did = f"does not have {short(listener.file_hash)}"
                pause = ABSENT_S
            except PeerBusy as exc:
                self.did = str(exc)
                pause = 0.2
            except (RemoteProtocolError, IntegrityError) as exc:
                self.did = str(exc)
                self.answered = True
                listener.on_misconduct(self, str(exc))
                return
            except FastCASError as exc:
                self.did = str(exc)
                self.answered = True
                n_failures += 1
                self.was_silent = True
                self._close_control()
                listener.on_silence(self)
                pause = min(FAILURE_MAX_S, FAILURE_MIN_S * 2 ** (n_failures - 1)) * (0.5 + 0.5 * rng.random())
            await listener.pause(pause)

    async def _exchange(self, listener: SwarmListener, rng: random.Random) -> float:
        """One round: returns how long to wait until the next."""
        if self.control is None:
            self.control = self.receiver.open(self.addr, self.our_id)
        wanted = listener.manifest_to_ask(self, ())
        if wanted is not None:
            manifest = await fetch_manifest(self.receiver, self.control, self.addr, wanted, listener.file_hash)
            listener.on_manifest(self, manifest)
            return POLL_PARTIAL_S
        known = listener.manifest
        waits = known is not None and not self.is_seed and self.generation is not None
        answer = await ask_swarm(
            self.receiver,
            self.control,
            self.addr,
            listener.file_hash,
            known,
            known.manifest_hash if known is not None else None,
            since=self.generation if waits else None,
            wait_ms=WAIT_MS if waits else 0,
            data_port=listener.data_port,
            node_id=listener.node_id,
        )
        self.answered = True
        self.lacks_file = False
        self.did = "answered"
        self.came_back = self.came_back or self.was_silent
        self.was_silent = False
        self.node_id = answer.node_id or self.node_id
        if known is not listener.manifest:  # another peer's manifest came first: ask again about that one
            return 0.0
        listener.on_swarm(self, answer)
        if known is None:
            return await self._obtain_manifest(listener, answer)
        return listener.poll_s(self) * (0.75 + 0.5 * rng.random())

    async def _obtain_manifest(self, listener: SwarmListener, answer: SwarmAnswer) -> float:
        wanted = listener.manifest_to_ask(self, answer.manifests)
        if wanted is None:
            if not answer.manifests:
                self.did = "offers no manifest"
            return POLL_PARTIAL_S
        assert self.control is not None
        manifest = await fetch_manifest(self.receiver, self.control, self.addr, wanted, listener.file_hash)
        listener.on_manifest(self, manifest)
        return POLL_PARTIAL_S
