"""The parameters of /swarm targets: bytes from the wire to checked values (architecture §4).

Pure. Owns the grammar; every value is matched by an ASCII pattern before it becomes a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastcas.limits import SWARM_WAIT_MS_MAX

__all__ = ["BadQuery", "Caller", "SwarmQuery", "parse_swarm_query", "parse_target"]

_PATH = re.compile(rb"/swarm/([0-9a-f]{64})(/next)?")
_HASH = re.compile(rb"[0-9a-f]{64}")
_NODE_ID = re.compile(rb"[0-9a-f]{40}")
_NUMBER = re.compile(rb"0|[1-9][0-9]{0,9}")
_PORT_MAX = 65535
_KNOWN = frozenset({b"m", b"since", b"wait_ms", b"port", b"id", b"from"})


class BadQuery(ValueError):
    """A known parameter is malformed or given twice; the message names it."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as it says itself: its node id and data port. Its address is the connection's source."""

    node_id: str
    port: int


@dataclass(frozen=True, slots=True)
class SwarmQuery:
    """Checked parameters.

    Attributes:
        manifest_hash: `m`, 32 bytes.
        since: Generation that the caller has.
        wait_ms: How long the answer may wait for news, 0..5,000.
        first_chunk: `from` of /next.
        caller: Only when both port and id are given.
    """

    manifest_hash: bytes | None = None
    since: int | None = None
    wait_ms: int = 0
    first_chunk: int = 0
    caller: Caller | None = None


def parse_target(path: bytes) -> tuple[bytes, bool]:
    """Return (file_hash, whether /next is asked) of a /swarm path.

    Raises:
        BadQuery: Another path.
    """
    match = _PATH.fullmatch(path)
    if not match:
        raise BadQuery("path: expected /swarm/<64 hex>")
    return bytes.fromhex(match[1].decode("ascii")), match[2] is not None


def _number(fields: dict[bytes, bytes], key: bytes, low: int, high: int) -> int | None:
    text = fields.get(key)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise BadQuery(f"{key.decode()}: expected a number from {low} to {high}")
    return int(text)


def _text(fields: dict[bytes, bytes], key: bytes, pattern: re.Pattern[bytes], what: str) -> str | None:
    text = fields.get(key)
    if text is None:
        return None
    if not pattern.fullmatch(text):
        raise BadQuery(f"{key.decode()}: expected {what}")
    return text.decode("ascii")


def parse_swarm_query(query: bytes) -> SwarmQuery:
    """Parse the part of a /swarm target after '?'. Unknown keys are ignored.

    Raises:
        BadQuery: A known key is malformed, out of range, or given twice; or only one of port and id is given.
    """
    fields: dict[bytes, bytes] = {}
    for part in query.split(b"&") if query else ():
        key, _, value = part.partition(b"=")
        if key not in _KNOWN:
            continue
        if key in fields:
            raise BadQuery(f"{key.decode()}: given twice")
        fields[key] = value
    manifest = _text(fields, b"m", _HASH, "64 lower-case hex digits")
    node_id = _text(fields, b"id", _NODE_ID, "40 lower-case hex digits")
    port = _number(fields, b"port", 1, _PORT_MAX)
    if (node_id is None) != (port is None):
        raise BadQuery("port, id: expected both or none")
    return SwarmQuery(
        bytes.fromhex(manifest) if manifest is not None else None,
        _number(fields, b"since", 0, (1 << 32) - 1),
        _number(fields, b"wait_ms", 0, SWARM_WAIT_MS_MAX) or 0,
        _number(fields, b"from", 0, (1 << 32) - 1) or 0,
        Caller(node_id, port) if node_id is not None and port is not None else None,
    )
