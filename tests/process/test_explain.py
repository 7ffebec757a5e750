"""`get --explain` names what is slow where this machine is: its disk, or its CPU with the plain kernel."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.ids import parse_ref
from tests.support.nodes import Node, run_fastcas
from tests.support.seeds import seeding_node

pytestmark = pytest.mark.slow

MIB = 1 << 20
SOURCE = Path(__file__).parents[1] / "support" / "slow_disk.c"


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, str]]:
    """A node with 48 MiB: one that takes long enough to be waited for, and lies in memory."""
    with seeding_node(tmp_path_factory.mktemp("explain"), random.Random(17).randbytes(48 * MIB)) as made:
        yield made


def get(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_fastcas(
        "get", "-o", str(folder / "o"), "--storage-dir", str(folder / "no"), *arguments,
        env={**os.environ, **environment}, preexec_fn=on_one_core,
    )  # fmt: skip


def on_one_core() -> None:
    """Leave the other cores to the node: what is slow is to be here."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def explained(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["explained"]


@pytest.mark.parametrize("plan", ["10000 0", "0 2000000"], ids=["writes", "fsync"])
def test_slow_disk_is_named(seed: tuple[Node, str], tmp_path: Path, plan: str) -> None:
    library = tmp_path / "slow_disk.so"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, SOURCE, "-ldl"], check=True)
    said = explained(get(tmp_path, seed[1], "--json", LD_PRELOAD=str(library), SLOW_DISK=plan))
    assert said["limited_by"] == "disk" and said["shares"]["disk"] > 0.5, said


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: a shared disk is busy when it likes, and would then be named rightly."""
    with tempfile.TemporaryDirectory(prefix="fastcas-explain-", dir="/dev/shm") as folder:
        yield Path(folder)


def test_plain_kernel_with_a_fast_peer_is_named(seed: tuple[Node, str], memory: Path) -> None:
    """By hash alone, so that every byte is hashed twice."""
    node, link = seed
    file_hash = str(parse_ref(link).file_hash.hex())
    (memory / "again").mkdir()
    said = explained(get(memory, file_hash, "--peer", node.peer, "--json", FASTCAS_SHA256_KERNEL="generic"))
    assert said["limited_by"] == "hashing", said
    done = get(memory / "again", file_hash, "--peer", node.peer, "--explain", FASTCAS_SHA256_KERNEL="generic")
    assert "limited by hashing CPU: " in done.stderr
