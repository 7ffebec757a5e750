"""The scheduler's rules one by one: what limits requests in flight, the gate, rests after "busy", hedges."""

from __future__ import annotations

import random

import pytest

from fastcas.fetch.scheduler import (
    BUSY_S,
    CROWD,
    CROWD_IN_FLIGHT,
    NEXT_AGAIN_S,
    NEXT_BY_NAME_S,
    NEXT_SILENT_S,
    Ask,
    Scheduler,
)

CHUNK = 1 << 18
LATE_MIN_S = 0.5  # nothing is late before
LATE_S = 1.5  # while nobody's rate is known
STEP_S = 0.01


def make(n: int, *haves: int, **options: int) -> Scheduler:
    """Return a scheduler that wants n chunks and knows leechers 0, 1, … with these."""
    scheduler = Scheduler(n, CHUNK, wanted=(1 << n) - 1, rng=random.Random(1), **options)
    for key, have in enumerate(haves):
        meet(scheduler, key, have)
    return scheduler


def meet(scheduler: Scheduler, key: int, have: int) -> None:
    """A leecher says what it has."""
    scheduler.add_peer(key)
    scheduler.set_have(key, have, is_seed=False)


def meet_seed(scheduler: Scheduler, key: int) -> None:
    """A seed says that it has everything."""
    scheduler.add_peer(key)
    scheduler.set_have(key, scheduler.full, is_seed=True)


def with_seed(n: int, have: int) -> Scheduler:
    """Return a scheduler that knows a seed, peer 0, and a leecher, peer 1."""
    scheduler = make(n)
    meet_seed(scheduler, 0)
    meet(scheduler, 1, have)
    return scheduler


# --- requests in flight ---


@pytest.mark.parametrize(("n_leechers", "each"), [(1, 2), (CROWD - 1, 2), (CROWD, 1), (CROWD_IN_FLIGHT, 1)])
def test_crowd_is_asked_for_one_chunk_each_and_few_for_two(n_leechers: int, each: int) -> None:
    scheduler = make(400, *[(1 << 300) - 1] * n_leechers)
    scheduler.decide(0.0)
    assert {len(peer.in_flight) for peer in scheduler.peers.values()} == {each}


def test_crowd_goes_on_when_one_of_so_many_requests_is_answered() -> None:
    scheduler = make(400, *[(1 << 300) - 1] * 60)
    first = scheduler.decide(0.0)[0]
    assert scheduler.decide(0.1) == []
    assert first.index is not None
    scheduler.completed(first.peer, [first.index], 0.2, CHUNK, 0.0)
    assert len(scheduler.decide(0.2)) == 1


def test_depths_of_resting_peers_let_the_crowd_be_asked_for_no_more() -> None:
    scheduler = make(400, *[(1 << 300) - 1] * 60)
    for key, peer in scheduler.peers.items():
        peer.depth = 2
        if key >= 20:
            scheduler.busy(key, None, 0.0)
    assert len(scheduler.decide(0.0)) == 40  # 20 peers, two each: more than 32
    scheduler = make(400, *[(1 << 300) - 1] * 60)
    for key in range(20):
        scheduler.peers[key].depth = 4
        scheduler.busy(key, None, 0.0)
    assert len(scheduler.decide(0.0)) == CROWD_IN_FLIGHT


def test_no_rate_lets_a_crowd_be_asked_for_more_than_the_memory_holds() -> None:
    scheduler = make(400, *[(1 << 300) - 1] * 60, memory_max=50 * CHUNK)
    for peer in scheduler.peers.values():
        peer.depth = 2
    assert len(scheduler.decide(0.0)) == 50


# --- the gate (rule 9) ---


def test_busy_node_goes_on_to_ask_by_name() -> None:
    scheduler = make(100, 0b1)
    scheduler.is_busy = lambda: True
    assert scheduler.decide(0.0) == [Ask(0, 0)]
    meet_seed(scheduler, 1)
    meet(scheduler, 2, 0b10)
    assert scheduler.decide(0.1) == [Ask(2, 1)]


def test_busy_node_that_waits_for_nothing_asks_for_something_new() -> None:
    scheduler = make(100, 0b1)
    scheduler.is_busy = lambda: True
    scheduler.decide(0.0)
    meet_seed(scheduler, 1)
    assert scheduler.decide(0.1) == []
    scheduler.completed(0, [0], 0.2, CHUNK, 0.0)
    assert {ask.index for ask in scheduler.decide(0.2)} == {None}


# --- rests ---


def test_busy_is_no_failure_and_cuts_no_longer_rest() -> None:
    scheduler = make(100, 0b1)
    scheduler.busy(0, None, 0.0)
    assert scheduler.peers[0].n_failures == 0
    until = scheduler.rest(0, 1.0)
    scheduler.busy(0, None, 1.0)
    assert scheduler.peers[0].rest_until == until > 1.0 + BUSY_S


def test_seed_that_is_busy_for_next_rests_and_is_asked_again() -> None:
    scheduler = with_seed(100, 0b1)
    n = len([ask for ask in scheduler.decide(0.0) if ask.index is None])
    for _ in range(n):
        scheduler.busy(0, None, 0.0)
    assert scheduler.peers[0].n_next == 0
    assert scheduler.decide(BUSY_S / 2) == []
    assert [ask.index for ask in scheduler.decide(BUSY_S)] == [None] * n


def test_end_of_a_rest_is_waited_for_only_where_there_is_something_to_ask_for() -> None:
    scheduler = make(4, 0b0001, 0b0110)
    asks = scheduler.decide(0.0)
    assert len(asks) == 3
    scheduler.busy(0, 0, 0.0)
    assert scheduler.wake_at(0.0) == pytest.approx(BUSY_S)
    scheduler.done(0)  # it came from this machine
    assert scheduler.wake_at(0.0) == pytest.approx(NEXT_AGAIN_S)


# --- hedges ---


def waits_for(scheduler: Scheduler, now: float) -> float:
    """Return when the next hedge is made, seconds after `now`."""
    step = 0
    while not scheduler.decide(now + step * STEP_S):
        step += 1
        assert step < 1000, "no hedge"
    return step * STEP_S


def test_chunk_is_late_after_three_times_what_its_peers_rate_and_queue_explain() -> None:
    scheduler = make(2, 0b11)
    scheduler.decide(0.0)
    slow = scheduler.peers[0]
    slow.rate_Bps, slow.rtt_s = CHUNK / 0.4, 0.1
    meet(scheduler, 1, 0b11)
    assert waits_for(scheduler, 0.0) == pytest.approx(3 * (0.1 + 2 * 0.4), abs=STEP_S)


def test_nothing_is_late_before_half_a_second() -> None:
    scheduler = make(1, 0b1)
    scheduler.decide(0.0)
    scheduler.peers[0].rate_Bps = 1e9
    meet(scheduler, 1, 0b1)
    assert waits_for(scheduler, 0.0) == pytest.approx(LATE_MIN_S, abs=STEP_S)


def test_each_request_is_late_in_its_own_time() -> None:
    scheduler = make(2, 0b01)
    scheduler.decide(0.0)
    meet(scheduler, 1, 0b10)
    scheduler.decide(0.3)
    meet(scheduler, 2, 0b11)
    meet(scheduler, 3, 0b11)
    assert waits_for(scheduler, 0.3) == pytest.approx(LATE_S - 0.3, abs=STEP_S)
    assert waits_for(scheduler, LATE_S) == pytest.approx(0.3, abs=STEP_S)


def test_answered_request_makes_the_next_one_no_later() -> None:
    scheduler = make(2, 0b01)
    scheduler.decide(0.0)
    meet(scheduler, 1, 0b10)
    scheduler.decide(0.4)
    scheduler.lost(0, 0)
    scheduler.done(0)
    meet(scheduler, 2, 0b11)
    assert waits_for(scheduler, 0.45) == pytest.approx(LATE_S - 0.05, abs=STEP_S)


def test_what_is_here_already_is_not_late() -> None:
    scheduler = make(1, 0b1)
    scheduler.decide(0.0)
    scheduler.done(0)
    meet(scheduler, 1, 0b1)
    assert scheduler.decide(60.0) == []


def test_late_chunk_waits_for_memory() -> None:
    scheduler = make(5, 0b00011, 0b01100, memory_max=4 * CHUNK)
    assert len(scheduler.decide(0.0)) == 4
    meet(scheduler, 2, 0b01111)
    assert scheduler.decide(60.0) == []
    scheduler.lost(0, 0)
    scheduler.done(0)
    assert [ask.peer for ask in scheduler.decide(60.0)] == [2]


def test_peer_that_rests_gets_no_hedge_until_it_may_be_asked() -> None:
    scheduler = make(1, 0b1)
    scheduler.decide(0.0)
    meet(scheduler, 1, 0b1)
    scheduler.busy(1, None, LATE_S - STEP_S)
    assert waits_for(scheduler, LATE_S - STEP_S) == pytest.approx(BUSY_S, abs=STEP_S)


def seed_that_still_gives() -> Scheduler:
    """A leecher is asked for the only chunk at 0 s, a seed is met then; it has not said that there is nothing new."""
    scheduler = make(1, 0b1)
    assert scheduler.decide(0.0) == [Ask(0, 0)]
    meet_seed(scheduler, 1)
    return scheduler


def test_seed_that_still_gives_what_nobody_has_is_kept_from_hedges_for_a_second_longer() -> None:
    scheduler = seed_that_still_gives()
    assert waits_for(scheduler, 0.0) == pytest.approx(LATE_S + NEXT_BY_NAME_S, abs=STEP_S)
    scheduler = seed_that_still_gives()
    scheduler.nothing_new(1, 0.0)
    assert waits_for(scheduler, 0.0) == pytest.approx(LATE_S, abs=STEP_S)


def test_seed_whose_choice_is_waited_for_gets_no_hedge_before_it_counts_as_silent() -> None:
    scheduler = seed_that_still_gives()
    scheduler.nothing_new(1, 0.0)
    scheduler.peers[1].n_next = 1  # asked again
    assert waits_for(scheduler, 0.0) == pytest.approx(NEXT_SILENT_S, abs=STEP_S)


# --- who is a seed ---


def test_seed_that_lacks_a_chunk_is_not_asked_to_choose() -> None:
    scheduler = with_seed(100, 0b1)
    scheduler.decide(0.0)
    for _ in range(scheduler.peers[0].n_next):
        scheduler.lost(0, None)
    scheduler.missing(0, 7)
    asks = scheduler.decide(0.1)
    assert asks
    assert all(ask.index is not None for ask in asks)
