"""Whose marks on the given board stay, with a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastcas.limits import NEXT_TRIAL_S, NEXT_TRIALS_PER_SOURCE, SWARM_PEERS_MAX
from fastcas.serve.query import Caller
from fastcas.serve.takers import Takers
from fastcas.table import GivenBoard

FILE, MANIFEST, N = b"f" * 32, b"m" * 32, 100
IP = "192.0.2.1"
ONE, TWO = Caller("1" * 40, 9001), Caller("2" * 40, 9002)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def board() -> Iterator[GivenBoard]:
    made = GivenBoard.create()
    yield made
    made.close()


def listed(*callers: Caller) -> dict[bytes, object]:
    return {FILE: {"peers": [(c.node_id, IP, c.port) for c in callers], "manifests": []}}


def give(board: GivenBoard, takers: Takers, caller: Caller, *chunks: int) -> None:
    for chunk in chunks:
        assert takers.may_mark(FILE, caller, IP)
        assert board.claim(MANIFEST, N, chunk)
        takers.mark(FILE, caller, IP, MANIFEST, chunk)


def given(board: GivenBoard) -> set[int]:
    return {i for i in range(N) if board.is_given(MANIFEST, i)}


def test_marks_on_trial_end_in_time_unless_proven(board: GivenBoard) -> None:
    clock = Clock()
    takers = Takers(board, clock)
    give(board, takers, ONE, 1, 2)
    give(board, takers, TWO, 3)
    takers.set_swarm(listed(ONE))  # type: ignore[arg-type]
    clock.now = NEXT_TRIAL_S - 0.1
    takers.expire()
    assert given(board) == {1, 2, 3}
    clock.now = NEXT_TRIAL_S
    takers.expire()
    assert (given(board), takers.n_lost, takers.on_trial) == ({1, 2}, 1, False)


def test_a_source_has_few_marks_on_trial_whatever_it_calls_itself(board: GivenBoard) -> None:
    takers = Takers(board, Clock())
    for chunk in range(NEXT_TRIALS_PER_SOURCE):
        give(board, takers, Caller(f"{chunk:040x}", 9000 + chunk), chunk)
    assert not takers.may_mark(FILE, ONE, IP)
    assert takers.may_mark(FILE, ONE, "192.0.2.2")
    takers.set_swarm(listed(ONE))  # type: ignore[arg-type]
    give(board, takers, ONE, *range(50, 90))  # a proven one has as many as it takes


def test_who_leaves_the_list_loses_its_marks_but_a_full_list_says_nothing(board: GivenBoard) -> None:
    takers = Takers(board, Clock())
    takers.set_swarm(listed(ONE, TWO))  # type: ignore[arg-type]
    give(board, takers, ONE, 1)
    give(board, takers, TWO, 2)
    others = [Caller(f"{i:040x}", 9100 + i) for i in range(SWARM_PEERS_MAX)]
    takers.set_swarm(listed(*others))  # type: ignore[arg-type]
    assert given(board) == {1, 2}
    takers.set_swarm(listed(TWO))  # type: ignore[arg-type]
    assert (given(board), takers.n_lost) == ({2}, 1)
    takers.set_swarm({})
    assert given(board) == set()
