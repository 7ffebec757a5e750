"""Announcing what this node has: at once when it is new, again when the network has grown, and before it expires.

Owns the schedule only: the offers are in `Provided`, the sending is in `Sweep`. Every chunk key and every file is
announced by a sweep, never by a lookup of its own.
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
    CHUNK_CYCLE_S,
    CHUNK_TTL_S,
    FILES_PER_ANNOUNCE,
    HOLDERS_CHUNK,
    HOLDERS_FILE,
    KEYS_PER_ANNOUNCE,
    LEAVE_S,
    METADATA_CYCLE_S,
    METADATA_TTL_S,
    METADATA_VALUE_MAX,
    REANNOUNCE_PAUSE_S,
    SWARM_CYCLE_S,
    SWARM_TTL_S,
)
from fastcas.dht.contacts import Contact
from fastcas.dht.identity import Identity, metadata_text
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.provided import OwnFile, Provided, metadata_key, swarm_key
from fastcas.dht.records import MetadataRecord
from fastcas.dht.sweep import Sweep, SweepReport
from fastcas.errors import UsageError

__all__ = ["Announcer", "metadata_value", "parse_metadata_value"]

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]
NAME_BYTES_MAX = 255
JITTER = 0.1


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
    """

    def __init__(
        self,
        protocol: FcProtocol,
        identity: Identity,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """Prepare; nothing is sent before `run` or a call."""
        self._protocol = protocol
        self._identity = identity
        self._clock = clock
        self._wall = wall
        self._rng = rng
        self._provided: Provided = protocol.provided
        self._announced: U64 = np.zeros(0, dtype=np.uint64)
        self._holders: set[Contact] = set()
        self._wake = asyncio.Event()
        self._nodes_then = 0
        self._all_due = False
        self._names: dict[bytes, tuple[bytes, str, int, bytes]] = {}
        # One sweep of a kind at a time, since two would only share windows; files never wait behind a million chunks.
        self._chunks_turn = asyncio.Lock()
        self._files_turn = asyncio.Lock()
        self.last_report: SweepReport | None = None

    # --- offers ---

    def set_snapshot(self, keys: U64) -> None:
        """Replace the chunk keys (sorted 64-bit); new ones are announced soon."""
        self._provided.snapshot = keys
        self._wake.set()

    def set_data_port(self, port: int) -> None:
        """Change the port that is announced; everything is announced again."""
        if port != self._provided.data_port:
            self._provided.data_port = port
            self._all_due = True
            self._wake.set()

    def note_network(self, n_contacts: int) -> None:
        """Look at the table's size: announce everything again when it has at least doubled."""
        if n_contacts and n_contacts >= 2 * self._nodes_then:
            self._all_due = True
            self._wake.set()

    async def announce_chunks(self, keys: U64) -> int:
        """Offer and announce chunk keys now; return how many somebody holds."""
        self._provided.extra = np.union1d(self._provided.extra, np.setdiff1d(keys, self._provided.snapshot))
        report = await self._sweep_chunks(keys)
        return report.n_stored

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
            self._provided.snapshot = self._provided.extra = self._announced = np.zeros(0, dtype=np.uint64)
            self._names.clear()
            await self._tell_holders([0, b""])
            return
        keys = [swarm_key(file_hash) for file_hash in files]
        for key in keys:
            self._provided.files.pop(key, None)
        for start in range(0, len(keys), FILES_PER_ANNOUNCE):
            await self._tell_holders([1, b"".join(keys[start : start + FILES_PER_ANNOUNCE])])

    async def leave(self) -> None:
        """Tell all who hold a record of ours that it is void; at most about a second."""
        await self._tell_holders([0, b""])

    async def _tell_holders(self, args: list[Any]) -> None:
        asks = [self._protocol.ask(holder, "wd", args, hard_s=LEAVE_S) for holder in self._holders]
        if asks:
            await asyncio.wait(asks, timeout=LEAVE_S + 0.2)

    # --- schedule ---

    async def run(self) -> None:
        """Announce what is due, for ever."""
        loop = asyncio.get_running_loop()
        due = {"chunks": self._next(CHUNK_CYCLE_S), "files": self._next(SWARM_CYCLE_S),
               "metadata": self._next(METADATA_CYCLE_S)}  # fmt: skip
        while True:
            self._wake.clear()
            all_due, self._all_due = self._all_due, False
            if all_due:
                self._nodes_then = len(self._protocol.router)
            now = self._clock()
            if all_due or now >= due["files"]:
                await self._sweep_files(list(self._provided.files))
                due["files"] = self._next(SWARM_CYCLE_S)
            if all_due or now >= due["metadata"]:
                await self._sweep_metadata(list(self._names))
                due["metadata"] = self._next(METADATA_CYCLE_S)
            if all_due or now >= due["chunks"]:
                await self._sweep_chunks(self._provided.chunk_keys)
                due["chunks"] = self._next(CHUNK_CYCLE_S)
            else:
                offered = self._provided.chunk_keys
                # What is gone is forgotten, so that it is announced again should it come back.
                self._announced = np.intersect1d(self._announced, offered, assume_unique=True)
                await self._sweep_chunks(np.setdiff1d(offered, self._announced, assume_unique=True))
            if all_due:
                await asyncio.sleep(REANNOUNCE_PAUSE_S)
            if not self._all_due and not self._wake.is_set():
                try:
                    async with asyncio.timeout_at(loop.time() + max(min(due.values()) - self._clock(), 0.0)):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    def _next(self, cycle_s: float) -> float:
        return self._clock() + cycle_s * (1.0 + JITTER * (2.0 * self._rng.random() - 1.0))

    # --- sweeps ---

    @property
    def _may_announce(self) -> bool:
        return bool(self._provided.data_port) and not self._protocol.is_read_only

    async def _sweep_chunks(self, keys: U64) -> SweepReport:
        if not len(keys) or not self._may_announce:
            return SweepReport(0, 0, set(), 0, 0)
        wire_keys = keys.astype(">u8")
        port = self._provided.data_port

        def batch(positions: npt.NDArray[np.intp]) -> tuple[str, list[Any]]:
            return "ap", [port, CHUNK_TTL_S, wire_keys[positions].tobytes()]

        report = await self._run(
            self._chunks_turn, keys, r=HOLDERS_CHUNK, per_datagram=KEYS_PER_ANNOUNCE, batch=batch, counts_self=True
        )
        self._announced = np.union1d(self._announced, keys)
        log.info(
            "announced chunks n=%d stored=%d lookups=%d datagrams=%d",
            len(keys), report.n_stored, report.lookups, report.datagrams,
        )  # fmt: skip
        return report

    async def _sweep_files(self, swarm_keys: list[bytes]) -> SweepReport:
        files = self._provided.files
        keys, top = _sorted_keys(key for key in swarm_keys if key in files)
        if not keys or not self._may_announce:
            return SweepReport(0, 0, set(), 0, 0)
        items = [key + files[key].have.to_bytes(2) for key in keys]
        port = self._provided.data_port

        def batch(positions: npt.NDArray[np.intp]) -> tuple[str, list[Any]]:
            return "as", [port, SWARM_TTL_S, b"".join(items[position] for position in positions.tolist())]

        return await self._run(
            self._files_turn, top, r=HOLDERS_FILE, per_datagram=FILES_PER_ANNOUNCE, batch=batch, counts_self=True
        )

    async def _sweep_metadata(self, metadata_keys: list[bytes]) -> SweepReport:
        keys, top = _sorted_keys(metadata_keys)
        if not keys:
            return SweepReport(0, 0, set(), 0, 0)
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
            self._files_turn,
            top,
            r=HOLDERS_FILE,
            per_datagram=1,
            batch=batch,
            counts_self=not self._protocol.is_read_only,
        )

    async def _run(self, turn: asyncio.Lock, keys: U64, **options: Any) -> SweepReport:
        async with turn:
            report = await Sweep(self._protocol, keys, **options).run()
        self._holders |= report.holders
        self.last_report = report
        return report


def _sorted_keys(keys: Iterable[bytes]) -> tuple[list[bytes], U64]:
    """Return distinct 20-byte keys in order, and their top 64 bits; keys that share 64 bits keep the first one."""
    by_top: dict[int, bytes] = {}
    for key in keys:
        by_top.setdefault(int.from_bytes(key[:8]), key)
    top = sorted(by_top)
    return [by_top[t] for t in top], np.array(top, dtype=np.uint64)
