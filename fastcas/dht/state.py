"""The state file: contacts that were good, for the next start. A hint; a damaged one is reported and ignored.

offset  size  field
0       8     magic "FCDHTST1"
8       8     xxh3-64 of the rest, little-endian
16      ...   msgpack map {"contacts": [[id20, packed ip, port]...]}, at most 400 contacts
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgpack
import xxhash

from fastcas.dht.budgets import SAVED_CONTACTS_MAX
from fastcas.dht.contacts import Address, Contact, pack_address, parse_ip

__all__ = ["load_state", "save_state"]

log = logging.getLogger(__name__)

MAGIC = b"FCDHTST1"
SIZE_MAX = 64 << 10


def save_state(path: Path, contacts: Iterable[Contact]) -> None:
    """Write the state file, readable by its owner only; the old one stays until the new one is on disk.

    Raises:
        OSError: It could not be written; the old file is as it was.
    """
    rows = [[c.id, pack_address(c.ip) or b"", c.port] for c in contacts][:SAVED_CONTACTS_MAX]
    body: bytes = msgpack.packb({"contacts": rows})
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


def load_state(path: Path) -> list[Address]:
    """Return the addresses of saved contacts; empty when there is no file or it is damaged (one warning)."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_MAX + 1)
    except FileNotFoundError:
        return []
    except OSError as exc:
        log.warning("DHT state %s: cannot be read (%s); starting without saved contacts", path, exc)
        return []
    body = data[16:]
    rows: object = None
    if len(data) <= SIZE_MAX and data[:8] == MAGIC and data[8:16] == xxhash.xxh3_64_digest(body)[::-1]:
        try:
            rows = msgpack.unpackb(body).get("contacts")
        except (ValueError, AttributeError, msgpack.UnpackException):
            rows = None
    if not isinstance(rows, list):
        log.warning("DHT state %s: damaged; starting without saved contacts", path)
        return []
    found: list[Address] = []
    for row in rows[:SAVED_CONTACTS_MAX]:
        match row:
            case [bytes(), bytes(packed), int(port)] if 1 <= port <= 65535:
                ip = parse_ip(packed)
                if ip is not None:
                    found.append((ip, port))
    return found
