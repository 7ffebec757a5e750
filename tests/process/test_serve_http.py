"""A real worker over real sockets: routes, conditions, ranges, keep-alive, refusals, real clients."""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcas.metadata import EMPTY_SHA256, Manifest
from tests.support.http_corpus import MALFORMED
from tests.support.serve_rig import BUDGET_S, Rig, content, read_response, rig, wait_until

CHUNK = 16384
SIZE = 20 * CHUNK + 777
UNKNOWN = "0" * 64


@pytest.fixture(scope="module", params=["auto", "sendfile", "copy"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Manifest]]:
    with rig(tmp_path_factory.mktemp("store"), send_path=request.param) as made:
        manifest = made.store.add_file(content(SIZE), CHUNK)
        made.store.add_file(b"")
        made.store.add_file(content(5_000_001, 7), 1 << 20)
        made.publish()
        yield made, manifest


def fetch(
    made: Rig, target: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", made.worker.port, timeout=BUDGET_S)
    try:
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_every_chunk_has_its_hash(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    connection = http.client.HTTPConnection("127.0.0.1", made.worker.port, timeout=BUDGET_S)
    for i in range(manifest.n_chunks):
        connection.request("GET", "/chunks/" + manifest.hash_of(i).hex())
        response = connection.getresponse()
        assert response.status == 200
        assert hashlib.sha256(response.read()).digest() == manifest.hash_of(i)
    connection.close()


def test_content_headers_are_those_of_an_immutable_resource(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    name = manifest.hash_of(0).hex()
    _, headers, body = fetch(made, f"/chunks/{name}")
    assert headers["ETag"] == f'"{name}"'
    assert headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Length"] == str(len(body)) == str(CHUNK)
    assert headers["Date"].endswith("GMT")


def test_manifest_is_canonical_bytes(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    status, _, body = fetch(made, "/manifests/" + manifest.manifest_hash.hex())
    assert (status, body) == (200, manifest.data)


@pytest.mark.parametrize("index", [0, 1])
def test_whole_file_is_its_chunks_in_order(served: tuple[Rig, Manifest], index: int) -> None:
    made, _ = served
    data = [content(SIZE), content(5_000_001, 7)][index]
    status, _, body = fetch(made, "/files/" + hashlib.sha256(data).hexdigest())
    assert (status, body == data) == (200, True)


def test_empty_file_is_empty(served: tuple[Rig, Manifest]) -> None:
    made, _ = served
    status, headers, body = fetch(made, "/files/" + EMPTY_SHA256.hex())
    assert (status, headers["Content-Length"], body) == (200, "0", b"")
    assert fetch(made, "/files/" + EMPTY_SHA256.hex(), headers={"Range": "bytes=0-"})[0] == 416


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [
        ("bytes=0-0", 0, 0), ("bytes=0-", 0, SIZE - 1), ("bytes=-1", SIZE - 1, SIZE - 1),
        ("bytes=-100000", SIZE - 100000, SIZE - 1), (f"bytes={CHUNK - 1}-{CHUNK}", CHUNK - 1, CHUNK),
        (f"bytes={CHUNK}-{2 * CHUNK - 1}", CHUNK, 2 * CHUNK - 1), ("bytes=5-200000", 5, 200000),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1), ("bytes=3-99999999999999", 3, SIZE - 1),
        (f"bytes={20 * CHUNK - 1}-", 20 * CHUNK - 1, SIZE - 1),
    ],
)  # fmt: skip
def test_range_of_a_file_is_that_part(served: tuple[Rig, Manifest], value: str, first: int, last: int) -> None:
    made, manifest = served
    status, headers, body = fetch(made, "/files/" + manifest.file_hash.hex(), headers={"Range": value})
    assert status == 206
    assert headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert hashlib.sha256(body).digest() == hashlib.sha256(content(SIZE)[first : last + 1]).digest()


def test_range_of_a_chunk_is_that_part(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    status, headers, body = fetch(made, "/chunks/" + manifest.hash_of(1).hex(), headers={"Range": "bytes=100-"})
    assert (status, headers["Content-Range"]) == (206, f"bytes 100-{CHUNK - 1}/{CHUNK}")
    assert body == content(SIZE)[CHUNK + 100 : 2 * CHUNK]


def test_range_outside_is_416_and_the_connection_goes_on(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    target = b"/files/" + manifest.file_hash.hex().encode()
    with made.worker.connect() as sock:
        sock.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nRange: bytes=%d-\r\n\r\n" % SIZE)
        status, fields, _ = read_response(sock)
        assert (status, fields["content-range"]) == (416, f"bytes */{SIZE}")
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_response(sock)[0] == 200


@pytest.mark.parametrize("value", ["bytes=0-1,5-6", "bytes=5-2", "lines=1-2", "bytes=x-", "bytes=0x1-5"])
def test_range_that_is_not_one_range_is_ignored(served: tuple[Rig, Manifest], value: str) -> None:
    made, manifest = served
    status, _, body = fetch(made, "/files/" + manifest.file_hash.hex(), headers={"Range": value})
    assert (status, len(body)) == (200, SIZE)


def test_if_range_decides_by_etag(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    name = manifest.file_hash.hex()
    for tag, expected in ((f'"{name}"', 206), (f'"{UNKNOWN}"', 200), (f'W/"{name}"', 200), (name, 200)):
        status, _, _ = fetch(made, f"/files/{name}", headers={"Range": "bytes=0-9", "If-Range": tag})
        assert (tag, status) == (tag, expected)


def test_if_none_match_is_304_without_body(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    name = manifest.hash_of(0).hex()
    for kind, target in (("chunks", name), ("files", manifest.file_hash.hex())):
        status, headers, body = fetch(made, f"/{kind}/{target}", headers={"If-None-Match": f'"x", W/"{target}"'})
        assert (status, headers["ETag"], body) == (304, f'"{target}"', b"")
    assert fetch(made, f"/chunks/{name}", headers={"If-None-Match": '"x"'})[0] == 200


def test_head_promises_what_get_sends(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    targets = (f"/chunks/{manifest.hash_of(0).hex()}", f"/files/{manifest.file_hash.hex()}", "/health", "/nothing")
    for target in targets:
        status, headers, _ = fetch(made, target)
        head_status, head_headers, head_body = fetch(made, target, "HEAD")
        assert (head_status, head_headers["Content-Length"], head_body) == (status, headers["Content-Length"], b"")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain.txt", 'attachment; filename="plain.txt"'),
        ("a%20b", 'attachment; filename="a b"'),
        ("%22%0d%0aX:%20y", 'attachment; filename="___X: y"'),
        ("..%2f..%2fetc", 'attachment; filename=".._.._etc"'),
        ("%c3%a9%25", "attachment; filename=\"___\"; filename*=UTF-8''%C3%A9%25"),
    ],
)
def test_name_sets_a_harmless_disposition(served: tuple[Rig, Manifest], name: str, expected: str) -> None:
    made, manifest = served
    _, headers, _ = fetch(made, f"/files/{manifest.file_hash.hex()}?name={name}", "HEAD")
    assert headers["Content-Disposition"] == expected
    assert "X" not in headers


@pytest.mark.parametrize(
    "target",
    [
        "/", "/chunks", "/chunks/", "/chunks/" + UNKNOWN, "/chunks/" + "0" * 63, "/chunks/" + "0" * 65,
        "/chunks/" + "A" * 64, "/chunks/" + UNKNOWN + "/", "//chunks/" + UNKNOWN, "/chunks/../health",
        "/chunks/" + "%30" * 64, "/files/" + UNKNOWN, "/manifests/" + UNKNOWN, "/health/", "/health?x", "/healthx",
        "/swarm/" + UNKNOWN + "/nextx", "/swarm/" + "g" * 64, "/etc/passwd", "/files/" + UNKNOWN + "?name=x",
    ],
)  # fmt: skip
def test_every_other_target_is_404(served: tuple[Rig, Manifest], target: str) -> None:
    status, headers, body = fetch(served[0], target)
    assert (status, headers["Content-Type"], body) == (404, "text/plain", b"not here\n")


def test_chunk_hash_is_not_a_manifest_or_file(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    for kind, name in (("manifests", manifest.hash_of(0)), ("files", manifest.manifest_hash),
                       ("chunks", manifest.manifest_hash), ("chunks", manifest.file_hash)):  # fmt: skip
        assert fetch(made, f"/{kind}/{name.hex()}")[0] == 404


def test_pipelined_requests_are_answered_in_order(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    order = [i % manifest.n_chunks for i in range(0, 300, 7)]
    with made.worker.connect() as sock:
        sock.sendall(
            b"".join(b"GET /chunks/%s HTTP/1.1\r\nHost: a\r\n\r\n" % manifest.hash_of(i).hex().encode() for i in order)
        )
        for i in order:
            status, _, body = read_response(sock)
            assert (status, hashlib.sha256(body).digest()) == (200, manifest.hash_of(i))


def test_request_in_single_bytes_is_answered(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    request = b"GET /chunks/%s HTTP/1.1\r\nHost: a\r\n\r\n" % manifest.hash_of(0).hex().encode()
    with made.worker.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request + request:
            sock.send(bytes([byte]))
        for _ in range(2):
            assert hashlib.sha256(read_response(sock)[2]).digest() == manifest.hash_of(0)


@pytest.mark.parametrize(
    ("version", "field", "stays"),
    [("1.1", "", True), ("1.1", "Connection: close\r\n", False), ("1.0", "", False),
     ("1.0", "Connection: keep-alive\r\n", True)],
)  # fmt: skip
def test_connection_stays_as_the_client_asked(
    served: tuple[Rig, Manifest], version: str, field: str, stays: bool
) -> None:
    request = f"GET /health HTTP/{version}\r\nHost: a\r\n{field}\r\n".encode()
    with served[0].worker.connect() as sock:
        sock.sendall(request)
        _, fields, body = read_response(sock)
        assert body == b"ok\n"
        assert fields.get("connection") == ("close" if not stays else "keep-alive" if version == "1.0" else None)
        if stays:
            sock.sendall(request)
            assert read_response(sock)[0] == 200
        else:
            assert sock.recv(1) == b""


def test_absolute_form_target_is_served(served: tuple[Rig, Manifest]) -> None:
    with served[0].worker.connect() as sock:
        sock.sendall(b"GET http://elsewhere:80/health HTTP/1.1\r\nHost: elsewhere\r\n\r\n")
        assert read_response(sock)[0] == 200


def test_malformed_requests_get_one_response_and_the_end(served: tuple[Rig, Manifest]) -> None:
    made, _ = served
    follower = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    for name, (data, status) in MALFORMED.items():
        with made.worker.connect() as sock:
            sock.sendall(data + follower)
            raw = b""
            while part := sock.recv(65536):
                raw += part
        assert raw.startswith(b"HTTP/1.1 %d " % status), (name, raw[:80])
        assert len(re.findall(rb"HTTP/1\.1 [0-9]{3} ", raw)) == 1, (name, raw)
        assert b"\r\nConnection: close\r\n" in raw, name
        assert raw.endswith(b"\n"), name
        assert b"ok\n" not in raw, name


def test_half_closed_client_gets_its_answer(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    with made.worker.connect() as sock:
        sock.sendall(b"GET /files/%s HTTP/1.1\r\nHost: a\r\n\r\n" % manifest.file_hash.hex().encode())
        sock.shutdown(socket.SHUT_WR)
        assert read_response(sock)[2] == content(SIZE)
        assert sock.recv(1) == b""


def test_counters_follow_the_requests(served: tuple[Rig, Manifest]) -> None:
    made, manifest = served
    before = made.counters.snapshot(0)
    fetch(made, "/chunks/" + manifest.hash_of(0).hex())
    fetch(made, "/chunks/" + UNKNOWN)
    wait_until(lambda: made.worker.count("requests") == before["requests"] + 2, "requests counted")
    assert made.worker.count("bytes_sent") == before["bytes_sent"] + CHUNK
    assert made.worker.count("status_404") == before["status_404"] + 1


def test_nothing_is_left_open_when_clients_are_gone(served: tuple[Rig, Manifest]) -> None:
    wait_until(lambda: served[0].worker.count("active") == 0, "no connection left")


def test_resident_memory_after_start_is_small(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        status = Path(f"/proc/{made.worker.process.pid}/status").read_text()
        rss_kib = int(status.split("VmRSS:")[1].split()[0])
        assert rss_kib <= 30 * 1024


def test_curl_resumes_a_file(served: tuple[Rig, Manifest], tmp_path: Path) -> None:
    made, manifest = served
    out = tmp_path / "out"
    out.write_bytes(content(SIZE)[:100_000])
    url = f"http://127.0.0.1:{made.worker.port}/files/{manifest.file_hash.hex()}"
    subprocess.run(["curl", "-sS", "-f", "-C", "-", "-o", str(out), url], check=True, timeout=BUDGET_S)
    assert hashlib.sha256(out.read_bytes()).digest() == manifest.file_hash


def test_aria2_fetches_in_parallel_ranges(served: tuple[Rig, Manifest], tmp_path: Path) -> None:
    made, _ = served
    name = hashlib.sha256(content(5_000_001, 7)).hexdigest()
    url = f"http://127.0.0.1:{made.worker.port}/files/{name}"
    subprocess.run(
        ["aria2c", "-q", "-x16", "-s16", "-k1M", f"--checksum=sha-256={name}", "-d", str(tmp_path), "-o", "out", url],
        check=True, timeout=BUDGET_S,
    )  # fmt: skip
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == name
