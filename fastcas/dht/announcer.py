"""Announcing what this node has: at once when it is new, again when the network has grown, and before it expires.

Owns the schedule of files and metadata and decides which chunks are announced at all; the schedule of chunks is in
`ChunkCycle`, the offers are in `Provided`, the sending is in `Sweep`.

Which chunks: `all`; or `rare`, those that no swarm record covers. Whatever the store holds belongs to a file whose
swarm record leads to this node, so rare are the chunks that a program registered by name
(`register_chunks_in_dht`): nobody could find them otherwise. Or none (`off`). `auto` is `all` in networks of up to
10,000 nodes and `rare` in larger ones, where records of every chunk of everybody would not fit. Files are always
announced.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import (
    ANNOUNCE_RATE_BPS,
    CHUNK_CYCLE_MIN_S,
    COPIES_CHEAP,
    FILES_PER_ANNOUNCE,
    HOLDERS_CHUNK,
    HOLDERS_CHUNK_MAX,
    HOLDERS_FILE,
    KEYS_PER_ANNOUNCE,
    LEAVE_ASKS_MAX,
    LEAVE_S,
    METADATA_CYCLE_S,
    METADATA_TTL_S,
    METADATA_VALUE_MAX,
    NODES_FOR_ALL_CHUNKS,
    PACE_PER_S,
    REANNOUNCE_PAUSE_S,
    SWARM_CYCLE_S,
    SWARM_TTL_S,
)
from fastcas.dht.chunk_cycle import ChunkCycle, SavedCycle
from fastcas.dht.contacts import Contact
from fastcas.dht.holders import HolderBook, Pacer
from fastcas.dht.identity import Identity, metadata_text
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.provided import OwnFile, Provided, metadata_key, swarm_key
from fastcas.dht.records import MetadataRecord
from fastcas.dht.sweep import NOTHING_SENT, Sweep, SweepReport
from fastcas.errors import UsageError

__all__ = ["Announcer", "chunk_holders", "metadata_value", "parse_metadata_value"]

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]
NAME_BYTES_MAX = 255
JITTER = 0.1
FEWER_NODES = 0.8  # of the limit: below it all chunks are announced again
_NO_KEYS: U64 = np.zeros(0, dtype=np.uint64)


def chunk_holders(n_keys: int) -> int:
    """Return how many nodes are to hold each of so many chunk keys: 8, and up to 12 while all copies are few."""
    return min(max(COPIES_CHEAP // max(n_keys, 1), HOLDERS_CHUNK), HOLDERS_CHUNK_MAX)


def metadata_value(name: str, size: int, manifest_hash: bytes) -> bytes:
    """Return the value of a metadata record.

    Raises:
        UsageError: It would not fit: a name over 255 bytes, a hash that is not 32 bytes.
    """
    if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX or len(manifest_hash) != 32 or size < 0:
        raise UsageError(f"metadata: expected a name of at most {NAME_BYTES_MAX} B, a size and a 32-byte hash")
    value: bytes = msgpack.packb(
        {"v": 1, "name": name.encode("utf-8", "surrogateescape"), "size": size, "manifest": manifest_hash}
    )
    return value


def parse_metadata_value(value: bytes) -> tuple[str, int, bytes] | None:
    """Return (name, size, manifest_hash) of a record's value, or None for anything else."""
    if len(value) > METADATA_VALUE_MAX:
        return None
    try:
        fields = msgpack.unpackb(value, max_map_len=16, max_array_len=0, max_ext_len=0, max_str_len=32)
    except (ValueError, msgpack.UnpackException):
        return None
    match fields:
        case {"v": 1, "name": bytes(name), "size": int(size), "manifest": bytes(manifest_hash)} if (
            size >= 0 and len(name) <= NAME_BYTES_MAX and len(manifest_hash) == 32
        ):
            return name.decode("utf-8", "replace"), size, manifest_hash
    return None


class Announcer:
    """Keeps the network informed of this node's offers. `run` is its one task.

    Args:
        protocol: Sends for us; its `provided` holds the offers.
        identity: Signs metadata.
        clock, wall: Monotonic and Unix time, seconds.
        rng: Jitter of the cycles.
        count_nodes: Returns about how many other nodes the network has.
        policy: Which chunks are announced: "auto", "off", "rare" or "all".
        rate_Bps: What announcing chunks again may cost, bytes per second in both directions together.
        on_progress: Called when there is something new for `to_saved`.
    """

    def __init__(
        self,
        protocol: FcProtocol,
        identity: Identity,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: random.Random,
        count_nodes: Callable[[], int],
        policy: str = "auto",
        rate_Bps: float = ANNOUNCE_RATE_BPS,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; nothing is sent before `run` or a call."""
        self._protocol = protocol
        self._identity = identity
        self._clock = clock
        self._wall = wall
        self._rng = rng
        self._count_nodes = count_nodes
        self._policy = policy
        self._rate_Bps = rate_Bps
        self._on_progress = on_progress
        self._provided: Provided = protocol.provided
        self._names: dict[bytes, tuple[bytes, str, int, bytes]] = {}
        self._pacer = Pacer(PACE_PER_S, clock)
        # One sweep of a kind at a time, since two would only share windows; files never wait behind a million chunks.
        self._chunks = _Kind(clock)
        self._files = _Kind(clock)
        self._cycle = ChunkCycle(rate_Bps)
        self._is_large = False
        self.last_report: SweepReport | None = None

    # --- offers ---

    def set_snapshot(self, keys: U64) -> None:
        """Replace the chunk keys (sorted 64-bit); new ones are announced soon."""
        self._provided.snapshot = keys
        self._chunks.wake.set()

    def set_data_port(self, port: int) -> None:
        """Change the port that is announced; everything is announced again."""
        if port == self._provided.data_port:
            return
        was_announced = bool(self._provided.data_port)
        self._provided.data_port = port
        self._files.make_due()
        if was_announced:
            self._chunks.make_due()
        else:
            self._chunks.wake.set()

    def note_network(self, n_nodes: int) -> None:
        """Look at the number of other nodes: announce everything again when it has at least doubled."""
        for kind in (self._files, self._chunks):
            kind.n_seen = n_nodes
            if kind.has_grown:
                kind.wake.set()

    @property
    def chunk_policy(self) -> str:
        """Which chunks are announced now: "off", "rare" or "all"."""
        if self._policy != "auto":
            return self._policy
        n_nodes = self._count_nodes()
        if self._is_large:
            self._is_large = n_nodes > FEWER_NODES * NODES_FOR_ALL_CHUNKS
        else:
            self._is_large = n_nodes > NODES_FOR_ALL_CHUNKS
        return "rare" if self._is_large else "all"

    def _offered(self) -> U64:
        """Return the chunk keys to announce, as the policy says."""
        match self.chunk_policy:
            case "all":
                return self._provided.chunk_keys
            case "rare":
                return self._provided.extra
        return _NO_KEYS

    async def announce_chunks(self, keys: U64) -> int:
        """Offer and announce chunk keys now, whether or not a file covers them; return how many somebody holds.

        0 where the policy is "off".
        """
        self._provided.extra = np.union1d(self._provided.extra, keys)
        if self._policy == "off":
            return 0
        return (await self._sweep_chunks(keys, self._offered())).n_stored

    async def announce_files(self, files: Iterable[tuple[bytes, int]]) -> int:
        """Offer and announce (file hash, thousandths) now, and again until withdrawn; return how many are held."""
        keys = []
        for file_hash, have in files:
            key = swarm_key(file_hash)
            self._provided.files[key] = OwnFile(file_hash, max(0, min(have, 1000)))
            keys.append(key)
        return (await self._sweep_files(keys)).n_stored

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Publish a signed record now, and again before it expires; return how many nodes hold it (we count).

        Raises:
            UsageError: The name is too long.
        """
        metadata_value(name, size, manifest_hash)
        key = metadata_key(file_hash)
        self._names[key] = (file_hash, name, size, manifest_hash)
        report = await self._sweep_metadata([key])
        return report.copies + (0 if self._protocol.is_read_only else 1)

    async def withdraw(self, files: Sequence[bytes] | None) -> None:
        """Take back these files, or everything (None), from all who hold any of it."""
        if files is None:
            self._provided.files.clear()
            self._provided.metadata.clear()
            self._provided.snapshot = self._provided.extra = _NO_KEYS
            self._names.clear()
            await self.leave()
            return
        keys = [swarm_key(file_hash) for file_hash in files]
        for key, file_hash in zip(keys, files, strict=True):
            self._provided.files.pop(key, None)
            self._provided.metadata.pop(metadata_key(file_hash), None)
            self._names.pop(metadata_key(file_hash), None)
        holders = self._files.book.current(LEAVE_ASKS_MAX)
        for start in range(0, len(keys), FILES_PER_ANNOUNCE):
            await self._tell(holders, [1, b"".join(keys[start : start + FILES_PER_ANNOUNCE])])

    def withdraw_chunks(self, keys: U64) -> None:
        """Announce chunks that were registered by name no more; what is announced of them expires."""
        self._provided.extra = np.setdiff1d(self._provided.extra, keys, assume_unique=True)

    async def leave(self) -> None:
        """Tell all who hold a record of ours or know us that both are void; at most about a second.

        Nothing is left to resume.
        """
        holders = [] if self._protocol.is_read_only else list(self._protocol.router)
        holders += self._files.book.current(LEAVE_ASKS_MAX)
        holders += self._chunks.book.current(max(LEAVE_ASKS_MAX - len(holders), 0))
        for kind in (self._files, self._chunks):
            kind.book.clear()
        self._cycle = ChunkCycle(self._rate_Bps)
        self._on_progress()
        await self._tell(list(dict.fromkeys(holders)), [0, b""])

    async def _tell(self, holders: Sequence[Contact], args: list[Any]) -> None:
        """Send a withdrawal to holders, first of all a token where the one that we have is too old."""
        loop = asyncio.get_running_loop()
        asks = [loop.create_task(self._protocol.write(holder, "wd", args, hard_s=LEAVE_S / 2)) for holder in holders]
        if asks:
            _, late = await asyncio.wait(asks, timeout=LEAVE_S + 0.2)
            for ask in late:
                ask.cancel()

    # --- restarts ---

    def to_saved(self) -> SavedCycle:
        """Return what a restarted process needs so as not to announce all chunks again."""
        return self._cycle.to_saved(self._provided.data_port, self._chunks.n_nodes, self._clock(), self._wall())

    def restore(self, saved: SavedCycle | None) -> None:
        """Take what an earlier process saved."""
        self._cycle.restore(saved)
        if saved is not None:
            self._chunks.n_nodes = saved.n_nodes

    # --- schedule ---

    async def run(self) -> None:
        """Announce what is due, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_files())
            group.create_task(self._keep_chunks())

    async def _keep_files(self) -> None:
        due = {"files": self._next(SWARM_CYCLE_S), "metadata": self._next(METADATA_CYCLE_S)}
        while True:
            all_due = self._files.take_due()
            if all_due or self._clock() >= due["files"]:
                await self._sweep_files(list(self._provided.files))
                due["files"] = self._next(SWARM_CYCLE_S)
            if all_due or self._clock() >= due["metadata"]:
                await self._sweep_metadata(list(self._names))
                due["metadata"] = self._next(METADATA_CYCLE_S)
            await self._files.rest(min(due.values()), all_due)

    async def _keep_chunks(self) -> None:
        while True:
            all_due = self._chunks.take_due()
            next_at = self._clock() + CHUNK_CYCLE_MIN_S
            offered = self._offered()
            if self._may_announce and len(offered):
                now = self._clock()
                self._cycle.adopt(offered, self._provided.data_port, now, self._wall())
                news, due = self._cycle.news(offered), self._cycle.due(offered, now, self._jitter())
                keys = offered if all_due else np.union1d(news, due)
                if len(keys):
                    await self._sweep_chunks(keys, offered)
                next_at = min(next_at, self._cycle.next_at(offered))
            await self._chunks.rest(next_at, all_due)

    def _jitter(self) -> float:
        return 1.0 + JITTER * (2.0 * self._rng.random() - 1.0)

    def _next(self, cycle_s: float) -> float:
        return self._clock() + cycle_s * self._jitter()

    # --- sweeps ---

    @property
    def _may_announce(self) -> bool:
        return bool(self._provided.data_port) and not self._protocol.is_read_only

    async def _sweep_chunks(self, keys: U64, offered: U64) -> SweepReport:
        if not len(keys) or not self._may_announce:
            return NOTHING_SENT
        wire_keys = keys.astype(">u8")
        port = self._provided.data_port
        ttl_s = self._cycle.ttl_s(len(offered))

        def batch(positions: npt.NDArray[np.intp]) -> tuple[str, list[Any]]:
            return "ap", [port, ttl_s, wire_keys[positions].tobytes()]

        cycle = self._cycle
        report = await self._run(
            self._chunks, keys, r=chunk_holders(len(offered)), per_datagram=KEYS_PER_ANNOUNCE, batch=batch,
            counts_self=True, ttl_s=ttl_s,
        )  # fmt: skip
        cycle.note(keys, offered, self._clock(), ttl_s, report.bytes)
        self._on_progress()
        log.info(
            "announced chunks n=%d stored=%d lookups=%d datagrams=%d bytes=%d",
            len(keys), report.n_stored, report.lookups, report.datagrams, report.bytes,
        )  # fmt: skip
        return report

    async def _sweep_files(self, swarm_keys: list[bytes]) -> SweepReport:
        files = self._provided.files
        keys, top = _sorted_keys(key for key in swarm_keys if key in files)
        if not keys or not self._may_announce:
            return NOTHING_SENT
        items = [key + files[key].have.to_bytes(2) for key in keys]
        port = self._provided.data_port

        def batch(positions: npt.NDArray[np.intp]) -> tuple[str, list[Any]]:
            return "as", [port, SWARM_TTL_S, b"".join(items[position] for position in positions.tolist())]

        return await self._run(
            self._files, top, r=HOLDERS_FILE, per_datagram=FILES_PER_ANNOUNCE, batch=batch, counts_self=True,
            ttl_s=SWARM_TTL_S,
        )  # fmt: skip

    async def _sweep_metadata(self, metadata_keys: list[bytes]) -> SweepReport:
        keys, top = _sorted_keys(key for key in metadata_keys if key in self._names)
        if not keys:
            return NOTHING_SENT
        records = []
        for key in keys:
            _, name, size, manifest_hash = self._names[key]
            value = metadata_value(name, size, manifest_hash)
            seq, expires = int(self._wall() * 1000), int(self._wall()) + METADATA_TTL_S
            signature = self._identity.sign(metadata_text(key, seq, expires, value))
            record = MetadataRecord(self._identity.public, seq, expires, value, signature)
            self._provided.metadata[key] = record
            records.append([key, record.public, seq, expires, value, signature])

        def batch(positions: npt.NDArray[np.intp]) -> tuple[str, list[Any]]:
            return "pm", records[int(positions[0])]

        return await self._run(
            self._files, top, r=HOLDERS_FILE, per_datagram=1, batch=batch,
            counts_self=not self._protocol.is_read_only, ttl_s=METADATA_TTL_S,
        )  # fmt: skip

    async def _run(self, kind: _Kind, keys: U64, **options: Any) -> SweepReport:
        async with kind.turn:
            report = await Sweep(self._protocol, keys, pacer=self._pacer, book=kind.book, **options).run()
        # A walk meets nodes that the table does not have: only more than those are a network that has grown.
        kind.n_nodes = max(kind.n_nodes, report.n_nodes)
        if not report.n_nodes:
            kind.n_nodes = 0  # nobody was there to take it: again as soon as anybody is
        self.last_report = report
        return report


class _Kind:
    """What is kept per kind of record: its turn and alarm, who holds such records, and how large the network was.

    Attributes:
        n_seen: Other nodes in the network, as far as is known now.
        n_nodes: Other nodes when everything was announced.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.book = HolderBook(clock)
        self.turn = asyncio.Lock()
        self.wake = asyncio.Event()
        self.n_seen = 0
        self.n_nodes = 0
        self._all_due = False

    @property
    def has_grown(self) -> bool:
        """Whether the network is at least twice as large as the one to which everything was announced."""
        return self.n_seen > 0 and self.n_seen >= 2 * self.n_nodes

    def make_due(self) -> None:
        """Have everything of this kind announced again soon."""
        self._all_due = True
        self.wake.set()

    def take_due(self) -> bool:
        """Return whether everything is due; if so it is about to be announced."""
        self.wake.clear()
        all_due = self._all_due or self.has_grown
        self._all_due = False
        if all_due:
            self.n_nodes = self.n_seen
        return all_due

    async def rest(self, until: float, all_due: bool) -> None:
        """Wait until a time or the alarm; a little in any case after everything was announced."""
        if all_due:
            await asyncio.sleep(REANNOUNCE_PAUSE_S)
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(until - self._clock(), 0.0)):
                await self.wake.wait()
        except TimeoutError:
            pass


def _sorted_keys(keys: Iterable[bytes]) -> tuple[list[bytes], U64]:
    """Return distinct 20-byte keys in order, and their top 64 bits; keys that share 64 bits keep the first one."""
    by_top: dict[int, bytes] = {}
    for key in keys:
        by_top.setdefault(int.from_bytes(key[:8]), key)
    top = sorted(by_top)
    return [by_top[t] for t in top], np.array(top, dtype=np.uint64)
