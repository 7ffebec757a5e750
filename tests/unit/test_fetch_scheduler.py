"""The scheduler: properties of its decisions, and a small simulation in virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.fetch.peerstate import FIRST_WINDOW_CHUNKS, FIRST_WINDOW_S, PeerState
from fastcas.fetch.scheduler import BUSY_S, CROWD_IN_FLIGHT, Ask, Scheduler, bits, from_bitfield, lowest_bits

CHUNK = 1 << 18


def make(n: int = 32, seed: int = 1, **options: int) -> Scheduler:
    """Return a scheduler that wants n chunks."""
    return Scheduler(n, CHUNK, wanted=(1 << n) - 1, rng=random.Random(seed), **options)


def with_peers(scheduler: Scheduler, *haves: int) -> Scheduler:
    """Add peers 0, 1, … that have these chunk sets; those with everything are seeds."""
    for key, have in enumerate(haves):
        scheduler.add_peer(key)
        scheduler.set_have(key, have, is_seed=have == scheduler.full)
    return scheduler


# --- chunk sets ---


@given(st.sets(st.integers(0, 500)))
def test_bits_are_the_members(members: set[int]) -> None:
    number = sum(1 << i for i in members)
    assert list(bits(number)) == sorted(members)
    assert lowest_bits(number, 3) == sorted(members)[:3]


@given(st.integers(1, 300), st.data())
def test_bitfield_bit_i_is_the_high_bit_first(n: int, data: st.DataObject) -> None:
    members = data.draw(st.sets(st.integers(0, n - 1)))
    field_bytes = bytearray(-(-n // 8))
    for i in members:
        field_bytes[i // 8] |= 0x80 >> i % 8
    assert set(bits(from_bitfield(bytes(field_bytes), n))) == members
    assert from_bitfield(b"\xff" * len(field_bytes), n) == (1 << n) - 1


# --- properties ---


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30), st.data())
def test_any_history_keeps_the_books_and_ends_with_everything(seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    rng = random.Random(seed)
    scheduler = make(n, seed)
    n_peers = data.draw(st.integers(1, 6))
    for key in range(n_peers):
        scheduler.add_peer(key)
        have = scheduler.full if key == 0 else rng.getrandbits(n)
        scheduler.set_have(key, have, is_seed=have == scheduler.full)
    now, done = 0.0, 0
    out: list[tuple[int, int | None]] = []
    for _ in range(4000):
        if not scheduler.wanted:
            break
        for ask in scheduler.decide(now):
            peer = scheduler.peers[ask.peer]
            assert peer.banned is None
            assert peer.rest_until <= now
            if ask.index is not None:
                assert peer.have >> ask.index & 1
                assert scheduler.wanted >> ask.index & 1
                assert scheduler.allowed >> ask.index & 1
            out.append((ask.peer, ask.index))  # type: ignore[arg-type]
        assert scheduler.n_in_flight == sum(len(peer.in_flight) for peer in scheduler.peers.values())
        assert scheduler.n_in_flight <= scheduler.max_in_flight
        assert scheduler.usable_peers() == [p for p in scheduler.peers.values() if p.have and p.banned is None]
        now += rng.random() * 0.2
        if not out:
            continue
        key, index = out.pop(rng.randrange(len(out)))
        if scheduler.peers[key].banned is not None:
            continue
        match rng.randrange(6):
            case 0:
                scheduler.busy(key, index, now)
            case 1:
                scheduler.failed(key, index, now)
            case 2 if key:
                scheduler.ban(key, "test")
                out = [entry for entry in out if entry[0] != key]
            case 3 if index is not None and key:
                scheduler.missing(key, index)
            case 4 if index is None:
                scheduler.nothing_new(key, now)
            case _:
                if index is None:
                    left = list(bits(scheduler.free)) or [0]
                    index = rng.choice(left)
                    scheduler.asked(key, index, now)
                together = [index]  # with others of the same peer, in any order
                while (others := [i for k, i in out if k == key and i is not None]) and rng.random() < 0.7:
                    together.append(rng.choice(others))
                    out.remove((key, together[-1]))
                scheduler.completed(key, together, now, len(together) * CHUNK, 0.001)
                done |= sum(1 << i for i in set(together))
    assert not scheduler.wanted
    assert done == scheduler.full


@given(st.integers(0, 1000))
def test_nothing_is_asked_twice_at_the_same_time(seed: int) -> None:
    scheduler = with_peers(make(64, seed), (1 << 64) - 1, (1 << 40) - 1, ((1 << 40) - 1) << 24)
    asks = scheduler.decide(0.0) + scheduler.decide(0.01)
    indices = [ask.index for ask in asks if ask.index is not None]
    assert len(indices) == len(set(indices))


@given(st.integers(0, 1000))
def test_rarest_chunk_comes_first(seed: int) -> None:
    # chunk 0 is with peer 0 only, chunk 1 with two, the others with all three
    rest = 0b11111100
    scheduler = with_peers(make(9, seed), rest | 0b11, rest | 0b10, rest)
    first = next(ask.index for ask in scheduler.decide(0.0) if ask.peer == 0)
    assert first == 0


def test_ties_are_broken_differently_by_different_seeds() -> None:
    firsts = set()
    for seed in range(30):
        scheduler = with_peers(make(65, seed), (1 << 64) - 1, (1 << 64) - 1)
        firsts.add(scheduler.decide(0.0)[0].index)
    assert len(firsts) > 10


def test_seeds_alone_are_asked_for_runs() -> None:
    scheduler = with_peers(make(64), (1 << 64) - 1)
    asked = [ask.index for ask in scheduler.decide(0.0)]
    assert all(a is not None and b is not None and (b == a + 1 or b == 0) for a, b in itertools.pairwise(asked))


def test_work_is_spread_over_peers() -> None:
    scheduler = with_peers(make(64), *[(1 << 64) - 1] * 4)
    assert {ask.peer for ask in scheduler.decide(0.0)} == {0, 1, 2, 3}


def test_window_grows_with_rate_and_round_trip() -> None:
    scheduler = with_peers(make(2000), (1 << 2000) - 1)
    now = 0.0
    asks = scheduler.decide(now)
    assert len(asks) == 4
    most = 0
    for _ in range(60):  # 1 Gbit/s at 40 ms needs 2 * 125e6 * 0.04 / CHUNK = 39 chunks in flight
        now += 0.04
        for ask in asks:
            assert ask.index is not None
            scheduler.completed(ask.peer, [ask.index], now, CHUNK, 0.04)
        asks = scheduler.decide(now)
        most = max(most, len(asks))
    assert most >= 39


def test_rate_of_a_new_peer_is_known_early_where_enough_came() -> None:
    quick, slow = PeerState("quick"), PeerState("slow")
    for i in range(1, FIRST_WINDOW_CHUNKS + 1):
        assert quick.depth == slow.depth == 0
        quick.measure(CHUNK, i * FIRST_WINDOW_S / FIRST_WINDOW_CHUNKS, 0.001, CHUNK)
        slow.measure(CHUNK // 2, i * 0.1 / FIRST_WINDOW_CHUNKS - 1e-6, 0.001, CHUNK)
    assert quick.rate_Bps == FIRST_WINDOW_CHUNKS * CHUNK / FIRST_WINDOW_S
    assert slow.rate_Bps == 0.0
    slow.measure(CHUNK // 2, 0.1, 0.001, CHUNK)
    assert slow.rate_Bps == 4.5 * CHUNK / 0.1


def test_windows_of_a_rate_become_longer() -> None:
    peer, now, ends = PeerState("x"), 0.0, []
    while now < 0.5:
        now += 1 / 1024
        before = peer.window_started
        peer.measure(4 * CHUNK, now, 0.0, CHUNK)
        if peer.window_started != before:
            ends.append((now - before) * 1024)
    assert ends[:5] == [math.ceil(s * 1024) for s in (0.0125, 0.025, 0.05, 0.1, 0.1)]


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(0, 220), st.integers(1, 30))
def test_run_goes_on_where_it_ended_and_begins_anew_at_its_end(chunks: set[int], cursor: int, n: int) -> None:
    peer = PeerState("x", cursor=cursor)
    ahead = sorted(i for i in chunks if i >= cursor) or sorted(chunks)
    assert peer.follow(sum(1 << i for i in chunks), n) == ahead[:n]
    assert peer.cursor == ahead[:n][-1] + 1


def test_lone_peer_is_asked_for_its_whole_window_and_no_more() -> None:
    scheduler = with_peers(make(200), (1 << 200) - 1)
    scheduler.peers[0].depth, scheduler.peers[0].cursor = 50, 0
    asks = [ask.index for ask in scheduler.decide(0.0)]
    assert asks == list(range(50))
    scheduler.completed(0, [0, 2, 4], 0.01, 3 * CHUNK, 0.0)
    assert [ask.index for ask in scheduler.decide(0.01)] == [50, 51, 52]


def test_window_stays_below_the_memory_cap() -> None:
    scheduler = make(2000, memory_max=10 * CHUNK)
    with_peers(scheduler, *[(1 << 2000) - 1] * 5)
    assert len(scheduler.decide(0.0)) == 10


def test_busy_peer_rests_and_another_is_asked() -> None:
    scheduler = with_peers(make(1), 1, 1)
    (ask,) = scheduler.decide(0.0)
    scheduler.busy(ask.peer, ask.index, 0.0)
    (second,) = scheduler.decide(0.0)
    assert second.peer != ask.peer
    scheduler.busy(second.peer, second.index, 0.0)
    assert scheduler.decide(BUSY_S / 2) == []
    assert scheduler.wake_at(0.0) == pytest.approx(BUSY_S)
    assert scheduler.decide(BUSY_S) != []


def test_failures_rest_longer_each_time_and_success_forgives() -> None:
    scheduler = with_peers(make(50), (1 << 50) - 1, (1 << 50) - 1)
    rests = []
    now = 0.0
    for _ in range(4):
        rests.append(scheduler.rest(0, now) - now)
        now = scheduler.peers[0].rest_until + 0.001
    assert rests[1] > rests[0] * 0.9
    assert rests[3] >= 30.0
    scheduler.completed(0, [0], now, CHUNK, 0.0)
    assert scheduler.peers[0].n_failures == 0


def test_only_peer_is_never_parked_for_long() -> None:
    scheduler = with_peers(make(5), 31)
    now = 0.0
    for _ in range(10):
        assert scheduler.rest(0, now) - now <= 2.0
        now = scheduler.peers[0].rest_until + 0.001


def test_banned_peer_is_never_asked_and_its_chunks_are_free() -> None:
    scheduler = with_peers(make(4), 15)
    asks = scheduler.decide(0.0)
    scheduler.ban(0, "lied")
    assert scheduler.free == 15
    assert scheduler.decide(1.0) == []
    scheduler.add_peer(1)
    scheduler.set_have(1, 15, is_seed=True)
    assert {ask.peer for ask in scheduler.decide(1.0)} == {1}
    assert len(asks) == 4


def test_late_chunk_is_asked_elsewhere_only_when_nothing_else_is_left() -> None:
    scheduler = with_peers(make(2), 3, 3)
    asks = scheduler.decide(0.0)
    slow, quick = asks[0], asks[1]
    if slow.peer == quick.peer:
        scheduler.lost(quick.peer, quick.index)
        quick = Ask(1 - int(str(slow.peer)), quick.index)
    assert quick.index is not None
    scheduler.completed(quick.peer, [quick.index], 0.1, CHUNK, 0.001)
    assert scheduler.decide(0.2) == []
    hedges = scheduler.decide(60.0)
    assert [(ask.peer, ask.index) for ask in hedges] == [(1 - int(str(slow.peer)), slow.index)]
    assert scheduler.decide(61.0) == []


def test_window_of_trust_limits_what_is_asked() -> None:
    scheduler = with_peers(make(100), (1 << 100) - 1)
    scheduler.allowed = ((1 << 10) - 1) << 90
    assert all(ask.index is not None and ask.index >= 90 for ask in scheduler.decide(0.0))


def test_unheld_chunks_are_those_that_no_usable_peer_has() -> None:
    scheduler = with_peers(make(4), 0b0011, 0b0100)
    assert scheduler.unheld() == 0b1000
    scheduler.ban(1, "lied")
    assert scheduler.unheld() == 0b1100


# --- NEXT ---


def test_seed_is_asked_to_choose_while_other_leechers_exist() -> None:
    scheduler = with_peers(make(100), (1 << 100) - 1, 0b1)
    asks = scheduler.decide(0.0)
    assert any(ask.peer == 0 and ask.index is None for ask in asks)
    assert not any(ask.peer == 0 and ask.index is not None for ask in asks)


def test_seed_without_next_is_an_ordinary_peer() -> None:
    scheduler = with_peers(make(100), (1 << 100) - 1, 0b1)
    scheduler.decide(0.0)
    scheduler.no_next(0)
    assert any(ask.peer == 0 and ask.index is not None for ask in scheduler.decide(0.0))


def test_after_nothing_new_the_seed_gives_what_leechers_have_too_then_the_rest() -> None:
    scheduler = with_peers(make(10), (1 << 10) - 1, 0b11)
    for _ in range(4):
        scheduler.nothing_new(0, 0.0)
    scheduler.rest(1, 0.0)
    named = [ask.index for ask in scheduler.decide(0.1) if ask.peer == 0 and ask.index is not None]
    assert set(named) <= {0, 1}
    for index in named:
        assert index is not None
        scheduler.completed(0, [index], 0.2, CHUNK, 0.0)
    later = [ask.index for ask in scheduler.decide(2.5) if ask.peer == 0 and ask.index is not None]
    assert later


def test_seed_that_chooses_what_is_here_already_is_asked_by_name() -> None:
    scheduler = with_peers(make(100), (1 << 100) - 1, 0b1)
    for index in range(5):
        scheduler.completed(1, [index], 0.0, CHUNK, 0.0)
        scheduler.decide(0.0)
        scheduler.asked(0, index, 0.0)
        scheduler.completed(0, [index], 0.0, CHUNK, 0.0)
    assert all(ask.index is not None for ask in scheduler.decide(0.1))
    assert scheduler.peers[0].in_flight


def test_leecher_that_became_complete_is_not_asked_to_choose() -> None:
    scheduler = with_peers(make(100), 0b1)
    scheduler.set_have(0, scheduler.full, is_seed=True)
    assert all(ask.index is not None for ask in scheduler.decide(0.0))


def test_busy_node_asks_for_nothing_new_while_it_waits_for_something() -> None:
    scheduler = with_peers(make(100), (1 << 100) - 1, 0b1)
    busy = [True]
    scheduler.is_busy = lambda: busy[0]
    assert [ask for ask in scheduler.decide(0.0) if ask.index is None]  # nothing was in flight
    scheduler = with_peers(make(100), 0b1)
    scheduler.is_busy = lambda: busy[0]
    assert scheduler.decide(0.0) == [Ask(0, 0)]
    scheduler.add_peer(1)
    scheduler.set_have(1, scheduler.full, is_seed=True)
    assert scheduler.decide(0.1) == []
    assert scheduler.wake_at(0.1) == pytest.approx(0.1 + BUSY_S)
    busy[0] = False
    assert {ask.index for ask in scheduler.decide(0.2)} == {None}


def test_crowd_is_asked_for_so_many_chunks_at_once_unless_rates_ask_for_more() -> None:
    half = (1 << 200) - 1
    scheduler = with_peers(make(400), *[half] * 60)
    assert len(scheduler.decide(0.0)) == CROWD_IN_FLIGHT
    for peer in scheduler.peers.values():
        peer.depth = 2
    scheduler.decide(0.1)
    assert scheduler.n_in_flight == 120


# --- a small swarm in virtual time ---


@dataclass
class Node:
    """A leecher of the simulation; everybody's uplink sends one chunk at a time."""

    scheduler: Scheduler
    have: int = 0
    up_Bps: float = 12.5e6
    busy_until: float = 0.0
    finished_at: float | None = None
    sent: int = 0
    given: set[int] = field(default_factory=set)


def simulate(n_leechers: int, n_chunks: int, seed: int) -> tuple[float, int]:
    """Return (last leecher's time ÷ bound, seed's bytes ÷ file) with equal links, 1 ms away from each other."""
    rng = random.Random(seed)
    full = (1 << n_chunks) - 1
    nodes: list[Node] = [Node(make(n_chunks, seed + i)) for i in range(n_leechers + 1)]
    nodes[0].have = full
    for me, node in enumerate(nodes[1:], 1):
        for other in range(n_leechers + 1):
            if other != me:
                node.scheduler.add_peer(other)
    events: list[tuple[float, int, str, tuple[int, Hashable, int | None]]] = []
    count = 0

    def push(at: float, kind: str, who: int, peer: Hashable = None, index: int | None = None) -> None:
        nonlocal count
        count += 1
        heapq.heappush(events, (at, count, kind, (who, peer, index)))

    for me in range(1, n_leechers + 1):
        push(rng.random() * 0.05, "poll", me)
    now = 0.0
    while events:
        now, _, kind, (me, peer, index) = heapq.heappop(events)
        node = nodes[me]
        if node.finished_at is not None:
            continue
        if kind == "poll":
            for other, state in enumerate(nodes):
                if other != me:
                    node.scheduler.set_have(other, state.have, is_seed=state.have == full)
            push(now + 0.1, "poll", me)
        elif kind == "arrive":
            assert isinstance(peer, int)
            if index is None:
                node.scheduler.nothing_new(peer, now)
            else:
                if index not in node.scheduler.peers[peer].in_flight:
                    node.scheduler.asked(peer, index, now)
                node.scheduler.completed(peer, [index], now, CHUNK, 0.001)
                node.have |= 1 << index
                if node.have == full:
                    node.finished_at = now
                    continue
        for ask in node.scheduler.decide(now):
            assert isinstance(ask.peer, int)
            server = nodes[ask.peer]
            chosen = ask.index
            if chosen is None:
                left = [i for i in range(n_chunks) if i not in server.given]
                if not left:
                    push(now + 0.001, "arrive", me, ask.peer, None)
                    continue
                chosen = rng.choice(left)
                server.given.add(chosen)
            start = max(now + 0.0005, server.busy_until)
            server.busy_until = start + CHUNK / server.up_Bps
            server.sent += 1
            push(server.busy_until + 0.0005, "arrive", me, ask.peer, chosen)
    size = n_chunks * CHUNK
    bound = max(size / 12.5e6, n_leechers * size / ((n_leechers + 1) * 12.5e6))
    last = max(node.finished_at or float("inf") for node in nodes[1:])
    return last / bound, nodes[0].sent * CHUNK // size


@pytest.mark.parametrize("n_leechers", [1, 4, 8])
def test_swarm_is_near_the_bound(n_leechers: int) -> None:
    ratio, seed_copies = simulate(n_leechers, 128, seed=3)
    assert ratio < 1.2
    assert seed_copies <= 2


def late_scheduler(n_peers: int) -> tuple[Scheduler, float]:
    """Return a scheduler whose first peer holds the only chunk's request, and a time at which that is late."""
    scheduler = Scheduler(1, CHUNK, wanted=1, rng=random.Random(1))
    for at in range(n_peers):
        scheduler.add_peer(at)
        scheduler.set_have(at, 1, is_seed=False)
    assert len(scheduler.decide(0.0)) == 1
    return scheduler, 2.0


def test_one_more_request_for_a_late_chunk_each_time_all_before_are_late() -> None:
    scheduler, now = late_scheduler(4)
    asked = []
    for _ in range(6):
        asked += [ask.peer for ask in scheduler.decide(now)]
        assert scheduler.decide(now) == []
        now += 2.0
    assert len(set(asked)) == len(asked) == 3


def test_late_chunk_is_asked_of_who_has_delivered() -> None:
    for seed in range(20):
        scheduler = Scheduler(2, CHUNK, wanted=3, rng=random.Random(seed))
        scheduler.add_peer("holds")
        scheduler.set_have("holds", 2, is_seed=False)
        scheduler.decide(0.0)
        scheduler.add_peer("delivers")
        scheduler.set_have("delivers", 1, is_seed=False)
        scheduler.decide(0.0)
        scheduler.completed("delivers", [0], 1.0, CHUNK, 0.001)
        for key in ("unknown", "delivers", "unknown too"):
            scheduler.add_peer(key)
            scheduler.set_have(key, 3, is_seed=False)
        assert scheduler.decide(10.0)[0] == Ask("delivers", 1)


def test_stand_in_is_asked_for_instead_of_a_late_chunk_and_the_chunk_itself_when_that_is_late_too() -> None:
    scheduler = Scheduler(2, CHUNK, wanted=1, rng=random.Random(1))
    offered = [1]
    scheduler.stand_in = lambda index, have: offered.pop() if index == 0 and offered else None
    for key in "abc":
        scheduler.add_peer(key)
        scheduler.set_have(key, 3, is_seed=False)
    (first,) = scheduler.decide(0.0)
    (instead,) = scheduler.decide(2.0)
    assert (first.index, instead.index) == (0, 1)
    assert scheduler.decide(3.0) == []
    assert [ask.index for ask in scheduler.decide(4.1)] == [0]


def test_seed_that_never_chooses_does_not_keep_the_others_from_being_asked() -> None:
    scheduler = Scheduler(50, CHUNK, wanted=(1 << 50) - 1, rng=random.Random(1))
    scheduler.add_peer("leecher")
    scheduler.set_have("leecher", 1, is_seed=False)
    for key in range(10):
        scheduler.add_peer(key)
        scheduler.set_have(key, (1 << 50) - 1, is_seed=True)
    n_asked = len([ask for ask in scheduler.decide(0.0) if ask.index is None])
    assert n_asked
    asks = scheduler.decide(2.5)
    assert {ask.peer for ask in asks if ask.index is not None} - {"leecher"}


def test_who_rests_long_rests_less_when_nobody_else_is_left() -> None:
    scheduler = Scheduler(9, CHUNK, wanted=511, rng=random.Random(1))
    for key in "ab":
        scheduler.add_peer(key)
        scheduler.set_have(key, 511, is_seed=False)
    now = 0.0
    for _ in range(3):
        now = max(now + 1.0, scheduler.rest("a", now) + 0.01)
    until = scheduler.rest("a", now)
    assert until > now + 20
    scheduler.ban("b", "lies")
    assert scheduler.decide(now) == []
    assert scheduler.decide(now + 2.1)


def test_who_came_back_is_asked_at_once() -> None:
    scheduler = Scheduler(9, CHUNK, wanted=511, rng=random.Random(1))
    scheduler.add_peer("a")
    scheduler.set_have("a", 511, is_seed=False)
    scheduler.rest("a", 0.0)
    assert scheduler.decide(0.1) == []
    scheduler.came_back("a")
    assert scheduler.decide(0.1)
