"""The HTTP client in C (csrc/receiver): threads that fetch, check and write without the GIL."""

import os
from typing import final

from fastcas.metadata import Manifest

_Path = str | bytes | os.PathLike[str]

@final
class Job:
    """One file being fetched: its manifest's arrays and where chunks are written. Copies and duplicates both."""

    def __init__(
        self,
        manifest: Manifest,
        fd: int,
        parity_fd: int = -1,
        *,
        direct_fd: int = -1,
        check_links: bool = True,
        links_alone: bool = False,
    ) -> None:
        """Bind a manifest to a part file.

        Args:
            manifest: At least one chunk.
            fd: The part file; each data chunk is written where it lies in the content.
            parity_fd: Where parity chunk j goes, at j * chunk_size; -1: none are fetched.
            direct_fd: The part file opened with O_DIRECT: whole chunks go past the page cache; -1: through it.
            check_links: Of data chunks, beside their own hashes; half of the hashing. A file's only chunk proves
                its link in any case.
            links_alone: Where a link is checked and holds, the own hash is not computed; half of the hashing, too.
        Raises:
            OSError: The descriptors cannot be duplicated.
            MemoryError: No memory for the arrays.
        """

    def take(self, index: int, fd: int, offset: int, write: bool) -> int:
        """Check a chunk that is on this machine, and write it to its place if `write` and it is right.

        Args:
            index: Chunk number, data first, then parity.
            fd: File that holds the chunk's bytes at `offset`.
        Returns:
            Bits: 1 own hash right, 2 link right, 4 the link was checked (never where content cuts the chunks), 8 the
            link is right and the own hash was not computed; 0 when the file ends early.
        Raises:
            OSError: The read or the write failed.
        Cost: blocks; one read, one pass over the bytes, one write; without the GIL.
        """

@final
class Answer:
    """One finished request. Only the receiver makes them.

    Attributes:
        outcome: `receiver.Outcome`.
        chosen: The peer chose the chunk (`get_next`).
        chunk: Its number; meaningless where the peer named none, and of a request into memory.
        flags: Bits of the check, as of `Job.take`.
        length: Bytes of body that arrived.
        service_us: From being the oldest request of its connection, sent, to its last byte, microseconds.
        connect_us: How long the connection took to open, microseconds.
        detail: Number of the refusal, else errno, else HTTP status.
        body: The bytes of a memory request, or what a corrupt body hashed to.
    """

    outcome: int
    chosen: bool
    chunk: int
    flags: int
    length: int
    service_us: int
    connect_us: int
    detail: int
    body: bytes | None

@final
class Receiver:
    """Threads with an epoll loop each, and one queue of results."""

    def __init__(self, n_threads: int, memory_max: int, connect_s: float, first_byte_s: float, stall_s: float) -> None:
        """Start the threads.

        Args:
            n_threads: 1..64.
            memory_max: Bytes of chunk buffers, all connections together.
            connect_s, first_byte_s, stall_s: Deadlines of csrc/receiver/receiver.h, seconds.
        """

    def close(self) -> None:
        """Stop the threads at once and close every socket. Idempotent."""

    def fileno(self) -> int:
        """Return the eventfd that is readable when results are waiting."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes of chunk buffers that exist at the moment."""

    def times(self) -> list[tuple[float, float, float]]:
        """Return what each thread has spent so far on receiving, hashing and writing, seconds of wall-clock time."""

    def open(self, ip: str, port: int, node_id: str | None = None) -> Connection:
        """Return a connection, which dials when its first request is queued.

        Args:
            ip: Literal address, version 4 or 6.
            port: 1..65535.
            node_id: Ours, sent as `Fastcas-Peer`; 1..64 lower-case hex digits.
        """

    def drain(self) -> dict[int, list[Answer]]:
        """Return all finished requests by listener, those of each oldest first."""

@final
class Connection:
    """One connection to one peer. Requests on it are answered in order.

    Each takes the number of a listener, under which `Receiver.drain` returns its answer.
    """

    def close(self) -> None:
        """Close it; outstanding requests end as cancelled. Idempotent."""

    @property
    def n_received(self) -> int:
        """Bytes of successful answers' bodies received on it so far."""

    def get_chunks(self, listener: int, job: Job, chunks: list[int]) -> None:
        """Ask for chunks by their hashes; their bytes go to the job's file once they are proven.

        Raises:
            IndexError: The file has no such chunk; none was asked for.
        """

    def get_next(self, listener: int, job: Job, target: bytes, first_byte_s: float) -> None:
        """Ask for a chunk that the peer chooses (`/swarm/<hash>/next`)."""

    def get(
        self,
        listener: int,
        target: bytes,
        max_length: int,
        expected_hash: bytes | None = None,
        first_byte_s: float = 0.0,
    ) -> None:
        """Ask for a small body, in memory.

        Args:
            target: Path and query, plain ASCII.
            max_length: A longer Content-Length is refused, bytes.
            expected_hash: What the body must hash to.
            first_byte_s: Deadline for the answer's first byte; 0 = the receiver's.
        """

def rename_noreplace(source: _Path, target: _Path) -> None:
    """Rename, or raise FileExistsError when the target exists (renameat2, RENAME_NOREPLACE)."""
