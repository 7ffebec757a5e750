"""The receiver alone: memory requests, deadlines, pipelining, the memory cap, and its end."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import PeerUnreachable, RemoteProtocolError, UsageError
from fastcas.fetch._receiver import Job, rename_noreplace
from fastcas.fetch.receiver import (
    HAS_LINK,
    HASH_OK,
    LINK_ALONE,
    LINK_OK,
    Answer,
    AsyncReceiver,
    Outcome,
    describe,
    error_of,
)
from fastcas.fetch.remote import Remote
from fastcas.ids import PeerAddr
from tests.support.evil_peer import Peer, content_of, head, make_manifest

CHUNK = 16384
CONTENT = content_of(40 * CHUNK + 99)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


class Wire:
    """A server that sends given bytes, whole or byte by byte, to each request."""

    def __init__(self, *answers: bytes, step: int = 1 << 20) -> None:
        self.answers = list(answers)
        self.step = step
        self.requests: list[bytes] = []
        self.n_connections = 0

    async def __aenter__(self) -> PeerAddr:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return PeerAddr("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        try:
            while self.answers:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                answer = self.answers.pop(0)
                for at in range(0, len(answer), self.step):
                    writer.write(answer[at : at + self.step])
                    await writer.drain()
                    if self.step < 100:
                        await asyncio.sleep(0)
                if not answer:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def ask(peer: PeerAddr, target: str = "/x", **options: Any) -> Answer:
    """One memory request on a receiver of its own."""
    receiver = AsyncReceiver(n_threads=1, connect_s=1.0, first_byte_s=0.3, stall_s=0.3)
    try:
        return await receiver.get(receiver.open(peer, "ab" * 20), target, **{"max_length": 1 << 20} | options)
    finally:
        receiver.close()


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_response_in_pieces_is_the_same(step: int) -> None:
    async def work() -> None:
        body = content_of(3000)
        wire = Wire(head("200 OK", len(body), "X-A: b") + body, step=step)
        async with wire as peer:
            answer = await ask(peer, expected_hash=hashlib.sha256(body).digest())
        assert (answer.outcome, answer.body) == (Outcome.OK, body)
        assert wire.requests == [
            f"GET /x HTTP/1.1\r\nHost: 127.0.0.1:{peer.port}\r\nFastcas-Peer: {'ab' * 20}\r\n\r\n".encode()
        ]

    run(work)


GOOD = head("200 OK", 3) + b"abc"


@pytest.mark.parametrize("n", range(len(GOOD)))
def test_response_cut_at_each_byte_is_no_success(n: int) -> None:
    async def work() -> None:
        async with Wire(GOOD[:n], b"") as peer:
            answer = await ask(peer)
        assert answer.outcome in (Outcome.TRUNCATED, Outcome.RESET, Outcome.STALLED, Outcome.FIRST_TIMEOUT)
        assert answer.body is None

    run(work)


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.OK),
        (b"HTTP/1.1 200\r\ncontent-length:3\r\n\r\nabc", Outcome.OK),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Outcome.OK),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Outcome.NOTHING),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", Outcome.NOTHING),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\nx", Outcome.REFUSED),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone", Outcome.NOT_FOUND),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: 0\r\n\r\n", Outcome.BUSY),
        (b"HTTP/1.1 418 Teapot\r\nContent-Length: 0\r\n\r\n", Outcome.STATUS),
        (b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\nLocation: /y\r\n\r\n", Outcome.REFUSED),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Outcome.REFUSED),
        (b"HTTP/1.1 2000 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 20 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 +20 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 O\0K\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"http/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0x3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3,3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3_0\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\n: x\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nX: 1\r\n  folded\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nX\xe9: 1\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 3000, Outcome.REFUSED),
        (b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", Outcome.REFUSED),
        (b"ICY 200 OK\r\n\r\n", Outcome.REFUSED),
    ],
)
def test_response_grammar(raw: bytes, outcome: Outcome) -> None:
    async def work() -> None:
        for step in (1 << 20, 1):
            if len(raw) > 1000 and step == 1:
                continue
            async with Wire(raw, step=step) as peer:
                answer = await ask(peer)
            assert answer.outcome == outcome, describe(answer)

    run(work)


def test_wrong_body_is_corrupt_and_kept_from_the_caller() -> None:
    async def work() -> None:
        async with Wire(GOOD) as peer:
            answer = await ask(peer, expected_hash=bytes(32))
        assert answer.outcome == Outcome.CORRUPT
        assert answer.body == hashlib.sha256(b"abc").digest()

    run(work)


def test_connection_refused_has_its_words() -> None:
    async def work() -> None:
        async with Wire() as peer:
            pass
        answer = await ask(peer)
        assert answer.outcome == Outcome.UNREACHABLE
        error = error_of(answer, "chunk 00", peer)
        assert isinstance(error, PeerUnreachable)
        assert "Connection refused" in str(error)

    run(work)


def test_closed_before_the_first_byte_is_asked_once_more() -> None:
    async def work() -> None:
        wire = Wire(b"", GOOD)
        async with wire as peer:
            assert (await ask(peer)).body == b"abc"
        assert wire.n_connections == 2

    run(work)


def test_silence_and_stall_have_their_deadlines() -> None:
    async def work() -> None:
        async with Peer(CONTENT, behaviour="silent") as peer:
            answer = await ask(peer.addr, f"/chunks/{peer.manifest.hash_of(0).hex()}")
            assert answer.outcome == Outcome.FIRST_TIMEOUT
        async with Peer(CONTENT, behaviour="stall") as peer:
            answer = await ask(peer.addr, f"/chunks/{peer.manifest.hash_of(0).hex()}")
            assert answer.outcome == Outcome.STALLED
            assert answer.length == 100

    run(work)


def test_pipelined_answers_come_in_order_and_the_last_breaks_alone() -> None:
    async def work() -> None:
        receiver = AsyncReceiver(n_threads=1, connect_s=1.0, first_byte_s=5.0, stall_s=5.0)
        try:
            bad = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"
            async with Wire(GOOD, GOOD, bad) as peer:
                connection = receiver.open(peer)
                answers = await asyncio.gather(
                    *(receiver.get(connection, f"/{i}", max_length=100) for i in range(4))
                )  # fmt: skip
            assert [a.outcome for a in answers] == [Outcome.OK, Outcome.OK, Outcome.REFUSED, Outcome.LOST]
            assert isinstance(error_of(answers[2], "x", peer), RemoteProtocolError)
        finally:
            receiver.close()

    run(work)


def test_chunks_wait_for_buffers_under_the_memory_cap(tmp_path: Path) -> None:
    async def work() -> None:
        receiver = AsyncReceiver(n_threads=2, memory_max=2 * CHUNK)
        with (tmp_path / "part").open("w+b") as file:
            async with Peer(CONTENT) as peer:
                job = Job(peer.manifest, file.fileno())
                answers: asyncio.Queue[list[Answer]] = asyncio.Queue()
                listener = receiver.listen(answers.put_nowait)
                lines = [receiver.open(peer.addr) for _ in range(8)]
                for i in range(peer.manifest.n_chunks):
                    lines[i % 8].get_chunks(listener, job, [i])
                n = 0
                while n < peer.manifest.n_chunks:
                    for answer in await answers.get():
                        n += 1
                        assert answer.outcome == Outcome.OK
                        assert answer.flags == HASH_OK | LINK_OK | HAS_LINK
                    assert receiver.core.buffer_bytes <= 2 * CHUNK
                receiver.close()
            assert file.read() == CONTENT

    run(work)


def test_answers_come_in_lists_to_the_listener_of_their_requests_the_oldest_first(tmp_path: Path) -> None:
    orders = ([7, 3, 4, 5, 0, 1], [20, 30, 10], [8])

    async def work() -> None:
        receiver = AsyncReceiver(n_threads=2)
        with (tmp_path / "part").open("w+b") as file:
            async with Peer(CONTENT) as peer:
                job = Job(peer.manifest, file.fileno())
                got: list[list[int]] = [[], [], []]
                forgotten: list[Answer] = []
                n_calls = 0
                done = asyncio.Event()

                def take(which: int, answers: list[Answer]) -> None:
                    nonlocal n_calls
                    n_calls += 1
                    got[which] += [answer.chunk for answer in answers]
                    if sum(map(len, got)) == sum(map(len, orders)):
                        done.set()

                lost = receiver.listen(forgotten.extend)
                receiver.open(peer.addr).get_chunks(lost, job, [15])
                receiver.forget(lost)
                for which, chunks in enumerate(orders):
                    listener = receiver.listen(partial(take, which))
                    receiver.open(peer.addr).get_chunks(listener, job, chunks)
                await done.wait()
                assert got == list(orders)
                assert n_calls >= len(orders)
                assert not forgotten
            receiver.close()

    run(work)


def test_list_with_a_chunk_that_the_file_lacks_asks_for_none_of_them(tmp_path: Path) -> None:
    async def work() -> None:
        receiver = AsyncReceiver(n_threads=1)
        wire = Wire(GOOD)
        with (tmp_path / "part").open("w+b") as file:
            job = Job(make_manifest(CONTENT), file.fileno())
            async with wire as addr:
                line = receiver.open(addr)
                listener = receiver.listen(lambda answers: pytest.fail(describe(answers[0])))
                for wrong in (41, -1, 1 << 40):
                    with pytest.raises((IndexError, OverflowError)):
                        line.get_chunks(listener, job, [0, 1, wrong])
                line.get_chunks(listener, job, [])
                assert (await receiver.get(line, "/x", max_length=10)).body == b"abc"
            receiver.close()
        assert len(wire.requests) == 1

    run(work)


def test_dropped_line_is_heard_to_its_end_and_then_forgotten(tmp_path: Path) -> None:
    async def work() -> None:
        receiver = AsyncReceiver(n_threads=1)
        with (tmp_path / "part").open("w+b") as file:
            async with Peer(CONTENT, behaviour="silent") as peer:
                heard: list[Outcome] = []
                remote = Remote(peer.addr, "user", receiver)
                remote.on_answers = lambda _, answers: heard.extend(Outcome(answer.outcome) for answer in answers)
                remote.ask_chunks(Job(peer.manifest, file.fileno()), list(range(6)))
                assert len(remote.lines) == 2
                remote.hang_up()
                await remote.wait_idle()
                assert heard == [Outcome.CANCELLED] * 6
                assert not remote.lines
                assert not receiver._listeners
            receiver.close()

    run(work)


def test_closing_a_connection_cancels_what_is_out() -> None:
    async def work() -> None:
        receiver = AsyncReceiver(n_threads=1)
        async with Peer(CONTENT, behaviour="silent") as peer:
            connection = receiver.open(peer.addr)
            target = f"/chunks/{peer.manifest.hash_of(0).hex()}"
            task = asyncio.create_task(receiver.get(connection, target, max_length=CHUNK))
            await asyncio.sleep(0)
            connection.close()
            assert (await task).outcome == Outcome.CANCELLED
            with pytest.raises(ValueError, match="closed"):
                connection.get(1, b"/x", 1)
        receiver.close()
        receiver.close()

    run(work)


def test_receiver_leaves_no_descriptor_behind() -> None:
    async def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with Peer(CONTENT) as peer:
            during = len(os.listdir("/proc/self/fd"))
            for _ in range(3):
                receiver = AsyncReceiver(n_threads=4)
                connections = [receiver.open(peer.addr) for _ in range(10)]
                await receiver.get(connections[0], "/health", max_length=10)
                receiver.close()
            assert len(os.listdir("/proc/self/fd")) <= during + 1
        del before

    run(work)


def test_arguments_are_checked() -> None:
    async def work() -> None:
        receiver = AsyncReceiver(n_threads=1)
        with pytest.raises(ValueError, match="address"):
            receiver.core.open("localhost", 80)
        with pytest.raises(UsageError):
            receiver.core.open("127.0.0.1", 0)
        with pytest.raises(UsageError):
            receiver.core.open("127.0.0.1", 80, "evil\r\nX: y")
        connection = receiver.core.open("127.0.0.1", 80)
        for target in (b"/a b", b"x", b"/\r\n", b"/" * 2000):
            with pytest.raises(ValueError, match="target"):
                connection.get(1, target, 10)
        receiver.close()

    run(work)


@pytest.mark.parametrize("size", [1, 64, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 63])
def test_job_checks_every_chunk_and_writes_only_what_is_right(tmp_path: Path, size: int) -> None:
    content = content_of(size)
    manifest = make_manifest(content)
    (tmp_path / "source").write_bytes(content)
    with (tmp_path / "source").open("r+b") as source, (tmp_path / "out").open("w+b") as out:
        job = Job(manifest, out.fileno())
        for i in range(manifest.n_chunks):
            assert job.take(i, source.fileno(), i * CHUNK, True) == HASH_OK | LINK_OK | HAS_LINK
        assert out.read() == content
        os.pwrite(source.fileno(), bytes([content[0] ^ 1]), 0)
        os.pwrite(out.fileno(), b"?", 0)
        assert job.take(0, source.fileno(), 0, True) == HAS_LINK
        assert os.pread(out.fileno(), 1, 0) == b"?"
        assert job.take(0, source.fileno(), size, False) == 0
        with pytest.raises(IndexError):
            job.take(manifest.n_chunks, source.fileno(), 0, False)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            job.take(0, 9999, 0, False)


def test_job_by_links_alone_looks_at_own_hashes_only_where_a_link_is_broken(tmp_path: Path) -> None:
    content = content_of(3 * CHUNK + 1)
    manifest = make_manifest(content)
    wrong_hash = replace(manifest, hashes=bytes(32) + manifest.hashes[32:])
    wrong_link = replace(manifest, midstates=bytes(32) + manifest.midstates[32:])
    (tmp_path / "source").write_bytes(content)
    with (tmp_path / "source").open("r+b") as source, (tmp_path / "out").open("w+b") as out:
        right = HAS_LINK | LINK_OK | LINK_ALONE
        job = Job(manifest, out.fileno(), links_alone=True)
        for i in range(manifest.n_chunks):
            assert job.take(i, source.fileno(), i * CHUNK, True) == right
        assert out.read() == content
        assert Job(wrong_hash, out.fileno(), links_alone=True).take(0, source.fileno(), 0, False) == right
        # The bytes are those that the manifest lists: it contradicts itself, and no peer is to blame.
        assert Job(wrong_link, out.fileno(), links_alone=True).take(0, source.fileno(), 0, False) == HAS_LINK | HASH_OK
        own = Job(manifest, out.fileno(), check_links=False, links_alone=True)
        assert own.take(0, source.fileno(), 0, False) == HASH_OK
        os.pwrite(source.fileno(), bytes([content[0] ^ 1]), 0)
        os.pwrite(out.fileno(), b"?", 0)
        assert job.take(0, source.fileno(), 0, True) == HAS_LINK
        assert os.pread(out.fileno(), 1, 0) == b"?"


@pytest.mark.parametrize("links_alone", [False, True])
def test_wrong_bytes_are_corrupt_and_not_written_whatever_is_checked(tmp_path: Path, links_alone: bool) -> None:
    wrong = bytes([CONTENT[0] ^ 1]) + CONTENT[1:CHUNK]
    manifest = make_manifest(CONTENT)

    async def work() -> None:
        receiver = AsyncReceiver(n_threads=1)
        with (tmp_path / "part").open("w+b") as file:
            job = Job(manifest, file.fileno(), links_alone=links_alone)
            async with Wire(head("200 OK", CHUNK) + wrong, head("200 OK", CHUNK) + CONTENT[:CHUNK]) as addr:
                answers: list[Answer] = []
                both = asyncio.Event()
                line = receiver.open(addr)

                def arrived(some: list[Answer]) -> None:
                    answers.extend(some)
                    if len(answers) == 2:
                        both.set()

                line.get_chunks(receiver.listen(arrived), job, [0, 0])
                await both.wait()
            receiver.close()
            corrupt, right = answers
            assert (corrupt.outcome, corrupt.body) == (Outcome.CORRUPT, hashlib.sha256(wrong).digest())
            assert right.outcome == Outcome.OK
            assert right.flags == HAS_LINK | LINK_OK | (LINK_ALONE if links_alone else HASH_OK)
            assert file.read() == CONTENT[:CHUNK]

    run(work)


def test_rename_noreplace(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    rename_noreplace(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").write_bytes(b"c")
    with pytest.raises(FileExistsError):
        rename_noreplace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"a"
