"""`P2PPeerManager`: the quick reference's way to find peers and to be found, over any `Discovery`.

Hashes are 64-hex strings here. Each forgiving method (`[]`, `False`, `None` when the network does not answer) has a
twin that raises. A malformed hash is the caller's mistake and raises `UsageError` from both.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from fastcas.errors import (
    ChunkNotFound,
    FastCASError,
    ManifestNotFound,
    ManifestUnknown,
    NoPeers,
    UsageError,
)
from fastcas.ids import parse_hash, short
from fastcas.metadata import FileMetadata, Manifest
from fastcas.peers.book import PeerBook
from fastcas.peers.discovery import Discovery, MetadataHint, PeerHint

__all__ = ["ChunkPeer", "P2PPeerManager"]

FIND_DEADLINE_S = 10.0
WANT = 16
MAX_MANIFEST_PEERS = 16

FetchManifest = Callable[[bytes, bytes | None, Sequence[PeerHint]], Awaitable[Manifest | None]]
FindManifest = Callable[[FileMetadata], Awaitable[Manifest | None] | Manifest | None]


@dataclass(frozen=True, slots=True)
class ChunkPeer:
    """A peer as the quick reference shows it: `.node_id`, `.ip`, `.port` (its TCP data port).

    node_id is "" where only the address is known.
    """

    node_id: str
    ip: str
    port: int


class P2PPeerManager:
    """Find and announce through a `Discovery`.

    Args:
        discovery: Where to ask.
        local: Hashes of the chunks that this node holds, for `local_chunks`; called each time.
        book: What is known about peers; a new one without.
        fetch_manifest: `await fetch_manifest(file_hash, manifest_hash or None, peers)` gets a proven manifest from
            one of the peers, or None. Without it `discover_file` finds nothing.
        find_manifest: Returns the manifest that this node holds with exactly a `FileMetadata`'s chunks, or None;
            plain or awaitable. Without it nothing can be published.
        find_deadline_s: Budget of one search, seconds.
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        local: Callable[[], Iterable[bytes]] | None = None,
        book: PeerBook | None = None,
        fetch_manifest: FetchManifest | None = None,
        find_manifest: FindManifest | None = None,
        find_deadline_s: float = FIND_DEADLINE_S,
    ) -> None:
        """Remember who does the work; nothing is sent yet."""
        self.discovery = discovery
        self.book = book if book is not None else PeerBook(time.monotonic)
        self._local = local
        self._fetch_manifest = fetch_manifest
        self._find_manifest = find_manifest
        self._deadline_s = find_deadline_s

    @property
    def local_chunks(self) -> set[str]:
        """Hashes of the chunks that this node holds."""
        return set() if self._local is None else {digest.hex() for digest in self._local()}

    # --- chunks ---

    async def find_peers_with_chunk(self, chunk_hash: str) -> list[ChunkPeer]:
        """Return peers that may have a chunk; empty when none is known.

        Raises:
            UsageError: The hash is malformed.
        """
        return (await self.find_peers_with_chunks([chunk_hash]))[chunk_hash]

    async def fetch_peers_with_chunk(self, chunk_hash: str) -> list[ChunkPeer]:
        """`find_peers_with_chunk` that raises when none is known.

        Raises:
            UsageError: The hash is malformed.
            ChunkNotFound: Nobody announced it, as far as this node can see.
        """
        peers = await self.find_peers_with_chunk(chunk_hash)
        if not peers:
            raise ChunkNotFound(f"chunk {short(chunk_hash)}: no peer has announced it")
        return peers

    async def find_peers_with_chunks(self, chunk_hashes: Sequence[str]) -> dict[str, list[ChunkPeer]]:
        """Return, for every hash asked, the peers that may have it. One batched search, not one per chunk.

        Raises:
            UsageError: A hash is malformed.
        """
        keys = [parse_hash(text, "chunk hash") for text in chunk_hashes]
        found: dict[str, dict[ChunkPeer, None]] = {text: {} for text in chunk_hashes}
        if keys:
            stream = self.discovery.find_chunk_peers(list(dict.fromkeys(keys)), WANT, self._deadline_s)
            async for digest, hint in stream:
                self.book.add(hint)
                found[digest.hex()][_shown(hint)] = None
        return {text: list(peers) for text, peers in found.items()}

    async def fetch_peers_with_chunks(self, chunk_hashes: Sequence[str]) -> dict[str, list[ChunkPeer]]:
        """`find_peers_with_chunks` that raises when a chunk has no known peer.

        Raises:
            UsageError: A hash is malformed.
            ChunkNotFound: Names the first chunks without a peer and how many there are.
        """
        found = await self.find_peers_with_chunks(chunk_hashes)
        missing = [text for text, peers in found.items() if not peers]
        if missing:
            shown = ", ".join(short(text) for text in missing[:4])
            raise ChunkNotFound(f"chunks {shown}: no peer has announced {len(missing)} of {len(found)}")
        return found

    async def register_chunks_in_dht(self, chunk_hashes: Sequence[str]) -> bool:
        """Announce chunks of this node; whether all of them are known to somebody afterwards.

        Raises:
            UsageError: A hash is malformed.
        """
        try:
            return await self.announce_chunks(chunk_hashes) >= len(set(chunk_hashes))
        except UsageError:
            raise
        except FastCASError:
            return False

    async def announce_chunks(self, chunk_hashes: Sequence[str]) -> int:
        """Announce chunks of this node; return how many are known to somebody afterwards.

        Raises:
            UsageError: A hash is malformed.
            NodeUnavailable: The DHT process does not answer.
        """
        keys = sorted({parse_hash(text, "chunk hash") for text in chunk_hashes})
        return await self.discovery.announce_chunks(keys) if keys else 0

    # --- files ---

    async def find_peers_with_file(self, file_hash: str) -> list[ChunkPeer]:
        """Return peers that may have (part of) a file; empty when none is known.

        Raises:
            UsageError: The hash is malformed.
        """
        return [_shown(hint) for hint in await self._file_peers(parse_hash(file_hash, "file hash"))]

    async def fetch_peers_with_file(self, file_hash: str) -> list[ChunkPeer]:
        """`find_peers_with_file` that raises when none is known.

        Raises:
            UsageError: The hash is malformed.
            NoPeers: Nobody announced it, as far as this node can see.
        """
        peers = await self.find_peers_with_file(file_hash)
        if not peers:
            raise NoPeers(f"file {short(file_hash)}: no peer has announced it")
        return peers

    async def publish_file_metadata(self, meta: FileMetadata) -> bool:
        """Publish the manifest that this node holds with exactly these chunks; False when it holds none.

        Raises:
            UsageError: A hash in `meta` is malformed.
        """
        try:
            return await self.announce_file_metadata(meta) > 0
        except UsageError:
            raise
        except FastCASError:
            return False

    async def announce_file_metadata(self, meta: FileMetadata) -> int:
        """`publish_file_metadata` that raises; return how many nodes hold the record.

        Raises:
            UsageError: A hash in `meta` is malformed.
            ManifestUnknown: This node holds no manifest with exactly these chunks; nothing was published.
            NodeUnavailable: The DHT process does not answer.
        """
        for argument, texts in (
            ("file_hash", [meta.file_hash]),
            ("data_chunks", meta.data_chunks),
            ("parity_chunks", meta.parity_chunks),
        ):
            for text in texts:
                parse_hash(text, argument)
        manifest: Manifest | None = None
        if self._find_manifest is not None:
            held = self._find_manifest(meta)
            manifest = held if isinstance(held, Manifest) or held is None else await held
        if manifest is None:
            raise ManifestUnknown(
                f"file {short(meta.file_hash)}: this node holds no manifest with these "
                f"{len(meta.data_chunks)}+{len(meta.parity_chunks)} chunks; nothing was published"
            )
        return await self.discovery.put_metadata(
            manifest.file_hash, meta.original_name, manifest.size, manifest.manifest_hash
        )

    async def discover_file(self, file_hash: str) -> FileMetadata | None:
        """Return what a file consists of, or None when no manifest for it can be had.

        Raises:
            UsageError: The hash is malformed.
        """
        try:
            return await self.fetch_file_metadata(file_hash)
        except UsageError:
            raise
        except FastCASError:
            return None

    async def fetch_file_metadata(self, file_hash: str) -> FileMetadata:
        """`discover_file` that raises. The manifest comes from the swarm and is proven by `fetch_manifest`.

        Raises:
            UsageError: The hash is malformed.
            NoPeers: Nobody announced the file.
            ManifestNotFound: There are peers, but none gave a manifest that holds.
        """
        key = parse_hash(file_hash, "file hash")
        hints = await self.discovery.get_metadata(key, self._deadline_s)
        peers = (await self._file_peers(key))[:MAX_MANIFEST_PEERS]
        if not peers:
            raise NoPeers(f"file {short(file_hash)}: no peer has announced it")
        if self._fetch_manifest is not None:
            by_manifest: dict[bytes | None, MetadataHint | None] = {hint.manifest_hash: hint for hint in hints}
            by_manifest.setdefault(None, None)
            for manifest_hash, hint in by_manifest.items():
                manifest = await self._fetch_manifest(key, manifest_hash, peers)
                if manifest is not None and manifest.file_hash == key:
                    return FileMetadata.from_manifest(manifest, hint.name if hint is not None else file_hash)
        raise ManifestNotFound(
            f"file {short(file_hash)}: none of {len(peers)} peers gave a manifest that holds "
            f"({len(hints)} were announced)"
        )

    async def _file_peers(self, file_hash: bytes) -> list[PeerHint]:
        stream = self.discovery.find_file_peers(file_hash, WANT, self._deadline_s)
        found: dict[PeerHint, None] = {}
        async for hint in stream:
            self.book.add(hint)
            found[hint] = None
        return sorted(found, key=lambda hint: not self.book.is_usable(hint.addr))

    # --- peers ---

    def get_peers_with_capacity(self) -> list[ChunkPeer]:
        """Return the known peers that may be asked now, fastest first."""
        return [ChunkPeer(e.node_id or "", e.addr.ip, e.addr.port) for e in self.book.with_capacity()]

    async def close(self) -> None:
        """Close the discovery; idempotent."""
        await self.discovery.close()


def _shown(hint: PeerHint) -> ChunkPeer:
    return ChunkPeer(hint.node_id or "", hint.ip, hint.port)
