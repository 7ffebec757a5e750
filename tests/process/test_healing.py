"""Files that heal, end to end: offline from parity, across nodes that each lost other chunks, on a node's own timer.

`make heal` runs this with 256 MiB (FASTCAS_HEAL_MIB).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastcas.errors import ChunkNotFound, SelfTestFailed
from fastcas.fetch.download import download
from fastcas.ids import Link, PeerAddr
from fastcas.metadata import Manifest
from fastcas.store import Store
from tests.support.nodes import Node, read_line, run_fastcas, start_node
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = int(os.environ.get("FASTCAS_HEAL_MIB", "8")) * MIB + 77_777  # a short last chunk in a short last stripe
K, M = 10, 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "file.bin"
    rng = random.Random(5)
    with path.open("wb") as file:
        for at in range(0, SIZE, MIB):
            file.write(rng.randbytes(min(MIB, SIZE - at)))
    return path


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store(storage: Path, path: Path) -> Manifest:
    done = run_fastcas("store", str(path), "--parity", f"{K}+{M}", "--storage-dir", str(storage), "--json")
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout)
    with Store.open(storage) as opened:
        manifest = opened.manifest(bytes.fromhex(stored["manifest_hash"]))
    assert manifest is not None
    return manifest


def stripes(manifest: Manifest) -> Iterator[list[int]]:
    for number in range(manifest.n_stripes):
        yield [i for part in manifest.stripe(number) for i in part]


def flip(fd: int, offset: int, length: int) -> None:
    at = offset + length // 2
    byte = os.pread(fd, 1, at)[0]
    os.pwrite(fd, bytes([byte ^ 0x10]), at)


def erase(fd: int, offset: int, length: int) -> None:
    os.pwrite(fd, bytes(length), offset)


def lose(storage: Path, manifest: Manifest, chunks: list[int], how: Callable[[int, int, int], None] = flip) -> None:
    """Damage chunks on disk, behind the store's back."""
    with Store.open(storage) as opened:
        for index in chunks:
            blob, offset, length = opened._core.catalog.extents_of(manifest.hash_of(index))[0]
            path = Path(os.fsdecode(opened._core.path_of(blob)))
            path.chmod(0o600)
            fd = os.open(path, os.O_RDWR)
            try:
                how(fd, offset, length)
            finally:
                os.close(fd)
            path.chmod(0o400)


def verify(storage: Path, *arguments: str) -> tuple[int, dict[str, object]]:
    done = run_fastcas("verify", "--json", "--storage-dir", str(storage), *arguments, timeout_s=110)
    assert done.returncode in (0, 5), done.stderr
    return done.returncode, json.loads(done.stdout)


def restored(storage: Path, manifest: Manifest, out: Path) -> str:
    done = run_fastcas("get", manifest.file_hash.hex(), "-o", str(out), "--storage-dir", str(storage), timeout_s=110)
    assert done.returncode == 0, done.stderr
    return digest(out)


@pytest.mark.parametrize("how", [flip, erase])
def test_any_m_chunks_of_every_stripe_are_healed_offline(
    tmp_path: Path, source: Path, how: Callable[[int, int, int], None]
) -> None:
    manifest = store(tmp_path / "s", source)
    rng = random.Random(1)
    lost = [i for chunks in stripes(manifest) for i in rng.sample(chunks, M)]
    lose(tmp_path / "s", manifest, lost, how)
    status, report = verify(tmp_path / "s", "--repair")
    assert (status, report["n_damaged"], report["n_repaired"]) == (0, len(lost), len(lost))
    assert verify(tmp_path / "s")[1]["n_damaged"] == 0
    assert restored(tmp_path / "s", manifest, tmp_path / "out") == digest(source)
    assert len(list((tmp_path / "s" / "quarantine").iterdir())) == len(lost)


@contextlib.contextmanager
def nodes_that_lost(tmp_path: Path, source: Path, share: Callable[[int, list[int]], list[int]]) -> Iterator[
    tuple[Manifest, list[Node]]
]:
    """Three nodes with the same file; node i lost share(i, chunks of a stripe) of every stripe, and knows it."""
    with contextlib.ExitStack() as stack:
        nodes: list[Node] = []
        for i in range(3):
            storage = tmp_path / f"node{i}"
            manifest = store(storage, source)
            lose(storage, manifest, [index for chunks in stripes(manifest) for index in share(i, chunks)])
            assert verify(storage)[0] == 5
            peers = [word for node in nodes for word in ("--peer", node.peer)]
            nodes.append(stack.enter_context(start_node(storage, *peers)))
        yield manifest, nodes


def offered(node: Node, manifest: Manifest) -> bool:
    connection = http.client.HTTPConnection(node.host, node.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", f"/swarm/{manifest.file_hash.hex()}?m={manifest.manifest_hash.hex()}")
        return connection.getresponse().status == 200


def test_client_fetches_from_nodes_that_each_lost_other_chunks(tmp_path: Path, source: Path) -> None:
    """Each lost six of a stripe's chunks, four of them are nowhere at all."""

    def share(i: int, chunks: list[int]) -> list[int]:
        return [*chunks[1:5], *chunks[5 + 2 * i : 7 + 2 * i]]

    with nodes_that_lost(tmp_path, source, share) as (manifest, nodes):
        for node in nodes:
            wait_until(lambda node=node: offered(node, manifest), "an incomplete file is offered")
        peers = [word for node in nodes for word in ("--peer", node.peer)]
        out = tmp_path / "out"
        done = run_fastcas(
            "get", manifest.file_hash.hex(), "-o", str(out), *peers, "--json", "--storage-dir", str(tmp_path / "no"),
            timeout_s=110,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert digest(out) == digest(source)
        assert result["local_bytes"] > 0  # rebuilt
        assert len(result["bytes_by_peer"]) >= 2


def test_node_heals_itself_from_its_peers(tmp_path: Path, source: Path) -> None:
    """Each lost six of a stripe's chunks: two more than its own parity can replace."""

    def share(i: int, chunks: list[int]) -> list[int]:
        return [chunks[(4 * i + j) % len(chunks)] for j in range(6)]

    with nodes_that_lost(tmp_path, source, share) as (manifest, nodes):
        node = nodes[2]  # was started with both others as --peer
        status, report = verify(node.storage, "--repair")
        assert status == 0
        ways = {item["repaired_by"] for item in report["damages"]}  # type: ignore[attr-defined]
        assert "peer" in ways
        assert restored(node.storage, manifest, tmp_path / "out") == digest(source)
        for other in nodes[:2]:
            assert verify(other.storage, "--repair", "--peer", node.peer)[0] == 0
        node.stop()
        nodes[0].stop()
        assert verify(nodes[0].storage)[1]["n_damaged"] == 0


def test_folder_without_a_node_heals_from_a_named_peer(tmp_path: Path, source: Path) -> None:
    manifest = store(tmp_path / "a", source)
    store(tmp_path / "b", source)
    lost = [i for chunks in stripes(manifest) for i in chunks[: M + 1]]
    lose(tmp_path / "b", manifest, lost)
    text = manifest.manifest_hash.hex()
    path = tmp_path / "b" / "manifests" / text[:2] / text
    path.chmod(0o600)
    path.write_bytes(b"x" * len(manifest.data))
    status, report = verify(tmp_path / "b", "--repair")
    assert status == 5
    with start_node(tmp_path / "a") as node:
        status, report = verify(tmp_path / "b", "--repair", "--peer", node.peer)
        assert status == 0, report
    assert restored(tmp_path / "b", manifest, tmp_path / "out") == digest(source)


def test_one_loss_too_many_names_stripe_and_chunks_on_both_sides(tmp_path: Path, source: Path) -> None:
    manifest = store(tmp_path / "s", source)
    lost = list(stripes(manifest))[1][: M + 1]
    lose(tmp_path / "s", manifest, lost)
    done = run_fastcas("verify", "--repair", "--storage-dir", str(tmp_path / "s"))
    assert done.returncode == 5
    with start_node(tmp_path / "s") as node:
        wait_until(lambda: offered(node, manifest), "an incomplete file is offered")
        link = Link(manifest.file_hash, manifest.manifest_hash, peers=(PeerAddr(node.host, node.port),))
        with pytest.raises(ChunkNotFound) as caught:
            asyncio.run(download(link, tmp_path / "out", discovery=None, stall_timeout_s=2.0))
    for text in (done.stdout, str(caught.value)):
        assert "stripe #1" in text
        for index in lost:
            assert f"#{index} ({manifest.hash_of(index).hex()[:8]})" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("through_node", [False, True], ids=["alone", "through a node"])
def test_interrupted_verify_exits_7_and_goes_on(tmp_path: Path, source: Path, through_node: bool) -> None:
    store(tmp_path / "s", source)
    with contextlib.ExitStack() as stack:
        if through_node:
            stack.enter_context(start_node(tmp_path / "s"))
        words = ["verify", "--json", "--storage-dir", str(tmp_path / "s")]
        process = subprocess.Popen(
            [sys.executable, "-m", "fastcas", *words, "--rate", "2M"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        with process.stdout, process.stderr:
            while json.loads(read_line(process.stderr, 60))["progress"]["done"] < MIB:
                pass
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read().decode()
            assert process.wait(30) == 7, rest
        assert "resume with: fastcas verify" in rest.splitlines()[-1]

        def go_on() -> dict[str, object]:
            return verify(tmp_path / "s")[1]

        report = go_on()
        assert MIB <= report["resumed_bytes"] < report["bytes"]  # type: ignore[operator]
        assert go_on()["resumed_bytes"] == 0


def test_parity_chunks_are_served_and_announced(tmp_path: Path, source: Path) -> None:
    manifest = store(tmp_path / "s", source)
    parity = [manifest.hash_of(i) for i in range(manifest.n_chunks, manifest.n_total)]
    with Store.open(tmp_path / "s") as opened:
        announced = b"".join(opened.chunk_hashes())
    assert {announced[at : at + 32] for at in range(0, len(announced), 32)} >= set(parity)
    with start_node(tmp_path / "s") as node:
        connection = http.client.HTTPConnection(node.host, node.port, timeout=10)
        with contextlib.closing(connection):
            for key in parity:
                connection.request("GET", f"/chunks/{key.hex()}")
                answer = connection.getresponse()
                assert answer.status == 200
                assert hashlib.sha256(answer.read()).digest() == key


def test_node_scrubs_on_its_timer_and_keeps_serving_commands(tmp_path: Path, source: Path) -> None:
    storage = tmp_path / "s"
    manifest = store(storage, source)
    lost = [i for chunks in stripes(manifest) for i in chunks[:M]]
    lose(storage, manifest, lost)
    with Store.open(storage) as opened:
        opened.remember("scrub-timer", json.dumps({"finished_at": int(time.time() - 8 * 24 * 3600)}).encode())
    with start_node(storage) as node:

        def scrubbed() -> bool:
            done = run_fastcas("status", "--json", "--storage-dir", str(storage))
            assert done.returncode == 0, done.stderr
            found: dict[str, int] = json.loads(done.stdout)["scrub"]
            return found.get("n_repaired") == len(lost)

        wait_until(scrubbed, "the timer healed everything", budget_s=100)
        assert restored(storage, manifest, tmp_path / "out") == digest(source)
        assert "scrub found damage" in node.log_path.read_text()


@pytest.mark.parametrize("room", ["hashing", "parity"])
def test_broken_kernel_ends_the_node_with_12_before_it_serves(tmp_path: Path, room: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import fastcas.{room} as room\n"
        "from fastcas.errors import SelfTestFailed\n"
        "def broken(kernel=None):\n"
        f"    raise SelfTestFailed('{room}: kernel ' + room.kernel_name() + ' computes wrong bytes')\n"
        "room.self_test = broken\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fastcas.cli.node_command", "--host", "127.0.0.1", "--port", "0", "--no-dht",
         "--workers", "1", "--storage-dir", str(tmp_path / "s")],
        capture_output=True, text=True, timeout=30, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == SelfTestFailed.exit_code == 12, done.stderr
    assert done.stdout == ""
    assert f"{room}: kernel" in done.stderr and "computes wrong bytes" in done.stderr
    assert "Traceback" not in done.stderr
