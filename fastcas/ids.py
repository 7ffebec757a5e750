"""Names and addresses as people write them: hashes, links, peers, sizes, rates, parity shapes.

Owns the grammar of every argument that names something (architecture §2, §9). Each parser takes the text and
the argument's name, and raises `UsageError` with one line that names the argument.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

from fastcas.errors import UsageError
from fastcas.limits import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, PATH_BYTES_MAX

__all__ = [
    "Link",
    "PeerAddr",
    "escape_for_terminal",
    "hex_of",
    "parse_chunk_size",
    "parse_hash",
    "parse_member",
    "parse_parity",
    "parse_peer",
    "parse_quota",
    "parse_rate",
    "parse_ref",
    "parse_size",
    "parse_subset",
    "short",
]

_HEX64 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,15})(K|M|G|KiB|MiB|GiB)?", re.ASCII)
_UNIT = {None: 1, "K": 1 << 10, "KiB": 1 << 10, "M": 1 << 20, "MiB": 1 << 20, "G": 1 << 30, "GiB": 1 << 30}
_PARITY = re.compile(r"([0-9]{1,3})\+([0-9]{1,3})", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", re.ASCII)
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
MAX_LINK_CHARS = 8192
MAX_LINK_PEERS = 64


def _quoted(text: str) -> str:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return "'" + escape_for_terminal(shown) + "'"


def escape_for_terminal(text: str) -> str:
    """Return `text` with control, bidi and other invisible characters as \\x, \\u or \\U escapes."""
    import unicodedata

    out = []
    for char in text:
        if unicodedata.category(char) in _UNSAFE_CATEGORIES:
            code = ord(char)
            out.append(f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
        else:
            out.append(char)
    return "".join(out)


def parse_hash(text: str, argument: str = "hash") -> bytes:
    """Return the 32 bytes of a 64-digit lower-case hex hash.

    Raises:
        UsageError: Anything else than exactly 64 of 0-9a-f.
    """
    if not isinstance(text, str) or not _HEX64.fullmatch(text):
        raise UsageError(f"{argument}: expected 64 lower-case hex digits, got {_quoted(str(text))}")
    return bytes.fromhex(text)


def hex_of(digest: bytes) -> str:
    """Return a 32-byte hash as 64 lower-case hex digits."""
    return digest.hex()


def short(digest: bytes | str) -> str:
    """Return the first 8 hex digits, as logs and messages show a hash."""
    return digest[:8] if isinstance(digest, str) else digest[:4].hex()


@dataclass(frozen=True, slots=True, order=True)
class PeerAddr:
    """Where a peer's data port listens: a literal IP address (or a host name not yet resolved) and a TCP port."""

    ip: str
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"

    @property
    def is_literal(self) -> bool:
        """Whether `ip` is an address, so that no name needs resolving."""
        try:
            ipaddress.ip_address(self.ip)
        except ValueError:
            return False
        return True


def parse_peer(text: str, argument: str = "peer") -> PeerAddr:
    """Parse `host:port`, `[v6]:port`.

    Raises:
        UsageError: No port, port outside 1..65535, or a host that is neither an address nor a name.
    """
    bad = UsageError(f"{argument}: expected HOST:PORT, got {_quoted(text)}")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise bad
        port_text = rest[1:]
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            raise bad from None
    else:
        host, colon, port_text = text.rpartition(":")
        if not colon or ":" in host:
            raise bad
        if re.fullmatch(r"[0-9.]+", host, re.ASCII):
            try:
                host = str(ipaddress.IPv4Address(host))
            except ValueError:
                raise bad from None
        elif not _HOST_NAME.fullmatch(host):
            raise bad
    if not re.fullmatch(r"[0-9]{1,5}", port_text, re.ASCII) or not 1 <= int(port_text) <= 65535:
        raise bad
    return PeerAddr(host, int(port_text))


def parse_size(text: str, argument: str = "size") -> int:
    """Return bytes: digits with optional K, M, G or KiB, MiB, GiB, powers of 1024.

    Raises:
        UsageError: Any other text, or zero.
    """
    match = _SIZE.fullmatch(text)
    if not match or int(match[1]) == 0:
        raise UsageError(f"{argument}: expected a size such as 256KiB or 4M, got {_quoted(text)}")
    return int(match[1]) * _UNIT[match[2]]


def parse_chunk_size(text: str, argument: str = "chunk_size") -> int | None:
    """Return bytes of a chunk size; None for "auto".

    Raises:
        UsageError: Neither "auto" nor a power of two from 16 KiB to 16 MiB.
    """
    if text == "auto":
        return None
    size = parse_size(text, argument)
    if not CHUNK_SIZE_MIN <= size <= CHUNK_SIZE_MAX or size & (size - 1):
        raise UsageError(f"{argument}: expected auto or a power of two from 16KiB to 16MiB, got {_quoted(text)}")
    return size


def parse_rate(text: str, argument: str = "rate") -> int:
    """Return bytes per second; the grammar of `parse_size`."""
    return parse_size(text, argument)


def parse_quota(text: str, argument: str = "quota") -> int | None:
    """Return bytes, the grammar of `parse_size`; None for "none".

    Raises:
        UsageError: Any other text.
    """
    return None if text == "none" else parse_size(text, argument)


def parse_parity(text: str, argument: str = "parity") -> tuple[int, int]:
    """Return (k, m) of `K+M` with k >= 1, 1 <= m <= 64, k + m <= 255.

    Raises:
        UsageError: Any other text or shape.
    """
    match = _PARITY.fullmatch(text)
    if match:
        k, m = int(match[1]), int(match[2])
        if k >= 1 and 1 <= m <= 64 and k + m <= 255:
            return k, m
    raise UsageError(f"{argument}: expected K+M with K >= 1, 1 <= M <= 64, K+M <= 255, got {_quoted(text)}")


def parse_subset(text: str, argument: str = "subset") -> tuple[int, int]:
    """Return (i, n) of `I/N`, the I-th of N parts.

    Raises:
        UsageError: Any other text, or not 1 <= I <= N <= 1,000,000.
    """
    match = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 1_000_000:
        raise UsageError(f"{argument}: expected I/N with 1 <= I <= N, such as 2/7, got {_quoted(text)}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True)
class Link:
    """A fastcas:// link: file_hash (32 bytes), and what helps to fetch it.

    name, size, peers (data ports) and dht (DHT nodes, UDP ports) are hints for people and for the first connection;
    manifest_hash, where present, is trusted as architecture §5.2 says. path, of a REF/path (`parse_member`): one file
    of a collection.
    """

    file_hash: bytes
    manifest_hash: bytes | None = None
    name: str | None = None
    size: int | None = None
    peers: tuple[PeerAddr, ...] = ()
    dht: tuple[PeerAddr, ...] = ()
    path: str | None = None

    def __str__(self) -> str:
        query = []
        if self.manifest_hash is not None:
            query.append("m=" + self.manifest_hash.hex())
        if self.name is not None:
            query.append("name=" + quote(self.name, safe=""))
        if self.size is not None:
            query.append(f"size={self.size}")
        for key, addresses in (("peer", self.peers), ("dht", self.dht)):
            query += [f"{key}=" + quote(str(address), safe=":[]") for address in addresses]
        path = "/" + quote(self.path) if self.path is not None else ""
        return "fastcas://" + self.file_hash.hex() + path + ("?" + "&".join(query) if query else "")

    @classmethod
    def parse(cls, text: str, argument: str = "link") -> Link:
        """Parse a link. Unknown keys are ignored; known ones must be well-formed and, but for peer and dht, single.

        Raises:
            UsageError: The scheme, the hash or a known key is malformed, or the link is over 8,192
                characters or 80 fields.
        """
        if len(text) > MAX_LINK_CHARS:
            raise UsageError(f"{argument}: longer than {MAX_LINK_CHARS} characters ({len(text)})")
        try:
            parts = urlsplit(text)
        except ValueError:
            raise UsageError(f"{argument}: not a fastcas:// link: {_quoted(text)}") from None
        if parts.scheme != "fastcas" or parts.path not in ("", "/") or parts.fragment:
            raise UsageError(f"{argument}: expected fastcas://<64 hex>?..., got {_quoted(text)}")
        file_hash = parse_hash(parts.netloc, argument)
        manifest_hash: bytes | None = None
        name: str | None = None
        size: int | None = None
        peers: list[PeerAddr] = []
        dht: list[PeerAddr] = []
        seen: set[str] = set()
        try:
            fields = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=MAX_LINK_PEERS + 16)
        except ValueError:
            raise UsageError(f"{argument}: more than {MAX_LINK_PEERS + 16} fields") from None
        for key, value in fields:
            if key in seen:
                raise UsageError(f"{argument}: {key}= given twice")
            if key in ("m", "name", "size"):
                seen.add(key)
            if key == "m":
                manifest_hash = parse_hash(value, f"{argument}: m")
            elif key == "name":
                name = value
            elif key == "size":
                if not re.fullmatch(r"[0-9]{1,16}", value, re.ASCII):
                    raise UsageError(f"{argument}: size: expected a number of bytes, got {_quoted(value)}")
                size = int(value)
            elif key == "peer":
                peers.append(parse_peer(value, f"{argument}: peer"))
            elif key == "dht":
                dht.append(parse_peer(value, f"{argument}: dht"))
        return cls(file_hash, manifest_hash, name, size, tuple(peers), tuple(dht))


def parse_ref(text: str, argument: str = "REF") -> Link:
    """Return the `Link` of a REF: a 64-hex file or collection hash, or a fastcas:// link.

    Raises:
        UsageError: Neither.
    """
    if text.startswith("fastcas:"):
        return Link.parse(text, argument)
    return Link(parse_hash(text, argument))


def parse_member(text: str, argument: str = "REF") -> Link:
    """Return the `Link` of a REF, or of REF/path: one file of a collection (`Link.path`).

    The path follows the hash (`<64 hex>/a/b`), the whole link, or the hash within it, there percent-encoded
    (`fastcas://<64 hex>/a/b?m=…`); a link that is followed by a path has no other `/` after its `?`.

    Raises:
        UsageError: The REF is malformed, or the path is empty, has an empty, `.` or `..` component, or over 4,096 B.
    """
    if not text.startswith("fastcas:"):
        ref, slash, path = text.partition("/")
        link = parse_ref(ref, argument)
    else:
        place, mark, query = text.partition("?")
        hash_end = len("fastcas://") + 64
        query, slash, path = query.partition("/")
        if len(place) > hash_end + 1 and place[hash_end] == "/" and not slash:
            slash, path = "/", unquote_to_bytes(place[hash_end + 1 :]).decode("utf-8", "surrogateescape")
            place = place[:hash_end]
        link = Link.parse(place + mark + query, argument)
    if not slash:
        return link
    n_bytes = len(path.encode(errors="replace"))
    is_text = path.isascii() or not any("\ud800" <= char <= "\udfff" for char in path)
    if not is_text or n_bytes > PATH_BYTES_MAX or "\0" in path or {"", ".", ".."}.intersection(path.split("/")):
        raise UsageError(f"{argument}: expected a path of plain components after the /, got {_quoted(path)}")
    return replace(link, path=path)
