"""`fastcas cat` and `fastcas.open`: proven bytes in order, from peers, a node, a store; ranges, pipes, archives."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastcas
from fastcas.errors import FastCASError, NoPeers
from tests.support.nodes import Node, run_fastcas, start_node
from tests.support.seeds import bytes_sent, link_of, seeding_node

pytestmark = pytest.mark.slow

MIB = 1 << 20
CONTENT = random.Random(11).randbytes(24 * MIB + 12345)
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, str]]:
    """A node with the content, and its link."""
    with seeding_node(tmp_path_factory.mktemp("reading"), CONTENT) as made:
        yield made


def cat(*arguments: str, storage: str = "/nonexistent") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fastcas", "cat", *arguments, "--storage-dir", storage]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("how", ["link", "hash", "node", "store"])
def test_cat_gives_the_file_and_ranges_of_it(seed: tuple[Node, str], tmp_path: Path, how: str) -> None:
    node, link = seed
    ref, storage = (link if how == "link" else HASH), "/nonexistent"
    arguments = ["--peer", node.peer] if how == "hash" else []
    if how == "node":
        storage = str(node.storage)
    if how == "store":
        (tmp_path / "f").write_bytes(CONTENT)
        storage = str(tmp_path / "s")
        run_fastcas("store", str(tmp_path / "f"), "--storage-dir", storage)
    done = cat(ref, *arguments, storage=storage)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == CONTENT
    for text, want in (
        ("0-0", CONTENT[:1]), ("262143-262144", CONTENT[262143:262145]), ("9000000-", CONTENT[9000000:]),
        (f"5-{len(CONTENT) - 1}", CONTENT[5:]),
    ):  # fmt: skip
        done = cat(ref, *arguments, "--range", text, storage=storage)
        assert (done.returncode, done.stdout) == (0, want), (text, done.stderr)


def test_cat_by_link_fetches_hardly_more_than_the_range(seed: tuple[Node, str]) -> None:
    node, link = seed
    before = bytes_sent(node)
    assert cat(link, "--range", "100-200").returncode == 0
    assert bytes_sent(node) - before < 18 * MIB  # read-ahead and the chunk itself


@pytest.mark.parametrize(
    "text",
    [f"0-{len(CONTENT)}", f"{len(CONTENT)}-", f"{len(CONTENT)}-{len(CONTENT) + 5}", "9-8", "x", "-5", "1-2,4-5", ""],
)
def test_cat_of_a_range_outside_the_file_is_a_usage_error(seed: tuple[Node, str], text: str) -> None:
    done = cat(seed[1], "--range", text)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"--range" in done.stderr and b"Traceback" not in done.stderr


def test_cat_into_a_pipe_that_closes_ends_quietly(seed: tuple[Node, str]) -> None:
    command = [sys.executable, "-m", "fastcas", "cat", seed[1], "--storage-dir", "/nonexistent"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        assert process.stdout.read(1000) == CONTENT[:1000]
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


def test_cat_without_anybody_is_not_found() -> None:
    done = cat(HASH)
    assert (done.returncode, done.stdout) == (3, b"")


@pytest.mark.parametrize("how", ["link", "hash"])
def test_open_reads_and_seeks_like_a_file(seed: tuple[Node, str], how: str) -> None:
    node, link = seed
    rng, truth = random.Random(3), io.BytesIO(CONTENT)
    with fastcas.open(link if how == "link" else HASH, peers=[node.peer], storage_dir="/nonexistent") as file:
        for _ in range(60):
            at, n = rng.randrange(len(CONTENT) + 1000), rng.choice([0, 1, 777, 300_000, 2 * MIB])
            assert file.seek(at) == truth.seek(at)
            assert file.read(n) == truth.read(n)
        assert file.seek(-5, os.SEEK_END) == truth.seek(-5, os.SEEK_END)
        assert file.read() == truth.read()
        assert file.readable() and file.seekable() and not file.writable()
    assert file.closed


@pytest.mark.parametrize("how", ["link", "hash"])
def test_open_tells_of_its_progress(seed: tuple[Node, str], how: str) -> None:
    node, link = seed
    told: list[dict[str, Any]] = []
    ref = link if how == "link" else HASH
    with fastcas.open(ref, peers=[node.peer], storage_dir="/nonexistent", progress=told.append) as file:
        assert file.read() == CONTENT
    counts = [moment["done"] for moment in told]
    assert counts == sorted(counts) and counts[-1] > 20 * MIB
    assert {moment["total"] for moment in told} == {len(CONTENT)}
    assert max(moment["peers"] for moment in told) == 1


def test_a_progress_callback_that_raises_ends_the_reading(seed: tuple[Node, str]) -> None:
    def progress(moment: dict[str, Any]) -> None:
        raise RuntimeError("from the callback")

    with (
        fastcas.open(seed[1], storage_dir="/nonexistent", progress=progress) as file,
        pytest.raises(FastCASError, match=f"^file {HASH[:8]}.*from the callback"),
    ):
        file.read()


def test_open_serves_zipfile_and_numpy(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, (300, 4000), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(tmp_path / "a.npy", "inner/a.npy")
        archive.writestr("hello.txt", "hello")
    with start_node(tmp_path / "node") as node:
        links = [link_of(node, tmp_path / name) for name in ("a.npy", "z.zip")]
        with fastcas.open(links[0], storage_dir="/nonexistent") as file:
            assert np.array_equal(np.load(file), array)
        with fastcas.open(links[1], storage_dir="/nonexistent") as file, zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None and archive.read("hello.txt") == b"hello"


def test_close_from_another_thread_ends_a_read_that_waits(tmp_path: Path) -> None:
    source = tmp_path / "f"
    source.write_bytes(CONTENT[: 4 * MIB])
    with start_node(tmp_path / "node", "--max-upload", "100K") as node:
        link = link_of(node, source)
        file = fastcas.open(link, storage_dir="/nonexistent").detach()
        errors: list[BaseException] = []
        begun = threading.Event()

        def read() -> None:
            begun.set()
            try:
                file.readinto(bytearray(4 * MIB))
            except ValueError as exc:
                errors.append(exc)

        thread = threading.Thread(target=read)
        thread.start()
        begun.wait()
        file.close()
        thread.join(10)
        assert not thread.is_alive() and len(errors) == 1
        file.close()


def test_open_of_what_nobody_has_is_typed() -> None:
    with pytest.raises(NoPeers):
        fastcas.open(HASH, storage_dir="/nonexistent")


def test_a_file_cut_by_content_is_read_by_its_link_alone(tmp_path: Path) -> None:
    """A bare hash proves nothing of it before its last byte is here, so nothing is handed out."""
    (tmp_path / "f").write_bytes(CONTENT)
    with start_node(tmp_path / "node") as node:
        link = link_of(node, tmp_path / "f", "--chunking", "cdc")
        whole, part = cat(link, "--peer", node.peer), cat(link, "--peer", node.peer, "--range", "3000000-9000000")
        here = cat(link, "--range", "3000000-9000000", storage=str(node.storage))
        bare = cat(HASH, "--peer", node.peer)
    assert (whole.returncode, whole.stdout == CONTENT) == (0, True), whole.stderr
    assert (part.returncode, part.stdout == CONTENT[3000000:9000001]) == (0, True), part.stderr
    assert (here.returncode, here.stdout == CONTENT[3000000:9000001]) == (0, True), here.stderr
    assert (bare.returncode, bare.stdout) == (2, b"")
    assert b"cut by content" in bare.stderr
