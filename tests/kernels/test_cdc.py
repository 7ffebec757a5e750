"""Content-defined cuts against the rule of csrc/cdc/cdc.h, written out slowly."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcas.errors import UsageError
from fastcas.hashing import Cutter

ROOT = Path(__file__).parents[2]
GOLDEN = (70, "bb58e92cee58a4db99e98f94e8119c2800dda32b202af89904cceb3d2fdb8e58")
GEAR = [int.from_bytes(hashlib.sha256(b"fastcas gear table 1" + bytes([b])).digest()[:8], "little") for b in range(256)]


def window_hash(content: bytes, place: int) -> int:
    """H(place): the sum over the 64 bytes before it."""
    return sum(GEAR[content[place - 1 - j]] << j for j in range(64)) % (1 << 64)


def slow_cuts(content: bytes, average: int) -> list[int]:
    """The rule, word by word; the content's end is not among the cuts unless the rule cuts there."""
    bits = average.bit_length() - 1
    cuts: list[int] = []
    start = 0
    for place in range(1, len(content) + 1):
        length = place - start
        if length == 4 * average:
            is_cut = True
        elif average // 4 <= length < 3 * average // 4:
            is_cut = window_hash(content, place) >> (64 - (bits + 2)) == 0
        elif length >= 3 * average // 4:
            is_cut = window_hash(content, place) >> (64 - (bits - 2)) == 0
        else:
            is_cut = False
        if is_cut:
            cuts.append(place)
            start = place
    return cuts


def fast_cuts(content: bytes, average: int, split: int | None = None) -> list[int]:
    cutter, cuts = Cutter(average), []
    step = split or max(len(content), 1)
    for at in range(0, len(content), step):
        cuts += [at + cut for cut in cutter.feed(content[at : at + step])]
    assert cutter.pending == len(content) - (cuts[-1] if cuts else 0)
    return cuts


def test_gear_table_is_made_by_its_rule() -> None:
    numbers = re.findall(r"0x([0-9a-f]{16})u", (ROOT / "csrc/cdc/gear.h").read_text())
    assert [int(text, 16) for text in numbers] == GEAR


@pytest.mark.parametrize("average", [256, 1024, 2048])
@pytest.mark.parametrize("kind", ["random", "text", "zeros", "period"])
def test_cuts_are_those_of_the_slow_oracle(average: int, kind: str) -> None:
    rng = random.Random(average)
    size = 16 * average + 17
    content = {
        "random": lambda: rng.randbytes(size),
        "text": lambda: b"".join(b"line %d of the log\n" % rng.randrange(1000) for _ in range(size // 16)),
        "zeros": lambda: bytes(size),
        "period": lambda: (rng.randbytes(97) * size)[:size],
    }[kind]()
    expected = slow_cuts(content, average)
    assert fast_cuts(content, average) == expected
    if kind == "random":
        lengths = [b - a for a, b in zip([0, *expected], expected, strict=False)]
        assert len(lengths) > 10 and min(lengths) >= average // 4 and max(lengths) <= 4 * average
    if kind == "zeros":
        assert expected == list(range(4 * average, size + 1, 4 * average))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1 << 32), st.lists(st.integers(0, 5000), max_size=30))
def test_any_split_gives_the_same_cuts(head: bytes, seed: int, pieces: list[int]) -> None:
    content = head + random.Random(seed).randbytes(20_000)
    cutter, cuts, at = Cutter(1024), [], 0
    for piece in [*pieces, len(content)]:
        cuts += [at + cut for cut in cutter.feed(content[at : at + piece])]
        at = min(at + piece, len(content))
    assert cuts == fast_cuts(content, 1024)


@pytest.mark.parametrize("split", [1, 2, 63, 64, 65, 255, 256, 257, 1023])
def test_splits_around_the_borders_give_the_same_cuts(split: int) -> None:
    content = random.Random(3).randbytes(30_000)
    assert fast_cuts(content, 1024, split) == fast_cuts(content, 1024)


def ends_after(average: int, target: int) -> bytes:
    """Content whose first cut by the rule lies after exactly `target` bytes; found by trying."""
    bits = average.bit_length() - 1 + (-2 if target >= 3 * average // 4 else 2)
    rng = random.Random(target)
    while True:
        window = rng.randbytes(64)
        if window_hash(window, 64) >> (64 - bits) == 0:
            content = bytes(target - 64) + window
            if target < average // 4 or slow_cuts(content, average) == [target]:
                return content


@pytest.mark.parametrize("target", [64, 65, 191, 192, 193, 1023])
def test_a_window_that_fits_ends_a_chunk_at_each_border(target: int) -> None:
    """min = 64, normal = 192, max = 1024: the first and last place of each region, and one beyond the longest."""
    content = ends_after(256, target) + bytes(1025)
    assert fast_cuts(content, 256) == [target, target + 1024]


def test_a_window_that_fits_before_the_shortest_ends_nothing() -> None:
    content = bytes(191) + ends_after(1024, 64)
    assert len(content) == 255 and fast_cuts(content + bytes(4000), 1024) == [4096]
    assert fast_cuts(b"\0" + content, 1024) == [256]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 255, 256])
def test_short_content_is_one_chunk(size: int) -> None:
    assert fast_cuts(random.Random(1).randbytes(size), 4096) == []


def test_cuts_come_back_after_an_insertion() -> None:
    content = random.Random(5).randbytes(2 << 20)
    changed = content[:700_000] + b"inserted" + content[700_000:]
    before, after = fast_cuts(content, 16384), fast_cuts(changed, 16384)
    common = {cut + 8 for cut in before if cut > 700_000} & set(after)
    assert len(common) >= len([cut for cut in before if cut > 700_000]) - 4


def test_golden_cuts() -> None:
    """One fixed answer: whoever changes the rule changes every manifest."""
    content = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(131_072))
    digest = hashlib.sha256(repr(fast_cuts(content, 65536)).encode()).hexdigest()
    assert (len(fast_cuts(content, 65536)), digest) == GOLDEN


@pytest.mark.parametrize("average", [0, 1, 128, 255, 257, 1000, 8 << 20, 1 << 32, -1])
def test_an_average_out_of_range_is_refused(average: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        Cutter(average)
