"""`P2PNode`: the handle that a program holds on a node of its own.

The node is a process family (supervisor, agent, DHT, workers) started by exec, so that no `__main__` guard is needed
and a notebook's running loop is no obstacle. It ends within 2 s after the program that started it. Methods go through
`node.sock`; the synchronous attributes read a copy that the node renews as things change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcas.config import NodeConfig
from fastcas.errors import FastCASError, NodeUnavailable, UsageError
from fastcas.ids import PeerAddr, parse_rate, short
from fastcas.limits import DATA_PORT, DHT_PORT, FETCH_TIMEOUT_S
from fastcas.metadata import FileMetadata, Manifest
from fastcas.node import wire
from fastcas.node.control_client import AsyncControlClient, ControlClient
from fastcas.node.node_discovery import NodeDiscovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastcas.fetch import P2PChunkDownloader
    from fastcas.peers.discovery import PeerHint
    from fastcas.peers.manager import P2PPeerManager

__all__ = ["DhtNode", "P2PNode", "RoutingNode", "RoutingTable"]

log = logging.getLogger(__name__)

START_S = 30.0
STOP_S = 10.0
KILL_S = 3.0
RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class RoutingNode:
    """A DHT contact: node id (40 hex digits), IP address and UDP port."""

    node_id: str
    ip: str
    port: int


class RoutingTable:
    """A copy of the node's routing table, at most about a second old."""

    def __init__(self) -> None:
        self._nodes: list[RoutingNode] = []

    def get_all_nodes(self) -> list[RoutingNode]:
        """Return the known DHT nodes."""
        return list(self._nodes)

    def replace(self, nodes: list[RoutingNode]) -> None:
        """Take a new copy."""
        self._nodes = nodes


class DhtNode:
    """What the quick reference calls `node.dht_node`.

    Attributes:
        routing_table: The copy of the routing table.
        port: UDP port, None without a DHT.
    """

    def __init__(self) -> None:
        self.routing_table = RoutingTable()
        self.port: int | None = None


class P2PNode:
    """A node of this program: serves and downloads.

    Args:
        node_id: A name for people.
        server_host: Address to serve on.
        server_port: TCP port; 0 takes a free one, `server_port` then tells which.
        dht_port: UDP port of the DHT. One that is named must be free; without, 8468 or a free one is taken.
        storage_dir: Storage folder, or its `hashed_files`.
        workers: Worker processes, default one per core.
        bootstrap: DHT nodes to join through, (host, port) each.
        peers: Nodes to ask for every file, (host, port) each.
        use_dht: False = no DHT process.
        announce: Which chunks are announced beside their files: "auto", "off", "rare" or "all".
        network_key_file: File with the key of a private DHT, 16 to 4096 bytes.
        max_upload: Limit of all uploads together, "10M" or bytes per second.
    Raises:
        UsageError: An argument cannot work.
    """

    def __init__(
        self,
        node_id: str = "",
        server_host: str = "0.0.0.0",
        server_port: int = DATA_PORT,
        dht_port: int | None = None,
        storage_dir: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        bootstrap: Sequence[tuple[str, int]] = (),
        *,
        peers: Sequence[tuple[str, int]] = (),
        use_dht: bool = True,
        max_upload: str | int = "",
        announce: str = "auto",
        network_key_file: str | os.PathLike[str] = "",
    ) -> None:
        self.node_id = node_id
        self.server_host = server_host
        self.server_port = server_port
        self._config = NodeConfig(
            workers=-1 if workers is None else workers,
            host=server_host,
            port=server_port,
            dht_port=DHT_PORT if dht_port is None else dht_port,
            dht_port_required=bool(dht_port),
            storage_dir=os.fspath(storage_dir) if storage_dir is not None else "",
            node_id=node_id,
            bootstrap=[str(PeerAddr(host, port)) for host, port in bootstrap],
            peer=[str(PeerAddr(host, port)) for host, port in peers],
            no_dht=not use_dht,
            max_upload=str(max_upload),
            announce=announce,
            network_key=os.fspath(network_key_file),
        ).check()
        self._n_workers = max(1, self._config.workers)
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_fd = -1
        self._client: AsyncControlClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._manager: P2PPeerManager | None = None
        self._downloader: P2PChunkDownloader | None = None
        self._chunks: frozenset[bytes] = frozenset()
        self.dht_node = DhtNode()
        self.dht_node_id = ""

    @property
    def storage_dir(self) -> Path:
        """The storage folder."""
        return self._config.root

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor, None while the node does not run."""
        return self._process.pid if self._process is not None else None

    async def initialize(self) -> None:
        """Start the node (without workers) for its storage folder; a second call does nothing.

        Raises:
            StoreLocked: Another node or command has the folder.
            PortInUse: The DHT port that was named is taken.
            FastCASError: The node cannot start; nothing is left running.
        """
        if self._process is not None:
            return
        try:
            facts = await self._start()
            self.dht_node_id = facts["node_id"]
            self.dht_node.port = facts["dht_port"]
            self._client = await AsyncControlClient.connect(self.storage_dir)
            first = asyncio.Event()
            self._watcher = asyncio.get_running_loop().create_task(self._keep_watching(first))
            async with asyncio.timeout(START_S):
                await first.wait()
        except TimeoutError:
            await self.shutdown()
            raise NodeUnavailable(f"node: does not answer within {START_S:.0f} s") from None
        except BaseException:
            await self.shutdown()
            raise

    async def _start(self) -> dict[str, Any]:
        config = NodeConfig.from_json(self._config.to_json())
        config.workers = 0
        config.port = 0
        owner_read, self._owner_fd = os.pipe()
        environment = {"FASTCAS_LOG": "WARNING", **os.environ}
        command = [sys.executable, "-m", "fastcas.node.supervisor", "--config", config.to_json()]
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a vfork, a few ms
                [*command, "--owner-fd", str(owner_read)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                pass_fds=(owner_read,), env=environment, process_group=0,
            )  # fmt: skip
        finally:
            os.close(owner_read)
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_S):
                line = await asyncio.to_thread(self._process.stdout.readline)
        except TimeoutError:
            raise NodeUnavailable(f"node: not ready within {START_S:.0f} s") from None
        try:
            facts = json.loads(line)
        except ValueError:
            raise NodeUnavailable("node: ended before it was ready") from None
        if "error" in facts:
            raise wire.error_from_map(facts)
        result: dict[str, Any] = facts
        return result

    def start_server(self) -> None:
        """Start the workers; returns once they accept connections.

        Raises:
            PortInUse: "Port already in use…": somebody listens there; use a different port number.
            NodeUnavailable: `initialize()` was not awaited, or the node ended.
            UsageError: The server runs already.
        """
        if self._client is None:
            raise NodeUnavailable("start_server: the node is not initialized; await node.initialize() first")
        args = {"host": self._config.host, "port": self._config.port, "workers": self._n_workers}
        with ControlClient(self.storage_dir) as client:
            self.server_port = int(client.call("start_workers", args)["port"])

    async def shutdown(self) -> None:
        """End the node: uploads are drained, announcements withdrawn. Idempotent; at most about 15 s."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        downloader, self._downloader = self._downloader, None
        if downloader is not None:
            downloader.close()
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(self._end, process)
        self._hang_up()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._hang_up()
            try:
                process.wait(KILL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _hang_up(self) -> None:
        if self._owner_fd >= 0:
            os.close(self._owner_fd)
            self._owner_fd = -1

    async def __aenter__(self) -> P2PNode:
        """Initialize."""
        await self.initialize()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Shut down."""
        await self.shutdown()

    # ---- what the quick reference asks of a node ----

    async def download_file_from_peers(
        self,
        file_hash: str,
        output_dir: str | os.PathLike[str],
        *,
        progress: Callable[[dict[str, Any]], None] | None = None,
        origins: Sequence[str] = (),
        max_download: int | str | None = None,
    ) -> bool:
        """Fetch a file into a folder and serve it from there; False when that fails (logged).

        Cancelling it ends the download; the part file is kept, and the next call goes on from there.

        Args:
            file_hash: 64 hex digits, or a fastcas:// link; followed by /path: that file of a collection.
            output_dir: Where it goes, under its stored name.
            progress: Called with {"done", "total", "rate_Bps", "peers", "waiting_on"}, in the loop's thread.
            origins: URLs of HTTP servers that have the file, for chunks that no peer has.
            max_download: Limit of the rate, bytes per second or text such as "10M", beside the node's own.
        Raises:
            UsageError: An argument is malformed.
        """
        try:
            await self.fetch_file_from_peers(
                file_hash, output_dir, progress=progress, origins=origins, max_download=max_download
            )
        except UsageError:
            raise
        except FastCASError as error:
            log.warning("download failed file=%s error=%s", file_hash[:8], error)
            return False
        return True

    async def fetch_file_from_peers(
        self,
        ref: str,
        output_dir: str | os.PathLike[str],
        *,
        timeout_s: float = FETCH_TIMEOUT_S,
        progress: Callable[[dict[str, Any]], None] | None = None,
        origins: Sequence[str] = (),
        max_download: int | str | None = None,
    ) -> Path:
        """`download_file_from_peers` that raises; returns where the file is.

        Args:
            timeout_s: For the first peer and the manifest, seconds.
        Raises:
            UsageError: An argument is malformed.
            NoPeers: Nobody has it.
            FastCASError: As `fastcas.fetch.download`; the part file is kept where it can be resumed.
        """
        folder = os.path.abspath(output_dir)  # noqa: ASYNC240 - touches no disk
        args = {
            "ref": ref, "out": None, "folder": os.fsencode(folder), "timeout_s": timeout_s, "origins": list(origins),
            "max_download_Bps": None if max_download is None else parse_rate(str(max_download), "max_download"),
        }  # fmt: skip
        return Path((await self._call("get", args, progress))["path"])

    async def status(self) -> dict[str, Any]:
        """Return what `fastcas status --json` prints."""
        return await self._call("status", {})

    @property
    def peer_manager(self) -> P2PPeerManager:
        """The manager that asks through this node.

        Raises:
            NodeUnavailable: The node does not run.
        """
        if self._client is None:
            raise NodeUnavailable("peer_manager: the node is not initialized; await node.initialize() first")
        if self._manager is None:
            from fastcas.peers.manager import P2PPeerManager

            self._manager = P2PPeerManager(
                NodeDiscovery(self._client), local=lambda: self._chunks, fetch_manifest=self._fetch_manifest,
                find_manifest=self._find_manifest,
            )  # fmt: skip
        return self._manager

    @property
    def downloader(self) -> P2PChunkDownloader:
        """A chunk downloader of this program, made when first used."""
        if self._downloader is None:
            from fastcas.fetch import P2PChunkDownloader

            self._downloader = P2PChunkDownloader(str(self.storage_dir))
        return self._downloader

    # ---- behind them ----

    async def _call(
        self, op: str, args: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        if self._client is None:
            raise NodeUnavailable(f"{op}: the node is not initialized; await node.initialize() first")
        return await self._client.call(op, args, on_progress)

    async def _find_manifest(self, meta: FileMetadata) -> Manifest | None:
        data = (await self._call("find_manifest", {"meta": asdict(meta)}))["manifest"]
        return Manifest.decode(data) if data is not None else None

    async def _fetch_manifest(
        self, file_hash: bytes, manifest_hash: bytes | None, peers: Sequence[PeerHint]
    ) -> Manifest | None:
        data = (await self._call("manifest", {"file_hash": file_hash, "manifest_hash": manifest_hash}))["manifest"]
        if data is not None:
            return Manifest.decode(data)
        from fastcas.fetch.manifests import find_manifest

        try:
            return await find_manifest(file_hash, manifest_hash, [hint.addr for hint in peers])
        except FastCASError as error:
            log.info("no manifest file=%s error=%s", short(file_hash), error)
            return None

    async def _keep_watching(self, first: asyncio.Event) -> None:
        """Keep the copies of routing table and chunk hashes; `first` is set once they are there."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        while True:
            tasks = [asyncio.ensure_future(self._call_watch(queue)), asyncio.ensure_future(self._apply(queue, first))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            log.info("node does not answer, its agent may be restarting")
            await asyncio.sleep(RETRY_S)
            with contextlib.suppress(FastCASError):
                await self._reconnect()

    async def _call_watch(self, queue: asyncio.Queue[dict[str, Any]]) -> None:
        if self._client is not None:
            await self._client.call("watch", {}, queue.put_nowait)

    async def _apply(self, queue: asyncio.Queue[dict[str, Any]], first: asyncio.Event) -> None:
        generation = -1
        while True:
            facts = await queue.get()
            self.dht_node.routing_table.replace([RoutingNode(*node) for node in facts["nodes"]])
            if facts["generation"] != generation:
                self._chunks = await self._fetch_local_chunks()
                generation = facts["generation"]
            first.set()

    async def _fetch_local_chunks(self) -> frozenset[bytes]:
        hashes = b""
        while True:
            answer = await self._call("local_chunks", {"offset": len(hashes) // 32})
            hashes += answer["hashes"]
            if not answer["hashes"] or len(hashes) >= 32 * answer["total"]:
                return frozenset(hashes[at : at + 32] for at in range(0, len(hashes), 32))

    async def _reconnect(self) -> None:
        fresh = await AsyncControlClient.connect(self.storage_dir)
        old, self._client = self._client, fresh
        if self._manager is not None:
            self._manager.discovery = NodeDiscovery(fresh)
        if old is not None:
            await old.close()
