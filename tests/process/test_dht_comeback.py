"""A DHT process that is killed: it is back with its table soon, and nobody who downloads notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcas.dht.server import FcServer
from fastcas.dht.state import load_state
from fastcas.node.control_client import ControlClient
from fastcas.peers.policy import AddressPolicy
from tests.support.nodes import Node, run_fastcas, start_node
from tests.support.waiting import child_of, wait_until

pytestmark = pytest.mark.slow

NETWORK = 60
JOINED = 15  # contacts of a node that has joined, at least
SHARE = 0.9
MIB = 1 << 20


@contextlib.contextmanager
def network(n: int) -> Iterator[list[tuple[str, int]]]:
    """`n` DHT nodes on 127.0.0.1 in a thread of this process, joined; yields their addresses."""
    addresses: list[tuple[str, int]] = []
    is_up, ending = threading.Event(), threading.Event()

    async def body() -> None:
        nodes = [FcServer(policy=AddressPolicy(own=()), seed=random.Random(f"n{i}").randbytes(32)) for i in range(n)]
        for node in nodes:
            await node.listen(0, "127.0.0.1")
            addresses.append(("127.0.0.1", node.port))
        for node in nodes:
            node.start(addresses[:1] if node is not nodes[0] else [])
        await asyncio.sleep(1.0)
        is_up.set()
        await asyncio.to_thread(ending.wait)
        for node in nodes:
            node.stop()

    thread = threading.Thread(target=lambda: asyncio.run(body()))
    thread.start()
    try:
        assert is_up.wait(20)
        yield addresses
    finally:
        ending.set()
        thread.join(20)


def figures(node: Node) -> dict[str, Any]:
    """What `status` says of a node's DHT process."""
    with ControlClient(node.storage) as client:
        result: dict[str, Any] = client.call("status", {})["dht"]
    return result


def table(node: Node) -> tuple[int | None, set[str]]:
    """The process id of a node's DHT process and the ids in its routing table."""
    dht = figures(node)
    return dht["pid"], {node_id for node_id, _, _ in dht["nodes"]}


def kill_dht(node: Node) -> int:
    (victim,) = child_of(node.tree(), "fastcas.dht")
    os.kill(victim, signal.SIGKILL)
    return victim


def test_the_table_is_back_soon_without_bootstrap_nodes_and_chunks_are_not_announced_again(tmp_path: Path) -> None:
    with network(NETWORK) as addresses:
        where = f"127.0.0.1:{addresses[0][1]}"
        with start_node(tmp_path / "s", "--bootstrap", where, dht=True) as first:
            wait_until(lambda: len(table(first)[1]) >= JOINED, "the node has joined")
            state = first.storage / "dht.state"
            wait_until(lambda: len(load_state(state).addresses) >= SHARE * len(table(first)[1]), "contacts are saved")
            first.kill()  # no farewell: what was saved while it ran has to do
        # Without a bootstrap node, so that only saved contacts can bring it back.
        with start_node(tmp_path / "s", dht=True) as node:
            wait_until(lambda: len(table(node)[1]) >= SHARE * JOINED, "the node is back from saved contacts")
            source = tmp_path / "source.bin"
            source.write_bytes(random.Random(6).randbytes(MIB))
            assert run_fastcas("store", str(source), "--storage-dir", str(node.storage)).returncode == 0

            def is_announced() -> bool:
                chunks = load_state(state).chunks
                return figures(node).get("rpc_ap", 0) > 0 and chunks is not None and len(chunks.slices) > 0

            wait_until(is_announced, "the chunks are announced, and that is saved")
            before = table(node)[1]
            start = time.monotonic()
            victim = kill_dht(node)
            wait_until(
                lambda: table(node)[0] != victim and len(table(node)[1] & before) >= SHARE * len(before),
                f"{SHARE:.0%} of {len(before)} contacts are back",
                budget_s=20,
            )
            print(f"\n{len(table(node)[1] & before)} of {len(before)} contacts after {time.monotonic() - start:.2f} s")
            wait_until(lambda: figures(node).get("rpc_as", 0) > 0, "the file is announced again")
            wait_until(lambda: figures(node).get("chunks_offered", 0) > 0, "the chunks are there")
            assert "rpc_ap" not in figures(node)  # they are still known where they were


def test_download_goes_on_while_both_sides_dht_processes_die(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(random.Random(5).randbytes(4 * MIB))
    with contextlib.ExitStack() as stack:
        seed = stack.enter_context(start_node(tmp_path / "a", "--max-upload", "2M", dht=True))
        bootstrap = f"127.0.0.1:{seed.dht_port}"
        taker = stack.enter_context(start_node(tmp_path / "b", "--bootstrap", bootstrap, dht=True))
        done = run_fastcas("store", str(source), "--storage-dir", str(seed.storage), "--json")
        file_hash = json.loads(done.stdout)["file_hash"]
        wait_until(lambda: len(table(taker)[1]) == 1, "the nodes know each other")
        out = tmp_path / "out.bin"
        command = [sys.executable, "-m", "fastcas", "get", file_hash, "-o", str(out), "--storage-dir"]
        process = stack.enter_context(subprocess.Popen([*command, str(taker.storage)], stdout=subprocess.DEVNULL))

        def bytes_done() -> int:
            with ControlClient(taker.storage) as client:
                return max([item["done"] for item in client.call("status", {})["downloads"]], default=0)

        def finds_the_part_file() -> bool:
            with ControlClient(seed.storage) as client:
                peers = client.call("peers", {"ref": file_hash})["peers"]
            return [taker.node_id, taker.host, taker.port, "dht"] in peers

        wait_until(lambda: 0 < bytes_done() < 3 * MIB, "the download runs")
        (worker,) = child_of(seed.tree(), "fastcas.serve")
        os.kill(worker, signal.SIGSTOP)  # so that it is not over too soon
        victims = {kill_dht(seed), kill_dht(taker)}
        wait_until(finds_the_part_file, "the new DHT processes know who has a part of it")
        assert bytes_done() < 4 * MIB
        os.kill(worker, signal.SIGCONT)
        assert process.wait(60) == 0
        assert out.read_bytes() == source.read_bytes()
        assert not {table(seed)[0], table(taker)[0]} & victims
