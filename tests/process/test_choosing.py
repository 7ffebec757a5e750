"""Part of a stored directory through real nodes: patterns, one file by its path; get, cat, open; what --json says."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastcas
from fastcas.errors import NotFound
from tests.support.library import tree_of
from tests.support.nodes import Node, run_fastcas, start_node
from tests.support.seeds import bytes_sent, link_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

RNG = random.Random(36)
MIB = 1 << 20
TREE = {
    "weights/a.bin": RNG.randbytes(2 * MIB + 5), "weights/b.bin": RNG.randbytes(3 * MIB), "README": b"read me",
    "docs/deep/one.txt": RNG.randbytes(40_000), "docs/two.txt": RNG.randbytes(30_000), "empty": b"",
} | {f"many/{i:03}.dat": RNG.randbytes(50_000) for i in range(100)}  # fmt: skip


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, str]]:
    """A node with the tree, and its link."""
    folder = tmp_path_factory.mktemp("choosing")
    for path, data in TREE.items():
        (folder / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / path).write_bytes(data)
    with start_node(folder / "node") as node:
        yield node, link_of(node, folder / "tree")


@pytest.fixture(params=["alone", "through a node", "from the store"])
def storage(request: Any, seed: tuple[Node, str], tmp_path: Path) -> Iterator[str]:
    """The storage folder that a command uses."""
    if request.param == "through a node":
        with start_node(tmp_path / "own") as own:
            yield str(own.storage)
    else:
        yield "/nonexistent" if request.param == "alone" else str(seed[0].storage)


def get(ref: str, storage: str, *arguments: str) -> Any:
    done = run_fastcas("get", ref, "--storage-dir", storage, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cat(ref: str, storage: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fastcas", "cat", ref, "--storage-dir", storage, *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def test_patterns_choose_what_is_fetched(seed: tuple[Node, str], storage: str, tmp_path: Path) -> None:
    node, link = seed
    before = bytes_sent(node)
    out = tmp_path / "out"
    said = get(link, storage, "-o", str(out), "--include", "*.txt", "--include", "/README", "--exclude", "deep/")
    assert tree_of(out) == {path: TREE[path] for path in ("docs/two.txt", "README")}
    assert said["chosen"] == {
        "files": 2, "size": 30_007, "files_total": len(TREE), "size_total": sum(map(len, TREE.values())),
        "paths": ["README", "docs/two.txt"],
    }  # fmt: skip
    assert bytes_sent(node) - before < MIB  # of the pack of 5 MB the chunks that are needed, and nothing of the rest
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "own") == ["out"]


@pytest.mark.parametrize("path", ["weights/a.bin", "docs/deep/one.txt", "empty"])
def test_one_file_by_its_path(seed: tuple[Node, str], storage: str, tmp_path: Path, path: str) -> None:
    node, link = seed
    file_hash = link[len("fastcas://") :][:64]
    refs = [f"{link}/{path}", f"{file_hash}/{path}"]
    for number, ref in enumerate(refs):
        out = tmp_path / f"out-{number}"
        assert get(ref, storage, "-o", str(out), "--peer", node.peer)["chosen"]["paths"] == [path]
        assert out.read_bytes() == TREE[path]
        done = cat(ref, storage, "--peer", node.peer)
        assert (done.returncode, done.stdout == TREE[path], done.stderr) == (0, True, b"")
        with fastcas.open(ref, peers=[node.peer], storage_dir=storage) as file:
            assert file.read() == TREE[path]
    if len(TREE[path]) > 9:
        assert cat(refs[0], storage, "--range", "3-7").stdout == TREE[path][3:8]


@pytest.mark.parametrize(("path", "status"), [("nope", 3), ("docs", 3), ("../etc/passwd", 2), ("/etc/passwd", 2)])
def test_path_that_is_not_there(seed: tuple[Node, str], storage: str, path: str, status: int) -> None:
    ref = f"{seed[1]}/{path}"
    for done in (run_fastcas("get", ref, "--storage-dir", storage), run_fastcas("cat", ref, "--storage-dir", storage)):
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
        assert "Traceback" not in done.stderr
    if status == 3:
        with pytest.raises(NotFound):
            fastcas.open(ref, storage_dir=storage)


def test_nothing_chosen_is_not_found(seed: tuple[Node, str], storage: str, tmp_path: Path) -> None:
    done = run_fastcas("get", seed[1], "-o", str(tmp_path / "o"), "--storage-dir", storage, "--include", "*.nope")
    assert done.returncode == 3 and f"none of the collection's {len(TREE)} files" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "arguments", [["--include", ""], ["--exclude", "a/../b"], ["--include", "*", "--raw"]], ids=str
)
def test_pattern_that_cannot_be_used_is_a_usage_error(seed: tuple[Node, str], arguments: list[str]) -> None:
    done = run_fastcas("get", seed[1], "--storage-dir", "/nonexistent", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and arguments[0] in done.stderr


def test_one_liner_chooses_too(seed: tuple[Node, str], tmp_path: Path) -> None:
    path = fastcas.get(seed[1], tmp_path / "o", exclude=["many", "weights"], storage_dir="/nonexistent")
    assert tree_of(path) == {name: data for name, data in TREE.items() if name.split("/")[0] not in ("many", "weights")}


def test_large_files_of_a_part_are_seeded_from_their_places(seed: tuple[Node, str], tmp_path: Path) -> None:
    with start_node(tmp_path / "own") as own:
        get(seed[1], str(own.storage), "-o", str(tmp_path / "out"), "--include", "a.bin")
        get(f"{seed[1]}/weights/b.bin", str(own.storage), "-o", str(tmp_path / "b"))

        def listed() -> set[str]:
            rows = json.loads(run_fastcas("ls", "--json", "--storage-dir", str(own.storage)).stdout)["files"]
            return {row["path"] for row in rows if row["is_complete"]}

        wanted = {str(tmp_path / "out/weights/a.bin"), str(tmp_path / "b")}
        wait_until(lambda: listed() == wanted, "both are registered, and not the collection")
