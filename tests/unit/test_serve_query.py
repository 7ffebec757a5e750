"""The grammar of /swarm targets."""

from __future__ import annotations

import pytest

from fastcas.serve.query import BadQuery, Caller, SwarmQuery, parse_swarm_query, parse_target

HASH = b"0123456789abcdef" * 4
NODE = b"ab" * 20


def test_parse_target_tells_file_and_next() -> None:
    digest = bytes.fromhex(HASH.decode())
    assert parse_target(b"/swarm/" + HASH) == (digest, False)
    assert parse_target(b"/swarm/" + HASH + b"/next") == (digest, True)


@pytest.mark.parametrize("path", [b"", b"/swarm/", b"/swarm/" + HASH + b"/", b"/swarm/" + HASH.upper(), b"/x/" + HASH])
def test_parse_target_refuses_other_paths(path: bytes) -> None:
    with pytest.raises(BadQuery):
        parse_target(path)


def test_parse_swarm_query_reads_every_parameter() -> None:
    query = b"m=" + HASH + b"&since=0&wait_ms=5000&from=4294967295&port=65535&id=" + NODE + b"&other=%zz"
    expected = SwarmQuery(bytes.fromhex(HASH.decode()), 0, 5000, 4294967295, Caller(NODE.decode(), 65535))
    assert parse_swarm_query(query) == expected


def test_parse_swarm_query_of_nothing_is_all_defaults() -> None:
    assert parse_swarm_query(b"") == parse_swarm_query(b"&&a=1&") == SwarmQuery()


@pytest.mark.parametrize(
    ("query", "subject"),
    [
        (b"m=", "m"), (b"m=" + HASH + b"0", "m"), (b"since=", "since"), (b"since=4294967296", "since"),
        (b"since=\xd9\xa1", "since"), (b"since=1_0", "since"), (b"wait_ms=5001", "wait_ms"), (b"from=0x1", "from"),
        (b"port=0&id=" + NODE, "port"), (b"port=1", "port"), (b"id=" + NODE, "port"), (b"id=" + NODE.upper(), "id"),
        (b"from=1&from=1", "from"),
    ],
)  # fmt: skip
def test_parse_swarm_query_names_what_is_malformed(query: bytes, subject: str) -> None:
    with pytest.raises(BadQuery, match=f"^{subject}"):
        parse_swarm_query(query)
