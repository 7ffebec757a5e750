"""`NodeDiscovery`: the node's own discovery, asked through its control socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastcas.errors import FastCASError
from fastcas.node.control_client import AsyncControlClient
from fastcas.peers.discovery import Discovery, MetadataHint, NodeHint, PeerHint

__all__ = ["NodeDiscovery", "serve_discovery"]

KEYS_PER_CALL = 8192


class NodeDiscovery:
    """A `Discovery` for programs that hold a node; closing it leaves the node alone.

    Finds end without hints when the node is gone; announcing raises `NodeUnavailable` then.
    """

    name = "node"

    def __init__(self, client: AsyncControlClient) -> None:
        """Ask through `client`, which stays the caller's."""
        self._client = client

    async def find_file_peers(self, file_hash: bytes, want: int, deadline_s: float) -> AsyncIterator[PeerHint]:
        """Yield the peers that the node finds."""
        args = {"file_hash": file_hash, "want": want, "deadline_s": deadline_s}
        try:
            answer = await self._client.call("find_file_peers", args)
        except FastCASError:
            return
        for peer in answer["peers"]:
            yield PeerHint(*peer)

    async def find_chunk_peers(
        self, hashes: Sequence[bytes], want: int, deadline_s: float
    ) -> AsyncIterator[tuple[bytes, PeerHint]]:
        """Yield (chunk, peer) pairs that the node finds."""
        for at in range(0, len(hashes), KEYS_PER_CALL):
            batch = list(hashes[at : at + KEYS_PER_CALL])
            args = {"keys": b"".join(batch), "want": want, "deadline_s": deadline_s}
            try:
                answer = await self._client.call("find_chunk_peers", args)
            except FastCASError:
                return
            peers = [PeerHint(*peer) for peer in answer["peers"]]
            for key_index, peer_index in answer["pairs"]:
                yield batch[key_index], peers[peer_index]

    async def announce_files(self, items: Sequence[tuple[bytes, int]]) -> int:
        """Announce files in the node's name."""
        return int((await self._client.call("announce_files", {"files": [list(item) for item in items]}))["stored"])

    async def announce_chunks(self, keys: Sequence[bytes]) -> int:
        """Announce chunks in the node's name."""
        return int((await self._client.call("announce_chunks", {"keys": b"".join(keys)}))["stored"])

    async def withdraw(
        self, files: Sequence[bytes] = (), *, chunks: Sequence[bytes] = (), everything: bool = False
    ) -> None:
        """Take back announcements."""
        await self._client.call(
            "withdraw", {"files": list(files), "chunks": b"".join(chunks), "all": everything}
        )

    async def put_metadata(self, file_hash: bytes, name: str, size: int, manifest_hash: bytes) -> int:
        """Publish a record in the node's name."""
        args = {"file_hash": file_hash, "name": name, "size": size, "manifest_hash": manifest_hash}
        return int((await self._client.call("put_metadata", args))["stored"])

    async def get_metadata(self, file_hash: bytes, deadline_s: float) -> list[MetadataHint]:
        """Return what publishers say about a file."""
        answer = await self._client.call("get_metadata", {"file_hash": file_hash, "deadline_s": deadline_s})
        return [MetadataHint(*record) for record in answer["records"]]

    async def routing(self) -> list[NodeHint]:
        """Return the node's DHT contacts."""
        return [NodeHint(*node) for node in (await self._client.call("routing", {}))["nodes"]]

    async def stats(self) -> dict[str, Any]:
        """Return the DHT's counters."""
        return await self._client.call("dht_stats", {})

    async def close(self) -> None:
        """Hold nothing."""


async def serve_discovery(discovery: Discovery, op: str, args: dict[str, Any]) -> dict[str, Any] | None:
    """The agent's side: answer one request of a `NodeDiscovery`, None if `op` is not one."""
    match op:
        case "find_file_peers":
            found = discovery.find_file_peers(_hash(args["file_hash"]), int(args["want"]), float(args["deadline_s"]))
            return {"peers": [_peer(hint) async for hint in found]}
        case "find_chunk_peers":
            return await _find_chunk_peers(discovery, args)
        case "announce_files":
            return {"stored": await discovery.announce_files([(_hash(h), int(have)) for h, have in args["files"]])}
        case "announce_chunks":
            return {"stored": await discovery.announce_chunks(_hashes(args["keys"]))}
        case "withdraw":
            files, chunks = [_hash(item) for item in args["files"]], _hashes(args["chunks"])
            await discovery.withdraw(files, chunks=chunks, everything=bool(args["all"]))
            return {}
        case "put_metadata":
            stored = await discovery.put_metadata(
                _hash(args["file_hash"]), str(args["name"]), int(args["size"]), _hash(args["manifest_hash"])
            )
            return {"stored": stored}
        case "get_metadata":
            records = await discovery.get_metadata(_hash(args["file_hash"]), float(args["deadline_s"]))
            return {"records": [[r.name, r.size, r.manifest_hash, r.publisher] for r in records]}
        case "routing":
            return {"nodes": [[n.node_id, n.ip, n.port] for n in await discovery.routing()]}
        case "dht_stats":
            return await discovery.stats()
    return None


async def _find_chunk_peers(discovery: Discovery, args: dict[str, Any]) -> dict[str, Any]:
    keys = _hashes(args["keys"])
    index_of = {key: number for number, key in enumerate(keys)}
    peers: dict[PeerHint, int] = {}
    pairs = []
    async for key, hint in discovery.find_chunk_peers(keys, int(args["want"]), float(args["deadline_s"])):
        pairs.append([index_of[key], peers.setdefault(hint, len(peers))])
    return {"peers": [_peer(hint) for hint in peers], "pairs": pairs}


def _peer(hint: PeerHint) -> list[Any]:
    return [hint.node_id, hint.ip, hint.port, hint.source]


def _hash(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ValueError("expected a hash of 32 bytes")
    return value


def _hashes(value: Any) -> list[bytes]:
    if not isinstance(value, bytes) or len(value) % 32:
        raise ValueError("expected hashes of 32 bytes")
    return [value[at : at + 32] for at in range(0, len(value), 32)]
