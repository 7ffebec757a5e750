"""The peers of one download: who they are, where they came from, what each did, which manifest they offer.

Owns the `Remote` of every known address, discovery while the download runs, the address policy for what peers say
of each other, bans, and the wait for a manifest. Never decides about chunks: it tells `on_have` what a peer has.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from fastcas.errors import FastCASError, ManifestCorrupt, NoPeers
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.fetch.remote import Remote, Source
from fastcas.fetch.swarmview import SwarmAnswer
from fastcas.fetch.tasks import TaskSet
from fastcas.ids import Link, PeerAddr, escape_for_terminal, short
from fastcas.metadata import Manifest
from fastcas.peers.policy import AddressPolicy

if TYPE_CHECKING:
    from fastcas.fetch.download import Settings
    from fastcas.peers.discovery import Discovery

__all__ = ["Crowd"]

log = logging.getLogger(__name__)

WAIT_TICK_S = 0.25
DISCOVERY_WANT = 50
DISCOVERY_PAUSE_S = 3.0
CALLERS_PAUSE_S = 0.5
DISCOVERY_DEADLINE_S = 10.0
PEERS_MAX = 100
MANIFESTS_AT_ONCE = 4  # that are fetched at the same time: each may take MANIFEST_SIZE_MAX of memory
POLL_MIN_S = 0.1
POLL_MAX_S = 0.5
POLL_SEED_S = 0.25
POLL_PER_PEER_S = 0.016  # so that all peers together are asked some sixty times a second, which costs 2 % of a core
OTHERS_MIN_S = 1.0  # how long a manifest cut by content waits for others while more peers may be found
OTHERS_MAX_S = 5.0  # and for peers that do not answer
CLAIM_S = 1.0  # how long one peer may be the only one asked for the manifest


class Crowd:
    """All peers of one file. Implements `SwarmListener` for their conversations.

    Attributes:
        manifest: The one in use; None while none is.
        on_have: Called when a peer said what it has (`remote.have`, `remote.is_seed`).
        on_ban: Called when a peer was banned.
    """

    def __init__(
        self, link: Link, settings: Settings, receiver: AsyncReceiver, rng: random.Random, tasks: TaskSet
    ) -> None:
        """Know nobody yet."""
        self.link = link
        self.file_hash = link.file_hash
        self.settings = settings
        self.receiver = receiver
        self.node_id = settings.node_id
        self.data_port = settings.data_port
        self.manifest: Manifest | None = None
        self.remotes: dict[PeerAddr, Remote] = {}
        self.on_have: Callable[[Remote], None] | None = None
        self.on_ban: Callable[[Remote], None] | None = None
        self._rng = rng
        self._tasks = tasks
        self._policy = AddressPolicy()
        self._offer: asyncio.Future[tuple[Manifest, Remote]] | None = None
        self._refused: dict[bytes, str] = {}
        self._last_resort: dict[bytes, tuple[Manifest, Remote]] = {}  # cut by content: proven only at the end
        self._last_resort_at = 0.0
        self._claim: tuple[Remote, float] | None = None
        self._fetching: list[Remote] = []  # who was asked for a manifest and has not answered, oldest first
        self._in_use = asyncio.Event()
        self._n_resolving = 0

    # --- finding peers ---

    def find(self) -> None:
        """Begin to look for peers: those of the settings, of the link, of discovery."""
        for addr in self.settings.peers:
            self._begin_named(addr, "user")
        for addr in self.link.peers:
            self._begin_named(addr, "link")
        if self.settings.discovery is not None:
            self._tasks.spawn(self._discover(self.settings.discovery))
        if self.settings.callers is not None:
            self._tasks.spawn(self._hear_callers(self.settings.callers))

    def _begin_named(self, addr: PeerAddr, source: Source) -> None:
        """A peer that the user named: host names are resolved, addresses are not filtered."""
        if addr.is_literal:
            self._add(addr, source)
        else:
            self._n_resolving += 1
            self._tasks.spawn(self._resolve(addr, source))

    async def _resolve(self, addr: PeerAddr, source: Source) -> None:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(addr.ip, addr.port, type=1)
        except (OSError, UnicodeError) as exc:
            remote = Remote(addr, source, self.receiver, did=f"cannot resolve the name: {exc}")
            remote.answered = remote.lacks_file = True
            self.remotes[addr] = remote
            return
        finally:
            self._n_resolving -= 1
        self._add(PeerAddr(str(found[0][4][0]), addr.port), source)

    def _add(self, addr: PeerAddr, source: Source, node_id: str | None = None) -> None:
        if addr in self.remotes or len(self.remotes) >= PEERS_MAX or (node_id is not None and node_id == self.node_id):
            return
        remote = Remote(addr, source, self.receiver, self.node_id, node_id)
        self.remotes[addr] = remote
        self._tasks.spawn(remote.converse(self, self._rng))

    async def _discover(self, discovery: Discovery) -> None:
        """Ask for peers again and again: those who come later join."""
        while True:
            try:
                async with asyncio.timeout(DISCOVERY_DEADLINE_S + 5):
                    async for hint in discovery.find_file_peers(self.file_hash, DISCOVERY_WANT, DISCOVERY_DEADLINE_S):
                        addr = PeerAddr(hint.ip, hint.port)
                        if hint.source in ("static", "link"):
                            self._begin_named(addr, "user")
                        elif self._policy.refusal(addr.ip, addr.port, giver_ip="127.0.0.1") is None:
                            # The backend applied the rule for loopback: it knows who said so.
                            self._add(addr, "discovery", hint.node_id)
            except (FastCASError, TimeoutError) as exc:
                log.debug("discovery failed backend=%s error=%s", discovery.name, exc)
            await asyncio.sleep(DISCOVERY_PAUSE_S)

    async def _hear_callers(self, callers: Callable[[bytes], Iterable[tuple[str, str, int]]]) -> None:
        """Whoever asks our own node for the file takes part in its swarm: ask back."""
        while True:
            for node_id, ip, port in callers(self.file_hash):
                self._add(PeerAddr(ip, port), "discovery", node_id)
            await asyncio.sleep(CALLERS_PAUSE_S)

    # --- the manifest ---

    async def wait_for_manifest(self, report: Callable[[str], None]) -> tuple[Manifest, Remote]:
        """Wait for a manifest that was not refused.

        Args:
            report: Called a few times a second with what is waited for.
        Raises:
            NoPeers: Nobody has the file within `timeout_s`, or everybody known said so.
            ManifestCorrupt: Every manifest that was offered has been convicted.
        A manifest of chunks that are cut by content has no links, so for a bare hash it is taken only when no other is
        offered (architecture §5.2).
        """
        self._offer = asyncio.get_running_loop().create_future()
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            while (left := deadline - time.monotonic()) > 0 and not self.is_hopeless():
                if self.link.manifest_hash in self._refused:
                    break
                await asyncio.wait([self._offer], timeout=min(WAIT_TICK_S, left))
                if self._offer.done():
                    return self._offer.result()
                if (offer := self._only_offer()) is not None:
                    return offer
                report("a peer that has the file")
        finally:
            self._offer = None
        if self._refused:
            reasons = "; ".join(self._refused.values())
            raise ManifestCorrupt(f"file {short(self.file_hash)}: no manifest is left to try: {reasons}")
        raise NoPeers(f"no peer has {self.file_hash.hex()}: {self.what_peers_did()}")

    def _only_offer(self) -> tuple[Manifest, Remote] | None:
        """A manifest that is proven only at the end, once nobody can be expected to offer another kind."""
        offers = [offer for key, offer in self._last_resort.items() if key not in self._refused]
        if not offers:
            return None
        waited_s = time.monotonic() - self._last_resort_at
        known = self._refused.keys() | self._last_resort.keys()
        may_differ = [
            remote
            for remote in self.remotes.values()
            if remote.banned is None and remote.may_offer and not (remote.answered and known.issuperset(remote.offered))
        ]
        finds_more = self.settings.discovery is not None or self._n_resolving > 0
        if waited_s < OTHERS_MAX_S and (may_differ or (finds_more and waited_s < OTHERS_MIN_S)):
            return None
        return offers[0]

    def use(self, manifest: Manifest) -> None:
        """From now on peers are asked what they have of this manifest."""
        self.manifest = manifest
        for remote in self.remotes.values():
            remote.generation, remote.lacks_file, remote.answered = None, False, False
        self._in_use.set()

    def convict(self, manifest: Manifest, giver: Remote, reason: str) -> None:
        """A manifest contradicts the content: never tried again, its first source offers no more."""
        self._refused[manifest.manifest_hash] = reason
        giver.may_offer = False
        giver.did = reason
        self.manifest = None
        self._in_use.clear()
        for remote in self.remotes.values():
            remote.generation, remote.have, remote.is_seed = None, 0, False

    def fail(self, error: FastCASError) -> None:
        """End the wait for a manifest with an error."""
        if self._offer is not None and not self._offer.done():
            self._offer.set_exception(error)

    # --- SwarmListener ---

    def manifest_to_ask(self, remote: Remote, offered: tuple[bytes, ...]) -> bytes | None:
        """See `SwarmListener`: the link's manifest, or the first that was not refused; one peer at a time."""
        if offered:
            remote.offered = offered
        if self._offer is None or self._offer.done() or not remote.may_offer:
            return None
        now = time.monotonic()
        if self._claim is not None and self._claim[0] is not remote and now < self._claim[1]:
            return None
        named = self.link.manifest_hash
        choice = [
            m for m in ([named] if named is not None else offered)
            if m not in self._refused and m not in self._last_resort
        ]  # fmt: skip
        if not choice:
            return None
        self._claim = (remote, now + CLAIM_S)
        self._ended_fetch(remote)
        for slow in self._fetching[: 1 - MANIFESTS_AT_ONCE]:
            self._ended_fetch(slow)
            slow.interrupt()
        self._fetching.append(remote)
        return choice[0]

    def _ended_fetch(self, remote: Remote) -> None:
        self._fetching = [other for other in self._fetching if other is not remote]

    def on_manifest(self, remote: Remote, manifest: Manifest) -> None:
        """See `SwarmListener`."""
        self._claim = None
        self._ended_fetch(remote)
        if manifest.is_cdc and self.link.manifest_hash is None:
            if not self._last_resort:
                self._last_resort_at = time.monotonic()
            self._last_resort.setdefault(manifest.manifest_hash, (manifest, remote))
            return
        fetching, self._fetching = self._fetching, []
        for other in fetching:  # theirs is not needed any more
            other.interrupt()
        if self._offer is not None and not self._offer.done():
            self._offer.set_result((manifest, remote))

    def on_swarm(self, remote: Remote, answer: SwarmAnswer) -> None:
        """See `SwarmListener`."""
        if answer.node_id is not None and answer.node_id == self.node_id:
            self.ban(remote, "is this node itself")
            return
        for node_id, addr in answer.peers:
            if addr in self.remotes:  # nearly always
                continue
            if self._policy.refusal(addr.ip, addr.port, giver_ip=remote.addr.ip) is None:
                self._add(addr, "swarm", node_id)
        manifest = self.manifest
        if manifest is None or answer.generation is None:
            return
        remote.generation = answer.generation
        have = remote.have if answer.have is None else answer.have
        if answer.is_seed:
            have = (1 << manifest.n_total) - 1
        for index in answer.new:
            have |= 1 << index
        data = (1 << manifest.n_chunks) - 1
        remote.have, remote.is_seed = have, have & data == data
        if self.on_have is not None:
            self.on_have(remote)

    def on_misconduct(self, remote: Remote, reason: str) -> None:
        """See `SwarmListener`."""
        self.ban(remote, reason)

    def on_silence(self, remote: Remote) -> None:
        """See `SwarmListener`."""
        self._ended_fetch(remote)
        if self._claim is not None and self._claim[0] is remote:
            self._claim = None

    def poll_s(self, remote: Remote) -> float:
        """See `SwarmListener`: what a seed has is known, so it is only asked for further peers."""
        crowded = min(POLL_MAX_S, POLL_PER_PEER_S * len(self.remotes))
        return max(POLL_SEED_S if remote.is_seed else POLL_MIN_S, crowded)

    async def pause(self, seconds: float) -> None:
        """See `SwarmListener`."""
        if self._in_use.is_set():
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._in_use.wait()

    # --- verdicts ---

    def ban(self, remote: Remote, reason: str) -> None:
        """Never ask a peer again in this download."""
        if remote.banned is not None:
            return
        remote.banned = remote.did = reason
        log.info("peer banned peer=%s reason=%s", remote.addr, escape_for_terminal(reason))
        if self.on_ban is not None:
            self.on_ban(remote)
        remote.close()

    def banned(self) -> dict[PeerAddr, str]:
        """Return the banned peers with the reasons."""
        return {remote.addr: remote.banned for remote in self.remotes.values() if remote.banned is not None}

    def is_hopeless(self) -> bool:
        """Whether everybody known has said no for good, and nobody else will be found."""
        if self.settings.discovery is not None or self._n_resolving:
            return False
        return all(remote.banned is not None or self._said_no(remote) for remote in self.remotes.values())

    def _said_no(self, remote: Remote) -> bool:
        if not remote.answered:
            return False
        if remote.lacks_file:
            return True
        if self.manifest is None:
            refused = bool(remote.offered) and all(m in self._refused for m in remote.offered)
            return refused or not remote.may_offer
        return False

    def what_peers_did(self) -> str:
        """Return what each peer did last, for the error that ends the download."""
        if not self.remotes:
            return "no peer was found" if self.settings.discovery else "no peer is known"
        shown = [f"{remote.addr}: {remote.banned or remote.did}" for remote in list(self.remotes.values())[:8]]
        more = len(self.remotes) - len(shown)
        return "; ".join(shown) + (f"; and {more} more peers" if more > 0 else "")

    def received(self) -> int:
        """Bytes of chunks that came from all peers so far, right or wrong."""
        return sum(remote.received() for remote in self.remotes.values())

    async def quiet(self) -> None:
        """Close every data connection that has a request out, and wait until none has: nothing is written after."""
        for remote in self.remotes.values():
            remote.hang_up()
        for remote in self.remotes.values():
            await remote.wait_idle()

    def close(self) -> None:
        """Close every connection."""
        for remote in self.remotes.values():
            remote.close()
