"""The request parser in C, under ASan and UBSan: corpus, feeding, differential test against h11 and httptools."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import h11
import httptools
import pytest

from tests.support.http_corpus import HOST, LINE, MALFORMED, WELL_FORMED

ROOT = Path(__file__).resolve().parents[2]
DONE = 1
MORE = 0


class Harness:
    """The compiled harness; each call runs all cases in one process."""

    def __init__(self, folder: Path) -> None:
        self.binary = folder / "http_parser_harness"
        warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        sources = ["tests/native/http_parser_harness.c", "csrc/http/parser.c"]
        subprocess.run(
            [
                "cc",
                "-std=c11",
                "-D_GNU_SOURCE",
                "-g",
                "-O1",
                *sanitizers,
                *warnings,
                "-Icsrc",
                "-o",
                self.binary,
                *sources,
            ],
            cwd=ROOT,
            check=True,
        )

    def __call__(self, cases: list[bytes]) -> list[list[str]]:
        """Return the printed fields of each case; fails on a sanitizer report or when two feedings disagree."""
        data = b"".join(struct.pack("=I", len(case)) + case for case in cases)
        done = subprocess.run([self.binary], input=data, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        lines = done.stdout.decode().splitlines()
        assert len(lines) == len(cases)
        return [line.split() for line in lines]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("parser"))


def status_of(fields: list[str]) -> int:
    return int(fields[0])


def h11_accepts(data: bytes) -> bool:
    connection = h11.Connection(h11.SERVER)
    try:
        connection.receive_data(data)
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return False
    return isinstance(event, h11.Request)


class _Callbacks:
    def __init__(self) -> None:
        self.complete = False

    def on_headers_complete(self) -> None:
        self.complete = True


def httptools_accepts(data: bytes) -> bool:
    callbacks = _Callbacks()
    try:
        httptools.HttpRequestParser(callbacks).feed_data(data)
    except httptools.HttpParserUpgrade:
        return True
    except httptools.HttpParserError:
        return False
    return callbacks.complete


def test_corpus_is_large_enough() -> None:
    assert len(MALFORMED) >= 80


def test_malformed_corpus_gets_its_status_however_it_is_fed(harness: Harness) -> None:
    results = harness([data for data, _ in MALFORMED.values()])
    wrong = {
        name: status_of(fields)
        for (name, (_, status)), fields in zip(MALFORMED.items(), results, strict=True)
        if status_of(fields) != status
    }
    assert wrong == {}


def test_well_formed_corpus_is_taken_whole(harness: Harness) -> None:
    results = harness(list(WELL_FORMED.values()))
    for (name, data), fields in zip(WELL_FORMED.items(), results, strict=True):
        assert (name, status_of(fields), int(fields[1])) == (name, DONE, len(data))


def test_truncated_requests_ask_for_more(harness: Harness) -> None:
    cases = [data[:n] for data in WELL_FORMED.values() if len(data) < 500 for n in range(len(data))]
    assert {status_of(fields) for fields in harness(cases)} == {MORE}


def test_fields_are_found(harness: Harness) -> None:
    request = b'HEAD http://h/a%20b?name=x%41&k HTTP/1.0\r\nRange: bytes=1-2\r\nIf-Range: "r"\r\n'
    request += b'If-None-Match: W/"abc", "d"\r\nFASTCAS-PEER:  p \r\n\r\n'
    fields = harness([request])[0]
    assert fields[2:5] == ["2", "0", "0"]
    spans = [bytes.fromhex(field).decode() for field in fields[5:11]]
    assert spans == ["/a%20b", "name=x%41&k", "bytes=1-2", '"r"', 'W/"abc", "d"', "p"]
    assert fields[11:] == ["206:1:2", "1", "1:2"]


@pytest.mark.parametrize(
    ("data", "keep_alive"),
    [("1.1|", 1), ("1.1|Connection: close", 0), ("1.0|", 0), ("1.0|Connection: keep-alive", 1),
     ("1.0|Connection: keep-alive, close", 0), ("1.1|Connection: x,keep-alive", 1)],
)  # fmt: skip
def test_keep_alive_follows_version_and_connection(harness: Harness, data: str, keep_alive: int) -> None:
    version, _, field = data.partition("|")
    request = f"GET / HTTP/{version}\r\nHost: a\r\n" + (f"{field}\r\n" if field else "") + "\r\n"
    assert int(harness([request.encode()])[0][4]) == keep_alive


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=0-0", "206:0:0"), ("bytes=0-", "206:0:999"), ("bytes=999-", "206:999:999"), ("bytes=-1", "206:999:999"),
        ("bytes=-1000", "206:0:999"), ("bytes=-5000", "206:0:999"), ("bytes=5-99999999999999999999", "206:5:999"),
        ("Bytes=1-2", "206:1:2"), ("bytes=1000-", "416:0:0"), ("bytes=-0", "416:0:0"),
        ("bytes=99999999999999999999-", "416:0:0"), ("bytes=2-1", "200:0:0"), ("bytes=", "200:0:0"),
        ("bytes=-", "200:0:0"), ("bytes=0-1,2-3", "200:0:0"), ("bytes= 0-1", "200:0:0"), ("items=0-1", "200:0:0"),
        ("bytes=a-b", "200:0:0"), ("bytes=0x0-1", "200:0:0"), ("bytes=+1-2", "200:0:0"),
    ],
)  # fmt: skip
def test_range_of_a_thousand_bytes(harness: Harness, value: str, expected: str) -> None:
    assert harness([LINE + HOST + f"Range: {value}\r\n\r\n".encode()])[0][11] == expected


@pytest.mark.parametrize(
    ("value", "matches"),
    [('"abc"', 1), ('W/"abc"', 1), ("*", 1), ('"x", "abc"', 1), ('"x","y" , W/"abc"', 1), ('"abcd"', 0), ('"ab"', 0),
     ("abc", 0), ('"abc', 0), ("", 0), ('x "abc"', 0)],
)  # fmt: skip
def test_if_none_match(harness: Harness, value: str, matches: int) -> None:
    assert int(harness([LINE + HOST + f"If-None-Match: {value}\r\n\r\n".encode()])[0][12]) == matches


def test_nothing_that_h11_or_httptools_reject_is_accepted(harness: Harness) -> None:
    seed = int(os.environ.get("FASTCAS_TEST_SEED", "20240607"))
    print(f"FASTCAS_TEST_SEED={seed}")
    rng = random.Random(seed)
    parents = [*WELL_FORMED.values(), *(data for data, _ in MALFORMED.values())]
    parents = [data for data in parents if len(data) < 400]
    odd = [
        b"\r",
        b"\n",
        b"\r\n",
        b"\0",
        b" ",
        b"\t",
        b":",
        b",",
        b"\x7f",
        b"\x80",
        b"\xff",
        b"%",
        b"?",
        b"#",
        b"0",
        b"/",
    ]
    cases = []
    for _ in range(6000):
        data = bytearray(rng.choice(parents))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                data[at:at] = rng.choice(odd)
            elif kind == 1 and at < len(data):
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at : at + rng.randint(1, 4)]
            else:
                other = rng.choice(parents)
                data[at:at] = other[rng.randrange(len(other)) :][:20]
        cases.append(bytes(data))
    taken = 0
    for data, fields in zip(cases, harness(cases), strict=True):
        if status_of(fields) == DONE:
            taken += 1
            request = data[: int(fields[1])]
            assert h11_accepts(request), request
            assert httptools_accepts(request), request
    assert taken > 100  # the test compares something
