"""The demo: three nodes on this machine, a real file from all three at once, one node killed half-way.

Run it with `make demo`. The file is a tar of the Python installation, filled up with files of /usr until it has
256 MiB, so nothing is downloaded and nothing is random. `run(size)` is also what tests/process/test_demo.py calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.nodes import Node, run_fastcas, start_node

MIB = 1 << 20


@dataclass
class Outcome:
    """What one run of the demo did."""

    size: int
    sha256: str
    seconds: float
    bytes_by_peer: dict[str, int]
    killed: str
    killed_at: float
    identical: bool


def real_files(roots: list[Path]) -> list[Path]:
    """Return the regular files below the roots, sorted, symbolic links left out."""
    found = []
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            found += [p for name in sorted(names) if (p := Path(folder, name)).is_file() and not p.is_symlink()]
    return found


def build_file(target: Path, size: int) -> None:
    """Write a tar of at least `size` bytes of this machine's files."""
    roots = [Path(sysconfig.get_path("stdlib")), Path("/usr/lib"), Path("/usr/bin"), Path("/usr/share")]
    seen: set[tuple[int, int]] = set()
    with tarfile.open(target, "w") as tar:
        for path in real_files(roots):
            try:
                facts = path.stat()
                if (facts.st_dev, facts.st_ino) not in seen:
                    tar.add(path, recursive=False)
            except OSError:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            if tar.offset >= size:
                break
    if target.stat().st_size < size:
        raise SystemExit(f"demo: this machine's files give only {target.stat().st_size} B, need {size} B")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, by Python's own hashlib."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def checked(*arguments: str) -> str:
    """Run `fastcas …`, return its stdout, end the demo if it fails."""
    result = run_fastcas(*arguments, timeout_s=300)
    if result.returncode:
        raise SystemExit(f"demo: fastcas {' '.join(arguments)} ended with {result.returncode}:\n{result.stderr}")
    return result.stdout


def fetch_and_kill(link: str, peers: list[str], out: Path, victim: Node, work: Path) -> tuple[dict, float]:
    """Run `fastcas get --json`, kill the victim when half of the bytes are here; return (final object, share)."""
    command = [sys.executable, "-m", "fastcas", "get", link, "-o", str(out), "--json"]
    command += ["--storage-dir", str(work / "client")]
    for peer in peers:
        command += ["--peer", peer]
    killed_at = -1.0
    errors: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            if not line.startswith('{"progress":'):
                errors.append(line)
                continue
            progress = json.loads(line)["progress"]
            share = progress["done"] / max(progress["total"], 1)
            if killed_at < 0 and share >= 0.5:
                victim.kill()
                killed_at = share
        result = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"demo: fastcas get ended with {process.returncode}:\n{''.join(errors)}")
    return json.loads(result), killed_at


def run(size: int, work: Path) -> Outcome:
    """Do the whole demo with a file of at least `size` bytes in the folder `work`."""
    source = work / "python.tar"
    say(f"building a tar of at least {size // MIB} MiB from files of this machine")
    build_file(source, size)
    digest = sha256_of(source)
    say(f"  {source.stat().st_size} bytes, SHA-256 {digest}")

    nodes: list[Node] = []
    try:
        first = start_node(work / "node1", workers=2, dht=True)
        nodes.append(first)
        boot = ["--bootstrap", f"127.0.0.1:{first.dht_port}"]
        nodes += [start_node(work / f"node{i}", *boot, workers=2, dht=True) for i in (2, 3)]
        for node in nodes:
            say(f"  node {node.node_id[:8]} serves on {node.peer} with 2 workers, DHT on UDP {node.dht_port}")

        stored = checked("store", str(source), "--storage-dir", str(first.storage))
        link = next(line for line in stored.splitlines() if line.startswith("Link: ")).removeprefix("Link: ")
        say(f"stored on the first node: {stored.splitlines()[0]}")
        if digest not in stored:
            raise SystemExit("demo: the stored hash is not the file's SHA-256")
        for node in nodes[1:]:
            copy = node.storage / "copy.tar"
            checked("get", digest, "-o", str(copy), "--storage-dir", str(node.storage))
            say(f"  node {node.node_id[:8]} found it through the DHT by its hash alone and now seeds it")

        say("fetching from all three at once; the second node is killed with SIGKILL half-way")
        out = work / "fetched.tar"
        start = time.monotonic()
        final, killed_at = fetch_and_kill(link, [n.peer for n in nodes], out, nodes[1], work)
        seconds = time.monotonic() - start
        killed = nodes[1].peer
        by_peer = {str(k): int(v) for k, v in final["bytes_by_peer"].items()}
        return Outcome(source.stat().st_size, digest, seconds, by_peer, killed, killed_at, sha256_of(out) == digest)
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.stop()
            elif node.process.stdout:
                node.process.stdout.close()


def main() -> None:
    """Parse the size and run in a temporary folder beside the project, removed at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=256, help="smallest size of the file, MiB")
    work = Path(tempfile.mkdtemp(prefix="fastcas-demo-"))
    try:
        outcome = run(parser.parse_args().mib * MIB, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for peer, count in sorted(outcome.bytes_by_peer.items()):
        note = f"  (killed at {outcome.killed_at:.0%})" if peer == outcome.killed else ""
        say(f"  {count:>12} bytes from {peer}{note}")
    rate = outcome.size / outcome.seconds / 1e6
    say(f"{outcome.size} bytes in {outcome.seconds:.2f} s = {rate:.0f} MB/s, start-up of the command included")
    if outcome.killed_at < 0 or not outcome.identical or len(outcome.bytes_by_peer) != 3:
        raise SystemExit("demo: FAILED: no kill half-way, other bytes, or not from all three peers")
    say(f"byte-identical: SHA-256 {outcome.sha256}")


if __name__ == "__main__":
    main()
