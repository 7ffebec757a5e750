"""A collection with its files and packs behind one data port; the scripted peer of the file answers each request."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from fastcas.ids import Link, PeerAddr
from fastcas.store.collection import Collection, FileEntry, PackEntry, SmallEntry
from tests.support.evil_peer import Peer, content_of, head

__all__ = ["BIG", "SMALLS", "WANTED", "Library", "library", "tree_of"]

BIG = content_of(200_000, 5)
SMALLS = {"a/tiny.txt": b"tiny", "a/b/other": content_of(1000, 6), "empty": b""}


class Library:
    """One data port that serves several files: routes each request to the `Peer` of that file."""

    def __init__(self, *contents: bytes) -> None:
        self.peers = [Peer(content) for content in contents]
        self.asked: list[str] = []

    async def __aenter__(self) -> Library:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def addr(self) -> PeerAddr:
        return PeerAddr("127.0.0.1", self._server.sockets[0].getsockname()[1])

    def link(self) -> Link:
        """Return a link to the collection."""
        manifest = self.peers[0].manifest
        return Link(manifest.file_hash, manifest.manifest_hash, peers=(self.addr,))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                target = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                self.asked.append(target)
                name = target.split("?")[0].split("/")[2]
                for peer in self.peers:
                    if (
                        name in (peer.manifest.file_hash.hex(), peer.manifest.manifest_hash.hex())
                        or name in peer._index
                    ):
                        await peer._answer(target, writer)
                        break
                else:
                    writer.write(head("404 Not Found", 0))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def library(**changes: Any) -> tuple[Library, bytes]:
    """Return a library with a collection of one big and some small files, and the collection's content."""
    pack = SMALLS["a/b/other"] + SMALLS["a/tiny.txt"]
    big, packed = Peer(BIG).manifest, Peer(pack).manifest
    small = [
        SmallEntry("a/b/other", False, 1000, hashlib.sha256(SMALLS["a/b/other"]).digest(), 0, 0),
        SmallEntry("a/tiny.txt", True, 4, hashlib.sha256(b"tiny").digest(), 0, 1000),
        SmallEntry("empty", False, 0, hashlib.sha256(b"").digest(), 0, 0),
    ]
    parts: dict[str, Any] = {
        "packs": (PackEntry(packed.file_hash, packed.manifest_hash, packed.size),),
        "dirs": ("a", "a/b"),
        "files": (FileEntry("a/big.bin", True, len(BIG), big.file_hash, big.manifest_hash),),
        "small": tuple(small),
    }
    content = Collection(**(parts | changes)).encode()
    return Library(content, BIG, pack), content


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of a folder's files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WANTED = SMALLS | {"a/big.bin": BIG}
