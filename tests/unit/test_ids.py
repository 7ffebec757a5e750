"""Names and addresses: what is accepted, what is refused, and that the message names the argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcas.errors import UsageError
from fastcas.ids import (
    Link,
    PeerAddr,
    escape_for_terminal,
    parse_chunk_size,
    parse_hash,
    parse_parity,
    parse_peer,
    parse_ref,
    parse_size,
)

HASH = "ab" * 32


def test_parse_hash_accepts_exactly_64_lower_hex() -> None:
    assert parse_hash(HASH) == b"\xab" * 32


@pytest.mark.parametrize(
    "text", ["", "ab", HASH.upper(), HASH + "0", HASH[:-1] + "g", HASH + "\n", " " + HASH, "٠" * 64]
)
def test_parse_hash_refuses_and_names_the_argument(text: str) -> None:
    with pytest.raises(UsageError, match=r"^file_hash: ") as caught:
        parse_hash(text, "file_hash")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:9000", PeerAddr("10.0.0.1", 9000)),
        ("[::1]:1", PeerAddr("::1", 1)),
        ("[2001:DB8::1]:65535", PeerAddr("2001:db8::1", 65535)),
        ("node-1.example:80", PeerAddr("node-1.example", 80)),
    ],
)
def test_parse_peer_accepts(text: str, expected: PeerAddr) -> None:
    assert parse_peer(text) == expected
    assert parse_peer(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":9000", "host:0", "host:65536", "host:+1", "host:1_0", "::1:9000", "[::1]9000",
     "[::1]:", "[10.0.0.1]:1", "1.2.3:1", "1.2.3.4.5:1", "256.1.1.1:1", "a b:1", "-a:1", "h\x00:1", "host:９"],
)  # fmt: skip
def test_parse_peer_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--peer: "):
        parse_peer(text, "--peer")


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("16K", 16384), ("16KiB", 16384), ("4M", 4 << 20), ("1GiB", 1 << 30), ("2G", 2 << 30)]
)
def test_parse_size_accepts_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0K", "-1", "1.5M", "1k", "1KB", "K", "1 K", "1_000", "9" * 16, "١"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--chunk-size: "):
        parse_size(text, "--chunk-size")


def test_parse_chunk_size_bounds() -> None:
    assert parse_chunk_size("auto") is None
    assert [parse_chunk_size(text) for text in ("16KiB", "65536", "16M")] == [16384, 65536, 16 << 20]
    for text in ("8KiB", "32MiB", "100000", "Auto", ""):
        with pytest.raises(UsageError, match=r"^--chunk-size: "):
            parse_chunk_size(text, "--chunk-size")


def test_parse_parity_bounds() -> None:
    assert parse_parity("10+4") == (10, 4)
    assert parse_parity("191+64") == (191, 64)
    for text in ("0+1", "1+0", "10+65", "192+64", "10", "10+", "+4", "10-4", "10+4+1", "a+b", "1000+1", ""):
        with pytest.raises(UsageError, match=r"^--parity: "):
            parse_parity(text, "--parity")


names = st.text(max_size=40).filter(str.isprintable)
addresses = st.lists(
    st.sampled_from([PeerAddr("10.0.0.1", 9000), PeerAddr("::1", 1), PeerAddr("seed.example", 80)]), max_size=4
)


@given(
    st.binary(min_size=32, max_size=32),
    st.none() | st.binary(min_size=32, max_size=32),
    st.none() | names,
    st.none() | st.integers(0, 2**50),
    addresses,
    addresses,
)
def test_link_round_trip(
    file_hash: bytes,
    manifest_hash: bytes | None,
    name: str | None,
    size: int | None,
    peers: list[PeerAddr],
    dht: list[PeerAddr],
) -> None:
    link = Link(file_hash, manifest_hash, name, size, tuple(peers), tuple(dht))
    assert Link.parse(str(link)) == link


@pytest.mark.parametrize(
    "text",
    ["fastcas://", "fastcas://" + HASH[:-1], "fastcas://" + HASH.upper(), "http://" + HASH, f"fastcas://{HASH}/x",
     f"fastcas://{HASH}?m=12", f"fastcas://{HASH}?size=-1", f"fastcas://{HASH}?size=1&size=2", f"fastcas://{HASH}?peer=x",
     f"fastcas://{HASH}?dht=x:0", f"fastcas://{HASH}?" + "&".join(["peer=10.0.0.1:1"] * 81),
     f"fastcas://{HASH}#x", f"fastcas://{HASH}?name=" + "x" * 9000, f"fastcas://user@{HASH}", f"fastcas://{HASH}:80"],
)  # fmt: skip
def test_link_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=r"^REF: "):
        parse_ref(text if text.startswith("fastcas:") else "fastcas:" + text, "REF")


def test_link_ignores_unknown_keys() -> None:
    assert Link.parse(f"fastcas://{HASH}?x=1&ws=https%3A%2F%2Fa&m={HASH}").manifest_hash == b"\xab" * 32


def test_escape_for_terminal_leaves_no_control_or_bidi_characters() -> None:
    shown = escape_for_terminal("a\x1b[31m\u202eb\x07\u200b\x85é")
    assert shown == "a\\x1b[31m\\u202eb\\x07\\u200b\\x85é"
