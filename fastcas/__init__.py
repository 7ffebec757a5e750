"""fastcas moves big files to many machines: content-addressed, peer to peer, every byte proven before it is seen.

The three stories, and where to read them:

    publish   file ─ingest▶ chunks (+parity) ─▶ store ─commit▶ table ─▶ dht announces
    serve     GET ─▶ worker engine ─lookup▶ table ─▶ (fd, offset, length) ─▶ writev | sendfile
    fetch     client ─who▶ peers ─▶ dht;  client ─scheduler▶ receiver ─GET▶ peer ─▶ verify ─▶ file on disk (─▶ parity)

    hashing/ parity/   leaf engines: bytes in, bytes out       peers/   who has what: the discovery seam
    table/             shared memory between the processes     fetch/   client, scheduler, receiver
    store/             bytes on disk                           dht/     the discovery process
    serve/             the worker processes                    node/    supervisor, agent, P2PNode
    errors ids limits config metadata: words and limits        cli/     the commands

Importing this package imports none of them: a name is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # not typing's: the commands wait for this module, so it imports next to nothing
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from fastcas.fetch import P2PChunkDownloader, P2PClient
    from fastcas.metadata import FileMetadata
    from fastcas.node.node import P2PNode
    from fastcas.node.reading import open
    from fastcas.node.shortcuts import get, store
    from fastcas.peers.manager import P2PPeerManager
    from fastcas.store.types import StoredFile
else:
    ModuleType = type(sys)

__version__ = "0.1.0"

__all__ = [
    "FileMetadata",
    "P2PChunkDownloader",
    "P2PClient",
    "P2PNode",
    "P2PPeerManager",
    "StoredFile",
    "get",
    "open",
    "store",
]

_WHERE = {
    "FileMetadata": "fastcas.metadata",
    "P2PChunkDownloader": "fastcas.fetch",
    "P2PClient": "fastcas.fetch",
    "P2PNode": "fastcas.node.node",
    "P2PPeerManager": "fastcas.peers.manager",
    "StoredFile": "fastcas.store.types",
    "get": "fastcas.node.shortcuts",
    "open": "fastcas.node.reading",
}
_MODULES = frozenset({"errors", "fetch", "hashing", "ids", "metadata", "parity", "peers", "store"})


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is."""
    import importlib

    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastcas.{name}")
    else:
        raise AttributeError(f"module 'fastcas' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _CallableStore(ModuleType):
    """`fastcas.store` is the package that keeps bytes and the one-liner that stores a file: a module that is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> StoredFile:
        from fastcas.node.shortcuts import store

        return store(*args, **kwargs)


class _Package(ModuleType):
    """Makes the `store` subpackage callable when the import system binds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "store" and type(value) is ModuleType:
            value.__class__ = _CallableStore
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
