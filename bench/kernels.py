"""SHA-256 against hashlib (OpenSSL) and Reed-Solomon against ISA-L, zfec and pyeclib, on this machine.

    python -m bench.kernels [--rounds N]

Every round runs each contender once, in turn, so that a change of the clock hits all of them; the figures are
medians of CPU time over the rounds, in GB (10^9 bytes) of input per CPU second of one thread.
"""

from __future__ import annotations

import argparse
import os
import ssl
import time

from bench.interleaved import cpu_name
from bench.kernels_gf256 import bench_reed_solomon
from bench.kernels_sha256 import bench_sha256
from fastcas import hashing
from fastcas.parity import kernel_name as gf256_kernel_name


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
