"""The collection format: canonical, bounded, and deaf to every hostile path."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.errors import CollectionCorrupt
from fastcas.metadata import EMPTY_SHA256
from fastcas.store import Collection, FileEntry, PackEntry, SmallEntry, check_path, check_paths
from fastcas.store.collection import MAGIC

H1, H2 = b"1" * 32, b"2" * 32


def small(path: str, size: int = 3, offset: int = 0, pack: int = 0) -> SmallEntry:
    digest = EMPTY_SHA256 if size == 0 else hashlib.sha256(path.encode()).digest()
    return SmallEntry(path, False, size, digest, pack, offset)


SAMPLE = Collection(
    packs=(PackEntry(H1, H2, 100),),
    dirs=("a", "a/b", "empty"),
    files=(FileEntry("a/big", True, 70_000, H1, H2), FileEntry("z", False, 1 << 40, H2, H1)),
    small=(small("a/b/nothing", 0), small("a/b/x", 3, 0), small("b", 97, 3)),
)


def with_paths(*paths: str) -> bytes:
    """A collection whose only sin can be its paths; parents are listed."""
    parents = {"/".join(path.split("/")[:i]) for path in paths for i in range(1, path.count("/") + 1)}
    return Collection(dirs=tuple(parents), small=tuple(small(path, 0) for path in paths)).encode()


def test_collection_round_trip_is_identity() -> None:
    data = SAMPLE.encode()
    assert data.startswith(b"fastcas-collection 1\n")
    assert Collection.decode(data) == SAMPLE
    assert Collection.decode(data).encode() == data
    assert SAMPLE.size == 70_000 + (1 << 40) + 100


def test_collection_layout_is_as_documented() -> None:
    data = Collection((PackEntry(H1, H2, 5),), ("d",), (), (small("d/f", 5),)).encode()
    expected = MAGIC + struct.pack("<IIII", 1, 1, 0, 1) + struct.pack("<Q", 5) + H1 + H2
    expected += struct.pack("<H", 1) + b"d"
    expected += struct.pack("<BIQI", 0, 0, 0, 5) + hashlib.sha256(b"d/f").digest() + struct.pack("<H", 3) + b"d/f"
    assert data == expected


def test_empty_directory_is_37_bytes() -> None:
    assert len(Collection().encode()) == 37
    assert Collection.decode(Collection().encode()) == Collection()


def test_collection_is_canonical_whatever_the_order() -> None:
    shuffled = Collection(SAMPLE.packs, SAMPLE.dirs[::-1], SAMPLE.files[::-1], SAMPLE.small[::-1])
    assert shuffled.encode() == SAMPLE.encode()


def test_collection_truncated_anywhere_is_refused() -> None:
    data = SAMPLE.encode()
    for end in range(len(data)):
        with pytest.raises(CollectionCorrupt):
            Collection.decode(data[:end])


def test_collection_with_trailing_bytes_is_refused() -> None:
    with pytest.raises(CollectionCorrupt, match="after the last entry"):
        Collection.decode(SAMPLE.encode() + b"\0")


def test_collection_with_any_bit_flipped_is_refused_or_canonical() -> None:
    data = SAMPLE.encode()
    for at in range(len(data)):
        for bit in range(8):
            raw = bytearray(data)
            raw[at] ^= 1 << bit
            try:
                assert Collection.decode(bytes(raw)).encode() == bytes(raw)
            except CollectionCorrupt:
                continue


HOSTILE = [
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/..",
    "..",
    ".",
    "a/./b",
    "a//b",
    "a/",
    "/",
    "",
    "a\\b",
    "..\\..\\x",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "a\x7fb",
    "a\x85b",
    "a\u202eb",
    "a\u200bb",
    "a\u2066b",
    "\ufeffa",
    "a\u061cb",
    "cafe\u0301",
    "x" * 256,
    "\u00e4" * 128,
    "/".join("a" * 65),
    "/".join(["a" * 250] * 17),
]
NOT_PORTABLE = [
    "C:",
    "C:/x",
    "a:stream",
    "a<b",
    "a>b",
    'a"b',
    "a|b",
    "a?b",
    "a*b",
    "a.",
    "a ",
    " a",
    "a./b",
    "CON",
    "con.txt",
    "Aux.tar.gz",
    "a/NUL",
    "COM1",
    "lpt9.x",
    "COM\u00b9",
    "CLOCK$",
    "conin$",
    "PRN .x",
]
FINE = [
    "a",
    ".hidden",
    "..x",
    "x..",
    "a/b/c",
    "with space",
    "\u00e4\u00f6\u00fc",
    "\u65e5\u672c/\u8a9e",
    "console",
    "com",
    "COM10",
    "x" * 255,
    "\u00e4" * 127,
    "/".join("a" * 64),
    "-rf",
    "~",
    "$HOME",
    "%2e%2e",
]
FINE.remove("x..")


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("posix_names", [False, True])
def test_hostile_path_rejects_the_whole_collection(path: str, posix_names: bool) -> None:
    with pytest.raises(CollectionCorrupt) as caught:
        check_path(path, posix_names=posix_names)
    assert caught.value.args[0].isprintable()
    with pytest.raises(CollectionCorrupt):
        Collection.decode(with_paths("good", path), posix_names=posix_names)


@pytest.mark.parametrize("path", NOT_PORTABLE)
def test_name_that_other_systems_cannot_have_needs_the_option(path: str) -> None:
    with pytest.raises(CollectionCorrupt):
        Collection.decode(with_paths(path))
    assert Collection.decode(with_paths(path), posix_names=True).small[0].path == path


@pytest.mark.parametrize("path", FINE)
def test_ordinary_path_is_accepted(path: str) -> None:
    check_path(path)
    assert Collection.decode(with_paths(path)).small[0].path == path


@pytest.mark.parametrize("raw", [b"a\xff", b"\xc0\xae\xc0\xae", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])
def test_path_that_is_not_utf8_is_refused(raw: bytes) -> None:
    data = Collection(small=(small("x" * len(raw), 0),)).encode().replace(b"x" * len(raw), raw)
    with pytest.raises(CollectionCorrupt, match="UTF-8"):
        Collection.decode(data)


@pytest.mark.parametrize(
    ("one", "two"), [("A", "a"), ("dir/F", "dir/f"), ("\u00c4", "\u00e4"), ("stra\u00dfe", "STRASSE")]
)
def test_paths_that_differ_in_case_only_are_refused(one: str, two: str) -> None:
    with pytest.raises(CollectionCorrupt, match="the same"):
        Collection.decode(with_paths(one, two))
    Collection.decode(with_paths(one, two), posix_names=True)


def test_file_that_is_also_a_directory_is_refused() -> None:
    with pytest.raises(CollectionCorrupt, match="the same"):
        Collection.decode(Collection(dirs=("a",), small=(small("a", 0), small("a/b", 0))).encode())


def test_file_in_two_lists_is_refused() -> None:
    with pytest.raises(CollectionCorrupt, match="the same"):
        Collection.decode(Collection(files=(FileEntry("a", False, 1, H1, H2),), small=(small("a", 0),)).encode())


def test_parent_that_is_not_listed_is_refused() -> None:
    with pytest.raises(CollectionCorrupt, match="not listed"):
        Collection.decode(Collection(small=(small("a/b", 0),)).encode())
    with pytest.raises(CollectionCorrupt, match="not listed"):
        Collection.decode(Collection(dirs=("a/b",)).encode())


def test_repeated_and_unsorted_entries_are_refused() -> None:
    for paths in (("b", "a"), ("a", "a")):
        data = MAGIC + struct.pack("<IIII", 0, 2, 0, 0)
        data += b"".join(struct.pack("<H", len(path)) + path.encode() for path in paths)
        with pytest.raises(CollectionCorrupt, match="out of order or repeated"):
            Collection.decode(data)


@pytest.mark.parametrize(
    "entry",
    [
        small("x", 3, 98),
        small("x", 3, (1 << 64) - 1),
        small("x", 3, 0, pack=1),
        small("x", 65_537),
        replace(small("x", 0), offset=1),
        replace(small("x", 0), pack=1),
        replace(small("x", 0), sha256=H1),
    ],
)
def test_small_file_outside_its_pack_is_refused(entry: SmallEntry) -> None:
    with pytest.raises(CollectionCorrupt):
        Collection.decode(Collection(packs=(PackEntry(H1, H2, 100),), small=(entry,)).encode())


def test_counts_are_bounded_before_anything_is_read() -> None:
    most = 1_000_000
    files = ((0, 0, 0, most + 1), (0, 0, most, 1), (0xFFFFFFFF, 0, 0, 0xFFFFFFFF))
    for counts in (*files, (2, 0, 0, 1), (0, most + 1, 1, 0)):
        with pytest.raises(CollectionCorrupt, match="limit"):
            Collection.decode(MAGIC + struct.pack("<IIII", *counts))


@pytest.mark.parametrize("counts", [(0, 1_000_000, 0, 0), (0, 1_000_000, 0, 1_000_000), (0, 0, 999_999, 1)])
def test_as_many_as_the_limits_are_read_on(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(CollectionCorrupt, match="ends"):
        Collection.decode(MAGIC + struct.pack("<IIII", *counts))


@pytest.mark.parametrize("size", [0, (1 << 50) + 1, (1 << 64) - 1])
def test_pack_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(CollectionCorrupt, match="pack"):
        Collection.decode(Collection(packs=(PackEntry(H1, H2, size),), small=(small("a", 0),)).encode())


def test_unknown_mode_is_refused() -> None:
    data = bytearray(Collection(small=(small("a", 0),)).encode())
    data[37] = 2
    with pytest.raises(CollectionCorrupt, match="mode 2"):
        Collection.decode(bytes(data))


def test_all_bad_names_are_told_at_once() -> None:
    with pytest.raises(CollectionCorrupt, match=r"'\.\.'.*'a:b'") as caught:
        check_paths(["fine"], ["..", "a:b"])
    assert "fine" not in str(caught.value)


NAMES = st.text(alphabet="abcXYZ019._-\u00e4\u65e5", min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(st.sets(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=12))
def test_decoder_accepts_exactly_what_the_rules_allow(paths: set[str]) -> None:
    data = with_paths(*paths)
    dirs = {"/".join(path.split("/")[:i]) for path in paths for i in range(1, path.count("/") + 1)}
    try:
        check_paths(dirs, paths)
    except CollectionCorrupt:
        with pytest.raises(CollectionCorrupt):
            Collection.decode(data)
    else:
        assert {entry.path for entry in Collection.decode(data).small} == paths


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_after_the_first_line_never_ends_in_a_foreign_exception(noise: bytes) -> None:
    try:
        assert Collection.decode(MAGIC + noise).encode() == MAGIC + noise
    except CollectionCorrupt:
        return
