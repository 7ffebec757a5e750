"""The store: bytes on disk, and the catalog that says what lies where.

In: files, directories and downloads of this machine; manifests; what the node asks for by hash.
Out: extents (blob, offset, length), manifests, reports; a listener hears what becomes live or goes away.
Owns: the storage folder, its lock, catalog.db, owned blobs, manifests, quarantine; all crash safety.
Never: opens a socket, starts a process, writes a user's own file, or hands out a byte that it has not checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcas.store.collection import Collection, FileEntry, PackEntry, SmallEntry, check_path, check_paths
    from fastcas.store.scrub import Scrub
    from fastcas.store.store import Store
    from fastcas.store.types import (
        Damage,
        Extent,
        FileRow,
        GcReport,
        Identity,
        MigrateReport,
        RebuildReport,
        StoredFile,
        StoreListener,
        VerifyReport,
        Wanted,
    )

__all__ = [
    "Collection",
    "Damage",
    "Extent",
    "FileEntry",
    "FileRow",
    "GcReport",
    "Identity",
    "MigrateReport",
    "PackEntry",
    "RebuildReport",
    "Scrub",
    "SmallEntry",
    "Store",
    "StoreListener",
    "StoredFile",
    "VerifyReport",
    "Wanted",
    "check_path",
    "check_paths",
]

_HOME = {
    "Collection": "collection",
    "Damage": "types",
    "Extent": "types",
    "FileEntry": "collection",
    "FileRow": "types",
    "GcReport": "types",
    "Identity": "types",
    "MigrateReport": "types",
    "PackEntry": "collection",
    "RebuildReport": "types",
    "Scrub": "scrub",
    "SmallEntry": "collection",
    "Store": "store",
    "StoreListener": "types",
    "StoredFile": "types",
    "VerifyReport": "types",
    "Wanted": "types",
    "check_path": "collection",
    "check_paths": "collection",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
