"""Finding: the peers of a file, of many chunks, and what publishers say about a file. Results stream to a callback.

A file's peers and metadata are asked for inside the walk, so that a hit costs no extra round. Many chunks are
found region by region: each is asked of its nearest holder first, of the next only while it is missing. Where somebody
may have planted nodes, everybody around a key is asked. What this node stores for others counts as an answer; what it
offers itself does not (it is looking for others).

A key that was looked for a short while ago costs no walk: three of its nearest nodes are asked instead, so that what
was announced since is found all the same. Equal searches at the same time are one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcas.dht.budgets import (
    FIND_WALKERS,
    HOLDERS_ASKED,
    METADATA_VALUE_MAX,
    PEERS_PER_REPLY,
    PROBES_MAX,
)
from fastcas.dht.caches import ProviderCache, RegionMap, SingleFlight
from fastcas.dht.chunk_search import ChunkSearch
from fastcas.dht.contacts import Contact
from fastcas.dht.lookup import Lookup, OnReply, Question
from fastcas.dht.peerlist import MayUse, Peer, parse_peers
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.provided import metadata_key, swarm_key
from fastcas.dht.records import MetadataRecord, Provider
from fastcas.dht.regions import depth_of, span, walk
from fastcas.dht.vicinity import Vicinity
from fastcas.dht.wire import OK, Field, check

__all__ = ["Finder"]

U64 = npt.NDArray[np.uint64]
MAX_RECORDS = 8
_BLOB = Field(bytes, 0, 1200)
_GS = (_BLOB, _BLOB, _BLOB, _BLOB, _BLOB)
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
        clock: Monotonic time, seconds.
        wall: Unix time, seconds.
    """

    def __init__(
        self, protocol: FcProtocol, may_use: MayUse, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        """Prepare; nothing is sent."""
        self._protocol = protocol
        self._may_use = may_use
        self._wall = wall
        self.regions = RegionMap(clock, lambda: len(protocol.router))
        self.providers = ProviderCache(clock)
        self._file_flights: SingleFlight[list[Peer]] = SingleFlight()
        self._chunk_flights: SingleFlight[dict[int, list[Peer]]] = SingleFlight()
        self._metadata_flights: SingleFlight[list[MetadataRecord]] = SingleFlight()

    # --- files ---

    async def find_file(
        self,
        file_hash: bytes,
        want: int,
        deadline_s: float,
        on_peers: Callable[[list[Peer]], None],
    ) -> int:
        """Walk to a file's swarm key, calling `on_peers` with new peers as they come; return how many there were."""
        key = swarm_key(file_hash)
        found: set[Peer] = set()

        def take(peers: list[Peer]) -> None:
            new = [peer for peer in dict.fromkeys(peers) if peer not in found]
            found.update(new)
            if new:
                on_peers(new)

        take(self._usable(self._peers_of(provider for provider, _ in self._protocol.swarms.get(key, want))))
        search = partial(self._search_file, key, want)
        await self._file_flights.share((key, want), search, take, deadline_s)
        return len(found)

    async def _search_file(self, key: bytes, want: int, tell: Callable[[list[Peer]], None]) -> None:
        known = self.providers.get(key)
        if known is not None and len(known.peers) >= want:
            tell(list(known.peers))
            return
        if known is not None and await self._probe_file(key, want, known.peers, tell):
            return
        found: dict[Peer, None] = {}
        holders = 0

        def on_reply(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
            nonlocal holders
            if not check(elements, _GS):
                return None
            peers = self._usable(parse_peers(elements[0], elements[1], contact.ip, self._may_use))
            found.update(dict.fromkeys(peers))
            if peers:
                holders += 1
                tell(peers)
            return elements[3], elements[4]

        def is_enough() -> bool:
            return len(found) >= want and holders >= HOLDERS_ASKED

        args = [key, min(want, 255)]
        is_complete = await self._cover(int.from_bytes(key), lambda _: ("gs", args), on_reply, is_enough)
        if is_complete or found:
            self.providers.note(key, found)

    async def _probe_file(
        self, key: bytes, want: int, known: tuple[Peer, ...], tell: Callable[[list[Peer]], None]
    ) -> bool:
        """Ask a few of the nearest nodes about a key that was looked for before; whether that is answer enough.

        Whom no complete answer names any more has left.
        """
        region = self.regions.get(int.from_bytes(key[:8]))
        if region is None:
            return False
        number = int.from_bytes(key)
        found: dict[Peer, None] = {}
        answers = 0
        is_all = True

        async def ask(node: Contact) -> None:
            nonlocal answers, is_all
            reply = await self._protocol.ask(node, "gs", [key, min(want, 255)])
            if reply is None or reply.status != OK or not check(reply.elements, _GS):
                return
            told = parse_peers(reply.elements[0], reply.elements[1], node.ip, self._may_use)
            peers = self._usable(told)
            found.update(dict.fromkeys(peers))
            answers += 1
            is_all = is_all and len(told) < min(PEERS_PER_REPLY, want)
            if peers:
                tell(peers)

        nodes = sorted(region[1], key=lambda node: node.long_id ^ number)[:PROBES_MAX]
        needed = min(HOLDERS_ASKED, len(nodes))
        while nodes and answers < needed:
            batch, nodes = nodes[: needed - answers], nodes[needed - answers :]
            await asyncio.gather(*map(ask, batch))
        if answers < needed:
            self.regions.drop(int.from_bytes(key[:8]))
            return False
        if not is_all:
            tell(list(known))
        elif found:
            self.providers.note(key, found)
        elif known:
            self.providers.forget(key)
        return True

    async def _cover(self, target: int, question: Question, on_reply: OnReply, is_enough: Callable[[], bool]) -> bool:
        """Ask everybody responsible for a target until it is enough; whether all were asked.

        It is never enough where somebody may have planted nodes: they could name peers of their own. Responsible are
        the 20 nearest nodes and all within the distance at which the 20th is expected; where more are there than
        there should be, all who can be found so far around.
        """
        asked: set[bytes] = set()

        def heard(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
            asked.add(contact.id)
            nodes = on_reply(contact, elements)
            if is_enough() and not lookup.is_crowded:
                lookup.stop()
            return nodes

        vicinity = Vicinity(self._protocol, target)
        mapped = self.regions.get(target >> 96)
        lookup = Lookup(
            self._protocol,
            target,
            radius=vicinity.reach,
            question=question,
            on_reply=heard,
            seeds=mapped[1] if mapped is not None else (),
        )
        result = await lookup.run()
        if not vicinity.is_crowded(result.nodes):
            if not result.is_cut and result.nodes:
                self.regions.put(*span(target, depth_of(target, result.nodes)), result.nodes)
            return not result.is_cut
        everybody, _ = await vicinity.everybody(result.nodes)
        left = [c for c in everybody if c.id not in asked and c.long_id ^ target <= vicinity.reach]
        # All at once: those who swallow requests must not use up the time of those behind them.
        replies = await asyncio.gather(*(self._protocol.ask(contact, *question(contact)) for contact in left))
        for contact, reply in zip(left, replies, strict=True):
            if reply is not None and reply.status == OK:
                on_reply(contact, reply.elements)
        return True

    # --- chunks ---

    async def find_chunks(
        self,
        hashes: bytes,
        want: int,
        deadline_s: float,
        on_found: Callable[[dict[int, list[Peer]]], None],
    ) -> int:
        """Find peers for n 32-byte hashes; `on_found` gets {position of the hash: new peers}, several times.

        Returns the number of hashes with at least one peer.
        """
        rows = np.ascontiguousarray(np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32)[:, :8])
        keys, inverse = np.unique(rows.view(">u8").ravel().astype(np.uint64), return_inverse=True)
        positions: dict[int, list[int]] = {}
        for position, row in enumerate(inverse.tolist()):
            positions.setdefault(row, []).append(position)
        found: list[set[Peer]] = [set() for _ in keys]

        def take(told: dict[int, list[Peer]]) -> None:
            news: dict[int, list[Peer]] = {}
            for row, peers in told.items():
                new = [peer for peer in dict.fromkeys(peers) if peer not in found[row]]
                if new:
                    found[row].update(new)
                    for position in positions[row]:
                        news[position] = new
            if news:
                on_found(news)

        search = partial(self._search_chunks, keys, want)
        await self._chunk_flights.share((keys.tobytes(), want), search, take, deadline_s)
        return sum(len(positions[row]) for row, peers in enumerate(found) if peers)

    async def _search_chunks(self, keys: U64, want: int, tell: Callable[[dict[int, list[Peer]]], None]) -> None:
        found: list[set[Peer]] = [set() for _ in keys]
        is_open = np.ones(len(keys), dtype=bool)
        is_missed = np.zeros(len(keys), dtype=bool)

        def take(rows: npt.NDArray[np.intp], told: dict[int, list[Peer | None]]) -> None:
            news: dict[int, list[Peer]] = {}
            for at, peers in told.items():
                row = int(rows[at])
                new = [peer for peer in self._usable(peers) if peer not in found[row]]
                if new:
                    found[row].update(new)
                    news[row] = new
            if news:
                tell(news)

        all_rows = np.arange(len(keys))
        held = self._protocol.hints
        for row, key in enumerate(keys.tolist()):
            known = self.providers.get(key)
            if known is not None:
                is_missed[row] = not known.peers
                is_open[row] = not known.peers or not (known.is_fresh or len(known.peers) >= want)
                if not is_open[row]:
                    take(all_rows, {row: list(known.peers)})
            if held.n_hints:
                take(all_rows, {row: self._peers_of(held.get(key, want))})
        rows = np.flatnonzero(is_open)
        search = ChunkSearch(
            self._protocol,
            self._may_use,
            keys[rows],
            is_missed[rows],
            want,
            [found[row] for row in rows.tolist()],
            partial(take, rows),
            self.regions,
        )
        await walk(self._protocol, keys[rows], search.region, walkers=FIND_WALKERS, regions=self.regions)
        for row in rows.tolist():
            if found[row] or not is_missed[row]:
                self.providers.note(int(keys[row]), found[row])

    # --- metadata ---

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataRecord]:
        """Return the live records whose signatures hold, newest first, at most 8."""
        key = metadata_key(file_hash)
        best: dict[bytes, MetadataRecord] = {}

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

        keep(self._protocol.metadata.get(key))
        await self._metadata_flights.share(key, partial(self._search_metadata, key), keep, deadline_s)
        return sorted(best.values(), key=lambda record: -record.expires)

    async def _search_metadata(self, key: bytes, tell: Callable[[list[MetadataRecord]], None]) -> None:
        rest: list[tuple[Contact, int]] = []

        def on_reply(contact: Contact, elements: list[Any]) -> tuple[bytes, bytes] | None:
            if not check(elements, _GM):
                return None
            total, records = elements[0], _records_in(elements[1])
            tell(records)
            if len(records) < min(total, MAX_RECORDS):
                rest.append((contact, len(records)))
            return elements[2], elements[3]

        await self._cover(int.from_bytes(key), lambda _: ("gm", [key, 0]), on_reply, lambda: False)
        for contact, skip in rest[:HOLDERS_ASKED]:
            await self._ask_for_rest(contact, key, skip, tell)

    async def _ask_for_rest(
        self, contact: Contact, key: bytes, skip: int, tell: Callable[[list[MetadataRecord]], None]
    ) -> None:
        """Fetch the alternatives that did not fit into a holder's first reply, one datagram each."""
        while skip < MAX_RECORDS:
            reply = await self._protocol.ask(contact, "gm", [key, skip])
            if reply is None or reply.status != OK or not check(reply.elements, _GM):
                return
            records = _records_in(reply.elements[1])
            if not records:
                return
            tell(records)
            skip += len(records)

    # --- common ---

    def _peers_of(self, providers: Iterable[Provider]) -> list[Peer | None]:
        """Return peers of records that we hold ourselves; we saw their addresses, so we are the teller."""
        return [
            Peer(p.node_id, p.ip, p.data_port) if self._may_use(p.ip, p.data_port, p.ip) else None for p in providers
        ]

    def _usable(self, peers: Iterable[Peer | None]) -> list[Peer]:
        own_id = self._protocol.identity.node_id
        return [peer for peer in peers if peer is not None and peer.node_id != own_id]


def _records_in(raw: list[Any]) -> list[MetadataRecord]:
    return [MetadataRecord(*entry[:5]) for entry in raw if isinstance(entry, list) and check(entry, _RECORD)]
