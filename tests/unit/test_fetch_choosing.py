"""Patterns that choose files of a collection: against a model that tries everything, and the rules one by one."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcas.errors import NotFound, UsageError
from fastcas.fetch.choosing import Choice, choice_of, chosen_of, chunks_of_ranges, ranges_of_packs
from fastcas.ids import Link, parse_member, parse_ref
from fastcas.store.collection import Collection, FileEntry, SmallEntry
from tests.support.evil_peer import content_of, make_manifest

HASH = "ab" * 32
NAME = st.text("ab.", min_size=1, max_size=4).filter(lambda text: text not in (".", ".."))
PATH = st.lists(NAME, min_size=1, max_size=4).map("/".join)
GLOB = st.text("ab.*?", min_size=1, max_size=4).filter(lambda text: text not in (".", ".."))
PATTERN = st.tuples(
    st.sampled_from(["", "/"]), st.lists(GLOB | st.just("**"), min_size=1, max_size=4).map("/".join),
    st.sampled_from(["", "/"]),
).map("".join)  # fmt: skip


def name_fits(glob: str, name: str) -> bool:
    """Whether one component fits: the definition, by trying."""
    if not glob:
        return not name
    if glob[0] == "*":
        return name_fits(glob[1:], name) or (bool(name) and name_fits(glob, name[1:]))
    return bool(name) and glob[0] in ("?", name[0]) and name_fits(glob[1:], name[1:])


def parts_fit(globs: list[str], names: list[str]) -> bool:
    if not globs:
        return not names
    if globs[0] == "**":
        return parts_fit(globs[1:], names) or (bool(names) and parts_fit(globs, names[1:]))
    return bool(names) and name_fits(globs[0], names[0]) and parts_fit(globs[1:], names[1:])


def model(pattern: str, path: str) -> bool:
    """Whether a pattern fits a file: it, or a folder above it."""
    folders_only = pattern.endswith("/")
    core = pattern.removesuffix("/")
    globs = core.removeprefix("/").split("/")
    if "/" not in core:
        globs = ["**", *globs]
    names = path.split("/")
    ends = range(1, len(names) + (0 if folders_only else 1))
    return any(parts_fit(globs, names[:end]) for end in ends)


@given(PATTERN, PATH)
def test_pattern_fits_what_the_rules_say(pattern: str, path: str) -> None:
    assert Choice([pattern]).fits(path) == model(pattern, path)


@given(st.lists(PATTERN, max_size=3), st.lists(PATTERN, max_size=3), PATH)
def test_include_and_exclude_are_any_and_none(include: list[str], exclude: list[str], path: str) -> None:
    wanted = (not include or any(model(p, path) for p in include)) and not any(model(p, path) for p in exclude)
    assert Choice(include, exclude).fits(path) == wanted


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("*.txt", ["a.txt", "x/y/b.txt"], ["a.txt.gz", "txt", "A.TXT"]),
        ("docs", ["docs", "docs/a", "x/docs/y/z"], ["docs2/a", "x/mydocs"]),
        ("docs/", ["docs/a", "x/docs/y"], ["docs", "x/docs"]),
        ("/README", ["README", "README/a"], ["x/README"]),
        ("a/*.bin", ["a/x.bin", "a/x.bin/below"], ["a/b/x.bin", "b/a/x.bin", "a/.bin2"]),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["z", "b/a/z"]),
        ("**/z", ["z", "a/z", "a/b/z/c"], ["zz"]),
        ("a/**", ["a/b", "a/b/c"], ["b/a"]),
        ("part-0000[0-3].*", ["part-00002.x", "m/part-00003.y"], ["part-00004.x"]),
        ("[!a]b", ["bb", "x/cb"], ["ab"]),
        ("a[*]", ["a*"], ["ab"]),
        ("[", ["["], ["a"]),
    ],
)
def test_rules_one_by_one(pattern: str, fitting: list[str], others: list[str]) -> None:
    choice = Choice([pattern])
    assert [path for path in fitting if not choice.fits(path)] == []
    assert [path for path in others if choice.fits(path)] == []


@pytest.mark.parametrize("pattern", ["", "/", "//", "a//b", "./a", "a/../b", "..", "x" * 5000])
def test_pattern_that_can_fit_nothing_is_a_usage_error(pattern: str) -> None:
    with pytest.raises(UsageError, match="--exclude"):
        choice_of({"exclude": [pattern]})


def test_number_of_patterns_is_bounded() -> None:
    with pytest.raises(UsageError, match="limit 1000"):
        Choice(["a"] * 1001)


def test_hostile_names_cost_no_more_than_long_ones() -> None:
    """A pattern that makes a backtracking matcher try for ages."""
    started = time.process_time()
    assert not Choice(["**/" * 30 + "*a" * 60 + "b"]).fits("/".join(["a" * 60] * 64))
    assert time.process_time() - started < 5  # seconds of CPU; a matcher that tries everything takes years


def tree() -> Collection:
    files = tuple(FileEntry(path, False, 100, bytes(32), bytes(32)) for path in ("a/big", "c/d/big"))
    small = tuple(SmallEntry(path, False, 10, bytes(32), pack, at) for path, pack, at in (("a/s", 0, 0), ("z", 1, 5)))
    return Collection((), ("a", "c", "c/d", "e"), files, small)


def test_chosen_part_has_its_files_their_folders_and_the_packs_they_need() -> None:
    part = Choice(["big"], ["/c/"]).apply(tree())
    assert (part.dirs, [entry.path for entry in part.files], part.small) == (("a",), ["a/big"], ())
    assert ranges_of_packs(part) == {}
    part = Choice(exclude=["big"]).apply(tree())
    assert (part.dirs, part.files, [entry.path for entry in part.small]) == (("a",), (), ["a/s", "z"])
    assert ranges_of_packs(part) == {0: [(0, 10)], 1: [(5, 10)]}
    chosen = chosen_of(tree(), part).to_map()
    assert chosen == {"files": 2, "size": 20, "files_total": 4, "size_total": 220, "paths": ["a/s", "z"]}
    with pytest.raises(NotFound, match="none of the collection's 4 files"):
        Choice(["nothing"]).apply(tree())


def test_chunks_of_ranges_are_those_that_they_touch() -> None:
    manifest = make_manifest(content_of(5 * 16384 + 9), 16384, 0, 0)
    assert chunks_of_ranges(manifest, [(0, 1)]) == 0b1
    assert chunks_of_ranges(manifest, [(16383, 2), (5 * 16384, 9)]) == 0b100011
    assert chunks_of_ranges(manifest, [(16384, 16384)]) == 0b10


@given(PATH, st.sampled_from(["", "?m=" + "cd" * 32, "?name=x&size=5&peer=10.0.0.1:1"]))
def test_ref_with_a_path_is_read_in_every_form(path: str, query: str) -> None:
    link = f"fastcas://{HASH}{query}"
    for text in (f"{HASH}/{path}", f"fastcas://{HASH}/{path}{query}", f"{link}/{path}" if query else f"{HASH}/{path}"):
        assert parse_member(text).path == path
    assert parse_member(str(parse_member(f"{link}/{path}"))) == parse_member(f"{link}/{path}")


@given(st.text(min_size=1, max_size=20))
def test_any_path_survives_its_link_or_is_refused(path: str) -> None:
    try:
        link = parse_member(f"{HASH}/{path}")
    except UsageError:
        return
    assert link == Link(bytes.fromhex(HASH), path=path)
    assert parse_member(str(link)) == link


@pytest.mark.parametrize(
    "path", ["", "/", "../x", "a/../../etc/passwd", "/etc/passwd", "a//b", "a/.", "a/", "a\0b", "x" * 5000, "\udcff"]
)
def test_hostile_path_is_a_usage_error(path: str) -> None:
    for text in (f"{HASH}/{path}", f"fastcas://{HASH}?m={HASH}/{path}"):
        with pytest.raises(UsageError, match="plain components"):
            parse_member(text)


@pytest.mark.parametrize("path", ["%2e%2e/x", "a/%2E%2E", "%00", "%ff"])
def test_hostile_path_in_a_link_is_seen_behind_its_escapes(path: str) -> None:
    with pytest.raises(UsageError, match="plain components"):
        parse_member(f"fastcas://{HASH}/{path}")


def test_only_who_can_use_a_path_takes_one() -> None:
    for text in (f"{HASH}/a", f"fastcas://{HASH}/a"):
        with pytest.raises(UsageError):
            parse_ref(text)
    assert parse_member(HASH) == parse_ref(HASH)
    assert parse_member(f"fastcas://{HASH}/").path is None
