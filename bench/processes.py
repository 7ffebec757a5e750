"""What the servers and clients under test cost: CPU of whole process trees."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def tree_cpu_s(pid: int) -> float:
    """Return utime + stime of a process and its descendants, seconds."""
    total, pending = 0.0, [pid]
    while pending:
        current = pending.pop()
        fields = Path(f"/proc/{current}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICK
        for task in Path(f"/proc/{current}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                pending += [int(child) for child in (task / "children").read_text().split()]
    return total
