"""How many bytes a download may ask for: a token bucket in chunks. Pure: the caller passes the time in.

Chunks are paid for when they are asked for, so that the limit holds over all peers together; what did not come is
given back. One bucket may lie behind another (a node's behind a download's): both must have enough.
"""

from __future__ import annotations

import math

__all__ = ["Pace"]

BURST_S = 0.1  # unused time that may be made up for, so that a late timer costs nothing


class Pace:
    """A limit of the download rate, shared by whoever holds it.

    Attributes:
        rate_Bps: Bytes per second.
    """

    def __init__(self, rate_Bps: float, behind: Pace | None = None) -> None:
        """Start empty: the first chunk waits for its bytes, too.

        Args:
            rate_Bps: Bytes per second, > 0.
            behind: A further limit that holds as well.
        """
        self.rate_Bps = rate_Bps
        self._behind = behind
        self._bytes = 0.0  # may be asked for; negative: a debt
        self._at = -math.inf

    def chunks(self, now: float, size: int) -> int:
        """Return how many chunks of `size` bytes may be asked for now."""
        if self._at == -math.inf:
            self._at = now
        most = max(self.rate_Bps * BURST_S, 1.0 * size)
        self._bytes = min(most, self._bytes + max(0.0, now - self._at) * self.rate_Bps)
        self._at = max(self._at, now)
        n = max(0, int(self._bytes // size))
        return n if self._behind is None else min(n, self._behind.chunks(now, size))

    def wait_s(self, size: int) -> float:
        """Return how long until a chunk of `size` bytes may be asked for, seconds; after `chunks` returned 0."""
        own = max(0.0, size - self._bytes) / self.rate_Bps
        return own if self._behind is None else max(own, self._behind.wait_s(size))

    def spend(self, n_bytes: int) -> None:
        """Bytes have been asked for; negative: asked for, but they did not come."""
        self._bytes -= n_bytes
        if self._behind is not None:
            self._behind.spend(n_bytes)
