"""Joining the network and staying in it: bootstrap nodes, saved contacts, names, back-off.

Everybody who may answer is asked at once, and nobody waits for anybody: not saved contacts for a slow name server,
not one bootstrap node for another. Whoever does not answer is named once, and asked again while contacts are few.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
from collections.abc import Callable, Iterable

from fastcas.dht.budgets import (
    ALPHA,
    BOOTSTRAP_NODES_MAX,
    BOOTSTRAP_ROUNDS,
    FAR_LOOKUPS,
    FORMER_ASKED,
    KSIZE,
    REJOIN_FIRST_S,
    REJOIN_LAST_S,
    RESOLVE_S,
    SAVED_CONTACTS_MAX,
)
from fastcas.dht.contacts import Address, pack_address, parse_ip
from fastcas.dht.lookup import Lookup
from fastcas.dht.protocol import FcProtocol
from fastcas.errors import NetworkError

__all__ = ["Joining", "resolve"]

log = logging.getLogger(__name__)

ADDRESSES_PER_NAME = 4


async def resolve(addr: tuple[str, int]) -> list[Address]:
    """Return the usable addresses of a host and port; a name is resolved in the loop's executor, 5 s at most.

    Raises:
        NetworkError: It cannot be resolved.
    """
    host, port = addr
    if pack_address(host) is not None:
        return [(str(ipaddress.ip_address(host)), port)]
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_S):
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except TimeoutError:
        raise NetworkError(f"DHT: host {host!r} cannot be resolved: no answer within {RESOLVE_S:.0f} s") from None
    except (OSError, UnicodeError) as exc:
        raise NetworkError(f"DHT: host {host!r} cannot be resolved: {getattr(exc, 'strerror', None) or exc}") from exc
    found = [str(info[4][0]) for info in infos]
    usable = [(ip, port) for ip in dict.fromkeys(found) if parse_ip(pack_address(ip) or b"") is not None]
    if not usable:
        raise NetworkError(f"DHT: host {host!r} cannot be resolved: no usable address")
    return usable[:ADDRESSES_PER_NAME]


class Joining:
    """One node's way into the network. `run` is its one task.

    Args:
        protocol: Sends for us.
        count_nodes: Returns about how many nodes the network has.

    Attributes:
        joined: Set once somebody is known, or there is nobody to wait for.
    """

    def __init__(self, protocol: FcProtocol, count_nodes: Callable[[], int]) -> None:
        """Know nobody yet."""
        self._protocol = protocol
        self._count_nodes = count_nodes
        self._nodes: dict[tuple[str, int], None] = {}
        self._former: dict[Address, None] = {}
        self._answered: set[tuple[str, int]] = set()
        self._complained: set[tuple[str, int]] = set()
        self._lonely = asyncio.Event()
        self._looking = asyncio.Lock()
        self._n_looks = 0
        self.joined = asyncio.Event()

    def add_nodes(self, addrs: Iterable[tuple[str, int]]) -> None:
        """Also join through these nodes: host names or addresses, UDP ports. Of too many the first ones are kept."""
        for addr in addrs:
            if len(self._nodes) < BOOTSTRAP_NODES_MAX:
                self._nodes[addr] = None

    def add_former(self, addresses: Iterable[Address]) -> None:
        """Remember contacts, the latest last, to be asked when all others are lost."""
        for address in addresses:
            self._former.pop(address, None)
            self._former[address] = None
        while len(self._former) > SAVED_CONTACTS_MAX:
            del self._former[next(iter(self._former))]

    def note_table(self, size: int) -> None:
        """Learn the size of the routing table after a change."""
        if size:
            self.joined.set()
        else:
            self._lonely.set()

    async def join(self, addrs: Iterable[tuple[str, int]]) -> bool:
        """Join through these nodes, asking twice at most; whether any answered. They are kept."""
        wanted = list(dict.fromkeys(addrs))
        self.add_nodes(wanted)
        for attempt in range(BOOTSTRAP_ROUNDS):
            if attempt:
                await asyncio.sleep(REJOIN_FIRST_S)
            if any(await asyncio.gather(*(self._ask_node(addr) for addr in wanted))):
                return True
        return False

    async def run(self) -> None:
        """Join, and join again whenever contacts are few, for ever."""
        router = self._protocol.router
        pause_s = REJOIN_FIRST_S
        former = list(self._former)
        while True:
            self._lonely.clear()
            size = len(router)
            nodes = [a for a in self._nodes if size < KSIZE or a not in self._answered]
            if nodes or former:
                await asyncio.gather(self._ask(former), *(self._ask_node(addr) for addr in nodes))
            if 0 < size < KSIZE and pause_s < REJOIN_LAST_S:
                await self.look_around()  # others may have joined through the same node at the same moment
            if not self._nodes and not self._former:
                self.joined.set()
            if router and not size:
                pause_s = REJOIN_FIRST_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._lonely.wait()
                pause_s = REJOIN_FIRST_S
            except TimeoutError:
                pause_s = min(2 * pause_s, REJOIN_LAST_S)
            former = [] if len(router) >= ALPHA else [a for a in self._former if router.at(a) is None][-FORMER_ASKED:]

    async def look_around(self) -> None:
        """Look up our own id, and in a larger network random ids far away.

        One at a time; who asks meanwhile gets one that began later, and so with what became known meanwhile, but
        all of them together no more than one.
        """
        begun = self._n_looks
        async with self._looking:
            if self._n_looks == begun:
                self._n_looks += 1
                await self._look_around()

    async def _look_around(self) -> None:
        await Lookup(self._protocol, self._protocol.source_node.long_id).run()
        if len(self._protocol.router) >= KSIZE:
            async with asyncio.TaskGroup() as group:
                for depth in range(self.n_far):
                    group.create_task(Lookup(self._protocol, self.far_target(depth)).run())
        self.joined.set()

    @property
    def n_far(self) -> int:
        """How many ranges of ids are worth a lookup of their own: the nearer ones are among our neighbours."""
        return min(max((self._count_nodes() // (KSIZE // 2)).bit_length() - 1, 1), FAR_LOOKUPS)

    def far_target(self, depth: int) -> int:
        """Return a random number that shares exactly `depth` leading bits with our id."""
        own: int = self._protocol.source_node.long_id
        low_bits = 159 - depth
        return ((own >> low_bits) ^ 1) << low_bits | secrets.randbits(low_bits)

    async def _ask_node(self, addr: tuple[str, int]) -> bool:
        """Ask one bootstrap node; what is wrong with it is said once."""
        try:
            answered = await self._ask(await resolve(addr))
            problem = f"DHT: bootstrap node {addr[0]}:{addr[1]} does not answer"
        except NetworkError as exc:
            answered, problem = False, str(exc)
        if answered:
            self._answered.add(addr)
            self._complained.discard(addr)
        else:
            level = logging.DEBUG if addr in self._complained else logging.WARNING
            log.log(level, "%s; trying again, this node goes on without it", problem)
            self._complained.add(addr)
        return answered

    async def _ask(self, addresses: Iterable[Address]) -> bool:
        """Ping addresses that are not known yet, all at once, and look around if anybody answered; whether anybody did.

        Our own address counts as answering: it is nobody's fault that we are the bootstrap node.
        """
        protocol = self._protocol
        wanted = list(dict.fromkeys(addresses))
        others = [a for a in wanted if a not in protocol.own_addresses]
        todo = [a for a in others if protocol.router.at(a) is None]
        found = await asyncio.gather(*(protocol.ping(address) for address in todo))
        if any(contact is not None and contact.id != protocol.identity.node_id for contact in found):
            await self.look_around()
        return len(todo) < len(wanted) or any(contact is not None for contact in found)
