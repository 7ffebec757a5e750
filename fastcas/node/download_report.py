"""A download as people and scripts see it: plain maps of its progress and of its end. Loads nothing of the node."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcas.fetch import DownloadResult, Progress

__all__ = ["ProgressRelay", "result_to_map"]

PROGRESS_S = 0.1
PROGRESS_STEPS = 20  # parts of the whole that are each reported, however fast they come


def result_to_map(result: DownloadResult) -> dict[str, Any]:
    """Return a finished download as people and scripts see it."""
    return {
        "path": str(result.path),
        "file_hash": result.file_hash.hex(),
        "manifest_hash": result.manifest.manifest_hash.hex(),
        "size": result.size,
        "seconds": round(result.seconds, 3),
        "bytes_by_peer": {str(peer): count for peer, count in result.bytes_by_peer.items()},
        "fetched_bytes": sum(result.bytes_by_peer.values()) + sum(result.bytes_by_origin.values()),
        "resumed_bytes": result.resumed_bytes,
        "local_bytes": result.local_bytes,
        "banned": {str(peer): reason for peer, reason in result.banned.items()},
        "bytes_by_origin": result.bytes_by_origin,
        "failed_origins": result.failed_origins,
        "explained": result.explained.to_map(),
        "chosen": result.chosen.to_map() if result.chosen is not None else None,
    }


class ProgressRelay:
    """A download's progress as plain maps: ten times a second, and at each twentieth of the whole."""

    def __init__(self, on_progress: Callable[[dict[str, Any]], None] | None) -> None:
        self._on_progress = on_progress
        self._reported_at = 0.0
        self._reported_done = 0

    def __call__(self, now: Progress) -> None:
        """Take what the fetch path says."""
        self._send(now.bytes_done, now.bytes_total, now.rate_Bps, now.peers, now.waiting_on)

    def bytes(self, done: int, total: int) -> None:
        """Take what a local copy says."""
        self._send(done, total, 0.0, 0, "")

    def _send(self, done: int, total: int, rate_Bps: float, peers: int, waiting_on: str) -> None:
        moment = time.monotonic()
        step = (done - self._reported_done) * PROGRESS_STEPS >= max(total, 1)
        if self._on_progress is not None and (done == total or step or moment - self._reported_at >= PROGRESS_S):
            self._reported_at, self._reported_done = moment, done
            self._on_progress(
                {"done": done, "total": total, "rate_Bps": int(rate_Bps), "peers": peers, "waiting_on": waiting_on}
            )
