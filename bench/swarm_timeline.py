"""Which uplinks idle, and when? What a swarm's hosts sent and got in every piece of a run, from the bridge's counters.

One small process in the bridge's namespace reads /proc/net/dev every STEP_S; nothing is asked of the nodes.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.netns import Host, Rates

__all__ = ["Timeline", "watch"]

STEP_S = 0.25
_READER = r"""
import sys, time
step = float(sys.argv[1])
while True:
    rows = [line.replace(":", " ").split() for line in open("/proc/net/dev").read().splitlines()[2:]]
    print(time.monotonic(), *(f"{r[0]} {r[1]} {r[9]}" for r in rows if r[0][0] == "p"), flush=True)
    time.sleep(step)
"""


@dataclass
class Timeline:
    """Samples (monotonic seconds, {host number: (bytes it sent, bytes it got)}), headers included."""

    rates: Sequence[Rates]
    samples: list[tuple[float, dict[int, tuple[int, int]]]] = field(default_factory=list)

    def rows(self, begin: float, end: float) -> list[tuple[float, list[float], list[float]]]:
        """Return (seconds since `begin`, share of each uplink in use, share of each downlink) from `begin` to `end`."""
        out = []
        for (at, before), (now, after) in zip(self.samples, self.samples[1:], strict=False):
            if now < begin or at > end:
                continue
            ups, downs = (
                [
                    (after[i][way] - before[i][way]) * 8e-6 / (now - at) / (rate.up if way == 0 else rate.down)
                    for i, rate in enumerate(self.rates)
                ]
                for way in (0, 1)
            )
            out.append((now - begin, ups, downs))
        return out

    def text(self, begin: float, ends: dict[int, float]) -> str:
        """Return a table: a line per sample, per host the percentage of its uplink in use; `<` marks who has finished.

        Args:
            begin: When the clock began.
            ends: Host number: when it had the file.
        """
        rows = self.rows(begin, max(ends.values()))
        lines = ["      s  uplinks in use, % (seed first; < finished) | downlinks"]
        for at, ups, downs in rows:
            marks = ["<" if begin + at > ends.get(i, float("inf")) else " " for i in range(len(ups))]
            lines.append(
                f"  {at:5.2f} "
                + "".join(f"{100 * up:4.0f}{mark}" for up, mark in zip(ups, marks, strict=True))
                + " |"
                + "".join(f"{100 * down:4.0f}" for down in downs)
            )
        total = sum(rate.up for rate in self.rates)
        used = sum(up * rate.up for _, ups, _ in rows for up, rate in zip(ups, self.rates, strict=True))
        lines.append(f"  all uplinks together {100 * used / max(1, len(rows)) / total:.0f} % in use")
        return "\n".join(lines)


@contextlib.contextmanager
def watch(hosts: Sequence[Host], rates: Sequence[Rates]) -> Iterator[Timeline]:
    """Sample while the block runs; the samples are there after it."""
    timeline = Timeline(rates)
    bridge = Host(hosts[0].bridge, "")
    process = subprocess.Popen(
        bridge.command([sys.executable, "-S", "-c", _READER, str(STEP_S)]), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    try:
        yield timeline
    finally:
        time.sleep(STEP_S)
        process.kill()
        rest, _ = process.communicate()
        for line in [first, *rest.splitlines()]:
            words = line.split()
            if len(words) % 3 != 1:
                continue
            counts = {int(words[i][1:]): (int(words[i + 1]), int(words[i + 2])) for i in range(1, len(words), 3)}
            if len(counts) == len(rates):
                timeline.samples.append((float(words[0]), counts))
