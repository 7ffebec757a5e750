"""Fetching between real nodes: through the DHT, from named peers, while one of them dies, by way of a node."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.dht.server import FcServer
from fastcas.peers.policy import AddressPolicy
from fastcas.store import Store
from tests.support.nodes import Node, read_line, run_fastcas, start_node
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

MIB = 1 << 20
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # for commands that run elsewhere


def write_random(path: Path, size: int) -> str:
    """Create a file of random bytes and return its hash."""
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def store(node: Node, path: Path, *arguments: str) -> dict[str, object]:
    done = run_fastcas("store", str(path), "--storage-dir", str(node.storage), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def get(*arguments: str) -> dict[str, object]:
    done = run_fastcas("get", *arguments, "--json", timeout_s=110)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def dht_nodes(folder: Path, count: int) -> Iterator[list[Node]]:
    """Nodes that have joined one DHT through the first."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(start_node(folder / "node0", dht=True))]
        for number in range(1, count):
            bootstrap = f"127.0.0.1:{nodes[0].dht_port}"
            nodes.append(stack.enter_context(start_node(folder / f"node{number}", "--bootstrap", bootstrap, dht=True)))
        yield nodes


def test_bare_hash_is_found_through_the_dht_and_fetched_from_all(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 12 * MIB)
    with dht_nodes(tmp_path, 3) as nodes:
        for node in nodes:
            assert store(node, source)["file_hash"] == file_hash

        def count_peers() -> int:
            done = run_fastcas("peers", file_hash, "--json", "--storage-dir", str(nodes[0].storage))
            return len(json.loads(done.stdout)["peers"]) if done.returncode == 0 else 0

        wait_until(lambda: count_peers() >= 2, "both others are announced")
        out = tmp_path / "out.bin"
        bootstrap = f"127.0.0.1:{nodes[1].dht_port}"
        result = get(file_hash, "-o", str(out), "--bootstrap", bootstrap, "--storage-dir", str(tmp_path / "no"))
        assert out.read_bytes() == source.read_bytes()
        assert set(result["bytes_by_peer"]) <= {node.peer for node in nodes}  # type: ignore[call-overload]


async def answers_in_the_open_network(port: int) -> bool:
    server = FcServer(policy=AddressPolicy(own=()))
    await server.listen(0, "127.0.0.1")
    try:
        return await server.bootstrap_node(("127.0.0.1", port)) is not None
    finally:
        server.stop()


def test_link_brings_a_node_into_the_private_network_that_both_have_the_key_of(tmp_path: Path) -> None:
    source, key = tmp_path / "source.bin", tmp_path / "key"
    file_hash = write_random(source, MIB)
    key.write_bytes(b"sixteen or more bytes")
    network = ["--network-key", str(key)]
    with contextlib.ExitStack() as stack:
        first, second = [stack.enter_context(start_node(tmp_path / name, *network, dht=True)) for name in "ab"]
        link = str(store(first, source)["link"])
        assert link.endswith(f"&peer={first.peer}&dht=127.0.0.1:{first.dht_port}")
        get(link, "-o", str(tmp_path / "out.bin"), "--storage-dir", str(second.storage))

        def contacts() -> object:
            done = run_fastcas("status", "--json", "--storage-dir", str(second.storage))
            return json.loads(done.stdout)["dht"]["nodes"]

        wait_until(lambda: contacts() == [[first.node_id, "127.0.0.1", first.dht_port]], "it has joined")
        assert first.dht_port is not None
        assert asyncio.run(answers_in_the_open_network(first.dht_port)) is False
        without_peer = f"fastcas://{file_hash}?dht=127.0.0.1:{first.dht_port}"
        result = get(without_peer, "-o", str(tmp_path / "again.bin"), *network, "--storage-dir", str(tmp_path / "no"))
        assert set(result["bytes_by_peer"]) <= {first.peer, second.peer}  # type: ignore[call-overload]
        assert (tmp_path / "again.bin").read_bytes() == source.read_bytes()


def test_node_that_fetched_a_file_serves_it_from_its_place(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 5 * MIB)
    with start_node(tmp_path / "a") as first, start_node(tmp_path / "b", "--peer", first.peer) as second:
        store(first, source)
        out = tmp_path / "out.bin"
        get(file_hash, "-o", str(out), "--storage-dir", str(second.storage))
        first.stop()
        again = tmp_path / "again.bin"
        result = get(file_hash, "-o", str(again), "--peer", second.peer, "--storage-dir", str(tmp_path / "no"))
        assert again.read_bytes() == source.read_bytes()
        assert list(result["bytes_by_peer"]) == [second.peer]  # type: ignore[call-overload]
        assert (second.storage / "hashed_files").is_dir()
        assert not any((second.storage / "hashed_files").rglob("*.blob"))  # seeded in place, not copied


def test_one_of_three_nodes_is_killed_while_it_is_fetched_from(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 24 * MIB)
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(start_node(tmp_path / f"node{i}", "--max-upload", "4M")) for i in range(3)
        ]
        for node in nodes:
            store(node, source)
        out = tmp_path / "out.bin"
        peers = [word for node in nodes for word in ("--peer", node.peer)]
        process = subprocess.Popen(
            [sys.executable, "-m", "fastcas", "get", file_hash, "-o", str(out), *peers, "--json",
             "--storage-dir", str(tmp_path / "no")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        with process.stdout, process.stderr:
            while json.loads(read_line(process.stderr, 60))["progress"]["done"] < 2 * MIB:
                pass
            nodes[1].kill()
            rest = process.stdout.read().splitlines()
            assert process.wait(100) == 0, process.stderr.read()
        result = json.loads(rest[-1])
        assert out.read_bytes() == source.read_bytes()
        assert sum(result["bytes_by_peer"].values()) >= 24 * MIB


@pytest.mark.parametrize("through_node", [False, True], ids=["alone", "through a node"])
def test_interrupted_get_exits_7_names_the_command_and_resumes(tmp_path: Path, through_node: bool) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 24 * MIB)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(start_node(tmp_path / "a", "--max-upload", "6M"))
        mine = tmp_path / "mine"
        if through_node:
            stack.enter_context(start_node(mine))
        store(node, source)
        out = tmp_path / "out.bin"
        arguments = ["get", file_hash, "-o", str(out), "--peer", node.peer, "--storage-dir", str(mine)]
        process = subprocess.Popen(
            [sys.executable, "-m", "fastcas", *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        with process.stdout, process.stderr:
            while json.loads(read_line(process.stderr, 60))["progress"]["done"] < 4 * MIB:
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 7
            complaint = process.stderr.read().decode()
        assert f"resume with: fastcas {' '.join(arguments[:2])}" in complaint
        assert "Traceback" not in complaint
        assert not out.exists()
        assert out.with_name("out.bin.fastcas-part").exists()
        node.stop()
        with start_node(tmp_path / "a", "--port", str(node.port)):
            result = get(*arguments[1:])
        assert out.read_bytes() == source.read_bytes()
        assert int(str(result["resumed_bytes"])) > 0


def test_directory_goes_there_and_back_through_nodes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    write_random(tree / "big.bin", 3 * MIB)
    (tree / "deep" / "small.txt").write_text("small\n")
    (tree / "deep" / "er" / "run.sh").write_text("#!/bin/sh\n")
    (tree / "deep" / "er" / "run.sh").chmod(0o755)
    (tree / "empty").write_bytes(b"")
    with start_node(tmp_path / "a") as first, start_node(tmp_path / "b") as second:
        stored = store(first, tree)
        assert stored["is_collection"] is True
        for storage in (second.storage, tmp_path / "none"):
            out = tmp_path / f"out-{storage.name}"
            get(str(stored["link"]), "-o", str(out), "--storage-dir", str(storage))
            for path in (p for p in tree.rglob("*") if p.is_file()):
                copy = out / path.relative_to(tree)
                assert copy.read_bytes() == path.read_bytes()
                assert bool(copy.stat().st_mode & 0o100) == bool(path.stat().st_mode & 0o100)


def make_collection(root: Path) -> dict[str, bytes]:
    """Write a folder with small and large files; returns {path: content}."""
    files = {
        "big.bin": random.Random(1).randbytes(3 * MIB), "deep/more.bin": random.Random(2).randbytes(200_000),
        "deep/small.txt": b"small\n", "deep/er/run.sh": b"#!/bin/sh\n", "empty": b"",
    }  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "deep/er/run.sh").chmod(0o755)
    return files


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def listed(storage: Path) -> list[dict[str, object]]:
    done = run_fastcas("ls", "--json", "--storage-dir", str(storage))
    assert done.returncode == 0, done.stderr
    result: list[dict[str, object]] = json.loads(done.stdout)["files"]
    return result


@pytest.mark.parametrize("through_node", [True, False], ids=["through a node", "alone"])
def test_fetched_collection_is_served_again_until_it_is_removed(tmp_path: Path, through_node: bool) -> None:
    wanted = make_collection(tmp_path / "tree")
    mine = tmp_path / "mine"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(start_node(tmp_path / "a"))
        stored = store(first, tmp_path / "tree", "--parity", "4+2", "--chunk-size", "16KiB")
        link = str(stored["link"])
        if through_node:
            second = stack.enter_context(start_node(mine))
        else:
            with Store.open(mine, create=True):
                pass
        get(link, "-o", str(tmp_path / "m2"), "--storage-dir", str(mine))
        first.stop()
        if not through_node:
            second = stack.enter_context(start_node(mine))
        wait_until(lambda: listed(mine), "the collection is registered")
        (row,) = [row for row in listed(mine) if row["name"]]
        assert (row["file_hash"], row["name"]) == (stored["file_hash"], "tree")
        assert (row["is_collection"], row["is_complete"]) == (True, True)
        result = get(
            link.partition("&peer=")[0], "-o", str(tmp_path / "m3"), "--peer", second.peer,
            "--storage-dir", str(tmp_path / "no"),
        )  # fmt: skip
        assert list(result["bytes_by_peer"]) == [second.peer]  # type: ignore[call-overload]
        assert files_of(tmp_path / "m2") == files_of(tmp_path / "m3") == wanted
        assert (tmp_path / "m3/deep/er/run.sh").stat().st_mode & 0o777 == 0o755

        for words in (["rm", str(stored["file_hash"])], ["gc"]):
            done = run_fastcas(*words, "--storage-dir", str(mine))
            assert done.returncode == 0, done.stderr
        assert listed(mine) == []
        assert not any((mine / "hashed_files").rglob("*.blob"))
        assert files_of(tmp_path / "m2") == wanted


def test_get_of_what_the_node_has_itself_needs_no_peer(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 2 * MIB)
    with start_node(tmp_path / "a") as node:
        store(node, source)
        folder = tmp_path / "here"
        folder.mkdir()
        done = run_fastcas("get", file_hash, "--storage-dir", str(node.storage), cwd=folder, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        assert done.stdout == str(folder / "source.bin") + "\n"
        assert (folder / "source.bin").read_bytes() == source.read_bytes()


def test_status_shows_a_running_download_and_the_callers_end_cancels_it(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 24 * MIB)
    with start_node(tmp_path / "a", "--max-upload", "2M") as node, start_node(tmp_path / "b") as mine:
        store(node, source)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastcas", "get", file_hash, "-o", str(tmp_path / "out.bin"), "--peer", node.peer,
             "--storage-dir", str(mine.storage)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def downloads() -> list[dict[str, object]]:
            done = run_fastcas("status", "--json", "--storage-dir", str(mine.storage))
            result: list[dict[str, object]] = json.loads(done.stdout)["downloads"]
            return result

        assert wait_until(downloads, "the download is shown")[0]["file_hash"] == file_hash
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not downloads(), "the download is cancelled")


def test_part_file_is_served_while_it_grows(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    write_random(source, 16 * MIB)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(start_node(tmp_path / "a", "--max-upload", "4M"))
        middle = stack.enter_context(start_node(tmp_path / "b"))
        link = str(store(first, source)["link"])
        feeding = subprocess.Popen(
            [sys.executable, "-m", "fastcas", "get", link, "-o", str(tmp_path / "middle.bin"), "--json",
             "--storage-dir", str(middle.storage)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert feeding.stdout is not None and feeding.stderr is not None
        with feeding.stdout, feeding.stderr:
            while json.loads(read_line(feeding.stderr, 60))["progress"]["done"] < 2 * MIB:
                pass
            # The link without its peer: only the middle node is known to the last one at first.
            bare = link.partition("&peer=")[0]
            out = tmp_path / "last.bin"
            result = get(bare, "-o", str(out), "--peer", middle.peer, "--storage-dir", str(tmp_path / "no"))
            assert feeding.wait(60) == 0, feeding.stderr.read()
        assert out.read_bytes() == source.read_bytes()
        assert result["bytes_by_peer"][middle.peer] > 0  # type: ignore[call-overload, index]


def test_peers_of_a_file_learn_of_each_other_from_the_seed(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 4 * MIB)
    with contextlib.ExitStack() as stack:
        seed = stack.enter_context(start_node(tmp_path / "seed"))
        other = stack.enter_context(start_node(tmp_path / "other"))
        store(seed, source)
        get(file_hash, "-o", str(tmp_path / "x"), "--peer", seed.peer, "--storage-dir", str(other.storage))

        def known() -> list[list[object]]:
            done = run_fastcas("peers", file_hash, "--json", "--storage-dir", str(seed.storage))
            result: list[list[object]] = json.loads(done.stdout)["peers"]
            return result

        (peer,) = wait_until(known, "the seed knows the other node")
        assert (peer[1], peer[2], peer[3]) == (other.host, other.port, "swarm")


def test_damage_of_a_running_node_is_repaired_from_a_peer(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    file_hash = write_random(source, 2 * MIB)
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(start_node(tmp_path / "good"))
        store(good, source)
        mine = stack.enter_context(start_node(tmp_path / "mine", "--peer", good.peer))
        store(mine, source)
        (blob,) = (mine.storage / "hashed_files").rglob("*.blob")
        blob.chmod(0o600)
        with blob.open("r+b") as file:
            file.seek(MIB)
            file.write(b"damage")
        storage = ["--storage-dir", str(mine.storage)]
        assert run_fastcas("verify", *storage).returncode == 5
        done = run_fastcas("verify", "--repair", *storage)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "repaired from peer" in done.stdout
        good.stop()
        result = get(file_hash, "-o", str(tmp_path / "out"), *storage)
        assert result["local_bytes"] == 2 * MIB
        assert (tmp_path / "out").read_bytes() == source.read_bytes()
