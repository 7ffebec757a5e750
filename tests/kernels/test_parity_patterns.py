"""Every choice of k survivors, on the matrix and on bytes.

On the matrix: decode_rows() of a pattern times the survivors' rows of the generator gives the lost shards' rows. That
is the whole proof for a pattern: the survivors' rows then span all rows of the generator, so they are invertible, and
the coefficients that the product uses are the right ones. Fewer losses than m use k survivors too, so the patterns
with exactly m losses cover all. Arithmetic and generator are the test's own (test_gf256.TABLE).

`make parity-patterns` (FASTCAS_PARITY_PATTERNS=all) rebuilds bytes for every pattern, tries 100,000 patterns of 32+8
instead of 1,000, and compares with galois, which it installs.
"""

import os
import random
from collections.abc import Iterator
from itertools import combinations, islice
from math import comb

import numpy as np
import pytest

from fastcas.errors import TooFewShards
from fastcas.parity import ReedSolomon
from fastcas.parity.matrix import cauchy, decode_rows
from tests.kernels.test_gf256 import TABLE

CODES = [(2, 1), (4, 2), (6, 3), (8, 3), (10, 4), (16, 4), (12, 6), (20, 4), (32, 8)]
ALL = os.environ.get("FASTCAS_PARITY_PATTERNS") == "all"
SEED = int(os.environ.get("FASTCAS_TEST_SEED", "1"))
EVERY_UP_TO = 500_000  # patterns; of wider codes, as many at random as stands here:
N_RANDOM = 100_000 if ALL else 1_000
N_REBUILT = EVERY_UP_TO if ALL else 400
INVERSES = np.array([0, *(int(np.flatnonzero(TABLE[a] == 1)[0]) for a in range(1, 256))], dtype=np.uint8)


def losses(k: int, m: int, n: int = EVERY_UP_TO) -> Iterator[tuple[int, ...]]:
    """Every choice of m lost shards where there are at most n, else a random sample."""
    if comb(k + m, m) <= n:
        yield from combinations(range(k + m), m)
        return
    rng = random.Random(SEED)
    for _ in range(min(n, N_RANDOM)):
        yield tuple(sorted(rng.sample(range(k + m), m)))


def generator_of(k: int, m: int) -> np.ndarray:
    """uint8[k + m, k] as the format defines it, element by element."""
    rows = np.eye(k + m, k, dtype=np.uint8)
    for i in range(k, k + m):
        rows[i] = [INVERSES[i ^ j] for j in range(k)]
    return rows


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint8[n, r, k] times uint8[n, k, c], matrix by matrix."""
    total = np.zeros((a.shape[0], a.shape[1], b.shape[2]), dtype=np.uint8)
    for i in range(a.shape[2]):
        total ^= TABLE[a[:, :, i, np.newaxis], b[:, np.newaxis, i, :]]
    return total


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("k", "m"), CODES)
def test_decode_rows_of_every_pattern_times_the_survivors_rows_are_the_lost_rows(k, m):
    whole, n_tried, patterns = generator_of(k, m), 0, losses(k, m)
    assert np.array_equal(whole[k:], cauchy(k, m))
    while batch := list(islice(patterns, 2_000)):
        lost = np.array(batch)
        used = np.array([[i for i in range(k + m) if i not in pattern] for pattern in batch])
        decode = np.array([decode_rows(k, m, u, pattern) for u, pattern in zip(used.tolist(), batch, strict=True)])
        wrong = (product(decode, whole[used]) != whole[lost]).any(axis=(1, 2))
        assert not wrong.any(), f"seed {SEED}: lost {lost[wrong][0]}"
        n_tried += len(batch)
    assert n_tried == (comb(k + m, m) if comb(k + m, m) <= EVERY_UP_TO else N_RANDOM)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("k", "m"), CODES)
def test_reconstruct_of_every_pattern_gives_every_byte_back(k, m):
    """All patterns of the smaller codes, a sample of the others (all of them with `make parity-patterns`)."""
    rs, rng = ReedSolomon(k, m), random.Random(SEED)
    data = [rng.randbytes(131) for _ in range(k)]
    whole = [*data, *rs.encode(data)]
    patterns = losses(k, m) if comb(k + m, m) <= N_REBUILT or ALL else losses(k, m, N_REBUILT)
    for lost in patterns:
        holes = [None if i in lost else shard for i, shard in enumerate(whole)]
        assert rs.reconstruct(holes) == whole, f"seed {SEED}: lost {lost}"


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (6, 3), (8, 3)])
def test_reconstruct_every_pattern_of_one_loss_too_many_raises(k, m):
    rs = ReedSolomon(k, m)
    data = [bytes([i]) * 9 for i in range(k)]
    whole = [*data, *rs.encode(data)]
    for lost in combinations(range(k + m), m + 1):
        with pytest.raises(TooFewShards) as caught:
            rs.reconstruct([None if i in lost else shard for i, shard in enumerate(whole)])
        assert str(caught.value) == (
            f"stripe {k}+{m}: expected at least {k} shards, got {k - 1} ({m + 1} lost, {m} can be); nothing was rebuilt"
        )


def test_parity_equals_logarithm_tables_made_from_two():
    """A second oracle: discrete logarithms to the base 2, and division by subtracting them."""
    power = [1]
    for _ in range(254):
        power.append(power[-1] << 1 ^ (0x11D if power[-1] & 0x80 else 0))
    log = {value: i for i, value in enumerate(power)}
    rng = random.Random(SEED)
    for k, m in CODES:
        data = [rng.randbytes(40) for _ in range(k)]
        expected = []
        for i in range(k, k + m):
            total = [0] * 40
            for j in range(k):
                for t, byte in enumerate(data[j]):
                    total[t] ^= power[(log[byte] - log[i ^ j]) % 255] if byte else 0
            expected.append(bytes(total))
        assert ReedSolomon(k, m).encode(data) == expected, f"seed {SEED}: {k}+{m}"


if ALL:

    @pytest.mark.parametrize(("k", "m"), CODES)
    def test_parity_and_rebuilt_bytes_equal_galois(k, m):
        import galois

        field = galois.GF(2**8, irreducible_poly=0x11D, primitive_element=2)
        rows = field(np.arange(k, k + m, dtype=np.uint8))[:, np.newaxis]
        lower = field(1) / (rows + field(np.arange(k, dtype=np.uint8)))
        whole = np.concatenate([field.Identity(k), lower]).view(field)
        data = field(np.random.default_rng(SEED).integers(0, 256, (k, 1_000), dtype=np.uint8))
        shards = [bytes(row) for row in np.array(whole @ data, dtype=np.uint8)]
        assert ReedSolomon(k, m).encode(shards[:k]) == shards[k:]
        for lost in islice(losses(k, m, 50), 50):
            used = [i for i in range(k + m) if i not in lost]
            rebuilt = whole[list(lost)] @ np.linalg.inv(whole[used]) @ (whole[used] @ data)
            expected = [bytes(row) for row in np.array(rebuilt, dtype=np.uint8)]
            got = ReedSolomon(k, m).reconstruct([None if i in lost else shard for i, shard in enumerate(shards)])
            assert [got[i] for i in lost] == expected
