"""`fastcas get` that cannot go on: when it ends, with which status, and what it says."""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.evil_peer import Peer, content_of
from tests.support.nodes import run_fastcas, start_node

CHUNK = 16384
CONTENT = content_of(40 * CHUNK + 1)


def get(peer: Peer, out: Path, storage: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the command while the peer serves."""

    async def work() -> subprocess.CompletedProcess[str]:
        async with peer:
            arguments = ("get", str(peer.link()), "-o", str(out), "--storage-dir", str(storage), *more)
            return await asyncio.to_thread(run_fastcas, *arguments)

    return asyncio.run(work())


@pytest.mark.parametrize("through_node", [False, True])
def test_silence_ends_with_4_and_names_the_missing_chunks_and_what_the_peer_did(
    tmp_path: Path, through_node: bool
) -> None:
    out, storage = tmp_path / "out", tmp_path / "storage"
    peer = Peer(CONTENT, knows_next=False, behaviour="silent", evil_when=lambda nth: nth > 10)
    if through_node:
        with start_node(storage):
            done = get(peer, out, storage, "--stall-timeout", "0.6")
    else:
        done = get(peer, out, storage, "--stall-timeout", "0.6")
    assert done.returncode == 4, done.stderr
    assert "for 0.6 s" in done.stderr
    assert re.search(r"3[01] of 41 chunks are missing: #\d+ \([0-9a-f]{8}\), .*127\.0\.0\.1:\d+: ", done.stderr)
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out.fastcas-part").exists()


def test_chunks_that_nobody_has_end_with_3(tmp_path: Path) -> None:
    peer = Peer(CONTENT, have=set(range(30)))
    done = get(peer, tmp_path / "out", tmp_path / "storage", "--stall-timeout", "0.5")
    assert done.returncode == 3, done.stderr
    assert "11 of 41 chunks are missing: #30 (" in done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_impossible_stall_timeout_is_a_usage_error(tmp_path: Path, value: str) -> None:
    done = run_fastcas("get", "00" * 32, "--stall-timeout", value, "--storage-dir", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "--stall-timeout" in done.stderr
