"""How long a download waits: for bytes from anybody, and for one peer that is slow. Pure: times are passed in.

Bytes buy time at 4 KiB/s, a chunk that is right buys all of it: who only trickles is given up, too. Owns the rate that
is shown. Never decides what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastcas.errors import ChunkNotFound, FastCASError, Stalled
from fastcas.fetch.remote import Remote
from fastcas.fetch.scheduler import lowest_bits
from fastcas.ids import short
from fastcas.limits import KIB
from fastcas.metadata import Manifest

__all__ = ["SLOW_BPS", "TICK_S", "Patience", "stuck", "too_slow"]

TICK_S = 0.25
SLOW_BPS = 4 * KIB
SLOW_WINDOW_S = 30.0
QUIET_S = 1.0  # after so long without a byte, progress says what is waited for


class Patience:
    """What one download may still wait.

    Attributes:
        rate_Bps: From everybody, over the last seconds.
    """

    def __init__(self, limit_s: float, now: float, n_received: int) -> None:
        """Start with all of it.

        Args:
            limit_s: So long next to nothing may come, seconds.
            n_received: Bytes that came before.
        """
        self.rate_Bps = 0.0
        self._limit_s = self._left_s = limit_s
        self._last_byte = self._last_tick = now
        self._n_received = n_received
        self._n_here = 0

    def tick(self, now: float, n_received: int, n_here: int, *, is_held: bool) -> None:
        """Another TICK_S is over.

        Args:
            n_received: Bytes of chunks that came from anybody.
            n_here: Chunks that are here and right.
            is_held: We hold back ourselves: silence is no stall.
        """
        n_bytes = n_received - self._n_received
        if n_bytes > 0 or is_held:
            self._last_byte = now
        if is_held or n_here > self._n_here:
            self._left_s = self._limit_s
        else:
            lost_s = min(now - self._last_tick, 4 * TICK_S)  # a longer tick was our own pause
            self._left_s = min(self._limit_s, self._left_s - lost_s + max(0, n_bytes) / SLOW_BPS)
        sample = max(0, n_bytes) / TICK_S
        self.rate_Bps = sample if self.rate_Bps == 0 else 0.8 * self.rate_Bps + 0.2 * sample
        self._last_tick, self._n_here, self._n_received = now, n_here, n_received

    @property
    def is_over(self) -> bool:
        """Whether next to nothing came for all the time there was."""
        return self._left_s <= 0

    def is_quiet(self, now: float) -> bool:
        """Whether no byte has come for a second."""
        return now - self._last_byte >= QUIET_S


def too_slow(asked: Sequence[tuple[Remote, bool]], now: float) -> list[Remote]:
    """Return the peers that gave less than 4 KiB/s over 30 s while others could be asked instead.

    Args:
        asked: The peers that can be asked, and whether each has requests out.
    """
    slow: list[Remote] = []
    for remote, is_busy in asked:
        if not is_busy:
            remote.shed_mark = None
            continue
        got = remote.received()
        if remote.shed_mark is None:
            remote.shed_mark = (now, got)
        elif now - remote.shed_mark[0] >= SLOW_WINDOW_S:
            if got - remote.shed_mark[1] < SLOW_BPS * SLOW_WINDOW_S and len(asked) > 1:
                slow.append(remote)
            remote.shed_mark = (now, got)
    return slow


def stuck(manifest: Manifest, missing: int, lost: str, did: str, stalled_s: float | None) -> FastCASError:
    """Return the error of a download that is given up.

    Args:
        missing: Chunk set.
        lost: What parity cannot bring back, in words; may be empty.
        did: What the peers did, in words.
        stalled_s: For so long next to nothing came from those who have the chunks; None: nobody has them.
    """
    n = missing.bit_count()
    shown = ", ".join(f"#{i} ({short(manifest.hash_of(i))})" for i in lowest_bits(missing, 3))
    text = (
        f"file {short(manifest.file_hash)}: {n} of {manifest.n_chunks} chunks are missing: {shown}"
        f"{', …' if n > 3 else ''}; {lost}{'; ' if lost else ''}{did}; the part file is kept and can be resumed"
    )
    if stalled_s is not None:
        return Stalled(f"less than {SLOW_BPS} B/s for {stalled_s:g} s: {text}")
    return ChunkNotFound(text)
