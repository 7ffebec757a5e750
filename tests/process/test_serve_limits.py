"""The upload limit over real workers: the rate, who shares it, and what is not held up by it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.support.serve_rig import BUDGET_S, Rig, content, read_response, rig

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Reader:
    """A thread that reads what a socket gives and counts it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.n = 0
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        buffer = bytearray(1 << 16)
        with contextlib.suppress(OSError):
            while got := self.sock.recv_into(buffer):
                self.n += got

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(BUDGET_S)
        self.sock.close()


def get(made: Rig, worker: int, target: str) -> socket.socket:
    sock = made.workers[worker].connect()
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    return sock


def measure(readers: list[Reader], seconds: float) -> list[float]:
    """Bytes per second of each reader over a window that begins when all have begun."""
    end = time.monotonic() + BUDGET_S
    while any(reader.n == 0 for reader in readers) and time.monotonic() < end:
        readers[0].thread.join(0.01)
    begin, before = time.monotonic(), [reader.n for reader in readers]
    while (passed := time.monotonic() - begin) < seconds:
        readers[0].thread.join(min(seconds - passed, 0.1))
    return [(reader.n - n) / passed for reader, n in zip(readers, before, strict=True)]


def test_two_workers_keep_to_one_rate(tmp_path: Path) -> None:
    rate = 8 * MIB
    with rig(tmp_path, workers=2, max_upload_Bps=rate) as made:
        manifest = made.store.add_file(content(64 * MIB), 1 * MIB)
        made.publish()
        readers = [Reader(get(made, i % 2, f"/files/{manifest.file_hash.hex()}")) for i in range(4)]
        total = sum(measure(readers, 2.5))
        for reader in readers:
            reader.end()
        print(f"limit {rate} B/s, measured {total:.0f} B/s: {100 * total / rate:.2f} %")
        assert 0.8 * rate <= total <= 1.2 * rate


def test_connections_of_one_worker_share_the_rate_evenly(tmp_path: Path) -> None:
    rate = 4 * MIB
    with rig(tmp_path, max_upload_Bps=rate) as made:
        manifest = made.store.add_file(content(32 * MIB), 1 * MIB)
        made.publish()
        readers = [Reader(get(made, 0, f"/files/{manifest.file_hash.hex()}")) for _ in range(8)]
        rates = measure(readers, 2.5)
        for reader in readers:
            reader.end()
        print("shares", [round(8 * r / rate, 3) for r in rates])
        assert min(rates) >= 0.5 * max(rates)
        assert made.worker.count("limit_waits") > 0


def test_answers_from_memory_do_not_wait_for_the_limit(tmp_path: Path) -> None:
    with rig(tmp_path, max_upload_Bps=64 << 10) as made:
        manifest = made.store.add_file(content(4 * MIB), 1 * MIB)
        made.publish()
        readers = [Reader(get(made, 0, f"/files/{manifest.file_hash.hex()}")) for _ in range(4)]
        with made.worker.connect() as sock:
            for target in ("/health", f"/swarm/{manifest.file_hash.hex()}") * 10:
                sock.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                assert read_response(sock)[0] == 200
        assert sum(reader.n for reader in readers) < MIB
        for reader in readers:
            reader.end()


def test_bytes_are_right_under_a_limit_and_dead_waiters_are_forgotten(tmp_path: Path) -> None:
    with rig(tmp_path, max_upload_Bps=16 * MIB) as made:
        data = content(3 * MIB + 77)
        manifest = made.store.add_file(data, 65536)
        made.publish()
        target = f"/files/{manifest.file_hash.hex()}"
        for _ in range(3):
            dying = [get(made, 0, target) for _ in range(10)]
            with get(made, 0, target) as sock:
                for other in dying:
                    other.close()
                assert read_response(sock)[2] == data
                sock.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\nRange: bytes=65000-200000\r\n\r\n".encode() * 2)
                assert read_response(sock)[2] == data[65000:200001]
                assert read_response(sock)[2] == data[65000:200001]
