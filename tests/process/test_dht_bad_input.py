"""What is wrong with the DHT's surroundings costs one clear line each; the node serves its chunks all the same."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.nodes import Node, free_port, run_fastcas, start_node
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

CONTENT = b"served whatever else is wrong" * 1000


def serves(node: Node, folder: Path) -> bool:
    """Whether the node stores a file and hands its bytes out."""
    path = folder / "content.bin"
    path.write_bytes(CONTENT)
    done = run_fastcas("store", str(path), "--storage-dir", str(node.storage))
    assert done.returncode == 0, done.stderr
    connection = http.client.HTTPConnection(node.host, node.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/files/" + hashlib.sha256(CONTENT).hexdigest())
        return connection.getresponse().read() == CONTENT


def status(node: Node) -> dict[str, Any]:
    done = run_fastcas("status", "--json", "--storage-dir", str(node.storage))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def complaints(node: Node) -> list[str]:
    """The lines of the node's log but for what it logs as a matter of course."""
    lines = node.log_path.read_text().splitlines()
    assert not any("Traceback" in line for line in lines), lines
    return [line for line in lines if " WARNING " in line or " ERROR " in line or "Traceback" in line]


def test_bootstrap_nodes_without_name_or_answer_are_one_line_each_and_asked_until_they_live(tmp_path: Path) -> None:
    port = free_port(socket.SOCK_DGRAM)
    where = ["--bootstrap", "no-such-host.invalid:8468", "--bootstrap", f"127.0.0.1:{port}"]
    with start_node(tmp_path / "s", *where, dht=True) as node:
        wait_until(lambda: len(complaints(node)) >= 2, "a line about each")
        assert serves(node, tmp_path)
        with start_node(tmp_path / "late", "--dht-port", str(port), dht=True):
            wait_until(lambda: status(node)["dht"]["contacts"] == 1, "it has joined after all")
        lines = sorted(complaints(node))
        assert len(lines) == 2
        assert any("'no-such-host.invalid' cannot be resolved" in line for line in lines)
        assert any(f"bootstrap node 127.0.0.1:{port} does not answer" in line for line in lines)


def test_taken_default_udp_port_is_replaced_with_one_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        with contextlib.suppress(OSError):  # somebody else has it: as good
            taken.bind(("127.0.0.1", 8468))
        with start_node(tmp_path / "s", dht=True, names_dht_port=False) as node:
            assert node.dht_port not in (None, 0, 8468)
            (line,) = complaints(node)
            assert "UDP port 8468" in line
            assert "in use" in line
            assert serves(node, tmp_path)


def test_damaged_state_file_is_one_line_and_replaced(tmp_path: Path) -> None:
    with start_node(tmp_path / "first", dht=True) as first:
        folder = tmp_path / "s"
        folder.mkdir()
        state = folder / "dht.state"
        state.write_bytes(b"FCDHTST2 but nothing else that fits")
        with start_node(folder, "--bootstrap", f"127.0.0.1:{first.dht_port}", dht=True) as node:
            assert serves(node, tmp_path)
            (line,) = complaints(node)
            assert f"{state}: damaged" in line
            wait_until(lambda: b"nothing else" not in state.read_bytes(), "a new state file")
            assert state.stat().st_mode & 0o777 == 0o600


def test_key_file_that_cannot_be_used_is_one_line_and_left_alone(tmp_path: Path) -> None:
    bad = [("short", b"short", 0o600, "expected 32 B, got 5 B"), ("open", b"k" * 32, 0o644, "readable by others")]
    ids = set()
    for name, content, mode, reason in bad:
        key = tmp_path / name / "node.key"
        key.parent.mkdir()
        key.write_bytes(content)
        key.chmod(mode)
        with start_node(key.parent, dht=True) as node:
            assert serves(node, tmp_path)
            (line,) = complaints(node)
            assert str(key) in line
            assert reason in line
            ids.add(node.node_id)
        assert key.read_bytes() == content
        assert key.stat().st_mode & 0o777 == mode
    key.unlink()
    with start_node(key.parent, dht=True) as node:
        assert len(complaints(node)) == 1  # the old one
        assert len(key.read_bytes()) == 32
        assert len(ids | {node.node_id}) == 3
