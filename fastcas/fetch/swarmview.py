"""`/swarm/<file_hash>`: the question's target and the answer's meaning, every field bounded before use.

Owns the client's side of the swarm format of architecture §4. Never talks to anybody.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack

from fastcas.errors import RemoteProtocolError
from fastcas.fetch.scheduler import from_bitfield
from fastcas.ids import PeerAddr
from fastcas.limits import CHUNKS_MAX, MIB, SWARM_PEERS_MAX

__all__ = ["SWARM_BODY_MAX", "SwarmAnswer", "next_target", "parse_swarm", "swarm_target"]

SWARM_BODY_MAX = MIB  # a bitfield of 200,000 chunks is 25 KB; a list of as many new numbers 1 MB
MANIFESTS_MAX = 16
_NODE_ID = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True, slots=True)
class SwarmAnswer:
    """What a peer says about a file.

    Attributes:
        node_id: Its DHT id, 40 hex digits, or None.
        manifests: Manifest hashes that it has proven for this file, best first.
        generation: Of the have-information, for `since`; None when it does not hold the asked manifest.
        is_seed: It has every chunk.
        have: Chunk set, when it answered with the whole bitfield.
        new: Chunk numbers since the asked generation.
        peers: Others it knows: (node_id, address).
    """

    node_id: str | None
    manifests: tuple[bytes, ...]
    generation: int | None
    is_seed: bool
    have: int | None
    new: tuple[int, ...]
    peers: tuple[tuple[str | None, PeerAddr], ...]


def _identity(data_port: int | None, node_id: str | None) -> str:
    return f"&port={data_port}&id={node_id}" if data_port and node_id else ""


def swarm_target(
    file_hash: bytes,
    manifest_hash: bytes | None,
    *,
    since: int | None = None,
    wait_ms: int = 0,
    data_port: int | None = None,
    node_id: str | None = None,
) -> str:
    """Return the target of a `/swarm` question; with `data_port` and `node_id` we become known there."""
    query = ""
    if manifest_hash is not None:
        query += f"&m={manifest_hash.hex()}"
        if since is not None:
            query += f"&since={since}"
        if wait_ms:
            query += f"&wait_ms={wait_ms}"
    query += _identity(data_port, node_id)
    return f"/swarm/{file_hash.hex()}" + ("?" + query[1:] if query else "")


def next_target(
    file_hash: bytes, manifest_hash: bytes, first: int, *, data_port: int | None = None, node_id: str | None = None
) -> str:
    """Return the target that asks for a chunk >= `first` which the seed has given to nobody."""
    return f"/swarm/{file_hash.hex()}/next?m={manifest_hash.hex()}&from={first}" + _identity(data_port, node_id)


def _number(value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError("number out of range")
    return value


def _peers(value: Any) -> tuple[tuple[str | None, PeerAddr], ...]:
    out = []
    if not isinstance(value, list):
        raise ValueError("peers is not a list")
    for entry in value[:SWARM_PEERS_MAX]:
        node_id, ip, port = entry
        if not isinstance(ip, str) or len(ip) > 45:
            raise ValueError("peer address")
        known = node_id if isinstance(node_id, str) and _NODE_ID.fullmatch(node_id) else None
        out.append((known, _address(ip, 1 + _number(port - 1, 65535))))
    return tuple(out)


@lru_cache(maxsize=4096)
def _address(ip: str, port: int) -> PeerAddr:
    """Everybody names the same few addresses again and again. Raises: ValueError: Not a literal address."""
    return PeerAddr(str(ipaddress.ip_address(ip)), port)


def parse_swarm(body: bytes, n_total: int | None) -> SwarmAnswer:
    """Parse the answer to a `/swarm` question.

    Args:
        body: At most SWARM_BODY_MAX bytes.
        n_total: Chunks of the manifest that was asked about; None when none was: have-information is ignored.
    Raises:
        RemoteProtocolError: Not such an answer.
    """
    try:
        raw = msgpack.unpackb(
            body, raw=False, strict_map_key=True, max_array_len=CHUNKS_MAX, max_map_len=64, max_ext_len=0
        )
        if not isinstance(raw, dict) or raw.get("v") != 1:
            raise ValueError("not a version 1 map")
        node_id = raw.get("node_id")
        manifests = tuple(raw.get("manifests", ()))[:MANIFESTS_MAX]
        if any(not isinstance(m, bytes) or len(m) != 32 for m in manifests):
            raise ValueError("manifest hash")
        is_seed, have, generation = False, None, None
        new: tuple[int, ...] = ()
        if n_total is not None:
            if "g" in raw:
                generation = _number(raw["g"], 1 << 63)
            is_seed = raw.get("all") is True
            if not is_seed and "have" in raw:
                field = raw["have"]
                if not isinstance(field, bytes) or len(field) != -(-n_total // 8):
                    raise ValueError("bitfield length")
                have = from_bitfield(field, n_total)
            if "new" in raw:
                new = tuple(_number(i, n_total) for i in raw["new"])
        peers = _peers(raw.get("peers", []))
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise RemoteProtocolError(f"/swarm answer: {exc}") from exc
    return SwarmAnswer(
        node_id if isinstance(node_id, str) and _NODE_ID.fullmatch(node_id) else None,
        manifests,
        generation,
        is_seed,
        have,
        new,
        peers,
    )
