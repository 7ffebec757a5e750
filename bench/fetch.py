"""How fast does one client get one file from one node, to disk and verified, and what does it cost both sides?

One run, interleaved: each turn fetches the same file over loopback by every way, in an order drawn anew; medians
over the turns. Wall time is that of the whole client process, start to end, with the file verified and on its place
(`curl` verifies nothing, so `sha256sum` follows it). CPU is utime + stime of all processes of each side per GB.

    fastcas link / hash   node with one worker, `fastcas get`; the file is fsynced
    libtorrent            seed -> leech, pip install libtorrent
    aria2                 from nginx (one worker, sendfile), --checksum, 4 connections
    curl + sha256sum      from the same nginx

    python -m bench.fetch [--size 1G] [--turns 3] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.processes import tree_cpu_s

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}

LIBTORRENT = r"""
import sys, time
import libtorrent as lt
role, torrent, folder, port, seed_port = sys.argv[1:6]
session = lt.session({"listen_interfaces": f"127.0.0.1:{port}", "enable_dht": False, "enable_lsd": False,
    "enable_upnp": False, "enable_natpmp": False, "enable_incoming_utp": False, "enable_outgoing_utp": False,
    "allow_multiple_connections_per_ip": True})
params = lt.add_torrent_params()
params.ti = lt.torrent_info(torrent)
params.save_path = folder
if role == "seed":
    params.flags |= lt.torrent_flags.seed_mode
handle = session.add_torrent(params)
if role == "seed":
    print("ready", flush=True)
    time.sleep(3600)
handle.connect_peer(("127.0.0.1", int(seed_port)))
while not handle.status().is_seeding:
    time.sleep(0.005)
session.remove_torrent(handle)
"""


@dataclass
class Way:
    """One way to get the file: how, and which server process answers."""

    name: str
    server_pid: int
    get: Callable[[Path], list[list[str]]]


@dataclass
class Sample:
    """One fetch: wall seconds, CPU seconds per GB of both sides."""

    wall_s: float
    client_s_per_gb: float
    server_s_per_gb: float


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_port(port: int) -> None:
    """Return when something listens on the port."""
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise SystemExit(f"bench: nothing listens on {port}") from None
            time.sleep(0.05)


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=ENV)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_file(path: Path, size: int) -> str:
    """Write `size` incompressible bytes; return their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for at in range(0, size, 1 << 20):
            block = os.urandom(min(1 << 20, size - at))
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextlib.contextmanager
def fastcas_ways(source: Path, work: Path) -> Iterator[list[Way]]:
    """A node with one worker that has the file in place."""
    fastcas = [sys.executable, "-m", "fastcas"]
    store = work / "store"
    out = subprocess.run(
        [*fastcas, "store", str(source), "--in-place", "--storage-dir", str(store), "--json"],
        check=True, stdout=subprocess.PIPE, env=ENV,
    ).stdout  # fmt: skip
    stored = json.loads(out.splitlines()[-1])
    port = free_port()
    start = "import sys; from fastcas.cli.node_command import main; sys.argv[0] = 'fastcas-node'; main()"
    command = [sys.executable, "-c", start, "--workers", "1", "--host", "127.0.0.1", "--port", str(port), "--no-dht",
               "--storage-dir", str(store)]  # fmt: skip

    def get(ref: str) -> Callable[[Path], list[list[str]]]:
        extra = ["--peer", f"127.0.0.1:{port}", "--storage-dir", str(work / "nothing")]
        return lambda target: [[*fastcas, "get", ref, "-o", str(target), *extra]]

    with running(command, work / "node.log") as node:
        wait_port(port)
        yield [
            Way("fastcas link", node.pid, get(stored["link"])),
            Way("fastcas hash", node.pid, get(stored["file_hash"])),
        ]


@contextlib.contextmanager
def libtorrent_ways(source: Path, work: Path) -> Iterator[list[Way]]:
    """A libtorrent seed."""
    try:
        import libtorrent as lt
    except ImportError:
        print("libtorrent: not installed (pip install libtorrent), left out")
        yield []
        return
    torrent = work / "file.torrent"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        files = lt.file_storage()
        lt.add_files(files, str(source))
        creator = lt.create_torrent(files)
        lt.set_piece_hashes(creator, str(source.parent))
        torrent.write_bytes(lt.bencode(creator.generate()))
    script = work / "torrent.py"
    script.write_text(LIBTORRENT)
    seed_port, leech_port = free_port(), free_port()
    command = [sys.executable, str(script), "seed", str(torrent), str(source.parent), str(seed_port), "0"]

    def get(target: Path) -> list[list[str]]:
        folder = target.with_name(target.name + ".d")
        folder.mkdir()
        return [[sys.executable, str(script), "leech", str(torrent), str(folder), str(leech_port), str(seed_port)]]

    with running(command, work / "seed.log") as seed:
        wait_port(seed_port)
        yield [Way("libtorrent", seed.pid, get)]


@contextlib.contextmanager
def nginx_ways(source: Path, work: Path, sha256: str) -> Iterator[list[Way]]:
    """An nginx with one worker, and the two clients that use it."""
    if shutil.which("nginx") is None:
        print("nginx: not installed, aria2 and curl are left out")
        yield []
        return
    port = free_port()
    config = work / "nginx.conf"
    config.write_text(
        f"""user root; worker_processes 1; daemon off; pid {work}/nginx.pid; error_log {work}/nginx.err warn;
        events {{ worker_connections 1024; }}
        http {{ access_log off; sendfile on; tcp_nopush on; open_file_cache max=10;
          server {{ listen 127.0.0.1:{port}; root {source.parent}; }} }}"""
    )
    url = f"http://127.0.0.1:{port}/{source.name}"

    def aria2(target: Path) -> list[list[str]]:
        return [["aria2c", "-q", "-x", "4", "-s", "4", "--file-allocation=none", f"--checksum=sha-256={sha256}",
                 "-d", str(target.parent), "-o", target.name, url]]  # fmt: skip

    def curl(target: Path) -> list[list[str]]:
        return [["curl", "-s", "-o", str(target), url], ["sha256sum", str(target)]]

    with running(["nginx", "-c", str(config), "-p", str(work)], work / "nginx.log") as nginx:
        wait_port(port)
        ways = [Way("curl + sha256sum", nginx.pid, curl)]
        if shutil.which("aria2c"):
            ways.append(Way("aria2", nginx.pid, aria2))
        yield ways


def touch_memory(target: Path, size: int) -> None:
    """Fill the page cache with a file of this size and drop it: nobody pays for the hypervisor's first touch."""
    warm = target.with_name("warm")
    block = bytes(1 << 20)
    with warm.open("wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    os.sync()
    warm.unlink()


def measure(way: Way, target: Path, size: int) -> Sample:
    """Fetch once by one way into an empty place."""
    commands = way.get(target)
    touch_memory(target, size)
    server_before = tree_cpu_s(way.server_pid)
    before = os.times()
    started = time.perf_counter()
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
        if done.returncode:
            raise SystemExit(f"bench: {way.name}: exit {done.returncode}: {done.stderr.strip()}")
    wall = time.perf_counter() - started
    after = os.times()
    client = after.children_user + after.children_system - before.children_user - before.children_system
    server = tree_cpu_s(way.server_pid) - server_before
    found = next(target.with_name(target.name + ".d").iterdir()) if not target.exists() else target
    if found.stat().st_size != size:
        raise SystemExit(f"bench: {way.name}: {found} has {found.stat().st_size} B, expected {size} B")
    shutil.rmtree(target.with_name(target.name + ".d"), ignore_errors=True)
    target.unlink(missing_ok=True)
    return Sample(wall, client / (size / 1e9), server / (size / 1e9))


def report(samples: dict[str, list[Sample]], size: int) -> dict[str, dict[str, float]]:
    """Print the table; return its rows."""
    rows: dict[str, dict[str, float]] = {}
    for name, found in samples.items():
        rows[name] = {
            "wall_s": statistics.median(s.wall_s for s in found),
            "client_cpu_s_per_gb": statistics.median(s.client_s_per_gb for s in found),
            "server_cpu_s_per_gb": statistics.median(s.server_s_per_gb for s in found),
        }
    ours = rows["fastcas link"]["wall_s"]
    print(f"\n{'':<18}{'wall s':>8}{'GB/s':>8}{'client CPU-s/GB':>17}{'server CPU-s/GB':>17}{'link is faster by':>19}")
    for name, row in rows.items():
        print(
            f"{name:<18}{row['wall_s']:>8.2f}{size / row['wall_s'] / 1e9:>8.3f}{row['client_cpu_s_per_gb']:>17.2f}"
            f"{row['server_cpu_s_per_gb']:>17.2f}{row['wall_s'] / ours:>18.2f}×"
        )
    return rows


def main() -> None:
    """Run the comparison."""
    sys.path.insert(0, str(ROOT))
    from fastcas.ids import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the temporary folder)")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fastcas-bench-", dir=options.folder))
    try:
        source = work / "source" / "file.bin"
        source.parent.mkdir()
        sha256 = make_file(source, options.size)
        with contextlib.ExitStack() as stack:
            ways = stack.enter_context(fastcas_ways(source, work))
            ways += stack.enter_context(libtorrent_ways(source, work))
            ways += stack.enter_context(nginx_ways(source, work, sha256))
            samples: dict[str, list[Sample]] = {way.name: [] for way in ways}
            for turn in range(options.turns):
                for way in random.Random(turn).sample(ways, len(ways)):
                    sample = measure(way, work / f"out-{turn}", options.size)
                    samples[way.name].append(sample)
                    print(f"turn {turn + 1} {way.name:<18} {sample.wall_s:7.2f} s", flush=True)
            rows = report(samples, options.size)
        if options.json is not None:
            options.json.write_text(json.dumps({"size": options.size, "turns": options.turns, "rows": rows}, indent=1))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
