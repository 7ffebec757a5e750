"""SHA-256: every kernel against hashlib (OpenSSL's EVP), one stream, many messages, and all hashes of a file.

    python -m bench.kernels_sha256 [--rounds N]

All contenders read the same 16 MiB; GB are 10^9 bytes of input per CPU second of one thread. The last three lines
are the targets, each a ratio of two medians of one run.

Contenders take turns with their like only, because a core remembers what it ran: on a Xeon (Golden Cove), OpenSSL
was seen at 1.2 instead of 1.9 GB/s for 0.3 s after scalar code, and AVX-512 holds the clock at 3.0 instead of 4.0 GHz
for 0.4 s.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import ssl
import time
from functools import partial

from bench.interleaved import Runs, cpu_name, measure, table
from fastcas import hashing

CHUNK = 1 << 20
N_CHUNKS = 16
SIZE = CHUNK * N_CHUNKS
ROUNDS = 25
OPENSSL = "hashlib, one stream"


def measure_apart(runs: Runs, rounds: int) -> dict[str, float]:
    """Measure those with SHA-NI in turn, then those without, then those with AVX-512; results as given."""
    groups: list[Runs] = [{}, {}, {}]
    for name, run in runs.items():
        groups[2 if "avx512" in name else "generic" in name or "avx2" in name][name] = run
    seconds = {name: median for group in groups for name, median in measure(group, rounds).items()}
    return {name: seconds[name] for name in runs}


def bench_streams(whole: bytes, rounds: int) -> None:
    """Print one message, and the hashes that hashlib needs two passes for."""
    view = memoryview(whole)

    def file_by_hashlib() -> object:
        content = hashlib.sha256()
        digests = []
        for at in range(0, SIZE, CHUNK):
            chunk = view[at : at + CHUNK]
            digests.append(hashlib.sha256(chunk).digest())
            content.update(chunk)
        return digests, content.digest()

    one: Runs = {"hashlib": lambda: hashlib.sha256(whole).digest()}
    file: Runs = {"hashlib, two hashes": file_by_hashlib}
    for kernel in hashing.kernels():
        one[kernel] = partial(hashing.sha256, whole, kernel=kernel)
        file[kernel] = partial(file_by_kernel, whole, kernel)
    table(f"SHA-256, one message of {SIZE >> 20} MiB", SIZE, measure_apart(one, rounds), "hashlib")
    title = f"chunk hashes and file hash of {SIZE >> 20} MiB (ChunkHasher: midstates too)"
    table(title, SIZE, measure_apart(file, rounds), "hashlib, two hashes")


def file_by_kernel(whole: bytes, kernel: str) -> object:
    """Hash a file in one pass: each chunk, the content, the midstates."""
    return hashing.ChunkHasher(CHUNK, kernel=kernel).update(whole).finish()


def bench_targets(whole: bytes, rounds: int) -> None:
    """Print digest_many and the one pass over a file against OpenSSL's one stream, then the targets."""
    view = memoryview(whole)
    chunks = [view[at : at + CHUNK] for at in range(0, SIZE, CHUNK)]
    kernels = hashing.kernels()
    runs: Runs = {OPENSSL: lambda: hashlib.sha256(whole).digest()}
    for kernel in kernels:
        runs[f"digest_many {kernel}"] = partial(hashing.digest_many, chunks, kernel=kernel)
        runs[f"one pass {kernel}"] = partial(file_by_kernel, whole, kernel)
    seconds = measure_apart(runs, rounds)
    title = f"{N_CHUNKS} chunks of {CHUNK >> 20} MiB (digest_many); chunk hashes and file hash in one pass"
    table(title, SIZE, seconds, OPENSSL)

    name = hashing.kernel_name()
    print()
    if "shani" in kernels:
        for kernel in [name, *({"avx512_x16"} & set(kernels) - {name})]:
            ratio = seconds[OPENSSL] / seconds[f"digest_many {kernel}"]
            note = "default" if kernel == name else "on demand"
            target("digest_many / OpenSSL one stream, with SHA-NI", ratio, 1.7, f"stretch 1.85; {kernel}, {note}")
    if "avx2_x8" in kernels:
        ratio = seconds["digest_many generic"] / seconds["digest_many avx2_x8"]
        target("digest_many avx2_x8 / generic", ratio, 5.0, f"{seconds[OPENSSL] / seconds['digest_many avx2_x8']:.2f} "
               "x OpenSSL one stream")  # fmt: skip
    ratio = seconds[OPENSSL] / seconds[f"one pass {name}"]
    target("chunk and file hash in one pass / OpenSSL file hash", ratio, 0.85, f"stretch 0.92; {name}")


def target(what: str, ratio: float, least: float, note: str) -> None:
    """Print one line of the targets."""
    verdict = "met" if ratio >= least else "MISSED"
    print(f"  {what:52} {ratio:5.2f}   target {least:.2f}: {verdict} ({note})")


def bench_sha256(rounds: int) -> None:
    """Print every SHA-256 table and the targets."""
    whole = os.urandom(SIZE)
    bench_streams(whole, rounds)
    bench_targets(whole, rounds)


def main() -> None:
    """Print this half of bench.kernels alone."""
    parser = argparse.ArgumentParser(description="SHA-256 kernels on this machine.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds per table (default {ROUNDS})")
    rounds = parser.parse_args().rounds
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d')}; medians of {rounds} interleaved rounds")
    print(f"sha256 {hashing.kernel_name()}; {ssl.OPENSSL_VERSION} behind hashlib")
    bench_sha256(rounds)


if __name__ == "__main__":
    main()
