"""Reed–Solomon encoding and reconstruction: shapes, lengths and lost slots; the arithmetic is csrc/gf256."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, TypeVar, overload

from fastcas.errors import TooFewShards, UsageError
from fastcas.limits import PARITY_TOTAL_MAX
from fastcas.parity._gf256 import Plan, survivors
from fastcas.parity.matrix import cauchy, decode_rows

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ReedSolomon"]

S = TypeVar("S", bound="Buffer")
T = TypeVar("T", bound="Buffer")

# Plans kept, of all codes together. One takes 40 B per coefficient: 1.6 KiB for 10+4, 630 KiB at the very most.
CACHED_PLANS = 64


@lru_cache(maxsize=CACHED_PLANS)
def _encode_plan(k: int, m: int, kernel: str | None) -> Plan:
    return Plan(cauchy(k, m).tobytes(), m, k, kernel=kernel)


@lru_cache(maxsize=CACHED_PLANS)
def _decode_plan(k: int, m: int, used: tuple[int, ...], lost: tuple[int, ...], kernel: str | None) -> Plan:
    return Plan(decode_rows(k, m, used, lost).tobytes(), len(lost), k, kernel=kernel)


class ReedSolomon:
    """A code of k data and m parity shards: any k of the k + m rebuild the others.

    Immutable; any number of threads may use one object at once, and the GIL is released during the arithmetic.

    Args:
        k: Data shards, at least 1.
        m: Parity shards, at least 1; k + m is at most 255.
        kernel: Name of the kernel to demand, None for the process's (`fastcas.parity.kernel_name()`).
    Raises:
        UsageError: k or m is out of range.
        KernelUnavailable: No such kernel here.
    Source: the matrix is defined in fastcas/parity/matrix.py.
    """

    def __init__(self, k: int, m: int, *, kernel: str | None = None) -> None:
        k, m = index(k), index(m)
        if k < 1 or m < 1 or k + m > PARITY_TOTAL_MAX:
            raise UsageError(f"parity: expected k >= 1, m >= 1 and k + m <= {PARITY_TOTAL_MAX}, got {k}+{m}")
        self._k = k
        self._m = m
        self._kernel = kernel
        self._plan = _encode_plan(k, m, kernel)

    def __repr__(self) -> str:
        return f"ReedSolomon({self._k}, {self._m})"

    @property
    def k(self) -> int:
        """Data shards."""
        return self._k

    @property
    def m(self) -> int:
        """Parity shards."""
        return self._m

    @property
    def kernel(self) -> str:
        """Name of the kernel in use."""
        return self._plan.kernel

    @overload
    def encode(self, data: Sequence[Buffer], out: None = None) -> list[bytes]: ...
    @overload
    def encode(self, data: Sequence[Buffer], out: Sequence[T]) -> list[T]: ...
    @overload
    def encode(self, data: Sequence[Buffer], out: Sequence[T | None]) -> list[T | bytes]: ...
    def encode(self, data: Sequence[Buffer], out: Sequence[T | None] | None = None) -> Sequence[T | bytes]:
        """Compute the m parity shards of k data shards.

        Args:
            data: k buffers of one length, which may be 0.
            out: m writable buffers of that length, overwritten; None as a whole or in a slot makes a new `bytes`.
                They must overlap neither each other nor the data.
        Returns:
            The m parity shards: the buffers of `out`, or new ones.
        Raises:
            UsageError: A count, a length, an overlap, or a buffer that is read-only; nothing was written.
        Cost: no copy; new buffers cost more than the arithmetic, so reuse them.
        """
        if len(data) != self._k:
            raise UsageError(f"data: expected {self._k} shards, got {len(data)}; nothing was encoded")
        if out is not None and len(out) != self._m:
            raise UsageError(f"out: expected {self._m} shards, got {len(out)}; nothing was encoded")
        slots: list[T | None] = [None] * self._m if out is None else list(out)
        return self._plan.apply(list(data), slots)

    def reconstruct(self, shards: Sequence[S | None], out: Sequence[T | None] | None = None) -> list[S | T | bytes]:
        """Rebuild what is lost, data and parity alike.

        The first k survivors are used; further ones are neither read nor checked, except for their lengths.

        Args:
            shards: k + m slots, data first; None = lost. All others have one length, which may be 0.
            out: k + m slots; only those of lost shards are used: a writable buffer of that length, or None for a
                new `bytes`. They must overlap neither each other nor the survivors that are used.
        Returns:
            All k + m shards: survivors as given, lost ones rebuilt.
        Raises:
            TooFewShards: Fewer than k survive; nothing was written.
            UsageError: A count, a length, an overlap, or a buffer that is read-only; nothing was written.
        Cost: one pass over k survivors; the inverse for a pattern of losses is computed once and cached.
        """
        total = self._k + self._m
        for name, n_slots in (("shards", len(shards)), ("out", total if out is None else len(out))):
            if n_slots != total:
                raise UsageError(f"{name}: expected {total} slots, got {n_slots}; nothing was rebuilt")
        result: list[S | T | bytes | None] = list(shards)
        here = survivors(list(shards))
        if len(here) < self._k:
            raise TooFewShards(
                f"stripe {self._k}+{self._m}: expected at least {self._k} shards, got {len(here)} "
                f"({total - len(here)} lost, {self._m} can be); nothing was rebuilt"
            )
        lost = [i for i, shard in enumerate(shards) if shard is None]
        if lost:
            used = here[: self._k]
            plan = _decode_plan(self._k, self._m, used, tuple(lost), self._kernel)
            wanted: list[T | None] = [None] * len(lost) if out is None else [out[i] for i in lost]
            given: list[Buffer] = [shard for shard in shards if shard is not None]
            rebuilt = plan.apply(given[: self._k], wanted)
            for i, shard in zip(lost, rebuilt, strict=True):
                result[i] = shard
        return [shard for shard in result if shard is not None]
