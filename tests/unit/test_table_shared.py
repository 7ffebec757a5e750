"""Ring, HaveLog, GivenBoard and Counters."""

from __future__ import annotations

import mmap
import os
import random
import select
import struct
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.table import Counters, GivenBoard, HaveLog, Ring, memfd
from fastcas.table._shared import NAMES, sort_keys
from tests.support.table_child import ROOT, child, receive

TAIL, HEAD, DATA = 128, 256, 4096
HASH_A, HASH_B = b"a" * 32, b"b" * 32


def writable_copy(fd: int) -> tuple[int, mmap.mmap]:
    """A memfd with the same bytes that anybody may write, sealed against shrinking only."""
    size = os.fstat(fd).st_size
    copy = memfd.create("copy", size)
    os.pwrite(copy, os.pread(fd, size, 0), 0)
    memfd.seal(copy, writable_by_others=True)
    return copy, mmap.mmap(copy, size)


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring.create(4096)
    yield made
    made.close()


# --- ring ---


def test_ring_wraps_around_with_every_length(ring: Ring) -> None:
    for length in [*range(200), 1000, 2047, 2048]:
        message = bytes(i * 7 % 256 for i in range(length))
        assert ring.push(message)
        assert ring.pop() == message
    assert ring.pop() is None


def test_ring_says_when_it_is_full_and_goes_on_after(ring: Ring) -> None:
    n = 0
    while ring.push(b"%d" % n + bytes(100)):
        n += 1
    assert n == 4096 // 112
    assert ring.pop() == b"0" + bytes(100)
    assert ring.push(b"x" * 101)
    assert not ring.push(b"x" * 101)
    assert len(ring.drain()) == n


def test_ring_longest_message_passes_and_one_byte_more_is_refused(ring: Ring) -> None:
    assert ring.max_message == 2048
    assert ring.push(bytes(2048))
    with pytest.raises(UsageError, match="2049 B"):
        ring.push(bytes(2049))
    assert ring.drain() == [bytes(2048)]


def test_ring_eventfd_tells_of_messages(ring: Ring) -> None:
    assert not select.select([ring.eventfd], [], [], 0)[0]
    ring.push(b"one")
    ring.push(b"two")
    assert select.select([ring.eventfd], [], [], 0)[0]
    assert ring.drain() == [b"one", b"two"]
    assert not select.select([ring.eventfd], [], [], 0)[0]
    assert ring.drain() == []


def test_ring_messages_wait_for_a_consumer_that_attaches_later(ring: Ring) -> None:
    ring.push(b"early")
    late = Ring.attach(ring.memfd, ring.eventfd)
    assert late.drain() == [b"early"]
    late.close()
    with pytest.raises(UsageError, match="closed"):
        late.pop()


def test_ring_carries_messages_between_processes() -> None:
    rng = random.Random(7)
    there, back = Ring.create(1 << 16), Ring.create(1 << 16)
    messages = [rng.randbytes(rng.randrange(1, 3000)) for _ in range(500)] + [b""]
    answers: list[bytes] = []
    with child("echo_ring") as (channel, _):
        channel.send({"op": "rings"}, [there.memfd, there.eventfd, back.memfd, back.eventfd])
        for message in messages:
            while not there.push(message):
                answers += back.drain()
        while len(answers) < len(messages):
            assert select.select([back.eventfd], [], [], 30)[0]
            answers += back.drain()
    there.close()
    back.close()
    assert answers == [message[::-1] for message in messages]


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: struct.pack_into("<Q", m, TAIL, 1 << 63),
        lambda m: struct.pack_into("<Q", m, TAIL, 8192),
        lambda m: struct.pack_into("<Q", m, TAIL, 13),
        lambda m: struct.pack_into("<Q", m, TAIL, 0),
        lambda m: struct.pack_into("<I", m, DATA + 16, 4000),
        lambda m: struct.pack_into("<II", m, DATA + 16, 4000, ~4000 & 0xFFFFFFFF),
        lambda m: struct.pack_into("<II", m, DATA + 16, 100, ~100 & 0xFFFFFFFF),
        lambda m: struct.pack_into("<II", m, DATA + 16, 0xFFFFFFFF, 0),
    ],
)
def test_ring_consumer_refuses_a_hostile_producer(ring: Ring, damage: Callable[[mmap.mmap], None]) -> None:
    ring.push(b"first")
    ring.push(b"second")
    shared = mmap.mmap(ring.memfd, 0)
    assert ring.pop() == b"first"
    damage(shared)
    for _ in range(2):
        with pytest.raises(LocalProtocolError):
            ring.drain()
    shared.close()


@pytest.mark.parametrize("head", [1 << 63, 8, 3, 4096])
def test_ring_producer_refuses_a_hostile_consumer(ring: Ring, head: int) -> None:
    ring.push(b"first")
    ring.pop()
    shared = mmap.mmap(ring.memfd, 0)
    struct.pack_into("<Q", shared, HEAD, head)
    for _ in range(2):
        with pytest.raises(LocalProtocolError):
            ring.push(b"second")
    shared.close()


def test_ring_survives_random_bytes() -> None:
    rng = random.Random(11)
    for _ in range(300):
        ring = Ring.create(4096)
        for _ in range(rng.randrange(8)):
            ring.push(rng.randbytes(rng.randrange(300)))
        with mmap.mmap(ring.memfd, 0) as shared:
            for _ in range(rng.randrange(1, 6)):
                at = rng.choice([rng.randrange(8192), TAIL + rng.randrange(8), DATA + rng.randrange(64)])
                shared[at] = rng.randrange(256)
        for use in (ring, None):
            try:
                view = use or Ring.attach(ring.memfd, ring.eventfd)
            except LocalProtocolError:
                continue
            try:
                assert all(len(message) <= 2048 for message in view.drain())
                view.push(b"more")
            except LocalProtocolError:
                pass
            if view is not ring:
                view.close()
        ring.close()


def test_ring_endless_producer_does_not_hold_the_consumer() -> None:
    """drain() takes at most about one capacity, then asks to be called again."""
    ring = Ring.create(4096)
    producer = Ring.attach(ring.memfd, ring.eventfd)
    while producer.push(bytes(1000)):
        pass
    assert len(ring.drain()) == 4
    while producer.push(bytes(1016)):
        pass
    assert len(ring.drain()) == 4
    assert select.select([ring.eventfd], [], [], 0)[0]
    assert ring.drain() == []
    assert not select.select([ring.eventfd], [], [], 0)[0]
    producer.close()
    ring.close()


@pytest.mark.parametrize("capacity", [0, 1, 2048, 4097, 1 << 31])
def test_ring_capacity_out_of_range_is_refused(capacity: int) -> None:
    with pytest.raises(UsageError):
        Ring.create(capacity)


# --- what attach refuses ---


def attach_ring(fd: int) -> Ring:
    event = os.eventfd(0)
    try:
        return Ring.attach(fd, event)
    finally:
        os.close(event)


def make_all() -> list[tuple[Callable[[int], object], int, object]]:
    ring, log = Ring.create(4096), HaveLog.create(HASH_A, HASH_B, 10)
    board, counters = GivenBoard.create(16, 64), Counters.create(2)
    return [
        (attach_ring, ring.memfd, ring),
        (HaveLog.attach, log.fd, log),
        (GivenBoard.attach, board.fd, board),
        (Counters.attach, counters.fd, counters),
    ]


def test_attach_refuses_damaged_headers_and_everything_else() -> None:
    for attach, fd, _owner in make_all():
        copy, shared = writable_copy(fd)
        attach(copy)
        original = shared[:128]
        checked = {attach_ring: [*range(12), *range(16, 32)], Counters.attach: range(16)}.get(attach, range(32))
        for at in checked:
            shared[at] ^= 0x41
            with pytest.raises(LocalProtocolError):
                attach(copy)
            shared[:128] = original
        attach(copy)
        shared.close()
        os.close(copy)

        unsealed = memfd.create("unsealed", 8192)
        os.pwrite(unsealed, original, 0)
        with pytest.raises(LocalProtocolError):
            attach(unsealed)
        os.close(unsealed)

        empty = memfd.create("empty")
        memfd.seal(empty, writable_by_others=True)
        with pytest.raises(LocalProtocolError):
            attach(empty)
        os.close(empty)

        read_end, write_end = os.pipe()
        with pytest.raises(OSError):
            attach(read_end)
        os.close(read_end)
        os.close(write_end)


def test_a_failed_attach_leaks_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    unsealed = memfd.create("unsealed", 8192)
    for attach in (attach_ring, HaveLog.attach, GivenBoard.attach, Counters.attach):
        with pytest.raises(LocalProtocolError):
            attach(unsealed)
    os.close(unsealed)
    assert set(os.listdir("/proc/self/fd")) == before


# --- have log ---


def test_have_log_since_and_bitfield_follow_the_writer() -> None:
    log = HaveLog.create(HASH_A, HASH_B, 19)
    reader = HaveLog.attach(log.fd)
    assert (reader.file_hash, reader.manifest_hash, reader.n_total, reader.generation) == (HASH_A, HASH_B, 19, 0)
    assert (reader.since(0), reader.bitfield()) == ([], bytes(3))
    for i in (3, 18, 0, 3, 18):
        log.append(i)
    assert (reader.generation, reader.since(0), reader.since(2), reader.since(3)) == (3, [3, 18, 0], [0], [])
    assert reader.bitfield() == log.bitfield() == bytes([0x90, 0x00, 0x20])
    log.append(8)
    assert (reader.since(3), reader.bitfield()) == ([8], bytes([0x90, 0x80, 0x20]))
    assert reader.since(5) == [3, 18, 0, 8], "a generation of another log"
    log.close()
    assert reader.since(0) == [3, 18, 0, 8]
    reader.close()
    with pytest.raises(UsageError, match="closed"):
        reader.since(0)


def test_have_log_refuses_numbers_out_of_range_and_readers_that_write() -> None:
    log = HaveLog.create(HASH_A, HASH_B, 8)
    reader = HaveLog.attach(log.fd)
    with pytest.raises(UsageError, match="chunk 8 of 8"):
        log.append(8)
    with pytest.raises(UsageError, match="reading"):
        reader.append(1)
    for n_total in (0, (1 << 24) + 1):
        with pytest.raises(UsageError):
            HaveLog.create(HASH_A, HASH_B, n_total)
    with pytest.raises(UsageError, match="32 bytes"):
        HaveLog.create(b"short", HASH_B, 8)
    log.close()
    reader.close()


def test_have_log_is_sealed_for_everybody_but_its_writer() -> None:
    log = HaveLog.create(HASH_A, HASH_B, 8)
    for refused in (
        lambda: os.ftruncate(log.fd, 0),
        lambda: os.ftruncate(log.fd, 1 << 20),
        lambda: os.pwrite(log.fd, b"x", 128),
        lambda: mmap.mmap(log.fd, 0),
    ):
        with pytest.raises(PermissionError):
            refused()
    log.append(1)
    assert log.generation == 1
    log.close()


def test_have_log_reader_survives_a_hostile_writer() -> None:
    log = HaveLog.create(HASH_A, HASH_B, 20)
    for i in range(5):
        log.append(i)
    copy, shared = writable_copy(log.fd)
    reader = HaveLog.attach(copy)
    struct.pack_into("<Q", shared, 128, 1 << 60)
    struct.pack_into("<I", shared, 4096, 0xFFFFFFFF)
    struct.pack_into("<I", shared, 4100, 20)
    assert reader.generation == 20
    assert all(i < 20 for i in reader.since(0))
    assert len(reader.bitfield()) == 3
    reader.close()
    shared.close()
    os.close(copy)
    log.close()


def test_have_log_is_followed_by_another_process() -> None:
    n = 20_000
    order = list(range(n))
    random.Random(3).shuffle(order)
    log = HaveLog.create(HASH_A, HASH_B, n)
    with child("have") as (channel, _):
        channel.send({"op": "have"}, [log.fd])
        receive(channel)
        for i in order:
            log.append(i)
        message, _ = receive(channel)
    assert message["seen"] == order
    assert message["bits"] == log.bitfield() == b"\xff" * (n // 8)
    log.close()


# --- given board ---


def test_board_gives_each_chunk_once_and_again_after_clear() -> None:
    board = GivenBoard.create()
    other = GivenBoard.attach(board.fd)
    assert board.claim(HASH_A, 100, 7)
    assert not other.claim(HASH_A, 100, 7)
    assert other.is_given(HASH_A, 7) and not other.is_given(HASH_A, 8) and not other.is_given(HASH_B, 7)
    given = [other.claim_from(HASH_A, 100, 3, pick * 31) for pick in range(96)]
    assert sorted(i for i in given if i is not None) == [i for i in range(3, 100) if i != 7]
    assert board.claim_from(HASH_A, 100, 3, 5) is None
    board.clear(HASH_A, 50)
    assert other.claim_from(HASH_A, 100, 3, 5) == 50
    assert board.claim_from(HASH_B, 100, 0, 0) == 0, "another file has a set of its own"
    board.close()
    other.close()
    with pytest.raises(UsageError, match="closed"):
        board.claim(HASH_A, 100, 1)


@pytest.mark.parametrize(("n", "start"), [(1, 0), (63, 0), (64, 0), (65, 64), (129, 64), (200, 63), (1000, 999)])
def test_board_pick_chooses_among_what_is_left(n: int, start: int) -> None:
    board = GivenBoard.create(1, 1024)
    left = list(range(start, n))
    rng = random.Random(n)
    while left:
        pick = rng.randrange(1 << 64)
        chosen = board.claim_from(HASH_A, n, start, pick)
        assert chosen == left[pick % len(left)]
        left.remove(chosen)
    assert board.claim_from(HASH_A, n, start, 0) is None
    assert not any(board.is_given(HASH_A, i) for i in range(start))
    board.close()


def test_board_that_is_full_forgets_the_files_before() -> None:
    board = GivenBoard.create(2, 64)  # two files at a time, 512 chunks in all
    assert board.claim(HASH_A, 384, 1)
    assert board.claim(HASH_B, 100, 1)
    assert not board.claim(HASH_A, 384, 1)
    third = b"c" * 32
    assert board.claim(third, 10, 1), "no room in the directory: the other half"
    assert not board.claim(third, 10, 1)
    assert not board.is_given(HASH_A, 1)
    assert board.claim(HASH_A, 500, 1), "no room in the arena"
    assert board.claim_from(third, 10, 1, 0) == 1
    for n in range(1000):
        name = n.to_bytes(32, "big")
        assert board.claim(name, 200, n % 200) and not board.claim(name, 200, n % 200)
    board.close()


def test_board_refuses_a_file_that_never_fits() -> None:
    board = GivenBoard.create(2, 64)
    assert board.claim(HASH_A, 512, 1)
    assert board.claim_from(HASH_B, 513, 0, 1) is None
    assert not board.claim(HASH_B, 513, 1)
    assert board.is_given(HASH_A, 1), "nothing was forgotten for it"
    assert not board.claim(HASH_A, 100, 2), "another number of chunks than before"
    board.close()


def test_board_refuses_numbers_out_of_range() -> None:
    board = GivenBoard.create()
    board.claim(HASH_A, 100, 1)
    for call in (
        lambda: board.claim(HASH_A, 100, 100),
        lambda: board.claim_from(HASH_A, 100, 100, 1),
        lambda: board.claim_from(HASH_B, (1 << 24) + 1, 0, 1),
        lambda: board.claim(b"short", 100, 1),
        lambda: GivenBoard.create(3),
        lambda: GivenBoard.create(4, 63),
    ):
        with pytest.raises(UsageError):
            call()
    board.clear(HASH_A, 1 << 31)
    assert not board.is_given(HASH_A, 1 << 31)
    board.close()


def test_board_many_processes_claim_every_chunk_exactly_once() -> None:
    n = 6000
    board = GivenBoard.create(16, 4096)
    claimed: Counter[int] = Counter()
    with child("claim", n, 1) as (one, _), child("claim", n, 2) as (two, _), child("claim", n, 3) as (three, _):
        for channel in (one, two, three):
            channel.send({"op": "board"}, [board.fd])
        for channel in (one, two, three):
            message, _ = receive(channel)
            claimed.update(message["chunks"])  # type: ignore[arg-type]
    assert claimed == Counter(range(n))
    board.close()


def test_board_survives_random_bytes() -> None:
    rng = random.Random(5)
    board = GivenBoard.create(4, 64)
    shared = mmap.mmap(board.fd, 0)
    for _ in range(2000):
        at = rng.choice([128 + rng.randrange(24), 4096 + rng.randrange(2 * (4 * 16 + 64))])
        shared[at] = rng.randrange(256)
        key = rng.choice([HASH_A, HASH_B]) if rng.random() < 0.8 else rng.randbytes(32)
        chosen = board.claim_from(key, 100, rng.randrange(100), rng.randrange(1 << 64))
        assert chosen is None or chosen < 100
        board.claim(key, 100, rng.randrange(100))
        board.clear(key, rng.randrange(1 << 32))
        board.is_given(key, rng.randrange(1 << 32))
    shared.close()
    board.close()


# --- counters ---


def test_counters_are_seen_by_everybody_and_slots_are_apart() -> None:
    counters = Counters.create(3)
    other = Counters.attach(counters.fd)
    counters.add(1, "requests")
    counters.add(1, "requests", 41)
    counters.set(2, "epoch_safe", 1 << 63)
    assert (other.get(1, "requests"), other.get(2, "epoch_safe"), other.get(0, "requests")) == (42, 1 << 63, 0)
    assert other.snapshot(1) == {name: 42 if name == "requests" else 0 for name in NAMES}
    other.clear(1)
    assert counters.snapshot(1) == dict.fromkeys(Counters.NAMES, 0)
    assert counters.get(2, "epoch_safe") == 1 << 63
    assert counters.n_slots == other.n_slots == 3
    for call in (lambda: counters.get(3, "requests"), lambda: counters.get(0, "nonsense"), lambda: Counters.create(0)):
        with pytest.raises(UsageError):
            call()
    counters.close()
    other.close()
    with pytest.raises(UsageError, match="closed"):
        counters.get(0, "requests")


def test_counter_names_follow_the_header() -> None:
    header = (ROOT / "csrc/table/counters.h").read_text()
    body = header[header.index("typedef enum") : header.index("FCAS_CTR_COUNT")]
    in_header = [
        word.split(" ")[0].strip(",").removeprefix("FCAS_CTR_").lower()
        for line in body.splitlines()
        if (word := line.split("/*")[0].strip()).startswith("FCAS_CTR_")
    ]
    assert tuple(in_header) == NAMES


# --- keys ---


def test_sort_keys_sorts_and_drops_repeats() -> None:
    rng = random.Random(1)
    keys = [rng.randbytes(32) for _ in range(1000)]
    some = keys + keys[:300]
    rng.shuffle(some)
    buffer = bytearray(b"".join(some))
    assert sort_keys(buffer) == 1000
    assert bytes(buffer[: 32 * 1000]) == b"".join(sorted(keys))
    assert sort_keys(bytearray()) == 0
    with pytest.raises(UsageError):
        sort_keys(bytearray(31))
