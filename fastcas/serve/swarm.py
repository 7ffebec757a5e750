"""/swarm and /swarm/…/next: what this node has of a file, who else has it, and the seed's choice of chunks.

Answers requests that the engine parked. Owns the long polls, the claims of chunks on their way, the worker's view
of have logs and of the swarm snapshot. Never blocks and never asks another process: what is here comes from the
chunk table (complete files), the have logs (partial ones) and the snapshot (peers).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from fastcas.limits import PEER_REPORT_S, SWARM_PEERS_MAX, SWARM_POLL_MAX_S, SWARM_POLL_MIN_S
from fastcas.serve.query import BadQuery, Caller, SwarmQuery, parse_swarm_query, parse_target
from fastcas.serve.takers import Takers

if TYPE_CHECKING:
    from fastcas.serve._engine import Engine, Parked
    from fastcas.table import GivenBoard, HaveLog
    from fastcas.table.snapshot import SwarmEntry

__all__ = ["SwarmService"]

log = logging.getLogger(__name__)

_MSGPACK = b"Content-Type: application/msgpack\r\nCache-Control: no-store\r\n"
_TEXT = b"Content-Type: text/plain\r\nCache-Control: no-store\r\n"
_NO_STORE = b"Cache-Control: no-store\r\n"
_SHAPE = struct.Struct("<8sBBBBIQII32s")  # a manifest's header, fastcas/metadata.py
_HASH_BATCH = 4096  # chunk hashes per read of a manifest
_COMPLETE_TTL_S = 1.0  # a complete file's bitfield is computed at most this often
_CALLERS_MAX = 4096
_PEERS_NEWS_S = 5.0  # so long after the list changed, answers with `since` hold it, too
_NEWS_SHARE = 0.1  # of the time since the last news that news may wait to be seen
_NEW_BYTES = 3  # what one entry of `new` takes, about; a bitfield is sent instead where that is shorter


class _State(NamedTuple):
    """What is here of one file under one manifest."""

    generation: int
    n_data: int
    n_total: int
    n_here: int
    data_complete: bool
    bitfield: bytes


@dataclass(slots=True)
class _Waiting:
    """A long poll."""

    handle: int
    file_hash: bytes
    query: SwarmQuery
    timer: asyncio.TimerHandle


class _Claim(NamedTuple):
    """A chunk of NEXT on its way, marked on the board: for whom."""

    file_hash: bytes
    manifest_hash: bytes
    chunk: int
    caller: Caller
    ip: str


class SwarmService:
    """Answers the parked requests of one worker's engine."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        node_id: str,
        report: Callable[[dict[str, Any]], None],
        board: GivenBoard | None,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Answer for `engine`.

        Args:
            node_id: 40 hex digits, said in every answer.
            report: Takes {op: "peer", …} messages for the agent.
            board: The node's given board; None: /next answers 404.
            rng: Chooses chunks for NEXT.
            clock: Monotonic seconds.
        """
        self._engine = engine
        self._loop = loop
        self._node_id = node_id
        self._report = report
        self._board = board
        self._rng = rng or random.Random()
        self._clock = clock
        self._logs: dict[bytes, HaveLog] = {}  # by manifest hash
        self._swarm: dict[bytes, SwarmEntry] = {}
        self._peers_changed: dict[bytes, float] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._poll: asyncio.TimerHandle | None = None
        self._news_at = -math.inf  # when somebody was last told something new
        self._takers = Takers(board, clock) if board is not None else None
        self._claims: dict[int, _Claim] = {}
        self._callers: dict[tuple[str, int, bytes], float] = {}
        self._complete: dict[bytes, tuple[float, _State]] = {}
        self._closed = False
        self.n_given = 0

    # --- what the agent publishes ---

    def add_log(self, have: HaveLog) -> None:
        """Serve a partial file's bitfield from now on; takes the log over."""
        old = self._logs.pop(have.manifest_hash, None)
        if old is not None:
            old.close()
        self._logs[have.manifest_hash] = have
        self._look()

    def end_log(self, manifest_hash: bytes) -> None:
        """Forget a partial file (it is complete, or given up)."""
        old = self._logs.pop(manifest_hash, None)
        if old is not None:
            old.close()
        self._complete.pop(manifest_hash, None)
        self._look()

    def set_swarm(self, swarm: dict[bytes, SwarmEntry]) -> None:
        """Name these peers and manifests from now on."""
        now = self._clock()
        self._peers_changed = {
            file_hash: now
            if file_hash not in self._swarm or self._swarm[file_hash]["peers"] != entry["peers"]
            else self._peers_changed.get(file_hash, now)
            for file_hash, entry in swarm.items()
        }
        self._swarm = swarm
        if self._takers is not None:
            self._takers.set_swarm(swarm)

    def table_changed(self) -> None:
        """A new chunk table is in use: what was computed from the old one is void."""
        self._complete.clear()
        self._look()

    # --- what the engine reports ---

    def answer(self, parked: Parked) -> None:
        """Answer a parked request, at once or when there is news."""
        try:
            file_hash, is_next = parse_target(parked.path)
            query = parse_swarm_query(parked.query)
            if is_next and query.manifest_hash is None:
                raise BadQuery("m: expected a manifest hash")
        except BadQuery as exc:
            self._engine.respond(parked.handle, 400, _TEXT, f"{exc}\n".encode())
            return
        if not self._is_known(file_hash):
            self._not_here(parked.handle)
            return
        if query.caller is not None:
            self._report_caller(file_hash, query.caller.node_id, query.caller.port, parked.ip)
        if is_next:
            self._next(parked, file_hash, query)
        elif query.wait_ms and not self._closed and not self._has_news(file_hash, query):
            self._wait(parked.handle, file_hash, query)
        else:
            if query.since is not None:
                self._news_at = self._clock()
            self._respond(parked.handle, file_hash, query)

    def sent(self, handle: int, ok: bool) -> None:
        """A chunk of /next left whole (ok), or its connection died: then it was not given."""
        claim = self._claims.pop(handle, None)
        if claim is None:
            return
        if self._board is None or self._takers is None:
            return
        if ok:
            self.n_given += 1
            self._takers.mark(claim.file_hash, claim.caller, claim.ip, claim.manifest_hash, claim.chunk)
        else:
            self._board.clear(claim.manifest_hash, claim.chunk)

    def tick(self) -> None:
        """Let the trials of unproven takers end; call it a few times a second."""
        if self._takers is not None and self._takers.on_trial:
            self._takers.expire()

    def gone(self, handle: int) -> None:
        """The connection of a parked request died."""
        waiting = self._waiting.pop(handle, None)
        if waiting is not None:
            waiting.timer.cancel()

    def close(self) -> None:
        """Answer what waits, and everything at once from now on; drop the logs. Idempotent."""
        self._closed = True
        for handle in list(self._waiting):
            self._finish(handle)
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        for have in self._logs.values():
            have.close()
        self._logs.clear()

    def statistics(self) -> dict[str, int]:
        """Return how many long polls wait, chunks are on their way, partial files and known swarms there are."""
        return {
            "waiting": len(self._waiting),
            "claims": len(self._claims),
            "logs": len(self._logs),
            "swarms": len(self._swarm),
            "given": self.n_given,
            "lost": self.n_lost,
        }

    @property
    def n_lost(self) -> int:
        """Marks of NEXT taken back because their taker is gone or never answered."""
        return self._takers.n_lost if self._takers is not None else 0

    # --- the map ---

    def _is_known(self, file_hash: bytes) -> bool:
        return (
            self._engine.lookup_file(file_hash) is not None
            or file_hash in self._swarm
            or any(have.file_hash == file_hash for have in self._logs.values())
        )

    def _manifests(self, file_hash: bytes) -> list[bytes]:
        mine = self._engine.lookup_file(file_hash)
        out = [] if mine is None else [mine]
        out += [m for m, have in self._logs.items() if have.file_hash == file_hash]
        entry = self._swarm.get(file_hash)
        if entry is not None:
            out += entry["manifests"]
        return list(dict.fromkeys(out))

    def _generation(self, file_hash: bytes, manifest_hash: bytes) -> int | None:
        """The generation alone: what a long poll looks at."""
        if self._engine.lookup_file(file_hash) == manifest_hash:
            state = self._state_of_complete(manifest_hash)
            return state.generation if state is not None else None
        have = self._log(file_hash, manifest_hash)
        return have.generation if have is not None else None

    def _log(self, file_hash: bytes, manifest_hash: bytes) -> HaveLog | None:
        have = self._logs.get(manifest_hash)
        return have if have is not None and have.file_hash == file_hash else None

    def _state_of_complete(self, manifest_hash: bytes) -> _State | None:
        """What is here of a file that the table lists: all data chunks as a rule, parity chunks perhaps.

        Cost: one lookup per chunk, at most once a second.
        """
        now = self._clock()
        cached = self._complete.get(manifest_hash)
        if cached is not None and now - cached[0] < _COMPLETE_TTL_S:
            return cached[1]
        head = self._engine.read_manifest(manifest_hash, 0, _SHAPE.size)
        if head is None:
            return None
        n, p = _SHAPE.unpack(head)[7:9]
        after_data = _SHAPE.size + 32 * (n + max(n - 1, 0))
        data = self._have(manifest_hash, _SHAPE.size, n)
        parity = self._have(manifest_hash, after_data, p)
        if data is None or parity is None:
            return None
        found = data + parity
        n_here = sum(found)
        state = _State(n_here, n, n + p, n_here, sum(data) == n, b"" if n_here == n + p else _bitfield(found))
        if len(self._complete) >= _CALLERS_MAX:
            self._complete.clear()
        self._complete[manifest_hash] = (now, state)
        return state

    def _have(self, manifest_hash: bytes, at: int, n: int) -> bytes | None:
        """One byte, 0 or 1, for each of n chunk hashes that begin at byte `at` of a manifest."""
        out = []
        for first in range(0, n, _HASH_BATCH):
            count = min(_HASH_BATCH, n - first)
            keys = self._engine.read_manifest(manifest_hash, at + 32 * first, 32 * count)
            if keys is None:
                return None
            out.append(self._engine.have(keys))
        return b"".join(out)

    def _map(self, file_hash: bytes, query: SwarmQuery) -> dict[str, Any]:
        manifests = self._manifests(file_hash)
        entry = self._swarm.get(file_hash)
        answer: dict[str, Any] = {
            "v": 1,
            "node_id": self._node_id,
            "manifests": manifests,
            "load": self._engine.statistics()["sending"],
        }
        # Whoever asks for news had the whole list before; at ten questions a second it would be most of the answer.
        if query.since is None or self._clock() - self._peers_changed.get(file_hash, -math.inf) < _PEERS_NEWS_S:
            answer["peers"] = entry["peers"][:SWARM_PEERS_MAX] if entry is not None else []
        wanted = query.manifest_hash
        if wanted is None:
            return answer
        if manifests and self._engine.lookup_file(file_hash) == wanted:
            state = self._state_of_complete(wanted)
            if state is not None:
                answer["g"] = state.generation
                if state.n_here == state.n_total:
                    answer["all"] = True
                else:
                    answer["have"] = state.bitfield
            return answer
        have = self._log(file_hash, wanted)
        if have is not None:
            generation = have.generation
            answer["g"] = generation
            since = query.since
            if since is not None and since <= generation and (generation - since) * _NEW_BYTES <= have.n_total // 8 + 8:
                answer["new"] = have.since(since)[: generation - since]
            else:
                answer["have"] = have.bitfield()
        return answer

    def _respond(self, handle: int, file_hash: bytes, query: SwarmQuery) -> None:
        if not self._is_known(file_hash):
            self._not_here(handle)
            return
        self._engine.respond(handle, 200, _MSGPACK, msgpack.packb(self._map(file_hash, query)))

    def _not_here(self, handle: int) -> None:
        self._engine.respond(handle, 404, _TEXT, b"not here\n")

    # --- long polls ---

    def _has_news(self, file_hash: bytes, query: SwarmQuery) -> bool:
        """Whether an answer would tell more than the caller knows; true, too, when it can never wait for more."""
        if query.manifest_hash is None or query.since is None:
            return True
        return self._generation(file_hash, query.manifest_hash) != query.since

    def _wait(self, handle: int, file_hash: bytes, query: SwarmQuery) -> None:
        timer = self._loop.call_later(query.wait_ms / 1000, self._finish, handle)
        self._waiting[handle] = _Waiting(handle, file_hash, query, timer)
        if self._poll is None:
            self._poll = self._loop.call_later(self._pause_s(), self._poll_news)

    def _pause_s(self) -> float:
        """Until the next look: short where chunks come fast, so that news travels faster than chunks do."""
        since_s = self._clock() - self._news_at
        return min(SWARM_POLL_MAX_S, max(SWARM_POLL_MIN_S, _NEWS_SHARE * since_s))

    def _finish(self, handle: int) -> None:
        waiting = self._waiting.pop(handle, None)
        if waiting is not None:
            waiting.timer.cancel()
            self._respond(handle, waiting.file_hash, waiting.query)

    def _poll_news(self) -> None:
        self._poll = None
        self._look()
        if self._waiting:
            self._poll = self._loop.call_later(self._pause_s(), self._poll_news)

    def _look(self) -> None:
        """Answer the long polls that have news. Cost: one look per (file, manifest) that somebody waits for."""
        generations: dict[tuple[bytes, bytes | None], int | None] = {}
        for waiting in list(self._waiting.values()):
            manifest_hash = waiting.query.manifest_hash
            key = (waiting.file_hash, manifest_hash)
            if key not in generations and manifest_hash is not None:
                generations[key] = self._generation(waiting.file_hash, manifest_hash)
            if generations.get(key) != waiting.query.since:
                self._news_at = self._clock()
                self._finish(waiting.handle)

    # --- NEXT ---

    def _next(self, parked: Parked, file_hash: bytes, query: SwarmQuery) -> None:
        manifest_hash = query.manifest_hash
        board = self._board
        if parked.is_head:
            self._engine.respond(parked.handle, 405, b"Allow: GET\r\n" + _TEXT, b"only GET\n")
            return
        if board is None or manifest_hash is None or self._engine.lookup_file(file_hash) != manifest_hash:
            self._not_here(parked.handle)
            return
        state = self._state_of_complete(manifest_hash)
        if state is None or not state.data_complete:
            self._not_here(parked.handle)
            return
        chunk = None
        if query.first_chunk < state.n_data:
            chunk = board.claim_from(manifest_hash, state.n_data, query.first_chunk, self._rng.getrandbits(32))
        if chunk is None:
            self._engine.respond(parked.handle, 204, _NO_STORE)
            return
        caller, takers = query.caller, self._takers
        if caller is not None and takers is not None and takers.may_mark(file_hash, caller, parked.ip):
            self._claims[parked.handle] = _Claim(file_hash, manifest_hash, chunk, caller, parked.ip)
        else:
            board.clear(manifest_hash, chunk)  # somebody who will not pass it on gets it unmarked
        if not self._send_chunk(parked.handle, manifest_hash, chunk):
            self.sent(parked.handle, False)
            self._not_here(parked.handle)

    def _send_chunk(self, handle: int, manifest_hash: bytes, chunk: int) -> bool:
        chunk_hash = self._engine.read_manifest(manifest_hash, _SHAPE.size + 32 * chunk, 32)
        if chunk_hash is None:
            return False
        fields = f"Content-Location: /chunks/{chunk_hash.hex()}\r\nX-Fastcas-Chunk: {chunk}\r\n".encode("ascii")
        return bool(self._engine.respond_chunk(handle, chunk_hash, fields, notify=handle in self._claims))

    # --- callers ---

    def _report_caller(self, file_hash: bytes, node_id: str, port: int, ip: str) -> None:
        now = self._clock()
        key = (ip, port, file_hash)
        last = self._callers.get(key)
        if last is not None and now - last < PEER_REPORT_S:
            return
        if len(self._callers) >= _CALLERS_MAX:
            self._callers = {k: at for k, at in self._callers.items() if now - at < PEER_REPORT_S}
            if len(self._callers) >= _CALLERS_MAX:
                return
        self._callers[key] = now
        self._report({"op": "peer", "file_hash": file_hash, "node_id": node_id, "ip": ip, "port": port})


def _bitfield(found: bytes) -> bytes:
    """Pack one byte (0 or 1) per chunk into bits: bit i = byte i // 8, mask 0x80 >> (i % 8)."""
    n = len(found)
    if n == 0:
        return b""
    bits = int(found.translate(_DIGITS), 2)
    return (bits << (-n % 8)).to_bytes((n + 7) // 8, "big")


_DIGITS = bytes([0x30, *([0x31] * 255)])
