"""What is wrong with the DHT's surroundings costs one clear line each; the node serves its chunks all the same."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
from pathlib import Path

import pytest

from fastcas.dht.identity import Identity
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


def complaints(node: Node) -> list[str]:
    """The lines of the node's log but for what it logs as a matter of course."""
    lines = node.log_path.read_text().splitlines()
    assert not any("Traceback" in line for line in lines), lines
    return [line for line in lines if " WARNING " in line or " ERROR " in line or "Traceback" in line]


def test_everything_that_can_be_wrong_is_one_line_each_and_the_node_serves(tmp_path: Path) -> None:
    """A name that does not resolve, a dead bootstrap node, a taken default port, a damaged state and key file."""
    folder = tmp_path / "s"
    folder.mkdir()
    state, key = folder / "dht.state", folder / "node.key"
    state.write_bytes(b"FCDHTST2 but nothing else that fits")
    key.write_bytes(b"short")
    key.chmod(0o600)
    dead = free_port(socket.SOCK_DGRAM)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(start_node(tmp_path / "first", dht=True))
        taken = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with contextlib.suppress(OSError):  # somebody else has it: as good
            taken.bind(("127.0.0.1", 8468))
        where = [f"--bootstrap={host}" for host in
                 ("no-such-host.invalid:8468", f"127.0.0.1:{dead}", f"127.0.0.1:{first.dht_port}")]  # fmt: skip
        node = stack.enter_context(start_node(folder, *where, dht=True, names_dht_port=False))
        assert node.dht_port not in (None, 0, 8468)
        assert serves(node, tmp_path)
        wait_until(lambda: len(complaints(node)) >= 5, "a line about each")
        wait_until(lambda: b"nothing else" not in state.read_bytes(), "it is in the network and saves a new state")
        lines = complaints(node)
        for words in (
            f"{key}: expected 32 B, got 5 B", f"{state}: damaged", "'no-such-host.invalid' cannot be resolved",
            f"bootstrap node 127.0.0.1:{dead} does not answer", "UDP port 8468 on 127.0.0.1 is in use",
        ):  # fmt: skip
            assert [words in line for line in lines].count(True) == 1, (words, lines)
        assert len(lines) == 5, lines
        assert state.stat().st_mode & 0o777 == 0o600
    assert key.read_bytes() == b"short"


def test_key_file_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    key = tmp_path / "s" / "node.key"
    key.parent.mkdir()
    key.write_bytes(b"k" * 32)
    key.chmod(0o644)
    with start_node(key.parent, dht=True) as node:
        assert serves(node, tmp_path)
        (line,) = complaints(node)
        assert f"{key}: readable by others" in line
        assert node.node_id != Identity(b"k" * 32).node_id.hex()
    assert key.read_bytes() == b"k" * 32
    assert key.stat().st_mode & 0o777 == 0o644
