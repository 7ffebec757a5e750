"""The state file: what a node that comes back needs to be in the network at once. A hint; damage is reported, ignored.

offset  size  field
0       8     magic "FCDHTST2"
8       8     xxh3-64 of the rest, little-endian
16      ...   msgpack map, see below; the whole file has at most 64 KiB

"contacts"  [[id20, packed ip (4 or 16 bytes), UDP port]...], at most 400, those that answered last first
"chunks"    nil, or what of the chunk keys was announced: {"port": TCP data port that was announced, "nodes": other
            nodes when everything was announced, "cursor": number of the slice of the key space that comes next,
            "cost": bytes per key, "slices": [[number 0..63, Unix time of the announcement, life of its records in
            seconds, xxh3-64 of its 64-bit keys]...]}

A file of the version before ("FCDHTST1", contacts only) is read as well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import xxhash

from fastcas.dht.budgets import SAVED_CONTACTS_MAX
from fastcas.dht.chunk_cycle import SavedCycle
from fastcas.dht.contacts import Address, Contact, pack_address, parse_ip

__all__ = ["SavedState", "load_state", "save_state"]

log = logging.getLogger(__name__)

MAGIC = b"FCDHTST2"
MAGIC_BEFORE = b"FCDHTST1"
SIZE_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a state file says: addresses of contacts, and the announced chunks if there were any."""

    addresses: list[Address] = field(default_factory=list)
    chunks: SavedCycle | None = None


def save_state(path: Path, contacts: Iterable[Contact], chunks: SavedCycle | None = None) -> None:
    """Write the state file, readable by its owner only; the old one stays until the new one is on disk.

    Raises:
        OSError: It could not be written; the old file is as it was.
    """
    rows = [[c.id, pack_address(c.ip) or b"", c.port] for c in contacts][:SAVED_CONTACTS_MAX]
    body: bytes = msgpack.packb({"contacts": rows, "chunks": chunks.to_map() if chunks is not None else None})
    data = MAGIC + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_state(path: Path) -> SavedState:
    """Return what was saved; nothing when there is no file or it is damaged (one warning)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not even a pipe can hold us up
        with os.fdopen(fd, "rb") as file:
            data = file.read(SIZE_MAX + 1) or b""
    except FileNotFoundError:
        return SavedState()
    except OSError as exc:
        log.warning("DHT state %s: cannot be read (%s); starting without saved contacts", path, exc)
        return SavedState()
    values = _decode(data)
    if values is None:
        log.warning("DHT state %s: damaged; starting without saved contacts", path)
        return SavedState()
    found: list[Address] = []
    for row in values["contacts"][:SAVED_CONTACTS_MAX]:
        match row:
            case [bytes(), bytes(packed), int(port)] if 1 <= port <= 65535:
                ip = parse_ip(packed)
                if ip is not None:
                    found.append((ip, port))
    return SavedState(found, SavedCycle.from_map(values.get("chunks")))


def _decode(data: bytes) -> dict[str, Any] | None:
    body = data[16:]
    if len(data) > SIZE_MAX or data[:8] not in (MAGIC, MAGIC_BEFORE):
        return None
    if data[8:16] != xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"):
        return None
    try:
        values = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("contacts"), list) else None
