"""Downloads through `P2PClient` and `P2PNode`: progress, limit, origins, cancellation, part of a collection."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastcas import P2PClient, P2PNode
from fastcas.errors import UsageError
from fastcas.fetch.download import Progress
from tests.support.fetching import run
from tests.support.nodes import Node
from tests.support.origin_server import OriginServer
from tests.support.seeds import bytes_sent, link_of, seeding_node

pytestmark = pytest.mark.slow

MIB = 1 << 20
CONTENT = random.Random(51).randbytes(8 * MIB + 17)
Download = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, str]]:
    with seeding_node(tmp_path_factory.mktemp("library"), CONTENT) as made:
        yield made


@asynccontextmanager
async def downloads(kind: str, folder: Path) -> AsyncIterator[Download]:
    """Yield a function that downloads a REF into `folder`/out with more arguments."""
    if kind == "client":
        async with P2PClient(download_dir=folder / "out") as client:
            yield client.download_file
        return
    node = P2PNode(server_host="127.0.0.1", server_port=0, workers=1, use_dht=False, storage_dir=folder / "own")
    async with node:

        async def download(ref: str, **options: Any) -> bool:
            return await node.download_file_from_peers(ref, folder / "out", **options)

        yield download


@pytest.mark.parametrize("kind", ["client", "node"])
def test_progress_limit_and_origins_are_taken(seed: tuple[Node, str], tmp_path: Path, kind: str) -> None:
    seen: list[Any] = []

    async def work() -> None:
        async with downloads(kind, tmp_path) as download, OriginServer(CONTENT) as server:
            begun = time.monotonic()
            assert await download(seed[1], progress=seen.append, origins=[server.url], max_download="8M")
            assert time.monotonic() - begun > 0.9  # 8 MiB at 8 MiB/s: the limit held
            for wrong in ({"origins": ["ftp://x"]}, {"max_download": "fast"}):
                with pytest.raises(UsageError):
                    await download(seed[1], **wrong)

    run(work)
    assert (tmp_path / "out" / "source.bin").read_bytes() == CONTENT
    done = [now.bytes_done if isinstance(now, Progress) else now["done"] for now in seen]
    assert done == sorted(done) and done[-1] == len(CONTENT) and len(done) > 5


@pytest.mark.parametrize("kind", ["client", "node"])
def test_cancelled_download_leaves_a_part_file_that_the_next_goes_on_from(
    seed: tuple[Node, str], tmp_path: Path, kind: str
) -> None:
    async def work() -> None:
        async with downloads(kind, tmp_path) as download:
            under_way = asyncio.Event()

            def progress(now: Any) -> None:
                if (now.bytes_done if isinstance(now, Progress) else now["done"]) >= MIB:
                    under_way.set()

            getting = asyncio.ensure_future(download(seed[1], progress=progress, max_download="2M"))
            await under_way.wait()
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            part = tmp_path / "out" / "source.bin.fastcas-part"
            assert part.exists() and not (tmp_path / "out" / "source.bin").exists()
            before = bytes_sent(seed[0])
            assert await download(seed[1])
            assert bytes_sent(seed[0]) - before < len(CONTENT) - MIB // 2
            assert not part.exists()

    run(work)
    assert (tmp_path / "out" / "source.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["client", "node"])
def test_one_file_of_a_collection(seed: tuple[Node, str], tmp_path: Path, kind: str) -> None:
    tree = {"a/big": CONTENT[:300_000], "a/small": b"small"}
    for path, data in tree.items():
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_bytes(data)
    link = link_of(seed[0], tmp_path / "tree")

    async def work() -> None:
        async with downloads(kind, tmp_path) as download:
            for path, data in tree.items():
                assert await download(f"{link}/{path}")
                assert await asyncio.to_thread((tmp_path / "out" / path[2:]).read_bytes) == data
            assert not await download(f"{link}/nope")

    run(work)


def test_client_chooses_files_of_a_collection(seed: tuple[Node, str], tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for name in ("a.txt", "b.bin"):
        (tmp_path / "tree" / name).write_bytes(name.encode())
    link = link_of(seed[0], tmp_path / "tree")

    async def work() -> None:
        async with P2PClient(download_dir=tmp_path / "out") as client:
            result = await client.fetch_file(link, tmp_path / "o", include=["*.txt"])
            assert result.chosen is not None and result.chosen.paths == ("a.txt",)

    run(work)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["a.txt"]
