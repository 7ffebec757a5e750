"""gc and what a worker has sent with sendfile but nobody has read yet: the bytes must not turn into zeros."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastcas.store import Store, maintain

UNIT = 16384


def test_bytes_in_a_sockets_queue_survive_the_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keep").write_bytes(keep := os.urandom(2 * UNIT))
    (tmp_path / "both").write_bytes(keep + os.urandom(4 * UNIT))
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = socket.create_connection(server.getsockname(), timeout=20)
        worker, _ = server.accept()
    store = Store.open(tmp_path / "s", create=True)
    sent: list[bytes] = []
    got: list[bytes] = []

    def read_all(_: float = 0.0) -> None:
        while sum(map(len, got)) < len(sent[0]):
            got.append(reader.recv(1 << 20))

    def barrier() -> None:
        (blob,) = (tmp_path / "s" / "hashed_files").rglob("*.blob")
        sent.append(blob.read_bytes()[2 * UNIT : 6 * UNIT])
        with blob.open("rb") as file:
            assert os.sendfile(worker.fileno(), file.fileno(), 2 * UNIT, 4 * UNIT) == 4 * UNIT

    try:
        first = store.store_file(tmp_path / "both", chunk_size=UNIT)
        store.store_file(tmp_path / "keep", chunk_size=UNIT)
        store.remove(bytes.fromhex(first.file_hash))
        monkeypatch.setattr(maintain.time, "sleep", read_all)  # the client reads while gc waits
        report = store.gc(barrier)
        read_all()
    finally:
        store.close()
        worker.close()
        reader.close()
    assert report.holes_punched == 1
    assert b"".join(got) == sent[0]
    assert any(sent[0])
