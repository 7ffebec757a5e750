"""One origin: an HTTP/1.1 server (nginx, S3, a CDN) that has the whole file and answers Range requests.

A strict little client on asyncio streams: GET of one range, identity coding, a bounded head, exact lengths, absolute
deadlines. Redirects are followed, a bounded number, never to an address that a stranger must not send us to. Never
judges bytes: whoever reads them does.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from fastcas import __version__
from fastcas.errors import (
    FastCASError,
    NotFound,
    PeerBusy,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    UsageError,
)
from fastcas.ids import escape_for_terminal
from fastcas.limits import CONNECT_S, FIRST_BYTE_S, KIB, RESPONSE_HEADERS_MAX, STALL_FETCH_S

__all__ = ["Origin", "OriginLine", "parse_origin", "refused_target"]

URL_MAX = 4096
REDIRECTS_MAX = 5
READ_B = 256 * KIB
SLOW_BPS = 4 * KIB
SLOW_WINDOW_S = 30.0
REST_MIN_S = 0.5
REST_MAX_S = 30.0
_URL = re.compile(r"[!-~]+", re.ASCII)
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
# What a cloud tells its own machines: tokens and keys. 169.254.169.254 is link-local, these are not.
_METADATA = {ipaddress.ip_address(text) for text in ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")}


def parse_origin(text: str, name: str = "--origin") -> str:
    """Return an origin's URL, checked.

    Args:
        text: http:// or https:// URL; of a collection's folder where it ends with "/".
        name: What the message calls it.
    Raises:
        UsageError: Not such a URL.
    """
    shown = escape_for_terminal(text[:80])
    if len(text) > URL_MAX or not _URL.fullmatch(text):
        raise UsageError(f"{name}: expected a URL of at most {URL_MAX} printable ASCII characters, got '{shown}'")
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
    except ValueError as exc:
        raise UsageError(f"{name}: '{shown}': {exc}") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port:
        raise UsageError(f"{name}: expected http://HOST/… or https://HOST/…, got '{shown}'")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{name}: a user name in the URL is not supported")
    return parts._replace(fragment="", path=parts.path or "/").geturl()


def refused_target(ip: str, giver_ip: str) -> str | None:
    """Return why a redirect must not lead to an address, None where it may.

    Args:
        ip: Where it leads. giver_ip: Who sent us there: who is on this machine or in a private network may lead there.
    """
    address, giver = _plain(ip), _plain(giver_ip)
    if address.is_link_local or address in _METADATA:
        return "a link-local or metadata address"
    if address.is_multicast or address.is_unspecified:
        return "no host's address"
    if address.is_loopback and not giver.is_loopback:
        return "this machine"
    if address.is_private and not giver.is_private:
        return "a private address"
    return None


def _plain(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(ip.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@dataclass(frozen=True)
class _Head:
    status: int
    fields: dict[str, str]


def _parse_head(data: bytes) -> _Head:
    """Raises: ValueError: Not a response head; the text says why."""
    if len(data) > RESPONSE_HEADERS_MAX:
        raise ValueError(f"headers over {RESPONSE_HEADERS_MAX} B")
    first, *lines = data[:-4].split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise ValueError("not an HTTP/1.1 status line")
    fields: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise ValueError("malformed header")
        name = field[1].decode().lower()
        if name in fields and name in ("content-length", "content-range", "location"):
            raise ValueError(f"repeated {field[1].decode()}")
        fields[name] = field[2].decode("latin-1").strip(" \t")
    return _Head(int(status[1]), fields)


class Origin:
    """What is known of one origin. Several lines may use it.

    Attributes:
        url: As the user named it; `shown` without its query, which may hold a signature.
        failed: Why it is not asked any more, None while it may be.
        did: What it did last, in words.
        n_bytes: Bytes of chunks that proved right. n_received: Bytes of bodies, right or wrong.
    """

    def __init__(self, url: str, named_hosts: frozenset[str]) -> None:
        """Know nothing yet.

        Args:
            named_hosts: Hosts that the user named; a redirect may lead there whatever their addresses are.
        """
        self.url = url
        parts = urlsplit(url)
        self.shown = escape_for_terminal(f"{parts.scheme}://{parts.netloc}{parts.path}")
        self.failed: str | None = None
        self.did = "not needed"
        self.n_bytes = 0
        self.n_received = 0
        self.rest_until = 0.0
        self.named_hosts = named_hosts
        self.etags: dict[str, str] = {}
        self._n_failures = 0

    def succeeded(self, n_bytes: int) -> None:
        """A chunk of it was right."""
        self.n_bytes += n_bytes
        self._n_failures = 0
        self.did = "answered"

    def give_up(self, reason: str) -> None:
        """Never ask it again in this download."""
        if self.failed is None:
            self.failed = self.did = reason

    def note(self, error: FastCASError, now: float) -> None:
        """A request failed: what cannot be better next time ends it, the rest lets it rest, longer each time."""
        if not error.retryable or isinstance(error, NotFound):
            self.give_up(str(error))
            return
        self.did = str(error)
        if self.rest_until <= now:  # not the other lines' part in the same failure
            self._n_failures += 1
            self.rest_until = now + min(REST_MAX_S, REST_MIN_S * 2 ** min(self._n_failures - 1, 10))


class OriginLine:
    """One connection for one origin at a time, kept open between requests."""

    def __init__(self) -> None:
        """Not connected."""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._where: tuple[str, str] | None = None
        self._ip = ""

    async def read(self, origin: Origin, start: int, end: int, size: int, take: Callable[[bytes], None]) -> None:
        """Get bytes start..end-1 of a file of `size` bytes; `take` is given them in order, exactly as many.

        Raises:
            NotFound: 404 or 410.
            RemoteProtocolError: It has another file, does without Range, or breaks HTTP: not to be asked again.
            PeerUnreachable, PeerTimeout, PeerBusy: It may be better later.
        """
        url = origin.url
        giver_ip: str | None = None
        for _ in range(REDIRECTS_MAX + 1):
            try:
                head = await self._ask(origin, url, giver_ip, start, end)
                if head.status not in (301, 302, 303, 307, 308):
                    await self._body(origin, url, head, start, end, size, take)
                    return
                url = self._follow(origin, url, head)
                giver_ip = self._ip
            except BaseException:
                self.close()
                raise
            self.close()  # whatever body a redirect has is not read
        raise RemoteProtocolError(f"more than {REDIRECTS_MAX} redirects")

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = self._where = None

    # --- one request ---

    async def _ask(self, origin: Origin, url: str, giver_ip: str | None, start: int, end: int) -> _Head:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = (
            f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: bytes={start}-{end - 1}\r\n"
            f"Accept-Encoding: identity\r\nUser-Agent: fastcas/{__version__}\r\n\r\n"
        ).encode("ascii")
        is_kept = self._streams is not None and self._where == (parts.scheme, parts.netloc)
        try:
            return await self._exchange(origin, parts, giver_ip, request)
        except PeerUnreachable:
            if not is_kept:
                raise
        self.close()  # a kept connection may have been closed meanwhile, which says nothing about the server
        return await self._exchange(origin, parts, giver_ip, request)

    async def _exchange(self, origin: Origin, parts: SplitResult, giver_ip: str | None, request: bytes) -> _Head:
        if self._streams is None or self._where != (parts.scheme, parts.netloc):
            self.close()
            await self._connect(origin, parts, giver_ip)
        assert self._streams is not None
        reader, writer = self._streams
        try:
            async with asyncio.timeout(FIRST_BYTE_S):
                writer.write(request)
                await writer.drain()
                data = await reader.readuntil(b"\r\n\r\n")
            return _parse_head(data)
        except TimeoutError:
            raise PeerTimeout(f"no answer within {FIRST_BYTE_S:g} s") from None
        except asyncio.LimitOverrunError:
            raise RemoteProtocolError(f"headers over {RESPONSE_HEADERS_MAX} B") from None
        except ValueError as exc:
            raise RemoteProtocolError(str(exc)) from None
        except (asyncio.IncompleteReadError, OSError) as exc:
            raise PeerUnreachable(getattr(exc, "strerror", None) or "closed the connection without an answer") from exc

    async def _connect(self, origin: Origin, parts: SplitResult, giver_ip: str | None) -> None:
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        error: FastCASError = PeerUnreachable(f"{host}: has no address")
        try:
            async with asyncio.timeout(CONNECT_S):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
                for address in dict.fromkeys(str(entry[4][0]) for entry in found):
                    why = None if giver_ip is None else refused_target(address, giver_ip)
                    if why is not None and host not in origin.named_hosts:
                        error = RemoteProtocolError(f"redirect to {escape_for_terminal(host)} ({address}): {why}")
                        continue
                    try:
                        self._streams = await asyncio.open_connection(
                            address, port, limit=READ_B, ssl=context, server_hostname=host if context else None
                        )
                        self._where, self._ip = (parts.scheme, parts.netloc), address
                        return
                    except ssl.SSLCertVerificationError as exc:
                        error = RemoteProtocolError(f"its certificate is not valid: {exc.verify_message}")
                    except OSError as exc:
                        error = PeerUnreachable(exc.strerror or str(exc))
        except TimeoutError:
            error = PeerTimeout(f"no connection within {CONNECT_S:g} s")
        except (OSError, UnicodeError) as exc:
            error = PeerUnreachable(f"cannot resolve the name: {exc}")
        raise error

    def _follow(self, origin: Origin, url: str, head: _Head) -> str:
        """The URL that a redirect names."""
        location = head.fields.get("location")
        if not location:
            raise RemoteProtocolError(f"status {head.status} without a Location")
        try:
            target = parse_origin(urljoin(url, location), "redirect")
        except (UsageError, ValueError) as exc:
            raise RemoteProtocolError(f"redirect: {exc}") from None
        if url.startswith("https:") and not target.startswith("https:"):
            raise RemoteProtocolError("redirect from https to http")
        return target

    async def _body(
        self, origin: Origin, url: str, head: _Head, start: int, end: int, size: int, take: Callable[[bytes], None]
    ) -> None:
        _check(head, start, end, size)
        parts = urlsplit(url)
        etag = head.fields.get("etag")
        if etag is not None:
            before = origin.etags.setdefault(f"{parts.netloc}{parts.path}", etag)
            if before != etag:
                raise RemoteProtocolError(
                    f"its ETag changed from {escape_for_terminal(before[:40])} to {escape_for_terminal(etag[:40])}"
                )
        assert self._streams is not None
        reader = self._streams[0]
        left = end - start
        begun = time.monotonic()
        while left:
            try:
                async with asyncio.timeout(STALL_FETCH_S):
                    piece = await reader.read(min(left, READ_B))
            except TimeoutError:
                raise PeerTimeout(f"stalled after {end - start - left} of {end - start} B") from None
            except OSError as exc:
                raise PeerUnreachable(f"{exc.strerror or exc} after {end - start - left} of {end - start} B") from exc
            if not piece:
                raise PeerUnreachable(f"closed the connection after {end - start - left} of {end - start} B")
            left -= len(piece)
            origin.n_received += len(piece)
            take(piece)
            if end - start - left < SLOW_BPS * (time.monotonic() - begun - SLOW_WINDOW_S):
                raise PeerTimeout(f"slower than {SLOW_BPS} B/s over {SLOW_WINDOW_S:g} s")
        if head.fields.get("connection", "").lower() == "close":
            self.close()


def _check(head: _Head, start: int, end: int, size: int) -> None:
    """Whether an answer that is no redirect has the asked bytes as its body.

    Raises:
        NotFound, PeerBusy, RemoteProtocolError: It has not.
    """
    status, fields = head.status, head.fields
    asked = f"bytes {start}-{end - 1}/{size}"
    length = fields.get("content-length")
    if status in (404, 410):
        raise NotFound(f"status {status}: has no such file")
    if status in (408, 425, 429) or status >= 500:
        raise PeerBusy(f"status {status}")
    if status == 416:
        has = escape_for_terminal(fields.get("content-range", "no Content-Range")[:60])
        raise RemoteProtocolError(f"status 416 for {asked}: {has}")
    if status not in (200, 206):
        raise RemoteProtocolError(f"status {status}")
    if "transfer-encoding" in fields:
        raise RemoteProtocolError("Transfer-Encoding")
    if fields.get("content-encoding", "identity").lower() != "identity":
        raise RemoteProtocolError("Content-Encoding")
    if length is None or not _NUMBER.fullmatch(length):
        raise RemoteProtocolError("no Content-Length" if length is None else "malformed Content-Length")
    if status == 200:
        if int(length) != size:
            raise RemoteProtocolError(f"its file has {length} B, expected {size} B")
        if (start, end) != (0, size):
            raise RemoteProtocolError(f"answers without Range: status 200 for {asked}")
        return
    got = fields.get("content-range", "-")
    match = _RANGE.fullmatch(got)
    if match is not None and match[3] not in ("*", str(size)):
        raise RemoteProtocolError(f"its file has {match[3]} B, expected {size} B")
    if match is None or (int(match[1]), int(match[2])) != (start, end - 1):
        raise RemoteProtocolError(f"Content-Range: expected {asked}, got {escape_for_terminal(got[:60])}")
    if int(length) != end - start:
        raise RemoteProtocolError(f"Content-Length: expected {end - start} B, got {length} B")
