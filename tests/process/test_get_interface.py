"""`fastcas get` as people use it: --origin with nginx, --explain, --max-download, interruption, destinations."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastcas
from fastcas.fetch.download import download
from fastcas.fetch.pacing import Pace
from fastcas.ids import Link
from tests.support.evil_peer import Peer, content_of
from tests.support.nodes import Node, free_port, read_line, run_fastcas, start_node
from tests.support.seeds import bytes_sent, seeding_node
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

MIB = 1 << 20
CONTENT = random.Random(21).randbytes(8 * MIB + 99)
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, str]]:
    with seeding_node(tmp_path_factory.mktemp("interface"), CONTENT) as made:
        yield made


def get(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_fastcas("get", *arguments, "--storage-dir", "/nonexistent", "--json")


def explained(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["explained"]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    """An nginx that serves `tmp_path/www`; its URL."""
    port = free_port()
    (tmp_path / "www").mkdir()
    (tmp_path / "www").chmod(0o755)
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {tmp_path}/pid; error_log {tmp_path}/error.log; user root;\n"
        f"events {{}}\nhttp {{ access_log {tmp_path}/access.log; server {{ listen 127.0.0.1:{port}; "
        f"root {tmp_path}/www; "
        f"location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }} }} }}\n"
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        probe = ["curl", "-s", f"http://127.0.0.1:{port}/"]
        wait_until(lambda: subprocess.run(probe, check=False).returncode == 0, "nginx is up")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("path", ["file.bin", "moved/file.bin"])
def test_origin_nginx_fills_what_a_damaged_node_lacks(tmp_path: Path, nginx: str, path: str) -> None:
    (tmp_path / "www" / "file.bin").write_bytes(CONTENT)
    source = tmp_path / "source.bin"
    source.write_bytes(CONTENT)
    with start_node(tmp_path / "node") as node:
        stored = json.loads(
            run_fastcas("store", str(source), "--in-place", "--storage-dir", str(node.storage), "--json").stdout
        )
        out = tmp_path / "out.bin"
        with source.open("r+b") as file:  # the node withdraws the file
            file.write(b"x")
        url = f"{nginx}/{path}"
        done = run_fastcas(
            "get", stored["link"], "-o", str(out), "--origin", url, "--json", "--storage-dir", str(node.storage)
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bytes_by_origin"] == {url: 256 * 1024}  # the damaged chunk alone
        assert out.read_bytes() == CONTENT
    assert "206" in (tmp_path / "access.log").read_text()


def test_explain_names_the_upload_of_a_slow_peer(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    with start_node(tmp_path / "node", "--max-upload", "8M") as node:
        run_fastcas("store", str(tmp_path / "f"), "--storage-dir", str(node.storage))
        done = get(HASH, "--peer", node.peer, "-o", str(tmp_path / "o"), "--explain")
        assert explained(done)["limited_by"] == "peer_upload"
        done = run_fastcas("get", HASH, "--peer", node.peer, "-o", str(tmp_path / "o2"), "--explain",
                           "--storage-dir", "/nonexistent")  # fmt: skip
        assert "limited by peer upload (or the network between): " in done.stderr


def test_explain_names_chunks_that_nobody_had_for_long(tmp_path: Path) -> None:
    content = content_of(20 * 16384)

    async def work() -> None:
        async with Peer(content, have=set(range(18))) as early:
            link = early.link()
            getting = asyncio.create_task(download(link, tmp_path / "o", discovery=None))
            async with asyncio.timeout(20):
                while early.n_chunks_served < 18:  # noqa: ASYNC110 - the peer has no event for that
                    await asyncio.sleep(0.01)
                await asyncio.sleep(1.0)  # that is what is to be explained
                early.have = None
                result = await getting
            assert (result.explained.limited_by, result.explained.n_unheld) == ("unheld", 2)
            assert result.explained.shares()["unheld"] > 0.5

    asyncio.run(work())


@pytest.mark.parametrize("through_node", [False, True])
def test_max_download_holds_within_five_per_cent(seed: tuple[Node, str], tmp_path: Path, through_node: bool) -> None:
    _, link = seed
    rate = 4 * MIB
    out = str(tmp_path / "o")
    if through_node:
        with start_node(tmp_path / "own", "--max-download", "4M") as own:
            done = run_fastcas("get", link, "-o", out, "--json", "--storage-dir", str(own.storage))
    else:
        done = get(link, "--max-download", "4M", "--explain", "-o", out)
    assert explained(done)["limited_by"] == "max_download"
    result = json.loads(done.stdout)
    assert 0.95 <= result["size"] / result["seconds"] / rate <= 1.05


@pytest.mark.parametrize("text", ["0", "fast", "-3", "1.5M", ""])
def test_max_download_that_is_no_rate_is_a_usage_error(text: str) -> None:
    done = get(HASH, "--max-download", text)
    assert done.returncode == 2 and "--max-download" in done.stderr


def test_pace_never_gives_more_than_its_rate_however_it_is_asked() -> None:
    rng = random.Random(5)
    behind = Pace(50_000)
    pace, now, asked = Pace(100_000, behind), 100.0, 0
    while now < 200:
        n = pace.chunks(now, 1000)
        pace.spend(n * 1000)
        asked += n * 1000
        assert asked <= 50_000 * (now - 100) + 1
        now += rng.choice([0.0, 0.001, 0.01, 0.09])
    assert asked >= 50_000 * 97


def test_destination_with_the_same_content_fetches_nothing_with_another_is_refused(
    seed: tuple[Node, str], tmp_path: Path
) -> None:
    node, link = seed
    out = tmp_path / "o"
    out.write_bytes(CONTENT)
    before = bytes_sent(node)
    assert get(link, "-o", str(out)).returncode == 0
    out.write_bytes(b"mine")
    done = get(link, "-o", str(out))
    assert done.returncode == 11 and out.read_bytes() == b"mine"
    assert bytes_sent(node) == before
    with out.open("rb") as old:
        assert get(link, "-o", str(out), "--force").returncode == 0
        assert old.read() == b"mine"  # replaced, not overwritten
    assert out.read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]


def test_interrupted_get_exits_seven_and_resumes(seed: tuple[Node, str], tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = [
        sys.executable,
        "-m",
        "fastcas",
        "get",
        seed[1],
        "-o",
        str(out),
        "--storage-dir",
        "/nonexistent",
        "--json",
    ]
    process = subprocess.Popen([*command, "--max-download", "2M"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        while json.loads(read_line(process.stderr, 30))["progress"]["done"] < MIB:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 7
    assert not out.exists()
    result = json.loads(get(seed[1], "-o", str(out)).stdout)
    assert result["resumed_bytes"] >= MIB and out.read_bytes() == CONTENT


def test_cancelled_download_leaves_a_part_file_that_is_resumed(tmp_path: Path) -> None:
    content = content_of(100 * 16384)

    async def work() -> None:
        async with Peer(content) as peer:
            here = asyncio.Event()
            link: Link = peer.link()
            getting = asyncio.create_task(
                download(link, tmp_path / "o", discovery=None, pace=Pace(40 * 16384),
                         progress=lambda now: here.set() if now.bytes_done else None)
            )  # fmt: skip
            async with asyncio.timeout(20):
                await here.wait()
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            assert (await download(link, tmp_path / "o", discovery=None)).resumed_bytes > 0

    asyncio.run(work())
    assert (tmp_path / "o").read_bytes() == content


def test_one_liner_takes_limit_progress_and_origins(seed: tuple[Node, str], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    begun = time.monotonic()
    path = fastcas.get(seed[1], tmp_path / "o", max_download="8M", progress=seen.append, storage_dir="/nonexistent",
                       origins=["http://127.0.0.1:9/x"])  # fmt: skip
    assert time.monotonic() - begun > 0.9
    assert path.read_bytes() == CONTENT and seen[-1]["done"] == len(CONTENT)
