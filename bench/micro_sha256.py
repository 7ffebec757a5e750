"""Each SHA-256 kernel by itself. Run: pytest bench/micro_sha256.py

One message, many messages (as many as fill all lanes, fewer, unequal ones), a chunk and the content's chain, small
buffers with the border to Python, and the self test. Ratios between kernels: python -m bench.kernels_sha256.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastcas import hashing
from fastcas.metadata import SHA256_IV

MIB = 1 << 20
DATA = random.Random(1).randbytes(16 * MIB)


@pytest.fixture(params=hashing.kernels())
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


def pieces(sizes: list[int]) -> list[memoryview]:
    view, at = memoryview(DATA), 0
    parts = []
    for size in sizes:
        parts.append(view[at : at + size])
        at += size
    return parts


def report(capsys: pytest.CaptureFixture[str], benchmark: Any, what: str, n_bytes: int) -> None:
    median_s = benchmark.stats.stats.median
    with capsys.disabled():
        print(f"\n{what}: {n_bytes / median_s / 1e9:.2f} GB/s, {median_s * 1e6:.1f} µs a call")


def test_one_message(kernel: str, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.pedantic(hashing.sha256, (DATA[:MIB],), {"kernel": kernel}, rounds=25, warmup_rounds=10)
    report(capsys, benchmark, f"{kernel}: sha256 of 1 MiB", MIB)


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ([MIB] * 16, "16 chunks of 1 MiB"),
        ([256 << 10] * 64, "64 chunks of 256 KiB"),
        ([MIB] * 5, "5 chunks of 1 MiB"),
        ([4096] * 256, "256 buffers of 4 KiB"),
        ([64] * 1024, "1024 buffers of 64 B"),
        ([MIB >> i for i in range(12)] * 4, "48 buffers from 1 MiB to 512 B"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_digest_many(
    kernel: str, sizes: list[int], what: str, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.pedantic(hashing.digest_many, (pieces(sizes),), {"kernel": kernel}, rounds=15, warmup_rounds=3)
    report(capsys, benchmark, f"{kernel}: digest_many, {what}", sum(sizes))


def test_chunk_pass(kernel: str, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.pedantic(hashing.chunk_pass, (DATA[:MIB], SHA256_IV), {"kernel": kernel}, rounds=25, warmup_rounds=10)
    report(capsys, benchmark, f"{kernel}: chunk hash and content chain of 1 MiB", MIB)


@pytest.mark.parametrize("size", [0, 64, 1024])
def test_small_message(kernel: str, size: int, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = DATA[:size]

    def thousand() -> None:
        for _ in range(1000):
            hashing.sha256(data, kernel=kernel)

    benchmark.pedantic(thousand, rounds=15, warmup_rounds=3)
    report(capsys, benchmark, f"{kernel}: 1000 calls of sha256 of {size} B", 1000 * size)


def test_self_test(kernel: str, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.pedantic(hashing.self_test, (kernel,), rounds=15, warmup_rounds=3)
    with capsys.disabled():
        print(f"\n{kernel}: self_test {benchmark.stats.stats.median * 1e6:.1f} µs")
