"""The engine in this process, with short deadlines and small limits: what the clock and the limits decide."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.serve._engine import DRAINED, Engine, Gone, Parked, Sent, Withdrawn
from fastcas.table import Counters
from tests.support.serve_rig import BUDGET_S, BlobStore, content, listener, read_response

pytestmark = pytest.mark.slow

REQUEST = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


class Served:
    """An engine that runs when `until` waits for something."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.store = BlobStore(folder)
        self.counters = Counters.create(1)
        self.listener = listener()
        self.flags = 0
        self.engine = Engine(self.listener.fileno(), self._on_flags, counters_fd=self.counters.fd, **limits)
        self.engine.set_table(self.store.table.fd, 1)
        self.clients: list[socket.socket] = []
        self.parked: list[Parked] = []
        self.events: list[Withdrawn | Sent | Gone] = []

    def _on_flags(self, flags: int) -> None:
        self.flags |= flags
        self.parked += self.engine.take_parked()
        self.events += self.engine.take_events()

    def until(self, condition: Any, what: str) -> None:
        """Run the engine until the condition holds."""
        end = time.monotonic() + BUDGET_S
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}"
            select.select([self.engine.fileno()], [], [], 0.005)
            self.engine.run()
            self.engine.tick()

    def client(self, data: bytes = b"") -> socket.socket:
        """Return a connected client that has sent `data`; reads never wait."""
        sock = socket.create_connection(self.listener.getsockname(), timeout=BUDGET_S)
        sock.sendall(data)
        sock.setblocking(False)
        self.clients.append(sock)
        return sock

    def read_until_closed(self, sock: socket.socket, pieces: list[bytes]) -> bool:
        """Read what is there; true at the end of the stream."""
        with contextlib.suppress(BlockingIOError):
            while part := sock.recv(1 << 20):
                pieces.append(part)
            return True
        return False

    def count(self, name: str) -> int:
        """Return a counter."""
        return self.counters.get(0, name)

    def close(self) -> None:
        """Close everything."""
        for sock in self.clients:
            sock.close()
        self.engine.close()
        self.listener.close()
        self.counters.close()
        self.store.close()


@contextlib.contextmanager
def served(folder: Path, **limits: Any) -> Iterator[Served]:
    made = Served(folder, **limits)
    try:
        yield made
    finally:
        made.close()


def test_header_deadline_is_absolute(tmp_path: Path) -> None:
    with served(tmp_path, header_s=0.2) as s:
        silent, slow = s.client(), s.client(REQUEST[:-2] + b"X: ")
        sent = iter(b"y" * 4000)

        def trickle() -> bool:
            with contextlib.suppress(OSError, StopIteration):
                slow.send(bytes([next(sent)]))
            return s.count("evict_header") == 2

        s.until(trickle, "both evicted")
        s.until(lambda: s.read_until_closed(silent, []), "silent client closed")


def test_idle_connection_is_closed_after_its_time(tmp_path: Path) -> None:
    with served(tmp_path, idle_s=0.15, header_s=60) as s:
        sock = s.client(REQUEST)
        pieces: list[bytes] = []
        s.until(lambda: s.read_until_closed(sock, pieces), "closed")
        assert b"".join(pieces).endswith(b"ok\n")
        assert s.count("evict_idle") == 1


def test_client_that_reads_nothing_is_reset(tmp_path: Path) -> None:
    with served(tmp_path, stall_s=0.3) as s:
        manifest = s.store.add_file(content(24 << 20), 1 << 20)
        sock = s.client(b"GET /files/%s HTTP/1.1\r\nHost: a\r\n\r\n" % manifest.file_hash.hex().encode())
        s.until(lambda: s.count("evict_stall") == 1, "evicted")
        assert s.engine.statistics()["connections"] == 0
        sock.setblocking(True)
        with pytest.raises(ConnectionResetError):
            while sock.recv(1 << 20):
                pass


def test_client_that_reads_too_slowly_is_reset(tmp_path: Path) -> None:
    with served(tmp_path, stall_s=0.3, min_rate_Bps=1 << 30, min_rate_window_s=1.0) as s:
        manifest = s.store.add_file(content(24 << 20), 1 << 20)
        sock = s.client(b"GET /files/%s HTTP/1.1\r\nHost: a\r\n\r\n" % manifest.file_hash.hex().encode())

        def sip() -> bool:
            with contextlib.suppress(OSError):
                sock.recv(20000)
            return s.count("evict_slow") == 1

        s.until(sip, "evicted")


def test_slow_but_steady_client_is_served(tmp_path: Path) -> None:
    with served(tmp_path, stall_s=0.3, min_rate_Bps=1, min_rate_window_s=0.3) as s:
        data = content(24 << 20)
        manifest = s.store.add_file(data, 1 << 20)
        sock = s.client(b"GET /files/%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                        % manifest.file_hash.hex().encode())  # fmt: skip
        pieces: list[bytes] = []

        def sip() -> bool:
            with contextlib.suppress(BlockingIOError):
                part = sock.recv(100_000)
                pieces.append(part)
                return not part
            return False

        s.until(sip, "whole file")
        assert b"".join(pieces).endswith(data)
        assert s.count("evict_stall") == 0


def test_connections_over_the_cap_get_503(tmp_path: Path) -> None:
    with served(tmp_path, max_connections=2) as s:
        first = [s.client(REQUEST), s.client(REQUEST)]
        s.until(lambda: s.count("requests") == 2, "two served")
        third = s.client()
        pieces: list[bytes] = []
        s.until(lambda: s.read_until_closed(third, pieces), "third refused")
        assert b"".join(pieces).startswith(b"HTTP/1.1 503 ")
        first[0].close()
        s.until(lambda: s.engine.statistics()["connections"] == 1, "one gone")
        again = s.client(REQUEST)
        s.until(lambda: s.count("requests") == 3, "served again")
        again.setblocking(True)
        assert read_response(again)[0] == 200


def test_without_descriptors_accept_pauses_and_recovers(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with served(tmp_path, accept_pause_s=0.1) as s:
        client = s.client(REQUEST)
        s.until(lambda: s.count("requests") == 1, "served")
        others = [socket.socket() for _ in range(3)]
        used = max(other.fileno() for other in others)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
        try:
            for other in others:
                other.connect(s.listener.getsockname())
            s.until(lambda: s.count("accept_emfile") >= 1, "out of descriptors")
            seen = s.count("accept_emfile")
            for _ in range(1000):
                s.engine.run()
            assert s.count("accept_emfile") == seen  # paused: no spinning
            client.setblocking(True)
            client.sendall(REQUEST)
            s.until(lambda: s.count("requests") == 2, "open connections go on")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        s.client(REQUEST)
        s.until(lambda: s.count("requests") == 3, "accepting again")
        for other in others:
            other.close()


def test_drain_ends_idle_connections_and_finishes_responses(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        data = content(24 << 20)
        manifest = s.store.add_file(data, 1 << 20)
        idle = s.client(REQUEST)
        busy = s.client(b"GET /files/%s HTTP/1.1\r\nHost: a\r\n\r\n" % manifest.file_hash.hex().encode())
        s.until(lambda: s.count("requests") == 2, "one idle, one sending")
        s.engine.drain()
        late = socket.create_connection(s.listener.getsockname(), timeout=BUDGET_S)
        pieces: list[bytes] = []
        s.until(lambda: s.read_until_closed(idle, []), "idle one closed")
        s.until(lambda: s.read_until_closed(busy, pieces) or len(b"".join(pieces)) > len(data), "response finished")
        s.until(lambda: s.flags & DRAINED, "drained")
        assert b"".join(pieces).endswith(data)
        assert s.count("accepted") == 2  # the late one waits in the queue for the next worker
        late.close()


def test_draining_answers_say_close(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        sock = s.client(REQUEST)
        s.until(lambda: s.count("requests") == 1, "served")
        s.engine.drain()
        sock.setblocking(True)
        sock.sendall(REQUEST)
        pieces: list[bytes] = []
        s.until(lambda: s.count("requests") == 2, "served while draining")
        sock.setblocking(False)
        s.until(lambda: s.read_until_closed(sock, pieces), "closed")
        assert b"".join(pieces).count(b"Connection: close\r\n") == 1


def test_parked_request_is_answered_later_and_pipelined_ones_wait(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        target = b"/swarm/" + b"ab" * 32
        sock = s.client(b"GET " + target + b"?m=1 HTTP/1.1\r\nHost: a\r\nFastcas-Peer: me\r\n\r\n" + REQUEST)
        s.until(lambda: len(s.parked) == 1, "parked")
        parked = s.parked[0]
        assert (parked.path, parked.query, parked.peer, parked.ip) == (target, b"m=1", b"me", "127.0.0.1")
        assert parked.port == sock.getsockname()[1]
        assert s.engine.respond(parked.handle, 200, b"X-A: b\r\n", b"later" * 3000)
        assert not s.engine.respond(parked.handle, 200)  # stale
        s.until(lambda: s.count("requests") == 2, "both answered")
        sock.setblocking(True)
        assert read_response(sock)[2] == b"later" * 3000
        assert read_response(sock)[2] == b"ok\n"


def test_dead_parked_connection_is_reported_and_its_handle_is_stale(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        sock = s.client(b"GET /swarm/%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"ab" * 32))
        s.until(lambda: len(s.parked) == 1, "parked")
        sock.close()
        s.until(lambda: s.events, "reported")
        assert s.events == [Gone(s.parked[0].handle)]
        again = s.client(b"GET /swarm/%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"ab" * 32))
        s.until(lambda: len(s.parked) == 2, "another one in the same place")
        assert not s.engine.respond(s.parked[0].handle, 200, b"", b"not yours")
        assert s.engine.respond(s.parked[1].handle, 200, b"", b"yours")
        again.setblocking(True)
        assert read_response(again)[2] == b"yours"


def test_too_many_parked_requests_get_503(tmp_path: Path) -> None:
    with served(tmp_path, max_parked=1) as s:
        request = b"GET /swarm/%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"ab" * 32)
        s.client(request)
        s.until(lambda: len(s.parked) == 1, "parked")
        second = s.client(request)
        s.until(lambda: s.count("status_503") == 1, "refused")
        second.setblocking(True)
        assert read_response(second)[1]["retry-after"] == "0"


def test_chunk_answer_reports_its_end_once(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        digest = s.store.add_chunks(content(8 << 20), 8 << 20)[0]
        request = b"GET /swarm/%s/next HTTP/1.1\r\nHost: a\r\n\r\n" % (b"ab" * 32)
        reader, dying = s.client(request), s.client(request)
        s.until(lambda: len(s.parked) == 2, "parked")
        by_port = {parked.port: parked.handle for parked in s.parked}
        good, bad = by_port[reader.getsockname()[1]], by_port[dying.getsockname()[1]]
        for handle in (good, bad):
            assert s.engine.respond_chunk(handle, digest, b"X-Fastcas-Chunk: 0\r\n", notify=True) is True
        assert s.engine.respond_chunk(good, digest) is None
        s.engine.run()
        dying.close()
        got: list[bytes] = []

        def read() -> bool:
            s.read_until_closed(reader, got)
            return len(s.events) == 2

        s.until(read, "both ends reported")
        assert sorted(s.events) == sorted([Sent(good, True), Sent(bad, False)])


def test_answer_from_outside_a_run_goes_on_without_a_tick(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        data = content(12 << 20)
        digest = s.store.add_chunks(data, 12 << 20)[0]
        request = b"GET /swarm/%s/next HTTP/1.1\r\nHost: a\r\n\r\n" % (b"ab" * 32)
        sock = s.client(request + request)
        s.until(lambda: len(s.parked) == 1, "parked")
        assert s.engine.respond_chunk(s.parked[0].handle, digest, notify=True)
        pieces: list[bytes] = []
        while len(s.parked) < 2:  # the engine's descriptor alone says when to run
            assert select.select([s.engine.fileno(), sock], [], [], BUDGET_S)[0]
            s.engine.run()
            s.read_until_closed(sock, pieces)
        assert s.engine.respond(s.parked[1].handle, 204)
        s.until(lambda: s.read_until_closed(sock, pieces) or b"".join(pieces[-2:]).endswith(b"\r\n\r\n"), "both read")
        assert data in b"".join(pieces)
        assert s.events == [Sent(s.parked[0].handle, True)]


def test_epoch_is_safe_only_when_older_responses_are_done(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        digest = s.store.add_chunks(content(16 << 20), 16 << 20)[0]
        sock = s.client(b"GET /chunks/%s HTTP/1.1\r\nHost: a\r\n\r\n" % digest.hex().encode())
        s.until(lambda: s.engine.statistics()["in_flight"] == 1, "in flight")
        s.store.table.remove_chunk(digest)
        epoch = s.store.table.advance()
        for _ in range(5):
            s.engine.run()
            s.engine.tick()
        assert s.count("epoch_safe") < epoch
        pieces: list[bytes] = []

        def read() -> bool:
            s.read_until_closed(sock, pieces)
            return s.count("epoch_safe") == epoch

        s.until(read, "safe")
        s.until(lambda: s.read_until_closed(sock, pieces) or sum(map(len, pieces)) > 16 << 20, "all read")


def test_new_table_is_unsafe_until_the_old_ones_responses_are_done(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        digest = s.store.add_chunks(content(16 << 20), 16 << 20)[0]
        for _ in range(3):
            epoch = s.store.table.advance()
        sock = s.client(b"GET /chunks/%s HTTP/1.1\r\nHost: a\r\n\r\n" % digest.hex().encode())
        s.until(lambda: s.engine.statistics()["in_flight"] == 1, "in flight")
        assert s.count("epoch_safe") == epoch
        s.engine.set_table(s.store.table.fd, 2)
        assert (s.count("epoch_table"), s.count("epoch_safe")) == (2, 0)
        pieces: list[bytes] = []

        def read() -> bool:
            s.read_until_closed(sock, pieces)
            return s.count("epoch_safe") == epoch

        s.until(read, "safe")


def test_nothing_is_accepted_before_the_first_table(tmp_path: Path) -> None:
    with served(tmp_path) as s, listener() as early:
        engine = Engine(early.fileno(), s._on_flags, counters_fd=s.counters.fd)
        with socket.create_connection(early.getsockname(), timeout=BUDGET_S) as sock:
            sock.sendall(REQUEST)
            for _ in range(10):
                engine.run()
                engine.tick()
            assert s.count("accepted") == 0
            engine.set_table(s.store.table.fd, 1)
            while s.count("requests") == 0:
                select.select([engine.fileno()], [], [], BUDGET_S)
                engine.run()
            assert read_response(sock)[0] == 200
        engine.close()


def test_memory_of_a_connection_and_its_buffers(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        assert s.engine.statistics()["conn_size"] <= 512
        sock = s.client(REQUEST[:10])
        s.until(lambda: s.engine.statistics()["inputs"] == 1, "a partial request has a buffer")
        sock.setblocking(True)
        sock.sendall(REQUEST[10:])
        s.until(lambda: s.count("requests") == 1, "served")
        assert s.engine.statistics()["inputs"] == 0


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with served(tmp_path) as s:
        with pytest.raises(LocalProtocolError):
            s.engine.set_table(s.counters.fd, 2)
        with pytest.raises(UsageError):
            s.engine.lookup_file(b"short")
        with pytest.raises(UsageError):
            Engine(s.listener.fileno(), s._on_flags, send_path="carrier pigeon")
        with pytest.raises(UsageError):
            Engine(s.listener.fileno(), s._on_flags, max_connections=0)
        with pytest.raises(OSError, match="engine"):
            Engine(999_999, s._on_flags)
        s.client(REQUEST)
        s.until(lambda: s.count("requests") == 1, "it still serves")
    with pytest.raises(UsageError):
        s.engine.run()


def unsent_max(made: Served) -> int:
    """Return TCP_NOTSENT_LOWAT of the engine's only connection, found among this process's descriptors."""
    port = made.clients[0].getsockname()[1]
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as sock:
            if sock.getpeername()[1:2] == (port,):
                return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    raise AssertionError("no connection")


def test_only_who_has_taken_much_gets_much_at_once(tmp_path: Path) -> None:
    """A reader of nothing is handed little, however much it asks for; one that read 4 MiB gets more."""
    with served(tmp_path) as made:
        digest = made.store.add_chunks(content(8 << 20), 8 << 20)[0]
        ask = f"GET /chunks/{digest.hex()} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        client = made.client(ask)
        made.until(lambda: made.count("bytes_sent") > 0, "the response has begun")
        assert unsent_max(made) == 256 << 10
        pieces: list[bytes] = []
        made.until(
            lambda: made.read_until_closed(client, pieces) or sum(map(len, pieces)) > 8 << 20, "the response is read"
        )
        assert unsent_max(made) == 2 << 20
