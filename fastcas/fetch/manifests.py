"""A manifest by itself, from one of several peers: for who wants to know a file without fetching it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastcas.errors import FastCASError, ManifestNotFound
from fastcas.fetch._receiver import Connection
from fastcas.fetch.downloader import resolve
from fastcas.fetch.http_small import ask_swarm, fetch_manifest
from fastcas.fetch.receiver import AsyncReceiver
from fastcas.ids import PeerAddr, short
from fastcas.limits import FETCH_TIMEOUT_S
from fastcas.metadata import Manifest

__all__ = ["find_manifest"]


async def find_manifest(
    file_hash: bytes,
    manifest_hash: bytes | None,
    peers: Sequence[PeerAddr],
    *,
    timeout_s: float = FETCH_TIMEOUT_S,
) -> Manifest:
    """Return a manifest of a file from the first of some peers that gives one.

    Args:
        manifest_hash: Which one; None: the first that a peer says it has proven. Such a manifest describes the file's
            hash, but its chunks are proven only by a download.
        peers: Tried in order.
        timeout_s: For all of them together, seconds.
    Raises:
        ManifestNotFound: None gave one in time; the message says what each did.
    """
    did: list[str] = []
    receiver = AsyncReceiver(n_threads=1)
    try:
        async with asyncio.timeout(timeout_s):
            for named in peers:
                try:
                    peer = await resolve(named.ip, named.port)
                    connection = receiver.open(peer)
                except FastCASError as exc:
                    did.append(str(exc))
                    continue
                try:
                    return await _from_peer(receiver, connection, peer, file_hash, manifest_hash)
                except FastCASError as exc:
                    did.append(str(exc))
                finally:
                    connection.close()
    except TimeoutError:
        did.append(f"nothing within {timeout_s:g} s")
    finally:
        receiver.close()
    raise ManifestNotFound(f"file {short(file_hash)}: no manifest: {'; '.join(did) or 'no peer is known'}")


async def _from_peer(
    receiver: AsyncReceiver, connection: Connection, peer: PeerAddr, file_hash: bytes, manifest_hash: bytes | None
) -> Manifest:
    wanted = [manifest_hash] if manifest_hash is not None else []
    if not wanted:
        answer = await ask_swarm(receiver, connection, peer, file_hash, None, None)
        wanted = list(answer.manifests)
    error: FastCASError = ManifestNotFound(f"{peer}: offers no manifest")
    for candidate in wanted:
        try:
            return await fetch_manifest(receiver, connection, peer, candidate, file_hash)
        except FastCASError as exc:
            error = exc
    raise error
