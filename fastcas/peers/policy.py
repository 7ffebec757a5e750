"""The address policy: which addresses that somebody else told us may be used. Pure but for reading own prefixes.

A peer address from the network is a suggestion to send packets somewhere; index poisoning turns such suggestions
into floods at third parties or into probes of the local network. So: literal addresses only, nothing reserved,
private ones only where this host is in that private block, loopback only where whoever said so was itself reached
over loopback, no privileged ports. Addresses that the user named are never asked about here.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

__all__ = ["AddressPolicy", "is_loopback", "own_networks"]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_REFUSED: tuple[IPNetwork, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "::/128", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:db8::/32",
        "2002::/16", "fe80::/10", "fec0::/10", "ff00::/8",
    )
)  # fmt: skip
_PRIVATE: tuple[IPNetwork, ...] = tuple(
    ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
)
FIRST_PORT = 1024
_MAX_ROUTES_B = 1 << 20


@lru_cache(maxsize=8192)
def _parse(ip: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(ip)
    except ValueError:
        return None


@lru_cache(maxsize=8192)
def is_loopback(ip: str) -> bool:
    """Whether a literal address is this host's loopback (127/8, ::1)."""
    address = _parse(ip)
    return address is not None and address.is_loopback


def own_networks() -> tuple[IPNetwork, ...]:
    """Return the prefixes of this host's own interfaces, without loopback and link-local ones.

    Source: the directly connected routes of /proc/net/route and the addresses of /proc/net/if_inet6.
    """
    found: list[IPNetwork] = []
    for line in _lines("/proc/net/route")[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[2] == "00000000" and fields[7] != "00000000":
            # The kernel prints the words in host order.
            network, mask = (struct.pack("=I", int(fields[i], 16)) for i in (1, 7))
            found.append(ipaddress.IPv4Network((network, int.from_bytes(mask).bit_count()), strict=False))
    for line in _lines("/proc/net/if_inet6"):
        fields = line.split()
        if len(fields) >= 3:
            found.append(ipaddress.IPv6Network((int(fields[0], 16), int(fields[2], 16)), strict=False))
    return tuple(net for net in dict.fromkeys(found) if not net.is_loopback and not net.is_link_local)


def _lines(path: str) -> list[str]:
    try:
        with Path(path).open(encoding="ascii", errors="replace") as file:
            return file.read(_MAX_ROUTES_B).splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class AddressPolicy:
    """What may be done with addresses from the network.

    Attributes:
        own: Prefixes of this host's own interfaces.
        allow_private: Accept private addresses wherever this host is.
        low_ports: Privileged ports that are accepted all the same.
    """

    own: tuple[IPNetwork, ...] = field(default_factory=own_networks)
    allow_private: bool = False
    low_ports: frozenset[int] = frozenset()

    def refusal(self, ip: str, port: int, *, giver_ip: str | None = None) -> str | None:
        """Return why an address that somebody told us must not be used, or None when it may be.

        Args:
            ip: Literal address.
            port: TCP or UDP port.
            giver_ip: The address over which the teller was reached; None where it is not known.
        """
        address = _parse(ip)
        if address is None:
            return "not a literal address"
        if not 1 <= port <= 65535:
            return "port out of range"
        if port < FIRST_PORT and port not in self.low_ports:
            return "privileged port"
        if address.is_loopback:
            return None if giver_ip is not None and is_loopback(giver_ip) else "loopback from outside"
        if any(net.version == address.version and address in net for net in self.own):
            return None
        if any(address in net for net in _REFUSED if net.version == address.version):
            return "reserved address"
        for block in _PRIVATE:
            if block.version == address.version and address in block:
                return None if self.allow_private or self._is_inside(block) else "private address of another network"
        return None

    def is_local(self, ip: str) -> bool:
        """Whether an address is loopback or in an own prefix: many nodes may legitimately share it.

        Such addresses are exempt from the diversity limits per /24 and have rate buckets by (ip, port).
        """
        address = _parse(ip)
        if address is None:
            return False
        return address.is_loopback or any(net.version == address.version and address in net for net in self.own)

    def usable(self, addresses: Iterable[tuple[str, int]], *, giver_ip: str | None = None) -> list[tuple[str, int]]:
        """Return those of `addresses` that are not refused, in order."""
        return [(ip, port) for ip, port in addresses if self.refusal(ip, port, giver_ip=giver_ip) is None]

    def _is_inside(self, block: IPNetwork) -> bool:
        return any(net.version == block.version and net.network_address in block for net in self.own)
