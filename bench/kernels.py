"""SHA-256 against hashlib (OpenSSL) and Reed-Solomon kernels against each other, on this machine.

    python -m bench.kernels [--rounds N]

Every round runs each contender once, in turn, so that a change of the clock hits all of them; the figures are
medians of CPU time over the rounds, in GB (10^9 bytes) of input per CPU second of one thread.
"""

from __future__ import annotations

import argparse
import os
import ssl
import time
from functools import partial

from bench.interleaved import Runs, cpu_name, measure, table
from bench.kernels_sha256 import bench_sha256
from fastcas import hashing
from fastcas.parity import ReedSolomon
from fastcas.parity import kernel_name as gf256_kernel_name
from fastcas.parity import kernels as gf256_kernels

CODES = [(4, 2), (10, 4), (16, 4), (20, 10)]
SHARD_SIZES = [64 << 10, 1 << 20]


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
