"""What a new version costs to fetch: fastcas (cut by content, and fixed chunks), casync and rsync, in one run.

Two releases of a wheel from the package index, unpacked and packed again as plain tar files with equal times. fastcas
is a real node and a real `get --seed-from`; its bytes are chunks as they travel, uncompressed, and the manifest. casync
gets the same minimum, average and maximum; its chunks are counted as they are (comparable) and as its store keeps them
(zstd), each with its index. rsync compares with the old file at the receiver; its bytes are those of both directions.
desync, a third tool with such chunks, is not in Debian; its row says so.

    python -m bench.dedup [--package scipy --old 1.14.0 --new 1.14.1] [--keep DIR]

Needs: casync and rsync (Debian), the package index.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from fastcas.hashing import Cutter
from fastcas.metadata import Manifest
from fastcas.store import Store
from tests.support.nodes import start_node

KIB, MIB = 1 << 10, 1 << 20
MUST_RATIO, MUST_GBPS = 1.05, 1.5
ENV = os.environ | {"FASTCAS_LOG": "ERROR"}


def run(*command: str | Path, **options: object) -> str:
    """Run a command that must succeed; returns its stdout."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=ENV, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"bench: {command[0]} {command[1]}: exit {done.returncode}: {done.stderr[-500:]}")
    return str(done.stdout)


def version_tar(package: str, version: str, work: Path) -> Path:
    """Download a wheel and return a tar of its files, sorted, with one time."""
    out = work / f"{package}-{version}.tar"
    if out.exists():
        return out
    folder = work / f"{package}-{version}"
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder,
        f"{package}=={version}")  # fmt: skip
    wheel = next(folder.glob("*.whl"))
    files = folder / "files"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(files)

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(files.rglob("*")):
            tar.add(path, str(path.relative_to(files)), recursive=False, filter=plain)
    shutil.rmtree(folder)
    return out


def fastcas_bytes(old: Path, new: Path, work: Path, arguments: list[str]) -> tuple[int, int, int]:
    """Fetch `new` from a node by somebody who has `old`; returns (chunk bytes, manifest bytes, mean chunk)."""
    store = work / "store"
    stored = json.loads(
        run(sys.executable, "-m", "fastcas", "store", new, "--storage-dir", store, "--in-place", "--json", *arguments)
    )
    with Store.open(store) as opened:
        manifest = opened.manifest(bytes.fromhex(stored["manifest_hash"]))
    assert isinstance(manifest, Manifest)
    out = work / "out"
    with start_node(store) as node:
        result = json.loads(
            run(sys.executable, "-m", "fastcas", "get", stored["link"], "-o", out, "--peer", node.peer, "--seed-from",
                old, "--storage-dir", work / "none", "--json")
        )  # fmt: skip
    if out.read_bytes() != new.read_bytes():
        raise SystemExit("bench: fastcas fetched something else")
    out.unlink()
    shutil.rmtree(store)
    return result["fetched_bytes"], len(manifest.data), manifest.size // manifest.n_chunks


def index_chunks(path: Path) -> dict[bytes, int]:
    """Return the chunks of a casync blob index: id -> bytes."""
    data = path.read_bytes()
    (header,) = struct.unpack_from("<Q", data)
    at, begin, chunks = header + 16, 0, {}
    while at + 40 <= len(data):
        (end,) = struct.unpack_from("<Q", data, at)
        if end == 0:
            break
        chunks[data[at + 8 : at + 40]] = end - begin
        begin, at = end, at + 40
    return chunks


def casync_bytes(old: Path, new: Path, work: Path, sizes: str) -> tuple[int, int, int, int]:
    """Return (chunk bytes, the same compressed, index bytes, mean chunk) that `new` takes beside `old`."""
    store = work / "casync.castr"
    indexes = []
    for name, path in (("old", old), ("new", new)):
        indexes.append(work / f"{name}.caibx")
        run("casync", "make", "--what=blob-index", f"--chunk-size={sizes}", f"--store={store}", indexes[-1], path)
    had, has = (index_chunks(path) for path in indexes)
    if sum(has.values()) > new.stat().st_size or not has:
        raise SystemExit("bench: casync's index was not understood")
    fresh = {key: length for key, length in has.items() if key not in had}
    compressed = sum((store / key.hex()[:4] / f"{key.hex()}.cacnk").stat().st_size for key in fresh)
    index = indexes[1].stat().st_size
    shutil.rmtree(store)
    return sum(fresh.values()), compressed, index, new.stat().st_size // max(len(has), 1)


def rsync_bytes(old: Path, new: Path, work: Path, *options: str) -> int:
    """Return the bytes of both directions."""
    target = work / "target.tar"
    shutil.copyfile(old, target)
    out = run("rsync", "--no-whole-file", "-I", "--stats", *options, new, target)
    if target.read_bytes() != new.read_bytes():
        raise SystemExit("bench: rsync made something else")
    words = [line.rpartition(":")[2].strip().replace(",", "") for line in out.splitlines() if "Total bytes" in line]
    return sum(int(word) for word in words)


def cutting_gbps(path: Path) -> float:
    """Return the best of five cutting rates over a file in memory, GB (10^9 bytes) per CPU second of one thread."""
    data = path.read_bytes()
    best = 0.0
    for _ in range(5):
        cutter = Cutter(MIB)
        began = time.thread_time()
        cutter.feed(data)
        best = max(best, len(data) / (time.thread_time() - began) / 1e9)
    return best


def main() -> int:
    """Print the table; returns 1 if a must is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="scipy")
    parser.add_argument("--old", default="1.14.0")
    parser.add_argument("--new", default="1.14.1")
    parser.add_argument("--keep", type=Path, help="folder where the tar files stay")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastcas-dedup-")))
        tars = options.keep or work
        tars.mkdir(parents=True, exist_ok=True)
        old, new = (version_tar(options.package, version, tars) for version in (options.old, options.new))
        size = new.stat().st_size
        print(f"{options.package} {options.old} -> {options.new}: tar of {old.stat().st_size} B -> {size} B")
        print(f"{'':34}{'fetched, B':>14}{'of all':>8}{'+ index, B':>12}{'mean chunk':>12}")

        def row(name: str, fetched: int, index: int, mean: int) -> None:
            print(f"{name:34}{fetched:>14}{fetched / size:>8.1%}{index:>12}{mean:>12}")

        worst = 0.0
        for average in (MIB, 256 * KIB, 64 * KIB):
            chunks, manifest, mean = fastcas_bytes(old, new, work, ["--chunking", "cdc", "--chunk-size", str(average)])
            sizes = f"{average // 4}:{average}:{average * 4}"
            theirs, compressed, index, their_mean = casync_bytes(old, new, work, sizes)
            row(f"fastcas cdc, average {average // KIB} KiB", chunks, manifest, mean)
            row(f"casync {average // KIB} KiB, chunks as they are", theirs, index, their_mean)
            row(f"casync {average // KIB} KiB, zstd", compressed, index, their_mean)
            ratio = (chunks + manifest) / (theirs + index)
            worst = max(worst, ratio) if average == MIB else worst
            to_zstd = (chunks + manifest) / (compressed + index)
            print(f"  fastcas : casync as they are {ratio:.3f}, fastcas : casync zstd {to_zstd:.3f}")
        chunks, manifest, mean = fastcas_bytes(old, new, work, [])
        row("fastcas fixed (auto)", chunks, manifest, mean)
        row("rsync", rsync_bytes(old, new, work), 0, 0)
        row("rsync -z", rsync_bytes(old, new, work, "-z"), 0, 0)
        print(f"{'desync':34}{'not measured: Debian has no package of it':>48}")
        speed = cutting_gbps(new)
    met = worst <= MUST_RATIO and speed >= MUST_GBPS
    print(f"bytes at the default average: {worst:.3f} of casync's uncompressed, must be <= {MUST_RATIO}")
    print(f"cutting: {speed:.2f} GB/s of one core, must be >= {MUST_GBPS}")
    print("met" if met else "MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
