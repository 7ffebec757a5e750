"""`P2PChunkDownloader`: single chunks from peers, as the quick reference has it. Needs no other process.

Hashes are 64-hex strings here. The quick reference's methods return None for whatever goes wrong; `fetch_chunk` is
the twin that raises. Connections are kept and used again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastcas.errors import ChunkNotFound, FastCASError, NotFound, PeerBusy, PeerTimeout, UsageError
from fastcas.fetch._receiver import Connection
from fastcas.fetch.receiver import AsyncReceiver, Outcome, error_of
from fastcas.ids import PeerAddr, parse_hash, short
from fastcas.limits import CHUNK_SIZE_MAX, CONNECTIONS_PER_PEER, FETCH_TIMEOUT_S

__all__ = ["P2PChunkDownloader", "resolve"]

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.1  # before another round over the same peers, doubled each time
IDLE_CONNECTIONS_MAX = 64
PARALLEL_MAX = 32


class P2PChunkDownloader:
    """Downloads chunks by hash, each proven before it is returned.

    Args:
        storage_dir: Where a caller keeps what it fetched; nothing is written there by these methods.
        timeout: Budget of one chunk from one peer, seconds.
        max_connections: At most so many at a time to one peer.
    """

    def __init__(
        self,
        storage_dir: str | os.PathLike[str] = ".",
        timeout: float = FETCH_TIMEOUT_S,
        max_connections: int = CONNECTIONS_PER_PEER,
    ) -> None:
        """Remember the settings; threads start with the first download."""
        if timeout <= 0:
            raise UsageError(f"timeout: expected more than 0 s, got {timeout}")
        if max_connections < 1:
            raise UsageError(f"max_connections: expected at least 1, got {max_connections}")
        self.storage_dir = Path(storage_dir)
        self.timeout = timeout
        self.max_connections = max_connections
        self._receiver: AsyncReceiver | None = None
        self._idle: dict[PeerAddr, list[Connection]] = {}
        self._slots: dict[PeerAddr, asyncio.Semaphore] = {}

    # --- the quick reference ---

    async def download_chunk(self, chunk_hash: str, peer_ip: str, peer_port: int) -> bytes | None:
        """Return a chunk from one peer, or None when it does not give the right bytes in time.

        Raises:
            UsageError: The hash or the address is malformed.
        """
        try:
            return await self.fetch_chunk(chunk_hash, peer_ip, peer_port)
        except UsageError:
            raise
        except FastCASError as exc:
            log.info("chunk not downloaded error=%s", exc)
            return None

    async def download_chunks_parallel(
        self, chunk_peers: Mapping[str, Sequence[tuple[str, int]]]
    ) -> dict[str, bytes | None]:
        """Return {hash: bytes or None}; the peers of each chunk are tried in order, all chunks at the same time.

        Raises:
            UsageError: A hash or an address is malformed.
        """
        limit = asyncio.Semaphore(PARALLEL_MAX)

        async def one(chunk_hash: str, peers: Sequence[tuple[str, int]]) -> bytes | None:
            async with limit:
                return await self.download_with_retry(chunk_hash, peers, max_retries=1)

        results = await asyncio.gather(*(one(chunk_hash, peers) for chunk_hash, peers in chunk_peers.items()))
        return dict(zip(chunk_peers, results, strict=True))

    async def download_with_retry(
        self, chunk_hash: str, peers: Sequence[tuple[str, int]], max_retries: int = 3
    ) -> bytes | None:
        """Return a chunk from the first peer that gives it, in at most `max_retries` rounds; None when none does.

        Raises:
            UsageError: The hash or an address is malformed.
        """
        try:
            return await self.fetch_with_retry(chunk_hash, peers, max_retries)
        except UsageError:
            raise
        except FastCASError as exc:
            log.info("chunk not downloaded error=%s", exc)
            return None

    # --- the twins that raise ---

    async def fetch_chunk(self, chunk_hash: str, peer_ip: str, peer_port: int) -> bytes:
        """Return a chunk from one peer, proven.

        Raises:
            UsageError: The hash or the address is malformed.
            ChunkNotFound: The peer does not have it.
            ChunkCorrupt: It sent other bytes.
            PeerTimeout: The budget is spent.
            PeerUnreachable, PeerBusy, RemoteProtocolError: As their names say.
        """
        digest = parse_hash(chunk_hash, "chunk_hash")
        peer = await resolve(peer_ip, peer_port)
        subject = f"chunk {short(digest)}"
        async with self._slot(peer):
            receiver = self._attached()
            idle = self._idle.setdefault(peer, [])
            connection = idle.pop() if idle else receiver.open(peer)
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await receiver.get(
                        connection, f"/chunks/{chunk_hash}", max_length=CHUNK_SIZE_MAX, expected_hash=digest,
                        first_byte_s=self.timeout,
                    )  # fmt: skip
            except TimeoutError:
                connection.close()
                raise PeerTimeout(f"{subject}: {peer}: not complete within {self.timeout:g} s") from None
            except BaseException:
                connection.close()
                raise
            if answer.outcome in (Outcome.OK, Outcome.BUSY, Outcome.NOT_FOUND):
                idle.append(connection)
                self._trim()
            else:
                connection.close()
        if answer.outcome == Outcome.NOT_FOUND:
            raise ChunkNotFound(f"Chunk not found: {subject}: {peer} does not have it")
        if answer.outcome != Outcome.OK:
            raise error_of(answer, subject, peer)
        return answer.body or b""

    async def fetch_with_retry(self, chunk_hash: str, peers: Sequence[tuple[str, int]], max_retries: int = 3) -> bytes:
        """`download_with_retry` that raises. A peer that sent wrong bytes is not asked again.

        Raises:
            UsageError: The hash or an address is malformed, or max_retries < 1.
            ChunkNotFound: No peer gave it; the message says what each did.
        """
        if max_retries < 1:
            raise UsageError(f"max_retries: expected at least 1, got {max_retries}")
        parse_hash(chunk_hash, "chunk_hash")
        left = list(dict.fromkeys(peers))
        did: dict[tuple[str, int], str] = {}
        for attempt in range(max_retries):
            if attempt and left:
                await asyncio.sleep(RETRY_PAUSE_S * 2 ** (attempt - 1))
            for ip, port in list(left):
                try:
                    return await self.fetch_chunk(chunk_hash, ip, port)
                except UsageError:
                    raise
                except FastCASError as exc:
                    did[ip, port] = str(exc)
                    if not exc.retryable or (isinstance(exc, NotFound) and not isinstance(exc, PeerBusy)):
                        left.remove((ip, port))
            if not left:
                break
        reasons = "; ".join(did.values()) if did else "no peer was given"
        raise ChunkNotFound(f"Chunk not found: chunk {short(chunk_hash)}: {reasons}")

    def close(self) -> None:
        """Stop the threads and close every connection. Idempotent; the next download starts them again."""
        receiver, self._receiver = self._receiver, None
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle, self._slots = {}, {}
        if receiver is not None:
            receiver.close()

    def __del__(self) -> None:
        """Stop the threads of a downloader that nobody closed."""
        if getattr(self, "_receiver", None) is not None:
            self.close()

    # --- inside ---

    def _attached(self) -> AsyncReceiver:
        """The receiver of the running loop; one of another loop is closed first."""
        if self._receiver is not None and self._receiver.loop is not asyncio.get_running_loop():
            self.close()
        if self._receiver is None:
            self._receiver = AsyncReceiver()
        return self._receiver

    def _slot(self, peer: PeerAddr) -> asyncio.Semaphore:
        self._attached()
        return self._slots.setdefault(peer, asyncio.Semaphore(self.max_connections))

    def _trim(self) -> None:
        """Keep the number of idle connections bounded, oldest peers first."""
        total = sum(len(connections) for connections in self._idle.values())
        for peer in list(self._idle):
            if total <= IDLE_CONNECTIONS_MAX:
                return
            for connection in self._idle.pop(peer):
                connection.close()
                total -= 1


async def resolve(ip: str, port: int) -> PeerAddr:
    """Return a literal address.

    Raises:
        UsageError: The port is out of range.
        NotFound: The name has no address.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise UsageError(f"peer_port: expected 1..65535, got {port!r}")
    peer = PeerAddr(ip, port)
    if peer.is_literal:
        return peer
    try:
        found = await asyncio.get_running_loop().getaddrinfo(ip, port, type=1)
    except (OSError, UnicodeError) as exc:
        raise NotFound(f"peer {peer}: cannot resolve the name: {exc}") from exc
    return PeerAddr(str(found[0][4][0]), port)
