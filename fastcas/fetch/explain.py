"""What limited a download: where its time went, by cause, and the largest share's words.

`Meter` is told at each decision what the download waits for; the receiver's threads count what they spend on
receiving, hashing and writing. Pure but for that: the caller passes the time in. Cost: nothing per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["CAUSES", "Explained", "Meter"]

CAUSES = {
    "finding": "finding a peer and the manifest",
    "peer_upload": "peer upload (or the network between)",
    "origin_upload": "the origins' upload (or the network between)",
    "unheld": "waiting for chunks that nobody has",
    "max_download": "own --max-download",
    "hashing": "hashing CPU",
    "receiving": "receiving CPU",
    "disk": "own disk",
    "local": "checking what was on this machine already",
    "reader": "whoever reads the result",
}

Times = Sequence[tuple[float, float, float]]


@dataclass
class Explained:
    """Where the time of a download went.

    Attributes:
        seconds: By cause (`CAUSES`).
        n_unheld: Chunks that nobody had, in the longest of the times in which they were waited for.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    n_unheld: int = 0

    def add(self, other: Explained) -> None:
        """Add what another part of the same job says."""
        for cause, seconds in other.seconds.items():
            self.seconds[cause] = self.seconds.get(cause, 0.0) + seconds
        self.n_unheld = max(self.n_unheld, other.n_unheld)

    @property
    def limited_by(self) -> str:
        """The cause with the most time; "nothing" when there was nothing to do."""
        return max(self.seconds, key=lambda cause: self.seconds[cause], default="nothing")

    def shares(self) -> dict[str, float]:
        """Return cause -> share of the whole time, the largest first; shares below 0.5 % are left out."""
        total = sum(self.seconds.values())
        parts = {cause: seconds / total for cause, seconds in self.seconds.items() if seconds >= 0.005 * total > 0}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def to_map(self) -> dict[str, object]:
        """Return it for `--json`; chunks that nobody had for no more than a moment are not mentioned."""
        shares = {cause: round(share, 3) for cause, share in self.shares().items()}
        n_unheld = self.n_unheld if "unheld" in shares else 0
        return {"limited_by": self.limited_by, "shares": shares, "n_unheld": n_unheld}


class Meter:
    """Adds up the time of one download.

    Args:
        now: Monotonic seconds, at which the time begins.
    """

    def __init__(self, now: float) -> None:
        self._cause = "finding"
        self._since = now
        self._seconds: dict[str, float] = {}
        self._n_unheld = self._n_now = 0
        self._longest = 0.0
        self._times_before: Times | None = None
        self._busy: Times = ()

    def switch(self, cause: str, now: float, n_unheld: int = 0) -> None:
        """From now on the time is `cause`'s."""
        spent = max(0.0, now - self._since)
        self._seconds[self._cause] = self._seconds.get(self._cause, 0.0) + spent
        if self._cause == "unheld" and spent > self._longest:
            self._longest, self._n_unheld = spent, self._n_now
        self._cause, self._since, self._n_now = cause, now, n_unheld

    def threads(self, times: Times) -> None:
        """What the receiver's threads say of themselves: when chunks begin to be asked for, and when all are here."""
        if self._times_before is None:
            self._times_before = times
        else:
            self._busy = [(a - d, b - e, c - f) for (a, b, c), (d, e, f) in zip(times, self._times_before, strict=True)]
            self._times_before = None

    def end(self, now: float) -> Explained:
        """Return where the time went until now.

        The time in which peers were waited for is divided: what the busiest thread of the receiver worked was not
        spent on waiting.
        """
        self.switch(self._cause, now)
        seconds = dict(self._seconds)
        flowing = seconds.get("peer_upload", 0.0)
        busiest = max(self._busy, key=sum, default=(0.0, 0.0, 0.0))
        scale = min(1.0, flowing / sum(busiest)) if sum(busiest) else 0.0
        for cause, spent in zip(("receiving", "hashing", "disk"), busiest, strict=True):
            seconds[cause] = seconds.get(cause, 0.0) + spent * scale
            flowing -= spent * scale
        seconds["peer_upload"] = max(0.0, flowing)
        return Explained({cause: spent for cause, spent in seconds.items() if spent > 0}, self._n_unheld)
