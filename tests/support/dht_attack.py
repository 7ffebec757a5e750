"""Nodes that attack: planted next to a key, or ordinary ones that lie. They answer pings honestly, as they must.

Their ids are what their keys say: planted ones are mined from a pool of keys, as an attacker would do it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from fastcas.dht.contacts import Contact, pack_contacts
from fastcas.dht.handlers import Asker
from fastcas.dht.identity import Identity
from fastcas.dht.peerlist import Peer
from fastcas.dht.provided import keys_of, metadata_key, swarm_key
from fastcas.dht.server import FcServer
from fastcas.dht.wire import OK
from tests.support.virtual_net import VirtualNet, address_of

Answer = tuple[int, list[Any]] | None
Behaviour = Callable[[str, Asker, list[Any], Answer], Answer]
POOL = 30_000
WRITES = frozenset(("ap", "as", "pm", "wd"))


@lru_cache(maxsize=1)
def _pool(size: int) -> list[tuple[int, int]]:
    """Return (id, number) of keys that an attacker may choose from; `VirtualNet.node` makes them by number."""
    return [
        (int.from_bytes(Identity(random.Random(f"node {number}").randbytes(32)).node_id), number)
        for number in range(1_000_000, 1_000_000 + size)
    ]


async def plant(
    net: VirtualNet, honest: Sequence[FcServer], target: int, count: int, *, poisons: bool = False, pool: int = POOL
) -> list[FcServer]:
    """Return `count` listening nodes nearer to `target` than all but a few of the honest ones, who know them.

    They take records and forget them; with `poisons` they name peers that do not exist.
    """
    chosen = sorted(_pool(pool), key=lambda entry: entry[0] ^ target)[:count]
    first = len(net.nodes)  # never an address that somebody else had: others may hold its token
    ips = [f"10.200.{place >> 8 & 255}.{place & 255}" for place in range(first, first + count)]
    planted = [await net.node(number, ip=ip) for (_, number), ip in zip(chosen, ips, strict=True)]
    introduce(net, planted, honest)
    allies = [contact_of(node) for node in planted]
    for node in planted:
        corrupt(node, poison(net.rng, allies) if poisons else swallow(allies))
    return planted


def introduce(net: VirtualNet, newcomers: Sequence[FcServer], honest: Sequence[FcServer]) -> None:
    """Let everybody who has room for them know the newcomers."""
    for newcomer in newcomers:
        for node in honest:
            node.protocol.router.add_verified(contact_of(newcomer), net.loop.time())


def remove(planted: Sequence[FcServer], honest: Sequence[FcServer]) -> None:
    """Undo `plant`: they are gone and nobody knows them any more."""
    for gone in planted:
        gone.stop()
        for node in honest:
            node.protocol.router.remove_contact(contact_of(gone))


def contact_of(node: FcServer) -> Contact:
    """Return a new contact of a node."""
    return Contact(node.identity.node_id, *address_of(node))


def corrupt(node: FcServer, behaviour: Behaviour) -> None:
    """Let a node answer everything but pings as `behaviour(name, asker, args, honest answer)` says."""
    handlers = node.protocol._handlers
    honest = handlers.handle

    def handle(name: str, asker: Asker, args: list[Any]) -> Answer:
        answer = honest(name, asker, args)
        return answer if name == "ping" or answer is None else behaviour(name, asker, args, answer)

    handlers.handle = handle  # type: ignore[method-assign]


def _reply(name: str, contacts: Sequence[Contact], asker: Asker, args: list[Any]) -> Answer:
    """Return a reply that names contacts and no records; stores are taken and forgotten."""
    nodes = pack_contacts(contacts[: min(20, (asker.room - 100) // 26)], asker.ip)
    match name:
        case "fn":
            return OK, list(nodes)
        case "gs":
            return OK, [b"", b"", b"", *nodes]
        case "gm":
            return OK, [0, [], *nodes]
        case "gp":
            return OK, [b"", b"", bytes(len(args[1]) // 8), len(args[1]) // 8, b"", b""]
    return OK, [130, 0]


def swallow(allies: Sequence[Contact]) -> Behaviour:
    """Take every record and forget it, know of no record, and name only allies, the nearest to what is asked."""

    def behave(name: str, asker: Asker, args: list[Any], answer: Answer) -> Answer:
        target = int.from_bytes(args[0]) if name in ("fn", "gs", "gm") else 0
        return _reply(name, sorted(allies, key=lambda c: c.long_id ^ target), asker, args)

    return behave


def poison(rng: random.Random, allies: Sequence[Contact]) -> Behaviour:
    """As `swallow`, but name ten peers that do not exist for whatever is asked."""
    honest_looking = swallow(allies)

    def behave(name: str, asker: Asker, args: list[Any], answer: Answer) -> Answer:
        peers = b"".join(rng.randbytes(20) + bytes((10, 220, rng.randrange(256), 1)) + b"\x23\x28" for _ in range(10))
        reply = honest_looking(name, asker, args, answer)
        if name == "gs" and reply is not None:
            n_contacts = max((asker.room - len(peers) - 130) // 26, 0)
            return OK, [peers, b"", bytes(20), *pack_contacts(allies[:n_contacts], asker.ip)]
        if name == "gp":
            n_keys = min(len(args[1]) // 8, 64)
            return OK, [peers, b"", bytes((4, 0, 1, 2, 3)) * n_keys, n_keys, b"", b""]
        return reply

    return behave


def drop(name: str, asker: Asker, args: list[Any], answer: Answer) -> Answer:
    """Answer nothing."""
    return None


def lie(rng: random.Random) -> Behaviour:
    """Name 20 contacts that do not exist, swallow records."""

    def behave(name: str, asker: Asker, args: list[Any], answer: Answer) -> Answer:
        made_up = [_made_up(rng, rng.getrandbits(160)) for _ in range(20)]
        return _reply(name, made_up, asker, args)

    return behave


def ever_closer(rng: random.Random, allies: Sequence[Contact]) -> Behaviour:
    """Name 20 contacts nearer to the target than anybody: ten that do not exist, ten at allies' addresses."""

    def behave(name: str, asker: Asker, args: list[Any], answer: Answer) -> Answer:
        target = int.from_bytes(args[0]) if name in ("fn", "gs", "gm") else 0
        contacts = [_made_up(rng, target ^ rng.getrandbits(140)) for _ in range(10)]
        for ally in rng.sample(list(allies), min(10, len(allies))):
            contacts.append(Contact((target ^ rng.getrandbits(140)).to_bytes(20), *ally.address))
        return _reply(name, contacts, asker, args)

    return behave


def _made_up(rng: random.Random, long_id: int) -> Contact:
    return Contact(
        long_id.to_bytes(20), f"10.{rng.randrange(210, 250)}.{rng.randrange(256)}.{rng.randrange(256)}", 8468
    )


async def is_found(publisher: FcServer, seeker: FcServer, kind: str, content: bytes) -> bool:
    """Whether `seeker` finds what `publisher` announces about `content`: a file, a chunk, or a file's metadata."""
    if kind == "metadata":
        await publisher.announcer.put_metadata(content, "x", 1, content)
        records = await seeker.finder.get_metadata(content, 10.0)
        return any(record.public == publisher.identity.public for record in records)
    peers: list[Peer] = []
    if kind == "file":
        await publisher.announcer.announce_files([(content, 1000)])
        await seeker.finder.find_file(content, 32, 10.0, peers.extend)
    else:
        await publisher.announcer.announce_chunks(keys_of(content))
        await seeker.finder.find_chunks(content, 4, 10.0, lambda news: [peers.extend(new) for new in news.values()])
    return any(peer.node_id == publisher.identity.node_id for peer in peers)


def key_of(kind: str, content: bytes) -> int:
    """Return the 160-bit key under which something about `content` is stored."""
    keys = {"metadata": metadata_key, "file": swarm_key, "chunk": lambda chunk: chunk[:8] + bytes(12)}
    return int.from_bytes(keys[kind](content))
