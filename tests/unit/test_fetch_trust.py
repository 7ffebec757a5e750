"""Trust: verdicts, the proven suffix, the window, and manifests that are not what they should be."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcas.errors import ManifestCorrupt
from fastcas.fetch.trust import Chain, Verdict, check_manifest, judge
from fastcas.metadata import Manifest
from tests.support.evil_peer import content_of, make_manifest


def blank(n: int, chunk_size: int = 1 << 14) -> Manifest:
    """Return a manifest of n chunks whose hashes mean nothing."""
    rng = random.Random(n)
    return Manifest(
        rng.randbytes(32), n * chunk_size, chunk_size, rng.randbytes(32 * n), rng.randbytes(32 * (n - 1))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "is_data", "verdict"),
    [
        (7, True, Verdict.RIGHT),
        (4, True, Verdict.PEER),
        (5, True, Verdict.MANIFEST),
        (6, True, Verdict.MANIFEST),
        (14, True, Verdict.RIGHT),
        (1, False, Verdict.RIGHT),
        (0, False, Verdict.PEER),
    ],
)
def test_verdicts(flags: int, is_data: bool, verdict: Verdict) -> None:
    assert judge(flags, is_data=is_data) is verdict


@given(st.permutations(range(30)))
def test_proven_suffix_is_the_run_that_reaches_the_end(order: list[int]) -> None:
    chain = Chain(blank(30), trusted=False)
    checked: set[int] = set()
    for index in order:
        chain.link_holds(index)
        checked.add(index)
        expected = next((i for i in range(30, 0, -1) if i - 1 not in checked), 0)
        assert chain.proven_from == expected
    assert chain.content_proven
    assert chain.unchecked() == []


@given(st.integers(2, 2000), st.integers(0, 1 << 20))
def test_unproven_bytes_stay_within_the_price_of_a_lie(n: int, seed: int) -> None:
    """Whatever order chunks arrive in, those outside the proven suffix are at most max(64 chunks, the suffix)."""
    rng = random.Random(seed)
    chain = Chain(blank(n), trusted=False)
    fetched: set[int] = set()
    for _ in range(3 * n):
        choice = [i for i in range(chain.first_allowed, n) if i not in fetched][:200]
        if not choice:
            break
        index = rng.choice(choice)
        fetched.add(index)
        outside = sum(1 for i in fetched if i < chain.proven_from)
        assert outside <= max(64, n - chain.proven_from)
        chain.link_holds(index)
    assert chain.content_proven


def test_big_chunks_make_the_window_64_mib() -> None:
    chain = Chain(blank(100, 1 << 24), trusted=False)
    assert chain.first_allowed == 96


def test_trusted_manifest_may_be_fetched_at_once() -> None:
    manifest = blank(1000)
    assert Chain(manifest, trusted=True).allowed() == (1 << 1000) - 1
    assert Chain(manifest, trusted=False).allowed() == ((1 << 64) - 1) << 936


def test_one_chunk_and_window() -> None:
    manifest = make_manifest(content_of(100))
    chain = Chain(manifest, trusted=False)
    assert chain.allowed() == 1
    chain.link_holds(0)
    assert chain.content_proven


def test_manifest_of_another_file_is_refused() -> None:
    manifest = make_manifest(content_of(50_000))
    assert check_manifest(manifest.data, manifest.manifest_hash, manifest.file_hash) == manifest
    with pytest.raises(ManifestCorrupt, match="expected file 00000000"):
        check_manifest(manifest.data, manifest.manifest_hash, bytes(32))


def test_malformed_manifest_is_refused() -> None:
    manifest = make_manifest(content_of(50_000))
    for data in (manifest.data[:-1], manifest.data + b"x", b"", bytes(64)):
        with pytest.raises(ManifestCorrupt):
            check_manifest(data, bytes(32), manifest.file_hash)


def test_one_chunk_manifest_must_name_the_file() -> None:
    with pytest.raises(ManifestCorrupt):
        replace(make_manifest(content_of(100)), hashes=bytes(32))
