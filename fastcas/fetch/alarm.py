"""One timer for many wishes: it rings at the earliest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Alarm"]

SOON_S = 0.001  # also keeps a wish for what is past from ringing in the same turn of the loop


class Alarm:
    """Calls `ring` in the loop, once for all wishes up to then; the wishes for later are forgotten with it."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float, now: float) -> None:
        """Wish to be woken at `at`; both in seconds of `time.monotonic`."""
        if self._timer is not None:
            if at > self._at - SOON_S:
                return
            self._timer.cancel()
        self._at = at
        self._timer = asyncio.get_running_loop().call_later(max(SOON_S, at - now), self._fire)

    def cancel(self) -> None:
        """Forget every wish."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._ring()
