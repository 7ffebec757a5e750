"""Downloads through a bad network: cut, reset, swallowed, flipped, slow; right in the end, or a typed error in time."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import FastCASError
from fastcas.fetch.download import DownloadResult, download
from fastcas.ids import Link
from tests.support.evil_peer import Peer, content_of
from tests.support.fetching import quick_deadlines, run
from tests.support.tcp_fault_proxy import Fault, TcpFaultProxy

CHUNK = 16384
CONTENT = content_of(20 * CHUNK + 777)
PLACES = [*range(0, 140, 9), *(CHUNK * percent // 100 for percent in range(5, 400, 40))]  # heads, and bodies


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_deadlines(monkeypatch)


async def get(link: Link, out: Path, **options: Any) -> DownloadResult:
    """Download without discovery, and compare."""
    result = await download(link, out, discovery=None, **options)
    assert await asyncio.to_thread(out.read_bytes) == CONTENT
    return result


@pytest.mark.parametrize("how", ["cut_at", "reset_at", "swallow_at", "flip_at"])
def test_fault_at_any_byte_beside_a_good_path(tmp_path: Path, how: str) -> None:
    async def once(peer: Peer, at: int) -> None:
        async with TcpFaultProxy(peer.addr, Fault(**{how: at})) as proxy:
            await get(peer.link(bare=at % 2 == 1, peers=(proxy.addr, peer.addr)), tmp_path / str(at))

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            await asyncio.gather(*(once(peer, at) for at in PLACES))

    run(work)
    assert len(list(tmp_path.iterdir())) == len(PLACES)


@pytest.mark.parametrize("how", ["cut_at", "reset_at", "swallow_at"])
def test_connections_that_break_at_any_byte_are_opened_anew(tmp_path: Path, how: str) -> None:
    async def once(peer: Peer, at: int) -> None:
        async with TcpFaultProxy(peer.addr, Fault(**{how: at}), n_faulty=2) as proxy:
            result = await get(peer.link(peers=(proxy.addr,)), tmp_path / str(at))
            assert proxy.n_connections > 2
            assert not result.banned

    async def work() -> None:
        async with Peer(CONTENT) as peer:
            await asyncio.gather(*(once(peer, at) for at in PLACES))

    run(work)


@pytest.mark.parametrize(
    ("fault", "exits"),
    [
        (Fault(cut_at=0), {3}), (Fault(reset_at=0), {3}), (Fault(swallow_at=0), {3}), (Fault(cut_at=5000), {3, 4}),
        (Fault(swallow_at=5000), {3, 4}), (Fault(flip_at=0), {3}), (Fault(flip_every=5000), {3, 5}),
        (Fault(rate_Bps=1000), {3, 4}),
    ],
)  # fmt: skip
def test_fault_that_stays_ends_in_time_with_the_right_exit_status(
    tmp_path: Path, fault: Fault, exits: set[int]
) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer, TcpFaultProxy(peer.addr, fault) as proxy:
            with pytest.raises(FastCASError) as caught:
                await get(peer.link(peers=(proxy.addr,)), tmp_path / "out", timeout_s=0.6, stall_timeout_s=0.6)
            assert caught.value.exit_code in exits, caught.value
            assert str(proxy.addr) in str(caught.value)

    run(work)
    assert not (tmp_path / "out").exists()


def test_slow_and_far_networks_only_take_longer(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer, contextlib.AsyncExitStack() as stack:
            faults = [Fault(delay_s=0.02), Fault(rate_Bps=200_000), Fault(delay_s=0.005, rate_Bps=1_000_000)]
            proxies = [await stack.enter_async_context(TcpFaultProxy(peer.addr, fault)) for fault in faults]
            result = await get(peer.link(bare=True, peers=tuple(proxy.addr for proxy in proxies)), tmp_path / "out")
            assert not result.banned

    run(work)


def test_flipped_bits_ban_and_never_arrive(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer, TcpFaultProxy(peer.addr, Fault(flip_every=50_000)) as proxy:
            result = await get(peer.link(peers=(proxy.addr, peer.addr)), tmp_path / "out")
            assert set(result.banned) <= {proxy.addr}
            assert peer.n_chunks_served <= 2 * peer.manifest.n_chunks

    run(work)
