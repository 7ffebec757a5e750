"""Requests of ours: message ids, the table of what is outstanding, retransmission, round-trip estimates and tokens.

A request is one datagram, sent again after its address's retransmission time, answered with None after its hard
limit. One timer serves all of them: a heap of due times, in which the entries of answered requests are skipped.
A cancelled request leaves the table at once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from fastcas.dht.budgets import (
    OUTSTANDING_MAX,
    RTO_FIRST_S,
    RTO_MAX_S,
    RTO_MIN_S,
    SOURCES_MAX,
    TIMER_GRAIN_S,
    TOKEN_ROTATE_S,
)
from fastcas.dht.contacts import Address, Contact

__all__ = ["Call", "Calls", "Reply"]

ID_SIZE = 20
IDS_DRAWN = 256
NEVER = float("inf")


@dataclass(slots=True)
class Reply:
    """An answer to a request of ours.

    Attributes:
        status: 0 is good (`fastcas.dht.wire`).
        observed: How the replier sees our address, 6 or 18 bytes; a claim.
        elements: What follows the token; the caller checks shapes.
    """

    status: int
    observed: bytes
    elements: list[Any]


class Call(asyncio.Future["Reply | None"]):
    """The future answer to one request, and what is needed to send it again."""

    __slots__ = (
        "address", "contact", "datagram", "hard_at", "message_id", "n_sent", "on_slow", "outstanding", "rto_s",
        "sent_at",
    )  # fmt: skip

    outstanding: dict[bytes, Call]
    message_id: bytes
    datagram: bytes
    address: Address
    contact: Contact | None
    on_slow: Callable[[], None] | None
    sent_at: float
    hard_at: float
    rto_s: float
    n_sent: int

    def cancel(self, msg: Any = None) -> bool:
        """Cancel, and leave the table of what is outstanding now."""
        self.outstanding.pop(self.message_id, None)
        return super().cancel(msg)


@dataclass(slots=True)
class Path:
    """What we know of one address: smoothed round trip, its variation, the token it gave us, who signed there."""

    srtt_s: float = 0.0
    var_s: float = 0.0
    token: bytes = b""
    token_until: float = 0.0
    node_id: bytes = b""
    node_id_until: float = 0.0

    @property
    def rto_s(self) -> float:
        """Seconds to wait for an answer before asking again."""
        if not self.srtt_s:
            return RTO_FIRST_S
        return min(max(self.srtt_s + 4.0 * self.var_s, RTO_MIN_S), RTO_MAX_S)

    def sample(self, seconds: float) -> None:
        """Take one measured round trip into account."""
        if not self.srtt_s:
            self.srtt_s, self.var_s = seconds, seconds / 2
        else:
            self.var_s += 0.25 * (abs(self.srtt_s - seconds) - self.var_s)
            self.srtt_s += 0.125 * (seconds - self.srtt_s)


class Calls:
    """All requests of one node that have no answer yet.

    Args:
        clock: Monotonic seconds.
        send: Sends a datagram to an address; never raises.
        on_failure: Gets the contact of a request that nobody answered.
        counters: Counts timeouts, retransmits and requests that found the table full.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        send: Callable[[bytes, Address], None],
        on_failure: Callable[[Contact], None],
        counters: Counter[str],
    ) -> None:
        """Start empty."""
        self._clock = clock
        self._send = send
        self._on_failure = on_failure
        self._counters = counters
        self._outstanding: dict[bytes, Call] = {}
        self._paths: OrderedDict[Address, Path] = OrderedDict()
        self._ids = b""
        self._due: list[tuple[float, bytes]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER

    def __len__(self) -> int:
        """Return how many requests have no answer yet."""
        return len(self._outstanding)

    def path(self, address: Address) -> Path:
        """Return what is known of an address; the longest unused one is forgotten when there are too many."""
        path = self._paths.get(address)
        if path is None:
            path = self._paths[address] = Path()
            if len(self._paths) > SOURCES_MAX:
                self._paths.popitem(last=False)
        else:
            self._paths.move_to_end(address)
        return path

    def known_path(self, address: Address) -> Path | None:
        """Return what is known of an address, or None; does not count as use."""
        return self._paths.get(address)

    def token_of(self, address: Address) -> bytes:
        """Return the fresh token that an address gave us, or nothing."""
        path = self.known_path(address)
        return path.token if path is not None and path.token_until > self._clock() else b""

    def new_id(self) -> bytes:
        """Return a random message id."""
        if not self._ids:
            self._ids = secrets.token_bytes(ID_SIZE * IDS_DRAWN)
        message_id, self._ids = self._ids[:ID_SIZE], self._ids[ID_SIZE:]
        return message_id

    def start(
        self,
        message_id: bytes,
        datagram: bytes,
        address: Address,
        contact: Contact | None,
        hard_s: float,
        on_slow: Callable[[], None] | None,
    ) -> Call:
        """Send a request and return its future answer. When too much is outstanding the answer is None at once."""
        call = Call(loop=asyncio.get_running_loop())
        call.outstanding = self._outstanding
        call.message_id = message_id
        if len(self._outstanding) >= OUTSTANDING_MAX:
            self._counters["drop_outstanding"] += 1
            call.set_result(None)
            return call
        now = self._clock()
        rto_s = min(self.path(address).rto_s, hard_s)
        call.datagram = datagram
        call.address = address
        call.contact = contact
        call.on_slow = on_slow
        call.sent_at = now
        call.hard_at = now + hard_s
        call.rto_s = rto_s
        call.n_sent = 1
        self._counters["requests"] += 1
        self._outstanding[message_id] = call
        self._wake_at(now + rto_s, message_id, now)
        self._send(datagram, address)
        return call

    def find(self, message_id: bytes, address: Address) -> Call | None:
        """Return the outstanding request that a reply from an address belongs to."""
        call = self._outstanding.get(message_id)
        return call if call is not None and call.address == address else None

    def finish(self, call: Call, reply: Reply, token: bytes) -> float:
        """Answer a request; return the time."""
        self._outstanding.pop(call.message_id, None)
        now = self._clock()
        path = self.path(call.address)
        if call.n_sent == 1:
            path.sample(max(now - call.sent_at, 1e-6))
        if token:
            path.token = token
            path.token_until = now + 0.9 * TOKEN_ROTATE_S
        if not call.done():
            call.set_result(reply)
        return now

    def cancel_all(self) -> None:
        """Answer None to everything outstanding."""
        calls = list(self._outstanding.values())
        self._outstanding.clear()
        self._due.clear()
        for call in calls:
            if not call.done():
                call.set_result(None)

    # --- time ---

    def _wake_at(self, due: float, message_id: bytes, now: float) -> None:
        heappush(self._due, (due, message_id))
        if due < self._timer_at - TIMER_GRAIN_S:
            self._set_timer(due, now)

    def _set_timer(self, due: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(max(due - now, 0.0), self._run_due)

    def _run_due(self) -> None:
        """Send again or give up what is due, and set the timer to the next that still waits."""
        self._timer, self._timer_at = None, -NEVER  # whatever is due in between, the timer is set at the end
        now = self._clock()
        try:
            while self._due:
                due, message_id = self._due[0]
                call = self._outstanding.get(message_id)
                if call is not None and due > now + TIMER_GRAIN_S:
                    break
                heappop(self._due)
                if call is not None:
                    self._overdue(call, now)
        finally:
            self._timer_at = NEVER
            if self._due:
                self._set_timer(self._due[0][0], now)

    def _overdue(self, call: Call, now: float) -> None:
        on_slow, call.on_slow = call.on_slow, None
        if now >= call.hard_at - TIMER_GRAIN_S:
            self._counters["timeouts"] += 1
            self._outstanding.pop(call.message_id, None)
            if call.contact is not None:
                self._on_failure(call.contact)
            if not call.done():
                call.set_result(None)
        else:
            left_s = call.hard_at - now
            call.n_sent += 1
            call.rto_s = min(2.0 * call.rto_s, left_s)
            if left_s - call.rto_s < RTO_MIN_S / 2:
                call.rto_s = left_s
            self._wake_at(now + call.rto_s, call.message_id, now)
            self._counters["retransmits"] += 1
            self._send(call.datagram, call.address)
        if on_slow is not None:
            on_slow()
