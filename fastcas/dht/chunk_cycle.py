"""When which chunk keys are announced: new ones at once, all others slice by slice, round and round.

Pure: no clock, no network. The key space has 64 slices. A cursor goes round them once per cycle; the cycle is as
short as the budget in bytes per second allows, but an hour at least. What was announced, when and for how long is
known per slice, and can be saved: a node that comes back while its records still lie with their holders goes on
where it stopped. Times are the caller's clock in seconds (monotonic); saved ones are Unix time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from fastcas.dht.budgets import (
    CHUNK_BYTES_GUESSED,
    CHUNK_CYCLE_MIN_S,
    CHUNK_SLICES,
    CHUNK_TTL_CYCLES,
    CHUNK_TTL_MAX_S,
    CHUNK_TTL_MIN_S,
    KEYS_PER_ANNOUNCE,
)

__all__ = ["ChunkCycle", "SavedCycle", "SavedSlice"]

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]
NEVER = float("-inf")
SAFE_SHARE = 0.9  # of a record's life may pass before it has to be announced again
SMOOTHING = 0.25  # weight of the latest measurement of the cost
_NO_KEYS: U64 = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class SavedSlice:
    """A slice as it was announced: Unix time, life in seconds, xxh3 of its keys."""

    done_at: float
    ttl_s: float
    digest: int


@dataclass(frozen=True, slots=True)
class SavedCycle:
    """What a restart needs.

    Attributes:
        data_port: TCP port that was announced.
        n_nodes: Other nodes in the network when everything was announced.
        cursor: Slice that comes next.
        bytes_per_key: What announcing costs.
        slices: Those that were announced, by number.
    """

    data_port: int
    n_nodes: int
    cursor: int
    bytes_per_key: float
    slices: dict[int, SavedSlice]

    def to_map(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [[number, s.done_at, s.ttl_s, s.digest] for number, s in sorted(self.slices.items())]
        return {
            "port": self.data_port, "nodes": self.n_nodes, "cursor": self.cursor, "cost": self.bytes_per_key,
            "slices": rows,
        }  # fmt: skip

    @classmethod
    def from_map(cls, values: object) -> SavedCycle | None:
        """Read what `to_map` wrote; None for anything else."""
        match values:
            case {
                "port": int(port), "nodes": int(n_nodes), "cursor": int(cursor), "cost": float(cost),
                "slices": list(rows),
            }:  # fmt: skip
                pass
            case _:
                return None
        slices = {}
        for row in rows[:CHUNK_SLICES]:
            match row:
                case [int(number), float(done_at), float(ttl_s), int(digest)] if 0 <= number < CHUNK_SLICES:
                    slices[number] = SavedSlice(done_at, ttl_s, digest)
                case _:
                    return None
        return cls(port, n_nodes, cursor % CHUNK_SLICES, min(max(cost, 1.0), 1e6), slices)


class ChunkCycle:
    """The schedule of one node's chunk keys. Keys are sorted distinct uint64.

    Args:
        rate_Bps: What announcing again may cost on average, bytes per second in both directions together.
    """

    def __init__(self, rate_Bps: float) -> None:
        """Nothing was announced yet."""
        self._rate_Bps = rate_Bps
        self._announced: U64 = _NO_KEYS
        self._done_at = [NEVER] * CHUNK_SLICES
        self._ttl_s = [0.0] * CHUNK_SLICES
        self._bytes_per_key = CHUNK_BYTES_GUESSED
        self._is_measured = False
        self._cursor = 0
        self._step_at = NEVER
        self._saved: SavedCycle | None = None
        self._is_slow = False

    # --- how long everything takes ---

    def cycle_s(self, n_keys: int) -> float:
        """Return how long going round takes for so many keys: as the budget allows, an hour at least."""
        return max(n_keys * self._bytes_per_key / self._rate_Bps, CHUNK_CYCLE_MIN_S)

    def ttl_s(self, n_keys: int) -> int:
        """Return for how long a record is to be stored: 2.2 cycles, 2 to 48 hours."""
        return int(min(max(CHUNK_TTL_CYCLES * self.cycle_s(n_keys), CHUNK_TTL_MIN_S), CHUNK_TTL_MAX_S))

    @staticmethod
    def steps(n_keys: int) -> int:
        """Return in how many steps the cursor goes round: a power of two, with a datagram's keys per step at least."""
        return 1 << min(max(n_keys // KEYS_PER_ANNOUNCE, 1), CHUNK_SLICES).bit_length() - 1

    # --- what to announce ---

    def news(self, offered: U64) -> U64:
        """Return the offered keys that are not announced, forgetting the announced ones that are no longer offered.

        What comes back later is then new again.
        """
        known = _is_in(offered, self._announced)
        if len(self._announced) != np.count_nonzero(known):
            self._announced = offered[known]
        return offered[~known]

    def due(self, offered: U64, now: float, jitter: float = 1.0) -> U64:
        """Return the keys to be announced again now: the cursor's slices, and what would expire before its turn.

        Moves the cursor; `jitter` around 1 stretches the time to its next step.
        """
        self._look_at_pace(len(offered))
        bounds = _bounds(offered)
        numbers = {n for n in range(CHUNK_SLICES) if bounds[n] < bounds[n + 1] and self._late_at(n) <= now}
        step_s = jitter * self.cycle_s(len(offered)) / self.steps(len(offered))
        if self._step_at == NEVER:
            self._step_at = now + step_s
        elif self._step_at <= now:
            width = CHUNK_SLICES // self.steps(len(offered))
            numbers |= {(self._cursor + i) % CHUNK_SLICES for i in range(width)}
            self._cursor = (self._cursor + width) % CHUNK_SLICES
            self._step_at = now + step_s
        if not numbers:
            return _NO_KEYS
        return np.concatenate([offered[bounds[n] : bounds[n + 1]] for n in sorted(numbers)])

    def next_at(self, offered: U64) -> float:
        """Return when `due` has to be asked next; `due` was asked before."""
        bounds = _bounds(offered)
        lates = [self._late_at(n) for n in range(CHUNK_SLICES) if bounds[n] < bounds[n + 1]]
        return min([self._step_at, *lates])

    def note(self, keys: U64, offered: U64, now: float, ttl_s: float, cost_bytes: int) -> None:
        """Record that `keys`, some or all of the offered ones, were announced for `ttl_s` seconds at this cost."""
        fresh = keys[~_is_in(keys, self._announced)]
        if len(fresh):
            self._announced = np.sort(np.concatenate([self._announced, fresh]), kind="stable")
        sent, all_of = np.diff(_bounds(keys)), np.diff(_bounds(offered))
        for number in np.flatnonzero(sent).tolist():
            if sent[number] >= all_of[number] or self._done_at[number] == NEVER:
                self._done_at[number], self._ttl_s[number] = now, float(ttl_s)
        # A few new keys cost more each, and nothing was paid where nobody was there: neither says what all will cost.
        if cost_bytes and len(keys) * CHUNK_SLICES >= len(offered):
            weight = SMOOTHING if self._is_measured else 1.0
            self._bytes_per_key += weight * (cost_bytes / len(keys) - self._bytes_per_key)
            self._is_measured = True

    def _late_at(self, number: int) -> float:
        """Return when a slice has to be announced although the cursor is elsewhere."""
        if self._is_slow or self._done_at[number] == NEVER:
            return float("inf")
        return self._done_at[number] + SAFE_SHARE * self._ttl_s[number]

    def _look_at_pace(self, n_keys: int) -> None:
        was_slow, cycle_s = self._is_slow, self.cycle_s(n_keys)
        self._is_slow = cycle_s > SAFE_SHARE * CHUNK_TTL_MAX_S
        if self._is_slow and not was_slow:
            log.warning(
                "announcing %d chunks takes %.0f h within %.0f B/s, records last %d h: some will be missing at times; "
                "allow more with --max-announce, or announce fewer with --announce rare",
                n_keys, cycle_s / 3600, self._rate_Bps, CHUNK_TTL_MAX_S // 3600,
            )  # fmt: skip

    # --- restarts ---

    def to_saved(self, data_port: int, n_nodes: int, now: float, wall: float) -> SavedCycle:
        """Return what a restart needs to know."""
        bounds = _bounds(self._announced)
        slices = {
            number: SavedSlice(
                wall - (now - self._done_at[number]),
                self._ttl_s[number],
                _digest(self._announced[bounds[number] : bounds[number + 1]]),
            )
            for number in range(CHUNK_SLICES)
            if bounds[number] < bounds[number + 1] and self._done_at[number] != NEVER
        }
        return SavedCycle(data_port, n_nodes, self._cursor, self._bytes_per_key, slices)

    def restore(self, saved: SavedCycle | None) -> None:
        """Remember what an earlier process announced; `adopt` decides what that is worth."""
        self._saved = saved

    def adopt(self, offered: U64, data_port: int, now: float, wall: float) -> None:
        """Count those slices as announced that are as an earlier process announced them and still held. Once."""
        saved, self._saved = self._saved, None
        if saved is None or saved.data_port != data_port:
            return
        self._cursor, self._bytes_per_key, self._is_measured = saved.cursor, saved.bytes_per_key, True
        bounds = _bounds(offered)
        held = [self._announced]
        for number, entry in saved.slices.items():
            keys = offered[bounds[number] : bounds[number + 1]]
            age_s = wall - entry.done_at
            if 0 <= age_s < SAFE_SHARE * entry.ttl_s <= CHUNK_TTL_MAX_S and _digest(keys) == entry.digest:
                self._done_at[number], self._ttl_s[number] = now - age_s, entry.ttl_s
                held.append(keys)
        self._announced = np.unique(np.concatenate(held))


def _is_in(keys: U64, among: U64) -> npt.NDArray[np.bool_]:
    """Return which of `keys` are in `among`, both sorted. Cost: 30 ns per key."""
    if not len(among):
        return np.zeros(len(keys), dtype=bool)
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return np.asarray(among[at] == keys)


def _bounds(keys: U64) -> npt.NDArray[np.intp]:
    """Return where each slice begins in sorted keys, and at the end their number."""
    firsts = np.arange(CHUNK_SLICES, dtype=np.uint64) << np.uint64(64 - (CHUNK_SLICES.bit_length() - 1))
    return np.append(np.searchsorted(keys, firsts, side="left"), len(keys))


def _digest(keys: U64) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(keys).tobytes())
