"""Downloads from peers that misbehave: never a wrong byte, the liar is banned, the good one completes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import ChunkNotFound, FastCASError, ManifestCorrupt, NoPeers, Stalled
from fastcas.fetch import receiver
from fastcas.fetch.download import DownloadResult, download
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.ids import Link, PeerAddr
from tests.support.evil_peer import BEHAVIOURS, Peer, content_of, make_manifest

CONTENT = content_of(60 * 16384 + 777)
HONEST_FAILURES = {
    "busy", "close_after", "close_at_once", "close_early", "close_in_head", "empty_204", "error_page", "not_found",
    "reset", "silent", "stall", "trickle",
}  # fmt: skip
BANNED = sorted(set(BEHAVIOURS) - HONEST_FAILURES)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine with a budget."""

    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(bounded())


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of one request in tenths of a second, so that silence is noticed soon."""

    def quick(**_: Any) -> AsyncReceiver:
        return AsyncReceiver(n_threads=2, connect_s=1.0, first_byte_s=0.3, stall_s=0.3)

    monkeypatch.setattr(receiver, "AsyncReceiver", quick)


async def get(link: Link, out: Path, **options: Any) -> DownloadResult:
    """Download without discovery."""
    return await download(link, out, discovery=None, **options)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_evil_peer_beside_a_good_one_completes(tmp_path: Path, fast: None, behaviour: str, bare: bool) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        evil, good = Peer(CONTENT, behaviour=behaviour, knows_next=False), Peer(CONTENT, knows_next=False)
        good.gate.clear()
        async with evil, good:
            fetching = asyncio.create_task(get(good.link(bare=bare, peers=(evil.addr, good.addr)), out))
            await evil.asked_for_chunk.wait()
            good.gate.set()
            result = await fetching
            assert result.bytes_by_peer[good.addr] > 0
            assert (evil.addr in result.banned) == (behaviour in BANNED)

    run(work)
    assert out.read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("behaviour", BANNED)
def test_evil_peer_alone_is_named_and_nothing_is_published(tmp_path: Path, fast: None, behaviour: str) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT, behaviour=behaviour) as evil:
            with pytest.raises(ChunkNotFound, match=str(evil.addr)):
                await get(evil.link(), out)

    run(work)
    assert not out.exists()
    part = tmp_path / "out.fastcas-part"
    written = part.read_bytes()
    for at in range(0, len(CONTENT), 16384):
        piece = written[at : at + 16384]
        assert piece in (bytes(len(piece)), CONTENT[at : at + 16384])


@pytest.mark.parametrize(("behaviour", "what"), [("close_early", "closed the connection"), ("stall", "stalled after")])
def test_peer_that_always_cuts_short_is_given_up_although_bytes_arrive(
    tmp_path: Path, fast: None, behaviour: str, what: str
) -> None:
    async def work() -> None:
        async with Peer(CONTENT, behaviour=behaviour) as evil:
            with pytest.raises(ChunkNotFound, match=f"{evil.addr}: chunk [0-9a-f]+: {what}"):
                await get(evil.link(), tmp_path / "out")

    run(work)


def test_nine_evil_of_ten_completes(tmp_path: Path, fast: None) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        evils = [Peer(CONTENT, behaviour=name) for name in [*BANNED[:6], "stall", "busy", "reset"]]
        good = Peer(CONTENT)
        try:
            for peer in (*evils, good):
                await peer.start()
            await get(good.link(peers=tuple(peer.addr for peer in (*evils, good))), out)
        finally:
            for peer in (*evils, good):
                await peer.stop()

    run(work)
    assert out.read_bytes() == CONTENT


def test_one_wrong_chunk_of_many_bans_with_the_reason(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        evil = Peer(CONTENT, behaviour="wrong_bytes", evil_when=lambda nth: nth == 5)
        async with evil, Peer(CONTENT) as good:
            result = await get(good.link(peers=(evil.addr, good.addr)), out)
            assert "wrong bytes" in result.banned[evil.addr]

    run(work)
    assert out.read_bytes() == CONTENT


def test_keep_alive_peer_that_resets_now_and_then_is_not_banned(tmp_path: Path, fast: None) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT, behaviour="reset", evil_when=lambda nth: nth % 7 == 0) as peer:
            result = await get(peer.link(), out)
            assert not result.banned

    run(work)
    assert out.read_bytes() == CONTENT


def test_peer_alone_that_hangs_up_early_now_and_then_completes(tmp_path: Path, fast: None) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT, behaviour="close_early", evil_when=lambda nth: nth == 3) as peer:
            await get(peer.link(), out)

    run(work)
    assert out.read_bytes() == CONTENT


def test_silence_for_the_stall_timeout_ends_with_the_missing_chunks(tmp_path: Path, fast: None) -> None:
    async def work() -> None:
        async with Peer(CONTENT, behaviour="silent", evil_when=lambda nth: nth > 10) as peer:
            with pytest.raises(Stalled, match=r"chunks are missing: #\d+ \([0-9a-f]{8}\)"):
                await get(peer.link(), tmp_path / "out", stall_timeout_s=1.0)

    run(work)
    assert (tmp_path / "out.fastcas-part").exists()


def test_lone_peer_that_only_trickles_is_given_up(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT, behaviour="trickle", evil_when=lambda nth: nth > 10) as peer:
            peer.trickle_s = 0.02  # never as long without a byte as the stall timeout
            with pytest.raises(Stalled, match="less than 4096 B/s for 1 s"):
                await get(peer.link(), tmp_path / "out", stall_timeout_s=1.0)

    run(work)
    assert (tmp_path / "out.fastcas-part").exists()


def test_chunks_that_nobody_has_are_named(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT, have=set(range(50))) as peer:
            with pytest.raises(ChunkNotFound, match=r"11 of 61 chunks are missing: #50 .*, …"):
                await get(peer.link(), tmp_path / "out", stall_timeout_s=0.5)

    run(work)


def test_two_halves_make_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT, have=set(range(31))) as low, Peer(CONTENT, have=set(range(31, 61))) as high:
            result = await get(low.link(peers=(low.addr, high.addr)), out)
            assert set(result.bytes_by_peer) == {low.addr, high.addr}

    run(work)
    assert out.read_bytes() == CONTENT


def test_peer_that_lies_in_its_bitfield_is_survived(tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Liar(Peer):
        def _swarm(self, options: dict[str, str]) -> bytes:
            have, self.have = self.have, None
            answer = super()._swarm(options)
            self.have = have
            return answer

    async def work() -> None:
        async with Liar(CONTENT, have={1, 2}) as liar, Peer(CONTENT) as good:
            await get(good.link(peers=(liar.addr, good.addr)), out)

    run(work)
    assert out.read_bytes() == CONTENT


def test_unreachable_peer_is_named_with_the_reason(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            gone = peer.link()
        with pytest.raises(NoPeers, match=f"no peer has {gone.file_hash.hex()}: .*Connection refused"):
            await get(gone, tmp_path / "out", timeout_s=0.3)

    run(work)


def test_peer_without_the_file_is_an_answer_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer:
            with pytest.raises(NoPeers, match="does not have"):
                await get(Link(bytes(32), peers=(peer.addr,)), tmp_path / "out", timeout_s=20)

    run(work)


def test_nobody_known_is_an_answer_at_once(tmp_path: Path) -> None:
    with pytest.raises(NoPeers, match="no peer is known"):
        run(lambda: get(Link(bytes(32)), tmp_path / "out", timeout_s=20))


def test_peer_that_appears_later_is_used(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        late = Peer(CONTENT)
        await late.start()
        addr = late.addr
        await late.stop()
        task = asyncio.create_task(get(late.link(peers=(addr,)), out, timeout_s=20))
        await asyncio.sleep(0)
        await late.start(addr.port)
        try:
            await task
        finally:
            await late.stop()

    run(work)
    assert out.read_bytes() == CONTENT


def test_new_peer_named_by_a_peer_joins(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT) as second:
            known = [[second.node_id, "127.0.0.1", second.addr.port]]
            async with Peer(CONTENT, have={0, 1, 2}, known_peers=known) as first:
                result = await get(first.link(), out)
                assert second.addr in result.bytes_by_peer

    run(work)
    assert out.read_bytes() == CONTENT


def test_manifest_with_wrong_bytes_bans_and_another_peer_gives_it(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(CONTENT, behaviour="manifest_wrong_bytes") as evil, Peer(CONTENT) as good:
            await get(good.link(peers=(evil.addr, good.addr)), out)

    run(work)
    assert out.read_bytes() == CONTENT


def test_manifest_of_another_file_is_refused(tmp_path: Path) -> None:
    other = make_manifest(content_of(50_000, 2))

    async def work() -> None:
        async with Peer(CONTENT) as good, Peer(content_of(50_000, 2)) as liar:
            link = Link(good.manifest.file_hash, other.manifest_hash, peers=(liar.addr,))
            with pytest.raises(FastCASError):
                await get(link, tmp_path / "out", timeout_s=0.5)

    run(work)
    assert not (tmp_path / "out").exists()


class Hooks:
    """Those of somebody who will serve the file."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Take every call."""
        return lambda *values: None


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("what", ["hash", "midstate", "swapped"])
def test_lying_manifest_is_convicted_and_another_one_used(tmp_path: Path, what: str, serves: bool) -> None:
    from dataclasses import replace

    options: dict[str, Any] = {"hooks": Hooks()} if serves else {}
    out = tmp_path / "out"
    truth = make_manifest(CONTENT)
    if what == "hash":
        lie = replace(truth, hashes=truth.hashes[:64] + bytes(32) + truth.hashes[96:])
    elif what == "midstate":
        lie = replace(truth, midstates=truth.midstates[:64] + bytes(32) + truth.midstates[96:])
    else:
        lie = replace(truth, hashes=truth.hashes[32:64] + truth.hashes[:32] + truth.hashes[64:])

    class Liar(Peer):
        async def _chunk(self, name: str, writer: asyncio.StreamWriter) -> None:
            self._index.setdefault(bytes(32).hex(), 2)
            await super()._chunk(name, writer)

    async def work() -> None:
        async with Liar(CONTENT, manifest=lie) as liar:
            if serves or what == "midstate":
                with pytest.raises(ManifestCorrupt, match="contradicts itself"):
                    await get(liar.link(bare=True), tmp_path / "alone", timeout_s=1.0, **options)
                assert not (tmp_path / "alone").exists()
            else:  # only the links count, they hold, and so the bytes are the file's
                await get(liar.link(bare=True), tmp_path / "alone", timeout_s=1.0)
                assert (tmp_path / "alone").read_bytes() == CONTENT
            async with Peer(CONTENT) as good:
                await get(good.link(bare=True, peers=(liar.addr, good.addr)), out, timeout_s=10, **options)

    run(work)
    assert out.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [0, 1, 63, 64, 16383, 16384, 16385, 32768, 3 * 16384 + 1])
@pytest.mark.parametrize("bare", [False, True])
def test_interesting_sizes(tmp_path: Path, size: int, bare: bool) -> None:
    content = content_of(size)
    out = tmp_path / "out"

    async def work() -> None:
        async with Peer(content) as peer:
            result = await get(peer.link(bare=bare), out)
            assert result.size == size

    run(work)
    assert out.read_bytes() == content


def test_address_list_from_peers_is_filtered(tmp_path: Path) -> None:
    async def work() -> None:
        known = [[None, "169.254.169.254", 8080], [None, "127.0.0.1", 22]]
        async with Peer(CONTENT, known_peers=known) as peer:
            result = await get(peer.link(), tmp_path / "out")
            assert set(result.bytes_by_peer) == {PeerAddr("127.0.0.1", peer.addr.port)}

    run(work)


def test_parity_replaces_data_that_nobody_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    k, m = 4, 2

    async def work() -> None:
        full = Peer(CONTENT, k=k, m=m)
        lost = {0, 5, 6, 60}
        have = set(range(full.manifest.n_total)) - lost
        async with Peer(CONTENT, k=k, m=m, have=have) as peer:
            result = await get(peer.link(), out)
            assert result.local_bytes > 0

    run(work)
    assert out.read_bytes() == CONTENT
