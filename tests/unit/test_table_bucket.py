"""The shared token bucket, with a clock of our own: exact rates, bursts, debts, several processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.table import Bucket, memfd

SECOND = 10**9
START = 1000 * SECOND


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    made = Bucket.create(1_000_000)
    yield made
    made.close()


def take_all(bucket: Bucket, now_ns: int) -> int:
    """Empty the bucket in slices; return the bytes."""
    taken = 0
    while bucket.take(bucket.slice_bytes, now_ns) == 0:
        taken += bucket.slice_bytes
    return taken


def test_burst_is_50_ms_and_then_the_rate_is_exact(bucket: Bucket) -> None:
    assert (bucket.rate_Bps, bucket.slice_bytes) == (1_000_000, 20_000)
    assert take_all(bucket, START) == 40_000  # two whole slices fit 50 ms
    taken = sum(take_all(bucket, START + ms * 10**6) for ms in range(1, 10_001))
    assert 9_990_000 <= taken <= 10_010_000


def test_wait_is_the_time_until_the_bytes_are_there(bucket: Bucket) -> None:
    take_all(bucket, START)
    wait_ns = bucket.take(20_000, START)
    assert wait_ns == 10_000_000  # 10 ms of the burst are left over
    assert bucket.take(20_000, START + wait_ns - 1) == 1
    assert bucket.take(20_000, START + wait_ns) == 0


def test_refund_gives_back_and_charge_makes_debt(bucket: Bucket) -> None:
    take_all(bucket, START)
    bucket.refund(20_000)
    assert bucket.take(20_000, START) == 0
    bucket.charge(500_000, START)
    assert bucket.take(1000, START + SECOND // 4) > 0
    assert bucket.take(1000, START + SECOND // 2) == 0
    for _ in range(10):
        bucket.charge(1 << 31, START)
    assert bucket.take(1000, START) <= SECOND + 1_000_000  # a second of debt at most


@given(rate=st.integers(1, 1 << 40), steps=st.lists(st.integers(0, 2 * SECOND), max_size=30))
def test_never_more_than_rate_and_burst(rate: int, steps: list[int]) -> None:
    bucket = Bucket.create(rate)
    now, taken = START, 0
    for step in steps:
        now += step
        for _ in range(20):
            if bucket.take(bucket.slice_bytes, now) == 0:
                taken += bucket.slice_bytes
    burst = max(rate / 20, 2 * bucket.slice_bytes)
    assert taken <= (now - START) * rate / SECOND + burst * 1.001 + 1
    bucket.close()


def test_all_who_share_it_get_the_rate_together(bucket: Bucket) -> None:
    taken = [0, 0, 0, 0]

    def work(number: int) -> None:
        mine = Bucket.attach(bucket.fd)
        for ms in range(2000):
            taken[number] += take_all(mine, START + ms * 10**6)
        mine.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) <= 2_000_000 + 50_000


def test_wrong_numbers_and_descriptors_are_refused(bucket: Bucket) -> None:
    for rate in (0, (1 << 40) + 1):
        with pytest.raises(UsageError):
            Bucket.create(rate)
    with pytest.raises(UsageError):
        bucket.take(20_001, START)
    fd = memfd.create("not a bucket", 4096)
    try:
        with pytest.raises(LocalProtocolError):
            Bucket.attach(fd)  # it can still shrink
        memfd.seal(fd, writable_by_others=True)
        with pytest.raises(LocalProtocolError):
            Bucket.attach(fd)
    finally:
        os.close(fd)
    bucket.close()
    with pytest.raises(UsageError):
        bucket.take(1, START)
