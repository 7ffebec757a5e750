"""Contacts: DHT nodes and how they look on the wire. The one place where an address from outside is judged.

A contact is id (20 bytes), packed IP (4 or 16 bytes), port (2 bytes, big-endian): 26 or 38 bytes, concatenated
without separators. Everything that names another node passes `parse_contact`; everything else of the DHT may
rely on a `Contact` being sendable: literal address, possible port, nobody's broadcast, not ourselves.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from functools import lru_cache

from kademlia.node import Node

from fastcas.peers.policy import is_loopback

__all__ = [
    "Address",
    "Contact",
    "is_shared",
    "pack_address",
    "pack_contacts",
    "parse_contact",
    "parse_contacts",
    "parse_ip",
    "subnet_of",
]

ID_SIZE = 20
V4_SIZE = ID_SIZE + 4 + 2
V6_SIZE = ID_SIZE + 16 + 2

Address = tuple[str, int]


class Contact(Node):  # type: ignore[misc]
    """A DHT node: id, address, and what we know of it.

    Attributes:
        id: 20 bytes. long_id: the same as a number.
        ip, port: Literal address and UDP port; `address` has both.
        last_seen: Loop time of its last answer, 0.0 before the first.
        failures: Requests in a row that it did not answer.
        is_verified: Whether it has signed a challenge at this address.
    """

    id: bytes
    long_id: int
    ip: str
    port: int

    def __init__(self, node_id: bytes, ip: str, port: int) -> None:
        """Make a contact of values that were checked already."""
        super().__init__(node_id, ip, port)
        self.address: Address = (ip, port)
        self.last_seen = 0.0
        self.failures = 0
        self.is_verified = False

    def __eq__(self, other: object) -> bool:
        """Same id at the same address."""
        return isinstance(other, Contact) and self.id == other.id and self.address == other.address

    def __hash__(self) -> int:
        """Hash of id and address."""
        return hash((self.id, self.address))


@lru_cache(maxsize=65_536)
def parse_ip(packed: bytes) -> str | None:
    """Return the text of a packed address that one can send to, or None.

    None for a wrong length, unspecified, 0/8, multicast, broadcast, reserved (240/4), link-local IPv6 (it needs a
    scope) and IPv4 in IPv6 clothes.
    """
    if len(packed) == 4:
        if packed[0] == 0 or packed[0] >= 224:
            return None
        return socket.inet_ntop(socket.AF_INET, packed)
    if len(packed) == 16:
        address = ipaddress.IPv6Address(packed)
        if address.is_unspecified or address.is_multicast or address.is_link_local or address.ipv4_mapped is not None:
            return None
        return socket.inet_ntop(socket.AF_INET6, packed)
    return None


@lru_cache(maxsize=65_536)
def pack_address(ip: str) -> bytes | None:
    """Return the 4 or 16 bytes of a literal address, or None for anything else."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)
    except (OSError, ValueError):
        return None


def parse_contact(node_id: bytes, packed_ip: bytes, port: int, *, giver_ip: str, own_id: bytes) -> Contact | None:
    """Return a contact that somebody told us, or None when it must not be used.

    Args:
        node_id: 20 bytes, not our own id.
        packed_ip: 4 or 16 bytes; loopback only if `giver_ip` is loopback.
        port: 1..65535.
        giver_ip: The address that the teller answered from.
        own_id: Our own id.
    """
    if len(node_id) != ID_SIZE or node_id == own_id or not 1 <= port <= 65535:
        return None
    ip = parse_ip(packed_ip)
    if ip is None or (_is_local(ip) and not _is_local(giver_ip)):
        return None
    return Contact(node_id, ip, port)


@lru_cache(maxsize=65_536)
def _is_local(ip: str) -> bool:
    return is_loopback(ip)


def parse_contacts(nodes4: bytes, nodes6: bytes, *, giver_ip: str, own_id: bytes, limit: int) -> list[Contact]:
    """Return the usable contacts of two packed lists; a list of a wrong length counts as empty."""
    found = []
    for blob, size in ((nodes4, V4_SIZE), (nodes6, V6_SIZE)):
        if len(blob) % size:
            continue
        for at in range(0, min(len(blob), limit * size), size):
            contact = parse_contact(
                blob[at : at + ID_SIZE],
                blob[at + ID_SIZE : at + size - 2],
                int.from_bytes(blob[at + size - 2 : at + size]),
                giver_ip=giver_ip,
                own_id=own_id,
            )
            if contact is not None:
                found.append(contact)
    return found[:limit]


def pack_contacts(contacts: Iterable[Contact], to_ip: str) -> tuple[bytes, bytes]:
    """Return (IPv4 list, IPv6 list); loopback contacts are told only over loopback."""
    lists: dict[int, list[bytes]] = {4: [], 16: []}
    local = _is_local(to_ip)
    for contact in contacts:
        packed = pack_address(contact.ip)
        if packed is not None and (local or not _is_local(contact.ip)):
            lists[len(packed)].append(contact.id + packed + contact.port.to_bytes(2))
    return b"".join(lists[4]), b"".join(lists[16])


@lru_cache(maxsize=65_536)
def subnet_of(ip: str) -> bytes:
    """Return what counts as one owner: the /24 of an IPv4, the /64 of an IPv6 address."""
    packed = pack_address(ip) or b""
    return packed[:3] if len(packed) == 4 else packed[:8]


@lru_cache(maxsize=65_536)
def is_shared(ip: str) -> bool:
    """Whether many honest nodes may share the subnet: loopback and private addresses.

    They are exempt from the limits per subnet; a private cluster is one or two /24s.
    """
    packed = pack_address(ip)
    return packed is not None and ipaddress.ip_address(packed).is_private
