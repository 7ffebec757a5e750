"""Each GF(2^8) kernel by itself. Run: pytest bench/micro_gf256.py

Encode and rebuild of 10+4, many outputs, odd lengths, small shards with the border to Python, plans and the self-test.
Ratios to ISA-L, zfec and pyeclib: python -m bench.kernels_gf256.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastcas import parity
from fastcas.parity import ReedSolomon
from fastcas.parity._gf256 import Plan
from fastcas.parity.matrix import cauchy, decode_rows

KIB, MIB = 1 << 10, 1 << 20
DATA = random.Random(1).randbytes(10 * MIB)  # 10 shards of 1 MiB, or 32 of 64 KiB


@pytest.fixture(params=[name for name in parity.kernels() if name != "generic"])
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


def shards(k: int, size: int) -> list[memoryview]:
    view = memoryview(DATA)
    return [view[i * size : (i + 1) * size] for i in range(k)]


def report(capsys: pytest.CaptureFixture[str], benchmark: Any, what: str, n_bytes: int) -> None:
    median_s = benchmark.stats.stats.median
    with capsys.disabled():
        print(f"\n{what}: {n_bytes / median_s / 1e9:.2f} GB/s, {median_s * 1e6:.1f} µs a call")


@pytest.mark.parametrize(
    ("k", "m", "size"),
    [(10, 4, MIB), (10, 4, 64 * KIB), (10, 4, 64 * KIB - 1), (4, 2, 64 * KIB), (32, 8, 64 * KIB), (20, 20, 64 * KIB)],
)
def test_encode(kernel: str, k: int, m: int, size: int, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = ReedSolomon(k, m, kernel=kernel), [bytearray(size) for _ in range(m)]
    benchmark.pedantic(code.encode, (shards(k, size), out), rounds=25, iterations=4, warmup_rounds=5)
    report(capsys, benchmark, f"{kernel}: encode {k}+{m}, shards of {size} B", k * size)


@pytest.mark.parametrize("size", [64 * KIB, MIB])
def test_reconstruct(kernel: str, size: int, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, data = ReedSolomon(10, 4, kernel=kernel), shards(10, size)
    holes = [None, None, None, None, *data[4:], *code.encode(data)]
    out = [*(bytearray(size) for _ in range(4)), *[None] * 10]
    benchmark.pedantic(code.reconstruct, (holes, out), rounds=25, iterations=4, warmup_rounds=5)
    report(capsys, benchmark, f"{kernel}: rebuild 4 of 10+4, shards of {size} B", 10 * size)


@pytest.mark.parametrize("size", [0, 64, 1024])
def test_small_shards(kernel: str, size: int, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, out = ReedSolomon(10, 4, kernel=kernel), shards(10, size), [bytearray(size) for _ in range(4)]
    benchmark.pedantic(code.encode, (data, out), rounds=25, iterations=1000, warmup_rounds=3)
    report(capsys, benchmark, f"{kernel}: encode 10+4, shards of {size} B", 10 * size)


def test_decode_plan(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What a pattern of losses costs the first time that it is met."""

    def make() -> Plan:
        return Plan(decode_rows(10, 4, range(4, 14), range(4)).tobytes(), 4, 10)

    benchmark.pedantic(make, rounds=25, iterations=20, warmup_rounds=3)
    with capsys.disabled():
        print(f"\ninverse and plan of 4 lost of 10+4: {benchmark.stats.stats.median * 1e6:.1f} µs")


def test_encode_plan(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.pedantic(lambda: Plan(cauchy(10, 4).tobytes(), 4, 10), rounds=25, iterations=20, warmup_rounds=3)
    with capsys.disabled():
        print(f"\nplan of 10+4: {benchmark.stats.stats.median * 1e6:.1f} µs")


def test_self_test(kernel: str, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.pedantic(parity.self_test, (kernel,), rounds=15, warmup_rounds=3)
    with capsys.disabled():
        print(f"\n{kernel}: self_test {benchmark.stats.stats.median * 1e6:.1f} µs")
