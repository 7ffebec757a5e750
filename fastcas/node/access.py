"""One way to do a command: through the node that runs on a storage folder, or on the folder itself.

`open_access` finds out which. Both sides take and return the same plain maps, so that commands and one-liners do
not care. Blocking; for one thread. Each way imports what it needs when it is taken: a command that fetches without a
storage folder waits for neither catalog nor DHT.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Protocol

from fastcas.config import read_network_key
from fastcas.errors import FastCASError, NetworkError, NodeUnavailable, NoPeers, StoreLocked, StoreNotFound
from fastcas.ids import Link, PeerAddr, parse_member, parse_peer, parse_ref, short
from fastcas.limits import FETCH_TIMEOUT_S, STALL_TIMEOUT_S

if TYPE_CHECKING:
    from fastcas.fetch import FetchedTree
    from fastcas.node.control_client import ControlClient
    from fastcas.peers.discovery import Discovery
    from fastcas.store import Store

__all__ = ["Access", "FolderAccess", "NodeAccess", "check_reachable", "dht_client", "open_access"]

log = logging.getLogger(__name__)

OnProgress = Callable[[dict[str, Any]], None]
RESTART_S = 5.0  # an agent that died is replaced within that
POLL_S = 0.05
PEERS_WANT = 64
PEERS_DEADLINE_S = 10.0


class Access(Protocol):
    """Where commands go."""

    is_node: bool

    def call(
        self, op: str, args: dict[str, Any], fds: Sequence[int] = (), on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Do one operation and return its result.

        Raises:
            FastCASError: It failed.
        """

    def close(self) -> None:
        """Let go. Idempotent."""


class NodeAccess:
    """Commands go to the running node."""

    is_node = True

    def __init__(self, client: ControlClient) -> None:
        self._client = client

    def call(
        self, op: str, args: dict[str, Any], fds: Sequence[int] = (), on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """See `Access`."""
        return self._client.call(op, args, fds, on_progress)

    def close(self) -> None:
        """Hang up; what runs is cancelled."""
        self._client.close()


class FolderAccess:
    """Commands run in this process. The folder is locked meanwhile; it may be absent for `get` and `peers`."""

    is_node = False

    def __init__(self, root: Path, store: Store | None) -> None:
        self._root = root
        self._store = store

    def call(
        self, op: str, args: dict[str, Any], fds: Sequence[int] = (), on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """See `Access`."""
        if op == "get":
            return asyncio.run(_get(self._store, args, on_progress))
        if op == "peers":
            return asyncio.run(_peers(args))
        from fastcas.node.operations import LOCAL_OPERATIONS, Operations
        from fastcas.store.paths import shown

        if self._store is None:
            raise StoreNotFound(f"{shown(self._root)}: no such storage folder")
        if op == "status":
            return {"node_id": None, "storage": str(self._root), "store": dict(self._store.stats())}
        if op == "verify":
            return asyncio.run(_verify(self._store, args, on_progress))
        if op not in LOCAL_OPERATIONS:
            raise NodeUnavailable(f"{op}: no node is running on {shown(self._root)}")
        return Operations(self._store).run(op, args, fds, on_progress)

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()
            self._store = None


def open_access(root: Path, *, create: bool = False, optional: bool = False) -> Access:
    """Return the way to a storage folder.

    Args:
        root: The folder.
        create: Make it where it is missing.
        optional: It need not be there, nor be free: the command only profits from it.
    A folder in use that has a control socket where nobody listens belongs to a node whose agent is being replaced:
    that is waited for, up to 5 s.

    Raises:
        StoreNotFound: No such folder (and neither `create` nor `optional`).
        StoreLocked: In use by another command (and not `optional`).
        PermissionDenied: The operating system refuses.
    """
    if optional and not create and _is_absent(root):
        return FolderAccess(root, None)
    from fastcas.node.control_client import ControlClient
    from fastcas.node.folder import SOCKET_NAME
    from fastcas.store import Store

    until = None
    while True:
        try:
            return NodeAccess(ControlClient(root))
        except NodeUnavailable:
            pass
        try:
            return FolderAccess(root, Store.open(root, create=create))
        except StoreNotFound:
            if not optional:
                raise
            return FolderAccess(root, None)
        except StoreLocked:
            if until is None and os.path.lexists(root / SOCKET_NAME):
                until = monotonic() + RESTART_S
            if until is None or monotonic() >= until:
                if not optional:
                    raise
                return FolderAccess(root, None)
        sleep(POLL_S)


def _is_absent(root: Path) -> bool:
    try:
        os.lstat(root)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


@contextlib.asynccontextmanager
async def dht_client(args: dict[str, Any], link: Link, *, is_needed: bool) -> AsyncIterator[Discovery | None]:
    """Ask a DHT for the time of one command; None without a bootstrap node.

    The DHT nodes that the link names are bootstrap nodes where nobody else can be asked.

    Raises:
        NetworkError: "DHT bootstrap failed": none of them answers, and there is nobody else to ask.
    """
    bootstrap = [parse_peer(str(text), "--bootstrap") for text in args.get("bootstrap", [])]
    if is_needed:
        bootstrap += link.dht
    if not bootstrap:
        yield None
        return
    from fastcas.peers.dht_process import DhtProcess

    timeout_s = float(args.get("timeout_s", FETCH_TIMEOUT_S))
    key = read_network_key(str(args["network_key"])) if args.get("network_key") else None
    dht = DhtProcess([(peer.ip, peer.port) for peer in bootstrap], network_key=key)
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await dht.start()
        except TimeoutError:
            names = ", ".join(map(str, bootstrap))
            raise NetworkError(f"DHT bootstrap failed: no answer from {names} within {timeout_s:g} s") from None
        if is_needed:
            dht.require_contacts()
        yield dht.discovery
    finally:
        await dht.close()


async def _here(function: Callable[..., Any], *values: Any) -> Any:
    await asyncio.sleep(0)  # an interrupt is noticed here
    return function(*values)


async def _verify(store: Store, args: dict[str, Any], on_progress: OnProgress | None) -> dict[str, Any]:
    from fastcas.node.operations import Operations
    from fastcas.node.verifying import RepairPeers, report_to_map, run_scrub

    def progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress({"done": done, "total": total})

    named = [parse_peer(str(text), "--peer") for text in args.get("peers", [])]
    scrub = Operations(store).begin_verify(args, can_ask=bool(named))
    peers = RepairPeers(named) if named and args.get("repair") else None
    try:
        report = await run_scrub(scrub, _here, peers=peers, rate_Bps=args.get("rate_Bps"), progress=progress)
    finally:
        if peers is not None:
            peers.close()
    return report_to_map(report)


async def _peers(args: dict[str, Any]) -> dict[str, Any]:
    from fastcas.peers.discovery import CompositeDiscovery, StaticDiscovery

    link = parse_ref(str(args["ref"]))
    named = [parse_peer(str(text), "--peer") for text in args.get("peers", [])]
    deadline_s = min(float(args.get("timeout_s", FETCH_TIMEOUT_S)), PEERS_DEADLINE_S)
    async with dht_client(args, link, is_needed=not named) as dht:
        backends: list[Discovery] = [StaticDiscovery(named)]
        if dht is not None:
            backends.append(dht)
        found = CompositeDiscovery(backends).find_file_peers(link.file_hash, PEERS_WANT, deadline_s)
        peers = [[hint.node_id, hint.ip, hint.port, hint.source] async for hint in found]
        return {"peers": peers, "dht": await dht.stats() if dht is not None else None}


async def _get(store: Store | None, args: dict[str, Any], on_progress: OnProgress | None) -> dict[str, Any]:
    from fastcas.fetch.download import download
    from fastcas.fetch.origin import parse_origin
    from fastcas.fetch.pacing import Pace
    from fastcas.node.download_report import ProgressRelay, result_to_map

    link = parse_member(str(args["ref"]))
    choice = None
    if args.get("include") or args.get("exclude"):
        from fastcas.fetch.choosing import choice_of

        choice = choice_of(args)
    peers = [parse_peer(str(text), "--peer") for text in args.get("peers", [])]
    timeout_s = float(args.get("timeout_s", FETCH_TIMEOUT_S))
    stall_s = float(args.get("stall_timeout_s", STALL_TIMEOUT_S))
    raw, force = bool(args.get("raw")), bool(args.get("force"))
    seeds: list[Path] = []
    if args.get("seed_from"):
        from fastcas.node.operations import seeds_of

        seeds = seeds_of(args)
    relay = ProgressRelay(on_progress)
    out = Path(os.fsdecode(args["out"])) if args.get("out") is not None else None
    folder = Path(os.fsdecode(args["folder"]))
    if store is not None:
        from fastcas.node.export import export

        here = export(store, link, out, folder, raw=raw, force=force, choice=choice, progress=relay.bytes)
        if here is not None:
            return here
    origins = [parse_origin(str(url)) for url in args.get("origins", [])]
    known = list(store.manifests_of(link.file_hash)) if origins and store is not None else []
    if not known:
        check_reachable(link, peers, args)
    rate = args.get("max_download_Bps")
    hooks = reservation = None
    if store is not None:
        from fastcas.node.reservation import Reservation

        hooks, reservation = _Finished(), Reservation(store, _here)
    try:
        async with dht_client(args, link, is_needed=not peers and not link.peers) as dht:
            result = await download(
                link, out, folder=folder, discovery=dht, peers=peers, local=store, timeout_s=timeout_s,
                stall_timeout_s=stall_s, hooks=hooks, progress=relay, raw=raw, force=force, origins=origins,
                pace=Pace(rate) if rate else None, known=known, reserve=reservation, seed_from=seeds,
                choice=choice,
            )  # fmt: skip
    finally:
        if reservation is not None:
            await reservation.release()
    if store is not None and hooks is not None:
        for path, manifest, is_proven in hooks.files:
            if is_proven:
                _remember(store, path, manifest)
        for tree in hooks.trees:
            _remember_tree(store, tree)
    return result_to_map(result)


def check_reachable(link: Link, peers: list[PeerAddr], args: dict[str, Any]) -> None:
    """Raise NoPeers where there is nobody to ask."""
    if not peers and not link.peers and not link.dht and not args.get("bootstrap"):
        raise NoPeers(
            f"no peer has {link.file_hash.hex()}: none is known; name one with --peer, a DHT node with --bootstrap, "
            "or run a node on this storage folder"
            + ("; an origin gives bytes only, and no manifest is known to prove them by" if args.get("origins") else "")
        )


class _Finished:
    """Hooks that remember what is finished."""

    def __init__(self) -> None:
        self.files: list[tuple[Path, Any, bool]] = []
        self.trees: list[FetchedTree] = []

    def on_manifest(self, manifest: Any, part_path: Path) -> None:
        """Nothing is served while it runs."""

    def on_chunk(self, index: int) -> None:
        """Nothing is served while it runs."""

    def on_finished(self, path: Path, manifest: Any, content_proven: bool) -> None:
        """Remember it."""
        self.files.append((path, manifest, content_proven))

    def on_tree(self, tree: FetchedTree) -> None:
        """Remember it."""
        self.trees.append(tree)

    def member(self) -> _Finished:
        """Files of a collection are remembered with it."""
        return self

    def end(self) -> None:
        """Nothing is served while it runs."""


def _remember(store: Store, path: Path, manifest: Any) -> None:
    """Note that a file can be seeded in place; that it cannot is no reason to fail."""
    try:
        store.register_linked(path, manifest, path.name, verified=True)
    except FastCASError as error:
        log.warning("file=%s is not remembered: %s", short(manifest.file_hash), error)


def _remember_tree(store: Store, tree: FetchedTree) -> None:
    """Keep what serving a collection needs beside its folder; likewise."""
    try:
        store.register_tree(
            tree.path, tree.collection, tree.manifest, tree.name, members=tree.members, identities=tree.identities
        )
    except FastCASError as error:
        log.warning("collection=%s is not remembered: %s", short(tree.manifest.file_hash), error)
