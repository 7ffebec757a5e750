"""SHA-256 against hashlib (OpenSSL) and Reed-Solomon kernels against each other, on this machine.

    python -m bench.kernels [--rounds N]

Every round runs each contender once, in turn, so that a change of the clock hits all of them; the figures are
medians of CPU time over the rounds, in GB (10^9 bytes) of input per CPU second of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import ssl
import statistics
import time
from collections.abc import Callable
from functools import partial

from fastcas import hashing
from fastcas.parity import ReedSolomon
from fastcas.parity import kernel_name as gf256_kernel_name
from fastcas.parity import kernels as gf256_kernels

Runs = dict[str, Callable[[], object]]

CHUNK = 256 << 10
N_CHUNKS = 32
CODES = [(4, 2), (10, 4), (16, 4), (20, 10)]
SHARD_SIZES = [64 << 10, 1 << 20]


def cpu_name() -> str:
    """Return what /proc/cpuinfo calls the CPU."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def measure(contenders: Runs, rounds: int) -> dict[str, float]:
    """Return each contender's median CPU seconds; one round more is run first and not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in range(-1, rounds):
        for name, run in contenders.items():
            start = time.thread_time()
            run()
            if counted >= 0:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, n_bytes: int, seconds: dict[str, float], base: str) -> None:
    """Print GB/s of each contender and its ratio to the base."""
    print(f"\n{title}")
    for name, median_s in seconds.items():
        print(f"  {name:28} {n_bytes / median_s / 1e9:7.2f} GB/s   {seconds[base] / median_s:6.2f} x {base}")


def bench_sha256(rounds: int) -> None:
    """One stream, many messages, and all hashes of a file."""
    chunks = [os.urandom(CHUNK) for _ in range(N_CHUNKS)]
    whole = b"".join(chunks)
    size = len(whole)

    def file_by_hashlib() -> object:
        content = hashlib.sha256()
        digests = []
        for chunk in chunks:
            digests.append(hashlib.sha256(chunk).digest())
            content.update(chunk)
        return digests, content.digest()

    def file_by_kernel(kernel: str) -> object:
        return hashing.ChunkHasher(CHUNK, kernel=kernel).update(whole).finish()

    one: Runs = {"hashlib": lambda: hashlib.sha256(whole).digest()}
    many: Runs = {"hashlib": lambda: [hashlib.sha256(chunk).digest() for chunk in chunks]}
    file: Runs = {"hashlib": file_by_hashlib}
    for kernel in hashing.kernels():
        one[kernel] = partial(hashing.sha256, whole, kernel=kernel)
        many[kernel] = partial(hashing.digest_many, chunks, kernel=kernel)
        file[kernel] = partial(file_by_kernel, kernel)
    table(f"SHA-256, one message of {size >> 20} MiB", size, measure(one, rounds), "hashlib")
    table(f"SHA-256, {N_CHUNKS} chunks of {CHUNK >> 10} KiB (digest_many)", size, measure(many, rounds), "hashlib")
    title = f"chunk hashes and file hash of {size >> 20} MiB (ChunkHasher: midstates too)"
    table(title, size, measure(file, rounds), "hashlib")


def bench_reed_solomon(k: int, m: int, shard: int, rounds: int) -> None:
    """Encode into buffers that are reused, into new ones, and rebuild as many shards as can be lost."""
    data = [os.urandom(shard) for _ in range(k)]
    out = [bytearray(shard) for _ in range(m)]
    n_lost = min(m, k)
    runs: Runs = {}
    for kernel in gf256_kernels():
        if kernel != "generic" or k * m * shard <= 4 << 20:  # beyond, it takes seconds and tells no more
            runs[kernel] = partial(ReedSolomon(k, m, kernel=kernel).encode, data, out)
    base = "avx2" if "avx2" in runs else next(iter(runs))
    code = ReedSolomon(k, m)
    whole = [*data, *code.encode(data)]
    runs[f"{code.kernel}, new buffers"] = partial(code.encode, data)
    runs[f"{code.kernel}, rebuild {n_lost} lost"] = partial(
        code.reconstruct, [*[None] * n_lost, *whole[n_lost:]], [*out[:n_lost], *[None] * (k + m - n_lost)]
    )
    table(f"Reed-Solomon {k}+{m}, shards of {shard >> 10} KiB", k * shard, measure(runs, rounds), base)


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description="Kernel throughput on this machine.")
    parser.add_argument("--rounds", type=int, default=25, help="rounds per table (default 25)")
    rounds = parser.parse_args().rounds
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d')}; medians of {rounds} interleaved rounds")
    print(f"sha256 {hashing.kernel_name()}, gf256 {gf256_kernel_name()}; {ssl.OPENSSL_VERSION} behind hashlib")
    bench_sha256(rounds)
    for k, m in CODES:
        for shard in SHARD_SIZES:
            bench_reed_solomon(k, m, shard, rounds)


if __name__ == "__main__":
    main()
