"""The agent: owns the store, writes the chunk table, answers `node.sock`, runs downloads, announces.

`python -m fastcas.node.agent --channel FD`. Life cycle only; the work is in publisher, downloads, operations,
swarmbook, announcer and control. May die at any time: workers go on with the table they have, the supervisor starts
another agent, which rebuilds the table from the catalog. Ends at once when the channel does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgpack

from fastcas import hashing, parity
from fastcas.config import NodeConfig
from fastcas.errors import FastCASError, LocalProtocolError, PermissionDenied, StoreError
from fastcas.ids import PeerAddr, parse_quota
from fastcas.limits import HEARTBEAT_S
from fastcas.node import wire
from fastcas.node.admin import AdminServer
from fastcas.node.announcer import Announcement, Announcer
from fastcas.node.control import ControlServer
from fastcas.node.downloads import Downloads
from fastcas.node.listeners import reachable_host
from fastcas.node.logs import set_up_logging
from fastcas.node.operations import Operations
from fastcas.node.partials import Partials
from fastcas.node.publisher import Publisher
from fastcas.node.requests import RequestHandler
from fastcas.node.store_thread import StoreThread
from fastcas.node.swarmbook import SwarmBook
from fastcas.node.uplink import is_busy
from fastcas.node.verifying import RepairPeers, Scrubber
from fastcas.peers.discovery import CompositeDiscovery, Discovery, StaticDiscovery
from fastcas.peers.ring_discovery import RingDiscovery
from fastcas.store import Store
from fastcas.table import Channel, Counters, Ring, write_keys, write_swarm
from fastcas.table.snapshot import SwarmEntry

__all__ = ["Agent"]

log = logging.getLogger(__name__)

Message = dict[str, Any]
KEYS_DELAY_S = 0.5  # chunk keys that come within this time go into one snapshot
PARTIALS_DELAY_S = 0.2  # likewise for what is left of incomplete files
STOP_S = 8.0
USED_S = 60.0  # how often it is written down which files peers fetch, for the order of eviction
USED_MAX = 4096


class Agent:
    """One agent process. Everything in the loop's thread but the store, which has its own."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._rings: dict[int, Ring] = {}
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._early: list[tuple[Message, list[int]]] = []
        self._stack = contextlib.AsyncExitStack()
        self._is_ready = False
        self._status = 0
        self._dht: RingDiscovery | None = None
        self._snapshot_running = False
        self.config = NodeConfig()
        self.label = ""
        self.node_id = ""
        self.has_dht = False
        self.state: Message = {"workers": [], "host": "0.0.0.0", "port": 0, "dht_port": None, "dht_pid": None}
        self.started_at = time.monotonic()
        self._stats: dict[str, int] = {}
        self._stats_are_old = True
        self._used: set[bytes] = set()
        self.chunks_generation = 0
        self.chunks_changed = asyncio.Event()  # set, and replaced, at every change

    # ---- life cycle ----

    async def run(self) -> int:
        """Serve the channel until it ends or a stop message comes; return the exit status."""
        self._channel.attach_to(self.loop, self._on_message, self._on_eof)
        try:
            await self._ended.wait()
            return self._status
        finally:
            for timer in self._timers.values():
                timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            try:
                async with asyncio.timeout(STOP_S):
                    await self._stack.aclose()
            except TimeoutError:
                log.warning("stopping took too long, left the rest to the kernel")

    def _end(self, status: int = 0) -> None:
        self._status = status
        self._ended.set()

    def _on_eof(self) -> None:
        # Nobody is there to restart the others: be gone well within 2 s. What is on disk is consistent at any time.
        os._exit(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_message(self, message: Message, fds: list[int]) -> None:
        op = message.get("op")
        if op == "start":
            self._spawn(self._start(message, fds))
        elif not self._is_ready:
            self._early.append((message, fds))
        else:
            self._dispatch(message, fds)

    def _dispatch(self, message: Message, fds: list[int]) -> None:
        match message:
            case {"op": "worker", "index": int(index)} if len(fds) == 2:
                self._add_worker(index, fds)
            case {"op": "worker_gone", "index": int(index)}:
                self._remove_worker(index)
            case {"op": "dht"} if len(fds) == 4:
                self._set_dht(fds)
            case {"op": "state"}:
                self.state = message
            case {"op": "reply", "id": int(number)}:
                future = self._pending.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case {"op": "stop"}:
                self._end()
            case _:
                log.error("unknown message from the supervisor op=%r", message.get("op"))
                for fd in fds:
                    os.close(fd)

    async def _start(self, message: Message, fds: list[int]) -> None:
        try:
            await self._start_parts(message, fds)
        except FastCASError as error:
            self._channel.send({"op": "failed", **wire.error_to_map(error)})
            self._end(error.exit_code)
        except OSError as error:
            log.exception("agent cannot start")
            self._channel.send({"op": "failed", **wire.error_to_map(FastCASError(f"agent: {error}"))})
            self._end(1)

    async def _start_parts(self, message: Message, fds: list[int]) -> None:
        from fastcas.dht.identity import Identity

        hashing.self_test()
        parity.self_test()
        lock_fd, counters_fd = fds
        self.config = wire.config_from_map(message["config"])
        self.config.storage_dir = message["storage"]
        self.label = message["label"]
        self.has_dht = message["dht"]
        self.state |= {"host": message["host"], "port": message["port"]}
        self.slot = int(message["slot"])
        root = Path(message["storage"])

        self.counters = Counters.attach(counters_fd)
        os.close(counters_fd)
        self._stack.callback(self.counters.close)
        self._beat()
        self.thread = StoreThread()
        self._stack.callback(self.thread.close)
        try:
            self.store = await self.thread.run(Store.open, root, create=True, lock_fd=lock_fd)
        finally:
            os.close(lock_fd)
        self._stack.push_async_callback(self.thread.run, self.store.close)
        seed = await self._identity()
        self.node_id = Identity(seed).node_id.hex()
        self._channel.send({"op": "identity", "seed": seed, "node_id": self.node_id})

        self.publisher = Publisher(self.loop, self.publish, self.counters)
        self._stack.callback(self.publisher.close)
        self.publisher.on_keys_changed = self._on_keys_changed
        self.store.listener = self.publisher
        await self.thread.run(self.store.load, self.publisher)

        self.announcer = Announcer(lambda: self._dht)
        self.announcer.start()
        self.swarmbook = SwarmBook(self.node_id, self._publish_swarm)
        self.swarmbook.start()
        self._static = StaticDiscovery(self.config.static_peers())
        self.downloads = Downloads(
            store=self.store, thread=self.thread, publisher=self.publisher, publish=self.publish,
            announcer=self.announcer, node_id=self.node_id, data_port=self.data_port,
            discovery=lambda: self._dht, callers=self.swarmbook.peers_of, named_peers=self.config.static_peers(),
            max_download_Bps=self.config.max_download_rate(), is_busy=lambda: is_busy(self.counters, self._rings),
        )  # fmt: skip
        self.partials = Partials(self.store, self.thread, self.publisher, self.publish, self.announcer)
        self._stack.callback(self.partials.close)
        handler = RequestHandler(self)
        self.operations = Operations(self.store, barrier=self.publisher.barrier, advertised=self.advertised)
        self.store.quota.barrier = self.publisher.barrier
        self.store.quota.on_evicted = self._on_evicted
        if self.config.quota:
            await self.thread.run(self.store.quota.set_limit, parse_quota(self.config.quota, "--quota"))
        self.scrubber = Scrubber(self.store, self.thread.run, self.repair_peers, self.forget_stats)
        self._stack.push_async_callback(self._close_dht)
        self._stack.push_async_callback(self.announcer.close)
        self._stack.push_async_callback(self.swarmbook.close)
        self._stack.push_async_callback(self.downloads.close)
        self._stack.push_async_callback(self.scrubber.close)
        if self.config.admin_port:
            admin = AdminServer(self.config.admin_port, handler.status)
            await admin.start()
            self._stack.push_async_callback(admin.close)
        control = ControlServer(root, handler.handle)
        control.start()
        self._stack.push_async_callback(control.close)

        self._is_ready = True
        for early, early_fds in self._early:
            self._dispatch(early, early_fds)
        self._early.clear()
        self.publisher.publish_loaded()
        self._on_keys_changed()
        self.scrubber.start()
        self._stats = await self.thread.run(self.store.stats)
        self._channel.send({"op": "ready", "chunks": self._stats["chunks"]})
        log.info("agent ready node=%s chunks=%d", self.node_id, self._stats["chunks"])

    async def _identity(self) -> bytes:
        """Return the seed of this node's key; a new one, which is not kept, where the key file cannot be used.

        Serving needs no lasting identity, and a key that others could read is not one.
        """
        try:
            return await self.thread.run(self.store.identity)
        except (PermissionDenied, StoreError) as error:
            log.error("%s; not used: this node has a new identity until it ends; mend or remove that file", error)
            return secrets.token_bytes(32)

    def _beat(self) -> None:
        self.counters.set(self.slot, "heartbeat_ns", time.monotonic_ns())
        self._timers["beat"] = self.loop.call_later(HEARTBEAT_S, self._beat)

    # ---- what others use ----

    def data_port(self) -> int | None:
        """Our TCP port, None while nothing is served."""
        return self.state["port"] or None

    def advertised(self) -> tuple[tuple[PeerAddr, ...], tuple[PeerAddr, ...]]:
        """The addresses to put into links, data port and DHT: ours, if they are more than a wildcard."""
        host, port, dht_port = reachable_host(self.state["host"]), self.data_port(), self.state["dht_port"]
        if host is None or not port:
            return (), ()
        return (PeerAddr(host, port),), (PeerAddr(host, dht_port),) if dht_port else ()

    def join_through(self, peers: Sequence[PeerAddr]) -> None:
        """Have the DHT process join through nodes that a link names; nobody waits for it."""
        if self._dht is not None and peers:
            self._spawn(self._join_through(self._dht, [(peer.ip, peer.port) for peer in peers]))

    async def _join_through(self, dht: RingDiscovery, peers: list[tuple[str, int]]) -> None:
        try:
            contacts = await dht.bootstrap(peers)
        except FastCASError as error:
            log.info("could not join through a link's DHT nodes error=%s", error)
        else:
            log.debug("joined through a link's DHT nodes contacts=%d", contacts)

    def discovery(self) -> Discovery:
        """Where to ask for peers: the DHT, if there is one, and the nodes that were named."""
        backends: list[Discovery] = [self._static]
        if self._dht is not None:
            backends.append(self._dht)
        return CompositeDiscovery(backends)

    def repair_peers(self, named: Sequence[PeerAddr] = ()) -> RepairPeers:
        """Whom to ask for what this store lost; for one verification."""
        return RepairPeers([*named, *self.config.static_peers()], self.discovery(), self.node_id)

    @property
    def dht(self) -> RingDiscovery | None:
        """The DHT process, None while there is none."""
        return self._dht

    def publish(
        self, to: str, key: str, message: Message | None, fds: list[int], forward: Message | None = None
    ) -> None:
        """Have the supervisor send and remember a message; takes the fds over."""
        try:
            self._channel.send({"op": "publish", "to": to, "key": key, "message": message, "forward": forward}, fds)
        except (OSError, LocalProtocolError) as error:
            log.error("publishing failed key=%s error=%s", key, error)
        finally:
            for fd in fds:
                os.close(fd)

    async def ask_supervisor(self, request: Message) -> Message:
        """Send a request and return the reply.

        Raises:
            FastCASError: What the supervisor answered.
        """
        number = len(self._pending) + time.monotonic_ns()
        future: asyncio.Future[Message] = self.loop.create_future()
        self._pending[number] = future
        try:
            self._channel.send({**request, "id": number})
            reply = await future
        finally:
            self._pending.pop(number, None)
        if not reply["ok"]:
            raise wire.error_from_map(reply)
        return reply

    def ask_stop(self) -> None:
        """Have the whole node stop."""
        self._channel.send({"op": "stop"})

    def _on_evicted(self, file_hashes: list[bytes]) -> None:
        """In the store's thread: say that files are here no more."""
        for file_hash in file_hashes:
            self.loop.call_soon_threadsafe(self.announcer.withdraw, file_hash)

    def forget_stats(self) -> None:
        """The store changed: its figures have to be asked for anew."""
        self._stats_are_old = True

    async def store_stats(self) -> dict[str, int]:
        """Return the store's figures; the last known ones while a long job keeps it busy."""
        if self._stats_are_old:
            task = self.loop.create_task(self._renew_stats())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.wait([task], timeout=1.0)
        return self._stats

    async def _renew_stats(self) -> None:
        self._stats_are_old = False
        self._stats = await self.thread.run(self.store.stats)

    async def announce_everything(self) -> None:
        """Tell a new DHT process what is here."""
        rows = await self.thread.run(self.store.files)
        self.announcer.announce(
            [Announcement(row.file_hash, row.manifest_hash, row.name, row.size) for row in rows if row.is_complete]
        )

    # ---- workers ----

    def _add_worker(self, index: int, fds: list[int]) -> None:
        self._remove_worker(index)
        ring = Ring.attach(*fds)
        for fd in fds:
            os.close(fd)
        self._rings[index] = ring
        self.loop.add_reader(ring.eventfd, self._on_events, ring)
        self.publisher.set_workers(frozenset(self._rings))

    def _remove_worker(self, index: int) -> None:
        ring = self._rings.pop(index, None)
        if ring is not None:
            self.loop.remove_reader(ring.eventfd)
            ring.close()
            self.publisher.set_workers(frozenset(self._rings))

    def _on_events(self, ring: Ring) -> None:
        try:
            messages = ring.drain()
        except LocalProtocolError as error:
            log.error("a worker's ring is damaged, no more events from it error=%s", error)
            self.loop.remove_reader(ring.eventfd)
            return
        for data in messages:
            try:
                event = msgpack.unpackb(data)
            except ValueError:
                continue
            match event:
                case {"op": "peer"}:
                    self.swarmbook.on_peer(event)
                    self._on_use(event.get("file_hash"))
                case {"op": "withdraw", "blob": int(number)}:
                    self._spawn(self._withdraw(number, str(event.get("reason", ""))))

    def _on_use(self, file_hash: object) -> None:
        """Remember that a peer fetches a file; written down once a minute."""
        if isinstance(file_hash, bytes) and len(file_hash) == 32 and len(self._used) < USED_MAX:
            self._used.add(file_hash)
            if "used" not in self._timers:
                self._timers["used"] = self.loop.call_later(USED_S, self._write_used)

    def _write_used(self) -> None:
        del self._timers["used"]
        used, self._used = self._used, set()
        self._spawn(self._touch(used))

    async def _touch(self, file_hashes: set[bytes]) -> None:
        try:
            await self.thread.run(self.store.touch, file_hashes)
        except FastCASError as error:
            log.warning("what was used is not written down error=%s", error)

    async def _withdraw(self, number: int, reason: str) -> None:
        log.warning("blob withdrawn blob=%d reason=%s", number, reason)
        await self.thread.run(self.store.withdraw_blob, number, reason)

    # ---- snapshots ----

    def _publish_swarm(self, files: dict[bytes, SwarmEntry]) -> None:
        self.publish("workers", "swarm", {"op": "swarm"}, [write_swarm(files)])

    def _on_keys_changed(self) -> None:
        self.chunks_generation += 1
        self.chunks_changed.set()
        self.chunks_changed = asyncio.Event()
        if "partials" not in self._timers and self._is_ready:
            self._timers["partials"] = self.loop.call_later(PARTIALS_DELAY_S, self._begin_partials)
        if self.has_dht and "keys" not in self._timers and self._is_ready:
            self._timers["keys"] = self.loop.call_later(KEYS_DELAY_S, self._begin_keys)

    def _begin_partials(self) -> None:
        del self._timers["partials"]
        self._spawn(self.partials.refresh())

    def _begin_keys(self) -> None:
        del self._timers["keys"]
        if self._snapshot_running:
            self._on_keys_changed()
        else:
            self._spawn(self._publish_keys())

    async def _publish_keys(self) -> None:
        self._snapshot_running = True
        try:
            fd = await self.thread.run(lambda: write_keys(self.store.chunk_hashes()))
            self.publish("dht", "keys", {"op": "keys"}, [fd])
        finally:
            self._snapshot_running = False

    # ---- the DHT process ----

    def _set_dht(self, fds: list[int]) -> None:
        requests, answers = Ring.attach(*fds[:2]), Ring.attach(*fds[2:])
        for fd in fds:
            os.close(fd)
        if self._dht is None:
            answers.drain()  # what an agent before this one had asked
            self._dht = RingDiscovery(requests, answers)
        else:
            self._dht.replace_rings(requests, answers)
        self.announcer.repeat()
        self._spawn(self.announce_everything())

    async def _close_dht(self) -> None:
        if self._dht is not None:
            await self._dht.close()


async def _main(fd: int) -> int:
    return await Agent(Channel.from_fd(fd)).run()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m fastcas.node.agent`."""
    import uvloop

    parser = argparse.ArgumentParser(prog="fastcas.node.agent")
    parser.add_argument("--channel", type=int, required=True)
    options = parser.parse_args(arguments)
    set_up_logging()
    return int(uvloop.run(_main(options.channel)))


if __name__ == "__main__":
    sys.exit(main())
