"""Peers that misbehave in every scripted way: beside a good one the file is right, alone the end is typed and in time.

`test_fetch_behaviours` has the verdicts of chunk answers; here are the other requests, crowds of liars, and memory.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import ChunkNotFound, FastCASError, NoPeers, Stalled
from fastcas.fetch import crowd
from fastcas.fetch.download import DownloadResult, download
from fastcas.ids import Link
from tests.support.evil_peer import BEHAVIOURS, WAYS, Peer, content_of
from tests.support.fetching import quick_deadlines, run

ROOT = Path(__file__).parents[2]
CHUNK = 16384
LARGE = 1 << 20
CONTENT = content_of(60 * CHUNK + 777)
EVERYTHING = [*BEHAVIOURS, *WAYS]
# Without others to lie about, or to be asked for NEXT beside, they serve the file.
GOOD_ALONE = {name for name, (kind, _) in WAYS.items() if kind == "next"} | {
    "content_location", "swarm_has_nothing", "swarm_lying_peers", "swarm_many_manifests", "swarm_says_it_is_another",
    "swarm_thousands_of_peers",
}  # fmt: skip
KINDS = sorted({kind for kind, _ in WAYS.values()})
LIMIT_MIB = 256


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_deadlines(monkeypatch)


async def get(link: Link, out: Path, **options: Any) -> DownloadResult:
    """Download without discovery."""
    return await download(link, out, discovery=None, **options)


async def beside(names: list[str], out: Path, *, bare: bool, n_leechers: int = 0) -> tuple[list[Peer], DownloadResult]:
    """Download from one good peer, one of each of these, and leechers that have the first chunks."""
    evils = [Peer(CONTENT, behaviour=name) for name in names]
    others = [Peer(CONTENT), *(Peer(CONTENT, have={0, 1, 2}) for _ in range(n_leechers))]
    peers = [*evils, *others]
    try:
        for peer in peers:
            await peer.start()
        result = await get(others[0].link(bare=bare, peers=tuple(peer.addr for peer in peers)), out)
    finally:
        for peer in peers:
            await peer.stop()
    return evils, result


def test_there_are_many_ways_to_be_evil() -> None:
    assert len(set(EVERYTHING)) == len(EVERYTHING) >= 90


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_evil_peer_beside_a_good_one(tmp_path: Path, kind: str, bare: bool) -> None:
    n_leechers = 1 if kind == "next" else 0  # without leechers nobody is asked for NEXT

    async def one(name: str) -> None:
        out = tmp_path / name / "out"
        await beside([name], out, bare=bare, n_leechers=n_leechers)
        assert await asyncio.to_thread(out.read_bytes) == CONTENT, name
        assert [path.name for path in out.parent.iterdir()] == ["out"], name

    async def work() -> None:
        await asyncio.gather(*(one(name) for name in WAYS if WAYS[name][0] == kind))

    run(work)


@pytest.mark.parametrize("kind", KINDS)
def test_each_evil_peer_alone_ends_in_words(tmp_path: Path, kind: str) -> None:
    async def one(name: str) -> None:
        out = tmp_path / name
        async with Peer(CONTENT, behaviour=name) as evil:
            try:
                await get(evil.link(), out, timeout_s=0.5, stall_timeout_s=0.5)
            except FastCASError as exc:
                assert isinstance(exc, ChunkNotFound | NoPeers | Stalled), (name, exc)
                assert str(evil.addr) in str(exc), name
            else:
                raise AssertionError(f"{name}: served the file")
        assert not await asyncio.to_thread(out.exists), name

    async def work() -> None:
        names = [name for name in WAYS if WAYS[name][0] == kind and name not in GOOD_ALONE]
        await asyncio.gather(*(one(name) for name in names))

    run(work)


@pytest.mark.parametrize("first", range(0, len(EVERYTHING), 9))
def test_nine_evil_of_ten(tmp_path: Path, first: int) -> None:
    out = tmp_path / "out"
    run(lambda: beside(EVERYTHING[first : first + 9], out, bare=first % 2 == 1, n_leechers=first % 2))
    assert out.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "name", ["next_silent", "stall", "silent", "trickle", "slow_headers", "half_open", "rst_storm"]
)
def test_nine_of_a_kind_and_a_leecher_do_not_hold_up_the_good_one(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run(lambda: beside([name] * 9, out, bare=True, n_leechers=1))
    assert out.read_bytes() == CONTENT


def test_memory_stays_bounded_whatever_nine_peers_send(tmp_path: Path) -> None:
    out = tmp_path / "out"
    content = content_of(24 * LARGE)
    names = ["manifest_never_ends"] * 4 + [
        "swarm_huge",
        "endless_body",
        "endless_headers",
        "stall",
        "swarm_claims_billions",
    ]
    script = (
        "import asyncio, re, sys\nfrom pathlib import Path\nfrom fastcas.fetch.download import download\n"
        "from fastcas.ids import Link\n"
        "asyncio.run(download(Link.parse(sys.argv[1]), Path(sys.argv[2]), discovery=None))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )

    async def work() -> int:
        evils = [Peer(content, chunk_size=LARGE, behaviour=name) for name in names]
        good = Peer(content, chunk_size=LARGE)
        try:
            for peer in (*evils, good):
                await peer.start()
            link = good.link(peers=tuple(peer.addr for peer in (*evils, good)))
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", script, str(link), str(out), cwd=ROOT, stdout=asyncio.subprocess.PIPE
            )
            said, _ = await child.communicate()
            assert child.returncode == 0
            return int(said)
        finally:
            for peer in (*evils, good):
                await peer.stop()

    kib: int = run(work)
    assert kib <= LIMIT_MIB * 1024
    assert out.read_bytes() == content


def test_few_manifests_are_fetched_at_once_and_none_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "CLAIM_S", 0.2)
    sending: set[Peer] = set()
    asked: set[Peer] = set()
    enough = asyncio.Event()
    most = 0

    class Endless(Peer):
        async def _misbehaves(self, kind: str, detail: Any, writer: asyncio.StreamWriter) -> bool:
            nonlocal most
            if kind != "manifests":
                return False
            sending.add(self)
            asked.add(self)
            if len(asked) > 6:
                enough.set()
            most = max(most, len(sending))
            try:
                return await super()._misbehaves(kind, detail, writer)
            finally:
                sending.discard(self)

    class Late(Peer):
        async def _misbehaves(self, kind: str, detail: Any, writer: asyncio.StreamWriter) -> bool:
            if kind == "manifests":
                await enough.wait()
            return False

    async def work() -> None:
        evils = [Endless(CONTENT, behaviour="manifest_never_ends") for _ in range(9)]
        good = Late(CONTENT)
        try:
            for peer in (*evils, good):
                await peer.start()
            await get(good.link(peers=tuple(peer.addr for peer in (*evils, good))), tmp_path / "out")
        finally:
            for peer in (*evils, good):
                await peer.stop()

    run(work)
    assert 3 <= most <= crowd.MANIFESTS_AT_ONCE + 1  # who hung up is noticed a moment later
    assert not sending
