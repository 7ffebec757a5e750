"""Who asked this node about a file: callers that gave a data port, once they answered a health check there.

They become the `peers` that workers tell others about (`swarm` snapshot): at most 50 per file, forgotten 15 minutes
after they were last seen, or once they are silent for 20 s and do not answer another health check. Only a caller's own
source address is ever dialled, at most 16 at a time and one address not more often than every 30 s, so that nobody can
aim our checks at somebody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastcas.limits import SWARM_PEERS_MAX
from fastcas.table.snapshot import SwarmEntry

__all__ = ["SwarmBook"]

log = logging.getLogger(__name__)

CHECK_S = 3.0
CHECKS_MAX = 16
AGAIN_S = 30.0
KEEP_S = 900.0
SWEEP_S = 10.0
SILENT_S = 20.0
PUBLISH_S = 0.05  # changes within this time go out together
FILES_MAX = 16_384
ADDRESSES_MAX = 65_536
_NODE_ID = re.compile(r"[0-9a-f]{40}", re.ASCII)

Address = tuple[str, int]


class SwarmBook:
    """What workers may tell about peers. Belongs to the loop's thread.

    Args:
        own_id: Our node id: a caller with it is ourselves.
        publish: Called with {file_hash: {"peers": …, "manifests": …}} when something changed.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        own_id: str,
        publish: Callable[[dict[bytes, SwarmEntry]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own_id = own_id
        self._publish = publish
        self._clock = clock
        self._files: OrderedDict[bytes, dict[Address, tuple[str, float]]] = OrderedDict()
        self._checked: OrderedDict[Address, tuple[float, bool]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to forget what is old."""
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def peers_of(self, file_hash: bytes) -> list[tuple[str, str, int]]:
        """Return [(node_id, ip, port)] known for a file."""
        return [(node_id, ip, port) for (ip, port), (node_id, _) in self._files.get(file_hash, {}).items()]

    def on_peer(self, event: dict[str, Any]) -> None:
        """Take a worker's event {file_hash, node_id, ip, port}; what is malformed is dropped."""
        match event:
            case {"file_hash": bytes(file_hash), "node_id": str(node_id), "ip": str(ip), "port": int(port)}:
                pass
            case _:
                return
        if len(file_hash) != 32 or not _NODE_ID.fullmatch(node_id) or node_id == self._own_id:
            return
        if not 1024 <= port <= 65535:
            return
        with contextlib.suppress(ValueError):
            ip = str(ipaddress.ip_address(ip))
            self._seen(file_hash, node_id, (ip, port))

    def _seen(self, file_hash: bytes, node_id: str, address: Address) -> None:
        now = self._clock()
        checked_at, answered = self._checked.get(address, (float("-inf"), False))
        if now - checked_at < AGAIN_S:
            if answered:
                self._add(file_hash, node_id, address)
            return
        if len(self._tasks) >= CHECKS_MAX:
            return
        self._checked[address] = (now, False)
        self._checked.move_to_end(address)
        while len(self._checked) > ADDRESSES_MAX:
            self._checked.popitem(last=False)
        task = asyncio.get_running_loop().create_task(self._check(file_hash, node_id, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, file_hash: bytes, node_id: str, address: Address) -> None:
        if await _is_healthy(address):
            self._checked[address] = (self._clock(), True)
            self._add(file_hash, node_id, address)
        else:
            log.debug("peer does not answer its health check ip=%s port=%d", *address)

    def _add(self, file_hash: bytes, node_id: str, address: Address) -> None:
        peers = self._files.setdefault(file_hash, {})
        self._files.move_to_end(file_hash)
        is_new = peers.get(address, ("", 0.0))[0] != node_id
        peers.pop(address, None)
        peers[address] = (node_id, self._clock())
        while len(peers) > SWARM_PEERS_MAX:
            del peers[next(iter(peers))]
        while len(self._files) > FILES_MAX:
            self._files.popitem(last=False)
        if is_new:
            self._changed()

    def _sweep(self) -> None:
        limit = self._clock() - KEEP_S
        changed = False
        for file_hash, peers in list(self._files.items()):
            for address in [a for a, (_, seen_at) in peers.items() if seen_at < limit]:
                del peers[address]
                changed = True
            if not peers:
                del self._files[file_hash]
        if changed:
            self._changed()
        self._recheck()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _recheck(self) -> None:
        """Ask those again who have been silent, a few at a time, the longest unasked first."""
        now = self._clock()
        silent = {a for peers in self._files.values() for a in peers}
        silent -= {a for peers in self._files.values() for a, (_, at) in peers.items() if now - at < SILENT_S}
        due = [a for a in silent if now - self._checked.get(a, (float("-inf"), False))[0] >= AGAIN_S]
        due.sort(key=lambda a: self._checked.get(a, (float("-inf"), False))[0])
        for address in due[: max(CHECKS_MAX - len(self._tasks), 0)]:
            self._checked[address] = (now, True)
            task = asyncio.get_running_loop().create_task(self._check_again(address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _check_again(self, address: Address) -> None:
        if await _is_healthy(address):
            return
        log.debug("peer is gone ip=%s port=%d", *address)
        self._checked[address] = (self._clock(), False)
        for file_hash, peers in list(self._files.items()):
            if peers.pop(address, None) is not None and not peers:
                del self._files[file_hash]
        self._changed()

    def _changed(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PUBLISH_S, self._publish_now)

    def _publish_now(self) -> None:
        self._timer = None
        # Proven manifests come from the table, which changes with the store; here only peers are told.
        self._publish({file_hash: {"peers": self.peers_of(file_hash), "manifests": []} for file_hash in self._files})

    async def close(self) -> None:
        """End the checks. Idempotent."""
        for timer in (self._timer, self._sweeper):
            if timer is not None:
                timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _is_healthy(address: Address) -> bool:
    """Whether GET /health there answers 200 within 3 s."""
    ip, port = address
    host = f"[{ip}]" if ":" in ip else ip
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(CHECK_S):
            reader, writer = await asyncio.open_connection(ip, port, limit=1024)
            writer.write(f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            line = await reader.readuntil(b"\r\n")
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return line.startswith((b"HTTP/1.1 200 ", b"HTTP/1.0 200 "))
