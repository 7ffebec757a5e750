"""What nine hostile peers of ten cost a download: time against the good peer alone, and memory.

The good peer is a node, the hostile ones are scripted (`tests/support/evil_peer.py`): each of their ways once, nine at
a time, and nine of a kind of those that hold on to requests. The client is `fastcas get` with its default deadlines.
Wanted: the right file, at most 1.3 times as long as the good peer alone and 20 s more, at most 256 MiB resident.

    python -m bench.evil_peers [--size 64M] [--kinds NAME,NAME…]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastcas.ids import parse_rate
from tests.support.evil_peer import BEHAVIOURS, WAYS, Peer, content_of
from tests.support.nodes import read_line, run_fastcas, start_node

WANTED_FACTOR, WANTED_MORE_S, WANTED_MIB = 1.3, 20.0, 256.0
HOLDERS = (
    "silent", "stall", "trickle", "slow_headers", "half_open", "swarm_silent", "manifest_never_ends", "next_silent",
    "rst_storm",
)  # fmt: skip
CHUNK = 1 << 18


async def serve(content: bytes, names: list[str]) -> None:
    """Be these peers until stdin ends; prints their addresses in one line."""
    logging.disable()  # asyncio complains about each byte that is sent to a client that has hung up
    first = Peer(content, chunk_size=CHUNK)
    peers = [Peer(content, chunk_size=CHUNK, behaviour=name, manifest=first.manifest) for name in names]
    for peer in peers:
        await peer.start()
    print(" ".join(str(peer.addr) for peer in peers), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def fetch(link: str, peers: list[str], out: Path, file_hash: str) -> tuple[float, float]:
    """Download once; returns seconds and MiB resident at most. Raises where the file is not right."""
    command = [sys.executable, "-m", "fastcas", "get", link, "-o", str(out), "--storage-dir", str(out.parent / "none")]
    command += [word for peer in peers for word in ("--peer", peer)]
    started = time.monotonic()
    resident = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:  # what the kernel says after the end counts the memory before exec, too: ours
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            resident = int(found[1]) if found else resident
            time.sleep(0.005)
    seconds = time.monotonic() - started
    assert process.returncode == 0, f"exit {process.returncode}"
    with out.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == file_hash, "wrong bytes"
    out.unlink()
    return seconds, resident / 1024


def beside(names: list[str], path: Path, link: str, good: str, out: Path, file_hash: str) -> tuple[float, float]:
    """`fetch` with hostile peers beside the good one, which is named last."""
    command = [sys.executable, "-m", "bench.evil_peers", "--serve", str(path), *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as evil:
        assert evil.stdout is not None
        addresses = read_line(evil.stdout, 60).split()
        try:
            return fetch(link, [*addresses, good], out, file_hash)
        finally:
            evil.kill()


def main() -> None:
    """Print the table; exit 1 where a figure is not what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64M")
    parser.add_argument("--kinds", default=",".join(HOLDERS))
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(Path(args.serve[0]).read_bytes(), args.serve[1:]))
        return
    every = [*BEHAVIOURS, *WAYS]
    crowds = [(" ".join(every[at : at + 9]), every[at : at + 9]) for at in range(0, len(every), 9)]
    crowds += [(f"9 × {kind}", [kind] * 9) for kind in args.kinds.split(",") if kind]
    with tempfile.TemporaryDirectory(prefix="fastcas-bench-") as name:
        folder = Path(name)
        path, out = folder / "file", folder / "out"
        path.write_bytes(content_of(int(parse_rate(args.size))))
        said = run_fastcas("store", str(path), "--storage-dir", str(folder / "node")).stdout
        file_hash, link = said.split()[4], said.split("Link: ")[1].strip()
        is_right = True
        with start_node(folder / "node") as node:
            alone = sorted(fetch(link, [node.peer], out, file_hash) for _ in range(3))[1]
            limit = WANTED_FACTOR * alone[0] + WANTED_MORE_S
            print(f"{args.size}, the good peer alone: {alone[0]:.2f} s, {alone[1]:.0f} MiB; limit: {limit:.1f} s")
            for title, names in crowds:
                seconds, mib = beside(names, path, link, node.peer, out, file_hash)
                is_good = seconds <= limit and mib <= WANTED_MIB
                is_right = is_right and is_good
                print(f"{seconds:6.2f} s {mib:5.0f} MiB {'' if is_good else 'TOO MUCH '} {title}", flush=True)
    raise SystemExit(not is_right)


if __name__ == "__main__":
    main()
