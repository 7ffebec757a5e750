"""How long does a folder of many middle-sized files take, by link from one node, near and far?

Each file has a manifest of its own. A node with one worker holds the folder; `fastcas get` fetches it over loopback,
and through a proxy that holds every byte back for so many milliseconds each way. Wall time of the client process.

    python -m bench.members [--files 2000] [--size 256K] [--delay-ms 0,20] [--folder DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fastcas.ids import parse_size
from tests.support.nodes import run_fastcas, start_node

PIECE_B = 1 << 18


@contextlib.asynccontextmanager
async def far(port: int, delay_s: float) -> AsyncIterator[int]:
    """Listen on a port that leads to another one, `delay_s` away in each direction."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on, each piece `delay_s` after it came, however many are on their way."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def take() -> None:
            while data := await reader.read(PIECE_B):
                await queue.put((loop.time() + delay_s, data))
            await queue.put((loop.time() + delay_s, b""))

        taking = asyncio.create_task(take())
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await asyncio.sleep(delay_s)  # the handshake
        answers, upstream = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(carry(reader, upstream), carry(answers, writer))
        except asyncio.CancelledError:
            pass
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fetch(link: str, port: int, out: Path) -> float:
    """Fetch the folder in a process of its own; returns seconds."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fastcas", "get", link, "-o", str(out), "--peer", f"127.0.0.1:{port}",
        "--storage-dir", "/nonexistent", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0
    return time.perf_counter() - started


async def measure(link: str, port: int, delays: list[float], folder: Path, n_files: int) -> None:
    """Fetch once for each delay."""
    for number, delay_ms in enumerate(delays):
        async with far(port, delay_ms / 1e3) if delay_ms else contextlib.nullcontext(port) as where:
            seconds = await fetch(link, where, folder / f"out-{number}")
        print(f"{delay_ms:g} ms each way: {seconds:.1f} s, {seconds / n_files * 1e3:.1f} ms a file", flush=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--size", type=parse_size, default=256 << 10)
    parser.add_argument("--delay-ms", default="0,20")
    parser.add_argument("--folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        tree = folder / "tree"
        for i in range(args.files):
            path = tree / f"{i % 20}" / f"{i}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(args.size))
        with start_node(folder / "node") as node:
            stored = run_fastcas("store", str(tree), "--in-place", "--storage-dir", str(node.storage), "--json")
            link = json.loads(stored.stdout)["link"].partition("&peer=")[0]
            print(f"{args.files} files of {args.size} B, by link from one node", flush=True)
            delays = [float(text) for text in args.delay_ms.split(",")]
            asyncio.run(measure(link, node.port, delays, folder, args.files))


if __name__ == "__main__":
    main()
