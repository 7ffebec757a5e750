"""A download killed at its N-th system call of every kind: never a wrong byte, and the next one goes on from there.

`make kill-points` goes through every N of every kind in every state (FASTCAS_KILL_POINTS=all), here a few of each.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections import Counter
from pathlib import Path

from tests.support.evil_peer import Peer, content_of
from tests.support.fetch_crash_rig import Rig, rig

IS_LONG = os.environ.get("FASTCAS_KILL_POINTS") == "all"
CHUNK = 16384
CONTENT = content_of(40 * CHUNK + 5)
N_HALF = 20
PATIENCE = 2  # downloads in a row that came through: no thread makes so many calls of the kind
KINDS = (
    "openat", "mkdir", "flock", "fallocate", "ftruncate", "pwrite64", "pread64", "lseek", "fsync", "renameat2",
    "unlink", "close", "clone3", "socket", "connect", "sendto", "recvfrom", "epoll_ctl", "epoll_wait", "read", "write",
    "futex", "newfstatat", "fcntl", "madvise", "eventfd2", "pipe2", "mmap",
)  # fmt: skip
FEW = (
    ("fresh", "pwrite64", (1, 2, 3, 9)), ("fresh", "fallocate", (1,)), ("fresh", "flock", (1,)),
    ("fresh", "ftruncate", (1, 2)), ("fresh", "fsync", (1, 2)), ("fresh", "renameat2", (1,)), ("fresh", "unlink", (1,)),
    ("resumed", "pwrite64", (1, 2, 5)), ("resumed", "recvfrom", (12,)), ("resumed", "unlink", (1,)),
    ("damaged", "pwrite64", (1, 2, 3)), ("damaged", "ftruncate", (1,)), ("other", "pwrite64", (1, 2, 3)),
)  # fmt: skip


async def lay_out(made: Rig, folder: Path) -> dict[str, Path | None]:
    """Make the states in which a download can begin: folder templates by name."""
    states: dict[str, Path | None] = {"fresh": None}
    made.peer.gate.set()
    async with Peer(CONTENT, have=set(range(N_HALF))) as half:
        await made.strike(half.link(), "close", "delay_enter=0:when=60000", stall_timeout_s=0.2)
    assert len(made.listed()) == N_HALF
    for name in ("resumed", "damaged", "other"):
        states[name] = folder / name
        shutil.copytree(made.out.parent, folder / name)
    for name, at in (("damaged", 3), ("other", 9)):  # the magic; the manifest's hash, with a check sum that is wrong
        journal = folder / name / made.journal.name
        data = bytearray(journal.read_bytes())
        data[at] ^= 1
        journal.write_bytes(data)
    return states


async def kill_and_resume(made: Rig, template: Path | None, kind: str, n: int) -> int:
    """Strike once; returns the exit status. Whatever it is, the next download is right and uses what was there."""
    made.lay(template)
    struck = await made.strike(made.peer.link(), kind, f"signal=SIGKILL:when={n}")
    assert struck.status in (-9, 0), (kind, n, struck)
    if made.out.exists():
        assert made.out.read_bytes() == CONTENT, (kind, n)
    else:
        assert struck.status == -9
    await made.resume(made.peer.link(), n_least=N_HALF if template is not None else 0)
    return struck.status


def test_killed_at_any_call_goes_on_from_there(tmp_path: Path) -> None:
    async def few() -> None:
        async with rig(tmp_path, Peer(CONTENT)) as made:
            states = await lay_out(made, tmp_path / "states")
            n_killed = 0
            for state, kind, points in FEW:
                for n in points:
                    n_killed += await kill_and_resume(made, states[state], kind, n) == -9
            assert n_killed >= 20

    async def all_points() -> None:
        count: Counter[str] = Counter()
        started = time.monotonic()
        async with rig(tmp_path, Peer(CONTENT)) as made:
            states = await lay_out(made, tmp_path / "states")
            for state, template in states.items():
                for kind in KINDS:
                    n, n_passed = 1, 0
                    while n_passed < PATIENCE:
                        status = await kill_and_resume(made, template, kind, n)
                        n, n_passed = n + 1, n_passed + 1 if status == 0 else 0
                        count[f"{state} {'killed' if status else 'came through'}"] += 1
        seconds = time.monotonic() - started
        print(f"\n{count.total()} downloads in {seconds:.0f} s: {dict(count)}; 0 wrong bytes, all resumed")
        assert sum(n for name, n in count.items() if name.endswith("killed")) >= 1000

    asyncio.run(all_points() if IS_LONG else few())
