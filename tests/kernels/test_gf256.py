"""The field and every GF(2^8) kernel, against tables that the test makes from the polynomial alone."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from fastcas.errors import KernelUnavailable, UsageError
from fastcas.parity import ReedSolomon, kernel_name, kernels, self_test
from fastcas.parity._gf256 import Plan
from fastcas.parity.matrix import invert, multiply

INTERESTING_SIZES = [
    0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 200, 255, 256, 257, 1000, 4096, 10_007,
]  # fmt: skip
ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("FASTCAS_TEST_SEED", "1"))
POOL = np.frombuffer(random.Random(5).randbytes(300_000), dtype=np.uint8)


def product_table() -> np.ndarray:
    """uint8[256, 256] by polynomial multiplication and reduction, bit by bit."""
    a = np.arange(256, dtype=np.uint32)[:, np.newaxis]
    b = np.arange(256, dtype=np.uint32)[np.newaxis, :]
    product = np.zeros((256, 256), dtype=np.uint32)
    for bit in range(8):
        product ^= np.where(b >> bit & 1, a << bit, 0).astype(np.uint32)
    for bit in range(14, 7, -1):
        product ^= np.where(product >> bit & 1, 0x11D << (bit - 8), 0).astype(np.uint32)
    return product.astype(np.uint8)


TABLE = product_table()
EVERY = np.arange(256, dtype=np.uint8)


def oracle(matrix: np.ndarray, inputs: list[np.ndarray]) -> list[bytes]:
    outputs = []
    for row in matrix:
        total = np.zeros_like(inputs[0])
        for coefficient, data in zip(row, inputs, strict=True):
            total ^= TABLE[coefficient][data]
        outputs.append(total.tobytes())
    return outputs


@pytest.fixture(params=kernels())
def kernel(request):
    return request.param


def through_kernel(kernel: str) -> np.ndarray:
    """uint8[256, 256] of all products as a kernel computes them: 255 rows, then the row of 0."""
    plan = Plan(bytes(range(1, 256)), 255, 1, kernel=kernel)
    rows = plan.apply([EVERY], [None] * 255)
    zero = Plan(bytes(1), 1, 1, kernel=kernel).apply([EVERY], [None])
    return np.frombuffer(b"".join([*zero, *rows]), dtype=np.uint8).reshape(256, 256)


def test_kernels_generic_is_always_there():
    assert kernels()[0] == "generic"
    assert kernel_name() in kernels()
    assert ReedSolomon(2, 1).kernel == kernel_name()


def test_self_test_of_every_kernel_passes(kernel):
    self_test(kernel)


def test_every_product_equals_the_definition(kernel):
    assert np.array_equal(through_kernel(kernel), TABLE)


def test_multiplication_is_commutative_has_one_and_zero_and_inverses(kernel):
    table = through_kernel(kernel)
    assert np.array_equal(table, table.T)
    assert np.array_equal(table[1], EVERY)
    assert not table[0].any()
    assert np.array_equal(np.count_nonzero(table[1:] == 1, axis=1), np.ones(255))  # exactly one inverse each
    assert table[1:, 1:].all()  # no zero divisors


def test_multiplication_is_associative_and_distributive_over_every_triple(kernel):
    table = through_kernel(kernel)
    for a in range(256):
        assert np.array_equal(table[table[a]][:, EVERY], table[a][table])  # (a b) c == a (b c)
        sums = EVERY[:, np.newaxis] ^ EVERY
        assert np.array_equal(table[a][sums], table[a][:, np.newaxis] ^ table[a])


def test_two_generates_the_multiplicative_group():
    seen, value = set(), 1
    for _ in range(255):
        seen.add(value)
        value = int(TABLE[2][value])
    assert value == 1
    assert len(seen) == 255


@pytest.mark.parametrize("size", INTERESTING_SIZES)
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (2, 3), (3, 5), (4, 10), (5, 2), (8, 4), (9, 7), (17, 3)])
def test_apply_every_shape_and_size_equals_the_oracle(kernel, n_out, n_in, size):
    rng = random.Random(n_out * 1000 + n_in)
    matrix = np.frombuffer(rng.randbytes(n_out * n_in), dtype=np.uint8).reshape(n_out, n_in)
    starts = [rng.randrange(200_000) for _ in range(n_in)]
    inputs = [POOL[at : at + size] for at in starts]
    plan = Plan(matrix.tobytes(), n_out, n_in, kernel=kernel)
    assert plan.kernel == kernel
    assert plan.apply(inputs, [None] * n_out) == oracle(matrix, inputs)


def test_apply_every_alignment_writes_only_its_bytes(kernel):
    matrix = np.array([[3, 1, 200], [7, 0, 9]], dtype=np.uint8)
    plan = Plan(matrix.tobytes(), 2, 3, kernel=kernel)
    for size in (5, 64, 130, 257):
        for shift in range(65):
            inputs = [POOL[at + shift : at + shift + size] for at in (0, 1000, 2001)]
            memory = [bytearray(b"\xa5" * (size + 200)) for _ in range(2)]
            plan.apply(inputs, [memoryview(m)[shift : shift + size] for m in memory])
            for got, wanted in zip(memory, oracle(matrix, inputs), strict=True):
                assert got == b"\xa5" * shift + wanted + b"\xa5" * (200 - shift), f"{size} at {shift}"


def test_apply_more_outputs_than_fit_registers_over_several_blocks_equals_the_oracle(kernel):
    rng = random.Random(11)
    matrix = np.frombuffer(rng.randbytes(19 * 30), dtype=np.uint8).reshape(19, 30)
    inputs = [POOL[at : at + 50_001] for at in range(0, 30 * 8000, 8000)]
    assert Plan(matrix.tobytes(), 19, 30, kernel=kernel).apply(inputs, [None] * 19) == oracle(matrix, inputs)


@pytest.mark.slow
def test_apply_random_shapes_equal_generic(kernel):
    rng = random.Random(SEED)
    for _ in range(150):
        n_out, n_in = rng.randint(1, rng.choice([4, 9, 40])), rng.randint(1, rng.choice([5, 40]))
        size = rng.choice([rng.randrange(0, 300), rng.randrange(0, 3000)])
        matrix, lead = rng.randbytes(n_out * n_in), rng.randrange(64)
        inputs = [POOL[at : at + size] for at in (rng.randrange(250_000) for _ in range(n_in))]
        memory = bytearray(lead + n_out * (size + 7))
        outputs = [memoryview(memory)[lead + r * (size + 7) :][:size] for r in range(n_out)]
        Plan(matrix, n_out, n_in, kernel=kernel).apply(inputs, outputs)
        expected = Plan(matrix, n_out, n_in, kernel="generic").apply(inputs, [None] * n_out)
        assert [bytes(view) for view in outputs] == expected, f"seed {SEED}: {n_out}x{n_in}, {size} B"
        assert sum(memory) == sum(map(sum, expected)), "a byte outside the outputs was written"


def test_self_test_knows_the_parity_that_the_definition_gives():
    """The constant in csrc/gf256/selftest.c, worked out from TABLE: FNV-1a of all parity for k + m < 16."""
    inverse = [0, *(int(np.flatnonzero(TABLE[a] == 1)[0]) for a in range(1, 16))]
    shards = [np.array([(41 * i + 97 * s + (i >> 3)) & 255 for i in range(150)], dtype=np.uint8) for s in range(15)]
    value = 0xCBF29CE484222325
    for k in range(1, 15):
        for m in range(1, 16 - k):
            matrix = np.array([[inverse[(k + r) ^ c] for c in range(k)] for r in range(m)], dtype=np.uint8)
            for byte in b"".join(oracle(matrix, shards[:k])):
                value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    assert f"UINT64_C(0x{value:016x})" in (ROOT / "csrc/gf256/selftest.c").read_text()


def test_apply_one_buffer_as_two_inputs_is_allowed(kernel):
    data = bytes(range(100))
    assert Plan(b"\x05\x05", 1, 2, kernel=kernel).apply([data, data], [None]) == [bytes(100)]


@pytest.mark.parametrize(
    ("matrix", "n_out", "n_in"),
    [(b"", 0, 1), (b"", 1, 0), (b"abc", 2, 2), (bytes(256), 256, 1), (bytes(256), 1, 256), (b"a", -1, -1)],
)
def test_plan_bad_shape_raises(matrix, n_out, n_in):
    with pytest.raises(UsageError, match="matrix: expected"):
        Plan(matrix, n_out, n_in)


def test_apply_wrong_counts_raise():
    plan = Plan(b"ab", 1, 2)
    with pytest.raises(UsageError, match="expected 2 in and 1 out, got 1 and 1"):
        plan.apply([b"x"], [None])
    with pytest.raises(UsageError, match="expected 2 in and 1 out, got 2 and 0"):
        plan.apply([b"x", b"y"], [])


def test_demand_for_an_unknown_kernel_raises():
    with pytest.raises(KernelUnavailable, match="unknown, expected one of generic, ssse3, avx2, gfni"):
        ReedSolomon(4, 2, kernel="neon")


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
def test_invert_times_the_matrix_is_one(n):
    rng = np.random.default_rng(n)
    while True:
        square = rng.integers(0, 256, (n, n), dtype=np.uint8)
        try:
            inverse = invert(square)
        except ValueError:
            continue
        break
    assert np.array_equal(multiply(square, inverse), np.eye(n, dtype=np.uint8))
    assert np.array_equal(multiply(inverse, square), np.eye(n, dtype=np.uint8))


def test_invert_needs_a_pivot_from_below():
    assert np.array_equal(invert(np.array([[0, 1], [1, 0]], dtype=np.uint8)), [[0, 1], [1, 0]])


def test_invert_singular_matrix_raises():
    with pytest.raises(ValueError, match="singular at column 1"):
        invert(np.array([[1, 2], [1, 2]], dtype=np.uint8))
