"""The datagram protocol: `kademlia`'s, with every path from the wire replaced.

Owns admission, decoding and dispatch of what we get, and the challenge that a contact must sign before it enters the
table; requests of ours are in `fastcas.dht.calls`. Synchronous: no task per datagram, and nothing that a datagram
says can raise out of `datagram_received`. Nothing is ever sent to an address that has not asked us, that we were not
told to contact, or that did not show a token.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from kademlia.protocol import KademliaProtocol

from fastcas.dht.budgets import (
    AMPLIFICATION_MAX,
    CHALLENGE_PAUSE_S,
    CHALLENGES_IN_FLIGHT,
    DATAGRAM_MAX,
    DATAGRAM_MIN,
    FLAG_READ_ONLY,
    KSIZE,
    PAD_TO,
    PROOF_S,
    RPC_HARD_S,
    SIGNATURES_PER_S,
    SOURCES_MAX,
    WIRE_VERSION,
)
from fastcas.dht.calls import Calls, Reply
from fastcas.dht.contacts import Address, Contact, pack_address, parse_ip
from fastcas.dht.guard import MAC_SIZE, TOKEN_SIZE, NetworkKey, SourceBuckets, TokenBucket, TokenJar
from fastcas.dht.handlers import Asker, Handlers
from fastcas.dht.identity import Identity, challenge_text, id_of, verify
from fastcas.dht.network_size import NetworkSize, from_table
from fastcas.dht.provided import Provided
from fastcas.dht.records import HintStore, MetadataStore, SwarmStore
from fastcas.dht.table import FcTable
from fastcas.dht.wire import BAD_TOKEN, OK, REPLY, REQUEST, Field, check, decode, encode, pack_observed

__all__ = ["FcProtocol", "Reply"]

log = logging.getLogger(__name__)

NO_NETWORK = bytes(8)
PADDED = frozenset(("fn", "gp", "gs", "gm"))
_REPLY_HEAD = (Field(int, 0, 255), Field(bytes, 0, 18), Field(bytes, 0, 8))
_PONG = (Field(bytes, 20, 20), Field(bytes, 32, 32), Field(bytes, 64, 64))


class FcProtocol(KademliaProtocol):  # type: ignore[misc]
    """One node's protocol over one or two sockets (`add_transport` per address family)."""

    def __init__(
        self,
        identity: Identity,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        is_local: Callable[[str], bool],
        network_key: bytes | None = None,
        is_read_only: bool = False,
        on_table_change: Callable[[], None] | None = None,
    ) -> None:
        """Serve as `identity`; `clock` is monotonic, `wall` is Unix time, both in seconds."""
        self.identity = identity
        self.is_read_only = is_read_only
        self.counters: Counter[str] = Counter()
        self._clock = clock
        self._network = NetworkKey(network_key) if network_key else None
        self.net_id = self._network.net_id if self._network else NO_NETWORK
        self._datagram_max = DATAGRAM_MAX - (MAC_SIZE if self._network else 0)
        self._transports: dict[int, asyncio.DatagramTransport] = {}
        self._calls = Calls(clock, self._send, lambda contact: self.router.note_failure(contact), self.counters)
        self._challenging: set[Address] = set()
        self._probing: set[Address] = set()
        self._failed_challenges: OrderedDict[Address, float] = OrderedDict()
        self._buckets = SourceBuckets(clock, is_local)
        self._tokens = TokenJar(clock)
        me = Contact(identity.node_id, "", 0)
        self.own_addresses: set[Address] = set()
        super().__init__(me, None, KSIZE)
        self.router: FcTable = FcTable(self, me, on_change=on_table_change)
        self.size = NetworkSize()
        self._estimated = ((-1, -1), 0)
        self.provided = Provided()
        self.hints = HintStore(clock)
        self.swarms = SwarmStore(clock)
        self.metadata = MetadataStore(clock, wall)
        signatures = TokenBucket(SIGNATURES_PER_S, SIGNATURES_PER_S, clock())
        self._handlers = Handlers(
            identity, self.net_id, self.router, self.provided, self.hints, self.swarms, self.metadata, signatures, clock
        )

    def __getattr__(self, name: str) -> Any:
        """Know no remote method by attribute: a misspelt name is an error, not a request."""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # --- sockets ---

    def add_transport(self, family_size: int, transport: asyncio.DatagramTransport) -> None:
        """Send to addresses of `family_size` packed bytes (4 or 16) through this transport."""
        self._transports[family_size] = transport
        self.transport = transport

    def connection_made(self, transport: Any) -> None:
        """Wait for `add_transport`."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave re-opening to the server."""

    def error_received(self, exc: Exception) -> None:
        """Count what the network said about a datagram of ours."""
        self.counters["socket_errors"] += 1

    def _send(self, datagram: bytes, address: Address) -> None:
        packed = pack_address(address[0])
        transport = self._transports.get(len(packed)) if packed is not None else None
        if transport is None or transport.is_closing():
            self.counters["unsendable"] += 1
            return
        if self._network is not None:
            datagram = self._network.seal(datagram)
        self.counters["datagrams_out"] += 1
        self.counters["bytes_out"] += len(datagram)
        try:
            transport.sendto(datagram, address)
        except (OSError, ValueError, TypeError, OverflowError):
            self.counters["socket_errors"] += 1

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Take one datagram from anybody. Cost: one MAC if there is a key, one decode, one handler."""  # hot
        counters = self.counters
        counters["datagrams_in"] += 1
        counters["bytes_in"] += len(data)
        if len(data) > DATAGRAM_MAX:
            counters["drop_size"] += 1
            return
        if self._network is not None:
            opened = self._network.open(data)
            if opened is None:
                counters["drop_mac"] += 1
                return
            data = opened
        if len(data) < DATAGRAM_MIN:
            counters["drop_size"] += 1
            return
        ip, port = addr[0], addr[1]
        if not port or "%" in ip:
            counters["drop_source"] += 1
        elif data[0] == REPLY:
            self._take_reply(data, (ip, port))
        elif data[0] != REQUEST:
            counters["drop_kind"] += 1
        elif self.is_read_only:
            counters["drop_read_only"] += 1
        elif not self._buckets.admit(ip, port):
            counters["drop_rate"] += 1
        else:
            self._take_request(data, ip, port)

    # --- requests from others ---

    def _take_request(self, data: bytes, ip: str, port: int) -> None:
        asked = _request_in(data)
        if asked is None:
            self.counters["drop_malformed"] += 1
            return
        name, flags, node_id, token, args = asked
        is_self = node_id == self.identity.node_id  # our own ping, sent to find out whether an address is ours
        if parse_ip(pack_address(ip) or b"") is None or (is_self and name != "ping"):
            self.counters["drop_source"] += 1
            return
        is_proven = self._tokens.holds(token, ip, port, node_id)
        if is_proven:
            self._buckets.prove(ip, port)
        room = self._datagram_max if is_proven else min(AMPLIFICATION_MAX * len(data), self._datagram_max)
        is_read_only = bool(flags & FLAG_READ_ONLY)
        asker = Asker(ip, port, node_id, is_proven, room)
        answer = self._handlers.handle(name, asker, args)
        if answer is None:
            self.counters["drop_malformed"] += 1
            return
        status, elements = answer
        head = [status, pack_observed(ip, port), self._tokens.token(ip, port, node_id)]
        reply = encode(REPLY, data[1:21], head + elements)
        if len(reply) > room:
            self.counters["drop_room"] += 1
            return
        self.counters["answered"] += 1
        self._send(reply, (ip, port))
        if is_proven and not is_read_only and not is_self and name != "wd":
            known = self.router.get(node_id)
            if known is not None and known.address == (ip, port):
                self.router.note_answer(known, self._clock())
            else:
                self.consider(Contact(node_id, ip, port))

    # --- requests of ours ---

    def request(
        self,
        address: Address,
        name: str,
        args: list[Any],
        *,
        contact: Contact | None = None,
        hard_s: float = RPC_HARD_S,
        on_slow: Callable[[], None] | None = None,
    ) -> asyncio.Future[Reply | None]:
        """Send a request; the future gets the reply, or None. Never raises.

        The same datagram is sent again after the address's retransmission time, `on_slow` is called then, once;
        after `hard_s` seconds the answer is None. `contact` gets the credit or the blame.
        """
        token = self._calls.token_of(address)
        flags = FLAG_READ_ONLY if self.is_read_only else 0
        message_id = self._calls.new_id()
        call = [WIRE_VERSION, flags, self.identity.node_id, token, *args]
        datagram = encode(REQUEST, message_id, [name, call])
        if not token and name in PADDED and len(datagram) < PAD_TO:
            datagram = encode(REQUEST, message_id, [name, [*call, bytes(PAD_TO - len(datagram))]])
        self.counters["rpc_" + name] += 1
        return self._calls.start(message_id, datagram, address, contact, hard_s, on_slow)

    def ask(self, contact: Contact, name: str, args: list[Any], **options: Any) -> asyncio.Future[Reply | None]:
        """`request` to a contact, which gets the credit or the blame."""
        return self.request(contact.address, name, args, contact=contact, **options)

    async def write(self, contact: Contact, name: str, args: list[Any], *, hard_s: float) -> Reply | None:
        """Ask with a token; without one, or with a stale one, a second try uses the one in the first answer."""
        if not self.has_token(contact.address):
            first = await self.ask(contact, "fn", [self.identity.node_id, 1], hard_s=hard_s)
            if first is None:
                return None
        for _ in range(2):
            reply = await self.ask(contact, name, args, hard_s=hard_s)
            if reply is None or reply.status != BAD_TOKEN:
                return reply
        return None

    def has_token(self, address: Address) -> bool:
        """Whether we hold a fresh token of an address."""
        return bool(self._calls.token_of(address))

    def _take_reply(self, data: bytes, address: Address) -> None:
        call = self._calls.find(data[1:21], address)
        if call is None:
            self.counters["drop_unasked"] += 1
            return
        body = decode(data)
        if body is None or not check(body, _REPLY_HEAD):
            self.counters["drop_malformed"] += 1
            return
        status, observed, token, *elements = body
        now = self._calls.finish(call, Reply(status, observed, elements), token if len(token) == TOKEN_SIZE else b"")
        if call.contact is not None:
            self.router.note_answer(call.contact, now)
            self.consider(call.contact)

    @property
    def n_outstanding(self) -> int:
        """Number of our requests that have no answer yet."""
        return len(self._calls)

    def cancel_all(self) -> None:
        """Answer None to everything outstanding."""
        self._calls.cancel_all()

    # --- who may enter the table ---

    def consider(self, contact: Contact) -> None:
        """Challenge a contact that has proved its address, if the table has a place for it.

        An id that is known at another address moves only after the old address has failed to answer; asking it
        is what happens first.
        """
        if self.is_own(contact) or contact.address in self._challenging:
            return
        known = self.router.get(contact.id)
        if known is not None:
            if known.address != contact.address and not known.failures and known.address not in self._probing:
                self._probe(known)
                return
            if known.address == contact.address or not known.failures:
                return
        if not self.router.wants(contact):
            self.router.add_contact(contact)
            return
        if len(self._challenging) >= CHALLENGES_IN_FLIGHT:
            self.router.add_contact(contact)
            return
        failed_at = self._failed_challenges.get(contact.address)
        if failed_at is not None and self._clock() - failed_at < CHALLENGE_PAUSE_S:
            return
        self._challenge(contact.address, contact.id)

    def _probe(self, contact: Contact) -> None:
        """Ask a contact whether it is still there; the answer, or its lack, goes to the table."""
        self._probing.add(contact.address)
        probe = self.ask(contact, "ping", [secrets.token_bytes(16)])
        probe.add_done_callback(lambda _: self._probing.discard(contact.address))

    def is_own(self, contact: Contact) -> bool:
        """Whether a contact is this node."""
        return contact.id == self.identity.node_id or contact.address in self.own_addresses

    def estimated_nodes(self) -> int:
        """Return about how many nodes the network has, this one included unless it only asks.

        Cost: O(table) after the table or the samples changed, else nothing.
        """
        versions = (self.router.version, self.size.version)
        if self._estimated[0] != versions:
            own = self.source_node.long_id
            others = self.size.estimate(from_table(own, (contact.long_id for contact in self.router), KSIZE))
            self._estimated = versions, others + (0 if self.is_read_only else 1)
        return self._estimated[1]

    def prove(self, contact: Contact, on_slow: Callable[[], None]) -> asyncio.Future[Contact | None]:
        """Challenge a contact, whatever the table thinks of it; None unless it has the id that it is said to have."""
        return self._challenge(contact.address, contact.id, on_slow)

    def who_signed_at(self, address: Address) -> bytes | None:
        """Return the id that was proved at an address within the last hour."""
        path = self._calls.known_path(address)
        return path.node_id if path is not None and path.node_id_until > self._clock() else None

    def _challenge(
        self, address: Address, node_id: bytes | None, on_slow: Callable[[], None] | None = None
    ) -> asyncio.Future[Contact | None]:
        """Ping with a nonce; the contact enters the table when it signs it. The future gets it, or None."""
        result: asyncio.Future[Contact | None] = asyncio.get_running_loop().create_future()
        nonce = secrets.token_bytes(16)
        self._challenging.add(address)

        def answered(future: asyncio.Future[Reply | None]) -> None:
            self._challenging.discard(address)
            reply = None if future.cancelled() else future.result()
            contact = self._proven(address, nonce, reply)
            if contact is not None:
                path = self._calls.path(address)
                path.node_id, path.node_id_until = contact.id, self._clock() + PROOF_S
            if contact is None or (node_id is not None and contact.id != node_id):
                self._failed_challenges[address] = self._clock()
                if len(self._failed_challenges) > SOURCES_MAX:
                    self._failed_challenges.popitem(last=False)
                contact = None
            else:
                self._failed_challenges.pop(address, None)
                if not self.is_own(contact):
                    self.router.add_verified(contact, self._clock())
            if not result.done():
                result.set_result(contact)

        self.request(address, "ping", [nonce], on_slow=on_slow).add_done_callback(answered)
        return result

    async def ping(self, address: Address) -> Contact | None:
        """Return who lives at an address, proven and entered into the table; None when nobody signs within 1 s.

        A contact with our own id means that the address is ours; it is remembered as such and not entered.
        """
        contact = await self._challenge(address, None)
        if contact is not None and contact.id == self.identity.node_id:
            self.own_addresses.add(address)
        return contact

    def _proven(self, address: Address, nonce: bytes, reply: Reply | None) -> Contact | None:
        if reply is None or reply.status != OK or not check(reply.elements, _PONG):
            return None
        node_id, public, signature = reply.elements[:3]
        text = challenge_text(nonce, node_id, reply.observed, self.net_id)
        if node_id != id_of(public) or not verify(public, signature, text):
            return None
        return Contact(node_id, *address)

    # --- what the package's own code must not do ---

    def welcome_if_new(self, node: Contact) -> None:
        """Remember a contact as a candidate; never hand records over on first sight."""
        self.router.add_contact(node)

    def handle_call_response(self, result: Any, node: Contact) -> Any:
        """Credit or blame a contact; one lost answer removes nobody."""
        if result is None:
            self.router.note_failure(node)
        else:
            self.router.note_answer(node, self._clock())
        return result

    def get_refresh_ids(self) -> list[bytes]:
        """Return a random id in the range of each bucket without contacts."""
        ids = []
        for bucket in self.router.lonely_buckets():
            low, high = bucket.range
            ids.append((low + secrets.randbelow(high - low + 1)).to_bytes(20))
        return ids


def _request_in(data: bytes) -> tuple[str, int, bytes, bytes, list[Any]] | None:
    """Return (name, flags, node id, token, arguments) of a request, or None when its head is malformed."""
    body = decode(data)
    if body is None or len(body) != 2:
        return None
    name, call = body
    if type(name) is not str or type(call) is not list or len(call) < 4:
        return None
    version, flags, node_id, token, *args = call
    if type(version) is not int or type(flags) is not int or type(node_id) is not bytes or type(token) is not bytes:
        return None
    if version != WIRE_VERSION or not 0 <= flags <= 255 or len(node_id) != 20 or len(token) > TOKEN_SIZE:
        return None
    return name, flags, node_id, token, args
