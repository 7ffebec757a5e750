"""The routing table against brute force, and the rules of who stays."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.dht.contacts import Contact, pack_contacts, parse_contacts
from fastcas.dht.network_size import crowds, expected_distance
from fastcas.dht.regions import allocate, within_reach
from fastcas.dht.table import FcTable

OWN = 1 << 159
ids = st.integers(0, (1 << 160) - 1)


def contact(number: int, at: int = 0) -> Contact:
    return Contact(number.to_bytes(20), f"10.{at >> 16 & 255}.{at >> 8 & 255}.{at & 255}", 8468)


def table_of(numbers: list[int], *, own: int = OWN) -> FcTable:
    table = FcTable(None, contact(own))
    for at, number in enumerate(numbers):
        table.add_verified(contact(number, at + 1), float(at))
    return table


@settings(max_examples=60, deadline=None)
@given(st.lists(ids, min_size=1, max_size=300, unique=True), ids, ids, st.integers(1, 30))
def test_nearest_is_brute_force_over_what_the_table_holds(numbers: list[int], own: int, target: int, k: int) -> None:
    table = table_of(numbers, own=own)
    held = [c.long_id for c in table]
    got = [c.long_id for c in table.nearest(target, k)]
    assert got == sorted(held, key=lambda number: number ^ target)[:k]
    assert own not in held


@settings(max_examples=60, deadline=None)
@given(st.lists(ids, max_size=300, unique=True), ids)
def test_every_id_is_in_exactly_one_bucket_and_can_be_removed(numbers: list[int], own: int) -> None:
    table = table_of(numbers, own=own)
    assert table.buckets[0].range[0] == 0
    assert table.buckets[-1].range[1] == (1 << 160) - 1
    for left, right in zip(table.buckets, table.buckets[1:], strict=False):
        assert left.range[1] + 1 == right.range[0]
    for bucket in table.buckets:
        assert len(bucket.nodes) <= table.ksize
        for held in bucket.nodes.values():
            assert bucket.range[0] <= held.long_id <= bucket.range[1]
            assert table.get(held.id) is held
    for held in list(table):
        table.remove_contact(held)
        assert table.get(held.id) is None
    assert len(table) == 0


def test_defect_13_id_on_a_bucket_edge_is_found_and_removed() -> None:
    middle = (1 << 160) // 2
    table = table_of([middle - 1, middle, middle + 1, *range(1, 40)], own=7)
    for number in (middle - 1, middle, middle + 1):
        held = table.get(number.to_bytes(20))
        assert held is not None
        table.remove_contact(held)
        assert table.get(number.to_bytes(20)) is None


def test_one_lost_answer_removes_nobody_and_the_second_does() -> None:
    table = table_of([5])
    held = next(iter(table))
    table.note_failure(held)
    assert len(table) == 1
    table.note_answer(held, 9.0)
    table.note_failure(held)
    assert len(table) == 1
    table.note_failure(held)
    assert len(table) == 0


def test_at_most_two_of_a_public_subnet_in_a_bucket_and_ten_in_the_table() -> None:
    table = FcTable(None, contact(OWN))
    for number in range(1, 200):
        spread = number << 152 | number
        table.add_verified(Contact(spread.to_bytes(20), f"8.8.8.{number}", 8468), 1.0)
    assert len(table) <= 10
    for bucket in table.buckets:
        assert len(bucket.nodes) <= 2


def test_known_contact_in_full_bucket_yields_only_when_it_owes_an_answer() -> None:
    far = list(range(1, 21))
    table = table_of(far, own=(1 << 160) - 1)
    table.add_verified(contact((1 << 160) - 5, 90), 1.0)
    bucket = table.bucket_of((3).to_bytes(20))
    assert len(bucket.nodes) == 20
    assert not table.add_verified(contact(100, 100), 50.0)
    assert table.candidates_for(contact(100, 100))[0].long_id == 100
    owing = table.get((3).to_bytes(20))
    assert owing is not None
    table.note_failure(owing)
    assert table.add_verified(contact(100, 100), 51.0)
    assert table.get((3).to_bytes(20)) is None


def test_same_address_under_another_id_replaces_the_old_one() -> None:
    table = table_of([5])
    table.add_verified(contact(6, 1), 2.0)
    assert [c.long_id for c in table] == [6]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=200, unique=True),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=30, unique=True),
    st.integers(1, 12),
)
def test_allocation_is_brute_force(keys: list[int], nodes: list[int], r: int) -> None:
    got = allocate(np.array(sorted(keys), dtype=np.uint64), np.array(nodes, dtype=np.uint64), r)
    for row, key in zip(got.tolist(), sorted(keys), strict=True):
        assert [nodes[i] for i in row] == sorted(nodes, key=lambda node: node ^ key)[:r]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=50, unique=True),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=60, unique=True),
    st.integers(0, 30),
    st.integers(20, 2000),
    st.sampled_from([8, 20]),
)
def test_holders_are_the_nearest_and_where_there_is_a_crowd_all_within_reach(
    keys: list[int], nodes: list[int], planted: int, n_nodes: int, r: int
) -> None:
    keys = sorted(keys)
    nodes = list(dict.fromkeys(nodes + [keys[0] ^ number for number in range(1, planted + 1)]))
    key_array, id_array = np.array(keys, dtype=np.uint64), np.array(nodes, dtype=np.uint64)
    takes = within_reach(key_array, id_array, allocate(key_array, id_array, 2 * r), n_nodes, r)
    reach = expected_distance(20, n_nodes) >> 96
    for row, key in zip(takes.tolist(), keys, strict=True):
        order = sorted(nodes, key=lambda node: node ^ key)
        crowd = [count for count, limit in crowds(n_nodes) if count <= min(2 * r, len(nodes))
                 if order[count - 1] ^ key < limit >> 96]  # fmt: skip
        expected = set(order[:r])
        if r == 20 or crowd:
            expected |= {node for node in nodes if node ^ key <= reach}
        assert {node for node, taken in zip(nodes, row, strict=True) if taken} == expected


def test_contacts_that_owe_an_answer_are_told_last() -> None:
    table = table_of([1, 2, 3, 4])
    owing = table.get((1).to_bytes(20))
    assert owing is not None
    table.note_failure(owing)
    assert [c.long_id for c in table.nearest_to_tell(0, 4, ("", 0))] == [2, 3, 4, 1]
    assert [c.long_id for c in table.nearest_to_tell(0, 3, ("", 0))] == [2, 3, 4]
    assert [c.long_id for c in table.nearest_to_tell(0, 4, ("10.0.0.2", 8468))] == [3, 4, 1]


def test_contacts_survive_packing_and_loopback_is_told_over_loopback_only() -> None:
    contacts = [contact(1, 1), Contact((2).to_bytes(20), "127.0.0.1", 9), Contact((3).to_bytes(20), "2a00::5", 65535)]
    outside = parse_contacts(*pack_contacts(contacts, "10.0.0.1"), giver_ip="10.0.0.9", own_id=b"", limit=20)
    inside = parse_contacts(*pack_contacts(contacts, "127.0.0.1"), giver_ip="127.0.0.1", own_id=b"", limit=20)
    assert set(outside) == {contacts[0], contacts[2]}
    assert set(inside) == set(contacts)
