"""How many requests does one worker answer per CPU-second, next to nginx with one worker?

One run, interleaved: for each chunk size nginx, fastcas `auto` and fastcas `sendfile` take turns under the same load
client (bench/load_client.c); medians over the turns. At least 1,000 distinct chunks each, all in the page cache. CPU
is utime + stime of the whole process tree of each server. nginx: sendfile, tcp_nopush, open_file_cache, no access
log. Prints both figures and the ratio.

    python -m bench.serve [--sizes 4K,64K,1M] [--turns 5] [--seconds 2] [--connections 16] [--json FILE]
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import tree_cpu_s
from fastcas.ids import parse_size
from tests.support.serve_rig import BlobStore, Rig

ROOT = Path(__file__).resolve().parents[1]
BLOB_BYTES = 64 << 20


@dataclass
class Target:
    """One server under test: where it listens and which processes are it."""

    name: str
    port: int
    pid: int
    paths: Path


def build_client(folder: Path) -> Path:
    """Compile the load client."""
    out = folder / "load_client"
    source = ROOT / "bench" / "load_client.c"
    subprocess.run(["cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-o", str(out), str(source)], check=True)
    return out


def run_load(client: Path, target: Target, options: argparse.Namespace, seconds: float, size: int) -> dict[str, Any]:
    """Load one target; return the client's figures with the server's CPU."""
    before = tree_cpu_s(target.pid)
    done = subprocess.run(
        [str(client), str(target.port), str(target.paths), str(options.connections), str(seconds), str(size),
         str(int(options.discard))],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout)
    figures["cpu_s"] = tree_cpu_s(target.pid) - before
    figures["per_cpu_s"] = figures["requests"] / figures["cpu_s"]
    figures["rate_GBps"] = figures["bytes"] / figures["seconds"] / 1e9
    return figures


def free_port() -> int:
    """Return a TCP port that is free at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def start_nginx(folder: Path, root: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start nginx with one worker; return it and its port."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log warn;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 20000; }}
        http {{
            sendfile on; tcp_nopush on; tcp_nodelay on; access_log off; default_type application/octet-stream;
            keepalive_timeout 60; keepalive_requests 1000000000; etag on;
            open_file_cache max=20000 inactive=600s; open_file_cache_valid 600s; open_file_cache_min_uses 1;
            server {{ listen 127.0.0.1:{port}; root {root}; }}
        }}
        """
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(folder)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("bench: nginx did not start") from None
            time.sleep(0.02)


def make_chunks(store: BlobStore, root: Path, paths: Path, size: int, n: int) -> None:
    """Store n chunks of `size` bytes, for fastcas as blobs of 64 MiB, for nginx as a file each."""
    rng = random.Random(size)
    per_blob = max(BLOB_BYTES // size, 1)
    (root / "chunks").mkdir(exist_ok=True)
    names = []
    for first in range(0, n, per_blob):
        data = rng.randbytes(size * min(per_blob, n - first))
        for digest in store.add_chunks(data, size):
            (root / "chunks" / digest.hex()).write_bytes(store.chunks.pop(digest))
            names.append(f"/chunks/{digest.hex()}")
    rng.shuffle(names)
    paths.write_text("".join(f"{name}\n" for name in names))


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run everything; return one row per (size, server)."""
    client = build_client(folder)
    root = folder / "nginx"
    root.mkdir()
    rigs = {}
    for mode in arguments.modes:
        (folder / mode).mkdir()
        rigs[mode] = Rig(folder / mode, send_path=mode)
    store = rigs[arguments.modes[0]].store
    nginx, nginx_port = start_nginx(folder, root)
    rows = []
    try:
        for number, size in enumerate(arguments.sizes, 1):
            paths = folder / f"paths-{size}"
            make_chunks(store, root, paths, size, arguments.chunks)
            for made in rigs.values():
                made.worker.use(store.table, number)
            targets = [Target("nginx", nginx_port, nginx.pid, paths)]
            targets += [Target(f"fastcas {m}", r.worker.port, r.worker.process.pid, paths) for m, r in rigs.items()]
            for target in targets:  # page cache, open files, mappings
                run_load(client, target, arguments, 1.0, size)
            turns: dict[str, list[dict[str, Any]]] = {target.name: [] for target in targets}
            for _ in range(arguments.turns):
                for target in targets:
                    turns[target.name].append(run_load(client, target, arguments, arguments.seconds, size))
            rows += [summary(size, name, taken) for name, taken in turns.items()]
    finally:
        nginx.send_signal(signal.SIGTERM)
        nginx.wait(10)
        for made in rigs.values():
            made.close()
    return rows


def summary(size: int, name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one server's turns."""
    row: dict[str, Any] = {"size": size, "server": name}
    for key in ("per_cpu_s", "rate_GBps", "p99_us"):
        row[key] = statistics.median(turn[key] for turn in turns)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table: figures of both sides and the ratio."""
    print(
        f"{'chunk':>9}  {'server':<17} {'requests/CPU-s':>14} {'vs nginx':>9} {'GB/s':>7} {'vs nginx':>9} {'p99 µs':>8}"
    )
    base: dict[str, Any] = {}
    for row in rows:
        if row["server"] == "nginx":
            base = row
        print(
            f"{row['size']:>9}  {row['server']:<17} {row['per_cpu_s']:>14,.0f} "
            f"{row['per_cpu_s'] / base['per_cpu_s']:>8.2f}× {row['rate_GBps']:>7.2f} "
            f"{row['rate_GBps'] / base['rate_GBps']:>8.2f}× {row['p99_us']:>8.0f}"
        )


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4K,64K,1M", type=lambda text: [parse_size(s) for s in text.split(",")])
    parser.add_argument("--chunks", default=1024, type=int, help="distinct chunks per size")
    parser.add_argument("--turns", default=5, type=int)
    parser.add_argument("--seconds", default=2.0, type=float, help="per turn and server")
    parser.add_argument("--connections", default=16, type=int)
    parser.add_argument("--discard", action="store_true", help="the client lets the kernel drop the bodies")
    parser.add_argument("--modes", default="auto,sendfile", type=lambda text: text.split(","), help="send paths")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if shutil.which("nginx") is None:
        raise SystemExit("bench: nginx is not installed")
    with tempfile.TemporaryDirectory(prefix="fastcas-bench-") as folder:
        rows = measure(arguments, Path(folder))
    machine = f"{os.cpu_count()} cores, Linux {os.uname().release}, Python {sys.version.split()[0]}"
    run_id = hashlib.sha256(repr(rows).encode()).hexdigest()[:8]
    print(f"{time.strftime('%Y-%m-%d')} · {machine} · {arguments.connections} connections · run {run_id}")
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
