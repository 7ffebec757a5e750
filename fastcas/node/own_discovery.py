"""What this node itself has, as discovery: a program that asks its own node also learns of its own node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from fastcas.peers.discovery import MetadataHint, PeerHint, StaticDiscovery
from fastcas.store import FileRow

__all__ = ["OwnDiscovery"]


class OwnDiscovery(StaticDiscovery):
    """Hints that name this node, for what it serves.

    Args:
        me: Our hint; None while nothing is served.
        find_file: Returns the row of a file, None where it is not known.
        has_chunk: Whether a chunk is here.
    """

    name = "own"

    def __init__(
        self,
        me: PeerHint | None,
        find_file: Callable[[bytes], Awaitable[FileRow | None]],
        has_chunk: Callable[[bytes], bool],
    ) -> None:
        super().__init__([])
        self._me = me
        self._find_file = find_file
        self._has_chunk = has_chunk

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Yield ourselves if the file is here."""
        if self._me is not None:
            row = await self._find_file(file_hash)
            if row is not None and row.is_complete:
                yield self._me

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Yield ourselves for the chunks that are here."""
        if self._me is not None:
            for digest in hashes:
                if self._has_chunk(digest):
                    yield digest, self._me

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Return what the file is called here."""
        row = await self._find_file(file_hash)
        if row is None or not row.name:
            return []
        return [MetadataHint(row.name, row.size, row.manifest_hash, "own")]
