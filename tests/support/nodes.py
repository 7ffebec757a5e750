"""Real nodes for tests, the demo and the benches: start `fastcas-node`, wait for its ready line, end it."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

READY = re.compile(
    r"node (?P<id>\S+) ready: data tcp://(?P<host>\S+):(?P<port>\d+) workers=(?P<workers>\d+) "
    r"dht (?:off|udp://(?P<dht_host>\S+):(?P<dht_port>\d+)) storage=(?P<storage>.+) chunks=(?P<chunks>\d+)"
)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_line(stream: IO[bytes], timeout_s: float) -> str:
    """Return the next line of a pipe, or raise TimeoutError; an empty string at its end."""
    deadline = time.monotonic() + timeout_s
    line = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"no line within {timeout_s} s, got {bytes(line)!r}")
            byte = os.read(stream.fileno(), 1)
            if not byte:
                break
            line += byte
    return line.decode()


@dataclass
class Node:
    """One running `fastcas-node` and what its ready line said."""

    process: subprocess.Popen[bytes]
    storage: Path
    node_id: str
    host: str
    port: int
    dht_port: int | None
    log_path: Path
    children: list[int] = field(default_factory=list)

    @property
    def peer(self) -> str:
        """HOST:PORT of the data port."""
        return f"{self.host}:{self.port}"

    def tree(self) -> list[int]:
        """Return the pids of the node's processes: the supervisor first."""
        pids = [self.process.pid]
        for pid in pids:
            try:
                pids += [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            except FileNotFoundError:
                continue
        return pids

    def kill(self) -> None:
        """SIGKILL every process of the node at once, as a power cut would."""
        for pid in self.tree():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)

    def stop(self, timeout_s: float = 35.0) -> int:
        """SIGTERM, wait, return the exit status; SIGKILL if it does not end in time."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            if self.process.stdout:
                self.process.stdout.close()
        return code

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_node(
    storage: Path, *arguments: str, workers: int = 1, dht: bool = False, names_dht_port: bool = True,
    timeout_s: float = 30.0,
) -> Node:  # fmt: skip
    """Start a node on 127.0.0.1 with free ports; return once it accepts connections.

    Args:
        storage: Its folder; the log is in it.
        arguments: More for the command line.
        workers: How many.
        dht: With a DHT process.
        names_dht_port: False leaves the DHT's port to the node's default.
        timeout_s: For the ready line.

    Raises:
        RuntimeError: It ended, or printed something else than the ready line; the message holds its stderr.
    """
    storage.mkdir(parents=True, exist_ok=True)
    log_path = storage / "node.log"
    command = [sys.executable, "-m", "fastcas.cli.node_command", "--host", "127.0.0.1", "--port", "0"]
    command += ["--workers", str(workers), "--storage-dir", str(storage)]
    if not dht:
        command += ["--no-dht"]
    elif names_dht_port:
        command += ["--dht-port", "0"]
    with log_path.open("ab") as log:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        line = read_line(process.stdout, timeout_s)
        match = READY.fullmatch(line.rstrip("\n"))
        if not match:
            raise RuntimeError(f"node in {storage} said {line!r}")
    except (TimeoutError, RuntimeError) as error:
        process.kill()
        process.wait()
        process.stdout.close()
        raise RuntimeError(f"{error}; its log:\n{log_path.read_text()[-4000:]}") from error
    dht_port = int(match["dht_port"]) if match["dht_port"] else None
    return Node(process, storage, match["id"], match["host"], int(match["port"]), dht_port, log_path)


def run_fastcas(*arguments: str, timeout_s: float = 60.0, **popen: object) -> subprocess.CompletedProcess[str]:
    """Run `fastcas …` to its end and return it (stdout and stderr as text)."""
    return subprocess.run(
        [sys.executable, "-m", "fastcas", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False,
        **popen,  # type: ignore[call-overload]
    )  # fmt: skip
