"""One download per fault: a real peer here, the download in a traced child that strace strikes at its N-th call.

strace counts per thread: "the N-th call of a kind" is that of whichever thread comes to N first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcas.fetch.download import DownloadResult, download
from fastcas.fetch.journal import Journal
from fastcas.ids import Link
from tests.support.evil_peer import Peer
from tests.support.library import Library

__all__ = ["FOREIGN", "Rig", "Struck", "rig"]

ROOT = Path(__file__).parents[2]
FOREIGN = 99
BUDGET_S = 60.0


@dataclass(frozen=True)
class Struck:
    """How a struck download ended: exit status (negative: the signal) and what it said."""

    status: int
    error: str
    was_hit: bool


class Rig:
    """A peer, a process that starts downloads, and the folder where they go."""

    def __init__(self, peer: Peer | Library, folder: Path, starter: asyncio.subprocess.Process) -> None:
        self.peer = peer
        self.folder = folder
        self.out = folder / "there" / "out"
        self.part = self.out.with_name("out.fastcas-part")
        self.journal = self.out.with_name("out.fastcas-journal")
        self._starter = starter

    async def ask(self, **order: Any) -> dict[str, Any]:
        """Give the starter one line and return its answer."""
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self._starter.stdin.write(json.dumps(order).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await asyncio.wait_for(self._starter.stdout.readline(), BUDGET_S))
        return answer

    def lay(self, template: Path | None) -> None:
        """Put the destination's folder into a state: a copy of `template`, or nothing at all."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        if template is not None:
            shutil.copytree(template, self.out.parent)
        for path in (self.part, self.journal):  # copies have holes filled, real part files have them
            if path.exists():
                assert path.stat().st_size

    async def strike(self, link: Link, kind: str, effect: str, **order: Any) -> Struck:
        """Download in a child whose calls of `kind` meet `effect` (strace's inject=kind:effect)."""
        log = self.folder / "trace"
        pid = (await self.ask(link=str(link), out=str(self.out), **order))["pid"]
        tracer = await asyncio.create_subprocess_exec(
            "strace", "-f", "-qq", "-o", str(log), "-e", f"trace={kind}", "-e", f"inject={kind}:{effect}",
            "-p", str(pid), stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        mark = f"TracerPid:\t{tracer.pid}\n"
        while mark not in Path(f"/proc/{pid}/status").read_text():  # noqa: ASYNC240 - a moment
            assert tracer.returncode is None, "strace did not attach"
            await asyncio.sleep(0.001)
        ended = await self.ask()
        await asyncio.wait_for(tracer.wait(), BUDGET_S)
        text = log.read_text()
        return Struck(ended["status"], ended["error"], "INJECTED" in text or "SIGKILL" in text)

    @property
    def file(self) -> Peer:
        """The peer of the one file."""
        assert isinstance(self.peer, Peer)
        return self.peer

    def listed(self) -> dict[int, bool]:
        """Return what the journal lists; asserts that it lists nothing that is not in the part file."""
        if not self.journal.exists():
            return {}
        manifest = self.file.manifest
        journal = Journal(self.journal, manifest.manifest_hash)
        try:
            chunks = journal.read(manifest.n_chunks).chunks
        finally:
            journal.close()
        size = manifest.chunk_size
        if self.part.exists():
            with self.part.open("rb") as file:
                for index, is_checked in chunks.items():
                    file.seek(index * size)
                    data = file.read(manifest.length_of(index))
                    right = hashlib.sha256(data).digest() == manifest.hash_of(index)
                    assert right or not is_checked, f"chunk #{index} is listed and wrong"
        return chunks

    async def resume(self, link: Link, *, n_least: int = 0, rebuilds: bool = False) -> DownloadResult:
        """Download again, here; asserts that all is right, nothing is left over, and what was there is used.

        Args:
            n_least: Chunks that must be found in the part file, beside those that the journal lists.
            rebuilds: Some chunks are rebuilt from parity, of which more may be fetched than is used.
        """
        peer = self.file
        listed = self.listed() if self.part.exists() else {}
        was_there = self.out.exists()
        before = peer.n_chunks_served
        result = await download(link, self.out, discovery=None)
        n_served = peer.n_chunks_served - before
        assert hashlib.sha256(self.out.read_bytes()).digest() == peer.manifest.file_hash
        assert [path.name for path in self.out.parent.iterdir()] == ["out"]
        if was_there:
            assert n_served == 0
        else:
            n_found = -(-result.resumed_bytes // peer.manifest.chunk_size)
            assert n_found >= max(n_least, sum(listed.values()))
            left = peer.manifest.n_chunks - n_found
            assert n_served <= left + peer.manifest.n_parity if rebuilds else n_served == left
        return result


@contextlib.asynccontextmanager
async def rig(folder: Path, peer: Peer | Library) -> AsyncIterator[Rig]:
    """Start everything; `peer` is not started yet."""
    async with peer:
        starter = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.fetch_crash_child", cwd=ROOT,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        made = Rig(peer, folder, starter)
        try:
            await made.ask(link=str(peer.link()), out=str(folder / "warm-up"), parity_after_s=0.05)
            yield made
        finally:
            assert starter.stdin is not None
            starter.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                starter.kill()
            await starter.communicate()
