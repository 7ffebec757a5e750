"""The name that a file gets where the user gave none: what its link, this store or its publishers call it."""

from __future__ import annotations

from fastcas.errors import FastCASError
from fastcas.fetch.partfile import safe_name
from fastcas.ids import Link
from fastcas.peers.discovery import Discovery

__all__ = ["choose_name"]

NAME_S = 5.0


async def choose_name(link: Link, discovery: Discovery | None, known: str | None, timeout_s: float) -> str:
    """Return a single safe path component: from the link, else `known`, else a metadata record, else the hash."""
    name = link.name or known
    if not name and discovery is not None:
        try:
            records = await discovery.get_metadata(link.file_hash, min(NAME_S, timeout_s))
        except FastCASError:
            records = []
        name = records[0].name if records else None
    return safe_name(name, link.file_hash.hex())
