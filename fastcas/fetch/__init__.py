"""Get a file from many peers at once, with every chunk proven before anybody can see it.

In: links and hashes, peers from discovery, chunks that this machine already has.
Out: a finished file (or folder) at its place, and what came from whom.
Owns: the HTTP client, the scheduler, the part file with its journal, the rules of trust for manifests.
Never: serves, stores into the store, talks UDP, shows a byte under its name before it was checked.

The function for one link is `fastcas.fetch.download.download`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcas.fetch.client import P2PClient
    from fastcas.fetch.download import DownloadHooks, DownloadResult, FetchedTree, LocalChunks, Progress
    from fastcas.fetch.downloader import P2PChunkDownloader

__all__ = [
    "DownloadHooks",
    "DownloadResult",
    "FetchedTree",
    "LocalChunks",
    "P2PChunkDownloader",
    "P2PClient",
    "Progress",
]

_HOME = {
    "DownloadHooks": "download",
    "DownloadResult": "download",
    "FetchedTree": "download",
    "LocalChunks": "download",
    "P2PChunkDownloader": "downloader",
    "P2PClient": "client",
    "Progress": "download",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
