"""What bench/serve.py leaves out: the engine beside a bare loop, two workers, a crowd, idle connections, ranges.

Each row names its target. Sides that are compared take turns under the same load client (bench/load_client.c), medians
over the turns; CPU is utime + stime of the whole process tree of each server. Rows:

    bare      requests per CPU-second, engine ÷ a bare C epoll + sendfile loop (bench/bare_loop.c)
    workers   CPU-seconds per GB with 2 workers ÷ with 1 worker
    crowd     p99 of a 64 KiB GET while 200 other connections download 1 MiB chunks, beside nginx
    idle      growth of a worker's RSS per idle keep-alive connection, and its RSS after start
    ranges    /files with Range over several chunks, beside nginx with the plain file

    python -m bench.serve_more [--rows bare,workers,crowd,idle,ranges] [--turns 5] [--seconds 2] [--idle 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.processes import tree_cpu_s
from bench.serve import Target, build_client, make_chunks, run_load, start_nginx
from tests.support.serve_rig import Rig, manifest_of, wait_until

ROOT = Path(__file__).resolve().parents[1]
KIB, MIB = 1 << 10, 1 << 20
FILE_SIZE = 128 * MIB
RANGE = MIB + 300 * KIB + 77  # touches five to seven chunks of 256 KiB


class Bench:
    """The folder, the load client and the options that all rows share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.client = build_client(folder)

    def subfolder(self, name: str) -> Path:
        """Return a new folder."""
        made = self.folder / name
        made.mkdir(parents=True)
        return made

    def turns(self, targets: list[Target], size: int) -> dict[str, list[dict[str, Any]]]:
        """Load the targets in turn; the figures of each."""
        taken: dict[str, list[dict[str, Any]]] = {target.name: [] for target in targets}
        for target in targets:  # page cache, open files, mappings
            run_load(self.client, target, self.options, 1.0, size)
        for _ in range(self.options.turns):
            for target in targets:
                taken[target.name].append(run_load(self.client, target, self.options, self.options.seconds, size))
        return taken


def median(turns: list[dict[str, Any]], key: str) -> float:
    """Median of one figure."""
    return statistics.median(turn[key] for turn in turns)


def rss_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return a figure of /proc/PID/status, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise ValueError(f"/proc/{pid}/status: no {field}")


def stop(process: subprocess.Popen[Any]) -> None:
    """End a server."""
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


def row_bare(bench: Bench) -> None:
    """Engine and bare loop, 64 KiB and 1 MiB chunks."""
    program = bench.folder / "bare_loop"
    source = ROOT / "bench" / "bare_loop.c"
    subprocess.run(["cc", "-std=c11", "-D_GNU_SOURCE", "-O3", "-o", str(program), str(source)], check=True)
    for size in (64 * KIB, MIB):
        folder = bench.subfolder(f"bare-{size}")
        made = Rig(folder, send_path="auto")
        make_chunks(made.store, folder, folder / "paths", size, 1024)
        made.publish()
        bare = subprocess.Popen([str(program), str(folder / "chunks")], stdout=subprocess.PIPE, text=True)
        try:
            assert bare.stdout is not None
            targets = [
                Target("bare", int(bare.stdout.readline()), bare.pid, folder / "paths"),
                Target("fastcas", made.worker.port, made.worker.process.pid, folder / "paths"),
            ]
            taken = bench.turns(targets, size)
        finally:
            stop(bare)
            made.close()
        ours, theirs = median(taken["fastcas"], "per_cpu_s"), median(taken["bare"], "per_cpu_s")
        print(f"bare     {size:>8} B: fastcas {ours:,.0f}, bare loop {theirs:,.0f} requests per CPU-s = "
              f"{ours / theirs:.2f} (target 0.95)")  # fmt: skip


def workers_cpu_s(made: Rig) -> float:
    """CPU of all workers of a rig."""
    return sum(tree_cpu_s(worker.process.pid) for worker in made.workers)


def row_workers(bench: Bench) -> None:
    """CPU per byte with one worker and with two; the client's connections spread over the listeners."""
    size = 256 * KIB
    folder = bench.subfolder("workers")
    rigs = {n: Rig(bench.subfolder(f"workers/{n}"), workers=n) for n in (1, 2)}
    make_chunks(rigs[1].store, folder, folder / "paths", size, 1024)
    per_gb: dict[int, list[float]] = {1: [], 2: []}
    try:
        for made in rigs.values():
            for worker in made.workers:
                worker.use(rigs[1].store.table)
        for turn in range(bench.options.turns + 1):
            for n, made in rigs.items():
                before = workers_cpu_s(made)
                target = Target(str(n), made.worker.port, made.worker.process.pid, folder / "paths")
                figures = run_load(bench.client, target, bench.options, bench.options.seconds, size)
                if turn:  # the first one warms up
                    per_gb[n].append((workers_cpu_s(made) - before) / (figures["bytes"] / 1e9))
    finally:
        for made in rigs.values():
            made.close()
    one, two = (statistics.median(per_gb[n]) for n in (1, 2))
    print(f"workers  CPU-s per GB: 1 worker {one:.4f}, 2 workers {two:.4f} = {two / one:.2f} (target 1.05)")


def row_crowd(bench: Bench) -> None:
    """Latency of small requests beside a crowd of downloads, for nginx and fastcas in turn."""
    folder = bench.subfolder("crowd")
    made = Rig(bench.subfolder("crowd/rig"))
    small, big = folder / "small", folder / "big"
    make_chunks(made.store, folder, small, 64 * KIB, 1024)
    make_chunks(made.store, folder, big, MIB, 256)
    made.publish()
    nginx, nginx_port = start_nginx(folder, folder)
    p99: dict[str, list[float]] = {"nginx": [], "fastcas": []}
    p50: dict[str, list[float]] = {"nginx": [], "fastcas": []}
    try:
        for _ in range(bench.options.turns):
            for name, port in (("nginx", nginx_port), ("fastcas", made.worker.port)):
                seconds = bench.options.seconds
                crowd = subprocess.Popen(
                    [str(bench.client), str(port), str(big), "200", str(seconds + 1), str(MIB), "1"],
                    stdout=subprocess.DEVNULL,
                )
                time.sleep(0.5)  # the crowd is at work; it stays half a second longer than the measured client
                done = subprocess.run(
                    [str(bench.client), str(port), str(small), "1", str(seconds), str(64 * KIB), "0"],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                crowd.wait(60)
                p99[name].append(json.loads(done.stdout)["p99_us"])
                p50[name].append(json.loads(done.stdout)["p50_us"])
    finally:
        stop(nginx)
        made.close()
    for name in p99:
        print(
            f"crowd    {name}: p50 {statistics.median(p50[name]):,.0f} µs, p99 {statistics.median(p99[name]):,.0f} µs"
        )
    ratio = statistics.median(p99["fastcas"]) / statistics.median(p99["nginx"])
    print(f"crowd    p99 fastcas ÷ nginx = {ratio:.2f} (target 1)")


def row_idle(bench: Bench) -> None:
    """Memory: after start, and per idle connection that has asked once."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    n = min(bench.options.idle, hard - 200)
    made = Rig(bench.subfolder("idle"))
    socks: list[socket.socket] = []
    try:
        digest = made.store.add_chunks(bytes(1000), 1000)[0]
        made.publish()
        pid = made.worker.process.pid
        print(f"idle     RSS of a worker after start: {rss_bytes(pid) / MIB:.1f} MiB "
              f"({rss_bytes(pid, 'RssAnon') / MIB:.1f} MiB its own; target 30 MiB)")  # fmt: skip
        request = f"GET /chunks/{digest.hex()} HTTP/1.1\r\nHost: a\r\n\r\n".encode()

        def connect() -> None:
            sock = socket.create_connection(("127.0.0.1", made.worker.port), 10)
            socks.append(sock)
            sock.sendall(request)
            while len(sock.recv(4096)) < 1000:
                continue

        connect()
        before = rss_bytes(pid)
        while len(socks) < n:
            connect()
        wait_until(lambda: made.worker.count("active") == n, "all are counted")
        growth = (rss_bytes(pid) - before) / (n - 1)
        print(f"idle     growth per idle connection at {n:,}: {growth:,.0f} B (target 2048, stretch 512)")
    finally:
        for sock in socks:
            sock.close()
        made.close()


def row_ranges(bench: Bench) -> None:
    """Ranges over several chunks of a file, against nginx with that file on disk."""
    folder = bench.subfolder("ranges")
    made = Rig(bench.subfolder("ranges/rig"))
    data = random.Random(1).randbytes(FILE_SIZE)
    (folder / "plain.bin").write_bytes(data)
    manifest = manifest_of(data, 256 * KIB)
    blob = made.store.add_blob(data)
    for i in range(FILE_SIZE // (256 * KIB)):
        made.store.table.put_chunk(manifest.hash_of(i), blob, i * 256 * KIB, 256 * KIB)
    made.store.add_manifest(manifest)
    made.store.table.put_file(manifest.file_hash, manifest.manifest_hash)
    made.publish()
    rng = random.Random(2)
    firsts = [rng.randrange(FILE_SIZE - RANGE) for _ in range(1024)]
    for name, target in (("nginx", "/plain.bin"), ("fastcas", f"/files/{manifest.file_hash.hex()}")):
        (folder / name).write_text("".join(f"{target} {first}-{first + RANGE - 1}\n" for first in firsts))
    nginx, nginx_port = start_nginx(folder, folder)
    try:
        targets = [
            Target("nginx", nginx_port, nginx.pid, folder / "nginx"),
            Target("fastcas", made.worker.port, made.worker.process.pid, folder / "fastcas"),
        ]
        taken = bench.turns(targets, RANGE)
    finally:
        stop(nginx)
        made.close()
    for key, what in (("per_cpu_s", "requests per CPU-s"), ("rate_GBps", "GB/s")):
        ours, theirs = median(taken["fastcas"], key), median(taken["nginx"], key)
        print(f"ranges   {what}: fastcas {ours:,.2f}, nginx {theirs:,.2f} = {ours / theirs:.2f} (target 1.0)")


ROWS: dict[str, Callable[[Bench], None]] = {
    "bare": row_bare,
    "workers": row_workers,
    "crowd": row_crowd,
    "idle": row_idle,
    "ranges": row_ranges,
}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), type=lambda text: text.split(","))
    parser.add_argument("--turns", default=5, type=int)
    parser.add_argument("--seconds", default=2.0, type=float, help="per turn and server")
    parser.add_argument("--connections", default=16, type=int)
    parser.add_argument("--idle", default=10_000, type=int, help="idle connections")
    parser.add_argument("--discard", action="store_true", help="the client lets the kernel drop the bodies")
    options = parser.parse_args()
    if shutil.which("nginx") is None:
        raise SystemExit("bench: nginx is not installed")
    print(f"{time.strftime('%Y-%m-%d')} · {os.cpu_count()} cores, Linux {os.uname().release}")
    for name in options.rows:
        with tempfile.TemporaryDirectory(prefix="fastcas-bench-") as folder:
            ROWS[name](Bench(options, Path(folder)))


if __name__ == "__main__":
    main()
