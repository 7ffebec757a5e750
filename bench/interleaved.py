"""Contenders in one process, each round running every one of them once, in turn, on one thread.

A change of the clock hits all of them alike. Figures are medians of CPU time.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

Runs = dict[str, Callable[[], object]]

WARM_UP_S = 1.0  # an idle virtual CPU takes about as long to get up to speed


def cpu_name() -> str:
    """Return what /proc/cpuinfo calls the CPU."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def measure(contenders: Runs, rounds: int) -> dict[str, float]:
    """Return each contender's median CPU seconds; WARM_UP_S of rounds are run first and not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    warm_at = time.monotonic() + WARM_UP_S
    counted = 0
    while contenders and counted < rounds:
        is_warm = time.monotonic() >= warm_at
        for name, run in contenders.items():
            start = time.thread_time()
            run()
            if is_warm:
                times[name].append(time.thread_time() - start)
        counted += is_warm
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, n_bytes: int, seconds: dict[str, float], base: str) -> None:
    """Print GB/s of each contender and its ratio to the base."""
    print(f"\n{title}")
    for name, median_s in seconds.items():
        print(f"  {name:28} {n_bytes / median_s / 1e9:7.2f} GB/s   {seconds[base] / median_s:6.2f} x {base}")
