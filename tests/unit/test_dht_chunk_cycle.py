"""The schedule of chunk keys, by itself: new ones, slices, budget, life of records, what a restart takes over."""

from __future__ import annotations

import logging
import random

import numpy as np
import numpy.typing as npt
import pytest

from fastcas.dht.budgets import CHUNK_BYTES_GUESSED, CHUNK_CYCLE_MIN_S, CHUNK_SLICES
from fastcas.dht.chunk_cycle import ChunkCycle, SavedCycle
from fastcas.dht.provided import keys_of

U64 = npt.NDArray[np.uint64]
NONE: U64 = np.zeros(0, dtype=np.uint64)
WALL = 1_800_000_000.0


def some_keys(n: int, seed: int = 1) -> U64:
    return keys_of(random.Random(seed).randbytes(32 * n))


def announced(keys: U64, *, rate_Bps: float = 1e9, now: float = 0.0, bytes_per_key: float = 88.0) -> ChunkCycle:
    """Return a schedule all of whose keys were just announced."""
    cycle = ChunkCycle(rate_Bps)
    assert len(cycle.due(keys, now)) == 0
    cycle.note(keys, keys, now, cycle.ttl_s(len(keys)), round(bytes_per_key * len(keys)))
    return cycle


def test_only_what_is_not_announced_is_new_and_what_went_away_becomes_new_again() -> None:
    keys = some_keys(1000)
    cycle = announced(keys)
    assert len(cycle.news(keys)) == 0
    more = np.union1d(keys, some_keys(10, seed=2))
    assert len(cycle.news(more)) == 10
    assert len(cycle.news(keys[:900])) == 0
    assert cycle.news(keys).tolist() == keys[900:].tolist()


def test_a_cycle_announces_every_key_once_in_order_slice_by_slice() -> None:
    keys = some_keys(20_000)
    cycle = announced(keys)
    now, seen, sizes = 0.0, [], []
    while now < CHUNK_CYCLE_MIN_S:
        now = cycle.next_at(keys)
        due = cycle.due(keys, now)
        cycle.note(due, keys, now, cycle.ttl_s(len(keys)), 88 * len(due))
        seen += due.tolist()
        sizes.append(len(due))
    assert seen == keys.tolist()
    assert len(sizes) == CHUNK_SLICES
    assert max(sizes) < 2 * len(keys) / CHUNK_SLICES


def test_few_keys_take_few_steps() -> None:
    assert [ChunkCycle.steps(n) for n in (0, 1, 130, 260, 1000, 5000, 8320, 10**7)] == [1, 1, 1, 2, 4, 32, 64, 64]


@pytest.mark.parametrize(
    ("n", "rate_Bps", "hours"), [(1000, 20_000, 1.0), (10**6, 20_000, 1.22), (10**7, 20_000, 12.2), (10**6, 2000, 12.2)]
)
def test_cycle_is_as_short_as_the_budget_allows_and_an_hour_at_least(n: int, rate_Bps: int, hours: float) -> None:
    cycle = announced(some_keys(1000), rate_Bps=rate_Bps)
    assert cycle.cycle_s(n) / 3600 == pytest.approx(hours, rel=0.01)
    assert cycle.ttl_s(n) / 3600 == pytest.approx(min(max(2.2 * hours, 2.0), 48.0), rel=0.01)
    assert n * 88 / cycle.cycle_s(n) <= rate_Bps * 1.01


def test_few_new_keys_say_nothing_about_the_cost_of_all() -> None:
    keys = some_keys(10_000)
    cycle = announced(keys, rate_Bps=100)
    before = cycle.cycle_s(len(keys))
    more = np.union1d(keys, some_keys(2, seed=2))
    cycle.note(cycle.news(more), more, 0.0, 7200, 60_000)
    assert cycle.cycle_s(len(keys)) == before
    cycle.note(keys, more, 0.0, 7200, 2 * 88 * len(keys))
    assert before < cycle.cycle_s(len(keys)) < 1.5 * before


def test_what_would_expire_before_its_turn_is_announced_at_once() -> None:
    keys = some_keys(64_000)
    cycle = announced(keys, rate_Bps=64_000 * 88 / 3600 / 10)  # ten hours round, the records were stored for 2.2 h
    later = np.union1d(keys, some_keys(10))
    cycle.note(keys, later, 0.0, 2.2 * 3600, 88 * len(keys))
    assert cycle.next_at(keys) <= 0.9 * 2.2 * 3600
    due = cycle.due(keys, 2.0 * 3600)
    assert len(due) == len(keys)


def test_a_budget_that_is_too_small_is_said_once_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    keys = some_keys(64_000)
    with caplog.at_level(logging.WARNING):
        cycle = announced(keys, rate_Bps=10)
        for hour in range(1, 50):
            assert len(cycle.due(keys, 3600.0 * hour)) <= 2 * len(keys) / CHUNK_SLICES
    assert caplog.text.count("--max-announce") == 1
    assert cycle.ttl_s(len(keys)) == 48 * 3600


def test_a_restart_goes_on_where_it_stopped_and_announces_only_what_changed_or_expired() -> None:
    keys = some_keys(64_000)
    before = announced(keys, now=100.0)
    saved = SavedCycle.from_map(before.to_saved(9000, 20, now=700.0, wall=WALL).to_map())
    assert saved is not None

    def restarted(offered: U64, *, port: int = 9000, after_s: float = 60.0) -> ChunkCycle:
        cycle = ChunkCycle(1e9)
        cycle.restore(saved)
        cycle.adopt(offered, port, 5.0, WALL + after_s)
        return cycle

    again = restarted(keys)
    assert len(again.news(keys)) == 0
    assert again.cycle_s(10**9) == before.cycle_s(10**9)
    assert len(again.due(keys, 5.0)) == 0
    assert len(again.due(keys, 5.0 + 2 * 3600)) == len(keys)  # their age counts from the announcement
    one_more = np.union1d(keys, np.array([12345], dtype=np.uint64))
    changed = restarted(one_more)
    assert len(changed.news(one_more)) == pytest.approx(len(keys) / CHUNK_SLICES, rel=0.2)
    assert len(restarted(keys, port=9001).news(keys)) == len(keys)
    assert len(restarted(keys, after_s=2 * 3600).news(keys)) == len(keys)
    assert len(restarted(keys, after_s=-3600).news(keys)) == len(keys)  # the clock went back: nobody knows


def test_after_saving_half_announced_the_other_half_is_new() -> None:
    keys = some_keys(10_000)
    half = keys[:5000]
    cycle = ChunkCycle(1e9)
    cycle.note(half, keys, 0.0, 7200, 88 * 5000)
    again = ChunkCycle(1e9)
    again.restore(cycle.to_saved(9000, 20, 0.0, WALL))
    again.adopt(keys, 9000, 0.0, WALL)
    news = again.news(keys)
    assert set(keys[5000:].tolist()) <= set(news.tolist())
    assert len(news) <= 5000 + 2 * len(keys) / CHUNK_SLICES  # the slice in the middle is announced again


GOOD = {"port": 1, "nodes": 1, "cursor": 0, "cost": 1.0, "slices": [[63, 1.0, 1.0, 1]]}


@pytest.mark.parametrize(
    "values",
    [
        None, [], {}, {name: value for name, value in GOOD.items() if name != "slices"}, GOOD | {"slices": [[1]]},
        GOOD | {"slices": [[64, 1.0, 1.0, 1]]}, GOOD | {"port": "x"}, GOOD | {"cost": None},
    ],
)  # fmt: skip
def test_malformed_saved_schedules_are_none(values: object) -> None:
    assert SavedCycle.from_map(GOOD) is not None
    assert SavedCycle.from_map(values) is None


def test_cost_is_guessed_until_it_was_measured() -> None:
    assert ChunkCycle(100.0).cycle_s(10**6) == 10**6 * CHUNK_BYTES_GUESSED / 100.0
