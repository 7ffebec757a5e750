"""What this node itself has, as discovery: a program that asks its own node also learns of its own node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from fastcas.peers.discovery import PeerHint, StaticDiscovery

__all__ = ["OwnDiscovery"]


class OwnDiscovery(StaticDiscovery):
    """Hints that name this node, for what it serves.

    Args:
        me: Our hint; None while nothing is served.
        has_file: Whether a file is complete here.
        has_chunk: Whether a chunk is here.
    """

    name = "own"

    def __init__(
        self, me: PeerHint | None, has_file: Callable[[bytes], Awaitable[bool]], has_chunk: Callable[[bytes], bool]
    ) -> None:
        super().__init__([])
        self._me = me
        self._has_file = has_file
        self._has_chunk = has_chunk

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Yield ourselves if the file is here."""
        if self._me is not None and await self._has_file(file_hash):
            yield self._me

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Yield ourselves for the chunks that are here."""
        if self._me is not None:
            for digest in hashes:
                if self._has_chunk(digest):
                    yield digest, self._me
