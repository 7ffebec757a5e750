"""The small questions to a peer's data port: its view of a swarm, manifests, its health. One coroutine each.

Uses the one HTTP client there is (the receiver); bodies are bounded, deadlines are the receiver's plus what the
question itself allows to wait.
"""

from __future__ import annotations

from fastcas.errors import FastCASError
from fastcas.fetch._receiver import Connection
from fastcas.fetch.receiver import AsyncReceiver, Outcome, error_of
from fastcas.fetch.swarmview import SWARM_BODY_MAX, SwarmAnswer, parse_swarm, swarm_target
from fastcas.fetch.trust import check_manifest
from fastcas.ids import PeerAddr, short
from fastcas.limits import FIRST_BYTE_S, MANIFEST_SIZE_MAX
from fastcas.metadata import Manifest

__all__ = ["ask_health", "ask_swarm", "fetch_manifest"]


async def _get(
    receiver: AsyncReceiver,
    connection: Connection,
    peer: PeerAddr,
    subject: str,
    target: str,
    max_length: int,
    expected_hash: bytes | None = None,
    first_byte_s: float = 0.0,
) -> bytes:
    answer = await receiver.get(
        connection, target, max_length=max_length, expected_hash=expected_hash, first_byte_s=first_byte_s
    )
    if answer.outcome != Outcome.OK:
        raise error_of(answer, subject, peer)
    return answer.body or b""


async def ask_swarm(
    receiver: AsyncReceiver,
    connection: Connection,
    peer: PeerAddr,
    file_hash: bytes,
    manifest: Manifest | None,
    manifest_hash: bytes | None,
    *,
    since: int | None = None,
    wait_ms: int = 0,
    data_port: int | None = None,
    node_id: str | None = None,
) -> SwarmAnswer:
    """Ask a peer what it has of a file and whom else it knows.

    Args:
        manifest: Where it is known: its have-information is understood only then.
        manifest_hash: Which cutting the question is about.
        since: Generation of its last answer.
        wait_ms: How long it may wait until something is new.
        data_port, node_id: Ours, if we serve.
    Raises:
        FastCASError: One of the tree, saying what the peer did.
    """
    target = swarm_target(file_hash, manifest_hash, since=since, wait_ms=wait_ms, data_port=data_port, node_id=node_id)
    body = await _get(
        receiver, connection, peer, f"swarm of {short(file_hash)}", target, SWARM_BODY_MAX,
        first_byte_s=FIRST_BYTE_S + wait_ms / 1000,
    )  # fmt: skip
    try:
        return parse_swarm(body, None if manifest is None else manifest.n_total)
    except FastCASError as exc:
        raise type(exc)(f"swarm of {short(file_hash)}: {peer}: {exc}") from exc


async def fetch_manifest(
    receiver: AsyncReceiver, connection: Connection, peer: PeerAddr, manifest_hash: bytes, file_hash: bytes
) -> Manifest:
    """Fetch a manifest by its hash and check that it describes the file.

    Raises:
        ManifestCorrupt: It describes another file, or is malformed.
        ChunkCorrupt: The bytes do not hash to `manifest_hash`.
        FastCASError: Another of the tree, saying what the peer did.
    """
    data = await _get(
        receiver, connection, peer, f"manifest {short(manifest_hash)}", f"/manifests/{manifest_hash.hex()}",
        MANIFEST_SIZE_MAX, manifest_hash,
    )  # fmt: skip
    return check_manifest(data, manifest_hash, file_hash)


async def ask_health(receiver: AsyncReceiver, connection: Connection, peer: PeerAddr) -> None:
    """Return when the peer's `/health` answers 200.

    Raises:
        FastCASError: One of the tree, saying what the peer did.
    """
    await _get(receiver, connection, peer, "health", "/health", 4096)
