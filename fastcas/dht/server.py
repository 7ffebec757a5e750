"""`FcServer`: the life of one DHT node, on the package's `Server`.

Binds the sockets and opens them again when they are lost, keeps the routing table fresh, saves it, and leaves
cleanly. How it joins the network and stays in it is in `Joining`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from kademlia.network import Server

from fastcas.dht.announcer import Announcer
from fastcas.dht.budgets import (
    ALPHA,
    ANNOUNCE_RATE_BPS,
    FAR_LOOKUPS,
    KSIZE,
    PING_STALEST_EVERY_S,
    REBIND_FIRST_S,
    REBIND_LAST_S,
    REFRESH_EVERY_S,
    REFRESH_FIRST_S,
    REJOIN_FIRST_S,
    SAVE_EVERY_S,
    SAVE_PAUSE_S,
    SAVE_SHARE,
    SAVED_CONTACTS_MAX,
    STALE_AFTER_S,
)
from fastcas.dht.contacts import Address, Contact, pack_address
from fastcas.dht.finder import Finder
from fastcas.dht.identity import Identity
from fastcas.dht.joining import Joining, resolve
from fastcas.dht.lookup import Lookup
from fastcas.dht.protocol import FcProtocol
from fastcas.dht.state import load_state, save_state
from fastcas.dht.udp import open_udp
from fastcas.errors import NetworkError, PortInUse, UsageError
from fastcas.peers.policy import AddressPolicy

__all__ = ["FcServer"]

log = logging.getLogger(__name__)

DROP = "drop_"
OpenTransport = Callable[
    [asyncio.AbstractEventLoop, asyncio.DatagramProtocol, str, int, Callable[[OSError], None]],
    asyncio.DatagramTransport,
]


class FcServer(Server):  # type: ignore[misc]
    """One DHT node. `listen`, then `start`, at the end `close`.

    Args:
        seed: Ed25519 seed, 32 bytes; None for a new identity.
        state_path: Where contacts are saved; None saves nothing.
        is_client: Ask and publish only; never enter anybody's table, answer nobody.
        network_key: Joins the private network with this key.
        policy: Judges peer addresses that others tell us.
        announce: Which chunks are announced: "auto", "off", "rare" or "all".
        announce_rate_Bps: What announcing chunks again may cost, bytes per second.
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
        announce: str = "auto",
        announce_rate_Bps: float = ANNOUNCE_RATE_BPS,
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
        self._turn = 0  # of the refreshes
        self._n_changes = 0
        self._save_wanted = asyncio.Event()
        self.is_closed = False
        self.protocol = self._create_protocol()
        self.joining = Joining(self.protocol, lambda: self.estimated_nodes)
        self.joined = self.joining.joined
        self.announcer = Announcer(
            self.protocol,
            self.identity,
            clock=clock,
            wall=wall,
            rng=self._rng,
            count_nodes=lambda: self.estimated_nodes - (0 if is_client else 1),
            policy=announce,
            rate_Bps=announce_rate_Bps,
            on_progress=self._save_wanted.set,
        )
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
        try:
            return [(await resolve((interface, 0)))[0][0]]
        except NetworkError as exc:
            raise NetworkError(f"{exc}; nothing was bound") from exc

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
        self.joining.add_nodes(bootstrap)
        if self._state_path is not None:
            saved = load_state(self._state_path)
            self.joining.add_former(saved.addresses)
            self.announcer.restore(saved.chunks)
        self._spawn(self.joining.run())
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

        Asks a second time, because the other side may be starting too. The addresses are kept and asked again
        whenever contacts are few.
        """
        await self.joining.join(addrs)
        return len(self.protocol.router)

    async def bootstrap_node(self, addr: Address) -> Contact | None:
        """Return who signs at an address, or None."""
        return await self.protocol.ping(addr)

    def bootstrappable_neighbors(self) -> list[Address]:
        """Return addresses for a later bootstrap: the contacts that answered last."""
        return [contact.address for contact in self._best_contacts()]

    def _on_table_change(self) -> None:
        size = len(self.protocol.router)
        self.joining.note_table(size)
        if size < KSIZE:
            self.announcer.note_network(size)
        self._n_changes += 1
        if self._n_changes >= SAVE_SHARE * size:
            self._save_wanted.set()

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
                self.joining.add_former(contact.address for contact in table)
                self.announcer.note_network(self.estimated_nodes - (0 if self._is_client else 1))
            owing = next((contact for contact in table if contact.failures), None)
            stalest = owing if owing is not None else table.stalest()
            if stalest is None or (owing is None and self._clock() - stalest.last_seen < STALE_AFTER_S):
                continue
            if await self.protocol.ping(stalest.address) is None:
                table.note_failure(stalest)
                for candidate in table.candidates_for(stalest)[:1]:
                    self.protocol.consider(candidate)

    def refresh_table(self, interval: float = REFRESH_EVERY_S) -> None:
        """Look around once, in the background; `start` repeats it."""
        self._spawn(self._refresh_table())

    async def _refresh_table(self) -> None:
        """Look up our own id or one of the ranges far away, by turns, and the ranges where the table has nobody.

        Everything at once would cost more than all other upkeep; the pings of `_keep_fresh` see to the contacts.
        """
        if not len(self.protocol.router):
            return
        self._turn += 1
        own: int = self.protocol.source_node.long_id
        targets = [own if self._turn % 2 else self.joining.far_target(self._turn // 2 % self.joining.n_far)]
        targets += [int.from_bytes(node_id) for node_id in self.protocol.get_refresh_ids()[:FAR_LOOKUPS]]
        for target in targets:
            await Lookup(self.protocol, target).run()

    async def _refresh_regularly(self) -> None:
        for pause_s in chain(REFRESH_FIRST_S, repeat(REFRESH_EVERY_S)):
            await asyncio.sleep(pause_s * (0.9 + 0.2 * self._rng.random()))
            await self._refresh_table()

    @property
    def estimated_nodes(self) -> int:
        """About how many nodes the network has, this one included unless it is a client."""
        return self.protocol.estimated_nodes()

    def statistics(self) -> dict[str, Any]:
        """Return counters and sizes for people; "drops" has the datagrams that were dropped, by cause."""
        protocol = self.protocol
        counters = {name: n for name, n in protocol.counters.items() if not name.startswith(DROP)}
        return {
            "lookups": 0,
            "lookup_hops": 0,
            **counters,
            "drops": {name.removeprefix(DROP): n for name, n in protocol.counters.items() if name.startswith(DROP)},
            "contacts": len(protocol.router),
            "nodes_estimated": self.estimated_nodes,
            "announce": self.announcer.chunk_policy,
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
        while True:
            try:
                async with asyncio.timeout(SAVE_EVERY_S):
                    await self._save_wanted.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(SAVE_PAUSE_S)
            await self._save()

    async def _save(self) -> None:
        contacts = self._best_contacts()
        if self._state_path is None or not contacts:
            return
        self._save_wanted.clear()
        self._n_changes = 0
        chunks = self.announcer.to_saved()
        try:
            await asyncio.to_thread(save_state, self._state_path, contacts, chunks)
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
