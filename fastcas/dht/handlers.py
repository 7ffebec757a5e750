"""Answering requests: synchronous, by a fixed table of names with the shape of their arguments.

A handler gets an `Asker` and arguments that have the right types and sizes, and returns the reply's elements after
the token, within the asker's room. It never sends, never waits, never raises for what a request says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastcas.dht.budgets import (
    CONTACTS_BESIDE_METADATA,
    CONTACTS_BESIDE_RECORDS,
    CONTACTS_PER_REPLY,
    CONTACTS_PER_REPLY_MAX,
    DATAGRAM_MAX,
    METADATA_VALUE_MAX,
    PEERS_PER_REPLY,
)
from fastcas.dht.contacts import V4_SIZE, pack_contacts
from fastcas.dht.guard import TokenBucket
from fastcas.dht.identity import Identity, challenge_text
from fastcas.dht.peerlist import PeerPacker
from fastcas.dht.provided import Provided
from fastcas.dht.records import HintStore, MetadataRecord, MetadataStore, SwarmStore
from fastcas.dht.table import FcTable
from fastcas.dht.wire import BAD_TOKEN, FULL, OK, Field, check, pack_observed

__all__ = ["Asker", "Handlers"]

REPLY_OVERHEAD = 21 + 1 + 1 + 20 + 10  # head, array, status, observed address, token
BLOB_OVERHEAD = 3  # of a byte string in msgpack
_ID = Field(bytes, 20, 20)
_PORT = Field(int, 1, 65535)
_TTL = Field(int, 1, 1 << 32)


@dataclass(slots=True)
class Asker:
    """Who asks.

    Attributes:
        is_proven: It has shown a token: the address is real, writes are allowed, replies may be large.
        room: Bytes that the reply datagram may have.
    """

    ip: str
    port: int
    node_id: bytes
    is_proven: bool
    room: int


class Handlers:
    """The serving half of a node: its table, its own offers and the records that it holds for others."""

    def __init__(
        self,
        identity: Identity,
        net_id: bytes,
        table: FcTable,
        provided: Provided,
        hints: HintStore,
        swarms: SwarmStore,
        metadata: MetadataStore,
        signatures: TokenBucket,
        clock: Callable[[], float],
    ) -> None:
        """Serve from these."""
        self._identity = identity
        self._net_id = net_id
        self._table = table
        self._provided = provided
        self._hints = hints
        self._swarms = swarms
        self._metadata = metadata
        self._signatures = signatures
        self._clock = clock

    def handle(self, name: str, asker: Asker, args: list[Any]) -> tuple[int, list[Any]] | None:
        """Return (status, elements), or None when there is no answer: unknown name, malformed, or over a limit."""
        entry = _HANDLERS.get(name)
        if entry is None or not check(args, entry[1]):
            return None
        handler, fields, is_write = entry
        if is_write and not asker.is_proven:
            return BAD_TOKEN, []
        return handler(self, asker, args[: len(fields)])  # what follows is padding, or newer than we

    # --- reading ---

    def _ping(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]] | None:
        if not asker.is_proven and not self._signatures.take(self._clock()):
            return None
        observed = pack_observed(asker.ip, asker.port)
        text = challenge_text(args[0], self._identity.node_id, observed, self._net_id)
        return OK, [self._identity.node_id, self._identity.public, self._identity.sign(text)]

    def _fn(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        room = asker.room - REPLY_OVERHEAD - 2 * BLOB_OVERHEAD
        return OK, list(self._nodes(asker, args[0], min(args[1], CONTACTS_PER_REPLY_MAX), room))

    def _gp(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        target, keys, want = args[0], args[1], min(args[2], PEERS_PER_REPLY)
        room = asker.room - REPLY_OVERHEAD - 5 * BLOB_OVERHEAD - 3
        nodes4, nodes6 = b"", b""
        if target:
            nodes4, nodes6 = self._nodes(asker, target, CONTACTS_BESIDE_RECORDS, room)
            room -= len(nodes4) + len(nodes6)
        packer = PeerPacker(asker.ip, room)
        rows: list[list[tuple[int, int]]] = []
        for at in range(0, len(keys), 8):
            if packer.room < 1:
                break
            packer.room -= 1
            rows.append(self._holders(packer, int.from_bytes(keys[at : at + 8]), want))
        index = b"".join(bytes((len(row), *map(packer.position, row))) for row in rows)
        return OK, [*packer.blobs(), index, len(rows), nodes4, nodes6]

    def _holders(self, packer: PeerPacker, key: int, want: int) -> list[tuple[int, int]]:
        row: list[tuple[int, int]] = []
        if self._provided.has_chunk(key) and packer.room > V4_SIZE:
            place = packer.add_self(self._identity.node_id, self._provided.data_port)
            if place is not None:
                packer.room -= 1
                row.append(place)
        for provider in self._hints.get(key, want):
            if len(row) >= want or packer.room < 1:
                break
            place = packer.add(provider)
            if place is not None and place not in row:
                packer.room -= 1
                row.append(place)
        return row

    def _gs(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        key, want = args[0], min(args[1], PEERS_PER_REPLY)
        room = asker.room - REPLY_OVERHEAD - 5 * BLOB_OVERHEAD - 2 * want
        packer = PeerPacker(asker.ip, room - min(CONTACTS_BESIDE_RECORDS * V4_SIZE, room // 2))
        places: dict[tuple[int, int], int] = {}
        own = self._provided.have_of(key)
        if own is not None:
            place = packer.add_self(self._identity.node_id, self._provided.data_port)
            if place is not None:
                places[place] = own
        for provider, have in self._swarms.get(key, want):
            if len(places) >= want:
                break
            place = packer.add(provider)
            if place is not None:
                places[place] = have
        in_order = sorted(places, key=packer.position)
        have2 = b"".join(places[place].to_bytes(2) for place in in_order)
        peers4, peers6 = packer.blobs()
        nodes = self._nodes(asker, key, CONTACTS_PER_REPLY, room - len(peers4) - len(peers6))
        return OK, [peers4, peers6, have2, *nodes]

    def _gm(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        key, skip = args
        room = asker.room - REPLY_OVERHEAD - 4 * BLOB_OVERHEAD
        held = {record.public: record for record in self._metadata.get(key)}
        own = self._provided.metadata.get(key)
        if own is not None:
            held[own.public] = own
        records = sorted(held.values(), key=lambda record: record.public)
        reserved = 0 if skip else min(CONTACTS_BESIDE_METADATA * V4_SIZE, room // 2)
        sent: list[list[Any]] = []
        for record in records[skip:]:
            size = 32 + 64 + len(record.value) + 2 * 9 + 4 * BLOB_OVERHEAD
            if size > room - reserved:
                break
            room -= size
            sent.append([record.public, record.seq, record.expires, record.value, record.signature])
        nodes = (b"", b"") if skip else self._nodes(asker, key, CONTACTS_PER_REPLY, room)
        return OK, [len(records), sent, *nodes]

    def _nodes(self, asker: Asker, target: bytes, count: int, room: int) -> tuple[bytes, bytes]:
        count = min(count, room // V4_SIZE)
        if count < 1:
            return b"", b""
        nearest = self._table.nearest_to_tell(int.from_bytes(target), count, (asker.ip, asker.port))
        nodes4, nodes6 = pack_contacts(nearest, asker.ip)
        while len(nodes4) + len(nodes6) > room:
            nearest.pop()
            nodes4, nodes6 = pack_contacts(nearest, asker.ip)
        return nodes4, nodes6

    # --- writing: the asker is proven ---

    def _ap(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        data_port, ttl_s, keys = args
        accepted = self._hints.put(asker.node_id, asker.ip, asker.port, data_port, keys, ttl_s)
        return (OK, [accepted, 0]) if accepted else (FULL, [0, 60])

    def _as(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        data_port, ttl_s, items = args
        accepted = 0
        for at in range(0, len(items), 22):
            have = min(int.from_bytes(items[at + 20 : at + 22]), 1000)
            key = items[at : at + 20]
            accepted += self._swarms.put(key, asker.node_id, asker.ip, asker.port, data_port, have, ttl_s)
        return (OK, [accepted, 0]) if accepted else (FULL, [0, 60])

    def _pm(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        key, public, seq, expires, value, signature = args
        accepted = self._metadata.put(key, MetadataRecord(public, seq, expires, value, signature))
        return (OK, [1]) if accepted else (FULL, [0])

    def _wd(self, asker: Asker, args: list[Any]) -> tuple[int, list[Any]]:
        source = (asker.node_id, asker.ip, asker.port)
        if args[0] == 0:
            known = self._table.get(asker.node_id)
            if known is not None and known.address == (asker.ip, asker.port):
                self._table.remove_contact(known)  # it leaves; if it does not, its next request brings it back
            return OK, [self._hints.withdraw(*source) + self._swarms.withdraw(*source)]
        keys = [args[1][at : at + 20] for at in range(0, len(args[1]), 20)]
        return OK, [self._swarms.withdraw(*source, keys)]


_Handler = Callable[[Handlers, Asker, list[Any]], tuple[int, list[Any]] | None]
_HANDLERS: dict[str, tuple[_Handler, tuple[Field, ...], bool]] = {
    "ping": (Handlers._ping, (Field(bytes, 16, 16),), False),
    "fn": (Handlers._fn, (_ID, Field(int, 1, 64)), False),
    "gp": (Handlers._gp, (Field(bytes, 0, 20, 20), Field(bytes, 8, DATAGRAM_MAX, 8), Field(int, 1, 255)), False),
    "gs": (Handlers._gs, (_ID, Field(int, 1, 255)), False),
    "gm": (Handlers._gm, (_ID, Field(int, 0, 64)), False),
    "ap": (Handlers._ap, (_PORT, _TTL, Field(bytes, 8, DATAGRAM_MAX, 8)), True),
    "as": (Handlers._as, (_PORT, _TTL, Field(bytes, 22, DATAGRAM_MAX, 22)), True),
    "pm": (
        Handlers._pm,
        (
            _ID,
            Field(bytes, 32, 32),
            Field(int, 0, (1 << 63) - 1),
            Field(int, 0, (1 << 63) - 1),
            Field(bytes, 1, METADATA_VALUE_MAX),
            Field(bytes, 64, 64),
        ),
        True,
    ),
    "wd": (Handlers._wd, (Field(int, 0, 1), Field(bytes, 0, DATAGRAM_MAX, 20)), True),
}
