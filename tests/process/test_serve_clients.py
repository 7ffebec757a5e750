"""Real download tools against a real worker, directly and through nginx as a caching proxy; every result is hashed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serve_rig import BUDGET_S, Rig, content, rig, wait_until

pytestmark = pytest.mark.slow

SIZE = 3_500_000  # several chunks, the last one short
CHUNK = 256 << 10


@pytest.fixture(scope="module")
def data() -> bytes:
    return content(SIZE, 3)


@pytest.fixture(scope="module", params=["auto", "copy"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("served"), send_path=request.param) as made:
        made.store.add_file(data, CHUNK)
        made.publish()
        yield made


def file_url(port: int, data: bytes) -> str:
    return f"http://127.0.0.1:{port}/files/{hashlib.sha256(data).hexdigest()}"


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_curl_downloads_a_file(served: Rig, data: bytes, tmp_path: Path) -> None:
    run(tmp_path, "curl", "-sSf", "-o", "out", file_url(served.worker.port, data))
    assert sha256_of(tmp_path / "out") == hashlib.sha256(data).hexdigest()


def test_curl_range_gives_exactly_the_range(served: Rig, data: bytes, tmp_path: Path) -> None:
    url = file_url(served.worker.port, data)
    for spec, want in (("100-1000000", data[100:1000001]), ("3400000-", data[3400000:]), ("-77", data[-77:])):
        code = run(tmp_path, "curl", "-sSf", "-o", "out", "-w", "%{http_code}", "--range", spec, url)
        assert (code, sha256_of(tmp_path / "out")) == ("206", hashlib.sha256(want).hexdigest())


@pytest.mark.parametrize("have", [1, CHUNK, SIZE - 1])
def test_curl_continues_a_broken_download(served: Rig, data: bytes, tmp_path: Path, have: int) -> None:
    (tmp_path / "out").write_bytes(data[:have])
    run(tmp_path, "curl", "-sSf", "-C", "-", "-o", "out", file_url(served.worker.port, data))
    assert sha256_of(tmp_path / "out") == hashlib.sha256(data).hexdigest()


def test_curl_etag_compare_downloads_nothing_twice(served: Rig, data: bytes, tmp_path: Path) -> None:
    url = file_url(served.worker.port, data)
    run(tmp_path, "curl", "-sSf", "--etag-save", "etag", "-o", "out", url)
    code = run(tmp_path, "curl", "-sSf", "--etag-compare", "etag", "-o", "second", "-w", "%{http_code}", url)
    assert code == "304"
    assert sha256_of(tmp_path / "out") == hashlib.sha256(data).hexdigest()


def test_curl_fetches_many_chunks_on_one_connection(served: Rig, tmp_path: Path) -> None:
    names = [digest.hex() for digest in served.store.chunks]
    options = [part for name in names for part in ("-o", name, f"http://127.0.0.1:{served.worker.port}/chunks/{name}")]
    before = served.worker.count("accepted")
    run(tmp_path, "curl", "-sSf", *options)
    assert [sha256_of(tmp_path / name) for name in names] == names
    assert served.worker.count("accepted") == before + 1


def test_curl_speaks_http_1_0(served: Rig, data: bytes, tmp_path: Path) -> None:
    run(tmp_path, "curl", "-sSf", "--http1.0", "-o", "out", file_url(served.worker.port, data))
    assert sha256_of(tmp_path / "out") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("have", [0, 1_000_000])
def test_wget_continues(served: Rig, data: bytes, tmp_path: Path, have: int) -> None:
    if have:
        (tmp_path / "out").write_bytes(data[:have])
    run(tmp_path, "wget", "-q", "-c", "-O", "out", file_url(served.worker.port, data))
    assert sha256_of(tmp_path / "out") == hashlib.sha256(data).hexdigest()


def test_aria2_with_16_connections_and_its_own_checksum(served: Rig, data: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(data).hexdigest()
    before = served.worker.count("accepted")
    run(
        tmp_path, "aria2c", "-q", "--no-conf", "-x16", "-s16", "-k1M", "--min-split-size=1M", "-o", "out",
        f"--checksum=sha-256={digest}", file_url(served.worker.port, data),
    )  # fmt: skip
    assert sha256_of(tmp_path / "out") == digest
    assert served.worker.count("accepted") > before + 1


def test_http_client_reuses_its_connection(served: Rig, data: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.worker.port, timeout=BUDGET_S)
    with contextlib.closing(connection):
        before = served.worker.count("accepted")
        for digest, chunk in served.store.chunks.items():
            connection.request("GET", f"/chunks/{digest.hex()}")
            answer = connection.getresponse()
            assert (answer.status, hashlib.sha256(answer.read()).digest()) == (200, digest)
            assert answer.getheader("Content-Length") == str(len(chunk))
        connection.request("HEAD", f"/files/{hashlib.sha256(data).hexdigest()}")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Content-Length"), answer.read()) == (200, str(SIZE), b"")
        connection.request("GET", "/chunks/" + "0" * 64)
        assert connection.getresponse().read() == b"not here\n"
    wait_until(lambda: served.worker.count("accepted") == before + 1, "counted")


@contextlib.contextmanager
def caching_proxy(folder: Path, upstream: int) -> Iterator[int]:
    """nginx in front of a worker: keep-alive upstream, cache keyed by target and slice of 1 MiB; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log warn;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 256; }}
        http {{
            access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/temp;
            fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
            proxy_cache_path {folder}/cache keys_zone=files:1m;
            upstream worker {{ server 127.0.0.1:{upstream}; keepalive 8; }}
            server {{
                listen 127.0.0.1:{port};
                add_header X-Cache $upstream_cache_status;
                location / {{
                    proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_cache files; proxy_cache_valid 200 206 1h; proxy_cache_revalidate on;
                }}
            }}
        }}
        """
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(folder)], stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, (folder / "error.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        wait_until(answers, "nginx listens")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(BUDGET_S)


def ask(port: int, target: str, **fields: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=BUDGET_S)
    with contextlib.closing(connection):
        connection.request("GET", target, headers={name.replace("_", "-"): value for name, value in fields.items()})
        answer = connection.getresponse()
        return answer, answer.read()


def test_nginx_in_front_caches_ranges_and_revalidates(served: Rig, data: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(data).hexdigest()
    target = f"/files/{digest}"
    with caching_proxy(tmp_path, served.worker.port) as port:
        answer, body = ask(port, target)
        assert (answer.status, answer.getheader("X-Cache")) == (200, "MISS")
        assert hashlib.sha256(body).hexdigest() == digest
        asked = served.worker.count("requests")
        answer, body = ask(port, target)
        assert (answer.status, answer.getheader("X-Cache")) == (200, "HIT")
        assert hashlib.sha256(body).hexdigest() == digest
        answer, body = ask(port, target, Range="bytes=1000000-2999999")
        assert (answer.status, answer.getheader("Content-Range")) == (206, f"bytes 1000000-2999999/{SIZE}")
        assert hashlib.sha256(body).digest() == hashlib.sha256(data[1000000:3000000]).digest()
        answer, body = ask(port, target, If_None_Match=f'"{digest}"')
        assert (answer.status, body) == (304, b"")
        answer, body = ask(port, target, Range="bytes=5-9", If_Range='"other"')
        assert (answer.status, hashlib.sha256(body).hexdigest()) == (200, digest)
        answer, _ = ask(port, target, Range=f"bytes={SIZE}-")
        assert answer.status == 416
        assert served.worker.count("requests") == asked  # the cache answered all of these alone
        for chunk in served.store.chunks:
            _, body = ask(port, f"/chunks/{chunk.hex()}")
            assert hashlib.sha256(body).digest() == chunk
        assert ask(port, "/chunks/" + "0" * 64)[0].status == 404
