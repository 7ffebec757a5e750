"""Sealed snapshots: one immutable value in a memfd, made once, read by any process that gets the descriptor.

Keys snapshot (`write_keys`): u64 count, then count * 32 bytes: sorted chunk hashes without repeats.
Swarm snapshot (`write_swarm`): u64 length, then `length` bytes of msgpack:
{file_hash: {"peers": [[node_id, ip, port], ...], "manifests": [manifest_hash, ...]}}, hashes as 32 bytes.
Integers little-endian. Both are sealed SHRINK | GROW | FUTURE_WRITE before anybody else sees them, so a snapshot
never changes: publishing another value means another memfd.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import msgpack

from fastcas.errors import LocalProtocolError, UsageError
from fastcas.table import memfd
from fastcas.table._shared import sort_keys

__all__ = ["SwarmEntry", "read_keys", "read_swarm", "write_keys", "write_swarm"]

_HEAD = struct.Struct("<Q")
KEYS_MAX = 1 << 30  # 32 GiB of keys: more chunks than one node can index
SWARM_BYTES_MAX = 256 << 20


class SwarmEntry(TypedDict):
    """What is known of one file's swarm: peers as (node_id, ip, port), manifest hashes best first."""

    peers: list[tuple[str, str, int]]
    manifests: list[bytes]


def write_keys(hashes: Iterable[bytes | bytearray | memoryview]) -> int:
    """Return the descriptor of a keys snapshot.

    Args:
        hashes: Any number of runs of n * 32 bytes, in any order.
    Raises:
        UsageError: A run that is not a multiple of 32 bytes.
    Cost: one sort without the GIL; twice the keys' memory.
    """
    keys = bytearray(_HEAD.size)
    for run in hashes:
        if len(run) % 32:
            raise UsageError(f"keys: expected a multiple of 32 bytes, got {len(run)}")
        keys += run
    with memoryview(keys) as view, view[_HEAD.size :] as body:
        count = sort_keys(body)
        _HEAD.pack_into(keys, 0, count)
        return _sealed("fastcas-keys", view[: _HEAD.size + 32 * count])


def read_keys(fd: int) -> memoryview:
    """Return the keys of a snapshot: uint8[n * 32], sorted. The descriptor is borrowed.

    The view keeps the mapping alive; release it, or drop the last reference to it, to unmap.

    Raises:
        LocalProtocolError: Not a keys snapshot, or a memfd that can still shrink.
    Cost: no copy.
    """
    mapping, size = _map(fd, "keys snapshot")
    view = memoryview(mapping).toreadonly()
    (count,) = _HEAD.unpack_from(view)
    if count > KEYS_MAX or _HEAD.size + 32 * count != size:
        view.release()
        mapping.close()
        raise LocalProtocolError(f"keys snapshot: {count} keys do not fit {size} B, not used")
    return view[_HEAD.size :]


def write_swarm(swarm: Mapping[bytes, SwarmEntry]) -> int:
    """Return the descriptor of a swarm snapshot.

    Raises:
        UsageError: More than 256 MiB encoded, or a field that `read_swarm` would refuse.
    """
    try:
        checked = {_hash(file_hash): _entry(entry) for file_hash, entry in swarm.items()}
    except (ValueError, TypeError, KeyError) as exc:
        raise UsageError(f"swarm snapshot: malformed ({exc}), not written") from exc
    packed = msgpack.packb(checked)
    if len(packed) > SWARM_BYTES_MAX:
        raise UsageError(f"swarm snapshot: {len(packed)} B exceed {SWARM_BYTES_MAX} B, not written")
    return _sealed("fastcas-swarm", _HEAD.pack(len(packed)) + packed)


def read_swarm(fd: int) -> dict[bytes, SwarmEntry]:
    """Return what `write_swarm` was given, every field checked. The descriptor is borrowed.

    Raises:
        LocalProtocolError: Not a swarm snapshot, or a memfd that can still shrink.
    """
    mapping, size = _map(fd, "swarm snapshot")
    with mapping:
        (length,) = _HEAD.unpack_from(mapping)
        if length > SWARM_BYTES_MAX or _HEAD.size + length != size:
            raise LocalProtocolError(f"swarm snapshot: {length} B do not fit {size} B, not used")
        packed = mapping[_HEAD.size :]
    try:
        decoded = msgpack.unpackb(packed, strict_map_key=True)
        return {_hash(file_hash): _entry(entry) for file_hash, entry in decoded.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise LocalProtocolError(f"swarm snapshot: malformed ({exc}), not used") from exc


def _hash(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ValueError("expected a hash of 32 bytes")
    return value


def _entry(value: Any) -> SwarmEntry:
    peers: list[tuple[str, str, int]] = []
    for node_id, ip, port in value["peers"]:
        if not isinstance(node_id, str) or not isinstance(ip, str):
            raise ValueError("expected node id and ip as text")
        if type(port) is not int or not 1 <= port <= 65535:
            raise ValueError("expected a port")
        peers.append((node_id, ip, port))
    return {"peers": peers, "manifests": [_hash(manifest) for manifest in value["manifests"]]}


def _sealed(name: str, content: bytes | memoryview) -> int:
    fd = memfd.create(name)
    try:
        done = 0
        with memoryview(content) as view:
            while done < len(view):
                done += os.write(fd, view[done:])
        memfd.seal(fd, writable_by_others=False)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, subject: str) -> tuple[mmap.mmap, int]:
    if not memfd.is_sealed(fd):
        raise LocalProtocolError(f"{subject}: the memfd can still shrink, not used")
    size = os.fstat(fd).st_size
    if size < _HEAD.size:
        raise LocalProtocolError(f"{subject}: {size} B are too few, not used")
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), size
