"""System calls of a real worker that fail or do little: right bytes or a closed connection, no wrong byte, no hang.

strace injects what leaves no bytes behind (an error, or 0). A short transfer has to move what it claims, which strace
cannot do: those come from a preloaded library.
"""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest

from tests.support.serve_faults import injected, use_limits, use_short_io
from tests.support.serve_rig import Rig, content, read_response, rig, wait_until

pytestmark = pytest.mark.slow

SIZE = 1 << 20
N_REQUESTS = 6


def ask(sock: socket.socket, target: str) -> None:
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())


def download(made: Rig, digest: bytes) -> bytes | None:
    """Fetch one chunk on a new connection: its bytes, or None when the connection was closed; wrong bytes fail."""
    want = made.store.chunks[digest]
    with made.worker.connect() as sock:
        ask(sock, f"/chunks/{digest.hex()}")
        got = b""
        try:
            while b"\r\n\r\n" not in got or len(got) - got.index(b"\r\n\r\n") - 4 < len(want):
                part = sock.recv(1 << 20)
                if not part:
                    break
                got += part
        except ConnectionResetError:
            pass
    head, _, body = got.partition(b"\r\n\r\n")
    assert not head or (b"HTTP/1.1 200 OK\r\n".startswith(head[:17]) or head.startswith(b"HTTP/1.1 404 "))
    if head.startswith(b"HTTP/1.1 404 "):
        return None
    assert body == want[: len(body)], "a wrong byte"
    return body if len(body) == len(want) else None


FAULTS = [
    (send_path, call, f"error={error}:when={when}", survives)
    for send_path, call in (("sendfile", "sendfile"), ("copy", "sendmsg"))
    for error, when, survives in (
        ("EINTR", "2+3", True), ("EAGAIN", "2", False), ("EIO", "2+3", False), ("ENOMEM", "2+3", False),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("send_path", "call", "fault", "survives"), [*FAULTS, ("sendfile", "sendfile", "retval=0:when=2+3", False)]
)
def test_failing_send_never_gives_a_wrong_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send_path: str, call: str, fault: str, survives: bool
) -> None:
    # The kernel says EAGAIN only where an edge follows; the one injected here ends with the stall deadline.
    use_limits(monkeypatch, tmp_path, STALL_S=0.5)
    with rig(tmp_path, send_path=send_path) as made:
        hashes = made.store.add_chunks(content(SIZE), SIZE // 4)
        made.publish()
        with injected(made.worker.process.pid, tmp_path / "trace", f"{call}:{fault}"):
            results = [download(made, hashes[i % 4]) for i in range(N_REQUESTS)]
        text = (tmp_path / "trace").read_text()
        assert "INJECTED" in text
        if survives:
            assert None not in results
        else:
            assert None in results
        wait_until(lambda: made.worker.count("active") == 0, "all connections gone")
        made.publish(2)  # a blob that could not be read was withdrawn; a new table lists it again
        assert all(download(made, digest) is not None for digest in hashes)


def test_unreadable_disk_is_reported(tmp_path: Path) -> None:
    with rig(tmp_path, send_path="sendfile") as made:
        digest = made.store.add_chunks(content(SIZE), SIZE)[0]
        made.publish()
        with injected(made.worker.process.pid, tmp_path / "trace", "sendfile:error=EIO"):
            assert download(made, digest) is None
        events = wait_until(lambda: made.worker.events("withdraw"), "withdrawal")
        assert [(event["blob"], event["reason"]) for event in events] == [(1, "unreadable")]


@pytest.mark.parametrize("error", ["EMFILE", "ECONNABORTED", "EINTR", "EPERM"])
def test_failing_accept_does_not_end_serving(tmp_path: Path, error: str) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(SIZE), SIZE)[0]
        made.publish()
        with injected(made.worker.process.pid, tmp_path / "trace", f"accept4:error={error}:when=1+3"):
            # a connection that met the fault may be dropped, the next ones are served
            assert any(download(made, digest) is not None for _ in range(4))
        assert "INJECTED" in (tmp_path / "trace").read_text()
        assert download(made, digest) is not None


@pytest.mark.parametrize("send_path", ["sendfile", "copy"])
def test_short_and_interrupted_transfers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send_path: str
) -> None:
    use_short_io(monkeypatch, tmp_path, short=700, eintr=200, seed=1)
    with rig(tmp_path, send_path=send_path) as made:
        monkeypatch.delenv("LD_PRELOAD")
        manifest = made.store.add_file(content(300_000), 16384)
        made.publish()
        with made.worker.connect() as sock:
            for digest in made.store.chunks:
                ask(sock, f"/chunks/{digest.hex()}")
            for digest in made.store.chunks:
                assert hashlib.sha256(read_response(sock)[2]).digest() == digest
            for _ in range(3):
                ask(sock, f"/files/{manifest.file_hash.hex()}")
                assert hashlib.sha256(read_response(sock)[2]).digest() == manifest.file_hash
        assert made.worker.count("accepted") == 1
