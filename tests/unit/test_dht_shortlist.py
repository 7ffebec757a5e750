"""The shortlist of a lookup against a plain model, and its rules about liars, subnets and who is asked first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.dht.contacts import Contact
from fastcas.dht.shortlist import Entry, Shortlist, State

ids = st.integers(0, (1 << 160) - 1)


def contact(number: int, at: int) -> Contact:
    return Contact(number.to_bytes(20), f"10.{at >> 16 & 255}.{at >> 8 & 255}.{at & 255}", 8468)


@settings(max_examples=100, deadline=None)
@given(st.lists(ids, min_size=1, max_size=60, unique=True), ids, st.integers(1, 20), st.integers(0, 159), st.data())
def test_what_is_found_and_asked_is_what_a_plain_model_says(
    numbers: list[int], target: int, k: int, radius_bits: int, data: st.DataObject
) -> None:
    radius = (1 << radius_bits) - 1
    shortlist = Shortlist(target, k, radius)
    for at, number in enumerate(numbers):
        shortlist.add(contact(number, at + 1))
    living = data.draw(st.sets(st.sampled_from(numbers)))
    asked = []
    while (entry := shortlist.next_to_ask()) is not None:
        assert not shortlist.is_complete()
        asked.append(entry.contact.long_id)
        entry.settle(State.LIVE if entry.contact.long_id in living else State.DEAD)
    assert shortlist.is_complete()
    nearest = sorted(living, key=lambda number: number ^ target)
    expected = nearest[: max(k, sum(1 for number in nearest if number ^ target <= radius))]
    assert [entry.contact.long_id for entry in shortlist.live()] == expected
    assert asked == sorted(asked, key=lambda number: number ^ target)
    last = expected[-1] ^ target if len(expected) >= k else 1 << 160
    assert asked == sorted((n for n in numbers if n ^ target <= max(last, radius)), key=lambda n: n ^ target)


def named(shortlist: Shortlist, giver: Entry, numbers: range) -> None:
    for number in numbers:
        shortlist.add(contact(number, number), giver)


def test_what_only_liars_named_is_neither_asked_nor_waited_for() -> None:
    shortlist = Shortlist(0, 3)
    for number in (10_000, 10_001, 10_002):
        shortlist.add(contact(number, number))
    liar = shortlist.next_to_ask()
    assert liar is not None
    liar.settle(State.LIVE)
    named(shortlist, liar, range(1, 41))
    honest = None
    asked = 0
    while (entry := shortlist.next_to_ask()) is not None:
        if entry.contact.long_id > 100:
            honest = entry
            entry.settle(State.LIVE)
        else:
            asked += 1
            entry.settle(State.DEAD)
    assert asked == 6
    assert shortlist.is_complete()
    assert len(shortlist.live()) == 3
    assert honest is not None
    named(shortlist, honest, range(40, 41))  # somebody who is believed names one of them, too
    entry = shortlist.next_to_ask()
    assert entry is not None
    assert entry.contact.long_id == 40


def test_who_names_live_ones_may_name_dead_ones() -> None:
    shortlist = Shortlist(0, 3)
    shortlist.add(contact(10_000, 10_000))
    giver = shortlist.next_to_ask()
    assert giver is not None
    giver.settle(State.LIVE)
    named(shortlist, giver, range(1, 41))
    for number in range(1, 41):
        entry = shortlist.next_to_ask()
        if entry is None:
            break
        entry.settle(State.LIVE if number % 4 == 0 else State.DEAD)
    assert len(shortlist.live()) == 3


def test_two_per_subnet_and_one_per_address() -> None:
    shortlist = Shortlist(0, 20)
    for number in range(1, 10):
        shortlist.add(Contact(number.to_bytes(20), f"8.8.8.{number}", 8468))
    shortlist.add(Contact((100).to_bytes(20), "8.8.4.4", 8468))
    shortlist.add(Contact((99).to_bytes(20), "8.8.4.4", 8468))
    asked = []
    while (entry := shortlist.next_to_ask()) is not None:
        asked.append(entry.contact.long_id)
        entry.settle(State.LIVE)
    assert asked == [1, 2, 100]


def test_starts_are_asked_first_and_waited_for() -> None:
    shortlist = Shortlist(0, 2)
    for number in (1, 2, 500):
        shortlist.add(contact(number, number))
    shortlist.begin_with([contact(500, 500), contact(7, 7)])
    far = shortlist.next_to_ask()
    assert far is not None
    assert far.contact.long_id == 500
    far.state = State.ASKED
    for _ in range(2):
        entry = shortlist.next_to_ask()
        assert entry is not None
        entry.settle(State.LIVE)
    assert shortlist.next_to_ask() is None
    assert not shortlist.is_complete()
    far.state = State.SLOW
    assert shortlist.is_complete()


def test_too_many_near_the_target_are_suspicious_until_they_are_dead_and_others_never() -> None:
    shortlist = Shortlist(0, 20, crowds=[(3, 100)])
    for number in (1, 2, 500):
        shortlist.add(contact(number, number))
    first = shortlist.next_to_ask()
    assert first is not None
    assert not shortlist.is_crowded()
    assert not shortlist.is_suspicious(first)
    shortlist.add(contact(3, 3))
    assert shortlist.is_crowded()
    assert shortlist.is_suspicious(first)
    first.settle(State.DEAD)
    assert not shortlist.is_crowded()
    shortlist.add(contact(4, 4))
    for _ in range(3):
        near = shortlist.next_to_ask()
        assert near is not None
        assert shortlist.is_suspicious(near)
        near.settle(State.LIVE)
    far = shortlist.next_to_ask()
    assert far is not None
    assert far.contact.long_id == 500
    assert not shortlist.is_suspicious(far)
