"""A real worker whose blobs, clients and tables misbehave: never a wrong length, never a hang, always reported."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.serve_rig import BUDGET_S, Rig, WorkerProcess, content, listener, read_response, rig, wait_until

pytestmark = pytest.mark.slow

BIG = 16 << 20


def ask(sock: socket.socket, target: str) -> None:
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())


def status_of(made: Rig, target: str) -> int:
    with made.worker.connect() as sock:
        ask(sock, target)
        return read_response(sock)[0]


def withdrawals(made: Rig, n: int = 1) -> list[tuple[int, str]]:
    """Wait for n withdraw events."""
    seen: list[tuple[int, str]] = []

    def look() -> bool:
        seen.extend((m["blob"], m["reason"]) for m in made.worker.events("withdraw"))
        return len(seen) >= n

    wait_until(look, "withdraw event")
    return seen


@pytest.mark.parametrize("send_path", ["sendfile", "copy"])
def test_blob_that_shrinks_while_served_closes_and_is_withdrawn(tmp_path: Path, send_path: str) -> None:
    with rig(tmp_path, send_path=send_path) as made:
        data = content(BIG)
        digest = made.store.add_chunks(data, BIG)[0]
        made.publish()
        with made.worker.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            ask(sock, f"/chunks/{digest.hex()}")
            got = sock.recv(1000)
            wait_until(lambda: made.worker.count("bytes_sent") > 0, "sending")
            os.truncate(made.store.paths[1], 4096)
            while part := sock.recv(1 << 20):
                got += part
        body = got.partition(b"\r\n\r\n")[2]
        assert len(body) < BIG
        assert withdrawals(made) == [(1, "short")]
        assert made.worker.count("shortfall") == 1
        assert status_of(made, f"/chunks/{digest.hex()}") == 404


def test_blob_shorter_than_its_extent_is_404(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        first, second = made.store.add_chunks(content(32768), 16384)
        made.publish()
        assert status_of(made, f"/chunks/{second.hex()}") == 200
        os.truncate(made.store.paths[1], 20000)

        def is_refused() -> bool:
            try:
                return status_of(made, f"/chunks/{second.hex()}") == 404
            except EOFError:  # checked less than 100 ms ago: short, and closed
                return False

        wait_until(is_refused, "refused")
        assert status_of(made, f"/chunks/{first.hex()}") == 404
        assert withdrawals(made) == [(1, "short")]


def test_linked_file_that_is_edited_is_withdrawn(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384, linked=True)[0]
        made.publish()
        assert status_of(made, f"/chunks/{digest.hex()}") == 200
        with made.store.paths[1].open("r+b") as f:
            f.write(b"edited")
        wait_until(lambda: status_of(made, f"/chunks/{digest.hex()}") == 404, "withdrawn")
        assert withdrawals(made) == [(1, "changed")]


def test_owned_blob_may_be_touched_and_grow(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384)[0]
        made.publish()
        with made.store.paths[1].open("ab") as f:
            f.write(b"more")
        assert status_of(made, f"/chunks/{digest.hex()}") == 200


@pytest.mark.parametrize("send_path", ["sendfile", "copy"])
@pytest.mark.parametrize("growing", [False, True])
def test_blob_serves_what_came_after_it_was_opened(tmp_path: Path, growing: bool, send_path: str) -> None:
    with rig(tmp_path, send_path=send_path) as made:
        first = made.store.add_chunks(content(16384), 16384, growing=growing)[0]
        made.publish()
        assert status_of(made, f"/chunks/{first.hex()}") == 200
        later = content(16384, 9)
        with made.store.paths[1].open("ab") as f:
            f.write(later)
        digest = hashlib.sha256(later).digest()
        made.store.table.put_chunk(digest, 1, 16384, 16384)
        with made.worker.connect() as sock:
            ask(sock, f"/chunks/{digest.hex()}")
            assert read_response(sock)[2] == later


@pytest.mark.parametrize("send_path", ["sendfile", "copy"])
def test_extents_anywhere_in_a_big_blob_are_served(tmp_path: Path, send_path: str) -> None:
    places = [0, (32 << 20) - 5, (32 << 20) - (16 << 20) + 1, (64 << 20) - 1, (96 << 20) - 70_000, (5 << 30) + 12345]
    with rig(tmp_path, send_path=send_path) as made:
        path = tmp_path / "sparse.blob"
        chunks = {}
        with path.open("wb") as f:
            for i, at in enumerate(places):
                f.seek(at)
                f.write(content(100_000, i))
        blob = made.store.add_blob(b"", path=path)
        for i, at in enumerate(places):
            digest = hashlib.sha256(content(100_000, i)).digest()
            chunks[digest] = i
            made.store.table.put_chunk(digest, blob, at, 100_000)
        made.publish()
        with made.worker.connect() as sock:
            for digest in chunks:
                ask(sock, f"/chunks/{digest.hex()}")
                assert hashlib.sha256(read_response(sock)[2]).digest() == digest


@pytest.mark.parametrize("kind", ["gone", "symlink", "fifo", "directory", "other file"])
def test_blob_replaced_by_something_else_is_not_followed(tmp_path: Path, kind: str) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384)[0]
        path = made.store.paths[1]
        moved = path.with_suffix(".moved")
        path.rename(moved)
        if kind == "symlink":
            path.symlink_to(moved)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "other file":
            path.write_bytes(content(16384))
        made.publish()
        assert status_of(made, f"/chunks/{digest.hex()}") == 404
        ((blob, reason),) = withdrawals(made)
        assert (blob, reason) == (1, "changed" if kind == "other file" else "gone")


def test_withdrawal_is_reported_once_a_second_not_per_request(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384)[0]
        made.store.paths[1].unlink()
        made.publish()
        with made.worker.connect() as sock:
            for _ in range(50):
                ask(sock, f"/chunks/{digest.hex()}")
                assert read_response(sock)[0] == 404
        assert 1 <= len(withdrawals(made)) <= BUDGET_S


def test_file_with_a_missing_chunk_is_404_or_closed_short(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        data = content(200_000)
        manifest = made.store.add_file(data, 16384)
        made.store.table.remove_chunk(manifest.hash_of(5))
        made.publish()
        with made.worker.connect() as sock:
            ask(sock, f"/files/{manifest.file_hash.hex()}")
            with pytest.raises(EOFError):
                read_response(sock)
        made.store.table.remove_chunk(manifest.hash_of(0))
        assert status_of(made, f"/files/{manifest.file_hash.hex()}") == 404


def test_damaged_manifest_is_404(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        manifest = made.store.add_file(content(200_000), 16384)
        with made.store.paths[2].open("r+b") as f:
            f.seek(24)
            f.write(b"\xff\xff\xff\xff")
        made.publish()
        assert status_of(made, f"/files/{manifest.file_hash.hex()}") == 404


def test_killed_clients_leave_nothing_behind(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        data = content(BIG)
        manifest = made.store.add_file(data, 1 << 20)
        made.publish()
        url = f"http://127.0.0.1:{made.worker.port}/files/{manifest.file_hash.hex()}"
        clients = [subprocess.Popen(["curl", "-s", "--limit-rate", "100K", "-o", "/dev/null", url]) for _ in range(5)]
        wait_until(lambda: made.worker.count("active") == 5, "five clients")
        for client in clients:
            client.send_signal(signal.SIGKILL)
            client.wait(BUDGET_S)
        wait_until(lambda: made.worker.count("active") == 0, "all gone")
        with made.worker.connect() as sock:
            ask(sock, f"/files/{manifest.file_hash.hex()}")
            assert read_response(sock)[2] == data


def test_tables_are_swapped_under_load_without_a_failed_request(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        hashes = made.store.add_chunks(content(1 << 20), 16384)
        made.publish()
        failures: list[object] = []
        stop = threading.Event()

        def load(offset: int) -> None:
            with made.worker.connect() as sock:
                i = offset
                while not stop.is_set():
                    digest = hashes[i % len(hashes)]
                    ask(sock, f"/chunks/{digest.hex()}")
                    status, _, body = read_response(sock)
                    if status != 200 or hashlib.sha256(body).digest() != digest:
                        failures.append((status, len(body)))
                    i += 1

        threads = [threading.Thread(target=load, args=(i * 13,)) for i in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in range(2, 42):
                made.publish(number)
                made.store.table.advance()
        finally:
            stop.set()
            for thread in threads:
                thread.join(BUDGET_S)
        assert failures == []
        wait_until(lambda: made.worker.count("epoch_safe") == made.store.table.epoch, "epoch safe")


def test_new_table_with_reused_blob_numbers_serves_the_new_blobs(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with rig(tmp_path / "a") as made, rig(tmp_path / "b", workers=0) as other:
        old = made.store.add_chunks(content(16384, 1), 16384)[0]
        new = other.store.add_chunks(content(16384, 2), 16384)[0]
        made.publish()
        assert status_of(made, f"/chunks/{old.hex()}") == 200
        made.worker.use(other.store.table, 2)
        assert status_of(made, f"/chunks/{old.hex()}") == 404
        with made.worker.connect() as sock:
            ask(sock, f"/chunks/{new.hex()}")
            assert hashlib.sha256(read_response(sock)[2]).digest() == new


def test_removed_blob_is_closed_soon(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384)[0]
        made.publish()
        assert status_of(made, f"/chunks/{digest.hex()}") == 200
        fds = Path(f"/proc/{made.worker.process.pid}/fd")
        open_paths = lambda: {os.readlink(fd) for fd in fds.iterdir() if fd.is_symlink()}  # noqa: E731
        path = str(made.store.paths[1])
        assert path in open_paths()
        made.store.table.remove_chunk(digest)
        made.store.table.remove_blob(1)
        made.store.table.advance()
        wait_until(lambda: path not in open_paths(), "closed")


def test_drain_finishes_and_the_process_ends(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        data = content(BIG)
        manifest = made.store.add_file(data, 1 << 20)
        made.publish()
        with made.worker.connect() as sock:
            ask(sock, f"/files/{manifest.file_hash.hex()}")
            wait_until(lambda: made.worker.count("requests") == 1, "begun")
            made.worker.channel.send({"op": "drain"})
            assert read_response(sock)[2] == data
        made.worker.wait_message("drained")
        assert made.worker.process.wait(BUDGET_S) == 0


def test_worker_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        made.worker.channel.close()
        assert made.worker.process.wait(2) == 0


def test_killed_workers_queue_goes_to_the_replacement(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384)[0]
        made.publish()
        made.worker.process.send_signal(signal.SIGSTOP)
        waiting = [made.worker.connect() for _ in range(20)]
        for sock in waiting:
            ask(sock, f"/chunks/{digest.hex()}")
        made.worker.kill()
        replacement = WorkerProcess(made.sockets[0], board=made.board, counters=made.counters)
        made.workers.append(replacement)
        replacement.use(made.store.table, 1)
        for sock in waiting:
            assert hashlib.sha256(read_response(sock)[2]).digest() == digest
            sock.close()


def test_messages_that_make_no_sense_are_survived(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        digest = made.store.add_chunks(content(16384), 16384)[0]
        made.publish()
        for message in ({"op": "unknown"}, {"op": "table"}, {"op": "have"}, {}, {"op": "start"}):
            made.worker.channel.send(message)
        made.worker.channel.send({"op": "table", "number": 7}, [made.counters.fd])
        made.worker.channel.send({"op": "swarm"}, [made.counters.fd])
        made.publish(2)
        assert status_of(made, f"/chunks/{digest.hex()}") == 200
        assert made.worker.process.poll() is None


def test_worker_refuses_a_channel_that_is_none() -> None:
    with listener() as sock:
        done = subprocess.run(
            [sys.executable, "-m", "fastcas.serve", "--channel", str(sock.fileno())],
            pass_fds=[sock.fileno()], capture_output=True, text=True, timeout=BUDGET_S,
        )  # fmt: skip
    assert done.returncode != 0
    assert "not a local packet socket" in done.stderr
