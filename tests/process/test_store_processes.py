"""Real processes on one storage folder: the second is refused at once, and a node's quota is never exceeded."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.nodes import read_line, run_fastcas, start_node
from tests.support.store_rig import counted_files, data_of

MIB = 1 << 20
HOLDER = """
import sys
from fastcas.store import Store
with Store.open(sys.argv[1], create=True):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "command",
    [["ls"], ["gc"], ["verify"], ["rebuild"], ["store", "FILE"], ["migrate", "OLD"], ["node"]],
    ids=lambda words: words[0],
)
def test_second_process_on_a_store_exits_10_and_says_who_has_it(tmp_path: Path, command: list[str]) -> None:
    root = tmp_path / "st"
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "old/hashed_files").mkdir(parents=True)
    (tmp_path / "old/cas_index.json").write_text("{}")
    words = [{"FILE": str(tmp_path / "file"), "OLD": str(tmp_path / "old")}.get(word, word) for word in command]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert read_line(holder.stdout, 20) == "open\n"
        before = time.monotonic()
        if command == ["node"]:
            done = subprocess.run(
                [sys.executable, "-m", "fastcas.cli.node_command", "--port", "0", "--no-dht", "--storage-dir", root],
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
        else:
            done = run_fastcas(*words, "--storage-dir", str(root))
        took = time.monotonic() - before
        assert holder.stdin is not None
        holder.stdin.close()
    print(f"{command[0]}: exit {done.returncode} after {took:.2f} s, the interpreter's start included")
    assert done.returncode == 10
    assert done.stdout == ""
    assert str(root) in done.stderr
    assert f"in use by process {holder.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert run_fastcas("ls", "--storage-dir", str(root)).returncode == 0


@contextlib.contextmanager
def watched(root: Path) -> Iterator[list[int]]:
    """Sample what counts on disk as often as it goes; yields the samples.

    A walk takes a moment, in which one file goes and another comes: only two that agree are a sample.
    """
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        before: dict[int, int] = {}
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                now = counted_files(root)
                if now == before:
                    samples.append(sum(now.values()))
                before = now

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def store(root: Path, path: Path, *options: str) -> tuple[int, str]:
    """Store a file or folder; returns the exit status and its hash, or what stderr says."""
    done = run_fastcas("store", str(path), "--storage-dir", str(root), "--json", *options, timeout_s=110)
    if done.returncode:
        return done.returncode, str(json.loads(done.stderr.splitlines()[-1])["error"]["message"])
    return 0, str(json.loads(done.stdout)["file_hash"])


def listed(root: Path) -> set[str]:
    done = run_fastcas("ls", "--storage-dir", str(root), "--json")
    return {item["file_hash"] for item in json.loads(done.stdout)["files"] if not item.get("is_member")}


@pytest.mark.slow
def test_quota_of_a_node_is_never_exceeded_and_pinned_files_stay(tmp_path: Path) -> None:
    limit = 8 * MIB
    for number in range(10):
        (tmp_path / f"f{number}").write_bytes(data_of(2 * MIB, number))
        tree = tmp_path / f"t{number}"
        tree.mkdir()
        for member in range(20):
            (tree / f"m{member}").write_bytes(data_of(40_000, 1000 * number + member))
    root = tmp_path / "limited"
    with (
        start_node(tmp_path / "source") as source,
        start_node(root, "--quota", str(limit), "--peer", source.peer) as node,
    ):
        trees = [store(source.storage, tmp_path / f"t{number}")[1] for number in range(10)]
        with watched(root) as samples:
            status, pinned = store(root, tmp_path / "f0")
            assert status == 0
            assert run_fastcas("pin", pinned, "--storage-dir", str(root)).returncode == 0
            hashes = [store(root, tmp_path / f"f{number}") for number in range(1, 5)]
            assert [status for status, _ in hashes] == [0] * 4
            assert pinned in listed(root)
            assert hashes[0][1] not in listed(root)  # the longest unused went
            assert hashes[3][1] in listed(root)

            def fetch(number: int) -> int:
                done = run_fastcas(
                    "get", trees[number], "-o", str(tmp_path / f"out{number}"), "--storage-dir", str(root),
                    timeout_s=110,
                )  # fmt: skip
                return done.returncode

            with ThreadPoolExecutor(5) as pool:
                gets = [pool.submit(fetch, number) for number in range(10)]
                stores = [pool.submit(store, root, tmp_path / f"f{number}") for number in range(5, 10)]
                fetched = [each.result() for each in gets]
                stored = [each.result()[0] for each in stores]
            assert set(fetched) | set(stored) <= {0, 8}
            assert 0 in fetched
            assert 0 in stored
            assert pinned in listed(root)
            for file_hash in listed(root):
                assert run_fastcas("pin", file_hash, "--storage-dir", str(root)).returncode == 0
            before = listed(root)
            (tmp_path / "big").write_bytes(data_of(7 * MIB, 99))
            status, message = store(root, tmp_path / "big")
            assert status == 8
            assert str(root) in message
            assert f"quota of {limit} B" in message
            assert "pinned" in message
            assert listed(root) == before
        assert node.process.poll() is None
    assert run_fastcas("verify", "--storage-dir", str(root)).returncode == 0
    print(f"quota {limit} B: at most {max(samples)} B on disk in {len(samples)} samples, {fetched} {stored}")
    assert max(samples) <= limit
