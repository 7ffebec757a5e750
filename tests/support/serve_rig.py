"""A real worker process on a folder of real blobs, without agent and catalog: what the tests of serving stand on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from fastcas.metadata import Manifest
from fastcas.table import Bucket, Channel, ChunkTable, Counters, GivenBoard, Ring

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 20.0
NODE_ID = "ab" * 20


def wait_until(condition: Callable[[], Any], what: str, budget_s: float = BUDGET_S) -> Any:
    """Return the first true value of `condition`; fail after the budget."""
    end = time.monotonic() + budget_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {budget_s} s: {what}")
        time.sleep(0.005)


def content(size: int, seed: int = 0) -> bytes:
    """Return `size` reproducible bytes."""
    return random.Random(seed).randbytes(size)


def manifest_of(data: bytes, chunk_size: int) -> Manifest:
    """Cut `data`; the midstates are arbitrary, serving does not look at them."""
    hashes = b"".join(hashlib.sha256(data[i : i + chunk_size]).digest() for i in range(0, len(data), chunk_size))
    n = len(hashes) // 32
    return Manifest(hashlib.sha256(data).digest(), len(data), chunk_size, hashes, bytes(32 * max(n - 1, 0)))


class BlobStore:
    """Blobs in a folder and the table that lists them."""

    def __init__(self, folder: Path, *, n_slots: int = 8192) -> None:
        self.folder = folder
        self.table = ChunkTable(n_slots, 256, 1 << 16)
        self.chunks: dict[bytes, bytes] = {}
        self.paths: dict[int, Path] = {}
        self._number = 0

    def add_blob(self, data: bytes, *, linked: bool = False, growing: bool = False, path: Path | None = None) -> int:
        """Write a blob file and list it; return its number."""
        self._number += 1
        if path is None:
            path = self.folder / f"{self._number}.blob"
            path.write_bytes(data)
        st = path.stat()
        self.paths[self._number] = path
        self.table.put_blob(
            self._number, os.fsencode(path), device=st.st_dev, inode=st.st_ino, size=st.st_size,
            mtime_ns=st.st_mtime_ns, linked=linked, growing=growing,
        )  # fmt: skip
        return self._number

    def add_chunks(self, data: bytes, chunk_size: int, **kinds: bool) -> list[bytes]:
        """Store `data` as chunks of one blob; return their hashes."""
        blob = self.add_blob(data, **kinds)
        hashes = []
        for at in range(0, len(data), chunk_size):
            piece = data[at : at + chunk_size]
            digest = hashlib.sha256(piece).digest()
            self.table.put_chunk(digest, blob, at, len(piece))
            self.chunks[digest] = piece
            hashes.append(digest)
        return hashes

    def add_manifest(self, manifest: Manifest) -> int:
        """List a manifest; return its blob number."""
        blob = self.add_blob(manifest.data)
        self.table.put_manifest(manifest.manifest_hash, blob, 0, len(manifest.data))
        return blob

    def add_file(self, data: bytes, chunk_size: int = 16384, **kinds: bool) -> Manifest:
        """Store a whole file: chunks, manifest, file entry."""
        manifest = manifest_of(data, chunk_size)
        if data:
            self.add_chunks(data, chunk_size, **kinds)
        self.add_manifest(manifest)
        self.table.put_file(manifest.file_hash, manifest.manifest_hash)
        return manifest

    def close(self) -> None:
        """Close the table."""
        self.table.close()


def listener(port: int = 0) -> socket.socket:
    """Return a SO_REUSEPORT listener on 127.0.0.1."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(1024)
    return sock


class WorkerProcess:
    """One worker and what its parent shares with it."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        board: GivenBoard,
        index: int = 0,
        send_path: str = "auto",
        counters: Counters,
        preexec: Callable[[], None] | None = None,
        bucket: Bucket | None = None,
        workers: int = 1,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.port: int = sock.getsockname()[1]
        self.counters = counters
        self.index = index
        self.ring = Ring.create(1 << 16)
        self.messages: list[dict[str, Any]] = []
        self.channel, theirs = Channel.pair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastcas.serve", "--channel", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=ROOT, preexec_fn=preexec,
        )  # fmt: skip
        theirs.close()
        self.channel.send(
            {"op": "start", "index": index, "workers": workers, "node_id": NODE_ID,
             "config": {"send_path": send_path, "max_upload": bucket.rate_Bps if bucket else None,
                        "node_label": "test", **(config or {})}},
            [sock.fileno(), counters.fd, self.ring.memfd, self.ring.eventfd, board.fd,
             *([bucket.fd] if bucket else [])],
        )  # fmt: skip
        self.wait_message("ready")

    def wait_message(self, op: str) -> dict[str, Any]:
        """Return the next message of this kind from the worker."""

        def look() -> dict[str, Any] | None:
            received = self.channel.recv()
            if received is not None:
                self.messages.append(received[0])
            return next((m for m in self.messages if m["op"] == op), None)

        message = wait_until(look, f"message {op}")
        self.messages.remove(message)
        return message  # type: ignore[no-any-return]

    def use(self, table: ChunkTable, number: int = 1) -> None:
        """Hand over a table and wait until it is in use."""
        self.channel.send({"op": "table", "number": number}, [table.fd])
        wait_until(lambda: self.count("epoch_table") == number, "table in use")

    def count(self, name: str) -> int:
        """Return one of the worker's counters."""
        return self.counters.get(self.index, name)

    def events(self, op: str) -> list[dict[str, Any]]:
        """Return the events of a kind that came on the ring since the last call for any kind."""
        return [m for m in map(msgpack.unpackb, self.ring.drain()) if m["op"] == op]

    def connect(self) -> socket.socket:
        """Return a client socket with a time limit."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=BUDGET_S)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(BUDGET_S)

    def close(self) -> None:
        """End the worker by closing the channel, and check that it ends by itself."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self.process.poll() is None:
            self.kill()
            raise AssertionError("the worker outlived its parent")
        self.ring.close()


class Rig:
    """A store, a listener per worker on one port, and the workers."""

    def __init__(self, folder: Path, *, workers: int = 1, max_upload_Bps: int = 0, **options: Any) -> None:
        self.store = BlobStore(folder)
        self.board = GivenBoard.create()
        self.counters = Counters.create(max(workers, 1))
        self.bucket = Bucket.create(max_upload_Bps) if max_upload_Bps else None
        first = listener()
        self.sockets = [first, *(listener(first.getsockname()[1]) for _ in range(workers - 1))]
        self.workers = [
            WorkerProcess(
                sock, index=i, board=self.board, counters=self.counters, bucket=self.bucket, workers=workers, **options
            )
            for i, sock in enumerate(self.sockets)
        ]

    @property
    def worker(self) -> WorkerProcess:
        """The first worker."""
        return self.workers[0]

    def publish(self, number: int = 1) -> None:
        """Let all workers use the store's table."""
        for worker in self.workers:
            worker.use(self.store.table, number)

    def close(self) -> None:
        """End everything."""
        for worker in self.workers:
            worker.close()
        for sock in self.sockets:
            sock.close()
        self.store.close()
        self.board.close()
        self.counters.close()
        if self.bucket is not None:
            self.bucket.close()


@contextlib.contextmanager
def rig(folder: Path, **options: Any) -> Iterator[Rig]:
    """A `Rig` that is closed at the end."""
    made = Rig(folder, **options)
    try:
        yield made
    finally:
        made.close()


def read_response(sock: socket.socket, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Read exactly one response; the rest of the stream stays in the socket."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        part = sock.recv(1)
        if not part:
            raise EOFError(f"connection closed after {raw!r}")
        raw += part
    lines = raw.decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    status = int(lines[0].split()[1])
    body = b""
    length = 0 if head or status in (204, 304) else int(fields["content-length"])
    while len(body) < length:
        part = sock.recv(min(length - len(body), 1 << 20))
        if not part:
            raise EOFError(f"connection closed after {len(body)} of {length} B")
        body += part
    return status, fields, body
