"""`FcServer`: the life of one DHT node, on the package's `Server`.

Binds the sockets and opens them again when they are lost, joins the network and stays in it (bootstrap list, saved
contacts, back-off 1 s to 60 s), keeps the routing table fresh, saves it, and leaves cleanly.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import random
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from kademlia.network import Server

from fastcas.dht.announcer import Announcer
from fastcas.dht.budgets import (
    ALPHA,
    KSIZE,
    PING_STALEST_EVERY_S,
    REBIND_FIRST_S,
    REBIND_LAST_S,
    REFRESH_EVERY_S,
    REFRESH_FIRST_S,
    REJOIN_FIRST_S,
    REJOIN_LAST_S,
    RESOLVE_S,
    SAVE_EVERY_S,
    SAVE_FIRST_S,
    SAVED_CONTACTS_MAX,
    STALE_AFTER_S,
)
from fastcas.dht.contacts import Address, Contact, pack_address, parse_ip
from fastcas.dht.finder import Finder
from fastcas.dht.identity import Identity
from fastcas.dht.lookup import Lookup
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.state import load_state, save_state
from fastcas.dht.udp import open_udp
from fastcas.errors import NetworkError, PortInUse, UsageError
from fastcas.peers.policy import AddressPolicy

__all__ = ["FcServer"]

log = logging.getLogger(__name__)

OpenTransport = Callable[
    [asyncio.AbstractEventLoop, asyncio.DatagramProtocol, str, int, Callable[[OSError], None]],
    asyncio.DatagramTransport,
]
BOOTSTRAP_ROUNDS = 3
FAR_LOOKUPS = 8
GROWN = 1.6  # times the estimated size: beyond the chance of one lookup


class FcServer(Server):  # type: ignore[misc]
    """One DHT node. `listen`, then `start`, at the end `close`.

    Args:
        seed: Ed25519 seed, 32 bytes; None for a new identity.
        state_path: Where contacts are saved; None saves nothing.
        is_client: Ask and publish only; never enter anybody's table, answer nobody.
        network_key: Joins the private network with this key.
        policy: Judges peer addresses that others tell us.
        open_transport: Opens a socket; another one in tests.
        wall: Unix time, seconds.
        rng: Choices and jitter.
    """

    protocol: FcProtocol

    def __init__(
        self,
        *,
        seed: bytes | None = None,
        state_path: Path | None = None,
        is_client: bool = False,
        network_key: bytes | None = None,
        policy: AddressPolicy | None = None,
        open_transport: OpenTransport = open_udp,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        """Make the node; must be called inside its event loop. Nothing is bound yet."""
        self.identity = Identity(seed)
        super().__init__(KSIZE, ALPHA, self.identity.node_id, None)
        clock = asyncio.get_running_loop().time
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._policy = policy if policy is not None else AddressPolicy()
        self._open_transport = open_transport
        self._state_path = state_path
        self._network_key = network_key
        self._is_client = is_client
        self._wall = wall
        self._tasks: set[asyncio.Task[Any]] = set()
        self._transports: dict[int, asyncio.DatagramTransport] = {}
        self._bootstrap_list: list[tuple[str, int]] = []
        self._answered: set[Address] = set()
        self._unresolved: set[str] = set()
        self._former: dict[Address, None] = {}
        self._lonely = asyncio.Event()
        self._turn = 0  # of the refreshes
        self.joined = asyncio.Event()
        self.is_closed = False
        self.protocol = self._create_protocol()
        self.announcer = Announcer(self.protocol, self.identity, clock=clock, wall=wall, rng=self._rng)
        self.finder = Finder(self.protocol, self._may_use, clock, wall)

    def _create_protocol(self) -> FcProtocol:
        return FcProtocol(
            self.identity,
            clock=self._clock,
            wall=self._wall,
            is_local=self._policy.is_local,
            network_key=self._network_key,
            is_read_only=self._is_client,
            on_table_change=self._on_table_change,
        )

    def _may_use(self, ip: str, port: int, giver_ip: str) -> bool:
        return self._policy.refusal(ip, port, giver_ip=giver_ip) is None

    @property
    def node_id(self) -> str:
        """40 hex digits."""
        return self.identity.node_id.hex()

    @property
    def port(self) -> int:
        """The UDP port that is bound, 0 before `listen`."""
        for transport in self._transports.values():
            name = transport.get_extra_info("sockname")
            if name:
                return int(name[1])
        return 0

    # --- sockets ---

    async def listen(self, port: int, interface: str = "0.0.0.0") -> None:
        """Bind UDP `port` (0: any) on an address or name; "::" binds both families.

        Raises:
            PortInUse: The port is taken.
            NetworkError: The address is not ours or cannot be resolved.
        """
        for ip in await self._addresses_of(interface):
            self._bind(ip, port or self.port)

    async def _addresses_of(self, interface: str) -> list[str]:
        if interface == "::":
            return ["0.0.0.0", "::"]
        if pack_address(interface) is not None:
            return [interface]
        resolved = await self._resolve((interface, 0))
        if not resolved:
            raise NetworkError(f"DHT: host {interface!r} cannot be resolved; nothing was bound")
        return [resolved[0][0]]

    def _bind(self, ip: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        family_size = 16 if ":" in ip else 4

        def on_lost(exc: OSError) -> None:
            log.warning("DHT socket lost address=%s error=%s; opening it again", ip, exc)
            self._spawn(self._rebind(ip, bound_port))

        try:
            transport = self._open_transport(loop, self.protocol, ip, port, on_lost)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise PortInUse(f"DHT: UDP port {port} on {ip} is in use") from exc
            raise NetworkError(f"DHT: cannot bind UDP {ip}:{port}: {exc.strerror or exc}") from exc
        self._transports[family_size] = transport
        self.protocol.add_transport(family_size, transport)
        bound_port = int(transport.get_extra_info("sockname")[1])

    async def _rebind(self, ip: str, port: int) -> None:
        pause_s = REBIND_FIRST_S
        while not self.is_closed:
            try:
                self._bind(ip, port)
            except (PortInUse, NetworkError) as exc:
                log.warning("%s; next try in %.1f s", exc, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, REBIND_LAST_S)
            else:
                self.protocol.counters["rebinds"] += 1
                return

    # --- life ---

    def start(self, bootstrap: Iterable[tuple[str, int]] = ()) -> None:
        """Join the network in the background, announce, and stay in it until `close`."""
        self._bootstrap_list = list(dict.fromkeys(bootstrap))
        if self._state_path is not None:
            self._former.update(dict.fromkeys(load_state(self._state_path)))
        self._spawn(self._stay_joined())
        self._spawn(self._keep_fresh())
        self._spawn(self._refresh_regularly())
        self._spawn(self.announcer.run())
        if self._state_path is not None:
            self._spawn(self._save_regularly())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("DHT task failed", exc_info=task.exception())

    def stop(self) -> None:
        """Close the sockets at once, without a farewell."""
        self.is_closed = True
        for task in list(self._tasks):
            task.cancel()
        for transport in self._transports.values():
            transport.close()
        self.protocol.cancel_all()

    async def close(self) -> None:
        """Leave: withdraw our records, save contacts, close. At most about 1.5 s; idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.announcer.leave()
        await self._save()
        self.stop()

    # --- joining ---

    async def bootstrap(self, addrs: Iterable[tuple[str, int]]) -> int:
        """Join through `addrs` (names are resolved off the loop); return the number of contacts afterwards.

        Asks up to three times, because the other side may be starting too. The addresses are kept and asked again
        whenever contacts are few.
        """
        wanted = list(dict.fromkeys(addrs))
        self._bootstrap_list = list(dict.fromkeys([*self._bootstrap_list, *wanted]))
        for attempt in range(BOOTSTRAP_ROUNDS):
            if attempt:
                await asyncio.sleep(REJOIN_FIRST_S)
            if await self._contact(await self._resolve_all(wanted)):
                break
        return len(self.protocol.router)

    async def bootstrap_node(self, addr: Address) -> Contact | None:
        """Return who signs at an address, or None."""
        return await self.protocol.ping(addr)

    def bootstrappable_neighbors(self) -> list[Address]:
        """Return addresses for a later bootstrap: the contacts that answered last."""
        return [contact.address for contact in self._best_contacts()]

    async def _contact(self, addresses: Iterable[Address]) -> bool:
        """Ping addresses at once, and look around if anybody answered; whether anybody did."""
        todo = [a for a in dict.fromkeys(addresses) if a not in self.protocol.own_addresses]
        if not todo:
            return bool(self.protocol.own_addresses)
        found = await asyncio.gather(*(self.protocol.ping(address) for address in todo))
        others = [c for c in found if c is not None and c.id != self.identity.node_id]
        self._answered.update(c.address for c in others)
        if others:
            await self._look_around()
        return any(contact is not None for contact in found)

    async def _look_around(self) -> None:
        """Look up our own id, and in a larger network random ids far away, so that every bucket gets contacts."""
        await Lookup(self.protocol, self.protocol.source_node.long_id).run()
        if len(self.protocol.router) >= KSIZE:
            async with asyncio.TaskGroup() as group:
                for depth in range(self._n_far):
                    group.create_task(Lookup(self.protocol, self._far_target(depth)).run())
        self.joined.set()

    @property
    def _n_far(self) -> int:
        """How many ranges of ids are worth a lookup of their own: the nearer ones are among our neighbours."""
        return min(max((self.estimated_nodes // (KSIZE // 2)).bit_length() - 1, 1), FAR_LOOKUPS)

    def _far_target(self, depth: int) -> int:
        """Return a random number that shares exactly `depth` leading bits with our id."""
        low_bits = 159 - depth
        own: int = self.protocol.source_node.long_id
        return ((own >> low_bits) ^ 1) << low_bits | secrets.randbits(low_bits)

    async def _stay_joined(self) -> None:
        pause_s = REJOIN_FIRST_S
        while True:
            self._lonely.clear()
            size = len(self.protocol.router)
            wanted = await self._resolve_all(self._bootstrap_list)
            missing = [a for a in wanted if self.protocol.router.at(a) is None]
            if size >= KSIZE:
                missing = [a for a in missing if a not in self._answered]
            if size < ALPHA:
                missing += [a for a in self._former if self.protocol.router.at(a) is None][:40]
            if missing:
                await self._contact(missing)
            elif 0 < size < KSIZE:
                await self._look_around()  # others may have joined through the same node at the same moment
            if not self._bootstrap_list and not self._former:
                self.joined.set()
            if self.protocol.router and not size:
                pause_s = REJOIN_FIRST_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._lonely.wait()
                pause_s = REJOIN_FIRST_S
            except TimeoutError:
                pause_s = min(2 * pause_s, REJOIN_LAST_S)

    def _on_table_change(self) -> None:
        size = len(self.protocol.router)
        if not size:
            self._lonely.set()
        else:
            self.joined.set()
        self.announcer.note_network(size)

    async def _resolve_all(self, addrs: Iterable[tuple[str, int]]) -> list[Address]:
        resolved = await asyncio.gather(*(self._resolve(addr) for addr in addrs))
        return list(dict.fromkeys(address for answer in resolved for address in answer))

    async def _resolve(self, addr: tuple[str, int]) -> list[Address]:
        """Return the literal addresses of a host and port; a name is resolved in the loop's executor, 5 s at most."""
        host, port = addr
        if pack_address(host) is not None:
            return [(str(ipaddress.ip_address(host)), port)]
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RESOLVE_S):
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except (OSError, TimeoutError, UnicodeError) as exc:
            level = logging.DEBUG if host in self._unresolved else logging.WARNING
            log.log(level, "DHT bootstrap host %s cannot be resolved: %s", host, exc)
            self._unresolved.add(host)
            return []
        self._unresolved.discard(host)
        found = [str(info[4][0]) for info in infos]
        return [(ip, port) for ip in dict.fromkeys(found) if parse_ip(pack_address(ip) or b"") is not None][:4]

    # --- keeping fresh ---

    async def _keep_fresh(self) -> None:
        """Challenge the contact that has been silent longest again; one that owes an answer sooner.

        Whoever signs there stays or takes the place: a node that came back with a new key replaces its old self.
        """
        table = self.protocol.router
        while True:
            is_hurried = any(contact.failures for contact in table)
            await asyncio.sleep(REJOIN_FIRST_S if is_hurried else PING_STALEST_EVERY_S)
            if not is_hurried:
                self._remember_contacts()
            owing = next((contact for contact in table if contact.failures), None)
            stalest = owing if owing is not None else table.stalest()
            if stalest is None or (owing is None and self._clock() - stalest.last_seen < STALE_AFTER_S):
                continue
            if await self.protocol.ping(stalest.address) is None:
                table.note_failure(stalest)
                for candidate in table.candidates_for(stalest)[:1]:
                    self.protocol.consider(candidate)

    def _remember_contacts(self) -> None:
        """Keep the addresses of contacts for the day when the table is empty, the latest 400."""
        for contact in self.protocol.router:
            self._former.pop(contact.address, None)
            self._former[contact.address] = None
        while len(self._former) > SAVED_CONTACTS_MAX:
            del self._former[next(iter(self._former))]

    def refresh_table(self, interval: float = REFRESH_EVERY_S) -> None:
        """Look around once, in the background; `start` repeats it."""
        self._spawn(self._refresh_table())

    async def _refresh_table(self) -> None:
        """Look up our own id or one of the ranges far away, by turns, and the ranges where the table has nobody.

        Everything at once would cost more than all other upkeep; the pings of `_keep_fresh` see to the contacts. It is
        worth it where the network has grown since, as it does when many join at the same time.
        """
        if not len(self.protocol.router):
            return
        self._turn += 1
        if self._turn % 2:
            before = self.estimated_nodes
            await Lookup(self.protocol, self.protocol.source_node.long_id).run()
            if self.protocol.size.latest > GROWN * before:
                self.protocol.size.forget()
                await self._look_around()
        else:
            await Lookup(self.protocol, self._far_target(self._turn // 2 % self._n_far)).run()
        for node_id in self.protocol.get_refresh_ids()[:FAR_LOOKUPS]:
            await Lookup(self.protocol, int.from_bytes(node_id)).run()

    async def _refresh_regularly(self) -> None:
        pause_s = REFRESH_FIRST_S
        while True:
            await asyncio.sleep(pause_s * (0.9 + 0.2 * self._rng.random()))
            await self._refresh_table()
            pause_s = REFRESH_EVERY_S

    @property
    def estimated_nodes(self) -> int:
        """About how many nodes the network has."""
        return self.protocol.estimated_nodes()

    def statistics(self) -> dict[str, Any]:
        """Return counters and sizes for people."""
        protocol = self.protocol
        return {
            **protocol.counters,
            "contacts": len(protocol.router),
            "nodes_estimated": self.estimated_nodes,
            "hints_held": protocol.hints.n_hints,
            "providers_held": protocol.hints.n_providers,
            "swarm_records_held": protocol.swarms.n_records,
            "metadata_keys_held": protocol.metadata.n_keys,
            "chunks_offered": len(protocol.provided.chunk_keys),
            "files_offered": len(protocol.provided.files),
            "port": self.port,
        }

    # --- state ---

    def _best_contacts(self) -> list[Contact]:
        return sorted(self.protocol.router, key=lambda contact: -contact.last_seen)[:SAVED_CONTACTS_MAX]

    async def _save_regularly(self) -> None:
        pause = SAVE_FIRST_S
        while True:
            await asyncio.sleep(pause)
            await self._save()
            pause = min(SAVE_EVERY_S, 4 * pause)

    async def _save(self) -> None:
        contacts = self._best_contacts()
        if self._state_path is None or not contacts:
            return
        try:
            await asyncio.to_thread(save_state, self._state_path, contacts)
        except OSError as exc:
            log.warning("DHT state %s: cannot be written (%s); the old one stays", self._state_path, exc)

    def save_state(self, fname: str) -> None:
        """Write the contacts to a file; blocks."""
        save_state(Path(fname), self._best_contacts())

    # --- what the package offers and we do not ---

    async def get(self, key: object) -> None:
        """Refuse: there are no unsigned values here.

        Raises:
            UsageError: Always.
        """
        raise UsageError("DHT: plain get and set are switched off; use the finder and the announcer")

    async def set(self, key: object, value: object) -> None:
        """Refuse, as `get`.

        Raises:
            UsageError: Always.
        """
        await self.get(key)

    async def set_digest(self, dkey: bytes, value: object) -> None:
        """Refuse, as `get`.

        Raises:
            UsageError: Always.
        """
        await self.get(dkey)

    @classmethod
    async def load_state(cls, fname: str, port: int, interface: str = "0.0.0.0") -> FcServer:
        """Return a listening node with a new identity that joins through a state file's contacts."""
        server = cls(state_path=Path(fname))
        await server.listen(port, interface)
        server.start()
        return server
