"""How fast does one client get one file from one node, to disk and verified, and what does it cost both sides?

One run, interleaved: each turn fetches the same file over loopback by every way, in an order drawn anew; medians
over the turns. Wall time is that of the whole client process, start to end, with the file verified and on its place
(`curl` verifies nothing, so `sha256sum` follows it). CPU is utime + stime of all processes of each side per GB.

    fastcas link / hash   node with one worker, `fastcas get`; the file is fsynced
    libtorrent            seed -> leech, pip install libtorrent
    aria2                 from nginx (one worker, sendfile), --checksum, 4 connections
    curl + sha256sum      from the same nginx
    curl                  `-o` alone: verifies nothing

Then by link: the time from the start of the download in a running interpreter to the first verified chunk (median of
five), and with --huge the peak memory of one client that fetches a file of that size. Targets are printed with what
was measured. Ways through the page cache are not fsynced by others; fastcas is.

    python -m bench.fetch [--size 1G] [--turns 3] [--huge 20G] [--folder DIR] [--json FILE]
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
# As where the package is installed: its bytecode is compiled once, whatever this shell says.
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENV["PYTHONPATH"] = str(ROOT)

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


FIRST_CHUNK = r"""
import asyncio, sys, tempfile, time
from pathlib import Path
import fastcas.fetch.filefetch  # start-up: what a running program has loaded
from fastcas.fetch.download import download
from fastcas.ids import parse_peer, parse_ref

class Hooks:
    def on_manifest(self, manifest, part_path): pass
    def on_finished(self, path, manifest, content_proven): pass
    def on_tree(self, tree): pass
    def on_chunk(self, index):
        self.ms = self.ms or (time.perf_counter() - self.started) * 1e3
        self.task.cancel()

async def once(link, peer, folder):
    hooks = Hooks()
    hooks.ms, hooks.task, hooks.started = 0.0, asyncio.current_task(), time.perf_counter()
    try:
        await download(link, Path(folder) / "out", discovery=None, peers=[peer], hooks=hooks)
    except asyncio.CancelledError:
        hooks.task.uncancel()
    return hooks.ms

with tempfile.TemporaryDirectory(dir=sys.argv[3]) as folder:
    print(asyncio.run(once(parse_ref(sys.argv[1]), parse_peer(sys.argv[2]), folder)))
"""

FIRST_CHUNK_RUNS = 5


@dataclass
class Way:
    """One way to get the file: how, and which server process answers."""

    name: str
    server_pid: int
    get: Callable[[Path], list[list[str]]]


@dataclass
class Sample:
    """One fetch: wall seconds, CPU seconds per GB of both sides, the client's peak memory."""

    wall_s: float
    client_s_per_gb: float
    server_s_per_gb: float
    rss_mib: float


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
def fastcas_ways(source: Path, work: Path) -> Iterator[tuple[list[Way], str, int]]:
    """A node with one worker that has the file in place; also the link and the node's port."""
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
        ways = [
            Way("fastcas link", node.pid, get(stored["link"])),
            Way("fastcas hash", node.pid, get(stored["file_hash"])),
        ]
        yield ways, str(stored["link"]), port


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
        ways = [
            Way("curl + sha256sum", nginx.pid, curl),
            Way("curl", nginx.pid, lambda target: curl(target)[:1]),
        ]
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


def measure(way: Way, target: Path, size: int, *, warm: bool = True) -> Sample:
    """Fetch once by one way into an empty place."""
    commands = way.get(target)
    if warm:
        touch_memory(target, size)
    server_before = tree_cpu_s(way.server_pid)
    before = os.times()
    started = time.perf_counter()
    rss = 0
    for command in commands:
        with tempfile.TemporaryFile("w+") as said:
            client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=ENV)
            _, status, usage = os.wait4(client.pid, 0)
            client.returncode = os.waitstatus_to_exitcode(status)
            rss = max(rss, usage.ru_maxrss)
            if client.returncode:
                said.seek(0)
                raise SystemExit(f"bench: {way.name}: exit {client.returncode}: {said.read().strip()}")
    wall = time.perf_counter() - started
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    server = tree_cpu_s(way.server_pid) - server_before
    found = next(target.with_name(target.name + ".d").iterdir()) if not target.exists() else target
    if found.stat().st_size != size:
        raise SystemExit(f"bench: {way.name}: {found} has {found.stat().st_size} B, expected {size} B")
    shutil.rmtree(target.with_name(target.name + ".d"), ignore_errors=True)
    target.unlink(missing_ok=True)
    return Sample(wall, cpu / (size / 1e9), server / (size / 1e9), rss / 1024)


def first_chunk_ms(link: str, port: int, folder: Path) -> float:
    """Median milliseconds from the start of a download to its first verified chunk."""
    command = [sys.executable, "-c", FIRST_CHUNK, link, f"127.0.0.1:{port}", str(folder)]
    runs = [
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=ENV).stdout for _ in range(FIRST_CHUNK_RUNS)
    ]
    return statistics.median(float(out) for out in runs)


def huge_rss_mib(size: int, work: Path) -> float:
    """Peak memory of a client that fetches a sparse file of `size` bytes by link, MiB."""
    source = work / "huge" / "file.bin"
    source.parent.mkdir()
    with source.open("wb") as file:
        file.truncate(size)
    with fastcas_ways(source, work / "huge") as (ways, _, _):
        sample = measure(ways[0], work / "huge-out", size, warm=False)
    print(f"{size / (1 << 30):.0f} GiB by link: {sample.wall_s:.1f} s, peak {sample.rss_mib:.0f} MiB", flush=True)
    return sample.rss_mib


def verdicts(rows: dict[str, dict[str, float]], first_ms: float, huge_mib: float | None) -> None:
    """Print each target with what was measured."""
    link, bare = rows["fastcas link"], rows["fastcas hash"]

    def say(what: str, value: float, target: float, *, at_most: bool = False) -> None:
        met = value <= target if at_most else value >= target
        print(f"{what:<52}{value:>8.2f}  {'at most' if at_most else 'at least':<9}{target:>7.2f}  "
              f"{'met' if met else 'MISSED'}")  # fmt: skip

    print()
    for name, target in (("libtorrent", 4.0), ("aria2", 5.0), ("curl + sha256sum", 4.0), ("curl", 1.2)):
        if name in rows:
            say(f"wall: by link faster than {name} by", rows[name]["wall_s"] / link["wall_s"], target)
    if "libtorrent" in rows:
        base = rows["libtorrent"]["client_cpu_s_per_gb"]
        say("client CPU per GB ÷ libtorrent's, by link", link["client_cpu_s_per_gb"] / base, 0.28, at_most=True)
        say("client CPU per GB ÷ libtorrent's, by hash", bare["client_cpu_s_per_gb"] / base, 0.4, at_most=True)
    say("peak memory of the client, MiB", max(link["rss_mib"], bare["rss_mib"]), 128, at_most=True)
    if huge_mib is not None:
        say("peak memory of the client, huge file, MiB", huge_mib, 128, at_most=True)
    say("first verified chunk, ms", first_ms, 50, at_most=True)


def report(samples: dict[str, list[Sample]], size: int) -> dict[str, dict[str, float]]:
    """Print the table; return its rows."""
    rows: dict[str, dict[str, float]] = {}
    for name, found in samples.items():
        rows[name] = {
            "wall_s": statistics.median(s.wall_s for s in found),
            "client_cpu_s_per_gb": statistics.median(s.client_s_per_gb for s in found),
            "server_cpu_s_per_gb": statistics.median(s.server_s_per_gb for s in found),
            "rss_mib": max(s.rss_mib for s in found),
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
    parser.add_argument("--huge", type=parse_size, default=None, help="peak memory for one file of this size, too")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the temporary folder)")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fastcas-bench-", dir=options.folder))
    try:
        source = work / "source" / "file.bin"
        source.parent.mkdir()
        sha256 = make_file(source, options.size)
        with contextlib.ExitStack() as stack:
            ways, link, port = stack.enter_context(fastcas_ways(source, work))
            ways += stack.enter_context(libtorrent_ways(source, work))
            ways += stack.enter_context(nginx_ways(source, work, sha256))
            samples: dict[str, list[Sample]] = {way.name: [] for way in ways}
            for turn in range(options.turns):
                for way in random.Random(turn).sample(ways, len(ways)):
                    sample = measure(way, work / f"out-{turn}", options.size)
                    samples[way.name].append(sample)
                    print(f"turn {turn + 1} {way.name:<18} {sample.wall_s:7.2f} s", flush=True)
            rows = report(samples, options.size)
            first_ms = first_chunk_ms(link, port, work)
        source.unlink()
        huge = huge_rss_mib(options.huge, work) if options.huge else None
        verdicts(rows, first_ms, huge)
        if options.json is not None:
            options.json.write_text(json.dumps({"size": options.size, "turns": options.turns, "rows": rows}, indent=1))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
