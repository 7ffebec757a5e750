"""SHA-256 against hashlib (OpenSSL) and Reed-Solomon against ISA-L, zfec and pyeclib, on this machine.

    python -m bench.kernels [--rounds N]

Every round runs each contender once, in turn, so that a change of the clock hits all of them; the figures are
medians of CPU time over the rounds, in GB (10^9 bytes) of input per CPU second of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import ssl
import time
from functools import partial

from bench.interleaved import Runs, cpu_name, measure, table
from bench.kernels_gf256 import bench_reed_solomon
from fastcas import hashing
from fastcas.parity import kernel_name as gf256_kernel_name

CHUNK = 256 << 10
N_CHUNKS = 32


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


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description="Kernel throughput on this machine.")
    parser.add_argument("--rounds", type=int, default=25, help="rounds per table (default 25)")
    rounds = parser.parse_args().rounds
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d')}; medians of {rounds} interleaved rounds")
    print(f"sha256 {hashing.kernel_name()}, gf256 {gf256_kernel_name()}; {ssl.OPENSSL_VERSION} behind hashlib")
    bench_sha256(rounds)
    bench_reed_solomon(rounds)


if __name__ == "__main__":
    main()
