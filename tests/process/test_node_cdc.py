"""Files cut by content through real nodes: any Range of /files, a folder, a new version from seeds and the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.hashing import Cutter
from tests.support.nodes import Node, start_node
from tests.support.store_rig import data_of

MIB = 1 << 20
AVERAGE = 65536
OLD = data_of(3 * MIB)
NEW = OLD[:MIB] + b"inserted" * 10 + OLD[MIB:]
ENV = os.environ | {"FASTCAS_LOG": "ERROR"}


def fastcas(*arguments: str | Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "fastcas", *map(str, arguments), "--json"], capture_output=True, text=True, env=ENV,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "old").write_bytes(OLD)
    (folder / "tree").mkdir()
    (folder / "tree" / "new").write_bytes(NEW)
    (folder / "tree" / "small").write_bytes(data_of(900, 9))
    return folder


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with start_node(tmp_path_factory.mktemp("seed") / "store") as node:
        yield node


def store(node: Node, path: Path) -> Any:
    return fastcas(
        "store", path, "--chunking", "cdc", "--chunk-size", str(AVERAGE), "--storage-dir", node.storage
    )  # fmt: skip


def test_files_with_any_range_are_the_content_s(node: Node, folder: Path) -> None:
    stored = store(node, folder / "old")
    url = f"http://{node.peer}/files/{stored['file_hash']}"
    cuts = Cutter(AVERAGE).feed(OLD)
    assert urllib.request.urlopen(url, timeout=10).read() == OLD
    places = [0, 1, cuts[0] - 1, cuts[0], cuts[0] + 1, cuts[5], cuts[-1] - 1, cuts[-1], len(OLD) - 1]
    for first in places:
        for last in (place for place in places if place >= first):
            request = urllib.request.Request(url, headers={"Range": f"bytes={first}-{last}"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 206
                assert answer.read() == OLD[first : last + 1]


@pytest.mark.parametrize("through", ["seed file", "store"])
def test_a_new_version_fetches_the_difference(node: Node, folder: Path, tmp_path: Path, through: str) -> None:
    stored = store(node, folder / "tree" / "new")
    mine = tmp_path / "mine"
    arguments: list[str | Path] = ["--seed-from", folder / "old"]
    if through == "store":
        fastcas("store", folder / "old", "--chunking", "cdc", "--chunk-size", str(AVERAGE), "--storage-dir", mine)
        arguments = []
    got = fastcas("get", stored["link"], "-o", tmp_path / "out", "--peer", node.peer, "--storage-dir", mine, *arguments)
    assert (tmp_path / "out").read_bytes() == NEW
    assert 0 < got["fetched_bytes"] <= 2 * 4 * AVERAGE
    assert got["fetched_bytes"] + got["local_bytes"] == len(NEW)


def test_a_folder_arrives_seeds_on_and_verifies(node: Node, folder: Path, tmp_path: Path) -> None:
    stored = store(node, folder / "tree")
    with start_node(tmp_path / "second") as second:
        got = fastcas("get", stored["link"], "-o", tmp_path / "out", "--peer", node.peer, "--seed-from", folder,
                      "--storage-dir", second.storage)  # fmt: skip
        assert (tmp_path / "out" / "new").read_bytes() == NEW
        assert (tmp_path / "out" / "small").read_bytes() == data_of(900, 9)
        assert got["fetched_bytes"] < got["size"] / 10
        info = fastcas("info", stored["file_hash"], "--storage-dir", second.storage)
        assert [manifest["chunking"] for manifest in info["manifests"]] == ["cdc"]
        third = fastcas("get", stored["file_hash"], "-o", tmp_path / "third", "--peer", second.peer,
                        "--storage-dir", tmp_path / "none")  # fmt: skip
        assert third["fetched_bytes"] > 0
        assert (tmp_path / "third" / "new").read_bytes() == NEW
        assert fastcas("verify", "--storage-dir", second.storage)["is_clean"]
