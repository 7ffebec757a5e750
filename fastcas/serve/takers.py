"""Who got chunks through NEXT: marks on the given board stay only for takers that can pass the chunks on.

A caller whose data port answered a health check is listed in the swarm snapshot: it is proven. One that is not listed
yet may have a few marks on trial, and loses them when it is not listed in time. A proven one that leaves the list is
gone, and its marks are taken back, so that what it held is given again. A full list leaves some out, therefore
nobody is gone by not being on one. Belongs to one worker: the board is shared, what each worker gave is its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastcas.limits import NEXT_TRIAL_S, NEXT_TRIALS_PER_SOURCE, SWARM_PEERS_MAX

if TYPE_CHECKING:
    from fastcas.serve.query import Caller
    from fastcas.table import GivenBoard
    from fastcas.table.snapshot import SwarmEntry

__all__ = ["Takers"]

_MARKS_MAX = 1 << 18  # further ones are not remembered: those of proven takers stay

Address = tuple[str, str, int]


@dataclass(slots=True)
class _Taker:
    since: float
    is_proven: bool
    marks: list[tuple[bytes, int]] = field(default_factory=list)


class Takers:
    """The marks that this worker set, by taker.

    Args:
        board: The node's given board.
        clock: Monotonic seconds.
    """

    def __init__(self, board: GivenBoard, clock: Callable[[], float] = time.monotonic) -> None:
        self._board = board
        self._clock = clock
        self._takers: dict[tuple[bytes, Address], _Taker] = {}
        self._trials: Counter[str] = Counter()  # marks of unproven takers by source
        self._proven: dict[bytes, frozenset[Address]] = {}
        self._n_marks = 0
        self.n_lost = 0

    @property
    def on_trial(self) -> bool:
        """Whether somebody is; then `expire` has work to do."""
        return bool(self._trials)

    def set_swarm(self, swarm: Mapping[bytes, SwarmEntry]) -> None:
        """Take a new snapshot: some are proven now, some are gone."""
        self._proven = {file_hash: frozenset(map(tuple, entry["peers"])) for file_hash, entry in swarm.items()}  # type: ignore[arg-type]
        for key, taker in list(self._takers.items()):
            listed = self._proven.get(key[0], frozenset())
            if key[1] in listed:
                self._prove(key, taker)
            elif taker.is_proven and len(listed) < SWARM_PEERS_MAX:
                self._forget(key, taker)

    def may_mark(self, file_hash: bytes, caller: Caller, ip: str) -> bool:
        """Return whether a chunk for this caller is to be marked."""
        if (caller.node_id, ip, caller.port) in self._proven.get(file_hash, frozenset()):
            return True
        taker = self._takers.get((file_hash, (caller.node_id, ip, caller.port)))
        return (taker is not None and taker.is_proven) or self._trials[ip] < NEXT_TRIALS_PER_SOURCE

    def mark(self, file_hash: bytes, caller: Caller, ip: str, manifest_hash: bytes, chunk: int) -> None:
        """The caller has this chunk, which is marked on the board already."""
        address = (caller.node_id, ip, caller.port)
        key = (file_hash, address)
        taker = self._takers.get(key)
        is_proven = taker.is_proven if taker is not None else address in self._proven.get(file_hash, frozenset())
        if self._n_marks >= _MARKS_MAX:
            if not is_proven:
                self._board.clear(manifest_hash, chunk)
            return
        if taker is None:
            taker = self._takers[key] = _Taker(self._clock(), is_proven)
        taker.marks.append((manifest_hash, chunk))
        self._n_marks += 1
        if not is_proven:
            self._trials[ip] += 1

    def expire(self) -> None:
        """Take back the marks of those who were not proven in time. Cost: one step per taker."""
        now = self._clock()
        for key, taker in list(self._takers.items()):
            if not taker.is_proven and now - taker.since >= NEXT_TRIAL_S:
                self._forget(key, taker)

    def _prove(self, key: tuple[bytes, Address], taker: _Taker) -> None:
        if not taker.is_proven:
            taker.is_proven = True
            self._end_trial(key[1][1], len(taker.marks))

    def _forget(self, key: tuple[bytes, Address], taker: _Taker) -> None:
        del self._takers[key]
        for manifest_hash, chunk in taker.marks:
            self._board.clear(manifest_hash, chunk)
        self._n_marks -= len(taker.marks)
        self.n_lost += len(taker.marks)
        if not taker.is_proven:
            self._end_trial(key[1][1], len(taker.marks))

    def _end_trial(self, ip: str, n: int) -> None:
        self._trials[ip] -= n
        if self._trials[ip] <= 0:
            del self._trials[ip]
