"""What the agent does for each request on `node.sock`.

Commands on the store go to the store's thread; downloads, discovery and status stay in the loop. A stored or removed
file is announced or withdrawn here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcas.errors import FastCASError, Interrupted, NodeUnavailable, UsageError
from fastcas.fetch.origin import parse_origin
from fastcas.ids import Link, parse_hash, parse_member, parse_peer, parse_ref
from fastcas.limits import FETCH_TIMEOUT_S, STALL_TIMEOUT_S
from fastcas.metadata import FileMetadata, Manifest
from fastcas.node.announcer import Announcement
from fastcas.node.control import Request
from fastcas.node.listeners import reachable_host
from fastcas.node.node_discovery import serve_discovery
from fastcas.node.operations import LOCAL_OPERATIONS, seeds_of
from fastcas.node.own_discovery import OwnDiscovery
from fastcas.node.verifying import RepairPeers, report_to_map, run_scrub
from fastcas.peers.discovery import CompositeDiscovery, Discovery, NodeHint, PeerHint

if TYPE_CHECKING:
    from fastcas.fetch.choosing import Choice
    from fastcas.node.agent import Agent
    from fastcas.store import FileRow

__all__ = ["RequestHandler"]

PEERS_WANT = 64
WAITING_S = 1.0
DHT_FIGURES_S = 1.0
WATCH_S = 1.0  # how old a handle's copy of the routing table gets
HASHES_PER_ANSWER = 1 << 20


class RequestHandler:
    """Bound to one agent; `handle` is the control server's handler."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._handlers: dict[str, Callable[[Request], Awaitable[dict[str, Any]]]] = {
            "verify": self._verify,
            "get": self._get,
            "peers": self._peers,
            "status": lambda request: self.status(),
            "start_workers": self._start_workers,
            "stop": self._stop,
            "watch": self._watch,
            "local_chunks": self._local_chunks,
            "manifest": self._manifest,
            "find_manifest": self._find_manifest,
            "bootstrap": self._bootstrap,
        }

    async def handle(self, request: Request) -> dict[str, Any]:
        """Answer one request.

        Raises:
            FastCASError: To be told to the caller.
        """
        if request.op in LOCAL_OPERATIONS:
            return await self._local(request)
        handler = self._handlers.get(request.op)
        if handler is not None:
            return await handler(request)
        answer = await serve_discovery(self._discovery_with_us(), request.op, request.args)
        if answer is None:
            raise UsageError(f"operation: {request.op!r} is unknown to this node")
        return answer

    def _discovery_with_us(self) -> Discovery:
        agent = self._agent
        port = agent.data_port()
        host = reachable_host(agent.state["host"]) or "127.0.0.1"
        me = PeerHint(agent.node_id, host, port, "own") if port else None

        async def find_file(file_hash: bytes) -> FileRow | None:
            return await agent.thread.run(agent.store.file, file_hash)

        def has_chunk(digest: bytes) -> bool:
            return agent.publisher.find_extent(digest) is not None

        return CompositeDiscovery([OwnDiscovery(me, find_file, has_chunk), agent.discovery()])

    async def status(self) -> dict[str, Any]:
        """Return what `fastcas status` shows. Does not wait behind a long ingest for more than a second."""
        agent = self._agent
        dht: dict[str, Any] | None = None
        if agent.has_dht:
            nodes: list[NodeHint] = []
            if agent.dht is not None:
                with contextlib.suppress(FastCASError, TimeoutError):
                    async with asyncio.timeout(DHT_FIGURES_S):
                        nodes = await agent.dht.routing()
            dht = {
                **await self._dht_figures(), "port": agent.state["dht_port"], "pid": agent.state["dht_pid"],
                "nodes": [[node.node_id, node.ip, node.port] for node in nodes],
            }  # fmt: skip
        workers = [
            {**worker, "counters": agent.counters.snapshot(int(worker["slot"]))}
            for worker in agent.state.get("workers", [])
        ]
        return {
            "node_id": agent.node_id, "label": agent.label, "pid": os.getppid(), "agent_pid": os.getpid(),
            "uptime_s": time.monotonic() - agent.started_at, "storage": agent.config.storage_dir,
            "data": {"host": agent.state["host"], "port": agent.data_port()},
            "dht": dht, "workers": workers, "store": await agent.store_stats(), "downloads": agent.downloads.running(),
            "scrub": agent.scrubber.to_map(),
        }  # fmt: skip

    async def _dht_figures(self) -> dict[str, Any]:
        """Return the counters of the DHT process; without it, or when it is slow, that nobody is known."""
        if self._agent.dht is not None:
            with contextlib.suppress(FastCASError, TimeoutError):
                async with asyncio.timeout(DHT_FIGURES_S):
                    return await self._agent.dht.stats()
        return {"contacts": 0}

    async def _verify(self, request: Request) -> dict[str, Any]:
        agent, args = self._agent, request.args
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()
        telling = loop.create_task(_tell_waiting(request, begun))
        peers: RepairPeers | None = None
        try:
            scrub = await agent.thread.run(agent.operations.begin_verify, args, can_ask=True)
            begun.set()
            if args.get("repair"):
                peers = agent.repair_peers([parse_peer(str(text), "--peer") for text in args.get("peers", [])])
            report = await run_scrub(
                scrub, agent.thread.run, peers=peers, rate_Bps=args.get("rate_Bps"), cancelled=request.cancelled,
                progress=lambda done, total: request.progress({"done": done, "total": total}),
            )  # fmt: skip
        finally:
            telling.cancel()
            if peers is not None:
                peers.close()
        agent.forget_stats()
        return report_to_map(report)

    async def _local(self, request: Request) -> dict[str, Any]:
        agent = self._agent
        loop = asyncio.get_running_loop()

        def progress(values: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(request.progress, values)

        fds = [os.dup(fd) for fd in request.fds]  # the thread may outlive a cancelled request

        def work() -> dict[str, Any]:
            loop.call_soon_threadsafe(begun.set)
            try:
                return agent.operations.run(request.op, request.args, fds, progress, request.cancelled)
            finally:
                for fd in fds:
                    os.close(fd)

        begun = asyncio.Event()
        telling = loop.create_task(_tell_waiting(request, begun))
        try:
            result = await agent.thread.run(work)
        finally:
            telling.cancel()
        agent.forget_stats()
        if request.op in ("store", "migrate"):
            stored = [result] if request.op == "store" else result["files"]
            agent.announcer.announce(
                [
                    Announcement(parse_hash(f["file_hash"]), parse_hash(f["manifest_hash"]), f["name"], f["size"])
                    for f in stored
                ]
            )
            if any(f["is_collection"] for f in stored):
                await agent.announce_everything()
        elif request.op == "rm":
            agent.announcer.withdraw(parse_hash(result["file_hash"]))
        return result

    async def _get(self, request: Request) -> dict[str, Any]:
        from fastcas.fetch.choosing import choice_of

        args = request.args
        link, choice = parse_member(str(args["ref"])), choice_of(args)
        peers = [parse_peer(str(text), "--peer") for text in args.get("peers", [])]
        timeout_s = float(args.get("timeout_s", FETCH_TIMEOUT_S))
        bootstrap = [parse_peer(str(text), "--bootstrap") for text in args.get("bootstrap", [])]
        if bootstrap:
            if self._agent.dht is None:
                raise UsageError("--bootstrap: this storage folder's node runs without a DHT")
            await self._agent.dht.bootstrap([(peer.ip, peer.port) for peer in bootstrap])
        self._agent.join_through(link.dht)
        origins = [parse_origin(str(url)) for url in args.get("origins", [])]
        folder = Path(os.fsdecode(args["folder"]))
        out = Path(os.fsdecode(args["out"])) if args.get("out") is not None else None
        if not (out or folder).is_absolute():
            raise UsageError("out: expected an absolute path")
        seeds = seeds_of(args)
        here = await self._export(request, link, out, folder, choice)
        if here is not None:
            return here
        try:
            return await self._agent.downloads.get(
                link, out, folder=folder, peers=peers, timeout_s=timeout_s,
                stall_timeout_s=float(args.get("stall_timeout_s", STALL_TIMEOUT_S)), raw=bool(args.get("raw")),
                force=bool(args.get("force")), on_progress=request.progress, origins=origins,
                max_download_Bps=args.get("max_download_Bps"), seed_from=seeds, choice=choice,
            )  # fmt: skip
        finally:
            self._agent.partials.republish()

    async def _export(
        self, request: Request, link: Link, out: Path | None, folder: Path, choice: Choice | None
    ) -> dict[str, Any] | None:
        """Answer a `get` from this store alone, where it has everything."""
        from fastcas.node.export import export

        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            if request.cancelled.is_set():
                raise Interrupted(f"get: stopped after {done} of {total} B")
            loop.call_soon_threadsafe(request.progress, {"done": done, "total": total, "rate_Bps": 0, "peers": 0})

        if not self._agent.publisher.has_file(link.file_hash):
            return None  # known without waiting for the store, which may be busy
        raw, force = bool(request.args.get("raw")), bool(request.args.get("force"))
        return await self._agent.thread.run(
            export, self._agent.store, link, out, folder, raw=raw, force=force, choice=choice, progress=progress
        )

    async def _peers(self, request: Request) -> dict[str, Any]:
        link = parse_ref(str(request.args["ref"]))
        timeout_s = float(request.args.get("timeout_s", FETCH_TIMEOUT_S))
        found = self._agent.discovery().find_file_peers(link.file_hash, PEERS_WANT, min(timeout_s, 10.0))
        peers = [[h.node_id, h.ip, h.port, h.source] async for h in found if h.node_id != self._agent.node_id]
        known = {(peer[1], peer[2]) for peer in peers}
        for node_id, ip, port in self._agent.swarmbook.peers_of(link.file_hash):
            if (ip, port) not in known:
                peers.append([node_id, ip, port, "swarm"])
        return {"peers": peers, "dht": await self._dht_figures() if self._agent.has_dht else None}

    async def _start_workers(self, request: Request) -> dict[str, Any]:
        args = request.args
        host, port, workers = str(args["host"]), int(args["port"]), int(args["workers"])
        reply = await self._agent.ask_supervisor(
            {"op": "start_workers", "host": host, "port": port, "workers": workers}
        )
        self._agent.state |= {"host": host, "port": reply["port"]}
        await self._agent.announce_everything()
        return {"port": reply["port"]}

    async def _stop(self, request: Request) -> dict[str, Any]:
        self._agent.ask_stop()
        return {}

    async def _watch(self, request: Request) -> dict[str, Any]:
        """Tell a library handle what it keeps a copy of, at once and whenever it changes, until it goes away.

        The routing table, and a number that changes with the chunks.
        """
        agent = self._agent
        told: dict[str, Any] = {}
        while True:
            generation, changed = agent.chunks_generation, agent.chunks_changed
            nodes = await agent.dht.routing() if agent.dht is not None else []
            facts = {"nodes": [[n.node_id, n.ip, n.port] for n in nodes], "generation": generation}
            if facts != told:
                told = facts
                request.progress(facts)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await changed.wait()

    async def _manifest(self, request: Request) -> dict[str, Any]:
        store = self._agent.store
        file_hash, manifest_hash = request.args["file_hash"], request.args["manifest_hash"]
        manifests = await self._agent.thread.run(store.manifests_of, file_hash)
        fitting = [m for m in manifests if manifest_hash in (None, m.manifest_hash)]
        return {"manifest": fitting[0].data if fitting else None}

    async def _local_chunks(self, request: Request) -> dict[str, Any]:
        store = self._agent.store
        offset = int(request.args["offset"])
        data = await self._agent.thread.run(lambda: b"".join(store.chunk_hashes()))
        return {"hashes": data[32 * offset : 32 * (offset + HASHES_PER_ANSWER)], "total": len(data) // 32}

    async def _find_manifest(self, request: Request) -> dict[str, Any]:
        meta = FileMetadata(**request.args["meta"])
        manifests = await self._agent.thread.run(self._agent.store.manifests_of, parse_hash(meta.file_hash))
        return {"manifest": next((m.data for m in manifests if _has_chunks(m, meta)), None)}

    async def _bootstrap(self, request: Request) -> dict[str, Any]:
        if self._agent.dht is None:
            raise NodeUnavailable("bootstrap: this node runs without a DHT")
        peers = [(str(host), int(port)) for host, port in request.args["peers"]]
        return {"contacts": await self._agent.dht.bootstrap(peers)}


async def _tell_waiting(request: Request, begun: asyncio.Event) -> None:
    """Say that a command waits for another one, if it does for long."""
    try:
        async with asyncio.timeout(WAITING_S):
            await begun.wait()
    except TimeoutError:
        request.progress({"done": 0, "total": 0, "peers": 0, "waiting_on": "another command on this store"})


def _has_chunks(manifest: Manifest, meta: FileMetadata) -> bool:
    mine = FileMetadata.from_manifest(manifest, meta.original_name)
    return mine.data_chunks == meta.data_chunks and mine.parity_chunks == meta.parity_chunks
