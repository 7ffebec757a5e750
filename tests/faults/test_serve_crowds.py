"""Crowds against a real worker: slow clients, no descriptors left. They are closed in time, a good client is served."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcas.limits import ACCEPT_PAUSE_S
from tests.support.serve_faults import cpu_s, slow_clients, use_limits
from tests.support.serve_rig import BUDGET_S, Rig, content, read_response, rig, wait_until

pytestmark = pytest.mark.slow

CROWD = 1000
MEASURED = 300  # requests of the good client


def ask(sock: socket.socket, target: str) -> None:
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())


class GoodClient:
    """One connection that fetches one chunk over and over, every answer checked."""

    def __init__(self, made: Rig, digest: bytes) -> None:
        self._made, self._digest = made, digest

    def rate(self, at_least: int, until: Callable[[], bool] = lambda: True) -> float:
        """Fetch `at_least` times, and on until a condition holds; return requests per second."""
        want, n = self._made.store.chunks[self._digest], 0
        with self._made.worker.connect() as sock:
            begin = time.monotonic()
            while n < at_least or not until():
                assert time.monotonic() - begin < BUDGET_S, "the crowd is not closed"
                ask(sock, f"/chunks/{self._digest.hex()}")
                assert read_response(sock)[2] == want
                n += 1
            return n / (time.monotonic() - begin)


@pytest.mark.parametrize(
    ("kind", "counter", "limits"),
    [
        ("head", "evict_header", {"HEADER_DEADLINE_S": 1.0}),
        ("stall", "evict_stall", {"STALL_S": 1.0}),
        ("trickle", "evict_slow", {"MIN_RATE_WINDOW_S": 1.0, "STALL_S": 3.0}),
    ],
)
def test_slow_clients_are_closed_while_a_good_one_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, counter: str, limits: dict[str, float]
) -> None:
    use_limits(monkeypatch, tmp_path, **limits)
    with rig(tmp_path) as made:
        small = made.store.add_chunks(content(65536), 65536)[0]
        big = made.store.add_chunks(content(8 << 20, 1), 8 << 20)[0]
        made.publish()
        good = GoodClient(made, small)
        alone = good.rate(MEASURED)
        with slow_clients(kind, made.worker.port, f"/chunks/{big.hex()}", CROWD) as crowd:
            assert crowd.stdout is not None
            assert crowd.stdout.readline() == "connected\n"
            beside = good.rate(MEASURED, lambda: made.worker.count("active") == 1)  # itself
            assert made.worker.count(counter) == CROWD
            if kind != "stall":  # a client that does not even read learns nothing of its end
                assert crowd.stdout.readline() == f"closed {CROWD}\n"
        print(f"{kind}: the good client keeps {beside / alone:.0%} of its speed beside {CROWD} slow ones")


def test_no_descriptors_left_neither_spins_nor_stays(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        data = content(8 << 20)
        digest = made.store.add_chunks(data, len(data))[0]
        small = made.store.add_chunks(content(16384, 1), 16384)[0]
        made.publish()
        GoodClient(made, small).rate(1)
        pid = made.worker.process.pid
        with made.worker.connect() as running:
            running.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            ask(running, f"/chunks/{digest.hex()}")
            wait_until(lambda: made.worker.count("bytes_sent") > 65536, "a transfer runs")
            used = max(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())
            limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 4, limit[1]))
            begin, begin_cpu_s = time.monotonic(), cpu_s(pid)
            crowd = [made.worker.connect() for _ in range(200)]
            wait_until(lambda: made.worker.count("accept_emfile") >= 5, "out of descriptors for a while")
            elapsed_s, used_s = time.monotonic() - begin, cpu_s(pid) - begin_cpu_s
            # One try per pause: a loop that spins makes thousands.
            assert made.worker.count("accept_emfile") <= elapsed_s / ACCEPT_PAUSE_S + 2
            print(f"CPU without descriptors: {used_s / elapsed_s:.1%} of {elapsed_s:.2f} s")
            assert hashlib.sha256(read_response(running)[2]).digest() == digest
        for sock in crowd:
            sock.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        begin = time.monotonic()
        GoodClient(made, small).rate(1)
        print(f"served again after {time.monotonic() - begin:.2f} s")
        wait_until(lambda: made.worker.count("active") == 0, "nobody left")


def test_few_descriptors_from_the_start(tmp_path: Path) -> None:
    """A worker that may have 1,024 descriptors serves 200 connections with as many blobs."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with rig(tmp_path, preexec=few) as made:
        hashes = [made.store.add_chunks(content(100, i), 100)[0] for i in range(200)]
        made.publish()
        socks = [made.worker.connect() for _ in hashes]
        for sock, digest in zip(socks, hashes, strict=True):
            ask(sock, f"/chunks/{digest.hex()}")
        for sock, digest in zip(socks, hashes, strict=True):
            assert hashlib.sha256(read_response(sock)[2]).digest() == digest
            sock.close()
        assert len(os.listdir(f"/proc/{made.worker.process.pid}/fd")) < 1024
