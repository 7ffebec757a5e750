"""`P2PClient`: fetch files in the caller's own process, serving nothing (quick reference).

Owns a DHT process in client mode where bootstrap nodes are given, or a link names some and nobody else can be asked,
and a chunk downloader. `download_file` returns None when it cannot; `fetch_file` is the twin that raises.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastcas.errors import FastCASError, ManifestNotFound, NetworkError, UsageError
from fastcas.fetch.download import DownloadResult, LocalChunks, Progress, download
from fastcas.fetch.downloader import P2PChunkDownloader
from fastcas.fetch.manifests import find_manifest
from fastcas.fetch.pacing import Pace
from fastcas.ids import Link, PeerAddr, parse_member, parse_peer, parse_rate
from fastcas.limits import FETCH_TIMEOUT_S, STALL_TIMEOUT_S
from fastcas.metadata import Manifest
from fastcas.peers.dht_process import DhtProcess
from fastcas.peers.discovery import CompositeDiscovery, Discovery, PeerHint, StaticDiscovery
from fastcas.peers.manager import P2PPeerManager

__all__ = ["P2PClient"]

log = logging.getLogger(__name__)


class P2PClient:
    """A download-only client.

    Args:
        dht_bootstrap_nodes: (host, UDP port) of DHT nodes; none: only `peers` are asked.
        download_dir: Where files go that are given no path.
        peers: Data ports that are always asked: (host, port), "host:port" or PeerAddr.
        local: Chunks of this machine, taken before any peer is asked.
        discovery: Where to ask instead of a DHT process of our own.
        timeout_s: Bounds the wait for the first peer and the manifest, seconds.
        stall_timeout_s: Without a byte from anybody for so long, a download ends.
        network_key: Of a private DHT.
    """

    def __init__(
        self,
        dht_bootstrap_nodes: Sequence[tuple[str, int]] = (),
        download_dir: str | os.PathLike[str] = "downloads",
        *,
        peers: Sequence[PeerAddr | tuple[str, int] | str] = (),
        local: LocalChunks | None = None,
        discovery: Discovery | None = None,
        timeout_s: float = FETCH_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        network_key: bytes | None = None,
    ) -> None:
        """Check the arguments; nothing runs before `initialize`."""
        self.download_dir = Path(download_dir)
        self.peers = tuple(_peer(entry) for entry in peers)
        self._bootstrap = [(str(host), int(port)) for host, port in dht_bootstrap_nodes]
        self._local = local
        self._given = discovery
        self._timeout_s = timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._network_key = network_key
        self._dht: DhtProcess | None = None
        self._starting = asyncio.Lock()
        self._discovery: Discovery = StaticDiscovery(self.peers)
        self.downloader = P2PChunkDownloader(self.download_dir, timeout=timeout_s)
        self.peer_manager = P2PPeerManager(self._discovery, fetch_manifest=self._manifest)

    async def __aenter__(self) -> P2PClient:
        """Initialize."""
        await self.initialize()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Shut down."""
        await self.shutdown()

    async def initialize(self) -> None:
        """Join the DHT where bootstrap nodes are given. A second call does nothing.

        Raises:
            NetworkError: "DHT bootstrap failed": no bootstrap node answered, and there are no static peers.
        """
        if self._dht is not None or isinstance(self._discovery, CompositeDiscovery):
            return
        await self._join(self._bootstrap)

    async def _join(self, bootstrap: Sequence[tuple[str, int]]) -> None:
        """Start a DHT process where there are bootstrap nodes, and ask it and everybody who was given."""
        backends: list[Discovery] = [StaticDiscovery(self.peers)] if self.peers else []
        if self._given is not None:
            backends.append(self._given)
        if bootstrap:
            dht = DhtProcess(bootstrap, network_key=self._network_key)
            try:
                await dht.start()
                dht.require_contacts()
            except NetworkError as exc:
                if not self.peers and self._given is None:
                    await dht.close()
                    raise
                log.warning("%s", exc)
            if dht.is_alive:
                self._dht = dht
                backends.append(dht.discovery)
            else:
                await dht.close()
        if backends:
            self._discovery = CompositeDiscovery(backends)
            self.peer_manager = P2PPeerManager(self._discovery, fetch_manifest=self._manifest)

    @asynccontextmanager
    async def _joined_through(self, link: Link) -> AsyncIterator[None]:
        """Use the DHT nodes that a link names: beside those that we know, or where nobody else can be asked.

        Raises:
            NetworkError: "DHT bootstrap failed": none of them answered, and there is nobody else.
        """
        where = [(peer.ip, peer.port) for peer in link.dht]
        joining: asyncio.Task[int] | None = None
        async with self._starting:
            if where and self._dht is not None:
                joining = asyncio.ensure_future(self._dht.discovery.bootstrap(where))
            elif where and not self.peers and not link.peers and self._given is None:
                await self._join(where)
        try:
            yield
        finally:
            if joining is not None:
                joining.cancel()
                with suppress(FastCASError, asyncio.CancelledError):
                    await joining

    async def download_file(
        self,
        file_hash: str,
        out: str | os.PathLike[str] | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        force: bool = False,
        origins: Sequence[str] = (),
        max_download: int | str | None = None,
    ) -> Path | None:
        """Fetch a file; returns its path, or None when that failed (the reason is logged).

        Cancelling it ends the download; the part file is kept, and the next call goes on from there.

        Args:
            file_hash: 64 hex digits, or a fastcas:// link; followed by /path: that file of a collection.
            out: File to create; None: the stored name in `download_dir`.
            progress: Called a few times a second.
            force: Replace a destination with other content.
            origins: URLs of HTTP servers that have the file, for chunks that no peer has.
            max_download: Limit of the rate, bytes per second or text such as "10M".
        Raises:
            UsageError: The hash or link is malformed.
        """
        try:
            result = await self.fetch_file(
                file_hash, out, progress=progress, force=force, origins=origins, max_download=max_download
            )
            return result.path
        except UsageError:
            raise
        except FastCASError as exc:
            log.error("file not downloaded: %s", exc)
            return None

    async def fetch_file(
        self,
        ref: str | Link,
        out: str | os.PathLike[str] | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        force: bool = False,
        raw: bool = False,
        trust_resume: bool = False,
        origins: Sequence[str] = (),
        max_download: int | str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> DownloadResult:
        """`download_file` that raises; arguments and errors as `fastcas.fetch.download`.

        Args:
            include, exclude: Patterns for the files of a collection, as in `fastcas.fetch.choosing`; without: all.
        """
        link = parse_member(ref) if isinstance(ref, str) else ref
        choice = None
        if include or exclude:
            from fastcas.fetch.choosing import Choice

            choice = Choice(include, exclude)
        target = Path(out) if out is not None else None
        async with self._joined_through(link):
            return await download(
                link,
                target,
                discovery=self._discovery if self._dht is not None or self._given is not None else None,
                peers=self.peers,
                local=self._local,
                timeout_s=self._timeout_s,
                stall_timeout_s=self._stall_timeout_s,
                progress=progress,
                trust_resume=trust_resume,
                force=force,
                raw=raw,
                folder=self.download_dir,
                origins=origins,
                pace=Pace(parse_rate(str(max_download), "max_download")) if max_download is not None else None,
                choice=choice,
            )

    async def shutdown(self) -> None:
        """End the DHT process and the downloader's threads. Idempotent, bounded."""
        self.downloader.close()
        dht, self._dht = self._dht, None
        discovery, self._discovery = self._discovery, StaticDiscovery(self.peers)
        if dht is not None:
            with suppress(FastCASError):
                await discovery.close()
            await dht.close()

    async def _manifest(
        self, file_hash: bytes, manifest_hash: bytes | None, peers: Sequence[PeerHint]
    ) -> Manifest | None:
        try:
            return await find_manifest(
                file_hash, manifest_hash, [PeerAddr(hint.ip, hint.port) for hint in peers], timeout_s=self._timeout_s
            )
        except ManifestNotFound as exc:
            log.info("%s", exc)
            return None


def _peer(entry: PeerAddr | tuple[str, int] | str) -> PeerAddr:
    if isinstance(entry, PeerAddr):
        return entry
    if isinstance(entry, str):
        return parse_peer(entry)
    host, port = entry
    return parse_peer(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
