"""Who may ask how much: write tokens, rate buckets per source, the optional network key.

All times are the caller's clock in seconds (monotonic); nothing here reads a clock or touches a socket.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from blake3 import blake3

from fastcas.dht.budgets import (
    BURST_LOCAL,
    BURST_PROVEN,
    BURST_UNPROVEN,
    RATE_LOCAL,
    RATE_PROVEN,
    RATE_UNPROVEN,
    SOURCE_BAN_S,
    SOURCES_MAX,
    TOKEN_ROTATE_S,
)
from fastcas.dht.contacts import pack_address, subnet_of

__all__ = ["MAC_SIZE", "TOKEN_SIZE", "NetworkKey", "SourceBuckets", "TokenBucket", "TokenJar"]

TOKEN_SIZE = 8
MAC_SIZE = 16
TOKENS_KEPT = 8192  # made tokens that are remembered: about 1.5 MB at most


class TokenJar:
    """Write tokens: proof that an address has received something from us a short while ago.

    A token is the keyed BLAKE3 of ip, port and id under a secret that changes every 5 minutes; the previous
    secret still counts, so a token holds for 5 to 10 minutes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Draw the first secret."""
        self._clock = clock
        self._current = secrets.token_bytes(32)
        self._previous = secrets.token_bytes(32)
        self._since = clock()
        self._made: dict[tuple[str, int, bytes], bytes] = {}

    def token(self, ip: str, port: int, node_id: bytes) -> bytes:
        """Return the 8-byte token for a source."""
        self._rotate()
        source = (ip, port, node_id)
        made = self._made.get(source)
        if made is None:
            if len(self._made) >= TOKENS_KEPT:
                self._made.clear()
            made = self._made[source] = self._make(self._current, ip, port, node_id)
        return made

    def holds(self, token: bytes, ip: str, port: int, node_id: bytes) -> bool:
        """Whether a token was made for this source within the last two periods."""
        if len(token) != TOKEN_SIZE:
            return False
        if hmac.compare_digest(token, self.token(ip, port, node_id)):
            return True
        return hmac.compare_digest(token, self._make(self._previous, ip, port, node_id))

    def _make(self, secret: bytes, ip: str, port: int, node_id: bytes) -> bytes:
        packed = pack_address(ip) or b""
        return blake3(packed + port.to_bytes(2) + node_id, key=secret).digest(TOKEN_SIZE)

    def _rotate(self) -> None:
        age_s = self._clock() - self._since
        if age_s < TOKEN_ROTATE_S:
            return
        self._previous = self._current if age_s < 2 * TOKEN_ROTATE_S else secrets.token_bytes(32)
        self._current = secrets.token_bytes(32)
        self._since = self._clock()
        self._made.clear()


class TokenBucket:
    """A rate limit: `rate` per second with bursts of `burst`."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """Start full."""
        self.rate = rate
        self.burst = burst
        self.level = burst
        self._at = now

    def take(self, now: float) -> bool:
        """Take one; False when there is none left."""
        self.level = min(self.level + (now - self._at) * self.rate, self.burst)
        self._at = now
        if self.level < 1.0:
            return False
        self.level -= 1.0
        return True


@dataclass(slots=True)
class _Source:
    level: float
    at: float
    overrun: float = 0.0
    banned_until: float = 0.0
    proven_until: float = 0.0


class SourceBuckets:
    """Rate limits per source of requests: by IP (/64), by (ip, port) for local addresses. O(1), bounded."""

    def __init__(self, clock: Callable[[], float], is_local: Callable[[str], bool]) -> None:
        """`is_local` says which addresses many nodes share legitimately (loopback, own prefixes)."""
        self._clock = clock
        self._owner_of = lru_cache(maxsize=8192)(lambda ip: _owner(ip, is_local(ip)))
        self._sources: OrderedDict[tuple[bytes, int], _Source] = OrderedDict()

    def admit(self, ip: str, port: int) -> bool:
        """Count one request; False when it must be dropped unread."""
        now = self._clock()
        owner = self._owner_of(ip)
        local = owner[1]
        source = self._source(owner, port, now)
        if source.banned_until > now:
            return False
        if local:
            rate, burst = RATE_LOCAL, BURST_LOCAL
        elif source.proven_until > now:
            rate, burst = RATE_PROVEN, BURST_PROVEN
        else:
            rate, burst = RATE_UNPROVEN, BURST_UNPROVEN
        source.level = min(source.level + (now - source.at) * rate, burst)
        source.overrun = max(source.overrun - (now - source.at) * rate, 0.0)
        source.at = now
        if source.level >= 1.0:
            source.level -= 1.0
            return True
        source.overrun += 1.0
        if source.overrun > 3.0 * burst:
            source.banned_until = now + SOURCE_BAN_S
        return False

    def prove(self, ip: str, port: int) -> None:
        """Raise a source's limits: it has shown a valid token."""
        now = self._clock()
        source = self._source(self._owner_of(ip), port, now)
        if source.proven_until <= now:
            source.level = max(source.level, BURST_PROVEN)
        source.proven_until = now + 2 * TOKEN_ROTATE_S

    def _source(self, owner: tuple[bytes, bool], port: int, now: float) -> _Source:
        name, local = owner
        key = (name, port if local else 0)
        source = self._sources.get(key)
        if source is None:
            source = self._sources[key] = _Source(BURST_LOCAL if local else BURST_UNPROVEN, now)
            if len(self._sources) > SOURCES_MAX:
                self._sources.popitem(last=False)
        else:
            self._sources.move_to_end(key)
        return source


def _owner(ip: str, local: bool) -> tuple[bytes, bool]:
    """Return what shares a rate limit (an address, a /64; beside its port if it is local), and if it is local."""
    packed = pack_address(ip) or b""
    return (packed if local or len(packed) == 4 else subnet_of(ip)), local


class NetworkKey:
    """The keyed MAC in front of every datagram of a private network: 16 bytes, checked before anything is decoded."""

    def __init__(self, key: bytes) -> None:
        """Derive the MAC key and the network's id from a key of any length."""
        self._mac_key = blake3(key, derive_key_context="fastcas 1 datagram mac").digest()
        self.net_id = blake3(key, derive_key_context="fastcas 1 network id").digest(8)

    def seal(self, datagram: bytes) -> bytes:
        """Return MAC and datagram."""
        return blake3(datagram, key=self._mac_key).digest(MAC_SIZE) + datagram

    def open(self, sealed: bytes) -> bytes | None:
        """Return the datagram, or None when the MAC does not hold."""
        datagram = sealed[MAC_SIZE:]
        mac = blake3(datagram, key=self._mac_key).digest(MAC_SIZE)
        return datagram if hmac.compare_digest(mac, sealed[:MAC_SIZE]) else None
