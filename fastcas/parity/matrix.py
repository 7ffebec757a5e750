"""The generator matrix of the parity format, and its inverses.

The field is GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11d); x (the byte 2) generates its
multiplicative group. For k data and m parity shards, k + m <= 255, the generator has k + m rows and k columns:

    row i, i < k:          1 in column i, 0 elsewhere (the code is systematic: data shards are stored as they are)
    row k + i, 0 <= i < m: column j holds 1 / ((k + i) xor j)

Byte t of shard r is the sum over j of G[r][j] * (byte t of data shard j). The lower part is a Cauchy matrix over the
disjoint points k..k+m-1 and 0..k-1, so every square part of it is invertible, and with it every choice of k rows of
the whole: any k shards give the data back. (A Vandermonde matrix below an identity does not: 10 + 5 over 0x11d leaves
10 of its 3,003 patterns unrecoverable.) This definition is part of the file format: parity chunks' hashes depend on
every coefficient.

Source: J. Bloemer et al., "An XOR-Based Erasure-Resilient Coding Scheme", ICSI TR-95-048, 1995, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["cauchy", "decode_rows", "invert", "multiply"]

Matrix = npt.NDArray[np.uint8]

POLYNOMIAL = 0x11D


def _make_tables() -> tuple[Matrix, npt.NDArray[np.intp]]:
    """Return (exp, log): exp[i] = 2^i for i in 0..509, log[exp[i]] = i for i in 0..254; log[0] is not a logarithm."""
    exp = np.zeros(510, dtype=np.uint8)
    log = np.zeros(256, dtype=np.intp)
    value = 1
    for i in range(255):
        exp[i] = exp[i + 255] = value
        log[value] = i
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return exp, log


_EXP, _LOG = _make_tables()


def _products(a: Matrix, b: Matrix) -> Matrix:
    """Return a * b, element by element, broadcast."""
    product: Matrix = np.where((a == 0) | (b == 0), np.uint8(0), _EXP[_LOG[a] + _LOG[b]])
    return product


def _inverses(a: Matrix) -> Matrix:
    """Return 1 / a, element by element; no element may be 0."""
    inverse: Matrix = _EXP[255 - _LOG[a]]
    return inverse


def multiply(a: Matrix, b: Matrix) -> Matrix:
    """Return the matrix product of uint8[n, m] and uint8[m, p] over the field, uint8[n, p]."""
    product = np.zeros((a.shape[0], b.shape[1]), dtype=np.uint8)
    for i in range(a.shape[1]):
        product ^= _products(a[:, i : i + 1], b[i : i + 1, :])
    return product


def cauchy(k: int, m: int) -> Matrix:
    """Return the generator's lower part, uint8[m, k], C-contiguous: the coefficients of the parity shards."""
    rows = np.arange(k, k + m, dtype=np.uint8)[:, np.newaxis]
    return _inverses(rows ^ np.arange(k, dtype=np.uint8))


def invert(square: Matrix) -> Matrix:
    """Return the inverse of a square matrix by Gauss–Jordan elimination, uint8[n, n].

    Raises:
        ValueError: The matrix is singular.
    Cost: n^3 / 2 table look-ups, vectorised by rows.
    """
    n = square.shape[0]
    work = np.concatenate([square, np.eye(n, dtype=np.uint8)], axis=1)
    for column in range(n):
        candidates = np.flatnonzero(work[column:, column])
        if candidates.size == 0:
            raise ValueError(f"matrix: singular at column {column}")
        pivot = column + int(candidates[0])
        if pivot != column:
            work[[column, pivot]] = work[[pivot, column]]
        work[column] = _products(work[column], _inverses(work[column, column : column + 1]))
        factors = work[:, column : column + 1].copy()
        factors[column] = 0
        work ^= _products(factors, work[column : column + 1, :])
    return np.ascontiguousarray(work[:, n:])


def decode_rows(k: int, m: int, used: Sequence[int], lost: Sequence[int]) -> Matrix:
    """Return the coefficients that compute lost shards from k surviving ones.

    Args:
        k: Data shards.
        m: Parity shards.
        used: k different surviving shards in ascending order; data shards are 0..k-1, parity shards k..k+m-1. Every
            data shard that is not among them is in `lost`.
        lost: The shards to compute, in ascending order.
    Returns:
        uint8[len(lost), k], C-contiguous: row i computes lost[i] from the shards in the order of `used`.
    Cost: one inversion of as many rows as data shards are lost, not of k.
    """
    below = cauchy(k, m)
    present = [i for i in used if i < k]
    parity = [i - k for i in used if i >= k]
    lost_data = [i for i in lost if i < k]
    lost_parity = [i - k for i in lost if i >= k]

    # parity = A * present + B * lost_data, hence lost_data = B^-1 * A * present + B^-1 * parity (- is +).
    inverse = invert(below[np.ix_(parity, lost_data)])
    data_rows = np.concatenate([multiply(inverse, below[np.ix_(parity, present)]), inverse], axis=1)
    # A lost parity shard is its row of the generator over present and lost data.
    parity_rows = multiply(below[np.ix_(lost_parity, lost_data)], data_rows)
    parity_rows[:, : len(present)] ^= below[np.ix_(lost_parity, present)]
    return np.ascontiguousarray(np.concatenate([data_rows, parity_rows]))
