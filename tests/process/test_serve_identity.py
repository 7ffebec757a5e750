"""Blobs that are registered again: what a worker has open must not outlive what the table says of it."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastcas.serve._engine import Engine
from fastcas.table import ChunkTable
from tests.support.serve_rig import BUDGET_S, content, listener, read_response

CHUNK = 16384
KEYS = [bytes([i]) * 32 for i in range(4)]


class Rig:
    """An engine in this process, the table that it uses, and one blob file."""

    def __init__(self, folder: Path, send_path: str) -> None:
        self.path = folder / "1.blob"
        self.number = 0
        self.tables: list[ChunkTable] = []
        self.listener = listener()
        self.engine = Engine(self.listener.fileno(), lambda flags: None, send_path=send_path)

    def publish(self, chunks: int, **kinds: bool) -> None:
        """Register the file, with its first chunks, in a new table."""
        status = self.path.stat()
        table = ChunkTable(1024, 16, 4096)
        table.put_blob(
            1, os.fsencode(self.path), device=status.st_dev, inode=status.st_ino, size=status.st_size,
            mtime_ns=status.st_mtime_ns, **kinds,
        )  # fmt: skip
        for i in range(chunks):
            table.put_chunk(KEYS[i], 1, i * CHUNK, CHUNK)
        self.number += 1
        self.engine.set_table(table.fd, self.number)
        self.tables.append(table)

    def get(self, key: bytes) -> tuple[int, bytes]:
        """Ask for a chunk; return status and body."""
        with socket.create_connection(self.listener.getsockname(), timeout=BUDGET_S) as sock:
            sock.sendall(f"GET /chunks/{key.hex()} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            end = time.monotonic() + BUDGET_S
            while not select.select([sock], [], [], 0.005)[0]:
                assert time.monotonic() < end, "no answer"
                self.engine.run()
            self.engine.run()
            status, _, body = read_response(sock)
            return status, body

    def close(self) -> None:
        """Close everything."""
        self.engine.close()
        self.listener.close()
        for table in self.tables:
            table.close()


@contextmanager
def rig(folder: Path, send_path: str = "auto") -> Iterator[Rig]:
    made = Rig(folder, send_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("send_path", ["copy", "sendfile"])
def test_chunk_that_was_appended_to_a_mapped_blob_is_served(tmp_path: Path, send_path: str) -> None:
    data = content(2 * CHUNK)
    with rig(tmp_path, send_path) as made:
        made.path.write_bytes(data[:CHUNK])
        made.publish(1)
        assert made.get(KEYS[0]) == (200, data[:CHUNK])
        with made.path.open("ab") as file:
            file.write(data[CHUNK:])
        made.tables[-1].put_chunk(KEYS[1], 1, CHUNK, CHUNK)
        assert made.get(KEYS[1]) == (200, data[CHUNK:])
        assert made.engine.take_events() == []


def test_edited_file_that_is_registered_again_is_not_withdrawn(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        made.path.write_bytes(content(CHUNK, 1))
        made.publish(1, linked=True)
        assert made.get(KEYS[0]) == (200, content(CHUNK, 1))
        made.path.write_bytes(content(CHUNK, 2))
        os.utime(made.path, ns=(1, 1))
        made.publish(1, linked=True)
        time_of_checks = time.monotonic() + 0.11  # an open blob is believed for a tenth of a second
        while time.monotonic() < time_of_checks:
            assert made.get(KEYS[0]) == (200, content(CHUNK, 2))
        assert made.engine.take_events() == []


def test_finished_part_file_is_checked_like_any_linked_file(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        made.path.write_bytes(content(CHUNK))
        made.publish(1, growing=True)
        assert made.get(KEYS[0])[0] == 200
        made.publish(1, linked=True)
        assert made.get(KEYS[0])[0] == 200
        made.path.write_bytes(content(CHUNK, 2))
        os.utime(made.path, ns=(1, 1))
        end = time.monotonic() + BUDGET_S
        while made.get(KEYS[0])[0] == 200:
            assert time.monotonic() < end, "an edited file is still served"
