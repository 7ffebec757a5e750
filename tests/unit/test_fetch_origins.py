"""Origins: HTTP servers that fill what the swarm lacks, whatever they do; every byte proven as usual."""

from __future__ import annotations

import re
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastcas.errors import ChunkNotFound, NoPeers, Stalled, UsageError
from fastcas.fetch.choosing import Choice
from fastcas.fetch.download import DownloadResult, download
from fastcas.fetch.origin import parse_origin, refused_target
from fastcas.fetch.pacing import Pace
from fastcas.ids import Link
from fastcas.store.collection import FileEntry
from tests.support.evil_peer import Peer, content_of, make_manifest
from tests.support.fetching import run
from tests.support.library import BIG, library
from tests.support.origin_server import OriginServer

CHUNK = 16384
CONTENT = content_of(40 * CHUNK + 777)
N = 41


async def get(peer: Peer, out: Path, *urls: str, bare: bool = False, **options: Any) -> DownloadResult:
    """Download without discovery."""
    return await download(peer.link(bare=bare), out, discovery=None, origins=urls, **options)


async def fill(out: Path, *urls: str, content: bytes = CONTENT, **options: Any) -> DownloadResult:
    """Download from origins alone, by a manifest that this machine has."""
    manifest = make_manifest(content, CHUNK)
    link = Link(manifest.file_hash, manifest.manifest_hash)
    return await download(link, out, discovery=None, origins=urls, known=[manifest], **options)


@pytest.mark.parametrize("bare", [False, True])
def test_origin_is_asked_for_what_no_peer_has_and_for_nothing_else(tmp_path: Path, bare: bool) -> None:
    lacking = {3, 4, 5, 17, 40}

    async def work() -> None:
        async with Peer(CONTENT, have=set(range(N)) - lacking) as peer, OriginServer(CONTENT) as server:
            result = await get(peer, tmp_path / "out", server.url, bare=bare)
            asked = {at // CHUNK for start, end in server.ranges for at in range(start, end, CHUNK)}
            assert asked == lacking
            assert (3 * CHUNK, 6 * CHUNK) in server.ranges  # a run is one request
            assert result.bytes_by_origin == {server.url: 4 * CHUNK + 777}
            assert sum(result.bytes_by_peer.values()) == 36 * CHUNK
            assert result.explained.limited_by in ("unheld", "origin_upload")

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_origin_is_not_asked_while_peers_have_everything(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT) as peer, OriginServer(CONTENT) as server:
            await get(
                peer, tmp_path / "out", server.url, pace=Pace(len(CONTENT) / 1.5)
            )  # 1.5 s
            assert server.n_connections == 0

    run(work)


@pytest.mark.parametrize("behaviour", ["closes", "hangs_up", "no_range"])
def test_origin_alone_fills_a_file_whose_manifest_is_known(tmp_path: Path, behaviour: str) -> None:
    content = CONTENT if behaviour != "no_range" else CONTENT[:CHUNK]  # all of it is one range

    async def work() -> None:
        async with OriginServer(content, behaviour) as server:
            result = await fill(tmp_path / "out", server.url, content=content, pace=Pace(200 * CHUNK))
            assert result.bytes_by_origin == {server.url: len(content)}

    run(work)
    assert (tmp_path / "out").read_bytes() == content


EVIL = {
    "no_range": "answers without Range: status 200 for bytes",
    "wrong_range": "Content-Range: expected bytes",
    "no_content_range": "Content-Range: expected bytes .*, got -",
    "wrong_size": "its file has 656138 B, expected 656137 B",
    "range_416": r"status 416 for bytes .*: bytes \*/",
    "not_found": "status 404: has no such file",
    "forbidden": "status 403",
    "etag": 'its ETag changed from "1" to "',
    "gzip": "Content-Encoding",
    "wrong_bytes": "chunk #[0-9]+: wrong bytes",
    "short": "Content-Length: expected",
    "chunked": "Transfer-Encoding",
    "garbage": "not an HTTP/1.1 status line",
    "big_head": "headers over 16384 B",
}


@pytest.mark.parametrize("behaviour", EVIL)
def test_origin_that_misbehaves_is_named_and_given_up(tmp_path: Path, behaviour: str) -> None:
    async def work() -> None:
        async with OriginServer(CONTENT, behaviour) as server:
            with pytest.raises(ChunkNotFound, match=f"{server.url}: {EVIL[behaviour]}"):
                await fill(tmp_path / "out", server.url, pace=Pace(400 * CHUNK))

    run(work)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("behaviour", ["busy", "truncated"])
def test_origin_that_fails_now_and_then_is_asked_again(tmp_path: Path, behaviour: str) -> None:
    async def work() -> None:
        server = OriginServer(CONTENT, behaviour, when=lambda nth: nth == 1)
        async with server:
            result = await fill(tmp_path / "out", server.url)
            assert not result.failed_origins

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_origin_that_is_down_ends_by_the_stall_timeout_and_is_named(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises((ChunkNotFound, Stalled), match=re.escape("http://127.0.0.1:9/f: Connect")):
            await fill(tmp_path / "out", "http://127.0.0.1:9/f", stall_timeout_s=0.6)

    run(work)


def test_second_origin_takes_over(tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            OriginServer(CONTENT, "wrong_bytes") as evil,
            OriginServer(CONTENT) as good,
        ):
            result = await fill(tmp_path / "out", evil.url, good.url)
            assert list(result.failed_origins) == [evil.url]

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


def test_redirect_is_followed_a_bounded_number_of_times(tmp_path: Path) -> None:
    async def work() -> None:
        async with OriginServer(CONTENT) as last:
            async with OriginServer(CONTENT, "redirect", location=last.url) as first:
                result = await fill(tmp_path / "out", first.url)
                assert result.bytes_by_origin == {first.url: len(CONTENT)}
            async with OriginServer(CONTENT, "redirect", location="/file.bin") as circle:
                with pytest.raises(ChunkNotFound, match=f"{circle.url}: more than 5 redirects"):
                    await fill(tmp_path / "out2", circle.url)
                assert 6 <= len(circle.ranges) <= 4 * 6

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://169.254.169.254/latest/meta-data", "a link-local or metadata address"),
        ("http://[fe80::1]/x", "a link-local or metadata address"),
        ("http://[::ffff:169.254.169.254]/x", "a link-local or metadata address"),
        ("http://100.100.100.200/x", "a link-local or metadata address"),
        ("file:///etc/passwd", "expected http://HOST/"),
        ("http://user:secret@127.0.0.1/", "a user name in the URL"),
    ],
)
def test_redirect_never_leads_to_metadata_services(tmp_path: Path, location: str, why: str) -> None:
    async def work() -> None:
        async with OriginServer(CONTENT, "redirect", location=location) as server:
            with pytest.raises(ChunkNotFound, match=f"{server.url}: .*{why}"):
                await fill(tmp_path / "out", server.url)

    run(work)


def test_where_a_redirect_may_lead_depends_on_who_sends_us() -> None:
    public, private, here = "93.184.216.34", "10.1.2.3", "127.0.0.1"
    assert refused_target(public, public) is None
    assert refused_target(private, public) == "a private address"
    assert refused_target(here, public) == refused_target(here, private) == "this machine"
    assert refused_target(here, here) is refused_target(private, private) is None
    assert refused_target("169.254.1.1", here) is not None
    assert refused_target("0.0.0.0", here) == refused_target("224.0.0.1", here) == "no host's address"


@pytest.mark.parametrize("text", ["", "ftp://h/f", "http:///f", "http://u@h/f", "http://h:0/", "http://h:99999/", "http://h/\n",
                                  "http://h/ü", "h/f", "http://[::1/"])  # fmt: skip
def test_url_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--origin"):
        parse_origin(text)


def test_without_a_manifest_an_origin_cannot_help_and_that_is_said(tmp_path: Path) -> None:
    async def work() -> None:
        async with Peer(CONTENT, behaviour="manifest_wrong_bytes") as peer, OriginServer(CONTENT) as server:
            with pytest.raises(NoPeers, match="an origin gives bytes only, and no manifest is known"):
                await get(peer, tmp_path / "out", server.url, timeout_s=1.0)

    run(work)


def test_https_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=origin"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def work() -> None:
        async with OriginServer(CONTENT, context=context) as server:
            with pytest.raises(ChunkNotFound, match=f"{server.url}: its certificate is not valid"):
                await fill(tmp_path / "out", server.url)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            result = await fill(tmp_path / "out", server.url)
            assert result.bytes_by_origin == {server.url: len(CONTENT)}

    run(work)
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["whole", "chosen", "by its path"])
def test_origin_of_a_folder_fills_the_files_of_a_collection(tmp_path: Path, how: str) -> None:
    """The URL of the folder, and the path within the collection, percent-encoded."""
    path = "a/big one%.bin"
    big = Peer(BIG).manifest
    lib, _ = library(files=(FileEntry(path, False, len(BIG), big.file_hash, big.manifest_hash),))
    lib.peers[1].have = {0, 1, 5}
    lacking = len(BIG) - 3 * CHUNK

    async def work() -> None:
        async with lib, OriginServer(BIG, target="/a/big%20one%25.bin") as server:
            link = replace(lib.link(), path=path if how == "by its path" else None)
            result = await download(
                link, tmp_path / "out", discovery=None, origins=[server.folder],
                choice=Choice(["a/*.bin"]) if how == "chosen" else None,
            )  # fmt: skip
            assert result.bytes_by_origin == {server.url: lacking}
            assert not result.failed_origins

    run(work)
    out = tmp_path / "out" if how == "by its path" else tmp_path / "out" / path
    assert out.read_bytes() == BIG


def test_wrong_bytes_of_a_folder_are_not_taken(tmp_path: Path) -> None:
    lib, _ = library()
    lib.peers[1].have = set(range(5))

    async def work() -> None:
        async with lib, OriginServer(BIG, "wrong_bytes", target="/a/big.bin") as server:
            with pytest.raises(ChunkNotFound, match="wrong bytes"):
                await download(
                    lib.link(), tmp_path / "out", discovery=None, origins=[server.folder], stall_timeout_s=2.0
                )

    run(work)
    assert not (tmp_path / "out").exists()
