"""Channel: messages and descriptors between processes."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Iterator

import msgpack
import pytest
import uvloop

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.limits import CHANNEL_MESSAGE_MAX
from fastcas.table.channel import FDS_MAX, QUEUE_BYTES_MAX, Channel
from tests.support.table_child import child, receive


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A hostile end and an honest one."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(right)
    yield left, channel
    left.close()
    channel.close()


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    for i in range(5):
        left.send({"op": "n", "n": i, "hash": bytes(32), "none": None})
    assert [right.recv() for _ in range(5)] == [
        ({"op": "n", "n": i, "hash": bytes(32), "none": None}, []) for i in range(5)
    ]
    assert right.recv() is None


def test_descriptors_cross_processes_and_stay_the_senders_own() -> None:
    before = open_fds()
    with child("echo_fds") as (channel, _):
        files = []
        for text in (b"one", b"two"):
            fd = os.memfd_create("test")
            os.pwrite(fd, text, 0)
            files.append(fd)
        channel.send({"n": 1}, files)
        for fd in files:
            os.close(fd)
        assert receive(channel) == ({"op": "read", "n": 1, "data": [b"one", b"two"]}, [])
    assert open_fds() == before


def test_received_descriptors_are_close_on_exec(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.send({"n": 1}, [0])
    received = right.recv()
    assert received is not None
    _, [fd] = received
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_most_descriptors_pass_and_one_more_is_refused(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.send({"n": 1}, [0] * FDS_MAX)
    received = right.recv()
    assert received is not None and len(received[1]) == FDS_MAX
    for fd in received[1]:
        os.close(fd)
    with pytest.raises(LocalProtocolError, match="65 descriptors"):
        left.send({"n": 1}, [0] * (FDS_MAX + 1))


def test_longest_message_passes_and_one_byte_more_is_refused(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    overhead = len(msgpack.packb({"d": bytes(60000)})) - 60000
    body = bytes(CHANNEL_MESSAGE_MAX - overhead)
    left.send({"d": body})
    assert right.recv() == ({"d": body}, [])
    with pytest.raises(LocalProtocolError, match=f"{CHANNEL_MESSAGE_MAX + 1} B"):
        left.send({"d": body + b"x"})
    assert right.recv() is None


def test_a_full_socket_queues_with_duplicated_descriptors(pair: tuple[Channel, Channel]) -> None:
    before = open_fds()
    left, right = pair
    n = 0
    while not left.wants_write:
        left.send({"n": n, "pad": bytes(30000)})
        n += 1
    fd = os.memfd_create("test")
    os.pwrite(fd, b"mine", 0)
    left.send({"n": n}, [fd])
    os.close(fd)
    got = []
    while len(got) <= n:
        received = right.recv()
        if received is None:
            left.flush()
            continue
        got.append(received[0]["n"])
        for passed in received[1]:
            assert os.pread(passed, 10, 0) == b"mine"
            os.close(passed)
    assert got == list(range(n + 1))
    assert not left.wants_write
    assert open_fds() == before


def test_a_peer_that_never_reads_is_an_error_at_last(pair: tuple[Channel, Channel]) -> None:
    left, _ = pair
    with pytest.raises(LocalProtocolError, match="does not read"):
        for _ in range(QUEUE_BYTES_MAX // 60000 + 100):
            left.send({"pad": bytes(60000)})


def test_close_drops_queued_descriptors() -> None:
    before = open_fds()
    left, right = Channel.pair()
    while not left.wants_write:
        left.send({"pad": bytes(60000)}, [0])
    left.send({"n": 1}, [0, 1, 2])
    left.close()
    left.close()
    right.close()
    assert open_fds() == before


def test_everything_sent_arrives_before_the_end(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    right.send({"never": "read"})
    left.send({"n": 1})
    left.close()
    assert right.recv() == ({"n": 1}, [])
    with pytest.raises(EOFError):
        right.recv()


def test_sending_to_a_peer_that_is_gone_is_quiet_and_recv_tells(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.close()
    right.send({"n": 1})
    right.send({"n": 2})
    assert not right.wants_write
    with pytest.raises(EOFError):
        right.recv()


def test_a_killed_process_is_the_end() -> None:
    with child("echo_fds") as (channel, process):
        process.kill()
        with pytest.raises(EOFError):
            receive(channel)


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x81",
        b"\x81\xa1",
        msgpack.packb([1, 2]),
        msgpack.packb({"a": 1}) + b"\x00",
        msgpack.packb({1: 1}),
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa2\xff\xfe\x00",
    ],
)
def test_bytes_that_are_no_map_are_refused_and_their_descriptors_closed(
    raw: tuple[socket.socket, Channel], data: bytes
) -> None:
    hostile, channel = raw
    before = open_fds()
    hostile.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))])
    with pytest.raises(LocalProtocolError):
        channel.recv()
    assert open_fds() == before


def test_a_message_that_is_too_long_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    hostile, channel = raw
    hostile.send(msgpack.packb({"d": bytes(CHANNEL_MESSAGE_MAX)}))
    with pytest.raises(LocalProtocolError, match="longer"):
        channel.recv()


def test_too_many_descriptors_are_refused_and_closed(raw: tuple[socket.socket, Channel]) -> None:
    hostile, channel = raw
    before = open_fds()
    fds = array.array("i", [0] * (FDS_MAX + 5))
    hostile.sendmsg([msgpack.packb({"n": 1})], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(LocalProtocolError, match="lost"):
        channel.recv()
    assert open_fds() == before


def test_from_fd_refuses_what_is_no_local_packet_socket() -> None:
    read_end, write_end = os.pipe()
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(left), contextlib.closing(right):
        for fd in (read_end, left.fileno()):
            with pytest.raises(UsageError):
                Channel.from_fd(fd)
            os.fstat(fd)
    os.close(read_end)
    os.close(write_end)


def test_a_closed_channel_refuses_use(pair: tuple[Channel, Channel]) -> None:
    left, _ = pair
    left.close()
    assert left.fileno() == -1
    for call in (lambda: left.send({}), left.recv):
        with pytest.raises(UsageError, match="closed"):
            call()


@pytest.fixture(params=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as running:
        yield running


def test_attached_ends_exchange_more_than_the_socket_holds(runner: asyncio.Runner) -> None:
    async def exchange() -> list[int]:
        left, right = Channel.pair()
        loop = asyncio.get_running_loop()
        got: list[int] = []
        everything, done = asyncio.Event(), asyncio.Event()

        def on_message(message: dict[str, int], fds: list[int]) -> None:
            got.append(message["n"])
            for fd in fds:
                os.close(fd)
            if len(got) == 201:
                everything.set()

        left.attach_to(loop, on_message, lambda: None)
        right.attach_to(loop, on_message, done.set)
        for n in range(200):
            left.send({"n": n, "pad": bytes(20000)}, [0])
        assert left.wants_write
        right.send({"n": -1})
        await asyncio.wait_for(everything.wait(), 30)
        left.close()
        await asyncio.wait_for(done.wait(), 10)
        right.close()
        return got

    before = open_fds()
    got = runner.run(exchange())
    assert sorted(got) == list(range(-1, 200))
    assert [n for n in got if n >= 0] == list(range(200))
    assert len(open_fds() - before) <= 8  # the loop's own


def test_attached_garbage_ends_the_conversation(runner: asyncio.Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def receive_garbage() -> list[object]:
        hostile, sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel = Channel(sock)
        events: list[object] = []
        ended = asyncio.Event()
        channel.attach_to(asyncio.get_running_loop(), lambda message, fds: events.append(message), ended.set)
        with pytest.raises(UsageError):
            channel.attach_to(asyncio.get_running_loop(), lambda message, fds: None, lambda: None)
        hostile.send(msgpack.packb({"n": 1}))
        hostile.send(b"\xc1\xc1")
        hostile.send(msgpack.packb({"n": 2}))
        await asyncio.wait_for(ended.wait(), 10)
        channel.detach()
        channel.close()
        hostile.close()
        return events

    assert runner.run(receive_garbage()) == [{"n": 1}]
    assert "broke the channel's protocol" in caplog.text


def test_a_callback_may_close_the_channel(runner: asyncio.Runner) -> None:
    async def close_inside() -> int:
        left, right = Channel.pair()
        count = 0
        closed = asyncio.Event()

        def on_message(message: dict[str, object], fds: list[int]) -> None:
            nonlocal count
            count += 1
            right.close()
            closed.set()

        right.attach_to(asyncio.get_running_loop(), on_message, lambda: None)
        for n in range(3):
            left.send({"n": n})
        await asyncio.wait_for(closed.wait(), 10)
        left.close()
        return count

    assert runner.run(close_inside()) == 1


def test_wants_write_follows_the_socket(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    while not left.wants_write:
        left.send({"pad": bytes(60000)})
    assert not select.select([], [left], [], 0)[1]
    while right.recv() is not None:
        pass
    assert select.select([], [left], [], 10)[1]
    left.flush()
    assert not left.wants_write
