"""Lists of peers in replies: how records become bytes, and how bytes become peers that may be contacted.

A peer is id20, packed IP, TCP data port. The "self" marker is IP 0.0.0.0 under the replier's own id; whoever reads
it puts the address in that the reply came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastcas.dht.contacts import ID_SIZE, V4_SIZE, V6_SIZE, pack_address, parse_ip
from fastcas.dht.records import Provider
from fastcas.peers.policy import is_loopback

__all__ = ["Peer", "PeerPacker", "parse_peers"]

SELF_IP = bytes(4)
MayUse = Callable[[str, int, str], bool]


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody who may have what was asked for: DHT node id, literal address, TCP data port."""

    node_id: bytes
    ip: str
    port: int


class PeerPacker:
    """Collects the distinct peers of one reply within a number of bytes."""

    def __init__(self, to_ip: str, room: int) -> None:
        """Collect for an asker at `to_ip`; at most `room` bytes of peers."""
        self._to_loopback = is_loopback(to_ip)
        self.room = room
        self._lists: tuple[list[bytes], list[bytes]] = ([], [])
        self._places: dict[bytes, tuple[int, int]] = {}

    def add_self(self, node_id: bytes, data_port: int) -> tuple[int, int] | None:
        """Add the replier itself."""
        return self._add(0, node_id + SELF_IP + data_port.to_bytes(2))

    def add(self, provider: Provider) -> tuple[int, int] | None:
        """Return the place of a peer, adding it if need be; None when it must not be told or does not fit."""
        packed = pack_address(provider.ip)
        if packed is None or (is_loopback(provider.ip) and not self._to_loopback):
            return None
        return self._add(0 if len(packed) == 4 else 1, provider.node_id + packed + provider.data_port.to_bytes(2))

    def _add(self, family: int, entry: bytes) -> tuple[int, int] | None:
        place = self._places.get(entry)
        if place is None:
            if len(entry) > self.room or len(self._places) >= 255:
                return None
            self.room -= len(entry)
            place = self._places[entry] = (family, len(self._lists[family]))
            self._lists[family].append(entry)
        return place

    def position(self, place: tuple[int, int]) -> int:
        """Return a place's position in peers4 then peers6; only after everything was added."""
        family, index = place
        return index + (len(self._lists[0]) if family else 0)

    def blobs(self) -> tuple[bytes, bytes]:
        """Return (peers4, peers6)."""
        return b"".join(self._lists[0]), b"".join(self._lists[1])


def parse_peers(peers4: bytes, peers6: bytes, replier_ip: str, may_use: MayUse) -> list[Peer | None]:
    """Return the peers of a reply in order, None for each that must not be used.

    Args:
        peers4, peers6: As they came; a wrong length makes an empty list.
        replier_ip: Where the reply came from; stands for the "self" marker.
        may_use: Says whether (ip, port), told by somebody at the third argument, may be contacted.
    """
    found: list[Peer | None] = []
    for blob, size in ((peers4, V4_SIZE), (peers6, V6_SIZE)):
        if len(blob) % size:
            return []
        for at in range(0, len(blob), size):
            packed = blob[at + ID_SIZE : at + size - 2]
            ip = replier_ip if packed == SELF_IP else parse_ip(packed)
            port = int.from_bytes(blob[at + size - 2 : at + size])
            usable = ip is not None and may_use(ip, port, replier_ip)
            found.append(Peer(blob[at : at + ID_SIZE], ip, port) if usable and ip is not None else None)
    return found


def parse_index(index: bytes, answered: int, n_peers: int) -> list[Sequence[int]] | None:
    """Return the peer positions of each answered key of a `gp` reply, or None when it is malformed."""
    rows: list[Sequence[int]] = []
    at = 0
    for _ in range(answered):
        if at >= len(index):
            return None
        count = index[at]
        row = index[at + 1 : at + 1 + count]
        if len(row) != count or any(position >= n_peers for position in row):
            return None
        rows.append(row)
        at += 1 + count
    return rows
