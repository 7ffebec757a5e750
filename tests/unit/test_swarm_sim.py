"""The distribution strategy in virtual time: last leecher's time over the lower bound, with the real scheduler."""

from __future__ import annotations

import math

import pytest

from tests.support.swarm_sim import Swarm, simulate


def alike(n: int, up: float, down: float, **options: int) -> Swarm:
    """N leechers with the seed's uplink."""
    return Swarm((up,) * n, down, up, **options)


# A wire's headers cost 4.5 % and are not simulated: these bounds lie below what bench/swarm.py has to reach.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("swarm", "limit"),
    [
        (alike(8, 100, 200), 1.15),
        (alike(4, 100, 100, n_chunks=512), 1.10),
        (alike(16, 50, 100), 1.2),
        (Swarm((10.0,) * 2 + (100.0,) * 6, 200, 100), 1.15),
        (Swarm((20.0,) * 4 + (100.0,) * 4, 200, 100), 1.1),
    ],
    ids=["8", "4", "16", "two slow", "half slow"],
)
def test_a_swarm_is_close_to_the_bound(swarm: Swarm, limit: float) -> None:
    assert simulate(swarm).ratio <= limit


@pytest.mark.slow
def test_what_only_leechers_had_that_vanished_is_asked_of_the_seed_by_name() -> None:
    """Nothing takes their marks back here: without asking by name nobody would ever finish."""
    assert simulate(alike(10, 100, 200, leave=2)).ratio <= 1.35


@pytest.mark.slow
def test_those_who_join_half_way_hold_nobody_up() -> None:
    assert simulate(alike(10, 100, 200, leave=2, replaced=True)).ratio <= 1.6


@pytest.mark.slow
def test_what_a_crowd_takes_above_the_bound_are_few_chunk_times_per_doubling() -> None:
    swarm = alike(100, 100, 200, n_chunks=64)
    assert (simulate(swarm).ratio - 1) * swarm.n_chunks <= 6 * math.log2(100)
