"""A disk that refuses once or from now on, at each of a download's calls in turn: a typed error that names the path,
the right exit status, a part file that is kept, and the next download goes on. Short writes change nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.evil_peer import Peer, content_of
from tests.support.fetch_crash_rig import FOREIGN, ROOT, Rig, rig

CHUNK = 16384
CONTENT = content_of(12 * CHUNK + 5)
KINDS = ("pwrite64", "fallocate", "ftruncate", "mkdir", "openat", "fsync", "renameat2", "unlink", "flock", "lseek")
EXITS = {"ENOSPC": 8, "EIO": 1, "EACCES": 9, "EDQUOT": 8}


async def refuse(made: Rig, kind: str, error: str, when: str) -> int | None:
    """Let calls fail; returns the exit status, None if none failed. The next download must be right."""
    made.lay(None)
    struck = await made.strike(made.peer.link(), kind, f"error={error}:when={when}")
    where = (kind, error, when, struck)
    assert struck.status != FOREIGN, where
    if struck.status:
        assert struck.status == EXITS[error], where
        assert str(made.folder) in struck.error, where
        assert os.strerror(getattr(errno, error)) in struck.error, where
        assert "Traceback" not in struck.error
    if made.out.exists():
        assert made.out.read_bytes() == CONTENT, where
    await made.resume(made.peer.link())
    return struck.status if struck.was_hit else None


@pytest.mark.slow
@pytest.mark.parametrize(("error", "lasts"), [("ENOSPC", ""), ("ENOSPC", "+"), ("EIO", "")])
def test_disk_that_refuses_is_a_typed_error_and_what_is_there_is_kept(tmp_path: Path, error: str, lasts: str) -> None:
    async def work() -> None:
        seen: set[tuple[str, int | None]] = set()
        async with rig(tmp_path, Peer(CONTENT)) as made:
            for kind in KINDS:
                for n in range(1, 100):
                    status = await refuse(made, kind, error, f"{n}{lasts}")
                    seen.add((kind, status))
                    if status is None:
                        break
        assert {("pwrite64", EXITS[error]), ("ftruncate", EXITS[error]), ("mkdir", EXITS[error])} <= seen
        assert {("fsync", EXITS[error]), ("renameat2", EXITS[error]), ("fallocate", EXITS[error])} <= seen

    asyncio.run(work())


def test_short_and_interrupted_writes_change_nothing(tmp_path: Path) -> None:
    library, log, out = tmp_path / "short_write.so", tmp_path / "log", tmp_path / "out"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "tests" / "support" / "short_write.c"
    subprocess.run(["cc", *flags, "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "SHORT_WRITE_LOG": str(log)}

    async def get(link: str, *more: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastcas", "get", link, "-o", str(out), "--storage-dir", str(tmp_path / "no"), *more,
            cwd=ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        return await asyncio.wait_for(process.wait(), 60)

    async def work() -> None:
        async with Peer(CONTENT, have=set(range(7))) as half:
            assert await get(str(half.link()), "--stall-timeout", "0.3") == 3
        async with Peer(CONTENT) as peer:
            assert await get(str(peer.link())) == 0
            assert peer.n_chunks_served == peer.manifest.n_chunks - 7

    asyncio.run(work())
    assert out.read_bytes() == CONTENT
    assert log.stat().st_size > 13
