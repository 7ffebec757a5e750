"""How fast is storing, beside `openssl dgst` and `cp`, and how fast is a node with a million chunks up again?

One run, interleaved: each turn runs every contender once, in turn; medians over the turns. The files are in the page
cache. Times are those of whole processes; `fastcas` is the real command with a new storage folder each time. Its
start-up (storing an empty file in the same way) is measured beside it, printed apart, and taken off before a ratio is
formed; the ratio with it stands in brackets. openssl computes one digest, fastcas two and the midstates.

    in place, one core    both on CPU 0 (taskset), one file
    in place, all cores   openssl on CPU 0 as before, fastcas free
    many files in place   a folder of 4 MiB files; openssl gets all of them in one command, on CPU 0
    copy                  cp, then sync of the copy, then openssl dgst of it; fastcas makes the same durable
    small files           a folder of 4 KiB files; files per second, start-up included
    start-up              a node whose catalog has 1,000,000 chunks: from exec to the first chunk over HTTP

    python -m bench.ingest [--size 1G] [--turns 5] [--files 100000] [--only in-place,copy,small,start] [--folder DIR]

With --files 1000000 the folder is fetched again from a node, too: time and peak memory of both commands.
Needs: openssl, coreutils, util-linux; twice the size, and 4 KiB per file, of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.interleaved import cpu_name
from fastcas.ids import parse_size
from fastcas.metadata import Manifest
from fastcas.store import Store
from fastcas.table import TableOwner
from tests.support.nodes import start_node

MIB = 1 << 20
FASTCAS = [sys.executable, "-m", "fastcas"]
ENV = os.environ | {"FASTCAS_LOG": "ERROR", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
MANY_B, SMALL_B, CHUNK_B = 4 * MIB, 4096, 16384
MILLION, PER_FILE = 1_000_000, 200_000


@dataclass(frozen=True, slots=True)
class Ran:
    """One finished process: wall seconds, peak resident bytes of it alone, what it printed."""

    seconds: float
    peak_B: int
    out: str


def run(command: list[str]) -> Ran:
    """Run a command that must succeed."""
    with tempfile.TemporaryFile() as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=ENV)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise SystemExit(f"bench: {' '.join(command)[:200]}: exit {process.returncode}")
    return Ran(seconds, usage.ru_maxrss << 10, text)


class Bench:
    """The folder of one run, and what was missed."""

    def __init__(self, work: Path, turns: int) -> None:
        self.work, self.turns = work, turns
        self.missed: list[str] = []
        self.empty = work / "empty"
        self.empty.touch()

    def store(self, path: Path, *options: str, pin: bool = False) -> Ran:
        """Store into a new folder."""
        shutil.rmtree(self.work / "store", ignore_errors=True)
        pinned = ["taskset", "-c", "0"] if pin else []
        return run(
            [*pinned, *FASTCAS, "store", str(path), "--storage-dir", str(self.work / "store"), "--json", *options]
        )

    def medians(self, contenders: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Run every contender once per turn, after one turn that does not count."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(self.turns + 1):
            for name, once in contenders.items():
                seconds = once()
                if turn:
                    times[name].append(seconds)
        return {name: statistics.median(values) for name, values in times.items()}

    def row(self, name: str, shown: str, value: float, must: float, *, at_most: bool = False) -> None:
        """Print one figure and whether it is reached."""
        met = value <= must if at_most else value >= must
        if not met:
            self.missed.append(name)
        print(f"  {name:28} {shown:64} must be {'<=' if at_most else '>='} {must:g}{'' if met else '  MISSED'}")

    def ratio(self, name: str, theirs: float, whole: float, start: float, n_bytes: int, must: float) -> None:
        """Print how many times as fast fastcas is, without and with its start-up."""
        ours = whole - start
        self.row(
            name,
            f"{theirs / ours:5.2f}x ({theirs / whole:.2f}x with start-up of {start:.2f} s)"
            f"  {n_bytes / ours / 1e9:.2f} : {n_bytes / theirs / 1e9:.2f} GB/s",
            theirs / ours, must,
        )  # fmt: skip


def in_place(bench: Bench, size: int) -> None:
    """One file, and many, hashed where they lie; and one copied."""
    one, folder = bench.work / "one", bench.work / "many"
    folder.mkdir()
    write_random(one, size)
    many = [folder / f"{i:04}" for i in range(max(2, size // MANY_B))]
    for path in many:
        write_random(path, MANY_B)
    os.sync()
    digest = ["taskset", "-c", "0", "openssl", "dgst", "-sha256"]
    seconds = bench.medians(
        {
            "openssl": lambda: run([*digest, str(one)]).seconds,
            "one core": lambda: bench.store(one, "--in-place", pin=True).seconds,
            "all cores": lambda: bench.store(one, "--in-place").seconds,
            "openssl many": lambda: run([*digest, *map(str, many)]).seconds,
            "many": lambda: bench.store(folder, "--in-place").seconds,
            "start, one core": lambda: bench.store(bench.empty, "--in-place", pin=True).seconds,
            "start": lambda: bench.store(bench.empty, "--in-place").seconds,
        }
    )
    theirs, start = seconds["openssl"], seconds["start"]
    bench.ratio("in place, one core", theirs, seconds["one core"], seconds["start, one core"], size, 0.85)
    bench.ratio("in place, all cores", theirs, seconds["all cores"], start, size, 0.95)
    bench.ratio("many files in place", seconds["openssl many"], seconds["many"], start, len(many) * MANY_B, 1.6)
    shutil.rmtree(folder)
    one.unlink()


def copy(bench: Bench, size: int) -> None:
    """One file copied, made durable and hashed."""
    one, other = bench.work / "one", bench.work / "copy"
    write_random(one, size)
    os.sync()

    def by_hand() -> float:
        other.unlink(missing_ok=True)
        steps = (["cp", str(one), str(other)], ["sync", str(other)], ["openssl", "dgst", "-sha256", str(other)])
        return sum(run(step).seconds for step in steps)

    seconds = bench.medians(
        {
            "by hand": by_hand,
            "fastcas": lambda: bench.store(one).seconds,
            "start": lambda: bench.store(bench.empty).seconds,
        }
    )
    bench.ratio("copy", seconds["by hand"], seconds["fastcas"], seconds["start"], size, 1.5)
    one.unlink()
    other.unlink()


def small(bench: Bench, n_files: int) -> None:
    """A folder of small files; a large one is fetched again."""
    folder = bench.work / "small"
    rng = random.Random(1)
    for i in range(n_files):
        parent = folder / f"{i // 1000:04}"
        if i % 1000 == 0:
            parent.mkdir(parents=True)
        (parent / f"{i:07}").write_bytes(rng.randbytes(SMALL_B))
    os.sync()
    runs = [bench.store(folder) for _ in range(1 if n_files >= MILLION else bench.turns)]
    seconds = statistics.median(ran.seconds for ran in runs)
    stored = json.loads(runs[-1].out)
    rate = n_files / seconds
    bench.row("small files", f"{n_files:,} of 4 KiB in {seconds:.2f} s: {rate:,.0f} files/s, peak"
              f" {max(ran.peak_B for ran in runs) / MIB:.0f} MiB", rate, 20_000)  # fmt: skip
    if n_files < MILLION:
        shutil.rmtree(folder)
        return
    with Store.open(bench.work / "store") as opened:
        manifest = opened.manifest(bytes.fromhex(stored["manifest_hash"]))
        assert manifest is not None
        print(f"  the collection itself: {manifest.size / MIB:.1f} MiB, {manifest.size / n_files:.0f} B per file")
    with start_node(bench.work / "store", timeout_s=120) as node:
        got = run([*FASTCAS, "get", stored["link"], "-o", str(bench.work / "again"), "--peer", node.peer,
                   "--storage-dir", str(bench.work / "none"), "--json"])  # fmt: skip
    print(
        f"  fetched again: {got.seconds:.1f} s, {n_files / got.seconds:,.0f} files/s, peak {got.peak_B / MIB:.0f} MiB"
    )
    if subprocess.run(["diff", "-rq", str(folder), str(bench.work / "again")], check=False).returncode:
        raise SystemExit("bench: what was fetched differs")
    shutil.rmtree(folder)
    shutil.rmtree(bench.work / "again")


def start(bench: Bench) -> None:
    """A node with a million chunks: its catalog is filled as a download fills it, with files that are holes."""
    folder = bench.work / "million"
    zeros = hashlib.sha256(bytes(CHUNK_B)).digest()
    with Store.open(folder / "store", create=True) as store:
        for i in range(MILLION // PER_FILE):
            path = folder / f"file{i}"
            with path.open("wb") as file:
                file.truncate(CHUNK_B * PER_FILE)
            hashes = (zeros if i == 0 else b"") + os.urandom(32 * (PER_FILE - (i == 0)))
            manifest = Manifest(
                os.urandom(32), CHUNK_B * PER_FILE, CHUNK_B, hashes, os.urandom(32 * (PER_FILE - 1)), 0, 0, b""
            )
            store.register_linked(path, manifest, path.name, verified=True)
    times, supervisors = [], []
    for _ in range(bench.turns):
        began = time.perf_counter()
        with start_node(folder / "store", timeout_s=120) as node:
            url = f"http://{node.peer}/chunks/{zeros.hex()}"
            with urllib.request.urlopen(url) as answer:
                body = answer.read()
            times.append(time.perf_counter() - began)
            status = Path(f"/proc/{node.process.pid}/status").read_text()
            supervisors.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        if body != bytes(CHUNK_B):
            raise SystemExit("bench: the node sent something else")
    seconds = statistics.median(times)
    bench.row("start-up, 1,000,000 chunks", f"{seconds:.2f} s from exec to the first chunk (largest {max(times):.2f})",
              seconds, 3.0, at_most=True)  # fmt: skip
    bench.row("supervisor, the same", f"{max(supervisors):.0f} MiB peak", max(supervisors), 150, at_most=True)
    shutil.rmtree(folder)
    table_memory(bench)


def table_memory(bench: Bench) -> None:
    """Bytes of table per chunk while one grows chunk by chunk: mean over the sizes, and the worst."""
    per_chunk = []
    owner = TableOwner()
    for n in range(1, 1 << 20):
        owner.put_chunk(os.urandom(32), 1, n, 1)
        if n >= 1 << 16 and n % 64 == 0:
            per_chunk.append(os.fstat(owner.fd).st_size / n)
    owner.close()
    typical, worst = statistics.median(per_chunk), max(per_chunk)
    bench.row("table, typical", f"{typical:.1f} B per chunk, median over growth to 2^20", typical, 64, at_most=True)
    bench.row("table, worst", f"{worst:.1f} B per chunk", worst, 128, at_most=True)


def write_random(path: Path, size: int) -> None:
    """Make a file of bytes that cannot be shared."""
    with path.open("wb") as file:
        for at in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - at)))


def main() -> int:
    """Print the table; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1G")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--only", default="in-place,copy,small,start")
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    options = parser.parse_args()
    size, wanted = parse_size(options.size), options.only.split(",")
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs, Linux {platform.release()}, {datetime.date.today()},"
          f" load {os.getloadavg()[0]:.1f}")  # fmt: skip
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastcas-ingest-", dir=options.folder)))
        bench = Bench(work, options.turns)
        if "in-place" in wanted:
            in_place(bench, size)
        if "copy" in wanted:
            copy(bench, size)
        if "small" in wanted:
            small(bench, options.files)
        if "start" in wanted:
            start(bench)
    print(f"MISSED: {', '.join(bench.missed)}" if bench.missed else "all met")
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
