"""The serve engine: one worker's HTTP connections on one listener (csrc/engine/engine.h).

An epoll instance of its own holds the listener and all connections; `fileno()` is what the event loop watches.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, final

PARKED: int
EVENTS: int
DRAINED: int
SEND_PATHS: tuple[str, ...]
OWN_PREFIXES_MAX: int
WITHDRAW_REASONS: tuple[str, ...]

class Parked(NamedTuple):
    """A request that Python answers.

    Attributes:
        handle: For `respond` and `respond_chunk`; never reused.
        is_head: HEAD: the engine leaves the body out by itself.
        ip: Source address, text.
        port: Source port.
        path: As on the wire, at most 1,024 B, characters of RFC 3986.
        query: Without '?', still percent-encoded.
        peer: Value of Fastcas-Peer, or empty.
    """

    handle: int
    is_head: bool
    ip: str
    port: int
    path: bytes
    query: bytes
    peer: bytes

class Withdrawn(NamedTuple):
    """A blob whose extents cannot be served; reason: "gone", "changed", "short" or "unreadable"."""

    blob: int
    reason: str

class Sent(NamedTuple):
    """The end of a `respond_chunk` with notify; ok: the last byte was written to the socket."""

    handle: int
    ok: bool

class Gone(NamedTuple):
    """A parked request's connection died."""

    handle: int

@final
class Engine:
    """One worker's connections. One thread at a time; `run` and `tick` release the GIL."""

    def __init__(
        self,
        listener_fd: int,
        on_flags: Callable[[int], None],
        *,
        counters_fd: int = -1,
        counter_slot: int = 0,
        send_path: str = "auto",
        copy_max: int = ...,
        max_connections: int = ...,
        max_cached: int = ...,
        max_parked: int = ...,
        header_s: float = ...,
        idle_s: float = ...,
        stall_s: float = ...,
        min_rate_Bps: int = ...,
        bucket_fd: int = -1,
        upload_slots: int = 0,
        max_per_source: int = 0,
        own_prefixes: Iterable[str] = (),
        min_rate_window_s: float = ...,
        accept_pause_s: float = ...,
        max_events: int = ...,
    ) -> None:
        """Serve a listening TCP socket.

        Args:
            listener_fd: Borrowed, and made non-blocking; must stay open.
            on_flags: Called by `run` and `tick` when there is something to take: bits PARKED, EVENTS, DRAINED.
            counters_fd: Counters memfd, borrowed; -1 = count nothing.
            counter_slot: This worker's slot there.
            send_path: "auto", "sendfile" or "copy".
            copy_max: auto: longest body sent from the mapping, bytes; longer ones by sendfile.
            max_connections: More are answered 503 and closed.
            max_cached: Blob windows kept open while nobody uses them.
            max_parked: Parked requests at once; more are answered 503.
            header_s: Absolute deadline of a request's header.
            idle_s: Keep-alive.
            stall_s: Sending without progress.
            min_rate_Bps: Averaged over min_rate_window_s; slower connections are reset. 0 = none.
            min_rate_window_s: See above.
            bucket_fd: Upload limit shared with other engines (`Bucket`), borrowed; -1 = none.
            upload_slots: Chunks sent at once for requests with Fastcas-Peer, at most 64; further ones wait, or are told
                "busy" when too much waits. 0 = no such rules.
            max_per_source: Connections of one IPv4 address or IPv6 /64, more get 503 and are closed; 0 = any number.
            own_prefixes: At most 16 networks ("10.0.0.0/8") that, like loopback, are exempt from max_per_source.
            accept_pause_s: After running out of file descriptors.
            max_events: Socket events that one `run` handles, about.
        Raises:
            UsageError: A limit out of range, an unknown send path, no such counter slot.
            LocalProtocolError: counters_fd is no counters memfd, or bucket_fd no bucket.
            OSError: The kernel refused; nothing is left open.
        """
    def close(self) -> None:
        """Close all connections and blobs. Idempotent."""
    def fileno(self) -> int:
        """Return the epoll descriptor: `loop.add_reader(engine.fileno(), engine.run)`."""
    def run(self) -> None:
        """Serve what is ready, then call on_flags if there is something to take. Never waits. hot"""
    def tick(self) -> None:
        """Deadlines, epoch, heartbeat, counters; call it about four times a second."""
    def set_table(self, fd: int, number: int) -> None:
        """Answer from this chunk table from now on; fd is borrowed. With the first one, accepting begins.

        Raises:
            LocalProtocolError: Not a table of this version; the one in use stays.
            OSError: The kernel refused; the one in use stays.
        """
    def drain(self) -> None:
        """Stop accepting, end each connection with its next response or after a second of idleness."""
    def take_parked(self) -> list[Parked]:
        """Return the parked requests that were not taken yet, oldest first."""
    def take_events(self) -> list[Withdrawn | Sent | Gone]:
        """Return what happened since the last call, oldest first."""
    def respond(self, handle: int, status: int, fields: bytes = b"", body: bytes = b"") -> bool:
        """Answer a parked request; False when it is answered already or its connection is gone.

        Args:
            fields: Complete header lines with CRLF each. Content-Length and Connection are added.
        Raises:
            UsageError: More than 2 KiB of fields, 2 GiB of body.
            MemoryError: The request stays parked.
        """
    def respond_chunk(
        self, handle: int, chunk_hash: bytes, fields: bytes = b"", *, notify: bool = False
    ) -> bool | None:
        """Answer a parked request with a chunk of the table.

        Args:
            notify: Report the end as a `Sent` event, exactly once.
        Returns:
            True; False when the chunk cannot be served (the request stays parked); None for a stale handle.
        Raises:
            UsageError: More than 2 KiB of fields.
        """
    def lookup_file(self, file_hash: bytes) -> bytes | None:
        """Return the manifest hash of a complete file."""
    def manifest_length(self, manifest_hash: bytes) -> int | None:
        """Return a manifest's length in bytes."""
    def read_manifest(self, manifest_hash: bytes, offset: int, length: int) -> bytes | None:
        """Return a part of a manifest, None if it is not here or the part lies outside it."""
    def have(self, keys: bytes) -> bytes:
        """Return one byte per 32-byte key: 1 if the chunk is here, else 0. Cost: about 0.2 µs a key, no GIL."""
    def statistics(self) -> dict[str, int]:
        """Return connections, sending, parked, cached, inputs, in_flight, table_number, conn_size."""
