"""What a download takes, reports and returns; `download` is the whole flow for a link."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from fastcas import limits
from fastcas.fetch.explain import Explained
from fastcas.fetch.origin import parse_origin
from fastcas.fetch.pacing import Pace
from fastcas.ids import Link, PeerAddr
from fastcas.metadata import Manifest

if TYPE_CHECKING:
    from fastcas.fetch.choosing import Choice, Chosen
    from fastcas.fetch.seeds import SeedFiles
    from fastcas.peers.discovery import Discovery
    from fastcas.store.collection import Collection
    from fastcas.store.types import Identity

__all__ = ["DownloadHooks", "DownloadResult", "FetchedTree", "LocalChunks", "Progress", "Settings", "download"]


class LocalChunks(Protocol):
    """Chunks that are on this machine already."""

    def open_extent(self, chunk_hash: bytes) -> tuple[int, int, int] | None:
        """Return (fd, offset, length) of a chunk, or None. The fd stays the provider's, valid until the next call."""


@dataclass(frozen=True)
class FetchedTree:
    """A collection whose folder is at its place.

    Attributes:
        path: The folder.
        name: What the collection is called.
        collection: What it lists.
        manifest: Of the collection's content.
        members: By manifest hash, of packs and large files, as far as they are known.
        identities: By path, of the large files as they were when they were proven.
    """

    path: Path
    name: str
    collection: Collection
    manifest: Manifest
    members: Mapping[bytes, Manifest]
    identities: Mapping[str, Identity]


class DownloadHooks(Protocol):
    """Called in the loop's thread while a download runs."""

    def on_manifest(self, manifest: Manifest, part_path: Path) -> None:
        """The manifest is known and the part file exists."""

    def on_chunk(self, index: int) -> None:
        """Chunk `index` is in the part file, checked against its own hash."""

    def on_finished(self, path: Path, manifest: Manifest, content_proven: bool) -> None:
        """The file is at its place; `content_proven`: every link was checked. Not called for a collection.

        Without hooks, links are not checked where a link names the manifest: nobody asks.
        """

    def on_tree(self, tree: FetchedTree) -> None:
        """A collection's folder is at its place, whole."""

    def member(self) -> DownloadHooks:
        """Return the hooks for one file of a collection: several are fetched at once."""

    def end(self) -> None:
        """No more of this file comes: of a collection's file, and of its own content when its folder is there."""


@dataclass(frozen=True)
class Progress:
    """A moment of a download.

    Attributes:
        bytes_done: Proven bytes in the part file.
        bytes_total: Size of the file; 0 while unknown.
        rate_Bps: From peers, over the last seconds.
        peers: That can be asked at the moment.
        waiting_on: What it waits for, "" while bytes flow.
    """

    bytes_done: int
    bytes_total: int
    rate_Bps: float
    peers: int
    waiting_on: str


@dataclass
class DownloadResult:
    """A finished download.

    Attributes:
        path: The file (or folder, for a collection).
        resumed_bytes: Found in an earlier part file. local_bytes: Taken from this machine: its store, seed files.
        banned: Peers that lied or broke the protocol, with the reason.
        bytes_by_origin: By URL. failed_origins: By URL, why one is not asked any more.
        explained: What limited it.
        chosen: Of a collection of which not everything was wanted.
    """

    path: Path
    file_hash: bytes
    manifest: Manifest
    size: int
    seconds: float
    bytes_by_peer: dict[PeerAddr, int] = field(default_factory=dict)
    resumed_bytes: int = 0
    local_bytes: int = 0
    banned: dict[PeerAddr, str] = field(default_factory=dict)
    bytes_by_origin: dict[str, int] = field(default_factory=dict)
    failed_origins: dict[str, str] = field(default_factory=dict)
    explained: Explained = field(default_factory=Explained)
    chosen: Chosen | None = None


@dataclass
class Settings:
    """What a download was asked to do; see `download`."""

    discovery: Discovery | None = None
    peers: Sequence[PeerAddr] = ()
    local: LocalChunks | None = None
    node_id: str | None = None
    data_port: int | None = None
    timeout_s: float = limits.FETCH_TIMEOUT_S
    stall_timeout_s: float = limits.STALL_TIMEOUT_S
    hooks: DownloadHooks | None = None
    progress: Callable[[Progress], None] | None = None
    trust_resume: bool = False
    force: bool = False
    raw: bool = False
    folder: Path | None = None
    callers: Callable[[bytes], Iterable[tuple[str, str, int]]] | None = None
    origins: Sequence[str] = ()
    pace: Pace | None = None
    known: Sequence[Manifest] = ()
    reserve: Callable[[Manifest, Collection | None], Awaitable[None]] | None = None
    seeds: SeedFiles | None = None
    choice: Choice | None = None
    is_part_of_tree: bool = False  # what is fetched must be a collection
    wanted: Callable[[Manifest], int] | None = None  # the chunk set that is needed of a file
    is_busy: Callable[[], bool] | None = None

    def origins_of_file(self) -> list[str]:
        """Return the origins that name a file; the others name a collection's folder."""
        return [url for url in self.origins if not url.endswith("/")]

    def origins_of_member(self, path: str) -> list[str]:
        """Return where the origins that name a collection's folder have one of its files."""
        return [url + quote(path) for url in self.origins if url.endswith("/")]


async def download(
    link: Link,
    out: Path | None,
    *,
    discovery: Discovery | None,
    peers: Sequence[PeerAddr] = (),
    local: LocalChunks | None = None,
    node_id: str | None = None,
    data_port: int | None = None,
    timeout_s: float = limits.FETCH_TIMEOUT_S,
    stall_timeout_s: float = limits.STALL_TIMEOUT_S,
    hooks: DownloadHooks | None = None,
    progress: Callable[[Progress], None] | None = None,
    trust_resume: bool = False,
    force: bool = False,
    raw: bool = False,
    folder: Path | None = None,
    callers: Callable[[bytes], Iterable[tuple[str, str, int]]] | None = None,
    origins: Sequence[str] = (),
    pace: Pace | None = None,
    known: Sequence[Manifest] = (),
    reserve: Callable[[Manifest, Collection | None], Awaitable[None]] | None = None,
    seed_from: Sequence[Path] = (),
    choice: Choice | None = None,
    is_busy: Callable[[], bool] | None = None,
) -> DownloadResult:
    """Fetch a file from everybody who has it, prove it, and put it at its place.

    Args:
        link: File hash, and what helps: manifest hash, peers, name; with a path, that file of the collection.
        out: File to create; None = the stored name, made safe, in `folder` (the current one by default).
        discovery: How to find more peers; None = only those of `link` and `peers`.
        peers: That the user named; their addresses are not filtered, their manifests trusted for scheduling.
        local: Chunks of this machine, taken first, with the same checks.
        node_id, data_port: Ours, if we serve: told to the peers.
        timeout_s: Bounds the wait for the first peer and the manifest, seconds.
        stall_timeout_s: With less than 4 KiB/s from everybody together, and no chunk, for so long, the download ends.
        hooks, progress: Called in the loop's thread.
        trust_resume: Do not hash again what the journal lists (of the same boot).
        force: Replace a destination with other content.
        raw: A collection is an ordinary file.
        callers: Returns [(node_id, ip, port)] of those who asked our own workers for a file: they may have part of it.
        origins: URLs of HTTP servers that have the file, for chunks that no peer has; one that ends with "/" has a
            collection's files at their paths.
        pace: Limit of the rate, all peers and origins together.
        known: Manifests that this machine has of the file: used where nobody gives one.
        reserve: Awaited before the bytes of a file, or (then with it) the files of a collection are fetched; what it
            raises ends the download.
        seed_from: Files and folders in which chunks may lie; peers are asked for the rest once they were looked at.
        choice: Which files of the collection; None: all.
        is_busy: Whether others wait for our own uplink: seeds are not asked for what is new meanwhile.
    Returns:
        The result; for a collection, of the folder.
    Raises:
        UsageError: An origin is no http or https URL, or something is to be chosen of a file that is no collection.
        NotFound: The collection has no file at the link's path, or none that is chosen; nothing of it was fetched.
        NoPeers: Nobody has the file, or no manifest, within `timeout_s`.
        ChunkNotFound: Nobody is left who has what is missing; the part file is kept.
        Stalled: Next to nothing came for `stall_timeout_s`; the part file is kept.
        ManifestCorrupt: The manifest contradicts the content or itself.
        DestinationExists: The destination has other content; nothing was fetched.
        StoreFull, PermissionDenied, StoreLocked, StoreError: The disk refuses; the part file is kept.
    """
    from fastcas.fetch.filefetch import FileFetch
    from fastcas.fetch.receiver import AsyncReceiver

    seeds = None
    if seed_from:
        from fastcas.fetch.seeds import SeedFiles

        seeds = SeedFiles(seed_from)
    settings = Settings(
        discovery, tuple(peers), local, node_id, data_port, timeout_s, stall_timeout_s, hooks, progress,
        trust_resume, force, raw, folder, callers, [parse_origin(url, "origin") for url in origins], pace, known,
        reserve, seeds, choice, choice is not None, is_busy=is_busy,
    )  # fmt: skip

    receiver = AsyncReceiver()
    try:
        if link.path is not None:
            from fastcas.fetch.member import fetch_member

            return await fetch_member(link, link.path, out, settings, receiver)
        fetch = FileFetch(link, out, settings, receiver)
        result = await fetch.run()
        if fetch.is_collection:
            from fastcas.fetch.tree import fetch_tree

            return await fetch_tree(fetch, result)
        return result
    finally:
        receiver.close()
