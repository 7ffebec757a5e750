"""The process family: ready line, taken ports and folders, killed children, signals."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.nodes import Node, free_port, run_fastcas, start_node
from tests.support.waiting import child_of, is_running, wait_until

pytestmark = pytest.mark.slow


def stored(node: Node, folder: Path, size: int = 600_000) -> tuple[str, bytes]:
    """Store a random file in a node and return (file hash, content)."""
    content = random.Random(size).randbytes(size)
    path = folder / f"file-{size}.bin"
    path.write_bytes(content)
    done = run_fastcas("store", str(path), "--storage-dir", str(node.storage))
    assert done.returncode == 0, done.stderr
    return hashlib.sha256(content).hexdigest(), content


def fetch(node: Node, target: str) -> tuple[int, bytes]:
    """GET from a node; one connection."""
    connection = http.client.HTTPConnection(node.host, node.port, timeout=20)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def start_failing(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastcas.cli.node_command", *arguments], capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip


def test_node_prints_one_ready_line_and_ends_with_0_on_term(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    node = start_node(storage, "--node-id", "MyNode", workers=2)
    pids = node.tree()
    assert node.node_id == "MyNode"
    assert len(child_of(pids, "fastcas.serve")) == 2
    assert fetch(node, "/health")[0] == 200
    node.process.send_signal(signal.SIGTERM)
    assert node.process.stdout is not None
    assert node.process.stdout.read() == b""
    assert node.stop() == 0
    wait_until(lambda: not any(map(is_running, pids)), "all processes gone")
    assert not (storage / "node.sock").exists()


def test_second_node_on_the_folder_exits_10_naming_it(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage") as node:
        done = start_failing("--port", "0", "--no-dht", "--storage-dir", str(node.storage))
        assert done.returncode == 10
        assert str(node.storage) in done.stderr
        assert "in use" in done.stderr
        assert done.stdout == ""


def test_taken_tcp_port_exits_10_naming_it(tmp_path: Path) -> None:
    with start_node(tmp_path / "a") as node:
        done = start_failing(
            "--host", "127.0.0.1", "--port", str(node.port), "--no-dht", "--storage-dir", str(tmp_path / "b")
        )
        assert done.returncode == 10
        assert "Port already in use" in done.stderr
        assert str(node.port) in done.stderr


def test_taken_udp_port_that_was_named_exits_10(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = start_failing(
            "--host", "127.0.0.1", "--port", "0", "--dht-port", str(port), "--storage-dir", str(tmp_path / "s")
        )
    assert done.returncode == 10
    assert f"UDP port {port}" in done.stderr


def test_taken_admin_port_exits_10(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = ["--host", "127.0.0.1", "--port", "0", "--admin-port", str(port)]
        done = start_failing(*where, "--no-dht", "--storage-dir", str(tmp_path / "s"))
    assert done.returncode == 10
    assert f"admin TCP port {port}" in done.stderr


def test_killed_worker_is_replaced_and_queued_connections_are_served(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage", workers=1) as node:
        file_hash, content = stored(node, tmp_path)
        (victim,) = child_of(node.tree(), "fastcas.serve")
        os.kill(victim, signal.SIGSTOP)
        waiting = []
        for _ in range(20):  # they sit in the listener's queue: nobody accepts them
            sock = socket.create_connection((node.host, node.port), timeout=20)
            sock.sendall(f"GET /files/{file_hash} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            waiting.append(sock)
        os.kill(victim, signal.SIGKILL)
        for sock in waiting:
            with sock:
                answer = b""
                while data := sock.recv(1 << 20):
                    answer += data
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(content)
        assert child_of(node.tree(), "fastcas.serve") != [victim]


def test_killed_agent_comes_back_while_workers_serve(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage") as node:
        file_hash, content = stored(node, tmp_path)
        workers = child_of(node.tree(), "fastcas.serve")
        (agent,) = child_of(node.tree(), "fastcas.node.agent")
        os.kill(agent, signal.SIGKILL)
        assert fetch(node, f"/files/{file_hash}") == (200, content)

        # No command fails meanwhile: it waits for the new agent.
        done = run_fastcas("status", "--json", "--storage-dir", str(node.storage))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["node_id"] == node.node_id
        second_hash, second = stored(node, tmp_path, 300_000)
        assert fetch(node, f"/files/{second_hash}") == (200, second)
        assert fetch(node, f"/files/{file_hash}") == (200, content)
        assert child_of(node.tree(), "fastcas.serve") == workers


def test_killed_dht_process_comes_back_on_its_port(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(start_node(tmp_path / "a", dht=True))
        bootstrap = f"127.0.0.1:{first.dht_port}"
        second = stack.enter_context(start_node(tmp_path / "b", "--bootstrap", bootstrap, dht=True))
        file_hash, content = stored(second, tmp_path)
        (victim,) = child_of(second.tree(), "fastcas.dht")
        os.kill(victim, signal.SIGKILL)

        def has_contacts() -> bool:
            done = run_fastcas("status", "--json", "--storage-dir", str(second.storage))
            status = json.loads(done.stdout)
            assert status["dht"]["port"] == second.dht_port
            return status["dht"]["contacts"] > 0 and child_of(second.tree(), "fastcas.dht") != [victim]

        wait_until(has_contacts, "the new DHT process has contacts")
        out = tmp_path / "out.bin"
        done = run_fastcas("get", file_hash, "-o", str(out), "--storage-dir", str(first.storage))
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == content


def test_children_end_after_the_supervisor_and_the_node_can_start_again(tmp_path: Path) -> None:
    node = start_node(tmp_path / "storage", workers=2, dht=True)
    file_hash, content = stored(node, tmp_path)
    pids = node.tree()
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()
    wait_until(lambda: not any(map(is_running, pids)), "orphans end", budget_s=5)
    node.stop()
    with start_node(tmp_path / "storage", "--port", str(node.port)) as again:
        assert fetch(again, f"/files/{file_hash}") == (200, content)


def test_hup_replaces_every_worker_without_a_failed_request(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage", workers=2) as node:
        file_hash, content = stored(node, tmp_path)
        before = set(child_of(node.tree(), "fastcas.serve"))
        failures: list[object] = []
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                try:
                    if fetch(node, f"/files/{file_hash}") != (200, content):
                        failures.append("wrong answer")
                except OSError as exc:
                    failures.append(exc)

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            node.process.send_signal(signal.SIGHUP)
            wait_until(
                lambda: len(child_of(node.tree(), "fastcas.serve")) == 2
                and not before & set(child_of(node.tree(), "fastcas.serve")),
                "both workers are new",
                budget_s=60,
            )
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []


def test_admin_port_gives_status_and_metrics(tmp_path: Path) -> None:
    port = free_port()
    with start_node(tmp_path / "storage", "--admin-port", str(port)) as node:
        file_hash, content = stored(node, tmp_path)
        fetch(node, f"/files/{file_hash}")
        admin = Node(node.process, node.storage, "", "127.0.0.1", port, None, node.log_path)
        status, body = fetch(admin, "/status")
        assert status == 200
        assert json.loads(body)["store"]["files"] == 1
        status, body = fetch(admin, "/metrics")
        assert status == 200
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }
        assert samples["fastcas_store_files",] == 1
        assert samples["fastcas_worker_bytes_sent_total", "0"] >= len(content)
        assert samples["fastcas_worker_responses_total", "0", "2xx"] >= 1
        assert samples["fastcas_worker_evictions_total", "0", "stall"] == 0
        assert samples["fastcas_worker_shortfalls_total", "0"] == 0
        assert samples["fastcas_worker_heartbeat_age_seconds", "0"] >= 0
        assert fetch(admin, "/elsewhere")[0] == 404
        assert not any(name.startswith("fastcas_dht") for name, *_ in samples)


def test_status_peers_and_metrics_show_the_dht(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(start_node(tmp_path / "a", dht=True))
        options = ["--bootstrap", f"127.0.0.1:{first.dht_port}", "--announce", "rare", "--admin-port", str(port)]
        node = stack.enter_context(start_node(tmp_path / "b", *options, dht=True))
        file_hash, _ = stored(first, tmp_path)
        folder = ["--storage-dir", str(node.storage)]

        def knows_the_file() -> bool:
            return run_fastcas("peers", file_hash, *folder).returncode == 0

        wait_until(knows_the_file, "the file is announced")
        done = run_fastcas("peers", file_hash, *folder)
        assert f"127.0.0.1:{first.port}  {first.node_id}  dht" in done.stdout
        shown = r"DHT: 1 contact of about 2 nodes, [1-9]\d* lookups of [0-9.]+ hops, announces rare chunks"
        assert re.fullmatch(shown + r"(, dropped: .*)?\n", done.stderr)
        dht = json.loads(run_fastcas("status", "--json", *folder).stdout)["dht"]
        assert dht["nodes"] == [[first.node_id, "127.0.0.1", first.dht_port]]
        assert dht["announce"] == "rare"
        assert {"lookups", "lookup_hops", "drops", "contacts", "nodes_estimated"} <= set(dht)
        assert "1 contact of about 2 nodes" in run_fastcas("status", *folder).stdout
        body = fetch(Node(node.process, node.storage, "", "127.0.0.1", port, None, node.log_path), "/metrics")[1]
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }
        assert samples["fastcas_dht_contacts",] == 1
        assert samples["fastcas_dht_nodes_estimated",] == 2
        assert samples["fastcas_dht_lookups_total",] >= 1
        assert samples["fastcas_dht_requests_total", "fn"] >= 1
        assert samples["fastcas_dht_datagrams_in_total",] >= 1


def test_rm_and_gc_on_a_running_node_take_the_file_away(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage") as node:
        file_hash, _ = stored(node, tmp_path)
        kept_hash, kept = stored(node, tmp_path, 300_000)
        assert run_fastcas("rm", file_hash, "--storage-dir", str(node.storage)).returncode == 0
        done = run_fastcas("gc", "--json", "--storage-dir", str(node.storage))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bytes_freed"] >= 600_000
        assert fetch(node, f"/files/{file_hash}")[0] == 404
        assert fetch(node, f"/files/{kept_hash}") == (200, kept)


def test_worker_that_hangs_is_killed_and_replaced(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage", workers=1) as node:
        file_hash, content = stored(node, tmp_path)
        (victim,) = child_of(node.tree(), "fastcas.serve")
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: not is_running(victim), "the hanging worker is killed", budget_s=40)
        assert fetch(node, f"/files/{file_hash}") == (200, content)


def test_killed_in_the_middle_of_everything_the_node_starts_again(tmp_path: Path) -> None:
    node = start_node(tmp_path / "storage", workers=2)
    file_hash, content = stored(node, tmp_path)
    node.kill()
    node.stop()
    with start_node(tmp_path / "storage") as again:
        assert fetch(again, f"/files/{file_hash}") == (200, content)
        assert run_fastcas("verify", "--storage-dir", str(again.storage)).returncode == 0


def test_upload_limit_holds_bodies_back_and_nothing_else(tmp_path: Path) -> None:
    with start_node(tmp_path / "storage", "--max-upload", "256K") as node:
        file_hash, content = stored(node, tmp_path, 4 << 20)
        with socket.create_connection((node.host, node.port), timeout=30) as sock:
            sock.sendall(f"GET /files/{file_hash} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            got = sock.recv(1 << 16)
            assert got.startswith(b"HTTP/1.1 200 ")
            # Sixteen seconds of sending lie ahead; what is no body goes at once.
            assert fetch(node, "/health")[0] == 200
            admin = json.loads(run_fastcas("status", "--json", "--storage-dir", str(node.storage)).stdout)
            assert 0 < admin["workers"][0]["counters"]["bytes_sent"] < len(content)
            assert admin["workers"][0]["counters"]["active"] == 1
