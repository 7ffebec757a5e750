"""The manifest: canonical bytes that survive a round trip and nothing else."""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.errors import ManifestCorrupt, UsageError
from fastcas.hashing import ChunkHasher
from fastcas.metadata import (
    EMPTY_SHA256,
    HEADER,
    SHA256_IV,
    FileMetadata,
    Manifest,
    check_chunking,
    choose_average,
    choose_chunk_size,
)
from tests.support.store_rig import INTERESTING_SIZES, data_of

KIB = 1 << 10
MIB = 1 << 20


def made(size: int, chunk_size: int = 16 * KIB, k: int = 0, m: int = 0) -> Manifest:
    hasher = ChunkHasher(chunk_size)
    hasher.update(data_of(size))
    hashes, midstates, file_hash, _ = hasher.finish()
    n = len(hashes) // 32
    parity = b"".join(hashlib.sha256(b"p%d" % i).digest() for i in range(-(-n // k) * m if k else 0))
    return Manifest(file_hash, size, chunk_size, hashes, midstates, k, m, parity)


def synthetic(n: int, chunk_size: int, k: int = 0, m: int = 0, last: int = 1) -> Manifest:
    """A manifest of n chunks without the bytes."""
    size = (n - 1) * chunk_size + last
    p = -(-n // k) * m if k else 0
    return Manifest(b"f" * 32, size, chunk_size, b"h" * 32 * n, b"s" * 32 * (n - 1), k, m, b"p" * 32 * p)


@pytest.mark.parametrize("size", INTERESTING_SIZES)
@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (4, 2), (10, 4)])
def test_manifest_round_trip_is_identity(size: int, shape: tuple[int, int]) -> None:
    manifest = made(size, k=shape[0], m=shape[1])
    again = Manifest.decode(manifest.data)
    assert again == manifest
    assert again.data == manifest.data
    assert again.manifest_hash == hashlib.sha256(manifest.data).digest()


def test_manifest_layout_is_as_documented() -> None:
    manifest = made(3 * 16384 + 7, k=2, m=1)
    data = manifest.data
    assert data[:8] == b"FCASMAN1"
    assert data[8:12] == bytes([1, 0, 2, 1])
    assert struct.unpack_from("<IQII", data, 12) == (16384, 3 * 16384 + 7, 4, 2)
    assert data[32:64] == manifest.file_hash
    assert data[64 : 64 + 128] == manifest.hashes
    assert data[192 : 192 + 96] == manifest.midstates
    assert data[288:] == manifest.parity_hashes
    assert len(data) == 64 + 32 * (4 + 3 + 2)


def test_manifest_of_known_bytes_has_a_fixed_hash() -> None:
    """Format golden value: 40,000 bytes of 'a' in 16 KiB chunks; hashes from hashlib alone."""
    content = b"a" * 40_000
    hasher = ChunkHasher(16384)
    hasher.update(content)
    hashes, midstates, file_hash, size = hasher.finish()
    expected = b"".join(hashlib.sha256(content[at : at + 16384]).digest() for at in (0, 16384, 32768))
    assert (hashes, file_hash, size) == (expected, hashlib.sha256(content).digest(), 40_000)
    header = struct.pack("<8sBBBBIQII32s", b"FCASMAN1", 1, 0, 0, 0, 16384, 40_000, 3, 0, file_hash)
    assert Manifest(file_hash, size, 16384, hashes, midstates).data == header + hashes + midstates


@pytest.mark.parametrize("size", [0, 1, 16384, 40_000])
def test_manifest_truncated_anywhere_is_refused(size: int) -> None:
    data = made(size, k=2, m=1).data
    for end in range(len(data)):
        with pytest.raises(ManifestCorrupt):
            Manifest.decode(data[:end])


@pytest.mark.parametrize("extra", [b"\0", b"x" * 31, b"x" * 32, b"x" * 64])
def test_manifest_with_trailing_bytes_is_refused(extra: bytes) -> None:
    with pytest.raises(ManifestCorrupt):
        Manifest.decode(made(40_000).data + extra)


@pytest.mark.parametrize("at", range(HEADER.size))
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_manifest_header_bit_flip_never_decodes_to_the_same(at: int, bit: int) -> None:
    manifest = made(5 * 16384 + 1, k=4, m=2)
    data = bytearray(manifest.data)
    data[at] ^= 1 << bit
    try:
        other = Manifest.decode(bytes(data))
    except ManifestCorrupt:
        return
    assert other.data == bytes(data)
    assert other.manifest_hash != manifest.manifest_hash
    assert other.n_total == manifest.n_total


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"FCASMAN2"),
        (0, b"GCASMAN1"),
        (8, b"\0"),
        (8, b"\2"),
        (9, b"\1"),
        (9, b"\x80"),
        (10, b"\1"),
        (11, b"\1"),
        (10, b"\xff\xff"),
        (12, struct.pack("<I", 0)),
        (12, struct.pack("<I", 8192)),
        (12, struct.pack("<I", 16385)),
        (12, struct.pack("<I", 32 * MIB)),
        (12, struct.pack("<I", 0xFFFFFFFF)),
        (16, struct.pack("<Q", 0)),
        (16, struct.pack("<Q", 1 << 63)),
        (16, struct.pack("<Q", (1 << 64) - 1)),
        (24, struct.pack("<I", 2)),
        (24, struct.pack("<I", 4)),
        (24, struct.pack("<I", 0xFFFFFFFF)),
        (28, struct.pack("<I", 1)),
        (28, struct.pack("<I", 0xFFFFFFFF)),
    ],
)
def test_manifest_with_a_wrong_field_is_refused(offset: int, value: bytes) -> None:
    data = bytearray(made(40_000).data)
    data[offset : offset + len(value)] = value
    with pytest.raises(ManifestCorrupt):
        Manifest.decode(bytes(data))


def test_manifest_of_nothing_must_have_the_hash_of_nothing() -> None:
    assert made(0).file_hash == EMPTY_SHA256
    with pytest.raises(ManifestCorrupt, match="hash of nothing"):
        Manifest(b"x" * 32, 0, 16384, b"", b"")


def test_manifest_of_one_chunk_must_have_its_hash() -> None:
    manifest = made(100)
    assert manifest.hashes == manifest.file_hash
    with pytest.raises(ManifestCorrupt, match="one chunk"):
        replace(manifest, hashes=b"x" * 32)


def test_manifest_links_chain_to_the_file_hash() -> None:
    manifest = made(3 * 16384)
    assert manifest.chain_before(0) == SHA256_IV
    assert manifest.chain_after(0) == manifest.chain_before(1) == manifest.midstates[:32]
    assert manifest.chain_after(2) == manifest.file_hash


@pytest.mark.parametrize(("n", "k", "m"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (9, 4, 2), (7, 3, 1)])
def test_manifest_stripes_cover_every_chunk_once(n: int, k: int, m: int) -> None:
    manifest = synthetic(max(n, 2), 16384, k, m, last=5)
    seen: list[int] = []
    for number in range(manifest.n_stripes):
        data, parity = manifest.stripe(number)
        assert len(parity) == m
        assert all(manifest.stripe_of(i) == number for i in (*data, *parity))
        assert {manifest.length_of(i) for i in parity} == {manifest.length_of(data[0])}
        seen += [*data, *parity]
    assert sorted(seen) == list(range(manifest.n_total))


def test_manifest_lengths_add_up() -> None:
    manifest = made(300_001)
    assert sum(manifest.length_of(i) for i in range(manifest.n_chunks)) == 300_001


def test_manifest_of_65536_chunks_encodes_and_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = synthetic(65_536, 256 * KIB)
    began = time.perf_counter()
    again = Manifest.decode(manifest.data)
    took_ms = (time.perf_counter() - began) * 1000
    assert again == manifest
    with capsys.disabled():
        print(f"\n65,536 chunks: encode and decode {took_ms:.1f} ms", end=" ")


def test_manifest_over_the_limits_is_refused() -> None:
    with pytest.raises(ManifestCorrupt, match="200001 chunks"):
        synthetic(200_001, 16 * KIB)
    with pytest.raises(ManifestCorrupt, match="over"):
        synthetic(200_000, 16 * KIB, 1, 2)
    with pytest.raises(ManifestCorrupt, match="stripe"):
        synthetic(100, 16 * MIB, 100, 10)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_manifest_decoder_accepts_only_canonical_bytes(data: st.DataObject) -> None:
    raw = bytearray(made(data.draw(st.sampled_from([0, 1, 40_000, 98_304])), k=2, m=1).data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    try:
        decoded = Manifest.decode(bytes(raw))
    except ManifestCorrupt:
        return
    assert decoded.data == bytes(raw)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_manifest_decoder_refuses_noise(noise: bytes) -> None:
    with pytest.raises(ManifestCorrupt):
        Manifest.decode(noise)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 256 * KIB),
        (65_536 * 256 * KIB, 256 * KIB),
        (65_536 * 256 * KIB + 1, 512 * KIB),
        (1 << 40, 16 * MIB),
        (200_000 * 16 * MIB, 16 * MIB),
    ],
)
def test_chunk_size_auto_doubles_until_it_fits(size: int, expected: int) -> None:
    assert choose_chunk_size(size) == expected


@pytest.mark.parametrize("wanted", [0, 1, 16383, 16385, 8 * KIB, 32 * MIB, 3 * 16384])
def test_chunk_size_that_is_no_power_of_two_in_range_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match="chunk size"):
        choose_chunk_size(1, wanted)


def test_chunk_size_that_cuts_too_finely_is_refused() -> None:
    with pytest.raises(UsageError, match="limit 200000"):
        choose_chunk_size(16384 * 200_000 + 1, 16384)
    with pytest.raises(UsageError, match="limit 200000"):
        choose_chunk_size(1 << 50)


def test_file_metadata_lists_hashes_as_hex() -> None:
    manifest = made(40_000, k=2, m=1)
    meta = FileMetadata.from_manifest(manifest, "a.bin")
    assert (meta.file_hash, meta.original_name, meta.size) == (manifest.file_hash.hex(), "a.bin", 40_000)
    assert "".join(meta.data_chunks) == manifest.hashes.hex()
    assert "".join(meta.parity_chunks) == manifest.parity_hashes.hex()


def cut(*lengths: int, chunk_size: int = 256 * KIB) -> Manifest:
    """A manifest of chunks cut by content, with hashes of their numbers."""
    hashes = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(len(lengths)))
    file_hash = hashes if len(lengths) == 1 else hashlib.sha256(b"content").digest()
    packed = struct.pack(f"<{len(lengths)}I", *lengths)
    return Manifest(file_hash, sum(lengths), chunk_size, hashes, b"", lengths=packed)


def test_cdc_manifest_layout_is_as_documented_and_comes_back() -> None:
    manifest = cut(16384, 262_144, 20_000, 5)
    data = manifest.data
    assert data[:12] == b"FCASMAN1" + bytes([1, 1, 0, 0])
    assert struct.unpack_from("<IQII", data, 12) == (256 * KIB, 298_533, 4, 0)
    assert data[32:64] == manifest.file_hash
    assert data[64 : 64 + 128] == manifest.hashes
    assert struct.unpack("<4I", data[192:]) == (16384, 262_144, 20_000, 5)
    again = Manifest.decode(data)
    assert again == manifest and again.data == data and again.is_cdc and again.chunking == "cdc"
    assert (again.n_chunks, again.n_total, again.n_stripes, again.wanted_size) == (4, 4, 0, 64 * KIB)


def test_cdc_manifest_knows_where_each_chunk_lies() -> None:
    manifest = cut(16384, 262_144, 20_000, 5)
    assert [manifest.offset_of(i) for i in range(5)] == [0, 16384, 278_528, 298_528, 298_533]
    assert [manifest.length_of(i) for i in range(4)] == [16384, 262_144, 20_000, 5]
    assert [manifest.chunk_at(at) for at in (0, 16383, 16384, 278_527, 278_528, 298_527, 298_528, 298_532)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    fixed = made(40_000)
    assert [fixed.offset_of(i) for i in range(3)] == [0, 16384, 32768]
    assert [fixed.chunk_at(at) for at in (0, 16383, 16384, 39_999)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "lengths", [(16383, 5), (262_145,), (16384, 262_145, 5), (16384, 0), (16384, 16384, 16383, 1), (0,)]
)
def test_cdc_manifest_with_a_length_outside_the_rule_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ManifestCorrupt):
        cut(*lengths)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (9, b"\2"),
        (9, b"\3"),
        (9, b"\0"),
        (10, b"\1"),
        (11, b"\1"),
        (10, b"\1\1"),
        (12, struct.pack("<I", 128 * KIB)),
        (12, struct.pack("<I", 32 * MIB)),
        (12, struct.pack("<I", 300_000)),
        (12, struct.pack("<I", 512 * KIB)),  # the lengths are too short for it
        (16, struct.pack("<Q", 298_532)),
        (16, struct.pack("<Q", 0)),
        (16, struct.pack("<Q", (1 << 50) + 1)),
        (24, struct.pack("<I", 3)),
        (24, struct.pack("<I", 0)),
        (24, struct.pack("<I", 200_001)),
        (24, struct.pack("<I", 0xFFFFFFFF)),
        (28, struct.pack("<I", 1)),
        (192, struct.pack("<I", 16385)),
        (204, struct.pack("<I", 0)),
    ],
)
def test_cdc_manifest_with_a_wrong_field_is_refused(offset: int, value: bytes) -> None:
    data = bytearray(cut(16384, 262_144, 20_000, 5).data)
    data[offset : offset + len(value)] = value
    with pytest.raises(ManifestCorrupt):
        Manifest.decode(bytes(data))


def test_cdc_manifest_truncated_or_with_more_is_refused() -> None:
    data = cut(16384, 262_144, 20_000, 5).data
    for end in range(len(data)):
        with pytest.raises(ManifestCorrupt):
            Manifest.decode(data[:end])
    for extra in (b"\0", b"\0" * 4, b"x" * 32, b"x" * 36):
        with pytest.raises(ManifestCorrupt):
            Manifest.decode(data + extra)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cdc_manifest_decoder_accepts_only_canonical_bytes(data: st.DataObject) -> None:
    raw = bytearray(cut(*data.draw(st.sampled_from([(5,), (16384, 1), (16384, 262_144, 20_000, 5)]))).data)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = Manifest.decode(bytes(raw))
    except ManifestCorrupt:
        return
    assert decoded.data == bytes(raw)


def test_cdc_manifest_of_one_chunk_must_have_its_hash() -> None:
    with pytest.raises(ManifestCorrupt, match="one chunk"):
        replace(cut(100), hashes=b"x" * 32)


def test_cdc_with_parity_or_an_unknown_chunking_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot have parity"):
        check_chunking("cdc", (4, 2))
    with pytest.raises(UsageError, match="chunking"):
        check_chunking("rabin", None)


@pytest.mark.parametrize(("size", "expected"), [(0, MIB), (1 << 36, MIB), ((1 << 36) + 1, 2 * MIB), (1 << 39, 4 * MIB)])
def test_average_doubles_until_it_fits(size: int, expected: int) -> None:
    assert choose_average(size) == expected


@pytest.mark.parametrize("wanted", [0, 32 * KIB, 100_000, 8 * MIB])
def test_average_out_of_range_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        choose_average(1, wanted)
    with pytest.raises(UsageError, match="more than 200000"):
        choose_average(1 << 45)
