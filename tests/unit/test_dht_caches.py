"""What searches remember, against plain models; and a search misses nothing that was announced since the last one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.dht.caches import ProviderCache, RegionMap, SingleFlight
from fastcas.dht.contacts import Contact
from fastcas.dht.peerlist import Peer
from fastcas.dht.provided import keys_of
from fastcas.dht.server import FcServer
from tests.support.dht_sim import ideal_network
from tests.support.virtual_net import VirtualLoop, VirtualNet, run

FILE = bytes(range(32))
PEER = Peer(bytes(20), "10.0.0.1", 9000)
small = st.integers(0, 40)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "drop", "wait"]), small, small), max_size=40))
def test_region_map_is_a_dictionary_of_keys_that_forgets(steps: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    regions = RegionMap(clock, lambda: 5)
    model: dict[int, tuple[int, int, float, list[Contact]]] = {}
    for what, a, b in steps:
        first, last = min(a, b), max(a, b)
        if what == "put":
            nodes = [Contact(bytes(20), "10.0.0.1", 1 + len(model))]
            for gone in [k for k, (low, high, _, _) in model.items() if low <= last and high >= first]:
                del model[gone]
            model |= dict.fromkeys(range(first, last + 1), (first, last, clock.now + 600, nodes))
            regions.put(first, last, nodes)
        elif what == "drop":
            if a in model:
                for key in range(model[a][0], model[a][1] + 1):
                    del model[key]
            regions.drop(a)
        elif what == "wait":
            clock.now += 20.0 * b
        else:
            known = model.get(a)
            expected = None if known is None or known[2] <= clock.now else (known[1], known[3])
            assert regions.get(a) == expected


def test_region_counts_until_the_network_has_doubled_and_there_are_not_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_contacts = 10
    clock = Clock()
    regions = RegionMap(clock, lambda: n_contacts)
    regions.put(5, 9, [])
    n_contacts = 20
    assert regions.get(7) == (9, [])
    n_contacts = 21
    assert regions.get(7) is None
    monkeypatch.setattr("fastcas.dht.caches.CACHED_REGIONS_MAX", 10)
    for number in range(20):
        clock.now += 1.0
        regions.put(10 * number, 10 * number + 5, [])
    assert len(regions) == 10
    assert regions.get(95) is None
    assert regions.get(195) == (195, [])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["found", "missed", "wait", "forget"]), st.integers(0, 5)), max_size=30))
def test_provider_cache_remembers_hits_10_minutes_and_misses_30_s_to_5_minutes(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    cache = ProviderCache(clock, limit=4)
    order: list[int] = []
    until: dict[int, float] = {}
    misses: dict[int, float] = {}
    hits: dict[int, float] = {}
    for what, key in steps:
        if what == "wait":
            clock.now += 25.0 * (key + 1)
            continue
        if key in order:
            order.remove(key)
        if what == "forget":
            cache.forget(key)
            for facts in (until, misses, hits):
                facts.pop(key, None)
        else:
            order.append(key)
            cache.note(key, [PEER] if what == "found" else [])
            if what == "found":
                misses[key], hits[key], until[key] = 0, clock.now, clock.now + 600.0
            else:
                misses[key] = misses.get(key, 0) + 1
                hits.pop(key, None)
                until[key] = clock.now + min(30.0 * 2 ** (misses[key] - 1), 300.0)
            if len(order) > 4:
                gone = order.pop(0)
                for facts in (until, misses, hits):
                    facts.pop(gone, None)
        for other in range(6):
            known = cache.get(other)
            assert (known is not None) == (until.get(other, 0.0) > clock.now)
            if known is not None:
                assert known.peers == ((PEER,) if other in hits else ())
                assert other not in hits or known.is_fresh == (clock.now - hits[other] < 60.0)
    assert len(cache) <= 4


def in_virtual_time(body: Callable[[], object]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(body())  # type: ignore[arg-type]


def test_equal_searches_at_the_same_time_are_one_and_latecomers_hear_everything() -> None:
    async def body() -> None:
        flights: SingleFlight[int] = SingleFlight()
        n_searches = 0

        async def search(tell: Callable[[int], None]) -> None:
            nonlocal n_searches
            n_searches += 1
            for number in range(3):
                tell(number)
                await asyncio.sleep(1.0)

        heard: list[list[int]] = [[], [], []]

        async def late(seconds: float, to: list[int]) -> bool:
            await asyncio.sleep(seconds)
            return await flights.share("key", search, to.append, 10.0)

        ended = await asyncio.gather(late(0.0, heard[0]), late(1.5, heard[1]), late(2.5, heard[2]))
        assert ended == [True, True, True]
        assert heard == [[0, 1, 2]] * 3
        assert n_searches == 1
        await flights.share("key", search, heard[0].append, 10.0)
        assert n_searches == 2
        assert len(flights) == 0

    in_virtual_time(body)


def test_who_gives_up_does_not_end_it_for_others_and_the_last_one_does() -> None:
    async def body() -> None:
        flights: SingleFlight[int] = SingleFlight()
        ends: list[str] = []

        async def search(tell: Callable[[int], None]) -> None:
            try:
                await asyncio.sleep(5.0)
                ends.append("done")
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        impatient = flights.share(1, search, lambda _: None, 1.0)
        patient = flights.share(1, search, lambda _: None, 10.0)
        assert await asyncio.gather(impatient, patient) == [False, True]
        assert await flights.share(2, search, lambda _: None, 1.0) is False
        cancelled = asyncio.ensure_future(flights.share(3, search, lambda _: None, 10.0))
        await asyncio.sleep(1.0)
        cancelled.cancel()
        await asyncio.sleep(1.0)
        assert ends == ["done", "cancelled", "cancelled"]
        assert len(flights) == 0

    in_virtual_time(body)


def test_failed_search_fails_for_all_who_wait() -> None:
    async def body() -> None:
        flights: SingleFlight[int] = SingleFlight()

        async def search(tell: Callable[[int], None]) -> None:
            await asyncio.sleep(1.0)
            raise ValueError("broken")

        waiting = [flights.share(1, search, lambda _: None, 10.0) for _ in range(2)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError]

    in_virtual_time(body)


# --- searches ---


async def peers_of_file(node: FcServer, want: int = 32) -> tuple[set[Peer], int]:
    before = node.protocol.counters["requests"]
    found: set[Peer] = set()
    await node.finder.find_file(FILE, want, 10.0, found.update)
    return found, node.protocol.counters["requests"] - before


async def peers_of_chunks(node: FcServer, hashes: bytes) -> tuple[int, int]:
    before = node.protocol.counters["requests"]
    n = await node.finder.find_chunks(hashes, 4, 30.0, lambda news: None)
    return n, node.protocol.counters["requests"] - before


@pytest.mark.slow
def test_repeated_searches_cost_little_and_see_what_is_new_and_what_has_left() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, 200)
        seeker, publishers = nodes[0], nodes[1:3]
        found, cost = await peers_of_file(seeker)
        assert (len(found), cost >= 20) == (0, True)
        found, cost = await peers_of_file(seeker)
        assert (len(found), cost) == (0, 3)
        for n_publishers in (1, 2):  # a key that was missed, and one that was found
            await publishers[n_publishers - 1].announcer.announce_files([(FILE, 1000)])
            found, cost = await peers_of_file(seeker)
            assert (len(found), cost) == (n_publishers, 3)
        assert (await peers_of_file(seeker, 2))[1] == 0  # as many as are wanted are known
        await publishers[0].close()
        assert {peer.node_id for peer in (await peers_of_file(seeker))[0]} == {publishers[1].identity.node_id}
        await asyncio.sleep(601)
        assert (await peers_of_file(seeker))[1] >= 20

    run(body)


@pytest.mark.slow
def test_chunks_that_were_missed_are_found_when_they_were_announced_since() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, 200)
        seeker, publisher = nodes[0], nodes[1]
        hashes = random.Random(1).randbytes(32 * 300)
        n, walking = await peers_of_chunks(seeker, hashes)
        n_again, probing = await peers_of_chunks(seeker, hashes)
        assert (n, n_again) == (0, 0)
        assert probing < 0.4 * walking
        await publisher.announcer.announce_chunks(keys_of(hashes))
        assert (await peers_of_chunks(seeker, hashes))[0] == 300
        assert await peers_of_chunks(seeker, hashes) == (300, 0)
        await asyncio.sleep(61)  # fewer peers than wanted: asked again, in the same regions
        n, cost = await peers_of_chunks(seeker, hashes)
        assert n == 300
        assert 0 < cost < walking

    run(body)


@pytest.mark.slow
def test_same_search_by_ten_at_once_costs_as_much_as_one() -> None:
    async def body(net: VirtualNet) -> None:
        nodes = await ideal_network(net, 200)
        await nodes[1].announcer.announce_files([(FILE, 1000)])
        _, alone = await peers_of_file(nodes[5])
        before = nodes[0].protocol.counters["requests"]
        results = await asyncio.gather(*(peers_of_file(nodes[0]) for _ in range(10)))
        assert all(len(found) == 1 for found, _ in results)
        assert nodes[0].protocol.counters["requests"] - before <= 1.5 * alone

    run(body)
