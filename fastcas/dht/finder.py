"""Finding: the peers of a file, of many chunks, and what publishers say about a file. Results stream to a callback.

A file's peers and metadata are asked for inside the walk, so that a hit costs no extra round. Many chunks are
found region by region: each is asked of its nearest holder first, of the next only while it is missing. What this
node stores for others counts as an answer; what it offers itself does not (it is looking for others).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import HOLDERS_ASKED, HOLDERS_CHUNK, KEYS_PER_QUERY, KSIZE, METADATA_VALUE_MAX, WINDOW_TOTAL
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup
from fastcas.dht.peerlist import MayUse, Peer, parse_index, parse_peers
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.provided import metadata_key, swarm_key
from fastcas.dht.records import MetadataRecord, Provider
from fastcas.dht.regions import Region, allocate, id_key, walk
from fastcas.dht.wire import OK, Field, check

__all__ = ["Finder"]

FEW_KEYS = 1000  # up to here a key is asked of three holders even after the first answer
MAX_RECORDS = 8
_BLOB = Field(bytes, 0, 1200)
_GS = (_BLOB, _BLOB, _BLOB, _BLOB, _BLOB)
_GP = (_BLOB, _BLOB, _BLOB, Field(int, 0, 255), _BLOB, _BLOB)
_GM = (Field(int, 0, 64), Field(list, 0, MAX_RECORDS), _BLOB, _BLOB)
_RECORD = (
    Field(bytes, 32, 32),
    Field(int, 0, (1 << 63) - 1),
    Field(int, 0, (1 << 63) - 1),
    Field(bytes, 1, METADATA_VALUE_MAX),
    Field(bytes, 64, 64),
)


class Finder:
    """Looks for records of other nodes.

    Args:
        protocol: Sends for us.
        may_use: Whether a peer address (ip, port) told by somebody at the third argument may be contacted.
        wall: Unix time, seconds.
    """

    def __init__(self, protocol: FcProtocol, may_use: MayUse, wall: Callable[[], float]) -> None:
        """Prepare; nothing is sent."""
        self._protocol = protocol
        self._may_use = may_use
        self._wall = wall

    # --- files ---

    async def find_file(
        self, file_hash: bytes, want: int, deadline_s: float, on_peers: Callable[[list[Peer]], None]
    ) -> int:
        """Walk to a file's swarm key, calling `on_peers` with new peers as they come; return how many there were."""
        key = swarm_key(file_hash)
        found: set[Peer] = set()
        holders = 0

        def take(peers: Iterable[Peer | None]) -> None:
            new = [peer for peer in dict.fromkeys(peers) if self._is_news(peer, found)]
            found.update(peer for peer in new if peer is not None)
            if new:
                on_peers([peer for peer in new if peer is not None])

        def on_reply(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
            nonlocal holders
            if not check(elements, _GS):
                return None
            peers = parse_peers(elements[0], elements[1], contact.ip, self._may_use)
            if peers:
                holders += 1
                take(peers)
            if len(found) >= want and holders >= HOLDERS_ASKED:
                lookup.stop()
            return elements[3], elements[4]

        take(self._peers_of(provider for provider, _ in self._protocol.swarms.get(key, want)))
        lookup = Lookup(
            self._protocol,
            int.from_bytes(key),
            k=KSIZE,
            question=lambda contact: ("gs", [key, min(want, 255)]),
            on_reply=on_reply,
        )
        await lookup.run(deadline_s=deadline_s)
        return len(found)

    # --- chunks ---

    async def find_chunks(
        self, hashes: bytes, want: int, deadline_s: float, on_found: Callable[[dict[int, list[Peer]]], None]
    ) -> int:
        """Find peers for n 32-byte hashes; `on_found` gets {position of the hash: new peers}, several times.

        Returns the number of hashes with at least one peer.
        """
        all_keys = np.ascontiguousarray(np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32)[:, :8])
        wanted = all_keys.view(">u8").ravel().astype(np.uint64)
        keys, inverse = np.unique(wanted, return_inverse=True)
        positions: dict[int, list[int]] = {}
        for position, row in enumerate(inverse.tolist()):
            positions.setdefault(row, []).append(position)
        found: list[set[Peer]] = [set() for _ in keys]

        def take(rows: dict[int, list[Peer | None]]) -> None:
            news: dict[int, list[Peer]] = {}
            for row, peers in rows.items():
                new = [peer for peer in dict.fromkeys(peers) if peer is not None and self._is_news(peer, found[row])]
                if new:
                    found[row].update(new)
                    for position in positions[row]:
                        news[position] = new
            if news:
                on_found(news)

        held = self._protocol.hints
        if held.n_hints:
            take({row: self._peers_of(held.get(int(key), want)) for row, key in enumerate(keys.tolist())})
        search = _ChunkSearch(self._protocol, self._may_use, keys, want, found, take)
        try:
            async with asyncio.timeout(deadline_s):
                await walk(self._protocol, keys, search.region)
        except TimeoutError:
            pass
        return sum(len(positions[row]) for row, peers in enumerate(found) if peers)

    # --- metadata ---

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataRecord]:
        """Return the live records whose signatures hold, newest first, at most 8."""
        key = metadata_key(file_hash)
        best: dict[bytes, MetadataRecord] = {}
        rest: list[tuple[Contact, int]] = []

        def keep(records: Iterable[MetadataRecord]) -> None:
            for record in records:
                known = best.get(record.public)
                if known is not None and known.seq >= record.seq:
                    continue
                if (known is not None or len(best) < MAX_RECORDS) and record.expires > self._wall():
                    if record.holds(key):
                        best[record.public] = record
                    else:
                        self._protocol.counters["bad_signatures"] += 1

        def on_reply(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
            if not check(elements, _GM):
                return None
            total, records = elements[0], _records_in(elements[1])
            keep(records)
            if len(records) < min(total, MAX_RECORDS):
                rest.append((contact, len(records)))
            return elements[2], elements[3]

        keep(self._protocol.metadata.get(key))
        lookup = Lookup(
            self._protocol,
            int.from_bytes(key),
            k=KSIZE,
            question=lambda contact: ("gm", [key, 0]),
            on_reply=on_reply,
        )
        try:
            async with asyncio.timeout(deadline_s):
                await lookup.run(deadline_s=deadline_s)
                for contact, skip in rest[:HOLDERS_ASKED]:
                    await self._ask_for_rest(contact, key, skip, keep)
        except TimeoutError:
            pass
        return sorted(best.values(), key=lambda record: -record.expires)

    async def _ask_for_rest(
        self, contact: Contact, key: bytes, skip: int, keep: Callable[[Iterable[MetadataRecord]], None]
    ) -> None:
        """Fetch the alternatives that did not fit into a holder's first reply, one datagram each."""
        while skip < MAX_RECORDS:
            reply = await self._protocol.ask(contact, "gm", [key, skip])
            if reply is None or reply.status != OK or not check(reply.elements, _GM):
                return
            records = _records_in(reply.elements[1])
            if not records:
                return
            keep(records)
            skip += len(records)

    # --- common ---

    def _peers_of(self, providers: Iterable[Provider]) -> list[Peer | None]:
        """Return peers of records that we hold ourselves; we saw their addresses, so we are the teller."""
        return [
            Peer(p.node_id, p.ip, p.data_port) if self._may_use(p.ip, p.data_port, p.ip) else None for p in providers
        ]

    def _is_news(self, peer: Peer | None, known: set[Peer]) -> bool:
        return peer is not None and peer not in known and peer.node_id != self._protocol.identity.node_id


class _ChunkSearch:
    """One search for many chunks: asks the holders of each region."""

    def __init__(
        self,
        protocol: FcProtocol,
        may_use: MayUse,
        keys: npt.NDArray[np.uint64],
        want: int,
        found: list[set[Peer]],
        take: Callable[[dict[int, list[Peer | None]]], None],
    ) -> None:
        self._protocol = protocol
        self._may_use = may_use
        self._keys = keys
        self._want = want
        self._found = found
        self._take = take
        self._window = asyncio.Semaphore(WINDOW_TOTAL)

    async def region(self, region: Region) -> None:
        """Ask for a region's keys, rank by rank: only what is still missing, or wants more answers."""
        if not region.nodes:
            return
        keys = self._keys[region.first : region.last]
        ids = np.array([id_key(node.id) for node in region.nodes], dtype=np.uint64)
        nearest = allocate(keys, ids, HOLDERS_CHUNK)
        sure = HOLDERS_ASKED if len(self._keys) <= FEW_KEYS else 1
        for rank in range(nearest.shape[1]):
            open_rows = [
                row
                for row in range(len(keys))
                if not self._found[region.first + row]
                or (rank < sure and len(self._found[region.first + row]) < self._want)
            ]
            if not open_rows:
                return
            rows = np.array(open_rows, dtype=np.intp)
            holders = nearest[rows, rank]
            async with asyncio.TaskGroup() as group:
                for number in np.unique(holders).tolist():
                    mine = rows[holders == number] + region.first
                    for start in range(0, len(mine), KEYS_PER_QUERY):
                        part = mine[start : start + KEYS_PER_QUERY]
                        group.create_task(self._ask(region.nodes[number], part))

    async def _ask(self, node: Contact, rows: npt.NDArray[np.intp]) -> None:
        """Ask one holder for a datagram's worth of keys; a reply that answers only some is continued."""
        while len(rows):
            keys = self._keys[rows].astype(">u8").tobytes()
            async with self._window:
                reply = await self._protocol.ask(node, "gp", [b"", keys, min(self._want, 255)])
            if reply is None or reply.status != OK or not check(reply.elements, _GP):
                return
            peers4, peers6, index, answered = reply.elements[:4]
            peers = parse_peers(peers4, peers6, node.ip, self._may_use)
            lists = parse_index(index, answered, len(peers))
            if not lists or len(lists) > len(rows):
                return
            self._take({int(row): [peers[i] for i in picks] for row, picks in zip(rows, lists, strict=False)})
            rows = rows[len(lists) :]


def _records_in(raw: list[Any]) -> list[MetadataRecord]:
    return [MetadataRecord(*entry[:5]) for entry in raw if isinstance(entry, list) and check(entry, _RECORD)]
